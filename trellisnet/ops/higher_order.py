"""Backward passes that can themselves be differentiated, for operators with a hand-written one that cannot.

Such an operator asks in its `backward` whether the hand-written pass will do (:func:`needed`); if not, it computes its
outputs again with torch's operations and lets autograd differentiate these (:func:`gradients`).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def transformed() -> bool:
    """Whether `torch.func` transforms what is run, which it can do with torch's own operations alone."""
    return torch._C._are_functorch_transforms_active()


def needed(grads: Sequence[Tensor | None]) -> bool:
    """Whether this backward pass must consist of torch's own operations.

    It must if autograd records it (`create_graph=True`, which turns gradient mode on within `backward`), or if vmap
    runs it for many gradients at once (`is_grads_batched=True`); what vmap hands over has no memory to point at.
    """
    return torch.is_grad_enabled() or not all(grad is None or _has_memory(grad) for grad in grads)


def _has_memory(tensor: Tensor) -> bool:
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
    """Gradients of Σ grads · function(*inputs), differentiable in `inputs` and `grads` if gradient mode is on.

    Args:
        function: returns as many tensors as there are `grads`. It runs without autocast, which would round.
        inputs: of the operator, as autograd saved them; one may depend on another, each gradient is partial.
        wanted: of which inputs the gradients are. The others' are None.
        grads: of the outputs.
    """
    recorded = torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast(grads[0].device.type, enabled=False):
        # An alias each, so that autograd stops there and does not go on to another input.
        inputs = [None if t is None else t.view_as(t) if recorded else t.detach() for t in inputs]
        leaves = [t for t, needs in zip(inputs, wanted, strict=True) if needs]
        if not recorded:
            leaves = [t.requires_grad_() for t in leaves]
        outputs = function(*inputs)
        grads = [grad.to(output.dtype) for grad, output in zip(grads, outputs, strict=True)]
        # Zeros for what has no influence, as hand-written passes give.
        found = iter(torch.autograd.grad(outputs, leaves, grads, create_graph=recorded, materialize_grads=True))
    return [next(found) if needs else None for needs in wanted]
