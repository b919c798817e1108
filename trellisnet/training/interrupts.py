"""SIGINT, SIGTERM and SIGHUP as exceptions that are never raised in the middle of a step."""

import contextlib
import signal
import threading
from collections.abc import Iterator

# SIGHUP comes when the terminal goes away; Windows does not have it.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGHUP", "SIGINT", "SIGTERM") if hasattr(signal, name))


class Interrupted(BaseException):
    """The process was asked to stop by the signal `signum`."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


class Interrupts:
    """While entered, raise :class:`Interrupted` on the first of SIGNALS, or at the end of :meth:`held` if inside it.

    Later signals are ignored, so that the last checkpoint is complete. Only the main thread can handle signals;
    in other threads, and if never entered, this has no effect. After :meth:`note` nothing is raised: a process that
    trains with others reads `pending` and agrees with them when to end. A SIGHUP that is ignored, as under nohup, stays
    ignored.
    """

    def __init__(self) -> None:
        self._held = False
        self._pending: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            taken = [s for s in SIGNALS if s.name != "SIGHUP" or signal.getsignal(s) is not signal.SIG_IGN]
            self._before = {s: signal.signal(s, self._handle) for s in taken}
        return self

    def __exit__(self, *_) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._held, self._pending = False, None

    def _handle(self, signum: int, _frame) -> None:
        if self._held:
            self._pending = signum
        else:
            self._held = True  # for good
            raise Interrupted(signum)

    @property
    def pending(self) -> int:
        """The signal that has come and was not raised yet; 0 if none has."""
        return self._pending or 0

    def note(self) -> None:
        """From now on only record signals."""
        self._held = True

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Delay signals until the body is done."""
        if self._held:  # already inside one
            yield
            return
        self._held = True
        try:
            yield
        finally:
            self._held = False
        pending, self._pending = self._pending, None
        if pending is not None:
            self._handle(pending, None)
