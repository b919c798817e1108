"""The trellis operator and its backends, behind one call.

`reference` is the paper's equation, against which every other backend is tested; `fused` is fast; `triton` is `fused`
with Triton gates, which `fused` itself prefers on CUDA.
"""

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from trellisnet.ops import fused, gates, mixed_group, operators, reference
from trellisnet.ops.fused import resolve_gates
from trellisnet.ops.gemm import GEMMS
from trellisnet.ops.higher_order import dispatches, for_onnx, intercepted, transformed
from trellisnet.ops.last_step import last_step as _last_step
from trellisnet.ops.pruning import dependencies
from trellisnet.ops.reference import ACTIVATIONS
from trellisnet.ops.spec import BACKENDS, GATE_KERNELS, Activation, Execution, TrellisSpec, Weights

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "GATE_KERNELS",
    "GEMMS",
    "Activation",
    "Execution",
    "Trellis",
    "TrellisSpec",
    "dependencies",
    "find_activation",
    "hide_padding",
    "not_fused",
    "resolve",
    "resolve_gates",
    "slow_gates",
    "traced",
    "transformed",
    "trellis",
    "widened",
]


class Trellis(NamedTuple):
    """Result of :func:`trellis`.

    Args:
        output: (N, L − start, output_size).
        state: (h, c) of the last layer at the last step, (N, H) each.
        aux: auxiliary outputs, (N, L − start, output_size) each.
        layer_steps: number of (layer, time step) pairs computed; in a compiled program, the number of all pairs.
    """

    output: Tensor
    state: tuple[Tensor, Tensor]
    aux: list[Tensor]
    layer_steps: int


def traced() -> bool:
    """Return whether torch is compiling, exporting or tracing this code."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def hide_padding(x: Tensor, lengths: Tensor, value: float = 0) -> Tensor:
    """Replace the padding of x (N, L, …), whose rows have `lengths` (N,) valid steps, by `value`."""
    padding = torch.arange(x.size(1), device=x.device) >= lengths.unsqueeze(1)  # (N, L)
    # Not a product with a mask, which would let NaN through.
    return x.masked_fill(padding.view(*padding.shape, *[1] * (x.dim() - 2)), value)


def widened(tensor: Tensor, weight: Tensor) -> Tensor:
    """Return `tensor` in the dtype of `weight` if that is wider: within autocast only products are in 16 bits."""
    return tensor.to(torch.promote_types(tensor.dtype, weight.dtype))


def find_activation(name: str) -> Activation:
    """Return the activation of this name.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]


def not_fused(spec: TrellisSpec) -> str:
    """Say why the fused operator cannot run this spec here; empty if it can."""
    if torch.jit.is_tracing():
        return "torch.jit cannot trace it"
    if for_onnx():
        return "ONNX does not have it"
    if transformed():
        return "torch.func cannot transform it"
    if spec.kernel_groups is not None:
        return "it has no mixed group convolution"
    return "" if spec.activation.name in gates.FUNCTIONS else f"it has no {spec.activation.name} gates"


def resolve(spec: TrellisSpec, execution: Execution) -> str:
    """Return the backend that runs `spec`: for `auto` the fastest that can.

    Raises:
        ValueError: the chosen backend cannot run it, or cannot recompute as requested.
    """
    backend, reason = execution.backend, not_fused(spec)
    if backend == "triton" and not torch.compiler.is_compiling():  # torch cannot compile an import
        reason = reason or fused.no_triton()
    if backend in ("fused", "triton") and reason:
        raise ValueError(f"backend: {backend} cannot run this, {reason}; expected auto or reference")
    if backend == "reference" or reason:
        # Under tracing the reference runs even if `recompute` is set, so that any model can be exported.
        if execution.recompute and not traced():
            reason = reason or "the backend is reference"
            raise ValueError(f"recompute: needs the backend fused, but {reason}; turn recompute off")
        return "reference"
    return "fused" if backend == "auto" else backend


def slow_gates(device: torch.device, compute: torch.dtype, activation: str = "lstm") -> str:
    """Say why `auto` falls back to eager gates here, naming the faster ones; empty if it does not."""
    fastest = fused.fastest_gates(device)
    reason = fused.reason_against(fastest, device, compute, activation)
    return f"slower than {fastest}: {reason}" if reason else ""


def trellis(
    x: Tensor,
    weights: Weights,
    state: tuple[Tensor, Tensor] | None,
    spec: TrellisSpec,
    *,
    start: int = 0,
    aux_every: int | None = None,
    hidden_scale: Tensor | None = None,
    lengths: Tensor | None = None,
    execution: Execution = Execution(),  # noqa: B008
) -> Trellis:
    """Run all layers of the trellis.

    Args:
        x: input sequence (N, L, C), L ≥ 1.
        weights: (weight_x, weight_h, bias): kernel on x (GH, C, k), newest tap last, in G row groups (i, o, g, f for an
            LSTM); kernel on the hidden sequence (GH, H, k); bias (GH,).
        state: (h, c) to the left of the first time step, (N, H) each; None for zeros.
        spec: what to compute.
        start: first time step to return outputs for, 0 to L − 1. `fused`, and `reference` for start = L − 1, compute
            only what these outputs depend on.
        aux_every: also return the output of every layer i = 1..num_layers with i % aux_every == 0.
        hidden_scale: factor on the hidden input of every layer and time step, including its left padding, (N, H, 1);
            0 or 1/(1−p) for variational dropout. It leaves the cell path, x and the outputs alone. `fused` has no
            gradient for it.
        lengths: number of valid steps in each row of a right-padded batch, int64 (N,) in start + 1..L; the state is
            then that of the last valid step, and padding in x has no influence. None for all.
        execution: how to compute it.

    Raises:
        ValueError: the kernels do not match the spec, or the backend, gemm or gates cannot run here.
    """
    _, weight_h, bias = weights
    spec.check_kernel(weight_h)
    backend, gates = execution.backend, spec.activation.gates
    if hidden_scale is not None and hidden_scale.requires_grad:
        if backend in ("fused", "triton"):
            raise ValueError(f"hidden_scale: {backend} has no gradient for it; detach it or take backend='reference'")
        backend = "reference"
    tensors = [t for t in (x, *weights, *(state or ()), hidden_scale) if t is not None]
    if backend == "auto" and (x.is_meta or intercepted(*tensors)):
        backend = "reference"
    elif backend in ("fused", "triton") and not traced() and not intercepted():  # a dispatch mode turns kernels off
        for tensor in filter(dispatches, tensors):
            kind = type(tensor).__name__
            raise ValueError(f"{backend}: cannot run on tensors of class {kind}; take backend='reference'")
    if backend != execution.backend:
        execution = dataclasses.replace(execution, backend=backend)
    if lengths is not None:
        x = hide_padding(x, lengths)
    if resolve(spec, execution) != "reference":
        options = {"start": start, "aux_every": aux_every, "hidden_scale": hidden_scale, "lengths": lengths}
        run = operators.trellis if torch.compiler.is_compiling() else fused.trellis
        return Trellis(*run(x, weights, state, spec, **options, execution=execution))
    N, L, _ = x.shape
    x = widened(x, bias)
    zero = x.new_zeros(N, bias.numel() // gates)
    state = (zero, zero) if state is None else tuple(widened(part, bias) for part in state)
    # Under tracing the equation is recorded; the sets of positions of the pruned path depend on L.
    if start == L - 1 and aux_every is None and lengths is None and not traced():
        if spec.kernel_groups is not None:
            weights = mixed_group.dense(*weights, spec.kernel_groups, gates)
        output, state, layer_steps = _last_step(x, weights, state, spec, hidden_scale)
        return Trellis(output, state, [], layer_steps)
    options = {"aux_every": aux_every, "hidden_scale": hidden_scale, "lengths": lengths}
    output, state, aux = reference.trellis(x, weights, state, spec, **options)
    return Trellis(output[:, start:], state, [a[:, start:] for a in aux], spec.num_layers * L)
