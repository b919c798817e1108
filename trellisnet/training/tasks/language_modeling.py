"""Language modelling: losses, perplexity and bits per character.

Letters: N batch (rows), L length of a row, l length of a window.
"""

import functools
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trellisnet.core import State
from trellisnet.equilibrium import EquilibriumTrellisNet
from trellisnet.errors import counted
from trellisnet.heads import LinearSoftmax
from trellisnet.models import TrellisLanguageModel
from trellisnet.regularization import Masks, activation_regularization, temporal_activation_regularization
from trellisnet.training.distributed import Ranks
from trellisnet.training.passes import Passes
from trellisnet.training.tasks.base import LazyBatches, Losses, Progress, Task, evaluating, mean, tracked
from trellisnet.training.tasks.windows import (
    Windows,
    cut,
    grouped_features,
    no_window,
    random_spans,
    streamed_features,
    windowed_features,
)


class LanguageModeling(Task):
    """Next-token prediction over rows of text, scored by perplexity (section 5.2, Appendices B.1 and B.2).

    A window gets its history in one of two ways. *History mode*: windows of `seq_len` overlap by `horizon` positions,
    which are context only and are not scored; every window starts from a zero state. *Repackaging*: windows of
    `horizon` positions lie end to end, all scored, and the state is carried from one to the next, detached. The
    :class:`Windows` for training and for evaluation follow the authors' two rules.

    Args:
        model: the language model.
        horizon: unscored positions of a window in history mode; length of a window otherwise. None, in history mode: as
            many as the core reaches back. If its depth is changed later, training windows are cut with as much context
            as its depth then needs, but score the same positions.
        seq_len: length of a window in history mode.
        repackage: carry the state. With seq_len > 0 training windows still overlap, as in the authors' word-level
            script, so the state carried into a window belongs to a later position; a warning says so.
        aux_weight: λ of Eq. 23, the weight of the summed auxiliary losses; 0 or less: none.
        aux_every: ℓ of Appendix B.2: layers ℓ, 2ℓ, … predict too, counted from the bottom as in the authors' code.
        alpha, beta: weights of AR and TAR.
        length_seed: train on windows of random length (Merity et al., 2018, section 5), drawn anew every epoch from
            this seed: normally distributed with mean `horizon`, or half of it for one window in twenty, and standard
            deviation 5, but at least 5. The learning rate is scaled by the length. Only with `repackage`.
        label_smoothing: share of each target, auxiliary ones included, that training spreads evenly over all tokens.
            Only with a plain softmax.
        ranks: the processes that share the evaluation and all get its result; by default this one is alone.

    Raises:
        ValueError: settings that contradict each other.
    """

    score_name = "ppl"
    digits = 2
    batch_name, unit, count = "window", "tok", "tokens"

    def __init__(
        self,
        model: TrellisLanguageModel,
        *,
        horizon: int | None,
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
        self.follows_depth = horizon is None
        if horizon is None:
            if repackage:
                raise ValueError("horizon: expected a number with repackage, got None")
            horizon = getattr(model.core, "reach", math.inf)
            if horizon == math.inf:
                raise ValueError("horizon: expected a number, got None; this core has no reach to take it from")
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
        self._training_windows = Windows.for_training(horizon, seq_len, repackage)
        self.evaluation_windows = Windows.for_evaluation(horizon, seq_len, repackage)
        self.aux_weight = aux_weight
        self.aux_every = aux_every
        self.alpha = alpha
        self.beta = beta
        self.length_seed = length_seed
        self.label_smoothing = label_smoothing
        if isinstance(model.core, EquilibriumTrellisNet):
            self.measured = (*self.measured, "residual", "evaluations", "unsolved")
        self.ranks = ranks or Ranks()

    @property
    def training_windows(self) -> Windows:
        """Windows of training, at the depth that the core has now."""
        windows = self._training_windows
        return windows.with_context(self.model.core.reach) if self.follows_depth else windows

    def windows(self, rows: Tensor, training: bool = True) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield the windows of rows (N, L) that score anything: start, inputs (N, l), targets (N, l).

        `training` selects one of the authors' two rules.

        Raises:
            ValueError: history mode with seq_len ≤ horizon.
        """
        windows = self.training_windows if training else self.evaluation_windows
        for start in windows.starts(rows.size(1)):
            yield start, *windows.cut(rows, start)

    def segments(self, length: int) -> Windows:
        """Windows that score `length` positions each, with the history that evaluation gives them: a carried state, or
        `horizon` positions of context.

        Raises:
            ValueError: a length below 1.
        """
        if length < 1:
            raise ValueError(f"length: expected at least 1, got {length}")
        carried = self.evaluation_windows.carried
        return Windows(0 if carried else self.horizon, length, carried)

    def batches(self, rows: Tensor, epoch: int = 0) -> Sequence[tuple[Tensor, Tensor]]:
        """Training windows (inputs, targets) of an epoch, cut out of rows (N, L) on access.

        Raises:
            ValueError: the rows are shorter than one window.
        """
        if self.length_seed is not None:
            spans = random_spans(rows.size(1), self.horizon, np.random.default_rng([self.length_seed, epoch]))
            batches = LazyBatches(spans, lambda span: cut(rows, *span))
        else:
            places = range(len(self.training_windows.starts(rows.size(1))))
            batches = LazyBatches(places, functools.partial(self._window, rows))
        if not batches:
            raise no_window(rows.size(1))
        return batches

    def _window(self, rows: Tensor, place: int) -> tuple[Tensor, Tensor]:
        windows = self.training_windows  # at the time when the window is cut
        return windows.cut(rows, windows.starts(rows.size(1))[place])

    def rate(self, batch: tuple[Tensor, Tensor]) -> float:
        """Factor of the learning rate: length / horizon for a window of random length, else 1."""
        return 1.0 if self.length_seed is None else batch[0].size(1) / self.horizon

    def size(self, batch: tuple[Tensor, Tensor]) -> int:
        """Number of scored tokens in a training window."""
        inputs, _ = batch
        return inputs.size(0) * (inputs.size(1) - self.training_windows.context)

    def loss(
        self, inputs: Tensor, targets: Tensor, state: State | None = None, masks: Masks | None = None
    ) -> tuple[Losses, State | None]:
        """Loss of one window, in nats per token.

        Args:
            inputs, targets: int64 (N, l).
            state: (h, c) to start from; always used if given.
            masks: explicit dropout masks.

        Returns:
            0-dim terms `raw`, `aux`, `alpha`, `beta` and, with label smoothing, `smoothing`, already multiplied by
            their weights, and their sum `loss`; and the state to carry: detached when repackaging, else None.

        Raises:
            ValueError: the window has nothing to score.
        """
        windows = self.training_windows if self.model.training else self.evaluation_windows
        skip = windows.context
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
            margins = [self.model.head.margin(x, targets).mean() for x in outputs]
            losses["smoothing"] = self.label_smoothing * sum(w * m for w, m in zip(weights, margins, strict=True))
            losses["loss"] = losses["loss"] + losses["smoothing"]
        return losses | self._measure(out.output.detach(), targets), windows.carry(out.state)

    def _measure(self, output: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Means (0-dim) of a window for the names in `measured` after "loss"."""
        if not isinstance(self.model.core, EquilibriumTrellisNet):
            return {}
        residual, evaluations = self.model.core.solved["forward"]
        return {
            "residual": residual,
            "evaluations": torch.tensor(float(evaluations), device=residual.device),
            "unsolved": 1.0 - (residual <= self.model.core.tolerance).float(),  # its mean: share of the windows
        }

    def streams(self, windows: Windows) -> bool:
        """Return whether :meth:`evaluate` streams every row instead of cutting it into these windows.

        This is done where it is exact, that is, where no score depends on positions before its window.
        """
        reach = getattr(self.model.core, "reach", math.inf)  # only TrellisNet has streams
        return windows.context > 0 and windows.context >= reach and self.measured == ("loss",)

    def scored(
        self,
        rows: Tensor,
        *,
        windows: Windows | None = None,
        max_tokens: int | None = None,
        progress: Progress | None = None,
        ranks: Ranks | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Features (N, l, output_size) and targets (N, l) that :meth:`evaluate` scores, piece by piece in text order.

        Consume it in evaluation mode. It yields only this rank's part of the pieces if `ranks` are given; the other
        arguments and the errors are those of :meth:`evaluate`.
        """
        windows, ranks = windows or self.evaluation_windows, ranks or Ranks()
        starts = windows.starts_to_score(rows, max_tokens)
        if self.streams(windows):
            last = min(starts[-1] + windows.length, rows.size(1) - 1)
            positions = ranks.part(range(windows.context, last))
            return streamed_features(self.model, rows, positions, windows.context, progress)
        if windows.carried:  # these windows must stay in order, so the ranks share the rows
            rows = ranks.part(rows)
            starts = starts if rows.size(0) else range(0)
        else:
            starts = ranks.part(starts)
        return windowed_features(self.model, rows, windows, starts, progress)

    @torch.no_grad()
    def evaluate(
        self,
        rows: Tensor,
        *,
        windows: Windows | None = None,
        max_tokens: int | None = None,
        progress: Progress | None = None,
    ) -> dict[str, Any]:
        """Score rows in evaluation mode; restores the model's mode.

        In history mode with a horizon of at least the model's reach the rows are streamed, so that every position is
        computed once; the scored positions are those of the windows.

        Args:
            rows: int64 (N, L).
            windows: how to cut the rows; by default `evaluation_windows`.
            max_tokens: stop after the window in which this many tokens have been scored.
            progress: wraps the windows, e.g. in a progress bar.

        Returns:
            `loss`, the mean in nats per token, and `tokens`, the scored positions × rows.

        Raises:
            ValueError: the rows are shorter than one window.
        """
        how = {"windows": windows, "max_tokens": max_tokens, "progress": progress}
        with evaluating(self.model):
            return self._averaged(self.scored(rows, **how, ranks=self.ranks))

    @torch.no_grad()
    def evaluate_depths(
        self,
        rows: Tensor,
        depths: Sequence[int],
        *,
        max_tokens: int | None = None,
        progress: Progress | None = None,
    ) -> list[dict[str, Any]]:
        """Score rows with a TrellisNet of each of several depths.

        Where windows start from a zero state, the layers of the deepest network are the outputs of all others, and one
        pass gives all results. A carried state is that of its own depth and pads every layer, so each depth has a pass.

        Args:
            rows: int64 (N, L).
            depths: numbers of layers.
            max_tokens, progress: as in :meth:`evaluate`.

        Returns:
            the result of :meth:`evaluate` for every depth, in their order; the windows are the same for all.
        """
        windows = self.evaluation_windows
        if windows.carried:
            return super().evaluate_depths(rows, depths, max_tokens=max_tokens, progress=progress)
        every, totals = math.gcd(*depths), [_Totals(self) for _ in depths]
        with evaluating(self.model):
            for start in tracked(self.ranks.part(windows.starts_to_score(rows, max_tokens)), progress):
                inputs, targets = windows.cut(rows, start)
                out = self.model(inputs, start=windows.context, aux_every=every, num_layers=max(depths))
                for depth, total in zip(depths, totals, strict=True):
                    total.add(out.aux[depth // every - 1], targets[:, windows.context :])
        return [total.means() for total in totals]

    @torch.no_grad()
    def evaluate_exit(
        self, rows: Tensor, *, tolerance: float, max_tokens: int | None = None, progress: Progress | None = None
    ) -> dict[str, Any]:
        """Score rows as streams that stop at the layer beyond which the features hardly change (early exit).

        Every row is read from a zero state with its exact history, which is never repackaged. The scored positions are
        those of :meth:`evaluate`.

        Args:
            rows: int64 (N, L).
            tolerance: as in :meth:`trellisnet.TrellisNet.stream`; 0: compute all layers.
            max_tokens, progress: as in :meth:`evaluate`.

        Returns:
            the result of :meth:`evaluate`, whose errors it also raises, and `layers`, computed on average.
        """
        windows, own, layers = self.evaluation_windows, self.ranks.part(rows), []
        last = windows.starts_to_score(rows, max_tokens)[-1] + windows.length
        positions, how = range(windows.context, min(last, rows.size(1) - 1)), (windows.context, progress)
        with evaluating(self.model):
            pieces = streamed_features(self.model, own, positions, *how, tolerance, layers) if own.size(0) else ()
            result = self._averaged(pieces)
        computed, read = self.ranks.sum(own.size(0) * sum(layers), own.size(0) * len(layers))
        return result | {"layers": mean(computed, read)}

    def _averaged(self, pieces: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Any]:
        """Means of `measured` over the features and targets of all ranks."""
        totals = _Totals(self)
        for output, targets in pieces:
            totals.add(output, targets)
        return totals.means()

    @torch.no_grad()
    def evaluate_all(
        self, stream: Tensor, *, batch_size: int = 1, max_tokens: int | None = None, progress: Progress | None = None
    ) -> dict[str, Any]:
        """Score every target of a stream, including those with less history than a full context.

        Args:
            stream: 1-D int64; all but its first token are scored.
            batch_size: windows of history mode scored side by side, unless the stream is read as one row.
            max_tokens, progress: as in :meth:`evaluate`, which also describes the result.

        Raises:
            ValueError: the stream has fewer than two tokens.
        """
        rows, windows = stream.unsqueeze(0), self.evaluation_windows
        if not windows.context:
            return self.evaluate(rows, max_tokens=max_tokens, progress=progress)
        starts = windows.starts(rows.size(1))
        if starts and self.streams(windows):
            if max_tokens is not None:  # all of the first window is scored
                starts = starts[: 1 + max(0, math.ceil((max_tokens - windows.length) / windows.stride))]
            positions = self.ranks.part(range(min(starts[-1] + windows.length, rows.size(1) - 1)))
            pieces = streamed_features(self.model, rows, positions, windows.context, progress)
        else:
            groups = self.ranks.part(windows.groups(stream.numel(), batch_size, max_tokens))
            pieces = grouped_features(self.model, rows, windows, groups, progress)
        with evaluating(self.model):
            return self._averaged(pieces)

    @torch.no_grad()
    def evaluate_mc(
        self,
        rows: Tensor,
        *,
        passes: int,
        max_tokens: int | None = None,
        progress: Progress | None = None,
        kept: Passes | None = None,
        name: str = "",
    ) -> dict[str, Any]:
        """Score rows by each target's probability averaged over passes with dropout (Monte Carlo dropout; Gal &
        Ghahramani, 2016, "A Theoretically Grounded Application of Dropout in Recurrent Neural Networks", section 5).

        Each pass draws one set of masks for its rows and keeps it from the first window to the last. A core whose
        dropout has no mask per sequence instead draws as in training. Each rank takes some of the rows and draws masks
        for them alone.

        Args:
            rows: int64 (N, L).
            passes: number of samples, which `progress` wraps.
            max_tokens: each pass stops after the window in which this many tokens have been scored.
            kept: a file that holds earlier passes and receives these, under `name`; only for one rank.

        Returns:
            the result of :meth:`evaluate`, whose errors it also raises, and `passes`.

        Raises:
            UserError: as in :meth:`trellisnet.training.passes.Passes.restore`.
        """
        windows = self.evaluation_windows
        skip, starts = windows.context, windows.starts_to_score(rows, max_tokens)
        own = self.ranks.part(rows)
        done, total = kept.restore(name, passes, own.device) if kept else (0, None)
        samples = range(done, passes if own.size(0) else 0)
        for sample in tracked(samples, progress):
            masks, losses, state = self.model.draw_masks(own.size(0)), [], None
            latent = None if masks is None else masks.latent
            with evaluating(self.model):
                self.model.train(masks is None)
                for start in starts:
                    inputs, targets = windows.cut(own, start)
                    out = self.model(inputs, state, start=skip, masks=masks)
                    state, targets = windows.carry(out.state), targets[:, skip:]
                    options = {"latent_mask": latent, "draw": masks is None, "reduction": "none"}
                    losses.append(self.model.loss(out.output, targets, **options).flatten().double())
            log_p = -torch.cat(losses)
            total = log_p if total is None else torch.logaddexp(total, log_p)
            if kept:
                kept.keep(name, sample + 1, total, last=sample + 1 == passes)
        log_p = total.sum().item() if total is not None else 0.0
        log_p, tokens = self.ranks.sum(log_p, 0 if total is None else total.numel())
        return {"loss": math.log(passes) - mean(log_p, tokens), "tokens": tokens, "passes": passes}

    @staticmethod
    def score(loss: float) -> float:
        """Perplexity of a mean loss in nats."""
        return math.inf if loss > 700 else math.exp(loss)


class _Totals:
    """Sums of what a task measures over the features and targets of this rank."""

    def __init__(self, task: LanguageModeling):
        self.task = task
        self.loss, self.tokens = 0.0, 0
        self.others = dict.fromkeys(task.measured[1:], 0.0)

    def add(self, output: Tensor, targets: Tensor) -> None:
        """Add features (N, l, output_size) and targets (N, l)."""
        self.loss += self.task.model.loss(output, targets, reduction="sum").item()
        for name, value in self.task._measure(output, targets).items():
            self.others[name] += value.item() * targets.numel()
        self.tokens += targets.numel()

    def means(self) -> dict[str, Any]:
        """Means over all ranks, and `tokens`, their number."""
        loss, tokens, *sums = self.task.ranks.sum(self.loss, self.tokens, *self.others.values())
        means = {name: mean(sum_, tokens) for name, sum_ in zip(self.others, sums, strict=True)}
        return {"loss": mean(loss, tokens), "tokens": tokens} | means
