"""The optimiser and the learning-rate schedule."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from trellisnet.errors import UserError
from trellisnet.training.config import RunConfig

FIRST_PLATEAU = 5  # epochs before the first that can be one by `recent`
_UNUSABLE = {"LBFGS": "needs to evaluate the loss several times a step", "SparseAdam": "needs sparse gradients"}


def make_optimizer(parameters: Iterable[nn.Parameter], config: RunConfig) -> torch.optim.Optimizer:
    """The class of torch.optim that `--optim` names, with `--lr`, `--wdecay` and, unless it is 0, `--momentum`.

    Raises:
        UserError: no such class, or one that needs a closure, sparse gradients or other settings.
    """
    more = {"momentum": config.momentum} if config.momentum else {}
    name = config.optim
    if name in _UNUSABLE:
        raise UserError(f"--optim {name}: {_UNUSABLE[name]}, which this engine does not do; use SGD or Adam")
    cls = getattr(torch.optim, name, None)
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)) or cls is torch.optim.Optimizer:
        raise UserError(f"--optim {name}: no such optimiser in torch.optim; use SGD or Adam")
    try:
        return cls(parameters, lr=config.lr, weight_decay=config.wdecay, **more)
    except (TypeError, ValueError) as e:
        raise UserError(f"--optim {name}: cannot be made with these settings ({e}); use SGD or Adam") from e


def make_averaging(parameters: Iterable[nn.Parameter], config: RunConfig) -> torch.optim.ASGD:
    """Averaged SGD as in the authors' `--asgd`: the initial rate, kept constant, and the average of all iterates."""
    return torch.optim.ASGD(parameters, lr=config.lr, t0=0, lambd=0.0, weight_decay=config.wdecay)


@contextlib.contextmanager
def averaged(
    optimizer: torch.optim.Optimizer,
    held: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> Iterator[None]:
    """Put the averaged weights of ASGD in place of the parameters for a while; nothing happens without an average.

    Args:
        optimizer: the optimiser that may hold an average.
        held: keeps signals out while weights are exchanged.
    """
    pairs = [(p, state["ax"]) for p, state in optimizer.state.items() if "ax" in state]
    raw = [p.detach().clone() for p, _ in pairs]
    try:
        with held(), torch.no_grad():
            for p, average in pairs:
                p.copy_(average)
        yield
    finally:
        with held(), torch.no_grad():
            for (p, _), value in zip(pairs, raw, strict=True):
                p.copy_(value)


@dataclass
class Schedule:
    """The learning rate: the authors' rules for all their tasks, and those of the networks it is compared with.

    After an epoch the rate is divided by `factor` if the validation loss exceeds the best one older than `anneal`
    epochs, as long as the rate is above `floor`; otherwise by 10 if the epoch is one of `when`, as long as the rate is
    above `when_floor`. After every epoch from `decay_from` on it is divided by `decay` besides.

    Args:
        lr: current rate.
        anneal: patience in epochs; 0: no annealing on plateaus.
        recent: instead of `anneal`: a plateau is a loss not below the worst of so many epochs before, from the sixth
            epoch on (the rule of the TCN's authors); 0: by `anneal`.
        factor: divisor on a plateau.
        floor: no annealing on plateaus at or below this rate.
        when: epochs, counted from 1, after which the rate is divided by 10.
        when_floor: no division at them at or below this rate.
        decay, decay_from: see above; with 1 nothing happens.
        asgd: at the first plateau switch to averaged SGD instead, at the initial rate, and never anneal after it.
        averaging: whether that has happened.
        history: validation losses of the epochs so far.
    """

    lr: float
    anneal: int = 0
    recent: int = 0
    factor: float = 4.0
    floor: float = 0.0
    when: list[int] = field(default_factory=list)
    when_floor: float = 0.0
    decay: float = 1.0
    decay_from: int = 1
    asgd: bool = False
    averaging: bool = False
    history: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.initial = self.lr

    def step(self, epoch: int, loss: float) -> float:
        """Take the validation loss of `epoch`; returns the rate for the next one."""
        if not self.averaging:
            if self._is_plateau(loss) and self.lr > self.floor:
                if self.asgd:
                    self.averaging, self.lr = True, self.initial
                else:
                    self.lr /= self.factor
            elif epoch in self.when and self.lr > self.when_floor:
                self.lr /= 10
            if epoch >= self.decay_from and not self.averaging:
                self.lr /= self.decay
        self.history.append(loss)
        return self.lr

    def _is_plateau(self, loss: float) -> bool:
        if self.recent:
            return len(self.history) >= FIRST_PLATEAU and loss >= max(self.history[-self.recent :])
        older = self.history[: -self.anneal] if self.anneal else []
        return bool(older) and loss > min(older)
