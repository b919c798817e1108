"""The last layer at the last time step, from the layer-steps it depends on and no others, by differentiable operations.

Which these are, and why every layer keeps a row for each of its positions, says :mod:`trellisnet.ops.pruning`. The
equation is that of :mod:`trellisnet.ops.reference`.

Letters: N batch, L length, C input channels, H hidden channels, G gates, k kernel size, S positions of a layer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from trellisnet.ops import pruning
from trellisnet.ops.reference import ACTIVATIONS


def last_step(
    x: Tensor,
    weight_x: Tensor,
    weight_h: Tensor,
    bias: Tensor,
    state: tuple[Tensor, Tensor],
    *,
    num_layers: int,
    dilation: Sequence[int],
    output_size: int,
    hidden_scale: Tensor | None = None,
    activation: str = "lstm",
    inject_every: int = 1,
) -> tuple[Tensor, tuple[Tensor, Tensor], int]:
    """Any dtype, any device, differentiable in every tensor. Arguments as in :func:`trellisnet.ops.trellis`.

    Returns:
        output (N, 1, output_size), (h, c) of the last layer at the last step, the layer-steps computed.
    """
    f = ACTIVATIONS[activation]
    h0, c0 = (s.unsqueeze(1) for s in state)  # (N, 1, H)
    (N, L, _), H, k = x.shape, h0.size(2), weight_h.size(2)
    plan = pruning.plan(L, num_layers, tuple(dilation), k, inject_every, L - 1, x.device)
    scale = None if hidden_scale is None else hidden_scale.transpose(1, 2)  # (N, 1, H)
    weight_x, weight_h = (w.transpose(1, 2).flatten(1).t() for w in (weight_x, weight_h))  # (k·C, GH), (k·H, GH)
    layer_steps = 0

    def masked(h):
        return h if scale is None else h * scale

    def taps(source, reads, left):
        """k rows for every position, oldest first, (N, S, k·channels)."""
        return torch.cat([pruning.take(source, read, left, dim=1) for read in reads], dim=2)

    def linear(z, rows, weight):
        """z + rows · weight, (N, S, GH); z of that shape or (GH,)."""
        z = z if z.dim() == 1 else z.flatten(0, 1)
        return torch.addmm(z, rows.flatten(0, 1), weight).unflatten(0, rows.shape[:2])

    def gates(z_x, rows=None, c_shifted=None):
        """(h, c), (N, S, H) each, from x̃ (N, S, GH) or (GH,); rows and c_shifted None: both are zero."""
        nonlocal layer_steps
        if activation == "lstm":  # what is zero is left out, and the product adds x̃
            z = z_x if rows is None else linear(z_x, rows, weight_h)
            layer_steps += z.size(1)
            z_i, z_o, z_g, z_f = z.chunk(4, dim=2)
            c = torch.sigmoid(z_i) * torch.tanh(z_g)
            if c_shifted is not None:
                c = torch.sigmoid(z_f) * c_shifted + c
            return torch.sigmoid(z_o) * torch.tanh(c), c
        z_h = torch.zeros_like(z_x) if rows is None else linear(torch.zeros_like(bias), rows, weight_h)
        layer_steps += z_h.size(1)
        return f(z_x.expand_as(z_h), z_h, z_h.new_zeros(()) if c_shifted is None else c_shifted, dim=2)

    x_tilde = {d: linear(bias, taps(x, reads, x.new_zeros(N, 1, x.size(2))), weight_x) for d, reads in plan.x.items()}

    def of_x(layer, first=0, last=None):
        return bias if layer.x is None else pruning.rows(x_tilde[layer.dilation], layer.x, first, last, dim=1)

    h_carried = masked(h0)
    first, *above = plan.layers
    # Layer 0 is zero, and left of it is the carried state. One position at least reads them, so that there is a
    # gradient, if only zero, for the state and the hidden kernel of a network that never looks left of the sequence.
    edge = max(1, first.edge)
    zero = torch.zeros_like(h0)

    def of_layer_0(read, left):
        count = min(read.left, edge)
        return torch.cat([left.expand(-1, count, -1), zero.expand(-1, edge - count, -1)], dim=1)

    rows = torch.cat([of_layer_0(read, h_carried) for read in first.taps], dim=2)
    parts = [gates(of_x(first, 0, edge), rows, of_layer_0(first.cell, c0))]
    if edge < first.size:
        parts.append(gates(of_x(first, edge)))  # h and c of layer 0 are zero here
    h, c = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    for layer in above:
        h, c = gates(of_x(layer), taps(masked(h), layer.taps, h_carried), pruning.take(c, layer.cell, c0, dim=1))

    return h[:, :, H - output_size :], (h[:, 0], c[:, 0]), layer_steps
