"""What every train.py does: settings, device, run folder, train or score, metrics file, exit code."""

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from trellisnet import ops, weights
from trellisnet.errors import RunError, UserError
from trellisnet.models import count_parameters
from trellisnet.training import checkpoint
from trellisnet.training.config import RunConfig, check_settings, flag_of, from_settings, parse
from trellisnet.training.engine import Splits, Task, evaluate, fit
from trellisnet.training.optim import Schedule
from trellisnet.training.runlog import (
    RunFolder,
    check_metrics_path,
    command_line,
    environment,
    write_metrics,
)

EXIT_OK, EXIT_FAILED, EXIT_USER = 0, 1, 2

# A task's setup: from settings and device to the task, its data, its learning-rate schedule, and facts to print.
Setup = Callable[[Any, torch.device], tuple[Task, Splits, Schedule, dict[str, Any]]]


def main(cls: type[RunConfig], setup: Setup, argv: Sequence[str] | None = None) -> int:
    """Run a task's program.

    Args:
        cls: the task's settings.
        setup: builds what is to be trained.
        argv: command-line arguments; None for those of the process.

    Returns:
        the exit code: 0 done; 2 the input is wrong; 1 the run failed; 130 or 143 interrupted. What is wrong is one
        line on standard error.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        with _signals():
            _run(cls, setup, argv)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return EXIT_USER
    except RunError as e:
        print(f"failed: {e}", file=sys.stderr)
        return EXIT_FAILED
    except _Interrupted as e:
        print("interrupted; the same command with --resume goes on from the last checkpoint", file=sys.stderr)
        return 128 + e.signum
    return EXIT_OK


class _Interrupted(BaseException):
    def __init__(self, signum: int):
        self.signum = signum


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into :class:`_Interrupted`. Only the main thread can; elsewhere nothing changes."""

    def interrupt(signum, _frame):
        raise _Interrupted(signum)

    main_thread = threading.current_thread() is threading.main_thread()
    signals = (signal.SIGINT, signal.SIGTERM) if main_thread else ()
    before = {signum: signal.signal(signum, interrupt) for signum in signals}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _run(cls: type[RunConfig], setup: Setup, argv: list[str]) -> None:
    started = time.monotonic()
    config, given = parse(cls, argv)
    resumed = None
    if config.resume:
        config, resumed = _resume(cls, config, given)
    if config.metrics:
        check_metrics_path(config.metrics)
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    device = config.torch_device()
    task, splits, schedule, facts = setup(config, device)
    if config.load_weight and resumed is None:
        weights.load_weights(task.model, config.load_weight)

    facts = {"parameters": count_parameters(task.model), **facts}
    env = environment(device) | {"backend": ops.resolve(config.backend), "precision": "fp32"}
    shown = ", ".join(f"{value:,} {key}" for key, value in facts.items() if isinstance(value, int))
    print(f"{splits.label}: {shown}; {env['device']} ({env['machine']}), {env['threads']} threads")
    command = command_line(f"{config.task}/train.py", argv)
    metrics = {
        "task": config.task, "preset": config.preset, "command": command, "version": env["version"],
        "commit": env["commit"], "params": facts["parameters"], "data": splits.sha256, "corpus": splits.label,
    }  # fmt: skip
    if config.eval:
        if not config.load_weight:
            print("NOTICE: no --load_weight: scoring untrained weights")
        metrics |= _score(task, splits, config)
    else:
        folder = RunFolder(config.folder(), fresh=resumed is None, overwrite=config.overwrite)
        print(f"run folder: {folder.path}")
        try:
            if resumed is None:
                folder.write_config(config, {"data": splits.sha256, "corpus": splits.label})
            folder.log_head(command, env, {**facts, "data": f"{splits.label}, sha256 {splits.sha256}"})
            result = fit(task, splits, config, folder, schedule, weights.save_weights, resume_from=resumed)
        finally:
            folder.close()
        metrics |= vars(result)
    metrics |= {key: env[key] for key in ("device", "machine", "threads", "precision", "backend")}
    metrics |= {"seed": config.seed, "torch": env["torch"]}
    if config.eval:
        metrics["seconds"] = time.monotonic() - started
    if config.metrics:
        write_metrics(config.metrics, metrics)


def _resume(cls: type[RunConfig], config: RunConfig, given: dict[str, Any]) -> tuple[RunConfig, dict[str, Any]]:
    """Settings and content of the checkpoint to continue; given flags must agree with it.

    Raises:
        UserError: no checkpoint, or a flag that would change what the run computes.
    """
    typed = Path(config.resume)
    path = config.folder() / "last.pt" if config.resume == "last.pt" and not typed.is_file() else typed
    content = checkpoint.load(path)
    settings = check_settings(cls, content["settings"], f"{path}")
    for name, value in given.items():
        if name not in cls.resumable and value != settings[name]:
            raise UserError(
                f"{flag_of(cls, name)} {value}: the run in {path.parent} was started with {settings[name]}, and a "
                "continued run keeps its settings: leave the flag out, or start a new run with another --out"
            )
    changed = {name: value for name, value in given.items() if name in cls.resumable - {"preset", "config"}}
    settings = {**settings, "eval": False, "overwrite": False, **changed, "out": str(path.parent)}
    return from_settings(cls, settings), content


def _score(task: Task, splits: Splits, config: RunConfig) -> dict[str, Any]:
    """Score validation and test data with the weights as they are."""
    results = {}
    for name in ("valid", "test"):
        result = results[name] = evaluate(task, getattr(splits, name), name, config)
        score = task.score_name
        print(f"{name} {score} {result[score]:.2f}  loss {result['loss']:.4f} nats  {result['tokens']:,} tokens")
    return {**results, "epochs": 0, "steps": 0, "best_epoch": None, "complete": not config.max_eval_tokens}
