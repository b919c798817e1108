"""Export a run's weights to a small file, to be kept in results/ and used with --load_weight.

    python scripts/export.py runs/word_ptb/small results/my_words

The second folder receives:

    weights.pkl     the weights in the authors' layout, rounded to float16; a model in float32 loads them as they are
    config.json     the settings of the run, without those that belong to one machine, and with the depth that
                    validates best in place of `--eval_nlevels auto`
    weights.json    checksum and scores of the file, measured after rounding, on all of the data and on their beginning
    vocabulary.json of a language model: its words or symbols with their ids
    log.txt, metrics.jsonl, metrics.json    if the run's folder has them

An earlier export there stays intact until the new one is complete. Further flags, such as `--data`, `--device` and
`--eval_batch_size`, go to the task's train.py. `--vocabulary` alone writes vocabulary.json into a folder that lacks it,
from the data of its run:

    python scripts/export.py --vocabulary results/my_words
"""

import argparse
import functools
import hashlib
import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main takes signals: no traceback from an import

import torch

from scripts import trained
from scripts.reports.records import read_events, refusing
from trellisnet import weights
from trellisnet.data import vocabulary
from trellisnet.errors import RunError, UserError, counted
from trellisnet.serialization import atomic_folder, atomic_write
from trellisnet.training import programs
from trellisnet.training.cli import guarded
from trellisnet.training.config import AUTOMATIC, PROJECT, Parser, check_settings, read_run_config

PARTIAL = {"tokens": 5000, "examples": 256}  # size of the quick score
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
LARGEST = 10  # MB
WRITTEN = ("weights.pkl", "config.json", "weights.json", vocabulary.FILE)
CARD = "README.md"  # by scripts/collect.py
COPIED = ("log.txt", "metrics.jsonl", "metrics.json")
# Keys of a run's config.json that describe its machine.
OF_THE_MACHINE = ("command", "device", "threads")


def portable(config: dict[str, Any]) -> dict[str, Any]:
    """A run's config.json without traces of its machine; folders of data are relative to the project."""
    settings = config["settings"] | AUTOMATIC | {"load_weight": "", "max_eval_tokens": 0}
    data = Path(settings.get("data", "")).absolute()
    if settings.get("data", "") not in ("", "synthetic") and data.is_relative_to(PROJECT):
        default = PROJECT / programs.get(config["task"]).config_class.default_data
        settings["data"] = "" if data == default else data.relative_to(PROJECT).as_posix()
    rest = {key: value for key, value in config.items() if key not in OF_THE_MACHINE}
    return {**rest, "settings": settings}


def at_chosen_depth(config: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    """A config.json in which the depth of the scores `measured` replaces `--eval_nlevels auto` and its candidates."""
    if config["settings"].get("eval_nlevels") != -1:
        return config
    chosen = {"eval_nlevels": measured["test"]["nlevels"], "eval_depths": []}
    return {**config, "settings": config["settings"] | chosen}


def score(task: str, folder: Path, flags: Sequence[str], limit: int = 0) -> dict[str, Any]:
    """Score the weights in a folder with `--eval`; return the content of its metrics file.

    Raises:
        RunError: train.py failed, with its reason on standard error.
        SystemExit: a signal ended the evaluation.
    """
    with tempfile.TemporaryDirectory() as temporary:
        metrics = Path(temporary) / "metrics.json"
        command = ["--run", folder, "--eval", *flags, "--max_eval_tokens", limit, "--metrics", metrics]
        code = programs.get(task).main([str(part) for part in command])
        if code > 128:
            raise SystemExit(code)
        if code:
            raise RunError(f"the weights could not be scored (exit code {code})")
        return json.loads(metrics.read_text())


def before(run: Path) -> dict[str, Any] | None:
    """Scores of a finished run; None without them, or if it was continued later.

    Raises:
        UserError: its metrics.jsonl is corrupt.
    """
    path = run / "metrics.jsonl"
    events = read_events(path) if path.is_file() else []
    with refusing(path):
        last = next((r for r in reversed(events) if r["event"] in ("epoch", "result")), None)
        return {key: last[key] for key in ("valid", "test")} if last and last["event"] == "result" else None


def write(path: Path, content: dict[str, Any]) -> None:
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def copy(run: Path, out: Path, new: Path, overwrite: bool) -> None:
    """Check that `out` is free or an export of the same run, and copy the files of its results into `new`.

    Raises:
        UserError: a file there would be replaced, or there is nothing to export.
    """
    if not (run / "weights.pkl").is_file():
        raise UserError(f"{run}: has no weights.pkl, which a run writes at the end of its first epoch")
    if out.resolve() == run.resolve():
        raise UserError(f"{out}: is the folder of the run itself; name another, such as results/NAME")
    there = {path.name for path in out.iterdir()} if out.exists() else set()
    if foreign := sorted(there - {*WRITTEN, *COPIED, CARD}):
        raise UserError(f"{out}: holds {foreign[0]}, which no export wrote; name another folder")
    present = {name for name in COPIED if (run / name).is_file()}
    other = [name for name in sorted(present & there) if (out / name).read_bytes() != (run / name).read_bytes()]
    if (replaced := [*other, *(name for name in WRITTEN if name in there)]) and not overwrite:
        raise UserError(f"{out}: holds {replaced[0]} of another export or run; name another folder or pass --overwrite")
    # An earlier export of the run, with the same log or metrics, may hold files that its folder lacks.
    same = bool(present & there) and not other
    sources = {name: out for name in there.intersection(COPIED) if same} | dict.fromkeys(present, run)
    sources |= {CARD: out} if CARD in there else {}  # of which scripts/collect.py writes one block anew
    for name, source in sources.items():
        shutil.copyfile(source / name, new / name)


def run(argv: Sequence[str]) -> None:
    """Parse, round, score, write."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("out", type=Path, nargs="?", help="folder to write, such as results/NAME")
    parser.add_argument(
        "--vocabulary", action="store_true", help="only write vocabulary.json into the folder of the run"
    )
    parser.add_argument("--dtype", choices=list(DTYPES), default="float16", help="(default: float16)")
    parser.add_argument("--max_mb", type=float, default=LARGEST, help=f"refuse a larger file (default: {LARGEST})")
    parser.add_argument("--partial", type=int, default=0, help="tokens or images of the quick score")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    args, flags = parser.parse_known_args(argv)
    config = read_run_config(args.run)
    if config["task"] not in programs.TASKS:
        raise UserError(f"{args.run}: is a run of {config['task']}; expected one of {', '.join(programs.TASKS)}")
    if args.vocabulary:
        add_vocabulary(args.run, config["task"], flags)
        return
    if (out := args.out) is None:
        parser.error("the following arguments are required: out")
    check_settings(programs.get(config["task"]).config_class, config["settings"], str(args.run / "config.json"))
    with atomic_folder(out) as new:
        size = fill(new, config, args, flags)
    if not (out / "metrics.json").is_file():
        print(
            f"NOTICE: {args.run} has no metrics.json: copy the one that --metrics wrote to {out}",
            file=sys.stderr,
        )
    print(f"{out / 'weights.pkl'}: {size / 1e6:.2f} MB, {args.dtype}; scores in {out / 'weights.json'}")


def vocabulary_of(run: Path, flags: Sequence[str]) -> vocabulary.Vocabulary:
    """The vocabulary of a language model: that in its folder, else that of its data."""
    flags = [*flags, "--eval_nlevels", "0"]  # any depth will do, and there is none to choose
    return trained.load(argparse.Namespace(run=str(run), task=None), flags).vocabulary


def add_vocabulary(run: Path, task: str, flags: Sequence[str]) -> None:
    """Write vocabulary.json into a folder; it must be that of the weights there.

    Raises:
        UserError: no language model, no data, or data of another run.
    """
    if task not in trained.PROGRAMS:
        raise UserError(f"{run}: is a run of {task}, which has no vocabulary")
    made = vocabulary_of(run, flags)
    made.save(run / vocabulary.FILE)
    print(f"{run / vocabulary.FILE}: {counted(len(made), made.spelling.noun)}")


def fill(new: Path, config: dict[str, Any], args: argparse.Namespace, flags: Sequence[str]) -> int:
    """Write all files of an export into an empty folder; return the size of its weights in bytes."""
    task, small = config["task"], new / "weights.pkl"
    copy(args.run, args.out, new, args.overwrite)
    weights.round_weights(args.run / "weights.pkl", small, DTYPES[args.dtype])
    if (size := small.stat().st_size) > args.max_mb * 1e6:
        raise UserError(f"{args.run}: its weights take {size / 1e6:.1f} MB in {args.dtype}; see --max_mb")
    config = portable(config)
    write(new / "config.json", config)
    if task in trained.PROGRAMS:
        vocabulary_of(args.run, flags).save(new / vocabulary.FILE)
    measured = score(task, new, flags)
    write(new / "config.json", at_chosen_depth(config, measured))
    limit = args.partial or next(PARTIAL[count] for count in PARTIAL if count in measured["test"])
    short = score(task, new, flags, limit)
    splits = ("valid", "test")
    write(
        new / "weights.json",
        {
            "task": task, "preset": measured["preset"], "params": measured["params"], "dtype": args.dtype,
            "bytes": size, "sha256": hashlib.sha256(small.read_bytes()).hexdigest(),
            "corpus": measured["corpus"], "data": measured["data"],
            **{split: measured[split] for split in splits}, "before_rounding": before(args.run),
            "partial": {"max_eval_tokens": limit, **{split: short[split] for split in splits}},
            "precision": measured["precision"], "backend": measured["backend"],
            "machine": measured["machine"], "torch": measured["torch"], "commit": measured["commit"],
        },
    )  # fmt: skip
    return size


main = functools.partial(guarded, run)

if __name__ == "__main__":
    sys.exit(main())
