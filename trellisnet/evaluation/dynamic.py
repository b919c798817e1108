r"""Dynamic evaluation: a model learns from the text that it is scored on (Krause, Kahembwe, Murray & Renals, 2018,
"Dynamic Evaluation of Neural Sequence Models", arXiv:1709.07432).

The text comes in segments of a few positions. Each is scored first and learned from afterwards, by one step from the
weights θ that scored it, with the gradient g of its mean loss. With the trained weights θ₀ the rule `sgd` is

.. math::
    \theta \leftarrow \theta + \lambda\,(\theta_0 - \theta) - \eta\, g,

and `rms` divides each gradient by its typical size and decays less towards θ₀ where that is small: with G, for each
weight the root mean square of its gradients over segments of the training data, and m, the mean over tensors of the
mean of G,

.. math::
    \theta \leftarrow \theta + \min(\lambda\, G / m, 1)\,(\theta_0 - \theta) - \eta\, g / (G + \varepsilon).

Dropout is off. The history of a segment, up to `horizon` positions back, is computed with the current weights: in
history mode these positions come with the segment; where the state is carried, the segments that hold them are
recomputed from the state before them.

Segments come from :meth:`trellisnet.training.tasks.LanguageModeling.segments`. Besides the gradient, `rms` keeps four
numbers for every weight (θ₀, G, and the two factors), `sgd` one.

Letters: N batch (rows), L length of a row.
"""

import contextlib
import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trellisnet.errors import counted
from trellisnet.training.tasks import LanguageModeling, Progress, Windows, evaluating
from trellisnet.training.tasks.base import tracked
from trellisnet.training.tasks.windows import no_window, windowed_features

RULES = ("rms", "sgd")
FACTORS = (0.5, 1.0, 2.0)  # of rate and decay that :func:`tune` tries

Visit = Callable[[Tensor, Tensor], Any]


@dataclass(frozen=True)
class Update:
    """Settings of an update after a segment.

    Args:
        rule: "rms" or "sgd", as above.
        lr: η.
        decay: λ.
        epsilon: ε, of `rms`.

    Raises:
        ValueError: a setting out of range.
    """

    rule: str = "rms"
    lr: float = 5e-5
    decay: float = 2e-3
    epsilon: float = 2e-5

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"rule: expected one of {', '.join(RULES)}, got {self.rule!r}")
        for name in ("lr", "decay", "epsilon"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        if self.rule == "rms" and not self.epsilon:
            raise ValueError("epsilon: expected more than 0, because some gradients are 0, got 0")


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    """The trainable parameters; those that several modules share count once."""
    return [p for p in model.parameters() if p.requires_grad]


def _uncached(device: torch.device) -> torch.autocast:
    """The current autocast without its cache of converted weights, which would outlive an update."""
    kind = device.type
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return torch.autocast(kind, dtype, enabled=enabled, cache_enabled=False)


@contextlib.contextmanager
def _restored(parameters: Sequence[nn.Parameter]) -> Iterator[list[Tensor]]:
    """Yield copies of the weights, and restore them on exit, after an error too."""
    trained = [p.detach().clone() for p in parameters]
    try:
        yield trained
    finally:
        with torch.no_grad():
            for p, before in zip(parameters, trained, strict=True):
                p.copy_(before)


@torch.enable_grad()
def gradient_statistics(
    task: LanguageModeling,
    rows: Tensor,
    *,
    segments: Windows,
    limit: int = 0,
    group: int = 0,
    progress: Progress | None = None,
) -> list[Tensor]:
    """G of the rule `rms`: root mean squares of the gradients of the mean losses of segments, in evaluation mode.

    Args:
        task: the model and its losses.
        rows: training data (N, L). A segment spans all rows, so that their number decides how noisy G is.
        segments: how rows are cut.
        limit: number of segments to use, from the beginning of the rows; 0: all.
        group: number of rows to compute at a time, to save memory; 0: all.
        progress: wraps the segments.

    Returns:
        a tensor for each trainable parameter, in the order of `model.parameters()`.

    Raises:
        ValueError: the rows are shorter than one window.
    """
    model, parameters = task.model, _trainable(task.model)
    starts = segments.starts_to_score(rows)[: limit or None]
    squares = [torch.zeros_like(p) for p in parameters]
    with evaluating(model), _uncached(rows.device):
        groups = [windowed_features(model, part, segments, starts) for part in rows.split(group or rows.size(0))]
        for _ in tracked(starts, progress):
            sums = None
            for part in groups:
                output, targets = next(part)
                loss = model.loss(output, targets, reduction="sum") / (rows.size(0) * targets.size(1))
                gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
                sums = gradients if sums is None else [a + b for a, b in zip(sums, gradients, strict=True)]
            for square, gradient in zip(squares, sums, strict=True):
                square.addcmul_(gradient, gradient)
    return [square.div_(len(starts)).sqrt_() for square in squares]


def _factors(
    update: Update, parameters: Sequence[Tensor], statistics: Sequence[Tensor] | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Decay rates, at most 1, and step sizes of all parameters."""
    if update.rule == "sgd":
        rates = [p.new_tensor(min(update.decay, 1.0)) for p in parameters]
        return rates, [p.new_tensor(update.lr) for p in parameters]
    if statistics is None or len(statistics) != len(parameters):
        count = "None" if statistics is None else len(statistics)
        raise ValueError(f"statistics: the rule rms expects {counted(len(parameters), 'tensors')}, got {count}")
    mean = torch.stack([g.mean() for g in statistics]).mean().item() or 1.0  # 0 if nothing has a gradient
    rates = [(g * (update.decay / mean)).clamp_(max=1) for g in statistics]
    return rates, [update.lr / (g + update.epsilon) for g in statistics]


def evaluate(
    task: LanguageModeling,
    rows: Tensor,
    update: Update,
    statistics: Sequence[Tensor] | None = None,
    *,
    segments: Windows,
    max_tokens: int | None = None,
    progress: Progress | None = None,
    visit: Visit | None = None,
) -> dict[str, Any]:
    """Score rows (N, L) segment by segment, learning from each after it has been scored.

    Restores the weights and the model's mode on exit, after an error too. With lr = 0 nothing is learned, no gradients
    are computed, and the result is bit-equal to :meth:`LanguageModeling.evaluate` in the same segments.

    Args:
        task: the model and its losses; a carried state is recomputed over `task.horizon` positions.
        rows: int64 (N, L). All rows share one set of weights; the authors adapt to a single row.
        update: rule and rates of learning.
        statistics: from :func:`gradient_statistics`; not needed by the rule `sgd`.
        segments: how rows are cut.
        max_tokens: stop after the segment in which this many tokens have been scored.
        progress: wraps the segments.
        visit: called with features (N, l, output_size) and targets (N, l) of each segment before it is learned from.

    Returns:
        `loss`, the mean in nats per token, and `tokens`. A loss that is not finite ends the evaluation.

    Raises:
        ValueError: the rows are shorter than one window, or statistics that do not fit.
    """
    model, parameters = task.model, _trainable(task.model)
    rates, steps = _factors(update, parameters, statistics)
    total, tokens, learns = 0.0, 0, update.lr > 0
    with (
        evaluating(model),
        torch.set_grad_enabled(learns),
        _uncached(rows.device),
        _restored(parameters) as trained,
    ):
        if learns:
            recomputed = math.ceil(task.horizon / segments.scored) if segments.carried else 0
            starts = segments.starts_to_score(rows, max_tokens)
            pieces = windowed_features(model, rows, segments, starts, progress, recomputed)
        else:
            pieces = task.scored(rows, windows=segments, max_tokens=max_tokens, progress=progress)
        for output, targets in pieces:
            loss = model.loss(output, targets, reduction="sum")
            total += loss.item()
            tokens += targets.numel()
            if not math.isfinite(total):
                break
            if visit is not None:
                with torch.no_grad():
                    visit(output.detach(), targets)
            if not learns:
                continue
            gradients = torch.autograd.grad(loss / targets.numel(), parameters, materialize_grads=True)
            del output, loss
            with torch.no_grad():
                for p, before, g, rate, step in zip(parameters, trained, gradients, rates, steps, strict=True):
                    if update.decay:
                        p.lerp_(before, rate)
                    p.addcmul_(g, step, value=-1)
    if not tokens:
        raise no_window(rows.size(1))
    return {"loss": total / tokens, "tokens": tokens}


def tune(
    task: LanguageModeling,
    rows: Tensor,
    update: Update,
    statistics: Sequence[Tensor] | None = None,
    *,
    segments: Windows,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> tuple[Update, list[dict[str, float]]]:
    """Choose 0.5, 1 or 2 times the rate and the decay of `update` by the loss on validation rows (N, L).

    Arguments and errors as in :func:`evaluate`.

    Returns:
        the best update, and `lr`, `decay` and `loss` of all candidates; the loss is infinite if one diverged.
    """
    largest = sys.float_info.max
    grid = [
        dataclasses.replace(update, lr=min(update.lr * factor, largest), decay=min(update.decay * other, largest))
        for factor in FACTORS
        for other in (FACTORS if update.decay else (1.0,))
    ]
    losses = [
        evaluate(task, rows, candidate, statistics, segments=segments, max_tokens=max_tokens, progress=progress)["loss"]
        for candidate in grid
    ]
    losses = [loss if math.isfinite(loss) else math.inf for loss in losses]
    table = [{"lr": u.lr, "decay": u.decay, "loss": loss} for u, loss in zip(grid, losses, strict=True)]
    return grid[losses.index(min(losses))], table
