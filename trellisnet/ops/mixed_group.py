r"""The mixed group convolution of Theorem 1 (Eq. 5): the sparse kernel that turns a trellis into a recurrent network.

The H channels form as many groups as the recurrent network has layers. Group g reads its own **past** taps and the
**current** tap of group g − 1; the first group, with none below it, reads x instead, through all taps of W^x:

.. math::
    \hat z^{(g)}_t = \sum_{j=1}^{k-1} W^{past}_{g,j} h^{(g)}_{t-jd} + b^{(g)} +
    \begin{cases} \mathrm{Conv1D}(x; W^x)_t & g = 1 \\ W^{below}_g h^{(g-1)}_t & g > 1 \end{cases}

The rows of every kernel and of the bias run group by group, and gate by gate within a group, as a group convolution
needs them. The outputs of this module are ordered gate by gate, as the activations need them.

Letters: N batch, L length, H hidden channels, h = H/groups, G gates, k kernel size, d dilation.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def by_gate(z: Tensor, groups: int, gates: int, dim: int = 1) -> Tensor:
    """Reorder the rows in dimension `dim` from group by group to gate by gate."""
    return z.unflatten(dim, (groups, gates, -1)).transpose(dim, dim + 1).flatten(dim, dim + 2)


def conv_x(x: Tensor, weight_x: Tensor, bias: Tensor, d: int, groups: int, gates: int) -> Tensor:
    """Compute x̃: the convolution of x, for the first group, plus the bias, for all groups.

    Args:
        x: (N, C, (k−1)·d + L).
        weight_x: (G·h, C, k).
        bias: (G·H,).

    Returns:
        (N, G·H, L).
    """
    z = F.conv1d(x, weight_x, dilation=d)
    return by_gate(F.pad(z, (0, 0, 0, bias.numel() - z.size(1))) + bias.unsqueeze(1), groups, gates)


def conv_h(h: Tensor, weight_h: Tensor, d: int, groups: int, gates: int) -> Tensor:
    """Convolve the hidden sequence.

    Args:
        h: (N, H, (k−1)·d + L).
        weight_h: (G·H, h, k). The last tap reads the group below, the others their own group; the first group's last
            tap is unused.

    Returns:
        (N, G·H, L).
    """
    width, k = weight_h.shape[1:]
    first = weight_h.size(0) // groups  # rows of the first group
    z = F.conv1d(h[:, :, :-d], weight_h[:, :, :-1], dilation=d, groups=groups)
    if groups > 1:
        below = F.conv1d(h[:, :-width, (k - 1) * d :], weight_h[first:, :, -1:], groups=groups - 1)
        z = z + F.pad(below, (0, 0, first, 0))
    return by_gate(z, groups, gates)


def dense(weight_x: Tensor, weight_h: Tensor, bias: Tensor, groups: int, gates: int) -> tuple[Tensor, Tensor, Tensor]:
    """Fill in the zeros of both kernels, (G·H, C, k) and (G·H, H, k), and order them and the bias gate by gate."""
    width, k = weight_h.shape[1:]
    blocks = weight_h.unflatten(0, (groups, -1))  # (groups, G·h, h, k)
    full = blocks.new_zeros(groups, blocks.size(1), groups, width, k)  # (row group, rows, column group, columns, k)
    group = torch.arange(groups, device=blocks.device)
    full[group, :, group, :, :-1] = blocks[..., :-1]
    full[group[1:], :, group[:-1], :, -1] = blocks[1:, ..., -1]
    full = full.flatten(2, 3).flatten(0, 1)  # (G·H, H, k)
    weight_x = F.pad(weight_x, (0, 0, 0, 0, 0, weight_h.size(0) - weight_x.size(0)))
    return by_gate(weight_x, groups, gates, 0), by_gate(full, groups, gates, 0), by_gate(bias, groups, gates, 0)
