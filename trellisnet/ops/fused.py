r"""The whole trellis as one differentiable operation: fast and lean, for LSTM gates or tanh and a dense kernel.

It computes the equation of :mod:`trellisnet.ops.reference`, with these differences:

- **Time comes first**, (S, N, H), so that a tap reads a slice of rows (or, from a strided set, a selection).
- **Only the positions of** :mod:`trellisnet.ops.pruning` are computed, those that the requested outputs depend on.
- **One product per layer**: the rows of all taps side by side, (S·N, k·H), times the kernel.
- **Gates in one pass** (:mod:`trellisnet.ops.gates` or :mod:`trellisnet.ops.compiled`), in the memory of the product.
  They write h straight into the taps of the layer above.
- **For the backward pass** the gates (in the dtype of the products) and the cell are stored, (S, N, 5H) per layer;
  hidden states are recomputed from them. With `recompute` only the input of every K-th layer is stored, and the
  backward pass recomputes K layers at a time.
- **The gradient of the kernel** is summed in single precision in one buffer, from products over several layers at once:
  on a GPU over all of them, if their operands take no more than `ARENA`.
- **The gradient of x̃** is summed on a GPU once per dilation, in single precision, from the operands of these products.
  On a CPU the gate kernels of each layer add to it while its values are in the cache.

Products may be in bfloat16; cells, gate arithmetic and sums over layers are then in float32.

If its backward pass is itself differentiated, the layers are recomputed in differentiable operations
(:func:`trellisnet.ops.last_step.layers`), which gives derivatives of any order in the memory and time of the reference.
There are no forward-mode derivatives and no support for `torch.func`; the reference has both. Programs that are
compiled or exported run this as an operator (:mod:`trellisnet.ops.operators`).

Letters: N batch, L length, H hidden channels, G gates, k kernel size, S positions of a layer, P rows of x̃.
"""

import importlib.util
from collections import Counter
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trellisnet.ops import compiled, higher_order, last_step, pruning
from trellisnet.ops import gates as eager
from trellisnet.ops import gemm as products
from trellisnet.ops.gates import Step
from trellisnet.ops.pruning import Layer, Plan
from trellisnet.ops.spec import Execution, TrellisSpec, Weights

empty = torch.empty  # a name in this module, so that tests can fill uninitialised memory with NaN
BUCKET = 128  # round the rows of a CPU product up to a multiple of it: oneDNN caches data for every distinct number
LAYERS_AT_ONCE = 4  # layers per product for the gradient of the kernel, on a CPU
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
    if higher_order.intercepted():
        return "Python code intercepts torch's operations"
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


class Setting(NamedTuple):
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

    def __init__(self, setting: Setting, weight: Tensor, batch: int):
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
    """Return the number of layers per product for the kernel's gradient."""
    # Not a function of free memory: the order of summation, and so the rounding, has to be reproducible.
    if geometry.device.type != "cuda":
        return LAYERS_AT_ONCE
    width = (geometry.GH + geometry.k * geometry.H) * geometry.compute.itemsize
    if sum(rows) * width <= ARENA:
        return len(rows)
    return max(LAYERS_AT_ONCE, ARENA // (max(rows) * width) - 1)


class _LayerSums:
    """Gradients that are sums over layers, computed for several layers at once from their dz: of the kernel and of x̃.

    That of the kernel is Σ tapsᵀ · dz, (k·H, GH), and not its transpose, because oneDNN is a few percent faster that
    way. The layers arrive from the top down, and the taps of each arrive one layer after its dz: they are the h of the
    layer below.

    Args:
        setting: of the call.
        sizes: positions of the layers, from the lowest up.
        dx: gradients of x̃ by dilation, to be added to.
        shapes: their shapes.
    """

    def __init__(
        self, setting: Setting, geometry: _Geometry, sizes: list[int], dx: dict[int, Tensor], shapes: dict[int, tuple]
    ):
        self.setting, self.geometry, self.dx, self.shapes = setting, geometry, dx, shapes
        self.rows_ahead = [geometry.rows(size) for size in sizes if size]  # of the layers still to come
        low_memory = len(setting.segments) > 1  # hold two layers at most
        at_once = 1 if low_memory else _layers_at_once(geometry, self.rows_ahead)
        self.capacity = min(sum(self.rows_ahead), (at_once + 1) * max(self.rows_ahead, default=0))
        self.dz = _Rows(geometry, geometry.GH, self.capacity)
        self.taps = _Rows(geometry, geometry.k * geometry.H, self.capacity)
        self.complete = 0  # rows with both dz and taps
        self.last = 0  # positions of the layer with dz but no taps yet
        self.kernel: Tensor | None = None
        self.sums_x = _sums_x(setting, geometry)
        self.held: list[tuple[Layer, int]] = []  # layers whose dz belongs to a gradient of x̃, and its first row

    def takes_x(self, number: int) -> bool:
        """Return whether the gradient of x̃ for layer `number` is summed here instead of by the gate kernels."""
        layer = self.setting.plan.layers[number - 1]
        # The product, and so dz, covers all positions of all layers but the first.
        return number > 1 and layer.x is not None and layer.dilation in self.sums_x

    def next_dz(self, positions: int) -> Tensor:
        """Return the rows for dz of the next layer down, to be filled together with :meth:`last_taps`."""
        return self.dz.take(positions, self.complete + self.geometry.rows(self.last))

    def last_taps(self) -> Tensor:
        """Return the rows for the taps that belong to the last dz."""
        return self.taps.take(self.last, self.complete)

    def advance(self, number: int, positions: int) -> Tensor:
        """Take over the filled rows, sum up if the next layer would not fit, and return where dz lies now.

        Args:
            number: of the layer that dz belongs to.
            positions: number of its positions in dz.
        """
        self.complete += self.geometry.rows(self.last)
        self.last = positions
        rows = self.rows_ahead.pop()
        dz = self.dz.memory[self.complete : self.complete + rows]
        if self.takes_x(number):
            self.held.append((self.setting.plan.layers[number - 1], self.complete))
        if self.complete + rows + (self.rows_ahead[-1] if self.rows_ahead else 0) <= self.capacity:
            return dz
        self._sum()
        self.complete = 0
        self.dz.memory[:rows] = dz.clone()  # source and target may overlap
        return self.dz.memory[:rows]

    def finish(self) -> Tensor:
        """Return the gradient of the kernel, once the taps of the lowest layer are filled; complete those of x̃."""
        self.complete += self.geometry.rows(self.last)
        self._sum()
        if self.kernel is None:
            return self.geometry.zeros(self.geometry.k * self.geometry.H, self.geometry.GH)
        return self.kernel

    def _sum(self) -> None:
        for dilation in sorted({layer.dilation for layer, _ in self.held}):
            add = dilation in self.dx
            if not add:
                self.dx[dilation] = self.geometry.empty(*self.shapes[dilation])
            held = [(layer, first) for layer, first in self.held if layer.dilation == dilation]
            self.setting.gates.sum_rows(self.dx[dilation], self.dz.memory, held, add)
        self.held = []
        if self.complete:
            dz, taps = (rows.memory[: self.complete] for rows in (self.dz, self.taps))
            if self.kernel is None:
                self.kernel = products.product_in(self.geometry.sum, taps.t(), dz.t(), self.setting.product)
            else:
                products.add_product(self.kernel, taps.t(), dz.t(), self.setting.product)


def _sums_x(setting: Setting, geometry: _Geometry) -> set[int]:
    """Return the dilations whose x̃ gets its gradient from the collected rows of dz: on a GPU, those of several layers.

    For a single layer this would cost another pass over dz and save nothing; with `recompute`, layers are collected one
    by one.
    """
    if geometry.device.type != "cuda" or len(setting.segments) > 1:
        return set()
    layers = Counter(layer.dilation for layer in setting.plan.layers[1:] if layer.x is not None)
    return {dilation for dilation, count in layers.items() if count > 1}


class _Layers:
    """The layers of one call, computed one by one from the lowest up."""

    def __init__(self, setting: Setting, inputs: "Inputs", batch: int):
        weight, bias, h0, c0, scale, _, x_tilde = inputs
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


class Result(NamedTuple):
    """Result of :func:`forward`.

    Args:
        h: hidden channels of the last layer, unmasked, (S, N, H).
        c: its cell at the positions `last`, (N, H).
        aux: auxiliary outputs, (S, N, output_size) each.
        stored: what :func:`backward` reads, if the setting needs it; None stands for zeros.
    """

    h: Tensor
    c: Tensor
    aux: list[Tensor]
    stored: list[Tensor | None]


class Inputs(NamedTuple):
    """Tensors of one call.

    Args:
        weight: (GH, k·H).
        bias: (GH,).
        h0, c0: (N, H), or None for zeros.
        scale: (N, H), or None.
        last: last position of every row, (N,), or None for the end of all.
        x_tilde: x̃ including the bias, (P, N, GH), for every dilation of `inject_dilations`.
    """

    weight: Tensor
    bias: Tensor
    h0: Tensor | None
    c0: Tensor | None
    scale: Tensor | None
    last: Tensor | None
    x_tilde: Sequence[Tensor]


def forward(setting: Setting, inputs: Inputs, batch: int) -> Result:
    """Compute all layers, time first, in the dtypes of the setting."""
    run = _Layers(setting, inputs, batch)
    geometry, layers = run.geometry, setting.plan.layers
    N, H, wanted = geometry.N, geometry.H, layers[-1].size
    stored, checkpoints, aux = [], [], []
    taps, h, c = run.first_taps(), geometry.empty(wanted, N, H), None
    for first, end in setting.segments:
        if setting.needs_grad and end < len(layers):
            checkpoints += [taps.clone(), c]
        for number in range(first, end + 1):
            out = h if number == len(layers) else None
            if out is None and number in setting.aux_layers:
                out = geometry.empty(wanted, N, setting.spec.output_size)
            if setting.needs_grad and number == first and end == len(layers):
                stored.append(c)  # cell of the layer below the first stored one
            gates, c, taps = run.compute(number, taps, c, out, with_taps=number < len(layers))
            if setting.needs_grad and end == len(layers):
                stored += [gates, c]
            if number in setting.aux_layers:
                aux.append(out[..., H - setting.spec.output_size :].clone() if out is h else out)
    return Result(h, (h if c is None else c)[_at(inputs.last, N)].clone(), aux, [*checkpoints, *stored])


class Gradients(NamedTuple):
    """Gradients of the :class:`Inputs` that have one; x̃ in full precision."""

    weight: Tensor
    bias: Tensor
    h0: Tensor | None
    c0: Tensor | None
    x_tilde: list[Tensor]


def backward(
    setting: Setting,
    inputs: Inputs,
    stored: Sequence[Tensor | None],
    shapes: Sequence[tuple[int, ...]],
    batch: int,
    dh: Tensor,
    dc_last: Tensor,
    daux: Sequence[Tensor],
) -> Gradients:
    """Compute the gradients from those of h, c and the auxiliary outputs.

    Args:
        inputs: those of :func:`forward`, of which x̃ is read only to recompute layers.
        stored: what :func:`forward` stored.
        shapes: shapes of x̃.
    """
    layers, activation = setting.plan.layers, setting.spec.activation
    weight, _, h0, c0, scale, last, _ = inputs
    run = _Layers(setting, inputs, batch)
    geometry = run.geometry
    N, H, GH, k = geometry.N, geometry.H, geometry.GH, geometry.k
    w_t = products.pack(weight.to(setting.compute).t().contiguous(), run.max_rows, setting.product)  # (k·H, GH)
    dbias, dh_left, dc_left = geometry.zeros(GH), geometry.zeros(N, H), geometry.zeros(N, H)
    dx: dict[int, Tensor] = {}
    shape_of = dict(zip(setting.inject_dilations, shapes, strict=True))
    sums = _LayerSums(setting, geometry, run.edges, dx, shape_of)
    daux = {i: grad.contiguous() for i, grad in zip(sorted(setting.aux_layers), daux, strict=True)}

    dc = geometry.zeros(layers[-1].size, N, H)
    dc[_at(last, N)] = dc_last.to(dc.dtype)
    daux[len(layers)], dc = _last_gradient(setting, dh.to(geometry.sum), dc, daux.get(len(layers)))
    above = taps = dtaps = None
    for segment in reversed(range(len(setting.segments))):
        first, end = setting.segments[segment]
        if end == len(layers):
            cells, gates = stored[2 * segment :: 2], stored[2 * segment + 1 :: 2]
        else:
            cells, gates = _recompute(run, first, end, *stored[2 * segment : 2 * segment + 2])
        for number in range(end, first - 1, -1):
            layer, edge = layers[number - 1], run.edges[number - 1]
            if above:
                taps = run.fill(sums.last_taps(), number + 1)
            dz = sums.next_dz(edge)
            reads_cell = activation.has_cell and (number > 1 or c0 is not None)
            dc_below = geometry.empty(layer.size, N, H) if reads_cell else None
            # The first layer of a dilation writes the gradient of x̃ if it covers all rows, else it adds to zeros.
            add = layer.x is not None and (layer.dilation in dx or len(layer.x) < shape_of[layer.dilation][0])
            if layer.x is None:
                dx_layer = geometry.empty(layer.size, N, GH)
            elif sums.takes_x(number):
                dx_layer = None
            elif layer.dilation in dx:
                dx_layer = dx[layer.dilation]
            else:
                make = geometry.zeros if add else geometry.empty
                dx_layer = dx[layer.dilation] = make(*shape_of[layer.dilation])
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
                dz = sums.advance(number, edge)
                dtaps = _positions(setting.product(dz, w_t), edge, N, k, H)
                for j, read in enumerate(layer.taps if h0 is not None else ()):
                    dh_left += dtaps[: read.left, :, j].sum(0, dtype=geometry.sum)
            dc, above = dc_below, layer
        del cells, gates
    if run.edges[0]:
        run.fill(sums.last_taps(), 1)
    dw = sums.finish().t()
    if scale is not None:
        dh_left *= run.scale
    state = [None if s is None else g.to(s.dtype) for g, s in ((dh_left, h0), (dc_left, c0))]
    return Gradients(dw.to(weight.dtype), dbias, *state, [dx[d] for d in setting.inject_dilations])


def operations(setting: Setting, inputs: Inputs, batch: int) -> list[Tensor]:
    """Return h, c and the auxiliary outputs as :func:`forward` does, by torch's own operations, differentiable."""
    spec = setting.spec
    work = torch.float64 if setting.compute == torch.float64 else torch.float32
    weight, bias, h0, c0, scale = (None if t is None else t.to(work) for t in inputs[:5])
    zero = bias.new_zeros(batch, bias.numel() // spec.activation.gates)
    state, aux = (zero if h0 is None else h0, zero if c0 is None else c0), []
    x_tilde = (x.to(work).transpose(0, 1) for x in inputs.x_tilde)
    x_tilde = dict(zip(setting.inject_dilations, x_tilde, strict=True))
    arguments = setting.plan, x_tilde, weight.t(), bias, state, scale, spec.activation
    for number, (h, c) in enumerate(last_step.layers(*arguments), start=1):  # noqa: B007
        if number in setting.aux_layers:
            wanted = pruning.rows(h, setting.plan.layers[number - 1].wanted, dim=1)
            aux.append(wanted[..., wanted.size(2) - spec.output_size :].transpose(0, 1))
    return [h.transpose(0, 1), c.transpose(0, 1)[_at(inputs.last, batch)], *aux]


class _Trellis(torch.autograd.Function):
    """(setting, N, weight_x, weight, bias, h0, c0, scale, last, *rows, *x̃) → (h, c, *aux).

    Arguments: weight_x (GH, k·C), rows (P, N, k·C) for every dilation, and the fields of :class:`Inputs`.

    x̃ = rows · weight_xᵀ + bias is not stored. If the backward pass is differentiated, it is recomputed from rows and
    weight_x, which the product that made it stores anyway; they have no gradient of their own here.
    """

    @staticmethod
    def forward(ctx: Any, setting: Setting, batch: int, weight_x: Tensor, *tensors):
        dilations = len(setting.inject_dilations)
        rows, x_tilde = tensors[6 : 6 + dilations], tensors[6 + dilations :]
        result = forward(setting, Inputs(*tensors[:6], x_tilde), batch)
        ctx.setting, ctx.batch = setting, batch
        ctx.shapes, ctx.dtypes = [tuple(x.shape) for x in x_tilde], [x.dtype for x in x_tilde]
        if setting.needs_grad:
            reread = x_tilde if len(setting.segments) > 1 else [None] * dilations
            ctx.save_for_backward(weight_x, *tensors[:6], *rows, *reread, *result.stored)
        return result.h, result.c, *result.aux

    @staticmethod
    def backward(ctx: Any, *grads):
        if higher_order.needed(grads):
            return _Trellis._differentiable(ctx, grads)
        dilations = len(ctx.shapes)
        _, *tensors = ctx.saved_tensors
        x_tilde, stored = tensors[6 + dilations : 6 + 2 * dilations], tensors[6 + 2 * dilations :]
        dh, dc, *daux = grads
        with torch.autocast(dh.device.type, enabled=False):
            inputs = Inputs(*tensors[:6], x_tilde)
            *grads, dx = backward(ctx.setting, inputs, stored, ctx.shapes, ctx.batch, dh, dc, daux)
            dx = [x.to(dtype) for x, dtype in zip(dx, ctx.dtypes, strict=True)]
        return None, None, None, *grads, *[None] * (2 + dilations), *dx

    @staticmethod
    def jvp(ctx: Any, *tangents):
        raise NotImplementedError('fused has no forward-mode derivatives; take backend="reference"')

    @staticmethod
    def _differentiable(ctx: Any, grads: Sequence[Tensor]):
        setting: Setting = ctx.setting
        weight_x, weight, bias, h0, c0, scale, last, *saved = ctx.saved_tensors
        dilations = len(setting.inject_dilations)
        work = torch.float64 if setting.compute == torch.float64 else torch.float32

        def outputs(weight, bias, h0, c0, *x_tilde):
            return operations(setting, Inputs(weight, bias, h0, c0, scale, last, x_tilde), ctx.batch)

        with torch.autocast(grads[0].device.type, enabled=False):
            wide = (weight_x.to(work), bias.to(work))
            x_tilde = [torch.nn.functional.linear(r.to(work), *wide) for r in saved[:dilations]]
        wanted = [*ctx.needs_input_grad[3:7], *ctx.needs_input_grad[-dilations:]]
        grads = higher_order.gradients(outputs, (weight, bias, h0, c0, *x_tilde), wanted, grads)
        dx = [None if g is None else g.to(dtype) for g, dtype in zip(grads[4:], ctx.dtypes, strict=True)]
        return None, None, None, *grads[:4], *[None] * (2 + dilations), *dx


def _recompute(run: _Layers, first: int, end: int, taps: Tensor, c: Tensor | None) -> tuple[list, list]:
    """Recompute a segment from its checkpoint: its cells, after that of the layer below it, and its gates."""
    cells, gates = [c], []
    for number in range(first, end + 1):
        gate, c, taps = run.compute(number, taps, c, None, with_taps=number < end)
        cells.append(c)
        gates.append(gate)
    return cells, gates


def _last_gradient(setting: Setting, dh: Tensor, dc: Tensor, daux: Tensor | None) -> tuple[Tensor, Tensor | None]:
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
    N, L, _ = x.shape
    weight_x, weight_h, bias = weights
    compute = compute_dtype(weight_h)
    product = products.resolve(execution.gemm if N else "mm", x.device, compute)  # oneDNN refuses empty matrices
    weight_x, weight_h = (w.transpose(1, 2).flatten(1) for w in (weight_x, weight_h))  # (GH, k·C), (GH, k·H)
    if compute != weight_h.dtype:  # before autocast does, so that F.linear and this operator store the same tensors
        weight_x = weight_x.to(compute)
    plan = pruning.plan(L, spec, start, x.device)
    rows = rows_of(plan, x.transpose(0, 1), weight_x.dtype)
    x_tilde = [torch.nn.functional.linear(r, weight_x, bias) for r in rows]
    # Autograd cannot save inference tensors for a backward pass.
    h0, c0 = (s.clone() if s.is_inference() else s for s in state) if state else (None, None)
    needs_grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (weight_h, bias, h0, c0, *x_tilde)
    )
    gates = gates_of(gates_choice(execution), x.device, compute, spec.activation.name)
    setting = make_setting(plan, spec, compute, product, gates, aux_every or 0, execution, needs_grad)
    scale = None if hidden_scale is None else hidden_scale.squeeze(2)
    last = None if lengths is None else lengths - start - 1
    with torch.autocast(x.device.type, enabled=False):
        h, c, *aux = _Trellis.apply(setting, N, weight_x, weight_h, bias, h0, c0, scale, last, *rows, *x_tilde)
    return *finish(h, c, aux, last, weight_h.dtype, spec), plan.layer_steps


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype of the products: that of the weights or, within `torch.autocast`, its own."""
    device = weight.device.type
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return weight.dtype


def gates_choice(execution: Execution) -> str:
    """Return the gate kernels that are asked for."""
    return "triton" if execution.backend == "triton" else execution.gates


def rows_of(plan: Plan, x: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Gather what the taps of x̃ read from x (L, N, C), (P, N, k·C) in `dtype` for every dilation."""
    zero = x.new_zeros(1, *x.shape[1:])
    rows = [torch.cat([pruning.take(x, read, zero) for read in reads], dim=2) for reads in plan.x.values()]
    return [r.to(dtype) for r in rows]


def make_setting(
    plan: Plan,
    spec: TrellisSpec,
    compute: torch.dtype,
    product: products.Product,
    gates: ModuleType,
    aux_every: int,
    execution: Execution,
    needs_grad: bool,
) -> Setting:
    """Collect the setting of one call; `aux_every` is 0 for no auxiliary outputs."""
    depth = spec.num_layers
    aux_layers = frozenset(range(aux_every, depth + 1, aux_every)) if aux_every else frozenset()
    every = execution.segment(depth) if needs_grad else depth
    segments = tuple((first, min(first + every - 1, depth)) for first in range(1, depth + 1, every))
    return Setting(plan, spec, compute, product, gates, aux_layers, tuple(plan.x), needs_grad, segments)


def finish(
    h: Tensor, c: Tensor, aux: Sequence[Tensor], last: Tensor | None, dtype: torch.dtype, spec: TrellisSpec
) -> tuple[Tensor, tuple[Tensor, Tensor], list[Tensor]]:
    """Return output, state and auxiliary outputs, batch first and in `dtype`, from what :func:`forward` returns."""
    h, c, *aux = (part.to(dtype) for part in (h, c, *aux))
    outputs = [part.transpose(0, 1) for part in (h[..., h.size(2) - spec.output_size :], *aux)]
    return outputs[0], (h[_at(last, h.size(1))], c), outputs[1:]
