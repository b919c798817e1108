"""Cache, dynamic evaluation and early exit as evaluations of a run: settings, tuning, scores and their cost."""

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from trellisnet.data.corpus import Corpus, batchify
from trellisnet.errors import RunError, UserError, counted
from trellisnet.evaluation import cache, dynamic
from trellisnet.training.language_model import LanguageModelConfig, Scores
from trellisnet.training.runlog import cost
from trellisnet.training.settings import setting
from trellisnet.training.tasks import LanguageModeling, Progress, Windows

SPLITS = ("valid", "test")
STATISTICS_ROWS = 100  # of the training data, as in Krause et al.
TUNING_TOKENS = 30_000  # of the validation data, to choose rate and decay
DEFAULTS = {"rms": (1e-5, 4e-4), "sgd": (0.02, 0.0)}  # rate and decay per position of a segment

Method = Callable[..., dict[str, Any]]

# Properties shared by the settings.
_SCORING = {"group": "evaluation", "process": True}
_DYNAMIC = _SCORING | {"needs": ["dynamic_eval"]}


@dataclass(kw_only=True)
class AdaptiveConfig(LanguageModelConfig):
    """Settings of a language model, and of its scores with a cache, dynamic evaluation and early exit."""

    cache: list[float] = setting([], "with --eval: also score with a cache: WINDOW THETA LAMBDA", **_SCORING)
    cache_tune: bool = setting(
        False, "choose theta and lambda on the validation data, from a grid", **_SCORING, needs=["cache"]
    )
    dynamic_eval: bool = setting(False, "with --eval: also score with weights that learn from the text", **_SCORING)
    dynamic_eval_tune: bool = setting(
        False, "choose rate and decay on the validation data, from 0.5, 1 and 2 times the given ones", **_DYNAMIC
    )
    dynamic_eval_rule: str = setting("rms", "update rule of dynamic evaluation", **_DYNAMIC, choices=dynamic.RULES)
    dynamic_eval_lr: float = setting(
        -1.0, "learning rate of dynamic evaluation; -1: 1e-5 (with sgd: 0.02) per position of a segment",
        **_DYNAMIC, at_least=0, special=-1,
    )  # fmt: skip
    dynamic_eval_decay: float = setting(
        -1.0, "decay towards the trained weights; -1: 4e-4 (with sgd: 0) per position of a segment",
        **_DYNAMIC, at_least=0, special=-1,
    )  # fmt: skip
    dynamic_eval_epsilon: float = setting(2e-5, "epsilon of the rule rms", **_DYNAMIC, above=0)
    dynamic_eval_segment: int = setting(5, "positions that are scored, then trained on", **_DYNAMIC, at_least=1)
    dynamic_eval_stats: int = setting(
        0, "segments of the training data for the gradient statistics of rms; 0: all", **_DYNAMIC, at_least=0
    )
    early_exit: list[float] = setting(
        [], "with --eval: also score with early exit at the first layer whose output changes by less than these shares",
        **_SCORING,
    )  # fmt: skip
    adapt_rows: int = setting(
        1, "rows of text that cache and dynamic evaluation read side by side",
        **_SCORING, needs=["cache", "dynamic_eval"], at_least=1,
    )  # fmt: skip

    def validate(self) -> None:
        super().validate()
        scoring = {"--cache": self.cache, "--dynamic_eval": self.dynamic_eval, "--early_exit": self.early_exit}
        for flag, on in scoring.items():
            if on and not self.eval:
                raise UserError(f"{flag}: scores trained weights; pass --eval and --load_weight FILE")
        if not all(0 <= share < 1 for share in self.early_exit):
            shares = " ".join(f"{share:g}" for share in self.early_exit)
            raise UserError(f"--early_exit {shares}: expected shares in [0, 1), such as 0.1")
        if self.cache:
            given = f"--cache {' '.join(f'{number:.15g}' for number in self.cache)}"
            if len(self.cache) != 3:
                raise UserError(f"{given}: expected three numbers, WINDOW THETA LAMBDA, e.g. --cache 500 1 0.1")
            window, theta, weight = self.cache
            if window < 1 or not window.is_integer():
                raise UserError(f"{given}: WINDOW: expected a whole number of positions ≥ 1, got {window:g}")
            if theta < 0:
                raise UserError(f"{given}: THETA: expected 0 or more, got {theta:g}")
            if not 0 <= weight < 1:
                raise UserError(f"{given}: LAMBDA: expected a share in [0, 1), got {weight:g}")

    def extra_evaluations(self, task: LanguageModeling, corpus: Corpus, rows: dict[str, Tensor]) -> Scores:
        extra = super().extra_evaluations(task, corpus, rows) | scores(self, task, corpus)
        for split in SPLITS if self.early_exit else ():
            for share in sorted({0.0, *self.early_exit}):  # 0: all layers, for comparison
                extra[f"{split}_exit_{share:.15g}"] = functools.partial(_timed_exit, task, share), rows[split]
        return extra


def _timed_exit(task: LanguageModeling, tolerance: float, rows: Tensor, **how: Any) -> dict[str, Any]:
    with cost(rows.device) as taken:
        result = task.evaluate_exit(rows, tolerance=tolerance, **how)
    return result | {"tolerance": tolerance, "seconds": taken["seconds"]}


def scores(config: AdaptiveConfig, task: LanguageModeling, corpus: Corpus) -> Scores:
    """The scores that the settings ask for, of each split in `--adapt_rows` rows.

    `<split>_static` is the score of the model as it is, in its own windows, and `<split>_static_segments` in the
    segments of dynamic evaluation, if these differ. `<split>_cache` and `<split>_dynamic` are the adaptive ones.
    `<split>_dynamic_cache` adds a cache, made of the features and losses of dynamic evaluation.

    Raises:
        UserError: a text that is too short for the settings.
    """
    if not (config.cache or config.dynamic_eval):
        return {}
    device = next(task.model.parameters()).device
    try:
        rows = {split: batchify(getattr(corpus, split), config.adapt_rows).to(device) for split in SPLITS}
    except ValueError as e:
        raise UserError(f"--adapt_rows {config.adapt_rows}: the text is too short for so many; pass fewer") from e
    methods = _Adapted(config, task, corpus, rows).methods().items()
    return {
        f"{split}_{name}": (functools.partial(method, split), rows[split])
        for name, method in methods
        for split in SPLITS
    }


class _Adapted:
    """Scores of one model; they share gradient statistics, tuned settings and histories."""

    def __init__(self, config: AdaptiveConfig, task: LanguageModeling, corpus: Corpus, rows: dict[str, Tensor]):
        self.config, self.task, self.corpus, self.rows = config, task, corpus, rows
        self.device = rows["valid"].device
        self.caches: dict[bool, cache.Cache] = {}  # with or without dynamic evaluation
        self.update: dynamic.Update | None = None
        self.statistics: list[Tensor] | None = None
        self.histories: dict[str, cache.History] = {}  # of dynamic evaluation, for a cache on top of it
        self.costs: dict[str, dict[str, Any]] = {}  # of these histories
        if config.dynamic_eval:
            self.segments = task.segments(config.dynamic_eval_segment)
            if not self.segments.starts(self._training_rows().size(1)):
                raise UserError(
                    f"--dynamic_eval: the training text of {corpus.train.numel()} tokens is shorter than a segment"
                )
        for split, text in rows.items():
            cuts = [task.evaluation_windows, *([self.segments] if config.dynamic_eval else [])]
            if not all(windows.starts(text.size(1)) for windows in cuts):
                short = counted(text.size(1), "tokens")
                raise UserError(
                    f"--adapt_rows {config.adapt_rows}: rows of {short} of {split} are too short; pass fewer"
                )
            scored = min(self._scored(windows, text) for windows in cuts)
            if config.cache and config.cache[0] > scored - 2:  # it would act nowhere
                given = f"--cache {' '.join(f'{number:.15g}' for number in config.cache)}"
                raise UserError(
                    f"{given}: WINDOW: expected at most {scored - 2}, as {counted(scored, 'positions')} of a row of "
                    f"{split} are scored"
                )

    def _scored(self, windows: Windows, text: Tensor) -> int:
        """Number of positions of a row that are scored in these windows."""
        starts = windows.starts_to_score(text, self.config.max_eval_tokens or None)
        return min(starts[-1] + windows.length, text.size(1) - 1) - windows.context

    def methods(self) -> dict[str, Method]:
        """Methods that score a split, by name: (split, rows, max_tokens=…, progress=…) → result."""
        windows = self.task.evaluation_windows
        methods = {"static": functools.partial(self.static, windows)}
        if self.config.dynamic_eval and self.segments != windows:
            methods["static_segments"] = functools.partial(self.static, self.segments)
        if self.config.cache:
            methods["cache"] = self.cached
        if self.config.dynamic_eval:
            methods["dynamic"] = self.learning
        if self.config.cache and self.config.dynamic_eval:
            methods["dynamic_cache"] = self.learning_cached
        return methods

    def static(self, windows: Windows, split: str, rows: Tensor, **how: Any) -> dict[str, Any]:
        """Score with fixed weights, in `windows`."""
        with cost(self.device) as taken:
            result = self.task.evaluate(rows, windows=windows, **how)
        return result | taken

    def cached(self, split: str, rows: Tensor, **how: Any) -> dict[str, Any]:
        """Score with a cache of the model's features."""
        with cost(self.device) as tuning:
            best, details = self._best_cache(False, lambda: cache.collect(self.task, self.rows["valid"], **how))
        with cost(self.device) as taken:
            result = self._with_cache(cache.collect(self.task, rows, **how), best)
        return result | taken | _settings(best) | _preparation(details, tuning)

    def learning(self, split: str, rows: Tensor, max_tokens: int | None = None, progress: Progress | None = None):
        """Score with weights that learn from the text."""
        how = {"max_tokens": max_tokens, "progress": progress}
        with cost(self.device) as preparing:
            details = self._prepare(**how)
        pieces: list[tuple[Tensor, Tensor, Tensor]] = []

        def visit(output: Tensor, targets: Tensor) -> None:
            pieces.append((output, targets, self.task.model.loss(output, targets, reduction="none")))

        with cost(self.device) as taken:
            how |= {"segments": self.segments, "visit": visit if self.config.cache else None}
            result = dynamic.evaluate(self.task, rows, self.update, self.statistics, **how)
        if not math.isfinite(self.task.score(result["loss"])):
            raise RunError(
                f"dynamic evaluation of {split} diverged after {result['tokens']:,} tokens; lower --dynamic_eval_lr "
                f"from {self.update.lr:g}"
            )
        if pieces:
            self.histories[split] = cache.history(pieces)
            self.costs[split] = taken
        settings = {"rule": self.update.rule, "lr": self.update.lr, "decay": self.update.decay}
        settings |= {"epsilon": self.update.epsilon} if self.update.rule == "rms" else {}
        settings["segment"] = self.config.dynamic_eval_segment
        return result | taken | {"settings": settings} | _preparation(details, preparing)

    def learning_cached(self, split: str, rows: Tensor, **_: Any) -> dict[str, Any]:
        """Score with a cache of the features and losses of :meth:`learning`; its time and memory are included."""
        with cost(self.device) as tuning:
            best, details = self._best_cache(True, lambda: self.histories["valid"])
        with cost(self.device) as taken:
            result = self._with_cache(self.histories[split], best)
        taken["seconds"] += self.costs[split]["seconds"]
        if taken["peak_memory"] is not None:
            taken["peak_memory"] = max(taken["peak_memory"], self.costs[split]["peak_memory"])
        return result | taken | _settings(best) | _preparation(details, tuning)

    @staticmethod
    def _with_cache(past: cache.History, settings: cache.Cache) -> dict[str, Any]:
        result = cache.evaluate(past, settings)
        if math.isnan(result["loss"]) and not past.losses.isnan().any():
            raise RunError(f"the loss with --cache is not a number; lower THETA from {settings.theta:g}")
        return result

    def _best_cache(
        self, is_dynamic: bool, valid: Callable[[], cache.History]
    ) -> tuple[cache.Cache, dict[str, Any] | None]:
        """The cache to use, tuned on request, and the grid of its tuning, the first time."""
        if is_dynamic in self.caches:
            return self.caches[is_dynamic], None
        window, theta, weight = self.config.cache
        best, details = cache.Cache(int(window), theta, weight), None
        if self.config.cache_tune:
            best, table = cache.tune(valid(), best)
            details = {"grid": table}
        self.caches[is_dynamic] = best
        return best, details

    def _training_rows(self) -> Tensor:
        """Training text (N, L) for the gradient statistics."""
        longest = self.corpus.train.numel() // self.segments.length // 2
        return batchify(self.corpus.train, max(1, min(STATISTICS_ROWS, longest)))

    def _prepare(self, max_tokens: int | None, progress: Progress | None) -> dict[str, Any] | None:
        """Compute statistics and choose rate and decay, the first time; return details of both."""
        if self.update is not None:
            return None
        config, details, started = self.config, {}, time.monotonic()
        rule, segment = config.dynamic_eval_rule, config.dynamic_eval_segment
        given = (config.dynamic_eval_lr, config.dynamic_eval_decay)
        lr, decay = (
            default * segment if value < 0 else value for value, default in zip(given, DEFAULTS[rule], strict=True)
        )
        self.update = dynamic.Update(rule, lr, decay, config.dynamic_eval_epsilon)
        if rule == "rms":
            rows, group = self._training_rows().to(self.device), max(1, config.batch_size // config.accumulate)
            self.statistics = dynamic.gradient_statistics(
                self.task, rows, segments=self.segments, limit=config.dynamic_eval_stats, group=group, progress=progress
            )
            details["statistics_seconds"] = time.monotonic() - started
        if config.dynamic_eval_tune:
            limit = min(TUNING_TOKENS, max_tokens or TUNING_TOKENS)
            self.update, details["grid"] = dynamic.tune(
                self.task, self.rows["valid"], self.update, self.statistics, segments=self.segments, max_tokens=limit,
                progress=progress,
            )  # fmt: skip
        return details


def _settings(used: cache.Cache) -> dict[str, Any]:
    return {"settings": {"window": used.window, "theta": used.theta, "lambda": used.weight}}


def _preparation(details: dict[str, Any] | None, taken: dict[str, Any]) -> dict[str, Any]:
    """Details of tuning and statistics, where there are any, with their time and memory."""
    if not details:
        return {}
    for candidate in details.get("grid", ()):
        candidate["loss"] = candidate["loss"] if math.isfinite(candidate["loss"]) else None  # JSON has no infinity
    return details | {f"preparation_{key}": value for key, value in taken.items()}
