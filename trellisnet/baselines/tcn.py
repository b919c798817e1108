"""Generic temporal convolutional network (Bai, Kolter & Koltun, 2018, "An Empirical Evaluation of Generic Convolutional
and Recurrent Networks for Sequence Modeling", arXiv:1803.01271, section 3).

Letters: N batch, L length, C channels, k kernel size.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from trellisnet.baselines.lstm import check_call
from trellisnet.core import TrellisOutput, check_at_least, check_lengths
from trellisnet.ops import hide_padding
from trellisnet.regularization import Masks, check_rate, weight_norm

INIT_STD = 0.01


class WeightNorm(nn.Module):
    """Weight normalisation of a kernel as a parametrization, with the names and values of torch's own.

    Torch's has a fused kernel whose second derivatives are wrong (torch 2.13 on a CPU).
    """

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        """Compute w from g (rows, 1, 1) and v (rows, in, k)."""
        return weight_norm(v, g)

    def right_inverse(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Return g = ‖w‖ and v = w."""
        return torch.linalg.vector_norm(w, dim=(1, 2), keepdim=True), w


class ResidualBlock(nn.Module):
    """[weight-normalised causal convolution, ReLU, dropout] twice, plus the input, ReLU (Figure 1b of the paper).

    Args:
        input_size, output_size: channels; if they differ, a 1×1 convolution maps the input to the width of the sum.
        kernel_size: k.
        dilation: dilation of both convolutions.
        dropout: probability of dropping a value, elementwise.

    The convolutions keep torch's initialisation; the 1×1 convolution starts from N(0, 0.01²).
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        kernel_size: int,
        dilation: int,
        dropout: float,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.past = (kernel_size - 1) * dilation
        self.dropout = dropout
        factory = {"device": device, "dtype": dtype}
        sizes = ((input_size, output_size), (output_size, output_size))
        self.convolutions = nn.ModuleList(nn.Conv1d(*size, kernel_size, dilation=dilation, **factory) for size in sizes)
        for convolution in self.convolutions:
            register_parametrization(convolution, "weight", WeightNorm())
        self.fit = nn.Conv1d(input_size, output_size, 1, **factory) if input_size != output_size else None
        if self.fit is not None:
            nn.init.normal_(self.fit.weight, std=INIT_STD)

    def forward(self, x: Tensor, drop: bool) -> Tensor:
        """Map x (N, input_size, L) to (N, output_size, L), with dropout if `drop`."""
        y = x
        for convolution in self.convolutions:
            y = convolution(F.pad(y, (self.past, 0)))  # causal: position t sees t, t − dilation, …
            y = F.dropout(y.relu(), self.dropout, drop)
        return (y + (x if self.fit is None else self.fit(x))).relu()


class TCN(nn.Module):
    """Stack of residual blocks whose dilation doubles from block to block.

    Args:
        input_size: channels of x.
        hidden_size: width of all blocks but the last.
        num_layers: number of blocks (the authors' `levels`).
        output_size: width of the last block. Default: hidden_size.
        kernel_size: k ≥ 2.
        hidden_dropout: probability of dropping a value within a block, elementwise (the authors' `dropout`).
        input_dropout: the same for x (their `emb_dropout`).

    Raises:
        ValueError: a setting is out of range.
    """

    core_name = "tcn"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        *,
        output_size: int | None = None,
        kernel_size: int = 2,
        hidden_dropout: float = 0.0,
        input_dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        output_size = hidden_size if output_size is None else output_size
        check_at_least(
            1, input_size=input_size, hidden_size=hidden_size, num_layers=num_layers, output_size=output_size
        )
        check_at_least(2, kernel_size=kernel_size)
        if num_layers > 30:
            raise ValueError(f"num_layers: expected at most 30 blocks, whose dilation reaches 2**29, got {num_layers}")
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.output_size = output_size
        self.kernel_size = kernel_size
        self.hidden_dropout = check_rate("hidden_dropout", hidden_dropout)
        self.input_dropout = check_rate("input_dropout", input_dropout)
        widths = [input_size, *[hidden_size] * (num_layers - 1), output_size]
        self.blocks = nn.ModuleList(
            ResidualBlock(widths[i], widths[i + 1], kernel_size, 2**i, hidden_dropout, device=device, dtype=dtype)
            for i in range(num_layers)
        )

    @property
    def receptive_field(self) -> int:
        """Number of time steps of x that one output depends on: 1 + 2(k−1)(2^num_layers − 1)."""
        return 1 + 2 * (self.kernel_size - 1) * (2**self.num_layers - 1)

    def draw_masks(self, batch_size: int) -> None:
        """Return None: as in the authors' code, dropout is elementwise and drawn anew for every time step."""

    def forward(
        self,
        x: Tensor,
        state: tuple[()] | None = None,
        *,
        start: int = 0,
        aux_every: int | None = None,
        last_only: bool = False,
        lengths: Tensor | Sequence[int] | None = None,
        masks: Masks | None = None,
    ) -> TrellisOutput:
        """Run the network over a whole sequence.

        Args:
            x: (N, L, input_size), L ≥ 1, preceded by zeros.
            state: None or (), because a TCN carries no state.
            start: first time step to return outputs for. Inputs outside their receptive field are skipped.
            aux_every: must be None.
            last_only: return the last time step alone.
            lengths: number of valid steps in each row of a right-padded batch, integers (N,) in 1..L; padding has no
                influence, and outputs there are meaningless.
            masks: anything but None turns dropout off, because this network has no masks.

        Returns:
            outputs (N, L − start, output_size), the state (), no aux.

        Raises:
            TypeError: x is not a tensor.
            ValueError: a shape or setting does not fit.
        """
        check_call(x, self.input_size, start, aux_every)
        if state:
            raise ValueError(f"state: expected None (a TCN carries no state), got {len(state)} parts")
        if lengths is not None:
            x = hide_padding(x, check_lengths(lengths, x))
        start, drop = (x.size(1) - 1 if last_only else start), self.training and masks is None
        first = max(0, start + 1 - self.receptive_field)
        y = F.dropout(x[:, first:], self.input_dropout, drop).mT  # (N, C, L)
        for block in self.blocks:
            y = block(y, drop)
        return TrellisOutput(y.mT[:, start - first :], (), [])
