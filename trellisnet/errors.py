"""The exceptions that a command-line program turns into one line and an exit code, and what such lines are made of."""

import errno
import re
from typing import Any

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}  # not the fault of what the user asked for
LINE = 2000  # characters of a message: room for two long paths
NAME = 80  # the same of a name within one


def shown(text: object, limit: int | None = None) -> str:
    """Make one printable line of a name or text from a file, a server or the command line.

    Args:
        text: anything with a `str`.
        limit: of characters, beginning and end of a longer text being kept; None: none.

    Returns:
        `text` with escapes, as Python spells them, for line feeds, escape codes and whatever else is not printable.
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
    """An exception whose text is safe to print, whatever names are part of it.

    Args:
        lines: of the message, mostly one; line feeds within a line are escaped.
    """

    def __init__(self, *lines: str):
        super().__init__(*(shown(line, LINE) for line in lines))

    def __str__(self) -> str:
        return "\n".join(self.args)


class UserError(_Message, ValueError):
    """The user's input is wrong. The message says what is wrong and what to do; exit code 2."""


class ArgumentError(UserError):
    """A UserError that says which arguments would do. Python shows these, a program the flags that stand for them.

    Args:
        line: what is wrong.
        purpose: what the arguments are for, if the line does not say it.
        arguments: their values; `...` where the message cannot know it.
    """

    def __init__(self, line: str, /, *, purpose: str = "", **arguments: Any):
        self.line, self.purpose, self.arguments = line, purpose, arguments
        shown_as = [f"{name}={getattr(v, '__name__', repr(v))}" for name, v in arguments.items() if v is not ...]
        unknown = [f"the {name} that it was trained with" for name, value in arguments.items() if value is ...]
        super().__init__(self.advise(", ".join(shown_as + unknown)))

    def advise(self, what: str) -> str:
        """The message, with `what` as what to pass."""
        return f"{self.line}; pass {what}{self.purpose}"


class RunError(_Message, RuntimeError):
    """The input was right but the run cannot go on (a loss that is not finite, a full disk); exit code 1."""


def of_system(error: OSError, path: object = None) -> str:
    """Say in one printable line what the system said, and of which file; `path` where the error names none."""
    name = error.filename or path
    return shown(f"{error.strerror or error}" + (f" ({name})" if name else ""), LINE)


def unwritable(what: str, error: OSError) -> UserError | RunError:
    """The exception for something that cannot be written: a RunError if the disk is full.

    Args:
        what: the beginning of the message, such as "FOLDER: NAME cannot be written there".
        error: what the system said.
    """
    kind = RunError if error.errno in _DISK_FULL else UserError
    return kind(f"{what} ({error.strerror}); make room or name another folder")


def counted(number: int, things: str) -> str:
    """Return a number with its noun, given in the plural: "2 threads", "1 thread", "1 step an epoch"."""
    return f"{number:,} " + (re.sub(r"s\b", "", things, count=1) if number == 1 else things)
