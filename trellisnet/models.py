"""Complete models: input layer, core (a trellis) and head.

Another core (:mod:`trellisnet.baselines`) can replace the trellis if it has TrellisNet's interface: the constructor
`Core(input_size, hidden_size, num_layers, output_size=…, device=…, dtype=…, …)`; the attributes `core_name`,
`input_size` and `output_size`; `core(x, state, start=…, aux_every=…, last_only=…, lengths=…, masks=…)`, which returns a
:class:`trellisnet.core.TrellisOutput` whose state is a tuple of any number of batch-first tensors; and
`core.draw_masks(batch_size)`, which returns None if its dropout does not use one mask per sequence.

Letters: N batch, L length, V vocabulary, E embedding_size, M auxiliary outputs.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trellisnet.core import State, Stream, TrellisNet, check_at_least, check_sequence, check_tensor
from trellisnet.heads import INIT_RANGE, LinearSoftmax, MixtureOfSoftmaxes, SplitSoftmax
from trellisnet.regularization import Masks, check_rate, draw_mask, dropout_scale, scaled


def depth_of(core: nn.Module, num_layers: int | None) -> dict[str, int]:
    """Return the keyword argument that sets the depth of one call of a core.

    Raises:
        ValueError: a depth for a core whose layers do not share their weights.
    """
    if num_layers is None:
        return {}
    if not isinstance(core, TrellisNet):
        raise ValueError(f"num_layers: only a TrellisNet runs at any depth; expected None, got {num_layers}")
    return {"num_layers": num_layers}


class LanguageModelOutput(NamedTuple):
    """Features for the head.

    Args:
        output: features after output dropout, (N, L, output_size).
        raw_output: the same before output dropout.
        state: (h, c) to carry over, (N, H) each, not detached; another core has its own tuple.
        aux: auxiliary outputs, each after output dropout with its own mask, (N, L, output_size) each.
    """

    output: Tensor
    raw_output: Tensor
    state: State
    aux: list[Tensor]


class TrellisLanguageModel(nn.Module):
    """Embedding, core and (tied) softmax, mixture of softmaxes or split softmax: the models of Tables 1 to 3.

    Args:
        vocab_size: V.
        embedding_size: E.
        hidden_size: all channels of h (the authors' nhid + nout).
        num_layers: layers of the core.
        output_size: channels that the head reads; must equal embedding_size when tied, unless n_experts > 0.
        tied: the head shares the embedding matrix.
        n_experts: number of softmaxes in the mixture; 0 for a single softmax.
        cutoffs: first word ids of the bands of a split (adaptive) softmax; None for no bands.
        embedding_dropout: probability of dropping a whole word of the vocabulary.
        input_dropout: probability of dropping an embedding channel, one mask per sequence.
        output_dropout: probability of dropping an output channel, one mask per sequence.
        latent_dropout: probability of dropping a latent channel of the mixture, one mask per sequence.
        log_epsilon: added to the mixture's probabilities before the logarithm; no effect on a single softmax.
        freeze_last_embedding: give the last vocabulary entry no gradient through the input, as the authors' code
            does by accident (its padding_idx of −1 means the last row).
        embedding_dropout_per_row: draw the dropped words separately for each row of the batch, as recurrent highway
            networks do, instead of once for the whole batch.
        core: constructor of the core.
        embedding: constructor of the embedding: (vocab_size, embedding_size) → module with the matrix as `weight`.
        embedding_init: initialises the parameters of the embedding, and the matrix of an untied softmax, in place.
            Default: U(±0.1).
        head: constructor of the head if it is neither a mixture nor split, with the arguments of
            :class:`trellisnet.heads.LinearSoftmax`.
        mixture: further keywords for :class:`trellisnet.heads.MixtureOfSoftmaxes`.
        device, dtype: of all parameters.
        options: further keywords for the core.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(
        self,
        vocab_size: int,
        embedding_size: int,
        hidden_size: int,
        num_layers: int,
        *,
        output_size: int,
        tied: bool = True,
        n_experts: int = 0,
        cutoffs: Sequence[int] | None = None,
        embedding_dropout: float = 0.0,
        input_dropout: float = 0.0,
        output_dropout: float = 0.0,
        latent_dropout: float = 0.0,
        log_epsilon: float = 0.0,
        freeze_last_embedding: bool = False,
        embedding_dropout_per_row: bool = False,
        core: Callable[..., nn.Module] = TrellisNet,
        embedding: Callable[..., nn.Module] = nn.Embedding,
        embedding_init: Callable[[Tensor], Any] | None = None,
        head: Callable[..., nn.Module] = LinearSoftmax,
        mixture: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options,
    ):
        super().__init__()
        if cutoffs is not None and n_experts:
            raise ValueError(f"cutoffs: expected None with a mixture of softmaxes (n_experts = {n_experts})")
        if n_experts < 0:
            raise ValueError(f"n_experts: expected 0 or more, got {n_experts}")
        check_at_least(1, vocab_size=vocab_size, embedding_size=embedding_size)
        if tied and not n_experts and output_size != embedding_size:
            raise ValueError(f"output_size: tied weights need embedding_size = {embedding_size}, got {output_size}")
        self.vocab_size = vocab_size
        self.tied = tied
        self.n_experts = n_experts
        self.embedding_dropout = check_rate("embedding_dropout", embedding_dropout)
        self.input_dropout = check_rate("input_dropout", input_dropout)
        self.output_dropout = check_rate("output_dropout", output_dropout)
        self.freeze_last_embedding = freeze_last_embedding
        self.embedding_dropout_per_row = embedding_dropout_per_row

        factory = {"device": device, "dtype": dtype}
        self.embedding = embedding(vocab_size, embedding_size, **factory)
        for parameter in self.embedding.parameters():
            if embedding_init is None:
                nn.init.uniform_(parameter, -INIT_RANGE, INIT_RANGE)
            else:
                embedding_init(parameter)
        self.core = core(embedding_size, hidden_size, num_layers, output_size=output_size, **options, **factory)
        if tied:
            factory["weight"] = self.embedding.weight if type(self.embedding) is nn.Embedding else self.embedding
        factory["gemm"] = getattr(self.core, "gemm", "auto")
        if n_experts:
            self.head = MixtureOfSoftmaxes(
                output_size,
                vocab_size,
                n_experts,
                embedding_size,
                dropout=latent_dropout,
                log_epsilon=log_epsilon,
                **(mixture or {}),
                **factory,
            )
        elif cutoffs is not None:
            self.head = SplitSoftmax(output_size, vocab_size, cutoffs, **factory)
        else:
            self.head = head(output_size, vocab_size, **factory)
        check_rate("latent_dropout", latent_dropout)
        if embedding_init is not None and not tied:
            embedding_init(self.head.weight)

    def embed(self, tokens: Tensor, masks: Masks | None = None) -> Tensor:
        """Embed token ids (N, L), with embedding and input dropout: (N, L, E)."""
        weight = self.embedding.weight
        padding_idx = self.vocab_size - 1 if self.freeze_last_embedding else None
        x = F.embedding(tokens, weight, padding_idx=padding_idx)  # (N, L, E)
        shape = self._word_mask_shape(x.size(0))
        word_scale = dropout_scale(weight, shape, self.embedding_dropout, self.training, masks, "embedding")
        if word_scale is not None and self.embedding_dropout_per_row:
            x = x * word_scale.gather(1, tokens).unsqueeze(2)  # (N, L, 1)
        elif word_scale is not None:
            x = x * F.embedding(tokens, word_scale)  # scales the looked-up rows, not the whole matrix
        channels = (x.size(0), 1, x.size(2))
        return scaled(x, dropout_scale(x, channels, self.input_dropout, self.training, masks, "input"))

    def _word_mask_shape(self, batch_size: int) -> tuple[int, int]:
        return (batch_size, self.vocab_size) if self.embedding_dropout_per_row else (self.vocab_size, 1)

    def draw_masks(self, batch_size: int) -> Masks | None:
        """Draw masks for `batch_size` rows as training would; None if the core does not use one mask per sequence.

        Passing them to several forward passes, also in evaluation mode, fixes what is dropped (Monte Carlo dropout).
        """
        core, like = self.core.draw_masks(batch_size), self.head.bias
        if core is None:
            return None
        latent = None
        if self.n_experts:
            width = self.n_experts * self.head.embedding_size
            latent = draw_mask(like, (batch_size, 1, width), self.head.dropout)
        return Masks(
            embedding=draw_mask(like, self._word_mask_shape(batch_size), self.embedding_dropout),
            input=draw_mask(like, (batch_size, 1, self.core.input_size), self.input_dropout),
            output=draw_mask(like, (batch_size, 1, self.core.output_size), self.output_dropout),
            latent=latent,
            **core,
        )

    def forward(
        self,
        tokens: Tensor,
        state: State | None = None,
        *,
        start: int = 0,
        aux_every: int | None = None,
        num_layers: int | None = None,
        masks: Masks | None = None,
    ) -> LanguageModelOutput:
        """Compute the features of a segment; :meth:`log_prob` and :meth:`loss` apply the head to them.

        Args:
            tokens: int64 (N, L), L ≥ 1.
            state: (h, c) carried over from the previous segment, (N, H) each; None for zeros.
            start: first time step to return features for, 0 to L − 1; see :meth:`trellisnet.TrellisNet.forward`.
            aux_every: also return the outputs of every aux_every-th layer.
            num_layers: depth of this call, for a TrellisNet only; None for the core's own.
            masks: explicit dropout masks; None draws them in training mode.

        Raises:
            TypeError: tokens is not a tensor.
            ValueError: a shape does not fit, or another core is given a depth.
        """
        check_tensor("tokens", tokens)
        if tokens.dim() != 2 or tokens.size(1) < 1:
            raise ValueError(f"tokens: expected (N, L ≥ 1), got {tuple(tokens.shape)}")
        if tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"tokens: expected ids in int64, got {str(tokens.dtype).removeprefix('torch.')}")
        x = self.embed(tokens, masks)
        depth = depth_of(self.core, num_layers)
        raw_output, state, aux = self.core(x, state, start=start, aux_every=aux_every, masks=masks, **depth)

        N, _, C = raw_output.shape
        p, training = self.output_dropout, self.training
        output = scaled(raw_output, dropout_scale(raw_output, (N, 1, C), p, training, masks, "output"))
        if aux:
            scale = dropout_scale(raw_output, (N, len(aux), 1, C), p, training, masks, "aux")
            if scale is not None:
                aux = [a * s for a, s in zip(aux, scale.unbind(1), strict=True)]
        return LanguageModelOutput(output, raw_output, state, aux)

    def init_stream(self, batch_size: int, *, num_layers: int | None = None) -> Stream:
        """Start reading texts piece by piece; see :meth:`trellisnet.TrellisNet.init_stream`."""
        return self.core.init_stream(batch_size, **depth_of(self.core, num_layers))

    def stream(self, tokens: Tensor, stream: Stream, tolerance: float = 0.0) -> tuple[Tensor, Stream]:
        """Compute the features of the next tokens, without dropout and gradients.

        Args:
            tokens: int64 (N, T), T ≥ 1.
            stream: the stream after the tokens before.
            tolerance: of an early exit; see :meth:`trellisnet.TrellisNet.stream`.

        Returns:
            features (N, T, output_size), equal to `output` of one long :meth:`forward` in evaluation mode, and the
            stream after these tokens.
        """
        check_tensor("tokens", tokens)
        return self.core.stream(F.embedding(tokens, self.embedding.weight), stream, tolerance)

    def step(self, tokens: Tensor, stream: Stream) -> tuple[Tensor, Stream]:
        """Read one more token of each text, int64 (N,); return features (N, output_size), and the stream after it."""
        check_tensor("tokens", tokens)
        return self.core.step(F.embedding(tokens, self.embedding.weight), stream)

    def log_prob(self, output: Tensor, *, latent_mask: Tensor | None = None, draw: bool = True) -> Tensor:
        """Return log-probabilities in nats, (..., output_size) → (..., V); arguments as in :meth:`loss`."""
        return self.head.log_prob(output, **self._latent(latent_mask, draw))

    def loss(
        self,
        output: Tensor,
        target: Tensor,
        *,
        latent_mask: Tensor | None = None,
        reduction: str = "mean",
        draw: bool = True,
    ) -> Tensor:
        """Return the negative log-likelihood in nats.

        Args:
            output: features from :meth:`forward`, (..., output_size).
            target: int64 (...).
            latent_mask: explicit 0/1 mask on the mixture's latent vectors, (N, 1, n_experts·embedding_size).
            reduction: "mean", "sum" or "none" (shape of target).
            draw: draw latent dropout in training mode if no mask is given.

        Raises:
            ValueError: shapes do not fit, or a single softmax is given a latent mask.
        """
        return self.head.loss(output, target, reduction, **self._latent(latent_mask, draw))

    def losses(
        self,
        outputs: Sequence[Tensor],
        target: Tensor,
        weights: Sequence[float],
        *,
        latent_masks: Sequence[Tensor | None] | None = None,
        draw: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Return the mean losses of several outputs against the same targets, in nats, with one pass through the head.

        Args:
            outputs: S outputs, (N, L, output_size) each: `output` and `aux` of :meth:`forward`.
            target: int64 (N, L).
            weights: S numbers.
            latent_masks: one mask per output, as in :meth:`loss`. If only some are None, those outputs drop nothing.
            draw: as in :meth:`loss`.

        Returns:
            The weighted sum of the losses, which is the one to differentiate, and the losses (S,).

        Raises:
            ValueError: shapes do not fit, or a single softmax is given a latent mask.
        """
        x = torch.stack(list(outputs))
        given = [mask for mask in latent_masks or () if mask is not None]
        latent = self._latent(latent_masks if given else None, draw)
        if given:
            identity = x.new_full(given[0].shape, 1 - self.head.dropout)  # becomes 1 when the head divides by 1 − p
            latent["latent_mask"] = torch.stack([identity if mask is None else mask.to(x) for mask in latent_masks])
        return self.head.losses(x, target, weights, **latent)

    def _latent(self, latent_mask: Any, draw: bool) -> dict[str, Any]:
        if self.n_experts:
            return {"latent_mask": latent_mask, "draw": draw}
        if latent_mask is not None:
            raise ValueError("latent_mask: only a mixture of softmaxes (n_experts > 0) has latent vectors")
        return {}


class ClassifierOutput(NamedTuple):
    """Result of a :class:`TrellisClassifier`.

    Args:
        logits: (N, num_classes).
        state: (h, c) at the last valid step, (N, H) each, not detached.
    """

    logits: Tensor
    state: State


class TrellisClassifier(nn.Module):
    """A core over a whole sequence and a linear map of its last step: the models of Table 4.

    Args:
        input_size: channels of the sequence.
        num_classes: number of classes.
        hidden_size: all channels of h (the authors' nhid + nout).
        num_layers: layers of the core.
        output_size: channels that the linear map reads. Default: all.
        input_dropout: probability of dropping an input value, elementwise.
        output_dropout: probability of dropping a logit, elementwise. Both act in training only, whereas the authors'
            code also drops in evaluation.
        core: constructor of the core.
        device, dtype: of all parameters.
        options: further keywords for the core.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(
        self,
        input_size: int,
        num_classes: int,
        hidden_size: int,
        num_layers: int,
        *,
        output_size: int | None = None,
        input_dropout: float = 0.0,
        output_dropout: float = 0.0,
        core: Callable[..., nn.Module] = TrellisNet,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options,
    ):
        super().__init__()
        check_at_least(1, num_classes=num_classes)
        self.num_classes = num_classes
        self.input_dropout = check_rate("input_dropout", input_dropout)
        self.output_dropout = check_rate("output_dropout", output_dropout)
        factory = {"device": device, "dtype": dtype}
        self.core = core(input_size, hidden_size, num_layers, output_size=output_size, **options, **factory)
        self.head = nn.Linear(self.core.output_size, num_classes, **factory)

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        num_layers: int | None = None,
        masks: Masks | None = None,
    ) -> ClassifierOutput:
        """Classify sequences by their last step.

        Args:
            x: (N, L, input_size), L ≥ 1.
            state: (h, c) carried over from a previous segment, (N, H) each; None for zeros.
            lengths: number of valid steps in each row of a right-padded batch, integers (N,) in 1..L; None for all.
                Padding has no influence.
            num_layers: depth of this call, for a TrellisNet only; None for the core's own.
            masks: explicit dropout masks, of which `input`, `weight_x`, `weight_h`, `hidden` and `output` are read.

        Raises:
            TypeError: x is not a tensor.
            ValueError: a shape or length does not fit, or another core is given a depth.
        """
        check_sequence(x, self.core.input_size)
        x = scaled(x, dropout_scale(x, x.shape, self.input_dropout, self.training, masks, "input"))
        depth = depth_of(self.core, num_layers)
        if lengths is None:
            output, state, _ = self.core(x, state, last_only=True, masks=masks, **depth)  # (N, 1, output_size)
        else:
            output, state, _ = self.core(x, state, lengths=lengths, masks=masks, **depth)
            last = torch.as_tensor(lengths).to(x.device, torch.int64) - 1
            output = output.gather(1, last.view(-1, 1, 1).expand(-1, 1, output.size(2)))
        with torch.autocast(x.device.type, enabled=False):  # logits in full precision cost nothing at this size
            logits = self.head(output.squeeze(1).to(self.head.weight.dtype))
        shape, p = logits.shape, self.output_dropout
        return ClassifierOutput(scaled(logits, dropout_scale(x, shape, p, self.training, masks, "output")), state)


def count_parameters(model: nn.Module) -> int:
    """Count the parameters of the model, shared ones once."""
    return sum(p.numel() for p in model.parameters())
