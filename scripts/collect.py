"""Write RESULTS.md, and the quoted output in README.md, from the logs in results/; or print a table of the paper.

A result is a folder `results/<name>/` with the files of one complete run on real data: `metrics.json` (written by
`--metrics`), `metrics.jsonl` and `log.txt` (from the run folder). The folder `results/table6_small/` compares rows of
Table 6 after equally many updates: what `PRESET=small STEPS=N bash scripts/table6.sh` leaves in
`runs/tables/table6_small-N-steps/<row>/seed-<seed>/metrics.json`, as `<row>.json`. `results/torture/` has what
`scripts/torture.py --json` and, as `ranks.json`, `scripts/compare_ranks.py --json` have written, `results/adapted/` the
`--metrics` files of runs with `--eval` and `--cache` or `--dynamic_eval`. Nothing in RESULTS.md is written by hand.

    python scripts/collect.py           write both files
    python scripts/collect.py --check   only say whether they are up to date (exit code 1 if not)
    python scripts/collect.py --table 1 print Table 1 beside what scripts/table1.sh has trained so far; likewise
                                        --table rhn, sparse, compare
"""

import argparse
import functools
import json
import re
import signal
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main takes signals: no traceback from an import

from trellisnet import errors
from trellisnet.serialization import atomic_write, read_regular
from trellisnet.training.cli import guarded
from trellisnet.training.config import PROJECT, Parser

# Test scores of the paper (Tables 1 to 3), by task.
PAPER = {
    "word_ptb": (56.97, "24M parameters, preset `paper`"),
    "char_ptb": (1.158, "13.4M parameters, preset `paper`, on the authors' stream"),
    "wt103": (29.19, "180M parameters, preset `paper`, on the whole of WikiText-103"),
    "pmnist": ("98.13 %, 99.20 % without permutation,", "8M parameters, preset `8m`"),
    "cifar10": ("73.42 %", "8M parameters, preset `8m`, on the original images"),
}
# What a score is called, and its digits.
SCORES = {"ppl": ("perplexity", 2), "bpc": ("bits per character", 4), "accuracy": ("accuracy", 4)}
# Tasks in the order of the paper.
ORDER = list(PAPER)
# The tables of the paper: model, size and test score as printed there; and its row in scripts/table<number>.sh, if it
# has one. Table 5 lists settings, which are the presets `paper`.
TABLES = {
    1: (
        "Word-level Penn Treebank, test perplexity",
        [
            ("Generic TCN", "13M", 88.68, "tcn"),
            ("AWD-LSTM (ours without finetuning)", "24M", 58.8, "awd_lstm"),
            ("AWD-LSTM-MoS (ours without finetuning)", "24M", 55.97, "awd_lstm_mos"),
            ("TrellisNet", "24M", 56.97, "trellisnet"),
            ("TrellisNet (1.4x larger)", "33M", 56.80, "trellisnet_larger"),
            ("TrellisNet-MoS", "25M", 54.67, "trellisnet_mos"),
            ("TrellisNet-MoS (1.4x larger)", "34M", 54.19, "trellisnet_mos_larger"),
            ("Recurrent highway network, depth 10 (not in the paper)", "", None, "rhn"),
            ("Sparse LSTM (not in the paper)", "", None, "sparse_lstm"),
        ],
    ),
    2: (
        "WikiText-103, test perplexity",
        [("Generic TCN (ours with our settings)", "150M", 45.2, "tcn"), ("TrellisNet", "180M", 29.19, "trellisnet")],
    ),
    3: (
        "Character-level Penn Treebank, test bits per character",
        [
            ("Generic TCN", "3.0M", 1.31, "tcn"),
            ("AWD-LSTM, standard stream", "13.8M", 1.175, "awd_lstm"),
            ("TrellisNet", "13.4M", 1.158, "trellisnet"),
            ("TrellisNet, standard stream", "13.4M", None, "trellisnet_standard"),
        ],
    ),
    4: (
        "MNIST and CIFAR-10 pixel by pixel, test accuracy in percent",
        [
            ("Sequential MNIST: Generic TCN", "", 99.0, "sequential_mnist_tcn"),
            ("Sequential MNIST: TrellisNet", "8M", 99.20, "sequential_mnist"),
            ("Sequential MNIST: TrellisNet, released settings", "", None, "sequential_mnist_released"),
            ("Permuted MNIST: Generic TCN", "", 97.2, "permuted_mnist_tcn"),
            ("Permuted MNIST: TrellisNet", "8M", 98.13, "permuted_mnist"),
            ("Permuted MNIST: TrellisNet, released settings", "", None, "permuted_mnist_released"),
            ("Sequential CIFAR-10: TrellisNet", "8M", 73.42, "sequential_cifar10"),
            ("Sequential CIFAR-10: TrellisNet, released settings", "", None, "sequential_cifar10_released"),
        ],
    ),
    6: (
        "Ablations on word-level Penn Treebank, test perplexity",
        [
            ("TrellisNet", "24.1M", 56.97, "trellisnet"),
            ("- Hidden (VD-based) Dropout", "24.1M", 64.69, "no_hidden_dropout"),
            ("- Weight Dropout", "24.1M", 63.82, "no_weight_dropout"),
            ("- Auxiliary Losses", "24.1M", 57.99, "no_auxiliary_losses"),
            ("- Long Seq. Parallelism", "24.1M", 57.35, "no_long_sequence_parallelism"),
            ("- Dense Kernel (i.e. mixed group conv; 2 groups here)", "24.1M", 59.18, "mixed_group_2"),
            ("- Dense Kernel (4 groups; not in the paper)", "", None, "mixed_group_4"),
            ("- Injected Input (every 2 layers instead)", "24.1M", 57.44, "inject_every_2"),
            ("- Injected Input (every 5 layers instead)", "24.1M", 59.75, "inject_every_5"),
            ("- Injected Input (every 10 layers instead)", "24.1M", 60.70, "inject_every_10"),
            ("- Injected Input (every 20 layers instead)", "24.1M", 74.91, "inject_every_20"),
            ("GRU gates (not in the paper)", "", None, "activation_gru"),
            ("tanh, no gates (not in the paper)", "", None, "activation_tanh"),
        ],
    ),
}
# Tables of other papers, likewise, and their scripts: those of the authors' README of recurrent highway networks, and
# those of "Predefined Sparseness in Recurrent Sequence Models", whose numbers are not in its README.
_RHN_TEST = (
    (90.6, 89.2), (75.1, 76.3), (70.6, 72.6), (68.6, 70.9), (67.7, 69.8),
    (66.6, 69.3), (66.4, 68.7), (66.1, 68.5), (66.0, 68.5), (66.0, 68.3),
)  # fmt: skip
OTHER_TABLES = {
    "rhn": (
        "Recurrent highway networks on word-level Penn Treebank, test perplexity",
        "rhn_table",
        [
            (f"depth {depth}, {tied} weights", "32M" if tied == "untied" else "", paper, f"depth_{depth}{suffix}")
            for depth, both in enumerate(_RHN_TEST, start=1)
            for (tied, suffix), paper in zip((("tied", ""), ("untied", "_untied")), both, strict=True)
        ],
    ),
    "sparse": (
        "Predefined sparseness on word-level Penn Treebank, test perplexity; reciting, training accuracy in percent",
        "sparse_table",
        [
            ("AWD-LSTM", "24.2M", None, "dense"),
            ("sparse_hidden, 1725 channels", "23.8M", None, "sparse"),
            ("Reciting: dense", "24.2M", None, "recite_dense"),
            ("Reciting: dense, half the width", "7.07M", None, "recite_dense_reduced"),
            ("Reciting: sparse_hidden", "7.07M", None, "recite_sparse_hidden"),
            ("Reciting: sparse_all, sparse embedding", "7.07M", None, "recite_sparse_all"),
        ],
    ),
}
# What scripts/compare.sh trains, a folder runs/tables/compare-<minutes>-minutes each time.
COMPARED = {
    "trellisnet": "TrellisNet", "awd_lstm": "AWD-LSTM", "tcn": "Generic TCN", "rhn": "Recurrent highway network",
    "sparse_lstm": "Sparse LSTM",
}  # fmt: skip
# In README, what stands between <!-- output of NAME: begin --> and <!-- output of NAME: end --> comes from the log of
# results/NAME.
QUOTED = re.compile(r"<!-- output of (\w+): begin -->\n.*?<!-- output of \1: end -->", re.DOTALL)


SPEED = re.compile(r"<!-- speed: begin -->\n.*?<!-- speed: end -->", re.DOTALL)
MEMORY = re.compile(r"<!-- memory: begin -->\n.*?<!-- memory: end -->", re.DOTALL)
# What README says about published tables goes into RESULTS.md too.
NOT_COMPARABLE = re.compile(r"<!-- not comparable: begin -->\n(.*?)<!-- not comparable: end -->", re.DOTALL)


# Flags of a measurement that do not change how much memory it takes.
HERE_ONLY = re.compile(
    r" --(max_steps|max_eval_tokens|metrics|out|epochs|data|checkpoint_steps|log-interval) \S+"
    r"| --(overwrite|no-download)"
)


class BadResultError(Exception):
    """A folder in results/ that must not be quoted."""


def _printable(record: dict[str, Any]) -> dict[str, Any]:
    """An object of a JSON file, if its texts can stand in a table and be printed."""
    for text in (*record, *record.values()):
        if isinstance(text, str) and not text.isprintable():
            raise ValueError(f"holds a text with control characters: {errors.shown(text, errors.NAME)}")
    return record


def parsed(path: Path) -> Any:
    """The content of a JSON file that a run or a script has written.

    Raises:
        OSError, ValueError: it cannot be read; or it is no JSON, or has control characters in a text.
    """
    return _parse(read_regular(path))


def parsed_lines(path: Path) -> list[Any]:
    """:func:`parsed` of every line of a file."""
    return [_parse(line) for line in read_regular(path).splitlines()]


def _parse(text: str) -> Any:
    try:
        return json.loads(text, object_hook=_printable)
    except RecursionError as e:
        raise ValueError("nested too deeply") from e


def read(folder: Path, by_script: bool = False) -> tuple[dict, list[dict]]:
    """Metrics and epoch records of one result; with `by_script` its command without what a script adds to it.

    Raises:
        BadResultError: a file is missing or unreadable, or the run is partial, synthetic, of uncommitted code, or its
            command would not work elsewhere.
    """
    try:
        metrics = parsed(folder / "metrics.json")
        records = parsed_lines(folder / "metrics.jsonl")
        # A continued run may tell of an epoch twice; the last time counts.
        epochs = list({r["epoch"]: r for r in records if r["event"] == "epoch" and r["finished"]}.values())
        complete = metrics["complete"] and [r["epoch"] for r in epochs] == list(range(1, metrics["epochs"] + 1))
        if by_script:
            metrics["script command"] = metrics["command"]
            metrics["command"] = re.sub(r" --(out|metrics|threads) \S+| --overwrite", "", metrics["command"])
        section(folder.name, metrics, epochs)
        read_regular(folder / "log.txt")
    except (OSError, ValueError) as e:
        raise BadResultError(f"{folder}: {e}") from e
    except (KeyError, TypeError, StopIteration) as e:
        raise BadResultError(f"{folder}: a field is missing or of another kind ({e})") from e
    if not complete:
        raise BadResultError(f"{folder}: not a complete run")
    if re.search(r"(^|[ =])/", metrics["command"]):
        raise BadResultError(f"{folder}: the command names a path of one machine: {metrics['command']}")
    if metrics["corpus"] == "synthetic":
        raise BadResultError(f"{folder}: a run on synthetic data is no result")
    if not metrics["commit"] or metrics["commit"].endswith("-dirty"):
        raise BadResultError(f"{folder}: the code of the run was not committed")
    return metrics, epochs


def score_of(split: dict) -> tuple[str, float]:
    name = next(name for name in SCORES if name in split)
    return name, split[name]


def shown(split: dict) -> str:
    """A score with its other denominators."""
    score, value = score_of(split)
    name, digits = SCORES[score]
    others = [key for key in split if key.startswith(f"{score}_") and split[key] != value]
    more = "".join(f", {split[key]:.{digits}f} on the {key.removeprefix(f'{score}_')} stream" for key in others)
    return f"{name} **{value:.{digits}f}**{more}"


def _threads(record: dict) -> str:
    return f"{record['threads']} thread{'s' * (record['threads'] != 1)}"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.{0 if seconds >= 600 else 1}f}"


def section(name: str, metrics: dict, epochs: list[dict]) -> str:
    """A heading, the facts and the learning curve of one run."""
    score, _ = score_of(metrics["test"])
    count = "examples" if score == "accuracy" else "tokens"
    digits = SCORES[score][1]
    paper, setting = PAPER[metrics["task"]]
    facts = {
        "Command": f"`{metrics['command']}`",
        "Test": f"{shown(metrics['test'])} ({metrics['test'][count]:,} {count} scored); "
        f"the paper reports {paper} with another configuration ({setting})",
        "Validation": f"{metrics['valid'][score]:.{digits}f} at epoch {metrics['best_epoch']}"
        if metrics["valid"]
        else "none held out; the last epoch is scored",
        "Parameters": f"{metrics['params']:,}",
        "Wall time": f"{_minutes(metrics['seconds'])} minutes, evaluation included",
        "Machine": f"{metrics['machine']}, {_threads(metrics)}, {metrics['device']}, {metrics['precision']}, "
        f"backend {metrics['backend']}, torch {metrics['torch']}",
        "Seed": str(metrics["seed"]),
        "Commit": f"`{metrics['commit']}`",
        "Data": f"{metrics['corpus']}, sha256 `{metrics['data'][:16]}…`",
        "Log": f"[results/{name}/](results/{name})",
    }
    order = f", {ORDERS[1]}" if "--no-permute" in metrics["command"] else ""
    augmented = ", augmented" if metrics.get("augment") else ""
    weights = re.search(r"--load_weight[ =](\S+)", metrics["command"])
    start = f", from `{weights[1]}`" if weights else ""
    lines = [f"## {metrics['task']}, preset `{metrics['preset']}`{order}{augmented}{start}", ""]
    lines += [f"- {key}: {value}" for key, value in facts.items()]
    lines += ["", f"| epoch | lr | train {score} | valid {score} | minutes |", "|--:|--:|--:|--:|--:|"]
    lines += [
        f"| {e['epoch']} | {e['lr']:g} | {e['train_score']:.{digits}f} "
        f"| {'' if e['valid_score'] is None else format(e['valid_score'], f'.{digits}f')} | {e['seconds'] / 60:.1f} |"
        for e in epochs
    ]
    return "\n".join(lines) + "\n"


# The table of the paper with a task's results.
TABLE_OF = {"word_ptb": 1, "wt103": 2, "char_ptb": 3, "pmnist": 4, "cifar10": 4}
ORDERS = ("permuted", "not permuted")


def summary(runs: list[tuple[dict, list[dict]]]) -> str:
    """Tables 1 to 4 beside the best result of every kind.

    Args:
        runs: results, as :func:`read` gives them.
    """
    lines = [
        "## Tables 1 to 4 of the paper, and what is here",
        "",
        "TrellisNet in the paper (without a mixture of softmaxes), and the best result below on the same task. Where "
        "sizes or data differ these do not compare: what the paper's models come to with this code is not known before "
        "they have been trained.",
        "",
        "| table | task | the paper's model | paper | ours | preset | parameters | data | minutes |",
        "|--:|---|---|--:|--:|---|--:|---|--:|",
    ]
    best: dict[tuple[str, str, str], dict] = {}
    for metrics, _ in runs:
        name, value = score_of(metrics["test"])
        order = ORDERS["--no-permute" in metrics["command"]] if metrics["task"] == "pmnist" else ""
        key = metrics["task"], order, "augmented" if metrics.get("augment") else ""
        known = best.get(key)
        if known is None or (value > known["test"][name] if name == "accuracy" else value < known["test"][name]):
            best[key] = metrics

    def position(key: tuple[str, str, str]) -> tuple:
        task, order, augmented = key
        return TABLE_OF[task], ORDER.index(task), order != ORDERS[0], augmented

    for task, order, augmented in sorted(best, key=position):
        metrics = best[task, order, augmented]
        name, value = score_of(metrics["test"])
        paper, model = PAPER[task]
        if task == "pmnist":  # two numbers in one
            paper = re.findall(r"[\d.]+ %", paper)[ORDERS.index(order)]
        ours = f"{100 * value:.2f} %" if name == "accuracy" else f"{value:.{SCORES[name][1]}f}"
        weights = re.search(r"--load_weight[ =](\S+)/", metrics["command"])
        cells = [
            str(TABLE_OF[task]), ", ".join(filter(None, (task, order, augmented))), model, str(paper), ours,
            f"`{metrics['preset']}`", f"{metrics['params']:,}", metrics["corpus"],
            _minutes(metrics["seconds"]) + (f" after `{weights[1]}`" if weights else ""),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def results(
    folders: list[Path], comparisons: list[Path], adaptations: list[Path], faults: list[Path], not_comparable: str
) -> str:
    """The whole of RESULTS.md."""
    parts = [
        "# Results\n\nGenerated by `python scripts/collect.py` from the logs in `results/`; not edited by hand. "
        "Train scores are those of training, with dropout on.\n"
    ]
    runs = [read(folder) for folder in folders]
    parts += [summary(runs)] if runs else []
    parts += [section(folder.name, *run) for folder, run in zip(folders, runs, strict=True)]
    kinds = {"precision": precision, "compare": equal_time}
    parts += [kinds.get(folder.name.split("_")[0], comparison)(folder) for folder in comparisons]
    parts += map(adapted, adaptations)
    if not_comparable:
        parts.append(f"## What in the published tables is not comparable\n\n{not_comparable}")
    return "\n".join([*parts, *((ranks if path.stem == "ranks" else torture)(path) for path in faults)])


def quoted(folder: Path) -> str:
    """What the run printed, as README shows it: epochs and final scores from its log."""
    lines = [
        line for line in read_regular(folder / "log.txt").splitlines() if re.match(r"epoch +\d+  |valid|test", line)
    ]
    name = folder.name
    return "\n".join([f"<!-- output of {name}: begin -->", "```", *lines, "```", f"<!-- output of {name}: end -->"])


def finished_runs(folder: Path) -> tuple[str, list[float], int, int, bool]:
    """The finished runs in runs/tables/table<number>/<row>: name and values of their score, parameters, epochs, and
    whether they were augmented.

    Raises:
        BadResultError: a damaged file, or runs of one row that differ in size, length or augmentation or come from
            uncommitted code.
    """
    score, finished, kinds = "", [], set()
    for path in sorted(folder.glob("seed-*/metrics.json")):
        try:
            metrics = parsed(path)
            if metrics["complete"] and metrics["corpus"] != "synthetic":
                score, value = score_of(metrics["test"])
                if folder.name.startswith("recite"):  # what is asked is how well the training text is known
                    score = "accuracy"
                    value = [r for r in parsed_lines(path.parent / "metrics.jsonl") if r["event"] == "epoch"][-1][
                        "train_score"
                    ]
                finished.append(100 * value if score == "accuracy" else value)
                kinds.add((metrics["params"], metrics["epochs"], metrics.get("augment", False)))
                if not metrics["commit"] or metrics["commit"].endswith("-dirty"):
                    raise BadResultError(f"{path}: the code of the run was not committed")
        except (OSError, ValueError, KeyError, TypeError, StopIteration) as e:
            raise BadResultError(f"{path}: a file of another kind, or a damaged one ({e})") from e
    if len(kinds) > 1:
        raise BadResultError(
            f"{folder}: holds runs that differ in size, number of epochs or augmentation; keep those of one kind"
        )
    return score, finished, *(kinds.pop() if kinds else (0, 0, False))


def row(folder: Path) -> tuple[str, str]:
    """Size and score of the finished runs of a row: parameters; mean ± spread (n). Errors as :func:`finished_runs`."""
    score, finished, parameters, epochs, augmented = finished_runs(folder)
    if not finished:
        return "", "not run"
    digits = 4 if score == "bpc" else 2
    spread = f" ± {statistics.stdev(finished):.{digits}f}" if len(finished) > 1 else ""
    kind = f"n = {len(finished)}, {epochs} epochs" + (", augmented" if augmented else "")
    result = f"{statistics.mean(finished):.{digits}f}{spread} ({kind})"
    return f"{parameters:,}", result


def compared(root: Path) -> str:
    """What scripts/compare.sh has finished: networks of one size after about the same time, as markdown.

    Raises:
        BadResultError: as :func:`row`.
    """
    lines = []
    for folder in sorted((root / "runs" / "tables").glob("compare-*-minutes")):
        minutes = folder.name.split("-")[1]
        lines += [f"Word-level Penn Treebank, {minutes} minutes of training each", ""]
        lines += ["| model | test perplexity | parameters | minutes |", "|---|--:|--:|--:|"]
        for name, model in COMPARED.items():
            parameters, ours = row(folder / name)
            runs = [parsed(path) for path in sorted((folder / name).glob("seed-*/metrics.json"))]
            times = ", ".join(f"{run['seconds'] / 60:.0f}" for run in runs if run["complete"])
            lines.append(f"| {model} | {ours} | {parameters} | {times} |")
        lines.append("")
    return "\n".join(lines) or "nothing has been compared yet: bash scripts/compare.sh"


def equal_time(folder: Path) -> str:
    """The same from results/compare_<minutes>_minutes/<row>/, each of them a result as any other.

    Raises:
        BadResultError: as :func:`read`; or another name, or runs on different data or machines.
    """
    match = re.fullmatch(r"compare_(\d+)_minutes", folder.name)
    if not match:
        raise BadResultError(f"{folder}: expected a name such as compare_30_minutes")
    names = [name for name in COMPARED if (folder / name).is_dir()]
    if set(names) != {path.name for path in folder.iterdir()} or not names:
        raise BadResultError(f"{folder}: expected folders named {', '.join(COMPARED)}")
    lines, kinds, planned = [], set(), set()
    for name in names:
        metrics, epochs = read(folder / name, by_script=True)
        try:
            planned.add(re.search(r"--out \S*/compare-(\d+)-minutes/", metrics["script command"])[1])
            kinds.add(tuple(metrics[key] for key in ("task", "data", "machine", "threads", "torch", "commit")))
            tokens = re.search(r"^# training tokens: (\d+)$", read_regular(folder / name / "log.txt"), re.MULTILINE)
            speed = int(tokens[1]) * len(epochs) / sum(e["train_seconds"] for e in epochs)
            cells = [
                COMPARED[name], f"{metrics['params']:,}", metrics["precision"], f"{len(epochs)}",
                f"{metrics['seconds'] / 60:.1f}", f"{speed:,.0f}",
                *(f"{score_of(metrics[split])[1]:.2f}" for split in ("valid", "test")),
                f"`{metrics['command']}`",
            ]  # fmt: skip
        except (KeyError, TypeError, ValueError) as e:
            raise BadResultError(f"{folder / name}: a field is missing or of another kind ({e})") from e
        lines.append(f"| {' | '.join(cells)} |")
    if len(kinds) > 1:
        raise BadResultError(f"{folder}: runs on different data, machines or code")
    if planned != {match[1]}:
        raise BadResultError(f"{folder}: runs that were planned for {', '.join(sorted(planned))} minutes")
    task, data, machine, threads, torch, commit = kinds.pop()
    columns = "network, parameters, precision, epochs, minutes, tokens/s of training, valid ppl, test ppl, command"
    return "\n".join(
        [
            f"## Networks of one size after about {match[1]} minutes each, {task}",
            "",
            f"`MINUTES={match[1]} bash scripts/compare.sh`: every network in the precision in which it is faster. "
            f"{machine}, threads {threads}, torch {torch}, commit `{commit}`, data sha256 `{data[:16]}…`; one seed.",
            "",
            f"| {columns.replace(', ', ' | ')} |",
            "|---|--:|---|--:|--:|--:|--:|--:|---|",
            *lines,
            "",
        ]
    )


def table(number: int | str, root: Path) -> str:
    """A table of the paper beside our runs, as markdown: the mean, the standard deviation, the number of seeds."""
    if number in OTHER_TABLES:
        title, script, rows = OTHER_TABLES[number]
    else:
        title, rows = TABLES[number]
        script, title = f"table{number}", f"Table {number}. {title}"
    lines = [title, "", "| model | size | paper | ours | parameters |", "|---|--:|--:|--:|--:|"]
    for model, size, paper, name in rows:
        parameters, ours = row(root / "runs" / "tables" / script / name) if name else ("", "not run")
        lines.append(f"| {model} | {size} | {'' if paper is None else paper} | {ours} | {parameters} |")
    return "\n".join(lines)


def comparison(folder: Path) -> str:
    """Rows of Table 6 after equally many updates, from results/table6_<preset>/<row>.json.

    Raises:
        BadResultError: a damaged file, partial scores, synthetic data, uncommitted code, an unknown row, or rows that
            are not comparable.
    """
    if not (match := re.fullmatch(r"table6_(\w+)", folder.name)):
        raise BadResultError(f"{folder}: expected a name such as table6_small")
    preset = match[1]
    names = {name: (model, paper) for model, _, paper, name in TABLES[6][1] if name}
    found, kinds = {}, set()
    for path in folder.glob("*.json"):
        try:
            metrics = parsed(path)
            score, _ = score_of(metrics["test"])
            same = ("task", "preset", "steps", "seed", "data", "commit", "machine", "torch", "corpus")
            scored = (metrics["valid"]["tokens"], metrics["test"]["tokens"])
            kinds.add((*(metrics[key] for key in same), *scored))
            found[path.stem] = metrics
            if metrics["corpus"] == "synthetic" or not metrics["commit"] or metrics["commit"].endswith("-dirty"):
                raise BadResultError(f"{path}: of synthetic data or uncommitted code")
            if metrics["test"].get("partial") or metrics["preset"] != preset or path.stem not in names:
                raise BadResultError(f"{path}: partial, of another preset than {preset}, or no row of Table 6")
        except (OSError, ValueError, KeyError, TypeError, StopIteration) as e:
            raise BadResultError(f"{path}: a file of another kind, or a damaged one ({e})") from e
    first = next(iter(names))
    if len(kinds) != 1 or first not in found:
        raise BadResultError(f"{folder}: rows of one kind expected, {first} among them")
    base, paper_base = found[first], names[first][1]
    name, digits = SCORES[score]
    command = HERE_ONLY.sub("", base["command"])
    lines = [
        f"## Rows of Table 6, {base['task']}, preset `{preset}`, {base['steps']:,} updates each",
        "",
        f"`{command} --max_steps {base['steps']}` and the flags of the row: "
        f"`PRESET={preset} STEPS={base['steps']} bash scripts/table6.sh`. "
        f"{base['machine']}, torch {base['torch']}, commit `{base['commit']}`, {base['corpus']}, seed {base['seed']} "
        "alone; a small network and few updates: no test of the paper's differences, which are those of 500 epochs at "
        "24M parameters. Minutes are wall time, no measure of speed.",
        "",
        f"| row | flags | parameters | minutes | valid {score} | test {name} | difference | in the paper |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    common = set(command.split(" --"))
    for row, (model, paper) in names.items():
        if row in found:
            metrics = found[row]
            flags = [flag for flag in HERE_ONLY.sub("", metrics["command"]).split(" --") if flag not in common]
            shown = f"`--{' --'.join(flags)}`" if flags else ""
            if metrics["test"]["loss"] > base["test"]["loss"] + 2:
                model += " — diverged with these settings"
            cells = [model, shown, f"{metrics['params']:,}", f"{metrics['seconds'] / 60:.1f}"]
            cells += [f"{metrics[split][score]:.{digits}f}" for split in ("valid", "test")]
            cells.append("" if row == first else f"{metrics['test'][score] - base['test'][score]:+.{digits}f}")
            cells.append("" if row == first or paper is None else f"{paper - paper_base:+.{digits}f}")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def precision(folder: Path) -> str:
    """Runs that differ in precision and seed only, from results/precision/<precision>-<seed>.json.

    Raises:
        BadResultError: a damaged file, partial scores, synthetic data, uncommitted code, or runs of different kinds.
    """
    runs, kinds = {}, set()
    for path in folder.glob("*.json"):
        try:
            metrics = parsed(path)
            same = ("task", "preset", "epochs", "steps", "data", "commit", "machine", "torch", "corpus", "backend")
            kinds.add(tuple(metrics[key] for key in same))
            runs[metrics["precision"], metrics["seed"]] = metrics
            if metrics["corpus"] == "synthetic" or not metrics["commit"] or metrics["commit"].endswith("-dirty"):
                raise BadResultError(f"{path}: of synthetic data or uncommitted code")
            if metrics["test"].get("partial") or not metrics["complete"]:
                raise BadResultError(f"{path}: partial")
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise BadResultError(f"{path}: a file of another kind, or a damaged one ({e})") from e
    if len(kinds) != 1:
        raise BadResultError(f"{folder}: runs of one kind expected")
    one = next(iter(runs.values()))
    score, _ = score_of(one["test"])
    name, digits = SCORES[score]
    command = re.sub(r" --(precision|seed|out|metrics) \S+", "", one["command"])
    lines = [
        f"## Single precision and bfloat16, {one['task']}, preset `{one['preset']}`, {one['epochs']} epochs",
        "",
        f"`{command} --precision … --seed …`: `bash scripts/precision.sh`. {one['params']:,} parameters, "
        f"{one['machine']}, torch {one['torch']}, commit `{one['commit']}`, {one['corpus']}. "
        "Minutes are wall time, no measure of speed.",
        "",
        f"| precision | seed | minutes | valid {name} | test {name} |",
        "|---|--:|--:|--:|--:|",
    ]
    for (kind, seed), metrics in sorted(runs.items(), reverse=True):
        cells = [f"{metrics[split][score]:.{digits}f}" for split in ("valid", "test")]
        lines.append(f"| {kind} | {seed} | {metrics['seconds'] / 60:.1f} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def committed(path: Path) -> dict:
    """What a script has written with --json.

    Raises:
        BadResultError: of uncommitted code.
        OSError, ValueError, KeyError, TypeError, AttributeError: a damaged file.
    """
    found = parsed(path)
    if not found["commit"] or found["commit"].endswith("-dirty"):
        raise BadResultError(f"{path}: of uncommitted code")
    return found


def torture(path: Path) -> str:
    """What runs and files have survived, from what `scripts/torture.py --json` has written.

    Raises:
        BadResultError: a damaged file, or one of uncommitted code.
    """
    try:
        found = committed(path)
        kills, disk, hostile, soak = *(found[part] for part in ("kills", "disk", "payloads")), found.get("soak")
        moments = {key.removeprefix("killed "): n for key, n in kills.items() if key.startswith("killed in ")}
        command = re.sub(r" --json \S+", "", found["command"])
        shown = ", ".join(f"{count} {moment}" for moment, count in moments.items())
        lines = [
            f"## Faults, seed {found['seed']}",
            "",
            f"`{command}` on {found['machine']}, torch {found['torch']}, commit `{found['commit']}`, seed "
            f"{found['seed']}. Every run that something was done to ended, to the bit, with the weights, the optimiser "
            "and the random numbers of one that was left alone.",
            "",
            f"- Kills survived: {sum(moments.values())} ({shown}) in {kills['runs']} run(s) of {kills['epochs']} "
            f"epochs; and {kills['terminated']} times SIGTERM, after which the run ended with a checkpoint within "
            f"{kills['seconds to terminate']:g} s",
            f"- Writes that failed: {disk['no room']} for want of room, {disk['too large']} for a limit on the size of "
            f"files; folders that may not be written: {disk['read-only']}",
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
        lines += [
            "",
            "| damaged at random | tried | detected | harmless | not noticed |",
            "|---|--:|--:|--:|--:|",
        ]
        for r in found["mutations"]:
            name = r["target"] if r["summed"] else f"{r['target']}, which has no checksums"
            lines.append(f"| {name} | {r['tried']:,} | {r['detected']:,} | {r['harmless']:,} | {r['unnoticed']:,} |")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise BadResultError(f"{path}: a file of another kind, or a damaged one ({e})") from e
    return "\n".join([*lines, ""])


# Ways of scoring with --cache and --dynamic_eval: key in the metrics, and name.
ADAPTED = {
    "static": "static", "static_segments": "static, in the segments of dynamic evaluation", "cache": "+ cache",
    "dynamic": "+ dynamic evaluation", "dynamic_cache": "+ dynamic evaluation + cache",
}  # fmt: skip


def adapted(path: Path) -> str:
    """One run with `--eval` and `--cache` or `--dynamic_eval`: every way of scoring, and what it costs.

    Raises:
        BadResultError: a damaged file, or a run on part of the data, of synthetic data or uncommitted code, or whose
            command would not work elsewhere.
    """
    try:
        metrics = parsed(path)
        if metrics["corpus"] == "synthetic" or not metrics["commit"] or metrics["commit"].endswith("-dirty"):
            raise BadResultError(f"{path}: of synthetic data or uncommitted code")
        if not metrics["complete"]:
            raise BadResultError(f"{path}: of a part of the data")
        if re.search(r"(^|[ =])/", command := re.sub(r" --metrics \S+", "", metrics["command"])):
            raise BadResultError(f"{path}: the command names a path of one machine: {command}")
        score, _ = score_of(metrics["test_static"])
        digits = SCORES[score][1]
        lines = [
            f"## Cache and dynamic evaluation, {metrics['task']}, preset `{metrics['preset']}`",
            "",
            f"`{command}` on {metrics['machine']}, {_threads(metrics)}, {metrics['device']}, "
            f"{metrics['precision']}, torch {metrics['torch']}, commit `{metrics['commit']}`, {metrics['corpus']}; "
            f"{metrics['params']:,} parameters, seed {metrics['seed']}; {metrics['test_static']['tokens']:,} test "
            "tokens. Minutes and the peak of the process's memory are those of scoring the test data, after what was "
            "prepared and tuned once, on training and validation data.",
            "",
            f"| | valid {score} | test {score} | minutes | peak | prepared in | settings |",
            "|---|--:|--:|--:|--:|--:|---|",
        ]
        for key, name in ADAPTED.items():
            if f"test_{key}" not in metrics:
                continue
            valid, test = metrics[f"valid_{key}"], metrics[f"test_{key}"]
            peak = f"{test['peak_memory'] / 1e9:.2f} GB" if test["peak_memory"] else ""
            before = f"{valid['preparation_seconds'] / 60:.1f} min" if "preparation_seconds" in valid else ""
            settings = test.get("settings", {}).items()
            listed = ", ".join(f"{k} {v if isinstance(v, str) else format(v, 'g')}" for k, v in settings)
            scores = f"{valid[score]:.{digits}f} | {test[score]:.{digits}f}"
            lines.append(f"| {name} | {scores} | {test['seconds'] / 60:.1f} | {peak} | {before} | {listed} |")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration) as e:
        raise BadResultError(f"{path}: a file of another kind, or a damaged one ({e})") from e
    return "\n".join([*lines, ""])


def ranks(path: Path) -> str:
    """How far several ranks differ from one process, from what `scripts/compare_ranks.py --json` has written.

    Raises:
        BadResultError: a damaged file, or one of uncommitted code.
    """
    try:
        found = committed(path)
        command = re.sub(r" --json \S+", "", found["command"])
        lines = [
            "## Several ranks",
            "",
            f"`{command}` on {found['machine']}, torch {found['torch']}, commit `{found['commit']}`: tiny networks "
            f"without dropout, {found['steps']} updates. The largest difference from one process of losses, gradients, "
            "weights and scores, relative to the largest entry.",
            "",
            "| task | ranks | float32 | float64 |",
            "|---|--:|--:|--:|",
        ]
        rows: dict[tuple[str, int], dict[str, float]] = {}
        for r in found["records"]:
            worst = max(r[kind] for kind in ("losses", "gradients", "weights", "scores"))
            rows.setdefault((r["task"], r["ranks"]), {})[r["dtype"]] = worst
        for (task, size), worst in rows.items():
            lines.append(f"| {task} | {size} | {worst['float32']:.1e} | {worst['float64']:.1e} |")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise BadResultError(f"{path}: a file of another kind, or a damaged one ({e})") from e
    return "\n".join([*lines, ""])


def place(path: Path) -> tuple[int, str]:
    """Where the result in a metrics file belongs: by the order of its task in the paper, then by the names of its path.

    What cannot be read comes last; whoever needs its content says why.
    """
    try:
        return ORDER.index(parsed(path)["task"]), str(path)
    except (OSError, ValueError, KeyError, TypeError):
        return len(ORDER), str(path)


def is_result(folder: Path) -> bool:
    """Whether a folder holds the files of one run, whatever it is called."""
    return any((folder / name).is_file() for name in ("metrics.json", "metrics.jsonl", "config.json"))


def memory(folder: Path) -> str:
    """README's table of what fits in how much memory, from the metrics of runs of a few steps in results/memory/.

    Raises:
        BadResultError: a run on synthetic data or of uncommitted code, or a field is missing.
    """
    lines = ["<!-- memory: begin -->", "| command | parameters | peak |", "|---|--:|--:|"]
    for path in sorted(folder.glob("*.json"), key=place):
        try:
            metrics = parsed(path)
            if metrics["corpus"] == "synthetic" or not metrics["commit"] or metrics["commit"].endswith("-dirty"):
                raise BadResultError(f"{path}: of synthetic data or uncommitted code")
            command = HERE_ONLY.sub("", metrics["command"])
            lines.append(f"| `{command}` | {metrics['params']:,} | {metrics['peak_memory'] / 1e9:.1f} GB |")
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise BadResultError(f"{path}: {e}") from e
    return "\n".join([*lines, "<!-- memory: end -->"])


def speed(folder: Path) -> str:
    """README's table of speed, from what `scripts/bench.py --json` has written into results/speed/.

    Raises:
        BadResultError: a damaged file, or one of uncommitted code.
    """
    lines = ["<!-- speed: begin -->"]
    for path in sorted(folder.glob("*.json")):
        try:
            found = committed(path)
            command = re.sub(r" --json \S+", "", found["command"])
            if "--quick" in command or re.search(r"(^|[ =])/", command):
                raise BadResultError(f"{path}: of small networks, or the command names a path of one machine")
            variants = list(dict.fromkeys(r["variant"] for r in found["records"]))
            lines += [
                f"`{command}` on {found['machine']}, {_threads(found)}, torch {found['torch']}, "
                f"commit `{found['commit']}`; medians, in brackets the share of one large product's rate:",
                "",
                f"| task | | {' | '.join(variants)} |",
                f"|---|---|{'--:|' * len(variants)}",
            ]
            rows: dict[tuple[str, str], dict[str, str]] = {}
            for r in found["records"]:
                cells = rows.setdefault((r["task"], r["part"]), {})
                if "bytes" in r:
                    first = next(m for m in found["records"] if (m["task"], m["part"]) == (r["task"], r["part"]))
                    ratio = f", 1/{first['bytes'] / r['bytes']:.1f}" if cells else ""
                    cell = f"{r['bytes'] / 1e9:.2f} GB{ratio}"
                else:
                    ratio = f", **{r['ratio']:.2f}x**" if cells else ""
                    timed = r["part"] not in ("evaluation", "generation")  # else a rate
                    cell = f"{r['seconds']:.3g} s{ratio}" if timed else f"{r['per_second']:.3g} tokens/s{ratio}"
                    cell += f" ({r['share_of_peak']:.0%})" if "gflops" in r else ""
                cells[r["variant"]] = cell
            for (task, part), cells in rows.items():
                lines.append(f"| {task} | {part} | {' | '.join(cells.get(v, '') for v in variants)} |")
            lines.append("")
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise BadResultError(f"{path}: a file of another kind, or a damaged one ({e})") from e
    return "\n".join([*lines[: len(lines) - (lines[-1] == "")], "<!-- speed: end -->"])


def run(argv: Sequence[str]) -> int:
    """Parse, read, write or compare."""
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if a file is out of date")
    names = [*map(str, TABLES), *OTHER_TABLES, "compare"]
    parser.add_argument("--table", choices=names, help="print this table of the paper or a script, and write nothing")
    parser.add_argument("--root", type=Path, default=PROJECT, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.table:
        try:
            number = int(args.table) if args.table.isdigit() else args.table
            print(compared(args.root) if number == "compare" else table(number, args.root))
        except BadResultError as e:
            raise errors.UserError(str(e)) from e
        return 0
    everything = [path for path in (args.root / "results").glob("[!.]*") if path.is_dir()]
    folders, comparisons = [], []
    for path in sorted(everything, key=lambda path: place(path / "metrics.json")):
        if is_result(path):
            if (path / "metrics.json").is_file():
                folders.append(path)
            else:
                print(f"NOTICE: {path}: has no metrics.json, so it is left out", file=sys.stderr)
        elif path.name not in ("figures", "memory", "speed", "torture", "adapted"):
            comparisons.append(path)
    adaptations = sorted((args.root / "results" / "adapted").glob("*.json"), key=place)
    faults = sorted((args.root / "results" / "torture").glob("*.json"))
    readme = (args.root / "README.md").read_text(encoding="utf-8")
    try:
        readme = QUOTED.sub(lambda found: quoted(args.root / "results" / found[1]), readme)
        for block, write in ((MEMORY, memory), (SPEED, speed)):
            readme = block.sub(lambda _, w=write: w(args.root / "results" / w.__name__), readme)
        caveats = NOT_COMPARABLE.search(readme)
        contents = {
            "RESULTS.md": results(folders, comparisons, adaptations, faults, caveats[1] if caveats else ""),
            "README.md": readme,
        }
    except (BadResultError, OSError) as e:
        raise errors.UserError(str(e)) from e
    stale = []
    for name, content in contents.items():
        path = args.root / name
        if not path.exists() or path.read_text(encoding="utf-8") != content:
            stale.append(name)
            if not args.check:
                with atomic_write(path) as file:
                    file.write(content.encode())
    print(f"{'out of date' if args.check else 'written'}: {', '.join(stale)}" if stale else "up to date")
    return 1 if stale and args.check else 0


main = functools.partial(guarded, run)

if __name__ == "__main__":
    sys.exit(main())
