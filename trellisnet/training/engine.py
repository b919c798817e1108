"""The training engine: the loop, logging, checkpoints, resume. It knows no task and no data."""

import contextlib
import copy
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from trellisnet import serialization
from trellisnet.errors import RunError, UserError, counted, shown
from trellisnet.training import checkpoint
from trellisnet.training.config import RunConfig, to_settings
from trellisnet.training.distributed import Gradient, Ranks, Told
from trellisnet.training.graphs import CUDARecorder, Recorded
from trellisnet.training.interrupts import Interrupted, Interrupts
from trellisnet.training.optim import (
    EMA,
    Schedule,
    averaged,
    averages,
    check_state,
    make_averaging,
    make_optimizer,
    put,
)
from trellisnet.training.runlog import NoFolder, RunFolder
from trellisnet.training.tasks import Splits, Task

FIRST_STEPS, FIRST_SECONDS = 10, 30  # after so many steps or seconds the time of an epoch can be told


@dataclass
class Result:
    """What a run came to. `valid`, `test` and what is in `extra_evaluations` are results of :func:`evaluate`."""

    valid: dict[str, Any] | None = None
    test: dict[str, Any] | None = None
    epochs: int = 0
    steps: int = 0
    best_epoch: int | None = None
    complete: bool = False
    seconds: float = 0.0
    extra_evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)


class Bar(tqdm):
    """A progress bar. On a narrow terminal it leaves out what does not fit of the figures behind it, but the speed.

    tqdm would cut the line within a number, which then reads as another number.
    """

    def show(self, figures: list[str]) -> None:
        """Show figures behind the bar, the last of them, the speed, first."""
        self.set_postfix_str("  ".join([*figures[-1:], *figures[:-1]]))

    @staticmethod
    def format_meter(*args: Any, ncols: int | None = None, postfix: str | None = None, **options: Any) -> str:
        figures = postfix.split("  ") if postfix else []
        if figures:
            options["bar_format"] = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        # Without `ncols` the bar is ten characters wide, and one of them is enough.
        while figures and ncols and len(tqdm.format_meter(*args, postfix="  ".join(figures), **options)) > ncols + 9:
            figures.pop()
        return tqdm.format_meter(*args, ncols=ncols, postfix="  ".join(figures), **options)


def bar(iterable: Iterable | None = None, total: int | None = None, **options: Any) -> Bar:
    """A progress bar on standard error; silent where that is no terminal."""
    return Bar(iterable, total=total, disable=None, dynamic_ncols=True, leave=False, **options)


def evaluate(
    task: Task,
    data: Any,
    name: str,
    config: RunConfig,
    method: Callable[..., dict[str, Any]] | None = None,
    ranks: Ranks | None = None,
    interrupts: Interrupts | None = None,
) -> dict[str, Any]:
    """Score one split by `method` (default: `Task.evaluate`); adds the scores, and `partial` if it was cut short.

    `name` is "valid" or "test", or one of these and, after an underscore, how it is evaluated. The task divides the
    work among the ranks, which all get the same result.

    Raises:
        RunError: the loss or the score is not finite.
        Interrupted: one of several ranks has been told to end.
    """
    limit = config.max_eval_tokens or None
    ranks, interrupts = ranks or Ranks(), interrupts or Interrupts()

    def progress(it: Iterable, total: int) -> Iterable:
        shown = bar(it, total, desc=name, unit=task.batch_name)
        return shown if ranks.size == 1 else itertools.takewhile(going_on, shown)

    def going_on(_: Any) -> bool:
        """A rank that has been told to end leaves off, and tells the others where all meet."""
        ranks.progress.work += 1
        return not interrupts.pending

    try:
        with config.autocast(next(task.model.parameters()).device):
            result = (method or task.evaluate)(data, max_tokens=limit, progress=progress)
    except ValueError:
        ranks.heed(interrupts.pending)  # who leaves off at once has nothing to score
        raise
    ranks.heed(interrupts.pending)
    result |= task.scores(result, name.split("_")[0])
    score = result[task.score_name]
    if not math.isfinite(result["loss"]) or not math.isfinite(score):
        raise RunError(f"the {name} loss is {result['loss']:g}, {task.score_name} {score:g}; lower --lr or --clip")
    if limit:
        result["partial"] = True
    return result


def score_line(task: Task, name: str, result: dict[str, Any]) -> str:
    """A result of :func:`evaluate` in words."""
    main = result[task.score_name]
    others = [key for key in task.scores(result, name.split("_")[0]) if result[key] != main]
    scores = "  ".join(f"{key} {result[key]:.{task.digits}f}" for key in [task.score_name, *others])
    marks = {"partial": "partial", "init_tail": "tail vectors not trained"}
    marked = ", ".join(text for mark, text in marks.items() if mark in result)
    line = f"{name} {scores}  loss {result['loss']:.4f} nats  {counted(result[task.count], task.count)}"
    if "settings" in result:
        settings = result["settings"].items()
        line += "  " + " ".join(f"{key} {v:g}" if isinstance(v, float) else f"{key} {v}" for key, v in settings)
    return f"{line} ({marked})" if marked else line


class _Meter:
    """What is measured, of how much and how long, since it was made. It stays on the device until it is asked for."""

    def __init__(self, measured: Sequence[str], ranks: Ranks) -> None:
        self.ranks = ranks
        self.started = self.shown = time.monotonic()
        self.steps = self.count = 0
        self._totals: dict[str, float | Tensor] = dict.fromkeys(measured, 0.0)

    def add(self, means: dict[str, Tensor], count: int) -> None:
        """Add a batch: `count` is all ranks', and so are the means, but that each rank gives only its share of them."""
        for name, mean in means.items():
            self._totals[name] = self._totals[name] + mean.detach() * count
        self.count += count
        self.steps += 1

    def totals(self) -> dict[str, float]:
        """Sums over all tokens or examples; waits for the device, and for the other ranks."""
        sums = self.ranks.sum(*map(float, self._totals.values()))
        return dict(zip(self._totals, sums, strict=True))

    def means(self) -> dict[str, float]:
        """Means of a token or an example; waits as well."""
        self.shown = time.monotonic()
        return {name: total / self.count for name, total in self.totals().items()}

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started


def rehearse(task: Task, splits: Splits, config: RunConfig, ranks: Ranks) -> None:
    """Compute the loss and the gradient of the first batch and discard them, to fail before anything is lost.

    A step that does not fit into memory fails here. Weights and random number generators are left as they were; nothing
    is communicated.

    Raises:
        RunError: loss or gradient are not finite, and `skip_bad_steps` does not allow for it.
    """
    parameters, rng = list(task.model.parameters()), checkpoint.rng_state()
    batch = [ranks.part(part) if len(part) >= ranks.size else part[:1] for part in task.batches(splits.train, 0)[0]]
    batch = [part.tensor_split(min(config.accumulate, len(part)))[0] for part in batch]
    task.model.train()
    with config.autocast(parameters[0].device):
        losses, _ = task.loss(*batch)
    losses["loss"].backward()
    loss, norm = (
        losses["loss"].item(),
        nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]).item(),
    )
    task.model.zero_grad(set_to_none=True)
    checkpoint.set_rng_state(rng)
    if not (math.isfinite(loss) and math.isfinite(norm)) and not config.skip_bad_steps:
        raise RunError(f"the first batch has loss {loss:g} and gradient norm {norm:g}, which is not finite")


class Trainer:
    """One training run. :func:`fit` is the way in.

    Args:
        task: what is learned.
        splits: the data.
        config: the settings.
        folder: where the run leaves its files.
        optimizer: updates the parameters of `task.model`.
        schedule: the learning rate.
        save_weights: writes the model's weights in a task-independent layout to a path.
        command: the command line that started the run, kept with it.
        interrupts: holds signals back where a step must be whole.
        say: prints a line for the user.
        ranks: the processes that train together. The first one writes; all do the rest.
    """

    def __init__(
        self,
        task: Task,
        splits: Splits,
        config: RunConfig,
        folder: RunFolder | NoFolder,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        save_weights: Callable[[nn.Module, Any], None],
        command: str,
        interrupts: Interrupts,
        say: Callable[[str], None],
        ranks: Ranks,
    ):
        self.task, self.splits, self.config, self.folder = task, splits, config, folder
        self.optimizer, self.schedule = optimizer, schedule
        self.save_weights, self.command = save_weights, command
        self.interrupts, self.say, self.ranks = interrupts, say, ranks
        self.gradient = Gradient(task, ranks)
        self.told: Told | None = None  # of the last step
        self.epoch = self.batch = self.step = 0
        self.carry: Any = None
        self.lr = schedule.rate(0)  # of the last update, or the first one
        self.ema = EMA(task.model.parameters(), config.ema) if config.ema else None
        self.best: dict[str, Any] | None = None
        self.skipped = 0  # steps, see --skip_bad_steps
        # Of this epoch, up to the last log line; and since then.
        self.running = {**dict.fromkeys(task.measured, 0.0), "count": 0, "seconds": 0.0}
        self.meter = _Meter(task.measured, ranks)
        self.seconds_before = 0.0
        self.started = self.saved = time.monotonic()
        self.gradients = self._gradients
        if config.cuda_graph == "on":
            parameters = list(task.model.parameters())
            self.gradients = Recorded(self._gradients, parameters, CUDARecorder(parameters[0].device))

    # -- state of the run ------------------------------------------------------------------------------------------

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    def checkpoint(self) -> dict[str, Any]:
        """Everything needed to go on. Its tensors are those of the model and the optimizer, not copies."""
        carry, rng, others = self.carry, checkpoint.rng_state(), []
        if self.ranks.size > 1:
            own = carry if carry is None else tuple(part.cpu() for part in carry)
            carries, (rng, *others) = zip(*self.ranks.gather((own, rng)), strict=True)
            carry = carry if carry is None else tuple(map(torch.cat, zip(*carries, strict=True)))
        return {
            "task": self.config.task,
            "settings": to_settings(self.config),
            "command": self.command,
            "data": self.splits.fingerprint,
            "model": self.task.model.state_dict(),
            "average": None,
            "optimizer": self.optimizer.state_dict(),
            "schedule": {
                "lr": self.schedule.lr,
                "history": list(self.schedule.history),
                "averaging": self.schedule.averaging,
            },
            "epoch": self.epoch,
            "batch": self.batch,
            "carry": carry,
            "step": self.step,
            "best": self.best,
            "seconds": self.seconds,
            "running": self._running(),
            "skipped": self.skipped,
            "rng": rng,
            "rng_others": list(others),
        }

    def _running(self) -> dict[str, float]:
        """The sums of the epoch so far."""
        since = {**self.meter.totals(), "count": self.meter.count, "seconds": self.meter.seconds}
        return {name: value + since[name] for name, value in self.running.items()}

    def restore(self, content: dict[str, Any]) -> None:
        """Put back what :meth:`checkpoint` returned; `content` is emptied, lest callers keep a second set of weights.

        Raises:
            UserError: the data are not those of the run, the content is damaged, or best.pt is missing or damaged.
        """
        try:
            self._restore(content)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as e:
            if isinstance(e, UserError):
                raise
            reason = str(e).strip().splitlines()[-1][:120] if str(e).strip() else type(e).__name__
            raise UserError(f"the checkpoint does not fit this run, or is damaged ({reason})") from e
        content.clear()

    def _restore(self, content: dict[str, Any]) -> None:
        known = self.splits.fingerprint[: max(len(content["data"]), 4)]  # older ones end before the vocabulary
        if content["data"] != known:
            if self.splits.changed and content["data"][0] in (self.splits.sha256, self.splits.stored_sha256):
                raise UserError(
                    f"the run was started by a version that read these data otherwise: now they are read "
                    f"{self.splits.changed}; start a new run, or continue it with that version (see its log.txt)"
                )
            raise UserError(
                f"the data differ from those the run was started on (sha256 {self.splits.sha256[:12]}… instead of "
                f"{content['data'][0][:12]}…); name those with --data"
            )
        self.best = content["best"]
        if self.best is not None and self.ranks.first:
            self._load_best()
            if (valid := self.best["valid"]) is not None:  # what will be asked of it
                score_line(self.task, "valid", valid)
                self.task.is_better(valid, valid)
        self._check_weights(content["model"])
        if self.ema is not None and content["average"] is not None:
            self.task.model.load_state_dict(content["average"])
            self.ema.update()  # the first one copies
        self.task.model.load_state_dict(content["model"])
        self.schedule.lr = content["schedule"]["lr"]
        self.schedule.history = list(content["schedule"]["history"])
        self.schedule.averaging = bool(content["schedule"]["averaging"])
        if self.schedule.averaging:
            self.optimizer = make_averaging(self.task.model.parameters(), self.config)
        self.optimizer.load_state_dict(content["optimizer"])
        make = make_averaging if self.schedule.averaging else make_optimizer
        check_state(self.optimizer, lambda parameters: make(parameters, self.config))
        self.epoch, self.batch, self.step = (content[key] for key in ("epoch", "batch", "step"))
        self.lr = self.schedule.rate(max(self.step - 1, 0))
        device = next(self.task.model.parameters()).device
        carry = content["carry"]
        self.carry = carry if carry is None else tuple(self.ranks.part(part).to(device) for part in carry)
        self._check_place()
        running = dict(content["running"])
        running["count"] = running.pop("tokens", None) or running.get("count", 0)  # its name in older checkpoints
        self.running = {name: float(running[name]) for name in self.running}
        self.seconds_before, self.skipped = content["seconds"], content["skipped"]
        self._restore_rng([content["rng"], *content["rng_others"]])

    def _check_weights(self, weights: dict[str, Tensor]) -> None:
        """Raise ValueError unless these are weights of the model, and finite."""
        kinds = [{name: (t.shape, t.dtype) for name, t in w.items()} for w in (self.task.model.state_dict(), weights)]
        if kinds[0] != kinds[1]:
            names = sorted(name for name in {**kinds[0], **kinds[1]} if kinds[0].get(name) != kinds[1].get(name))
            raise ValueError(f"other weights than this model's: {shown(names[0])}")
        if not all(map(serialization.all_finite, weights.values())):
            raise ValueError("weights that are not finite")

    def _check_place(self) -> None:
        """Raise ValueError unless the epoch has as many batches, and the carried state fits the next one."""
        batches = self.task.batches(self.splits.train, self.epoch)
        if self.batch > len(batches):
            raise ValueError(f"batch {self.batch} of an epoch of {len(batches)}")
        if self.carry is not None:
            with torch.no_grad():
                self.task.loss(*map(self.ranks.part, batches[min(self.batch, len(batches) - 1)]), state=self.carry)

    def _restore_rng(self, states: list[dict[str, Any]]) -> None:
        ranks = self.ranks
        if ranks.first or ranks.size == len(states):
            checkpoint.set_rng_state(states[ranks.rank])
        else:
            ranks.seed(self.config.seed, self.step)
        if ranks.size != len(states):
            line = (
                f"NOTICE: the checkpoint is of {counted(len(states), 'ranks')}, this run has {ranks.size}: the first "
                "goes on with its random numbers, others begin new ones"
            )
            self.say(line)
            self.folder.log(line)

    # -- the loop --------------------------------------------------------------------------------------------------

    def run(self) -> Result:
        """Train to the last epoch (or `max_steps`), then score validation and test with the best weights."""
        if self.ranks.size > 1:
            self.interrupts.note()  # ranks end together, or would wait for each other in vain
        try:
            while self.epoch < self.config.epochs and not self._stopped():
                finished = self._train_epoch(self.task.batches(self.splits.train, self.epoch))
                self._end_epoch(finished)
        except Interrupted:
            with self.interrupts.held():
                self._save(best=False)
            raise
        return self._finish()

    def _load_best(self) -> dict[str, Any]:
        """best.pt, which must be the one that last.pt tells of; its tensors stay in the file."""
        path = self.folder.file("best.pt")
        try:
            best = checkpoint.load(path, mmap=True)
        except UserError as e:
            weights = self.folder.file("weights.pkl")
            raise UserError(f"{e}; put a copy of it back, or begin anew from its weights, {weights}") from e
        if best["best"] != self.best:
            of = best["best"] and best["best"]["epoch"]
            raise UserError(
                f"{path}: is of epoch {of}, last.pt tells of epoch {self.best['epoch']}; put the files of one run "
                "together"
            )
        # Under each other's names their sums are right, but the weights are not the best.
        if (best["epoch"], best["batch"]) != (self.best["epoch"], 0):
            raise UserError(f"{path}: was not written at the end of its epoch; put the files back under their names")
        try:
            self._check_weights(best["average"] or best["model"])
        except ValueError as e:
            raise UserError(f"{path}: a corrupt checkpoint ({e})") from e
        return best

    def _stopped(self) -> bool:
        return bool(self.config.max_steps) and self.step >= self.config.max_steps

    def _end(self, batches: int) -> int:
        """The last batch of this epoch, of `batches`, before `max_steps` ends the run."""
        limit = self.config.max_steps
        return min(batches, self.batch + max(0, limit - self.step)) if limit else batches

    def _train_epoch(self, batches: Sequence[Any]) -> bool:
        """Train on what is left of the epoch; False if it was cut short by `max_steps`."""
        task, model, config = self.task, self.task.model, self.config
        model.train()
        self.meter, self.saved = _Meter(task.measured, self.ranks), time.monotonic()
        told, alone = self.epoch > 0, self.ranks.size == 1
        end = self._end(len(batches))
        progress = bar(total=end, initial=self.batch, desc=f"epoch {self.epoch + 1}", unit=task.batch_name)
        with progress:
            for batch in map(batches.__getitem__, range(self.batch, len(batches))):
                if self._stopped():
                    break
                with self.interrupts.held():
                    means = self._step(batch)
                    if means is not None:
                        self.meter.add(means, task.size(batch))
                if self.told.signum:
                    raise Interrupted(self.told.signum)
                counted = self.meter.steps  # none if all since the last line were skipped
                if not told and counted and (counted == FIRST_STEPS or self.meter.seconds > FIRST_SECONDS):
                    told = True
                    self._tell_duration(self.meter.seconds / counted, len(batches))
                progress.total = self._end(len(batches))  # later by every step that is skipped
                progress.update()
                due = self.batch % config.log_interval == 0 or self.batch == len(batches) or self._stopped()
                if due and counted:
                    with self.interrupts.held():
                        figures = self._log_steps(len(batches))
                    progress.show(figures)
                # Several ranks tell each other how far they are for the log only.
                elif not progress.disable and alone and counted and self.meter.shown + 1 < time.monotonic():
                    progress.show(self._figures())
                due = config.checkpoint_steps and self.step % config.checkpoint_steps == 0
                late = self._is_late() if alone else self.told.late
                if due or late:
                    with self.interrupts.held():
                        self._save(best=False)
                    self.saved = time.monotonic()
        return self.batch == len(batches)

    def _is_late(self) -> bool:
        """Whether the last checkpoint of the epoch, or its beginning, is `checkpoint_minutes` ago."""
        minutes = self.config.checkpoint_minutes
        return bool(minutes) and time.monotonic() - self.saved > 60 * minutes

    def _step(self, batch: tuple[Tensor, ...]) -> dict[str, Tensor] | None:
        """One update from one batch, of which every rank computes its own rows.

        Returns:
            the means of what is measured, or this rank's share of them; None for a step that was skipped.

        Raises:
            RunError: the loss or the gradient is not finite, and no more steps may be skipped; nothing was updated.
        """
        config, model = self.config, self.task.model
        known, total, norm, *rest = self.gradients(batch, self.carry)
        means, carry = dict(zip(self.task.measured, rest, strict=False)), rest[len(self.task.measured) :]
        self.batch += 1
        # The one place of a step that waits for the device: nothing may be updated before.
        self.told = self.gradient.told(known, total)
        if not all(self.told.finite):
            self._skip(float(self.told.loss), "gradient" if not self.told.finite[1] else "carried state")
            return None
        if config.clip > 0:
            nn.utils.clip_grads_with_norm_(model.parameters(), config.clip, norm)
        self.lr = self.schedule.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * self.task.rate(batch)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update()
        self.carry = tuple(carry) or None
        self.step += 1
        return means

    def _gradients(self, batch: tuple[Tensor, ...], carry: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        """Make the gradients of a batch, in `accumulate` slices of this rank's rows. It may be recorded: nothing here
        looks at a number on the device.

        Returns:
            what :meth:`Gradient.told` asks for; this rank's share of the loss; the norm of all gradients; the means of
            what is measured; the state to carry.
        """
        config, model, ranks = self.config, self.task.model, self.ranks
        self.optimizer.zero_grad(set_to_none=True)
        self.gradient.clear()
        rows, own = batch[0].size(0), [ranks.part(part) for part in batch]
        if idle := own[0].size(0) == 0:  # the last batch of an epoch may have fewer rows than there are ranks
            own = [part[:1] for part in batch]  # they take part in it all the same, with a share of nothing
        pieces = min(config.accumulate, own[0].size(0))  # and it may have few rows
        slices = list(zip(*(part.tensor_split(pieces) for part in own), strict=True))
        states = [None] * len(slices)
        if carry is not None:
            states = list(zip(*(part.tensor_split(pieces) for part in carry), strict=True))
        means, carried, total = dict.fromkeys(self.task.measured, 0.0), [], 0.0
        tell = {"late": ranks.first and self._is_late(), "signum": self.interrupts.pending}
        for number, (part, state) in enumerate(zip(slices, states, strict=True), start=1):
            share, autocast = 0.0 if idle else part[0].size(0) / rows, config.autocast(part[0].device)
            last = number == len(slices)
            losses, state = self.gradient.add(part, state, share, autocast=autocast, last=last, **tell)
            total = total + losses["loss"] * share  # not detached: a recording keeps by it what its graph reads
            for name in means:
                means[name] = means[name] + losses["raw" if name == "loss" else name].detach() * share
            carried.append(state)
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        carry = [torch.cat(parts) for parts in zip(*carried, strict=True)] if carried[0] is not None else []
        return self.gradient.known(total, norm, carry), total, norm, *means.values(), *carry

    def _skip(self, loss: float, other: str) -> None:
        """Leave out a step whose loss, or the `other`, is not finite: weights, optimizer and carried state stay.

        Raises:
            RunError: as many steps as `skip_bad_steps` allows have been left out already.
        """
        config, task = self.config, self.task
        before = int(self._running()["count"])  # what the epoch has been trained on, which is a place in its stream
        norms = {name: p.grad.norm().item() for name, p in task.model.named_parameters() if p.grad is not None}
        worst = max(norms, key=lambda name: (math.isnan(norms[name]), norms[name]))
        what = f"training loss became {loss}" if not math.isfinite(loss) else f"{other} is not finite"
        line = (
            f"the {what} by step {self.step + 1} (epoch {self.epoch + 1}, {task.batch_name} {self.batch}), after "
            f"{counted(before, task.count)} of the epoch; the largest gradient norm is {norms[worst]:.3g}, of {worst}"
        )
        if self.skipped >= config.skip_bad_steps:
            skipped = f" ({self.skipped} skipped before it)" if self.skipped else ""
            raise RunError(f"{line}{skipped}; lower --lr or --clip, or let it pass with --skip_bad_steps")
        self.skipped += 1
        line = f"skipped: {line} ({self.skipped} of {config.skip_bad_steps})"
        self.say(line)
        self.folder.log(line)
        place = {"epoch": self.epoch + 1, "batch": self.batch, "step": self.step}
        self.folder.record("skipped", **place, loss=loss, tensor=worst, norm=norms[worst])

    def _tell_duration(self, step: float, batches: int) -> None:
        """Tell how long an epoch of `batches` and all epochs take, or what `max_steps` leaves of them."""
        epochs, limit = batches * self.config.epochs, self.config.max_steps
        every = f"about {_duration(step * batches)} an epoch, {{}} for all, evaluation aside"
        if limit and limit < epochs:
            every = f"about {{}} for {counted(limit, 'steps')}, evaluation aside"
        self.say(every.format(_duration(step * (min(limit, epochs) if limit else epochs))))

    def _figures(self) -> list[str]:
        """Loss, score, learning rate and speed since the last log line."""
        means, task = self.meter.means(), self.task
        score = self._score(task.training_score(means))
        speed = self.meter.count / max(self.meter.seconds, 1e-9)
        return [f"loss {means['loss']:.4f}", score, f"lr {self.lr:g}", f"{speed:,.0f} {task.unit}/s"]

    def _score(self, score: float) -> str:
        return f"{self.task.score_name} {score:.{self.task.digits}f}"

    def _log_steps(self, steps: int) -> list[str]:
        figures, name = self._figures(), self.task.batch_name
        self.folder.log(f"epoch {self.epoch + 1} {name} {self.batch}/{steps} step {self.step} {' '.join(figures)}")
        self.folder.record(
            "train", epoch=self.epoch + 1, batch=self.batch, step=self.step, lr=self.lr, **self.meter.means()
        )
        self.running = self._running()
        self.meter = _Meter(self.task.measured, self.ranks)
        return figures

    def _end_epoch(self, finished: bool) -> None:
        """Validate, remember the best, anneal, log, write the checkpoints, then report.

        A run that is killed before the checkpoint logs the epoch again; one killed after it has nothing left to log.

        An epoch cut short by `max_steps` is validated for information only, so that a continued run is not changed by
        where it had been stopped.
        """
        with averaged(averages(self.optimizer, self.ema), self.interrupts.held):
            valid = self._validate()
        with self.interrupts.held():
            self._close_epoch(finished, valid)

    def _validate(self) -> dict[str, Any] | None:
        if self.splits.valid is None:
            return None
        return self._evaluate(self.splits.valid, "valid")

    def _evaluate(self, data: Any, name: str, method: Callable[..., dict[str, Any]] | None = None) -> dict[str, Any]:
        return evaluate(self.task, data, name, self.config, method, self.ranks, self.interrupts)

    def _close_epoch(self, finished: bool, valid: dict[str, Any] | None) -> None:
        epoch, lr, name, seconds = self.epoch + 1, self.lr, self.task.score_name, self.running["seconds"]
        train = {key: self.running[key] / max(self.running["count"], 1) for key in self.task.measured}
        train_score = self.task.training_score(train)
        rate = self.running["count"] / max(seconds, 1e-9)
        # Without validation data the last epoch counts.
        better = finished and (None in (self.best, valid) or self.task.is_better(valid, self.best["valid"]))
        if better:
            self.best = {"epoch": epoch, "valid": valid}
        if finished:
            was_averaging = self.schedule.averaging
            self.schedule.step(epoch, (valid or train)["loss"])
            if self.schedule.averaging and not was_averaging:
                self.optimizer = make_averaging(self.task.model.parameters(), self.config)
                self.say(
                    f"epoch {epoch:3d}  no gain in {counted(self.config.anneal, 'epochs')}: averaging from here on"
                )
            self.epoch, self.batch, self.carry = epoch, 0, None
            self.running, self.meter = dict.fromkeys(self.running, 0.0), _Meter(self.task.measured, self.ranks)
        line = f"epoch {epoch:3d}{'' if finished else ' (cut short)'}  lr {lr:g}  " + (
            f"train {self._score(train_score)}  "
            + (f"valid {self._score(valid[name])}{' *' if better else ''}  " if valid else "")
            + f"{_duration(seconds)}  {rate:,.0f} {self.task.unit}/s"
        )
        self.folder.log(line)
        self.folder.record(
            "epoch", epoch=epoch, step=self.step, lr=lr, train_loss=train["loss"], train_score=train_score,
            valid_loss=valid and valid["loss"], valid_score=valid and valid[name], finished=finished,
            train_seconds=seconds, seconds=self.seconds,
        )  # fmt: skip
        self._save(better)
        self.say(line)

    def _save(self, best: bool) -> None:
        """Write last.pt, and before it best.pt and weights.pkl if these weights are the best.

        In this order best.pt is never behind what last.pt tells of; if a run is killed in between, best.pt is a whole
        checkpoint of the later state and the run is continued from it. The last.pt before this one is kept until all
        epochs are done, in case the disk spoils it.
        """
        if not all(serialization.all_finite(p) for p in self.task.model.parameters()):
            raise RunError(f"the weights are no longer finite numbers at step {self.step}; lower --lr or --clip")
        content = self.checkpoint()
        pairs = averages(self.optimizer, self.ema)
        if pairs:
            content["model"] = copy.deepcopy(content["model"])  # the model is about to hold the averages
        with averaged(pairs), self._writing():
            if pairs:
                content["average"] = self.task.model.state_dict()
            self.folder.sync()
            if best and self.ranks.first:
                checkpoint.save(self.folder.file("best.pt"), content)
                self.save_weights(self.task.model, self.folder.file("weights.pkl"))
            if self.ranks.first:
                serialization.keep(self.folder.file("last.pt"), self.folder.file("last.previous.pt"))
                checkpoint.save(self.folder.file("last.pt"), content)

    @contextlib.contextmanager
    def _writing(self, what: str = "the checkpoint") -> Iterator[None]:
        """The first rank writes, the others wait; if it cannot, that ends them all."""
        with self.ranks.agreed():
            try:
                yield
            except OSError as e:
                self.folder.check_present()
                raise RunError(f"{what} could not be written ({e.strerror}); make room and continue") from e

    def _take_best(self) -> None:
        """The weights of best.pt, on the first rank."""
        if not self.ranks.first:
            return
        self.folder.check_present()
        try:
            best = self._load_best()
        except UserError as e:  # it was whole when the run began
            raise RunError(str(e)) from e
        self.task.model.load_state_dict(best["average"] or best["model"])

    def _finish(self) -> Result:
        """Score the test data with the best weights, or with the last ones if no epoch was finished."""
        best_epoch = self.best["epoch"] if self.best else None
        if self.best:
            with self.ranks.agreed():
                self._take_best()
            self.ranks.copy(self.task.model)
            valid = self.best["valid"]
        else:
            put(averages(self.optimizer, self.ema))
            valid = self._validate()
        with self._writing("weights.pkl"):
            if self.ranks.first:
                self.save_weights(self.task.model, self.folder.file("weights.pkl"))
        test = self._evaluate(self.splits.test, "test")
        if not self.best:  # what was loaded has hardly been trained
            valid, test = valid and valid | self.config.marks(), test | self.config.marks()
        for split, result in (("valid", valid), ("test", test)):
            if result is not None:
                line = score_line(self.task, split, result)
                self.say(line)
                self.folder.log(line)
        extra_evaluations = {}
        for split, (method, data) in self.splits.extra_evaluations.items():
            extra_evaluations[split] = self._evaluate(data, split, method)
            line = score_line(self.task, split, extra_evaluations[split])
            self.say(line)
            self.folder.log(line)
        self.folder.record("result", step=self.step, valid=valid, test=test, best_epoch=best_epoch, **extra_evaluations)
        with self._writing("the log"):
            self.folder.sync()
        if self.epoch >= self.config.epochs and self.ranks.first:
            self.folder.file("last.previous.pt").unlink(missing_ok=True)
        return Result(
            valid=valid,
            test=test,
            epochs=self.epoch,
            steps=self.step,
            best_epoch=best_epoch,
            complete=self.epoch >= self.config.epochs and "partial" not in test,
            seconds=self.seconds,
            extra_evaluations=extra_evaluations,
        )


def _duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24}d{hours % 24:02d}h"
    return f"{hours}h{m:02d}m" if hours else f"{m}m{s:02d}s" if m else f"{seconds:.1f}s"


def fit(
    task: Task,
    splits: Splits,
    config: RunConfig,
    folder: RunFolder | NoFolder,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    save_weights: Callable[[nn.Module, Any], None],
    *,
    command: str = "",
    interrupts: Interrupts | None = None,
    resume_from: dict[str, Any] | None = None,
    say: Callable[[str], None] = tqdm.write,
    ranks: Ranks | None = None,
) -> Result:
    """Train `task` to the end of the run and score it.

    Args:
        task, splits, config, folder, optimizer, schedule: see :class:`Trainer`.
        save_weights: writes the best epoch's weights (weights.pkl).
        command: the command line that started the run.
        interrupts: entered by the caller, it lets a signal end the run with a checkpoint.
        resume_from: a checkpoint to continue from; it is emptied.
        say: prints a line for the user; the default keeps clear of the progress bar.
        ranks: the processes that train together; by default this one is alone.

    Returns:
        validation and test results of the best epoch by validation, or of the last one if nothing is held out.

    Raises:
        UserError: settings or data that do not fit.
        RunError: a loss that is not finite, or a checkpoint that could not be written; another rank has died.
        Interrupted: a signal came; the checkpoint is written.
    """
    interrupts, ranks = interrupts or Interrupts(), ranks or Ranks()
    trainer = Trainer(task, splits, config, folder, optimizer, schedule, save_weights, command, interrupts, say, ranks)
    if resume_from is not None:
        with ranks.agreed():
            trainer.restore(resume_from)
    return trainer.run()
