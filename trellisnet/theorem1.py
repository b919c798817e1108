r"""Theorem 1, executable: truncated recurrent networks as trellis networks.

**Theorem 1** (section 4.2). Let :math:`\rho^M` be an M-truncated recurrent network with L layers of d hidden units: its
output at time t is computed from zero states and the last M inputs alone. Then there is a TrellisNet :math:`\tau` with
M + L − 1 layers and Ld channels such that

.. math::
    \rho^M(x_{1:T}) = \tau_{(L-1)d+1 \,:\, Ld}(x_{1:T}).

The paper prints the index as L(d−1)+1 : Ld, which would be the last L channels. The proof (Eq. 6 and the text after Eq.
18) shows that group i of the channels is layer i, so the output is the last *group*, the last d channels.

The kernel is the mixed group convolution of Eq. 5: :math:`W_{hh}^{(i)}` reads the past tap of group i,
:math:`W_{hx}^{(i)}` the current tap of group i − 1, or of x for i = 1. By Eq. 6, layer j of the trellis holds
:math:`h^{(i)}_{t,\,t-j+i}`, layer i of the network started at t − j + i. If that network has not started yet (i > j),
the value is zero, and the trellis must compute it as zero. This requires f(0) = 0, hence tanh (or relu, which
`TrellisNet` lacks) or an LSTM cell, but no sigmoid, and **no biases**. With a single layer this case does not arise,
and a bias is harmless once M inputs have been seen (t ≥ M; here also before, because the trellis is padded with zeros
in every layer).
"""

import torch
from torch import nn

from trellisnet.core import TrellisNet

_ROWS = {"lstm": (0, 3, 2, 1), "tanh": (0,)}  # positions of our i, o, g, f in torch's order i, f, g, o


def from_rnn(rnn: nn.RNN, horizon: int) -> TrellisNet:
    """Convert a truncated `nn.RNN` with tanh to an equivalent trellis network.

    Args:
        rnn: L layers of d units, unidirectional, without biases unless L = 1 (see above). Dropout between its layers,
            which acts in training only, is not carried over.
        horizon: M ≥ 1, the number of inputs that an output sees. M ≥ T gives the untruncated network.

    Returns:
        a network with M + L − 1 layers, Ld channels in L groups and output_size d, on the device and in the dtype of
        `rnn`, with copies of its weights; it reads (N, T, C) regardless of `rnn.batch_first`.

    Raises:
        ValueError: no TrellisNet equals this network, or horizon is not an integer ≥ 1.
    """
    _check(rnn, nn.RNN, horizon)
    if rnn.nonlinearity != "tanh":
        raise ValueError(f"rnn.nonlinearity: a trellis network has no {rnn.nonlinearity} activation, only tanh")
    return _convert(rnn, horizon, "tanh")


def from_lstm(lstm: nn.LSTM, horizon: int) -> TrellisNet:
    """Convert a truncated `nn.LSTM` (Appendix A); otherwise as :func:`from_rnn`."""
    _check(lstm, nn.LSTM, horizon)
    return _convert(lstm, horizon, "lstm")


def _check(network: nn.RNNBase, kind: type[nn.RNNBase], horizon: int) -> None:
    if not isinstance(network, kind):
        raise ValueError(f"expected an nn.{kind.__name__}, got {type(network).__name__}")
    if type(horizon) is not int or horizon < 1:
        raise ValueError(f"horizon: expected an integer of at least 1, got {horizon}")
    if network.bidirectional:
        raise ValueError("bidirectional: a trellis network is causal, it cannot read backwards")
    if network.proj_size:
        raise ValueError(f"proj_size: expected 0, got {network.proj_size}; Theorem 1 has no projections")
    if network.bias and network.num_layers > 1:
        raise ValueError(
            f"bias: with {network.num_layers} layers Theorem 1 holds only without biases, because layers that have not "
            "started must stay zero; use bias=False"
        )


@torch.no_grad()
def _convert(network: nn.RNNBase, horizon: int, activation: str) -> TrellisNet:
    L, d = network.num_layers, network.hidden_size
    like = {"device": network.weight_hh_l0.device, "dtype": network.weight_hh_l0.dtype}
    options = {"output_size": d, "weight_norm": False, "activation": activation, "kernel_groups": L}
    trellis = TrellisNet(network.input_size, L * d, horizon + L - 1, **options, **like)

    def rows(name, layer):
        parts = getattr(network, f"{name}_l{layer}").chunk(len(_ROWS[activation]))
        return torch.cat([parts[i] for i in _ROWS[activation]])

    for parameter in trellis.parameters():
        parameter.zero_()
    trellis.weight_x[:, :, 1] = rows("weight_ih", 0)  # the past tap of x stays zero
    trellis.weight_h_past[:, :, 0] = torch.cat([rows("weight_hh", layer) for layer in range(L)])
    if L > 1:
        trellis.weight_h_below[:, :, 0] = torch.cat([rows("weight_ih", layer) for layer in range(1, L)])
    if network.bias:
        trellis.bias.copy_(rows("bias_ih", 0) + rows("bias_hh", 0))
    return trellis
