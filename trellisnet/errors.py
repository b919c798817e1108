"""Exceptions that a command-line program turns into one line and an exit code, and helpers to write such lines."""

import errno
import re
from typing import Any

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}  # not the user's mistake
_UNREACHABLE = {errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES}  # wherever it happens, a path must change
LINE = 2000  # characters of a message: room for two long paths
NAME = 80  # characters of a name within a message


def shown(text: object, limit: int | None = None) -> str:
    """Turn a name or text from a file, a server or the command line into one printable line.

    Args:
        text: anything with a `str`.
        limit: maximal number of characters; of a longer text the beginning and the end are kept. None for no limit.

    Returns:
        `text` with Python's escapes for line feeds, control codes and other characters that are not printable.
    """
    text = _shortened(str(text), limit)
    if not text.isprintable():
        escaped = (c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
        text = _shortened("".join(escaped), limit)
    return text


def _shortened(text: str, limit: int | None) -> str:
    if limit is None or len(text) <= limit:
        return text
    end = (limit - 1) // 3
    return f"{text[: limit - 1 - end]}…{text[len(text) - end :]}"


class _Message(Exception):
    """An exception whose text is safe to print, whatever names it contains.

    Args:
        lines: lines of the message, usually one; line feeds within a line are escaped.
    """

    def __init__(self, *lines: str):
        super().__init__(*(shown(line, LINE) for line in lines))

    def __str__(self) -> str:
        return "\n".join(self.args)


class UserError(_Message, ValueError):
    """Wrong input by the user. The message says what is wrong and what to do; exit code 2."""


class ArgumentError(UserError):
    """A UserError that says which arguments to pass: in Python by their names, on the command line by their flags.

    Args:
        line: what is wrong.
        purpose: what the arguments are for, if the line does not say it.
        arguments: names and values; `...` for a value that is not known here.
    """

    def __init__(self, line: str, /, *, purpose: str = "", **arguments: Any):
        self.line, self.purpose, self.arguments = line, purpose, arguments
        shown_as = [f"{name}={getattr(v, '__name__', repr(v))}" for name, v in arguments.items() if v is not ...]
        unknown = [f"the {name} that it was trained with" for name, value in arguments.items() if value is ...]
        super().__init__(self.advise(", ".join(shown_as + unknown)))

    def advise(self, arguments: str) -> str:
        """Return the message with these arguments, or flags, as what to pass."""
        return f"{self.line}; pass {arguments}{self.purpose}"


class RunError(_Message, RuntimeError):
    """A failure of a run whose input was right (a non-finite loss, a full disk); exit code 1."""


def of_system(error: OSError, path: object = None) -> str:
    """Return a system error and its file as one printable line; `path` is used if the error names no file."""
    name = error.filename or path
    return shown(f"{error.strerror or error}" + (f" ({name})" if name else ""), LINE)


def from_system(error: OSError, path: object = None) -> UserError | RunError:
    """Build the exception for a system error: a UserError if the path cannot be reached, else a RunError.

    Args:
        error: the system error.
        path: named if the error names no file.
    """
    if error.errno in _UNREACHABLE:
        return UserError(f"{of_system(error, path)}; name another path")
    return RunError(of_system(error, path))


def unwritable(what: str, error: OSError) -> UserError | RunError:
    """Build the exception for something that cannot be written: a RunError if the disk is full, else a UserError.

    Args:
        what: beginning of the message, such as "FOLDER: NAME cannot be written there".
        error: the system error.
    """
    kind = RunError if error.errno in _DISK_FULL else UserError
    return kind(f"{what} ({error.strerror}); make room or name another folder")


def counted(number: int, things: str) -> str:
    """Return a number with its noun, passed in the plural: "2 threads", "1 thread", "1 step per epoch"."""
    return f"{number:,} " + (re.sub(r"s\b", "", things, count=1) if number == 1 else things)
