"""Report which rank the others are waiting for when one hangs.

All ranks make the same collective calls in the same order, so a rank that has made fewer than another is the one that
the other waits for. A thread of each rank publishes its count through the store of torchrun; the threads communicate in
no other way, and a thread that cannot reach the store ends: the collectives themselves notice dead ranks.
"""

import contextlib
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch.distributed as dist

LIMIT = 300.0  # seconds of waiting until a line reports it; the time doubles with every further line


class Progress:
    """Progress of a rank, recorded by its main thread.

    Attributes:
        calls: collective calls so far, the present one included.
        work: pieces of work done between them.
        since: when the present call began, by time.monotonic(); None outside of one.
    """

    def __init__(self) -> None:
        self.calls = self.work = 0
        self.since: float | None = None

    @contextlib.contextmanager
    def meeting(self) -> Iterator[None]:
        """Mark a collective call."""
        self.calls += 1
        self.since = time.monotonic()
        try:
            yield
        finally:
            self.since = None


class _Report(NamedTuple):
    """The last report of a rank; `beats` is the number of its reports."""

    calls: int = 0
    work: int = 0
    beats: int = 0


class Watch:
    """The thread that publishes a rank's progress and reports which rank this one is waiting for.

    Args:
        connect: opens a connection to the store that no other thread uses.
        rank, size: number of this rank and of all ranks.
        progress: of this rank.
        say: prints a line.
    """

    def __init__(
        self, connect: Callable[[], dist.Store], rank: int, size: int, progress: Progress, say: Callable[[str], None]
    ):
        self.rank, self.size = rank, size
        self._connect, self._progress, self._say = connect, progress, say
        self._beats = 0
        self._since: float | None = None  # start of the call that the last look saw
        self._due = LIMIT
        self._before: list[_Report] | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch of ranks", daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        self._thread.join(timeout=1)  # it may be waiting for a store that does not answer

    def _run(self) -> None:
        with contextlib.suppress(RuntimeError):
            store = self._connect()
            store.set(f"who {self.rank}", f"{platform.node()}, pid {os.getpid()}")
            while True:
                self.look(store)
                if self._over.wait(LIMIT / 10):
                    return

    def look(self, store: dist.Store) -> None:
        """Publish this rank's progress; if it has been waiting for too long, look at that of the others."""
        since = self._progress.since
        self._beats += 1
        store.set(f"{self.rank}", f"{self._progress.calls} {self._progress.work} {self._beats}")
        if since != self._since:
            self._since, self._due, self._before = since, LIMIT / 2, None
        if since is None or time.monotonic() - since < self._due:
            return
        reports = [self._report(store, rank) for rank in range(self.size)]
        if self._before is not None:
            self._compare(store, reports, self._before, time.monotonic() - since)
        self._before = reports
        self._due *= 2

    def _report(self, store: dist.Store, rank: int) -> _Report:
        key = f"{rank}"
        return _Report(*map(int, store.get(key).split())) if store.check([key]) else _Report()

    def _compare(self, store: dist.Store, reports: list[_Report], before: list[_Report], waited: float) -> None:
        """Name the ranks that have neither arrived nor moved since the reports before, unless a lower rank will."""
        calls = self._progress.calls
        late = [rank for rank in range(self.size) if reports[rank].calls < calls]
        hanging = [
            rank
            for rank in range(self.size)
            if reports[rank].beats == before[rank].beats
            or (rank in late and (reports[rank].calls, reports[rank].work) == (before[rank].calls, before[rank].work))
        ]
        if self.rank > next(rank for rank in range(self.size) if rank not in hanging):
            return
        time_ = f"{waited / 60:.0f} minutes" if waited >= 120 else f"{waited:.1f} seconds"
        if hanging:
            names = ", ".join(self._name(store, rank) for rank in hanging)
            self._say(f"NOTICE: rank {self.rank} has been waiting for {time_} for {names}; still waiting")
        elif not late:
            self._say(
                f"NOTICE: rank {self.rank} has been waiting for {time_} although all ranks have arrived; their devices "
                "or the connections between them may hang; still waiting"
            )

    def _name(self, store: dist.Store, rank: int) -> str:
        key = f"who {rank}"
        return f"rank {rank} ({store.get(key).decode()})" if store.check([key]) else f"rank {rank}"
