"""Files that survive: atomic writes, and reading tensors without ever running code from the file."""

import contextlib
import os
import pickle
import pickletools
import re
import struct
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from trellisnet.errors import UserError

# What torch and zipfile raise on damaged input is not documented; these are the kinds seen on altered files.
_DAMAGE = (RuntimeError, OSError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError)
_DAMAGE += (AssertionError, OverflowError, MemoryError, struct.error, zlib.error, zipfile.BadZipFile)
_PART = 2**20  # elements


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`; on a clean exit it is flushed to disk and takes the place of `path`.

    Whatever goes wrong in between, the old file stays as it was and the temporary one is removed. Links are followed;
    what is no regular file (a device, a pipe) is written to directly.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        with path.open("wb") as file:
            yield file
        return
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


class _Writer:
    """What torch.save writes to. What goes wrong in writing is kept and not raised: torch would lose it.

    Its writers are in C++; they turn an exception into a RuntimeError of their own, or carry on as if nothing were.
    """

    def __init__(self, file: BinaryIO):
        self.file = file
        self.error: BaseException | None = None

    def write(self, data: bytes | memoryview) -> int:
        if self.error is None:
            try:
                self.file.write(data)
            except BaseException as e:
                self.error = e
        return len(data)

    def flush(self) -> None:
        """Left to :func:`atomic_write`."""


def save(path: str | os.PathLike, content: Any, *, legacy: bool = False) -> None:
    """torch.save to `path`, atomically and without a copy in memory; `legacy` writes the container of torch < 1.6.

    Raises:
        OSError: the disk is full, or the like.
    """
    with atomic_write(path) as file:
        writer = _Writer(file)
        torch.save(content, writer, _use_new_zipfile_serialization=not legacy)
        if writer.error is not None:
            raise writer.error


def load(path: str | os.PathLike, what: str, *, mmap: bool = False) -> Any:
    """Read a file of tensors and plain values onto the CPU; nothing in it can run code.

    Args:
        path: zip or legacy container, tensors from any device.
        what: what the file should be, for the message.
        mmap: map the tensors of a zip container into memory instead of reading them; the file must not be written to
            while they are in use (to be replaced, as by :func:`save`, is fine).

    Raises:
        UserError: missing, unreadable, truncated or corrupt, or a pickle of something else than tensors.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file; expected {what}")
    try:
        file = open(path, "rb")  # noqa: SIM115 (closed below)
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from e
    with file:
        return read(file, path, what, mmap=mmap)


def read(file: BinaryIO, name: str | os.PathLike, what: str, *, mmap: bool = False) -> Any:
    """:func:`load` of an open file; `name` is for the message, and with `mmap` its path."""
    try:
        _check_members(file)
        _check_claims(file)
        mmap = mmap and zipfile.is_zipfile(file)
        file.seek(0)
        with warnings.catch_warnings(action="ignore"):  # how the file was written is not the user's concern
            return torch.load(name if mmap else file, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as e:
        if re.search("unsupported (global|class)", str(e), re.IGNORECASE):
            raise UserError(
                f"{name}: holds a pickled object (a whole model?), not {what}; opening it could run any code, so it is "
                "refused. Where it was made, save its weights with torch.save(model.state_dict(), FILE) and load those."
            ) from e
        raise UserError(f"{name}: not {what}, or a damaged one ({_reason(e)})") from e
    except _DAMAGE as e:
        raise UserError(f"{name}: not {what}, or a damaged one ({_reason(e)})") from e


def _check_members(file: BinaryIO) -> None:
    """Compare the members of a zip container with their checksums, which torch does not; the older one has none."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"{damaged} does not match its checksum")


def _check_claims(file: BinaryIO) -> None:
    """Refuse an older container that claims more numbers than it has bytes, before memory is taken for them.

    It is a row of pickles followed by raw numbers. The fourth pickle describes the tensors; no size, stride or offset
    in it can exceed the size of the file. (The newer container is compared with the sizes of its members by torch.)
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if zipfile.is_zipfile(file):
        return
    file.seek(0)
    for pickled in range(4):
        for _, argument, _ in pickletools.genops(file):
            if pickled == 3 and isinstance(argument, int) and argument > size:
                raise EOFError(f"claims {argument:,} numbers in a file of {size:,} bytes")


def _reason(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    said = re.search("WeightsUnpickler error: (.+)", text)
    return (said.group(1) if said else text).splitlines()[0][:120]


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is infinite or NaN, found out a part at a time: torch.isfinite makes copies of its input."""
    return all(part.isfinite().all() for part in tensor.detach().flatten().split(_PART))
