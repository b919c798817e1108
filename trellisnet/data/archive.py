"""Files out of archives that nobody vouches for: only those asked for, of bounded size, and only where they belong."""

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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, BinaryIO

from trellisnet import serialization
from trellisnet.errors import UserError, unwritable

_BLOCK = 1 << 16  # bytes
_HEADER = 1 << 20  # bytes of a header of a tar archive; they are read at once
_LONG = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_ZIP = (b"PK\3\4", b"PK\5\6")  # the second: of an empty one. An uncompressed tar may well end like a zip.

# What the libraries raise on damaged input is only partly documented.
_DAMAGE = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, struct.error, EOFError, OSError)
_DAMAGE += (RuntimeError, ValueError, KeyError, IndexError, TypeError, OverflowError, MemoryError)


@dataclass(frozen=True)
class _Member:
    name: str
    regular: bool  # a file, not a folder, link or device
    open: Callable[[], IO[bytes]]


class _TarInfo(tarfile.TarInfo):
    """Refuses headers that would be read into memory whatever their size."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _LONG and self.size > _HEADER:
            raise tarfile.ReadError(f"a header of {self.size:,} bytes")
        return super()._proc_member(archive)


def extract(archive: Path, members: dict[str, str], folder: Path, *, max_size: int) -> list[Path]:
    """Take single files out of a zip or tar archive (plain or compressed). What else is in it is not touched.

    Nothing is written before all names in the archive are known to be harmless. The files are written one after the
    other, each of them whole or not at all; one that is there already is replaced.

    Args:
        archive: the file.
        members: name in the archive -> name of the file.
        folder: where the files go, made if need be.
        max_size: of each of the files in bytes, whatever the archive says of their sizes.

    Returns:
        paths of the files, in the order of `members`.

    Raises:
        ValueError: a name of a file with a folder in it.
        UserError: no archive or a damaged one; one with a name that is absolute or leads out of its folder; a member
            that is missing, there more than once, no regular file or too large; a folder that cannot be written.
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
        with _refusing_damage(archive):
            found = _members(file, stack)
        wanted = _wanted(archive, found, members)
        for member, name in zip(wanted, members.values(), strict=True):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with serialization.atomic_write(folder / name) as out:
                    for block in _blocks(archive, member, max_size):
                        out.write(block)
            except OSError as e:  # those of reading are UserErrors
                raise unwritable(f"{folder}: {name} cannot be written there", e) from e
    return [folder / name for name in members.values()]


@contextlib.contextmanager
def _refusing_damage(archive: Path) -> Iterator[None]:
    try:
        yield
    except _DAMAGE as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0].rstrip(":")[:120]
        raise UserError(f"{archive}: not a zip or tar archive, or a damaged one ({reason}); get it again") from e


def _members(file: BinaryIO, stack: contextlib.ExitStack) -> list[_Member]:
    """Everything in the archive; `stack` keeps it open."""
    start = file.read(4)
    file.seek(0)
    if start in _ZIP:
        unzipped = stack.enter_context(zipfile.ZipFile(file))
        return [_Member(info.filename, _is_regular(info), partial(unzipped.open, info)) for info in unzipped.infolist()]
    untarred = stack.enter_context(tarfile.TarFile.open(fileobj=file, mode="r:*", tarinfo=_TarInfo))
    found = [_Member(info.name, info.isreg(), partial(untarred.extractfile, info)) for info in untarred.getmembers()]
    while untarred.fileobj.read(_BLOCK):  # the checksum of a compressed one comes after its last member
        pass
    return found


def _is_regular(info: zipfile.ZipInfo) -> bool:
    return not info.is_dir() and stat.S_IFMT(info.external_attr >> 16) in (0, stat.S_IFREG)  # 0: made without modes


def _wanted(archive: Path, found: list[_Member], names: dict[str, str]) -> list[_Member]:
    """The members of these names, once the whole archive is known to be harmless."""
    for member in found:
        path = posixpath.normpath(member.name.replace("\\", "/"))
        if path.startswith("/") or ntpath.splitdrive(path)[0] or path.split("/")[0] == "..":
            raise UserError(
                f"{archive}: holds {member.name[:120]!r}, which leads out of its folder, so nothing of it is taken; "
                "get it from somebody you trust"
            )
    times, by_name = Counter(member.name for member in found), {member.name: member for member in found}
    for name in names:
        if times[name] != 1:
            says = f"holds {name} {times[name]} times" if times[name] else f"does not hold {name}"
            raise UserError(f"{archive}: {says}; it is not the archive that was expected, get the right one")
        if not by_name[name].regular:
            raise UserError(f"{archive}: {name} is no regular file in it; get the right archive")
    return [by_name[name] for name in names]


def _blocks(archive: Path, member: _Member, max_size: int) -> Iterator[bytes]:
    """The content of a member, counted."""
    left = max_size
    with contextlib.ExitStack() as stack:
        with _refusing_damage(archive):
            file = stack.enter_context(member.open())
        while True:
            with _refusing_damage(archive):
                block = file.read(_BLOCK)
            if not block:
                return
            left -= len(block)
            if left < 0:
                raise UserError(f"{archive}: {member.name} is larger than {max_size:,} bytes; get the right archive")
            yield block
