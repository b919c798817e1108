"""Generation of text by a language model that keeps its state, so that each further token costs one step.

Letters: N batch (texts side by side), T tokens of a piece, V vocabulary.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trellisnet.baselines import TCN
from trellisnet.core import TrellisNet
from trellisnet.models import TrellisLanguageModel
from trellisnet.regularization import Masks

PIECE = 1024  # positions × texts read at a time


@dataclass(frozen=True)
class Sampling:
    """Settings for drawing the next token from its distribution p. They act in this order.

    Args:
        temperature: draw from p^(1/temperature), normalised; 0: always take the most probable token.
        top_k: keep the `top_k` most probable tokens; 0: all.
        top_p: keep the smallest set of most probable tokens with at least this total probability ("nucleus", Holtzman
            et al., 2020, "The Curious Case of Neural Text Degeneration", section 3.1); 1: all.

    Of equally probable tokens the one with the lower id comes first.

    Raises:
        ValueError: a number out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature: expected a finite number of at least 0, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k: expected at least 0, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a probability in (0, 1], got {self.top_p}")

    def probabilities(self, log_prob: Tensor) -> Tensor:
        """Probabilities (..., V) for drawing, float64, from log-probabilities (..., V); zero for excluded tokens."""
        log_prob = log_prob.double()
        if self.temperature == 0:
            best = log_prob.max(dim=-1, keepdim=True).indices  # the first of equals
            return torch.zeros_like(log_prob).scatter_(-1, best, 1.0)
        # The largest becomes 0, so that no temperature makes all of them infinite.
        p = torch.softmax((log_prob - log_prob.amax(dim=-1, keepdim=True)) / self.temperature, dim=-1)
        if not 0 < self.top_k < p.size(-1) and self.top_p == 1:
            return p
        ranked, order = p.sort(dim=-1, descending=True, stable=True)
        if self.top_k:
            ranked[..., self.top_k :] = 0
        ranked /= ranked.sum(dim=-1, keepdim=True)
        if self.top_p < 1:
            before = F.pad(ranked.cumsum(dim=-1)[..., :-1], (1, 0))  # total of the more probable tokens
            ranked[before >= self.top_p] = 0
            ranked /= ranked.sum(dim=-1, keepdim=True)
        return torch.zeros_like(p).scatter_(-1, order, ranked)

    def draw(self, log_prob: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw a token for each text: (N, V) → int64 (N,). On the CPU, so that a seed gives the same text anywhere."""
        p = self.probabilities(log_prob)
        if self.temperature == 0:
            return p.argmax(dim=1)
        return torch.multinomial(p.cpu(), 1, generator=generator).squeeze(1).to(p.device)


class Reader:
    """Reader of texts side by side, which predicts their next tokens, without dropout and gradients.

    A TrellisNet reads them as a stream (:mod:`trellisnet.ops.streaming`): each token costs one step, and predictions
    are those of one long forward pass from a zero state. Recurrent networks carry their state. For each token a TCN
    recomputes the window that its output depends on.

    Args:
        model: the language model, which computes in the type of an enclosing `torch.autocast`.
        batch_size: N ≥ 1.

    Raises:
        ValueError: batch_size below 1.
    """

    def __init__(self, model: TrellisLanguageModel, batch_size: int = 1):
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        self.model = model
        self.batch_size = batch_size
        self._memory = None  # stream, state or window
        if isinstance(model.core, TrellisNet):
            self._memory = model.init_stream(batch_size)

    @torch.no_grad()
    def read(self, tokens: Tensor) -> Tensor:
        """Read the next tokens of every text.

        Args:
            tokens: int64 (N, T), T ≥ 1; any number of tokens takes constant memory.

        Returns:
            log-probabilities (N, V) of the following token, in nats.

        Raises:
            ValueError: another shape.
        """
        if tokens.dim() != 2 or tokens.size(0) != self.batch_size or tokens.size(1) < 1:
            raise ValueError(f"tokens: expected ({self.batch_size}, T ≥ 1), got {tuple(tokens.shape)}")
        for piece in tokens.split(max(1, PIECE // self.batch_size), dim=1):
            output = self._features(piece)
        return self.model.log_prob(output, draw=False)

    def _features(self, tokens: Tensor) -> Tensor:
        """Features of the last token, (N, output_size)."""
        core = self.model.core
        if isinstance(core, TrellisNet):
            if tokens.size(1) == 1:
                output, self._memory = self.model.step(tokens[:, 0], self._memory)
                return output
            output, self._memory = self.model.stream(tokens, self._memory)
            return output[:, -1]
        state = None
        if isinstance(core, TCN):
            window = tokens.clone() if self._memory is None else torch.cat([self._memory, tokens], dim=1)
            self._memory = tokens = window[:, -core.receptive_field :]
        else:
            state = self._memory
        out = self.model(tokens, state, start=tokens.size(1) - 1, masks=Masks())  # nothing is dropped
        if not isinstance(core, TCN):
            self._memory = out.state
        return out.output[:, -1]


def generate(
    model: TrellisLanguageModel,
    prompt: Tensor,
    length: int,
    sampling: Sampling = Sampling(),
    *,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Continue texts: yield the next token of each, int64 (N,), `length` times.

    Args:
        model: the language model.
        prompt: beginnings of the texts, int64 (N, T), T ≥ 1, on the model's device.
        length: number of tokens to generate for each.
        sampling: how tokens are drawn.
        generator: on the CPU; None: torch's default generator.

    Raises:
        ValueError: a prompt of another shape or a negative length.
    """
    if prompt.dim() != 2 or not prompt.numel():
        raise ValueError(f"prompt: expected (N ≥ 1, T ≥ 1), got {tuple(prompt.shape)}")
    if length < 0:
        raise ValueError(f"length: expected at least 0, got {length}")
    reader, tokens = Reader(model, prompt.size(0)), prompt
    for _ in range(length):
        token = sampling.draw(reader.read(tokens), generator)
        tokens = token.unsqueeze(1)
        yield token
