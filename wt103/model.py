"""Settings and model of WikiText-103. Defaults are those of the authors' released script."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch

from trellisnet.data.corpus import ORDERS
from trellisnet.errors import UserError
from trellisnet.evaluation.adaptation import AdaptiveConfig
from trellisnet.training.language_model import build_model
from trellisnet.training.settings import setting

__all__ = ["Config", "build_model"]

# The authors' cut-offs, for larger vocabularies than this.
LARGE_VOCABULARY = 75_000
CUTOFFS = (2_800, 20_000, 76_000)


@dataclass(kw_only=True)
class Config(AdaptiveConfig):
    """Train a TrellisNet on WikiText-103."""

    task: ClassVar[str] = "wt103"
    default_data: ClassVar[str] = "data/wikitext-103"
    plateau_factor: ClassVar[float] = 10.0
    plateau_floor: ClassVar[float] = 1e-5
    when_floor: ClassVar[float] = 1e-5
    presets: ClassVar = {
        "default": {},
        # Table 5, "Word-WT103"; its hidden size of 2000 counts all channels: 1500 + 512 make the paper's 180M.
        "paper": {
            "name": "paper", "nhid": 1500, "nlevels": 70, "horizon": 70, "wdrop": 0.1, "aux": 0.08, "clip": 0.1,
            "vocab_order": "frequency",
        },
        # For a sample of a few hundred thousand tokens, on two CPU cores. Here plain SGD learns faster than Adam.
        "small": {
            "name": "small", "emsize": 128, "nhid": 96, "nout": 128, "nlevels": 6, "horizon": 30, "batch_size": 10,
            "wnorm": False, "optim": "SGD", "lr": 20.0, "clip": 0.25, "dropout": 0.4, "dropouti": 0.3, "dropouth": 0.2,
            "emb_dropout": 0.1, "aux": 0.0, "epochs": 9, "when": [6, 8], "anneal": 0, "eval_batch_size": 10,
            "vocab_order": "frequency",
        },
        # The TCN's authors publish only its size, 150M; widths, windows and rates are ours.
        "tcn": {
            "name": "tcn", "model": "tcn", "emsize": 400, "nhid": 1000, "nout": 400, "nlevels": 8, "ksize": 3,
            "dropout": 0.0, "dropouti": 0.1, "dropouth": 0.1, "aux": 0.0, "repack": False, "horizon": 160,
            "seq_len": 480, "optim": "SGD", "lr": 4.0, "clip": 0.35, "batch_size": 16, "eval_batch_size": 1,
            "vocab_order": "frequency",
        },
    }  # fmt: skip

    defaults: ClassVar = {
        "name": "Trellis_wordWT103", "emsize": 512, "nhid": 1600, "nout": 512, "nlevels": 75, "wnorm": True,
        "optim": "Adam", "lr": 1e-3, "clip": 0.07, "wdecay": 0.0, "epochs": 25, "when": [15, 20], "anneal": 5,
        "batch_size": 40, "eval_batch_size": 1, "dropout": 0.1, "dropouti": 0.1, "dropouth": 0.1, "horizon": 75,
        "repack": True, "aux": 0.1, "aux_freq": 25,
    }  # fmt: skip
    helps: ClassVar = {
        "anneal": "divide the learning rate by 10 on a plateau, with a patience of N epochs; 0: never",
        "horizon": "length of a window; without --repack: its unscored positions; auto: as many as the layers reach "
        "back",
    }

    vocab_order: str = setting(
        "appearance", "order of the vocabulary, which determines the bands", group="data", choices=ORDERS
    )
    cutoffs: list[int] = setting(
        [], "cut-offs of the split softmax; default: the authors' for more than 75,000 words; 0: none", group="model"
    )
    init_tail: bool = setting(
        False, "accept weights without the vectors of the bands, and mark the score", group="run and checkpoints"
    )

    def validate(self) -> None:
        super().validate()
        if self.emb_blocks > 1:
            raise UserError(
                "--emb_blocks: a sparse embedding needs rare words first, but the bands of this task's softmax need "
                "frequent ones first; use it in word_ptb"
            )
        if self.cutoffs not in ([], [0]) and any(low >= high for low, high in pairwise([0, *self.cutoffs])):
            raise UserError(f"--cutoffs {' '.join(map(str, self.cutoffs))}: expected increasing numbers above 0")

    def no_graph(self, device: torch.device) -> str:
        bands = "" if self.cutoffs == [0] else "the bands of the softmax are sorted on the CPU"
        return super().no_graph(device) or bands

    def data_options(self) -> dict[str, Any]:
        return {"order": self.vocab_order}

    def marks(self) -> dict[str, bool]:
        return {"init_tail": True} if self.init_tail else {}

    def load_options(self) -> dict[str, Any]:
        return {"init_tail": self.init_tail}

    def bands(self, vocab_size: int) -> list[int] | None:
        """Return explicit cut-offs, or the authors' for a large vocabulary.

        Raises:
            UserError: a cut-off lies beyond the vocabulary, or a mixture of softmaxes would have bands.
        """
        if self.cutoffs == [0]:
            return None
        if self.cutoffs and self.cutoffs[-1] >= vocab_size:
            raise UserError(f"--cutoffs {self.cutoffs[-1]}: must be less than the {vocab_size:,} words of the corpus")
        bands = self.cutoffs or [c for c in CUTOFFS if vocab_size > LARGE_VOCABULARY and c < vocab_size]
        if bands and self.n_experts:
            raise UserError(
                f"--n_experts {self.n_experts}: a mixture of softmaxes has no bands, which a vocabulary of "
                f"{vocab_size:,} words needs; leave it out, or pass --cutoffs 0 to go without bands"
            )
        return bands or None
