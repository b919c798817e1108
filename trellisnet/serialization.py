"""Files that survive: atomic writes, and reading tensors without ever running code from the file."""

import contextlib
import os
import pickle
import re
import struct
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from trellisnet.errors import UserError


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`; on a clean exit it is flushed to disk and takes the place of `path`.

    Whatever goes wrong in between, the old file stays as it was and the temporary one is removed.
    """
    path = Path(path)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes private files; these are ordinary ones
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def save(path: str | os.PathLike, content: Any, *, legacy: bool = False) -> None:
    """torch.save to `path`, atomically; `legacy` writes the container of torch < 1.6."""
    with atomic_write(path) as file:
        torch.save(content, file, _use_new_zipfile_serialization=not legacy)


def load(path: str | os.PathLike, what: str) -> Any:
    """Read a file of tensors and plain values onto the CPU; nothing in it can run code.

    Args:
        path: zip or legacy container, tensors from any device.
        what: what the file should be, for the message.

    Raises:
        UserError: missing, unreadable, truncated or corrupt, or a pickle of something else than tensors.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; expected {what}")
    try:
        file = open(path, "rb")  # noqa: SIM115 (closed by the with below)
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from e
    try:
        with file, warnings.catch_warnings(action="ignore"):  # how the file was written is not the user's concern
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        if re.search("unsupported (global|class)", str(e), re.IGNORECASE):
            raise UserError(
                f"{path}: holds a pickled object (a whole model?), not {what}; opening it could run any code, so it is "
                "refused. Where it was made, save its weights with torch.save(model.state_dict(), FILE) and load those."
            ) from e
        raise UserError(f"{path}: not {what}, or a damaged one ({_reason(e)})") from e
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError,
            AssertionError, OverflowError, MemoryError, struct.error, zipfile.BadZipFile) as e:  # fmt: skip
        # What torch raises on damaged input is not documented; these are the kinds seen on truncated and altered files.
        raise UserError(f"{path}: not {what}, or a damaged one ({_reason(e)})") from e


def _reason(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    said = re.search("WeightsUnpickler error: (.+)", text)
    return (said.group(1) if said else text).splitlines()[0][:120]
