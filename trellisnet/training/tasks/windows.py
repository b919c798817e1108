"""Cutting text into windows, and computing the model's features over them.

Letters: N batch (rows), L length of a row, l length of a window.
"""

import dataclasses
import itertools
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from trellisnet.core import State
from trellisnet.errors import counted
from trellisnet.models import TrellisLanguageModel
from trellisnet.training.tasks.base import Progress, tracked

STREAM_POSITIONS = 1024  # positions × rows per chunk of a streamed evaluation: enough for efficient products
SHORTEST, DEVIATION = 5, 5.0  # minimum and standard deviation of random window lengths


@dataclass(frozen=True)
class Windows:
    """Rule for cutting rows of text into windows, for training, evaluation and the segments of dynamic evaluation.

    Windows start `stride` = `scored` positions apart, so every position after the first `context` is scored once. The
    last window of a row may be shorter.

    Args:
        context: positions at the start of a window that provide history and are not scored.
        scored: scored positions after them.
        carried: pass the state on from window to window, detached; otherwise each starts from a zero state.
        skipped: positions at the start of a row that no window contains.
    """

    context: int
    scored: int
    carried: bool = False
    skipped: int = 0

    @classmethod
    def for_training(cls, horizon: int, seq_len: int, repackage: bool) -> Self:
        """The authors' rule for training: windows overlap if `seq_len` is given or the state is not carried."""
        if seq_len > 0 or not repackage:
            return cls(horizon, seq_len - horizon, repackage)
        return cls(0, horizon, repackage)

    @classmethod
    def for_evaluation(cls, horizon: int, seq_len: int, repackage: bool) -> Self:
        """The authors' rule for evaluation: windows overlap if `seq_len` exceeds `horizon` and no state is carried."""
        if seq_len > horizon and not repackage:
            return cls(horizon, seq_len - horizon, repackage)
        return cls(0, horizon, repackage)

    def with_context(self, context: int) -> Self:
        """Windows with less context that score the same positions."""
        skipped = self.skipped + self.context - context
        return dataclasses.replace(self, context=context, skipped=skipped)

    @property
    def stride(self) -> int:
        """Positions from the start of one window to the start of the next."""
        return self.scored

    @property
    def length(self) -> int:
        """Length of a full window."""
        return self.context + self.scored

    def starts(self, length: int) -> range:
        """Starts of the windows of a row of `length` tokens that score at least one position.

        Raises:
            ValueError: no position of a window is scored.
        """
        if self.scored < 1:
            raise ValueError(
                f"seq_len: history mode needs seq_len > horizon = {self.context}, got {self.length}; "
                "make it longer, or repackage with seq_len = 0"
            )
        return range(self.skipped, max(length - 1 - self.context, 0), self.stride)

    def starts_to_score(self, rows: Tensor, max_tokens: int | None = None) -> range:
        """Starts of the windows of rows (N, L), up to the one that contains the `max_tokens`th scored token.

        Raises:
            ValueError: there are none.
        """
        starts = self.starts(rows.size(1))
        if not starts:
            raise no_window(rows.size(1))
        if max_tokens is None:
            return starts
        return starts[: max(1, math.ceil(max_tokens / (rows.size(0) * self.stride)))]

    def cut(self, rows: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the window at `start`, int64 (N, l); rows may be int32 to save memory."""
        return cut(rows, start, min(start + self.length, rows.size(1) - 1))

    def groups(self, length: int, batch_size: int, max_tokens: int | None = None) -> list[tuple[int, list[int]]]:
        """Group the windows of one row of `length` tokens so that all but its first token are scored.

        Args:
            length: of the row.
            batch_size: windows of a group, which are equally long.
            max_tokens: stop after the group that contains this many scored tokens.

        Returns:
            unscored positions at the start of each window, and starts of the windows. The first window, which has
            nothing before it, is a group by itself and scored from its start.

        Raises:
            ValueError: the row has fewer than two tokens.
        """
        if length < 2:
            raise no_window(length)
        starts = self.starts(length) or range(1)
        full = [start for start in starts[1:] if start + self.length < length]
        groups = [(0, [0])] + [(self.context, full[i : i + batch_size]) for i in range(0, len(full), batch_size)]
        groups += [(self.context, [start]) for start in starts[1 + len(full) :]]
        if max_tokens is not None:
            sizes = (sum(min(self.length, length - 1 - start) - skip for start in starts) for skip, starts in groups)
            groups = groups[: 1 + sum(tokens < max_tokens for tokens in itertools.accumulate(sizes))]
        return groups

    def carry(self, state: State) -> State | None:
        """The state to start the next window from."""
        # The state of a core may be a view of all outputs of a window; a copy lets these be freed.
        return tuple(part.detach().clone() for part in state) if self.carried else None


def cut(rows: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
    """Inputs at positions start … end − 1 of rows (N, L) and their targets, int64 (N, l).

    Raises:
        TypeError: rows of real numbers.
    """
    if rows.is_floating_point():
        raise TypeError(f"rows: expected ids in int64, got {str(rows.dtype).removeprefix('torch.')}")
    return rows[:, start:end].long(), rows[:, start + 1 : end + 1].long()


def no_window(length: int) -> ValueError:
    """The error for rows that are too short."""
    return ValueError(f"rows of {counted(length, 'tokens')} hold no window with anything to score")


def random_spans(length: int, horizon: int, random: np.random.Generator) -> list[tuple[int, int]]:
    """Start and end of windows of random length that cover a row of `length` tokens (Merity et al., 2018, section 5).

    As in the authors' code, a last window of a single step is dropped.
    """
    spans, start = [], 0
    while start < length - 2:
        mean = horizon if random.random() < 0.95 else horizon / 2
        end = min(start + max(SHORTEST, int(random.normal(mean, DEVIATION))), length - 1)
        spans.append((start, end))
        start = end
    return spans


# -- features ----------------------------------------------------------------------------------------------------------


def streamed_features(
    model: TrellisLanguageModel,
    rows: Tensor,
    positions: range,
    context: int,
    progress: Progress | None,
    tolerance: float = 0.0,
    layers: list[int] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Features and targets at consecutive positions of rows (N, L), which the model reads as one stream.

    Reading starts `context` positions earlier: a window's history. With a `tolerance` the model may exit early; the
    number of layers computed for each position of a row is then appended to `layers`.
    """
    steps = max(1, STREAM_POSITIONS // max(1, rows.size(0)))
    starts = range(max(positions.start - context, 0), positions.stop, steps) if positions else range(0)
    stream = model.init_stream(rows.size(0))
    for start in tracked(starts, progress):
        end, skip = min(start + steps, positions.stop), max(positions.start - start, 0)
        inputs, targets = cut(rows, start, end)
        output, stream = model.stream(inputs, stream, tolerance)
        if layers is not None:
            layers += [stream.layers] * inputs.size(1)
        if targets.size(1) > skip:
            yield output[:, skip:], targets[:, skip:]


def grouped_features(
    model: TrellisLanguageModel,
    rows: Tensor,
    windows: Windows,
    groups: Sequence[tuple[int, list[int]]],
    progress: Progress | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Features and targets of the scored positions of a row (1, L), for each of :meth:`Windows.groups` side by side."""
    for skip, starts in tracked(groups, progress):
        pairs = [windows.cut(rows, start) for start in starts]
        inputs, targets = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        yield model(inputs, start=skip).output, targets[:, skip:]


def windowed_features(
    model: TrellisLanguageModel,
    rows: Tensor,
    windows: Windows,
    starts: range,
    progress: Progress | None = None,
    recomputed: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Features and targets of the scored positions of rows (N, L), window by window.

    Each window is computed on demand, with the current weights, mode and gradient setting. If the weights change
    between windows, a carried state is recomputed over the last `recomputed` windows.
    """
    state: State | None = None
    before: deque[tuple[Tensor, State | None]] = deque(maxlen=recomputed)  # inputs and initial states
    for start in tracked(starts, progress):
        inputs, targets = windows.cut(rows, start)
        state = _recompute(model, windows, before, state)
        before.append((inputs, state))
        out = model(inputs, state, start=windows.context)
        state = windows.carry(out.state)
        yield out.output, targets[:, windows.context :]


@torch.no_grad()
def _recompute(
    model: TrellisLanguageModel, windows: Windows, before: deque[tuple[Tensor, State | None]], state: State | None
) -> State | None:
    """Recompute the states between the windows in `before` with the current weights; return the one after them."""
    for i, (inputs, initial) in enumerate(before):
        state = state if i else initial  # the state before the first window stays as it was
        before[i] = inputs, state
        state = windows.carry(model(inputs, state).state)
    return state
