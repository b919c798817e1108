"""The program behind every train.py: settings, device, run folder, training or scoring, metrics file, exit code."""

import contextlib
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from trellisnet import console, serialization, weights
from trellisnet.data import vocabulary
from trellisnet.errors import LINE, NAME, RunError, UserError, counted, from_system, shown
from trellisnet.models import count_parameters
from trellisnet.training import checkpoint
from trellisnet.training.config import PROJECT, RUN_FOLDER, RunConfig, check_settings, from_settings, parse
from trellisnet.training.distributed import LostError, Ranks
from trellisnet.training.engine import Result, Trainer
from trellisnet.training.interrupts import Interrupted, Interrupts
from trellisnet.training.optim import Schedule, make_optimizer
from trellisnet.training.rehearsal import rehearse
from trellisnet.training.reporting import score_line
from trellisnet.training.runlog import (
    NoFolder,
    RunFolder,
    alone,
    busy,
    check_metrics_path,
    command_line,
    depth_of_best,
    environment,
    peak_memory,
    runnable,
    software,
    write_json,
)
from trellisnet.training.scoring import evaluate, set_depth
from trellisnet.training.settings import flag_of, properties_of
from trellisnet.training.tasks import Splits, Task

OURS = (PROJECT, Path(weights.__file__).parent)  # where our warnings come from
CHOICES = ("precision", "backend", "gemm", "gates", "cuda_graph")  # settings that records keep of how a run computes
CHECKPOINTS = ("last.pt", "last.previous.pt", "best.pt")  # with any of them --resume continues a run
EXIT_OK, EXIT_FAILED, EXIT_USER = 0, 1, 2

# A task's setup: from settings, device and ranks to the task, its data, its learning-rate schedule, and facts to print.
Setup = Callable[[Any, torch.device, Ranks], tuple[Task, Splits, Schedule, dict[str, Any]]]


@console.lenient()
def main(cls: type[RunConfig], setup: Setup, argv: Sequence[str] | None = None) -> int:
    """Run a task's program.

    Args:
        cls: the task's settings.
        setup: builds the task.
        argv: command-line arguments; None for those of the process.

    Returns:
        the exit code: 0 done; 2 the input is wrong; 1 the run failed; 129, 130 or 143 interrupted. An error is one line
        on standard error, printed by one rank; all ranks return the same code unless some have died.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    ranks = Ranks.of_environment()
    program = _Program(cls, setup, ranks)
    line, code, agreed = None, EXIT_OK, True  # agreed: all ranks end like this
    try:
        with _silenced(ranks), Interrupts() as interrupts, plain_warnings(), program.stack:
            ranks.join()
            with ranks.watched():
                program.run(argv, interrupts)
    except (UserError, RunError) as e:
        (line, code), agreed = _verdict(e, program.way_on()), not isinstance(e, LostError)
    except OSError as e:
        (line, code), agreed = _verdict(from_system(e, program.folder), program.way_on()), False
    except (MemoryError, RuntimeError) as e:
        if not is_out_of_memory(e):
            raise
        line = f"failed: out of memory; lower --batch_size or the sizes; {program.way_on()}"
        code, agreed = EXIT_FAILED, False
    except Interrupted as e:
        line, code = f"interrupted; {program.way_on()}{program.way_out()}", 128 + e.signum
    except SystemExit as e:  # --help
        code = e.code or EXIT_OK
    if line is not None and (ranks.first if agreed else ranks.claims()):
        print(line, file=sys.stderr)
    if agreed:
        ranks.leave()
    return code


@console.lenient()
def guarded(function: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Run the program of a script, which has no run folder.

    Args:
        function: from command-line arguments to the exit code; None: 0.
        argv: the arguments; None for those of the process.

    Returns:
        the exit code, as :func:`main` does.
    """
    try:
        with Interrupts(), plain_warnings():
            code = function(sys.argv[1:] if argv is None else list(argv)) or EXIT_OK
        sys.stdout.flush()
        # The output may be the only result, so a failed write is a failure; but a reader may stop early.
        return code if isinstance(sys.stdout.error, BrokenPipeError | None) else EXIT_FAILED
    except (UserError, RunError, OSError) as e:
        line, code = _verdict(from_system(e) if isinstance(e, OSError) else e)
    except (MemoryError, RuntimeError) as e:
        if not is_out_of_memory(e):
            raise
        line, code = "failed: out of memory; ask for less at once, or pass another --device", EXIT_FAILED
    except Interrupted as e:
        line, code = "interrupted", 128 + e.signum
    except SystemExit as e:  # --help
        return e.code or EXIT_OK
    print(line, file=sys.stderr)
    return code


def _verdict(e: UserError | RunError, way_on: str = "") -> tuple[str, int]:
    """The message for an error, and the exit code; `way_on`, which says how to continue, is added to a failure."""
    if isinstance(e, UserError):
        return f"error: {e}", EXIT_USER
    return "; ".join(filter(None, (f"failed: {e}", way_on))), EXIT_FAILED


def is_out_of_memory(e: Exception) -> bool:
    """Return whether an error reports a lack of memory; for the CPU's, torch raises a plain RuntimeError."""
    return isinstance(e, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(e)


@contextlib.contextmanager
def _silenced(ranks: Ranks) -> Iterator[None]:
    """Discard the output of all ranks but the first."""
    if ranks.first:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


@contextlib.contextmanager
def plain_warnings() -> Iterator[None]:
    """Show our own warnings as one line, without file and line number."""
    with warnings.catch_warnings():
        # DistributedDataParallel warns of strides that differ only in dimensions of size 1.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        show = warnings.showwarning

        def plain(message, category, filename, *rest, **options):
            # Warnings of our own classes may arise in a call from torch.
            ours = category is UserWarning and any(map(Path(filename).is_relative_to, OURS))
            if ours or category.__module__.startswith("trellisnet."):
                print(f"warning: {shown(message, LINE)}", file=sys.stderr)
            else:
                show(message, category, filename, *rest, **options)

        warnings.showwarning = plain
        yield


def _say(line: str) -> None:
    """Print a line, clear of the progress bar."""
    tqdm.write(shown(line, LINE))
    sys.stdout.flush()


class _Program:
    """One call of a train.py."""

    def __init__(self, cls: type[RunConfig], setup: Setup, ranks: Ranks):
        self.cls = cls
        self.setup = setup
        self.ranks = ranks
        self.folder: Path | None = None  # of the run, once there is one
        self.replaced = self.stoppable = False  # the run has replaced another one; --max_steps may end it
        self.unfinished, self.scored = "", ""  # the evaluation that ended the scoring; where the scores before are
        self.stack = contextlib.ExitStack()  # holds the lock of the run folder

    def way_on(self) -> str:
        """Name the checkpoint that is left, and the command that continues from it."""
        if self.scored:
            return f"{self.unfinished} was not finished; the scores before it are {self.scored}"
        if self.folder is None:
            return "nothing was written"
        if not self.folder.is_dir():
            return "there is nothing left to continue from"
        if not any((self.folder / name).is_file() for name in CHECKPOINTS):
            deleted = ", and the earlier run is deleted (--overwrite)" * self.replaced
            return f"no checkpoint had been written yet{deleted}"
        resume = ["--resume", str(self.folder / "last.pt")]
        command = runnable(self.cls.program(), resume, self.ranks.launcher())
        return f"the last checkpoint is kept; continue with: {shown(command)}"

    def way_out(self) -> str:
        """Advice on getting the weights of a run that was stopped in its first epoch, or ""."""
        if not self.stoppable or not (self.folder / "last.pt").is_file() or (self.folder / weights.FILE).exists():
            return ""
        resume = ["--resume", str(self.folder / "last.pt"), "--max_steps", "1"]  # no step more, if there was one
        command = runnable(self.cls.program(), resume, self.ranks.launcher())
        return f"\nno epoch is finished; score and save the weights as they are with: {shown(command)}"

    def run(self, argv: list[str], interrupts: Interrupts) -> None:
        """Parse, set up, train or score, write the metrics."""
        started, ranks = time.monotonic(), self.ranks
        ranks.check_same(lambda: software(self.cls), "run the same versions everywhere")
        with ranks.agreed():
            config, given = parse(self.cls, argv)
        ranks.check_same(lambda: vars(config), "start all ranks with the same flags")
        with ranks.agreed():
            config, resumed, notice = self._start(config, given)
        config, resumed, notice = ranks.share((config, resumed, notice))
        with ranks.agreed():
            if not config.eval:
                ranks.check_rows(config.batch_size)
            if config.threads:
                torch.set_num_threads(config.threads)
            if config.deterministic:  # required by cuBLAS, which reads it when it is first used
                os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            ranks.device(config.wanted_device())
            # What "auto" resolves to is part of the run: a continuation makes the same choices.
            device = config.torch_device()
            if device.index is not None and device.type == "cuda":
                torch.cuda.set_device(device)  # checkpoints hold the random numbers of the current device
            config = config.resolved(device)
            if torch.are_deterministic_algorithms_enabled() != config.deterministic:  # imports torch's compiler
                torch.use_deterministic_algorithms(config.deterministic)
        ranks.check_same(
            lambda: {"device": device.type, "backend": config.backend, "gates": config.gates},
            "build trellisnet everywhere alike, or pass a --device, --backend and --gates that all ranks have",
        )
        config = ranks.share(config)  # some choices depend on timings
        self.stack.enter_context(config.float32_products())
        for last in (False, True)[: ranks.size]:  # data are fetched and encoded once per machine
            with ranks.agreed():
                if last == (ranks.local_rank > 0):
                    (task, splits, schedule, facts), untrained = self._build(config, device, resumed is None)
        ranks.check_same(
            lambda: _read_by_all(splits, config.load_weight if resumed is None else ""), "give all ranks the same files"
        )
        ranks.seed(config.seed)

        facts = {"parameters": count_parameters(task.model), **facts}
        env = environment(device) | {"ranks": ranks.size} | {key: getattr(config, key) for key in CHOICES}
        summary = ", ".join(f"{key} {v}" if isinstance(v, str) else counted(v, key) for key, v in facts.items())
        how = [counted(env["threads"], "threads"), config.precision, config.backend]
        how += [f"{config.gates} gates"] if config.backend != "reference" else []
        if device.type == "cuda" and not config.eval:
            how.append("CUDA graph" if config.cuda_graph == "on" else "no CUDA graph")
        how += [f"{ranks.size} ranks"] if ranks.size > 1 else []
        _say(f"{splits.label}: {summary}; {env['device']} ({env['machine']}), {', '.join(how)}")
        if device.type == "cpu" and ranks.size == 1 and (line := busy(env["threads"])):
            _say(line)
        notices = [*splits.notices, *config.notices(device), *([notice] if notice else [])]
        if resumed is None:
            notices += filter(None, [_other_depth(config, given), _other_data(config, splits)])
        for line in notices:
            _say(line)
        command = command_line(config.program(), argv, ranks.launcher())
        first_command = resumed["command"] if resumed else command  # training empties the checkpoint
        if config.eval:
            marks = config.marks() if untrained else {}
            outcome, peak, ended = self._score(task, splits, config, marks, interrupts)
            outcome["seconds"] = time.monotonic() - started
        else:
            facts |= {"notice": "; ".join(notices)} if notices else {}
            result = self._train(task, splits, schedule, config, resumed, command, env, facts, interrupts)
            peak = peak_memory(device)
            outcome = vars(result) | result.extra_evaluations
            self.unfinished, ended = outcome.pop("unfinished"), outcome.pop("ended")
            del outcome["extra_evaluations"]
        peaks = [peak] if ended else ranks.gather(peak)  # if ended, the other ranks may be gone
        if config.metrics:
            metrics = {
                "task": config.task, "preset": config.preset, "command": first_command,
                "resumed_with": None if resumed is None else command, "version": env["version"],
                "commit": env["commit"], "params": facts["parameters"], "data": splits.sha256,
                "corpus": splits.label, "vocabulary": splits.vocabulary_sha256, "train": {task.count: splits.sizes[0]},
                **outcome,
                "peak_memory": peaks[0] if None in peaks else max(peaks), "peak_memory_ranks": peaks,
                **{key: env[key] for key in ("device", "machine", "threads", "ranks")},
                **{key: env[key] for key in (*CHOICES, "torch")},
                "seed": config.seed, "deterministic": config.deterministic,
                **({} if config.eval else config.recipe()),
            }  # fmt: skip
            with contextlib.nullcontext() if ended else ranks.agreed():
                if ranks.first:
                    write_json(config.metrics, "--metrics", metrics)
        if ended:
            self.scored = f"in {config.metrics}" if config.metrics else "printed above"
            raise ended

    def _start(self, config: RunConfig, given: dict[str, Any]) -> tuple[RunConfig, dict[str, Any] | None, str | None]:
        """Return settings, the checkpoint to continue, and a notice on it. Only the first rank reads files."""
        resumed, notice = None, None
        if not self.ranks.first:
            return config, resumed, notice
        if config.resume:
            path = _checkpoint_path(config)
            self.stack.enter_context(alone(path.parent))
            config, resumed, notice = _resume(self.cls, path, given)
        if config.eval and not config.load_weight and config.data != "synthetic":
            raise UserError(
                f"--eval: scores trained weights; pass --run FOLDER or --load_weight FILE{_shipped(config)}"
            )
        if config.metrics:
            check_metrics_path(config.metrics, None if config.eval else config.folder())
        return config, resumed, notice

    def _build(
        self, config: RunConfig, device: torch.device, fresh: bool
    ) -> tuple[tuple[Task, Splits, Schedule, dict[str, Any]], list[str]]:
        """Set up the task and, unless a run is resumed, load --load_weight.

        Returns:
            the results of the setup, and the names of the parameters that the weight file lacked.
        """
        torch.manual_seed(config.seed)
        parts = task, splits, *_ = self.setup(config, device, self.ranks)
        if not config.load_weight or not fresh:
            return parts, []
        options = {"vocabulary": splits.vocabulary_sha256, "changed": splits.changed, "task": config.task}
        options |= config.load_options()
        with config.in_flags():
            return parts, weights.load_weights(task.model, config.load_weight, **options)

    def _train(
        self,
        task: Task,
        splits: Splits,
        schedule: Schedule,
        config: RunConfig,
        resumed: dict[str, Any] | None,
        command: str,
        env: dict[str, Any],
        facts: dict[str, Any],
        interrupts: Interrupts,
    ) -> Result:
        replaces = self.ranks.share(config.overwrite and resumed is None and _holds_files(config.folder()))
        with self.ranks.agreed():
            if replaces and config.load_weight:
                _check_kept(config.load_weight, config.folder())
            # Fail on bad settings before an earlier run is deleted.
            optimizer = make_optimizer(task.model.parameters(), config)
            if replaces:
                rehearse(task, splits, config, self.ranks)
        with self.ranks.agreed():
            folder = self._folder(config, resumed is None) if self.ranks.first else NoFolder(config.folder())
        self.folder, self.replaced, self.stoppable = folder.path, replaces, not config.fixed("max_steps")
        with contextlib.closing(folder):
            _say(f"run folder: {folder.path}")
            if resumed is None:
                data = {"data": splits.sha256, "vocabulary": splits.vocabulary_sha256}
                chosen = {key: env[key] for key in ("version", "commit", "device", "threads", "ranks")}
                folder.write_config(config, {"command": command, **data, **facts, **chosen, **splits.choices})
            folder.log_head(command, env, {**facts, "data": f"{splits.label}, sha256 {splits.sha256}"})

            def save_weights(model: nn.Module, path: Path) -> None:
                if splits.vocabulary is not None:
                    splits.vocabulary.save(path.with_name(vocabulary.FILE))
                weights.save_weights(model, path, vocabulary=splits.vocabulary_sha256, task=config.task)

            first_command = resumed["command"] if resumed else command
            result = Trainer(
                task, splits, config, folder, optimizer, schedule, save_weights, command=first_command,
                interrupts=interrupts, say=_say, ranks=self.ranks,
            ).fit(resumed)  # fmt: skip
            peaks = self.ranks.gather(peak_memory(next(task.model.parameters()).device))
            if self.ranks.size > 1 and None not in peaks:
                line = "peak memory: " + ", ".join(f"rank {rank} {n / 1e9:.2f} GB" for rank, n in enumerate(peaks))
                _say(line)
                folder.log(line)
            return result

    def _score(
        self, task: Task, splits: Splits, config: RunConfig, marks: dict[str, bool], interrupts: Interrupts
    ) -> tuple[dict[str, Any], int | None, BaseException | None]:
        """Score all that the settings ask for with the weights as they are; `marks` go into every result.

        Returns:
            the results; peak memory in bytes; and the exception that ended the evaluation after some scores, to be
            raised when these have been written.
        """
        if not config.load_weight:
            _say("NOTICE: no --load_weight: scoring untrained weights")
        if self.ranks.size > 1:
            interrupts.note()
        device = next(task.model.parameters()).device
        results: dict[str, Any] = {"valid": None, "test": None}
        methods = {"valid": set_depth(task, config.scoring_depths()), "test": None}
        evaluations = {name: (method, getattr(splits, name)) for name, method in methods.items()}
        evaluations |= splits.extra_evaluations
        ended, peaks = None, []
        for name, (method, data) in evaluations.items():
            if data is None:
                continue
            try:
                result = evaluate(task, data, name, config, method, self.ranks, interrupts)
            except (Interrupted, Exception) as e:
                if isinstance(e, LostError) or not any(results.values()):
                    raise
                self.unfinished, ended = name, e
                break
            results[name] = result | marks
            peaks.append(peak_memory(device))  # after each, because a method may reset the peak
            _say(score_line(task, name, results[name]))
        complete = ended is None and not config.max_eval_tokens
        results |= {"epochs": 0, "steps": 0, "best_epoch": None, "complete": complete}
        return results, max(filter(None, peaks), default=None), ended

    def _folder(self, config: RunConfig, fresh: bool) -> RunFolder:
        if fresh:
            self.stack.enter_context(alone(config.folder()))
        return RunFolder(config.folder(), fresh=fresh, overwrite=config.overwrite, tensorboard=config.tensorboard)


def _shipped(config: RunConfig) -> str:
    """The flag that scores a shipped model of this task, as an example; "" if there are none."""
    task = config.task
    ours = [os.path.relpath(path) for path in weights.shipped() if weights.task_beside(path / weights.FILE) == task]
    others = f" (or {', '.join(ours[1:])})" if ours[1:] else ""
    return f", for example --run {ours[0]}{others}" if ours else ""


def _other_depth(config: RunConfig, given: dict[str, Any]) -> str:
    """Return a notice if the weights were trained with another number of layers than the network has unasked.

    The layers of a trellis share their weights, so that neither names nor shapes show it. A run that has yet to grow
    was trained with fewer than its settings say.
    """
    ours = getattr(config, "nlevels", None)
    if not config.load_weight or ours is None or getattr(config, "equilibrium", False):
        return ""
    file = Path(weights.locate(config.load_weight))
    final = weights.layers_beside(file)
    theirs = depth_of_best(file.with_name("metrics.jsonl")) or final
    asked = config.eval_nlevels or theirs == final if config.run else "nlevels" in given
    if asked:
        return ""
    if theirs == math.inf and "equilibrium" not in given:
        return (
            f"NOTICE: {config.load_weight}: was trained at the equilibrium, but this network has "
            f"{counted(ours, 'layers')}; pass --equilibrium for that of training"
        )
    if type(theirs) is not int or theirs == ours:
        return ""
    flag = "--eval_nlevels" if config.run else "--nlevels"  # --grow needs the --nlevels of the run
    return (
        f"NOTICE: {config.load_weight}: was trained with {counted(theirs, 'layers')}, but this network has {ours}; "
        f"pass {flag} {theirs} for the depth of training"
    )


def _other_data(config: RunConfig, splits: Splits) -> str:
    """Return a notice if `--eval` scores other data than those of the run that the weights are from.

    A text that has changed since then may test on lines that the weights were trained on.
    """
    theirs = weights.data_beside(weights.locate(config.load_weight)) if config.eval and config.load_weight else None
    if type(theirs) is not str or theirs in (splits.sha256, splits.stored_sha256):
        return ""
    return (
        f"NOTICE: {config.load_weight}: was trained on other data (sha256 {shown(theirs[:12], NAME)}… instead of "
        f"{splits.sha256[:12]}…)"
    )


def _read_by_all(splits: Splits, weight_file: str) -> dict[str, Any]:
    """Sizes and digests of the files that every rank has read from its own disk."""
    digests = {"data": splits.sha256, "vocabulary": splits.vocabulary_sha256}
    if weight_file:
        digests["weights"] = serialization.sha256_of_file(weights.locate(weight_file))
    facts = {f"{name} sha256": f"{digest[:16]}…" for name, digest in digests.items() if digest}
    return {"data sizes": splits.sizes, **facts}


def _check_kept(weight_file: str, folder: Path) -> None:
    """Raise UserError if the weights that a run starts from lie in the folder whose run it is to replace."""
    if Path(weights.locate(weight_file)).resolve().parent == folder.resolve():
        raise UserError(f"--overwrite: would delete the weights of --load_weight {weight_file}; name another --out")


def _holds_files(folder: Path) -> bool:
    try:
        return any(folder.iterdir())
    except OSError:  # missing, or unusable, which is reported when it is opened
        return False


def _checkpoint_path(config: RunConfig) -> Path:
    """The checkpoint to continue from.

    Raises:
        UserError: its folder is missing, or is not the one that --out names.
    """
    path = config.folder() if config.resume == RUN_FOLDER else Path(config.resume)
    if config.resume == RUN_FOLDER or os.path.isdir(path):
        path /= "last.pt"
    if config.out and path.absolute().parent != Path(config.out).absolute():
        raise UserError(f"--out {config.out}: --resume {path} continues in its own folder; leave one of the two out")
    if not path.parent.is_dir():
        raise UserError(f"{path}: no such file; expected {checkpoint.WHAT}")
    return path


def _newest(path: Path) -> tuple[dict[str, Any], str | None]:
    """Content of the newest intact checkpoint, and a notice if the one at `path` is corrupt.

    If a kill has left last.pt older than best.pt, that is best.pt; if last.pt is corrupt, the newer of
    last.previous.pt and best.pt.

    Raises:
        UserError: there is none.
    """
    content, error, newest, others = None, None, path, ()
    try:
        content = checkpoint.load(path)
    except UserError as e:
        error = e
    if path.name == "last.pt":
        others = CHECKPOINTS[2:] if content is not None else CHECKPOINTS[1:]
    for other in filter(Path.is_file, map(path.with_name, others)):
        with contextlib.suppress(UserError):  # a corrupt best.pt is reported when it is needed
            later = checkpoint.load(other, mmap=True)
            if content is None or _is_ahead(later, content):
                content, newest = later, other
    if content is None:
        raise error
    if newest != path:
        content.clear()  # where memory is short, one fits and two do not
        content = checkpoint.load(newest)
    notice = f"NOTICE: {error}; continuing from {newest.name}, step {content['step']}" if error else None
    return content, notice


def _is_ahead(later: dict[str, Any], content: dict[str, Any]) -> bool:
    """Return whether `later` was written after `content`."""
    # Of an epoch cut short at the end of a planned rate, only the best result tells the state after its validation.
    after, before = ((c["step"], c["epoch"], c["best"]["epoch"] if c["best"] else -1) for c in (later, content))
    return after > before


def _check_config(path: Path, settings: dict[str, Any], cls: type[RunConfig]) -> None:
    """Refuse a checkpoint beside the config.json of another run; one that is missing or unreadable is ignored.

    Raises:
        UserError: they differ in a setting that a continued run keeps.
    """
    try:
        stored = json.loads(serialization.read_regular(path))["settings"]
        differ = [name for name in settings if name in stored and stored[name] != settings[name]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return
    differ = [name for name in differ if not properties_of(cls, name).may_change]
    if differ:
        name = differ[0]
        raise UserError(
            f"{path}: says {name} {shown(stored[name], NAME)}, the checkpoint beside it {settings[name]}; put the "
            "files of one run together, or delete this one if it is corrupt"
        )


def _resume(cls: type[RunConfig], path: Path, given: dict[str, Any]) -> tuple[RunConfig, dict[str, Any], str | None]:
    """Settings and content of the checkpoint to continue, and a notice on it; flags must agree with its settings.

    Raises:
        UserError: no checkpoint, or a flag that would change what the run computes.
    """
    content, notice = _newest(path)
    if content["task"] != cls.task:
        owner = content["task"]
        command = runnable(f"{owner}/train.py", ["--resume", str(path)])
        raise UserError(f"{path}: belongs to a run of {owner}; continue it with {command}")
    settings = check_settings(cls, content["settings"], f"{path}")
    _check_config(path.with_name("config.json"), settings, cls)
    # With today's defaults for settings that an earlier version did not have.
    stored = from_settings(cls, {**settings, "resume": str(path)})
    for name, value in given.items():
        if (reason := stored.fixed(name)) and value != getattr(stored, name):
            raise UserError(
                f"{flag_of(cls, name)} {value}: the run in {path.parent} was started with {getattr(stored, name)}, "
                f"and {reason}: leave the flag out, or start a new run with another --out"
            )
    changed = {name: v for name, v in given.items() if properties_of(cls, name).may_change and name != "config"}
    return from_settings(cls, {**settings, **changed, "out": str(path.parent)}), content, notice
