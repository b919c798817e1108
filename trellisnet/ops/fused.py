r"""The whole trellis as one differentiable operation: fast and lean, for LSTM gates or tanh and a dense kernel.

It computes what :mod:`trellisnet.ops.reference` says, with these differences in how:

- **Time comes first**, (S, N, H), so that what a tap reads is a slice (or, of a strided set, a selection) of rows.
- **Only what is asked for** is computed: the positions of :mod:`trellisnet.ops.pruning`.
- **One product a layer**: the rows of all taps side by side, (S·N, k·H), times the kernel.
- **Gates in blocks** of rows small enough to stay in the cache, in place where the products left them.
- **Kept for the backward**: the gates (in the type of the products) and the cell, (S, N, 5H) a layer; hidden states
  are computed from them again. The gradient of the kernel is summed in single precision in one buffer for all layers.

Products may be in bfloat16; cells, gates at work and sums over layers are then in float32.

Letters: N batch, L length, H hidden channels, G gates, k kernel size, S positions of a layer, P rows of x̃.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trellisnet.ops import gemm as products
from trellisnet.ops import pruning
from trellisnet.ops.pruning import Index, Layer, Plan, Read

# (gradient of the outputs, outputs) → gradient of the inputs
sigmoid_backward, tanh_backward = torch.ops.aten.sigmoid_backward, torch.ops.aten.tanh_backward
empty = torch.empty  # a name of this module's own, so that tests can fill what it makes with NaN
GATES = {"lstm": 4, "tanh": 1}
BLOCK = 1 << 18  # numbers of a block of H channels: 1 MB
BUCKET = 128  # products have a multiple of so many rows: the libraries keep something for every distinct number of them


class _Setting(NamedTuple):
    plan: Plan
    activation: str
    compute: torch.dtype  # of the products and of the gates that are kept
    product: products.Product
    aux_layers: frozenset[int]  # counted from 1
    output_size: int
    inject_dilations: tuple[int, ...]  # of the x̃ that follow
    keep: bool  # what a backward pass needs


class _Geometry:
    """What every step of the operation needs of shapes and types."""

    def __init__(self, setting: _Setting, weight: Tensor, like: Tensor, batch: int):
        self.setting = setting
        self.N = batch
        self.H = weight.size(0) // GATES[setting.activation]
        self.k = weight.size(1) // self.H
        self.sum = torch.float64 if setting.compute == torch.float64 else torch.float32
        self.device = like.device
        # On a GPU nothing is gained by blocks.
        self.block = max(1, BLOCK // max(1, batch * self.H)) if like.device.type == "cpu" else 1 << 62

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return empty(shape, dtype=dtype or self.sum, device=self.device)

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.sum, device=self.device)

    def blocks(self, first: int, last: int) -> list[tuple[int, int]]:
        return [(a, min(a + self.block, last)) for a in range(first, last, self.block)]

    def bucket(self, positions: int) -> int:
        """Rows of a product over so many positions, rounded up."""
        return -(-positions * self.N // BUCKET) * BUCKET if self.device.type == "cpu" else positions * self.N


def _pieces(read: Read, first: int, last: int) -> list[tuple[slice, Index | None]]:
    """Positions first:last of a read, as slices of the block: those before the first step (None), then rows."""
    left = min(max(read.left - first, 0), last - first)
    pieces: list[tuple[slice, Index | None]] = [(slice(0, left), None)] if left else []
    if left < last - first:
        pieces.append((slice(left, last - first), read.rows[first + left - read.left : last - read.left]))
    return pieces


def _add_rows(target: Tensor, index: Index, values: Tensor) -> None:
    """target[index] += values, along dimension 0."""
    if isinstance(index, range):
        pruning.rows(target, index).add_(values)
    else:
        target.index_add_(0, index, values.to(target.dtype))


def _fill_taps(geometry: _Geometry, layer: Layer, h_below: Tensor | None, h_left: Tensor | None) -> Tensor:
    """The rows that all taps read side by side, (bucket, k·H); those that pad it are zero.

    Args:
        h_below: masked h of the layer below, (S, N, H); None: zero.
        h_left: masked h before the first step, (N, H); None: zero.
    """
    N, H, size = geometry.N, geometry.H, layer.edge
    taps = geometry.empty(geometry.bucket(size), geometry.k * H, dtype=geometry.setting.compute)
    taps[size * N :].zero_()
    view = taps[: size * N].view(size, N, geometry.k * H)
    for j, read in enumerate(layer.taps):
        for where, index in _pieces(read, 0, size):
            part = view[where, :, j * H : (j + 1) * H]
            source = h_left if index is None else h_below
            if source is None:
                part.zero_()
            else:
                part.copy_(source if index is None else pruning.rows(source, index))
    return taps


class _Trellis(torch.autograd.Function):
    """(setting, weight, bias, h0, c0, scale, N, *x̃) → layer-steps computed, h, c, and the auxiliary outputs.

    weight (GH, k·H), bias (GH,), h0 and c0 (N, H) or None for zeros, scale (N, H) or None, every x̃ (P, N, GH) with its
    bias in it. h and c are those of the last layer, (S, N, H), unmasked; auxiliary outputs (S, N, output_size).
    """

    @staticmethod
    def forward(ctx: Any, setting: _Setting, weight, bias, h0, c0, scale, batch, *x_tilde):
        geometry = _Geometry(setting, weight, weight, batch)
        N, H, compute = geometry.N, geometry.H, setting.compute
        lstm = setting.activation == "lstm"
        shared = dict(zip(setting.inject_dilations, x_tilde, strict=True))
        w = weight.to(compute)
        h_left = None if h0 is None else (h0 if scale is None else h0 * scale)
        gates, cells, aux = [], [], []
        h_below = c_below = None
        layer_steps = 0
        last = len(setting.plan.layers)
        for number, layer in enumerate(setting.plan.layers, start=1):
            first = number == 1
            edge = 0 if first and h0 is None else layer.edge
            z = setting.product(_fill_taps(geometry, layer, h_below, h_left), w) if edge else None
            z = None if z is None else z[: edge * N].view(edge, N, weight.size(0))
            # The gates stay where the product has left them, if it has made them all.
            kept = z if edge == layer.size else geometry.empty(layer.size, N, weight.size(0), dtype=compute)
            c = geometry.empty(layer.size, N, H) if lstm else None
            h = None if number == last else geometry.empty(layer.size, N, H, dtype=compute)
            whole = geometry.empty(layer.size, N, H) if number == last or number in setting.aux_layers else None
            for a, b in geometry.blocks(0, edge) + geometry.blocks(edge, layer.size):
                gate = kept[a:b] if compute == geometry.sum else geometry.empty(b - a, N, weight.size(0))
                x_part = bias if layer.x is None else pruning.rows(shared[layer.dilation], layer.x, a, b)
                if a >= edge:
                    gate.copy_(x_part)
                else:
                    (gate if kept is z and compute == geometry.sum else gate.copy_(z[a:b])).add_(x_part)
                layer_steps += b - a
                h_block = geometry.empty(b - a, N, H) if whole is None else whole[a:b]
                if lstm:
                    gate[..., : 2 * H].sigmoid_()
                    gate[..., 2 * H : 3 * H].tanh_()
                    gate[..., 3 * H :].sigmoid_()
                    i, o, g, f = gate.split(H, dim=-1)
                    torch.mul(i, g, out=c[a:b])
                    if a < edge:
                        for where, index in _pieces(layer.cell, a, b):
                            before = c0 if index is None else None if first else pruning.rows(c_below, index)
                            if before is not None:
                                c[a:b][where].addcmul_(f[where], before.to(c.dtype))
                    torch.tanh(c[a:b], out=h_block).mul_(o)
                else:
                    h_block.copy_(gate.tanh_())
                if gate.dtype != compute:
                    kept[a:b] = gate
                if h is not None:
                    h[a:b] = h_block if scale is None else h_block * scale
            if setting.keep:
                gates.append(kept)
                cells.append(c)
            if number in setting.aux_layers:
                aux.append(pruning.rows(whole, layer.wanted)[..., H - setting.output_size :].clone())
            h_below, c_below = h, c
        ctx.geometry = geometry
        if setting.keep:
            ctx.save_for_backward(weight, h0, c0, scale, *gates, *(cells if lstm else ()))
        ctx.shapes = [tuple(x.shape) for x in x_tilde]
        ctx.dtypes = [x.dtype for x in x_tilde]
        return layer_steps, whole, (whole.clone() if c is None else c.clone()), *aux

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, _, dh, dc, *daux):
        with torch.autocast(ctx.geometry.device.type, enabled=False):
            return _Trellis._backward(ctx, dh, dc, *daux)

    @staticmethod
    def _backward(ctx: Any, dh, dc, *daux):
        geometry: _Geometry = ctx.geometry
        setting = geometry.setting
        N, H, k, compute = geometry.N, geometry.H, geometry.k, setting.compute
        lstm = setting.activation == "lstm"
        layers = setting.plan.layers
        weight, h0, c0, scale, *kept = ctx.saved_tensors
        gates, cells = kept[: len(layers)], kept[len(layers) :]
        w_t = weight.to(compute).t().contiguous()  # (k·H, GH)
        dw, dbias = geometry.zeros(*weight.shape), geometry.zeros(weight.size(0))
        dh_left = None if h0 is None else geometry.zeros(N, H)
        dc_left = None if c0 is None else geometry.zeros(N, H)
        dx = {d: geometry.zeros(*shape) for d, shape in zip(setting.inject_dilations, ctx.shapes, strict=True)}
        dh = dh.to(geometry.sum) if lstm else (dh + dc).to(geometry.sum)
        dc = dc.to(geometry.sum)
        h_left = None if h0 is None else (h0 if scale is None else h0 * scale)
        daux = list(daux)

        def again(number: int) -> tuple[Tensor, Tensor | None]:
            """Masked h of a layer, (S, N, H), and tanh(c)."""
            size = layers[number - 1].size
            h = geometry.empty(size, N, H, dtype=compute)
            tanh_c = geometry.empty(size, N, H) if lstm else None
            for a, b in geometry.blocks(0, size):
                if lstm:
                    torch.tanh(cells[number - 1][a:b], out=tanh_c[a:b])
                    h_block = tanh_c[a:b] * gates[number - 1][a:b, :, H : 2 * H]
                else:
                    h_block = gates[number - 1][a:b]
                h[a:b] = h_block if scale is None else h_block * scale
            return h, tanh_c

        _, tanh_c = again(len(layers)) if lstm else (None, None)
        for number in range(len(layers), 0, -1):
            layer, first = layers[number - 1], number == 1
            edge = 0 if first and h0 is None else layer.edge
            if number in setting.aux_layers:
                grad = daux.pop()
                dh = dh.clone() if number == len(layers) else dh
                _add_rows(dh[..., H - setting.output_size :], layer.wanted, grad)
            below = layers[number - 2] if not first else None
            dc_below = geometry.zeros(below.size, N, H) if lstm and below else None
            dz = geometry.empty(geometry.bucket(edge), weight.size(0), dtype=compute) if edge else None
            if edge:
                dz[edge * N :].zero_()
            for a, b in geometry.blocks(0, edge) + geometry.blocks(edge, layer.size):
                gate = gates[number - 1][a:b].to(geometry.sum)
                block = geometry.empty(b - a, N, gate.size(2))
                if a < edge and compute == geometry.sum:
                    block = dz[a * N : b * N].view_as(block)  # where the products read it
                if lstm:
                    i, o, g, f = gate.split(H, dim=-1)
                    dz_i, dz_o, dz_g, dz_f = block.split(H, dim=-1)
                    t, dh_block = tanh_c[a:b], dh[a:b]
                    # dL/dc: through h = o tanh(c), and through the cell path of the layer above
                    dc_block = tanh_backward(dh_block * o, t).add_(dc[a:b])
                    sigmoid_backward(dh_block * t, o, grad_input=dz_o)
                    sigmoid_backward(dc_block * g, i, grad_input=dz_i)
                    tanh_backward(dc_block * i, g, grad_input=dz_g)
                    if a < edge:
                        sigmoid_backward(dc_block, f, grad_input=dz_f)
                        dc_block.mul_(f)
                        for where, index in _pieces(layer.cell, a, b):
                            if index is None:
                                before = c0
                                if dc_left is not None:
                                    dc_left += dc_block[where].sum(0)
                            else:
                                before = None if first else pruning.rows(cells[number - 2], index)
                                if before is not None:
                                    _add_rows(dc_below, index, dc_block[where])
                            if before is None:
                                dz_f[where].zero_()
                            else:
                                dz_f[where].mul_(before)
                    else:
                        dz_f.zero_()
                else:
                    tanh_backward(dh[a:b], gate, grad_input=block)
                if layer.x is None:
                    dbias += block.sum((0, 1))
                else:
                    _add_rows(dx[layer.dilation], layer.x[a:b], block)
                if a < edge and compute != geometry.sum:
                    dz[a * N : b * N] = block.flatten(0, 1)
            dc = dc_below
            dh = geometry.zeros(below.size, N, H) if below else None
            if not edge:
                continue
            h_below, tanh_c = again(number - 1) if below else (None, None)
            taps = _fill_taps(geometry, layer, h_below, h_left)
            del h_below
            if ctx.needs_input_grad[1]:
                products.add_product(dw, dz.t(), taps.t(), setting.product)
            del taps
            dtaps = setting.product(dz, w_t)[: edge * N].view(edge, N, k, H)
            if scale is not None:  # not in bfloat16, where 1/(1−p) would be rounded in every layer
                dtaps = dtaps.to(geometry.sum).mul_(scale.unsqueeze(1))
            for j, read in enumerate(layer.taps):
                for where, index in _pieces(read, 0, edge):
                    if index is not None:
                        if below:
                            _add_rows(dh, index, dtaps[where, :, j])
                    elif dh_left is not None:
                        dh_left += dtaps[where, :, j].sum(0, dtype=geometry.sum)
        grads = [dx[d].to(dtype) for d, dtype in zip(setting.inject_dilations, ctx.dtypes, strict=True)]
        state = [g if g is None else g.to(s.dtype) for g, s in ((dh_left, h0), (dc_left, c0))]
        return None, dw.to(weight.dtype), dbias, *state, None, None, *grads


def trellis(
    x: Tensor,
    weight_x: Tensor,
    weight_h: Tensor,
    bias: Tensor,
    state: tuple[Tensor, Tensor] | None,
    *,
    num_layers: int,
    dilation: Sequence[int],
    output_size: int,
    start: int = 0,
    aux_every: int | None = None,
    hidden_scale: Tensor | None = None,
    activation: str = "lstm",
    inject_every: int = 1,
    gemm: str = "auto",
) -> tuple[Tensor, Tensor, list[Tensor], int]:
    """h and c of the last layer from `start` on, all channels, the auxiliary outputs, and the layer-steps computed.

    Arguments as in :func:`trellisnet.ops.trellis`. h, c (N, S, H), aux (N, S, output_size). Differentiable, once, in
    x, the kernels, the bias and the state, but not in `hidden_scale`. Within `torch.autocast` the products are in its
    type.
    """
    (N, L, C), k = x.shape, weight_h.size(2)
    device = x.device.type
    compute = weight_h.dtype
    if torch.is_autocast_enabled(device) and compute != torch.float64:
        compute = torch.get_autocast_dtype(device)
    plan = pruning.plan(L, num_layers, tuple(dilation), k, inject_every, start, x.device)
    product = products.resolve(gemm if N else "mm", x.device, compute)  # oneDNN has no products of nothing
    weight_x, weight_h = (w.transpose(1, 2).flatten(1) for w in (weight_x, weight_h))  # (GH, k·C), (GH, k·H)
    x = x.transpose(0, 1)  # (L, N, C)
    nothing = x.new_zeros(1, N, C)
    x_tilde = [
        torch.nn.functional.linear(torch.cat([pruning.take(x, read, nothing) for read in reads], dim=2), weight_x, bias)
        for reads in plan.x.values()
    ]
    aux_layers = frozenset(range(aux_every, num_layers + 1, aux_every)) if aux_every else frozenset()
    # What was made in inference mode cannot be kept for a backward pass.
    h0, c0 = (s.clone() if s.is_inference() else s for s in state) if state else (None, None)
    keep = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (weight_h, bias, h0, c0, *x_tilde)
    )
    setting = _Setting(plan, activation, compute, product, aux_layers, output_size, tuple(plan.x), keep)
    scale = None if hidden_scale is None else hidden_scale.squeeze(2)
    with torch.autocast(device, enabled=False):
        layer_steps, *parts = _Trellis.apply(setting, weight_h, bias, h0, c0, scale, N, *x_tilde)
    h, c, *aux = (part.transpose(0, 1).to(weight_h.dtype) for part in parts)
    return h, c, aux, layer_steps
