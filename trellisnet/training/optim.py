"""The optimiser and the learning-rate schedule."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from trellisnet.errors import UserError
from trellisnet.training.config import RunConfig

_UNUSABLE = {"LBFGS": "needs to evaluate the loss several times a step", "SparseAdam": "needs sparse gradients"}


@dataclass
class Schedule:
    """The learning rate: the authors' rules for all their tasks.

    After an epoch the rate is divided by `factor` if the validation loss exceeds the best one older than `anneal`
    epochs, as long as the rate is above `floor`; and by 10 if the epoch is one of `when`.

    Args:
        lr: current rate.
        anneal: patience in epochs; 0: no annealing on plateaus.
        factor: divisor on a plateau.
        floor: no annealing on plateaus at or below this rate.
        when: epochs, counted from 1, after which the rate is divided by 10.
        history: validation losses of the epochs so far.
    """

    lr: float
    anneal: int = 0
    factor: float = 4.0
    floor: float = 0.0
    when: list[int] = field(default_factory=list)
    history: list[float] = field(default_factory=list)

    def step(self, epoch: int, loss: float) -> float:
        """Take the validation loss of `epoch`; returns the rate for the next one."""
        older = self.history[: -self.anneal] if self.anneal else []
        if older and loss > min(older) and self.lr > self.floor:
            self.lr /= self.factor
        if epoch in self.when:
            self.lr /= 10
        self.history.append(loss)
        return self.lr


def make_optimizer(parameters: Iterable[nn.Parameter], config: RunConfig) -> torch.optim.Optimizer:
    """The class of torch.optim that `--optim` names, with `--lr` and `--wdecay`.

    Raises:
        UserError: no such class, or one that needs a closure, sparse gradients or other settings.
    """
    name = config.optim
    if name in _UNUSABLE:
        raise UserError(f"--optim {name}: {_UNUSABLE[name]}, which this engine does not do; use SGD or Adam")
    cls = getattr(torch.optim, name, None)
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)) or cls is torch.optim.Optimizer:
        raise UserError(f"--optim {name}: no such optimiser in torch.optim; use SGD or Adam")
    try:
        return cls(parameters, lr=config.lr, weight_decay=config.wdecay)
    except (TypeError, ValueError) as e:
        raise UserError(f"--optim {name}: cannot be made with these settings ({e}); use SGD or Adam") from e
