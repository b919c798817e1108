"""Train the five tasks on one rank and on several, and compare losses, gradients, weights and scores.

    python scripts/compare_ranks.py                 1, 2 and 4 ranks: some minutes
    python scripts/compare_ranks.py --ranks 1 3

Each rank is a process on this machine. Tiny networks without dropout make five updates each on generated data. All
numbers must agree with those of a single process, relative to the largest of their kind: to 1e-6 in float32 and to
1e-12 in float64.
"""

import argparse
import functools
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main takes signals: no traceback from an import

import torch
from torch import Tensor

from scripts.common import check_bounds, origin
from trellisnet.errors import RunError, counted
from trellisnet.training import programs
from trellisnet.training.cli import guarded
from trellisnet.training.config import Parser, parse
from trellisnet.training.distributed import Ranks
from trellisnet.training.engine import Trainer
from trellisnet.training.optim import make_optimizer
from trellisnet.training.runlog import NoFolder, check_json_path, write_json
from trellisnet.training.scoring import evaluate

STEPS = 5
BOUNDS = {"float32": 1e-6, "float64": 1e-12}
OFF = "--dropout 0 --dropouti 0 --dropouth 0 --wdrop 0 --data synthetic --nhid 6 --max_eval_tokens 1500".split()
TEXT = """--emsize 8 --nout 8 --nlevels 4 --horizon 6 --batch_size 12 --emb_dropout 0 --dropoutl 0 --aux 0.1
--aux_freq 2 --alpha 2 --beta 1 --lr 1 --optim SGD --clip 0.25 --mc_dropout 2 --eval_all""".split()
DOUBLE = "--gemm mm --gates eager".split()  # these can compute in float64
CARRIED = "--repack --seq_len 0".split()
IMAGES = "--nlevels 6 --batch_size 12 --optim SGD --lr 0.5 --no-validation".split()
CASES = {
    "word_ptb": [*TEXT, *"--no-repack --seq_len 20 --horizon auto --random_depth 1 --eval_depths 2 6".split()],
    "word_ptb, carried, mixture, 2 slices": [*TEXT, *CARRIED, *"--n_experts 3 --accumulate 2".split()],
    "word_ptb, AWD-LSTM": [*TEXT, *CARRIED, *"--model awd-lstm --aux 0 --nlevels 2".split()],
    "char_ptb": [*TEXT, *CARRIED, "--eval_batch_size", "1"],
    "wt103": [*TEXT, *CARRIED, *"--cutoffs 20 50 --eval_batch_size 3".split()],
    "pmnist": [*IMAGES, "--mc_dropout", "2"],
    "cifar10": [*IMAGES, *"--accumulate 2 --augment --label_smoothing 0.1".split()],
}


def train(case: str, dtype: torch.dtype, ranks: Ranks) -> dict[str, Any]:
    """Make some updates; return losses and gradients by step, final weights, and scores of the test data."""
    program = programs.get(case.split(",")[0])
    config, _ = parse(program.config_class, [*OFF, *CASES[case], *(DOUBLE if dtype is torch.float64 else [])])
    config = config.resolved(torch.device("cpu"))
    ranks.check_rows(config.batch_size)
    torch.manual_seed(config.seed)
    task, splits, schedule, facts = program.setup(config, torch.device("cpu"), ranks)
    task.model.to(dtype)
    if "pixels" in facts:
        rows = (STEPS - 1) * config.batch_size + 3  # the last batch has three rows: with four ranks one has none
        splits = replace(splits, train=tuple(part[:rows] for part in splits.train), test=_few(splits.test))
        extra = {key: (method, _few(data)) for key, (method, data) in splits.extra_evaluations.items()}
        splits = replace(splits, extra_evaluations=extra)
        task.prepare = functools.partial(_prepared, task.prepare, dtype)
    optimizer = make_optimizer(task.model.parameters(), config)
    args = (task, splits, config, NoFolder(Path()), optimizer, schedule, _nothing)
    trainer, found = Trainer(*args, say=_nothing, ranks=ranks), {}
    batches = task.batches(splits.train, 0)
    task.model.train()
    for step in range(STEPS):
        trainer.set_depth(step)
        means = trainer._step(batches[step])
        losses = zip(means, ranks.sum(*map(float, means.values())), strict=True)
        found |= {f"losses {step} {key}": _numbers({key: value}) for key, value in losses}
        found[f"gradients {step}"] = {name: p.grad.clone() for name, p in task.model.named_parameters()}
    found["weights"] = {name: p.detach().clone() for name, p in task.model.named_parameters()}
    evaluations = {"test": (task.evaluate, splits.test), **splits.extra_evaluations}
    for name, (method, data) in evaluations.items():
        result = evaluate(task, data, name, config, method, ranks)
        found |= {f"scores {name} {key}": _numbers({key: value}) for key, value in result.items()}
    return found


def _numbers(values: dict[str, float]) -> dict[str, Tensor]:
    return {key: torch.tensor(value, dtype=torch.float64) for key, value in values.items()}


def _few(data: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return tuple(part[:150] for part in data)


def _prepared(prepare: Callable[[Tensor], Tensor], dtype: torch.dtype, pixels: Tensor) -> Tensor:
    return prepare(pixels).to(dtype)


def _nothing(*_: Any) -> None:
    """Neither print nor save anything."""


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """Largest difference of losses, gradients, weights and scores, each relative to its largest entry.

    All gradients of a step count as one vector, and so do the weights: where the terms of a small gradient cancel, the
    single process is no more exact.
    """
    found = dict.fromkeys(("losses", "gradients", "weights", "scores"), 0.0)
    for name, tensors in ours.items():
        pairs = [(a, theirs[name][key]) for key, a in tensors.items()]
        largest = max(b.abs().max().item() for _, b in pairs)
        difference = max((a - b).abs().max().item() for a, b in pairs)
        kind = name.split()[0]
        found[kind] = max(found[kind], difference / largest if largest else difference)
    return found


def worker(path: Path, cases: Iterable[str]) -> None:
    """Run all cases on this rank; the first rank writes the results."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    ranks = Ranks.of_environment()
    ranks.join()
    found = {kind: {case: train(case, getattr(torch, kind), ranks) for case in cases} for kind in BOUNDS}
    if ranks.first:
        torch.save(found, path)
    ranks.leave()


def launch(size: int, path: Path, cases: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Start `size` ranks with torchrun; dtype → case → result of :func:`train`.

    Raises:
        RunError: a rank failed.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(size), __file__]
    if code := subprocess.run([*command, "--worker", str(path), "--cases", *cases], check=False).returncode:
        raise RunError(f"{counted(size, 'ranks')} could not train (exit code {code} of torchrun)")
    return torch.load(path, weights_only=True)


def run(argv: Sequence[str]) -> int:
    """Parse, train, compare, write."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of ranks (default: 1 2 4)")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="(default: all)")
    parser.add_argument("--json", help="also write the findings to this file")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        worker(args.worker, args.cases)
        return 0
    check_bounds(args, ranks=1)
    if args.json:
        check_json_path(args.json, "--json", ("command", "records"))
    records, failed = [], False
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # about images longer than the receptive field
    alone = {kind: {case: train(case, getattr(torch, kind), Ranks()) for case in args.cases} for kind in BOUNDS}
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        for size in args.ranks:
            found = launch(size, Path(folder) / f"{size}.pt", args.cases)
            for kind, bound in BOUNDS.items():
                for case in args.cases:
                    differ = differences(found[kind][case], alone[kind][case])
                    records.append({"task": case, "ranks": size, "dtype": kind, **differ})
                    wrong = max(differ.values()) > bound
                    failed |= wrong
                    shown = ", ".join(f"{name} {value:.1e}" for name, value in differ.items())
                    print(f"{case}, {size} ranks, {kind}: {shown}{'  TOO MUCH' if wrong else ''}", flush=True)
    if args.json:
        head = origin("scripts/compare_ranks.py", argv, torch.device("cpu"))
        write_json(args.json, "--json", {**head, "steps": STEPS, "records": records})
    return int(failed)


main = functools.partial(guarded, run)

if __name__ == "__main__":
    sys.exit(main())
