"""Regularisation: variational dropout, embedding dropout, DropConnect, weight normalisation, AR and TAR.

All functions are pure: masks and effective weights, which live for one forward pass, are passed around as values. A
*scale* is a mask already divided by the keep probability: 0 where dropped, 1/(1−p) where kept.

Letters: N batch, L length, E embedding width, H hidden channels, G gates, V classes, M auxiliary outputs, k taps.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Masks(NamedTuple):
    """Explicit 0/1 dropout masks of one forward pass, of any dtype.

    They act in training and in evaluation mode, and nothing else is drawn: where a field is None, nothing is dropped.
    Kept entries are scaled by 1/(1−p) with the rate of the module that reads the mask.

    Args:
        embedding: whole words, (V, 1), or (N, V) with a mask per row.
        input: embedded input, (N, 1, E), the same at every time step.
        weight_x: kernel on the input, (GH, in, k−1) when only the older taps are dropped, else (GH, in, k).
        weight_h: kernel on the hidden sequence, likewise.
        hidden: hidden input of every layer and time step, (N, H, 1).
        output: (N, 1, output_size).
        aux: auxiliary outputs, each with its own mask, (N, M, 1, output_size).
        latent: latent vectors of a mixture of softmaxes, (N, 1, n_experts·embedding_size).
        latent_aux: the same for each auxiliary output, (N, M, 1, n_experts·embedding_size).

    The networks of :mod:`trellisnet.baselines` read weight_h and hidden in shapes of their own; a stack of layers
    takes a tuple with one mask per layer.
    """

    embedding: Tensor | None = None
    input: Tensor | None = None
    weight_x: Tensor | None = None
    weight_h: Tensor | tuple | None = None
    hidden: Tensor | tuple | None = None
    output: Tensor | None = None
    aux: Tensor | None = None
    latent: Tensor | None = None
    latent_aux: Tensor | None = None


def check_rate(name: str, p: float) -> float:
    """Return the dropout probability `p`, or raise ValueError unless 0 ≤ p < 1."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"{name}: expected a probability in [0, 1), got {p}")
    return float(p)


def dropout_scale(
    like: Tensor, shape: Sequence[int], p: float, training: bool, masks: Masks | None, name: str
) -> Tensor | None:
    """Return the scale for one forward pass: from `masks.<name>` if there are masks, else drawn; None for no dropout.

    Args:
        like: tensor that determines device and dtype.
        shape: shape of the scale.
        p: probability of dropping.
        training: draw only if True; otherwise no random number is consumed.
        masks: explicit masks, or None.
        name: field of `masks`.

    Raises:
        ValueError: the mask has another shape.
    """
    if masks is None:
        return F.dropout(like.new_ones(shape), p) if training and p > 0 else None
    mask = getattr(masks, name)
    if mask is None:
        return None
    if tuple(mask.shape) != tuple(shape):
        raise ValueError(f"masks.{name}: expected shape {tuple(shape)}, got {tuple(mask.shape)}")
    return mask.to(like) / (1 - p)


def draw_mask(like: Tensor, shape: Sequence[int], p: float) -> Tensor | None:
    """Draw a 0/1 mask for :class:`Masks`, each entry 0 with probability `p`; for p = 0 draw nothing, return None."""
    return torch.bernoulli(like.new_full(shape, 1 - p)) if p > 0 else None


def scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    """Return x · scale, broadcast; x itself if scale is None."""
    return x if scale is None else x * scale


def drop_connect(weight: Tensor, p: float, temporal: bool, training: bool, masks: Masks | None, name: str) -> Tensor:
    """Apply DropConnect to a kernel (rows, in, k) (Appendix B.1, "recurrent weight dropout").

    With `temporal` only the older taps 0 … k−2 are dropped, the counterpart of a recurrent network's hidden-to-hidden
    matrix; otherwise all taps are.
    """
    rows, channels, k = weight.shape
    dropped = k - 1 if temporal else k
    scale = dropout_scale(weight, (rows, channels, dropped), p, training, masks, name)
    if scale is None:
        return weight
    return torch.cat([weight[:, :, :dropped] * scale, weight[:, :, dropped:]], dim=2)


def weight_norm(v: Tensor, g: Tensor) -> Tensor:
    """Return w = g · v / ‖v‖ (weight normalisation, Salimans & Kingma, 2016), with one norm per output row.

    v is the direction *after* DropConnect, as in the authors' code: every row keeps the norm |g|, so the 1/(1−p)
    scaling only shifts weight between dropped and undropped taps. A row that is dropped entirely becomes zero.

    Args:
        v: (rows, in, k). g: (rows, 1, 1).
    """
    norm = torch.linalg.vector_norm(v, dim=(1, 2), keepdim=True)  # (rows, 1, 1)
    return v * (g / norm.masked_fill(norm == 0, 1))


def activation_regularization(output: Tensor, alpha: float) -> Tensor:
    """Return the AR term alpha · mean(output²), on the output after dropout (Merity et al., 2018b)."""
    return alpha * output.square().mean()


def temporal_activation_regularization(raw_output: Tensor, beta: float) -> Tensor:
    """Return the TAR term beta · mean((o_{t+1} − o_t)²), on the output before dropout (N, L, C); 0 if L = 1."""
    if raw_output.size(1) < 2:
        return raw_output.new_zeros(())
    return beta * raw_output.diff(dim=1).square().mean()
