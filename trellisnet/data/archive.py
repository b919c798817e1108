"""Safe extraction from untrusted archives: only the requested files, of bounded size, and only into their folder."""

import contextlib
import lzma
import ntpath
import posixpath
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, BinaryIO

from trellisnet import serialization
from trellisnet.errors import UserError, unwritable

_BLOCK = 1 << 16  # bytes
_HEADER = 1 << 20  # bytes of a header of a tar archive, which is read into memory
_LONG = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_ZIP = (b"PK\3\4", b"PK\5\6")  # the second: an empty zip. The end decides nothing: a tar may end like a zip.

# Only partly documented: exceptions of the libraries on corrupt input.
_CORRUPT = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, struct.error, EOFError, OSError)
_CORRUPT += (RuntimeError, ValueError, KeyError, IndexError, TypeError, OverflowError, MemoryError)


@dataclass(frozen=True)
class _Member:
    name: str
    regular: bool  # not a folder, link or device
    open: Callable[[], IO[bytes]]


class _TarInfo(tarfile.TarInfo):
    """Tar member that refuses overlong headers; its parent class reads a header of any size into memory."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _LONG and self.size > _HEADER:
            raise tarfile.ReadError(f"a header of {self.size:,} bytes")
        return super()._proc_member(archive)


def extract(archive: Path, members: dict[str, str], folder: Path, *, max_size: int) -> list[Path]:
    """Extract single files from a zip or tar archive (plain or compressed), and nothing else.

    Nothing is written until all names in the archive have been checked. The files are written one by one, each
    atomically; an existing file, or a link of that name, is replaced.

    Args:
        archive: the archive.
        members: name in the archive → name of the file.
        folder: target folder, created if missing.
        max_size: limit on the size of each file in bytes, regardless of the size that the archive claims.

    Returns:
        paths of the files, in the order of `members`.

    Raises:
        ValueError: the name of a file contains a folder.
        UserError: not an archive, or corrupt; a name in it is absolute or leads out of its folder; a member is missing,
            there more than once, not a regular file, or too large; the folder cannot be written.
        RunError: the disk is full.
    """
    for name in members.values():
        if name in ("", ".", "..") or re.search(r"[/\\\0]", name):
            raise ValueError(f"members: expected names of files without folder, got {name!r}")
    try:
        file = serialization.open_regular(archive)
    except OSError as e:
        raise UserError(f"{archive}: cannot be read ({e.strerror}); put the archive there") from e
    with file, contextlib.ExitStack() as stack:
        with _refusing_corrupt(archive):
            content = _members(file, stack)
        requested = _requested(archive, content, members)
        for member, name in zip(requested, members.values(), strict=True):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with serialization.atomic_write(folder / name, follow_links=False) as out:
                    for block in _blocks(archive, member, max_size):
                        out.write(block)
            except OSError as e:  # from writing: errors in reading are UserErrors
                raise unwritable(f"{folder}: {name} cannot be written there", e) from e
    return [folder / name for name in members.values()]


@contextlib.contextmanager
def _refusing_corrupt(archive: Path) -> Iterator[None]:
    try:
        yield
    except _CORRUPT as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0].rstrip(":")[:120]
        raise UserError(f"{archive}: not a zip or tar archive, or corrupt ({reason}); get it again") from e


def _members(file: BinaryIO, stack: contextlib.ExitStack) -> list[_Member]:
    """List all members of the archive, which `stack` keeps open."""
    start = file.read(4)
    file.seek(0)
    if start in _ZIP:
        unzipped = stack.enter_context(zipfile.ZipFile(file))
        return [_Member(info.filename, _is_regular(info), partial(unzipped.open, info)) for info in unzipped.infolist()]
    untarred = stack.enter_context(tarfile.TarFile.open(fileobj=file, mode="r:*", tarinfo=_TarInfo))
    members = [_Member(info.name, info.isreg(), partial(untarred.extractfile, info)) for info in untarred.getmembers()]
    while untarred.fileobj.read(_BLOCK):  # to the end, where a compressed archive has its checksum
        pass
    return members


def _is_regular(info: zipfile.ZipInfo) -> bool:
    return not info.is_dir() and stat.S_IFMT(info.external_attr >> 16) in (0, stat.S_IFREG)  # 0: a zip without modes


def _requested(archive: Path, members: list[_Member], names: Iterable[str]) -> list[_Member]:
    """Check the names of the whole archive and return the members of these names."""
    for member in members:
        path = posixpath.normpath(member.name.replace("\\", "/"))
        if path.startswith("/") or ntpath.splitdrive(path)[0] or path.split("/")[0] == "..":
            raise UserError(
                f"{archive}: holds {member.name[:120]!r}, which leads out of its folder, so nothing is extracted; get "
                "it from somebody you trust"
            )
    times, by_name = Counter(member.name for member in members), {member.name: member for member in members}
    for name in names:
        if times[name] != 1:
            problem = f"holds {name} {times[name]} times" if times[name] else f"does not hold {name}"
            raise UserError(f"{archive}: {problem}; it is not the expected archive, get the right one")
        if not by_name[name].regular:
            raise UserError(f"{archive}: {name} is not a regular file in it; get the right archive")
    return [by_name[name] for name in names]


def _blocks(archive: Path, member: _Member, max_size: int) -> Iterator[bytes]:
    """Yield the content of a member, at most `max_size` bytes."""
    left = max_size
    with contextlib.ExitStack() as stack:
        with _refusing_corrupt(archive):
            file = stack.enter_context(member.open())
        while True:
            with _refusing_corrupt(archive):
                block = file.read(_BLOCK)
            if not block:
                return
            left -= len(block)
            if left < 0:
                raise UserError(f"{archive}: {member.name} is larger than {max_size:,} bytes; get the right archive")
            yield block
