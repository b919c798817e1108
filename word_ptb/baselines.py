"""Presets of the other cores: their authors' recipes, and small versions for two CPU cores."""

from typing import Any

_CARRIED = {"repack": True, "seq_len": 0, "aux": 0.0}
_UNREGULARISED = {
    "dropout": 0.0, "dropouti": 0.0, "dropouth": 0.0, "emb_dropout": 0.0, "wdrop": 0.0, "alpha": 0.0, "beta": 0.0,
    "wdecay": 0.0,
}  # fmt: skip

# Recipe from the README of AWD-LSTM. The presets `…-finetune` are for its second program.
_AWD_LSTM = {
    "model": "awd-lstm", **_CARRIED, "nlevels": 3, "emsize": 400, "nhid": 1150, "nout": 400, "dropout": 0.4,
    "dropouti": 0.4, "dropouth": 0.25, "emb_dropout": 0.1, "wdrop": 0.5, "alpha": 2.0, "beta": 1.0, "wdecay": 1.2e-6,
    "horizon": 70, "random_length": True, "lr": 30.0, "clip": 0.25, "anneal": 0, "nonmono": 5, "epochs": 500,
    "batch_size": 20, "eval_batch_size": 10, "seed": 141,
}  # fmt: skip
# Learning to recite: memorise the training text, without regularisation.
_RECITE = {
    **_UNREGULARISED, "recite": True, "nonmono": 0, "lr": 5.0, "momentum": 0.9, "decay": 1 / 0.97, "epochs": 150,
    "seed": 0,
}  # fmt: skip
# Settings of TrellisNet's preset `small` that the other cores share.
_SMALL = {
    **_UNREGULARISED, "emsize": 200, "nout": 200, "horizon": 30, "batch_size": 10, "dropout": 0.25, "dropouti": 0.1,
    "dropouth": 0.1, "wdecay": 1.2e-6, "lr": 20.0, "clip": 0.225, "epochs": 9, "when": [6, 8], "anneal": 10, "aux": 0.0,
}  # fmt: skip
_SMALL_CARRIED = {**_SMALL, **_CARRIED}
# `ptb_sota` of the authors' TensorFlow code. Their loss is a sum over the 35 steps of a window and ours a mean, so
# their learning rate of 0.2, clip of 10 and weight decay of 1e-7 are rescaled.
_STEPS = 35
_RHN = {
    **_UNREGULARISED, "model": "rhn", **_CARRIED, "horizon": _STEPS, "dropout": 0.75, "dropouti": 0.75,
    "dropouth": 0.25, "emb_dropout": 0.25, "emb_dropout_rows": True, "wdecay": 1e-7 / _STEPS, "lr": 0.2 * _STEPS,
    "clip": 10 / _STEPS, "decay": 1.02, "decay_from": 20, "anneal": 0, "epochs": 500, "batch_size": 20,
    "eval_batch_size": 20,
}  # fmt: skip
# Width for each depth, from the table in the authors' README.
RHN_WIDTHS = {1: 1275, 2: 1180, 3: 1110, 4: 1050, 5: 1000, 6: 960, 7: 920, 8: 890, 9: 860, 10: 830}


def _rhn(depth: int) -> dict[str, Any]:
    width = RHN_WIDTHS[depth]
    return {**_RHN, "nlevels": depth, "emsize": width, "nhid": width, "nout": width}


# Recipe of Yang et al. (2018) for the Penn Treebank, without dynamic evaluation.
_AWD_LSTM_MOS = {
    **_AWD_LSTM, "n_experts": 15, "emsize": 280, "nhid": 960, "nout": 620, "dropoutl": 0.29, "dropouth": 0.225,
    "lr": 20.0, "batch_size": 12, "epochs": 1000, "seed": 28,
}  # fmt: skip
_SPARSE_LSTM = {**_AWD_LSTM, "model": "sparse-lstm"}
_SPARSE_HIDDEN = {**_SPARSE_LSTM, "sparse_mode": "sparse_hidden", "sparse_fract": 0.66666, "nhid": 1725}
_PRESETS = {
    "awd-lstm": _AWD_LSTM,
    "awd-lstm-finetune": {**_AWD_LSTM, "finetune": True},
    "awd-lstm-mos": _AWD_LSTM_MOS,
    "awd-lstm-mos-finetune": {**_AWD_LSTM_MOS, "finetune": True, "lr": 25.0},
    "awd-lstm-small": {**_SMALL_CARRIED, "model": "awd-lstm", "nlevels": 2, "nhid": 347, "wdrop": 0.1},
    "awd-lstm-recite": {**_AWD_LSTM, **_RECITE},
    "tcn": {
        **_UNREGULARISED, "model": "tcn", "nlevels": 4, "ksize": 3, "emsize": 600, "nhid": 600, "nout": 600,
        "dropouth": 0.45, "dropouti": 0.25, "aux": 0.0, "horizon": 40, "seq_len": 80, "lr": 4.0, "clip": 0.35,
        "anneal": 0, "anneal_recent": 5, "anneal_by": 2.0, "epochs": 100, "eval_batch_size": 10,
    },
    "tcn-small": {
        **_SMALL, "model": "tcn", "nlevels": 5, "ksize": 3, "nhid": 200, "dropout": 0.0, "dropouth": 0.2,
        "horizon": 40, "seq_len": 120, "lr": 4.0,
    },
    "rhn": _rhn(10),
    **{f"rhn-depth-{depth}": _rhn(depth) for depth in RHN_WIDTHS},
    # For the mean over a window of 30, the authors' rate of 0.2 is 6.
    "rhn-small": {
        **_SMALL_CARRIED, "model": "rhn", "nlevels": 5, "emsize": 248, "nhid": 248, "nout": 248, "lr": 6.0,
        "clip": 10 / 30,
    },
    "sparse-lstm": _SPARSE_HIDDEN,
    "sparse-lstm-finetune": {**_SPARSE_HIDDEN, "finetune": True, "min_epochs": 100},
    "sparse-lstm-small": {
        **_SMALL_CARRIED, "model": "sparse-lstm", "sparse_mode": "sparse_hidden", "sparse_fract": 0.66666,
        "nlevels": 2, "nhid": 520, "wdrop": 0.1,
    },
    "sparse-lstm-recite": {**_SPARSE_LSTM, **_RECITE},
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {name: {"name": name, **values} for name, values in _PRESETS.items()}
