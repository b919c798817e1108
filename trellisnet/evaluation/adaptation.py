"""Cache and dynamic evaluation for language models: their settings, what they score, how it is tuned, what it costs."""

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
TUNING_TOKENS = 30_000  # of the validation data that rate and decay are chosen on
# Rate and decay for every position of a segment.
DEFAULTS = {"rms": (1e-5, 4e-4), "sgd": (0.02, 0.0)}

Method = Callable[..., dict[str, Any]]

# Properties that settings share.
_SCORING = {"group": "evaluation", "process": True}
_DYNAMIC = _SCORING | {"needs": ["dynamic_eval"]}


@dataclass(kw_only=True)
class AdaptiveConfig(LanguageModelConfig):
    """Settings of language models that can also be scored with a cache or by dynamic evaluation."""

    cache: list[float] = setting([], "with --eval: also score with a cache: WINDOW THETA LAMBDA", **_SCORING)
    cache_tune: bool = setting(
        False, "choose theta and lambda on the validation data, from a grid", **_SCORING, needs=["cache"]
    )
    dynamic_eval: bool = setting(False, "with --eval: also score with weights that learn from the text", **_SCORING)
    dynamic_eval_tune: bool = setting(
        False, "choose its rate and decay on the validation data: half, once and twice", **_DYNAMIC
    )
    dynamic_eval_rule: str = setting("rms", "how they learn", **_DYNAMIC, choices=dynamic.RULES)
    dynamic_eval_lr: float = setting(
        -1.0, "rate; -1: for every position of a segment 1e-5, with sgd 0.02", **_DYNAMIC, at_least=0, special=-1
    )
    dynamic_eval_decay: float = setting(
        -1.0,
        "decay towards the trained weights; -1: for every position of a segment 4e-4, with sgd 0",
        **_DYNAMIC,
        at_least=0,
        special=-1,
    )
    dynamic_eval_epsilon: float = setting(2e-5, "of rms", **_DYNAMIC, above=0)
    dynamic_eval_segment: int = setting(5, "positions that are scored, then learned from", **_DYNAMIC, at_least=1)
    dynamic_eval_stats: int = setting(
        0, "segments of the training data that rms takes gradients of; 0: all", **_DYNAMIC, at_least=0
    )
    adapt_rows: int = setting(
        1,
        "rows of text that cache and dynamic evaluation read side by side",
        **_SCORING,
        needs=["cache", "dynamic_eval"],
        at_least=1,
    )

    def validate(self) -> None:
        super().validate()
        for way, on in (("cache", bool(self.cache)), ("dynamic_eval", self.dynamic_eval)):
            if on and not self.eval:
                raise UserError(f"--{way}: is a way of scoring trained weights; pass --eval and --load_weight FILE")
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
        return super().extra_evaluations(task, corpus, rows) | scores(self, task, corpus)


def scores(config: AdaptiveConfig, task: LanguageModeling, corpus: Corpus) -> Scores:
    """The scores that the settings ask for.

    All are of the whole split in `--adapt_rows` rows: `<split>_static` by the model as it is and, if the segments of
    dynamic evaluation are not its windows, `<split>_static_segments` by the same in those; `<split>_cache`,
    `<split>_dynamic` and, with both, `<split>_dynamic_cache`: a cache of the features, and beside the losses, of
    dynamic evaluation.

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
    found: Scores = {}
    adapted = _Adapted(config, task, corpus, rows)
    for name, method in adapted.methods().items():
        for split in SPLITS:
            found[f"{split}_{name}"] = functools.partial(method, split), rows[split]
    return found


class _Adapted:
    """Scores of one model and what they share: statistics, settings that were tuned, histories."""

    def __init__(self, config: AdaptiveConfig, task: LanguageModeling, corpus: Corpus, rows: dict[str, Tensor]):
        self.config, self.task, self.corpus, self.rows = config, task, corpus, rows
        self.device = rows["valid"].device
        self.caches: dict[bool, cache.Cache] = {}  # with or without dynamic evaluation
        self.update: dynamic.Update | None = None
        self.statistics: list[Tensor] | None = None
        self.histories: dict[str, cache.History] = {}  # of dynamic evaluation, if a cache comes on top
        self.costs: dict[str, dict[str, Any]] = {}  # of these
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
            if config.cache and config.cache[0] >= text.size(1) - 2:
                given = f"--cache {' '.join(f'{number:.15g}' for number in config.cache)}"
                raise UserError(f"{given}: WINDOW: expected less than the {text.size(1)} tokens of a row of {split}")

    def methods(self) -> dict[str, Method]:
        """By name: what scores a split, (split, rows, max_tokens=…, progress=…) → result."""
        windows = self.task.evaluation_windows
        ways = {"static": functools.partial(self.static, windows)}
        if self.config.dynamic_eval and self.segments != windows:
            ways["static_segments"] = functools.partial(self.static, self.segments)
        if self.config.cache:
            ways["cache"] = self.cached
        if self.config.dynamic_eval:
            ways["dynamic"] = self.learning
        if self.config.cache and self.config.dynamic_eval:
            ways["dynamic_cache"] = self.learning_cached
        return ways

    def static(self, windows: Windows, split: str, rows: Tensor, **how: Any) -> dict[str, Any]:
        """The model with fixed weights, on the same rows, in `windows`."""
        with cost(self.device) as taken:
            result = self.task.evaluate(rows, windows=windows, **how)
        return result | taken

    def cached(self, split: str, rows: Tensor, **how: Any) -> dict[str, Any]:
        """With a cache of its features."""
        with cost(self.device) as tuning:
            chosen, further = self._chosen_cache(False, lambda: cache.collect(self.task, self.rows["valid"], **how))
        with cost(self.device) as taken:
            result = self._with_cache(cache.collect(self.task, rows, **how), chosen)
        return result | taken | _told(chosen) | _tuned(further, tuning)

    def learning(self, split: str, rows: Tensor, max_tokens: int | None = None, progress: Progress | None = None):
        """With weights that learn from the text."""
        how = {"max_tokens": max_tokens, "progress": progress}
        with cost(self.device) as preparing:
            further = self._prepare(**how)
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
        return result | taken | {"settings": settings} | _tuned(further, preparing)

    def learning_cached(self, split: str, rows: Tensor, **_: Any) -> dict[str, Any]:
        """With both: the features and losses are those of :meth:`learning`, whose time and memory are counted in."""
        with cost(self.device) as tuning:
            chosen, further = self._chosen_cache(True, lambda: self.histories["valid"])
        with cost(self.device) as taken:
            result = self._with_cache(self.histories[split], chosen)
        taken["seconds"] += self.costs[split]["seconds"]
        if taken["peak_memory"] is not None:
            taken["peak_memory"] = max(taken["peak_memory"], self.costs[split]["peak_memory"])
        return result | taken | _told(chosen) | _tuned(further, tuning)

    @staticmethod
    def _with_cache(past: cache.History, chosen: cache.Cache) -> dict[str, Any]:
        result = cache.evaluate(past, chosen)
        if math.isnan(result["loss"]) and not past.losses.isnan().any():
            raise RunError(f"the loss with --cache is not a number; lower THETA from {chosen.theta:g}")
        return result

    def _chosen_cache(
        self, is_dynamic: bool, valid: Callable[[], cache.History]
    ) -> tuple[cache.Cache, dict[str, Any] | None]:
        """The cache to use, and what was tried the first time."""
        if is_dynamic in self.caches:
            return self.caches[is_dynamic], None
        window, theta, weight = self.config.cache
        chosen, further = cache.Cache(int(window), theta, weight), None
        if self.config.cache_tune:
            chosen, table = cache.tune(valid(), chosen)
            further = {"grid": table}
        self.caches[is_dynamic] = chosen
        return chosen, further

    def _training_rows(self) -> Tensor:
        """What the statistics are taken of, (N, L)."""
        longest = self.corpus.train.numel() // self.segments.length // 2
        return batchify(self.corpus.train, max(1, min(STATISTICS_ROWS, longest)))

    def _prepare(self, max_tokens: int | None, progress: Progress | None) -> dict[str, Any] | None:
        """Take statistics and choose rate and decay, the first time."""
        if self.update is not None:
            return None
        config, further, started = self.config, {}, time.monotonic()
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
            further["statistics_seconds"] = time.monotonic() - started
        if config.dynamic_eval_tune:
            most = min(TUNING_TOKENS, max_tokens or TUNING_TOKENS)
            self.update, further["grid"] = dynamic.tune(
                self.task, self.rows["valid"], self.update, self.statistics, segments=self.segments, max_tokens=most,
                progress=progress,
            )  # fmt: skip
        return further


def _told(chosen: cache.Cache) -> dict[str, Any]:
    return {"settings": {"window": chosen.window, "theta": chosen.theta, "lambda": chosen.weight}}


def _tuned(further: dict[str, Any] | None, taken: dict[str, Any]) -> dict[str, Any]:
    """What was found out beforehand, the first time, and the seconds and memory for it."""
    if not further:
        return {}
    for tried in further.get("grid", ()):
        tried["loss"] = tried["loss"] if math.isfinite(tried["loss"]) else None  # there is no infinity in JSON
    return further | {f"preparation_{key}": value for key, value in taken.items()}
