"""Forward and backward pass of the gates of one layer, between the products of the fused operator.

This version uses torch's operations; :mod:`trellisnet.ops.compiled` does the same in one pass over memory. Both
work in place on the buffers of a :class:`Step`. Rows are (position, sequence), time first; LSTM gates lie in the order
i, o, g, f. What depends on the activation is in `FUNCTIONS`.

Letters: N batch, H hidden channels, G gates, k kernel size, S positions of a layer, P rows of x̃.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trellisnet.ops import pruning
from trellisnet.ops.pruning import Index, Layer, Read
from trellisnet.ops.spec import Activation

# (gradient of the outputs, outputs) → gradient of the inputs
sigmoid_backward, tanh_backward = torch.ops.aten.sigmoid_backward, torch.ops.aten.tanh_backward
empty = torch.empty  # a name in this module, so that tests can fill uninitialised memory with NaN
BLOCK = 1 << 18  # elements of a block of H channels, 1 MB: small enough to stay in the cache


@dataclass
class Step:
    """Buffers that the gates of one layer read and write.

    `gates`, `x`, `taps`, `dtaps` and `dz` are in the dtype of the products; everything else is in single precision, or
    in double if the products are.

    Args:
        activation: activation of the layer.
        layer: positions of the layer, and what they read.
        above: the layer above, or None.
        product: number of leading positions whose gates hold a product on entry; the others see x alone.
        gates: (S, N, GH): products on entry to `forward`, gates afterwards.
        x: x̃ including the bias, (P, N, GH); in a layer without x, the bias (GH,).
        c: cell (S, N, H), written by `forward`; None if there is none.
        c_below: cell of the layer below; None for zeros.
        c0: cell to the left of the first step, (N, H); None for zeros.
        scale: factor on h as the layer above reads it, (N, H); None for 1.
        taps: (S of the layer above, N, k, H), or None: where h goes, the k taps of a position side by side. Taps before
            the first step are left alone.
        out: (wanted, N, ·), or None: where the last channels of h go, unmasked, at `layer.wanted`; in `backward`, the
            gradient of that.
        dtaps: gradient of `taps`, or None.
        dc_above: gradient that the cell path of the layer above passes down, (S of the layer above, N, H), or None; for
            the last layer, the gradient of its cell, (S, N, H).
        dz: gradient of the products, (product, N, GH), written by `backward`.
        dc: gradient that this layer's cell path passes down, (S, N, H), written by `backward`, or None.
        dx: gradient of x̃, (P, N, GH); in a layer without x, (S, N, GH). None: :func:`sum_rows` computes it from dz.
        add: whether `backward` adds to `dx`. It may overwrite if this layer covers all rows of x̃.
    """

    activation: Activation
    layer: Layer
    above: Layer | None
    product: int
    gates: Tensor
    x: Tensor | None  # not read by `backward`
    c: Tensor | None
    c_below: Tensor | None
    c0: Tensor | None
    scale: Tensor | None
    taps: Tensor | None = None
    out: Tensor | None = None
    dtaps: Tensor | None = None
    dc_above: Tensor | None = None
    dz: Tensor | None = None
    dc: Tensor | None = None
    dx: Tensor | None = None
    add: bool = True


def _blocks(step: Step) -> list[tuple[int, int]]:
    """Divide the positions of the layer into blocks, none of which straddles `product`."""
    size, N, GH = step.gates.shape
    # One block on a GPU, which gains nothing from cache-sized ones.
    length = max(1, BLOCK * 4 // max(1, N * GH)) if step.gates.device.type == "cpu" else max(1, size)
    spans = ((0, step.product), (step.product, size))
    return [(a, min(a + length, last)) for first, last in spans for a in range(first, last, length)]


def _pieces(read: Read, first: int, last: int) -> list[tuple[slice, Index | None]]:
    """Split positions first:last of a read into (slice of the block, rows); rows are None before the first step."""
    left = min(max(read.left - first, 0), last - first)
    pieces: list[tuple[slice, Index | None]] = [(slice(0, left), None)] if left else []
    if left < last - first:
        pieces.append((slice(left, last - first), read.rows[first + left - read.left : last - read.left]))
    return pieces


def add_rows(target: Tensor, index: Index, values: Tensor) -> None:
    """Add values to target[index] along dimension 0."""
    if isinstance(index, range):
        pruning.rows(target, index).add_(values)
    else:
        target.index_add_(0, index, values.to(target.dtype))


def _spread(step: Step, h: Tensor) -> None:
    """Write h, already masked, (S, N, H), to the taps of the layer above."""
    for j, read in enumerate(step.above.taps):
        step.taps[read.left :, :, j].copy_(pruning.rows(h, read.rows))


def _lstm(step: Step, first: int, gate: Tensor, h: Tensor) -> None:
    last, H = first + gate.size(0), h.size(-1)
    gate[..., : 2 * H].sigmoid_()
    gate[..., 2 * H : 3 * H].tanh_()
    gate[..., 3 * H :].sigmoid_()
    i, o, g, f = gate.split(H, dim=-1)
    c = torch.mul(i, g, out=step.c[first:last])
    for where, index in _pieces(step.layer.cell, first, last):
        c_shifted = step.c0 if index is None else step.c_below
        if c_shifted is not None:
            c_shifted = c_shifted if index is None else pruning.rows(c_shifted, index)
            c[where].addcmul_(f[where], c_shifted.to(c.dtype))
    torch.tanh(c, out=h).mul_(o)


def _lstm_backward(step: Step, first: int, gate: Tensor, dh: Tensor, dc: Tensor, dz: Tensor) -> Tensor:
    last = first + gate.size(0)
    i, o, g, f = gate.split(dh.size(-1), dim=-1)
    dz_i, dz_o, dz_g, dz_f = dz.split(dh.size(-1), dim=-1)
    h = torch.tanh(step.c[first:last])
    # dL/dc: through h = o tanh(c), and through the cell path of the layer above
    dc_now = tanh_backward(dh * o, h).add_(dc)
    sigmoid_backward(dh * h, o, grad_input=dz_o)
    sigmoid_backward(dc_now * g, i, grad_input=dz_i)
    tanh_backward(dc_now * i, g, grad_input=dz_g)
    sigmoid_backward(dc_now, f, grad_input=dz_f)
    for where, index in _pieces(step.layer.cell, first, last):
        c_shifted = step.c0 if index is None else step.c_below
        if c_shifted is None:
            dz_f[where].zero_()
        else:
            dz_f[where].mul_(c_shifted if index is None else pruning.rows(c_shifted, index))
    if step.dc is not None:
        torch.mul(dc_now, f, out=step.dc[first:last])
    return h.mul_(o)


def _tanh(step: Step, first: int, gate: Tensor, h: Tensor) -> None:
    h.copy_(gate.tanh_())


def _tanh_backward(step: Step, first: int, gate: Tensor, dh: Tensor, dc: None, dz: Tensor) -> Tensor:
    tanh_backward(dh, gate, grad_input=dz)
    return gate


# Two functions per activation, each for a block of positions that begins at `first`. Forward (step, first, gate, h)
# turns `gate`, which holds x̃ + Conv1D(h) on entry, into what backward needs, and writes h and the cell, if any.
# Backward (step, first, gate, dh, dc, dz) writes dz and the gradient of the cell, if any, and returns h.
FUNCTIONS: dict[str, tuple[Callable[..., None], Callable[..., Tensor]]] = {
    "lstm": (_lstm, _lstm_backward),
    "tanh": (_tanh, _tanh_backward),
}


def forward(step: Step) -> None:
    """Compute gates and cell, and write h to the taps that read it and to the output."""
    layer, gates = step.layer, step.gates
    size, N, GH = gates.shape
    H = GH // step.activation.gates
    function, _ = FUNCTIONS[step.activation.name]
    work = torch.float64 if gates.dtype == torch.float64 else torch.float32

    def new(rows: int, channels: int, dtype: torch.dtype = work) -> Tensor:
        return empty((rows, N, channels), dtype=dtype, device=gates.device)

    h_masked = None if step.taps is None else new(size, H, gates.dtype)
    h_all = None if step.out is None else new(size, H)
    for a, b in _blocks(step):
        gate = gates[a:b] if gates.dtype == work else new(b - a, GH)
        x = step.x if layer.x is None else pruning.rows(step.x, layer.x, a, b)
        if a >= step.product:
            gate.copy_(x)
        else:
            (gate if gates.dtype == work else gate.copy_(gates[a:b])).add_(x)
        h = new(b - a, H) if h_all is None else h_all[a:b]
        function(step, a, gate, h)
        if gates.dtype != work:
            gates[a:b] = gate
        if h_masked is not None:
            h_masked[a:b] = h if step.scale is None else h * step.scale
    if h_masked is not None:
        _spread(step, h_masked)
    if h_all is not None:
        step.out.copy_(pruning.rows(h_all, layer.wanted)[..., H - step.out.size(2) :])


def backward(step: Step) -> None:
    """Compute the gradients of products, x̃ and cells, and write h to the taps again."""
    layer, above, gates = step.layer, step.above, step.gates
    size, N, GH = gates.shape
    H = GH // step.activation.gates
    _, function = FUNCTIONS[step.activation.name]
    work = torch.float64 if gates.dtype == torch.float64 else torch.float32

    def new(rows: int, channels: int, dtype: torch.dtype = work) -> Tensor:
        return empty((rows, N, channels), dtype=dtype, device=gates.device)

    dh = new(size, H).zero_()
    if step.dtaps is not None:
        for j, read in enumerate(above.taps):
            add_rows(dh, read.rows, step.dtaps[read.left :, :, j])
        if step.scale is not None:
            dh.mul_(step.scale)
    if step.out is not None:
        add_rows(dh[..., H - step.out.size(2) :], layer.wanted, step.out)
    dc = step.dc_above
    if step.activation.has_cell and above is not None:
        dc = new(size, H).zero_()
        add_rows(dc, above.cell.rows, step.dc_above[above.cell.left :])
    h_masked = None if step.taps is None else new(size, H, gates.dtype)
    for a, b in _blocks(step):
        gate = gates[a:b].to(work)
        direct = a < step.product and gates.dtype == work
        dz = step.dz[a:b] if direct else new(b - a, GH)
        h = function(step, a, gate, dh[a:b], None if dc is None else dc[a:b], dz)
        if h_masked is not None:
            h_masked[a:b] = h if step.scale is None else h * step.scale
        if step.dx is not None and step.add:
            add_rows(step.dx, layer.x[a:b], dz)
        elif step.dx is not None:
            step.dx[a:b] = dz
        if a < step.product and not direct:
            step.dz[a:b] = dz
    if h_masked is not None:
        _spread(step, h_masked)


def sum_rows(dx: Tensor, dz: Tensor, layers: Sequence[tuple[Layer, int]], add: bool) -> None:
    """Sum the dz of several layers that x̃ enters with one dilation: its gradient.

    Args:
        dx: gradient of x̃, (P, N, GH).
        dz: rows of GH numbers, in the dtype of the products.
        layers: each layer, and the row of `dz` at which its positions begin.
        add: add to `dx` instead of overwriting it.
    """
    N, GH = dx.shape[1:]
    if not add:
        dx.zero_()
    for layer, first in layers:
        add_rows(dx, layer.x, dz[first : first + layer.size * N].view(layer.size, N, GH))
