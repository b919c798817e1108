"""The fused trellis and the heads' cross-entropy as operators of torch, for programs that are compiled or exported.

`torch.ops.trellisnet.trellis` and `torch.ops.trellisnet.cross_entropy` compute what :mod:`trellisnet.ops.fused` and
:mod:`trellisnet.ops.cross_entropy` do, by the same functions. Torch sees an operator as one node with a schema of
tensors, numbers and strings. So everything that decides how to compute (dtype, choice of gate kernels and products) is
an argument, and what the backward pass reads is among the results: as a list of tensors, because a single buffer would
require a copy of every product of oneDNN, which cannot write into given memory.

Eager code calls the functions directly: an operator may neither return None nor hand over memory it has stored.

The shapes of the results depend on the length alone if all time steps are wanted; the length may then be symbolic. With
`start` they depend on the positions that :mod:`trellisnet.ops.pruning` keeps, and torch compiles for each length.

Letters: N batch, L length, C input channels, H hidden channels, G gates, k kernel size.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trellisnet.ops import cross_entropy, fused, higher_order, pruning, reference
from trellisnet.ops import gemm as products
from trellisnet.ops.gates import add_rows
from trellisnet.ops.pruning import Plan
from trellisnet.ops.spec import Execution, TrellisSpec, Weights


class _Settings(NamedTuple):
    """Arguments of the trellis operators after the tensors."""

    start: int
    num_layers: int
    output_size: int
    dilation: Sequence[int]
    kernel_size: int
    inject_every: int
    activation: str
    aux_every: int  # 0: no auxiliary outputs
    compute: str  # dtype of the products
    gemm: str
    gates: str
    recompute_every: int  # 0: store all layers
    needs_grad: bool  # store what the backward pass reads

    @property
    def spec(self) -> TrellisSpec:
        sizes = self.num_layers, self.output_size, reference.ACTIVATIONS[self.activation], tuple(self.dilation)
        return TrellisSpec(*sizes, self.kernel_size, None, self.inject_every)

    @property
    def execution(self) -> Execution:
        return Execution(recompute=self.recompute_every > 0, recompute_every=self.recompute_every or None)

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.compute)

    @property
    def sums(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32


# x (L, N, C), weight_x (GH, k·C), weight_h (GH, k·H), bias (GH,), h0 and c0 (N, H) or None for zeros, scale (N, H),
# last (N,): position of the last valid step of every row, counted from `start`.
_TENSORS = (
    "Tensor x, Tensor weight_x, Tensor weight_h, Tensor bias, Tensor? h0, Tensor? c0, Tensor? scale, Tensor? last"
)
_SETTINGS = (
    "SymInt start, int num_layers, int output_size, int[] dilation, int kernel_size, int inject_every, str activation, "
    "int aux_every, str compute, str gemm, str gates, int recompute_every, bool needs_grad"
)
# h, c, auxiliary outputs, what is stored: as in `fused.Result`, but for 0-dim tensors that stand for None.
_FORWARD = f"({_TENSORS}, {_SETTINGS}) -> (Tensor, Tensor, Tensor[], Tensor[])"
# Gradients of the first six tensors, of x on request; 0-dim tensors stand for None.
_BACKWARD = (
    f"(Tensor? dh, Tensor? dc, Tensor?[] daux, Tensor[] stored, bool needs_x, {_TENSORS}, {_SETTINGS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _setting(x: Tensor, settings: _Settings) -> fused.Setting:
    spec = settings.spec
    plan = pruning.plan(x.size(0), spec, settings.start, x.device)
    # Decided here, not while a program is compiled or exported, because it may run on another machine.
    product = products.resolve(settings.gemm if x.size(1) else "mm", x.device, settings.dtype)
    gates = fused.gates_of(settings.gates, x.device, settings.dtype, spec.activation.name)
    options = settings.aux_every, settings.execution, settings.needs_grad
    return fused.make_setting(plan, spec, settings.dtype, product, gates, *options)


def _x_tilde(plan: Plan, x: Tensor, weight_x: Tensor, bias: Tensor, dtype: torch.dtype) -> list[Tensor]:
    return [F.linear(rows, weight_x.to(dtype), bias.to(dtype)) for rows in fused.rows_of(plan, x, dtype)]


@torch.library.custom_op("trellisnet::trellis", mutates_args=(), schema=_FORWARD)
def _trellis(x, weight_x, weight_h, bias, h0, c0, scale, last, *settings):
    setting = _setting(x, settings := _Settings(*settings))
    with torch.autocast(x.device.type, enabled=False):
        x_tilde = _x_tilde(setting.plan, x, weight_x, bias, settings.dtype)
        inputs = fused.Inputs(weight_h, bias, h0, c0, scale, last, x_tilde)
        h, c, aux, stored = fused.forward(setting, inputs, x.size(1))
    return h, c, aux, [x.new_zeros(()) if t is None else t for t in stored]


@_trellis.register_fake
def _(x, weight_x, weight_h, bias, h0, c0, scale, last, *settings):
    settings = _Settings(*settings)
    spec, (L, N, _), k = settings.spec, x.shape, settings.kernel_size
    H, depth, d = weight_h.size(1) // k, spec.num_layers, spec.dilations[0]
    positions = None
    if settings.start == 0:
        sizes = [L] * depth
    else:
        positions = pruning.dependencies(int(L), depth, spec.dilation, k, int(settings.start))
        sizes = [len(here) for here in positions]

    def empty(*shape, dtype=settings.sums):
        return x.new_empty(shape, dtype=dtype)

    def cell(layer):  # of the layer of this number, counted from 1
        return empty(sizes[layer - 1], N, H) if layer and spec.activation.has_cell else x.new_empty(())

    stored = []
    *checkpoints, last_first = range(0, depth, settings.execution.segment(depth)) if settings.needs_grad else [depth]
    for first in checkpoints:
        rows = sizes[first]
        if first == 0:  # of the lowest layer, only the positions that read the state
            near = max(k - 1, 1) * d
            rows = torch.sym_min(L, near) if positions is None else sum(t < near for t in positions[0])
            rows = 0 if h0 is None else rows
        rows = rows * N if x.device.type != "cpu" else (rows * N + fused.BUCKET - 1) // fused.BUCKET * fused.BUCKET
        stored += [empty(rows, k * H, dtype=settings.dtype), cell(first)]
    if settings.needs_grad:
        stored.append(cell(last_first))
    for layer in range(last_first, depth):
        stored += [empty(sizes[layer], N, weight_h.size(0), dtype=settings.dtype), cell(layer + 1)]
    count = depth // settings.aux_every if settings.aux_every else 0
    aux = [empty(sizes[-1], N, settings.output_size) for _ in range(count)]
    return empty(sizes[-1], N, H), empty(N, H), aux, stored


@torch.library.custom_op("trellisnet::trellis_backward", mutates_args=(), schema=_BACKWARD)
def _trellis_backward(dh, dc, daux, stored, needs_x, x, weight_x, weight_h, bias, h0, c0, scale, last, *settings):
    setting = _setting(x, settings := _Settings(*settings))
    plan, dtype, wanted = setting.plan, settings.dtype, setting.plan.layers[-1].size
    (_, N, C), (GH, width) = x.shape, weight_h.shape

    def made(grad, *shape):
        return x.new_zeros(shape, dtype=settings.sums) if grad is None else grad

    with torch.autocast(x.device.type, enabled=False):
        reread = _x_tilde(plan, x, weight_x, bias, dtype) if len(setting.segments) > 1 else [None] * len(plan.x)
        inputs = fused.Inputs(weight_h, bias, h0, c0, scale, last, reread)
        stored = [None if t.dim() == 0 else t for t in stored]
        shapes = [(reads[0].left + len(reads[0].rows), N, GH) for reads in plan.x.values()]
        dh, dc = made(dh, wanted, N, width // settings.kernel_size), made(dc, N, width // settings.kernel_size)
        daux = [made(grad, wanted, N, settings.output_size) for grad in daux]
        grads = fused.backward(setting, inputs, stored, shapes, N, dh, dc, daux)
        dx = x.new_zeros(x.shape) if needs_x else None
        dweight_x, dbias = weight_x.new_zeros(weight_x.shape), grads.bias
        for reads, rows, dz in zip(plan.x.values(), fused.rows_of(plan, x, dtype), grads.x_tilde, strict=True):
            dbias += dz.sum((0, 1))
            dz = dz.flatten(0, 1).to(dtype)
            dweight_x += dz.t() @ rows.flatten(0, 1)
            drows = (dz @ weight_x.to(dtype)).view_as(rows) if needs_x else None
            for j, read in enumerate(reads if needs_x else ()):
                add_rows(dx, read.rows, drows[read.left :, :, j * C : (j + 1) * C])
    grads = dx, dweight_x, grads.weight.contiguous(), dbias.to(bias.dtype), grads.h0, grads.c0
    return tuple(x.new_zeros(()) if grad is None else grad for grad in grads)


@_trellis_backward.register_fake
def _(dh, dc, daux, stored, needs_x, x, weight_x, weight_h, bias, h0, c0, scale, last, *settings):
    tensors = x if needs_x else None, weight_x, weight_h, bias, h0, c0
    return tuple(x.new_empty(()) if t is None else t.new_empty(t.shape) for t in tensors)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)
    ctx.settings = inputs[8:]
    ctx.save_for_backward(*inputs[:8], *output[3])


def _gradients(ctx: Any, dh, dc, daux, _):
    x, weight_x, weight_h, bias, h0, c0, scale, last, *stored = ctx.saved_tensors
    # By torch's own operations if the backward pass will itself be differentiated, or if nothing has been stored for
    # it, as in a program that was exported without gradients.
    if torch.is_grad_enabled() or not _Settings(*ctx.settings).needs_grad:
        grads = _differentiable(ctx, dh, dc, daux)
    else:
        arguments = x, weight_x, weight_h, bias, h0, c0, scale, last, *ctx.settings
        needs_x = ctx.needs_input_grad[0]
        grads = torch.ops.trellisnet.trellis_backward(dh, dc, daux, stored, needs_x, *arguments)
        tensors = x if needs_x else None, weight_x, weight_h, bias, h0, c0
        grads = [None if t is None else grad for t, grad in zip(tensors, grads, strict=True)]
    return *grads, None, None, *[None] * len(ctx.settings)


def _differentiable(ctx: Any, *grads) -> list[Tensor | None]:
    x, *tensors, scale, last = ctx.saved_tensors[:8]
    setting = _setting(x, settings := _Settings(*ctx.settings))
    dh, dc, daux = grads

    def outputs(x, weight_x, weight_h, bias, h0, c0):
        x_tilde = _x_tilde(setting.plan, x, weight_x, bias, settings.sums)
        results = fused.operations(setting, fused.Inputs(weight_h, bias, h0, c0, scale, last, x_tilde), x.size(1))
        return [result for result, grad in zip(results, (dh, dc, *daux), strict=True) if grad is not None]

    given = [grad for grad in (dh, dc, *daux) if grad is not None]
    return higher_order.gradients(outputs, (x, *tensors), ctx.needs_input_grad[:6], given)


_trellis.register_autograd(_gradients, setup_context=_setup)


def _by_the_equation(x, weight_x, weight_h, bias, h0, c0, scale, last, *settings):
    settings = _Settings(*settings)
    spec, dtype, N, k = settings.spec, settings.dtype, x.size(1), settings.kernel_size
    H, start = weight_h.size(1) // k, settings.start
    weights = (*(w.to(dtype).unflatten(1, (k, -1)).transpose(1, 2) for w in (weight_x, weight_h)), bias.to(dtype))
    state = tuple((x.new_zeros(N, H) if s is None else s).to(dtype) for s in (h0, c0))
    options: dict[str, Any] = {"aux_every": settings.aux_every or None}
    if scale is not None:
        options["hidden_scale"] = scale.to(dtype).unsqueeze(2)
    if last is not None:
        options["lengths"] = last + start + 1
    all_channels = dataclasses.replace(spec, output_size=H)
    h, (_, c), aux = reference.trellis(x.to(dtype).transpose(0, 1), weights, state, all_channels, **options)
    h, *aux = (part[:, start:].transpose(0, 1).to(settings.sums) for part in (h, *aux))
    # Nothing is stored; a program exported with gradients unpacks as many tensors as there may be, and reads none.
    stored = [x.new_zeros(())] * (2 * spec.num_layers + 1)
    return h, c.to(settings.sums), [part[..., H - spec.output_size :] for part in aux], stored


# For `ExportedProgram.run_decompositions`: replaces the operators of forward passes by torch's own operations.
DECOMPOSITIONS = {
    torch.ops.trellisnet.trellis.default: _by_the_equation,
    torch.ops.trellisnet.cross_entropy.default: cross_entropy.decomposition,
}


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
    """Run all layers as one operator; arguments and results as in :func:`trellisnet.ops.fused.trellis`."""
    weight_x, weight_h, bias = weights
    compute = fused.compute_dtype(weight_h)
    weight_x, weight_h = (w.transpose(1, 2).flatten(1) for w in (weight_x, weight_h))  # (GH, k·C), (GH, k·H)
    h0, c0 = state or (None, None)
    scale = None if hidden_scale is None else hidden_scale.squeeze(2)
    last = None if lengths is None else lengths - start - 1
    tensors = x.transpose(0, 1).contiguous(), weight_x, weight_h, bias, h0, c0, scale, last
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors[:6])
    every = execution.segment(spec.num_layers) if execution.recompute else 0
    h, c, aux, _ = torch.ops.trellisnet.trellis(
        *tensors, start, spec.num_layers, spec.output_size, spec.dilation, spec.kernel_size, spec.inject_every,
        spec.activation.name, aux_every or 0, str(compute).removeprefix("torch."), execution.gemm,
        fused.gates_choice(execution), every, needs_grad,
    )  # fmt: skip
    return *fused.finish(h, c, aux, last, bias.dtype, spec), spec.num_layers * x.size(1)
