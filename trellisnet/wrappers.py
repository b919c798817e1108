"""Wrappers of cores: both directions, and the interface of `torch.nn.LSTM`.

Letters: N batch, L length, H hidden channels, D directions (1 or 2).
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from trellisnet.core import State, TrellisNet, TrellisOutput, check_lengths, check_sequence, check_tensor
from trellisnet.ops import hide_padding


def reverse(x: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Reverse the first `lengths` (N,) time steps of each row of x (N, L, C); padding stays at the right."""
    if lengths is None:
        return x.flip(1)
    at, ends = torch.arange(x.size(1), device=x.device), lengths.unsqueeze(1)
    back = torch.where(at < ends, ends - 1 - at, at)  # (N, L)
    return x.gather(1, back.unsqueeze(2).expand_as(x))


def both_ways(
    forwards: nn.Module,
    backwards: nn.Module,
    x: Tensor,
    state: State | None = None,
    lengths: Tensor | Sequence[int] | None = None,
) -> TrellisOutput:
    """Read x with one core and, reversed, with another; arguments and results as in :meth:`Bidirectional.forward`."""
    padded: dict[str, Tensor] = {}
    if lengths is not None:
        lengths = check_lengths(lengths, x)
        x = hide_padding(x, lengths)
        if "lengths" in inspect.signature(forwards.forward).parameters:
            padded = {"lengths": lengths}
    half = len(state or ()) // 2
    states = (state[:half], state[half:]) if state else (None, None)
    ahead, ahead_state, *_ = forwards(x, states[0], **padded)
    behind, behind_state, *_ = backwards(reverse(x, lengths), states[1], **padded)
    output = torch.cat([ahead, reverse(behind, lengths)], dim=2)
    ended = lengths is None or padded  # else the states are those after the padding
    return TrellisOutput(output, (*ahead_state, *behind_state) if ended else (), [])


class Bidirectional(nn.Module):
    """Two cores with separate parameters, one of which reads a sequence forwards and the other backwards.

    It suits tasks whose input is complete, such as tagging. A language model must not see the words it predicts.

    Args:
        core: constructor of a core: :class:`trellisnet.TrellisNet` or one of :mod:`trellisnet.baselines`.
        sizes, options: its arguments. `Bidirectional(TrellisNet, 20, 50, 8)` has 8 layers and 50 channels in each
            direction, so 100 output channels.
    """

    def __init__(self, core: Callable[..., nn.Module], *sizes: int, **options: Any):
        super().__init__()
        self.forwards, self.backwards = (core(*sizes, **options) for _ in range(2))
        self.input_size, self.output_size = self.forwards.input_size, 2 * self.forwards.output_size

    def forward(
        self, x: Tensor, state: State | None = None, *, lengths: Tensor | Sequence[int] | None = None
    ) -> TrellisOutput:
        """Read whole sequences in both directions.

        Args:
            x: (N, L, input_size), L ≥ 1.
            state: initial states, the parts of the forward core before those of the backward core; None for zeros.
            lengths: number of valid steps in each row of a right-padded batch, integers (N,) in 1..L; None for all.
                Each row is reversed from its own end. Padding has no influence, and outputs there are meaningless.

        Returns:
            outputs (N, L, output_size) in the order of `nn.LSTM(bidirectional=True)`, at every step the channels of the
            forward core, then those of the backward core; the final states, ordered as `state`, where the backward core
            ends at the first step; no aux. With `lengths` the states are () if the cores have no such argument.

        Raises:
            TypeError: x is not a tensor.
            ValueError: a shape or length does not fit.
        """
        check_sequence(x, self.input_size)
        return both_ways(self.forwards, self.backwards, x, state, lengths)


def _of_cores(name: str) -> property:
    """Expose an attribute of the cores of a :class:`TrellisLSTM`, which is the same for both directions."""

    def read(self):
        return getattr(self.cores[0], name)

    def write(self, value):
        for core in self.cores:
            setattr(core, name, value)

    return property(read, write)


class TrellisLSTM(nn.Module):
    """A TrellisNet with the interface of `torch.nn.LSTM`, to replace it in an existing program by changing one line.

    As in an LSTM, outputs are causal in one direction and see both sides with `bidirectional`; h and c of one call
    start the next; a missing state is zero; `PackedSequence` and unbatched input are accepted, and the state is then
    that of the last valid step. The differences are:

    - **The receptive field is finite.** An output depends on `receptive_field` inputs, num_layers + 1 without dilation,
      and on the state of the call before only where these reach beyond the first step. Choose `num_layers` (or
      `dilation`) by the distance that matters; it has no default because an LSTM's 1 or 2 would hide all but the last
      two or three inputs.
    - Layers share their weights, so that `num_layers` adds time but no parameters.
    - The state is that of the last layer, (D, N, H) and not (num_layers · D, N, H). All layers of the next call start
      from it, so two calls do not equal one call with the whole sequence.
    - `dropout` drops hidden channels of all layers, with one mask per sequence (Appendix B.1), and acts with one layer
      too; the output itself is not dropped.
    - Weights start from N(0, 0.01²); with `init_gain=2` distant dependencies are learned sooner.
    - There are no `bias=False`, `proj_size`, `flatten_parameters`, and no parameters `weight_ih_l0`, ….

    Args:
        input_size: channels of the input.
        hidden_size: H.
        num_layers: depth.
        batch_first: the input is (N, L, input_size) instead of (L, N, input_size).
        bidirectional: read in both directions, D = 2.
        dropout: probability of dropping a hidden channel.
        options: further keywords of :class:`trellisnet.TrellisNet`.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        *,
        batch_first: bool = False,
        bidirectional: bool = False,
        dropout: float = 0.0,
        **options: Any,
    ):
        super().__init__()
        self.input_size, self.hidden_size = input_size, hidden_size
        self.batch_first, self.bidirectional = batch_first, bidirectional
        make = Bidirectional if bidirectional else lambda core, *sizes, **others: core(*sizes, **others)
        self.core = make(TrellisNet, input_size, hidden_size, num_layers, hidden_dropout=dropout, **options)

    num_layers = _of_cores("num_layers")
    dropout = _of_cores("hidden_dropout")

    @property
    def cores(self) -> tuple[TrellisNet, ...]:
        """The core of each direction."""
        return (self.core.forwards, self.core.backwards) if self.bidirectional else (self.core,)

    @property
    def receptive_field(self) -> int:
        """Number of inputs that one output depends on, in each direction; see :class:`trellisnet.TrellisNet`."""
        return self.cores[0].receptive_field

    def forward(
        self, input: Tensor | PackedSequence, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        """Run the network over a segment.

        Args:
            input: (L, N, input_size), with `batch_first` (N, L, input_size), unbatched (L, input_size), or packed.
            hx: (h, c), (D, N, H) each, or unbatched (D, H); None for zeros.

        Returns:
            the output, in the form of the input with D · H channels, and (h, c) in the form of `hx`.

        Raises:
            TypeError: the input is neither a tensor nor packed.
            ValueError: a shape does not fit.
        """
        x, lengths, unbatched = input, None, False
        if isinstance(input, PackedSequence):
            x, lengths = pad_packed_sequence(input, batch_first=True)
        else:
            check_tensor("input", input)
            if input.dim() not in (2, 3):
                raise ValueError(f"input: expected 2 or 3 dimensions, got {tuple(input.shape)}")
            unbatched = input.dim() == 2
            x = input.unsqueeze(0) if unbatched else input if self.batch_first else input.transpose(0, 1)
        state = None
        if hx is not None:
            if len(hx) != 2:
                raise ValueError(f"hx: expected (h, c), got {len(hx)} parts")
            shape = (1 + self.bidirectional, *([] if unbatched else [x.size(0)]), self.hidden_size)
            for name, part in zip("hc", hx, strict=True):
                if tuple(part.shape) != shape:
                    raise ValueError(f"hx {name}: expected {shape}, got {tuple(part.shape)}")
            # h and c of the forward core, then of the backward core
            parts = (part for direction in zip(*hx, strict=True) for part in direction)
            state = tuple(part.unsqueeze(0) if unbatched else part for part in parts)
        output, state, _ = self.core(x, state, lengths=lengths)
        h, c = torch.stack(state[::2]), torch.stack(state[1::2])  # (D, N, H)
        if unbatched:
            return output.squeeze(0), (h.squeeze(1), c.squeeze(1))
        if lengths is None:
            return output if self.batch_first else output.transpose(0, 1), (h, c)
        if input.sorted_indices is not None:
            output, lengths = output[input.sorted_indices], lengths[input.sorted_indices.cpu()]
        packed = pack_padded_sequence(output, lengths, batch_first=True)
        return packed._replace(sorted_indices=input.sorted_indices, unsorted_indices=input.unsorted_indices), (h, c)
