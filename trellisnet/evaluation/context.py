"""Loss by context length: how well a language model predicts the same tokens, given more and more context.

The protocol of Khandelwal et al., 2018, "Sharp Nearby, Fuzzy Far Away: How Neural Language Models Use Context",
section 3, without its permutations: a trained model sees only the last n tokens before a target.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trellisnet.models import TrellisLanguageModel
from trellisnet.regularization import Masks

PIECE = 4096  # positions × windows computed at a time


def context_lengths(receptive_field: int | None, longest: int = 256) -> list[int]:
    """Context lengths to measure: powers of two, the receptive field, and twice that, which changes nothing.

    Args:
        receptive_field: in tokens; None if unlimited, as in recurrent networks.
        longest: limit in tokens.
    """
    powers = [2**i for i in range(longest.bit_length()) if 2**i <= longest]
    if receptive_field is None:
        return powers
    within = [n for n in powers if n < receptive_field]
    return [n for n in [*within, receptive_field, 2 * receptive_field] if n <= longest]


@torch.no_grad()
def loss_by_context(
    model: TrellisLanguageModel, stream: Tensor, lengths: Sequence[int], *, targets: int
) -> list[dict[str, Any]]:
    """Mean loss of fixed targets for each length of context.

    The targets are spread evenly over the stream, from the first with the longest context before it to the end. Each is
    predicted from the n tokens before it, starting from a zero state.

    Args:
        model: the language model; nothing is dropped.
        stream: token ids, 1-D int64 or int32.
        lengths: numbers n ≥ 1 of tokens.
        targets: number of tokens to predict; fewer if the stream is shorter.

    Returns:
        for every length, in increasing order, `context`, `loss` (nats per token), and `error`: the standard error of
        the mean difference from the loss with the longest context. It is smaller than that of the losses themselves,
        because the tokens are the same.

    Raises:
        TypeError: a stream of real numbers.
        ValueError: no lengths, one below 1, or a stream that is too short for the longest.
    """
    if not lengths or min(lengths) < 1 or targets < 1:
        raise ValueError(f"lengths, targets: expected numbers of at least 1, got {list(lengths)} and {targets}")
    lengths = sorted(set(lengths))
    longest = lengths[-1]
    room = stream.numel() - longest
    if stream.dim() != 1 or room < 1:
        raise ValueError(f"stream: expected 1-D, more than {longest} tokens, got {tuple(stream.shape)}")
    if stream.is_floating_point():
        raise TypeError(f"stream: expected ids in int64, got {str(stream.dtype).removeprefix('torch.')}")
    count = min(targets, room)
    places = longest + torch.arange(count, device=stream.device) * room // count
    losses = {n: _losses(model, stream, places, n) for n in lengths}
    return [
        {
            "context": n,
            "loss": loss.mean().item(),
            "error": (loss - losses[longest]).std().item() / math.sqrt(count) if count > 1 else 0.0,
        }
        for n, loss in losses.items()
    ]


def _losses(model: TrellisLanguageModel, stream: Tensor, places: Tensor, context: int) -> Tensor:
    """Losses of the tokens at `places`, each predicted from the `context` tokens before it, float64."""
    losses = []
    for part in places.split(max(1, PIECE // context)):
        windows = stream[part.unsqueeze(1) + torch.arange(-context, 1, device=part.device)].long()  # (N, context + 1)
        out = model(windows[:, :-1], start=context - 1, masks=Masks())
        loss = model.loss(out.output[:, -1:], windows[:, -1:], reduction="none", draw=False)
        losses.append(loss.flatten().double())
    return torch.cat(losses)
