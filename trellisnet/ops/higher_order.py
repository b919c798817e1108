"""Differentiable backward passes for operators whose hand-written backward cannot be differentiated.

Such an operator checks in its `backward` whether the hand-written pass suffices (:func:`needed`). If not, it recomputes
its outputs with torch's own operations and lets autograd differentiate those (:func:`gradients`).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def transformed() -> bool:
    """Return whether this code runs under a transform of `torch.func`, which supports only torch's own operations."""
    return torch._C._are_functorch_transforms_active()


def for_onnx() -> bool:
    """Return whether this code is being exported to ONNX."""
    return torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export()  # the second imports torch.onnx


def only_torch() -> bool:
    """Return whether this code may use only torch's own operators, as under a transform or in a torch.jit trace."""
    return transformed() or torch.jit.is_tracing() or for_onnx()


def intercepted(*tensors: Tensor) -> bool:
    """Return whether Python code intercepts torch's operations, so that none may bypass it.

    A dispatch mode does (`make_fx`, `FakeTensorMode`, selective checkpoints), and so do tensor classes such as
    `DTensor`. Neither sees what the gate kernels write through pointers, and such tensors may have no memory at all.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._len_torch_dispatch_stack() > 0 or any(map(dispatches, tensors))


def dispatches(tensor: Tensor) -> bool:
    """Return whether the class of a tensor carries out torch's operations in Python."""
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__


def needed(grads: Sequence[Tensor | None]) -> bool:
    """Return whether this backward pass must consist of torch's own operations.

    This is so if autograd records it (`create_graph=True`, which turns gradient mode on within `backward`), or if vmap
    runs it for many gradients at once (`is_grads_batched=True`): vmap's tensors have no memory to point to, and those
    of classes such as `DTensor` may have none.
    """
    return torch.is_grad_enabled() or not all(grad is None or _has_memory(grad) for grad in grads)


def _has_memory(tensor: Tensor) -> bool:
    if dispatches(tensor):
        return False
    try:
        tensor.data_ptr()
    except RuntimeError:
        return False
    return True


def gradients(
    function: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    wanted: Sequence[bool],
    grads: Sequence[Tensor],
) -> list[Tensor | None]:
    """Return the gradients of Σ grads · function(*inputs), differentiable if gradient mode is on.

    Args:
        function: returns one tensor for each of `grads`. It runs without autocast, which would round.
        inputs: inputs of the operator, as autograd saved them. One may depend on another; the gradients are partial.
        wanted: whether the gradient of each input is needed; otherwise it is None.
        grads: gradients of the outputs.
    """
    recorded = torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast(grads[0].device.type, enabled=False):
        # Aliases, so that autograd stops at them and does not go on from one input to another.
        inputs = [None if t is None else t.view_as(t) if recorded else t.detach() for t in inputs]
        leaves = [t for t, needs in zip(inputs, wanted, strict=True) if needs]
        if not recorded:
            leaves = [t.requires_grad_() for t in leaves]
        outputs = function(*inputs)
        grads = [grad.to(output.dtype) for grad, output in zip(grads, outputs, strict=True)]
        # Zeros, not None, for inputs without influence, as the hand-written passes return.
        partials = iter(torch.autograd.grad(outputs, leaves, grads, create_graph=recorded, materialize_grads=True))
    return [next(partials) if needs else None for needs in wanted]
