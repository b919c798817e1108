r"""A sequence in pieces, of any length, with nothing computed twice and constant memory.

Every layer reads the one below at most (k−1)·d steps back (its cell path d steps), so those last rows of every layer,
and the last rows of x, are all that a next piece needs. The pieces together are one long pass from a zero state,
position by position. That is not "history repackaging", which gives every layer the rows of the last one.

Any kind of layer, without gradients; the equation is that of :mod:`trellisnet.ops.reference`. Time comes first, and
products are those of :mod:`trellisnet.ops.gemm`, as in :mod:`trellisnet.ops.fused`.

Letters: N batch, T steps of a piece, C input channels, H hidden channels, G gates, k kernel size, d dilation of a
layer.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trellisnet.ops import gemm as products
from trellisnet.ops import mixed_group
from trellisnet.ops.reference import ACTIVATIONS, GATES


class Kernels(NamedTuple):
    """Dense kernels and settings of a network, as :func:`prepare` arranges them."""

    weight_x: Tensor  # (GH, k·C), oldest tap first
    weight_h: Tensor  # (GH, k·H), likewise, in the type of the products
    bias: Tensor  # (GH,)
    kernel_size: int
    dilations: tuple[int, ...]  # of every layer
    activation: str
    inject_every: int
    product: products.Product


class Stream(NamedTuple):
    """What is remembered of a sequence, all of constant size.

    Args:
        kernels: those of the network when the stream was begun.
        x: the last (k−1)·max(d) steps of the input, (·, N, C).
        h: for every layer but the first, the last (k−1)·d steps of the layer below, ((k−1)·d, N, H) each.
        c: likewise the last d steps of its cell, (d, N, H) each.
    """

    kernels: Kernels
    x: Tensor
    h: tuple[Tensor, ...]
    c: tuple[Tensor, ...]


def prepare(
    weight_x: Tensor,
    weight_h: Tensor,
    bias: Tensor,
    *,
    num_layers: int,
    dilation: Sequence[int],
    activation: str = "lstm",
    kernel_groups: int | None = None,
    inject_every: int = 1,
    gemm: str = "auto",
) -> Kernels:
    """Arguments as in :func:`trellisnet.ops.trellis`. Within `torch.autocast` the products are in its type."""
    if kernel_groups is not None:
        weight_x, weight_h, bias = mixed_group.dense(weight_x, weight_h, bias, kernel_groups, GATES[activation])
    device = bias.device
    compute = bias.dtype
    if torch.is_autocast_enabled(device.type) and compute != torch.float64:
        compute = torch.get_autocast_dtype(device.type)

    def arranged(weight, dtype):
        return weight.detach().transpose(1, 2).flatten(1).to(dtype, copy=True)  # a copy that stays as it is

    return Kernels(
        arranged(weight_x, bias.dtype),
        arranged(weight_h, compute),
        bias.detach().clone(),
        weight_h.size(2),
        tuple(dilation[i % len(dilation)] for i in range(num_layers)),
        activation,
        inject_every,
        products.resolve(gemm, device, compute),
    )


def start(kernels: Kernels, batch_size: int) -> Stream:
    """The stream before its first step: zeros."""
    k = kernels.kernel_size
    H = kernels.weight_h.size(1) // k

    def zeros(steps, channels):
        return kernels.bias.new_zeros(steps, batch_size, channels)

    above = kernels.dilations[1:]
    return Stream(
        kernels,
        zeros((k - 1) * max(kernels.dilations), kernels.weight_x.size(1) // k),
        tuple(zeros((k - 1) * d, H) for d in above),
        tuple(zeros(d, H) for d in above),
    )


def _taps(rows: Tensor, k: int, d: int, steps: int) -> Tensor:
    """What the k taps of the last `steps` rows read, oldest first, (steps, N, k·channels)."""
    first = rows.size(0) - steps - (k - 1) * d
    return torch.cat([rows[first + j * d : first + j * d + steps] for j in range(k)], dim=2)


def _x_tilde(kernels: Kernels, x: Tensor, k: int, steps: int) -> dict[int, Tensor]:
    """x̃ of the last `steps` of x for every dilation of a layer that x enters, (steps, N, GH)."""
    return {
        d: F.linear(_taps(x, k, d, steps), kernels.weight_x, kernels.bias)
        for d in set(kernels.dilations[:: kernels.inject_every])
    }


def _product(kernels: Kernels, rows: Tensor, weight: Tensor) -> Tensor:
    """rows (…, K) · weightᵀ, in the type of the cells."""
    z = kernels.product(rows.flatten(0, -2).to(weight.dtype), weight)
    return z.to(kernels.bias.dtype).unflatten(0, rows.shape[:-1])


@torch.no_grad()
def piece(x: Tensor, stream: Stream) -> tuple[Tensor, Tensor, Stream]:
    """The next steps of a sequence.

    Args:
        x: (N, T, C), T ≥ 1.
        stream: of the steps before.

    Returns:
        h and c of the last layer, (N, T, H); the stream to go on from. `stream` itself is left as it is.
    """
    kernels = stream.kernels
    f, T, k = ACTIVATIONS[kernels.activation], x.size(1), kernels.kernel_size
    x = torch.cat([stream.x, x.transpose(0, 1)])
    x_tilde = _x_tilde(kernels, x, k, T)
    new_h, new_c = [], []
    h = c = None
    for i, d in enumerate(kernels.dilations):
        z_x = x_tilde[d] if i % kernels.inject_every == 0 else kernels.bias
        if i == 0:  # the layer below is zero
            zero = z_x.new_zeros(()).expand_as(z_x)
            h, c = f(z_x, zero, z_x.new_zeros(()), dim=2)
            continue
        below, cells = torch.cat([stream.h[i - 1], h]), torch.cat([stream.c[i - 1], c])
        z_h = _product(kernels, _taps(below, k, d, T), kernels.weight_h)
        h, c = f(z_x.expand_as(z_h), z_h, cells[:T], dim=2)
        new_h.append(below[T:].clone())
        new_c.append(cells[T:].clone())
    return h.transpose(0, 1), c.transpose(0, 1), Stream(kernels, x[T:].clone(), tuple(new_h), tuple(new_c))


@torch.no_grad()
def step(x: Tensor, stream: Stream) -> tuple[Tensor, Tensor, Stream, int]:
    """The next single step: one product for the old taps of all layers, then one a layer for its newest.

    Args:
        x: (N, C).
        stream: of the steps before.

    Returns:
        h and c of the last layer, (N, H); the stream to go on from; the layer-steps computed.
    """
    kernels = stream.kernels
    f, k = ACTIVATIONS[kernels.activation], kernels.kernel_size
    H = kernels.weight_h.size(1) // k
    x = torch.cat([stream.x, x.unsqueeze(0)])
    x_tilde = {d: z.squeeze(0) for d, z in _x_tilde(kernels, x, k, 1).items()}  # (N, GH)
    above = kernels.dilations[1:]
    # Of what a layer remembers, tap j of k is row j·d.
    old = [torch.cat([rows[j * d] for j in range(k - 1)], dim=1) for rows, d in zip(stream.h, above, strict=True)]
    z_old = _product(kernels, torch.stack(old), kernels.weight_h[:, :-H]) if old else None  # (layers − 1, N, GH)
    new_h, new_c, layer_steps = [], [], 0
    h = c = None
    for i, d in enumerate(kernels.dilations):
        z_x = x_tilde[d] if i % kernels.inject_every == 0 else kernels.bias
        layer_steps += 1
        if i == 0:
            h, c = f(z_x, torch.zeros_like(z_x), z_x.new_zeros(()), dim=1)
            continue
        new_h.append(torch.cat([stream.h[i - 1][1:], h.unsqueeze(0)]))
        new_c.append(torch.cat([stream.c[i - 1][1:], c.unsqueeze(0)]))
        z_h = _product(kernels, h, kernels.weight_h[:, -H:]).add_(z_old[i - 1])
        h, c = f(z_x.expand_as(z_h), z_h, stream.c[i - 1][0], dim=1)
    return h, c, Stream(kernels, x[1:].clone(), tuple(new_h), tuple(new_c)), layer_steps
