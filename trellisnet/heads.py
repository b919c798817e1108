"""Output layers. Each owns (or shares) its parameters and has one interface: `log_prob(x)` and `loss(x, target)`.

Letters: V classes; `...` any leading dimensions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INIT_RANGE = 0.1
REDUCTIONS = ("mean", "sum", "none")


class LinearSoftmax(nn.Module):
    """Softmax over a linear map, log softmax(W x + b); the head of Tables 1 and 3.

    Args:
        in_features: width of x.
        n_classes: V.
        weight: parameter (V, in_features) to share, e.g. the embedding of a tied model. Default: a new one, U(±0.1).
        bias: parameter (V,) to share. Default: a new one, zero.

    Raises:
        ValueError: a shared parameter has another shape.
    """

    def __init__(
        self,
        in_features: int,
        n_classes: int,
        *,
        weight: nn.Parameter | None = None,
        bias: nn.Parameter | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.in_features = in_features
        self.n_classes = n_classes
        if weight is None:
            weight = nn.Parameter(torch.empty(n_classes, in_features, device=device, dtype=dtype))
            nn.init.uniform_(weight, -INIT_RANGE, INIT_RANGE)
        if bias is None:
            bias = nn.Parameter(torch.zeros(n_classes, device=device, dtype=dtype))
        for name, parameter, shape in (
            ("weight", weight, (n_classes, in_features)),
            ("bias", bias, (n_classes,)),
        ):
            if tuple(parameter.shape) != shape:
                raise ValueError(f"{name}: expected shape {shape}, got {tuple(parameter.shape)}")
        self.weight = weight
        self.bias = bias

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.n_classes}"

    def logits(self, x: Tensor) -> Tensor:
        """(..., in_features) → (..., V)."""
        return F.linear(x, self.weight, self.bias)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-probabilities in nats, (..., in_features) → (..., V)."""
        return F.log_softmax(self.logits(x), dim=-1)

    def loss(self, x: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
        """Negative log-likelihood in nats.

        Args:
            x: (..., in_features).
            target: class ids, int64, (...).
            reduction: "mean", "sum" (0-dim results) or "none" (shape of target).

        Raises:
            ValueError: unknown reduction, or x and target do not fit.
        """
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
        if x.shape[:-1] != target.shape:
            raise ValueError(f"target: expected shape {tuple(x.shape[:-1])}, got {tuple(target.shape)}")
        logits = self.logits(x.reshape(-1, x.size(-1)))  # (positions, V)
        loss = F.cross_entropy(logits, target.reshape(-1), reduction=reduction)
        return loss.view(target.shape) if reduction == "none" else loss
