r"""Cross-entropy of a softmax over a linear map, or of a mixture of them, without holding all logits at once.

Expert k of a mixture (Yang et al., 2018) has the logits a_k = W x_k + b. For a target y the loss and its gradient are

.. math::
    \ell = -\log\Bigl(\varepsilon + \sum_k \pi_k\, \mathrm{softmax}(a_k)_y\Bigr), \qquad
    \frac{\partial \ell}{\partial a_k} = \rho_k\,(\mathrm{softmax}(a_k) - \mathrm{onehot}(y)), \qquad
    \rho_k = -\frac{\partial \ell}{\partial \log \pi_k} = \pi_k\, \mathrm{softmax}(a_k)_y\, e^{\ell},

and a single softmax is the mixture of one, ρ = 1. So if the weights of the sum of losses are known beforehand, a chunk
of positions needs its logits only once, for the losses and for the gradient of the sum. Both are computed in the
forward pass, chunk by chunk, with the three products that forward and backward pass take anyway. The gradient of
anything but the sum takes a fourth product, which recomputes the logits. If the backward pass is itself
differentiated, the definition is used instead, with all logits at once.

Letters: P positions, K experts, E width of x, V classes, R rows of a product: K for each position of a chunk.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trellisnet.ops import gemm as products
from trellisnet.ops import higher_order

CHUNK, CHUNK_GPU = 1 << 21, 1 << 26  # logits of a chunk: 8 and 268 MB in fp32; on a GPU it takes some 50 launches
ROWS = 128  # least rows of a chunk, because every chunk reads W twice and adds to its gradient
BUCKET = 32  # round rows up to a multiple on a CPU, where oneDNN keeps a megabyte for every distinct number of rows


class _Setting(NamedTuple):
    compute: torch.dtype  # of the products
    product: products.Product
    positions: int  # per chunk
    bucket: int  # rows of a product are a multiple of this
    log_epsilon: float
    needs_grad: bool


def reference(
    x: Tensor, weight: Tensor, bias: Tensor, target: Tensor, log_prior: Tensor | None = None, log_epsilon: float = 0.0
) -> Tensor:
    """Return the losses (P,) by their definition, with all logits at once; arguments as in :func:`cross_entropy`."""
    log_p = F.log_softmax(F.linear(x, weight, bias), dim=-1)  # (P, K, V)
    log_p = log_p.gather(2, target.view(-1, 1, 1).expand(-1, x.size(1), 1)).squeeze(2)  # (P, K)
    if log_prior is not None:
        log_p = log_p + log_prior
    log_p = log_p.logsumexp(dim=1)
    return -(torch.logaddexp(log_p, log_p.new_full((), math.log(log_epsilon))) if log_epsilon else log_p)


def _log_softmax(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the softmax of logits (R, V), and its logarithm at y, (R, 1)."""
    p = torch.softmax(logits, dim=1)
    # The largest probability is 1 / Σ exp(a − max a), so log Σ exp(a) costs no further exponentials.
    log_sum = logits.amax(1, keepdim=True) - p.amax(1, keepdim=True).log()
    return p, logits.gather(1, y) - log_sum


def _losses(setting: _Setting, x, weight, bias, target, log_prior, scale, wanted=(True, True)) -> tuple[Tensor, tuple]:
    """Return the losses (P,) and, with a `scale`, the gradients of Σ scale · loss by x, weight, bias and log_prior.

    Args:
        wanted: whether to compute the gradients of x and of weight, which take a product each.
    """
    (P, K, E), compute = x.shape, setting.compute
    sums = torch.float64 if compute == torch.float64 else torch.float32  # softmax, losses, and sums over chunks
    w, b = weight.to(compute), bias.to(sums)
    loss = x.new_empty(P, dtype=sums)
    dx = dweight = dbias = dlog_prior = None
    if scale is not None:
        dx = torch.empty_like(x) if wanted[0] else None
        dbias = torch.zeros_like(bias, dtype=sums)
        dlog_prior = None if log_prior is None else torch.empty_like(log_prior)
    for start in range(0, P, setting.positions):
        at = slice(start, min(start + setting.positions, P))
        R = (at.stop - start) * K
        padding = (0, 0, 0, -R % setting.bucket)
        rows = F.pad(x[at].reshape(R, E).to(compute), padding)
        y = F.pad(target[at].repeat_interleave(K).unsqueeze(1), padding)
        p, log_p = _log_softmax(setting.product(rows, w).to(sums).add_(b), y)
        log_p = log_p[:R].view(-1, K)
        if log_prior is not None:
            log_p = log_p + log_prior[at]
        mixed = log_p.logsumexp(dim=1, keepdim=True)
        if setting.log_epsilon:
            mixed = torch.logaddexp(mixed, mixed.new_full((), math.log(setting.log_epsilon)))
        loss[at] = -mixed.squeeze(1)
        if scale is None:
            continue
        rho = (log_p - mixed).exp() * scale[at].unsqueeze(1)  # (R/K, K)
        if dlog_prior is not None:
            dlog_prior[at] = -rho
        rho = F.pad(rho.view(R, 1), padding)
        # In one dimension: with deterministic algorithms, only that form of scatter can be captured in a CUDA graph.
        flat_y = y.squeeze(1) + torch.arange(y.size(0), device=y.device) * p.size(1)
        p.view(-1).scatter_(0, flat_y, p.gather(1, y).squeeze(1) - 1)
        # Sum in blocks: one product over all rows would add them up one by one and lose digits.
        block = BUCKET if rows.size(0) % BUCKET == 0 else rows.size(0)
        dbias += torch.bmm(rho.view(-1, 1, block), p.view(-1, block, p.size(1))).sum((0, 1))
        p = p.to(compute)
        # ρ is one number per row, so each product is scaled on its narrow side, E, not on V.
        if dx is not None:
            dx[at] = (setting.product(p, w.t()) * rho)[:R].view(-1, K, E)
        if wanted[1]:
            rows = (rows * rho).to(compute)
            if dweight is None:  # filling and adding to zeros would cost as much as many rows of the product
                dweight = products.product_in(sums, p.t(), rows.t(), products.ROUTES["mm"])
            else:
                products.add_product(dweight, p.t(), rows.t(), products.ROUTES["mm"])
    return loss, (dx, dweight, dbias, dlog_prior)


class _CrossEntropy(torch.autograd.Function):
    """(setting, x, weight, bias, target, log_prior, scale) → Σ scale · loss, losses (P,)."""

    @staticmethod
    def forward(ctx: Any, setting: _Setting, x, weight, bias, target, log_prior, scale):
        ctx.setting, ctx.wanted = setting, ctx.needs_input_grad[1:3]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, target, log_prior, scale)
        summed = scale if setting.needs_grad else None
        loss, ctx.gradients = _losses(setting, x, weight, bias, target, log_prior, summed, ctx.wanted)
        return None if scale is None else (loss * scale).sum(), loss

    @staticmethod
    def backward(ctx: Any, dtotal, dloss):
        if dtotal is None and dloss is None:
            return (None,) * 7
        if higher_order.needed((dtotal, dloss)):
            return _CrossEntropy._differentiable(ctx, dtotal, dloss)
        x, weight, bias, target, log_prior, scale = ctx.saved_tensors

        def compute(scale: Tensor) -> tuple[Tensor | None, ...]:
            with torch.autocast(x.device.type, enabled=False):
                return _losses(ctx.setting, x, weight, bias, target, log_prior, scale, ctx.wanted)[1]

        if dloss is None:
            # The precomputed gradients are scaled in place and handed over; a second backward pass recomputes them.
            gradients, ctx.gradients = ctx.gradients or compute(scale), None
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(dtotal)
        else:
            gradients = compute(dloss if dtotal is None else dloss + dtotal * scale)
        dx, dweight, dbias, dlog_prior = gradients
        dweight = None if dweight is None else dweight.to(weight.dtype)
        return None, dx, dweight, dbias.to(bias.dtype), None, dlog_prior, None

    @staticmethod
    def jvp(ctx: Any, *tangents):
        raise NotImplementedError("cross_entropy has no forward-mode derivatives; take the cross_entropy of log_prob")

    @staticmethod
    def _differentiable(ctx: Any, dtotal, dloss):
        x, weight, bias, target, log_prior, scale = ctx.saved_tensors
        ctx.gradients = None  # frees the precomputed ones, which an ordinary backward pass would recompute
        sums = torch.float64 if ctx.setting.compute == torch.float64 else torch.float32

        def losses(*inputs):
            x, weight, bias, log_prior = (None if t is None else t.to(sums) for t in inputs)
            return (reference(x, weight, bias, target, log_prior, ctx.setting.log_epsilon),)

        grad = dloss if dtotal is None else dtotal * scale if dloss is None else dloss + dtotal * scale
        wanted = [*ctx.needs_input_grad[1:4], ctx.needs_input_grad[5]]
        *dx, dlog_prior = higher_order.gradients(losses, (x, weight, bias, log_prior), wanted, (grad,))
        return None, *dx, None, dlog_prior, None


def cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    scale: Tensor | None = None,
    *,
    log_prior: Tensor | None = None,
    log_epsilon: float = 0.0,
    gemm: str = "auto",
    within: Tensor | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Return the negative log-likelihood in nats, −log(log_epsilon + Σ_k prior_k · softmax(W x_k + b)[target]).

    Differentiable in x, weight, bias and log_prior. The gradient of the sum is computed together with it; that of the
    individual losses computes the logits a second time. Within `torch.autocast` the products are in its dtype; softmax,
    losses and the accumulated gradients of weight and bias are in float32 at least.

    Args:
        x: features, (P, K, E); K = 1 without a mixture.
        weight: W, (V, E).
        bias: b, (V,).
        target: classes, int64 (P,).
        scale: weights of the positions in the sum, (P,), without a gradient. None for no sum.
        log_prior: log-prior of every expert, (P, K). None for a single expert.
        log_epsilon: added to the probability.
        gemm: matrix products, one of `trellisnet.ops.GEMMS`.
        within: in a compiled program, the positions to compute, bool (P,); losses elsewhere are zero. None for all.
            Eager code selects the positions itself.

    Returns:
        The sum of scale · loss, 0-dim (or None), and the losses (P,): float64 if weight is, else float32.

    Raises:
        ValueError: an unknown gemm, or one that cannot run here; a scale that requires a gradient.
    """
    if scale is not None and scale.requires_grad:
        raise ValueError("scale: cross_entropy has no gradient for it; detach it")
    if higher_order.only_torch():
        losses = reference(x, weight, bias, target, log_prior, log_epsilon)
        return None if scale is None else (losses * scale).sum(), losses
    device, compute = x.device.type, weight.dtype
    if torch.is_autocast_enabled(device) and compute != torch.float64:
        compute = torch.get_autocast_dtype(device)
    inputs = (x, weight, bias, log_prior)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    if torch.compiler.is_compiling():
        wanted = [needs_grad, x.requires_grad, weight.requires_grad]
        settings = log_epsilon, str(compute).removeprefix("torch."), gemm, *wanted
        tensors = x, weight, bias, target, log_prior, scale, within
        total, losses, _ = torch.ops.trellisnet.cross_entropy(*tensors, *settings)
        return None if scale is None else total, losses
    setting = _setting(x, weight, compute, gemm, log_epsilon, needs_grad)
    with torch.autocast(device, enabled=False):
        return _CrossEntropy.apply(setting, x, weight, bias, target, log_prior, scale)


def _setting(
    x: Tensor, weight: Tensor, compute: torch.dtype, gemm: str, log_epsilon: float, needs_grad: bool
) -> _Setting:
    chunk, bucket = (CHUNK, BUCKET) if x.device.type == "cpu" else (CHUNK_GPU, 1)
    rows = max(ROWS, chunk // weight.size(0))
    rows += -rows % bucket
    product = products.resolve(gemm, x.device, compute)
    return _Setting(compute, product, max(1, rows // x.size(1)), bucket, log_epsilon, needs_grad)


# -- the same as an operator of torch, for programs that are compiled or exported (see trellisnet.ops.operators) -------

_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor bias, Tensor target, Tensor? log_prior, Tensor? scale, Tensor? within, "
    "float log_epsilon, str compute, str gemm, bool needs_grad, bool needs_x, bool needs_weight"
)
_SETTINGS = 6  # number of arguments that are no tensors


def _run(x, weight, bias, target, log_prior, scale, within, log_epsilon, compute, gemm, needs_grad, *wanted):
    """Return losses (P,), zero where `within` is False, and the gradients as a list, with 0-dim tensors for None."""
    setting = _setting(x, weight, getattr(torch, compute), gemm, log_epsilon, needs_grad)
    rows = slice(None) if within is None else within.nonzero().squeeze(1)
    priors, scales = (None if t is None else t[rows] for t in (log_prior, scale))
    with torch.autocast(x.device.type, enabled=False):
        summed = scales if needs_grad else None
        losses, grads = _losses(setting, x[rows], weight, bias, target[rows], priors, summed, wanted)
    dx, dweight, dbias, dlog_prior = grads
    if within is not None:
        losses = losses.new_zeros(target.shape).index_copy_(0, rows, losses)
        dx, dlog_prior = (
            None if grad is None else torch.zeros_like(all_rows).index_copy_(0, rows, grad)
            for all_rows, grad in ((x, dx), (log_prior, dlog_prior))
        )
    if summed is None:
        return losses, []
    if dweight is None and wanted[1]:  # no position at all
        dweight = torch.zeros_like(weight, dtype=losses.dtype)
    return losses, [x.new_zeros(()) if grad is None else grad for grad in (dx, dweight, dbias, dlog_prior)]


def _shapes(x, weight, bias, target, log_prior, scale, within, log_epsilon, compute, gemm, needs_grad, *wanted):
    sums = torch.float64 if compute == "float64" else torch.float32
    losses = x.new_empty(target.shape, dtype=sums)
    if scale is None or not needs_grad:
        return losses, []
    dx, dweight = (torch.empty_like(x) if wanted[0] else None), None
    if wanted[1]:
        dweight = weight.new_empty(weight.shape, dtype=sums)
    grads = dx, dweight, bias.new_empty(bias.shape, dtype=sums), log_prior
    return losses, [x.new_empty(()) if grad is None else torch.empty_like(grad) for grad in grads]


_FORWARD = f"({_ARGUMENTS}) -> (Tensor, Tensor, Tensor[])"  # Σ scale · loss, losses, gradients of the first


@torch.library.custom_op("trellisnet::cross_entropy", mutates_args=(), schema=_FORWARD)
def _operator(*arguments):
    losses, grads = _run(*arguments)
    scale = arguments[5]
    return losses.new_zeros(()) if scale is None else (losses * scale).sum(), losses, grads


@_operator.register_fake
def _(*arguments):
    losses, grads = _shapes(*arguments)
    scale = arguments[5]
    dtype = losses.dtype if scale is None else torch.promote_types(losses.dtype, scale.dtype)
    return losses.new_empty((), dtype=dtype), losses, grads


@torch.library.custom_op("trellisnet::cross_entropy_backward", mutates_args=(), schema=f"({_ARGUMENTS}) -> Tensor[]")
def _backward_operator(*arguments):
    return _run(*arguments)[1]


@_backward_operator.register_fake
def _(*arguments):
    return _shapes(*arguments)[1]


def _by_the_definition(x, weight, bias, target, log_prior, within, log_epsilon) -> Tensor:
    if within is None:
        return reference(x, weight, bias, target, log_prior, log_epsilon)
    return reference(x, weight, bias, target * within, log_prior, log_epsilon) * within


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)
    ctx.settings = inputs[-_SETTINGS:]
    ctx.save_for_backward(*inputs[:-_SETTINGS], *output[2])


def _gradients(ctx: Any, dtotal, dloss, _):
    x, weight, bias, target, log_prior, scale, within, *grads = ctx.saved_tensors
    log_epsilon, compute, gemm, needs_grad, *wanted = ctx.settings
    nothing = [None] * (1 + _SETTINGS)
    dtotal = None if scale is None else dtotal  # else there is no sum
    if dtotal is None and dloss is None:
        return *nothing, *[None] * 6
    grad = dloss if dtotal is None else dtotal * scale if dloss is None else dloss + dtotal * scale
    if torch.is_grad_enabled():  # the backward pass will itself be differentiated

        def losses(*inputs):
            x, weight, bias, log_prior = (None if t is None else t.to(grad.dtype) for t in inputs)
            return (_by_the_definition(x, weight, bias, target, log_prior, within, log_epsilon),)

        needed = [*ctx.needs_input_grad[:3], ctx.needs_input_grad[4]]
        *dx, dlog_prior = higher_order.gradients(losses, (x, weight, bias, log_prior), needed, (grad,))
        return *dx, None, dlog_prior, None, *nothing
    needed = [*ctx.needs_input_grad[:2], True, log_prior is not None]
    # A program exported without gradients has not computed those of the sum, or not all of them.
    if dloss is None and needs_grad and not any(now > then for now, then in zip(needed[:2], wanted, strict=True)):
        grads = [g * dtotal for g in grads]
    else:
        settings = log_epsilon, compute, gemm, True, *needed[:2]
        tensors = x, weight, bias, target, log_prior, grad, within
        grads = torch.ops.trellisnet.cross_entropy_backward(*tensors, *settings)
    dx, dweight, dbias, dlog_prior = (g if needs else None for g, needs in zip(grads, needed, strict=True))
    dweight = None if dweight is None else dweight.to(weight.dtype)
    return dx, dweight, dbias.to(bias.dtype), None, dlog_prior, None, *nothing


_operator.register_autograd(_gradients, setup_context=_setup)


def decomposition(x, weight, bias, target, log_prior, scale, within, log_epsilon, compute, *_):
    """Compute the operator's results by torch's own operations (`trellisnet.ops.operators.DECOMPOSITIONS`)."""
    sums = torch.float64 if compute == "float64" else torch.float32
    x, weight, bias, log_prior = (None if t is None else t.to(sums) for t in (x, weight, bias, log_prior))
    losses = _by_the_definition(x, weight, bias, target, log_prior, within, log_epsilon)
    total = losses.new_zeros(()) if scale is None else (losses * scale).sum()
    # In the place of the gradients, which a program exported with gradients unpacks and does not read.
    return total, losses, [losses.new_zeros(())] * 4
