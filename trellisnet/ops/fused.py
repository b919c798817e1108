r"""The whole trellis as one differentiable operation: fast and lean, for LSTM gates or tanh and a dense kernel.

It computes the equation of :mod:`trellisnet.ops.reference`, with these differences:

- **Time comes first**, (S, N, H), so that a tap reads a slice of rows (or, from a strided set, a selection).
- **Only the positions of** :mod:`trellisnet.ops.pruning` are computed, those that the requested outputs depend on.
- **One product per layer**: the rows of all taps side by side, (S·N, k·H), times the kernel.
- **Gates in one pass** (:mod:`trellisnet.ops.gates` or :mod:`trellisnet.ops.compiled`), in the memory of the product.
  They write h straight into the taps of the layer above.
- **Stored for the backward pass** are the gates (in the dtype of the products) and the cell, (S, N, 5H) per layer;
  hidden states are recomputed from them. With `recompute` only the input of every K-th layer is stored, and the
  backward pass recomputes K layers at a time.
- **The gradient of the kernel** is summed in single precision in one buffer, from products over several layers at once:
  on a GPU over all of them, if their operands take no more than `ARENA`.

Products may be in bfloat16; cells, gate arithmetic and sums over layers are then in float32.

If its backward pass is itself differentiated, the layers are recomputed in differentiable operations
(:func:`trellisnet.ops.last_step.layers`), which gives derivatives of any order in the memory and time of the reference.
There are no forward-mode derivatives and no support for `torch.func`; the reference has both.

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

empty = torch.empty  # a name in this module, so that tests can fill uninitialised memory with NaN
BUCKET = 128  # round the rows of a CPU product up to a multiple: oneDNN caches something for every distinct number
LAYERS_AT_ONCE = 4  # layers per product into the gradient of the kernel, on a CPU
ARENA = 2 << 30  # bytes of rows that are collected for that product on a GPU


def _triton() -> ModuleType:
    return importlib.import_module("trellisnet.ops.triton_gates")  # not at the top: triton is an extra


def no_triton() -> str:
    """Say why Triton is unavailable; empty if it is available."""
    if not importlib.util.find_spec("triton"):
        return "the package triton is not installed"
    try:
        _triton()
    except Exception as e:  # a missing library, an incompatible torch, …
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0][:80]
        return f"the package triton cannot be imported ({reason})"
    return ""


def fastest_gates(device: torch.device) -> str:
    """Return the gate kernels that `auto` tries first on this device."""
    return "triton" if device.type == "cuda" else "compiled"


def reason_against(choice: str, device: torch.device, compute: torch.dtype, activation: str) -> str:
    """Say why these gate kernels cannot run here; empty if they can."""
    if choice == "eager":
        return ""
    if choice == "compiled":
        return compiled.reason_against(device, compute, activation)
    return no_triton() or _triton().reason_against(device, compute, activation)


def resolve_gates(choice: str, device: torch.device, compute: torch.dtype, activation: str = "lstm") -> str:
    """Return the gate kernels to use: for `auto` the fastest that can run here.

    Raises:
        ValueError: the chosen kernels cannot run here.
    """
    auto = choice == "auto"
    choice = fastest_gates(device) if auto else choice
    if reason := reason_against(choice, device, compute, activation):
        if auto:
            return "eager"
        raise ValueError(f"gates: {choice} cannot run, {reason}; expected auto or eager")
    return choice


def gates_of(choice: str, device: torch.device, compute: torch.dtype, activation: str) -> ModuleType:
    """Return the module whose `forward` and `backward` compute the gates; see :func:`resolve_gates`."""
    choice = resolve_gates(choice, device, compute, activation)
    return {"eager": eager, "compiled": compiled}.get(choice) or _triton()


class _Setting(NamedTuple):
    plan: Plan
    spec: TrellisSpec
    compute: torch.dtype  # of the products and of the stored gates
    product: products.Product
    gates: ModuleType
    aux_layers: frozenset[int]  # counted from 1
    inject_dilations: tuple[int, ...]  # dilations of the x̃ arguments, in their order
    needs_grad: bool  # store what a backward pass reads
    segments: tuple[tuple[int, int], ...]  # first and last layer of each; all but the last segment are recomputed


class _Geometry:
    """Shapes and dtypes of one call."""

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
        """Return the number of rows of a product over these positions, rounded up to whole buckets on a CPU."""
        return -(-positions * self.N // BUCKET) * BUCKET if self.device.type == "cpu" else positions * self.N


class _Rows:
    """Memory for the rows of products, all of one width, that is reused from layer to layer."""

    def __init__(self, geometry: _Geometry, width: int, rows: int):
        self.geometry = geometry
        self.memory = geometry.empty(rows, width, dtype=geometry.compute)

    def take(self, positions: int, after: int = 0) -> Tensor:
        """Return the rows for these positions, `after` rows into the memory; those that fill up the bucket are zero."""
        rows = self.memory[after : after + self.geometry.rows(positions)]
        rows[positions * self.geometry.N :].zero_()
        return rows


def _positions(rows: Tensor, positions: int, *shape: int) -> Tensor:
    """View rows of a product as (positions, N, …), without those that fill up the bucket."""
    return rows[: positions * shape[0]].view(positions, *shape)


def _layers_at_once(geometry: _Geometry, rows: Sequence[int]) -> int:
    """Return the number of layers per product into the kernel's gradient."""
    # Not a function of free memory: the order of summation, and so the rounding, has to be reproducible.
    if geometry.device.type != "cuda":
        return LAYERS_AT_ONCE
    width = (geometry.GH + geometry.k * geometry.H) * geometry.compute.itemsize
    if sum(rows) * width <= ARENA:
        return len(rows)
    return max(LAYERS_AT_ONCE, ARENA // (max(rows) * width) - 1)


class _KernelGradient:
    """Gradient of the kernel, Σ over layers of tapsᵀ · dz, (k·H, GH), one product for several layers.

    (k·H, GH) and not its transpose, because oneDNN is a few percent faster that way. The layers arrive from the top
    down, and the taps of each arrive one layer after its dz: they are the h of the layer below.

    Args:
        sizes: positions of the layers, from the lowest up.
        low_memory: hold two layers at most.
    """

    def __init__(self, geometry: _Geometry, sizes: list[int], product: products.Product, low_memory: bool):
        self.geometry, self.product = geometry, product
        self.rows_ahead = [geometry.rows(size) for size in sizes if size]  # of the layers still to come
        at_once = 1 if low_memory else _layers_at_once(geometry, self.rows_ahead)
        self.capacity = min(sum(self.rows_ahead), (at_once + 1) * max(self.rows_ahead, default=0))
        self.dz = _Rows(geometry, geometry.GH, self.capacity)
        self.taps = _Rows(geometry, geometry.k * geometry.H, self.capacity)
        self.complete = 0  # rows with both dz and taps
        self.last = 0  # positions of the layer with dz but no taps yet
        self.sum: Tensor | None = None

    def next_dz(self, positions: int) -> Tensor:
        """Return the rows for dz of the next layer down, to be filled together with :meth:`last_taps`."""
        return self.dz.take(positions, self.complete + self.geometry.rows(self.last))

    def last_taps(self) -> Tensor:
        """Return the rows for the taps that belong to the last dz."""
        return self.taps.take(self.last, self.complete)

    def advance(self, positions: int) -> Tensor:
        """Take over the filled rows, multiply if the next layer would not fit, and return where dz lies now."""
        self.complete += self.geometry.rows(self.last)
        self.last = positions
        rows = self.rows_ahead.pop()
        dz = self.dz.memory[self.complete : self.complete + rows]
        if self.complete + rows + (self.rows_ahead[-1] if self.rows_ahead else 0) <= self.capacity:
            return dz
        self._multiply()
        self.complete = 0
        self.dz.memory[:rows] = dz.clone()  # source and target may overlap
        return self.dz.memory[:rows]

    def finish(self) -> Tensor:
        """Return the gradient, once the taps of the lowest layer are filled."""
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
    """The layers of one call, computed one by one from the lowest up."""

    def __init__(self, setting: _Setting, weight, bias, h0, c0, scale, batch: int, x_tilde: Sequence[Tensor]):
        self.setting, self.layers = setting, setting.plan.layers
        self.geometry = geometry = _Geometry(setting, weight, batch)
        # Positions of every layer whose product can differ from zero.
        self.edges = [layer.edge if i or h0 is not None else 0 for i, layer in enumerate(self.layers)]
        self.x = dict(zip(setting.inject_dilations, x_tilde, strict=True))
        self.max_rows = max(map(geometry.rows, self.edges))  # of a product
        self.w = products.pack(weight.to(setting.compute), self.max_rows, setting.product)
        self.bias = bias.to(setting.compute)
        # Contiguous, because the gate kernels read whole rows.
        h_left, self.c_left, self.scale = (
            None if s is None else s.to(geometry.sum).contiguous() for s in (h0, c0, scale)
        )
        self.h_left = h_left if self.scale is None or h_left is None else h_left * self.scale
        # One memory for all layers: the taps of a layer are written after those of the layer below have been read.
        self.memory = _Rows(geometry, geometry.k * geometry.H, self.max_rows)

    def fill(self, rows: Tensor, number: int) -> Tensor:
        """Write the carried h into the taps that reach before the first step: (S, N, k, H), a view of `rows`."""
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
        """Compute layer `number`: its gates, its cell, and the taps of the layer above; `out` as in :class:`Step`."""
        setting, geometry = self.setting, self.geometry
        layer, edge = self.layers[number - 1], self.edges[number - 1]
        z = _positions(setting.product(taps, self.w), edge, geometry.N, geometry.GH) if edge else None
        if edge == layer.size:
            gates = z  # in place: the product covers every position
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
    """Index of the last position of every row in (S, N, …); -1, which needs no kernel launch, if all rows are full."""
    return -1 if last is None else (last, torch.arange(N, device=last.device))


class _Trellis(torch.autograd.Function):
    """(setting, weight, bias, h0, c0, scale, last, N, weight_x, *rows, *x̃) → (layer-steps, h, c, *aux).

    Arguments: weight (GH, k·H), bias (GH,), h0 and c0 (N, H) or None for zeros, scale (N, H) or None, last (N,) or None
    for the end of every row, rows (P, N, k·C), x̃ (P, N, GH) including the bias. Results: h (S, N, H) of the last
    layer, unmasked, its cell c (N, H) at the positions `last`, and the auxiliary outputs (S, N, output_size).

    x̃ = rows · weight_xᵀ + bias is not stored. If the backward pass is differentiated, it is recomputed from rows and
    weight_x, which the product that made it stores anyway; they have no gradient of their own here.
    """

    @staticmethod
    def forward(ctx: Any, setting: _Setting, weight, bias, h0, c0, scale, last, batch, weight_x, *rows_and_x_tilde):
        dilations = len(setting.inject_dilations)
        rows, x_tilde = rows_and_x_tilde[:dilations], rows_and_x_tilde[dilations:]
        run = _Layers(setting, weight, bias, h0, c0, scale, batch, x_tilde)
        geometry, layers = run.geometry, setting.plan.layers
        N, H, wanted = geometry.N, geometry.H, layers[-1].size
        stored, checkpoints, aux, layer_steps = [], [], [], 0
        taps, h, c = run.first_taps(), geometry.empty(wanted, N, H), None
        for first, end in setting.segments:
            if setting.needs_grad and end < len(layers):
                checkpoints += [taps.clone(), c]
            for number in range(first, end + 1):
                out = h if number == len(layers) else None
                if out is None and number in setting.aux_layers:
                    out = geometry.empty(wanted, N, setting.spec.output_size)
                if number == first and end == len(layers):
                    stored.append(c)  # cell of the layer below the first stored one
                gates, c, taps = run.compute(number, taps, c, out, with_taps=number < len(layers))
                layer_steps += layers[number - 1].size
                if setting.needs_grad and end == len(layers):
                    stored += [gates, c]
                if number in setting.aux_layers:
                    aux.append(out[..., H - setting.spec.output_size :].clone() if out is h else out)
        ctx.setting, ctx.batch = setting, batch
        ctx.shapes, ctx.dtypes = [tuple(x.shape) for x in x_tilde], [x.dtype for x in x_tilde]
        if setting.needs_grad:
            reread = x_tilde if checkpoints else [None] * len(x_tilde)
            ctx.save_for_backward(weight, bias, h0, c0, scale, last, weight_x, *rows, *reread, *checkpoints, *stored)
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
        grads = higher_order.gradients(outputs, (weight, bias, h0, c0, *x_tilde), wanted, grads)
        dx = [None if g is None else g.to(dtype) for g, dtype in zip(grads[4:], ctx.dtypes, strict=True)]
        return None, *grads[:4], *[None] * (4 + len(dilations)), *dx

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
        w_t = products.pack(weight.to(setting.compute).t().contiguous(), run.max_rows, setting.product)  # (k·H, GH)
        kernel = _KernelGradient(geometry, run.edges, setting.product, low_memory=len(setting.segments) > 1)
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
                cells, gates = _recompute(run, first, end, *saved[2 * segment : 2 * segment + 2])
            for number in range(end, first - 1, -1):
                layer, edge = layers[number - 1], run.edges[number - 1]
                if above:
                    taps = run.fill(kernel.last_taps(), number + 1)
                dz = kernel.next_dz(edge)
                reads_cell = activation.has_cell and (number > 1 or c0 is not None)
                dc_below = geometry.empty(layer.size, N, H) if reads_cell else None
                # The first layer of a dilation writes the gradient of x̃ if it covers all rows, else it adds to zeros.
                add = layer.x is not None and (layer.dilation in dx or len(layer.x) < shapes[layer.dilation][0])
                if layer.x is None:
                    dx_layer = geometry.empty(layer.size, N, GH)
                elif layer.dilation in dx:
                    dx_layer = dx[layer.dilation]
                else:
                    make = geometry.zeros if add else geometry.empty
                    dx_layer = dx[layer.dilation] = make(*shapes[layer.dilation])
                i = number - first
                step = Step(
                    activation, layer, above, edge, gates[i], x=None, c=cells[i + 1], c_below=cells[i], c0=run.c_left,
                    scale=run.scale, taps=taps, out=daux.get(number), dtaps=dtaps, dc_above=dc,
                    dz=_positions(dz, edge, N, GH), dc=dc_below, dx=dx_layer, add=add,
                )  # fmt: skip
                setting.gates.backward(step)
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
            run.fill(kernel.last_taps(), 1)
        dw = kernel.finish().t()
        if scale is not None:
            dh_left *= run.scale
        grads = [dx[d].to(dtype) for d, dtype in zip(setting.inject_dilations, ctx.dtypes, strict=True)]
        state = [None if s is None else g.to(s.dtype) for g, s in ((dh_left, h0), (dc_left, c0))]
        return None, dw.to(weight.dtype), dbias, *state, *[None] * (4 + dilations), *grads


def _recompute(run: _Layers, first: int, end: int, taps: Tensor, c: Tensor | None) -> tuple[list, list]:
    """Recompute a segment from its checkpoint: its cells, after that of the layer below it, and its gates."""
    cells, gates = [c], []
    for number in range(first, end + 1):
        gate, c, taps = run.compute(number, taps, c, None, with_taps=number < end)
        cells.append(c)
        gates.append(gate)
    return cells, gates


def _last_gradient(setting: _Setting, dh: Tensor, dc: Tensor, daux: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of h (including that of its auxiliary output) and c of the last layer, (S, N, H) each."""
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
    """Run all layers; arguments, results and shapes as in :func:`trellisnet.ops.trellis`.

    Differentiable in x, the kernels, the bias and the state, but not in `hidden_scale`. Within `torch.autocast` the
    products are in its dtype.
    """
    N, L, C = x.shape
    weight_x, weight_h, bias = weights
    num_layers, device = spec.num_layers, x.device.type
    compute = weight_h.dtype
    if torch.is_autocast_enabled(device) and compute != torch.float64:
        compute = torch.get_autocast_dtype(device)
    plan = pruning.plan(L, spec, start, x.device)
    product = products.resolve(execution.gemm if N else "mm", x.device, compute)  # oneDNN refuses empty matrices
    weight_x, weight_h = (w.transpose(1, 2).flatten(1) for w in (weight_x, weight_h))  # (GH, k·C), (GH, k·H)
    x = x.transpose(0, 1)  # (L, N, C)
    zero = x.new_zeros(1, N, C)
    rows = [torch.cat([pruning.take(x, read, zero) for read in reads], dim=2) for reads in plan.x.values()]
    if compute != weight_h.dtype:  # before autocast does, so that F.linear and this operator store the same tensors
        weight_x, rows = weight_x.to(compute), [r.to(compute) for r in rows]
    x_tilde = [torch.nn.functional.linear(r, weight_x, bias) for r in rows]
    aux_layers = frozenset(range(aux_every, num_layers + 1, aux_every)) if aux_every else frozenset()
    # Autograd cannot save inference tensors for a backward pass.
    h0, c0 = (s.clone() if s.is_inference() else s for s in state) if state else (None, None)
    needs_grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (weight_h, bias, h0, c0, *x_tilde)
    )
    choice = "triton" if execution.backend == "triton" else execution.gates
    gates = gates_of(choice, x.device, compute, spec.activation.name)
    every = execution.segment(num_layers) if needs_grad else num_layers
    segments = tuple((first, min(first + every - 1, num_layers)) for first in range(1, num_layers + 1, every))
    setting = _Setting(plan, spec, compute, product, gates, aux_layers, tuple(plan.x), needs_grad, segments)
    scale = None if hidden_scale is None else hidden_scale.squeeze(2)
    last = None if lengths is None else lengths - start - 1
    with torch.autocast(device, enabled=False):
        layer_steps, *parts = _Trellis.apply(setting, weight_h, bias, h0, c0, scale, last, N, weight_x, *rows, *x_tilde)
    h, c, *aux = (part.to(weight_h.dtype) for part in parts)
    outputs = [part.transpose(0, 1) for part in (h[..., h.size(2) - spec.output_size :], *aux)]
    return outputs[0], (h[_at(last, N)], c), outputs[1:], layer_steps
