r"""The trellis of the paper, written to be read beside it.

With :math:`z = (c, h)` (the paper's :math:`z_{\cdot,1}` and :math:`z_{\cdot,2}`), dilation d and layer
:math:`i = 0, 1, \dots` (section 5.1, Eq. 19 and the gated activation f; Appendix B.2 for d > 1):

.. math::
    \tilde x &= \mathrm{Conv1D}(x; W^x) + b                                            \\
    \hat z^{(i+1)} &= \mathrm{Conv1D}(h^{(i)}; W^h) + \tilde x                         \\
    c^{(i+1)}_t &= \sigma(\hat z_f) \circ c^{(i)}_{t-d} + \sigma(\hat z_i) \circ \tanh(\hat z_g) \\
    h^{(i+1)}_t &= \sigma(\hat z_o) \circ \tanh(c^{(i+1)}_t)

starting from :math:`z^{(0)} = 0`. W and b are the same in every layer, and x enters every layer through
:math:`\tilde x`, which is therefore computed once for each distinct dilation.

LSTM gates are the paper's choice; the other activations :math:`h, c = f(\tilde x, \mathrm{Conv1D}(h; W^h), c_{t-d})`
are below. With `inject_every` = K, x enters layers 1, 1 + K, 1 + 2K, … and b all of them (Table 6). With
`kernel_groups` the kernel is that of Theorem 1, see :mod:`trellisnet.ops.mixed_group`.

To the left of the first time step lie zeros for x and, in **every** layer, the same carried h and c: those of the last
layer at the last step of the previous segment (Appendix B.1, "history repackaging"). Two segments with a carried state
are therefore *not* the same as one long segment; only truncated recurrent networks (Theorem 1) have that property.

Letters: N batch, L length, C input channels, H hidden channels, G gates (4 for an LSTM), k kernel size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from trellisnet.ops import mixed_group
from trellisnet.ops.spec import Activation, TrellisSpec, Weights


def lstm(z_x: Tensor, z_h: Tensor, c_shifted: Tensor, dim: int = 1) -> tuple[Tensor, Tensor]:
    """LSTM gates (section 5.1, Appendix A) in the published order i, o, g, f, from z_x = x̃ and z_h = Conv1D(h)."""
    z_i, z_o, z_g, z_f = (z_x + z_h).chunk(4, dim)
    c = torch.sigmoid(z_f) * c_shifted + torch.sigmoid(z_i) * torch.tanh(z_g)
    return torch.sigmoid(z_o) * torch.tanh(c), c


def gru(z_x: Tensor, z_h: Tensor, c_shifted: Tensor, dim: int = 1) -> tuple[Tensor, Tensor]:
    """GRU gates (Appendix B.1, "gated activations"), in the order r, u, n; c is h itself.

    r scales the output of the kernel, as in `nn.GRU`, and so all its taps, also those on the group below: with several
    groups this is not a stack of GRUs.
    """
    (x_r, x_u, x_n), (h_r, h_u, h_n) = z_x.chunk(3, dim), z_h.chunk(3, dim)
    n = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
    u = torch.sigmoid(x_u + h_u)
    h = u * c_shifted + (1 - u) * n
    return h, h


def tanh(z_x: Tensor, z_h: Tensor, c_shifted: Tensor, dim: int = 1) -> tuple[Tensor, Tensor]:
    """Ungated activation (Theorem 1 with g = tanh); c is h itself, and nothing reads it."""
    h = torch.tanh(z_x + z_h)
    return h, h


ACTIVATIONS = {
    "lstm": Activation("lstm", gates=4, has_cell=True, additive=True, function=lstm, forget_gate=3),
    "gru": Activation("gru", gates=3, has_cell=False, additive=False, function=gru),
    "tanh": Activation("tanh", gates=1, has_cell=False, additive=True, function=tanh),
}


def trellis(
    x: Tensor,
    weights: Weights,
    state: tuple[Tensor, Tensor],
    spec: TrellisSpec,
    *,
    aux_every: int | None = None,
    hidden_scale: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor], list[Tensor]]:
    """Run all layers, on any device and in any dtype, differentiable in every tensor.

    Arguments as in :func:`trellisnet.ops.trellis`.
    """
    h0, c0 = (s.unsqueeze(2) for s in state)  # (N, H, 1)
    weight_x, weight_h, bias = weights
    (N, L, _), H, k, output_size = x.shape, h0.size(1), spec.kernel_size, spec.output_size
    f, gates, kernel_groups = spec.activation.function, spec.activation.gates, spec.kernel_groups
    x = x.transpose(1, 2)  # (N, C, L)

    def conv_x(x, d):
        if kernel_groups is not None:
            return mixed_group.conv_x(x, weight_x, bias, d, kernel_groups, gates)
        return F.conv1d(x, weight_x, bias, dilation=d)

    def conv_h(h, d):
        if kernel_groups is not None:
            return mixed_group.conv_h(h, weight_h, d, kernel_groups, gates)
        return F.conv1d(h, weight_h, dilation=d)

    injected = set(spec.dilations[:: spec.inject_every])
    x_tilde = {d: conv_x(F.pad(x, ((k - 1) * d, 0)), d) for d in injected}  # (N, GH, L)
    no_x = bias if kernel_groups is None else mixed_group.by_gate(bias, kernel_groups, gates, 0)
    no_x = no_x.view(1, -1, 1)
    h = c = x.new_zeros(N, H, L)
    aux = []
    for layer, d in enumerate(spec.dilations, start=1):
        h_padded = torch.cat([h0.expand(-1, -1, (k - 1) * d), h], dim=2)  # (N, H, (k-1)d + L)
        if hidden_scale is not None:
            h_padded = h_padded * hidden_scale  # one mask for all layers and all time steps
        c_shifted = torch.cat([c0.expand(-1, -1, d), c], dim=2)[:, :, :L]  # c at t - d; (N, H, L)
        z_x = x_tilde[d] if spec.injected(layer - 1) else no_x  # (N, GH, L) or (1, GH, 1)
        h, c = f(z_x, conv_h(h_padded, d), c_shifted)

        if aux_every is not None and layer % aux_every == 0:
            aux.append(h[:, H - output_size :].transpose(1, 2))  # (N, L, output_size)

    output = h[:, H - output_size :].transpose(1, 2)  # (N, L, output_size)
    if aux_every is not None and spec.num_layers % aux_every == 0:
        aux[-1] = aux[-1].clone()  # not the memory of the output, which the caller may change in place
    if lengths is None:
        return output, (h[:, :, -1], c[:, :, -1]), aux
    last = (lengths - 1).view(N, 1, 1).expand(-1, H, 1)
    return output, (h.gather(2, last).squeeze(2), c.gather(2, last).squeeze(2)), aux
