"""The exceptions that a command-line program turns into one line and an exit code."""

import errno

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}  # not the fault of what the user asked for


class UserError(ValueError):
    """The user's input is wrong. The message says what is wrong and what to do; exit code 2."""


class RunError(RuntimeError):
    """The input was right but the run cannot go on (a loss that is not finite, a full disk); exit code 1."""


def unwritable(what: str, error: OSError) -> UserError | RunError:
    """The exception for something that cannot be written: a RunError if the disk is full.

    Args:
        what: the beginning of the message, such as "FOLDER: NAME cannot be written there".
        error: what the system said.
    """
    kind = RunError if error.errno in _DISK_FULL else UserError
    return kind(f"{what} ({error.strerror}); make room or name another folder")
