"""The gradient of a training batch, computed in slices of rows and summed over the ranks."""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trellisnet.training.config import RunConfig
from trellisnet.training.distributed import Ranks, reaching
from trellisnet.training.tasks import Task


class Gradients:
    """Gradients of a task's loss, batch by batch. Each rank computes its own rows of a batch.

    Args:
        task: the model and its losses.
        config: read for `accumulate`, the number of slices that the rows of a rank are computed in, and `precision`.
        ranks: the processes over which gradients are summed.
    """

    def __init__(self, task: Task, config: RunConfig, ranks: Ranks):
        self.task, self.config, self.ranks = task, config, ranks
        self._module: nn.Module | None = None
        if ranks.size > 1:
            with reaching(ranks.progress):
                self._module = nn.parallel.DistributedDataParallel(_LossModule(task), gradient_as_bucket_view=True)
                self._settle_buckets()

    def _settle_buckets(self) -> None:
        """Differentiate zero, so that a resumed run is bit-equal to an uninterrupted one.

        After its first backward pass DistributedDataParallel reorders its buckets by the order in which gradients
        arrived, which changes the order of the sums over ranks. This makes it do so before the first step.
        """
        self._module(None).backward()
        self.task.model.zero_grad(set_to_none=True)

    def __call__(self, batch: tuple[Tensor, ...], carry: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        """Replace the parameters' `grad` by the gradients of a batch.

        May be recorded as a CUDA graph, so it never copies from the device.

        Args:
            batch: the rows of all ranks.
            carry: this rank's state to start from.

        Returns:
            whether the loss, the gradient norm and each tensor of the state to carry are finite, as one bool tensor;
            this rank's share of the loss; the norm of all gradients; its shares of the means of `task.measured`; its
            state to carry.
        """
        config, model, ranks = self.config, self.task.model, self.ranks
        model.zero_grad(set_to_none=True)
        units, own = self.task.size(batch), [ranks.part(part) for part in batch]
        if idle := own[0].size(0) == 0:  # the last batch of an epoch may have fewer rows than there are ranks
            own = [part[:1] for part in batch]  # an idle rank takes part in the reduction with a weight of 0
        pieces = min(config.accumulate, own[0].size(0))
        slices = list(zip(*(part.tensor_split(pieces) for part in own), strict=True))
        states = [None] * len(slices)
        if carry is not None:
            states = list(zip(*(part.tensor_split(pieces) for part in carry), strict=True))
        means, carried, total = dict.fromkeys(self.task.measured, 0.0), [], 0.0
        for number, (part, state) in enumerate(zip(slices, states, strict=True), start=1):
            share = 0.0 if idle else self.task.size(part) / units
            losses, state = self._backward(part, state, share, last=number == len(slices))
            total = total + losses["loss"] * share  # not detached: this keeps alive what a recorded graph reads
            for name in means:
                means[name] = means[name] + losses["raw" if name == "loss" else name].detach() * share
            carried.append(state)
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        carry = [torch.cat(parts) for parts in zip(*carried, strict=True)] if carried[0] is not None else []
        finite = torch.stack([value.isfinite().all() for value in (total, norm, *carry)])
        return finite, total, norm, *means.values(), *carry

    def _backward(
        self, part: Sequence[Tensor], state: Any, share: float, *, last: bool
    ) -> tuple[dict[str, Tensor], Any]:
        """Add the gradient of a slice to the parameters' `grad`.

        Args:
            part: the slice.
            state: the state to start from.
            share: number of its units (`Task.size`) as a fraction of those of the batch.
            last: whether it is the last slice of the batch, after which the gradients are summed over the ranks.

        Returns:
            losses and state of `Task.loss`; with several ranks the losses are detached.
        """
        autocast = self.config.autocast(part[0].device)
        if self._module is None:
            with autocast:
                losses, state = self.task.loss(*part, state=state)
            (losses["loss"] * share).backward()
            return losses, state
        with contextlib.nullcontext() if last else self._module.no_sync(), reaching():
            with autocast:
                # DistributedDataParallel averages over the ranks.
                objective, losses, state = self._module(part, state, share * self.ranks.size)
            with self.ranks.progress.meeting() if last else contextlib.nullcontext():
                objective.backward()
        return losses, state


class _LossModule(nn.Module):
    """A task's loss as a module, for DistributedDataParallel."""

    def __init__(self, task: Task):
        super().__init__()
        self.model = task.model
        self._loss = task.loss

    def forward(
        self, part: Sequence[Tensor] | None, state: Any = None, weight: float = 0.0
    ) -> tuple[Tensor, dict[str, Tensor], Any] | Tensor:
        if part is None:
            return sum(parameter.view(-1)[0] * 0 for parameter in self.parameters() if parameter.requires_grad)
        losses, state = self._loss(*part, state=state)
        return losses["loss"] * weight, {name: value.detach() for name, value in losses.items()}, state
