"""Output of a run: progress bar, means since the last log line, and the lines themselves."""

import time
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from tqdm import tqdm

from trellisnet.errors import counted
from trellisnet.training.config import RunConfig
from trellisnet.training.distributed import Ranks
from trellisnet.training.tasks import Task


class Bar(tqdm):
    """A progress bar that drops figures if the terminal is narrow, the speed last of all.

    tqdm would cut the line within a number, which then reads as another number.
    """

    def show(self, figures: list[str]) -> None:
        """Show figures after the bar; the last of them, the speed, comes first."""
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


class Meter:
    """Sums of the measured quantities since its creation, with count and time; they stay on the device until read."""

    def __init__(self, measured: Sequence[str], ranks: Ranks) -> None:
        self.ranks = ranks
        self.started = self.shown = time.monotonic()
        self.steps = self.count = 0
        self._totals: dict[str, float | Tensor] = dict.fromkeys(measured, 0.0)

    def add(self, means: dict[str, Tensor], count: int) -> None:
        """Add a batch of `count` units on all ranks; `means` are this rank's shares of the means."""
        for name, mean in means.items():
            self._totals[name] = self._totals[name] + mean.detach() * count
        self.count += count
        self.steps += 1

    def totals(self) -> dict[str, float]:
        """Sums over all units and ranks; synchronises the device and the ranks."""
        sums = self.ranks.sum(*map(float, self._totals.values()))
        return dict(zip(self._totals, sums, strict=True))

    def means(self) -> dict[str, float]:
        """Means per unit; synchronises as :meth:`totals` does."""
        self.shown = time.monotonic()
        return {name: total / self.count for name, total in self.totals().items()}

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started


def duration(seconds: float) -> str:
    """Seconds as text, in the two units that suit their size."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24}d{hours % 24:02d}h"
    return f"{hours}h{m:02d}m" if hours else f"{m}m{s:02d}s" if m else f"{seconds:.1f}s"


def duration_line(step: float, batches: int, config: RunConfig) -> str:
    """Estimated duration of an epoch of `batches` and of all epochs, or of the steps that `max_steps` leaves.

    `step` is the time of a step in seconds.
    """
    steps, limit = batches * config.epochs, config.max_steps
    if (layers := config.depth(0)) != config.depth(config.epochs):
        return f"about {duration(step * batches)} per epoch of {counted(layers, 'layers')}, without evaluation"
    if limit and limit < steps:
        return f"about {duration(step * limit)} for {counted(limit, 'steps')}, without evaluation"
    return f"about {duration(step * batches)} per epoch, {duration(step * steps)} in all, without evaluation"


def score_text(task: Task, score: float) -> str:
    """A score with its name."""
    return f"{task.score_name} {score:.{task.digits}f}"


def figures(task: Task, meter: Meter, lr: float) -> list[str]:
    """Loss, score, learning rate and speed since the last log line."""
    means = meter.means()
    speed = meter.count / max(meter.seconds, 1e-9)
    score = score_text(task, task.training_score(means))
    others = [f"{name} {mean:.2g}" for name, mean in means.items() if name not in ("loss", task.score_name)]
    return [f"loss {means['loss']:.4f}", score, *others, f"lr {lr:g}", f"{speed:,.0f} {task.unit}/s"]


def epoch_line(task: Task, record: dict[str, Any]) -> str:
    """An epoch as a line, from its record in metrics.jsonl."""
    valid, seconds = record["valid_score"], record["train_seconds"]
    parts = [f"epoch {record['epoch']:3d}{'' if record['finished'] else ' (cut short)'}", f"lr {record['lr']:g}"]
    parts += [counted(record["nlevels"], "layers")] if "nlevels" in record else []
    parts.append(f"train {score_text(task, record['train_score'])}")
    if valid is not None:
        parts.append(f"valid {score_text(task, valid)}{' *' * record['best']}")
    return "  ".join([*parts, duration(seconds), f"{record['count'] / max(seconds, 1e-9):,.0f} {task.unit}/s"])


def score_line(task: Task, name: str, result: dict[str, Any]) -> str:
    """A result of :func:`trellisnet.training.scoring.evaluate` as a line."""
    main = result[task.score_name]
    others = [key for key in task.scores(result, name.split("_")[0]) if result[key] != main]
    scores = "  ".join(f"{key} {result[key]:.{task.digits}f}" for key in [task.score_name, *others])
    marks = {"partial": "partial", "init_tail": "tail vectors not trained"}
    marked = ", ".join(text for mark, text in marks.items() if mark in result)
    line = f"{name} {scores}  loss {result['loss']:.4f} nats  {counted(result[task.count], task.count)}"
    line += f"  {counted(result['nlevels'], 'layers')}" if "nlevels" in result else ""
    line += f"  {result['layers']:.1f} layers computed" if "layers" in result else ""
    if "settings" in result:
        settings = result["settings"].items()
        line += "  " + " ".join(f"{key} {v:g}" if isinstance(v, float) else f"{key} {v}" for key, v in settings)
    return f"{line} ({marked})" if marked else line
