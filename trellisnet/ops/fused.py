r"""The whole trellis as one differentiable operation: fast and lean, for LSTM gates or tanh and a dense kernel.

It computes what :mod:`trellisnet.ops.reference` says, with these differences in how:

- **Time comes first**, (S, N, H), so that what a tap reads is a slice (or, of a strided set, a selection) of rows.
- **Only what is asked for** is computed: the positions of :mod:`trellisnet.ops.pruning`.
- **One product a layer**: the rows of all taps side by side, (S·N, k·H), times the kernel.
- **Gates in one go** (:mod:`trellisnet.ops.gates`, or :mod:`trellisnet.ops.compiled`), in place where the products left
  them. They put h straight into the taps of the layer above.
- **Kept for the backward**: the gates (in the type of the products) and the cell, (S, N, 5H) a layer; hidden states
  are computed from them again. With `recompute` = K only what is read by every K-th layer is kept, and the K layers
  from there on are computed once more when the backward pass comes to them.
- **The gradient of the kernel** is summed in single precision in one buffer, from products over several layers at once:
  on a GPU over all of them, if what they multiply takes no more than `ARENA`.

Products may be in bfloat16; cells, gates at work and sums over layers are then in float32.

Where its backward pass is itself differentiated, it is replaced by that of the same layers in differentiable operations
(:func:`trellisnet.ops.last_step.layers`), computed anew; so there are derivatives of any order, in the memory and time
of the reference. It has no forward-mode derivatives and does not run under `torch.func`; the reference does.

Letters: N batch, L length, H hidden channels, G gates, k kernel size, S positions of a layer, P rows of x̃.
"""

import importlib.util
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trellisnet.ops import compiled, higher_order, last_step, pruning
from trellisnet.ops import gates as eager
from trellisnet.ops import gemm as products
from trellisnet.ops.gates import Step
from trellisnet.ops.pruning import Plan
from trellisnet.ops.spec import Execution, TrellisSpec, Weights

empty = torch.empty  # a name of this module's own, so that tests can fill what it makes with NaN
BUCKET = 128  # products have a multiple of so many rows: the libraries keep something for every distinct number of them
LAYERS_AT_ONCE = 4  # whose rows are collected before they are multiplied into the gradient of the kernel
ARENA = 2 << 30  # bytes of rows that are collected on a GPU


def _triton() -> ModuleType:
    return importlib.import_module("trellisnet.ops.triton_gates")  # it needs an extra


def no_triton() -> str:
    """Why there is no Triton; empty if there is."""
    if not importlib.util.find_spec("triton"):
        return "the package triton is not installed"
    try:
        _triton()
    except Exception as e:  # a library that it needs is missing, another version of torch, …
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0][:80]
        return f"the package triton cannot be imported ({reason})"
    return ""


def fastest_gates(device: torch.device) -> str:
    """The gate kernels that `auto` tries first on this device."""
    return "triton" if device.type == "cuda" else "compiled"


def reason_against(choice: str, device: torch.device, compute: torch.dtype, activation: str) -> str:
    """Why these gate kernels cannot run here; empty if they can."""
    if choice == "eager":
        return ""
    if choice == "compiled":
        return compiled.reason_against(device, compute, activation)
    return no_triton() or _triton().reason_against(device, compute, activation)


def resolve_gates(choice: str, device: torch.device, compute: torch.dtype, activation: str = "lstm") -> str:
    """The gate kernels that `choice` stands for: `auto` becomes the fastest that can run here.

    Raises:
        ValueError: a choice that cannot run here.
    """
    auto = choice == "auto"
    choice = fastest_gates(device) if auto else choice
    if reason := reason_against(choice, device, compute, activation):
        if auto:
            return "eager"
        raise ValueError(f"gates: {choice} cannot run, {reason}; expected auto or eager")
    return choice


def gates_of(choice: str, device: torch.device, compute: torch.dtype, activation: str) -> ModuleType:
    """The module whose `forward` and `backward` compute the gates; arguments and errors as in :func:`resolve_gates`."""
    choice = resolve_gates(choice, device, compute, activation)
    return {"eager": eager, "compiled": compiled}.get(choice) or _triton()


class _Setting(NamedTuple):
    plan: Plan
    spec: TrellisSpec
    compute: torch.dtype  # of the products and of the gates that are kept
    product: products.Product
    gates: ModuleType
    aux_layers: frozenset[int]  # counted from 1
    inject_dilations: tuple[int, ...]  # of the x̃ that follow
    keep: bool  # what a backward pass needs
    segments: tuple[tuple[int, int], ...]  # first and last layer of each; all but the last segment are computed again


class _Geometry:
    """What every step of the operation needs of shapes and types."""

    def __init__(self, setting: _Setting, weight: Tensor, batch: int):
        self.N = batch
        self.GH = weight.size(0)
        self.H = self.GH // setting.spec.activation.gates
        self.k = setting.spec.kernel_size
        self.compute = setting.compute
        self.sum = torch.float64 if setting.compute == torch.float64 else torch.float32
        self.device = weight.device

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return empty(shape, dtype=dtype or self.sum, device=self.device)

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.sum, device=self.device)

    def rows(self, positions: int) -> int:
        """Rows of a product over so many positions, rounded up."""
        return -(-positions * self.N // BUCKET) * BUCKET if self.device.type == "cpu" else positions * self.N


class _Rows:
    """Rows for products, of one width, whose memory is used again and again."""

    def __init__(self, geometry: _Geometry, width: int, rows: int):
        self.geometry = geometry
        self.memory = geometry.empty(rows, width, dtype=geometry.compute)

    def take(self, positions: int, after: int = 0) -> Tensor:
        """Rows for so many positions behind the first `after`; those that fill up the bucket are zero."""
        rows = self.memory[after : after + self.geometry.rows(positions)]
        rows[positions * self.geometry.N :].zero_()
        return rows


def _positions(rows: Tensor, positions: int, *shape: int) -> Tensor:
    """Rows of a product as (positions, N, …), without those that fill up the bucket."""
    return rows[: positions * shape[0]].view(positions, *shape)


def _layers_at_once(geometry: _Geometry, rows: Sequence[int]) -> int:
    """How many layers' rows are collected. It must not depend on how much memory is free: sums would differ."""
    if geometry.device.type != "cuda":
        return LAYERS_AT_ONCE
    width = (geometry.GH + geometry.k * geometry.H) * geometry.compute.itemsize
    if sum(rows) * width <= ARENA:
        return len(rows)
    return max(LAYERS_AT_ONCE, ARENA // (max(rows) * width) - 1)


class _KernelGradient:
    """Σ over layers of tapsᵀ · dz, (k·H, GH). The rows of some layers are collected, then multiplied at once.

    (oneDNN is some percent faster with this than with the transpose of it.)

    Args:
        sizes: positions of the layers, from below; they come from above.
        sparing: two layers are all that there is room for.
    """

    def __init__(self, geometry: _Geometry, sizes: list[int], product: products.Product, sparing: bool):
        self.geometry, self.product = geometry, product
        self.ahead = [geometry.rows(size) for size in sizes if size]  # of layers that are to come
        at_once = 1 if sparing else _layers_at_once(geometry, self.ahead)
        capacity = min(sum(self.ahead), (at_once + 1) * max(self.ahead, default=0))
        self.dz = _Rows(geometry, geometry.GH, capacity)
        self.taps = _Rows(geometry, geometry.k * geometry.H, capacity)
        self.capacity, self.complete, self.last = capacity, 0, 0  # rows of which taps are there too; positions
        self.sum: Tensor | None = None

    def dz_of(self, positions: int) -> Tensor:
        """Rows for dz of the next layer down, to be filled while the taps of the layer before are."""
        after = self.complete + self.geometry.rows(self.last)
        return self.dz.take(positions, after)

    def taps_of_last(self) -> Tensor:
        """Rows for the taps that go with the last dz."""
        return self.taps.take(self.last, self.complete)

    def advance(self, positions: int) -> Tensor:
        """To be called when dz of so many positions and the taps of the layer before are there: where dz is now."""
        self.complete += self.geometry.rows(self.last)
        self.last = positions
        rows = self.ahead.pop()
        dz = self.dz.memory[self.complete : self.complete + rows]
        if self.complete + rows + (self.ahead[-1] if self.ahead else 0) <= self.capacity:
            return dz
        self._multiply()
        self.complete = 0
        self.dz.memory[:rows] = dz.clone()  # the two may overlap
        return self.dz.memory[:rows]

    def finish(self) -> Tensor:
        """To be called when the last taps are there: the gradient."""
        self.complete += self.geometry.rows(self.last)
        self._multiply()
        if self.sum is None:
            return self.geometry.zeros(self.geometry.k * self.geometry.H, self.geometry.GH)
        return self.sum

    def _multiply(self) -> None:
        if self.complete:
            dz, taps = (rows.memory[: self.complete] for rows in (self.dz, self.taps))
            if self.sum is None:
                self.sum = products.product_in(self.geometry.sum, taps.t(), dz.t(), self.product)
            else:
                products.add_product(self.sum, taps.t(), dz.t(), self.product)


class _Layers:
    """The layers of one call, computed one by one from below."""

    def __init__(self, setting: _Setting, weight, bias, h0, c0, scale, batch: int, x_tilde: Sequence[Tensor]):
        self.setting, self.layers = setting, setting.plan.layers
        self.geometry = geometry = _Geometry(setting, weight, batch)
        # Positions of every layer for which there is something to multiply.
        self.edges = [layer.edge if i or h0 is not None else 0 for i, layer in enumerate(self.layers)]
        self.x = dict(zip(setting.inject_dilations, x_tilde, strict=True))
        self.most = max(map(geometry.rows, self.edges))  # rows of a product
        self.w = products.pack(weight.to(setting.compute), self.most, setting.product)
        self.bias = bias.to(setting.compute)
        # Whole rows, as the kernels read them.
        given = (None if s is None else s.to(geometry.sum).contiguous() for s in (h0, c0, scale))
        h_left, self.c_left, self.scale = given
        self.h_left = h_left if self.scale is None or h_left is None else h_left * self.scale
        # The taps of a layer are written when those of the layer below have been read: one memory for all.
        self.memory = _Rows(geometry, geometry.k * geometry.H, self.most)

    def fill(self, rows: Tensor, number: int) -> Tensor:
        """Write what lies before the first step into the taps of a layer: (S, N, k, H), as a view of `rows`."""
        geometry, layer, edge = self.geometry, self.layers[number - 1], self.edges[number - 1]
        taps = _positions(rows, edge, geometry.N, geometry.k, geometry.H)
        for j, read in enumerate(layer.taps):
            left = min(read.left, edge)
            taps[:left, :, j] = 0 if self.h_left is None else self.h_left
            if number == 1:  # the layer below is zero
                taps[left:, :, j] = 0
        return taps

    def first_taps(self) -> Tensor:
        rows = self.memory.take(self.edges[0])
        self.fill(rows, 1)
        return rows

    def compute(
        self, number: int, taps: Tensor, c_below: Tensor | None, out: Tensor | None, with_taps: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Gates, cell, and the taps of the layer above, of the layer `number`; `out` as in :class:`Step`."""
        setting, geometry = self.setting, self.geometry
        layer, edge = self.layers[number - 1], self.edges[number - 1]
        z = _positions(setting.product(taps, self.w), edge, geometry.N, geometry.GH) if edge else None
        if edge == layer.size:
            gates = z  # they stay where the product has left them, if it has made them all
        else:
            gates = geometry.empty(layer.size, geometry.N, geometry.GH, dtype=setting.compute)
            if edge:
                gates[:edge] = z
        above = rows = above_taps = None
        if with_taps:
            above = self.layers[number]
            rows = self.memory.take(above.size)
            above_taps = self.fill(rows, number + 1)
        activation = setting.spec.activation
        c = geometry.empty(layer.size, geometry.N, geometry.H) if activation.has_cell else None
        x = self.bias if layer.x is None else self.x[layer.dilation]
        common = {"c_below": c_below, "c0": self.c_left, "scale": self.scale, "out": out}
        setting.gates.forward(Step(activation, layer, above, edge, gates, x, c, taps=above_taps, **common))
        return gates, c, rows


def _at(last: Tensor | None, N: int) -> Any:
    """Index of every row's last position in (S, N, …); if all are the same a number, which takes no kernels."""
    return -1 if last is None else (last, torch.arange(N, device=last.device))


class _Trellis(torch.autograd.Function):
    """(setting, weight, bias, h0, c0, scale, last, N, weight_x, *rows, *x̃) → layer-steps computed, h, c, and the
    auxiliary outputs.

    weight (GH, k·H), bias (GH,), h0 and c0 (N, H) or None for zeros, scale (N, H) or None, every x̃ (P, N, GH) with its
    bias in it. h (S, N, H), unmasked, is that of the last layer, c (N, H) its cell at the positions `last` (N,), or
    at the end of all for None; auxiliary outputs (S, N, output_size).

    x̃ = rows · weight_xᵀ + bias, rows (P, N, k·C), is not kept: where the backward pass is differentiated, it is made
    again of its factors, which the product that made it keeps anyway. They have no gradient of their own here.
    """

    @staticmethod
    def forward(ctx: Any, setting: _Setting, weight, bias, h0, c0, scale, last, batch, weight_x, *rows_and_x_tilde):
        dilations = len(setting.inject_dilations)
        rows, x_tilde = rows_and_x_tilde[:dilations], rows_and_x_tilde[dilations:]
        run = _Layers(setting, weight, bias, h0, c0, scale, batch, x_tilde)
        geometry, layers = run.geometry, setting.plan.layers
        N, H, wanted = geometry.N, geometry.H, layers[-1].size
        kept, checkpoints, aux, layer_steps = [], [], [], 0
        taps, h, c = run.first_taps(), geometry.empty(wanted, N, H), None
        for first, end in setting.segments:
            if setting.keep and end < len(layers):
                checkpoints += [taps.clone(), c]
            for number in range(first, end + 1):
                out = h if number == len(layers) else None
                if out is None and number in setting.aux_layers:
                    out = geometry.empty(wanted, N, setting.spec.output_size)
                if number == first and end == len(layers):
                    kept.append(c)  # below the first layer that is kept
                gates, c, taps = run.compute(number, taps, c, out, with_taps=number < len(layers))
                layer_steps += layers[number - 1].size
                if setting.keep and end == len(layers):
                    kept += [gates, c]
                if number in setting.aux_layers:
                    aux.append(out[..., H - setting.spec.output_size :].clone() if out is h else out)
        ctx.setting, ctx.batch = setting, batch
        ctx.shapes, ctx.dtypes = [tuple(x.shape) for x in x_tilde], [x.dtype for x in x_tilde]
        if setting.keep:
            again = x_tilde if checkpoints else [None] * len(x_tilde)
            ctx.save_for_backward(weight, bias, h0, c0, scale, last, weight_x, *rows, *again, *checkpoints, *kept)
        return layer_steps, h, (h if c is None else c)[_at(last, N)].clone(), *aux

    @staticmethod
    def backward(ctx: Any, _, *grads):
        if higher_order.needed(grads):
            return _Trellis._differentiable(ctx, grads)
        with torch.autocast(grads[0].device.type, enabled=False):
            return _Trellis._backward(ctx, *grads)

    @staticmethod
    def jvp(ctx: Any, *tangents):
        raise NotImplementedError('fused has no forward-mode derivatives; take backend="reference"')

    @staticmethod
    def _differentiable(ctx: Any, grads: Sequence[Tensor]):
        setting: _Setting = ctx.setting
        spec = setting.spec
        weight, bias, h0, c0, scale, last, weight_x, *saved = ctx.saved_tensors
        dilations = setting.inject_dilations
        rows, needs = saved[: len(dilations)], ctx.needs_input_grad
        work = torch.float64 if setting.compute == torch.float64 else torch.float32

        def wide(tensor):
            return None if tensor is None else tensor.to(work)

        def outputs(*inputs):
            weight, bias, h0, c0, *x_tilde = map(wide, inputs)
            zero = bias.new_zeros(ctx.batch, bias.numel() // spec.activation.gates)
            state, aux = (zero if h0 is None else h0, zero if c0 is None else c0), []
            x_tilde = dict(zip(dilations, (x.transpose(0, 1) for x in x_tilde), strict=True))
            arguments = setting.plan, x_tilde, weight.t(), bias, state, wide(scale), spec.activation
            for number, (h, c) in enumerate(last_step.layers(*arguments), start=1):  # noqa: B007
                if number in setting.aux_layers:
                    wanted = pruning.rows(h, setting.plan.layers[number - 1].wanted, dim=1)
                    aux.append(wanted[..., wanted.size(2) - spec.output_size :].transpose(0, 1))
            return h.transpose(0, 1), c.transpose(0, 1)[_at(last, ctx.batch)], *aux

        with torch.autocast(grads[0].device.type, enabled=False):
            x_tilde = [torch.nn.functional.linear(wide(r), wide(weight_x), wide(bias)) for r in rows]
        wanted = [*needs[1:5], *needs[-len(dilations) :]]
        found = higher_order.gradients(outputs, (weight, bias, h0, c0, *x_tilde), wanted, grads)
        dx = [None if g is None else g.to(dtype) for g, dtype in zip(found[4:], ctx.dtypes, strict=True)]
        return None, *found[:4], *[None] * (4 + len(dilations)), *dx

    @staticmethod
    def _backward(ctx: Any, dh, dc_last, *daux):
        setting: _Setting = ctx.setting
        layers, activation = setting.plan.layers, setting.spec.activation
        weight, bias, h0, c0, scale, last, _, *saved = ctx.saved_tensors
        dilations = len(ctx.shapes)
        x_tilde, saved = saved[dilations : 2 * dilations], saved[2 * dilations :]
        run = _Layers(setting, weight, bias, h0, c0, scale, ctx.batch, x_tilde)
        geometry = run.geometry
        N, H, GH, k = geometry.N, geometry.H, geometry.GH, geometry.k
        w_t = products.pack(weight.to(setting.compute).t().contiguous(), run.most, setting.product)  # (k·H, GH)
        kernel = _KernelGradient(geometry, run.edges, setting.product, sparing=len(setting.segments) > 1)
        dbias, dh_left, dc_left = geometry.zeros(GH), geometry.zeros(N, H), geometry.zeros(N, H)
        dx: dict[int, Tensor] = {}
        shapes = dict(zip(setting.inject_dilations, ctx.shapes, strict=True))
        daux = {i: grad.contiguous() for i, grad in zip(sorted(setting.aux_layers), daux, strict=True)}

        dc = geometry.zeros(layers[-1].size, N, H)
        dc[_at(last, N)] = dc_last.to(dc.dtype)
        daux[len(layers)], dc = _last_gradient(setting, dh.to(geometry.sum), dc, daux.get(len(layers)))
        above = taps = dtaps = None
        for segment in reversed(range(len(setting.segments))):
            first, end = setting.segments[segment]
            if end == len(layers):
                cells, gates = saved[2 * segment :: 2], saved[2 * segment + 1 :: 2]
            else:
                cells, gates = _again(run, first, end, *saved[2 * segment : 2 * segment + 2])
            for number in range(end, first - 1, -1):
                layer, edge = layers[number - 1], run.edges[number - 1]
                if above:
                    taps = run.fill(kernel.taps_of_last(), number + 1)
                dz = kernel.dz_of(edge)
                read_below = activation.has_cell and (number > 1 or c0 is not None)
                dc_below = geometry.empty(layer.size, N, H) if read_below else None
                # The layer that has all rows of x̃ of its dilation writes them, if it is the first to come.
                add = layer.x is not None and (layer.dilation in dx or len(layer.x) < shapes[layer.dilation][0])
                if layer.x is None:
                    dx_layer = geometry.empty(layer.size, N, GH)
                elif layer.dilation in dx:
                    dx_layer = dx[layer.dilation]
                else:
                    make = geometry.zeros if add else geometry.empty
                    dx_layer = dx[layer.dilation] = make(*shapes[layer.dilation])
                place = number - first
                before = {"c_below": cells[place], "c0": run.c_left, "scale": run.scale}
                passed = {"taps": taps, "out": daux.get(number), "dtaps": dtaps, "dc_above": dc}
                result = {"dz": _positions(dz, edge, N, GH), "dc": dc_below, "dx": dx_layer, "add": add}
                now = activation, layer, above, edge, gates[place], None, cells[place + 1]
                setting.gates.backward(Step(*now, **before, **passed, **result))
                if layer.x is None:
                    dbias += dx_layer.sum((0, 1))
                if dc_below is not None and c0 is not None:
                    dc_left += dc_below[: layer.cell.left].sum(0)
                if edge:
                    dz = kernel.advance(edge)
                    dtaps = _positions(setting.product(dz, w_t), edge, N, k, H)
                    for j, read in enumerate(layer.taps if h0 is not None else ()):
                        dh_left += dtaps[: read.left, :, j].sum(0, dtype=geometry.sum)
                dc, above = dc_below, layer
            del cells, gates
        if run.edges[0]:
            run.fill(kernel.taps_of_last(), 1)
        dw = kernel.finish().t()
        if scale is not None:
            dh_left *= run.scale
        grads = [dx[d].to(dtype) for d, dtype in zip(setting.inject_dilations, ctx.dtypes, strict=True)]
        state = [None if s is None else g.to(s.dtype) for g, s in ((dh_left, h0), (dc_left, c0))]
        return None, dw.to(weight.dtype), dbias, *state, *[None] * (4 + dilations), *grads


def _again(run: _Layers, first: int, end: int, taps: Tensor, c: Tensor | None) -> tuple[list, list]:
    """Cells, that below the first layer among them, and gates of a segment, from what was kept of its beginning."""
    cells, gates = [c], []
    for number in range(first, end + 1):
        gate, c, taps = run.compute(number, taps, c, None, with_taps=number < end)
        cells.append(c)
        gates.append(gate)
    return cells, gates


def _last_gradient(setting: _Setting, dh: Tensor, dc: Tensor, daux: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Gradients of h of the last layer, its auxiliary output among them, and of its cell (S, N, H) each."""
    if not setting.spec.activation.has_cell:  # h is the cell
        dh, dc = dh + dc, None
    if daux is not None:
        dh = dh.clone()
        dh[..., dh.size(2) - setting.spec.output_size :] += daux
    return dh.contiguous(), dc


def trellis(
    x: Tensor,
    weights: Weights,
    state: tuple[Tensor, Tensor] | None,
    spec: TrellisSpec,
    *,
    start: int = 0,
    aux_every: int | None = None,
    hidden_scale: Tensor | None = None,
    lengths: Tensor | None = None,
    execution: Execution,
) -> tuple[Tensor, tuple[Tensor, Tensor], list[Tensor], int]:
    """The outputs of the last layer from `start` on, the state, the auxiliary outputs, and the layer-steps computed.

    Arguments and shapes as in :func:`trellisnet.ops.trellis`. Differentiable in x, the kernels, the bias and the state,
    but not in `hidden_scale`. Within `torch.autocast` the products are in its type.
    """
    N, L, C = x.shape
    weight_x, weight_h, bias = weights
    num_layers, device = spec.num_layers, x.device.type
    compute = weight_h.dtype
    if torch.is_autocast_enabled(device) and compute != torch.float64:
        compute = torch.get_autocast_dtype(device)
    plan = pruning.plan(L, spec, start, x.device)
    product = products.resolve(execution.gemm if N else "mm", x.device, compute)  # oneDNN has no products of nothing
    weight_x, weight_h = (w.transpose(1, 2).flatten(1) for w in (weight_x, weight_h))  # (GH, k·C), (GH, k·H)
    x = x.transpose(0, 1)  # (L, N, C)
    nothing = x.new_zeros(1, N, C)
    rows = [torch.cat([pruning.take(x, read, nothing) for read in reads], dim=2) for reads in plan.x.values()]
    if compute != weight_h.dtype:  # as autocast would, so that what the products keep can be kept for this operator
        weight_x, rows = weight_x.to(compute), [r.to(compute) for r in rows]
    x_tilde = [torch.nn.functional.linear(r, weight_x, bias) for r in rows]
    aux_layers = frozenset(range(aux_every, num_layers + 1, aux_every)) if aux_every else frozenset()
    # What was made in inference mode cannot be kept for a backward pass.
    h0, c0 = (s.clone() if s.is_inference() else s for s in state) if state else (None, None)
    keep = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (weight_h, bias, h0, c0, *x_tilde)
    )
    choice = "triton" if execution.backend == "triton" else execution.gates
    gates = gates_of(choice, x.device, compute, spec.activation.name)
    every = execution.segment(num_layers) if keep else num_layers
    segments = tuple((first, min(first + every - 1, num_layers)) for first in range(1, num_layers + 1, every))
    setting = _Setting(plan, spec, compute, product, gates, aux_layers, tuple(plan.x), keep, segments)
    scale = None if hidden_scale is None else hidden_scale.squeeze(2)
    last = None if lengths is None else lengths - start - 1
    with torch.autocast(device, enabled=False):
        layer_steps, *parts = _Trellis.apply(setting, weight_h, bias, h0, c0, scale, last, N, weight_x, *rows, *x_tilde)
    h, c, *aux = (part.to(weight_h.dtype) for part in parts)
    outputs = [part.transpose(0, 1) for part in (h[..., h.size(2) - spec.output_size :], *aux)]
    return outputs[0], (h[_at(last, N)], c), outputs[1:], layer_steps
