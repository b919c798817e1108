"""Downloads with mirrors, resumption, and sizes and checksums known in advance; only a complete file gets its name."""

import argparse
import contextlib
import hashlib
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPException, HTTPResponse, responses
from pathlib import Path
from typing import BinaryIO
from urllib.error import HTTPError, URLError
from urllib.parse import urljoin, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from tqdm import tqdm

from trellisnet import serialization
from trellisnet.data import PROJECT
from trellisnet.errors import RunError, UserError, unwritable

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

TIMEOUT = 10.0  # seconds to connect, and between two pieces of a response
USER_AGENT = "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0"  # some refuse Python's with 403
_BLOCK = 1 << 16  # bytes
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)  # Windows lacks it
_REDIRECTS = {301, 302, 303, 307, 308}
_MAX_REDIRECTS = 5


@dataclass(frozen=True)
class Source:
    """A file and where to download it.

    Args:
        name: name of the file, without folder.
        urls: mirrors, http or https, tried in this order.
        checksum: md5 or sha256 of the content in hexadecimal.
        size: size of the content in bytes; nothing longer is ever written.

    Raises:
        ValueError: a name with a folder in it, no mirror or one that is not http(s), or an invalid checksum or size.
    """

    name: str
    urls: tuple[str, ...]
    checksum: str
    size: int

    def __post_init__(self):
        if self.name in ("", ".", "..") or re.search(r"[/\\\0]", self.name):
            raise ValueError(f"name: expected a file name without folder, got {self.name!r}")
        if isinstance(self.urls, str) or not self.urls:
            raise ValueError(f"urls: expected a tuple of at least one URL, got {self.urls!r}")
        for url in self.urls:
            if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
                raise ValueError(f"urls: expected http:// or https://, got {url!r}")
        if not re.fullmatch("[0-9a-f]{32}|[0-9a-f]{64}", self.checksum):
            raise ValueError(f"checksum: expected 32 or 64 hexadecimal digits in lower case, got {self.checksum!r}")
        if self.size < 1:
            raise ValueError(f"size: expected the number of bytes, got {self.size}")

    @property
    def algorithm(self) -> str:
        """Name of the checksum."""
        return "md5" if len(self.checksum) == 32 else "sha256"

    def sum(self, file: BinaryIO) -> str:
        """Checksum of the rest of a file."""
        return hashlib.file_digest(file, lambda: hashlib.new(self.algorithm, usedforsecurity=False)).hexdigest()


class _MirrorError(Exception):
    """Failure of a mirror to deliver the file; the message gives the reason."""


class _ResumeError(_MirrorError):
    """Failure to continue a partial file; a download from the start may succeed."""


def fetch(source: Source, folder: str | Path) -> Path:
    """Download a file if it is missing in `folder`, and return its path. See :func:`fetch_all`."""
    fetch_all([source], folder)
    return Path(folder) / source.name


def fetch_all(sources: Iterable[Source], folder: str | Path) -> list[Path]:
    """Download the files that are missing in `folder`, which is created if missing.

    If a download fails, the part that has arrived is kept as `<name>.part`, and the next mirror or call continues it; a
    link or special file of that name is removed first. Only a complete file with the right checksum gets its name; one
    with a wrong checksum is kept as `<name>.wrong`, replacing an older one. Processes that download the same file at
    the same time take turns, and the later ones find it done.

    Args:
        sources: the files. Those that exist cause no network traffic.
        folder: target folder.

    Returns:
        paths of the files that were missing.

    Raises:
        UserError: a file exists with another content (then nothing is replaced or downloaded), no mirror delivers a
            file, or the folder cannot be written.
        RunError: the disk is full.
    """
    folder = Path(folder)
    missing = [source for source in sources if not is_there(source, folder)]
    for number, source in enumerate(missing):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            failures = _fetch(source, folder / source.name)
        except OSError as e:  # from the disk: errors of the network are _MirrorErrors
            raise unwritable(f"{folder}: {source.name} cannot be written there", e) from e
        if failures:  # stop: the other files would most likely fail as slowly
            names, single = ", ".join(other.name for other in missing[number:]), source is missing[-1]
            raise UserError(
                f"{folder}: {names} missing; {source.name} could not be fetched ({_reasons(failures)})",
                f"Put {'it there under this name' if single else 'them there under these names'}, or try again"
                f"{_progress(source, folder)}.",
                "Or do without: train.py --data synthetic needs no files.",
            )
    return [folder / source.name for source in missing]


def is_there(source: Source, folder: Path) -> bool:
    """Return whether the file is in `folder`.

    Raises:
        UserError: a file of this name is there, but cannot be read or has another checksum.
    """
    path = folder / source.name
    try:
        with serialization.open_regular(path) as file:
            checksum = source.sum(file)
    except (FileNotFoundError, NotADirectoryError):  # the latter is reported when the folder is created
        return False
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); move it away or name another folder") from e
    if checksum != source.checksum:
        raise UserError(
            f"{path}: has {source.algorithm} {checksum}, expected {source.checksum}; it is not replaced: move it away, "
            "or, if it is your own, put the files that belong with it beside it"
        )
    return True


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _progress(source: Source, folder: Path) -> str:
    """Describe the partial file for a message; empty if there is none."""
    part = _part(folder / source.name)
    if not part.is_file():
        return ""
    return f" ({part.stat().st_size:,} of {source.size:,} bytes are kept in {part.name} and will be continued)"


def _reasons(failures: dict[str, str]) -> str:
    """Say why each mirror failed, naming a shared reason once: without a network it is the same for all."""
    urls: dict[str, list[str]] = {}
    for url, reason in failures.items():
        urls.setdefault(reason, []).append(url)
    return "; ".join(
        f"{first} and {len(others)} more: {reason}" if others else f"{first}: {reason}"
        for reason, (first, *others) in urls.items()
    )


def _fetch(source: Source, path: Path) -> dict[str, str]:
    """Download the file to `path`.

    Returns:
        URL → reason if all mirrors failed; empty on success.
    """
    part, failures = _part(path), {}
    with _exclusive(part) as file:
        if is_there(source, path.parent):  # another process has just finished it
            os.unlink(part)
            return {}
        for url in source.urls:
            try:
                _complete(source, url, file)
            except _MirrorError as e:
                failures[url] = str(e)
                continue
            os.fsync(file.fileno())
            os.replace(part, path)
            return {}
        if not _size(file):
            os.unlink(part)
    return failures


@contextlib.contextmanager
def _exclusive(part: Path) -> Iterator[BinaryIO]:
    """Open the partial file for appending, locked: other processes wait until this one is done."""
    ours = False
    while not ours:
        _remove_unless_plain(part)
        with open(part, "a+b", opener=lambda path, flags: os.open(path, flags | _NO_LINK, 0o666)) as file:
            if fcntl is not None:
                with contextlib.suppress(OSError):  # a file system without locks, for one process at a time
                    fcntl.flock(file, fcntl.LOCK_EX)
            # Check that the name still refers to this file: while we waited, it may have got its final name.
            with contextlib.suppress(FileNotFoundError):
                ours = os.path.samestat(os.fstat(file.fileno()), part.stat())
            if ours:
                yield file


def _remove_unless_plain(part: Path) -> None:
    """Remove links and special files of this name: writing to them could change another file, or never end."""
    with contextlib.suppress(FileNotFoundError):
        status = part.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            part.unlink()


def _size(file: BinaryIO) -> int:
    return file.seek(0, os.SEEK_END)


def _complete(source: Source, url: str, file: BinaryIO) -> None:
    """Complete the partial file from a mirror and check it, discarding content that cannot belong to it.

    Raises:
        _MirrorError: the file is still not complete.
    """
    if _size(file) > source.size:
        file.truncate(0)
    if _size(file) == source.size:  # an earlier call was killed just before it renamed the file
        with contextlib.suppress(_MirrorError):
            return _check(source, file, _MirrorError)
    if offset := _size(file):
        with contextlib.suppress(_ResumeError):
            return _receive(source, url, file, offset)
    return _receive(source, url, file, 0)


def _check(source: Source, file: BinaryIO, error: type[_MirrorError]) -> None:
    """Check the received file; `error` is raised for a wrong checksum, _MirrorError for a short file."""
    file.flush()
    if (size := _size(file)) < source.size:
        raise _MirrorError(f"ended after {size:,} of {source.size:,} bytes")
    file.seek(0)
    if (checksum := source.sum(file)) != source.checksum:
        remark = _keep_aside(file, Path(file.name).with_name(f"{source.name}.wrong"))
        file.truncate(0)
        raise error(f"{source.algorithm} {checksum} instead of {source.checksum}{remark}")


def _keep_aside(file: BinaryIO, path: Path) -> str:
    """Copy the wrong content to `path`, for inspection, and return a remark for the message."""
    file.seek(0)
    try:
        with serialization.atomic_write(path, follow_links=False) as copy:
            shutil.copyfileobj(file, copy)
    except OSError:
        return ""
    return f" (kept as {path.name})"


def _receive(source: Source, url: str, file: BinaryIO, offset: int) -> None:
    """Append the mirror's bytes from `offset` on, or start over if it sends the whole file; check the result."""
    with _open(url, offset) as response:
        if response.status == HTTPStatus.PARTIAL_CONTENT and offset:
            if not re.match(rf"bytes {offset}-\d+/({source.size}|\*)$", response.headers.get("Content-Range", "")):
                raise _ResumeError("sends another part than requested")
        elif response.status == HTTPStatus.OK:
            if response.length not in (None, source.size):
                raise _MirrorError(f"announces {response.length:,} bytes instead of {source.size:,}")
            offset = 0
        else:
            raise _MirrorError(_status(response.status))
        error = _ResumeError if offset else _MirrorError
        file.truncate(offset)
        with tqdm(
            total=source.size, initial=offset, desc=source.name, unit="B", unit_scale=True,
            disable=None, dynamic_ncols=True, leave=False,
        ) as bar:  # fmt: skip
            for block in _blocks(response):
                offset += len(block)
                if offset > source.size:
                    file.truncate(0)
                    raise error(f"sends more than {source.size:,} bytes")
                file.write(block)
                bar.update(len(block))
        _check(source, file, error)


def _blocks(response: HTTPResponse) -> Iterator[bytes]:
    """Yield the body as it arrives."""
    while True:
        try:
            block = response.read1(_BLOCK)
        except (OSError, HTTPException) as e:
            raise _MirrorError(_reason(e)) from e
        if not block:
            return
        yield block


class _NoRedirects(HTTPRedirectHandler):
    """Handler that leaves redirects to :func:`_open`; its parent would read the whole body of one, however long."""

    def http_error_302(self, *_args):
        """Do not handle the redirect, so that it becomes an HTTPError."""

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def _open(url: str, offset: int) -> HTTPResponse:
    """Request the file from `offset` (bytes) on, following redirects on the same host.

    Raises:
        _MirrorError: no response, or one that is not a success.
        _ResumeError: the server refuses the offset.
    """
    opener = build_opener(_NoRedirects)
    headers = {"User-Agent": USER_AGENT, "Accept": "*/*"} | ({"Range": f"bytes={offset}-"} if offset else {})
    for _ in range(_MAX_REDIRECTS + 1):
        try:
            return opener.open(Request(url, headers=headers), timeout=TIMEOUT)
        except HTTPError as e:
            e.close()
            status, location = e.code, e.headers.get("Location")
        except (OSError, HTTPException, ValueError) as e:  # ValueError: an invalid URL
            raise _MirrorError(_reason(e)) from e
        if status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and offset:
            raise _ResumeError(_status(status))
        if status not in _REDIRECTS or not location:
            raise _MirrorError(_status(status))
        url = _redirected(url, location)
    raise _MirrorError(f"redirects more than {_MAX_REDIRECTS} times")


def _redirected(url: str, location: str) -> str:
    """Return the target of a redirect; refuse one that leaves the host or goes from https to something else."""
    try:
        target = urljoin(url, location)
        old, new = urlsplit(url), urlsplit(target)
        if new.scheme not in ("http", "https") or (old.scheme, new.scheme) == ("https", "http"):
            raise _MirrorError(f"redirects from {old.scheme} to {_printable(new.scheme)}, which is not followed")
        if old.hostname != new.hostname:
            raise _MirrorError(f"redirects to another host ({_printable(new.hostname)}), which is not followed")
    except ValueError as e:
        raise _MirrorError("redirects to an invalid URL") from e
    return target


def _status(code: int) -> str:
    return f"HTTP {code} {responses.get(code, '(unknown status)')}"


def _reason(error: Exception) -> str:
    if isinstance(error, URLError) and isinstance(error.reason, Exception):
        error = error.reason
    if isinstance(error, TimeoutError):
        return f"no answer for {TIMEOUT:g} s"
    return _printable(getattr(error, "strerror", None) or str(error) or type(error).__name__)


def _printable(text: str | None) -> str:
    """Turn text from a server into one short, printable line."""
    return " ".join("".join(c if c.isprintable() else " " for c in text or "nothing").split())[:120]


def main(
    module: str,
    description: str,
    default: str,
    names: Sequence[str],
    fetch: Callable[[Path], list[Path]],
    argv: Sequence[str] | None = None,
) -> int:
    """Run `python -m <module> FOLDER`, which downloads the files missing in a folder.

    Args:
        module: the module that is run.
        description: text for --help.
        default: default folder, relative to the project.
        names: names of all files.
        fetch: downloads the files missing in a folder and returns their paths.
        argv: command-line arguments; None for those of the process.

    Returns:
        the exit code: 0 done; 2 wrong input; 1 failure.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument(
        "folder", nargs="?", default=PROJECT / default, help=f"target folder (default: {default} in the project)"
    )
    folder = Path(parser.parse_args(argv).folder)
    try:
        fetched = fetch(folder)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except RunError as e:
        print(f"failed: {e}", file=sys.stderr)
        return 1
    for name in names:
        print(f"{folder / name}: {'fetched' if folder / name in fetched else 'already there'}")
    return 0
