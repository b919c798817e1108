r"""The last layer at the last time step, from the layer-steps it depends on and no others.

A classifier reads :math:`h^{(n)}_{L-1}` alone. Tap j of a layer reads j·d steps back and its cell path reads t − d, so
the positions that count are, from the top down,

.. math::
    S_n = \{L - 1\}, \qquad S_{i-1} = \{t - j d_i : t \in S_i,\ j = 0, \dots, k-1\} \cap \{t \ge 0\}

(with k = 1 the cell path adds t − d_i). For dilations 1, 1, 2, 4, …, 512, k = 2 and L = 784 these are 1,571 of the
8,624 layer-steps. The sets are strided, so every layer keeps a row for each of its positions, (N, |S_i|, H), and the
layer above picks rows from it. The equation is that of :mod:`trellisnet.ops.reference`.

Letters: N batch, L length, C input channels, H hidden channels, G gates, k kernel size, n layers, d_i dilation of layer
i.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from trellisnet.ops.reference import ACTIVATIONS

Index = range | tuple[int, ...]  # row numbers; a range is sliced, which copies nothing


class _Layer(NamedTuple):
    """Where a layer above the first finds the rows it reads; −1 stands for what is left of the first time step."""

    dilation: int
    x: Index | None  # a row of x̃ for every position; None: x does not enter this layer
    h: Index  # k rows of the layer below for every position, oldest tap first
    c: Index  # a row of the layer below for every position, that of t − d


class _Plan(NamedTuple):
    edge: tuple[Index, Index, Index]  # of x, h and c, for those positions of layer 1 that may read the carried state
    inside: Index  # k rows of x for every other position of layer 1
    x: dict[int, Index]  # for every dilation above layer 1: k rows of x for every row of x̃
    above: list[_Layer]


def dependencies(length: int, num_layers: int, dilation: Sequence[int], kernel_size: int) -> list[list[int]]:
    """Positions t ≥ 0 of every layer that the last layer at the last time step depends on.

    Args:
        length: L ≥ 1.
        num_layers: n ≥ 1.
        dilation: dilations, cycled over the layers.
        kernel_size: k ≥ 1.

    Returns:
        [S_1, …, S_n], each sorted; S_0 is left out because layer 0 is zero.
    """
    reach = max(kernel_size, 2)  # the cell path reads t − d also where no tap does
    positions = [[length - 1]]
    for layer in range(num_layers, 1, -1):
        d = dilation[(layer - 1) % len(dilation)]
        positions.append(sorted({t - j * d for t in positions[-1] for j in range(min(reach, t // d + 1))}))
    return positions[::-1]


def _index(rows: Sequence[int]) -> Index:
    """The row numbers as a range where they are one."""
    if len(rows) == 0:
        return ()
    step = rows[1] - rows[0] if len(rows) > 1 else 1
    if step > 0 and list(rows) == list(range(rows[0], rows[-1] + 1, step)):
        return range(rows[0], rows[-1] + 1, step)
    return tuple(rows)


@lru_cache(maxsize=64)
def _plan(length: int, num_layers: int, dilation: tuple[int, ...], kernel_size: int, inject_every: int) -> _Plan:
    """All indices of one geometry. Plain integers: a cached tensor might be one made in inference mode."""
    positions = dependencies(length, num_layers, dilation, kernel_size)
    dilations = [dilation[i % len(dilation)] for i in range(num_layers)]

    def taps(d, positions):
        return [t - j * d for t in positions for j in reversed(range(kernel_size))]

    def of_x(d, positions):
        return _index([max(t, -1) for t in taps(d, positions)])

    # Layer 0 has two rows, the carried state and zero. One position at least reads them, so that there is a gradient,
    # if only zero, for the state and the hidden kernel of a network that never looks left of the sequence.
    (first, *above), (first_d, *dilations) = positions, dilations
    injected = [layer % inject_every == 0 for layer in range(1, num_layers)]
    edge = max(1, sum(t < max(kernel_size - 1, 1) * first_d for t in first))
    edge, inside = first[:edge], first[edge:]
    edge_h, edge_c = ([int(t >= 0) for t in read] for read in (taps(first_d, edge), [t - first_d for t in edge]))

    needed: dict[int, set[int]] = {}
    for d, here, inject in zip(dilations, above, injected, strict=True):
        if inject:
            needed.setdefault(d, set()).update(here)
    rows_x = {d: {t: row for row, t in enumerate(sorted(p))} for d, p in needed.items()}
    layers = []
    for d, here, below, inject in zip(dilations, above, positions[:-1], injected, strict=True):
        row_below = {t: row for row, t in enumerate(below)}
        layers.append(
            _Layer(
                d,
                _index([rows_x[d][t] for t in here]) if inject else None,
                _index([row_below.get(t, -1) for t in taps(d, here)]),
                _index([row_below.get(t - d, -1) for t in here]),
            )
        )
    return _Plan(
        (of_x(first_d, edge), _index(edge_h), _index(edge_c)),
        of_x(first_d, inside),
        {d: of_x(d, sorted(p)) for d, p in needed.items()},
        layers,
    )


def _take(rows: Tensor, index: Index, left: Tensor | None = None) -> Tensor:
    """Rows (N, R, ·) by number; −1 is `left` (N, 1, ·)."""
    if index[0] < 0:  # positions ascend and the oldest tap comes first: no later index is −1 if the first is not
        rows = torch.cat([left, rows], dim=1)
        index = range(0, index.stop + 1, index.step) if isinstance(index, range) else [row + 1 for row in index]
    if isinstance(index, range):
        return rows[:, index.start : index.stop : index.step]
    return rows.index_select(1, torch.tensor(index, device=rows.device))


def last_step(
    x: Tensor,
    weight_x: Tensor,
    weight_h: Tensor,
    bias: Tensor,
    state: tuple[Tensor, Tensor],
    *,
    num_layers: int,
    dilation: Sequence[int],
    output_size: int,
    hidden_scale: Tensor | None = None,
    activation: str = "lstm",
    inject_every: int = 1,
) -> tuple[Tensor, tuple[Tensor, Tensor], int]:
    """Any dtype, any device, differentiable in every tensor. Arguments as in :func:`trellisnet.ops.last_step`."""
    f, rows = ACTIVATIONS[activation], bias.numel()
    h0, c0 = (s.unsqueeze(1) for s in state)  # (N, 1, H)
    (N, L, _), H, k = x.shape, h0.size(2), weight_h.size(2)
    plan = _plan(L, num_layers, tuple(dilation), k, inject_every)
    scale = None if hidden_scale is None else hidden_scale.transpose(1, 2)  # (N, 1, H)
    weight_x, weight_h = (w.transpose(1, 2).flatten(1).t() for w in (weight_x, weight_h))  # (k·C, GH), (k·H, GH)
    layer_steps = 0

    def masked(h):
        return h if scale is None else h * scale

    def linear(z, taps, weight):
        """z + taps · weight, (N, S, GH): z of that shape or (GH,), k rows of the layer below or of x a position."""
        S = taps.size(1) * taps.size(2) // weight.size(0)
        taps = taps.reshape(N * S, weight.size(0))  # (N·S, k·H) or (N·S, k·C)
        return torch.addmm(z if z.dim() == 1 else z.reshape(N * S, rows), taps, weight).view(N, S, rows)

    def gates(z_x, taps=None, c_shifted=None):
        """(h, c), (N, S, H) each, from x̃ (N, S, GH) or (GH,); taps and c_shifted None: both are zero."""
        nonlocal layer_steps
        if activation == "lstm":  # what is zero is left out, and the product adds x̃
            z = z_x if taps is None else linear(z_x, taps, weight_h)
            layer_steps += z.size(1)
            z_i, z_o, z_g, z_f = z.chunk(4, dim=2)
            c = torch.sigmoid(z_i) * torch.tanh(z_g)
            if c_shifted is not None:
                c = torch.sigmoid(z_f) * c_shifted + c
            return torch.sigmoid(z_o) * torch.tanh(c), c
        z_h = torch.zeros_like(z_x) if taps is None else linear(torch.zeros_like(bias), taps, weight_h)
        layer_steps += z_h.size(1)
        return f(z_x.expand_as(z_h), z_h, z_h.new_zeros(()) if c_shifted is None else c_shifted, dim=2)

    def x_tilde(index):
        return linear(bias, _take(x, index, x.new_zeros(N, 1, x.size(2))), weight_x)

    h_carried = masked(h0)
    h, c = (torch.cat([carried, torch.zeros_like(carried)], dim=1) for carried in (h_carried, c0))
    x_edge, h_edge, c_edge = plan.edge
    parts = [gates(x_tilde(x_edge), _take(h, h_edge), _take(c, c_edge))]
    if plan.inside:
        parts.append(gates(x_tilde(plan.inside)))  # h and c of layer 0 are zero here
    h, c = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))

    shared = {d: x_tilde(index) for d, index in plan.x.items()}
    for layer in plan.above:
        z_x = bias if layer.x is None else _take(shared[layer.dilation], layer.x)
        h, c = gates(z_x, _take(masked(h), layer.h, h_carried), _take(c, layer.c, c0))

    return h[:, :, H - output_size :], (h[:, 0], c[:, 0]), layer_steps
