"""The trellis from the layer-steps that the wanted outputs depend on and no others, by differentiable operations.

:mod:`trellisnet.ops.pruning` says which these are, and why every layer keeps a row for each of its positions. The
equation is that of :mod:`trellisnet.ops.reference`, which this replaces for the last time step alone, and which the
fused operator differentiates here more than once.

Letters: N batch, L length, C input channels, H hidden channels, G gates, k kernel size, S positions of a layer, P rows
of x̃.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from trellisnet.ops import pruning
from trellisnet.ops.pruning import Plan
from trellisnet.ops.spec import Activation, TrellisSpec, Weights


def _taps(source: Tensor, reads: Sequence[pruning.Read], left: Tensor) -> Tensor:
    """k rows for every position, oldest first, (N, S, k·channels)."""
    return torch.cat([pruning.take(source, read, left, dim=1) for read in reads], dim=2)


def _linear(z: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """z + rows · weight, (N, S, GH); z of that shape or (GH,)."""
    z = z if z.dim() == 1 else z.flatten(0, 1)
    return torch.addmm(z, rows.flatten(0, 1), weight).unflatten(0, rows.shape[:2])


def layers(
    plan: Plan,
    x_tilde: Mapping[int, Tensor],
    weight_h: Tensor,
    bias: Tensor,
    state: tuple[Tensor, Tensor],
    scale: Tensor | None,
    activation: Activation,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (h, c) of every layer at its positions, from below, (N, S, H) each.

    Args:
        plan: the positions.
        x_tilde: x̃ with its bias for every dilation of `plan.x`, (N, P, GH).
        weight_h: (k·H, GH), oldest tap first.
        bias: (GH,).
        state: (h, c) left of the first time step, (N, H) each.
        scale: factor on the hidden input, (N, H), or None.
        activation: the function of a layer.
    """
    h0, c0 = (s.unsqueeze(1) for s in state)  # (N, 1, H)

    def masked(h):
        return h if scale is None else h * scale.unsqueeze(1)

    def gates(z_x, rows=None, c_shifted=None):
        """(h, c), (N, S, H) each, from x̃ (N, S, GH) or (GH,); rows and c_shifted None: both are zero."""
        c_shifted = bias.new_zeros(()) if c_shifted is None else c_shifted
        if activation.additive:  # the product adds x̃
            z = z_x if rows is None else _linear(z_x, rows, weight_h)
            return activation.function(z, bias.new_zeros(()), c_shifted, dim=2)
        z_h = torch.zeros_like(z_x) if rows is None else _linear(torch.zeros_like(bias), rows, weight_h)
        return activation.function(z_x.expand_as(z_h), z_h, c_shifted, dim=2)

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
    yield h, c
    for layer in above:
        h, c = gates(of_x(layer), _taps(masked(h), layer.taps, h_carried), pruning.take(c, layer.cell, c0, dim=1))
        yield h, c


def last_step(
    x: Tensor,
    weights: Weights,
    state: tuple[Tensor, Tensor],
    spec: TrellisSpec,
    hidden_scale: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor], int]:
    """Any dtype, any device, differentiable in every tensor. Arguments as in :func:`trellisnet.ops.trellis`.

    Returns:
        output (N, 1, output_size), (h, c) of the last layer at the last step, the layer-steps computed.
    """
    (N, L, C), H = x.shape, state[0].size(1)
    plan = pruning.plan(L, spec, L - 1, x.device)
    *kernels, bias = weights
    weight_x, weight_h = (w.transpose(1, 2).flatten(1).t() for w in kernels)  # (k·C, GH), (k·H, GH)
    nothing = x.new_zeros(N, 1, C)
    x_tilde = {d: _linear(bias, _taps(x, reads, nothing), weight_x) for d, reads in plan.x.items()}
    scale = None if hidden_scale is None else hidden_scale.squeeze(2)
    layer_steps = 0
    for h, c in layers(plan, x_tilde, weight_h, bias, state, scale, spec.activation):  # noqa: B007
        layer_steps += h.size(1)
    return h[:, :, H - spec.output_size :], (h[:, 0], c[:, 0]), layer_steps
