r"""Streaming: read a sequence of any length piece by piece, in constant memory, computing nothing twice.

A layer reads the one below at most (k−1)·d steps back (its cell path d steps), so the next piece needs only those last
rows of every layer and of x. All pieces together equal one long pass from a zero state, position by position. This
differs from "history repackaging", which gives every layer the state of the last one.

All kinds of layers are supported, without gradients; the equation is that of :mod:`trellisnet.ops.reference`. Time
comes first, and products and gate kernels are those of :mod:`trellisnet.ops.fused`; programs that are compiled,
exported or traced consist of torch's own operations.

Letters: N batch, T steps of a piece, C input channels, H hidden channels, G gates, k kernel size, d dilation of a
layer.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trellisnet.ops import compiled, mixed_group, traced
from trellisnet.ops import gates as eager
from trellisnet.ops import gemm as products
from trellisnet.ops.fused import gates_of
from trellisnet.ops.gates import Step
from trellisnet.ops.higher_order import dispatches, intercepted
from trellisnet.ops.pruning import Layer, Read
from trellisnet.ops.spec import Activation, Execution, TrellisSpec, Weights


@lru_cache(maxsize=256)
def _one_to_one(steps: int, injected: bool) -> Layer:
    """Return a plan in which each position reads the row of its own number: the taps are gathered already."""
    every = Read(0, range(steps))
    return Layer(1, steps, steps, (every,), every, range(steps) if injected else None, range(steps), {})


class Cell(NamedTuple):
    """Gates and cell of a layer, for any number of time steps.

    Args:
        bias: (GH,).
        activation: the activation.
        compute: dtype of the products.
        kernels: gate kernels; None for the activation of the reference.
    """

    bias: Tensor
    activation: Activation
    compute: torch.dtype
    kernels: ModuleType | None

    def __call__(
        self, z_x: Tensor | None, z_h: Tensor | None, cells: Tensor | None, *, last: bool
    ) -> tuple[Tensor, Tensor]:
        """Return h and c, (T, N, H); h is in the dtype of the products, except in the last layer.

        Args:
            z_x: x̃ (T, N, GH); None if x does not enter this layer.
            z_h: Conv1D(h), which may be overwritten; None if the layer below is zero.
            cells: what the cell path reads, (T, N, H); None for zeros.
            last: whether this is the last layer.
        """
        bias, activation, compute = self.bias, self.activation, self.compute
        if self.kernels is None:
            z_x = bias if z_x is None else z_x.to(bias.dtype)
            z_h = torch.zeros_like(z_x) if z_h is None else z_h.to(z_x.dtype)
            cells = z_x.new_zeros(()) if cells is None else cells
            h, c = activation.function(z_x.expand_as(z_h), z_h, cells, dim=2)
            return h if last else h.to(compute), c
        T, N, GH = (z_x if z_h is None else z_h).shape
        layer, shape = _one_to_one(T, z_x is not None), (T, N, GH // activation.gates)
        c = bias.new_empty(shape) if activation.has_cell else None
        h = bias.new_empty(shape, dtype=bias.dtype if last else compute)
        step = Step(
            activation=activation, layer=layer, above=None if last else layer, product=0 if z_h is None else T,
            gates=bias.new_empty(T, N, GH, dtype=compute) if z_h is None else z_h,
            x=bias.to(compute) if z_x is None else z_x, c=c, c_below=cells, c0=None, scale=None,
            taps=None if last else h.unsqueeze(2), out=h if last else None,
        )  # fmt: skip
        self.kernels.forward(step)
        return h, h if c is None else c


class Kernels(NamedTuple):
    """Dense kernels of a network, arranged by :func:`prepare`, and how to compute with them."""

    weight_x: Tensor  # (GH, k·C), oldest tap first, in the dtype of the products
    weight_h: Tensor  # (GH, k·H), likewise
    oldest: Tensor  # (GH, (k−1)·H), all taps but the newest, packed for a row of every layer but the first
    newest: Any  # (GH, H), packed for `add`
    weight_x_single: Any  # weight_x, packed for `add`
    bias: Tensor  # (GH,), in the dtype of gates and cells: float32 at least
    spec: TrellisSpec
    product: products.Product
    add: Callable[[Tensor, Tensor, Any], None]  # (target, rows, weight): target += rows · weightᵀ, one row per sequence
    gates: ModuleType | None  # gate kernels; None for the activation of the reference

    @property
    def cell(self) -> Cell:
        return Cell(self.bias, self.spec.activation, self.weight_h.dtype, self.gates)


class Stream(NamedTuple):
    """State between two pieces, of constant size.

    Args:
        kernels: kernels of the network when the stream was started.
        x: the last (k−1)·max(d) steps of the input, (·, N, C).
        h: for every layer but the first, the last (k−1)·d steps of the layer below, ((k−1)·d, N, H) each, in the dtype
            of the products.
        c: likewise the last d steps of its cell, (d, N, H) each.
        layers: number of layers computed for the last piece; fewer than all of them after an early exit.
    """

    kernels: Kernels
    x: Tensor
    h: tuple[Tensor, ...]
    c: tuple[Tensor, ...]
    layers: int = 0


def choose(
    bias: Tensor, activation: Activation, execution: Execution
) -> tuple[torch.dtype, products.Product, ModuleType | None]:
    """Return the dtype of the products, the product and the gate kernels for a network with this bias.

    Within `torch.autocast` the products are in its dtype.
    """
    device, compute, kernels = bias.device, bias.dtype, None
    if torch.is_autocast_enabled(device.type) and compute != torch.float64:
        compute = torch.get_autocast_dtype(device.type)
    if activation.name in eager.FUNCTIONS:
        kernels = gates_of(execution.gates, device, compute, activation.name)
    return compute, products.resolve(execution.gemm, device, compute), kernels


def prepare(weights: Weights, spec: TrellisSpec, execution: Execution, batch_size: int) -> Kernels:
    """Arrange the kernels for streams of `batch_size` sequences; arguments as in :func:`trellisnet.ops.trellis`."""
    activation = spec.activation
    spec.check_kernel(weights[1])
    if spec.kernel_groups is not None:
        weights = mixed_group.dense(*weights, spec.kernel_groups, activation.gates)
    weight_x, weight_h, bias = weights
    compute, product, gate_kernels = choose(bias, activation, execution)

    def arranged(weight):  # a copy, so that later training steps do not change a stream
        return weight.detach().transpose(1, 2).flatten(1).to(compute, copy=True)

    H, k = weight_h.shape[1:]
    w = arranged(weight_h)
    # Contiguous now, because each product would copy a strided one.
    oldest, newest = w[:, : (k - 1) * H].contiguous(), w[:, (k - 1) * H :].contiguous()
    w_x = arranged(weight_x)
    if gate_kernels is compiled and batch_size <= compiled.FEW:
        add, pack = compiled.add_product, compiled.pack
    else:
        single = products.for_single_rows(bias.device, compute, product)
        add = partial(products.add_product, product=single)
        pack = partial(products.pack, rows=batch_size, product=single)
    oldest = products.pack(oldest, (spec.num_layers - 1) * batch_size, product)
    bias = bias.detach().to(torch.promote_types(bias.dtype, torch.float32), copy=True)
    return Kernels(w_x, w, oldest, pack(newest), pack(w_x), bias, spec, product, add, gates=gate_kernels)


def start(kernels: Kernels, batch_size: int) -> Stream:
    """Return the stream before its first step: zeros."""
    k, dilations = kernels.spec.kernel_size, kernels.spec.dilations
    H = kernels.weight_h.size(1) // k

    def zeros(steps, channels, dtype=None):
        return kernels.bias.new_zeros(steps, batch_size, channels, dtype=dtype)

    above = dilations[1:]
    return Stream(
        kernels,
        zeros((k - 1) * max(dilations), kernels.weight_x.size(1) // k),
        tuple(zeros((k - 1) * d, H, kernels.weight_h.dtype) for d in above),
        tuple(zeros(d, H) for d in above),
    )


def _usable(kernels: Kernels, x: Tensor) -> Kernels:
    """Return the kernels, limited to torch's own operations while torch traces this code or Python intercepts them.

    Raises:
        ValueError: x is of a class that carries out operations in Python; a stream updates plain tensors in place.
    """
    if not traced() and not intercepted():
        if dispatches(x):
            raise ValueError(f"x: a stream cannot read tensors of class {type(x).__name__}; pass plain tensors")
        return kernels
    H = kernels.weight_h.size(1) // kernels.spec.kernel_size
    oldest, newest, product = kernels.weight_h[:, :-H], kernels.weight_h[:, -H:], products.ROUTES["mm"]
    return kernels._replace(
        oldest=oldest, newest=newest, weight_x_single=kernels.weight_x, product=product,
        add=partial(products.add_product, product=product), gates=None,
    )  # fmt: skip


def _taps(rows: Tensor, k: int, d: int, steps: int) -> Tensor:
    """Gather what the k taps of the last `steps` rows read, oldest first, (steps, N, k·channels)."""
    first = rows.size(0) - steps - (k - 1) * d
    return torch.cat([rows[first + j * d : first + j * d + steps] for j in range(k)], dim=2)


def _x_tilde(kernels: Kernels, x: Tensor, k: int, steps: int) -> dict[int, Tensor]:
    """Compute x̃ of the last `steps` of x, (steps, N, GH), for every dilation of a layer that x enters."""
    x, bias = x.to(kernels.weight_x.dtype), kernels.bias.to(kernels.weight_x.dtype)
    return {
        d: F.linear(_taps(x, k, d, steps), kernels.weight_x, bias)
        for d in set(kernels.spec.dilations[:: kernels.spec.inject_every])
    }


def _product(product: products.Product, rows: Tensor, weight: Tensor) -> Tensor:
    """Return rows (…, K) · weightᵀ."""
    return product(rows.flatten(0, -2), weight).unflatten(0, rows.shape[:-1])


def _moved(below: Tensor, above: Tensor, channels: int) -> float:
    """Return how much the last `channels` of h change from one layer to the next, relative to their norm."""
    a, b = (h[:, :, h.size(2) - channels :].float() for h in (below, above))
    return (torch.linalg.vector_norm(b - a) / torch.linalg.vector_norm(b)).item()


@torch.no_grad()
def piece(x: Tensor, stream: Stream, tolerance: float = 0.0) -> tuple[Tensor, Tensor, Stream]:
    """Read the next steps of a sequence.

    Args:
        x: (N, T, C), T ≥ 1.
        stream: the stream after the steps before; it is left unchanged.
        tolerance: above 0, stop at the first layer whose output changes by less than this share of its norm, over the
            whole piece, and assume that all layers above hold the same h and c.

    Returns:
        h and c of the last layer, (N, T, H), float32 at least; and the stream after these steps.
    """
    kernels, spec = _usable(stream.kernels, x), stream.kernels.spec
    cell = kernels.cell
    T, k, last = x.size(1), spec.kernel_size, spec.num_layers - 1
    x = torch.cat([stream.x, x.transpose(0, 1)])
    x_tilde = _x_tilde(kernels, x, k, T)
    new_h, new_c = [], []
    h = c = None
    layers, settled = 1, False
    for i, d in enumerate(spec.dilations):
        z_x = x_tilde[d] if spec.injected(i) else None
        if i == 0:  # the layer below is zero
            h, c = cell(z_x, None, None, last=i == last)
            continue
        below, cells = torch.cat([stream.h[i - 1], h]), torch.cat([stream.c[i - 1], c])
        new_h.append(below[T:].clone())
        new_c.append(cells[T:].clone())
        if settled:
            continue
        z_h = _product(kernels.product, _taps(below, k, d, T), kernels.weight_h)
        before, (h, c) = h, cell(z_x, z_h, cells[:T], last=i == last)
        layers = i + 1
        # x climbs one group per layer, and changes no output before it has reached the last one.
        settled = tolerance > 0 and i >= (spec.kernel_groups or 1) and _moved(before, h, spec.output_size) < tolerance
    rest = stream._replace(x=x[T:].clone(), h=tuple(new_h), c=tuple(new_c), layers=layers)
    return h.to(kernels.bias.dtype).transpose(0, 1), c.transpose(0, 1), rest


def _shift(rows: Tensor, row: Tensor) -> Tensor:
    """Drop the oldest row and append `row`."""
    return row if rows.size(0) == 1 else torch.cat([rows[1:], row])


@torch.no_grad()
def step(x: Tensor, stream: Stream) -> tuple[Tensor, Tensor, Stream, int]:
    """Read a single step: one product for the old taps of all layers, then one per layer for its newest tap.

    Args:
        x: (N, C).
        stream: the stream after the steps before; it is left unchanged.

    Returns:
        h and c of the last layer, (N, H), float32 at least; the stream after this step; number of layer-steps computed.
    """
    kernels, spec = _usable(stream.kernels, x), stream.kernels.spec
    cell = kernels.cell
    k, last = spec.kernel_size, spec.num_layers - 1
    x = torch.cat([stream.x, x.unsqueeze(0)])
    x_tilde, low = {}, x.to(kernels.weight_x.dtype)
    for d in set(spec.dilations[:: spec.inject_every]):
        x_tilde[d] = kernels.bias.to(low.dtype).repeat(1, x.size(1), 1)  # (1, N, GH)
        kernels.add(x_tilde[d][0], _taps(low, k, d, 1)[0], kernels.weight_x_single)
    above = spec.dilations[1:]
    # Tap j is row j·d of the rows that a layer keeps.
    old = [rows[::d] for rows, d in zip(stream.h, above, strict=True)]
    z_old = ()  # (1, N, GH) for every layer but the first
    if old:
        taps = torch.stack(old).transpose(1, 2).flatten(2)  # (layers − 1, N, (k−1)·H)
        z_old = _product(kernels.product, taps, kernels.oldest).unsqueeze(1).unbind(0)
    new_h, new_c, layer_steps = [], [], 0
    h = c = None
    for i, d in enumerate(spec.dilations):
        z_x = x_tilde[d] if spec.injected(i) else None
        layer_steps += 1
        if i == 0:
            h, c = cell(z_x, None, None, last=i == last)
            continue
        new_h.append(_shift(stream.h[i - 1], h))
        new_c.append(_shift(stream.c[i - 1], c))
        z_h = z_old[i - 1]
        kernels.add(z_h[0], h[0], kernels.newest)
        h, c = cell(z_x, z_h, stream.c[i - 1][:1], last=i == last)
    stream = stream._replace(x=x[1:].clone(), h=tuple(new_h), c=tuple(new_c), layers=layer_steps)
    return h[0], c[0], stream, layer_steps
