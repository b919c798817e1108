"""Files that survive: atomic writes, locks, sums, and reading tensors without ever running code from the file."""

import contextlib
import errno
import hashlib
import os
import pickle
import pickletools
import re
import shutil
import stat
import struct
import tempfile
import warnings
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from trellisnet.errors import UserError, unwritable

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# What torch and zipfile raise on damaged input is not documented; these are the kinds seen on altered files.
_DAMAGE = (RuntimeError, OSError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError)
_DAMAGE += (AssertionError, OverflowError, MemoryError, struct.error, zlib.error, zipfile.BadZipFile)
_LINKS = 40  # that the system follows
_PART = 2**20  # elements
_ZIP = b"PK\3\4"  # what torch knows a zip container by
_UNSYNCED = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM)  # of what cannot be synchronised
_BUSY = (errno.EAGAIN, errno.EACCES)  # of a lock that somebody else has
_KINDS = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def lock(folder: str | os.PathLike, *, wait: bool) -> int | None:
    """Take the lock of a folder, which lasts until the descriptor is closed: a killed process leaves none behind.

    Args:
        folder: an existing one.
        wait: until whoever has the lock lets go of it.

    Returns:
        the descriptor; None where there are no locks (on some network file systems, and on Windows).

    Raises:
        BlockingIOError: somebody else has it.
        OSError: no such folder, or one that may not be read.
    """
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as e:
        os.close(descriptor)
        if e.errno in _BUSY:
            raise BlockingIOError(e.errno, e.strerror) from e
        return None
    return descriptor


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`; on a clean exit it is flushed to disk and takes the place of `path`.

    Whatever goes wrong in between, the old file stays as it was and the temporary one is removed. Links are followed;
    what is no regular file (a device, a pipe) and what this process has open (/dev/stdout) is written to directly.
    """
    if (number := stands_for(path)) is not None:
        with os.fdopen(os.dup(number), "wb") as file:
            yield file
        return
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
        sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Make a new folder beside `path`; on a clean exit it is flushed to disk and takes the place of `path`.

    Whatever goes wrong in between, the old folder stays as it was and the new one is removed. Between the last two
    renames a kill leaves the old folder whole under a hidden name, from which the next call puts it back.

    Args:
        path: a folder of files alone, or none yet.

    Raises:
        UserError: it is no folder or cannot be written, or another process is making it.
    """
    path = Path(os.path.realpath(path))
    new, old = (path.with_name(f".{path.name}.{end}") for end in ("new", "old"))
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file; name another folder")
    try:
        new.mkdir(parents=True, exist_ok=True)
        descriptor = lock(new, wait=False)
    except BlockingIOError as e:
        raise UserError(f"{path}: another process is at work there; wait for it, or name another folder") from e
    except OSError as e:
        raise unwritable(f"{path}: cannot be written", e) from e
    try:
        if old.exists() and not path.exists():
            os.rename(old, path)
        shutil.rmtree(old, ignore_errors=True)
        for left in new.iterdir():  # by a process that was killed
            left.unlink()
        yield new
        for name in os.listdir(new):
            with open(new / name, "rb") as file:
                sync_file(file.fileno())
        sync_folder(new)
        if path.exists():
            os.rename(path, old)
        os.rename(new, path)
        sync_folder(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        if old.exists() and not path.exists():
            os.rename(old, path)
        shutil.rmtree(new, ignore_errors=True)
        raise
    finally:
        if descriptor is not None:
            os.close(descriptor)


def stands_for(path: str | os.PathLike) -> int | None:
    """The descriptor of this process that a path such as /dev/stdout stands for on Linux; None if it is another path.

    What such a link seems to point to may be a name of nothing (`pipe:[7]`), or of a file that must not be replaced.
    """
    path = os.path.abspath(path)
    for _ in range(_LINKS):
        folder, name = os.path.realpath(os.path.dirname(path)), os.path.basename(path)
        if folder == f"/proc/{os.getpid()}/fd" and name.isdecimal():
            return int(name)
        path = os.path.join(folder, name)
        if not os.path.islink(path):
            break
        path = os.path.join(folder, os.readlink(path))
    return None


def keep(path: Path, previous: Path) -> None:
    """Give a file that is about to be replaced a second name, in the place of what had that; nothing is copied.

    While the next file is written the two names stand for one file, so that there is never a third on the disk. A link
    to a file on another file system is an exception: that file is copied.

    Raises:
        OSError: the folder cannot be written.
    """
    if path.is_file():
        previous.unlink(missing_ok=True)
        try:
            os.link(os.path.realpath(path), previous)  # what a link points to is what will be replaced
        except OSError:
            if path.is_symlink():
                with open(path, "rb") as old, atomic_write(previous) as copy:
                    shutil.copyfileobj(old, copy)
            else:  # a file system without hard links: until the next file is whole there is only the previous one
                os.replace(path, previous)
        sync_folder(previous.parent)


def sync_file(descriptor: int) -> None:
    """Wait until what was written is on the disk, where the file and the system know how."""
    try:
        os.fsync(descriptor)
    except OSError as e:
        if e.errno not in _UNSYNCED:
            raise


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk: a file's new name is not there yet when its content is."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows, or a folder that may be written but not read
        return
    try:
        sync_file(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Open a regular file for reading in binary; a pipe would block until somebody writes, a device may never end.

    Raises:
        OSError: missing, unreadable, a folder, or no regular file; its `strerror` says which.
    """
    try:
        mode = os.stat(path).st_mode
    except ValueError as e:  # a zero byte or a lone surrogate, which a JSON file can hold
        raise OSError(errno.EINVAL, "no valid file name", os.fspath(path)) from e
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "a special file")
        raise OSError(errno.EINVAL, f"{kind}, not a regular file", os.fspath(path))
    return open(path, "rb")


def read_regular(path: str | os.PathLike) -> str:
    """Read a regular file of UTF-8 text.

    Raises:
        OSError: as of :func:`open_regular`.
        UnicodeDecodeError: not UTF-8.
    """
    with open_regular(path) as file:
        return file.read().decode("utf-8")


def sha256_of_file(path: str | os.PathLike) -> str:
    """Digest of a file's bytes, as hexadecimal. Errors as of :func:`open_regular`."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    try:
        file = open_regular(path)
    except (FileNotFoundError, NotADirectoryError) as e:
        raise UserError(f"{path}: no such file; expected {what}") from e
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); expected {what}") from e
    with file:
        return read(file, path, what, mmap=mmap)


def read(file: BinaryIO, name: str | os.PathLike, what: str, *, mmap: bool = False) -> Any:
    """:func:`load` of an open file; `name` is for the message, and with `mmap` its path."""
    try:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        zipped = file.read(len(_ZIP)) == _ZIP
        stored = (_check_members if zipped else _check_claims)(file, size)
        file.seek(0)
        with warnings.catch_warnings(action="ignore"):  # how the file was written is not the user's concern
            source = name if mmap and zipped else file
            content = torch.load(source, map_location="cpu", weights_only=True, mmap=mmap and zipped)
        _check_content(content, size, stored)
        return content
    except pickle.UnpicklingError as e:
        if re.search("unsupported (global|class)", str(e), re.IGNORECASE):
            raise UserError(
                f"{name}: holds a pickled object (a whole model?), not {what}; opening it could run any code, so it is "
                "refused. Where it was made, save its weights with torch.save(model.state_dict(), FILE) and load those."
            ) from e
        raise UserError(f"{name}: not {what}, or a damaged one ({_reason(e)})") from e
    except _DAMAGE as e:
        raise UserError(f"{name}: not {what}, or a damaged one ({_reason(e)})") from e


def _check_members(file: BinaryIO, size: int) -> int:
    """Compare the members of a zip container with their checksums, which torch does not.

    Nothing in it is compressed, so that together they are no larger than the file of `size` bytes.

    Returns:
        bytes of the numbers in it.
    """
    with zipfile.ZipFile(file) as archive:
        claimed = sum(member.file_size for member in archive.infolist())
        if claimed > size:
            raise zipfile.BadZipFile(f"claims {claimed:,} bytes in a file of {size:,}")
        damaged = archive.testzip()
        stored = sum(member.file_size for member in archive.infolist() if "/data/" in member.filename)
    if damaged is not None:
        raise zipfile.BadZipFile(f"{damaged} does not match its checksum")
    return stored


def _check_claims(file: BinaryIO, size: int) -> int:
    """Refuse an older container that claims more numbers than it has bytes, before memory is taken for them.

    It is a row of pickles followed by raw numbers. The fourth pickle describes the tensors; no size, stride or offset
    in it can exceed the size of the file. It has no checksums.

    Returns:
        `size`, more than which the numbers in it cannot have.
    """
    file.seek(0)
    for pickled in range(4):
        for _, argument, _ in pickletools.genops(file):
            if pickled == 3 and isinstance(argument, int) and argument > size:
                raise EOFError(f"claims {argument:,} numbers in a file of {size:,} bytes")
    return size


def _check_content(content: Any, size: int, stored: int) -> None:
    """Refuse content that is more than what a file of `size` bytes can hold, or that carries more than its values.

    Such are tensors that repeat the numbers of their storage, containers that hold one another over and over, and
    attributes, which may hide the methods of what has them. Where less than the numbers it claims are stored, some
    versions of torch (2.6) leave the rest as it was in memory; `stored` is how many bytes there are.
    """
    waiting, parts, storages = [content], 0, {}
    while waiting:
        value = waiting.pop()
        parts += 1
        if parts > size:  # none takes less than a byte
            raise ValueError("its parts hold one another over and over")
        if getattr(value, "__dict__", {}).keys() - ({"_metadata"} if isinstance(value, OrderedDict) else set()):
            raise ValueError(f"a {type(value).__name__} in it has attributes")
        if isinstance(value, dict):
            waiting += value.keys()
            waiting += value.values()
        elif isinstance(value, list | tuple | set):
            waiting += value
        elif isinstance(value, torch.Tensor) and value.layout == torch.strided:
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            if not value.numel() * value.element_size() <= storage.nbytes() <= size:
                raise ValueError(f"a tensor in it claims {value.numel():,} numbers")
    if (claimed := sum(storages.values())) > stored:
        raise ValueError(f"its tensors claim {claimed:,} bytes and have {stored:,}")


def _reason(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    said = re.search("WeightsUnpickler error: (.+)", text)
    return (said.group(1) if said else text).splitlines()[0][:120]


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is infinite or NaN, found out a part at a time: torch.isfinite makes copies of its input."""
    return all(part.isfinite().all() for part in tensor.detach().flatten().split(_PART))


def sha256_of(content: Any) -> str:
    """Digest of nested dicts, lists and tuples of tensors and plain values, taken without copying what is on the CPU.

    Types count (1, 1.0 and True differ) and so does the order of a dict, but not what kind of dict it is. Tensors count
    by dtype, shape and bytes, wherever they are.

    Raises:
        TypeError: something else is in it.
    """
    digest = hashlib.sha256()
    _add(digest, content)
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    """Every value begins with a line that says what follows, so that no two contents come to the same bytes."""
    if isinstance(value, torch.Tensor):
        digest.update(f"{value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    elif isinstance(value, dict):
        digest.update(f"dict {len(value)}\n".encode())
        for key, item in value.items():
            _add(digest, key)
            _add(digest, item)
    elif isinstance(value, list | tuple):
        digest.update(f"{'list' if isinstance(value, list) else 'tuple'} {len(value)}\n".encode())
        for item in value:
            _add(digest, item)
    elif value is None or type(value) in (bool, int, float, str):
        digest.update(f"{value!a}\n".encode())  # exact for a float, and one line for a str
    else:
        raise TypeError(f"expected tensors and plain values, not {type(value)}")
