"""What a trellis computes, :class:`TrellisSpec`, and how it is computed, :class:`Execution`.

Both are checked where they are made, so that nothing that receives one checks it again.
"""

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
    """The function of a layer, h, c = f(x̃, Conv1D(h), c_{t−d}).

    Args:
        name: key of the gate kernels that compute it.
        gates: G, the row groups of a kernel.
        has_cell: whether c is a tensor of its own; else it is h.
        additive: whether x̃ and Conv1D(h) enter as their sum alone.
        function: (z_x, z_h, c_shifted, dim) → (h, c), with the channels along `dim`.
    """

    name: str
    gates: int
    has_cell: bool
    additive: bool
    function: Callable[..., tuple[Tensor, Tensor]]


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
    """What a trellis computes from its weights, which know neither the depth nor the dilations.

    Args:
        num_layers: how often the one layer is applied.
        output_size: how many of the last channels of h are the output.
        activation: the function of a layer, one of `trellisnet.ops.ACTIVATIONS`.
        dilation: dilations, cycled over the layers.
        kernel_size: k taps.
        kernel_groups: None for a dense kernel. A number of groups for the kernel of Theorem 1: weight_x is then
            (GH/groups, C, k), weight_h (GH, H/groups, k), rows ordered as in :mod:`trellisnet.ops.mixed_group`.
        inject_every: x enters layers 1, 1 + inject_every, 1 + 2·inject_every, …; the bias enters all.

    Attributes:
        dilations: the dilation of every layer.

    Raises:
        ValueError: a value out of range.
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
        given = self.dilation
        if not isinstance(given, Sequence) or not given or not all(isinstance(d, Integral) and d >= 1 for d in given):
            raise ValueError(f"dilation: expected a sequence of integers ≥ 1, got {given!r}")
        values["dilation"] = dilation = tuple(map(int, given))
        values["dilations"] = (dilation * -(-values["num_layers"] // len(dilation)))[: values["num_layers"]]
        for name, value in values.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen

    def injected(self, layer: int) -> bool:
        """Whether x enters the layer, counted from 0."""
        return layer % self.inject_every == 0


@dataclass(frozen=True)
class Execution:
    """How a trellis is computed. It changes speed, memory and rounding only.

    Args:
        backend: one of `BACKENDS`; `auto` takes the fastest that can run the spec, `triton` is `fused` with gates by
            Triton.
        gemm: how `fused` multiplies, one of `GEMMS`; `auto` follows a fixed rule, see :mod:`trellisnet.ops.gemm`.
        gates: how `fused` computes the gates, one of `GATE_KERNELS`; `auto` takes the fastest that can run.
        recompute: keep for the backward pass only what every `recompute_every`-th layer reads, and compute the layers
            between once more when it reaches them. Only `fused` can.
        recompute_every: None: about the root of num_layers, which needs least memory.

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
        """How many layers are computed from what is kept below them; all of them without `recompute`."""
        return (self.recompute_every or max(1, round(num_layers**0.5))) if self.recompute else num_layers
