"""Faults that strike a run: kills, full disks, locked folders, jumping clocks, and memory that leaks. Part of
scripts/torture.py.

The runs are those of word_ptb/train.py with a tiny network. After any fault it must end with the same
weights and the same last checkpoint, to the bit, as an undisturbed run.
"""

import contextlib
import ctypes
import errno
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.faults import mutations
from trellisnet import serialization
from trellisnet.errors import UserError
from trellisnet.training import checkpoint
from trellisnet.training.config import PROJECT
from trellisnet.training.runlog import read_records

PROGRAM = PROJECT / "word_ptb" / "train.py"
# Dropout, so that random numbers matter; carried state; Adam, which has a state of its own.
FLAGS = """--data synthetic --emsize 8 --nhid 12 --nout 8 --nlevels 4 --repack --seq_len 0 --horizon 20 --batch_size 25
--eval_batch_size 10 --aux 0.1 --aux_freq 2 --optim Adam --lr 0.01 --max_eval_tokens 8000 --log-interval 5 --threads 1
--checkpoint_steps 3""".split()
COMPARED = "task data model average optimizer schedule epoch batch carry step best skipped draws".split()
MOMENTS = ("step", "evaluation", "checkpoint")
LIFE = 0.6  # longest time in seconds before a kill within a step
START = 600.0  # seconds within which a run must start, even on a busy machine
DEADLINE = 30.0  # seconds that a run has to end after SIGTERM, as schedulers commonly grant
SLACK = 2**23  # bytes by which memory may grow where it should be constant


class BrokenError(Exception):
    """A fault was not survived."""


def expect(condition: bool, message: str) -> None:
    if not condition:
        raise BrokenError(message)


class Job:
    """A run that faults are inflicted on.

    Args:
        folder: the run folder.
        seed: of its random numbers.
        epochs: its length.
    """

    def __init__(self, folder: Path, seed: int, epochs: int):
        self.folder, self.seed, self.epochs = folder, seed, epochs

    @property
    def last(self) -> Path:
        return self.folder / "last.pt"

    def flags(self, *more: str) -> list[str]:
        """Flags that start the run, or resume it if there is a checkpoint."""
        if self.last.exists():
            return ["--resume", str(self.last), *more]
        length = ["--seed", str(self.seed), "--epochs", str(self.epochs)]
        return [*FLAGS, *length, "--out", str(self.folder), "--overwrite", *more]

    def command(self, *more: str) -> list[str]:
        return [sys.executable, str(PROGRAM), *self.flags(*more)]

    def child(self, *more: str, limit: Callable[[], None]) -> tuple[int, list[str]]:
        """Run in a process that calls `limit` first; return its exit code and its lines on standard error."""
        done = subprocess.run(self.command(*more), capture_output=True, text=True, check=False, preexec_fn=limit)
        return done.returncode, done.stderr.splitlines()

    def _logged(self) -> int:
        """When the log was last written, in nanoseconds; 0 while it is empty. A run leaves its own to the next one."""
        try:
            log = (self.folder / "log.txt").stat()
        except FileNotFoundError:
            return 0
        return log.st_mtime_ns if log.st_size else 0

    @contextlib.contextmanager
    def started(self, *flags: str) -> Iterator[subprocess.Popen]:
        """Start a process and wait until it is about to train."""
        before = self._logged()
        options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(self.command(*flags), **options) as process:
            try:
                wait(lambda: process.poll() is not None or self._logged() > before, START)
                yield process
            finally:
                process.kill()

    def run(self, *more: str) -> None:
        """Run to the end, in this process."""
        code, printed = mutations.call(*self.flags(*more))
        expect(code == 0, f"the run ended with exit code {code}: {printed.splitlines()[-1:]}")

    def now(self) -> str:
        """The one of MOMENTS that the run is in, or was in when it was killed."""
        if any(self.folder.glob(".*.tmp")):
            return "checkpoint"
        with contextlib.suppress(OSError, IndexError, ValueError, KeyError):
            last = read_records(self.folder / "metrics.jsonl")[-1]
            steps = json.loads((self.folder / "config.json").read_text())["steps an epoch"]
            if last["event"] == "train" and last["batch"] == steps:
                return "evaluation"
        return "step"

    def done(self) -> bool:
        """Whether the run has recorded its result."""
        return read_records(self.folder / "metrics.jsonl")[-1]["event"] == "result"

    def check(self) -> None:
        """Expect no checkpoint yet, or an intact one."""
        if self.last.exists():
            try:
                checkpoint.load(self.last)
            except UserError as e:
                raise BrokenError(f"a checkpoint is corrupt: {e}") from e

    def outcome(self) -> dict[str, str]:
        """Digests of the outcome of a run, times aside."""
        found = {"weights.pkl": serialization.sha256_of(serialization.load(self.folder / "weights.pkl", "weights"))}
        for name in ("last.pt", "best.pt"):
            content = checkpoint.load(self.folder / name)
            content["draws"] = content["rng"]["torch"]  # the only generator in use
            found |= {f"{key} of {name}": serialization.sha256_of(content[key]) for key in COMPARED}
        return found

    def expect_outcome(self, expected: dict[str, str], after: str) -> None:
        differ = [key for key, digest in self.outcome().items() if digest != expected[key]]
        expect(not differ, f"after {after} the run ended with other {', '.join(differ)} than the uninterrupted one")


def wait(condition: Callable[[], bool], seconds: float) -> float:
    """Wait for a condition; return the seconds it took, or inf. Time while all processes are stopped does not count."""
    taken, before = 0.0, time.monotonic()
    while not condition():
        if taken > seconds:
            return math.inf
        time.sleep(0.0005)
        now = time.monotonic()
        taken += min(now - before, 0.1)
        before = now
    return taken


def aim(job: Job, process: subprocess.Popen, rng: random.Random) -> None:
    """Wait for a random instant in a step, in evaluation or during the write of a checkpoint."""
    moment = rng.choice(MOMENTS)
    if moment == "step":
        time.sleep(rng.uniform(0, LIFE))
        return
    wait(lambda: process.poll() is not None or job.now() == moment, 10 * LIFE)
    time.sleep(rng.choice([0, rng.uniform(0, 0.002 if moment == "checkpoint" else 0.1)]))


def reference(folder: Path, seed: int, epochs: int) -> dict[str, str]:
    """Outcome of an undisturbed run."""
    job = Job(folder / f"undisturbed-{seed}-{epochs}", seed, epochs)
    if not job.last.exists():
        job.run()
    return job.outcome()


def kill(folder: Path, count: int, seed: int, epochs: int) -> dict[str, Any]:
    """Kill runs at random instants and resume them, until `count` kills have been survived.

    Every tenth signal is a SIGTERM instead of a SIGKILL: the run must then write a checkpoint and end within DEADLINE.
    """
    rng, moments, runs, slowest = random.Random(seed), Counter(), 0, 0.0
    terms = 0
    while not runs or moments.total() - terms < count:
        expected = reference(folder, seed + runs, epochs)
        job = Job(folder / f"killed-{seed + runs}", seed + runs, epochs)
        while True:
            alive = moments.total() - terms < count
            with job.started() as process:
                if not alive:
                    _, said = process.communicate()
                elif moments.total() % 10 == 9 and job.last.exists():
                    aim(job, process, rng)
                    process.terminate()
                    seconds = wait(lambda p=process: p.poll() is not None, DEADLINE)
                    expect(seconds < DEADLINE, f"a run had not ended {DEADLINE:g} s after SIGTERM")
                    _, said = process.communicate()
                    if process.returncode == 143:
                        first, *more = said.splitlines()
                        expect(first.startswith("interrupted; "), f"it said: {said}")
                        advice = [line for line in more if line.startswith("no epoch is finished; ")]
                        expect(more == advice[:1], f"it also said: {more}")
                        slowest, terms = max(slowest, seconds), terms + 1
                        moments["terminated"] += 1
                else:
                    aim(job, process, rng)
                    process.kill()
                    _, said = process.communicate()
                code = process.returncode
            if code == -signal.SIGKILL:
                moments[job.now()] += 1
                job.check()
            elif code == 0:
                break
            elif code == -signal.SIGTERM:  # it came while the interpreter was ending
                expect(job.done(), "a run ended on SIGTERM without a checkpoint")
            else:
                expect(code == 143, f"a resumed run ended with exit code {code}: {said}")
        job.expect_outcome(expected, f"{dict(moments)} (seed {job.seed})")
        expect(not list(job.folder.glob(".*.tmp")), "temporary files were left")
        runs += 1
    kills = {f"killed in {moment}": moments[moment] for moment in MOMENTS}
    return {**kills, "terminated": terms, "seconds to terminate": round(slowest, 2), "runs": runs, "epochs": epochs}


# -- disks -------------------------------------------------------------------------------------------------------------


def full(folder: Path, attempts: int, seed: int, epochs: int = 2) -> dict[str, Any]:
    """Limit the size of files, then fail each write once for lack of space, then write-protect the folder."""
    expected = reference(folder, seed, epochs)
    job = Job(folder / "full", seed, epochs)
    job.run("--max_steps", "20")
    size = job.last.stat().st_size // 2
    before = job.last.read_bytes()
    code, said = job.child("--max_steps", "0", limit=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))
    expect(code == 1, f"a file that is too large: exit code {code}")
    expect(len(said) == 1 and said[0].startswith("failed: ") and "File too large" in said[0], f"it said {said}")
    expect(job.last.read_bytes() == before, "a write beyond the limit damaged the checkpoint")
    writes = _no_room(job, attempts)
    locked = _read_only(job)
    job.run("--max_steps", "0")
    job.expect_outcome(expected, "a full disk")
    return {"too large": 1, "no room": writes, "read-only": locked}


def _no_room(job: Job, attempts: int) -> int:
    """Resume a run in this process with its nth write failing, for each n from 1; return the number of failures."""
    atomic_write, writes = serialization.atomic_write, 0

    class File:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            nonlocal writes
            writes += 1
            if writes == number:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.file.write(data)

    @contextlib.contextmanager
    def failing(path):
        with atomic_write(path) as file:
            yield File(file) if Path(path).suffix in (".pt", ".pkl") else file

    serialization.atomic_write = failing
    try:
        for number in range(1, attempts + 1):
            writes = 0
            code, printed = mutations.call(*job.flags("--max_steps", "0"))
            expect(code == 1 and "No space left on device" in printed, f"write {number}: exit code {code}")
            expect(not list(job.folder.glob(".*.tmp")), f"write {number}: temporary files were left")
            job.check()
    finally:
        serialization.atomic_write = atomic_write
    return attempts


def _obey_modes() -> None:
    """Drop the capability that lets a superuser write where file modes forbid it."""
    if os.geteuid() == 0:
        drop, override = 24, 1  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE
        ctypes.CDLL(None).prctl(drop, override, 0, 0, 0)


def _read_only(job: Job) -> int:
    """Resume a run in a write-protected folder and start one below it; 0 where file modes forbid nothing."""
    probe = [sys.executable, "-c", "import sys; open(sys.argv[1] + '/x', 'w')", str(job.folder)]
    before = job.last.read_bytes()
    job.folder.chmod(0o555)
    try:
        if not subprocess.run(probe, capture_output=True, check=False, preexec_fn=_obey_modes).returncode:
            (job.folder / "x").unlink()
            return 0
        for other in (job, Job(job.folder / "new", job.seed, 1)):
            code, said = other.child("--max_steps", "0", limit=_obey_modes)
            expect(code == 2, f"read-only: exit code {code}")
            expect(
                len(said) == 1 and said[0].startswith("error: ") and "cannot be written" in said[0], f"it said {said}"
            )
    finally:
        job.folder.chmod(0o755)
    expect(job.last.read_bytes() == before, "a read-only folder was written")
    return 2


def clocks(folder: Path, seed: int, epochs: int = 2) -> dict[str, Any]:
    """Let the clocks stand still and jump, backwards too, during a run in two halves."""
    expected = reference(folder, seed, epochs)
    job, draw, real = Job(folder / "clocks", seed, epochs), random.Random(seed), (time.time, time.monotonic)

    def jumping(clock: Callable[[], float], spans: list[float]) -> Callable[[], float]:
        offset, frozen = 0.0, clock()

        def now() -> float:
            nonlocal offset
            offset += draw.choice(spans)
            return offset + (frozen if draw.random() < 0.2 else clock())

        return now

    time.time = jumping(time.time, [0.0, 3600.0, -3600.0, 1e9, -1e9])
    time.monotonic = jumping(time.monotonic, [0.0, 0.0, 0.0, 5.0, 86400.0, -5.0])
    try:
        for steps in ("20", "0"):
            job.run("--max_steps", steps, "--checkpoint_minutes", "1000")
    finally:
        time.time, time.monotonic = real
    job.expect_outcome(expected, "jumps of the clock")
    return {"runs": 1}


def locks(folder: Path, seed: int, epochs: int = 2) -> dict[str, Any]:
    """Start a second process in a run folder: it is refused until the first has ended."""
    expected = reference(folder, seed, epochs)
    job = Job(folder / "locks", seed, epochs)
    with job.started() as process:
        wait(job.last.exists, START)
        process.send_signal(signal.SIGSTOP)  # so that it does not finish in the meantime
        for flags in (job.flags(), [*FLAGS, "--out", job.folder], [*FLAGS, "--out", job.folder, "--overwrite"]):
            code, printed = mutations.call(*flags)
            expect(code == 2, f"a second process was admitted: exit code {code}")
            said = printed.splitlines()[-1]
            expect(said.startswith(f"error: {job.folder}: another process is at work there; "), f"it said {said}")
    job.run()
    job.expect_outcome(expected, "a second process")
    return {"refused": 3}


# -- memory ------------------------------------------------------------------------------------------------------------


def soak(folder: Path, minutes: float, seed: int) -> dict[str, Any]:
    """Train for some minutes; return memory in bytes near the start and at the end, epochs and steps."""
    job, resident = Job(folder / "soak", seed, 10**6), []
    with job.started() as process:
        wait(job.last.exists, START)
        end = time.monotonic() + 60 * minutes
        while not resident or time.monotonic() < end:
            time.sleep(min(1.0, minutes))
            expect(process.poll() is None, f"the run ended with exit code {process.returncode}")
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            resident.append(1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")))
        process.terminate()
        process.communicate()
    start, stop = drift(resident)
    expect(stop < start + SLACK, f"memory grew from {start:,} to {stop:,} bytes in {minutes:g} minutes")
    last = checkpoint.load(job.last)
    counts = {"epochs": last["epoch"], "steps": last["step"]}
    return {"minutes": minutes, "resident at the start": start, "resident at the end": stop, **counts}


def drift(resident: list[int]) -> tuple[int, int]:
    """Largest memory in the second sixth of the time, after the warm-up, and in the last."""
    part = max(len(resident) // 6, 1)
    return max(resident[part : 2 * part] or resident), max(resident[-part:])
