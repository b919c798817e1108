"""Records of runs and measurements: read here alone, with every check that makes them quotable.

A result is a folder `results/<name>/` with the files of one complete run on real data: metrics.json (what `--metrics`
writes), metrics.jsonl and log.txt (from the run folder; the log is for readers, no program looks into it).
"""

import contextlib
import json
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from scripts.reports.tables import COMPARED, PUBLISHED, TABLES, Row
from trellisnet.errors import NAME, UserError, shown
from trellisnet.serialization import read_regular
from trellisnet.training.runlog import read_records

# Names and decimals of scores, and abbreviations of what they are averaged over, by their keys in a result.
SCORES = {"ppl": ("perplexity", 2), "bpc": ("bits per character", 4), "accuracy": ("accuracy", 4)}
UNITS = {"tokens": "tok", "examples": "seq"}
# Ways of scoring with --cache and --dynamic_eval: part of the key in the metrics, and name.
ADAPTED = {
    "static": "static", "static_segments": "static, in the segments of dynamic evaluation", "cache": "+ cache",
    "dynamic": "+ dynamic evaluation", "dynamic_cache": "+ dynamic evaluation + cache",
}  # fmt: skip
RATES = ("evaluation", "generation")  # parts of a benchmark that are measured in tokens per second


# -- files -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Turn whatever a corrupt record raises into a UserError that names the file."""
    try:
        yield
    except UserError:
        raise
    except KeyError as e:
        raise UserError(f"{path}: corrupt or of another kind (it has no {e})") from e
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror or e})") from e
    except (ValueError, TypeError, AttributeError, IndexError, ArithmeticError, RecursionError) as e:
        raise UserError(f"{path}: corrupt or of another kind ({e})") from e


def read_json(path: Path) -> Any:
    """Content of a JSON file whose texts can be printed, in a table too.

    Raises:
        UserError: unreadable, no JSON, or control characters in a text.
    """
    with refusing(path):
        return _printable(json.loads(read_regular(path)))


def read_events(path: Path) -> list[dict[str, Any]]:
    """:func:`read_json` of every line of a metrics.jsonl."""
    with refusing(path):
        return _printable(read_records(path))


def _printable(content: Any) -> Any:
    if isinstance(content, str) and not content.isprintable():
        raise ValueError(f"a text with control characters: {shown(content, NAME)}")
    for part in (
        (*content, *content.values()) if isinstance(content, dict) else content if isinstance(content, list) else ()
    ):
        _printable(part)
    return content


# -- commands ----------------------------------------------------------------------------------------------------------


def options(command: str) -> list[tuple[str, ...]]:
    """The words of a recorded command: those of the program, then each flag with its values."""
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


def check_committed(path: Path, record: Mapping[str, Any]) -> None:
    """Refuse a record of code that was not committed."""
    if not record["commit"] or record["commit"].endswith("-dirty"):
        raise UserError(f"{path}: the code was not committed")


def check_portable(path: Path, command: str) -> None:
    """Refuse a command that works on one machine only."""
    if any(part.startswith("/") for word in shlex.split(command) for part in word.split("=")):
        raise UserError(f"{path}: the command names a path of one machine: {command}")


def check_alike(folder: Path, runs: Iterable[Mapping[str, Any]], *keys: str) -> None:
    """Refuse runs that differ in anything but what they compare."""
    first, *others = runs
    for key in keys:
        if any(other[key] != first[key] for other in others):
            raise UserError(f"{folder}: the runs differ in {key}; keep those of one kind")


# -- runs --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """A score, with all that :mod:`trellisnet.training.reporting` needs to know of a task."""

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

    def scores(self, result: Mapping[str, Any], split: str) -> list[str]:
        """Keys of all scores of a result."""
        return [key for key in result if key.partition("_")[0] in SCORES]

    def better(self, other: "Score") -> bool:
        return self.value > other.value if self.score_name == "accuracy" else self.value < other.value

    def __str__(self) -> str:
        return f"{self.value:.{self.digits}f}"


def score_of(result: Mapping[str, Any]) -> Score:
    """The score of a split."""
    for name, (_, digits) in SCORES.items():
        if name in result:
            return Score(name, float(result[name]), digits, "examples" if "examples" in result else "tokens")
    raise KeyError("score")


def read_metrics(path: Path, *, complete: bool = True) -> dict[str, Any]:
    """A metrics file that may be quoted.

    Raises:
        UserError: corrupt, of synthetic data or of uncommitted code; if `complete`, of an unfinished run.
    """
    metrics = read_json(path)
    with refusing(path):
        if metrics["corpus"] == "synthetic":
            raise UserError(f"{path}: a run on synthetic data is no result")
        check_committed(path, metrics)
        if complete and not metrics["complete"]:
            raise UserError(f"{path}: not a complete run")
    return metrics


def read_measurement(path: Path) -> dict[str, Any]:
    """What a script has written with --json, of committed code; its command without that flag."""
    record = read_json(path)
    with refusing(path):
        check_committed(path, record)
        return record | {"command": without(record["command"], "json")}


def finished_epochs(events: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Records of finished epochs; of one that was logged again after a kill, the later one."""
    return list({r["epoch"]: r for r in events if r["event"] == "epoch" and r["finished"]}.values())


class Run(NamedTuple):
    """A complete run; its command without what only names files of one machine."""

    folder: Path
    metrics: dict[str, Any]
    epochs: list[dict[str, Any]]
    evaluations: dict[str, dict[str, Any]]  # by split, as they were printed


def read_run(folder: Path, *, ignored: Sequence[str] = ()) -> Run:
    """A result.

    Args:
        folder: of its files.
        ignored: flags that are left out of its command.

    Raises:
        UserError: a file is missing or corrupt; the run is unfinished, synthetic, or of uncommitted code; its command
            would not work elsewhere.
    """
    metrics, events = read_metrics(folder / "metrics.json"), read_events(folder / "metrics.jsonl")
    if not (folder / "log.txt").is_file():
        raise UserError(f"{folder}: has no log.txt; copy it from the run's folder")
    with refusing(folder):
        epochs = finished_epochs(events)
        if [r["epoch"] for r in epochs] != list(range(1, metrics["epochs"] + 1)):
            raise UserError(f"{folder}: not a complete run: metrics.jsonl does not have its {metrics['epochs']} epochs")
        command = without(metrics["command"], *ignored)
        check_portable(folder, command)
        last = [r for r in events if r["event"] == "result"][-1:]
        evaluations = {name: result for r in last for name, result in r.items() if isinstance(result, dict)}
        score_of(metrics["test"])
    return Run(folder, metrics | {"command": command}, epochs, evaluations)


def is_result(folder: Path) -> bool:
    """Whether a folder holds the files of one run, whatever it is called."""
    return any((folder / name).is_file() for name in ("metrics.json", "metrics.jsonl", "config.json"))


def place(path: Path) -> tuple[int, str]:
    """Where the result in a metrics file belongs: by the order of the tasks in the paper, then by path.

    An unreadable file comes last; whoever needs its content says why.
    """
    with contextlib.suppress(UserError, TypeError, KeyError, ValueError):
        return list(PUBLISHED).index(read_json(path)["task"]), str(path)
    return len(PUBLISHED), str(path)


# -- runs that are compared --------------------------------------------------------------------------------------------


class Finished(NamedTuple):
    """The finished runs of a row of a table: their scores, what they have in common, and minutes."""

    score_name: str
    values: list[float]
    params: int
    epochs: int
    augmented: bool
    minutes: list[float]


def read_row(folder: Path, recited: bool = False) -> Finished | None:
    """The finished runs in runs/tables/<table>/<row>; None if there are none.

    Accuracies are in percent; with `recited` the training accuracy is the score.

    Raises:
        UserError: corrupt, uncommitted code, or runs that differ in size, epochs or augmentation.
    """
    runs, scores = [], []
    for path in sorted(folder.glob("seed-*/metrics.json")):
        metrics = read_json(path)
        with refusing(path):
            if metrics["corpus"] == "synthetic" or not metrics["complete"]:
                continue
            check_committed(path, metrics)
            score = score_of(metrics["test"])
            if recited:
                epochs = [r for r in read_events(path.with_name("metrics.jsonl")) if r["event"] == "epoch"]
                score = score_of({"accuracy": epochs[-1]["train_score"]})
            scores.append(score)
            runs.append({"augment": False, **metrics})
    if not runs:
        return None
    with refusing(folder):
        check_alike(folder, runs, "params", "epochs", "augment")
        name, one = scores[0].score_name, runs[0]
        values = [100 * score.value if name == "accuracy" else score.value for score in scores]
        minutes = [run["seconds"] / 60 for run in runs if "seconds" in run]
    return Finished(name, values, one["params"], one["epochs"], one["augment"], minutes)


def read_ablations(folder: Path) -> list[tuple[Row, dict[str, Any]]]:
    """Rows of Table 6 after equally many updates, the complete network first, from results/table6_<preset>.

    Raises:
        UserError: corrupt, partial scores, synthetic data, uncommitted code, an unknown row, or rows that are not
            comparable.
    """
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
        same = "task preset steps seed data commit machine torch corpus tokens".split()
        check_alike(folder, runs.values(), *same)
    return [(row, runs[row.name]) for row in rows if row.name in runs]


def read_precisions(folder: Path) -> list[dict[str, Any]]:
    """Runs that differ in precision and seed only, from results/precision/<precision>-<seed>.json.

    Raises:
        UserError: corrupt, unfinished, synthetic data, uncommitted code, or runs that differ otherwise.
    """
    runs = [read_metrics(path) for path in sorted(folder.glob("*.json"))]
    if not runs:
        raise UserError(f"{folder}: has no runs")
    with refusing(folder):
        check_alike(folder, runs, *"task preset epochs steps data commit machine torch corpus backend".split())
        return sorted(runs, key=lambda run: (run["precision"], run["seed"]), reverse=True)


def read_equal_time(folder: Path) -> tuple[int, list[tuple[str, Run]]]:
    """Minutes, and the runs of networks after about as many, from results/compare_<minutes>_minutes/<row>/.

    Raises:
        UserError: as :func:`read_run`; another name, runs of another length, or on different data or machines.
    """
    match folder.name.split("_"):
        case ["compare", minutes, "minutes"] if minutes.isdigit():
            pass
        case _:
            raise UserError(f"{folder}: expected a name such as compare_30_minutes")
    names = [name for name in COMPARED if (folder / name).is_dir()]
    if set(names) != {path.name for path in folder.iterdir()} or not names:
        raise UserError(f"{folder}: expected folders named {', '.join(COMPARED)}")
    runs = []
    for name in names:
        with refusing(folder / name):
            (planned,) = [
                words[1]
                for words in options(read_json(folder / name / "metrics.json")["command"])
                if words[0] == "--out"
            ]
            if f"compare-{minutes}-minutes" not in Path(planned).parts:
                raise UserError(f"{folder / name}: was planned for another time (--out {planned})")
        runs.append((COMPARED[name], read_run(folder / name, ignored=("out", "metrics", "threads", "overwrite"))))
    with refusing(folder):
        check_alike(folder, [run.metrics for _, run in runs], *"task data machine threads torch commit".split())
    return int(minutes), runs


def read_adapted(path: Path) -> tuple[dict[str, Any], dict[str, tuple[dict[str, Any], dict[str, Any]]]]:
    """A run with `--eval` and `--cache` or `--dynamic_eval`: its metrics, and validation and test result by way.

    Raises:
        UserError: corrupt, of part of the data, of synthetic data or uncommitted code; or its command would not work
            elsewhere.
    """
    metrics = read_metrics(path)
    with refusing(path):
        command = without(metrics["command"], "metrics")
        check_portable(path, command)
        score_of(metrics["test_static"])
        ways = {way: (metrics[f"valid_{way}"], metrics[f"test_{way}"]) for way in ADAPTED if f"test_{way}" in metrics}
    return metrics | {"command": command}, ways


def read_speeds(root: Path) -> dict[str, dict[str, Any]]:
    """What scripts/bench.py has measured, by name, from results/speed.

    Raises:
        UserError: corrupt, of uncommitted code, of small networks, or with a command that names a path of one machine.
    """
    found = {}
    for path in sorted((root / "results" / "speed").glob("*.json")):
        found[path.stem] = content = read_measurement(path)
        with refusing(path):
            if ("--quick",) in options(content["command"]):
                raise UserError(f"{path}: of small networks")
            check_portable(path, content["command"])
            for record in content["records"]:
                [record[key] for key in ("task", "part", "variant")]
                f"{record['bytes']:.0f}" if "bytes" in record else f"{record['ratio']:.2f} {speed_text(record)}"
    return found


def speed_text(record: Mapping[str, Any]) -> str:
    """A time, or a rate, of a benchmark."""
    return f"{record['per_second']:.3g} tokens/s" if record["part"] in RATES else f"{record['seconds']:.3g} s"


def read_memories(root: Path) -> dict[str, dict[str, Any]]:
    """Metrics of runs of a few steps whose memory was measured, by name in the order of the paper, from results/memory.

    Raises:
        UserError: corrupt, of synthetic data or uncommitted code.
    """
    paths = sorted((root / "results" / "memory").glob("*.json"), key=place)
    found = {path.stem: read_metrics(path, complete=False) for path in paths}
    for path in paths:
        with refusing(path):
            float(found[path.stem]["peak_memory"])
    return found
