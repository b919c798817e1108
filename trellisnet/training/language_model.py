"""Settings and program that all language models share; a task folder adds data, defaults and presets."""

import functools
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from trellisnet import serialization
from trellisnet.baselines import SparseEmbedding, sparse
from trellisnet.data.corpus import ALL_ORDERS, SPLITS, Corpus, batchify, only_held_out
from trellisnet.data.spelling import WORDS, Spelling
from trellisnet.data.vocabulary import Vocabulary
from trellisnet.errors import UserError, counted
from trellisnet.models import TrellisLanguageModel
from trellisnet.training.config import to_settings
from trellisnet.training.core_config import CoreConfig
from trellisnet.training.distributed import Ranks
from trellisnet.training.optim import Schedule, make_schedule
from trellisnet.training.passes import Passes
from trellisnet.training.programs import Program
from trellisnet.training.scoring import Scores
from trellisnet.training.settings import properties_of, setting
from trellisnet.training.tasks import LanguageModeling, Splits
from trellisnet.training.tasks.windows import no_window


@dataclass(kw_only=True)
class LanguageModelConfig(CoreConfig):
    """Settings that the language models share, under the authors' names."""

    data_settings: ClassVar = ("data", "vocab_order")
    # In these the authors' rules for the learning rate differ; see trellisnet.training.optim.Schedule.
    plateau_factor: ClassVar[float] = 4.0
    plateau_floor: ClassVar[float] = 0.0
    when_floor: ClassVar[float] = 0.0

    defaults: ClassVar = {"wnorm": False}
    helps: ClassVar = {
        "data": "a text file, a folder with train.txt, valid.txt and test.txt, or 'synthetic'; default: {default_data} "
        "in the project",
    }

    emsize: int = setting(400, "embedding width", group="model", at_least=1)
    nout: int = setting(400, "output channels; equal to --emsize when tied", group="model", at_least=1)
    sparse_mode: str = setting(
        "direct", "layers of a sparse LSTM that are made sparse", group="settings of other cores", choices=sparse.MODES
    )
    sparse_fract: float = setting(
        1.0, "share of inputs or outputs that sparse layers keep", group="settings of other cores", above=0, at_most=1
    )
    emb_blocks: int = setting(
        1, "column blocks of a sparse embedding; words with low ids have fewer; 1: dense", group="model", at_least=1
    )
    emb_density: float = setting(1.0, "fraction of a sparse embedding's entries that is kept", group="model")
    vocab_order: str = setting(
        "auto", "order of the vocabulary; auto: frequency_up with --emb_blocks, else appearance",
        group="data", choices=("auto", *ALL_ORDERS),
    )  # fmt: skip
    tied: bool = setting(True, "share the embedding matrix with the softmax", group="model")
    n_experts: int = setting(0, "number of softmaxes in a mixture; 0: a plain softmax", group="model", at_least=0)
    mos_epsilon: float = setting(
        -1.0, "added to a mixture's probabilities; -1: 1e-8 when scoring loaded weights, else 0", group="model",
        at_least=0, special=-1,
    )  # fmt: skip

    asgd: bool = setting(
        False, "switch to averaged SGD on the first plateau instead of annealing", group="optimisation", step_rule=True
    )
    nonmono: int = setting(
        0, "switch to averaged SGD with a patience of N epochs, regardless of --anneal; 0: off",
        group="optimisation", step_rule=True, at_least=0,
    )  # fmt: skip
    finetune: bool = setting(
        False, "train by averaged SGD alone, starting from --load_weight, and end the run on the first plateau",
        group="optimisation", step_rule=True, needs=["load_weight"],
    )  # fmt: skip
    min_epochs: int = setting(
        0, "with --finetune: do not end before epoch N", group="optimisation", step_rule=True, at_least=0,
        needs=["finetune"],
    )  # fmt: skip
    anneal_by: float = setting(
        0.0, "divide the learning rate by this on a plateau; 0: the divisor of the authors' script",
        group="optimisation", step_rule=True, at_least=1, special=0,
    )  # fmt: skip
    anneal_recent: int = setting(
        0, "define a plateau as a loss not below the worst of the previous N epochs; 0: by --anneal",
        group="optimisation", step_rule=True, at_least=0,
    )  # fmt: skip

    dropout: float = setting(0.0, "output dropout, one mask per sequence", group="regularisation", rate="probability")
    dropouti: float = setting(0.0, "input dropout, one mask per sequence", group="regularisation", rate="probability")
    dropoutl: float = setting(
        0.0, "dropout of the mixture's latent vectors, one mask per sequence",
        group="regularisation", rate="probability",
    )  # fmt: skip
    emb_dropout: float = setting(
        0.0, "dropout of whole words of the vocabulary", group="regularisation", rate="probability"
    )
    emb_dropout_rows: bool = setting(False, "drop different words in each row", group="regularisation")

    horizon: int = setting(
        58, "unscored positions at the start of a window; auto: as many as the layers reach back; with --repack: "
        "length of a window", group="data", at_least=1, special=0, word="auto",
    )  # fmt: skip
    seq_len: int = setting(0, "length of a window, unscored positions included", group="data", at_least=0)
    repack: bool = setting(False, "carry the state from window to window (history repackaging)", group="data")
    random_length: bool = setting(
        False, "with --repack, train on windows of random length around --horizon", group="data"
    )
    aux: float = setting(0.0, "weight of the auxiliary losses; 0: none", group="regularisation")
    aux_freq: int = setting(20, "auxiliary loss after every Nth layer", group="regularisation")
    alpha: float = setting(0.0, "weight of activation regularisation (AR)", group="regularisation", at_least=0)
    beta: float = setting(0.0, "weight of temporal activation regularisation (TAR)", group="regularisation", at_least=0)
    mc_file: str = setting(
        "", "keep the passes of --mc_dropout in FILE, and continue from it", group="evaluation", process=True,
        needs=["mc_dropout"],
    )  # fmt: skip
    eval_all: bool = setting(False, "also score every token, even without a full history", group="evaluation")

    def validate(self) -> None:
        super().validate()
        blocks = min(self.emb_blocks, self.emsize)
        if not 1 / blocks <= self.emb_density <= 1:
            raise UserError(f"--emb_density: expected 1/{blocks} to 1 with {blocks} blocks, got {self.emb_density}")
        if self.finetune and self.schedule != "step":  # also if a preset asks for it
            raise UserError(f"--schedule {self.schedule}: finetuning keeps its rate; leave it out")
        if self.finetune and self.grow:
            raise UserError(
                "--grow: finetuning starts from trained weights, and could end before the last stage; pass --grow none"
            )
        plateaus = self.nonmono or self.patience() or self.anneal_recent
        if self.asgd and not (plateaus or self.eval or self.resume):
            raise UserError(
                "--asgd: begins on a plateau, of which --anneal 0 finds none; pass --nonmono N or --anneal N"
            )
        if self.anneal_by and not (plateaus or self.eval or self.resume):
            raise UserError(
                f"--anneal_by {self.anneal_by:g}: divides the learning rate on plateaus, of which these settings find "
                "none; pass --anneal_recent N, or divide it after certain epochs by --when"
            )
        if self.ema and self.schedule == "step" and (self.asgd or self.nonmono or self.finetune):
            flag = "--finetune" if self.finetune else "--asgd" if self.asgd else f"--nonmono {self.nonmono}"
            raise UserError(f"--ema: {flag} averages the weights as well; leave one of the two out")
        if self.label_smoothing and self.n_experts:
            raise UserError(
                "--label_smoothing: needs the log-probabilities of all words, which the loss of a mixture never "
                "computes at once; leave it out or pass --n_experts 0"
            )
        self.core.check_language_model(self)
        if self.random_length and (not self.repack or self.task_seq_len()):
            raise UserError("--random_length: needs windows that lie end to end; pass --repack --seq_len 0")
        if self.tied and not self.n_experts and self.nout != self.emsize:
            raise UserError(
                f"--nout {self.nout}: tied weights need --nout equal to --emsize {self.emsize}; "
                "change one or pass --no-tied"
            )
        if self.aux > 0:
            if self.aux_freq < 1:
                raise UserError(f"--aux_freq: expected at least 1, got {self.aux_freq}")
            if self.aux_freq > self.nlevels:
                raise UserError(
                    f"--aux_freq {self.aux_freq}: larger than --nlevels {self.nlevels}, so no layer has an auxiliary "
                    "loss; lower it or pass --aux 0"
                )
        if not self.horizon and self.repack:
            raise UserError("--horizon auto: with --repack it is the length of a window; pass a number or --no-repack")
        horizon, seq_len = self.horizon or self.core.reach(self), self.task_seq_len()
        if not self.eval and not self.repack and seq_len <= horizon:
            raise UserError(
                f"--seq_len {self.seq_len}: must be larger than --horizon {horizon}, or nothing is scored; increase it "
                "or pass --repack --seq_len 0"
            )
        if not self.eval and self.repack and 0 < seq_len <= self.horizon:
            raise UserError(f"--seq_len {self.seq_len}: with --repack expected 0 or more than --horizon {self.horizon}")

    def output_channels(self) -> int:
        return self.nout

    def order(self) -> str:
        """Return the order of the vocabulary; a sparse embedding needs rare words first."""
        if self.vocab_order != "auto":
            return self.vocab_order
        return "frequency_up" if self.emb_blocks > 1 else "appearance"

    def log_epsilon(self) -> float:
        """Return the epsilon added to a mixture's probabilities; default: 1e-8 to score loaded weights, else 0."""
        if self.mos_epsilon >= 0:
            return self.mos_epsilon
        return 1e-8 if self.eval and self.load_weight else 0.0

    def task_seq_len(self) -> int:
        """Return `seq_len` for the task: 0 if the state is carried, as in two of the authors' three scripts."""
        return 0 if self.repack else self.seq_len

    def no_graph(self, device: torch.device) -> str:
        return super().no_graph(device) or ("--random_length makes windows of many shapes" * self.random_length)

    def notices(self, device: torch.device) -> list[str]:
        notices, horizon = super().notices(device), self.horizon or self.core.reach(self)
        if self.seq_len > self.task_seq_len():
            notices.append(
                f"NOTICE: --seq_len {self.seq_len} has no effect with --repack, which makes windows of --horizon "
                f"{horizon} positions"
            )
        if not self.repack and self.task_seq_len() <= horizon:  # only with --eval
            notices.append(
                f"NOTICE: --seq_len {self.seq_len} does not exceed --horizon {horizon}, so windows of {horizon} "
                "positions are scored from the first on, without history; pass a larger --seq_len to score with it"
            )
        return notices

    def patience(self) -> int:
        """Return the plateau patience in epochs; 0 for no annealing on plateaus."""
        return self.anneal

    def data_options(self) -> dict[str, Any]:
        """Return the arguments of the task's `data.load` besides the folder."""
        return {"order": self.order()}

    def bands(self, vocab_size: int) -> list[int] | None:
        """Return the cut-offs of a split softmax for this vocabulary; None for another head."""
        return None

    @property
    def spelling(self) -> Spelling:
        """The spelling of text in tokens."""
        return WORDS

    def make_task(self, model: TrellisLanguageModel, corpus: Corpus, **options: Any) -> LanguageModeling:
        """Build the task; `options` are those of :class:`LanguageModeling`."""
        return LanguageModeling(model, **options)

    def extra_evaluations(self, task: LanguageModeling, corpus: Corpus, rows: dict[str, Tensor]) -> Scores:
        """Return the scores to report after training in addition to the perplexity of the windows.

        Args:
            task: the task.
            corpus: the text.
            rows: its splits as rows (N, length), on the device.
        """
        score_all = functools.partial(task.evaluate_all, batch_size=self.eval_batch_size)
        score_mc = functools.partial(task.evaluate_mc, passes=self.mc_dropout, kept=self._passes(task, corpus))
        extra = self.depth_scores(task, {split: rows[split] for split in ("valid", "test")})
        for split in ("valid", "test"):
            if self.eval_all:
                extra[f"{split}_all"] = score_all, getattr(corpus, split).to(rows[split].device)
            if self.mc_dropout:
                extra[f"{split}_mc"] = functools.partial(score_mc, name=split), rows[split]
        return extra

    def _passes(self, task: LanguageModeling, corpus: Corpus) -> Passes | None:
        """Return the file of --mc_file."""
        if not self.mc_file:
            return None
        if task.ranks.size > 1:
            raise UserError("--mc_file: keeps the passes of one process; start it with python, or leave the file out")
        path = Path(self.mc_file)
        if not path.absolute().parent.is_dir():
            raise UserError(f"--mc_file {path}: no such folder; make it, or name another file")
        if path.exists() and not (self.eval or self.resume):
            raise UserError(f"--mc_file {path}: holds passes, but the weights are yet to be trained; name a new file")
        depends = {
            name: value
            for name, value in to_settings(self).items()
            if not (properties_of(self, name).resumable or name in ("mc_dropout", "load_weight"))
        }

        def key() -> str:  # when the weights are loaded and the depth of the scores is known
            layers = task.model.core.num_layers if self.scoring_depths() else self.nlevels
            depth = {"eval_nlevels": layers} if layers != self.nlevels else {}  # --nlevels decides on windows, too
            content = {"settings": depends | depth, "data": corpus.sha256, **task.model.state_dict()}
            return serialization.sha256_of(content)

        return Passes(path, key)


def build_model(config: LanguageModelConfig, vocab_size: int) -> TrellisLanguageModel:
    """Build the language model of a configuration.

    Raises:
        UserError: sizes that the core does not support.
    """
    try:
        model = _build(config, vocab_size)
    except UserError:
        raise
    except ValueError as e:
        raise UserError(f"--model {config.model}: {e}") from e
    config.core.init_head(model.head)
    return model


def _build(config: LanguageModelConfig, vocab_size: int) -> TrellisLanguageModel:
    options = config.core.language_model_options(config)
    if config.emb_blocks > 1:
        sizes = {"blocks": config.emb_blocks, "density": config.emb_density}
        options["embedding"] = functools.partial(SparseEmbedding, **sizes)
    return TrellisLanguageModel(
        vocab_size,
        config.emsize,
        config.channels(),
        config.nlevels,
        output_size=config.nout,
        tied=config.tied,
        n_experts=config.n_experts,
        cutoffs=config.bands(vocab_size),
        latent_dropout=config.dropoutl,
        log_epsilon=config.log_epsilon(),
        embedding_dropout=config.emb_dropout,
        embedding_dropout_per_row=config.emb_dropout_rows,
        embedding_init=config.core.embedding_init(config.spelling.noun),
        output_dropout=config.dropout,
        **options,
    )


def _only_held_out(corpus: Corpus, token: str) -> list[str]:
    """Return a notice that counts the words that occur only in valid and test, which the model cannot learn."""
    held_out = only_held_out(corpus)
    counts = [f"{split} {types:,} ({counted(tokens, 'occurrences')})" for split, (types, tokens) in held_out.items()]
    return [f"{token} that the training text lacks: {', '.join(counts)}"] if held_out else []


def _repeated(corpus: Corpus) -> list[str]:
    """Return a notice for every two splits that are the same text."""
    return [
        f"{first} and {second} are the same text, so the {second} score is not one of unseen text"
        for first, second in itertools.combinations(SPLITS, 2)
        if torch.equal(getattr(corpus, first), getattr(corpus, second))
    ]


class LanguageModelProgram(Program):
    """Program of a language model; `load(folder, download, **config.data_options())` returns a :class:`Corpus`."""

    build_model = staticmethod(build_model)

    def setup(
        self, config: LanguageModelConfig, device: torch.device, ranks: Ranks | None = None
    ) -> tuple[LanguageModeling, Splits, Schedule, dict[str, Any]]:
        # Only the project's own folder is filled with downloads; a folder that the user names is left alone.
        corpus = self.load(config.data_folder(), download=config.download and not config.data, **config.data_options())
        model = build_model(config, len(corpus.vocabulary)).to(device)
        if config.label_smoothing and config.bands(len(corpus.vocabulary)):
            raise UserError(
                "--label_smoothing: needs the log-probabilities of all words, but a split softmax computes only "
                "those of the target's band; leave it out or pass --cutoffs 0"
            )
        task = config.make_task(
            model,
            corpus,
            horizon=config.horizon or None,
            seq_len=config.task_seq_len(),
            repackage=config.repack,
            aux_weight=config.aux,
            aux_every=config.aux_freq,
            alpha=config.alpha,
            beta=config.beta,
            length_seed=config.seed if config.random_length else None,
            label_smoothing=config.label_smoothing,
            ranks=ranks,
        )
        rows = {}
        try:
            for split in SPLITS:
                flag = "batch_size" if split == "train" else "eval_batch_size"
                ids, size = getattr(corpus, split), getattr(config, flag)
                if len(ids) < size:
                    raise ValueError(f"--{flag} {size}: {split} has only {counted(len(ids), 'tokens')}")
                rows[split] = batchify(ids, size).to(device)
            steps = 0 if config.eval else len(task.batches(rows["train"]))
            for split in ("valid", "test"):
                if not task.evaluation_windows.starts(rows[split].size(1)):
                    raise ValueError(f"{split}: {no_window(rows[split].size(1))}")
        except ValueError as e:
            raise UserError(f"the corpus is too short for these settings: {e}") from e
        schedule = make_schedule(
            config,
            lambda epoch: len(task.batches(rows["train"], epoch)),
            anneal=config.nonmono or config.patience(),
            recent=config.anneal_recent,
            factor=config.anneal_by or config.plateau_factor,
            floor=config.plateau_floor,
            when_floor=config.when_floor,
            asgd=config.asgd or config.nonmono > 0,
            finetune=config.finetune,
            min_epochs=config.min_epochs,
        )
        tokens = tuple(getattr(corpus, split).numel() for split in SPLITS)
        splits = Splits(
            **rows,
            label=corpus.label,
            sha256=corpus.sha256,
            sizes=tokens,
            extra_evaluations=config.extra_evaluations(task, corpus, rows),
            vocabulary_sha256=corpus.vocabulary_sha256,
            vocabulary=Vocabulary(corpus.vocabulary, config.spelling),
            notices=(*corpus.notices, *_only_held_out(corpus, config.spelling.noun), *_repeated(corpus)),
            changed=corpus.changed,
            stored_sha256=corpus.stored_sha256,
        )
        facts = {"training tokens": tokens[0], config.spelling.noun: len(corpus.vocabulary)}
        if not config.eval:
            facts["steps an epoch"] = steps
        facts["softmax"] = f"mixture of {config.n_experts}" if config.n_experts else "plain"
        if bands := config.bands(len(corpus.vocabulary)):
            facts["softmax"] = f"split at {', '.join(map(str, bands))}"
        return task, splits, schedule, facts
