r"""Pruning: which (layer, time step) pairs the requested outputs depend on, and where each finds what it reads.

Tap j of a layer reads j·d steps back and its cell path reads t − d. So if the last layer is requested from step s on,
the positions that matter are, from the top down,

.. math::
    S_n = \{s, \dots, L - 1\}, \qquad S_{i-1} = \{t - j d_i : t \in S_i,\ j = 0, \dots, k-1\} \cap \{t \ge 0\}

(with k = 1 the cell path adds t − d_i). S_i contains S_n, so auxiliary outputs need nothing more. For dilation 1 the
sets are ranges: 4,669 of 6,380 layer-steps for 58 layers, L = 110, s = 58. For dilations 1, 1, 2, 4, …, 512 and the
last step of 784 they are strided: 1,571 of 8,624.

Letters: L length, k kernel size, n layers, d_i dilation of layer i, S_i positions of layer i.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trellisnet.ops.spec import TrellisSpec

Index = range | Tensor  # row numbers, ascending; a range is sliced, which copies nothing


class Read(NamedTuple):
    """Rows that one tap of a layer reads: `left` positions read before the first step, the others these `rows`."""

    left: int
    rows: Index


class Layer(NamedTuple):
    """One layer of a plan."""

    dilation: int
    size: int  # |S_i|
    edge: int  # leading positions that may read something other than zero: all, except in the first layer
    taps: tuple[Read, ...]  # oldest first
    cell: Read
    x: Index | None  # rows of x̃ of this dilation; None if x does not enter this layer
    wanted: Index  # rows of S_n
    cache: dict[Any, Any]  # results of :func:`places` and :func:`readers_of_x`, which live as long as the layer


class Plan(NamedTuple):
    layers: tuple[Layer, ...]
    x: dict[int, tuple[Read, ...]]  # for every dilation: the rows of x that the taps of x̃ read, oldest first
    layer_steps: int


def dependencies(
    length: int, num_layers: int, dilation: Sequence[int], kernel_size: int, start: int | None = None
) -> list[list[int]]:
    """Return the positions t ≥ 0 of every layer that the last layer depends on from step `start` on.

    Args:
        length: L ≥ 1.
        num_layers: n ≥ 1.
        dilation: dilations, cycled over the layers.
        kernel_size: k ≥ 1.
        start: s; None for L − 1, the last step alone.

    Returns:
        [S_1, …, S_n], each sorted; S_0 is left out because layer 0 is zero.
    """
    reach = max(kernel_size, 2)  # the cell path reads t − d also where no tap does
    positions = [list(range(length - 1 if start is None else start, length))]
    for layer in range(num_layers, 1, -1):
        d = dilation[(layer - 1) % len(dilation)]
        positions.append(sorted({t - j * d for t in positions[-1] for j in range(min(reach, t // d + 1))}))
    return positions[::-1]


def _index(rows: Sequence[int], device: torch.device) -> Index:
    """Return the row numbers as a range if they form one, else as a tensor."""
    if len(rows) == 0:
        return range(0)
    step = rows[1] - rows[0] if len(rows) > 1 else 1
    if step > 0 and list(rows) == list(range(rows[0], rows[-1] + 1, step)):
        return range(rows[0], rows[-1] + 1, step)
    return torch.tensor(rows, device=device)


def _read(positions: Sequence[int], back: int, row: dict[int, int], device: torch.device) -> Read:
    """Return where `positions` read `back` steps back; `row` maps a time step to its row."""
    inside = [t - back for t in positions if t >= back]
    return Read(len(positions) - len(inside), _index([row[t] for t in inside], device))


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # the cached tensors may be made in evaluation and reused in training
def plan(length: int, spec: TrellisSpec, start: int, device: torch.device) -> Plan:
    """Compute all indices of one geometry; those that are tensors lie on `device`."""
    kernel_size = spec.kernel_size
    positions = dependencies(length, spec.num_layers, spec.dilation, kernel_size, start)
    needed: dict[int, set[int]] = {}
    for d, here in list(zip(spec.dilations, positions, strict=True))[:: spec.inject_every]:
        needed.setdefault(d, set()).update(here)
    row_of_x = {d: {t: row for row, t in enumerate(sorted(rows))} for d, rows in needed.items()}

    def taps(positions, d, row):
        return tuple(_read(positions, j * d, row, device) for j in reversed(range(kernel_size)))

    layers = []
    for i, (d, here) in enumerate(zip(spec.dilations, positions, strict=True)):
        below = range(length) if i == 0 else positions[i - 1]  # layer 0 is zero, so any numbering will do
        row, row_here = ({t: row for row, t in enumerate(p)} for p in (below, here))
        layers.append(
            Layer(
                d,
                len(here),
                sum(t < max(kernel_size - 1, 1) * d for t in here) if i == 0 else len(here),
                taps(here, d, row),
                _read(here, d, row, device),
                _index([row_of_x[d][t] for t in here], device) if spec.injected(i) else None,
                _index([row_here[t] for t in positions[-1]], device),
                {},
            )
        )
    time = {t: t for t in range(length)}
    x_taps = {d: taps(sorted(rows), d, time) for d, rows in needed.items()}
    return Plan(tuple(layers), x_taps, sum(map(len, positions)))


class Places(NamedTuple):
    """Row of each position of a layer in other buffers, −1 for none; int32, for kernels that loop over positions."""

    x: Tensor | None  # (S,): row of x̃
    cell: Tensor  # (S,): row of the layer below that the cell path reads; −1 before the first step
    out: Tensor  # (S,): row of the output
    taps: Tensor | None  # (k, S): position of the layer above that reads this one by each tap, oldest first
    dc: Tensor  # (S,): position of the layer above whose cell path reads this one; in the last layer, the position


def places(layer: Layer, above: Layer | None, device: torch.device) -> Places:
    """Return the places of a layer below `above` (None for the last layer), on `device`."""
    # The key does not name `above`: a layer only ever lies below one other, or, in streams, below none.
    cached = layer.cache.get((above is None, device))
    return cached or layer.cache.setdefault((above is None, device), _places(layer, above, device))


@torch.inference_mode(False)
def _places(layer: Layer, above: Layer | None, device: torch.device) -> Places:
    def inverse(index: Index, first: int) -> Tensor:
        """Return, for each position of the layer, which of first, first + 1, … reads it."""
        readers = torch.full((layer.size,), -1, device="cpu")  # which need not be torch's default device
        readers[_array(index).long()] = torch.arange(first, first + len(index), device="cpu")
        return readers

    taps, dc = None, torch.arange(layer.size, device="cpu")
    if above is not None:
        taps = torch.stack([inverse(read.rows, read.left) for read in above.taps])
        dc = inverse(above.cell.rows, above.cell.left)
    cell = torch.cat([torch.full((layer.cell.left,), -1, device="cpu"), _array(layer.cell.rows)])
    x = None if layer.x is None else _array(layer.x)
    arrays = (x, cell, inverse(layer.wanted, 0), taps, dc)
    return Places(*(None if a is None else a.to(device, torch.int32) for a in arrays))


def readers_of_x(layers: Sequence[tuple[Layer, int]], rows: int, batch: int, device: torch.device) -> Tensor:
    """Return which rows of a buffer belong to each row of x̃, on `device`.

    Args:
        layers: layers of one dilation that x̃ enters, and the row of the buffer, counted as (position, sequence), at
            which each begins.
        rows: P.
        batch: N.

    Returns:
        (layers, P) int32: row of the layer's position that reads this row of x̃, for the first sequence; −1 for none.
    """
    # The key names the first layer alone: the others are those below it, wherever its plan puts them.
    key = *(first for _, first in layers), batch, device
    cache = layers[0][0].cache
    return cache[key] if key in cache else cache.setdefault(key, _readers_of_x(layers, rows, batch).to(device))


@torch.inference_mode(False)
def _readers_of_x(layers: Sequence[tuple[Layer, int]], rows: int, batch: int) -> Tensor:
    readers = torch.full((len(layers), rows), -1, dtype=torch.int32, device="cpu")
    for reader, (layer, first) in zip(readers, layers, strict=True):
        at = torch.arange(first, first + layer.size * batch, batch, dtype=torch.int32, device="cpu")
        reader[_array(layer.x).long()] = at
    return readers


def _array(index: Index) -> Tensor:
    return torch.tensor(index, device="cpu") if isinstance(index, range) else index.cpu()


def rows(source: Tensor, index: Index, first: int = 0, last: int | None = None, dim: int = 0) -> Tensor:
    """Return `source` at index[first:last] along `dim`: a view if the index is a range."""
    index = index[first:last]
    if isinstance(index, range):
        return source[(slice(None),) * dim + (slice(index.start, index.stop, index.step),)]
    return source.index_select(dim, index)


def take(source: Tensor, read: Read, left: Tensor, dim: int = 0) -> Tensor:
    """Return what a tap reads: `left` (size 1 in `dim`) before the first step, then rows of `source`."""
    inside = rows(source, read.rows, dim=dim)
    if not read.left:
        return inside
    shape = list(source.shape)
    shape[dim] = read.left
    return torch.cat([left.expand(shape), inside], dim)
