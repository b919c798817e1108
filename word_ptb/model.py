"""Settings and model of word-level PTB. Defaults are those of the authors' released script."""

from dataclasses import dataclass
from typing import Any, ClassVar

from trellisnet.data.corpus import Corpus
from trellisnet.errors import UserError
from trellisnet.evaluation.adaptation import AdaptiveConfig
from trellisnet.models import TrellisLanguageModel
from trellisnet.training.language_model import build_model
from trellisnet.training.settings import setting
from trellisnet.training.tasks import LanguageModeling, Reciting
from word_ptb import baselines

__all__ = ["Config", "build_model"]


# What the presets `small`, `grow` and `medium` share.
SMALL = {
    "emsize": 200, "nhid": 100, "nout": 200, "nlevels": 8, "repack": True, "seq_len": 0,
    "horizon": 30, "batch_size": 10, "dropout": 0.25, "dropouti": 0.1, "dropouth": 0.1, "emb_dropout": 0.0,
    "wdrop": 0.0, "aux": 0.0, "alpha": 0.0, "beta": 0.0, "epochs": 9, "when": [6, 8],
}  # fmt: skip


@dataclass(kw_only=True)
class Config(AdaptiveConfig):
    """Train a TrellisNet on word-level Penn Treebank."""

    task: ClassVar[str] = "word_ptb"
    default_data: ClassVar[str] = "data/penn"
    plateau_floor: ClassVar[float] = 0.02
    presets: ClassVar = {
        "default": {},
        # Table 5, "Word-PTB (w/o MoS)"; the released script decides what the table omits (dropouti, AR, TAR, windows).
        "paper": {
            "name": "paper", "nlevels": 55, "horizon": 55, "aux_freq": 16, "wdecay": 1e-6,
        },
        # Table 5, "Word-PTB (w/ MoS)".
        "paper-mos": {
            "name": "paper-mos", "n_experts": 15, "emsize": 280, "nout": 480, "nlevels": 55, "horizon": 55,
            "aux_freq": 16, "wdecay": 1e-6, "emb_dropout": 0.05, "dropout": 0.4, "wdrop": 0.45, "clip": 0.2,
        },
        # Forty minutes on two CPU cores in bf16: shallow and narrow, with carried state (so that every position is
        # scored), many small updates, and no more regularisation than nine epochs need.
        "small": {"name": "small", **SMALL},
        # About as long as `small`. Windows are no longer than the network is deep, so that every position sees the
        # carried state, and more rows keep the number of tokens per update.
        "grow": {
            "name": "grow", **SMALL, "horizon": 4, "batch_size": 75, "grow": ["4:7"], "epochs": 12,
            "schedule": "cosine", "when": [-1], "eval_depths": [12, 16], "eval_nlevels": -1,
        },
        # Four hours on one CPU core in bf16, in windows as long as the network is deep; wider and trained for longer
        # than `small`, hence with more dropout, and DropConnect.
        "medium": {
            "name": "medium", **SMALL, "nhid": 200, "horizon": 8, "batch_size": 38, "dropout": 0.35, "dropouti": 0.2,
            "dropouth": 0.15, "wdrop": 0.2, "emb_dropout": 0.05, "epochs": 40, "schedule": "cosine", "when": [-1],
            "eval_depths": [12, 16], "eval_nlevels": -1,
        },
        # The demo: a minute or two on two CPU cores.
        "tiny": {
            "name": "tiny", "emsize": 48, "nhid": 32, "nout": 48, "nlevels": 4, "repack": True, "seq_len": 0,
            "horizon": 25, "batch_size": 20, "dropout": 0.1, "dropouti": 0.0, "dropouth": 0.0, "emb_dropout": 0.0,
            "wdrop": 0.0, "aux": 0.0, "alpha": 0.0, "beta": 0.0, "epochs": 2, "when": [1],
        },
        **baselines.PRESETS,
    }  # fmt: skip

    defaults: ClassVar = {
        "name": "Trellis_wordPTB", "optim": "SGD", "lr": 20.0, "clip": 0.225, "wdecay": 1.2e-6, "epochs": 500,
        "batch_size": 16, "eval_batch_size": 12, "anneal": 10, "dropout": 0.45, "dropouti": 0.45, "dropouth": 0.28,
        "dropoutl": 0.29, "emb_dropout": 0.1, "wdrop": 0.5, "seq_len": 110, "aux": 0.05, "aux_freq": 12, "alpha": 2.0,
        "beta": 1.0,
    }  # fmt: skip
    helps: ClassVar = {"anneal": "divide the learning rate by 4 on a plateau, with a patience of N epochs; 0: never"}

    recite: bool = setting(
        False, "score by accuracy, the share of words that the model ranks first", group="evaluation"
    )

    def validate(self) -> None:
        super().validate()
        if self.recite and (self.eval_all or self.mc_dropout or self.cache or self.dynamic_eval):
            others = "--eval_all, --mc_dropout, --cache and --dynamic_eval"
            raise UserError(f"--recite: is scored window by window; leave out {others}")

    def task_seq_len(self) -> int:
        """Return `seq_len`: the authors' script overlaps its training windows even if the state is carried."""
        return self.seq_len

    def make_task(self, model: TrellisLanguageModel, corpus: Corpus, **options: Any) -> LanguageModeling:
        """Build the task, scored by perplexity or, with `recite`, by accuracy."""
        return (Reciting if self.recite else LanguageModeling)(model, **options)
