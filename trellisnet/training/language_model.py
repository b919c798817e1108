"""What the programs of the language models share: settings, model, and how a corpus becomes a task and its data.

A task folder adds its data, its defaults and its presets.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from trellisnet.data.corpus import SPLITS, Corpus, batchify
from trellisnet.errors import UserError
from trellisnet.models import TrellisLanguageModel
from trellisnet.training.config import setting
from trellisnet.training.engine import Splits
from trellisnet.training.network import NetworkConfig
from trellisnet.training.optim import Schedule
from trellisnet.training.tasks import LanguageModeling


@dataclass(kw_only=True)
class LanguageModelConfig(NetworkConfig):
    """Settings that the language models share, under the authors' names."""

    token: ClassVar[str] = "words"  # what the vocabulary holds
    # The authors' rules for the learning rate differ in these, see trellisnet.training.optim.Schedule.
    plateau_factor: ClassVar[float] = 4.0
    plateau_floor: ClassVar[float] = 0.0
    when_floor: ClassVar[float] = 0.0

    emsize: int = setting(400, "embedding width")
    nout: int = setting(400, "output channels; equal to --emsize when tied")
    tied: bool = setting(True, "tie the output to the input embedding")
    wnorm: bool = setting(False, "weight normalisation")
    n_experts: int = setting(0, "softmaxes in a mixture; 0: one plain softmax")
    mos_epsilon: float = setting(-1.0, "added to the mixture's probabilities; -1: 1e-8 to score loaded weights, else 0")

    asgd: bool = setting(False, "switch to averaged SGD on the first plateau instead of annealing")

    dropout: float = setting(0.0, "output dropout, one mask a sequence")
    dropouti: float = setting(0.0, "input dropout, one mask a sequence")
    dropoutl: float = setting(0.0, "dropout of the mixture's latent vectors, one mask a sequence")
    emb_dropout: float = setting(0.0, "dropout of whole words of the vocabulary")

    horizon: int = setting(58, "unscored positions of a window; length of a window when the state is carried")
    seq_len: int = setting(0, "length of a window, the unscored positions included")
    repack: bool = setting(False, "carry the state from window to window")
    aux: float = setting(0.0, "weight of the auxiliary losses; 0: none")
    aux_freq: float = setting(20.0, "auxiliary loss after every so many layers")
    alpha: float = setting(0.0, "activation regularisation (AR)")
    beta: float = setting(0.0, "temporal activation regularisation (TAR)")
    eval_all: bool = setting(False, "also score every token, those without a whole history too")

    def validate(self) -> None:
        super().validate()
        self.check_at_least(1, "emsize", "nout", "horizon")
        self.check_at_least(0, "seq_len", "alpha", "beta", "n_experts")
        self.check_rates("dropoutl", "dropout", "dropouti", "emb_dropout")
        if self.tied and not self.n_experts and self.nout != self.emsize:
            raise UserError(
                f"--nout {self.nout}: tied weights need --nout equal to --emsize {self.emsize}; "
                "change one or pass --no-tied"
            )
        if self.aux > 0:
            if not self.aux_freq.is_integer() or self.aux_freq < 1:
                raise UserError(f"--aux_freq {self.aux_freq}: expected a whole number of layers ≥ 1")
            if self.aux_freq > self.nlevels:
                raise UserError(
                    f"--aux_freq {self.aux_freq:g}: larger than --nlevels {self.nlevels}, so no layer would have an "
                    "auxiliary loss; lower it or pass --aux 0"
                )
        seq_len = self.task_seq_len()
        if not self.eval and not self.repack and seq_len <= self.horizon:
            raise UserError(
                f"--seq_len {self.seq_len}: must be larger than --horizon {self.horizon}, or nothing is scored; "
                "make it longer or pass --repack --seq_len 0"
            )
        if not self.eval and self.repack and 0 < seq_len <= self.horizon:
            raise UserError(f"--seq_len {self.seq_len}: with --repack expected 0 or more than --horizon {self.horizon}")

    def channels(self) -> int:
        """H, the hidden channels with those of the output."""
        return self.nhid + self.nout

    def log_epsilon(self) -> float:
        """What is added to a mixture's probabilities: the authors' 1e-8 to score loaded weights, else nothing."""
        if self.mos_epsilon >= 0:
            return self.mos_epsilon
        return 1e-8 if self.eval and self.load_weight else 0.0

    def task_seq_len(self) -> int:
        """`seq_len` for the task: none while the state is carried, as in two of the authors' three scripts."""
        return 0 if self.repack else self.seq_len

    def patience(self) -> int:
        """Epochs without gain that make a plateau; 0: there are none."""
        return self.anneal

    def data_options(self) -> dict[str, Any]:
        """What the task's `data.load` is told beyond the folder."""
        return {}

    def bands(self, vocab_size: int) -> list[int] | None:
        """Cut-offs of the split softmax for a vocabulary; None for a plain one."""
        return None

    def make_task(self, model: TrellisLanguageModel, corpus: Corpus, **options: Any) -> LanguageModeling:
        """The task, with `options` of :class:`LanguageModeling`."""
        return LanguageModeling(model, **options)


def build_model(config: LanguageModelConfig, vocab_size: int) -> TrellisLanguageModel:
    """The language model of a configuration."""
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
        input_dropout=config.dropouti,
        output_dropout=config.dropout,
        **config.core_options(),
    )


def setup(
    load: Callable[..., Corpus], config: LanguageModelConfig, device: torch.device
) -> tuple[LanguageModeling, Splits, Schedule, dict[str, Any]]:
    """Task, data, schedule and facts of a run, for :func:`trellisnet.training.cli.main`.

    Args:
        load: the task's `data.load(folder, download, **config.data_options())`.
        config: the settings.
        device: where to train.

    Raises:
        UserError: a corpus that cannot be read or is too short for the settings.
    """
    # Only the project's own folder is filled by itself; a folder that the user names is theirs.
    corpus = load(config.data_folder(), download=config.download and not config.data, **config.data_options())
    model = build_model(config, len(corpus.vocabulary)).to(device)
    task = config.make_task(
        model,
        corpus,
        horizon=config.horizon,
        seq_len=config.task_seq_len(),
        repackage=config.repack,
        aux_weight=config.aux,
        aux_every=int(config.aux_freq),
        alpha=config.alpha,
        beta=config.beta,
    )
    sizes = {"train": config.batch_size, "valid": config.eval_batch_size, "test": config.eval_batch_size}
    try:
        rows = {split: batchify(getattr(corpus, split), sizes[split]).to(device) for split in SPLITS}
        steps = 0 if config.eval else len(task.batches(rows["train"]))
        for split in ("valid", "test"):
            if next(task.windows(rows[split], training=False), None) is None:
                raise ValueError(f"{split}: rows of {rows[split].size(1)} tokens hold no window with anything to score")
    except ValueError as e:
        raise UserError(f"the corpus is too short for these settings: {e}") from e
    schedule = Schedule(
        config.lr,
        config.patience(),
        factor=config.plateau_factor,
        floor=config.plateau_floor,
        when=config.when,
        when_floor=config.when_floor,
        asgd=config.asgd,
    )
    tokens = tuple(getattr(corpus, split).numel() for split in SPLITS)
    score_all = functools.partial(task.evaluate_all, batch_size=config.eval_batch_size)
    every = {f"{split}_all": (score_all, getattr(corpus, split).to(device)) for split in ("valid", "test")}
    splits = Splits(
        **rows,
        label=corpus.label,
        sha256=corpus.sha256,
        sizes=tokens,
        everything=every if config.eval_all else {},
        vocabulary=corpus.vocabulary_sha256,
    )
    facts = {"training tokens": tokens[0], config.token: len(corpus.vocabulary)}
    if not config.eval:
        facts["steps an epoch"] = steps
    facts["softmax"] = f"mixture of {config.n_experts}" if config.n_experts else "plain"
    if bands := config.bands(len(corpus.vocabulary)):
        facts["softmax"] = f"split at {', '.join(map(str, bands))}"
    return task, splits, schedule, facts
