"""Scoring a split with a task's own evaluation or another one, on all ranks."""

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

from trellisnet.errors import RunError
from trellisnet.training.config import RunConfig
from trellisnet.training.distributed import Ranks
from trellisnet.training.interrupts import Interrupts
from trellisnet.training.reporting import bar
from trellisnet.training.tasks import Task


def evaluate(
    task: Task,
    data: Any,
    name: str,
    config: RunConfig,
    method: Callable[..., dict[str, Any]] | None = None,
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
    result |= task.scores(result, name.split("_")[0])
    score = result[task.score_name]
    if not math.isfinite(result["loss"]) or not math.isfinite(score):
        raise RunError(f"the {name} loss is {result['loss']:g}, {task.score_name} {score:g}; lower --lr or --clip")
    if limit:
        result["partial"] = True
    return result
