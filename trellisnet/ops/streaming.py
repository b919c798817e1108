r"""A sequence in pieces, of any length, with nothing computed twice and constant memory.

Every layer reads the one below at most (k−1)·d steps back (its cell path d steps), so those last rows of every layer,
and the last rows of x, are all that a next piece needs. The pieces together are one long pass from a zero state,
position by position. That is not "history repackaging", which gives every layer the rows of the last one.

Any kind of layer, without gradients; the equation is that of :mod:`trellisnet.ops.reference`.

Letters: N batch, T steps of a piece, C input channels, H hidden channels, G gates, k kernel size, d dilation of a
layer.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trellisnet.ops import mixed_group
from trellisnet.ops.reference import ACTIVATIONS, GATES


class Kernels(NamedTuple):
    """Dense kernels and settings of a network, as :func:`prepare` arranges them."""

    weight_x: Tensor  # (k, C, GH)
    weight_h: Tensor  # (k, H, GH)
    bias: Tensor  # (GH,)
    dilations: tuple[int, ...]  # of every layer
    activation: str
    inject_every: int


class Stream(NamedTuple):
    """What is remembered of a sequence, all of constant size.

    Args:
        kernels: those of the network when the stream was begun.
        x: the last (k−1)·max(d) steps of the input, (N, ·, C).
        h: for every layer but the first, the last (k−1)·d steps of the layer below, (N, (k−1)·d, H) each.
        c: likewise the last d steps of its cell, (N, d, H) each.
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
) -> Kernels:
    """Arguments as in :func:`trellisnet.ops.trellis`."""
    if kernel_groups is not None:
        weight_x, weight_h, bias = mixed_group.dense(weight_x, weight_h, bias, kernel_groups, GATES[activation])
    dilations = tuple(dilation[i % len(dilation)] for i in range(num_layers))
    layout = {"memory_format": torch.contiguous_format}
    weight_x, weight_h = (w.detach().permute(2, 1, 0).clone(**layout) for w in (weight_x, weight_h))
    return Kernels(weight_x, weight_h, bias.detach().clone(), dilations, activation, inject_every)


def start(kernels: Kernels, batch_size: int) -> Stream:
    """The stream before its first step: zeros."""
    k, H = kernels.weight_h.shape[:2]

    def zeros(steps, channels):
        return kernels.bias.new_zeros(batch_size, steps, channels)

    above = kernels.dilations[1:]
    return Stream(
        kernels,
        zeros((k - 1) * max(kernels.dilations), kernels.weight_x.size(1)),
        tuple(zeros((k - 1) * d, H) for d in above),
        tuple(zeros(d, H) for d in above),
    )


def _x_tilde(kernels: Kernels, x: Tensor, steps: int) -> dict[int, Tensor]:
    """x̃ of the last `steps` of x for every dilation of a layer that x enters, (N, steps, GH)."""
    k, length = kernels.weight_x.size(0), x.size(1)
    return {
        d: kernels.bias
        + sum(x[:, length - steps - (k - 1 - j) * d : length - (k - 1 - j) * d] @ kernels.weight_x[j] for j in range(k))
        for d in set(kernels.dilations[:: kernels.inject_every])
    }


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
    f, T, k = ACTIVATIONS[kernels.activation], x.size(1), kernels.weight_h.size(0)
    x = torch.cat([stream.x, x], dim=1)
    x_tilde = _x_tilde(kernels, x, T)
    new_h, new_c = [], []
    h = c = None
    for i, d in enumerate(kernels.dilations):
        z_x = x_tilde[d] if i % kernels.inject_every == 0 else kernels.bias.view(1, 1, -1)
        if i == 0:  # the layer below is zero
            zero = z_x.new_zeros(()).expand_as(z_x)
            h, c = f(z_x, zero, z_x.new_zeros(()), dim=2)
            continue
        below, cells = torch.cat([stream.h[i - 1], h], dim=1), torch.cat([stream.c[i - 1], c], dim=1)
        z_h = sum(below[:, j * d : j * d + T] @ kernels.weight_h[j] for j in range(k))
        h, c = f(z_x, z_h, cells[:, :T], dim=2)
        new_h.append(below[:, T:].clone())
        new_c.append(cells[:, T:].clone())
    return h, c, Stream(kernels, x[:, T:].clone(), tuple(new_h), tuple(new_c))


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
    f, k = ACTIVATIONS[kernels.activation], kernels.weight_h.size(0)
    x = torch.cat([stream.x, x.unsqueeze(1)], dim=1)
    x_tilde = {d: z.squeeze(1) for d, z in _x_tilde(kernels, x, 1).items()}  # (N, GH)
    above = kernels.dilations[1:]
    # Rows of the old taps of every layer but the first: tap j is (k−1−j)·d steps back, row j·d of what is remembered.
    old = [torch.cat([rows[:, j * d] for j in range(k - 1)], dim=1) for rows, d in zip(stream.h, above, strict=True)]
    z_old = torch.stack(old) @ kernels.weight_h[:-1].flatten(0, 1) if old else None  # (layers − 1, N, GH)
    newest = kernels.weight_h[-1]
    new_h, new_c, layer_steps = [], [], 0
    h = c = None
    for i, d in enumerate(kernels.dilations):
        z_x = x_tilde[d] if i % kernels.inject_every == 0 else kernels.bias.unsqueeze(0)
        layer_steps += 1
        if i == 0:
            h, c = f(z_x, torch.zeros_like(z_x), z_x.new_zeros(()), dim=1)
            continue
        new_h.append(torch.cat([stream.h[i - 1][:, 1:], h.unsqueeze(1)], dim=1))
        new_c.append(torch.cat([stream.c[i - 1][:, 1:], c.unsqueeze(1)], dim=1))
        h, c = f(z_x, torch.addmm(z_old[i - 1], h, newest), stream.c[i - 1][:, 0], dim=1)
    return h, c, Stream(kernels, x[:, 1:].clone(), tuple(new_h), tuple(new_c)), layer_steps
