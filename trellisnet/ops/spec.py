"""Description of a trellis, :class:`TrellisSpec`, and of its computation, :class:`Execution`; both are validated."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Integral

from torch import Tensor

from trellisnet.ops.gemm import GEMMS

BACKENDS = ("auto", "reference", "fused", "triton")
GATE_KERNELS = ("auto", "compiled", "triton", "eager")

Weights = tuple[Tensor, Tensor, Tensor]  # weight_x (GH, C, k), weight_h (GH, H, k), bias (GH,)


@dataclass(frozen=True)
class Activation:
    """Activation of a layer, h, c = f(x̃, Conv1D(h), c_{t−d}).

    Args:
        name: key of its gate kernels.
        gates: G, the number of row groups in a kernel.
        has_cell: whether c is a separate tensor; otherwise c is h.
        additive: whether x̃ and Conv1D(h) enter only as their sum.
        function: (z_x = x̃, z_h = Conv1D(h), c_shifted, dim) → (h, c), with the channels along `dim`.
        forget_gate: index of the gate that scales c_{t−d}; None if there is none.
    """

    name: str
    gates: int
    has_cell: bool
    additive: bool
    function: Callable[..., tuple[Tensor, Tensor]]
    forget_gate: int | None = None


def _positive(name: str, value: object) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise ValueError(f"{name}: expected an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    return int(value)


def _check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


@dataclass(frozen=True)
class TrellisSpec:
    """Definition of a trellis. Its weights fix neither depth nor dilations, so both are here.

    Args:
        num_layers: number of times the one layer is applied.
        output_size: number of output channels, the last ones of h.
        activation: activation of a layer, one of `trellisnet.ops.ACTIVATIONS`.
        dilation: dilations, cycled over the layers.
        kernel_size: k taps.
        kernel_groups: None for a dense kernel, else the number of groups in Theorem 1: weight_x is then
            (GH/groups, C, k) and weight_h (GH, H/groups, k), with rows ordered as in
            :mod:`trellisnet.ops.mixed_group`.
        inject_every: x enters layers 1, 1 + inject_every, 1 + 2·inject_every, …; the bias enters every layer.

    Attributes:
        dilations: dilation of each layer.

    Raises:
        ValueError: a value is out of range.
    """

    num_layers: int
    output_size: int
    activation: Activation
    dilation: Sequence[int] = (1,)
    kernel_size: int = 2
    kernel_groups: int | None = None
    inject_every: int = 1
    dilations: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        values = {name: _positive(name, getattr(self, name)) for name in ("num_layers", "output_size", "kernel_size")}
        values["inject_every"] = _positive("inject_every", self.inject_every)
        if self.kernel_groups is not None:
            values["kernel_groups"] = _positive("kernel_groups", self.kernel_groups)
        cycle = self.dilation
        if not isinstance(cycle, Sequence) or not cycle or not all(isinstance(d, Integral) and d >= 1 for d in cycle):
            raise ValueError(f"dilation: expected a sequence of integers ≥ 1, got {cycle!r}")
        values["dilation"] = cycle = tuple(map(int, cycle))
        values["dilations"] = (cycle * -(-values["num_layers"] // len(cycle)))[: values["num_layers"]]
        for name, value in values.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen

    @property
    def reach(self) -> int:
        """Number of time steps back that any path, through h or c, reads: Σ_layers max(k − 1, 1)·dilation."""
        return max(self.kernel_size - 1, 1) * sum(self.dilations)

    def check_kernel(self, weight_h: Tensor) -> None:
        """Raise ValueError unless a kernel (GH, ·, k) has this trellis's taps and enough channels for its output."""
        rows, _, k = weight_h.shape
        if k != self.kernel_size:
            raise ValueError(f"weights: expected kernels of {self.kernel_size} taps, got {k}")
        if (H := rows // self.activation.gates) < self.output_size:
            raise ValueError(f"output_size: expected 1 to hidden_size = {H}, got {self.output_size}")

    def injected(self, layer: int) -> bool:
        """Return whether x enters this layer, counted from 0."""
        return layer % self.inject_every == 0


@dataclass(frozen=True)
class Execution:
    """Computation of a trellis, which changes only speed, memory and rounding.

    Args:
        backend: one of `BACKENDS`. `auto` takes the fastest that supports the spec; `triton` is `fused` with Triton
            gates.
        gemm: matrix products of `fused`, one of `GEMMS`; `auto` follows a fixed rule, see :mod:`trellisnet.ops.gemm`.
        gates: gate kernels of `fused`, one of `GATE_KERNELS`; `auto` takes the fastest that can run.
        recompute: store only the input of every `recompute_every`-th layer for the backward pass, which recomputes the
            layers in between. Needs `fused`.
        recompute_every: None for about √num_layers, which needs least memory.

    Raises:
        ValueError: an unknown choice, or a value out of range.
    """

    backend: str = "auto"
    gemm: str = "auto"
    gates: str = "auto"
    recompute: bool = False
    recompute_every: int | None = None

    def __post_init__(self) -> None:
        _check_choice("backend", self.backend, BACKENDS)
        _check_choice("gemm", self.gemm, GEMMS)
        _check_choice("gates", self.gates, GATE_KERNELS)
        every = self.recompute_every
        if every is not None and (type(every) is not int or every < 1):
            raise ValueError(f"recompute_every: expected None or an integer ≥ 1, got {every!r}")

    def segment(self, num_layers: int) -> int:
        """Return the number of layers between stored inputs; all of them without `recompute`."""
        return (self.recompute_every or max(1, round(num_layers**0.5))) if self.recompute else num_layers
