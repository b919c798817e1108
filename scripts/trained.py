"""Loading a trained language model, from the folder of a run or from a task's flags and a file of weights.

    --run runs/word_ptb/small                                 its config.json and weights.pkl
    --run word_ptb_small                                      those of a shipped model
    --task word_ptb --preset small --load_weight weights.pkl  any flags of word_ptb/train.py

Either may be followed by flags of the task's train.py for the data and the machine: `--data`, `--device`, `--threads`,
`--precision`. The vocabulary is that beside the weights; weights without one take it from the data.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from trellisnet import weights
from trellisnet.data.corpus import Corpus
from trellisnet.data.vocabulary import FILE, Vocabulary
from trellisnet.errors import NAME, UserError, shown
from trellisnet.evaluation.pretrained import Pretrained, read_vocabulary, restore, without_emulation
from trellisnet.training import programs
from trellisnet.training.config import find_run, parse, read_run_config
from trellisnet.training.language_model import LanguageModelConfig, LanguageModelProgram

PROGRAMS = {task: programs.get(task) for task in programs.TASKS}
PROGRAMS = {task: program for task, program in PROGRAMS.items() if isinstance(program, LanguageModelProgram)}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that :func:`load` reads."""
    parser.add_argument("--run", help="folder of a run, or name of a shipped model")
    parser.add_argument(
        "--task",
        choices=list(PROGRAMS),
        help="instead of --run: a task, with --load_weight FILE and flags of its train.py",
    )


def load(args: argparse.Namespace, flags: Sequence[str]) -> Pretrained:
    """Load the model that the command line names; its data are needed if its weights have no vocabulary beside them.

    Args:
        args: has the flags of :func:`add_flags`.
        flags: flags of the task's train.py.

    Raises:
        UserError: there is no such model, or nothing to take its vocabulary from.
        RunError: fetched data could not be written.
    """
    config = _settings(args, flags)
    file = weights.locate(config.load_weight)
    if Path(file).with_name(FILE).is_file():
        with config.in_flags():
            return restore(config, read_vocabulary(file))
    model, _ = _with_data(config)
    return model


def load_with_data(args: argparse.Namespace, flags: Sequence[str]) -> tuple[Pretrained, Corpus]:
    """:func:`load`, and the model's data."""
    return _with_data(_settings(args, flags))


def _settings(args: argparse.Namespace, flags: Sequence[str]) -> LanguageModelConfig:
    task, run = args.task, []
    if args.run:
        task, run = read_run_config(find_run(args.run))["task"], ["--run", args.run]
        if args.task not in (None, task):
            raise UserError(f"--task {args.task}: {args.run} is a run of {shown(task, NAME)}; leave one of the two out")
        if task not in PROGRAMS:
            expected = f"expected a language model: {', '.join(PROGRAMS)}"
            raise UserError(f"{args.run}: is a run of {shown(task, NAME)}; {expected}")
    elif task is None:
        raise UserError(
            "no model: pass --run FOLDER, or --task and --load_weight FILE with the flags it was trained with"
        )
    config, _ = parse(PROGRAMS[task].config_class, [*run, *flags, "--eval"])
    if not config.load_weight:
        raise UserError(f"no weights: pass --load_weight FILE, or the folder of a run with --run (task {task})")
    if not any(flag.startswith("--precision") for flag in flags):
        config = without_emulation(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    return config


def _with_data(config: LanguageModelConfig) -> tuple[Pretrained, Corpus]:
    # Data are fetched into the project's own folder only, never into one that the user names.
    download = config.download and not config.data
    corpus = PROGRAMS[config.task].load(config.data_folder(), download=download, **config.data_options())
    for notice in corpus.notices:
        print(notice, file=sys.stderr)
    with config.in_flags():
        return restore(config, Vocabulary(corpus.vocabulary, config.spelling), corpus.changed), corpus
