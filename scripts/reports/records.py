"""Records of runs and measurements: read only here, with all checks that make them quotable.

A result is a folder results/<name>/ with the files of one complete run on real data: metrics.json (written by
`--metrics`), metrics.jsonl and log.txt (from the run folder; the log is for people, no program reads it).

Every reader raises UserError, which names the file: it is unreadable, corrupt or of another kind; the run was on
synthetic data, unfinished, or made by code that was not committed; or runs that are to be compared differ otherwise.
"""

import contextlib
import dataclasses
import itertools
import json
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from scripts.reports.tables import COMPARED, GROWTH, MEMORY, PUBLISHED, RECIPE, TABLES, TAGGED, WEIGHTS, Row
from trellisnet.data import wikipedia
from trellisnet.errors import NAME, UserError, shown
from trellisnet.serialization import SAFETENSORS, read_regular
from trellisnet.training.runlog import read_records

Record = Mapping[str, Any]
# Key of a score in a result → its name and decimals; key of a count → its abbreviation.
SCORES = {
    "ppl": ("perplexity", 2), "bpc": ("bits per character", 4), "accuracy": ("accuracy", 4),
    "mse": ("mean squared error", 6),
}  # fmt: skip
UNITS = {"tokens": "tok", "examples": "seq"}
# Ways of scoring with --cache and --dynamic_eval: part of a key of the metrics → name.
ADAPTED = {
    "static": "static", "static_segments": "static, in the segments of dynamic evaluation", "cache": "+ cache",
    "dynamic": "+ dynamic evaluation", "dynamic_cache": "+ dynamic evaluation + cache",
}  # fmt: skip
SOLVED = ("residual", "evaluations", "unsolved")  # keys of a result at the equilibrium
RATES = ("evaluation", "generation")  # parts of a benchmark that are measured in tokens per second


# -- files -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Turn any error that a corrupt record raises into a UserError that names the file."""
    try:
        yield
    except UserError:
        raise
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror or e})") from e
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, ArithmeticError, RecursionError) as e:
        reason = f"it has no {e}" if isinstance(e, KeyError) else e
        raise UserError(f"{path}: corrupt or of another kind ({reason})") from e


def read_json(path: Path) -> Any:
    """Content of a JSON file; texts with control characters, which could not be printed, are refused."""
    with refusing(path):
        return _printable(json.loads(read_regular(path)))


def read_events(path: Path) -> list[dict[str, Any]]:
    """:func:`read_json` of every line of a metrics.jsonl."""
    with refusing(path):
        return _printable(read_records(path))


def _printable(content: Any) -> Any:
    if isinstance(content, str) and not content.isprintable():
        raise ValueError(f"a text with control characters: {shown(content, NAME)}")
    parts = (*content, *content.values()) if isinstance(content, dict) else content
    for part in parts if isinstance(content, dict | list) else ():
        _printable(part)
    return content


# -- commands ----------------------------------------------------------------------------------------------------------


def options(command: str) -> list[tuple[str, ...]]:
    """Words of a recorded command: those of the program, then each flag with its values."""
    groups: list[list[str]] = [[]]
    for word in shlex.split(command):
        if word.startswith("--"):
            groups.append([])
        groups[-1].append(word)
    return list(map(tuple, groups))


def without(command: str, *flags: str) -> str:
    """A command without certain flags and their values."""
    kept = [words for words in options(command) if words[0].partition("=")[0].removeprefix("--") not in flags]
    return shlex.join(word for words in kept for word in words)


# -- checks ------------------------------------------------------------------------------------------------------------


def check_committed(path: Path, record: Record) -> None:
    if not record["commit"] or record["commit"].endswith("-dirty"):
        raise UserError(f"{path}: the code was not committed")


def check_portable(path: Path, command: str) -> None:
    if any(part.startswith("/") for word in shlex.split(command) for part in word.split("=")):
        raise UserError(f"{path}: the command names a path of one machine: {command}")


def check_alike(folder: Path, runs: Iterable[Record], keys: str) -> None:
    """Refuse runs that differ in anything but what they compare."""
    first, *others = runs
    for key in keys.split():
        if any(other[key] != first[key] for other in others):
            raise UserError(f"{folder}: the runs differ in {key}; keep those of one kind")


# -- single runs and measurements --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """A score, with what the functions of :mod:`trellisnet.training.reporting` read from a task."""

    score_name: str
    value: float
    digits: int
    count: str

    @property
    def title(self) -> str:
        return SCORES[self.score_name][0]

    @property
    def unit(self) -> str:
        return UNITS[self.count]

    def scores(self, result: Record, split: str) -> list[str]:
        return [key for key in result if key.partition("_")[0] in SCORES]

    def is_better(self, other: "Score") -> bool:
        return self.value > other.value if self.score_name == "accuracy" else self.value < other.value

    def __str__(self) -> str:
        return f"{self.value:.{self.digits}f}"


def score_of(result: Record) -> Score:
    """The score of a split: the first one in its result, since a run that recites also has a perplexity."""
    for name in result:
        if name in SCORES:
            digits, count = SCORES[name][1], "examples" if "examples" in result else "tokens"
            return Score(name, float(result[name]), digits, count)
    raise KeyError("score")


def comparable(result: Record) -> Score:
    """:func:`score_of`; of characters, on the authors' stream, as the paper's score."""
    score = score_of(result)
    return dataclasses.replace(score, value=float(result.get(f"{score.score_name}_authors", score.value)))


def read_metrics(path: Path, *, complete: bool = True) -> dict[str, Any]:
    """A metrics file; with `complete` that of a finished run."""
    metrics = read_json(path)
    with refusing(path):
        if metrics["corpus"] == "synthetic":
            raise UserError(f"{path}: a run on synthetic data is no result")
        check_committed(path, metrics)
        if complete and not metrics["complete"]:
            raise UserError(f"{path}: not a complete run")
        if any("init_tail" in result for result in metrics.values() if isinstance(result, dict)):
            raise UserError(f"{path}: its scores are those of tail vectors that were not trained")
    return metrics


def read_measurement(path: Path) -> dict[str, Any]:
    """A file that a script has written with --json; its command without that flag."""
    record = read_json(path)
    with refusing(path):
        check_committed(path, record)
        return record | {"command": without(record["command"], "json")}


def finished_epochs(events: Iterable[Record]) -> list[Record]:
    """Records of finished epochs; of an epoch logged twice because of a kill, the later one."""
    return list({r["epoch"]: r for r in events if r["event"] == "epoch" and r["finished"]}.values())


class Run(NamedTuple):
    """A complete run."""

    folder: Path
    metrics: Record
    epochs: list[Record]
    evaluations: dict[str, Record]  # by split, in the order they were printed


def started_from(record: Record) -> str:
    """Return the folder of the weights that a run started from, or nothing; the flag takes a file or a folder."""
    weights = Path(record["load_weight"])
    if not weights.name:
        return ""
    return str(weights.parent if weights.suffix in (".pkl", SAFETENSORS) else weights)


def read_run(folder: Path, *ignored: str) -> Run:
    """A result; its command without the `ignored` flags must work on every machine."""
    metrics, events = read_metrics(folder / "metrics.json"), read_events(folder / "metrics.jsonl")
    if not (folder / "log.txt").is_file():
        raise UserError(f"{folder}: has no log.txt; copy it from the run's folder")
    with refusing(folder):
        if "load_weight" not in metrics:
            raise UserError(
                f"{folder}: recorded by version {metrics['version']}, which left fields out; train it again"
            )
        epochs = finished_epochs(events)
        if [r["epoch"] for r in epochs] != list(range(1, metrics["epochs"] + 1)):
            raise UserError(f"{folder}: not a complete run: metrics.jsonl does not have its {metrics['epochs']} epochs")
        command = without(metrics["command"], *ignored)
        check_portable(folder, command)
        last = [r for r in events if r["event"] == "result"][-1:]
        evaluations = {name: result for r in last for name, result in r.items() if isinstance(result, dict)}
        score_of(metrics["test"])
        if any(r[split] != metrics[split] for r in last for split in ("valid", "test")):
            raise UserError(f"{folder}: metrics.json and metrics.jsonl are of different runs; copy those of one")
        if metrics["corpus"] in wikipedia.DATASETS:
            raise UserError(f"{folder}: the paper has no score on {metrics['corpus']}; use a folder for short runs")
        if metrics["task"] == "cifar10" and metrics["permute"]:
            raise UserError(f"{folder}: the paper has no score on permuted CIFAR-10; use a folder for short runs")
    return Run(folder, metrics | {"command": command}, epochs, evaluations)


def read_shipped(root: Path) -> dict[str, tuple[Record, Record]]:
    """weights.json and metrics.json of the results that have both, by name, in the order of the paper."""
    found = {}
    for path in sorted((root / "results").glob("*/weights.json"), key=place):
        weights, metrics = read_json(path), path.with_name("metrics.json")
        if metrics.is_file():
            check_committed(path, weights)
            run = read_metrics(metrics)
            with refusing(path):
                before = weights.get("before_rounding") or run
                same = all(weights[key] == run[key] for key in ("task", "params", "data"))
                if not same or any(before[split] != run[split] for split in ("valid", "test")):
                    raise UserError(f"{path}: of another run than metrics.json beside it; export the run again")
            found[path.parent.name] = weights, run
    return found


def is_result(folder: Path) -> bool:
    """Return whether a folder holds the files of one run; its name is not read."""
    return any((folder / name).is_file() for name in ("metrics.json", "metrics.jsonl", "config.json"))


def place(path: Path) -> tuple[int, str]:
    """Sorting key of a metrics file: its task in the order of the paper, then its path; unreadable files come last."""
    with contextlib.suppress(UserError, TypeError, KeyError, ValueError):
        return list(PUBLISHED).index(read_json(path)["task"]), str(path)
    return len(PUBLISHED), str(path)


# -- runs that are compared --------------------------------------------------------------------------------------------


class Finished(NamedTuple):
    """The finished runs of a row of a table; accuracies are in percent."""

    score_name: str
    values: list[float]
    params: int
    epochs: list[int]
    augmented: bool
    minutes: list[float]


def read_row(folder: Path, recited: bool = False) -> Finished | None:
    """The finished runs in runs/tables/<table>/<row>, or None; with `recited` their score is the training accuracy."""
    runs, scores = [], []
    for path in sorted(folder.glob("seed-*/metrics.json")):
        metrics = read_json(path)
        with refusing(path):
            if metrics["corpus"] == "synthetic" or not metrics["complete"]:
                continue
            check_committed(path, metrics)
            result = metrics["test"]
            if recited:
                epochs = [r for r in read_events(path.with_name("metrics.jsonl")) if r["event"] == "epoch"]
                result = {"accuracy": epochs[-1]["train_score"]}
            scores.append(score_of(result))
            runs.append({"augment": False, **metrics})
    if not runs:
        return None
    with refusing(folder):
        check_alike(folder, runs, "params augment data")
        name, one = scores[0].score_name, runs[0]
        if not one["preset"].endswith("finetune"):  # which ends on a plateau, in another epoch for every seed
            check_alike(folder, runs, "epochs")
        values = [100 * score.value if name == "accuracy" else score.value for score in scores]
        minutes = [run["seconds"] / 60 for run in runs if "seconds" in run]
    return Finished(name, values, one["params"], [run["epochs"] for run in runs], one["augment"], minutes)


def read_ablations(folder: Path) -> list[tuple[Row, Record]]:
    """Rows of Table 6 after equally many updates, the whole network first, from results/table6_<preset>/<row>.json."""
    kind, _, preset = folder.name.partition("_")
    if kind != "table6" or not preset:
        raise UserError(f"{folder}: expected a name such as table6_small")
    rows, runs = TABLES["6"].rows, {}
    for path in sorted(folder.glob("*.json")):
        runs[path.stem] = metrics = read_metrics(path, complete=False)
        with refusing(path):
            if metrics["test"].get("partial"):
                raise UserError(f"{path}: its scores are partial")
            if metrics["preset"] != preset:
                raise UserError(f"{path}: of another preset than {preset}")
            if path.stem not in {row.name for row in rows}:
                raise UserError(f"{path}: no row of Table 6")
            metrics["tokens"] = metrics["valid"]["tokens"], metrics["test"]["tokens"]
    if rows[0].name not in runs:
        raise UserError(f"{folder}: expected {rows[0].name} among the rows")
    with refusing(folder):
        check_alike(folder, runs.values(), "task preset steps seed data commit machine torch corpus tokens")
    return [(row, runs[row.name]) for row in rows if row.name in runs]


def read_precisions(folder: Path) -> list[Record]:
    """Runs that differ in precision and seed only, from results/precision/<precision>-<seed>.json."""
    runs = [read_metrics(path) for path in sorted(folder.glob("*.json"))]
    if not runs:
        raise UserError(f"{folder}: has no runs")
    with refusing(folder):
        check_alike(folder, runs, "task preset epochs steps data commit machine torch corpus backend")
        return sorted(runs, key=lambda run: (run["precision"], run["seed"]), reverse=True)


def read_short_runs(folder: Path) -> list[Record]:
    """Runs of the other cores' recipes at a small size, from results/short_runs/<number>_<name>.json, in this order."""
    runs = []
    for path in sorted(folder.glob("*.json")):
        metrics = read_metrics(path)
        command = without(metrics["command"], "metrics", "threads", "overwrite", "no-download")
        check_portable(path, command)
        runs.append(metrics | {"command": command})
    if not runs:
        raise UserError(f"{folder}: has no runs")
    with refusing(folder):
        check_alike(folder, runs, "machine threads torch precision")
    return runs


def read_recipe(folder: Path) -> list[tuple[str, Record]]:
    """Rows of scripts/recipe.sh, labelled, from results/recipe/<row>.json."""
    runs = {path.stem: read_metrics(path) for path in sorted(folder.glob("*.json"))}
    if strange := sorted(runs.keys() - RECIPE.keys()):
        raise UserError(f"{folder}: {strange[0]} is no row of scripts/recipe.sh: {', '.join(RECIPE)}")
    if not runs:
        raise UserError(f"{folder}: has no runs")
    with refusing(folder):
        check_alike(folder, runs.values(), "task preset epochs steps seed data machine torch corpus precision permute")
        return [(label, runs[row]) for row, label in RECIPE.items() if row in runs]


def read_tagging(folder: Path) -> list[tuple[str, Record]]:
    """Rows of scripts/pos_table.sh, labelled, from results/pos_table/<row>.json."""
    labels = {row.name: row.label for row in TABLES["pos"].rows}
    runs = {path.stem: read_metrics(path) for path in sorted(folder.glob("*.json"))}
    if strange := sorted(runs.keys() - labels.keys()):
        raise UserError(f"{folder}: {strange[0]} is no row of scripts/pos_table.sh: {', '.join(labels)}")
    if not runs:
        raise UserError(f"{folder}: has no runs")
    with refusing(folder):
        for name, metrics in runs.items():
            if metrics["data"] not in TAGGED:
                raise UserError(f"{folder}: {name} is of a text that TAGGED in scripts/reports/tables.py does not name")
        check_alike(folder, runs.values(), "data epochs steps seed machine torch threads precision")
        return [(labels[row], runs[row]) for row in labels if row in runs]


def read_equal_time(folder: Path) -> tuple[str, list[tuple[str, Run]]]:
    """Minutes, and networks with their runs after about as many, from results/compare_<minutes>_minutes/<row>."""
    minutes = folder.name.removeprefix("compare_").removesuffix("_minutes")
    if folder.name != f"compare_{minutes}_minutes" or not minutes.isdigit():
        raise UserError(f"{folder}: expected a name such as compare_30_minutes")
    names = [name for name in COMPARED if (folder / name).is_dir()]
    if set(names) != {path.name for path in folder.iterdir()} or not names:
        raise UserError(f"{folder}: expected folders named {', '.join(COMPARED)}")
    runs = []
    for path in map(folder.joinpath, names):
        with refusing(path):
            words = shlex.split(read_metrics(path / "metrics.json")["command"])
            out = dict(itertools.pairwise(words))["--out"]
            if f"compare-{minutes}-minutes" not in Path(out).parts:
                raise UserError(f"{path}: was planned for another time (--out {out})")
        runs.append((COMPARED[path.name], read_run(path, "out", "metrics", "threads", "overwrite")))
    with refusing(folder):
        check_alike(folder, [run.metrics for _, run in runs], "task data machine threads torch commit")
    return minutes, runs


def read_long_memory(root: Path) -> dict[str, list[tuple[str, Run]]]:
    """By problem, networks with their runs, from results/long_memory/<problem>_<row>."""
    folder, runs = root / "results" / "long_memory", {}
    for path in sorted(folder.glob("[!.]*")):
        problem, _, row = path.name.partition("_")
        if row not in MEMORY:
            raise UserError(f"{path}: expected a row of scripts/memory.sh, such as copy_{next(iter(MEMORY))}")
        run = read_run(path, "out", "metrics", "threads", "overwrite")
        with refusing(path):
            if run.metrics["problem"] != problem:
                raise UserError(f"{path}: a run of the problem {run.metrics['problem']}")
            [float(run.metrics[key]) for key in ("length", "chance")], run.metrics["receptive_field"]
            runs.setdefault(problem, {})[row] = run
    if runs:
        with refusing(folder):
            everything = [run.metrics for by_row in runs.values() for run in by_row.values()]
            check_alike(folder, everything, "machine threads torch seed")
    ordered = sorted(runs.items(), reverse=True)  # copy first
    return {problem: [(MEMORY[row], rows[row]) for row in MEMORY if row in rows] for problem, rows in ordered}


def read_adapted(path: Path) -> tuple[Record, dict[str, tuple[Record, Record]]]:
    """A run with `--eval` and `--cache` or `--dynamic_eval`: metrics, and validation and test result by way."""
    metrics = read_metrics(path)
    with refusing(path):
        command = without(metrics["command"], "metrics")
        check_portable(path, command)
        score_of(metrics["test_static"])
        ways = {way: (metrics[f"valid_{way}"], metrics[f"test_{way}"]) for way in ADAPTED if f"test_{way}" in metrics}
        for split, results in zip(("valid", "test"), zip(*ways.values(), strict=True), strict=True):
            if len({result["tokens"] for result in results}) > 1:
                raise UserError(f"{path}: the ways are scored on different parts of the {split} data")
    return metrics | {"command": command}, ways


def read_depths(path: Path) -> tuple[Record, list[tuple[Record, Record]]]:
    """A trained model scored with `--eval_depths`: metrics, and validation and test result of every depth, in order.

    The metrics have the depth that it was trained with as `nlevels`, from config.json if the model of this name is
    shipped, else that of its test score.
    """
    metrics, config = read_metrics(path, complete=False), path.absolute().parent.parent / path.stem / "config.json"
    with refusing(path):
        command = without(metrics["command"], "metrics", "threads")
        check_portable(path, command)
        depths = {key.removeprefix("test") for key in metrics if key.startswith("test_depth_")}
        if not depths:
            raise UserError(f"{path}: has no scores by depth; score the run with --eval_depths")
        pairs = {metrics[f"test{key}"]["nlevels"]: (metrics[f"valid{key}"], metrics[f"test{key}"]) for key in depths}
        pairs[metrics["test"]["nlevels"]] = metrics["valid"], metrics["test"]
        trained = read_json(config)["settings"]["nlevels"] if config.is_file() else metrics["test"]["nlevels"]
        for split, results in zip(("valid", "test"), zip(*pairs.values(), strict=True), strict=True):
            [(score_of(result), result["receptive_field"]) for result in results]
            if len({result[score_of(result).count] for result in results}) > 1:
                raise UserError(f"{path}: the depths are scored on different parts of the {split} data")
    return metrics | {"command": command, "nlevels": trained}, [pairs[layers] for layers in sorted(pairs)]


def read_growth(folder: Path) -> dict[str, list[Record]]:
    """Runs of scripts/depth.sh by row, in the order of their seeds, from results/growth/<row>-<seed>.json."""
    runs: dict[str, list[Record]] = {}
    for path in sorted(folder.glob("*.json")):
        row, metrics = path.stem.rpartition("-")[0], read_metrics(path)
        with refusing(path):
            text, _, plan = row.partition("_")
            if text not in GROWTH or plan not in (*GROWTH[text][2], "random", "depth_2", "depth_4", "depth_6"):
                raise UserError(
                    f"{path}: expected the name of a row of scripts/depth.sh and a seed, as word_grown-1.json"
                )
            score_of(metrics["valid"]), score_of(metrics["test"]), metrics["seconds"], metrics["seed"]
            plans = GROWTH[text][2]
            epochs = plans.get(plan, plans["fixed"])
            stages = [f"{layers}:{n}" for layers, n in epochs.items()][:-1]
            planned = {"epochs": sum(epochs.values()), "grow": stages, "random_depth": 2 * (plan == "random")}
            for key, value in planned.items():
                if metrics[key] != value:
                    raise UserError(f"{path}: has {key} {metrics[key]}, the row of scripts/depth.sh has {value}")
            if ("--horizon 8 " in metrics["command"]) != (plan == "windows"):
                raise UserError(f"{path}: its windows are not those of the row of scripts/depth.sh")
            if plan == "random":
                [score_of(metrics[f"test_depth_{layers}"]) for layers in (2, 4, 6)]
            runs.setdefault(row, []).append(metrics)
    if not runs:
        raise UserError(f"{folder}: has no runs")
    with refusing(folder):
        check_alike(folder, itertools.chain(*runs.values()), "machine torch corpus precision")
        for text in GROWTH:
            own = {row: found for row, found in runs.items() if row.startswith(text)}
            equal = [m for row, found in own.items() for m in found if not row.endswith(("grown", "windows"))]
            for several, keys in ((itertools.chain(*own.values()), "task preset params data"), (equal, "steps")):
                if several := list(several):
                    check_alike(folder, several, keys)
    return runs


class Equilibrium(NamedTuple):
    """Results of scripts/equilibrium.sh; ways are "unrolled" and "equilibrium", for memory also "recompute".

    Args:
        scores: metrics of the rows that score, by name.
        epochs: the record of the epoch that either way trained.
        seconds: of an update, by way; a median for each of the runs that were timed.
        memories: metrics of the paper's model after a few updates, by way.
    """

    scores: dict[str, Record]
    epochs: dict[str, Record]
    seconds: dict[str, list[float]]
    memories: dict[str, Record]


def read_equilibrium(root: Path) -> Equilibrium:
    """Rows of scripts/equilibrium.sh, from <row>.json in results/equilibrium, <row>.jsonl of those that train, and
    results/memory/paper_<way>.json; rows that are timed have their seeds in their names.
    """
    folder = root / "results" / "equilibrium"
    rows = [row for pair in WEIGHTS.values() for row in pair]
    scores = {row: read_metrics(folder / f"{row}.json") for row in rows}
    epochs, seconds = {}, {}
    with refusing(folder):
        timed = []
        for way in ("unrolled", "equilibrium"):
            epochs[way] = _last_epoch(folder / f"{way}.jsonl")
            [epochs["equilibrium"][f"train_{name}"] for name in SOLVED if way == "equilibrium"]
            paths = sorted(folder.glob(f"timed_{way}-*.json"))
            timed += [read_metrics(path, complete=False) for path in paths]
            updates = [_last_epoch(path.with_suffix(".jsonl")) for path in paths]
            seconds[way] = [update["train_seconds"] / update["step"] for update in updates]
        [scores[row]["test"][name] for row in ("start_solved", "unrolled_solved", "equilibrium") for name in SOLVED]
        check_alike(folder, [*scores.values(), *timed], "task params data machine threads torch corpus precision")
        check_alike(folder, [scores[way] for way in ("unrolled", "equilibrium")], "steps seed schedule load_weight")
    folder, found = root / "results" / "memory", read_memories(root)
    with refusing(folder):
        memories = {way: found[f"paper_{way}"] for way in ("unrolled", "recompute", "equilibrium")}
        check_alike(folder, memories.values(), "params data machine threads torch precision steps")
    return Equilibrium(scores, epochs, seconds, memories)


def _last_epoch(path: Path) -> Record:
    return [record for record in read_events(path) if record["event"] == "epoch"][-1]


def read_exits(path: Path) -> tuple[Record, list[Record]]:
    """A trained model scored with `--early_exit`: metrics, and the test result of every tolerance, in order."""
    metrics = read_metrics(path, complete=False)
    with refusing(path):
        command = without(metrics["command"], "metrics", "threads")
        check_portable(path, command)
        exits = sorted((r for key, r in metrics.items() if key.startswith("test_exit_")), key=lambda r: r["tolerance"])
        if not exits or exits[0]["tolerance"]:
            raise UserError(f"{path}: has no scores by tolerance; score the run with --early_exit")
        [(score_of(r), r["layers"], r["seconds"]) for r in exits]
    return metrics | {"command": command}, exits


def read_speeds(root: Path) -> dict[str, Record]:
    """Files of scripts/bench.py in results/speed, by name."""
    found = {}
    for path in sorted((root / "results" / "speed").glob("*.json")):
        found[path.stem] = content = read_measurement(path)
        with refusing(path):
            if ("--quick",) in options(content["command"]):
                raise UserError(f"{path}: of small networks")
            check_portable(path, content["command"])
            for r in content["records"]:
                [r[key] for key in ("task", "part", "variant")]
                f"{r['bytes']:.0f}" if "bytes" in r else f"{r['ratio']:.2f} {speed_text(r)}"
    return found


def read_compatibility(root: Path) -> dict[str, Record]:
    """Files of scripts/compatibility.py in results/compatibility, by name."""
    found = {}
    for path in sorted((root / "results" / "compatibility").glob("*.json")):
        found[path.stem] = content = read_measurement(path)
        with refusing(path):
            check_portable(path, content["command"])
            first, *others = map(list, content["cells"].values())
            if any(other != first for other in others):
                raise UserError(f"{path}: the rows have different columns")
    return found


def speed_text(record: Record) -> str:
    """A time of a benchmark, or a rate."""
    return f"{record['per_second']:.3g} tokens/s" if record["part"] in RATES else f"{record['seconds']:.3g} s"


def read_memories(root: Path) -> dict[str, Record]:
    """Metrics of a few updates in results/memory, by name, in the order of the paper."""
    found = {}
    for path in sorted((root / "results" / "memory").glob("*.json"), key=place):
        found[path.stem] = metrics = read_metrics(path, complete=False)
        with refusing(path):
            float(metrics["peak_memory"])
            if metrics.get("resumed_with"):
                raise UserError(f"{path}: of a resumed run, whose peak memory is that of its last process; train anew")
    return found
