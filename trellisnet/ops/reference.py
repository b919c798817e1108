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

What lies left of the first time step (Appendix B.1, "history repackaging"): zeros for x, and in **every** layer the
same carried h and c, those of the last layer at the last step of the segment before. Two segments with a carried
state are therefore *not* the same as one long segment; only truncated recurrent networks (Theorem 1) have that
property.

Letters: N batch, L length, C input channels, H hidden channels, k kernel size.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def trellis(
    x: Tensor,
    weight_x: Tensor,
    weight_h: Tensor,
    bias: Tensor,
    state: tuple[Tensor, Tensor],
    *,
    num_layers: int,
    dilation: Sequence[int],
    output_size: int,
    aux_every: int | None = None,
    hidden_scale: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor], list[Tensor]]:
    """Any dtype, any device, differentiable in every tensor. Arguments as in :func:`trellisnet.ops.trellis`."""
    h0, c0 = (s.unsqueeze(2) for s in state)  # (N, H, 1)
    (N, L, _), H, k = x.shape, h0.size(1), weight_h.size(2)
    x = x.transpose(1, 2)  # (N, C, L)

    x_tilde = {
        d: F.conv1d(F.pad(x, ((k - 1) * d, 0)), weight_x, bias, dilation=d)  # (N, 4H, L)
        for d in set(dilation[:num_layers])
    }
    h = c = x.new_zeros(N, H, L)
    aux = []
    for layer in range(1, num_layers + 1):
        d = dilation[(layer - 1) % len(dilation)]
        h_padded = torch.cat([h0.expand(-1, -1, (k - 1) * d), h], dim=2)  # (N, H, (k-1)d + L)
        if hidden_scale is not None:
            h_padded = h_padded * hidden_scale  # one mask for all layers and all time steps
        z_hat = F.conv1d(h_padded, weight_h, dilation=d) + x_tilde[d]  # (N, 4H, L)
        z_i, z_o, z_g, z_f = z_hat.chunk(4, dim=1)  # the order of the published weights; (N, H, L) each
        c_shifted = torch.cat([c0.expand(-1, -1, d), c], dim=2)[:, :, :L]  # c at t - d; (N, H, L)

        c = torch.sigmoid(z_f) * c_shifted + torch.sigmoid(z_i) * torch.tanh(z_g)
        h = torch.sigmoid(z_o) * torch.tanh(c)

        if aux_every is not None and layer % aux_every == 0:
            aux.append(h[:, H - output_size :].transpose(1, 2))  # (N, L, output_size)

    output = h[:, H - output_size :].transpose(1, 2)  # (N, L, output_size)
    if lengths is None:
        return output, (h[:, :, -1], c[:, :, -1]), aux
    last = (lengths - 1).view(N, 1, 1).expand(-1, H, 1)
    return output, (h.gather(2, last).squeeze(2), c.gather(2, last).squeeze(2)), aux
