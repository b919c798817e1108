"""TrellisNet: a causal convolution with the same kernel in every layer, the input injected into every layer.

The module owns the parameters and prepares what one forward pass needs; the equation itself is in
:mod:`trellisnet.ops.reference`.
"""

import dataclasses
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

State = tuple[Tensor, ...]  # (h, c) of a TrellisNet; other cores carry other tensors, the batch in front


def check_tensor(name: str, value: Any) -> None:
    """Refuse what is no padded tensor.

    Raises:
        TypeError: the argument `name` is a packed sequence, or no tensor at all.
    """
    if isinstance(value, PackedSequence):
        advice = "unpack it with torch.nn.utils.rnn.pad_packed_sequence(…, batch_first=True)"
        raise TypeError(f"{name}: expected a padded tensor, got a PackedSequence; {advice}")
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")


def check_sequence(x: Tensor, input_size: int) -> None:
    """Refuse x unless it is a tensor (N, L ≥ 1, input_size).

    Raises:
        TypeError: x is no tensor.
        ValueError: x has another shape.
    """
    check_tensor("x", x)
    if x.dim() != 3 or x.size(2) != input_size or x.size(1) < 1:
        raise ValueError(f"x: expected (N, L ≥ 1, {input_size}), got {tuple(x.shape)}")


def check_lengths(lengths: Tensor | Sequence[int], x: Tensor) -> Tensor:
    """The valid steps of every row of x (N, L, …) as int64 (N,) on its device.

    Raises:
        ValueError: not N integers from 1 to L.
    """
    N, L = x.shape[:2]
    lengths = torch.as_tensor(lengths)
    if lengths.shape != (N,):
        raise ValueError(f"lengths: expected shape ({N},), got {tuple(lengths.shape)}")
    if lengths.is_floating_point() or lengths.dtype == torch.bool or not ((lengths >= 1) & (lengths <= L)).all():
        raise ValueError(f"lengths: expected integers from 1 to {L}, got {lengths.tolist()}")
    return lengths.to(x.device, torch.int64)


class TrellisOutput(NamedTuple):
    """What a forward pass returns.

    Args:
        output: last `output_size` channels of the last layer, (N, L, output_size), or from the time step on that was
            asked for.
        state: (h, c) of the last layer at the last time step, (N, H) each, not detached.
        aux: outputs of the layers that were asked for, (N, L, output_size) each.
    """

    output: Tensor
    state: State
    aux: list[Tensor]


def _setting(owner: str, name: str) -> property:
    """A field of the module's `spec` or `execution` as an attribute of its own, checked when it is set."""

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
        num_layers: how often the one layer is applied; at dilation 1 and kernel size 2 the receptive field is
            num_layers + 1 inputs.
        output_size: the last channels of h that are returned. Default: all H.
        kernel_size: k ≥ 2 taps. The hidden sequence is seen (k−1)·dilation steps back, the cell `dilation` steps.
        dilation: dilations, cycled over the layers.
        weight_norm: weight normalisation of both kernels, one norm an output row (Appendix B.2).
        hidden_dropout: probability of dropping a hidden channel; one mask a sequence, shared by all layers and time
            steps (Appendix B.1, "variational dropout").
        weight_dropout: probability of dropping a weight of either kernel (Appendix B.1, "DropConnect").
        temporal_weight_dropout: drop weights of the older taps only.
        activation: "lstm" (section 5.1, G = 4 gates), "gru" (3) or "tanh" (1, no gates). Without an LSTM's cell, the c
            of a state is h.
        kernel_groups: None for a dense kernel, else the number of groups of the mixed group convolution (Theorem 1,
            Eq. 5), equally wide: group g reads its own past taps and the current tap of group g − 1, x enters group 1.
        inject_every: inject x into layers 1, 1 + inject_every, … only (Table 6); the bias enters all.
        recompute: keep for the backward pass only what every `recompute_every`-th layer reads, and compute the layers
            between once more: less memory, a third more time.
        recompute_every: None: about the root of num_layers, which needs least memory.
        backend: operator to run, one of `trellisnet.ops.BACKENDS`.
        gemm: matrix products of the backend `fused`, one of `trellisnet.ops.GEMMS`.
        gates: what computes its gates, one of `trellisnet.ops.GATE_KERNELS`.

    Parameters `weight_x` (GH, input_size, k), `weight_h` (GH, H, k), `bias` (GH), rows i, o, g, f of an LSTM and r, u,
    n of a GRU; with weight normalisation `weight_x_v`, `weight_x_g` (GH, 1, 1), `weight_h_v`, `weight_h_g` instead of
    the kernels. They start from N(0, 0.01²), g from the norm of v. With `kernel_groups` = n, only what is not zero in
    Eq. 5 is a parameter: `weight_x` is (GH/n, input_size, k), and `weight_h_past` (GH, H/n, k−1) and, for n > 1,
    `weight_h_below` (GH − GH/n, H/n, 1) stand for `weight_h`, with one g for a row of both; rows run group by group,
    then gate by gate.

    Raises:
        ValueError: a setting out of range.
    """

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
        recompute: bool = False,
        recompute_every: int | None = None,
        backend: str = "auto",
        gemm: str = "auto",
        gates: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        for name, value, least in (
            ("input_size", input_size, 1), ("hidden_size", hidden_size, 1), ("kernel_size", kernel_size, 2),
        ):  # fmt: skip
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        output_size = hidden_size if output_size is None else output_size
        if not 1 <= output_size <= hidden_size:
            raise ValueError(f"output_size: expected 1 to hidden_size = {hidden_size}, got {output_size}")
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.weight_norm = weight_norm
        self.hidden_dropout = check_rate("hidden_dropout", hidden_dropout)
        self.weight_dropout = check_rate("weight_dropout", weight_dropout)
        self.temporal_weight_dropout = temporal_weight_dropout
        self.spec = ops.TrellisSpec(
            num_layers, output_size, ops.find_activation(activation), dilation, kernel_size, kernel_groups, inject_every
        )
        self.execution = ops.Execution(backend, gemm, gates, bool(recompute), recompute_every)
        ops.resolve(self.spec, self.execution)  # refuses what cannot run
        if kernel_groups is not None and hidden_size % kernel_groups:
            expected = f"None or a divisor of hidden_size = {hidden_size}"
            raise ValueError(f"kernel_groups: expected {expected}, got {kernel_groups}")
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
        width, first = self.hidden_size // (groups or 1), rows // (groups or 1)  # channels, rows of a group
        x, hidden = (first, self.input_size, k), {"weight_h": (rows, width, k)}
        if groups is not None:
            hidden = {"weight_h_past": (rows, width, k - 1)}
            if groups > 1:
                hidden["weight_h_below"] = (rows - first, width, 1)
        if not self.weight_norm:
            return {"weight_x": x, **hidden, "bias": (rows,)}
        directions = {f"{name}_v": shape for name, shape in hidden.items()}
        norms = {"weight_h_g": (rows, 1, 1)}
        return {"weight_x_v": x, "weight_x_g": (first, 1, 1), **directions, **norms, "bias": (rows,)}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw kernels and bias from N(0, 0.01²); g becomes the norm of v, so that w = v at the start."""
        for name, parameter in self.named_parameters():
            if not name.endswith("_g"):
                nn.init.normal_(parameter, std=INIT_STD)
        if self.weight_norm:
            for name in ("weight_x", "weight_h"):
                norm = torch.linalg.vector_norm(self._kernel(name), dim=(1, 2), keepdim=True)
                getattr(self, f"{name}_g").copy_(norm)

    def _kernel(self, name: str) -> Tensor:
        """A kernel as it is stored, v with weight normalisation; of a grouped one the shape that the operator reads."""
        suffix = "_v" if self.weight_norm else ""
        if name == "weight_x" or self.kernel_groups is None:
            return getattr(self, name + suffix)
        past = getattr(self, f"weight_h_past{suffix}")
        if self.kernel_groups == 1:
            return F.pad(past, (0, 1))
        below = getattr(self, f"weight_h_below{suffix}")
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
        """Time steps of x that one output depends on, itself included: 1 + Σ_layers (k−1)·dilation.

        With `kernel_groups`, x takes a layer without a step back for every group that it has to climb; what is too
        shallow for that sees nothing, 0.
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
        """How many time steps back anything is read, by whatever path: Σ_layers max(k − 1, 1)·dilation.

        After so many steps a sequence that began from a zero state cannot be told from one that began earlier.
        """
        return max(self.kernel_size - 1, 1) * sum(self.spec.dilations)

    def layer_steps(
        self, length: int, *, start: int = 0, last_only: bool = False, num_layers: int | None = None
    ) -> int:
        """How many pairs of a layer and a time step the outputs of `length` time steps depend on.

        Args:
            length: L.
            start, last_only, num_layers: as in the forward pass.

        Raises:
            ValueError: length or num_layers below 1.
        """
        if length < 1:
            raise ValueError(f"length: expected at least 1, got {length}")
        start = length - 1 if last_only else start
        depth = self._at_depth(num_layers).num_layers
        return sum(map(len, ops.dependencies(length, depth, self.dilation, self.kernel_size, start)))

    def draw_masks(self, batch_size: int) -> dict[str, Any]:
        """Masks for `batch_size` sequences, drawn as a forward pass in training mode would: fields of `Masks`."""

        def weight(name: str) -> Tensor | None:
            rows, channels, k = self._kernel(name).shape
            shape = (rows, channels, k - self.temporal_weight_dropout)
            return draw_mask(self.bias, shape, self.weight_dropout)

        hidden = draw_mask(self.bias, (batch_size, self.hidden_size, 1), self.hidden_dropout)
        return {"weight_x": weight("weight_x"), "weight_h": weight("weight_h"), "hidden": hidden}

    def effective_weight(self, name: str, masks: Masks | None = None) -> Tensor:
        """The kernel of this forward pass: DropConnect first, weight normalisation of what is left after it.

        Args:
            name: "weight_x" or "weight_h".
            masks: explicit masks, or None to draw in training mode.
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
            state: (h, c) carried from the segment before, (N, H) each; None for zeros.
            start: the first time step whose outputs are wanted, 0 to L − 1; the backend `fused` computes only the
                layer-steps that they depend on. Outputs, state and gradients are those of the full computation.
            aux_every: also return the outputs of the layers i = 1..num_layers with i % aux_every == 0.
            last_only: the last time step alone, start = L − 1, which any backend computes from what it depends on.
            lengths: valid steps of every row of a right-padded batch, integers (N,) in 1..L. The state is then that of
                the last valid step; what lies behind it in x has no influence, and outputs there mean nothing. Not with
                start or last_only.
            num_layers: depth of this call, as of a network of that depth with the same weights; None: the module's own.
            masks: explicit dropout masks (`weight_x`, `weight_h` and `hidden` are read).

        Raises:
            TypeError: x is no tensor.
            ValueError: a shape or setting that does not fit.
        """
        check_sequence(x, self.input_size)
        if aux_every is not None and aux_every < 1:
            raise ValueError(f"aux_every: expected None or at least 1, got {aux_every}")
        if not 0 <= start < x.size(1):
            raise ValueError(f"start: expected 0 to {x.size(1) - 1}, got {start}")
        if aux_every is not None and last_only:
            raise ValueError(f"aux_every: expected None with last_only, got {aux_every}")
        if lengths is not None:
            if last_only or start:
                raise ValueError("lengths: expected None with last_only or start, which skip steps of all rows alike")
            lengths = check_lengths(lengths, x)
        expected = (x.size(0), self.hidden_size)
        if state is not None and len(state) != 2:
            raise ValueError(f"state: expected (h, c), got {len(state)} parts")
        for name, part in () if state is None else zip("hc", state, strict=True):
            if tuple(part.shape) != expected:
                raise ValueError(f"state {name}: expected {expected}, got {tuple(part.shape)}")
        out = ops.trellis(
            x,
            (self.effective_weight("weight_x", masks), self.effective_weight("weight_h", masks), self.bias),
            state,
            self._at_depth(num_layers),
            start=x.size(1) - 1 if last_only else start,
            aux_every=aux_every,
            hidden_scale=dropout_scale(x, (*expected, 1), self.hidden_dropout, self.training, masks, "hidden"),
            lengths=lengths,
            execution=self.execution,
        )
        # A trace cannot hold an empty list, whose type it would not know.
        return TrellisOutput(out.output, out.state, out.aux or (() if torch.jit.is_tracing() else []))

    @torch.no_grad()
    def init_stream(self, batch_size: int, *, num_layers: int | None = None) -> Stream:
        """Begin to read sequences in pieces (:mod:`trellisnet.ops.streaming`): zeros, and a copy of the kernels.

        What :meth:`stream` and :meth:`step` then give is, position by position, what one long forward pass in
        evaluation mode would: without gradients and dropout, in memory that does not grow with the sequence.

        Args:
            batch_size: N ≥ 1 sequences, read side by side.
            num_layers: depth of this stream; None: the module's own.

        Raises:
            ValueError: batch_size or num_layers below 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        weight_x, weight_h = (self.effective_weight(name, Masks()) for name in ("weight_x", "weight_h"))
        weights, spec = (weight_x, weight_h, self.bias), self._at_depth(num_layers)
        return streaming.start(streaming.prepare(weights, spec, self.execution, batch_size), batch_size)

    def stream(self, x: Tensor, stream: Stream) -> tuple[Tensor, Stream]:
        """Read the next steps.

        Args:
            x: (N, T, input_size), T ≥ 1; pieces may differ in length.
            stream: of the steps before; it can be used again, to read on in another way.

        Returns:
            the outputs, (N, T, output_size), and the stream to go on from.

        Raises:
            ValueError: x does not fit.
        """
        self._check_piece(x, stream, 3)
        h, _, stream = streaming.piece(x, stream)
        return h[:, :, self.hidden_size - self.output_size :], stream

    def step(self, x_t: Tensor, stream: Stream) -> tuple[Tensor, Stream]:
        """Read one step: every layer computes one position, the old taps of all layers by one product.

        Args:
            x_t: (N, input_size).
            stream: as in :meth:`stream`.

        Returns:
            the output, (N, output_size), and the stream to go on from.

        Raises:
            ValueError: x_t does not fit.
        """
        self._check_piece(x_t, stream, 2)
        h, _, stream, _ = streaming.step(x_t, stream)
        return h[:, self.hidden_size - self.output_size :], stream

    def _check_piece(self, x: Tensor, stream: Stream, dimensions: int) -> None:
        check_tensor(name := "x" if dimensions == 3 else "x_t", x)
        N = stream.x.size(1)
        expected = f"({N}, {'T ≥ 1, ' * (dimensions - 2)}{self.input_size})"
        if x.dim() != dimensions or x.size(0) != N or x.size(-1) != self.input_size or not x.size(1):
            raise ValueError(f"{name}: expected {expected}, got {tuple(x.shape)}")
