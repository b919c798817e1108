"""The folder of a run, its log and metrics, and the commands and versions that they record."""

import contextlib
import hashlib
import inspect
import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch

import trellisnet
from trellisnet.errors import RunError, UserError, counted, shown, unwritable
from trellisnet.serialization import atomic_write, lock, read_regular, sha256_of_file, stands_for, sync_file
from trellisnet.training.config import PROJECT, RunConfig, to_settings

METRICS = ("task", "command", "valid", "test")  # keys that identify a metrics file

try:
    import resource
except ImportError:  # Windows
    resource = None


def command_line(program: str, argv: Sequence[str], launcher: Sequence[str] = ("python",)) -> str:
    """The command as typed in the project's folder, with relative paths to what lies inside.

    Outside a checkout that folder is the working directory. Records keep this form, which is the same on every machine;
    :func:`runnable` gives the form to show a user.
    """
    here = re.compile(rf"(^|=){re.escape(f'{PROJECT}{os.sep}')}(?=.)")
    return shlex.join([*launcher, program, *(here.sub(r"\1", argument) for argument in argv)])


def runnable(program: str, argv: Sequence[str], launcher: Sequence[str] = ("python",)) -> str:
    """The command as it runs from the working directory, whether or not this Python's environment is activated."""
    name, *options = launcher
    if name == "torchrun" and not _is_on_path(name):
        name, options = "python", ["-m", "torch.distributed.run", *options]
    start = python() if name == "python" else [name]
    return shlex.join([*start, *options, _from_here(PROJECT / program), *argv])


def python() -> list[str]:
    """Command for this Python from the working directory: its name if that is on PATH, else its path."""
    for name in ("python", "python3"):
        if _is_on_path(name) and os.path.samefile(shutil.which(name), sys.executable):
            return [name]
    return [_from_here(Path(sys.executable))] if sys.executable else ["python"]


def pip_install(package: str) -> str:
    """The command that installs a package for this Python."""
    return shlex.join([*python(), "-m", "pip", "install", package])


def _is_on_path(name: str) -> bool:
    """Return whether the shell finds the program beside this Python; environments may share one interpreter."""
    path = shutil.which(name)
    return path is not None and os.path.dirname(path) == os.path.dirname(sys.executable)


def _from_here(path: Path) -> str:
    """The path relative to the working directory if it lies inside, else as it is."""
    try:
        return str(path.relative_to(Path.cwd()))
    except (ValueError, OSError):  # elsewhere, or the working directory has been deleted
        return str(path)


def commit() -> str | None:
    """Commit of the code, with "-dirty" if tracked files differ from it; None outside a git checkout."""

    def git(*args: str) -> str:
        run = subprocess.run(["git", *args], cwd=PROJECT, capture_output=True, text=True, check=True, timeout=10)
        return run.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != PROJECT:
            return None  # installed inside somebody else's checkout
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def machine(device: torch.device) -> str:
    """The hardware in a few words, e.g. "AMD EPYC, 2 cores"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    return f"{name}, {counted(os.cpu_count() or 1, 'cores')}"


def busy(threads: int) -> str:
    """A notice if, by the load of the last minute, other processes leave clearly fewer cores than `threads`; else "".

    Threads that wait for one another make no progress while any of them has no core: two can be nine times slower than
    one.
    """
    try:
        load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # not on every system
        return ""
    if threads == 1 or load + threads <= 1.25 * cores:
        return ""
    free = max(1, int(cores - load))
    where = f"load {load:.1f} on {counted(cores, 'cores')}"
    return f"NOTICE: the machine is busy ({where}): {threads} threads may be many times slower than --threads {free}"


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, device and threads of this process."""
    return {
        "version": trellisnet.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "device": str(device),
        "machine": machine(device),
        "threads": torch.get_num_threads(),
    }


def software(cls: type[RunConfig]) -> dict[str, str]:
    """Versions, and a digest of the code of the package and of the task with settings `cls`, for comparing ranks."""
    digest = hashlib.sha256()
    for folder in (Path(trellisnet.__file__).parent, Path(inspect.getfile(cls)).parent):
        for path in sorted(p for p in folder.rglob("*") if p.suffix in (".py", ".c", ".h")):
            digest.update(f"{path.relative_to(folder)} {sha256_of_file(path)}\n".encode())
    return {
        "trellisnet": f"{trellisnet.__version__} (source {digest.hexdigest()[:12]})",
        "torch": torch.__version__,
        "numpy": numpy.__version__,
    }


def peak_memory(device: torch.device) -> int | None:
    """Peak memory of this process in bytes: of the device, or resident memory; None if unknown.

    It leaves out what a CUDA graph keeps for its replays besides the results.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, StopIteration):  # Linux, where getrusage counts a large parent process too
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # kilobytes elsewhere


@contextlib.contextmanager
def cost(device: torch.device) -> Iterator[dict[str, Any]]:
    """Measure the time and the memory of the body.

    On exit the dict holds `seconds`, and `peak_memory`: the peak during the body, including what was held before it, or
    None where the system cannot reset its peak (Linux and CUDA can). The reset also acts on :func:`peak_memory`.
    """
    measured: dict[str, Any] = {}
    fresh = _reset_peak(device)
    started = time.monotonic()
    yield measured
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    measured["seconds"] = time.monotonic() - started
    measured["peak_memory"] = peak_memory(device) if fresh else None


def _reset_peak(device: torch.device) -> bool:
    """Reset the peak that :func:`peak_memory` returns to what is held now; False if it cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")  # see proc(5)
    except OSError:
        return False
    return True


def check_metrics_path(path: str, run_folder: Path | None) -> None:
    """Raise UserError now rather than after hours of training if the metrics file cannot or must not be written."""
    real = Path(os.path.realpath(path))
    own = run_folder is not None and real.parent == Path(os.path.realpath(run_folder))  # created with the run
    if own and real.name != "metrics.json":
        raise UserError(f"--metrics {path}: in the run's own folder the file is called metrics.json")
    if real.name in RunFolder.FILES and real.name != "metrics.json":
        raise UserError(f"--metrics {path}: runs keep something else under this name; choose another")
    check_json_path(path, "--metrics", METRICS, later=own)


def check_json_path(path: str | os.PathLike, flag: str, keys: Collection[str], *, later: bool = False) -> None:
    """Apply :func:`check_output` to a JSON object, identified by certain keys."""
    check_output(path, flag, lambda real: _holds(real, keys), later=later)


def check_output(path: str | os.PathLike, flag: str, is_ours: Callable[[str], bool], *, later: bool = False) -> None:
    """Check before the work that its result can be written to a file and replaces nothing but an earlier result.

    Args:
        path: a new or empty file, an earlier result, or a special file (a device, a pipe).
        flag: the flag that named it.
        is_ours: whether the file at a path, which is not empty, is an earlier result.
        later: its folder will be created by then.

    Raises:
        UserError: it cannot be written, or holds something else.
    """
    if stands_for(path) is not None:
        return
    real = os.path.realpath(path)
    if os.path.exists(real) and not os.path.isfile(real):  # written to as it is, not replaced
        writable = not os.path.isdir(real) and os.access(real, os.W_OK)
    else:
        writable = later or _can_replace(real)
    if not writable:
        raise UserError(f"{flag} {path}: cannot be written; name a file in a folder that exists and is writable")
    if os.path.isfile(real) and os.path.getsize(real) and not is_ours(real):
        raise UserError(f"{flag} {path}: holds something else, which is not overwritten; name a new file")


def _can_replace(path: str) -> bool:
    """Return whether :func:`atomic_write` can make its temporary file beside a path, in its folder, of its name."""
    folder, name = os.path.split(path)
    try:
        tempfile.NamedTemporaryFile(dir=folder, prefix=f".{name}.", suffix=".tmp").close()
    except OSError:
        return False
    return True


def _holds(path: str, keys: Collection[str]) -> bool:
    """Return whether a file holds a JSON object with certain keys."""
    try:
        with open(path, "rb") as file:
            if file.read(1) != b"{":  # such as a checkpoint, which may be large
                return False
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.keys() >= set(keys)


def write_json(path: str | os.PathLike, flag: str, content: dict[str, Any]) -> None:
    """Write one JSON object, atomically.

    Raises:
        UserError: the file that `flag` named cannot be written.
        RunError: the disk is full.
    """
    try:
        with atomic_write(path) as file:
            file.write((json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
    except OSError as e:
        raise unwritable(f"{flag} {path}: cannot be written", e) from e


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Lock a run folder against other processes; a process that dies leaves no lock behind.

    Raises:
        UserError: another process is at work there, or the folder cannot be used.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        descriptor = lock(path, wait=False)
    except BlockingIOError as e:
        raise UserError(f"{path}: another process is at work there; wait for it, or choose another --out") from e
    except OSError as e:
        raise _unwritable(path, e) from e
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be written ({error.strerror}); choose another folder with --out")


class RunFolder:
    """The folder of a run: config.json, log.txt, metrics.jsonl, last.pt, best.pt, weights.pkl, vocabulary.json.

    Until all epochs are done, last.previous.pt is the previous last.pt.

    Args:
        path: the folder, which is created if missing.
        fresh: a new run (True) or the continuation of one (False).
        overwrite: delete the files of an earlier run.
        tensorboard: write the numbers of metrics.jsonl for TensorBoard too.

    Raises:
        UserError: a fresh run may not overwrite what the folder holds, or the folder cannot be written.
    """

    FILES = ("config.json", "log.txt", "metrics.jsonl", "metrics.json")
    FILES += ("last.pt", "last.previous.pt", "best.pt", "weights.pkl", "vocabulary.json")

    def __init__(self, path: Path, *, fresh: bool, overwrite: bool = False, tensorboard: bool = False):
        self.path = path
        self._board = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as e:
                raise UserError(f"--tensorboard: needs the package tensorboard: {pip_install('tensorboard')}") from e
        try:
            path.mkdir(parents=True, exist_ok=True)
            if fresh and any(path.iterdir()):
                if not overwrite:
                    raise UserError(
                        f"{path}: holds an earlier run; continue it with --resume, replace it with --overwrite, "
                        "or choose another folder with --out"
                    )
                self._clear()
            for left in self._left():
                left.unlink(missing_ok=True)
            tempfile.TemporaryFile(dir=path).close()  # old files may be writable where no checkpoint can be created
            self._stat = path.stat()
            _mend(path / "log.txt")
            _mend(path / "metrics.jsonl", is_complete=_is_json)
            self._log = (path / "log.txt").open("a", encoding="utf-8", buffering=1)
            self._metrics = (path / "metrics.jsonl").open("a", encoding="utf-8", buffering=1)
        except OSError as e:
            raise _unwritable(path, e) from e
        if tensorboard:
            self._board = SummaryWriter(str(path))

    def _left(self) -> list[Path]:
        """Temporary files of writes that were killed; each may be as large as a checkpoint."""
        return [left for name in self.FILES for left in self.path.glob(f".{name}.*.tmp")]

    def _clear(self) -> None:
        """Remove the files of a run; a folder with anything else in it is not ours to delete."""
        ours = [*(self.path / name for name in self.FILES), *self._left()]
        ours += self.path.glob("events.out.tfevents.*")
        ours = [path for path in ours if path.is_symlink() or not path.is_dir()]
        foreign = sorted(path.name for path in set(self.path.iterdir()) - set(ours))
        if foreign:
            raise UserError(f"{self.path}: holds {foreign[0]}, which no run wrote; empty it or choose another --out")
        for path in ours:
            path.unlink(missing_ok=True)

    def file(self, name: str) -> Path:
        return self.path / name

    def log(self, line: str) -> None:
        """Append a line to log.txt."""
        self._log.write(shown(line) + "\n")

    def record(self, event: str, **values: Any) -> None:
        """Append a JSON object to metrics.jsonl; numbers that are not finite become null."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._metrics.write(json.dumps({"event": event, **finite}) + "\n")
        if self._board is not None:
            for key, value in _flat(finite):
                self._board.add_scalar(f"{event}/{key}", value, values.get("step"))

    def check_present(self) -> None:
        """Raise RunError if the folder is no longer where it was."""
        try:
            present = os.path.samestat(self._stat, self.path.stat())
        except OSError:
            present = False
        if not present:
            raise RunError(f"{self.path}: the run folder was deleted or moved during the run")

    def sync(self) -> None:
        """Flush log.txt and metrics.jsonl to the disk, so that they never lag behind a checkpoint.

        Raises:
            RunError: the folder was deleted or moved.
            OSError: the disk is full, or the like.
        """
        self.check_present()
        for file in (self._log, self._metrics):
            file.flush()
            sync_file(file.fileno())

    def write_config(self, config: RunConfig, choices: dict[str, Any]) -> None:
        """Write config.json: all settings, and the choices made at the start of the run."""
        content = {"task": config.task, "settings": to_settings(config), **choices}
        with atomic_write(self.file("config.json")) as file:
            file.write((json.dumps(content, indent=1) + "\n").encode())

    def log_head(self, command: str, env: dict[str, Any], facts: dict[str, Any]) -> None:
        """Write the head of log.txt: time, command, environment and facts of the run."""
        self.log(f"# {time.strftime('%Y-%m-%d %H:%M:%S')}  {command}")
        for key, value in {**env, **facts}.items():
            self.log(f"# {key}: {value}")

    def close(self) -> None:
        with contextlib.ExitStack() as stack:  # if one fails, on a full disk, the others are closed all the same
            for file in filter(None, (self._board, self._metrics, self._log)):
                stack.callback(file.close)


def _mend(path: Path, is_complete: Callable[[bytes], bool] = bytes.__len__) -> None:
    """Before lines are appended, terminate a last line that a kill cut short, or drop it if it is incomplete."""
    if path.is_file():
        *_, torn = path.read_bytes().rpartition(b"\n")
        if torn and is_complete(torn):
            with path.open("ab") as file:
                file.write(b"\n")
        elif torn:
            os.truncate(path, path.stat().st_size - len(torn))


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read a metrics.jsonl, leaving out a last line that a kill cut short.

    Raises:
        OSError: it cannot be read.
        ValueError: another line is no JSON object; the message says which.
    """
    *lines, torn = read_regular(path).split("\n")
    lines += [torn] if _is_json(torn.encode()) else []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError as e:
            glued = ": a torn record and the next one are glued together" if line.rfind('{"event"') > 0 else ""
            raise ValueError(f"line {number} is no JSON object{glued}; split or delete it") from e
        if not isinstance(records[-1], dict):
            raise ValueError(f"line {number} is no JSON object; delete it")
    return records


def depth_of_best(path: Path) -> int | None:
    """Return the number of layers that validated the best weights so far of a run with a schedule of depths.

    Args:
        path: the metrics.jsonl of the run; without one, or without a depth in it, the result is None.
    """
    try:
        records = read_records(path)
    except (OSError, ValueError, RecursionError):
        return None
    depths = [record.get("nlevels") for record in records if record.get("event") == "epoch" and record.get("best")]
    return depths[-1] if depths and type(depths[-1]) is int else None


class NoFolder:
    """Stand-in for :class:`RunFolder` on ranks that write nothing: the same methods, without effect."""

    def __init__(self, path: Path):
        self.path = path

    def file(self, name: str) -> Path:
        return self.path / name

    def nothing(self, *_: Any, **__: Any) -> None:
        """Do nothing."""

    log = record = write_config = log_head = check_present = sync = close = nothing


def _flat(values: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers in a nested dict, their keys joined by "/"."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from ((f"{key}/{inner}", number) for inner, number in _flat(value))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield key, value
