"""The gates of one layer, forwards and backwards, between the products of the fused operator: in torch's operations.

:mod:`trellisnet.ops.compiled` does the same in one pass over memory. Either works on what a :class:`Step` names, in
place. Rows are (position, sequence), time first; the gates of an LSTM lie in the order i, o, g, f. `FUNCTIONS` holds
what depends on the activation.

Letters: N batch, H hidden channels, G gates, k kernel size, S positions of a layer, P rows of x̃.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trellisnet.ops import pruning
from trellisnet.ops.pruning import Index, Layer, Read
from trellisnet.ops.spec import Activation

# (gradient of the outputs, outputs) → gradient of the inputs
sigmoid_backward, tanh_backward = torch.ops.aten.sigmoid_backward, torch.ops.aten.tanh_backward
empty = torch.empty  # a name of this module's own, so that tests can fill what it makes with NaN
BLOCK = 1 << 18  # numbers of a block of H channels, 1 MB: small enough to stay in the cache


@dataclass
class Step:
    """What the gates of one layer read and write. Products and gates are in the type of `gates`, else single precision.

    Args:
        activation: the function of the layer.
        layer: its positions and what they read.
        above: the layer above, or None.
        product: positions whose gates hold a product on entry; of the others the gates are those of x alone.
        gates: (S, N, GH): products on entry of `forward`, the gates then.
        x: x̃ with its bias, (P, N, GH); where x does not enter, the bias (GH,).
        c: (S, N, H); None without a cell. `forward` writes it.
        c_below: of the layer below; None: zero.
        c0: left of the first step, (N, H); None: zero.
        scale: factor on h as the layer above reads it, (N, H); None: one.
        taps: (S of the layer above, N, k, H), or None. Where h goes: each tap beside its neighbours. What lies before
            the first step is left alone.
        out: (wanted, N, ·), or None. Where the last channels of h go unmasked, at `layer.wanted`; of `backward` the
            gradient of that.
        dtaps: gradient of `taps`, or None.
        dc_above: (S of the layer above, N, H), or None: what its cell path passes down; of the last layer the gradient
            of its cell, (S, N, H).
        dz: (product, N, GH): gradient of the products. `backward` writes it.
        dc: (S, N, H), or None: what the cell path of this layer passes down. `backward` writes it.
        dx: (P, N, GH), gradient of x̃; where x does not enter (S, N, GH).
        add: whether `backward` adds to `dx`; else it writes, which is right if this layer has all rows of x̃.
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
    """Positions of the layer in pieces, none of them on both sides of `product`."""
    size, N, GH = step.gates.shape
    # On a GPU nothing is gained by blocks.
    most = max(1, BLOCK * 4 // max(1, N * GH)) if step.gates.device.type == "cpu" else max(1, size)
    spans = ((0, step.product), (step.product, size))
    return [(a, min(a + most, last)) for first, last in spans for a in range(first, last, most)]


def _pieces(read: Read, first: int, last: int) -> list[tuple[slice, Index | None]]:
    """Positions first:last of a read, as slices of the block: those before the first step (None), then rows."""
    left = min(max(read.left - first, 0), last - first)
    pieces: list[tuple[slice, Index | None]] = [(slice(0, left), None)] if left else []
    if left < last - first:
        pieces.append((slice(left, last - first), read.rows[first + left - read.left : last - read.left]))
    return pieces


def add_rows(target: Tensor, index: Index, values: Tensor) -> None:
    """target[index] += values, along dimension 0."""
    if isinstance(index, range):
        pruning.rows(target, index).add_(values)
    else:
        target.index_add_(0, index, values.to(target.dtype))


def _spread(step: Step, h: Tensor) -> None:
    """h, masked, (S, N, H), to the taps of the layer above."""
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
        before = step.c0 if index is None else step.c_below
        if before is not None:
            before = before if index is None else pruning.rows(before, index)
            c[where].addcmul_(f[where], before.to(c.dtype))
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
        before = step.c0 if index is None else step.c_below
        if before is None:
            dz_f[where].zero_()
        else:
            dz_f[where].mul_(before if index is None else pruning.rows(before, index))
    if step.dc is not None:
        torch.mul(dc_now, f, out=step.dc[first:last])
    return h.mul_(o)


def _tanh(step: Step, first: int, gate: Tensor, h: Tensor) -> None:
    h.copy_(gate.tanh_())


def _tanh_backward(step: Step, first: int, gate: Tensor, dh: Tensor, dc: None, dz: Tensor) -> Tensor:
    tanh_backward(dh, gate, grad_input=dz)
    return gate


# For every activation two functions of a block of positions, which begins at `first`. Forward: (step, first, gate, h)
# turn `gate`, which holds x̃ + Conv1D(h) on entry, into what backward needs, and write h and, where there is one, the
# cell. Backward: (step, first, gate, dh, dc, dz) write dz and, where there is a cell, its gradient, and return h.
FUNCTIONS: dict[str, tuple[Callable[..., None], Callable[..., Tensor]]] = {
    "lstm": (_lstm, _lstm_backward),
    "tanh": (_tanh, _tanh_backward),
}


def forward(step: Step) -> None:
    """Compute gates and cell, and put h where it is read."""
    layer, gates = step.layer, step.gates
    size, N, GH = gates.shape
    H = GH // step.activation.gates
    function, _ = FUNCTIONS[step.activation.name]
    work = torch.float64 if gates.dtype == torch.float64 else torch.float32

    def new(rows: int, channels: int, dtype: torch.dtype = work) -> Tensor:
        return empty((rows, N, channels), dtype=dtype, device=gates.device)

    h_masked = None if step.taps is None else new(size, H, gates.dtype)
    whole = None if step.out is None else new(size, H)
    for a, b in _blocks(step):
        gate = gates[a:b] if gates.dtype == work else new(b - a, GH)
        x = step.x if layer.x is None else pruning.rows(step.x, layer.x, a, b)
        if a >= step.product:
            gate.copy_(x)
        else:
            (gate if gates.dtype == work else gate.copy_(gates[a:b])).add_(x)
        h = new(b - a, H) if whole is None else whole[a:b]
        function(step, a, gate, h)
        if gates.dtype != work:
            gates[a:b] = gate
        if h_masked is not None:
            h_masked[a:b] = h if step.scale is None else h * step.scale
    if h_masked is not None:
        _spread(step, h_masked)
    if whole is not None:
        step.out.copy_(pruning.rows(whole, layer.wanted)[..., H - step.out.size(2) :])


def backward(step: Step) -> None:
    """Compute the gradients of products, x̃ and cells, and put h where the layer above has read it."""
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
        dz = step.dz[a:b] if direct else new(b - a, GH)  # where the products read it
        h = function(step, a, gate, dh[a:b], None if dc is None else dc[a:b], dz)
        if h_masked is not None:
            h_masked[a:b] = h if step.scale is None else h * step.scale
        if not step.add:
            step.dx[a:b] = dz
        else:
            add_rows(step.dx, layer.x[a:b], dz)
        if a < step.product and not direct:
            step.dz[a:b] = dz
    if h_masked is not None:
        _spread(step, h_masked)
