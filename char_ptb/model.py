"""Settings and model of character-level PTB. Defaults are those of the authors' released script."""

from dataclasses import dataclass
from typing import Any, ClassVar

from trellisnet.data.corpus import Corpus
from trellisnet.data.spelling import STREAMS, Spelling
from trellisnet.evaluation.adaptation import AdaptiveConfig
from trellisnet.models import TrellisLanguageModel
from trellisnet.training.language_model import build_model
from trellisnet.training.settings import setting
from trellisnet.training.tasks import CharacterModeling

__all__ = ["Config", "build_model"]


@dataclass(kw_only=True)
class Config(AdaptiveConfig):
    """Train a TrellisNet on character-level Penn Treebank."""

    task: ClassVar[str] = "char_ptb"
    data_settings: ClassVar = ("data", "stream")
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
        "small": {
            "name": "small", "emsize": 64, "nhid": 256, "nout": 64, "nlevels": 8, "horizon": 80, "batch_size": 8,
            "lr": 1e-2, "dropout": 0.0, "dropouti": 0.0, "dropouth": 0.0, "emb_dropout": 0.0, "wdrop": 0.0,
            "aux_freq": 2, "epochs": 5, "when": [-1], "decay": 2.0,
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
        "horizon": "length of a window; without --repack, its unscored positions, auto: as many as the layers reach "
        "back",
    }

    dataset: str = setting("ptb", "name of the corpus; --data says where it is", group="data", choices=("ptb",))
    stream: str = setting(
        "authors",
        "spelling of the text: of the authors' code, or standard in the literature",
        group="data",
        choices=tuple(STREAMS),
    )

    def patience(self) -> int:
        """Return 0 without averaging, because the authors' script never reads its --anneal."""
        return self.anneal if self.asgd or self.finetune else 0

    def data_options(self) -> dict[str, Any]:
        return {**super().data_options(), "stream": self.stream}

    @property
    def spelling(self) -> Spelling:
        return STREAMS[self.stream]

    def make_task(self, model: TrellisLanguageModel, corpus: Corpus, **options: Any) -> CharacterModeling:
        """Build the task, scored in bits per character with the denominators of both streams."""
        own = corpus.spelled[self.stream]
        symbols = {name: {split: n / own[split] for split, n in each.items()} for name, each in corpus.spelled.items()}
        return CharacterModeling(model, symbols=symbols, **options)
