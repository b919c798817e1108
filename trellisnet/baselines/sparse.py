"""Predefined sparseness (Demeester, Deleu, Godin & Develder, 2018, "Predefined Sparseness in Recurrent Sequence
Models", arXiv:1808.08720): layers with a sparsity pattern fixed before training.

An LSTM becomes several small ones in parallel, so that its recurrent matrix is block diagonal and its input matrix
banded (section 3.1). An embedding matrix becomes a staircase: rare words have short vectors, frequent ones long ones
(section 3.2).

Letters: N batch, L length, H hidden width, V vocabulary, E embedding width.
"""

import math
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trellisnet.baselines.lstm import AWDLSTM, WeightDropLSTM
from trellisnet.core import check_at_least
from trellisnet.regularization import Masks

Segment = tuple[int, int]  # half-open: [begin, end)
INIT_RANGE = 0.1
MODES = ("direct", "sparse_hidden", "sparse_emb", "sparse_all")


def segments(total: int, count: int, density: float) -> list[Segment]:
    """Cover `total` positions with `count` equally spaced segments of `density`·total positions each.

    Raises:
        ValueError: the density is outside [1/count, 1], or a segment would be empty.
    """
    if not 1 / count - 1e-9 <= density <= 1:
        raise ValueError(f"density: expected 1/{count} to 1 for {count} segments, got {density}")
    if count == 1:
        return [(0, total)]
    overlap = total * (count * density - 1) / (count - 1)
    begins = [i * (total * density - overlap) for i in range(count)]
    spans = [(int(begin), int(begin + total * density + 1e-7)) for begin in begins]
    spans[-1] = (spans[-1][0], total)
    if count * density <= 1 + 1e-9:  # a begin that rounding leaves just below a whole number would be one too early
        spans = list(pairwise([0, *(end for _, end in spans)]))
    if any(begin >= end for begin, end in spans):
        raise ValueError(f"blocks: {count} are too many for {total} positions, some would be empty")
    assert all(end >= begin for (_, end), (begin, _) in pairwise(spans)), "a position is in no segment"
    return spans


def blocks_of(input_size: int, hidden_size: int, reduce_in: float, reduce_out: float) -> tuple[int, float]:
    """Find the blocks and density with which a sparse LSTM has the parameters of a smaller dense one.

    Args:
        input_size, hidden_size: sizes of the sparse LSTM.
        reduce_in, reduce_out: in (0, 1]; the dense one has reduce_in·input_size inputs and reduce_out·hidden_size
            hidden channels.

    Returns:
        the number of blocks and the density of their inputs. The density is capped at 1; the sparse LSTM is then
        smaller than the dense one.

    Raises:
        ValueError: a fraction is outside (0, 1], or the sizes leave no solution.
    """
    for name, value in (("reduce_in", reduce_in), ("reduce_out", reduce_out)):
        if not 0 < value <= 1:
            raise ValueError(f"{name}: expected a fraction in (0, 1], got {value}")
    # Parameters per hidden channel and gate that the blocks may have, without their two biases.
    budget = reduce_in * reduce_out * input_size + reduce_out**2 * hidden_size + 2 * reduce_out - 2
    ratio = (input_size + hidden_size) / budget if budget > 0 else math.inf
    if ratio > hidden_size or math.ceil(ratio) >= input_size:
        sizes = f"{input_size} inputs and {hidden_size} hidden channels"
        raise ValueError(f"reduce_in, reduce_out: {reduce_in} and {reduce_out} leave too little of {sizes}")
    count = math.ceil(ratio)
    density = min(1.0, (budget - hidden_size / count) / input_size)
    if density < 1 / count:
        raise ValueError(f"reduce_in, reduce_out: {reduce_in} and {reduce_out} need a density below 1/{count}")
    return count, density


class SparseLSTM(nn.Module):
    """LSTM layer made of small dense ones, each with one segment of the inputs and one of the hidden channels.

    It has the interface of :class:`trellisnet.baselines.lstm.WeightDropLSTM`. The parts run one after the other, each
    in torch's own LSTM: on a CPU this is faster than one batched product per time step for all parts, and than one LSTM
    with a block-diagonal matrix (measured by `scripts/bench_sparse.py`).

    Args:
        input_size, hidden_size: as in `torch.nn.LSTM`.
        blocks, density: the number of parts, and the fraction of the inputs that each reads, in [1/blocks, 1].
        reduce_in, reduce_out: alternative to blocks and density, see :func:`blocks_of`.
        weight_dropout: probability of dropping a recurrent weight, in every part.

    Raises:
        ValueError: neither or both pairs are passed, or a setting is out of range.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        blocks: int | None = None,
        density: float | None = None,
        reduce_in: float | None = None,
        reduce_out: float | None = None,
        weight_dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        by_blocks, by_reduction = (None not in pair for pair in ((blocks, density), (reduce_in, reduce_out)))
        passed = sum(value is not None for value in (blocks, density, reduce_in, reduce_out))
        if passed != 2 or not by_blocks | by_reduction:
            raise ValueError("expected either blocks and density or reduce_in and reduce_out")
        if by_reduction:
            blocks, density = blocks_of(input_size, hidden_size, reduce_in, reduce_out)
        check_at_least(1, blocks=blocks)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.density = density
        self.inputs = segments(input_size, blocks, density)
        self.outputs = segments(hidden_size, blocks, 1 / blocks)
        self.parts = nn.ModuleList(
            WeightDropLSTM(b - a, d - c, weight_dropout=weight_dropout, device=device, dtype=dtype)
            for (a, b), (c, d) in zip(self.inputs, self.outputs, strict=True)
        )

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}, inputs={self.inputs}, outputs={self.outputs}"

    def draw_masks(self) -> tuple[Tensor | None, ...]:
        """Draw a mask for the recurrent matrix of every part."""
        return tuple(part.draw_masks() for part in self.parts)

    def forward(
        self, x: Tensor, state: tuple[Tensor, Tensor] | None = None, masks: Masks | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Run the layer.

        Args:
            x: (N, L, input_size).
            state: (h, c), (N, H) each; None for zeros.
            masks: explicit masks, of which `weight_h`, one entry per part, is read; None draws in training mode.

        Returns:
            outputs (N, L, H), and (h, c) of the last step.
        """
        results = []
        for i, (part, (a, b), (c, d)) in enumerate(zip(self.parts, self.inputs, self.outputs, strict=True)):
            part_masks = masks
            if masks is not None and masks.weight_h is not None:
                part_masks = Masks(weight_h=masks.weight_h[i])
            part_state = None if state is None else tuple(s[:, c:d] for s in state)
            y, new_state = part(x[:, :, a:b], part_state, part_masks)
            results.append((y, *new_state))
        y, h, c = (torch.cat(tensors, dim=-1) for tensors in zip(*results, strict=True))
        return y, (h, c)


class SparseStack(AWDLSTM):
    """AWD-LSTM with sparse layers (section 4.1 of the paper).

    Args:
        mode: which sizes are reduced to `fraction`, in the sense of :func:`blocks_of`. "sparse_hidden": the hidden
            channels between layers; "sparse_emb": the input of the first layer and the output of the last;
            "sparse_all": both; "direct": none, which is an ordinary AWD-LSTM.
        fraction: in (0, 1].
        others: as in :class:`trellisnet.baselines.lstm.AWDLSTM`.

    Raises:
        ValueError: a setting is out of range, or the fraction leaves too little of a layer.
    """

    core_name = "sparse-lstm"

    def __init__(self, *sizes: int, mode: str = "direct", fraction: float = 1.0, **others: Any):
        if mode not in MODES:
            raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
        super().__init__(*sizes, mode=mode, fraction=fraction, **others)

    def make_layer(self, i: int, *, mode: str, fraction: float, **options: Any) -> nn.Module:
        """Build layer i, counted from 0."""
        if mode == "direct":
            return super().make_layer(i, **options)
        outer, inner = (fraction if mode in (which, "sparse_all") else 1.0 for which in ("sparse_emb", "sparse_hidden"))
        reduce_in, reduce_out = outer if i == 0 else inner, outer if i == self.num_layers - 1 else inner
        rates = {"reduce_in": reduce_in, "reduce_out": reduce_out, "weight_dropout": self.weight_dropout}
        return SparseLSTM(self.widths[i], self.widths[i + 1], **rates, **options)


def _ratio(density: float, count: int) -> float:
    """Find α in [0, 1] with mean(α⁰ … α^(count−1)) = density, by bisection."""
    low, high = (1.0, 1.0) if density >= 1 else (0.0, 1.0)
    while high - low > 1e-6:
        middle = (low + high) / 2
        if sum(middle**k for k in range(count)) / count < density:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def staircase(vocab_size: int, embedding_size: int, blocks: int, density: float) -> list[tuple[int, int]]:
    """Return the trainable rows and the width of every column block of a sparse embedding (section 3.2 of the paper).

    The number of rows shrinks from block to block by a nearly constant factor, chosen so that about density·V·E numbers
    are trainable; a block's rows are the *last* ones of the matrix. The budget follows the authors' code: its remainder
    is computed before a block's own numbers are subtracted, and the last block gets the rest.

    Args:
        vocab_size: V.
        embedding_size: E.
        blocks: number of column blocks, capped at E.
        density: in [1/blocks, 1].

    Raises:
        ValueError: a setting is out of range.
    """
    check_at_least(1, vocab_size=vocab_size, embedding_size=embedding_size, blocks=blocks)
    blocks = min(blocks, embedding_size)
    if not 1 / blocks <= density <= 1:
        raise ValueError(f"density: expected 1/{blocks} to 1 for {blocks} blocks, got {density}")
    if blocks == 1:
        return [(vocab_size, embedding_size)]
    width, budget = embedding_size // blocks, vocab_size * embedding_size * density
    rows, columns, used, left = vocab_size, embedding_size, width * vocab_size, density
    shapes = [(vocab_size, width)]
    for count in range(blocks, 2, -1):
        rows -= min(rows, math.ceil(rows * (1 - _ratio(left, count)))) if left else rows
        columns -= width
        left = min(1.0, max(0.0, (budget - used) / (rows * columns))) if rows else 0.0
        used += rows * width
        shapes.append((rows, width))
    last = embedding_size - width * (blocks - 1)
    return [*shapes, (min(rows, round(max(0, math.floor(budget) - used) / last)), last)]


class SparseEmbedding(nn.Module):
    """Embedding whose first rows are short: beyond their blocks they are zero, and stay so.

    It replaces `torch.nn.Embedding`. Ids must be sorted from rare to frequent words (`frequency_up`).

    Args:
        num_embeddings: V.
        embedding_dim: E.
        blocks: number of column blocks, at most E.
        density: fraction of the V·E numbers that are trainable, in [1/blocks, 1].

    The parameters `blocks.<j>`, (rows of block j, its width), start from U(±0.1).

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        blocks: int = 1,
        density: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        shapes = staircase(num_embeddings, embedding_dim, blocks, density)
        self.blocks = nn.ParameterList(torch.empty(shape, device=device, dtype=dtype) for shape in shapes)
        for block in self.blocks:
            nn.init.uniform_(block, -INIT_RANGE, INIT_RANGE)

    @property
    def columns(self) -> list[Segment]:
        """Columns of every block."""
        return list(pairwise(accumulate((block.size(1) for block in self.blocks), initial=0)))

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"

    @property
    def weight(self) -> Tensor:
        """Assembled matrix, (V, E): every block, with zeros above it for the rows that it lacks."""
        V = self.num_embeddings
        return torch.cat([F.pad(block, (0, 0, V - block.size(0), 0)) for block in self.blocks], dim=1)

    def forward(self, ids: Tensor) -> Tensor:
        """Look up the vectors (..., E) of ids, int64 (...)."""
        return F.embedding(ids, self.weight)
