r"""The neural cache: recent words are more likely to recur (Grave, Joulin & Usunier, 2017, "Improving
Neural Language Models with a Continuous Cache", arXiv:1612.04426).

With the features h of a trained model (the input of its head) and the words y that followed, at a position t with more
than W positions before it in its row,

.. math::
    a_j \propto \exp(\theta\, h_j \cdot h_t), \quad j = t - W, \dots, t - 1, \qquad
    p(w) = \lambda \sum_j a_j\,[y_j = w] + (1 - \lambda)\, p_\mathrm{model}(w),

and elsewhere p is the model's: as in AWD-LSTM's `pointer`, a partly filled cache is not used. Nothing is learned, and
the model runs once: its features and the losses of the targets serve any W, θ and λ.

Letters: N batch (rows), T scored positions of a row, C channels of the features, B positions of a block.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trellisnet.training.tasks import LanguageModeling, Progress, evaluating

# The grid, to which the given values are added.
THETAS = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0)
LAMBDAS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3)
NUMBERS, SHORTEST = 2**22, 32  # similarities computed at a time; positions of the shortest block


@dataclass(frozen=True)
class Cache:
    """Settings of a cache.

    Args:
        window: W, positions that it looks back.
        theta: θ, sharpness of its preference for similar positions.
        weight: λ, its share of the probability.

    Raises:
        ValueError: a setting out of range.
    """

    window: int
    theta: float
    weight: float

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window: expected at least 1, got {self.window}")
        if not 0 <= self.theta < math.inf:
            raise ValueError(f"theta: expected 0 or more, got {self.theta}")
        if not 0 <= self.weight < 1:
            raise ValueError(f"lambda: expected a share in [0, 1), got {self.weight}")


class History(NamedTuple):
    """Features and losses of a model over a text.

    Args:
        features: (N, T, C).
        targets: int64 (N, T).
        losses: of the targets, in nats, (N, T).
        lengths: of the pieces in which they were computed; they add up to T.
    """

    features: Tensor
    targets: Tensor
    losses: Tensor
    lengths: list[int]


def history(pieces: Iterable[tuple[Tensor, Tensor, Tensor]]) -> History:
    """Join features (N, l, C), targets (N, l) and losses (N, l) of consecutive pieces.

    Raises:
        ValueError: there are none.
    """
    pieces = list(pieces)
    if not pieces:
        raise ValueError("there is no window with anything to score")
    features, targets, losses = (torch.cat(parts, dim=1) for parts in zip(*pieces, strict=True))
    return History(features, targets, losses, [piece[1].size(1) for piece in pieces])


@torch.no_grad()
def collect(
    task: LanguageModeling, rows: Tensor, *, max_tokens: int | None = None, progress: Progress | None = None
) -> History:
    """Compute the history of rows (N, L); arguments and windows are those of :meth:`LanguageModeling.evaluate`.

    Raises:
        ValueError: the rows are shorter than one window.
    """
    loss = task.model.loss
    with evaluating(task.model):
        pieces = task.scored(rows, max_tokens=max_tokens, progress=progress)
        return history((output, targets, loss(output, targets, reduction="none")) for output, targets in pieces)


@torch.no_grad()
def log_prob(past: History, window: int, theta: float) -> Tensor:
    """Log-probability of the targets under a full cache, log Σ_j a_j [y_j = y_t].

    Computed in float32 at least, in blocks of positions.

    Returns:
        (N, T − window − 1), for the positions from window + 1 on; −∞ where no word of the window is the target.
    """
    h = past.features.to(torch.promote_types(past.features.dtype, torch.float32))
    y, (N, T, _) = past.targets, h.shape
    log_p = h.new_empty(N, max(T - window - 1, 0))
    size = max(SHORTEST, min(window, NUMBERS // (2 * N * window)))
    with torch.autocast(h.device.type, enabled=False):
        for start in range(window + 1, T, size):
            end, first = min(start + size, T), start - window
            scores = theta * (h[:, start:end] @ h[:, first : end - 1].mT)  # (N, B, window + B − 1)
            # Row i is position start + i, which sees columns i to i + window − 1.
            seen = torch.ones_like(scores[0], dtype=torch.bool).triu_().tril_(window - 1)
            scores.masked_fill_(~seen, -math.inf)
            same = y[:, start:end, None] == y[:, None, first : end - 1]
            hits = scores.masked_fill(~same, -math.inf).logsumexp(2)  # (N, B)
            log_p[:, start - window - 1 : end - window - 1] = hits - scores.logsumexp(2)
    return log_p


def _mixed(past: History, log_p: Tensor, window: int, weight: float) -> float:
    """Mean loss of the mixture, summed as :meth:`LanguageModeling.evaluate` sums."""
    losses = past.losses.clone()
    if log_p.numel():
        at = slice(window + 1, None)
        share = math.log(weight) if weight else -math.inf
        model = math.log1p(-weight) - losses[:, at].double()
        losses[:, at] = -torch.logaddexp(log_p.double() + share, model).to(losses.dtype)
    return sum(piece.flatten().sum().item() for piece in losses.split(past.lengths, dim=1)) / losses.numel()


@torch.no_grad()
def evaluate(past: History, cache: Cache) -> dict[str, Any]:
    """Mean loss of a text with a cache beside the model.

    With λ = 0 it is bit-equal to :meth:`LanguageModeling.evaluate`, or equal up to rounding with a split softmax, which
    sums band by band.

    Returns:
        `loss`, in nats, and `tokens`.
    """
    log_p = log_prob(past, cache.window, cache.theta)
    return {"loss": _mixed(past, log_p, cache.window, cache.weight), "tokens": past.targets.numel()}


@torch.no_grad()
def tune(
    past: History, cache: Cache, *, thetas: Sequence[float] = THETAS, weights: Sequence[float] = LAMBDAS
) -> tuple[Cache, list[dict[str, float]]]:
    """Choose θ and λ by the loss of validation data, from a grid and the values of `cache`; W is kept.

    Returns:
        the best cache, and `theta`, `lambda` and `loss` of all candidates.
    """
    table = []
    for theta in sorted({*thetas, cache.theta}):
        log_p = log_prob(past, cache.window, theta)
        for weight in sorted({*weights, cache.weight}):
            table.append({"theta": theta, "lambda": weight, "loss": _mixed(past, log_p, cache.window, weight)})
    best = min(table, key=lambda tried: tried["loss"] if math.isfinite(tried["loss"]) else math.inf)
    return Cache(cache.window, best["theta"], best["lambda"]), table
