"""AWD-LSTM: a stack of LSTMs with dropped recurrent weights (Merity, Keskar & Socher, 2018, "Regularizing and
Optimizing LSTM Language Models", arXiv:1708.02182).

The layers are `torch.nn.LSTM` with dropout added. The rest of the paper's recipe is elsewhere: embedding dropout and
the locked dropouts around the stack in :mod:`trellisnet.models`, AR, TAR and windows of random length in
:mod:`trellisnet.training.tasks`, non-monotonically triggered averaging in :mod:`trellisnet.training.optim`.

Letters: N batch, L length, H hidden width of a layer.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trellisnet.core import TrellisOutput, check_at_least, check_sequence
from trellisnet.ops import gemm
from trellisnet.regularization import Masks, check_rate, draw_mask, dropout_scale, scaled


class WeightDropLSTM(nn.LSTM):
    """One layer of `torch.nn.LSTM`, batch first, with DropConnect on its recurrent matrix (section 2 of the paper).

    One mask per forward pass is shared by all time steps. The dropped matrix is passed to torch's function as a value
    and never replaces the parameter, so that an evaluation, a copy or an exception cannot leave it in place. The
    function is always called in training mode when gradients are enabled: otherwise cuDNN refuses to backpropagate in
    evaluation mode.

    Args:
        input_size, hidden_size: as in `torch.nn.LSTM`.
        weight_dropout: probability of dropping a recurrent weight.

    Raises:
        ValueError: the rate is out of range.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        weight_dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(input_size, hidden_size, batch_first=True, device=device, dtype=dtype)
        self.weight_dropout = check_rate("weight_dropout", weight_dropout)

    def draw_masks(self) -> Tensor | None:
        """Draw a mask for the recurrent matrix, (4H, H); None if nothing is dropped."""
        return draw_mask(self.weight_hh_l0, self.weight_hh_l0.shape, self.weight_dropout)

    def forward(
        self, x: Tensor, state: tuple[Tensor, Tensor] | None = None, masks: Masks | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Run the layer.

        Args:
            x: (N, L, input_size).
            state: (h, c), (N, H) each; None for zeros.
            masks: explicit masks, of which `weight_h` (4H, H) is read; None draws in training mode.

        Returns:
            outputs (N, L, H), and (h, c) of the last step.

        Raises:
            ValueError: the mask has another shape.
        """
        weight = self.weight_hh_l0
        # On CUDA, autocast casts all inputs of cuDNN but fails if x is in bfloat16 already, so x is widened first. A
        # CPU without bfloat16 instructions has no LSTM in that type, so it computes in the dtype of the weights.
        wide = not x.is_cuda and not gemm.usable("onednn", x.device, torch.bfloat16)
        if x.is_cuda or wide:
            x = x.to(weight.dtype)
        scale = dropout_scale(weight, weight.shape, self.weight_dropout, self.training, masks, "weight_h")
        if state is None:
            zeros = x.new_zeros(x.size(0), self.hidden_size)
            state = zeros, zeros
        weights = [self.weight_ih_l0, scaled(weight, scale), self.bias_ih_l0, self.bias_hh_l0]
        # cuDNN refuses the columns of a wider state, which a sparse layer passes.
        h, c = (part.to(x.dtype).unsqueeze(0).contiguous() for part in state)
        with torch.autocast(x.device.type, enabled=False) if wide else contextlib.nullcontext():
            # has_biases, num_layers, dropout, train, bidirectional, batch_first
            x, h, c = torch.lstm(x, (h, c), weights, True, 1, 0.0, torch.is_grad_enabled(), False, True)
        return x, (h.squeeze(0), c.squeeze(0))


class AWDLSTM(nn.Module):
    """Stack of LSTMs: layers of `hidden_size`, the last one of `output_size`, with locked dropout in between.

    Args:
        input_size: channels of x.
        hidden_size: width of all layers but the last.
        num_layers: number of layers.
        output_size: width of the last layer. Default: hidden_size.
        hidden_dropout: probability of dropping a channel between two layers, one mask per sequence (the authors'
            `dropouth`).
        weight_dropout: probability of dropping a recurrent weight (`wdrop`).
        layer: further keywords for :meth:`make_layer` (device, dtype).

    Weights start from torch's U(±1/√H).

    Raises:
        ValueError: a setting is out of range.
    """

    core_name = "awd-lstm"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        *,
        output_size: int | None = None,
        hidden_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        **layer: Any,
    ):
        super().__init__()
        output_size = hidden_size if output_size is None else output_size
        check_at_least(
            1, input_size=input_size, hidden_size=hidden_size, num_layers=num_layers, output_size=output_size
        )
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.output_size = output_size
        self.hidden_dropout = check_rate("hidden_dropout", hidden_dropout)
        self.weight_dropout = check_rate("weight_dropout", weight_dropout)
        self.widths = [input_size, *[hidden_size] * (num_layers - 1), output_size]
        self.layers = nn.ModuleList(self.make_layer(i, **layer) for i in range(num_layers))

    def make_layer(self, i: int, **options: Any) -> nn.Module:
        """Build layer i, counted from 0: a module with the interface of :class:`WeightDropLSTM`."""
        return WeightDropLSTM(self.widths[i], self.widths[i + 1], weight_dropout=self.weight_dropout, **options)

    def draw_masks(self, batch_size: int) -> dict[str, Any]:
        """Draw masks as training would: `weight_h`, one per layer, and `hidden`, (N, 1, H) per gap between layers."""
        like, p = next(self.parameters()), self.hidden_dropout
        hidden = tuple(draw_mask(like, (batch_size, 1, width), p) for width in self.widths[1:-1])
        return {"weight_h": tuple(layer.draw_masks() for layer in self.layers), "hidden": hidden}

    def _masks_of(self, masks: Masks | None, i: int) -> Masks | None:
        """Select the masks of layer i: on its recurrent weights, and on the output of the layer below."""
        if masks is None:
            return None
        no_masks = [None] * self.num_layers
        weight_h, hidden = (no_masks if part is None else part for part in (masks.weight_h, masks.hidden))
        return Masks(weight_h=weight_h[i], hidden=hidden[i - 1] if i else None)

    def forward(
        self,
        x: Tensor,
        state: Sequence[Tensor] | None = None,
        *,
        start: int = 0,
        aux_every: int | None = None,
        last_only: bool = False,
        masks: Masks | None = None,
    ) -> TrellisOutput:
        """Run the stack over a segment.

        Args:
            x: (N, L, input_size), L ≥ 1.
            state: h and c of every layer in turn, (N, H) each, carried over from the previous segment; None for zeros.
            start: first time step to return outputs for; all are computed.
            aux_every: must be None: only the last layer has outputs for the head.
            last_only: return the last time step alone.
            masks: explicit masks, as from :meth:`draw_masks`.

        Returns:
            outputs of the last layer, (N, L − start, output_size); the state, not detached; no aux.

        Raises:
            TypeError: x is not a tensor.
            ValueError: a shape or setting does not fit.
        """
        check_call(x, self.input_size, start, aux_every)
        shapes = [(x.size(0), width) for width in self.widths[1:] for _ in "hc"]
        check_state(state, shapes)
        carried = []
        for i, layer in enumerate(self.layers):
            layer_masks = self._masks_of(masks, i)
            if i:
                channels = (x.size(0), 1, x.size(2))
                x = scaled(x, dropout_scale(x, channels, self.hidden_dropout, self.training, layer_masks, "hidden"))
            x, new_state = layer(x, None if state is None else tuple(state[2 * i : 2 * i + 2]), layer_masks)
            carried += new_state
        return TrellisOutput(x[:, -1:] if last_only else x[:, start:], tuple(carried), [])


def check_call(x: Tensor, input_size: int, start: int, aux_every: int | None) -> None:
    """Check the arguments that all baseline cores share.

    Raises:
        TypeError: x is not a tensor.
        ValueError: x is not (N, L ≥ 1, input_size), `start` lies outside it, or auxiliary outputs are requested.
    """
    check_sequence(x, input_size)
    if not 0 <= start < x.size(1):
        raise ValueError(f"start: expected 0 to {x.size(1) - 1}, got {start}")
    if aux_every is not None:
        raise ValueError(f"aux_every: expected None (only TrellisNet has auxiliary outputs), got {aux_every}")


def check_state(state: Sequence[Tensor] | None, shapes: Sequence[tuple[int, ...]]) -> None:
    """Raise ValueError unless the parts of a carried state have these shapes."""
    if state is not None and [tuple(part.shape) for part in state] != list(shapes):
        raise ValueError(f"state: expected {list(shapes)}, got {[tuple(part.shape) for part in state]}")
