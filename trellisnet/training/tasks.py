"""What is learned: the only place with losses, perplexity, and the ways of giving a window its history.

A task binds a model to a loss. The engine sees of it: `model`, `batches`, `size`, `loss`, `evaluate`, `scores`.

Letters: N batch (rows), L length of a row, l length of a window.
"""

import contextlib
import copy
import itertools
import math
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trellisnet.core import State
from trellisnet.errors import counted
from trellisnet.heads import LinearSoftmax
from trellisnet.models import TrellisClassifier, TrellisLanguageModel
from trellisnet.regularization import Masks, activation_regularization, temporal_activation_regularization
from trellisnet.training.distributed import Ranks

STREAMED = 1024  # positions × rows that a streamed evaluation computes at a time: enough for fast products
SHORTEST, DEVIATION = 5, 5.0  # of windows of random length

Losses = dict[str, Tensor]
Progress = Callable[[Iterable, int], Iterable]  # wraps an iterable of known length, e.g. in a progress bar


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and back to what every module was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


class Augmentation(Protocol):
    """Random variation of training sequences."""

    def draw(self, count: int, random: np.random.Generator) -> Tensor:
        """Draw how to vary so many sequences: a tensor with a row for each."""

    def __call__(self, sequences: Tensor, drawn: Tensor) -> Tensor:
        """Vary sequences, each by its row of `drawn`."""


def _mean(total: float, count: int) -> float:
    """A mean; NaN of nothing, where a rank was told to end before it had done anything."""
    return total / count if count else math.nan


class LanguageModeling:
    """Next-token prediction over rows of text, scored by perplexity (section 5.2, Appendices B.1 and B.2).

    There are two ways of giving a window its history. *History mode*: windows of `seq_len` overlap by `horizon`
    positions, whose outputs are context only and are not scored; every window starts from a zero state. *Repackaging*:
    windows of `horizon` positions lie end to end, all scored, and the state is carried from one to the next, detached.

    Args:
        model: the language model.
        horizon: unscored positions of a window in history mode; length of a window otherwise.
        seq_len: length of a window in history mode.
        repackage: carry the state. With seq_len > 0 training still uses overlapping windows, as the authors'
            word-level script does; that carries a state into a window that starts before it, so a warning is given.
        aux_weight: λ of Eq. 23, the weight of the summed auxiliary losses; 0 or less: none.
        aux_every: ℓ of Appendix B.2: layers ℓ, 2ℓ, … predict too, counted from the bottom as in the authors' code.
        alpha, beta: weights of AR and TAR.
        length_seed: train on windows of random length (Merity et al., 2018, section 5): normally distributed about
            `horizon`, or in one of twenty about half of it, with deviation 5, at least 5; others for every epoch, drawn
            from this seed. The learning rate of an update is scaled by the length. Only with `repackage`.
        label_smoothing: share of every target, auxiliary ones included, that training spreads evenly over all tokens.
            Only with a plain softmax.
        ranks: the processes among which evaluation is divided; all get the result of the whole. By default this one
            evaluates alone.

    Raises:
        ValueError: settings that fit no window.
    """

    score_name = "ppl"
    digits = 2  # of a printed score
    batch_name, unit, count = "window", "tok", "tokens"
    measured = ("loss",)

    def __init__(
        self,
        model: TrellisLanguageModel,
        *,
        horizon: int,
        seq_len: int = 0,
        repackage: bool = False,
        aux_weight: float = 0.0,
        aux_every: int | None = None,
        alpha: float = 0.0,
        beta: float = 0.0,
        length_seed: int | None = None,
        label_smoothing: float = 0.0,
        ranks: Ranks | None = None,
    ):
        if horizon < 1:
            raise ValueError(f"horizon: expected at least 1, got {horizon}")
        if seq_len < 0:
            raise ValueError(f"seq_len: expected 0 or more, got {seq_len}")
        if aux_weight > 0 and aux_every is None:
            raise ValueError("aux_every: expected a number of layers when aux_weight > 0, got None")
        if length_seed is not None and (seq_len > 0 or not repackage):
            raise ValueError("length_seed: windows of random length need repackage and seq_len = 0")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing: expected a share in [0, 1), got {label_smoothing}")
        if label_smoothing and not isinstance(model.head, LinearSoftmax):
            raise ValueError("label_smoothing: needs a plain softmax, neither a mixture nor a split one")
        if repackage and seq_len > 0:
            warnings.warn(
                f"repackaging with seq_len = {seq_len}: training windows overlap by {horizon} positions although the "
                "state is carried; seq_len = 0 gives windows that lie end to end",
                stacklevel=2,
            )
        self.model = model
        self.horizon = horizon
        self.seq_len = seq_len
        self.repackage = repackage
        self.aux_weight = aux_weight
        self.aux_every = aux_every
        self.alpha = alpha
        self.beta = beta
        self.length_seed = length_seed
        self.label_smoothing = label_smoothing
        self.ranks = ranks or Ranks()
        self.earlier = 0  # windows whose states `windowed` can compute again, see there

    def _has_history(self, training: bool) -> bool:
        """Whether windows overlap and leave their first `horizon` positions unscored: the authors' two rules."""
        if training:
            return self.seq_len > 0 or not self.repackage
        return self.seq_len > self.horizon and not self.repackage

    def windows(self, rows: Tensor, training: bool = True) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Cut rows (N, L) into windows: (start, inputs (N, l), targets (N, l)).

        Windows with nothing to score are skipped. `training` chooses between the authors' two rules.

        Raises:
            ValueError: history mode with seq_len ≤ horizon.
        """
        for start in self._starts(rows, training):
            yield start, *self._cut(rows, start, training)

    def _cut(self, rows: Tensor, start: int, training: bool) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the window at `start`, int64; rows may be int32 to save memory."""
        end = min(start + (self.seq_len if self._has_history(training) else self.horizon), rows.size(1) - 1)
        return rows[:, start:end].long(), rows[:, start + 1 : end + 1].long()

    def _starts(self, rows: Tensor, training: bool) -> range:
        unscored = self.horizon if self._has_history(training) else 0
        stride = self.seq_len - unscored if unscored else self.horizon
        if stride < 1:
            raise ValueError(
                f"seq_len: history mode needs seq_len > horizon = {self.horizon}, got {self.seq_len}; "
                "make it longer, or repackage with seq_len = 0"
            )
        return range(0, max(rows.size(1) - 1 - unscored, 0), stride)

    def batches(self, rows: Tensor, epoch: int = 0) -> Sequence[tuple[Tensor, Tensor]]:
        """The training windows of any epoch: (inputs, targets), cut out of `rows` when they are asked for.

        Raises:
            ValueError: the rows are shorter than one window.
        """
        if self.length_seed is not None:
            spans = self._random_spans(rows.size(1), epoch)
            found = _Lazy(spans, lambda span: (rows[:, slice(*span)].long(), rows[:, span[0] + 1 : span[1] + 1].long()))
        else:
            found = _Lazy(self._starts(rows, True), lambda start: self._cut(rows, start, True))
        if not found:
            raise ValueError(f"rows of {counted(rows.size(1), 'tokens')} hold no window with anything to score")
        return found

    def _random_spans(self, length: int, epoch: int) -> list[tuple[int, int]]:
        """Begin and end of the inputs of every window; like the authors', a last one of a single step is left out."""
        draw = np.random.default_rng([self.length_seed, epoch])
        spans, start = [], 0
        while start < length - 2:
            about = self.horizon if draw.random() < 0.95 else self.horizon / 2
            end = min(start + max(SHORTEST, int(draw.normal(about, DEVIATION))), length - 1)
            spans.append((start, end))
            start = end
        return spans

    def rate(self, batch: tuple[Tensor, Tensor]) -> float:
        """Factor of the learning rate for a window: its share of `horizon` if lengths are random, else 1."""
        return 1.0 if self.length_seed is None else batch[0].size(1) / self.horizon

    def size(self, batch: tuple[Tensor, Tensor]) -> int:
        """Scored tokens of a training window."""
        inputs, _ = batch
        return inputs.size(0) * (inputs.size(1) - (self.horizon if self._has_history(True) else 0))

    def loss(
        self, inputs: Tensor, targets: Tensor, state: State | None = None, masks: Masks | None = None
    ) -> tuple[Losses, State | None]:
        """Loss of one window, in nats a token.

        Args:
            inputs, targets: int64 (N, l).
            state: (h, c) to start from; always used when given.
            masks: explicit dropout masks.

        Returns:
            0-dim terms `raw`, `aux`, `alpha`, `beta`, and `smoothing` with label smoothing, already multiplied by their
            weights, and their sum `loss`; and the state to carry: detached when repackaging, else None.

        Raises:
            ValueError: the window has nothing to score.
        """
        skip = self.horizon if self._has_history(self.model.training) else 0
        if inputs.size(1) <= skip:
            raise ValueError(
                f"a window of {counted(inputs.size(1), 'tokens')} holds nothing to score after the first {skip}"
            )
        aux_every = self.aux_every if self.aux_weight > 0 else None
        out = self.model(inputs, state, start=skip, aux_every=aux_every, masks=masks)
        targets = targets[:, skip:]

        latent, latent_aux = (masks.latent, masks.latent_aux) if masks else (None, None)
        draw = masks is None
        outputs, weights = [out.output, *out.aux], [1.0] + [self.aux_weight] * len(out.aux)
        if out.aux:
            masked = [latent, *([None] * len(out.aux) if latent_aux is None else latent_aux.unbind(1))]
            loss, each = self.model.losses(outputs, targets, weights, latent_masks=masked, draw=draw)
            raw, aux = each[0], self.aux_weight * each[1:].sum()
        else:
            loss = raw = self.model.loss(out.output, targets, latent_mask=latent, draw=draw)
            aux = raw.new_zeros(())
        alpha = beta = raw.new_zeros(())
        if self.alpha:
            alpha = activation_regularization(out.output, self.alpha)
        if self.beta:
            beta = temporal_activation_regularization(out.raw_output, self.beta)
        losses = {"loss": loss + alpha + beta, "raw": raw, "aux": aux, "alpha": alpha, "beta": beta}
        if self.label_smoothing:
            margins = [
                weight * self.model.head.margin(x, targets).mean() for weight, x in zip(weights, outputs, strict=True)
            ]
            losses["smoothing"] = self.label_smoothing * sum(margins)
            losses["loss"] = losses["loss"] + losses["smoothing"]
        return losses | self._measure(out.output.detach(), targets), self._carried(out.state)

    def _measure(self, output: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """What is measured of a window beside its losses: a 0-dim mean for every further name in `measured`."""
        return {}

    def _carried(self, state: State) -> State | None:
        # They are views of whole sequences; the copies let those go.
        return tuple(part.detach().clone() for part in state) if self.repackage else None

    def streams(self) -> bool:
        """Whether :meth:`evaluate` reads every row once, as a stream, instead of in overlapping windows.

        It does if that is exact: if nothing that a window scores depends on what lies before the window.
        """
        reach = getattr(self.model.core, "reach", math.inf)  # only TrellisNet has streams
        return self._has_history(False) and self.horizon >= reach and self.measured == ("loss",)

    def _stream(self, rows: Tensor, places: range, progress: Progress | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Features and targets of some positions of rows (N, L), in a row, read as one stream.

        It begins `horizon` before them: further back nothing is seen.
        """
        steps = max(1, STREAMED // max(1, rows.size(0)))
        starts = range(max(places.start - self.horizon, 0), places.stop, steps) if places else range(0)
        stream = self.model.init_stream(rows.size(0))
        for start in progress(starts, len(starts)) if progress is not None else starts:
            end, skip = min(start + steps, places.stop), max(places.start - start, 0)
            output, stream = self.model.stream(rows[:, start:end].long(), stream)
            targets = rows[:, start + 1 : end + 1][:, skip:].long()
            if targets.numel():
                yield output[:, skip:], targets

    def _windowed(
        self, rows: Tensor, starts: range, progress: Progress | None, earlier: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Features and targets of the windows at `starts`; the states of `earlier` windows are computed again."""
        skip, state = self.horizon if self._has_history(False) else 0, None
        before: deque[tuple[Tensor, State | None]] = deque(maxlen=earlier)  # inputs and first states
        for start in progress(starts, len(starts)) if progress is not None else starts:
            inputs, targets = self._cut(rows, start, False)
            state = self._again(before, state)
            before.append((inputs, state))
            out = self.model(inputs, state, start=skip)
            state = self._carried(out.state)
            yield out.output, targets[:, skip:]

    @torch.no_grad()
    def _again(self, before: deque[tuple[Tensor, State | None]], state: State | None) -> State | None:
        """The state after some windows, and those between them, by the weights of now; `state` if there are none."""
        for i, (inputs, kept) in enumerate(before):
            state = state if i else kept  # what lies before the first of them stays as it is
            before[i] = inputs, state
            state = self._carried(self.model(inputs, state).state)
        return state

    def windowed(
        self,
        rows: Tensor,
        *,
        max_tokens: int | None = None,
        progress: Progress | None = None,
        recompute: bool = False,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """What is scored of rows (N, L), window by window under the rule of evaluation.

        Every window is computed when it is asked for: by the weights, in the mode and with or without the gradients of
        that moment. Where the state is carried, it is detached. Every rank computes all of them.

        Args:
            rows, max_tokens, progress: as in :meth:`evaluate`, which also tells of the errors.
            recompute: for weights that change on the way: where the state is carried, compute it again, by the weights
                of that moment, over as many windows before as :meth:`in_segments` says, from the state before those.

        Returns:
            features (N, l, output_size) and targets, int64 (N, l), of every window.
        """
        earlier = self.earlier if recompute and self.repackage else 0
        return self._windowed(rows, self._scored(rows, max_tokens), progress, earlier)

    def scored(
        self, rows: Tensor, *, max_tokens: int | None = None, progress: Progress | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """What :meth:`evaluate` scores, piece by piece, to be asked for in evaluation mode. Every rank computes all.

        Args:
            rows, max_tokens, progress: as in :meth:`evaluate`, which also tells of the errors.

        Returns:
            features (N, l, output_size) and targets, int64 (N, l), of every piece, in the order of the text.
        """
        return self._pieces(rows, max_tokens, progress, Ranks())

    def _pieces(
        self, rows: Tensor, max_tokens: int | None, progress: Progress | None, ranks: Ranks
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's part of what is scored."""
        starts = self._scored(rows, max_tokens)
        if self.streams():
            last = min(starts[-1] + self.seq_len, rows.size(1) - 1)
            return self._stream(rows, ranks.part(range(self.horizon, last)), progress)
        if not self.repackage:
            return self._windowed(rows, ranks.part(starts), progress)
        rows = ranks.part(rows)  # windows into which a state is carried must stay in their order
        return self._windowed(rows, starts if rows.size(0) else range(0), progress)

    def _scored(self, rows: Tensor, max_tokens: int | None) -> range:
        """Starts of the windows that evaluation scores: up to that in which the `max_tokens`th token is.

        Raises:
            ValueError: there are none.
        """
        starts = self._starts(rows, False)
        if not starts:
            raise ValueError(f"rows of {counted(rows.size(1), 'tokens')} hold no window with anything to score")
        if max_tokens is None:
            return starts
        return starts[: max(1, math.ceil(max_tokens / (rows.size(0) * starts.step)))]

    def in_segments(self, length: int) -> Self:
        """This task with windows that score `length` positions each, whatever it was trained on.

        Where the state is carried they lie end to end, and :meth:`windowed` can compute again those that reach
        `horizon` positions back; else each has the `horizon` positions before it as context.

        Raises:
            ValueError: segments of nothing.
        """
        if length < 1:
            raise ValueError(f"length: expected at least 1, got {length}")
        task = copy.copy(self)
        if self.repackage:
            task.horizon, task.seq_len, task.earlier = length, 0, math.ceil(self.horizon / length)
        else:
            task.seq_len = self.horizon + length
        return task

    @torch.no_grad()
    def evaluate(self, rows: Tensor, *, max_tokens: int | None = None, progress: Progress | None = None) -> dict:
        """Mean loss of rows (N, L) in evaluation mode; the model's mode is put back afterwards.

        In history mode with a horizon of at least the reach of the model the rows are read as streams, each position
        once; the scored positions are those of the windows.

        Args:
            rows: int64 (N, L).
            max_tokens: stop after the window in which so many tokens have been scored.
            progress: wraps the windows, e.g. in a progress bar.

        Returns:
            `loss`, the token-weighted mean in nats, and `tokens`, the scored positions × rows.

        Raises:
            ValueError: the rows are shorter than one window.
        """
        with evaluating(self.model):
            return self._averaged(self._pieces(rows, max_tokens, progress, self.ranks))

    def _averaged(self, pieces: Iterable[tuple[Tensor, Tensor]]) -> dict:
        """Mean loss, and what else is measured, of features and their targets on all ranks."""
        total, tokens = 0.0, 0
        further = dict.fromkeys(self.measured[1:], 0.0)
        for output, targets in pieces:
            total += self.model.loss(output, targets, reduction="sum").item()
            for name, mean in self._measure(output, targets).items():
                further[name] += mean.item() * targets.numel()
            tokens += targets.numel()
        total, tokens, *sums = self.ranks.sum(total, tokens, *further.values())
        means = {name: _mean(sum_, tokens) for name, sum_ in zip(further, sums, strict=True)}
        return {"loss": _mean(total, tokens), "tokens": tokens} | means

    @torch.no_grad()
    def evaluate_all(
        self, stream: Tensor, *, batch_size: int = 1, max_tokens: int | None = None, progress: Progress | None = None
    ) -> dict:
        """Mean loss of every target of a stream, those that have less than the whole history before them included.

        In history mode every window starts from nothing, so windows are scored side by side; otherwise, or if windows
        and one long pass are the same, the stream is one row.

        Args:
            stream: 1-D int64; all but its first token are scored.
            batch_size: windows scored at a time.
            max_tokens, progress: as in :meth:`evaluate`, which also tells of the result and the errors.
        """
        rows = stream.unsqueeze(0)
        if not self._has_history(False):
            return self.evaluate(rows, max_tokens=max_tokens, progress=progress)
        starts = self._starts(rows, False)
        if starts and self.streams():
            if max_tokens is not None:  # the first window scores more, all of it
                starts = starts[: 1 + max(0, math.ceil((max_tokens - self.seq_len) / starts.step))]
            last = min(starts[-1] + self.seq_len, rows.size(1) - 1)
            with evaluating(self.model):
                return self._averaged(self._stream(rows, self.ranks.part(range(last)), progress))
        windows = [(inputs, targets) for _, inputs, targets in self.windows(rows, training=False)]
        if not windows:
            raise ValueError(f"a stream of {counted(stream.numel(), 'tokens')} holds no window with anything to score")
        whole = [w for w in windows[1:] if w[0].size(1) == self.seq_len]
        rest = [w for w in windows[1:] if w[0].size(1) != self.seq_len]
        # The first window has nothing before it: all of it is scored.
        groups = [(0, windows[:1])]
        groups += [(self.horizon, whole[i : i + batch_size]) for i in range(0, len(whole), batch_size)]
        groups += [(self.horizon, [w]) for w in rest]
        if max_tokens is not None:
            sizes = (sum(targets.size(1) - skip for _, targets in group) for skip, group in groups)
            groups = groups[: 1 + sum(before < max_tokens for before in itertools.accumulate(sizes))]
        groups = self.ranks.part(groups)
        with evaluating(self.model):
            total, tokens = 0.0, 0
            for skip, group in progress(groups, len(groups)) if progress is not None else groups:
                inputs, targets = (torch.cat(parts) for parts in zip(*group, strict=True))
                loss = self.model.loss(self.model(inputs, start=skip).output, targets[:, skip:], reduction="sum")
                total += loss.item()
                tokens += targets[:, skip:].numel()
        total, tokens = self.ranks.sum(total, tokens)
        return {"loss": _mean(total, tokens), "tokens": tokens}

    @torch.no_grad()
    def evaluate_mc(
        self, rows: Tensor, *, passes: int, max_tokens: int | None = None, progress: Progress | None = None
    ) -> dict:
        """Loss of the mean probability of every target over passes with dropout (Monte Carlo dropout; Gal & Ghahramani,
        2016, "A Theoretically Grounded Application of Dropout in Recurrent Neural Networks", section 5).

        Every pass draws one set of masks for its rows and keeps it from the first window to the last. A network whose
        dropout is not one mask a sequence draws as in training instead. Every rank takes rows, and draws for them.

        Args:
            rows: int64 (N, L).
            passes: how many samples.
            max_tokens: every pass stops after the window in which so many tokens have been scored.
            progress: wraps the passes.

        Returns:
            as :meth:`evaluate`, and the number of `passes`.

        Raises:
            ValueError: the rows are shorter than one window.
        """
        skip, starts = self.horizon if self._has_history(False) else 0, self._scored(rows, max_tokens)
        own, total = self.ranks.part(rows), None
        samples = range(passes if own.size(0) else 0)
        for _ in progress(samples, len(samples)) if progress is not None else samples:
            masks, losses, state = self.model.draw_masks(own.size(0)), [], None
            latent = None if masks is None else masks.latent
            with evaluating(self.model):
                self.model.train(masks is None)
                for start in starts:
                    inputs, targets = self._cut(own, start, False)
                    out = self.model(inputs, state, start=skip, masks=masks)
                    state, targets = self._carried(out.state), targets[:, skip:]
                    options = {"latent_mask": latent, "draw": masks is None, "reduction": "none"}
                    losses.append(self.model.loss(out.output, targets, **options).flatten().double())
            log_p = -torch.cat(losses)
            total = log_p if total is None else torch.logaddexp(total, log_p)
        log_p = total.sum().item() if total is not None else 0.0
        log_p, tokens = self.ranks.sum(log_p, 0 if total is None else total.numel())
        return {"loss": math.log(passes) - _mean(log_p, tokens), "tokens": tokens, "passes": passes}

    @staticmethod
    def score(loss: float) -> float:
        """Perplexity of a mean loss in nats."""
        return math.exp(loss) if loss < 700 else math.inf

    def training_score(self, means: dict[str, float]) -> float:
        """The score of what was measured while training."""
        return self.score(means["loss"])

    def scores(self, result: dict, split: str) -> dict[str, float]:
        """What is reported of a result of a split ("valid" or "test"): :meth:`score` first."""
        return {self.score_name: self.score(result["loss"])}

    @staticmethod
    def is_better(result: dict, best: dict) -> bool:
        """Whether a validation result is to be preferred to the best one so far."""
        return result["loss"] < best["loss"]


class _Lazy(Sequence):
    """Batches that are made when they are looked at: `make` of every start."""

    def __init__(self, starts: Sequence[Any], make: Callable[[Any], tuple[Tensor, Tensor]]):
        self._starts, self._make = starts, make

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._make(self._starts[index])


class Reciting(LanguageModeling):
    """Language modelling scored by accuracy: the share of tokens to which the model gives the highest probability.

    Of the training text, while training, that says how well it is learned by heart ("learning to recite": Demeester et
    al., 2018, "Predefined Sparseness in Recurrent Sequence Models", section 4.2).
    """

    score_name = "accuracy"
    digits = 4
    measured = ("loss", "accuracy")

    def _measure(self, output: Tensor, targets: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            likeliest = self.model.log_prob(output, draw=False).argmax(-1)
        return {"accuracy": (likeliest == targets).float().mean()}

    def training_score(self, means: dict[str, float]) -> float:
        """Accuracy while training, before each update."""
        return means["accuracy"]

    def scores(self, result: dict, split: str) -> dict[str, float]:
        """Accuracy and perplexity of a result of :meth:`evaluate`."""
        return {"accuracy": result["accuracy"], "ppl": self.score(result["loss"])}


class CharacterModeling(LanguageModeling):
    """Next-character prediction, scored in bits per character (Table 3).

    The same text can be spelled in more or fewer symbols, and bits per character are bits per *symbol*: two results
    compare only on the same denominator. So every stream's is reported: `bpc` for the stream that is modelled, and
    `bpc_<name>`, the same bits divided by the number of symbols that stream <name> spells the text in.

    Args:
        model: the language model.
        symbols: name of a stream → split → its symbols per symbol of the stream that is modelled.
        options: those of :class:`LanguageModeling`.
    """

    score_name = "bpc"
    digits = 4

    def __init__(self, model: TrellisLanguageModel, *, symbols: dict[str, dict[str, float]], **options):
        super().__init__(model, **options)
        self.symbols = symbols

    @staticmethod
    def score(loss: float) -> float:
        """Bits of a mean loss in nats."""
        return loss / math.log(2)

    def scores(self, result: dict, split: str) -> dict[str, float]:
        """Bits per character on every denominator."""
        bpc = self.score(result["loss"])
        return {"bpc": bpc} | {f"bpc_{name}": bpc / ratios[split] for name, ratios in self.symbols.items()}


class Classification:
    """One class for a whole sequence (section 5.2, Table 4), scored by accuracy.

    Args:
        model: the classifier.
        batch_size: sequences of a training batch; the last one of an epoch may be smaller.
        eval_batch_size: sequences that are evaluated at a time; it does not change results.
        prepare: what is done to a batch of stored sequences (n, L, C), of any dtype, before the model gets it.
        seed: of the order of the training data, which is another one in every epoch, and of what `augment` draws.
        augment: what varies training sequences at random, before `prepare`.
        label_smoothing: share of every target that training spreads evenly over all classes.
        ranks: the processes among which evaluation is divided, see :class:`LanguageModeling`.
    """

    score_name = "accuracy"
    digits = 4
    batch_name, unit, count = "batch", "seq", "examples"
    measured = ("loss", "accuracy")

    def __init__(
        self,
        model: TrellisClassifier,
        *,
        batch_size: int,
        eval_batch_size: int = 64,
        prepare: Callable[[Tensor], Tensor] = lambda sequences: sequences,
        seed: int = 0,
        augment: Augmentation | None = None,
        label_smoothing: float = 0.0,
        ranks: Ranks | None = None,
    ):
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing: expected a share in [0, 1), got {label_smoothing}")
        self.model = model
        self.ranks = ranks or Ranks()
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.prepare = prepare
        self.seed = seed
        self.augment = augment
        self.label_smoothing = label_smoothing

    def batches(self, data: tuple[Tensor, Tensor], epoch: int = 0) -> Sequence[tuple[Tensor, Tensor]]:
        """The batches of an epoch, shuffled and augmented by seed and epoch: (inputs, targets), made when asked for.

        Args:
            data: sequences (n, L, C) and their classes, int64 (n,).
            epoch: counted from 0.
        """
        sequences, classes = data
        # A stream of numbers for every pair of seed and epoch; the global ones are left alone. Everything is drawn and
        # copied to the device once per epoch: no batch waits for that, and any of them can be made again.
        order = np.random.default_rng([self.seed, epoch]).permutation(len(classes))
        order = torch.from_numpy(order).to(classes.device)
        drawn = None
        if self.augment is not None:
            drawn = self.augment.draw(len(classes), np.random.default_rng([self.seed, epoch, 1])).to(sequences.device)

        def make(start: int) -> tuple[Tensor, Tensor]:
            batch = slice(start, start + self.batch_size)
            inputs = sequences[order[batch]]
            if drawn is not None:
                inputs = self.augment(inputs, drawn[batch])
            return self.prepare(inputs), classes[order[batch]]

        return _Lazy(range(0, len(classes), self.batch_size), make)

    def size(self, batch: tuple[Tensor, Tensor]) -> int:
        """Sequences of a batch."""
        return batch[1].numel()

    def rate(self, batch: tuple[Tensor, Tensor]) -> float:
        """Factor of the learning rate for a batch: always 1."""
        return 1.0

    def loss(
        self, inputs: Tensor, targets: Tensor, state: None = None, masks: Masks | None = None
    ) -> tuple[Losses, None]:
        """Loss of a batch.

        Args:
            inputs: (N, L, C).
            targets: classes, int64 (N,).
            state: nothing is carried.
            masks: explicit dropout masks.

        Returns:
            0-dim terms `loss`, `raw` (the same without label smoothing; nats per sequence) and `accuracy` (0 to 1); and
            no state.
        """
        logits = self.model(inputs, masks=masks).logits
        loss = raw = F.cross_entropy(logits, targets)
        if self.label_smoothing:
            loss = F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
        accuracy = (logits.argmax(1) == targets).float().mean()
        return {"loss": loss, "raw": raw, "accuracy": accuracy}, None

    @torch.no_grad()
    def evaluate(
        self, data: tuple[Tensor, Tensor], *, max_tokens: int | None = None, progress: Progress | None = None
    ) -> dict:
        """Mean loss and accuracy in evaluation mode; the model's mode is put back afterwards.

        Args:
            data: sequences (n, L, C) and their classes, int64 (n,).
            max_tokens: stop after the batch in which so many sequences have been scored.
            progress: wraps the batches, e.g. in a progress bar.

        Returns:
            `loss` in nats, `accuracy` from 0 to 1, and the number of `examples`.
        """
        sequences, classes = data
        starts = self._scored(len(classes), max_tokens)
        total, right, examples = 0.0, 0, 0
        with evaluating(self.model):
            for start in progress(starts, len(starts)) if progress is not None else starts:
                part = slice(start, start + self.eval_batch_size)
                logits, targets = self.model(self.prepare(sequences[part])).logits, classes[part]
                total += F.cross_entropy(logits, targets, reduction="sum").item()
                right += (logits.argmax(1) == targets).sum().item()
                examples += targets.numel()
        return self._result(total, right, examples)

    def _scored(self, examples: int, max_tokens: int | None) -> range:
        """Where this rank's batches begin, up to that in which so many sequences of all ranks have been scored."""
        starts = range(0, examples, self.eval_batch_size)
        if max_tokens is not None:
            starts = starts[: max(1, math.ceil(max_tokens / self.eval_batch_size))]
        return self.ranks.part(starts)

    def _result(self, total: float, right: int, examples: int) -> dict:
        """Means of sums that are this rank's."""
        total, right, examples = self.ranks.sum(total, right, examples)
        return {"loss": _mean(total, examples), "accuracy": _mean(right, examples), "examples": examples}

    @torch.no_grad()
    def evaluate_mc(
        self,
        data: tuple[Tensor, Tensor],
        *,
        passes: int,
        max_tokens: int | None = None,
        progress: Progress | None = None,
    ) -> dict:
        """Loss and accuracy of the mean probabilities over passes with dropout as in training (Monte Carlo dropout).

        Args:
            data: sequences (n, L, C) and their classes, int64 (n,).
            passes: how many samples.
            max_tokens, progress: as in :meth:`evaluate`, which also tells of the result.
        """
        sequences, classes = data
        starts = self._scored(len(classes), max_tokens)
        total, right, examples = 0.0, 0, 0
        with evaluating(self.model):
            self.model.train()
            for start in progress(starts, len(starts)) if progress is not None else starts:
                part = slice(start, start + self.eval_batch_size)
                inputs, targets = self.prepare(sequences[part]), classes[part]
                samples = [F.log_softmax(self.model(inputs).logits, dim=1) for _ in range(passes)]
                log_p = torch.stack(samples).double().logsumexp(0) - math.log(passes)  # (n, classes)
                total += F.nll_loss(log_p, targets, reduction="sum").item()
                right += (log_p.argmax(1) == targets).sum().item()
                examples += targets.numel()
        return self._result(total, right, examples) | {"passes": passes}

    def training_score(self, means: dict[str, float]) -> float:
        """Accuracy while training, dropout on."""
        return means["accuracy"]

    def scores(self, result: dict, split: str) -> dict[str, float]:
        """The accuracy of a result."""
        return {"accuracy": result["accuracy"]}

    @staticmethod
    def is_better(result: dict, best: dict) -> bool:
        """Whether a validation result is to be preferred to the best one so far."""
        return (result["accuracy"], -result["loss"]) > (best["accuracy"], -best["loss"])
