"""Loading a trained language model, from the folder of a run or from a task's flags and a file of weights.

    --run runs/word_ptb/small                                 its config.json and weights.pkl
    --task word_ptb --preset small --load_weight weights.pkl  any flags of word_ptb/train.py

Either may be followed by flags of the task's train.py for the data and the machine: `--data`, `--device`, `--threads`,
`--precision`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from scripts.reports.records import read_json
from trellisnet import weights
from trellisnet.data.corpus import Corpus
from trellisnet.errors import UserError
from trellisnet.models import TrellisLanguageModel
from trellisnet.training import programs
from trellisnet.training.config import parse
from trellisnet.training.language_model import LanguageModelConfig, LanguageModelProgram

PROGRAMS = {task: programs.get(task) for task in programs.TASKS}
PROGRAMS = {task: program for task, program in PROGRAMS.items() if isinstance(program, LanguageModelProgram)}
# A run's choices for its own machine are made again for this one.
HERE = "--backend auto --gemm auto --gates auto --threads 0 --device auto".split()


class Trained(NamedTuple):
    """A model in evaluation mode, with its settings and data."""

    config: LanguageModelConfig
    model: TrellisLanguageModel
    corpus: Corpus
    device: torch.device


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that :func:`load` reads."""
    parser.add_argument("--run", help="folder of a run: its config.json and weights.pkl")
    parser.add_argument(
        "--task",
        choices=list(PROGRAMS),
        help="instead of --run: a task, with --load_weight FILE and flags of its train.py",
    )


def read_config(folder: Path) -> dict[str, Any]:
    """Read the config.json of a run.

    Raises:
        UserError: it is missing or not one of a run.
    """
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"{path}: no such file; name the folder of a run")
    content = read_json(path)
    if not isinstance(content, dict) or not (
        isinstance(content.get("task"), str) and isinstance(content.get("settings"), dict)
    ):
        raise UserError(f"{path}: names no task and settings; expected the config.json of a run")
    return content


def load(args: argparse.Namespace, flags: Sequence[str]) -> Trained:
    """Load the model that the command line names.

    Args:
        args: has the flags of :func:`add_flags`.
        flags: flags of the task's train.py.

    Raises:
        UserError: there is no such model, or no data to take its vocabulary from.
        RunError: fetched data could not be written.
    """
    task, given = args.task, []
    if args.run:
        folder = Path(args.run)
        task = read_config(folder)["task"]
        if args.task not in (None, task):
            raise UserError(f"--task {args.task}: {folder} is a run of {task}; leave one of the two out")
        if task not in PROGRAMS:
            raise UserError(f"{folder}: is a run of {task}; expected a language model: {', '.join(PROGRAMS)}")
        given = ["--config", str(folder / "config.json"), "--load_weight", str(folder / "weights.pkl"), *HERE]
    elif task is None:
        raise UserError(
            "no model: pass --run FOLDER, or --task and --load_weight FILE with the flags it was trained with"
        )
    program = PROGRAMS[task]
    config, _ = parse(program.config_class, [*given, *flags, "--eval"])
    if not config.load_weight:
        raise UserError(f"no weights: pass --load_weight FILE, or the folder of a run with --run (task {task})")
    device = config.torch_device()
    if config.threads:
        torch.set_num_threads(config.threads)
    config = config.resolved(device)
    # Data are fetched into the project's own folder only, never into one that the user names.
    corpus = program.load(config.data_folder(), download=config.download and not config.data, **config.data_options())
    for notice in corpus.notices:
        print(notice, file=sys.stderr)
    model = program.build_model(config, len(corpus.vocabulary)).to(device).eval()
    options = {"vocabulary": corpus.vocabulary_sha256, "changed": corpus.changed, "task": config.task}
    options |= config.load_options()
    with config.in_flags():
        weights.load_weights(model, config.load_weight, **options)
    return Trained(config, model, corpus, device)
