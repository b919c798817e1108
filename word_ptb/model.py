"""Settings and model of word-level PTB. Defaults are those of the authors' released script."""

from dataclasses import dataclass
from typing import Any, ClassVar

from trellisnet.data.corpus import Corpus
from trellisnet.errors import UserError
from trellisnet.models import TrellisLanguageModel
from trellisnet.training.config import setting
from trellisnet.training.language_model import LanguageModelConfig, build_model
from trellisnet.training.tasks import LanguageModeling, Reciting
from word_ptb import baselines

__all__ = ["Config", "build_model"]


@dataclass(kw_only=True)
class Config(LanguageModelConfig):
    """Train a TrellisNet on word-level Penn Treebank."""

    task: ClassVar[str] = "word_ptb"
    default_data: ClassVar[str] = "data/penn"
    plateau_floor: ClassVar[float] = 0.02
    presets: ClassVar = {
        "default": {},
        # Table 5, "Word-PTB (w/o MoS)"; what it leaves out (dropouti, AR, TAR, windows) is the released script's.
        "paper": {
            "name": "paper", "nlevels": 55, "horizon": 55, "aux_freq": 16, "wdecay": 1e-6,
        },
        # Table 5, "Word-PTB (w/ MoS)".
        "paper-mos": {
            "name": "paper-mos", "n_experts": 15, "emsize": 280, "nout": 480, "nlevels": 55, "horizon": 55,
            "aux_freq": 16, "wdecay": 1e-6, "emb_dropout": 0.05, "dropout": 0.4, "wdrop": 0.45, "clip": 0.2,
        },
        # Forty minutes on two CPU cores in bf16: shallow and narrow, with carried state (so that all that is computed
        # is scored), many small updates, and only the regularisation that nine epochs need.
        "small": {
            "name": "small", "emsize": 200, "nhid": 100, "nout": 200, "nlevels": 8, "repack": True, "seq_len": 0,
            "horizon": 30, "batch_size": 10, "dropout": 0.25, "dropouti": 0.1, "dropouth": 0.1, "emb_dropout": 0.0,
            "wdrop": 0.0, "aux": 0.0, "alpha": 0.0, "beta": 0.0, "epochs": 9, "when": [6, 8],
        },
        # The demo: a few minutes on two CPU cores.
        "tiny": {
            "name": "tiny", "emsize": 48, "nhid": 32, "nout": 48, "nlevels": 4, "repack": True, "seq_len": 0,
            "horizon": 25, "batch_size": 20, "dropout": 0.1, "dropouti": 0.0, "dropouth": 0.0, "emb_dropout": 0.0,
            "wdrop": 0.0, "aux": 0.0, "alpha": 0.0, "beta": 0.0, "epochs": 2, "when": [1],
        },
        **baselines.PRESETS,
    }  # fmt: skip

    name: str = setting("Trellis_wordPTB", "name of the run; its folder is runs/word_ptb/<name> unless --out is given")
    data: str = setting(
        "", "a text file, a folder with train.txt, valid.txt, test.txt, or 'synthetic'; default: data/penn here"
    )
    optim: str = setting("SGD", "optimiser: a class of torch.optim")
    lr: float = setting(20.0, "initial learning rate")
    clip: float = setting(0.225, "gradient-norm clip; 0: none")
    wdecay: float = setting(1.2e-6, "weight decay, inside the optimiser")
    epochs: int = setting(500, "epochs to train in all")
    batch_size: int = setting(16, "rows of a training batch")
    eval_batch_size: int = setting(12, "rows for validation and test")
    anneal: int = setting(10, "plateau patience in epochs: divide the learning rate by 4; 0: never")

    dropout: float = setting(0.45, "output dropout, one mask a sequence")
    dropouti: float = setting(0.45, "input dropout, one mask a sequence")
    dropouth: float = setting(0.28, "hidden dropout, one mask a sequence for all layers")
    dropoutl: float = setting(0.29, "dropout of the mixture's latent vectors, one mask a sequence")
    emb_dropout: float = setting(0.1, "dropout of whole words of the vocabulary")
    wdrop: float = setting(0.5, "DropConnect on both kernels")

    seq_len: int = setting(110, "length of a window, the unscored positions included")
    aux: float = setting(0.05, "weight of the auxiliary losses; 0: none")
    aux_freq: int = setting(12, "auxiliary loss after every N layers")
    alpha: float = setting(2.0, "activation regularisation (AR)")
    beta: float = setting(1.0, "temporal activation regularisation (TAR)")
    recite: bool = setting(False, "score by the share of words that the model gives the highest probability")

    def validate(self) -> None:
        super().validate()
        if self.recite and (self.eval_all or self.mc_dropout or self.cache or self.dynamic_eval):
            others = "--eval_all, --mc_dropout, --cache and --dynamic_eval"
            raise UserError(f"--recite: is measured window by window; leave {others} out")

    def task_seq_len(self) -> int:
        """As it is: this script of the authors overlaps its training windows even while the state is carried."""
        return self.seq_len

    def make_task(self, model: TrellisLanguageModel, corpus: Corpus, **options: Any) -> LanguageModeling:
        """Perplexity; or how well the text is recited."""
        return (Reciting if self.recite else LanguageModeling)(model, **options)
