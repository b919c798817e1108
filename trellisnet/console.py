"""Standard output and standard error that cannot crash a program.

A terminal may vanish, a descriptor may be closed from the start (`>&-`), a disk may be full (`>/dev/full`). A program
then loses what it prints, but must not lose its work.
"""

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO


class _Lenient:
    """Wrapper of a text stream that drops what cannot be written.

    Args:
        stream: the stream to wrap.
        report: called once, with the first error, which is kept as `error`.
    """

    def __init__(self, stream: TextIO, report: Callable[[Exception], None]):
        self.stream, self._report = stream, report
        self.error: Exception | None = None

    def write(self, text: str) -> int:
        self._attempt(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._attempt(self.stream.flush)

    def _attempt(self, action: Callable[..., Any], *args: str) -> None:
        try:
            action(*args)
        except (OSError, ValueError) as e:  # ValueError: the stream has been closed
            if self.error is None:
                self.error = e
                self._report(e)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def lenient() -> Iterator[None]:
    """Make `sys.stdout` and `sys.stderr` drop what they cannot write, within the context.

    The loss of standard output is reported once on standard error, unless its reader has closed the pipe. Characters
    that a stream cannot encode are written as escapes. On exit all buffers are emptied, so that none can fail when the
    interpreter exits.
    """
    _fill_descriptors()
    before = sys.stdout, sys.stderr
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(open(os.devnull, "w")) if s is None else s for s in before]
        for stream in streams:
            if getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
                with contextlib.suppress(OSError, ValueError):  # reconfigure flushes the stream first
                    stream.reconfigure(errors="backslashreplace")
        sys.stdout, sys.stderr = _Lenient(streams[0], _report_loss), _Lenient(streams[1], lambda _: None)
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before
            for stream in streams:
                _empty(stream)


def _report_loss(error: Exception) -> None:
    if not isinstance(error, BrokenPipeError):
        reason = error.strerror if isinstance(error, OSError) else error
        print(f"NOTICE: standard output cannot be written ({reason}); continuing without it", file=sys.stderr)


def _fill_descriptors() -> None:
    """Open the null device on closed standard descriptors.

    Otherwise the next file opened, such as a checkpoint, would get number 1 or 2, and what libraries print would go
    into it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError as e:
            if e.errno != errno.EBADF:
                raise
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free number, this one


def _empty(stream: TextIO) -> None:
    """Flush a stream, into the null device if it cannot be written."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())
            stream.flush()
