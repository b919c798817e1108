"""Classification of sequences.

Letters: n sequences, N batch, L length of a sequence, C channels.
"""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trellisnet.models import TrellisClassifier
from trellisnet.regularization import Masks
from trellisnet.training.distributed import Ranks
from trellisnet.training.tasks.base import AccuracyTask, LazyBatches, Losses, Progress, evaluating, mean, tracked


class Augmentation(Protocol):
    """Random variation of training sequences."""

    def draw(self, count: int, random: np.random.Generator) -> Tensor:
        """Draw the parameters of `count` variations: a tensor with a row for each."""

    def __call__(self, sequences: Tensor, drawn: Tensor) -> Tensor:
        """Vary each sequence by its row of `drawn`."""


class Classification(AccuracyTask):
    """Classification of sequences (section 5.2, Table 4), scored by accuracy.

    Args:
        model: the classifier.
        batch_size: sequences of a training batch; the last one of an epoch may be smaller.
        eval_batch_size: sequences evaluated at a time; does not change results.
        prepare: maps a batch of stored sequences (n, L, C), of any dtype, to the model's input.
        seed: determines the order of the training data, a new one every epoch, and the draws of `augment`.
        augment: varies training sequences at random, before `prepare`.
        label_smoothing: share of each target that training spreads evenly over all classes.
        ranks: the processes that share the evaluation and all get its result; by default this one is alone.
    """

    unit, count = "seq", "examples"

    def __init__(
        self,
        model: TrellisClassifier,
        *,
        batch_size: int,
        eval_batch_size: int = 64,
        prepare: Callable[[Tensor], Tensor] = lambda sequences: sequences,
        seed: int = 0,
        augment: Augmentation | None = None,
        label_smoothing: float = 0.0,
        ranks: Ranks | None = None,
    ):
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing: expected a share in [0, 1), got {label_smoothing}")
        self.model = model
        self.ranks = ranks or Ranks()
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.prepare = prepare
        self.seed = seed
        self.augment = augment
        self.label_smoothing = label_smoothing

    def batches(self, data: tuple[Tensor, Tensor], epoch: int = 0) -> Sequence[tuple[Tensor, Tensor]]:
        """Batches (inputs, targets) of an epoch, shuffled and augmented by seed and epoch, computed on access.

        Args:
            data: sequences (n, L, C) and their classes, int64 (n,).
            epoch: counted from 0.
        """
        sequences, classes = data
        # Each pair of seed and epoch has its own generator, so the global one is left alone. All draws are copied to
        # the device once per epoch: no batch waits for a copy, and any batch can be computed again.
        order = np.random.default_rng([self.seed, epoch]).permutation(len(classes))
        order = torch.from_numpy(order).to(classes.device)
        drawn = None
        if self.augment is not None:
            drawn = self.augment.draw(len(classes), np.random.default_rng([self.seed, epoch, 1])).to(sequences.device)

        def make(start: int) -> tuple[Tensor, Tensor]:
            batch = slice(start, start + self.batch_size)
            inputs = sequences[order[batch]]
            if drawn is not None:
                inputs = self.augment(inputs, drawn[batch])
            return self.prepare(inputs), classes[order[batch]]

        return LazyBatches(range(0, len(classes), self.batch_size), make)

    def size(self, batch: tuple[Tensor, Tensor]) -> int:
        """Number of sequences in a batch."""
        return batch[1].numel()

    def loss(
        self, inputs: Tensor, targets: Tensor, state: None = None, masks: Masks | None = None
    ) -> tuple[Losses, None]:
        """Loss of a batch.

        Args:
            inputs: (N, L, C).
            targets: classes, int64 (N,).
            state: unused; no state is carried.
            masks: explicit dropout masks.

        Returns:
            0-dim `loss`, `raw` (the loss without label smoothing) in nats per sequence, and `accuracy` (0 to 1); and
            None for the state.
        """
        logits = self.model(inputs, masks=masks).logits
        loss = raw = F.cross_entropy(logits, targets)
        if self.label_smoothing:
            loss = F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
        accuracy = (logits.argmax(1) == targets).float().mean()
        return {"loss": loss, "raw": raw, "accuracy": accuracy}, None

    @torch.no_grad()
    def evaluate(
        self, data: tuple[Tensor, Tensor], *, max_tokens: int | None = None, progress: Progress | None = None
    ) -> dict:
        """Score sequences in evaluation mode; restores the model's mode.

        Args:
            data: sequences (n, L, C) and their classes, int64 (n,).
            max_tokens: stop after the batch in which this many sequences have been scored.
            progress: wraps the batches, e.g. in a progress bar.

        Returns:
            the mean `loss` in nats, `accuracy` from 0 to 1, and the number of `examples`.
        """
        sequences, classes = data
        starts = self._scored(len(classes), max_tokens)
        total, right, examples = 0.0, 0, 0
        with evaluating(self.model):
            for start in tracked(starts, progress):
                part = slice(start, start + self.eval_batch_size)
                logits, targets = self.model(self.prepare(sequences[part])).logits, classes[part]
                total += F.cross_entropy(logits, targets, reduction="sum").item()
                right += (logits.argmax(1) == targets).sum().item()
                examples += targets.numel()
        return self._result(total, right, examples)

    def _scored(self, examples: int, max_tokens: int | None) -> range:
        """Starts of this rank's batches, up to the one with the `max_tokens`th sequence of all ranks."""
        starts = range(0, examples, self.eval_batch_size)
        if max_tokens is not None:
            starts = starts[: max(1, math.ceil(max_tokens / self.eval_batch_size))]
        return self.ranks.part(starts)

    def _result(self, total: float, right: int, examples: int) -> dict:
        """Means over all ranks, from this rank's sums."""
        total, right, examples = self.ranks.sum(total, right, examples)
        return {"loss": mean(total, examples), "accuracy": mean(right, examples), "examples": examples}

    @torch.no_grad()
    def evaluate_mc(
        self,
        data: tuple[Tensor, Tensor],
        *,
        passes: int,
        max_tokens: int | None = None,
        progress: Progress | None = None,
    ) -> dict:
        """Score sequences by probabilities averaged over passes with dropout (Monte Carlo dropout).

        Args:
            data: sequences (n, L, C) and their classes, int64 (n,).
            passes: number of samples.
            max_tokens, progress: as in :meth:`evaluate`, whose result this extends by `passes`.
        """
        sequences, classes = data
        starts = self._scored(len(classes), max_tokens)
        total, right, examples = 0.0, 0, 0
        with evaluating(self.model):
            self.model.train()
            for start in tracked(starts, progress):
                part = slice(start, start + self.eval_batch_size)
                inputs, targets = self.prepare(sequences[part]), classes[part]
                samples = [F.log_softmax(self.model(inputs).logits, dim=1) for _ in range(passes)]
                log_p = torch.stack(samples).double().logsumexp(0) - math.log(passes)  # (n, classes)
                total += F.nll_loss(log_p, targets, reduction="sum").item()
                right += (log_p.argmax(1) == targets).sum().item()
                examples += targets.numel()
        return self._result(total, right, examples) | {"passes": passes}
