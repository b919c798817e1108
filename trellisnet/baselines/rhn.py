"""Recurrent highway network (Zilly, Srivastava, Koutník & Schmidhuber, 2017, "Recurrent Highway Networks",
arXiv:1607.03474, section 3): one layer whose transition from one time step to the next is itself deep.

Letters: N batch, L length, H hidden width, D depth (micro-steps within a time step).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trellisnet.baselines.lstm import check_call, check_state
from trellisnet.core import TrellisOutput, check_at_least
from trellisnet.ops import widened
from trellisnet.regularization import Masks, check_rate, draw_mask, dropout_scale, scaled

INIT_RANGE = 0.04


class RHN(nn.Module):
    """Recurrent highway layer with coupled gates (Eq. 6 to 9 of the paper, carry = 1 − transform).

    Each time step updates the state s in D micro-steps l = 1 … D, of which only the first sees the input x_t:

        h = tanh(W_H x_t [l = 1] + R_H^l (s ∘ m) + b_H^l)
        τ = σ(W_T x_t [l = 1] + R_T^l (s ∘ m) + b_T^l)
        s ← τ ∘ h + (1 − τ) ∘ s

    There is one mask m (`hidden_dropout`) per sequence, shared by all time steps, micro-steps and both transforms, as
    in the authors' TensorFlow code; the state that is carried past the gate is not masked. With `separate_masks` each
    transform has a mask of its own, on s and on x_t, as in their Torch code.

    Args:
        input_size: channels of x.
        hidden_size: H.
        num_layers: D, the recurrence depth.
        output_size: None or hidden_size, because the state is the output.
        hidden_dropout: probability of dropping a channel of the state on its way into the transforms.
        separate_masks: draw different masks for H and T.
        input_dropout: probability of dropping a channel of x; only with `separate_masks`, as a model has one otherwise.
        gate_bias: initial value of b_T in all micro-steps; a negative one biases the network towards carrying.

    The parameters are `weight_x` (2H, input_size), `weight_h` (D, 2H, H) and `bias` (D, 2H), with the rows of H before
    those of T. They start from U(±0.04), the biases of T from `gate_bias`.

    Raises:
        ValueError: a setting is out of range.
    """

    core_name = "rhn"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        *,
        output_size: int | None = None,
        hidden_dropout: float = 0.0,
        separate_masks: bool = False,
        input_dropout: float = 0.0,
        gate_bias: float = -2.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_at_least(1, input_size=input_size, hidden_size=hidden_size, num_layers=num_layers)
        if output_size not in (None, hidden_size):
            raise ValueError(f"output_size: the state is the output, expected {hidden_size}, got {output_size}")
        self.input_size = input_size
        self.hidden_size = self.output_size = hidden_size
        self.num_layers = num_layers
        if input_dropout and not separate_masks:
            raise ValueError("input_dropout: needs separate_masks; otherwise leave it to the model")
        self.hidden_dropout = check_rate("hidden_dropout", hidden_dropout)
        self.input_dropout = check_rate("input_dropout", input_dropout)
        self.separate_masks = separate_masks
        self.gate_bias = gate_bias
        factory, D, H = {"device": device, "dtype": dtype}, num_layers, hidden_size
        self.weight_x = nn.Parameter(torch.empty(2 * H, input_size, **factory))
        self.weight_h = nn.Parameter(torch.empty(D, 2 * H, H, **factory))
        self.bias = nn.Parameter(torch.empty(D, 2 * H, **factory))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all parameters from U(±0.04), then set the biases of the transform gate to `gate_bias`."""
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -INIT_RANGE, INIT_RANGE)
        self.bias[:, self.hidden_size :] = self.gate_bias

    def extra_repr(self) -> str:
        return (
            f"{self.input_size}, {self.hidden_size}, {self.num_layers}, hidden_dropout={self.hidden_dropout}, "
            f"gate_bias={self.gate_bias}, separate_masks={self.separate_masks}"
        )

    def draw_masks(self, batch_size: int) -> dict[str, Any]:
        """Draw the mask `hidden`, (N, H), as training would.

        With separate masks it is a tuple of those on x, (2, N, input_size), and on the state, (2, N, H), for H and T.
        """
        if not self.separate_masks:
            return {"hidden": draw_mask(self.bias, (batch_size, self.hidden_size), self.hidden_dropout)}
        return {"hidden": tuple(draw_mask(self.bias, shape, p) for shape, p in self._pairs(batch_size))}

    def _pairs(self, batch_size: int) -> list[tuple[tuple[int, int, int], float]]:
        """Shape and rate of the separate masks on x and on the state."""
        return [
            ((2, batch_size, self.input_size), self.input_dropout),
            ((2, batch_size, self.hidden_size), self.hidden_dropout),
        ]

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
        """Run the layer over a segment.

        Args:
            x: (N, L, input_size), L ≥ 1.
            state: (s,), (N, H), carried over from the previous segment; None for zeros.
            start: first time step to return outputs for; all are computed.
            aux_every: must be None.
            last_only: return the last time step alone.
            masks: explicit masks, of which `hidden` is read, as from :meth:`draw_masks`; None draws in training mode.

        Returns:
            states of all time steps, (N, L − start, H); (s,) of the last one, not detached; no aux.

        Raises:
            TypeError: x is not a tensor.
            ValueError: a shape or setting does not fit.
        """
        check_call(x, self.input_size, start, aux_every)
        shape = (x.size(0), self.hidden_size)
        check_state(state, [shape])
        x = widened(x, self.bias)
        s = x.new_zeros(shape) if state is None else widened(state[0], self.bias)
        transform, x_transformed, weights, biases = (self._separate if self.separate_masks else self._shared)(x, masks)
        outputs = []
        for z_x in x_transformed:
            for weight, bias in zip(weights, (z_x, *biases), strict=True):
                h, gate = transform(s, weight, bias)  # (N, H) each
                s = torch.lerp(s, h.tanh(), gate.sigmoid())
            outputs.append(s)
        y = torch.stack(outputs[-1:] if last_only else outputs[start:], dim=1)
        return TrellisOutput(y, (s,), [])

    def _shared(self, x: Tensor, masks: Masks | None) -> tuple[Any, ...]:
        """The two transforms as one product, (s, weight, bias) → (h, gate); the transformed x of each time step; and
        weights and biases of the micro-steps, less the first bias.
        """
        shape = (x.size(0), self.hidden_size)
        mask = dropout_scale(x, shape, self.hidden_dropout, self.training, masks, "hidden")

        def transform(s: Tensor, weight: Tensor, bias: Tensor) -> Sequence[Tensor]:
            return torch.addmm(bias, scaled(s, mask), weight).to(s.dtype).chunk(2, dim=1)

        x_transformed = F.linear(x, self.weight_x, self.bias[0]).unbind(1)  # L × (N, 2H), in one product
        return transform, x_transformed, self.weight_h.mT.unbind(0), self.bias[1:].unbind(0)

    def _separate(self, x: Tensor, masks: Masks | None) -> tuple[Any, ...]:
        """The same with a mask for each transform, as a batch of two products."""
        explicit = (None, None) if masks is None or masks.hidden is None else masks.hidden
        on_x, on_s = (
            dropout_scale(x, shape, p, self.training, masks if masks is None else Masks(hidden=mask), "hidden")
            for (shape, p), mask in zip(self._pairs(x.size(0)), explicit, strict=True)
        )

        def transform(s: Tensor, weight: Tensor, bias: Tensor) -> Sequence[Tensor]:
            pair = s.expand(2, *s.shape) if on_s is None else s * on_s  # (2, N, H)
            return torch.baddbmm(bias, pair, weight).to(s.dtype).unbind(0)

        D, H = self.num_layers, self.hidden_size
        halves = zip(self.weight_x.chunk(2), self.bias[0].chunk(2), strict=True)
        inputs = (None, None) if on_x is None else on_x.unsqueeze(2)  # (N, 1, input_size) each
        z = [F.linear(scaled(x, mask), *half) for mask, half in zip(inputs, halves, strict=True)]
        weights, biases = self.weight_h.view(D, 2, H, H).mT.unbind(0), self.bias[1:].view(-1, 2, 1, H).unbind(0)
        return transform, torch.stack(z).unbind(2), weights, biases
