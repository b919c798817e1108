"""The exceptions that a command-line program turns into one line and an exit code."""


class UserError(ValueError):
    """The user's input is wrong. The message says what is wrong and what to do; exit code 2."""


class RunError(RuntimeError):
    """The input was right but the run cannot go on (a loss that is not finite, a full disk); exit code 1."""
