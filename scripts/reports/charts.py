"""Data of the pictures: learning curves, tables of scores, losses by context length. pictures.py draws them."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scripts.reports import records
from scripts.reports.records import ADAPTED, SCORES, Record, finished_epochs, read_events, read_json, refusing, score_of
from scripts.reports.tables import COMPARED, TABLES
from trellisnet.errors import UserError


class Curve(NamedTuple):
    """Scores of a run by epoch, NaN where they were not finite; `valid` is empty without validation data."""

    label: str
    score: str  # ppl, bpc, accuracy or mse
    epochs: list[int]
    minutes: list[float]
    train: list[float]
    valid: list[float]


class Scores(NamedTuple):
    """A row of a chart: the paper's score, and those of our runs."""

    label: str
    paper: float | None
    ours: list[float]


class Chart(NamedTuple):
    """Scores that are comparable with each other."""

    name: str
    title: str
    axis: str
    rows: list[Scores]


def score_name(loss: float, score: float) -> str:
    """Name of a score, inferred from the loss that it was computed from."""
    if score == loss:  # a squared error is its own score
        return "mse"
    if loss < 700 and math.isclose(score, math.exp(loss), rel_tol=1e-6):
        return "ppl"
    return "bpc" if math.isclose(score, loss / math.log(2), rel_tol=1e-6) else "accuracy"


def read_curve(path: Path, label: str) -> Curve:
    """The learning curve of a run, from its folder or its metrics.jsonl.

    Raises:
        UserError: no such file, a corrupt one, or no finished epoch.
    """
    file = path / "metrics.jsonl" if path.is_dir() else path
    if not file.exists():
        raise UserError(f"{file}: no such file; name the folder of a run")
    events = read_events(file)
    with refusing(file):
        epochs = finished_epochs(events)
        if not epochs:
            raise UserError(f"{file}: no epoch is finished yet")
        split = "train" if epochs[0]["valid_score"] is None else "valid"
        scored = [e for e in epochs if e[f"{split}_score"] is not None]
        if not scored:
            raise UserError(f"{file}: no epoch has a finite score")
        train, valid = (
            [math.nan if e[key] is None else e[key] for e in epochs] for key in ("train_score", "valid_score")
        )
        return Curve(
            label,
            score_name(scored[0][f"{split}_loss"], scored[0][f"{split}_score"]),
            [e["epoch"] for e in epochs],
            [e["seconds"] / 60 for e in epochs],
            train,
            [] if split == "train" else valid,
        )


def labels(paths: Sequence[Path]) -> list[str]:
    """Short names that tell folders apart: as few of their last parts as that takes."""
    parts = [path.absolute().parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-count:]) for p in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names


def ablations(folder: Path) -> Chart:
    """Rows of Table 6 after equally many updates."""
    runs = records.read_ablations(folder)
    metrics = runs[0][1]
    title = f"Rows of Table 6, preset {metrics['preset']}, {metrics['steps']:,} updates each"
    rows = [Scores(row.label, None, [score_of(run["test"]).value]) for row, run in runs]
    return Chart(folder.name, title, _axis(metrics["test"]), rows)


def precisions(folder: Path) -> Chart:
    """Test scores by precision."""
    runs, scores = records.read_precisions(folder), {}
    for run in reversed(runs):
        scores.setdefault(run["precision"], []).append(score_of(run["test"]).value)
    rows = [Scores(kind, None, scores[kind]) for kind in sorted(scores, reverse=True)]
    return Chart("precision", f"{runs[0]['task']}, preset {runs[0]['preset']}", _axis(runs[0]["test"]), rows)


def equal_time(folder: Path) -> Chart:
    """Test scores of different networks after about the same time."""
    minutes, runs = records.read_equal_time(folder)
    rows = [Scores(label, None, [score_of(run.metrics["test"]).value]) for label, run in runs]
    title = f"Word-level PTB, about {minutes} minutes of training each"
    return Chart(folder.name, title, _axis(runs[0][1].metrics["test"]), rows)


def adapted(path: Path) -> Chart:
    """Test scores with a cache and dynamic evaluation."""
    metrics, ways = records.read_adapted(path)
    rows = [Scores(ADAPTED[way], None, [score_of(test).value]) for way, (_, test) in ways.items()]
    title = f"Cache and dynamic evaluation, {path.stem}"  # the model's name, as several models may share a preset
    return Chart(f"adapted_{path.stem}", title, _axis(metrics["test_static"]), rows)


def _axis(result: dict[str, Any]) -> str:
    return f"test {SCORES[score_of(result).score_name][0]}"


def _trained(root: Path) -> Iterator[Chart]:
    """Tables of the papers, and comparisons at equal time, from runs/tables."""
    runs = root / "runs" / "tables"

    def ours(folder: Path, recited: bool = False) -> list[float]:
        found = records.read_row(folder, recited)
        return found.values if found else []

    for title, score, script, rows in TABLES.values():
        scored, recited = [], []  # these have another score
        for row in rows:
            scores = Scores(row.label, row.paper, ours(runs / script / row.name, row.recited))
            (recited if row.recited else scored).append(scores)
        yield Chart(script, title, score, scored)
        yield Chart(f"{script}_recite", "Learning to recite", "training accuracy in percent", recited)
    for folder in sorted(runs.glob("compare-*-minutes")):
        rows = [Scores(label, None, ours(folder / name)) for name, label in COMPARED.items()]
        title = f"Word-level PTB, {folder.name.split('-')[1]} minutes of training each"
        yield Chart(folder.name, title, "test perplexity", rows)


def read_charts(root: Path) -> list[Chart]:
    """All scores in results/ and runs/tables/.

    Raises:
        UserError: a corrupt file, or runs that must not be quoted.
    """
    results = root / "results"
    folders = [(path, ablations) for path in sorted(results.glob("table6_*")) if any(path.glob("*.json"))]
    folders += [(path, precisions) for path in results.glob("precision") if any(path.glob("*.json"))]
    folders += [(path, equal_time) for path in sorted(results.glob("compare_*_minutes"))]
    charts = [read(path) for path, read in folders if not records.is_result(path)]
    charts += map(adapted, sorted(results.glob("adapted/*.json")))
    return charts + [chart for chart in _trained(root) if any(row.ours for row in chart.rows)]


def read_depths(paths: Sequence[Path]) -> list[tuple[str, list[tuple[Record, Record]]]]:
    """Read metrics of `--eval_depths`, each with a name: validation and test result of every depth, in order."""
    names = [path.stem for path in paths]
    names = names if len(set(names)) == len(names) else labels(paths)
    return [(name, records.read_depths(path)[1]) for name, path in zip(names, paths, strict=True)]


def read_contexts(paths: Sequence[Path]) -> list[tuple[str, dict[str, Any]]]:
    """Read the files of scripts/context.py, each with a name.

    Raises:
        UserError: another file, or losses per word beside losses per character.
    """
    found = list(map(read_json, paths))
    for path, content in zip(paths, found, strict=True):
        with refusing(path):
            [content[key] for key in ("task", "name", "token", "receptive_field", "corpus", "split")]
            numbers = [float(r[key]) for r in content["records"] for key in ("context", "loss", "error")]
            if not numbers or not all(map(math.isfinite, [*numbers, content["targets"]])):
                raise ValueError("a number is missing")
    if len({content["token"] for content in found}) > 1:
        raise UserError("losses per word and per character do not belong on one axis; plot them one by one")
    names = [f"{content['task']} {content['name']}" for content in found]
    if len(set(names)) < len(names):
        names = labels(paths)
    return list(zip(names, found, strict=True))
