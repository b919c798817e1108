"""The optimiser, averages of the weights and the learning-rate schedule."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import get_ema_multi_avg_fn

from trellisnet.errors import UserError
from trellisnet.serialization import all_finite
from trellisnet.training.config import RunConfig

FIRST_PLATEAU = 5  # epochs before the first that `recent` can call a plateau
_UNUSABLE = {"LBFGS": "needs to evaluate the loss several times per step", "SparseAdam": "needs sparse gradients"}


def make_optimizer(parameters: Iterable[nn.Parameter], config: RunConfig) -> torch.optim.Optimizer:
    """Make the optimiser of torch.optim that `--optim` names, with `--lr`, `--wdecay` and, unless 0, `--momentum`.

    Raises:
        UserError: no such class, one that needs a closure or sparse gradients, or one that cannot make a step with
            these settings.
    """
    options = {"lr": config.lr, "weight_decay": config.wdecay}
    options |= {"momentum": config.momentum} if config.momentum else {}
    name = config.optim
    if name in _UNUSABLE:
        raise UserError(f"--optim {name}: {_UNUSABLE[name]}, which this engine does not do; use SGD or Adam")
    cls = getattr(torch.optim, name, None)
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)) or cls is torch.optim.Optimizer:
        raise UserError(f"--optim {name}: no such optimiser in torch.optim; use SGD or Adam")
    parameters = list(parameters)
    try:
        _try(cls, parameters[0].dtype, options)
        return cls(parameters, **options)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as e:  # some settings fail only in a step
        values = ", ".join(f"{key} {value:g}" for key, value in options.items())
        raise UserError(f"--optim {name}: does not work with {values} ({e}); lower these or change --optim") from e


def _try(cls: type[torch.optim.Optimizer], dtype: torch.dtype, options: dict[str, float]) -> None:
    """Make one step from 1 with gradient 1; raise the optimiser's error, or ValueError if the result is not finite."""
    probe = nn.Parameter(torch.ones(1, 1, dtype=dtype))  # on the CPU, to wait for no device
    probe.grad = torch.ones_like(probe)
    cls([probe], **options).step()
    if not probe.isfinite().all():
        raise ValueError("an update is not a finite number")


def check_state(optimizer: torch.optim.Optimizer, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> None:
    """Compare the settings and state loaded into an optimiser with those of a new one after a step.

    Args:
        optimizer: the loaded one.
        make: makes a new one of the same kind for given parameters.

    Raises:
        ValueError: an entry is missing, of another type or shape, or not finite.
    """
    for group in optimizer.param_groups:
        for p in filter(optimizer.state.__contains__, group["params"]):
            probe = nn.Parameter(torch.zeros_like(p))  # one at a time, to save memory
            probe.grad = torch.zeros_like(p)
            fresh = make([probe])
            fresh.step()
            for name, value in fresh.param_groups[0].items():
                if name != "params" and _kind(group.get(name, value)) != _kind(value):
                    raise ValueError(f"{name} of the optimiser is {group[name]!r:.40}")
            ours, theirs = fresh.state[probe], optimizer.state[p]
            if _shapes(ours) != _shapes(theirs):
                raise ValueError("the optimiser's state has other entries or shapes")
            if not all(all_finite(v) for v in theirs.values() if isinstance(v, Tensor)):
                raise ValueError("the optimiser's state is not finite")


def _kind(value: Any) -> Any:
    """The kind of an optimiser's setting: all numbers are of one kind, and so are flags and None."""
    if isinstance(value, tuple | list):
        return [_kind(item) for item in value]
    if isinstance(value, float | int) and not isinstance(value, bool):
        return float if math.isfinite(value) else value
    return bool if value is None else type(value)


def _shapes(state: dict[str, Any]) -> dict[str, Any]:
    return {k: v.shape if isinstance(v, Tensor) else float for k, v in state.items() if v is not None}


def make_averaging(parameters: Iterable[nn.Parameter], config: RunConfig) -> torch.optim.ASGD:
    """Averaged SGD as in the authors' `--asgd`: the initial rate, kept constant, and the average of all iterates."""
    return torch.optim.ASGD(parameters, lr=config.lr, t0=0, lambd=0.0, weight_decay=config.wdecay)


class EMA:
    """Exponential moving average of the weights after every update, starting with those after the first update.

    Args:
        parameters: the weights.
        decay: share of the average that an update keeps.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float):
        self._parameters = list(parameters)
        self._averages: list[Tensor] = []
        self._average = get_ema_multi_avg_fn(decay)  # AveragedModel would wait for the device in every update

    def update(self) -> None:
        """Include the current weights in the average."""
        if self._averages:
            self._average(self._averages, [p.detach() for p in self._parameters], None)
        else:
            self._averages = [p.detach().clone() for p in self._parameters]

    def pairs(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Every weight with its average; none before the first update."""
        return list(zip(self._parameters, self._averages, strict=bool(self._averages)))


def averages(optimizer: torch.optim.Optimizer, ema: EMA | None = None) -> list[tuple[nn.Parameter, Tensor]]:
    """Pairs of weight and average: the average of `ema`, or else the one that ASGD keeps in its state."""
    if ema is not None:
        return ema.pairs()
    return [(p, state["ax"]) for p, state in optimizer.state.items() if "ax" in state]


@torch.no_grad()
def put(pairs: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
    """Copy the second of every pair into the first."""
    for p, value in pairs:
        p.copy_(value)


@contextlib.contextmanager
def averaged(
    pairs: list[tuple[nn.Parameter, Tensor]],
    held: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> Iterator[None]:
    """Replace the weights by their averages in the body; without averages do nothing.

    Args:
        pairs: from :func:`averages`.
        held: delays signals while weights are exchanged.
    """
    raw = [(p, p.detach().clone()) for p, _ in pairs]
    try:
        with held():
            put(pairs)
        yield
    finally:
        try:
            with held():
                put(raw)
        except BaseException:  # a signal that came just before `held` delays them
            put(raw)
            raise


class Curve:
    """Factor of the learning rate in every update, from torch's own schedulers.

    It depends only on the number of updates made, so that a resumed run needs nothing else. The schedulers drive an
    optimiser of their own: the one that trains may be replaced (ASGD), and tasks scale its rate per batch.

    Args:
        schedule: "step": 1. "cosine": from 1 along half a cosine to 0 (CosineAnnealingLR). "onecycle": from 1/25 up
            to 1 and down to 1/250,000, each along half a cosine (OneCycleLR; momentum is left alone).
        warmup: updates before 1 is reached, in which the factor rises linearly (LinearLR), or for "onecycle" along its
            first half cosine; 0: none, or for "onecycle" 30 % of all.
        updates: of the whole run; "step" ignores it.

    Raises:
        UserError: the warm-up fills the run.
    """

    def __init__(self, schedule: str, warmup: int, updates: int):
        if schedule != "step" and warmup >= updates:
            raise UserError(f"--warmup {warmup}: --schedule {schedule} needs fewer than the run's {updates:,} updates")
        optimizer = self._optimizer = torch.optim.SGD([torch.zeros(())], lr=1.0)
        self._update = 0
        self._scheduler: lr_scheduler.LRScheduler | None = None
        if schedule == "onecycle":
            rise = warmup / updates if warmup else 0.3
            options = {"pct_start": rise, "cycle_momentum": False}
            self._scheduler = lr_scheduler.OneCycleLR(optimizer, 1.0, updates, **options)
            return
        parts: list[lr_scheduler.LRScheduler] = []
        if warmup:
            parts.append(lr_scheduler.LinearLR(optimizer, 1 / (warmup + 1), total_iters=warmup))
        if schedule == "cosine":
            parts.append(lr_scheduler.CosineAnnealingLR(optimizer, updates - warmup))
        if parts:
            self._scheduler = lr_scheduler.SequentialLR(optimizer, parts, [warmup] * (len(parts) - 1))

    def factor(self, update: int) -> float:
        """Factor of update number `update`, counted from 0; the number must not decrease from call to call."""
        while self._scheduler is not None and self._update < update:
            self._optimizer.step()  # first, or torch warns; there is nothing to update
            self._scheduler.step()
            self._update += 1
        return self._optimizer.param_groups[0]["lr"]


@dataclass
class Schedule:
    """The learning rate: the authors' rules for all their tasks, and those of the baselines.

    After an epoch the rate is divided by `factor` if the validation loss exceeds the best one older than `anneal`
    epochs, as long as the rate is above `floor`; otherwise by 10 if the epoch is one of `when`, as long as the rate is
    above `when_floor`. After every epoch from `decay_from` on it is also divided by `decay`.

    Args:
        lr: current rate.
        anneal: patience in epochs; 0: no annealing on plateaus.
        recent: instead of `anneal`: a plateau is a loss not below the worst of the `recent` epochs before, from the
            sixth epoch on (the rule of the TCN's authors); 0: use `anneal`.
        factor: divisor on a plateau.
        floor: no annealing on plateaus at or below this rate.
        when: epochs, counted from 1, after which the rate is divided by 10.
        when_floor: no division after these epochs at or below this rate.
        decay, decay_from: see above; a `decay` of 1 changes nothing.
        asgd: at the first plateau switch to averaged SGD instead, at the initial rate, and never anneal after it.
        finetune: begin with averaged SGD, and end at the first plateau.
        min_epochs: epochs before finetuning may end.
        averaging: whether averaged SGD has begun.
        curve: factor of the rate in every update; None: 1.
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
    finetune: bool = False
    min_epochs: int = 0
    curve: Curve | None = None
    averaging: bool = False
    history: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.initial = self.lr
        self.averaging = self.averaging or self.finetune

    def state_dict(self) -> dict[str, Any]:
        """The values that change during a run."""
        return {"lr": self.lr, "history": list(self.history), "averaging": self.averaging}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.lr, self.history, self.averaging = state["lr"], list(state["history"]), bool(state["averaging"])

    def rate(self, update: int) -> float:
        """Rate of update number `update`, counted from 0; the number must not decrease from call to call."""
        return self.lr if self.curve is None else self.lr * self.curve.factor(update)

    def step(self, epoch: int, loss: float) -> float:
        """Record the validation loss of `epoch` (NaN if there is none), and return the rate for the next one."""
        if not self.averaging:
            plateau = self._is_plateau(loss, self.history)
            if plateau and self.asgd:
                self.averaging, self.lr = True, self.initial
            elif plateau and self.lr > self.floor:
                self.lr /= self.factor
            elif epoch in self.when and self.lr > self.when_floor:
                self.lr /= 10
            if epoch >= self.decay_from and not self.averaging:
                self.lr /= self.decay
        if not math.isnan(loss):
            self.history.append(loss)
        return self.lr

    @property
    def ended(self) -> bool:
        """True once finetuning has reached its plateau."""
        if not self.finetune or len(self.history) < max(self.min_epochs, 1):
            return False
        *before, last = self.history
        return self._is_plateau(last, before)

    @property
    def patience(self) -> int:
        """Number of epochs by which a plateau is defined."""
        return self.recent or self.anneal

    def _is_plateau(self, loss: float, history: list[float]) -> bool:
        if self.recent:
            return len(history) >= FIRST_PLATEAU and loss >= max(history[-self.recent :])
        older = history[: -self.anneal] if self.anneal else []
        return bool(older) and loss > min(older)


def make_schedule(config: RunConfig, updates: Callable[[int], int], **plateaus: Any) -> Schedule:
    """Build the schedule that the settings describe.

    Args:
        config: the settings.
        updates: number of updates of an epoch, given its number from 0.
        plateaus: the task's rules on plateaus, arguments of :class:`Schedule`; only --schedule step has plateaus.

    Raises:
        UserError: the warm-up fills the run.
    """
    if config.eval:
        return Schedule(config.lr)
    if config.schedule == "step":
        curve = Curve("step", config.warmup, 0) if config.warmup else None
        rules = {"when": config.when, "decay": config.decay, "decay_from": config.decay_from}
        return Schedule(config.lr, curve=curve, **rules, **plateaus)
    total = sum(map(updates, range(config.epochs)))
    if config.max_steps:
        total = min(total, config.max_steps)
    return Schedule(config.lr, curve=Curve(config.schedule, config.warmup, total))
