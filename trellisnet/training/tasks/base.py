"""The interface between the engine and a task, with defaults for what most tasks share."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from trellisnet.data.vocabulary import Vocabulary
from trellisnet.errors import UserError

Losses = dict[str, Tensor]
Progress = Callable[[Iterable, int], Iterable]  # wraps an iterable of known length, e.g. in a progress bar


class Task:
    """A model with its batches, loss and scores.

    A subclass sets `model` and the names below, and implements :meth:`batches`, :meth:`size`, :meth:`loss` and
    :meth:`evaluate`. By default the score is the loss, and lower is better.

    Attributes:
        model: the model to train.
        score_name: key of the score that is printed and logged.
        digits: decimals of a printed score.
        batch_name: noun for a batch.
        unit: abbreviation of the unit that :meth:`size` counts.
        count: the same unit in full, the key under which results hold the number of units.
        measured: means kept during training: "loss" and other keys of the dict that :meth:`loss` returns.
    """

    model: nn.Module
    score_name: ClassVar[str] = "loss"
    digits: ClassVar[int] = 4
    batch_name: ClassVar[str] = "batch"
    unit: ClassVar[str]
    count: ClassVar[str]
    measured: ClassVar[Sequence[str]] = ("loss",)

    def batches(self, data: Any, epoch: int = 0) -> Sequence[tuple[Tensor, ...]]:
        """Training batches of an epoch, counted from 0: tuples of tensors with the same number of rows."""
        raise NotImplementedError

    def size(self, batch: tuple[Tensor, ...]) -> int:
        """Number of units (scored tokens, sequences, …) in a batch, over which its loss is averaged."""
        raise NotImplementedError

    def rate(self, batch: tuple[Tensor, ...]) -> float:
        """Factor of the learning rate for a batch."""
        return 1.0

    def loss(self, *batch: Tensor, state: Any = None) -> tuple[Losses, Any]:
        """Losses of a batch and the state to carry into the next one, or None.

        Returns:
            0-dim means: `loss`, which is differentiated; `raw`, the part of it that is reported; the rest of
            `measured`. The state is a tuple of tensors with a row for each row of the batch.
        """
        raise NotImplementedError

    def evaluate(self, data: Any, *, max_tokens: int | None = None, progress: Progress | None = None) -> dict[str, Any]:
        """Score data in evaluation mode: a dict with `loss` and, under the name in `count`, the number of units.

        Args:
            data: a split.
            max_tokens: stop after the batch in which this many units have been scored.
            progress: wraps the batches, e.g. in a progress bar.
        """
        raise NotImplementedError

    def evaluate_depths(self, data: Any, depths: Sequence[int], **how: Any) -> list[dict[str, Any]]:
        """Results of :meth:`evaluate`, with its arguments `how`, for a TrellisNet of each of several depths."""
        results = []
        for depth in depths:
            with at_depth(self.model, depth):
                results.append(self.evaluate(data, **how))
        return results

    @staticmethod
    def score(loss: float) -> float:
        """Score for a mean loss."""
        return loss

    def training_score(self, means: dict[str, float]) -> float:
        """Score for the means of `measured` during training."""
        return self.score(means["loss"])

    def scores(self, result: dict[str, Any], split: str) -> dict[str, float]:
        """Scores to report for a result of :meth:`evaluate` on a split ("valid" or "test"), `score_name` first."""
        return {self.score_name: self.score(result["loss"])}

    @staticmethod
    def is_better(result: dict[str, Any], best: dict[str, Any]) -> bool:
        """Return whether a validation result beats the best one so far."""
        return result["loss"] < best["loss"]


class AccuracyTask(Task):
    """A task scored by accuracy, which its losses and results contain; the loss breaks ties."""

    score_name = "accuracy"
    measured = ("loss", "accuracy")

    def training_score(self, means: dict[str, float]) -> float:
        """Accuracy during training, with dropout."""
        return means["accuracy"]

    def scores(self, result: dict[str, Any], split: str) -> dict[str, float]:
        """Accuracy of a result."""
        return {"accuracy": result["accuracy"]}

    @staticmethod
    def is_better(result: dict[str, Any], best: dict[str, Any]) -> bool:
        """Return whether a validation result beats the best one so far."""
        return (result["accuracy"], -result["loss"]) > (best["accuracy"], -best["loss"])


@dataclass(frozen=True)
class Splits:
    """The data of a run in the form that the task takes.

    Args:
        train, valid, test: the splits; `valid` is None without validation data.
        label: name of the data for the user.
        sha256: digest of the data.
        sizes: of train, valid and test, in the task's units.
        extra_evaluations: scores to report at the end besides valid and test: name → (method, data).
        vocabulary_sha256: digest of the vocabulary, or of the order of the positions, stored with the weights.
        vocabulary: tokens of the ids, written beside the weights; None for data without ids.
        choices: facts to store in config.json.
        notices: lines for the user.
        changed: how the data are read now, if version 0.1.0 read them differently.
        stored_sha256: digest that version 0.1.0 computed for them.
    """

    train: Any
    valid: Any
    test: Any
    label: str
    sha256: str
    sizes: tuple[int, int, int]
    extra_evaluations: dict[str, tuple[Callable[..., dict[str, Any]], Any]] = field(default_factory=dict)
    vocabulary_sha256: str | None = None
    vocabulary: Vocabulary | None = None
    choices: dict[str, Any] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    changed: str = ""
    stored_sha256: str = ""

    @property
    def fingerprint(self) -> list[Any]:
        """Identifier of the data, with the sizes because the digest does not show where one split ends."""
        return [self.sha256, *self.sizes, self.vocabulary_sha256]

    def check_same(self, fingerprint: list[Any]) -> None:
        """Raise UserError unless a run's fingerprint is that of these data."""
        if fingerprint in (self.fingerprint, [*self.fingerprint[:-1], None]):  # None: not stored by earlier taggers
            return
        if self.changed and fingerprint[0] in (self.sha256, self.stored_sha256):
            if fingerprint[1:] == self.fingerprint[1:]:  # the change shows in the files, but in no id
                return
            raise UserError(
                f"the run was started by a version that read these data differently: now they are read {self.changed}; "
                "start a new run, or continue it with that version (see its log.txt)"
            )
        raise UserError(
            f"the data differ from those the run was started on (sha256 {self.sha256[:12]}… instead of "
            f"{fingerprint[0][:12]}…); name those with --data"
        )


class LazyBatches(Sequence):
    """Batches computed on access: `make(key)` for each of `keys`."""

    def __init__(self, keys: Sequence[Any], make: Callable[[Any], tuple[Tensor, ...]]):
        self._keys, self._make = keys, make

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return self._make(self._keys[index])


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode, and restore the mode of every module on exit."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def at_depth(model: nn.Module, num_layers: int) -> Iterator[None]:
    """Give the core of a model, a TrellisNet, another depth in the body."""
    own, model.core.num_layers = model.core.num_layers, num_layers
    try:
        yield
    finally:
        model.core.num_layers = own


def tracked(items: Sized, progress: Progress | None) -> Iterable:
    """`items` wrapped in `progress`, if there is one."""
    return items if progress is None else progress(items, len(items))


def mean(total: float, count: int) -> float:
    """A mean; NaN if nothing was counted, on a rank that was stopped before its first batch."""
    return total / count if count else math.nan
