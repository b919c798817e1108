"""Settings and model of character-level PTB, enwik8 and text8. Defaults are those of the authors' released script."""

from dataclasses import dataclass
from typing import Any, ClassVar

from trellisnet.data import PROJECT, wikipedia
from trellisnet.data.corpus import Corpus
from trellisnet.data.spelling import BYTES, STREAMS, Spelling
from trellisnet.errors import UserError
from trellisnet.evaluation.adaptation import AdaptiveConfig
from trellisnet.models import TrellisLanguageModel
from trellisnet.training.language_model import build_model
from trellisnet.training.settings import setting
from trellisnet.training.tasks import CharacterModeling

__all__ = ["Config", "build_model"]

# `enwik8_sota` and `text8_sota` of the authors' TensorFlow code. Their loss is a sum over the 50 steps of a window and
# ours a mean, so their learning rate of 0.2, clip of 10 and weight decay of 1e-7 are rescaled.
_STEPS = 50
_RHN = {
    "model": "rhn", "tied": False, "nlevels": 10, "nhid": 1500, "nout": 1500, "gate_bias": -4.0, "dropout": 0.4,
    "dropouti": 0.4, "dropouth": 0.1, "emb_dropout": 0.1, "emb_dropout_rows": True, "aux": 0.0, "horizon": _STEPS,
    "optim": "SGD", "lr": 0.2 * _STEPS, "clip": 10 / _STEPS, "wdecay": 1e-7 / _STEPS, "decay": 1.03, "decay_from": 5,
    "when": [-1], "epochs": 500, "batch_size": 128, "eval_batch_size": 128,
}  # fmt: skip
# TrellisNets of the same size. The settings are ours: those of Table 5 for characters, with the number of epochs for
# WikiText-103, a corpus of about the same size.
_WIKIPEDIA = {
    "emsize": 512, "nout": 512, "nlevels": 125, "horizon": 125, "aux_freq": 70, "emb_dropout": 0.0, "dropouth": 0.1,
    "wdrop": 0.1, "wdecay": 0.0, "epochs": 25, "when": [15, 20],
}  # fmt: skip


# What the presets `small`, `grow` and `medium` share.
SMALL = {
    "emsize": 64, "nhid": 256, "nout": 64, "nlevels": 8, "horizon": 80, "batch_size": 8,
    "lr": 1e-2, "dropout": 0.0, "dropouti": 0.0, "dropouth": 0.0, "emb_dropout": 0.0, "wdrop": 0.0,
    "aux_freq": 2, "epochs": 5, "when": [-1], "decay": 2.0,
}  # fmt: skip


@dataclass(kw_only=True)
class Config(AdaptiveConfig):
    """Train a TrellisNet on character-level Penn Treebank, enwik8 or text8."""

    task: ClassVar[str] = "char_ptb"
    data_settings: ClassVar = ("data", "dataset", "stream")
    default_data: ClassVar[str] = "data/penn"
    presets: ClassVar = {
        "default": {},
        # Table 5, "Char-PTB"; the released script decides what the table omits (dropouti, nout, epochs of decay).
        "paper": {
            "name": "paper", "nhid": 1000, "nlevels": 125, "horizon": 125, "aux_freq": 70, "emb_dropout": 0.0,
            "dropouth": 0.3, "wdrop": 0.25, "wdecay": 1e-6,
        },
        # An hour on two CPU cores with --precision bf16. Without dilation, the tied layers act as the steps of an LSTM
        # and learn faster. The gains of weight normalisation start small; a high learning rate and small batches get
        # past the first plateau.
        "small": {"name": "small", **SMALL},
        # As long as `small`, to within a tenth, but with twelve layers at the end.
        "grow": {
            "name": "grow", **SMALL, "nlevels": 12, "grow": ["2:2", "6:2"], "epochs": 6, "decay": 1.0,
            "schedule": "cosine",
        },
        # Five to six hours on one CPU core in bf16, half of the epochs with 8 layers; wider and trained for longer than
        # `small`, hence with some dropout and DropConnect.
        "medium": {
            "name": "medium", **SMALL, "nhid": 336, "nlevels": 12, "grow": ["8:7"], "epochs": 14, "decay": 1.0,
            "schedule": "cosine", "aux_freq": 4, "dropout": 0.05, "dropouth": 0.1, "wdrop": 0.1,
            "eval_depths": [16, 24], "eval_nlevels": -1,
        },
        # A few minutes on two CPU cores.
        "tiny": {
            "name": "tiny", "emsize": 24, "nhid": 40, "nout": 24, "nlevels": 5, "horizon": 50, "batch_size": 40,
            "dropout": 0.0, "dropouti": 0.0, "dropouth": 0.0, "emb_dropout": 0.0, "wdrop": 0.0, "aux": 0.0,
            "epochs": 2, "when": [1], "lr": 6e-3,
        },
        # Recipe from the README of AWD-LSTM, for the stream of its published scores.
        "awd-lstm": {
            "name": "awd-lstm", "model": "awd-lstm", "stream": "standard", "nhid": 1000, "nlevels": 3, "dropouth": 0.25,
            "emb_dropout": 0.0, "wdrop": 0.5, "aux": 0.0, "horizon": 150, "random_length": True, "clip": 0.25,
            "wdecay": 1.2e-6, "epochs": 500, "when": [300, 400], "batch_size": 128,
        },
        # Defaults of the authors' script, which spells `<eos>` as five characters (49 symbols); here it is one symbol.
        "tcn": {
            "name": "tcn", "model": "tcn", "emsize": 100, "nhid": 450, "nout": 100, "nlevels": 3, "ksize": 3,
            "dropout": 0.0, "dropouti": 0.1, "dropouth": 0.1, "emb_dropout": 0.0, "wdrop": 0.0, "aux": 0.0,
            "repack": False, "horizon": 80, "seq_len": 400, "optim": "SGD", "lr": 4.0, "clip": 0.15, "wdecay": 0.0,
            "when": [-1], "anneal_recent": 3, "anneal_by": 10.0, "epochs": 100, "batch_size": 32, "eval_batch_size": 1,
        },
        "enwik8": {"name": "enwik8", "dataset": "enwik8", **_WIKIPEDIA, "nhid": 1640},
        "text8": {"name": "text8", "dataset": "text8", **_WIKIPEDIA, "nhid": 1620},
        # An untied embedding is as wide as the alphabet.
        "rhn-enwik8": {"name": "rhn-enwik8", "dataset": "enwik8", **_RHN, "emsize": 205},
        "rhn-text8": {"name": "rhn-text8", "dataset": "text8", **_RHN, "emsize": 27},
        # Their Torch script, with a wide embedding and half the depth: the 27.6M parameters of their first table.
        "rhn-enwik8-depth-5": {
            "name": "rhn-enwik8-depth-5", "dataset": "enwik8", **_RHN, "emsize": 1500, "nlevels": 5, "dropout": 0.3,
            "dropouti": 0.3, "dropouth": 0.05, "rhn_masks": "separate", "decay": 1.04, "decay_from": 6, "epochs": 1000,
            "batch_size": 100, "eval_batch_size": 100,
        },
    }  # fmt: skip

    defaults: ClassVar = {
        "name": "Trellis_charPTB", "emsize": 200, "nhid": 1050, "nout": 200, "nlevels": 140, "wnorm": True,
        "optim": "Adam", "lr": 2e-3, "clip": 0.2, "wdecay": 8e-7, "epochs": 400, "when": [220, 350], "batch_size": 24,
        "eval_batch_size": 10, "anneal": 5, "dropout": 0.1, "dropouti": 0.1, "dropouth": 0.29, "emb_dropout": 0.02,
        "wdrop": 0.26, "horizon": 140, "repack": True, "aux": 0.3, "aux_freq": 80,
    }  # fmt: skip
    helps: ClassVar = {
        "anneal": "no effect without --asgd or --finetune, as in the authors' script; see --when",
        "emb_dropout": "dropout of whole symbols of the alphabet",
        "horizon": "length of a window; without --repack: its unscored positions; auto: as many as the layers reach "
        "back",
        "data": "a text file, a folder with train.txt, valid.txt and test.txt, or 'synthetic'; enwik8 and text8: any "
        "file, or the folder that holds it; default: {default_data}, or data/NAME, in the project",
    }

    dataset: str = setting(
        "ptb", "name of the corpus; enwik8 and text8 are read byte by byte", group="data",
        choices=("ptb", *wikipedia.DATASETS),
    )  # fmt: skip
    stream: str = setting(
        "authors",
        "spelling of the text: as in the authors' code, or the standard of the literature",
        group="data",
        choices=tuple(STREAMS),
    )

    def validate(self) -> None:
        super().validate()
        if self.dataset != "ptb":
            if self.stream != self.preset_value("stream"):
                raise UserError(f"--stream: has no effect with --dataset {self.dataset}, which is read byte by byte")
            if self.order() != "appearance":
                raise UserError(
                    f"--vocab_order {self.order()}: with --dataset {self.dataset} expected appearance; bytes have no "
                    "other order, nor a sparse embedding (--emb_blocks)"
                )

    def data_folder(self) -> str:
        return super().data_folder() if self.dataset == "ptb" else self.data or str(PROJECT / "data" / self.dataset)

    def patience(self) -> int:
        """Return 0 without averaging, because the authors' script never reads its --anneal."""
        return self.anneal if self.asgd or self.finetune else 0

    def data_options(self) -> dict[str, Any]:
        return {**super().data_options(), "stream": self.stream, "dataset": self.dataset}

    @property
    def spelling(self) -> Spelling:
        return STREAMS[self.stream] if self.dataset == "ptb" else BYTES

    def make_task(self, model: TrellisLanguageModel, corpus: Corpus, **options: Any) -> CharacterModeling:
        """Build the task, scored in bits per character, for PTB with the denominators of both streams."""
        own = corpus.spelled.get(self.stream)
        symbols = {name: {split: n / own[split] for split, n in each.items()} for name, each in corpus.spelled.items()}
        return CharacterModeling(model, symbols=symbols, **options)
