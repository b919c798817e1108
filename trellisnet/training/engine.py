"""The training engine: the loop, checkpoints, resume. It knows no particular task and no data."""

import contextlib
import copy
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from trellisnet import serialization
from trellisnet.errors import RunError, UserError, counted
from trellisnet.training import checkpoint
from trellisnet.training.config import RunConfig, to_settings
from trellisnet.training.distributed import LostError, Ranks, StepStatus
from trellisnet.training.gradients import Gradients
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
from trellisnet.training.reporting import Meter, bar, duration_line, epoch_line, figures, score_line
from trellisnet.training.runlog import NoFolder, RunFolder
from trellisnet.training.scoring import Method, evaluate, set_depth
from trellisnet.training.tasks import Splits, Task
from trellisnet.training.tasks.base import mean

FIRST_STEPS, FIRST_SECONDS = 10, 30  # steps or seconds after which the duration of an epoch is estimated


@dataclass
class Result:
    """Outcome of a run. `valid`, `test` and the values of `extra_evaluations` are results of :func:`evaluate`.

    `unfinished` names the extra evaluation that failed, if one did, and `ended` is its exception.
    """

    valid: dict[str, Any] | None = None
    test: dict[str, Any] | None = None
    epochs: int = 0
    steps: int = 0
    best_epoch: int | None = None
    complete: bool = False
    seconds: float = 0.0
    extra_evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    unfinished: str = ""
    ended: Exception | None = None


class Trainer:
    """One training run; :meth:`fit` runs it.

    Args:
        task: the model and its losses.
        splits: the data.
        config: the settings.
        folder: holds the files of the run.
        optimizer: updates the parameters of `task.model`.
        schedule: the learning rate.
        save_weights: writes a model's weights to a path, in a task-independent layout (weights.pkl).
        command: the command line that started the run, stored in checkpoints.
        interrupts: if the caller has entered it, a signal ends the run between two steps, with a checkpoint.
        say: prints a line for the user; the default keeps clear of the progress bar.
        ranks: the processes that train together, of which the first writes files; by default this one is alone.
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
        *,
        command: str = "",
        interrupts: Interrupts | None = None,
        say: Callable[[str], None] = tqdm.write,
        ranks: Ranks | None = None,
    ):
        self.task, self.splits, self.config, self.folder = task, splits, config, folder
        self.optimizer, self.schedule = optimizer, schedule
        self._make_averaging()
        self.save_weights, self.command = save_weights, command
        self.interrupts, self.say, self.ranks = interrupts or Interrupts(), say, ranks or Ranks()
        self.status: StepStatus | None = None  # of the last step
        self.epoch = self.batch = self.step = 0
        self.depth: int | None = None  # of the network now; None if it never changes
        self.carry: Any = None
        self.lr = schedule.rate(0)  # of the last update, or the first one
        self.ema = EMA(task.model.parameters(), config.ema) if config.ema else None
        self.best: dict[str, Any] | None = None
        self.skipped = 0  # steps, see --skip_bad_steps
        # Sums of this epoch up to the last log line; the meter has those since.
        self.running = {**dict.fromkeys(task.measured, 0.0), "count": 0, "seconds": 0.0}
        self.meter = Meter(task.measured, self.ranks)
        self.seconds_before = 0.0
        self.started = self.saved = time.monotonic()
        # By depth of the network; without graphs one function serves all.
        self.compute_gradients: defaultdict[int | None, Callable[..., tuple[Tensor, ...]]]
        gradients = Gradients(task, config, self.ranks)
        if config.cuda_graph == "on":
            parameters = list(task.model.parameters())
            recorder = CUDARecorder(parameters[0].device)
            self.compute_gradients = defaultdict(lambda: Recorded(gradients, parameters, recorder))
        else:
            self.compute_gradients = defaultdict(lambda: gradients)

    # -- state of the run ------------------------------------------------------------------------------------------

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    def checkpoint(self) -> dict[str, Any]:
        """Everything needed to continue the run. Its tensors are those of the model and the optimizer, not copies."""
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
            "schedule": self.schedule.state_dict(),
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
        """Restore what :meth:`checkpoint` returned; empty `content`, so that no second set of weights stays in memory.

        Raises:
            UserError: the data are not those of the run, the content is corrupt, or best.pt is missing or corrupt.
        """
        try:
            self._restore(content)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as e:
            if isinstance(e, UserError):
                raise
            reason = str(e).strip().splitlines()[-1][:120] if str(e).strip() else type(e).__name__
            raise UserError(f"the checkpoint does not fit this run, or is corrupt ({reason})") from e
        content.clear()

    def _restore(self, content: dict[str, Any]) -> None:
        self.splits.check_same(content["data"])
        self.best = content["best"]
        if self.best is not None and self.ranks.first:
            self._load_best()
            if (valid := self.best["valid"]) is not None:  # a result that these cannot read is corrupt
                score_line(self.task, "valid", valid)
                self.task.is_better(valid, valid)
        checkpoint.check_weights(self.task.model, content["model"])
        if self.ema is not None and content["average"] is not None:
            self.task.model.load_state_dict(content["average"])
            self.ema.update()  # the first one copies
        self.task.model.load_state_dict(content["model"])
        self.schedule.load_state_dict(content["schedule"])
        self._make_averaging()
        self.optimizer.load_state_dict(content["optimizer"])
        make = make_averaging if self.schedule.averaging else make_optimizer
        check_state(self.optimizer, lambda parameters: make(parameters, self.config))
        self.epoch, self.batch, self.step = (content[key] for key in ("epoch", "batch", "step"))
        self.lr = self.schedule.rate(max(self.step - 1, 0))
        device = next(self.task.model.parameters()).device
        carry = content["carry"]
        self.carry = carry if carry is None else tuple(self.ranks.part(part).to(device) for part in carry)
        self._check_place()
        self.running = {name: float(content["running"][name]) for name in self.running}
        self.seconds_before, self.skipped = content["seconds"], content["skipped"]
        self._restore_rng([content["rng"], *content["rng_others"]])

    def _make_averaging(self) -> None:
        """Replace the optimiser by averaged SGD once that has begun."""
        if self.schedule.averaging:
            self.optimizer = make_averaging(self.task.model.parameters(), self.config)

    def _check_place(self) -> None:
        """Raise ValueError unless the epoch has `batch` batches or more, and the carried state fits the next one."""
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
                f"NOTICE: the checkpoint was written by {counted(len(states), 'ranks')}, this run has {ranks.size}: "
                "the first rank continues its random numbers, the others start new ones"
            )
            self._announce(line)

    # -- the loop --------------------------------------------------------------------------------------------------

    def fit(self, resume_from: dict[str, Any] | None = None) -> Result:
        """Train to the last epoch (or `max_steps`), then score validation and test with the best weights.

        Args:
            resume_from: a checkpoint to continue from; it is emptied.

        Returns:
            validation and test results of the best epoch by validation, or of the last one if nothing is held out.

        Raises:
            UserError: settings or data that do not fit.
            RunError: a loss is not finite, a checkpoint could not be written, or another rank has died.
            Interrupted: a signal came; the checkpoint is written.
        """
        if resume_from is not None:
            with self.ranks.agreed():
                self.restore(resume_from)
            if self._is_done() or self._stopped():
                self._announce(f"NOTICE: nothing is left to train, so the run is only scored{self._extension()}")
        if self.ranks.size > 1:
            self.interrupts.note()  # ranks must end together, or some would wait for the others in vain
        try:
            if self.schedule.finetune and self.best is None:
                self._score_loaded()
            if self._awaits_validation():
                self._end_epoch(finished=self._has_all_batches())
            while not self._is_done() and not self._stopped():
                finished = self._train_epoch(self.task.batches(self.splits.train, self.epoch))
                self._end_epoch(finished)
        except Interrupted:
            with self.interrupts.held():
                self._save(best=False)
            raise
        return self._finish()

    def _load_best(self) -> dict[str, Any]:
        return checkpoint.load_best(self.folder.file("best.pt"), self.best, self.task.model)

    def _score_loaded(self) -> None:
        """Count the weights that finetuning starts from as the best so far, under epoch 0."""
        valid = self._evaluate(self.splits.valid, "valid")
        with self.interrupts.held():
            self.best = {"epoch": 0, "valid": valid}
            if valid is not None:
                self._announce(f"as loaded: {score_line(self.task, 'valid', valid)}")
            self._save(best=True)

    def _awaits_validation(self) -> bool:
        """Return whether the run was stopped after its last update, before a validation that counts."""
        if not self.batch or self.epoch >= self.config.epochs or not self._stopped():
            return False
        is_best = self.best is not None and self.best["epoch"] == self.epoch + 1  # of an epoch cut short, already
        return self._has_all_batches() or (self._is_done() and not is_best)

    def _has_all_batches(self) -> bool:
        """Return whether the epoch only lacks its validation."""
        return self.batch == len(self.task.batches(self.splits.train, self.epoch))

    def _is_done(self) -> bool:
        """Return whether the last epoch, finetuning, or a rate that falls until `max_steps` has ended."""
        falls = self.config.schedule != "step"
        return self.epoch >= self.config.epochs or self.schedule.ended or (falls and self._stopped())

    def _extension(self) -> str:
        """Say how a run without anything left to train can be extended; empty if it cannot."""
        name = "max_steps" if self._stopped() else "epochs"
        return "" if self.schedule.ended or self.config.fixed(name) else f"; raise --{name} to train on"

    def _stopped(self) -> bool:
        return bool(self.config.max_steps) and self.step >= self.config.max_steps

    def _end(self, batches: int) -> int:
        """Number of batches, out of `batches`, after which the epoch or the run (by `max_steps`) ends."""
        limit = self.config.max_steps
        return min(batches, self.batch + max(0, limit - self.step)) if limit else batches

    def _train_epoch(self, batches: Sequence[Any]) -> bool:
        """Train on the rest of an epoch; False if `max_steps` cut it short."""
        task, model, config = self.task, self.task.model, self.config
        model.train()
        self.meter, self.saved = Meter(task.measured, self.ranks), time.monotonic()
        estimated, alone = self.epoch > 0, self.ranks.size == 1
        end = self._end(len(batches))
        progress = bar(total=end, initial=self.batch, desc=f"epoch {self.epoch + 1}", unit=task.batch_name)
        with progress:
            for number in range(self.batch, len(batches)):
                if self._stopped():
                    break
                self.set_depth(self.step)
                batch = batches[number]  # cut out here, because its history may depend on the depth
                with self.interrupts.held():
                    means = self._step(batch)
                    if means is not None:
                        self.meter.add(means, task.size(batch))
                if self.status.signum:
                    raise Interrupted(self.status.signum)
                steps = self.meter.steps  # 0 if all since the last line were skipped
                if not estimated and steps and (steps == FIRST_STEPS or self.meter.seconds > FIRST_SECONDS):
                    estimated = True
                    self.say(duration_line(self.meter.seconds / steps, len(batches), config))
                progress.total = self._end(len(batches))  # a skipped step moves the end
                progress.update()
                due = self.batch % config.log_interval == 0 or self.batch == len(batches) or self._stopped()
                if due and steps:
                    with self.interrupts.held():
                        line = self._log_steps(len(batches))
                    progress.show(line)
                # Several ranks synchronise their averages for the log only.
                elif not progress.disable and alone and steps and self.meter.shown + 1 < time.monotonic():
                    progress.show(figures(task, self.meter, self.lr))
                due = config.checkpoint_steps and self.step % config.checkpoint_steps == 0
                if due or self.status.late:
                    with self.interrupts.held():
                        self._save(best=False)
                    self.saved = time.monotonic()
        return self.batch == len(batches)

    def set_depth(self, update: int | None = None) -> None:
        """Give the network the depth of an update, or of the validation after this epoch."""
        self.depth = self.config.depth(self.epoch, update)
        if self.depth is not None:
            self.task.model.core.num_layers = self.depth

    def _is_late(self) -> bool:
        """Return whether `checkpoint_minutes` have passed since the epoch's last checkpoint, or its start."""
        minutes = self.config.checkpoint_minutes
        return bool(minutes) and time.monotonic() - self.saved > 60 * minutes

    def _step(self, batch: tuple[Tensor, ...]) -> dict[str, Tensor] | None:
        """Make one update from a batch; each rank computes its own rows.

        Returns:
            this rank's shares of the means of `measured`; None for a skipped step.

        Raises:
            RunError: loss, gradient or state are not finite, and no more steps may be skipped; nothing was updated.
        """
        config, model = self.config, self.task.model
        finite, total, norm, *rest = self.compute_gradients[self.depth](batch, self.carry)
        means, carry = dict(zip(self.task.measured, rest, strict=False)), rest[len(self.task.measured) :]
        self.batch += 1
        # The only synchronisation with the device in a step: nothing may be updated before it.
        late = self.ranks.first and self._is_late()
        self.status = self.ranks.reduce_status(finite, late=late, signum=self.interrupts.pending)
        if not self.status.finite:
            (loss,) = self.ranks.sum(total.item())
            self._skip(loss, "gradient" if not self.status.finite_gradient else "carried state")
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

    def _skip(self, loss: float, other: str) -> None:
        """Skip a step whose loss, or else the `other` quantity, is not finite, keeping weights, optimizer and state.

        Raises:
            RunError: `skip_bad_steps` steps have been skipped already.
        """
        config, task = self.config, self.task
        before = int(self._running()["count"])  # units trained on, to find the batch in the data
        norms = {name: p.grad.norm().item() for name, p in task.model.named_parameters() if p.grad is not None}
        worst = max(norms, key=lambda name: (math.isnan(norms[name]), norms[name]))
        fault = f"training loss became {loss}" if not math.isfinite(loss) else f"{other} is not finite"
        line = (
            f"the {fault} at step {self.step + 1} (epoch {self.epoch + 1}, {task.batch_name} {self.batch}), after "
            f"{counted(before, task.count)} of the epoch; the largest gradient norm is {norms[worst]:.3g}, of {worst}"
        )
        if self.skipped >= config.skip_bad_steps:
            skipped = f" ({self.skipped} skipped before it)" if self.skipped else ""
            raise RunError(f"{line}{skipped}; lower --lr or --clip, or allow such steps with --skip_bad_steps")
        self.skipped += 1
        line = f"skipped: {line} ({self.skipped} of {config.skip_bad_steps})"
        self._announce(line)
        place = {"epoch": self.epoch + 1, "batch": self.batch, "step": self.step}
        self.folder.record("skipped", **place, loss=loss, tensor=worst, norm=norms[worst])

    def _log_steps(self, steps: int) -> list[str]:
        line, name = figures(self.task, self.meter, self.lr), self.task.batch_name
        self.folder.log(f"epoch {self.epoch + 1} {name} {self.batch}/{steps} step {self.step} {' '.join(line)}")
        self.folder.record(
            "train", epoch=self.epoch + 1, batch=self.batch, step=self.step, lr=self.lr, **self.meter.means()
        )
        self.running = self._running()
        self.meter = Meter(self.task.measured, self.ranks)
        return line

    def _announce(self, line: str) -> None:
        """Print a line and log it."""
        self.say(line)
        self.folder.log(line)

    def _end_epoch(self, finished: bool) -> None:
        """Validate, remember the best, anneal, log, write the checkpoints, then report.

        A run that is killed before the checkpoint logs the epoch again; one killed after it has nothing left to log.

        An epoch cut short by `max_steps` is validated for information only, so that where a run was stopped does not
        change how it continues; unless it cannot continue, because its learning rate falls until there.
        """
        self.set_depth()
        with averaged(averages(self.optimizer, self.ema), self.interrupts.held):
            valid = self._evaluate(self.splits.valid, "valid")
        with self.interrupts.held():
            self._close_epoch(finished, valid)

    def _evaluate(self, data: Any, name: str, method: Method | None = None) -> Any:
        """Result of :func:`evaluate`; None without data."""
        if data is None:
            return None
        return evaluate(self.task, data, name, self.config, method, self.ranks, self.interrupts)

    def _close_epoch(self, finished: bool, valid: dict[str, Any] | None) -> None:
        epoch, lr, name, seconds = self.epoch + 1, self.lr, self.task.score_name, self.running["seconds"]
        count = int(self.running["count"])  # 0, and means of NaN, if every step was skipped
        train = {key: mean(self.running[key], count) for key in self.task.measured}
        train_score = self.task.training_score(train)
        # Without validation data the last epoch is the best; so is the first one of a depth.
        first = self.best is None or valid is None or self._depth_of_best() != self.depth
        better = (finished or self._is_done()) and (first or self.task.is_better(valid, self.best["valid"]))
        if better:
            self.best = {"epoch": epoch, "valid": valid}
        if finished:
            was_averaging = self.schedule.averaging
            self.schedule.step(epoch, (valid or train)["loss"])
            turn = "finetuning ends" * self.schedule.ended
            if self.schedule.averaging and not was_averaging:
                self._make_averaging()
                turn = "averaging from here on"
            if turn:
                self.say(f"epoch {epoch:3d}  no gain in {counted(self.schedule.patience, 'epochs')}: {turn}")
            self.epoch, self.batch, self.carry = epoch, 0, None
            self.running, self.meter = dict.fromkeys(self.running, 0.0), Meter(self.task.measured, self.ranks)
        record = {
            "epoch": epoch, "step": self.step, "lr": lr, "train_loss": train["loss"], "train_score": train_score,
            "valid_loss": valid and valid["loss"], "valid_score": valid and valid[name], "best": better,
            "finished": finished, "count": count, "train_seconds": seconds, "seconds": self.seconds,
        }  # fmt: skip
        record |= {} if self.depth is None else {"nlevels": self.depth}
        record |= {f"train_{key}": mean for key, mean in train.items() if key not in ("loss", name)}
        line = epoch_line(self.task, record)
        self.folder.log(line)
        self.folder.record("epoch", **record)
        self._save(better)
        self.say(line)

    def _save(self, best: bool) -> None:
        """Write last.pt, and before it best.pt and weights.pkl if these weights are the best.

        In this order best.pt is never older than last.pt says; if a run is killed in between, best.pt is an intact
        checkpoint of the later state, and the run continues from it. The previous last.pt is kept until all epochs are
        done, in case the new one is found corrupt.
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

    def _depth_of_best(self) -> int | None:
        """Number of layers that validated the best weights."""
        return self.config.depth(self.best["epoch"] - 1)

    def _compare_depths(self) -> None:
        """Say so if a run that has yet to grow is scored with another number of layers than it was trained with."""
        trained = self._depth_of_best() if self.best else self.config.depth(self.epoch)
        if trained is None or trained == self.config.depth(self.config.epochs):
            return
        if trained != self.task.model.core.num_layers:
            self._announce(
                f"NOTICE: so far the run was trained with {counted(trained, 'layers')} (--grow), but it is scored with "
                f"{self.task.model.core.num_layers}; --eval_nlevels {trained} gives the scores of its own depth"
            )

    @contextlib.contextmanager
    def _writing(self, name: str = "the checkpoint") -> Iterator[None]:
        """Let the first rank write while the others wait; if it cannot, all of them end."""
        with self.ranks.agreed():
            try:
                yield
            except OSError as e:
                self.folder.check_present()
                raise RunError(f"{name} could not be written ({e.strerror}); make room and continue") from e

    def _take_best(self) -> None:
        """Load the weights of best.pt on the first rank."""
        if not self.ranks.first:
            return
        self.folder.check_present()
        try:
            best = self._load_best()
        except UserError as e:  # it was intact when the run began
            raise RunError(str(e)) from e
        self.task.model.load_state_dict(best["average"] or best["model"])

    def _finish(self) -> Result:
        """Score the test data with the best weights, or with the last ones if no epoch was finished."""
        best_epoch = self.best["epoch"] if self.best else None
        if self.best:
            with self.ranks.agreed():
                self._take_best()
            self.ranks.copy(self.task.model)
        else:
            put(averages(self.optimizer, self.ema))
        depths = self.config.scoring_depths()
        method = set_depth(self.task, depths)
        if self.best and depths in ([], [self._depth_of_best()]):
            valid = self.best["valid"]
        else:
            valid = self._evaluate(self.splits.valid, "valid", method)
        self._compare_depths()
        with self._writing("weights.pkl"):
            if self.ranks.first:
                self.save_weights(self.task.model, self.folder.file("weights.pkl"))
        test = self._evaluate(self.splits.test, "test")
        # Less than an epoch has hardly trained what a weight file lacked.
        marks = {} if best_epoch else self.config.marks()
        valid, test = valid and valid | marks, test | marks
        if valid is not None:
            self._announce(score_line(self.task, "valid", valid))
        self._announce(score_line(self.task, "test", test))
        extra_evaluations, unfinished, ended = {}, "", None
        for split, (method, data) in self.splits.extra_evaluations.items():
            try:
                extra_evaluations[split] = self._evaluate(data, split, method) | marks
            except Exception as e:
                # A loss that is not finite is so on all ranks; anything else may have happened on this one alone.
                if self.ranks.size > 1 and (isinstance(e, LostError) or not isinstance(e, RunError)):
                    raise
                unfinished, ended = split, e  # raised by the caller, when the other scores are written
                break
            self._announce(score_line(self.task, split, extra_evaluations[split]))
        self.folder.record("result", step=self.step, valid=valid, test=test, best_epoch=best_epoch, **extra_evaluations)
        with self._writing("the log"):
            self.folder.sync()
        if self._is_done() and self.ranks.first:
            self.folder.file("last.previous.pt").unlink(missing_ok=True)
        complete = self._is_done() and "partial" not in test and ended is None
        return Result(
            valid=valid, test=test, epochs=self.epoch, steps=self.step, best_epoch=best_epoch, complete=complete,
            seconds=self.seconds, extra_evaluations=extra_evaluations, unfinished=unfinished, ended=ended,
        )  # fmt: skip
