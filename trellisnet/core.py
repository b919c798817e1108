"""TrellisNet: a stack of causal convolutions that share one kernel, with the input injected into every layer.

The module owns the parameters and prepares a forward pass; the equation itself is in :mod:`trellisnet.ops.reference`.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from trellisnet import ops
from trellisnet.ops import streaming
from trellisnet.ops.streaming import Stream
from trellisnet.regularization import Masks, check_rate, draw_mask, drop_connect, dropout_scale, weight_norm

INIT_STD = 0.01

State = tuple[Tensor, ...]  # (h, c) of a TrellisNet; other cores carry other tensors, batch first


def check_at_least(least: int, **values: int) -> None:
    """Raise ValueError for the first argument, passed by its name, that is below `least`."""
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")


def check_tensor(name: str, value: Any) -> None:
    """Raise TypeError if the argument `name` is not a tensor (a PackedSequence is not)."""
    if isinstance(value, PackedSequence):
        advice = "unpack it with torch.nn.utils.rnn.pad_packed_sequence(…, batch_first=True)"
        raise TypeError(f"{name}: expected a padded tensor, got a PackedSequence; {advice}")
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_dtype(name: str, value: Tensor, weight: Tensor | None = None) -> None:
    """Raise TypeError unless the argument `name` is real, and in the dtype of `weight`, if any.

    Within `torch.autocast`, float64 alone has to match.
    """
    expected = "floating-point numbers" if weight is None else f"{_name(weight.dtype)}, the dtype of the weights"
    if not value.is_floating_point():
        advice = f"convert it with {name}.to({'torch.float32' if weight is None else weight.dtype}), or embed ids first"
        raise TypeError(f"{name}: expected {expected}, got {_name(value.dtype)}; {advice}")
    if weight is None or value.dtype == weight.dtype:
        return
    if torch.float64 in (value.dtype, weight.dtype) or not torch.is_autocast_enabled(value.device.type):
        advice = f"convert it with {name}.to({weight.dtype}), or the module with .to({value.dtype})"
        raise TypeError(f"{name}: expected {expected}, got {_name(value.dtype)}; {advice}")


def check_sequence(x: Tensor, input_size: int, weight: Tensor | None = None) -> None:
    """Check that x is a real tensor (N, L ≥ 1, input_size), in the dtype of `weight`, if any.

    Raises:
        TypeError: x is not a tensor, or has another dtype.
        ValueError: x has another shape.
    """
    check_tensor("x", x)
    if x.dim() != 3 or x.size(2) != input_size or x.size(1) < 1:
        advice = ""
        if x.dim() == 3 and x.size(1) == input_size:
            advice = "; if that is (N, channels, L), pass x.transpose(1, 2)"
        elif x.dim() == 2 and x.size(1) == input_size:
            advice = "; if that is a single sequence, pass x.unsqueeze(0)"
        raise ValueError(f"x: expected (N, L ≥ 1, {input_size}), got {tuple(x.shape)}{advice}")
    check_dtype("x", x, weight)


def _time_first(x: Tensor, batch_size: int) -> str:
    """Return advice for an x that is (L, N, …), judging by the batch size of another argument."""
    L, N = x.shape[:2]
    return "; x looks like (L, N, …), pass x.transpose(0, 1)" if N == batch_size != L else ""


def check_lengths(lengths: Tensor | Sequence[int], x: Tensor) -> Tensor:
    """Return the number of valid steps in each row of x (N, L, …) as int64 (N,) on the device of x.

    Raises:
        ValueError: anything but N integers from 1 to L.
    """
    N, L = x.shape[:2]
    lengths = torch.as_tensor(lengths)
    if lengths.shape != (N,):
        advice = _time_first(x, lengths.size(0)) if lengths.dim() == 1 else ""
        raise ValueError(f"lengths: expected shape ({N},), got {tuple(lengths.shape)}{advice}")
    if lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise ValueError(f"lengths: expected integers from 1 to {L}, got {lengths.tolist()}")
    # Neither a program that is being compiled nor a function under vmap may depend on values.
    if not ops.traced() and not ops.transformed() and not ((lengths >= 1) & (lengths <= L)).all():
        raise ValueError(f"lengths: expected integers from 1 to {L}, got {lengths.tolist()}")
    return lengths.to(x.device, torch.int64)


class TrellisOutput(NamedTuple):
    """Result of a forward pass.

    Args:
        output: last `output_size` channels of the last layer, (N, L − start, output_size).
        state: (h, c) of the last layer at the last time step, (N, H) each, not detached.
        aux: auxiliary outputs, (N, L − start, output_size) each, from the lowest layer up.
    """

    output: Tensor
    state: State
    aux: list[Tensor]


def _setting(owner: str, name: str) -> property:
    """Expose a field of the module's `spec` or `execution` as an attribute, validated when it is set."""

    def read(self):
        return getattr(getattr(self, owner), name)

    def write(self, value):
        setattr(self, owner, dataclasses.replace(getattr(self, owner), **{name: value}))

    return property(read, write)


class TrellisNet(nn.Module):
    """Trellis network (sections 3 and 5.1 of the paper).

    Args:
        input_size: channels of the input sequence x.
        hidden_size: H, all channels of h (the authors' nhid + nout).
        num_layers: number of times the one layer is applied. With dilation 1 and kernel size 2 the receptive field is
            num_layers + 1 inputs.
        output_size: number of channels returned, the last ones of h. Default: all H.
        kernel_size: k ≥ 2 taps. A layer reads h up to (k−1)·dilation steps back, and c `dilation` steps back.
        dilation: dilations, cycled over the layers.
        weight_norm: normalise the weights of both kernels, with one norm per output row (Appendix B.2).
        hidden_dropout: probability of dropping a hidden channel; one mask per sequence, shared by all layers and time
            steps (Appendix B.1, "variational dropout").
        weight_dropout: probability of dropping a weight of either kernel (Appendix B.1, "DropConnect").
        temporal_weight_dropout: drop weights of the older taps only.
        activation: "lstm" (section 5.1, G = 4 gates), "gru" (3) or "tanh" (1, ungated). Only an LSTM has a cell; for
            the others the c of a state equals h.
        kernel_groups: None for a dense kernel, else the number of equal groups of the mixed group convolution (Theorem
            1, Eq. 5): group g reads its own past taps and the current tap of group g − 1; x enters group 1.
        inject_every: inject x into layers 1, 1 + inject_every, … only (Table 6). The bias enters every layer.
        init_gain: None to start from the authors' N(0, 0.01²). Otherwise kernels start from N(0, gain² / fan-in) and
            biases from zero, except those of an LSTM's forget gate, which start from one. With the authors' small
            weights almost no signal of a distant input passes through many dilated layers; with a gain of 2 it does.
        recompute: store only the input of every `recompute_every`-th layer for the backward pass and recompute the
            layers in between: less memory, a third more time.
        recompute_every: None for about √num_layers, which needs least memory.
        backend: operator to run, one of `trellisnet.ops.BACKENDS`.
        gemm: matrix products of the backend `fused`, one of `trellisnet.ops.GEMMS`.
        gates: gate kernels of the backend `fused`, one of `trellisnet.ops.GATE_KERNELS`.

    The parameters are `weight_x` (GH, input_size, k), `weight_h` (GH, H, k) and `bias` (GH), with rows in the order i,
    o, g, f for an LSTM and r, u, n for a GRU. With weight normalisation `weight_x_v` and `weight_x_g` (GH, 1, 1),
    `weight_h_v` and `weight_h_g` replace the kernels; g starts from the norm of v. With `kernel_groups` = n, only the
    non-zero blocks of Eq. 5 are parameters: `weight_x` is (GH/n, input_size, k), and `weight_h_past` (GH, H/n, k−1)
    and, for n > 1, `weight_h_below` (GH − GH/n, H/n, 1) replace `weight_h` and share one g per row. Their rows run
    group by group, then gate by gate.

    Raises:
        ValueError: a setting is out of range.
    """

    core_name = "trellisnet"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        *,
        output_size: int | None = None,
        kernel_size: int = 2,
        dilation: Sequence[int] = (1,),
        weight_norm: bool = True,
        hidden_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        temporal_weight_dropout: bool = True,
        activation: str = "lstm",
        kernel_groups: int | None = None,
        inject_every: int = 1,
        init_gain: float | None = None,
        recompute: bool = False,
        recompute_every: int | None = None,
        backend: str = "auto",
        gemm: str = "auto",
        gates: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_at_least(1, input_size=input_size, hidden_size=hidden_size)
        check_at_least(2, kernel_size=kernel_size)
        output_size = hidden_size if output_size is None else output_size
        if not 1 <= output_size <= hidden_size:
            raise ValueError(f"output_size: expected 1 to hidden_size = {hidden_size}, got {output_size}")
        self.input_size, self.hidden_size = input_size, hidden_size
        self.weight_norm = weight_norm
        self.hidden_dropout = check_rate("hidden_dropout", hidden_dropout)
        self.weight_dropout = check_rate("weight_dropout", weight_dropout)
        self.temporal_weight_dropout = temporal_weight_dropout
        if init_gain is not None and not 0 < init_gain < math.inf:
            raise ValueError(f"init_gain: expected None or a number above 0, got {init_gain}")
        self.init_gain = init_gain
        self.spec = ops.TrellisSpec(
            num_layers, output_size, ops.find_activation(activation), dilation, kernel_size, kernel_groups, inject_every
        )
        self.execution = ops.Execution(backend, gemm, gates, bool(recompute), recompute_every)
        ops.resolve(self.spec, self.execution)  # raises now if this backend cannot run this spec
        if kernel_groups is not None and hidden_size % kernel_groups:
            raise ValueError(f"kernel_groups: expected a divisor of hidden_size = {hidden_size}, got {kernel_groups}")
        for name, shape in self._parameter_shapes().items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()

    num_layers = _setting("spec", "num_layers")
    output_size = _setting("spec", "output_size")
    kernel_size = _setting("spec", "kernel_size")
    dilation = _setting("spec", "dilation")
    kernel_groups = _setting("spec", "kernel_groups")
    inject_every = _setting("spec", "inject_every")
    backend = _setting("execution", "backend")
    gemm = _setting("execution", "gemm")
    gates = _setting("execution", "gates")
    recompute = _setting("execution", "recompute")
    recompute_every = _setting("execution", "recompute_every")

    @property
    def activation(self) -> str:
        return self.spec.activation.name

    def _parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        rows, k, groups = self.spec.activation.gates * self.hidden_size, self.kernel_size, self.kernel_groups
        group_width, group_rows = self.hidden_size // (groups or 1), rows // (groups or 1)
        x, hidden = (group_rows, self.input_size, k), {"weight_h": (rows, group_width, k)}
        if groups is not None:
            hidden = {"weight_h_past": (rows, group_width, k - 1)}
            if groups > 1:
                hidden["weight_h_below"] = (rows - group_rows, group_width, 1)
        if not self.weight_norm:
            return {"weight_x": x, **hidden, "bias": (rows,)}
        directions = {f"{name}_v": shape for name, shape in hidden.items()}
        norms = {"weight_h_g": (rows, 1, 1)}
        return {"weight_x_v": x, "weight_x_g": (group_rows, 1, 1), **directions, **norms, "bias": (rows,)}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw kernels and bias as `init_gain` says and set g to the norm of v, so that w = v at first."""
        for name, parameter in self.named_parameters():
            if name.endswith("_g"):
                continue
            if self.init_gain is None:
                nn.init.normal_(parameter, std=INIT_STD)
            elif name == "bias":
                nn.init.zeros_(parameter)
                activation = self.spec.activation
                if activation.forget_gate is not None:  # rows run group by group, then gate by gate
                    parameter.view(self.kernel_groups or 1, activation.gates, -1)[:, activation.forget_gate] = 1.0
            else:  # a row of a grouped kernel reads one group's past taps and one group's current tap
                inputs = (
                    self.input_size if name.startswith("weight_x") else self.hidden_size // (self.kernel_groups or 1)
                )
                nn.init.normal_(parameter, std=self.init_gain / math.sqrt(inputs * self.kernel_size))
        if self.weight_norm:
            for name in ("weight_x", "weight_h"):
                norm = torch.linalg.vector_norm(self._kernel(name), dim=(1, 2), keepdim=True)
                getattr(self, f"{name}_g").copy_(norm)

    def _kernel(self, name: str) -> Tensor:
        """Return a kernel as stored (v with weight normalisation), its groups assembled as the operator reads them."""
        suffix = "_v" if self.weight_norm else ""
        if name == "weight_x" or self.kernel_groups is None:
            return getattr(self, name + suffix)
        past = getattr(self, f"weight_h_past{suffix}")
        if self.kernel_groups == 1:
            return F.pad(past, (0, 1))
        below = getattr(self, f"weight_h_below{suffix}")  # group 1 has none: zeros instead
        return torch.cat([past, F.pad(below, (0, 0, 0, 0, past.size(0) - below.size(0), 0))], dim=2)

    def extra_repr(self) -> str:
        names = (
            "output_size", "kernel_size", "dilation", "weight_norm", "hidden_dropout", "weight_dropout",
            "temporal_weight_dropout", "activation", "kernel_groups", "inject_every", "recompute", "recompute_every",
            "backend", "gemm", "gates",
        )  # fmt: skip
        settings = (f"{name}={getattr(self, name)!r}" for name in names)
        return ", ".join([f"{self.input_size}, {self.hidden_size}, {self.num_layers}", *settings])

    def _at_depth(self, num_layers: int | None) -> ops.TrellisSpec:
        return self.spec if num_layers is None else dataclasses.replace(self.spec, num_layers=num_layers)

    @property
    def receptive_field(self) -> int:
        """Number of time steps of x that one output depends on: 1 + Σ_layers (k−1)·dilation.

        With `kernel_groups`, x climbs one group per layer, and takes no step back in these layers; the result is 0 if
        the network is too shallow for x to reach the output.
        """
        cycle = self.spec.dilations
        if self.kernel_groups is None:
            return 1 + (self.kernel_size - 1) * sum(cycle)
        climbs = (self.hidden_size - self.output_size) // (self.hidden_size // self.kernel_groups)
        if climbs >= self.num_layers:
            return 0
        return 1 + (self.kernel_size - 1) * (sum(cycle) - sum(sorted(cycle[1:])[:climbs]))

    @property
    def reach(self) -> int:
        """Number of time steps back that any path, through h or c, reads: Σ_layers max(k − 1, 1)·dilation.

        After that many steps it makes no difference whether a sequence began here, from a zero state, or earlier.
        """
        return self.spec.reach

    def layer_steps(
        self, length: int, *, start: int = 0, last_only: bool = False, num_layers: int | None = None
    ) -> int:
        """Count the (layer, time step) pairs that the outputs of `length` time steps depend on.

        Args:
            length: L.
            start, last_only, num_layers: as in :meth:`forward`.

        Raises:
            ValueError: length or num_layers below 1.
        """
        check_at_least(1, length=length)
        start = length - 1 if last_only else start
        depth = self._at_depth(num_layers).num_layers
        return sum(map(len, ops.dependencies(length, depth, self.dilation, self.kernel_size, start)))

    def draw_masks(self, batch_size: int) -> dict[str, Any]:
        """Draw the fields of `Masks` for `batch_size` sequences, as a forward pass in training mode would."""

        def weight(name: str) -> Tensor | None:
            rows, channels, k = self._kernel(name).shape
            shape = (rows, channels, k - self.temporal_weight_dropout)
            return draw_mask(self.bias, shape, self.weight_dropout)

        hidden = draw_mask(self.bias, (batch_size, self.hidden_size, 1), self.hidden_dropout)
        return {"weight_x": weight("weight_x"), "weight_h": weight("weight_h"), "hidden": hidden}

    def effective_weight(self, name: str, masks: Masks | None = None) -> Tensor:
        """Return the kernel of one forward pass: DropConnect first, then weight normalisation of the result.

        Args:
            name: "weight_x" or "weight_h".
            masks: explicit masks; None draws them in training mode.
        """
        kernel = self._kernel(name)
        kernel = drop_connect(kernel, self.weight_dropout, self.temporal_weight_dropout, self.training, masks, name)
        return weight_norm(kernel, getattr(self, f"{name}_g")) if self.weight_norm else kernel

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        start: int = 0,
        aux_every: int | None = None,
        last_only: bool = False,
        lengths: Tensor | Sequence[int] | None = None,
        num_layers: int | None = None,
        masks: Masks | None = None,
    ) -> TrellisOutput:
        """Run the trellis over a segment.

        Args:
            x: (N, L, input_size), L ≥ 1.
            state: (h, c) carried over from the previous segment, (N, H) each; None for zeros.
            start: first time step to return outputs for, 0 to L − 1. The backend `fused` computes only the layer-steps
                these outputs depend on; outputs, state and gradients equal those of the full computation.
            aux_every: also return the outputs of the layers i = 1..num_layers with i % aux_every == 0.
            last_only: return the last time step alone (start = L − 1). Every backend then prunes the computation.
            lengths: number of valid steps in each row of a right-padded batch, integers (N,) in 1..L. The state is then
                that of the last valid step; padding in x has no influence, and outputs there are meaningless. Not with
                start or last_only. Programs that are compiled, exported or vmapped do not check the range.
            num_layers: depth of this call, with the same weights; None for the module's own.
            masks: explicit dropout masks, of which `weight_x`, `weight_h` and `hidden` are read.

        Raises:
            TypeError: x is not a tensor, or x or the state is not in the dtype of the weights.
            ValueError: a shape or setting does not fit.
        """
        lengths = self._check_call(x, state, start, last_only, lengths)
        if aux_every is not None and aux_every < 1:
            raise ValueError(f"aux_every: expected None or at least 1, got {aux_every}")
        if aux_every is not None and last_only:
            raise ValueError(f"aux_every: expected None with last_only, got {aux_every}")
        out = ops.trellis(
            x,
            (self.effective_weight("weight_x", masks), self.effective_weight("weight_h", masks), self.bias),
            state,
            self._at_depth(num_layers),
            start=x.size(1) - 1 if last_only else start,
            aux_every=aux_every,
            hidden_scale=dropout_scale(
                x, (x.size(0), self.hidden_size, 1), self.hidden_dropout, self.training, masks, "hidden"
            ),
            lengths=lengths,
            execution=self.execution,
        )
        # Copied, because backends return views of all outputs: what changes these in place must not change the state.
        state = tuple(part.clone() for part in out.state)
        # torch.jit.trace cannot infer the element type of an empty list.
        return TrellisOutput(out.output, state, out.aux or (() if torch.jit.is_tracing() else []))

    def state_widths(self) -> dict[str, int]:
        """Return the channels of each part of a state, by name."""
        return {"h": self.hidden_size, "c": self.hidden_size}

    def _check_call(
        self, x: Tensor, state: State | None, start: int, last_only: bool, lengths: Tensor | Sequence[int] | None
    ) -> Tensor | None:
        """Check these arguments of :meth:`forward`; return `lengths` as int64 (N,), or None."""
        check_sequence(x, self.input_size, self.bias)
        if not 0 <= start < x.size(1):
            raise ValueError(f"start: expected 0 to {x.size(1) - 1}, got {start}")
        if lengths is not None:
            if last_only or start:
                raise ValueError("lengths: expected None with last_only or start, which skip steps of all rows alike")
            lengths = check_lengths(lengths, x)
        widths = self.state_widths()
        if state is not None and len(state) != len(widths):
            raise ValueError(f"state: expected ({', '.join(widths)}), got {len(state)} parts")
        for (name, width), part in () if state is None else zip(widths.items(), state, strict=True):
            if tuple(part.shape) != (x.size(0), width):
                advice = _time_first(x, part.size(0)) if part.dim() == 2 and part.size(1) == width else ""
                raise ValueError(f"state {name}: expected {(x.size(0), width)}, got {tuple(part.shape)}{advice}")
            check_dtype(f"state {name}", part, self.bias)
        return lengths

    @torch.no_grad()
    def init_stream(self, batch_size: int, *, num_layers: int | None = None) -> Stream:
        """Start reading sequences piece by piece (:mod:`trellisnet.ops.streaming`), with a copy of the kernels.

        :meth:`stream` and :meth:`step` then return, position by position, what one long forward pass in evaluation mode
        would, without gradients and in memory that does not grow with the sequence.

        Args:
            batch_size: N ≥ 1 sequences, read in parallel.
            num_layers: depth of this stream; None for the module's own.

        Raises:
            ValueError: batch_size or num_layers below 1.
        """
        check_at_least(1, batch_size=batch_size)
        weight_x, weight_h = (self.effective_weight(name, Masks()) for name in ("weight_x", "weight_h"))
        weights, spec = (weight_x, weight_h, self.bias), self._at_depth(num_layers)
        return streaming.start(streaming.prepare(weights, spec, self.execution, batch_size), batch_size)

    def stream(self, x: Tensor, stream: Stream, tolerance: float = 0.0) -> tuple[Tensor, Stream]:
        """Read the next steps.

        Args:
            x: (N, T, input_size), T ≥ 1; pieces may differ in length.
            stream: the stream after the steps before. It is left unchanged, so that several continuations can share it.
            tolerance: above 0, stop at the first layer whose output changes by less than this share of its norm ("early
                exit"); `stream.layers` then says how many were computed. 0 is exact, anything above an approximation.

        Returns:
            outputs (N, T, output_size), and the stream after these steps.

        Raises:
            TypeError: x is not a tensor, or has another dtype than the weights.
            ValueError: x has another shape; or tolerance is above 0 in a compiled, exported or traced program.
        """
        self._check_piece(x, stream, 3)
        if tolerance > 0 and ops.traced():
            raise ValueError(f"tolerance: expected 0 in a compiled, exported or traced program, got {tolerance}")
        h, _, stream = streaming.piece(x, stream, tolerance)
        return h[:, :, self.hidden_size - self.output_size :].to(self.bias.dtype), stream

    def step(self, x_t: Tensor, stream: Stream) -> tuple[Tensor, Stream]:
        """Read one step: every layer computes one position, with a single product for the old taps of all layers.

        Args:
            x_t: (N, input_size).
            stream: as in :meth:`stream`.

        Returns:
            output (N, output_size), and the stream after this step.

        Raises:
            TypeError: x_t is not a tensor, or has another dtype than the weights.
            ValueError: x_t has another shape.
        """
        self._check_piece(x_t, stream, 2)
        h, _, stream, _ = streaming.step(x_t, stream)
        return h[:, self.hidden_size - self.output_size :].to(self.bias.dtype), stream

    def _check_piece(self, x: Tensor, stream: Stream, dimensions: int) -> None:
        check_tensor(name := "x" if dimensions == 3 else "x_t", x)
        if ops.transformed():
            raise ValueError("stream: torch.func cannot transform it; call the network on whole sequences")
        N = stream.x.size(1)
        expected = f"({N}, {'T ≥ 1, ' * (dimensions - 2)}{self.input_size})"
        if x.dim() != dimensions or x.size(0) != N or x.size(-1) != self.input_size or not x.size(1):
            raise ValueError(f"{name}: expected {expected}, got {tuple(x.shape)}")
        check_dtype(name, x, self.bias)
