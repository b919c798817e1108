"""Safe files: atomic writes, locks, digests, and reading tensors without ever running code from the file."""

import contextlib
import errno
import hashlib
import json
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

# Undocumented: exceptions that torch and zipfile were seen to raise on corrupt files.
_CORRUPT = (RuntimeError, OSError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError)
_CORRUPT += (AssertionError, OverflowError, MemoryError, struct.error, zlib.error, zipfile.BadZipFile)
SAFETENSORS = ".safetensors"  # ending of files that the package of that name reads and writes
_MAX_LINKS = 40  # the kernel's limit on following links
_PART = 2**20  # elements
_ZIP = b"PK\3\4"  # by which torch recognises a zip container
_UNSYNCABLE = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM)  # fsync is not supported
_BUSY = (errno.EAGAIN, errno.EACCES)  # another process holds the lock
_KINDS = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def lock(folder: str | os.PathLike, *, wait: bool) -> int | None:
    """Lock a folder until the descriptor is closed, so that a killed process leaves no lock behind.

    Args:
        folder: an existing folder.
        wait: wait until the lock is free.

    Returns:
        the descriptor; None where locks are not supported (some network file systems, and Windows).

    Raises:
        BlockingIOError: another process holds the lock.
        OSError: the folder does not exist or cannot be read.
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
def atomic_write(path: str | os.PathLike, *, follow_links: bool = True) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`, which on a clean exit is flushed to disk and replaces `path`.

    On any error the old file stays as it was and the temporary one is removed.

    Args:
        path: the file to write. Special files (a device, a pipe) and open descriptors of this process (/dev/stdout) are
            written to directly.
        follow_links: write to the target of a link. Otherwise the link itself is replaced, and nothing is written
            outside its folder.
    """
    path = Path(path)
    if follow_links:
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
        os.chmod(temporary, 0o666 & ~_umask())  # ordinary permissions; mkstemp's files are private
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Make a new folder beside `path`, which on a clean exit is flushed to disk and replaces `path`.

    On any error the old folder stays as it was and the new one is removed. A kill between the last two renames leaves
    the old folder intact under a hidden name, and the next call restores it.

    Args:
        path: a folder that holds only files, or does not exist yet.

    Raises:
        UserError: it is not a folder or cannot be written, or another process is writing it.
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
        for leftover in new.iterdir():  # of a process that was killed
            leftover.unlink()
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
    """Return the descriptor of this process that a path such as /dev/stdout stands for on Linux; None for other paths.

    The target of such a link may not exist (`pipe:[7]`), or may be a file that must not be replaced.
    """
    path = os.path.abspath(path)
    for _ in range(_MAX_LINKS):
        folder, name = os.path.realpath(os.path.dirname(path)), os.path.basename(path)
        if folder == f"/proc/{os.getpid()}/fd" and name.isdecimal():
            return int(name)
        path = os.path.join(folder, name)
        if not os.path.islink(path):
            break
        path = os.path.join(folder, os.readlink(path))
    return None


def keep(path: Path, previous: Path) -> None:
    """Keep a file that is about to be replaced under a second name, replacing any file of that name.

    Until then both names refer to one file, so the disk never holds more than two. Nothing is copied, unless `path` is
    a link to another file system.

    Raises:
        OSError: the folder cannot be written.
    """
    if path.is_file():
        previous.unlink(missing_ok=True)
        try:
            os.link(os.path.realpath(path), previous)  # atomic_write replaces the target of a link
        except OSError:
            if path.is_symlink():
                with open(path, "rb") as old, atomic_write(previous) as copy:
                    shutil.copyfileobj(old, copy)
            else:  # a file system without hard links: until the next file is complete, only the previous one exists
                os.replace(path, previous)
        sync_folder(previous.parent)


def sync_file(descriptor: int) -> None:
    """Wait until the content of a file is on disk, if the file supports it."""
    try:
        os.fsync(descriptor)
    except OSError as e:
        if e.errno not in _UNSYNCABLE:
            raise


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on disk, which syncing a file does not guarantee."""
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
        OSError: missing, unreadable, a folder, or another special file; its `strerror` says which.
    """
    try:
        mode = os.stat(path).st_mode
    except ValueError as e:  # a zero byte or a lone surrogate, which a name from a JSON file can contain
        raise OSError(errno.EINVAL, "not a valid file name", os.fspath(path)) from e
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "a special file")
        raise OSError(errno.EINVAL, f"{kind}, not a regular file", os.fspath(path))
    return open(path, "rb")


def read_regular(path: str | os.PathLike) -> str:
    """Read a regular file of UTF-8 text.

    Raises:
        OSError: as in :func:`open_regular`.
        UnicodeDecodeError: not UTF-8.
    """
    with open_regular(path) as file:
        return file.read().decode("utf-8")


def sha256_of_file(path: str | os.PathLike) -> str:
    """Return the digest of a file's bytes in hexadecimal; errors as in :func:`open_regular`."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Writer:
    """Target for torch.save that stores the first error instead of raising it.

    Torch's C++ writers would turn an exception into a RuntimeError of their own, or ignore it.
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
        """Do nothing: :func:`atomic_write` flushes."""


def save(path: str | os.PathLike, content: Any, *, legacy: bool = False) -> None:
    """Call torch.save to `path`, atomically, without a copy in memory; `legacy` writes the container of torch < 1.6.

    A state dict goes to a path that ends in .safetensors in that format, repeated tensors under their first names.

    Raises:
        OSError: the disk is full, or the like.
        UserError: the package safetensors is not installed.
    """
    if os.fspath(path).endswith(SAFETENSORS):
        data = _to_safetensors(content, path)
        with atomic_write(path) as file:
            file.write(data)
        return
    with atomic_write(path) as file:
        writer = _Writer(file)
        torch.save(content, writer, _use_new_zipfile_serialization=not legacy)
        if writer.error is not None:
            raise writer.error


def _safetensors(path: str | os.PathLike) -> Any:
    try:
        import safetensors.torch
    except ImportError as e:
        raise UserError(
            f"{path}: files of this kind need the package safetensors; pip install safetensors, or use a .pkl"
        ) from e
    return safetensors


def _to_safetensors(state: dict[str, torch.Tensor], path: str | os.PathLike) -> bytes:
    first = {}  # the format has no tensors that share memory
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else name
        first.setdefault(key, (name, tensor.contiguous()))
    metadata = {name: json.dumps(value) for name, value in getattr(state, "_metadata", {}).items()}
    return _safetensors(path).torch.save(dict(first.values()), metadata)


def _from_safetensors(data: bytes, path: str | os.PathLike, what: str) -> "OrderedDict[str, torch.Tensor]":
    package = _safetensors(path)
    try:
        state = OrderedDict(package.torch.load(data))
        (length,) = struct.unpack_from("<Q", data)
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
        state._metadata = OrderedDict((name, json.loads(value)) for name, value in metadata.items())
    except (package.SafetensorError, RecursionError, *_CORRUPT) as e:
        raise UserError(f"{path}: not {what}, or corrupt ({_reason(e)})") from e
    return state


def load(path: str | os.PathLike, what: str, *, mmap: bool = False) -> Any:
    """Read a file of tensors and plain values onto the CPU; nothing in it can run code.

    Args:
        path: zip or legacy container, tensors from any device; or a state dict that ends in .safetensors.
        what: what the file should be, for the message.
        mmap: map the tensors of a zip container into memory instead of reading them. The file must not be written to
            while they are in use (replacing it, as :func:`save` does, is fine).

    Raises:
        UserError: missing, unreadable, truncated or corrupt, or a pickle of something other than tensors.
    """
    try:
        file = open_regular(path)
    except (FileNotFoundError, NotADirectoryError) as e:
        raise UserError(f"{path}: no such file; expected {what}") from e
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); expected {what}") from e
    with file:
        if os.fspath(path).endswith(SAFETENSORS):
            return _from_safetensors(file.read(), path, what)
        return read(file, path, what, mmap=mmap)


def read(file: BinaryIO, name: str | os.PathLike, what: str, *, mmap: bool = False) -> Any:
    """Read an open file as :func:`load` does; `name` is for the message and, with `mmap`, its path."""
    try:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        zipped = file.read(len(_ZIP)) == _ZIP
        stored = (_check_members if zipped else _check_claims)(file, size)
        file.seek(0)
        with warnings.catch_warnings(action="ignore"):  # warnings about old formats do not concern the user
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
        raise UserError(f"{name}: not {what}, or corrupt ({_reason(e)})") from e
    except _CORRUPT as e:
        raise UserError(f"{name}: not {what}, or corrupt ({_reason(e)})") from e


def _check_members(file: BinaryIO, size: int) -> int:
    """Verify the checksums of a zip container, which torch does not.

    Nothing in it is compressed, so its members together may not exceed the file's `size` in bytes.

    Returns:
        bytes of tensor data in it.
    """
    with zipfile.ZipFile(file) as archive:
        claimed = sum(member.file_size for member in archive.infolist())
        if claimed > size:
            raise zipfile.BadZipFile(f"claims {claimed:,} bytes in a file of {size:,}")
        corrupt = archive.testzip()
        stored = sum(member.file_size for member in archive.infolist() if "/data/" in member.filename)
    if corrupt is not None:
        raise zipfile.BadZipFile(f"{corrupt} does not match its checksum")
    return stored


def _check_claims(file: BinaryIO, size: int) -> int:
    """Refuse a legacy container that claims more numbers than it has bytes, before memory is allocated for them.

    It is a series of pickles followed by raw numbers, without checksums. The fourth pickle describes the tensors; no
    size, stride or offset in it can exceed the size of the file.

    Returns:
        `size`, an upper bound on the bytes of tensor data.
    """
    file.seek(0)
    for pickled in range(4):
        for _, argument, _ in pickletools.genops(file):
            if pickled == 3 and isinstance(argument, int) and argument > size:
                raise EOFError(f"claims {argument:,} numbers in a file of {size:,} bytes")
    return size


def _check_content(content: Any, size: int, stored: int) -> None:
    """Refuse content that a file of `size` bytes cannot hold, or that is more than plain values.

    This refuses tensors that repeat the numbers of their storage, containers that contain one another many times over,
    and attributes, which may shadow methods. `stored` is the number of bytes of tensor data in the file; if tensors
    claim more, some versions of torch (2.6) return uninitialised memory.
    """
    waiting, parts, storages = [content], 0, {}
    while waiting:
        value = waiting.pop()
        parts += 1
        if parts > size:  # each takes at least a byte
            raise ValueError("its parts contain one another over and over")
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
    """Return whether no element is infinite or NaN, checked part by part because torch.isfinite copies its input."""
    return all(part.isfinite().all() for part in tensor.detach().flatten().split(_PART))


def sha256_of(content: Any) -> str:
    """Return the digest of nested dicts, lists and tuples of tensors and plain values, without copying CPU tensors.

    Types matter (1, 1.0 and True differ), and so does the order of a dict, but not its class. Tensors count by dtype,
    shape and bytes, on any device.

    Raises:
        TypeError: the content holds anything else.
    """
    digest = hashlib.sha256()
    _add(digest, content)
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    """Add a value, preceded by a line that says what follows, so that no two contents yield the same bytes."""
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
