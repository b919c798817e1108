"""Output layers, which own or share their parameters, with one interface: `log_prob(x)` and `loss(x, target)`.

Letters: V classes, K experts, E embedding width, P positions; `...` any leading dimensions.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trellisnet.ops.cross_entropy import cross_entropy
from trellisnet.ops.higher_order import only_torch
from trellisnet.regularization import check_rate, scaled

INIT_RANGE = 0.1
REDUCTIONS = ("mean", "sum", "none")
# Logits computed at a time by a mixture's log_prob (16 MB in fp32; the backward pass holds a few such tensors).
CHUNK_LOGITS = 2**22


def check_target(target: Tensor) -> None:
    """Raise TypeError unless target holds class ids, int64."""
    if target.dtype != torch.int64:
        raise TypeError(f"target: expected class ids in int64, got {str(target.dtype).removeprefix('torch.')}")


class _Head(nn.Module):
    """Losses common to all heads; a head implements `_losses`.

    No loss stores positions × V numbers: see :mod:`trellisnet.ops.cross_entropy`.
    """

    def _losses(self, x: Tensor, target: Tensor, scale: Tensor | None, **latent: Any) -> tuple[Tensor | None, Tensor]:
        """Return Σ scale · loss (None without a scale) and the losses (P,) of x (..., in_features) and P targets."""
        raise NotImplementedError

    def loss(self, x: Tensor, target: Tensor, reduction: str = "mean", **latent: Any) -> Tensor:
        """Return the negative log-likelihood in nats.

        Args:
            x: (..., in_features).
            target: class ids, int64, (...).
            reduction: "mean", "sum" (0-dim results) or "none" (shape of target), whose gradient takes longer.
            latent: for a mixture, the keywords of :meth:`MixtureOfSoftmaxes.log_prob`.

        Raises:
            TypeError: target is not int64.
            ValueError: unknown reduction, or shapes that do not fit.
        """
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
        if x.shape[:-1] != target.shape:
            raise ValueError(f"target: expected shape {tuple(x.shape[:-1])}, got {tuple(target.shape)}")
        check_target(target)
        if reduction == "none":
            return self._losses(x, target, None, **latent)[1].view(target.shape)
        total, _ = self._losses(x, target, _repeated(1.0, x, target), **latent)
        return total / target.numel() if reduction == "mean" else total

    def losses(self, x: Tensor, target: Tensor, weights: Sequence[float], **latent: Any) -> tuple[Tensor, Tensor]:
        """Return the mean losses of S features of the same positions, in one pass with one gradient of the matrix.

        Args:
            x: (S, ..., in_features).
            target: class ids, int64, (...).
            weights: S numbers.
            latent: as in :meth:`loss`.

        Returns:
            The weighted sum of the losses, and the losses (S,). Differentiate the sum: the gradient of the individual
            losses takes longer.

        Raises:
            TypeError: target is not int64.
            ValueError: shapes that do not fit.
        """
        check_target(target)
        expected = (len(weights), *target.shape)
        if x.shape[:-1] != expected:
            raise ValueError(f"x: expected shape {(*expected, self.in_features)}, got {tuple(x.shape)}")
        scale = torch.cat([_repeated(weight, x, target) for weight in weights])
        total, each = self._losses(x, target.expand(expected), scale, **latent)
        return total / target.numel(), each.view(len(weights), -1).mean(1)


class _Softmax(_Head):
    """A head with the matrix (n_classes, width) and the bias (n_classes,) of a softmax, owned or shared.

    The matrix is either the parameter `weight`, or `weight_of.weight` of a module that assembles it anew for every pass
    (:class:`trellisnet.baselines.sparse.SparseEmbedding`). :meth:`matrix` returns it in both cases.

    The arguments are those of the heads, and `width`, that of the matrix.

    Raises:
        ValueError: a shared parameter has another shape.
    """

    def __init__(
        self,
        in_features: int,
        n_classes: int,
        width: int,
        weight: nn.Parameter | nn.Module | None,
        bias: nn.Parameter | None,
        gemm: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ):
        super().__init__()
        self.in_features = in_features
        self.n_classes = n_classes
        self.gemm = gemm
        if weight is None:
            weight = nn.Parameter(torch.empty(n_classes, width, device=device, dtype=dtype))
            nn.init.uniform_(weight, -INIT_RANGE, INIT_RANGE)
        if bias is None:
            bias = nn.Parameter(torch.zeros(n_classes, device=device, dtype=dtype))
        if isinstance(weight, nn.Module):
            self.weight_of = weight
        else:
            self.weight = weight
        self.bias = bias
        for name, tensor, shape in (("weight", self.matrix(), (n_classes, width)), ("bias", bias, (n_classes,))):
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.n_classes}"

    def matrix(self) -> Tensor:
        """Return the matrix of the softmax, (V, width)."""
        return self.weight_of.weight if "weight_of" in self._modules else self.weight


def _in_chunks(function: Callable[..., Tensor], logits: int, *tensors: Tensor) -> Tensor:
    """Evaluate function(*tensors) in chunks of positions; `logits` is the number of logits per position.

    With gradients and more than one chunk, the backward pass recomputes the logits, so that those of only one chunk are
    alive at a time.
    """
    size = max(1, CHUNK_LOGITS // logits)
    if tensors[0].size(0) <= size:
        return function(*tensors)
    chunks = zip(*(t.split(size) for t in tensors), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([function(*chunk) for chunk in chunks])
    options = {"use_reentrant": False, "preserve_rng_state": False}  # the function draws no random numbers
    return torch.cat([checkpoint(function, *chunk, **options) for chunk in chunks])


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return logits x · weightᵀ + bias in float32 at least, for softmax and loss; the product may be in bfloat16."""
    logits = F.linear(x, weight, bias)
    return logits.float() if logits.dtype.itemsize < 4 else logits


def _repeated(weight: float, x: Tensor, target: Tensor) -> Tensor:
    """Repeat a weight for every target, in float32 at least."""
    return x.new_full((target.numel(),), weight, dtype=torch.promote_types(x.dtype, torch.float32))


class LinearSoftmax(_Softmax):
    """Softmax over a linear map, log softmax(W x + b); the head of Tables 1 and 3.

    Args:
        in_features: width of x.
        n_classes: V.
        weight: parameter (V, in_features) to share, such as the embedding of a tied model, or a module with such a
            `weight`. Default: a new one, U(±0.1).
        bias: parameter (V,) to share. Default: a new one, zero.
        gemm: matrix products of the losses, one of `trellisnet.ops.GEMMS`.

    Raises:
        ValueError: a shared parameter has another shape.
    """

    def __init__(
        self,
        in_features: int,
        n_classes: int,
        *,
        weight: nn.Parameter | nn.Module | None = None,
        bias: nn.Parameter | None = None,
        gemm: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, n_classes, in_features, weight, bias, gemm, device, dtype)

    def logits(self, x: Tensor) -> Tensor:
        """Return logits, (..., in_features) → (..., V)."""
        return _linear(x, self.matrix(), self.bias)

    def log_prob(self, x: Tensor) -> Tensor:
        """Return log-probabilities in nats, (..., in_features) → (..., V)."""
        return F.log_softmax(self.logits(x), dim=-1)

    def margin(self, x: Tensor, target: Tensor) -> Tensor:
        """Return the logit of the target minus the mean of all logits, without computing them.

        Cross-entropy with label smoothing ε is the loss plus ε times this margin.

        Args:
            x: (..., in_features).
            target: class ids, int64 (...).

        Returns:
            (...), float32 at least.
        """
        weight = F.embedding(target, self.matrix()) - self.matrix().mean(0)
        bias = F.embedding(target, self.bias.unsqueeze(1)).squeeze(-1) - self.bias.mean()
        return (x * weight).sum(-1) + bias

    def _losses(self, x: Tensor, target: Tensor, scale: Tensor | None) -> tuple[Tensor | None, Tensor]:
        x = x.reshape(-1, 1, self.in_features)
        return cross_entropy(x, self.matrix(), self.bias, target.reshape(-1), scale, gemm=self.gemm)


class MixtureOfSoftmaxes(_Softmax):
    """Mixture of softmaxes p = Σ_k π_k softmax(W tanh(z_k) + b) (Yang et al., 2018), in log space.

    π = softmax(prior(x)) and z = latent(x), K latent vectors of width E. As in the TrellisNet authors' code, the prior
    has a bias and latent dropout acts *before* the tanh. The P·K·V logits never exist all at once.

    Args:
        in_features: width of x.
        n_classes: V.
        n_experts: K.
        embedding_size: E.
        weight: parameter (V, E) to share, such as the embedding of a tied model, or a module with such a `weight`.
            Default: a new one, U(±0.1).
        bias: parameter (V,) to share. Default: a new one, zero.
        dropout: probability of dropping a channel of a latent vector, one mask per sequence.
        log_epsilon: the result is log(p + log_epsilon). The authors' code adds 1e-8, which favours improbable words.
        prior_bias: whether the prior has a bias. Yang et al. have none.
        dropout_after_tanh: apply latent dropout after the tanh, as Yang et al. do.
        gemm: matrix products of the losses, one of `trellisnet.ops.GEMMS`.

    Raises:
        ValueError: a setting is out of range, or a shared parameter has another shape.
    """

    def __init__(
        self,
        in_features: int,
        n_classes: int,
        n_experts: int,
        embedding_size: int,
        *,
        weight: nn.Parameter | nn.Module | None = None,
        bias: nn.Parameter | None = None,
        dropout: float = 0.0,
        log_epsilon: float = 0.0,
        prior_bias: bool = True,
        dropout_after_tanh: bool = False,
        gemm: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, n_classes, embedding_size, weight, bias, gemm, device, dtype)
        if n_experts < 1:
            raise ValueError(f"n_experts: expected at least 1, got {n_experts}")
        if not 0 <= log_epsilon < math.inf:
            raise ValueError(f"log_epsilon: expected 0 or a small positive number, got {log_epsilon}")
        self.n_experts = n_experts
        self.embedding_size = embedding_size
        self.dropout = check_rate("dropout", dropout)
        self.log_epsilon = log_epsilon
        self.dropout_after_tanh = dropout_after_tanh
        self.prior = nn.Linear(in_features, n_experts, bias=prior_bias, device=device, dtype=dtype)
        self.latent = nn.Linear(in_features, n_experts * embedding_size, device=device, dtype=dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, n_experts={self.n_experts}, dropout={self.dropout}"

    def _mix(self, x: Tensor, latent_mask: Tensor | None, draw: bool) -> tuple[Tensor, Tensor]:
        """Return log π (P, K) and tanh(z) (P, K, E) for x (..., in_features)."""
        shape = (*x.shape[:-2], 1, self.n_experts * self.embedding_size)
        if latent_mask is not None:
            if tuple(latent_mask.shape) != shape:
                raise ValueError(f"latent_mask: expected shape {shape}, got {tuple(latent_mask.shape)}")
            scale = latent_mask.to(x) / (1 - self.dropout)
        elif draw and self.training and self.dropout > 0:
            scale = F.dropout(x.new_ones(shape), self.dropout)
        else:
            scale = None
        z = self.latent(x)  # (..., K·E)
        z = scaled(z.tanh(), scale) if self.dropout_after_tanh else scaled(z, scale).tanh()
        log_prior = F.log_softmax(_linear(x, self.prior.weight, self.prior.bias), dim=-1)  # (..., K)
        return log_prior.reshape(-1, self.n_experts), z.reshape(-1, self.n_experts, self.embedding_size)

    def _add_epsilon(self, log_p: Tensor) -> Tensor:
        if not self.log_epsilon:
            return log_p
        return torch.logaddexp(log_p, log_p.new_full((), math.log(self.log_epsilon)))

    def log_prob(self, x: Tensor, *, latent_mask: Tensor | None = None, draw: bool = True) -> Tensor:
        """Return log-probabilities in nats, (..., in_features) → (..., V).

        Args:
            x: (..., L, in_features).
            latent_mask: explicit 0/1 mask (..., 1, K·E); it acts in training and evaluation mode.
            draw: draw a mask in training mode if none is given.
        """
        # Bound now: when the checkpoint recomputes, `torch.func.functional_call` may have restored other parameters.
        matrix, bias = self.matrix(), self.bias

        def mixture(log_prior: Tensor, z: Tensor) -> Tensor:
            log_p = F.log_softmax(_linear(z, matrix, bias), dim=-1)  # (P, K, V)
            return self._add_epsilon(torch.logsumexp(log_prior.unsqueeze(2) + log_p, dim=1))  # (P, V)

        log_p = _in_chunks(mixture, self.n_experts * self.n_classes, *self._mix(x, latent_mask, draw))
        return log_p.view(*x.shape[:-1], self.n_classes)

    def _losses(
        self, x: Tensor, target: Tensor, scale: Tensor | None, latent_mask: Tensor | None = None, draw: bool = True
    ) -> tuple[Tensor | None, Tensor]:
        log_prior, z = self._mix(x, latent_mask, draw)
        options = {"log_prior": log_prior, "log_epsilon": self.log_epsilon, "gemm": self.gemm}
        return cross_entropy(z, self.matrix(), self.bias, target.reshape(-1), scale, **options)


class SplitSoftmax(_Softmax):
    """Tied adaptive softmax (Grave et al., 2017): a short list of frequent words, and bands of rarer ones.

    The head softmax covers the words below the first cut-off and one entry per band. A word in a band has the
    probability of the band's entry times that of a softmax within the band. All words share one matrix, so that it can
    be tied to the embedding; only the bands' entries have vectors of their own. Values, and the order of these vectors,
    follow the authors' code of 2019: band i, counted from 1, is row −i.

    Args:
        in_features: width of x.
        n_classes: V.
        cutoffs: 0 < c₁ < c₂ < … < V; the short list is [0, c₁), band i is [cᵢ, cᵢ₊₁).
        weight: parameter (V, in_features) to share, such as the embedding of a tied model, or a module with such a
            `weight`. Default: a new one, U(±0.1).
        bias: parameter (V,) to share. Default: a new one, zero.
        gemm: matrix products of the losses, one of `trellisnet.ops.GEMMS`.

    Raises:
        ValueError: the cut-offs do not increase or reach V, or a shared parameter has another shape.
    """

    def __init__(
        self,
        in_features: int,
        n_classes: int,
        cutoffs: Sequence[int],
        *,
        weight: nn.Parameter | nn.Module | None = None,
        bias: nn.Parameter | None = None,
        gemm: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, n_classes, in_features, weight, bias, gemm, device, dtype)
        borders = [0, *cutoffs, n_classes]
        if len(borders) < 3 or any(low >= high for low, high in pairwise(borders)):
            raise ValueError(f"cutoffs: expected increasing numbers between 0 and {n_classes}, got {list(cutoffs)}")
        self.cutoffs = list(cutoffs)
        self.sizes = [high - low for low, high in pairwise(borders)]  # of the short list and the bands
        self.tail_vectors = nn.Parameter(torch.zeros(len(cutoffs), in_features, device=device, dtype=dtype))
        self.tail_bias = nn.Parameter(torch.zeros(len(cutoffs), device=device, dtype=dtype))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, cutoffs={self.cutoffs}"

    def _parts(self) -> list[tuple[Tensor, Tensor]]:
        """Return weight and bias of the head softmax, then of every band."""
        # Split once, so that the backward pass builds one gradient of the whole matrix and not one per slice.
        (short, *weights), (short_bias, *biases) = self.matrix().split(self.sizes), self.bias.split(self.sizes)
        head = torch.cat([short, self.tail_vectors]), torch.cat([short_bias, self.tail_bias])
        return [head, *zip(weights, biases, strict=True)]

    def log_prob(self, x: Tensor) -> Tensor:
        """Return log-probabilities in nats, (..., in_features) → (..., V)."""
        head, *bands = (F.log_softmax(_linear(x, weight, bias), dim=-1) for weight, bias in self._parts())
        entries = head[..., self.sizes[0] :].unbind(-1)
        bands = [entries[-i].unsqueeze(-1) + band for i, band in enumerate(bands, 1)]
        return torch.cat([head[..., : self.sizes[0]], *bands], dim=-1)

    def _losses(self, x: Tensor, target: Tensor, scale: Tensor | None) -> tuple[Tensor | None, Tensor]:
        if only_torch():  # here no shape may depend on the values of the targets
            losses = -self.log_prob(x).gather(-1, target.unsqueeze(-1)).view(-1)
            return None if scale is None else (losses * scale).sum(), losses
        # A band is computed only at the positions whose target lies in it.
        x, flat = x.reshape(-1, 1, self.in_features), target.reshape(-1)  # (P, 1, in_features), (P,)
        band = sum((flat >= cutoff).long() for cutoff in self.cutoffs)  # 0: the short list
        head, *bands = self._parts()
        entry = torch.where(band > 0, head[1].numel() - band, flat)
        total, losses = cross_entropy(x, *head, entry, scale, gemm=self.gemm)
        for i, part in enumerate(bands, 1):
            if torch.compiler.is_compiling():  # nor here, but the operator can select the positions itself
                shifted, options = flat - self.cutoffs[i - 1], {"within": band == i, "gemm": self.gemm}
                band_total, band_losses = cross_entropy(x, *part, shifted, scale, **options)
                total, losses = None if scale is None else total + band_total, losses + band_losses
                continue
            at = (band == i).nonzero().squeeze(1)
            if at.numel():
                band_scale = None if scale is None else scale[at]
                band_total, band_losses = cross_entropy(
                    x[at], *part, flat[at] - self.cutoffs[i - 1], band_scale, gemm=self.gemm
                )
                total = None if scale is None else total + band_total
                losses = losses.index_add(0, at, band_losses)
        return total, losses
