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
from trellisnet.core import TrellisOutput, check_lengths
from trellisnet.ops import hide_padding
from trellisnet.regularization import Masks, check_rate, weight_norm

INIT_STD = 0.01


class WeightNorm(nn.Module):
    """Weight normalisation of a kernel, as a parametrization with the names and values of torch's own.

    That one computes w by a fused kernel whose second derivatives are wrong (torch 2.13 on a CPU).
    """

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        """w of g (rows, 1, 1) and v (rows, in, k)."""
        return weight_norm(v, g)

    def right_inverse(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """g and v, which is w itself."""
        return torch.linalg.vector_norm(w, dim=(1, 2), keepdim=True), w


class ResidualBlock(nn.Module):
    """[weight-normalised causal convolution, ReLU, dropout] twice, plus the input, ReLU (Figure 1b of the paper).

    Args:
        input_size, output_size: channels; if they differ, a 1×1 convolution fits the input to the sum.
        kernel_size: k.
        dilation: of both convolutions.
        dropout: probability of dropping a number, elementwise.

    The convolutions start from torch's own kernels, the 1×1 convolution from N(0, 0.01²).
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
        """(N, input_size, L) → (N, output_size, L)."""
        y = x
        for convolution in self.convolutions:
            y = convolution(F.pad(y, (self.past, 0)))  # causal: position t sees t, t − dilation, …
            y = F.dropout(y.relu(), self.dropout, drop)
        return (y + (x if self.fit is None else self.fit(x))).relu()


class TCN(nn.Module):
    """A stack of residual blocks whose dilation doubles from block to block.

    Args:
        input_size: channels of x.
        hidden_size: width of all blocks but the last.
        num_layers: blocks (the authors' `levels`).
        output_size: width of the last block. Default: hidden_size.
        kernel_size: k ≥ 2.
        hidden_dropout: probability of dropping a number within a block (the authors' `dropout`), elementwise.
        input_dropout: the same on x (their `emb_dropout`).

    Raises:
        ValueError: a setting out of range.
    """

    model_name = "tcn"

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
        sizes = {"input_size": input_size, "hidden_size": hidden_size, "num_layers": num_layers}
        for name, value in (sizes | {"output_size": output_size}).items():
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if kernel_size < 2:
            raise ValueError(f"kernel_size: expected at least 2, got {kernel_size}")
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
        """Time steps of x that one output depends on, itself included: 1 + 2(k−1)(2^num_layers − 1)."""
        return 1 + 2 * (self.kernel_size - 1) * (2**self.num_layers - 1)

    def draw_masks(self, batch_size: int) -> None:
        """None: dropout here is elementwise, another draw for every time step, as in the authors' code."""

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
            x: (N, L, input_size), L ≥ 1; zeros are what lies before it.
            state: nothing is carried; None or ().
            start: the first time step whose outputs are wanted. What they do not see is not computed.
            aux_every: None only.
            last_only: the last time step alone.
            lengths: valid steps of every row of a right-padded batch, integers (N,) in 1..L; what lies behind them has
                no influence, and outputs there mean nothing.
            masks: if given, nothing is dropped: there are no masks for this network.

        Returns:
            outputs (N, L − start, output_size), the state (), no aux.

        Raises:
            ValueError: a shape or setting that does not fit.
        """
        check_call(x, self.input_size, start, aux_every)
        if state:
            raise ValueError(f"state: expected None, for a TCN carries none, got {len(state)} parts")
        if lengths is not None:
            x = hide_padding(x, check_lengths(lengths, x))
        start, drop = (x.size(1) - 1 if last_only else start), self.training and masks is None
        first = max(0, start + 1 - self.receptive_field)
        y = F.dropout(x[:, first:], self.input_dropout, drop).mT  # (N, C, L)
        for block in self.blocks:
            y = block(y, drop)
        return TrellisOutput(y.mT[:, start - first :], (), [])
