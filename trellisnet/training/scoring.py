"""Scoring a split with a task's own evaluation or another one, on all ranks."""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from trellisnet.errors import RunError
from trellisnet.training.config import RunConfig
from trellisnet.training.distributed import Ranks
from trellisnet.training.interrupts import Interrupts
from trellisnet.training.reporting import bar
from trellisnet.training.tasks import Task
from trellisnet.training.tasks.base import at_depth

Method = Callable[..., dict[str, Any]]  # (data, max_tokens=…, progress=…) → result
Scores = dict[str, tuple[Method, Any]]  # scores to report: name → (evaluation, data)


def evaluate(
    task: Task,
    data: Any,
    name: str,
    config: RunConfig,
    method: Method | None = None,
    ranks: Ranks | None = None,
    interrupts: Interrupts | None = None,
) -> dict[str, Any]:
    """Score one split with `method` (default: `Task.evaluate`); add the scores, and `partial` if it was cut short.

    `name` is "valid" or "test", optionally followed by an underscore and the name of the method. The task divides the
    work among the ranks; all of them get the same result.

    Raises:
        RunError: the loss or the score is not finite.
        Interrupted: one of several ranks received a signal.
    """
    limit = config.max_eval_tokens or None
    ranks, interrupts = ranks or Ranks(), interrupts or Interrupts()

    def progress(it: Iterable, total: int) -> Iterable:
        shown = bar(it, total, desc=name, unit=task.batch_name)
        return shown if ranks.size == 1 else itertools.takewhile(going_on, shown)

    def going_on(_: Any) -> bool:
        """Stop early on a rank that received a signal; the ranks agree on it when they next meet."""
        ranks.progress.work += 1
        return not interrupts.pending

    try:
        with config.autocast(next(task.model.parameters()).device):
            result = (method or task.evaluate)(data, max_tokens=limit, progress=progress)
    except ValueError:
        ranks.heed(interrupts.pending)  # a rank that stopped at once has nothing to score
        raise
    ranks.heed(interrupts.pending)
    if config.scoring_depths():
        result = _depth_of(task) | result
    result |= task.scores(result, name.split("_")[0])
    score = result[task.score_name]
    if not math.isfinite(result["loss"]) or not math.isfinite(score):
        advice = "lower --lr or --clip" if name in ("valid", "test") else "leave this score out"
        raise RunError(f"the {name} loss is {result['loss']:g}, {task.score_name} {score:g}; {advice}")
    if limit:
        result["partial"] = True
    return result


def _depth_of(task: Task) -> dict[str, int]:
    """Return the depth of the core, for records, and how many inputs an output then sees."""
    return {"nlevels": task.model.core.num_layers, "receptive_field": task.model.core.receptive_field}


def set_depth(task: Task, depths: Sequence[int]) -> Method | None:
    """Give the core the depth of all scores, if there are `depths` to choose from.

    Returns:
        the method that scores validation data: with several depths it finds the best one, which the core keeps; None
        for the task's own.
    """
    if depths:
        task.model.core.num_layers = depths[-1]
    return functools.partial(_choose, task, depths) if len(depths) > 1 else None


def _choose(task: Task, depths: Sequence[int], data: Any, **how: Any) -> dict[str, Any]:
    best = None
    for depth, result in zip(depths, task.evaluate_depths(data, depths, **how), strict=True):
        # Nothing is better than a loss that is not a number.
        if best is None or math.isnan(best["loss"]) or task.is_better(result, best):
            best, task.model.core.num_layers = result, depth
    return best


def depth_scores(task: Task, depths: Sequence[int], splits: dict[str, Any]) -> Scores:
    """Scores of every split in `splits` at every depth, `<split>_depth_<layers>`; one evaluation computes a split."""
    results: dict[str, dict[int, dict[str, Any]]] = {}

    def method(split: str, depth: int, data: Any, **how: Any) -> dict[str, Any]:
        if depth not in results.setdefault(split, {}):
            results[split] = dict(zip(depths, task.evaluate_depths(data, depths, **how), strict=True))
        with at_depth(task.model, depth):
            return results[split].pop(depth) | _depth_of(task)

    return {
        f"{split}_depth_{depth}": (functools.partial(method, split, depth), data)
        for split, data in splits.items()
        for depth in depths
    }
