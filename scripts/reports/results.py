"""The sections of RESULTS.md, each from its records."""

import statistics
from collections.abc import Container, Iterable, Sequence
from pathlib import Path
from typing import Any

from scripts.reports import records
from scripts.reports.markdown import HERE_ONLY, table, threads
from scripts.reports.records import (
    ADAPTED,
    Run,
    Score,
    comparable,
    options,
    place,
    refusing,
    score_of,
    started_from,
    without,
)
from scripts.reports.tables import EQUILIBRIA, GROWTH, PUBLISHED, TAGGED, WEIGHTS
from trellisnet.errors import counted

ORDERS = {True: "permuted", False: "not permuted"}


def minutes(seconds: float) -> str:
    """Seconds in minutes, with a decimal if there are few."""
    return f"{seconds / 60:.{0 if seconds >= 600 else 1}f}"


def all_scores(result: dict[str, Any]) -> str:
    """A score with its other denominators."""
    score = score_of(result)
    prefix = f"{score.score_name}_"
    others = [key for key in result if key.startswith(prefix) and result[key] != score.value]
    more = "".join(f", {result[key]:.{score.digits}f} on the {key.removeprefix(prefix)} stream" for key in others)
    return f"{score.title} **{score}**{more}"


def section(run: Run) -> str:
    """A heading, the facts and the learning curve of one run.

    Raises:
        UserError: a field is missing or of another kind.
    """
    with refusing(run.folder):
        return _section(run, run.metrics)


def _section(run: Run, metrics: dict[str, Any]) -> str:
    score, published = score_of(metrics["test"]), PUBLISHED[metrics["task"]]
    paper = published.score
    if published.not_permuted:
        paper += f", {published.not_permuted} without permutation,"
    valid = "none held out; the last epoch is scored"
    if metrics["valid"]:
        # Finetuning that gains nothing keeps the loaded weights.
        when = f"at epoch {metrics['best_epoch']}" if metrics["best_epoch"] else "as loaded"
        valid = f"{score_of(metrics['valid'])} {when}"
    facts = {
        "Command": f"`{metrics['command']}`",
        "Test": f"{all_scores(metrics['test'])} ({metrics['test'][score.count]:,} {score.count} scored); "
        f"the paper reports {paper} with another configuration ({published.setting})",
        "Validation": valid,
        "Parameters": f"{metrics['params']:,}",
        "Wall time": f"{minutes(metrics['seconds'])} minutes, evaluation included",
        "Machine": f"{metrics['machine']}, {threads(metrics)}, {metrics['device']}, {metrics['precision']}, "
        f"backend {metrics['backend']}, torch {metrics['torch']}",
        "Seed": str(metrics["seed"]),
        "Commit": f"`{metrics['commit']}`",
        "Data": f"{metrics['corpus']}, sha256 `{metrics['data'][:16]}…`",
        "Log": f"[results/{run.folder.name}/](results/{run.folder.name})",
    }
    heading = f"## {metrics['task']}, preset `{metrics['preset']}`"
    if metrics["task"] == "pmnist" and not metrics["permute"]:
        heading += f", {ORDERS[False]}"
    heading += ", augmented" if metrics.get("augment") else ""
    heading += f", from `{metrics['load_weight']}`" if metrics["load_weight"] else ""
    curve = table(
        ["epoch:", "lr:", f"train {score.score_name}:", f"valid {score.score_name}:", "minutes:"],
        (
            (e["epoch"], f"{e['lr']:g}", f"{e['train_score']:.{score.digits}f}",
             "" if e["valid_score"] is None else f"{e['valid_score']:.{score.digits}f}", f"{e['seconds'] / 60:.1f}")
            for e in run.epochs
        ),
    )  # fmt: skip
    return _text([heading, "", *(f"- {key}: {value}" for key, value in facts.items()), "", *curve])


def summary(runs: Iterable[Run]) -> str:
    """Tables 1 to 4 beside the best result of each kind."""
    best: dict[tuple[str, str, str, str], dict[str, Any]] = {}
    for metrics in (run.metrics for run in runs):
        if (score_of(metrics["test"]).score_name == "accuracy") != PUBLISHED[metrics["task"]].score.endswith("%"):
            continue  # a run that recites, which the paper has none of
        order = ORDERS[metrics["permute"]] if metrics["task"] == "pmnist" else ""
        key = metrics["task"], order, "augmented" if metrics.get("augment") else "", metrics["corpus"]
        if key not in best or comparable(metrics["test"]).is_better(comparable(best[key]["test"])):
            best[key] = metrics

    def position(key: tuple[str, str, str, str]) -> tuple:
        task, order, augmented, corpus = key
        return PUBLISHED[task].table, list(PUBLISHED).index(task), order == ORDERS[False], augmented, corpus

    rows = []
    for key in sorted(best, key=position):
        (task, order, augmented, corpus), metrics = key, best[key]
        published, score, start = PUBLISHED[task], comparable(metrics["test"]), started_from(metrics)
        rows.append(
            (
                published.table, ", ".join(filter(None, (task, order, augmented))), published.setting,
                published.not_permuted if order == ORDERS[False] else published.score,
                f"{100 * score.value:.2f} %" if score.score_name == "accuracy" else score,
                f"`{metrics['preset']}`", f"{metrics['params']:,}", corpus,
                minutes(metrics["seconds"]) + (f" after `{start}`" if start else ""),
            )
        )  # fmt: skip
    columns = "table: task|the paper's model|paper:|ours:|preset|parameters:|data|minutes:"
    return _text(
        [
            "## Tables 1 to 4 of the paper, and our results",
            "",
            "The paper's TrellisNet (without a mixture of softmaxes), beside the best result below on the same task. "
            "Where sizes or data differ, the two are not comparable; what the paper's models reach with this code is "
            "unknown until they are trained.",
            "",
            *table(columns.replace("table: ", "table:|").split("|"), rows),
        ]
    )


def equal_time(folder: Path) -> str:
    """Networks after about the same time, from results/compare_<minutes>_minutes."""
    planned, runs = records.read_equal_time(folder)
    with refusing(folder):
        rows = []
        for label, run in runs:
            m, seconds = run.metrics, sum(epoch["train_seconds"] for epoch in run.epochs)
            rows.append(
                (
                    label, f"{m['params']:,}", m["precision"], len(run.epochs), f"{m['seconds'] / 60:.1f}",
                    f"{m['train']['tokens'] * len(run.epochs) / seconds:,.0f}", score_of(m["valid"]),
                    score_of(m["test"]), f"`{m['command']}`",
                )
            )  # fmt: skip
        columns = "network|parameters:|precision|epochs:|minutes:|training tokens/s:|valid ppl:|test ppl:|command"
        picture = folder.parent / "figures" / f"{folder.name}.svg"
        curves = (
            f" [Curves](results/figures/{picture.name}) of the rows kept here: `python scripts/plot.py curves "
            f"results/{folder.name}/* --by minutes --out results/figures/{picture.name}`."
        ) * picture.is_file()
        return _text(
            [
                f"## Networks of one size after about {planned} minutes each, {m['task']}",
                "",
                f"`MINUTES={planned} bash scripts/compare.sh`: each network in the precision in which it is faster. "
                f"{m['machine']}, {threads(m)}, torch {m['torch']}, commit `{m['commit']}`, data sha256 "
                f"`{m['data'][:16]}…`; one seed.{curves}",
                "",
                *table(columns.split("|"), rows),
            ]
        )


def _own_flags(command: Iterable[tuple[str, ...]], common: Container[tuple[str, ...]]) -> str:
    """Return the flags of a command that are not common to its table, as code."""
    own = " ".join(word for words in command if words not in common for word in words)
    return f"`{own}`" if own else ""


def ablations(folder: Path) -> str:
    """Rows of Table 6 after equally many updates, from results/table6_<preset>."""
    runs = records.read_ablations(folder)
    with refusing(folder):
        first, base = runs[0]
        score, test = score_of(base["test"]), base["test"]
        name, digits = score.score_name, score.digits
        common, rows = set(options(without(base["command"], *HERE_ONLY))), []
        for row, metrics in runs:
            flags = _own_flags(options(without(metrics["command"], *HERE_ONLY)), common)
            diverged = " — diverged with these settings" if metrics["test"]["loss"] > test["loss"] + 2 else ""
            difference = f"{metrics['test'][name] - test[name]:+.{digits}f}"
            paper = "" if row.paper is None else f"{row.paper - first.paper:+.{digits}f}"
            rows.append(
                (
                    row.label + diverged, flags, f"{metrics['params']:,}", f"{metrics['seconds'] / 60:.1f}",
                    *(score_of(metrics[split]) for split in ("valid", "test")),
                    *(("", "") if row is first else (difference, paper)),
                )
            )  # fmt: skip
        columns = f"row|flags|parameters:|minutes:|valid {name}:|test {score.title}:|difference:|in the paper:"
        steps, preset = base["steps"], base["preset"]
        return _text(
            [
                f"## Rows of Table 6, {base['task']}, preset `{preset}`, {steps:,} updates each",
                "",
                f"`{without(base['command'], *HERE_ONLY)} --max_steps {steps}` and the flags of the row: "
                f"`PRESET={preset} STEPS={steps} bash scripts/table6.sh`. "
                f"{base['machine']}, torch {base['torch']}, commit `{base['commit']}`, {base['corpus']}, one seed "
                f"({base['seed']}). A small network and few updates do not test the paper's differences, which are "
                "those after 500 epochs at 24M parameters. Minutes are wall time, not a measure of speed.",
                "",
                *table(columns.split("|"), rows),
            ]
        )


def recipe(folder: Path) -> str:
    """Validation scores of a recipe, part by part, from results/recipe."""
    runs = records.read_recipe(folder)
    with refusing(folder):
        one, commands = runs[0][1], [options(without(m["command"], *HERE_ONLY, "threads", "seed")) for _, m in runs]
        common = [words for words in commands[0] if all(words in command for command in commands)]
        rows, before = [], None
        for (label, metrics), command in zip(runs, commands, strict=True):
            score = score_of(metrics["valid"])
            difference = "" if before is None else f"{score.value - before:+.{score.digits}f}"
            rows.append((label, _own_flags(command, common), score, difference, f"`{metrics['commit']}`"))
            before = score.value
        name = score_of(one["valid"]).score_name
        return _text(
            [
                f"## Parts of the recipe, {one['task']}, preset `{one['preset']}`, {one['epochs']} epochs each",
                "",
                f"`{' '.join(word for words in common for word in words)} --epochs {one['epochs']}` and the flags of "
                "the row, which adds one part to the row above it: `bash scripts/recipe.sh`. Scores are on the "
                f"validation images. {one['machine']}, {one['precision']}, torch {one['torch']}, {one['corpus']}, one "
                f"seed ({one['seed']}).",
                "",
                *table(["row", "flags", f"valid {name}:", "difference:", "commit"], rows),
            ]
        )


def short_runs(folder: Path) -> str:
    """Runs of the other cores' recipes at a small size, from results/short_runs."""
    runs = records.read_short_runs(folder)
    with refusing(folder):
        one, rows = runs[0], []
        for run in runs:
            valid, test = score_of(run["valid"]), score_of(run["test"])
            when = "" if run["best_epoch"] else ", as loaded"
            counts = f"{run['params']:,}", run["epochs"], f"{run['seconds'] / 60:.1f}"
            scores = f"{valid}{when}", f"{test} {test.score_name}"
            rows.append((f"`{run['command']}`", run["corpus"], *counts, *scores, f"`{run['commit']}`"))
        columns = ("command", "data", "parameters:", "epochs:", "minutes:", "valid:", "test:", "commit")
        return _text(
            [
                "## Short runs of other recipes",
                "",
                f"Finetuning, bytes and other cores, at sizes that take minutes on a busy machine: {one['machine']}, "
                f"{threads(one)}, {one['precision']}, torch {one['torch']}, one seed. They show that a recipe trains, "
                "not how well; finetuning starts long before SGD has converged, so it need not beat another epoch of "
                "SGD. Minutes are wall time, not a measure of speed.",
                "",
                *table(columns, rows),
            ]
        )


def tagging(folder: Path) -> str:
    """Part-of-speech tagging with dense and sparse embeddings, from results/pos_table."""
    runs = records.read_tagging(folder)
    with refusing(folder):
        one, rows = runs[0][1], []
        for label, m in runs:
            percents = (f"{100 * score_of(m[split]).value:.2f} %" for split in ("valid", "test"))
            rows.append((label, f"{m['params']:,}", minutes(m["seconds"]), *percents, f"`{m['commit']}`"))
        return _text(
            [
                "## Part-of-speech tagging",
                "",
                f"`bash scripts/pos_table.sh` on {TAGGED[one['data']]}: {one['train']['tokens']:,} training tokens, "
                f"{one['test']['tokens']:,} test tokens, {one['epochs']} epochs. The paper used another text, so "
                f"its scores are not comparable. {one['machine']}, {threads(one)}, torch {one['torch']}, one seed "
                f"({one['seed']}); minutes are wall time, not a measure of speed.",
                "",
                *table(["model", "parameters:", "minutes:", "valid accuracy:", "test accuracy:", "commit"], rows),
            ]
        )


def precisions(folder: Path) -> str:
    """Runs that differ in precision and seed only, from results/precision."""
    runs = records.read_precisions(folder)
    with refusing(folder):
        one, title = runs[0], score_of(runs[0]["test"]).title
        command = without(one["command"], "precision", "seed", "out", "metrics")
        rows = (
            (run["precision"], run["seed"], f"{run['seconds'] / 60:.1f}", score_of(run["valid"]), score_of(run["test"]))
            for run in runs
        )
        return _text(
            [
                f"## Single precision and bfloat16, {one['task']}, preset `{one['preset']}`, {one['epochs']} epochs",
                "",
                f"`{command} --precision … --seed …`: `bash scripts/precision.sh`. {one['params']:,} parameters, "
                f"{one['machine']}, torch {one['torch']}, commit `{one['commit']}`, {one['corpus']}. "
                "Minutes are wall time, not a measure of speed.",
                "",
                *table(["precision", "seed:", "minutes:", f"valid {title}:", f"test {title}:"], rows),
            ]
        )


def long_memory(root: Path) -> str:
    """Copy task and adding problem, from results/long_memory; empty without runs."""
    problems = records.read_long_memory(root)
    if not problems:
        return ""
    with refusing(root / "results" / "long_memory"):
        first, rows = next(iter(problems.values()))[0][1].metrics, []
        for problem, runs in problems.items():
            for network, run in runs:
                m = run.metrics
                seen = "all" if m["receptive_field"] is None else f"{m['receptive_field']:,}"
                score = f"{score_of(m['test'])}" if problem == "copy" else ""
                rows.append(
                    (
                        problem, f"{m['length']:,}", network, f"{m['params']:,}", seen, m["epochs"],
                        minutes(m["seconds"]), f"{m['test']['loss']:.1e}", score, f"{m['chance']:.1e}",
                        f"`{m['commit']}`",
                    )
                )  # fmt: skip
        columns = (
            "problem", "T:", "network", "parameters:", "receptive field:", "epochs:", "minutes:", "test loss:",
            "digits correct:", "chance loss:", "commit",
        )  # fmt: skip
        return _text(
            [
                "## Copy task and adding problem",
                "",
                "The memory tests of "
                "[Bai, Kolter & Koltun (2018)](https://arxiv.org/abs/1803.01271): `bash scripts/memory.sh`. "
                f"{first['machine']}, {threads(first)}, torch {first['torch']}, seed {first['seed']}. "
                "The loss is the cross-entropy in nats per step for copying, and the mean squared error for "
                "adding. A network that sees too little cannot solve them "
                "([curves](results/figures/long_memory.svg)); one that sees everything need not learn to solve them in "
                "so few updates.",
                "",
                *table(columns, rows),
            ]
        )


def growth(folder: Path) -> str:
    """Growing against fixed depth, and random depth against one network for each, from results/growth."""
    runs = records.read_growth(folder)
    with refusing(folder):
        equal, every, one = [], [], next(iter(runs.values()))[0]
        commits = _commits(m for found in runs.values() for m in found)
        for text, (outside, layer, plans) in GROWTH.items():
            for plan, epochs in plans.items():
                if found := runs.get(f"{text}_{plan}"):
                    cost = sum(n * (outside + layers * layer) for layers, n in epochs.items()) / 1e6
                    stages = ", ".join(f"{counted(n, 'epochs')} of {layers} layers" for layers, n in epochs.items())
                    stages += ", in windows of 8 tokens" * (plan == "windows")
                    seconds = sum(m["seconds"] for m in found) / len(found)
                    scores = (_mean([score_of(m[split]) for m in found]) for split in ("valid", "test"))
                    equal.append((text, stages, f"{cost:.2f}M", len(found), *scores, minutes(seconds)))
            for layers in (2, 4, 6, 8):
                alone = runs.get(f"{text}_fixed" if layers == 8 else f"{text}_depth_{layers}", [])
                for m in runs.get(f"{text}_random", []):
                    ours = score_of(m["test" if layers == 8 else f"test_depth_{layers}"])
                    for other in (score_of(o["test"]) for o in alone if o["seed"] == m["seed"]):
                        every.append((text, layers, m["seed"], other, ours, f"{ours.value / other.value - 1:+.1%}"))
        lines = [
            "## Growing and random depth",
            "",
            f"`bash scripts/depth.sh`, which has the commands: small networks on {one['machine']}, {one['precision']}, "
            f"torch {one['torch']}, {commits}, {one['corpus']}; "
            "perplexity for words, bits per symbol for characters.",
        ]
        if equal:
            columns = "text|plan|multiply-adds per token of the text:|seeds:|valid:|test:|minutes:"
            head = (
                "Plans of equal cost, the softmax included, in windows of 30 words or 80 characters unless stated "
                "otherwise; minutes are wall time, not a measure of speed:"
            )
            lines += ["", head, "", *table(columns.split("|"), equal)]
        if every:
            columns = "text|layers:|seed:|test, trained for this depth:|test, random depth:|difference:"
            lines += [
                "",
                "One network of random depth, 2 to 8 layers, against one network per depth, with equally many updates:",
            ]
            lines += ["", *table(columns.split("|"), every)]
        return _text(lines)


def _commits(runs: Iterable[records.Record]) -> str:
    commits = dict.fromkeys(f"`{m['commit']}`" for m in runs)
    return f"commit{'s' * (len(commits) > 1)} {', '.join(commits)}"


def _mean(scores: Sequence[Score]) -> str:
    values = [score.value for score in scores]
    spread = f" ± {statistics.stdev(values):.{scores[0].digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{scores[0].digits}f}{spread}"


def equilibrium(folder: Path) -> str:
    """Training and scoring at the equilibrium against 16 layers, from results/equilibrium."""
    found = records.read_equilibrium(folder.parent.parent)
    with refusing(folder):
        one, rows, ways = found.scores["equilibrium"], [], []
        name = score_of(one["test"]).score_name
        commits = _commits([*found.scores.values(), *found.memories.values()])
        for label, pair in WEIGHTS.items():
            for way, row in zip(("16 layers", "equilibrium"), pair, strict=True):
                m = found.scores[row]
                rows.append((label, way, score_of(m["valid"]), score_of(m["test"]), *_solved(m["test"])))
        for way, epoch in found.epochs.items():
            updates = [f"{epoch['step']:,}", f"{epoch['train_score']:.2f}", *_solved(epoch, "train_")]
            ways.append((way, *updates, f"{statistics.median(found.seconds[way]):.3f}", _gb(found.memories[way])))
        training = f"|updates:|train {name}:|{_SOLVED}|seconds per update:|memory:"
        recomputed = ("unrolled, `--recompute`", *[""] * 6, _gb(found.memories["recompute"]))
        printed = [(e.label, e.unrolled, e.solved, e.peak, e.peak_solved, e.ratio) for e in EQUILIBRIA]
        columns = "model|test ppl, unrolled:|at the equilibrium:|memory, unrolled:|at the equilibrium:|time ratio:"
        return _text(
            [
                f"## At the equilibrium, {one['task']}",
                "",
                "`bash scripts/equilibrium.sh`: `word_ptb_small`, trained with 8 layers, continues with 16 layers or "
                f"at the equilibrium, for {found.epochs['equilibrium']['step']:,} updates each. {one['params']:,} "
                f"parameters, {one['machine']}, {threads(one)}, {one['precision']}, torch {one['torch']}, {commits}, "
                f"{one['corpus']}, one seed ({one['seed']}). *Residual* is the largest in a "
                "window, *evaluations* the number of layer evaluations per time step, both averaged over windows; "
                "*unsolved* is the share of windows with a residual above the tolerance.",
                "",
                *table(f"trained with|scored with|valid {name}:|test {name}:|{_SOLVED}".split("|"), rows),
                "",
                f"Training. Seconds per update are medians of {len(found.seconds['equilibrium'])} alternating runs "
                "without other load; memory is the peak of a process that trains the paper's model of 55 layers and "
                "writes its checkpoint:",
                "",
                *table(training.split("|"), [*ways, recomputed]),
                "",
                "Published numbers and ours:",
                "",
                *table(columns.split("|"), [*printed, _ours(found)]),
            ]
        )


_SOLVED = "residual:|evaluations:|unsolved:"


def _solved(record: records.Record, prefix: str = "") -> list[str]:
    """Cells of `_SOLVED`; empty ones without an equilibrium."""
    if f"{prefix}residual" not in record:
        return [""] * 3
    residual, evaluations, unsolved = (record[f"{prefix}{key}"] for key in records.SOLVED)
    return [f"{residual:.1e}", f"{evaluations:.1f}", f"{unsolved:.2%}"]


def _gb(metrics: records.Record) -> str:
    return f"{metrics['peak_memory'] / 1e9:.2f} GB"


def _ours(found: records.Equilibrium) -> tuple[str, ...]:
    """Our row beside :data:`EQUILIBRIA`."""
    seconds, memories, one = found.seconds, found.memories, found.scores["equilibrium"]
    unrolled, solved = (str(score_of(found.scores[way]["test"])) for way in ("unrolled", "equilibrium"))
    ratio = statistics.median(seconds["equilibrium"]) / statistics.median(seconds["unrolled"])
    recomputed = f"{_gb(memories['unrolled'])}, with `--recompute` {_gb(memories['recompute'])}"
    label = f"here: {one['corpus']}, {one['params'] / 1e6:.1f}M, memory of {memories['unrolled']['params'] / 1e6:.0f}M"
    return label, unrolled, solved, recomputed, _gb(memories["equilibrium"]), f"{ratio:.2f}, against 16 layers"


def depths(root: Path) -> str:
    """Trained models scored with other numbers of layers, from results/depth and results/exit; empty without them."""
    scored = sorted((root / "results" / "depth").glob("*.json"), key=place)
    if not scored:
        return ""
    rows, commands = [], []
    for path in scored:
        metrics, pairs = records.read_depths(path)
        with refusing(path):
            commands.append((path.stem, metrics))
            own, best = metrics["nlevels"], min(pairs, key=_rank)
            for valid, test in pairs:
                layers = test["nlevels"]
                marks = ["as trained"] * (layers == own) + ["chosen"] * (valid is best[0])
                rows.append(
                    (
                        f"`{path.stem}`", layers, f"{test['receptive_field']:,}", score_of(valid), score_of(test),
                        score_of(test).title, f"{test[score_of(test).count]:,}" + " (partial)" * ("partial" in test),
                        ", ".join(marks),
                    )
                )  # fmt: skip
    lines = [
        "## Depth of scoring",
        "",
        "Shipped models, scored with the same weights but more or fewer layers than in training: `--run "
        "results/NAME --eval --eval_depths …`. The depth that `--eval_nlevels auto` takes, the best one on the "
        "validation data, is marked *chosen*. A [picture](results/figures/depth.svg) of the language models: `python "
        "scripts/plot.py depth results/depth/*_ptb_*.json --out results/figures/depth.svg`.",
        "",
        *table(["model", "layers:", "receptive field:", "valid:", "test:", "score", "test units scored:", ""], rows),
        "",
        *(f"- `{name}`: `{m['command']}`; {m['machine']}, {m['precision']}, torch {m['torch']}, commit `{m['commit']}`"
          for name, m in commands),
    ]  # fmt: skip
    for path in sorted((root / "results" / "exit").glob("*.json"), key=place):
        lines += ["", *_exits(path)]
    return _text(lines)


def _rank(pair: tuple[records.Record, records.Record]) -> tuple[float, float]:
    """Sorting key by the validation result, as `--eval_nlevels auto` chooses: of equal accuracies the loss decides."""
    score = score_of(pair[0])
    return -score.value if score.score_name == "accuracy" else score.value, pair[0]["loss"]


def _exits(path: Path) -> list[str]:
    metrics, results = records.read_exits(path)
    with refusing(path):
        full, name, rows = results[0], score_of(results[0]).title, []
        for r in results:
            saved = "" if r is full else f"{1 - r['seconds'] / full['seconds']:.0%}"
            shown = f"{r['tolerance']:g}" if r["tolerance"] else "all layers"
            rows.append((shown, f"{r['layers']:.1f}", score_of(r), f"{r['seconds'] / 60:.1f}", saved))
        return [
            f"**Early exit**, `{path.stem}` with {full['layers']:.0f} layers, read as streams: `{metrics['command']}` "
            f"on {metrics['machine']}, {threads(metrics)}, {metrics['precision']}, torch {metrics['torch']}, commit "
            f"`{metrics['commit']}`; {full['tokens']:,} test tokens. Layers are averages.",
            "",
            *table(["tolerance:", "layers:", f"test {name}:", "minutes:", "time saved:"], rows),
        ]


def adapted(path: Path) -> str:
    """Ways of scoring one run with a cache and dynamic evaluation, and their cost."""
    metrics, ways = records.read_adapted(path)
    with refusing(path):
        name, rows = score_of(metrics["test_static"]).score_name, []
        for way, (valid, test) in ways.items():
            peak = f"{test['peak_memory'] / 1e9:.2f} GB" if test["peak_memory"] else ""
            prepared = f"{valid['preparation_seconds'] / 60:.1f} min" if "preparation_seconds" in valid else ""
            settings = test.get("settings", {}).items()
            listed = ", ".join(f"{key} {v if isinstance(v, str) else format(v, 'g')}" for key, v in settings)
            cost = f"{test['seconds'] / 60:.1f}", peak, prepared
            rows.append((ADAPTED[way], score_of(valid), score_of(test), *cost, listed))
        return _text(
            [
                f"## Cache and dynamic evaluation, `{path.stem}`",
                "",
                f"`{metrics['command']}` on {metrics['machine']}, {threads(metrics)}, {metrics['device']}, "
                f"{metrics['precision']}, torch {metrics['torch']}, commit `{metrics['commit']}`, {metrics['corpus']}; "
                f"{metrics['params']:,} parameters, seed {metrics['seed']}; {metrics['test_static']['tokens']:,} test "
                "tokens. Minutes and the peak memory of the process are those of scoring the test data, after "
                "preparation and tuning on training and validation data.",
                "",
                *table(["", f"valid {name}:", f"test {name}:", "minutes:", "peak:", "prepared in:", "settings"], rows),
            ]
        )


def faults(path: Path) -> str:
    """Faults that runs and files have survived, from the record of scripts/torture.py."""
    found = records.read_measurement(path)
    with refusing(path):
        kills, disk, hostile, soak = *(found[part] for part in ("kills", "disk", "payloads")), found.get("soak")
        moments = {key.removeprefix("killed "): n for key, n in kills.items() if key.startswith("killed in ")}
        listed = ", ".join(f"{count} {moment}" for moment, count in moments.items())
        lines = [
            f"## Faults, seed {found['seed']}",
            "",
            f"`{found['command']}` on {found['machine']}, torch {found['torch']}, commit `{found['commit']}`, seed "
            f"{found['seed']}. Every disturbed run ended, to the bit, with the weights, the optimiser state and the "
            "random numbers of an undisturbed one.",
            "",
            f"- Kills survived: {sum(moments.values())} ({listed}) in {kills['runs']} run(s) of {kills['epochs']} "
            f"epochs; and {kills['terminated']} times SIGTERM, after which the run ended with a checkpoint within "
            f"{kills['seconds to terminate']:g} s",
            f"- Writes that failed: {disk['no room']} for lack of space, {disk['too large']} for a limit on file size; "
            f"read-only folders: {disk['read-only']}",
            f"- Second processes refused: {found['locks']['refused']}; runs with jumping clocks: "
            f"{found['clocks']['runs']}",
            f"- Hostile files: {hostile['files']}, opened {hostile['opened']} times; {hostile['executed']} ran code, "
            f"and memory grew by {hostile['bytes'] / 1e6:.0f} MB at most",
        ]
        if soak:
            start, end = (soak[f"resident at the {when}"] / 1e6 for when in ("start", "end"))
            lines.append(
                f"- Memory: in {soak['minutes']:g} minutes of training ({soak['steps']:,} updates, {soak['epochs']:,} "
                f"epochs, each evaluated and saved) from {start:.1f} to {end:.1f} MB"
            )
        rows = (
            (r["target"] + ("" if r["summed"] else ", which has no checksums"),
             *(f"{r[key]:,}" for key in ("tried", "detected", "harmless", "unnoticed")))
            for r in found["mutations"]
        )  # fmt: skip
        columns = ["corrupted at random", "tried:", "detected:", "harmless:", "undetected:"]
        return _text([*lines, "", *table(columns, rows)])


def ranks(path: Path) -> str:
    """Differences of several ranks from one process, from the record of scripts/compare_ranks.py."""
    found = records.read_measurement(path)
    with refusing(path):
        worst: dict[tuple[str, int], dict[str, float]] = {}
        for r in found["records"]:
            largest = max(r[kind] for kind in ("losses", "gradients", "weights", "scores"))
            worst.setdefault((r["task"], r["ranks"]), {})[r["dtype"]] = largest
        rows = [(*key, *(f"{kinds[dtype]:.1e}" for dtype in ("float32", "float64"))) for key, kinds in worst.items()]
        return _text(
            [
                "## Several ranks",
                "",
                f"`{found['command']}` on {found['machine']}, torch {found['torch']}, commit `{found['commit']}`: tiny "
                f"networks without dropout, {found['steps']} updates. The largest difference from one process in "
                "losses, gradients, weights and scores, relative to the largest entry.",
                "",
                *table(["task", "ranks:", "float32:", "float64:"], rows),
            ]
        )


def _text(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)
