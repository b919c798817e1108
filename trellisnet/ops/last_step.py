"""The trellis restricted to the layer-steps that the requested outputs depend on, in differentiable operations.

:mod:`trellisnet.ops.pruning` determines these layer-steps. The equation is that of :mod:`trellisnet.ops.reference`.
This replaces the reference for the last time step alone, and the fused operator differentiates it for second and
higher derivatives.

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
    """Gather the k taps of every position, oldest first, (N, S, k·channels)."""
    return torch.cat([pruning.take(source, read, left, dim=1) for read in reads], dim=2)


def _linear(z: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """Return z + rows · weight, (N, S, GH); z has that shape or (GH,)."""
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
    """Yield (h, c) of every layer at its positions, from the lowest layer up, (N, S, H) each.

    Args:
        plan: positions of every layer.
        x_tilde: x̃, bias included, for every dilation of `plan.x`, (N, P, GH).
        weight_h: (k·H, GH), oldest tap first.
        bias: (GH,).
        state: (h, c) to the left of the first time step, (N, H) each.
        scale: factor on the hidden input, (N, H), or None.
        activation: activation of a layer.
    """
    h0, c0 = (s.unsqueeze(1) for s in state)  # (N, 1, H)

    def masked(h):
        return h if scale is None else h * scale.unsqueeze(1)

    def gates(z_x, rows=None, c_shifted=None):
        """Return (h, c), (N, S, H) each; z_x is x̃ (N, S, GH) or (GH,), and None stands for zeros."""
        c_shifted = bias.new_zeros(()) if c_shifted is None else c_shifted
        if activation.additive:  # x̃ is added within the product
            z = z_x if rows is None else _linear(z_x, rows, weight_h)
            return activation.function(z, bias.new_zeros(()), c_shifted, dim=2)
        z_h = torch.zeros_like(z_x) if rows is None else _linear(torch.zeros_like(bias), rows, weight_h)
        return activation.function(z_x.expand_as(z_h), z_h, c_shifted, dim=2)

    def x_tilde_of(layer, first=0, last=None):
        return bias if layer.x is None else pruning.rows(x_tilde[layer.dilation], layer.x, first, last, dim=1)

    h_carried = masked(h0)
    first, *above = plan.layers
    # Layer 0 is zero, with the carried state to its left. At least one position reads both, so that autograd returns a
    # gradient, if only zero, for the state and the hidden kernel even if no output depends on them.
    edge = max(1, first.edge)
    zero = torch.zeros_like(h0)

    def layer_0(read, left):
        count = min(read.left, edge)
        return torch.cat([left.expand(-1, count, -1), zero.expand(-1, edge - count, -1)], dim=1)

    rows = torch.cat([layer_0(read, h_carried) for read in first.taps], dim=2)
    parts = [gates(x_tilde_of(first, 0, edge), rows, layer_0(first.cell, c0))]
    if edge < first.size:
        parts.append(gates(x_tilde_of(first, edge)))  # these positions read zeros only
    h, c = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    yield h, c
    for layer in above:
        h, c = gates(x_tilde_of(layer), _taps(masked(h), layer.taps, h_carried), pruning.take(c, layer.cell, c0, dim=1))
        yield h, c


def last_step(
    x: Tensor,
    weights: Weights,
    state: tuple[Tensor, Tensor],
    spec: TrellisSpec,
    hidden_scale: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor], int]:
    """Run the trellis for the last time step alone, on any device, differentiable in every tensor.

    Arguments as in :func:`trellisnet.ops.trellis`.

    Returns:
        output (N, 1, output_size), (h, c) of the last layer at the last step, number of layer-steps computed.
    """
    (N, L, C), H = x.shape, state[0].size(1)
    plan = pruning.plan(L, spec, L - 1, x.device)
    *kernels, bias = weights
    weight_x, weight_h = (w.transpose(1, 2).flatten(1).t() for w in kernels)  # (k·C, GH), (k·H, GH)
    zero = x.new_zeros(N, 1, C)
    x_tilde = {d: _linear(bias, _taps(x, reads, zero), weight_x) for d, reads in plan.x.items()}
    scale = None if hidden_scale is None else hidden_scale.squeeze(2)
    layer_steps = 0
    for h, c in layers(plan, x_tilde, weight_h, bias, state, scale, spec.activation):  # noqa: B007
        layer_steps += h.size(1)
    return h[:, :, H - spec.output_size :], (h[:, 0], c[:, 0]), layer_steps
