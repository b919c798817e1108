"""What is learned: the only place with losses, perplexity, and the ways of giving a window its history.

A task binds a model to a loss. The engine sees of it: `model`, `batches`, `size`, `loss`, `evaluate`, `scores`.

Letters: N batch (rows), L length of a row, l length of a window.
"""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from trellisnet.core import State
from trellisnet.models import TrellisLanguageModel
from trellisnet.regularization import Masks, activation_regularization, temporal_activation_regularization

Losses = dict[str, Tensor]
Progress = Callable[[Iterable, int], Iterable]  # wraps an iterable of known length, e.g. in a progress bar


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

    Raises:
        ValueError: settings that fit no window.
    """

    score_name = "ppl"
    digits = 2  # of a printed score

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
    ):
        if horizon < 1:
            raise ValueError(f"horizon: expected at least 1, got {horizon}")
        if seq_len < 0:
            raise ValueError(f"seq_len: expected 0 or more, got {seq_len}")
        if aux_weight > 0 and aux_every is None:
            raise ValueError("aux_every: expected a number of layers when aux_weight > 0, got None")
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

    def batches(self, rows: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        """The training windows of an epoch: (inputs, targets), cut out of `rows` when they are asked for.

        Raises:
            ValueError: the rows are shorter than one window.
        """
        starts = self._starts(rows, True)
        if not starts:
            raise ValueError(f"rows of {rows.size(1)} tokens hold no window with anything to score")
        return _Windows(starts, lambda start: self._cut(rows, start, True))

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
            0-dim terms `raw`, `aux`, `alpha`, `beta`, already multiplied by their weights, and their sum `loss`;
            and the state to carry: detached when repackaging, else None.

        Raises:
            ValueError: the window has nothing to score.
        """
        skip = self.horizon if self._has_history(self.model.training) else 0
        if inputs.size(1) <= skip:
            raise ValueError(f"a window of {inputs.size(1)} tokens holds nothing to score after the first {skip}")
        with_aux = self.aux_weight > 0
        out = self.model(inputs, state, aux_every=self.aux_every if with_aux else None, masks=masks)
        targets = targets[:, skip:]

        def head(output: Tensor, latent_mask: Tensor | None) -> Tensor:
            return self.model.loss(output[:, skip:], targets, latent_mask=latent_mask, draw=masks is None)

        raw = head(out.output, masks.latent if masks else None)
        aux = alpha = beta = raw.new_zeros(())
        if with_aux and out.aux:
            latent_aux = masks.latent_aux if masks else None
            each = [None] * len(out.aux) if latent_aux is None else latent_aux.unbind(1)
            aux = self.aux_weight * sum(head(a, mask) for a, mask in zip(out.aux, each, strict=True))
        if self.alpha:
            alpha = activation_regularization(out.output[:, skip:], self.alpha)
        if self.beta:
            beta = temporal_activation_regularization(out.raw_output[:, skip:], self.beta)
        losses = {"loss": raw + aux + alpha + beta, "raw": raw, "aux": aux, "alpha": alpha, "beta": beta}
        return losses, self._carried(out.state)

    def _carried(self, state: State) -> State | None:
        h, c = state  # views of whole sequences; the copies let those go
        return (h.detach().clone(), c.detach().clone()) if self.repackage else None

    @torch.no_grad()
    def evaluate(self, rows: Tensor, *, max_tokens: int | None = None, progress: Progress | None = None) -> dict:
        """Mean loss of rows (N, L) in evaluation mode; the model's mode is put back afterwards.

        Args:
            rows: int64 (N, L).
            max_tokens: stop after the window in which so many tokens have been scored.
            progress: wraps the windows, e.g. in a progress bar.

        Returns:
            `loss`, the token-weighted mean in nats, and `tokens`, the scored positions × rows.

        Raises:
            ValueError: the rows are shorter than one window.
        """
        skip = self.horizon if self._has_history(False) else 0
        windows = self.windows(rows, training=False)
        if progress is not None:
            windows = progress(windows, len(self._starts(rows, False)))
        with self._evaluating():
            total, tokens, state = 0.0, 0, None
            for _, inputs, targets in windows:
                out = self.model(inputs, state)
                state = self._carried(out.state)
                targets = targets[:, skip:]
                total += self.model.loss(out.output[:, skip:], targets).item() * targets.numel()
                tokens += targets.numel()
                if max_tokens is not None and tokens >= max_tokens:
                    break
        if not tokens:
            raise ValueError(f"rows of {rows.size(1)} tokens hold no window with anything to score")
        return {"loss": total / tokens, "tokens": tokens}

    @torch.no_grad()
    def evaluate_all(
        self, stream: Tensor, *, batch_size: int = 1, max_tokens: int | None = None, progress: Progress | None = None
    ) -> dict:
        """Mean loss of every target of a stream, those that have less than the whole history before them included.

        In history mode every window starts from nothing, so windows are scored side by side; otherwise the stream is
        one row.

        Args:
            stream: 1-D int64; all but its first token are scored.
            batch_size: windows scored at a time.
            max_tokens, progress: as in :meth:`evaluate`, which also tells of the result and the errors.
        """
        rows = stream.unsqueeze(0)
        if not self._has_history(False):
            return self.evaluate(rows, max_tokens=max_tokens, progress=progress)
        windows = [(inputs, targets) for _, inputs, targets in self.windows(rows, training=False)]
        whole = [w for w in windows[1:] if w[0].size(1) == self.seq_len]
        rest = [w for w in windows[1:] if w[0].size(1) != self.seq_len]
        groups = [windows[:1]] if windows else []
        groups += [whole[i : i + batch_size] for i in range(0, len(whole), batch_size)] + [[w] for w in rest]
        with self._evaluating():
            total, tokens = 0.0, 0
            for group in progress(groups, len(groups)) if progress is not None else groups:
                inputs, targets = (torch.cat(parts) for parts in zip(*group, strict=True))
                skip = self.horizon if tokens else 0  # the first window has nothing before it: all of it is scored
                loss = self.model.loss(self.model(inputs).output[:, skip:], targets[:, skip:], reduction="sum")
                total += loss.item()
                tokens += targets[:, skip:].numel()
                if max_tokens is not None and tokens >= max_tokens:
                    break
        if not tokens:
            raise ValueError(f"a stream of {stream.numel()} tokens holds no window with anything to score")
        return {"loss": total / tokens, "tokens": tokens}

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Evaluation mode, and back to what every module was in."""
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            yield
        finally:
            for module, training in modes.items():
                module.training = training

    @staticmethod
    def score(loss: float) -> float:
        """Perplexity of a mean loss in nats."""
        return math.exp(loss) if loss < 700 else math.inf

    def scores(self, loss: float, split: str) -> dict[str, float]:
        """What is reported of a mean loss of a split ("train", "valid", "test"): :meth:`score` first."""
        return {self.score_name: self.score(loss)}


class _Windows(Sequence):
    """Windows that are cut when they are looked at."""

    def __init__(self, starts: range, cut: Callable[[int], tuple[Tensor, Tensor]]):
        self._starts, self._cut = starts, cut

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._cut(self._starts[index])


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

    def scores(self, loss: float, split: str) -> dict[str, float]:
        """Bits per character on every denominator."""
        bpc = self.score(loss)
        return {"bpc": bpc} | {f"bpc_{name}": bpc / ratios[split] for name, ratios in self.symbols.items()}
