"""The trellis operators and their backends, each operator behind one call.

`reference` is the paper's equation and the truth that every other backend is tested against; `fused` is the fast one;
`triton` is `fused` with gates by Triton, on CUDA, which `fused` takes there by itself if it can.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trellisnet.ops import fused, higher_order, mixed_group, reference
from trellisnet.ops.fused import GATE_KERNELS
from trellisnet.ops.gemm import GEMMS
from trellisnet.ops.last_step import last_step as _last_step
from trellisnet.ops.pruning import dependencies
from trellisnet.ops.reference import GATES

BACKENDS = ("auto", "reference", "fused", "triton")

__all__ = [
    "BACKENDS",
    "GATES",
    "GATE_KERNELS",
    "GEMMS",
    "Trellis",
    "dependencies",
    "hide_padding",
    "not_fused",
    "resolve",
    "resolve_gates",
    "slow_gates",
    "trellis",
]


class Trellis(NamedTuple):
    """What :func:`trellis` returns.

    Args:
        output: (N, L − start, output_size).
        state: (h, c) of the last layer at the last step, (N, H) each.
        aux: auxiliary outputs, (N, L − start, output_size) each.
        layer_steps: how many pairs of a layer and a time step were computed.
    """

    output: Tensor
    state: tuple[Tensor, Tensor]
    aux: list[Tensor]
    layer_steps: int


def _traced() -> bool:
    """Whether torch records what is run, to compile, export or trace it."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def hide_padding(x: Tensor, lengths: Tensor, value: float = 0) -> Tensor:
    """x (N, L, …) with `value` behind the `lengths` (N,) of its rows, even where NaN stands there."""
    at = torch.arange(x.size(1), device=x.device)
    behind = at >= lengths.unsqueeze(1)  # (N, L)
    return x.masked_fill(behind.view(*behind.shape, *[1] * (x.dim() - 2)), value)


def not_fused(activation: str = "lstm", kernel_groups: int | None = None) -> str:
    """Why the fused operator cannot run this kind of layer; empty if it can."""
    if _traced():
        return "torch cannot compile, export or trace it"
    if higher_order.transformed():
        return "torch.func cannot transform it"
    if kernel_groups is not None:
        return "it has no mixed group convolution"
    return "" if activation in fused.GATES else f"it has no {activation} gates"


def resolve(backend: str, activation: str = "lstm", kernel_groups: int | None = None) -> str:
    """The backend that `backend` stands for: `auto` becomes the fastest that can run this kind of layer.

    Raises:
        ValueError: unknown backend, or one that cannot run this.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    reason = not_fused(activation, kernel_groups)
    if backend == "triton":
        reason = reason or fused.no_triton()
    if backend in ("fused", "triton") and reason:
        raise ValueError(f"backend: {backend} cannot run this, {reason}; expected auto or reference")
    if backend == "auto":
        return "reference" if reason else "fused"
    return backend


def resolve_gates(gates: str, device: torch.device, compute: torch.dtype, activation: str = "lstm") -> str:
    """What `gates` stands for: `auto` becomes the fastest that can run here.

    Raises:
        ValueError: unknown gates, or some that cannot run here.
    """
    module = fused.gates_of(gates, device, compute, activation).__name__.rpartition(".")[2]
    return {"gates": "eager", "triton_gates": "triton"}.get(module, module)


def slow_gates(device: torch.device, compute: torch.dtype, activation: str = "lstm") -> str:
    """Why `auto` falls back to eager gates here, naming the faster ones; empty if it does not."""
    fastest = fused.fastest_gates(device)
    reason = fused.reason_against(fastest, device, compute, activation)
    return f"slower than {fastest}: {reason}" if reason else ""


def trellis(
    x: Tensor,
    weight_x: Tensor,
    weight_h: Tensor,
    bias: Tensor,
    state: tuple[Tensor, Tensor] | None,
    *,
    num_layers: int,
    dilation: Sequence[int],
    output_size: int,
    start: int = 0,
    aux_every: int | None = None,
    hidden_scale: Tensor | None = None,
    lengths: Tensor | None = None,
    activation: str = "lstm",
    kernel_groups: int | None = None,
    inject_every: int = 1,
    backend: str = "auto",
    recompute: int = 0,
    gemm: str = "auto",
    gates: str = "auto",
) -> Trellis:
    """Run all layers of the trellis.

    Args:
        x: input sequence (N, L, C), L ≥ 1.
        weight_x: kernel on x, (GH, C, k), newest tap last, G row groups: i, o, g, f of an LSTM.
        weight_h: kernel on the hidden sequence, (GH, H, k).
        bias: (GH,).
        state: (h, c) left of the first time step, (N, H) each; None: zeros.
        num_layers: how often the one layer is applied.
        dilation: dilations, cycled over the layers.
        output_size: how many of the last channels of h are the output.
        start: the first time step whose outputs are wanted, 0 to L − 1. `fused`, and `reference` for start = L − 1,
            compute only what these depend on.
        aux_every: also return the output of every layer i = 1..num_layers with i % aux_every == 0.
        hidden_scale: factor on the hidden input of every layer and time step, its left padding included, (N, H, 1);
            0 or 1/(1−p) for variational dropout. Cell path, x and outputs are untouched. `fused` has no gradient for
            it.
        lengths: valid steps of every row of a right-padded batch, int64 (N,) in start + 1..L; the state is then that of
            the last valid step, and what x has behind it is without influence. None: all are valid.
        activation: one of `GATES`, which says how many gates G it has.
        kernel_groups: None for a dense kernel. A number of groups for the kernel of Theorem 1: weight_x is then
            (GH/groups, C, k), weight_h (GH, H/groups, k), rows ordered as in :mod:`trellisnet.ops.mixed_group`.
        inject_every: x enters layers 1, 1 + inject_every, 1 + 2·inject_every, …; the bias enters all.
        backend: one of `BACKENDS`; `auto` takes the fastest that can run this.
        recompute: K ≥ 1 makes `fused` keep for the backward pass only what every K-th layer reads, and compute the
            layers between once more when it comes to them; 0: keep everything.
        gemm: how `fused` multiplies, one of `GEMMS`; `auto` follows a fixed rule, see :mod:`trellisnet.ops.gemm`.
        gates: how `fused` computes the gates, one of `GATE_KERNELS`; `auto`: compiled where it can be.

    Raises:
        ValueError: unknown backend, gemm or gates, or one that cannot run here.
    """
    if hidden_scale is not None and hidden_scale.requires_grad:
        if backend in ("fused", "triton"):
            raise ValueError(f"hidden_scale: {backend} has no gradient for it; expected a tensor without, or reference")
        backend = "reference" if backend == "auto" else backend
    if x.is_meta and backend == "auto":
        backend = "reference"
    N, L, _ = x.shape
    H = bias.numel() // GATES[activation]
    options = {
        "num_layers": num_layers,
        "dilation": dilation,
        "output_size": output_size,
        "hidden_scale": hidden_scale,
        "activation": activation,
        "inject_every": inject_every,
    }
    if backend == "triton":
        gates = "triton"
    if lengths is not None:
        x = hide_padding(x, lengths)
    if resolve(backend, activation, kernel_groups) != "reference":
        options |= {"start": start, "aux_every": aux_every, "lengths": lengths, "recompute": recompute}
        options |= {"gemm": gemm, "gates": gates}
        return Trellis(*fused.trellis(x, weight_x, weight_h, bias, state, **options))
    if recompute and not _traced():
        raise ValueError(f"recompute: the reference keeps everything; expected 0, got {recompute}")
    if state is None:
        state = (x.new_zeros(N, H), x.new_zeros(N, H))
    # What torch records is the equation, not the sets of positions.
    if start == L - 1 and aux_every is None and lengths is None and not _traced():
        if kernel_groups is not None:
            weight_x, weight_h, bias = mixed_group.dense(weight_x, weight_h, bias, kernel_groups, GATES[activation])
        output, state, layer_steps = _last_step(x, weight_x, weight_h, bias, state, **options)
        return Trellis(output, state, [], layer_steps)
    options |= {"aux_every": aux_every, "lengths": lengths, "kernel_groups": kernel_groups}
    output, state, aux = reference.trellis(x, weight_x, weight_h, bias, state, **options)
    return Trellis(output[:, start:], state, [a[:, start:] for a in aux], num_layers * L)
