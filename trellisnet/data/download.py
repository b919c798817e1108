"""Files from the net: several mirrors, resume, a known size and checksum, and never half a file under its name."""

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

TIMEOUT = 10.0  # seconds to connect, and between two pieces of an answer
USER_AGENT = "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0"  # some answer Python's with 403
_BLOCK = 1 << 16  # bytes
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)  # Windows has no such flag
_REDIRECTS = {301, 302, 303, 307, 308}
_MAX_REDIRECTS = 5


@dataclass(frozen=True)
class Source:
    """A file and where it can be had.

    Args:
        name: of the file in its folder.
        urls: mirrors, http or https, tried in this order.
        md5: hexadecimal sum of the content.
        size: of the content in bytes; nothing longer is ever written.

    Raises:
        ValueError: a name with a folder in it, no mirror or one that is not http(s), no md5, no size.
    """

    name: str
    urls: tuple[str, ...]
    md5: str
    size: int

    def __post_init__(self):
        if self.name in ("", ".", "..") or re.search(r"[/\\\0]", self.name):
            raise ValueError(f"name: expected that of a file without folder, got {self.name!r}")
        if isinstance(self.urls, str) or not self.urls:
            raise ValueError(f"urls: expected one URL or more in a tuple, got {self.urls!r}")
        for url in self.urls:
            if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
                raise ValueError(f"urls: expected http:// or https://, got {url!r}")
        if not re.fullmatch("[0-9a-f]{32}", self.md5):
            raise ValueError(f"md5: expected 32 hexadecimal digits in lower case, got {self.md5!r}")
        if self.size < 1:
            raise ValueError(f"size: expected the number of bytes, got {self.size}")


class _MirrorError(Exception):
    """This mirror does not give the file; the message says why."""


class _ResumeError(_MirrorError):
    """Continuing the partial file did not work; from the start it may."""


def fetch(source: Source, folder: str | Path) -> Path:
    """The path of a file in `folder`; it is fetched if it is missing. See :func:`fetch_all`."""
    fetch_all([source], folder)
    return Path(folder) / source.name


def fetch_all(sources: Iterable[Source], folder: str | Path) -> list[Path]:
    """Fetch the files that are missing in `folder`, which is made if need be.

    What has arrived of a file is kept as `<name>.part` when something goes wrong, and the next mirror or the next call
    continues it; a link or anything else of that name is removed first. Only a whole file with the right checksum gets
    its name; one with another is kept as `<name>.wrong`, which replaces an older one. Processes that fetch the same
    file at the same time take turns, and the later ones find it there.

    Args:
        sources: the files. Nothing is asked of the net for those that are there.
        folder: where they belong.

    Returns:
        paths of the files that were missing.

    Raises:
        UserError: a file is there with another content (it is not replaced, and nothing is fetched), no mirror gives a
            file, or the folder cannot be written.
        RunError: the disk is full.
    """
    folder = Path(folder)
    missing = [source for source in sources if not is_there(source, folder)]
    for number, source in enumerate(missing):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            failures = _fetch(source, folder / source.name)
        except OSError as e:  # those of the net are _MirrorErrors
            raise unwritable(f"{folder}: {source.name} cannot be written there", e) from e
        if failures:  # the others would most likely fail as slowly
            names, single = ", ".join(other.name for other in missing[number:]), source is missing[-1]
            raise UserError(
                f"{folder}: {names} missing; {source.name} could not be fetched ({_reasons(failures)})",
                f"Put {'it there under this name' if single else 'them there under these names'}, or try again"
                f"{_kept(source, folder)}.",
                "Or do without: train.py --data synthetic needs no files.",
            )
    return [folder / source.name for source in missing]


def is_there(source: Source, folder: Path) -> bool:
    """Whether the file is in `folder`.

    Raises:
        UserError: one with this name is, but it cannot be read or has another checksum.
    """
    path = folder / source.name
    try:
        with serialization.open_regular(path) as file:
            found = _md5(file)
    except (FileNotFoundError, NotADirectoryError):  # the second is reported when the folder is made
        return False
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); move it away or name another folder") from e
    if found != source.md5:
        raise UserError(
            f"{path}: has md5 {found}, the file to fetch {source.md5}; it is not replaced: move it away, or, if it is "
            "your own, put the files that belong with it beside it"
        )
    return True


def _md5(file: BinaryIO) -> str:
    return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _kept(source: Source, folder: Path) -> str:
    """What to tell of the partial file."""
    part = _part(folder / source.name)
    if not part.is_file():
        return ""
    return f" ({part.stat().st_size:,} of {source.size:,} bytes are kept in {part.name} and will be continued)"


def _reasons(failures: dict[str, str]) -> str:
    """Why no mirror gave a file, every reason once: without a network it is the same for all."""
    urls: dict[str, list[str]] = {}
    for url, reason in failures.items():
        urls.setdefault(reason, []).append(url)
    return "; ".join(
        f"{first} and {len(others)} more: {reason}" if others else f"{first}: {reason}"
        for reason, (first, *others) in urls.items()
    )


def _fetch(source: Source, path: Path) -> dict[str, str]:
    """Put the file in place.

    Returns:
        what went wrong if no mirror gave it, by URL; empty when all is well.
    """
    part, failures = _part(path), {}
    with _exclusive(part) as file:
        if is_there(source, path.parent):  # another process fetched it meanwhile
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
    """Open the partial file for appending, alone: whoever else wants it waits until this one is done."""
    ours = False
    while not ours:
        _remove_unless_ours(part)
        with open(part, "a+b", opener=lambda path, flags: os.open(path, flags | _NO_LINK, 0o666)) as file:
            if fcntl is not None:
                with contextlib.suppress(OSError):  # a file system without locks: one process at a time, then
                    fcntl.flock(file, fcntl.LOCK_EX)
            # While this one waited, the other may have given the file its final name: then it must not be written to.
            with contextlib.suppress(FileNotFoundError):
                ours = os.path.samestat(os.fstat(file.fileno()), part.stat())
            if ours:
                yield file


def _remove_unless_ours(part: Path) -> None:
    """Remove what only has the name of a partial file: writing to it would change another file, or never end."""
    with contextlib.suppress(FileNotFoundError):
        found = part.lstat()
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
            part.unlink()


def _size(file: BinaryIO) -> int:
    return file.seek(0, os.SEEK_END)


def _complete(source: Source, url: str, file: BinaryIO) -> None:
    """Bring the partial file to its full size and check it. What cannot be part of the right file is thrown away.

    Raises:
        _MirrorError: it is still not complete.
    """
    if _size(file) > source.size:
        file.truncate(0)
    if _size(file) == source.size:  # an earlier call was killed just before the end
        with contextlib.suppress(_MirrorError):
            return _check(source, file, _MirrorError)
    if offset := _size(file):
        with contextlib.suppress(_ResumeError):
            return _receive(source, url, file, offset)
    return _receive(source, url, file, 0)


def _check(source: Source, file: BinaryIO, error: type[_MirrorError]) -> None:
    """Compare size and checksum of what has arrived."""
    file.flush()
    if (size := _size(file)) < source.size:
        raise _MirrorError(f"ended after {size:,} of {source.size:,} bytes")
    file.seek(0)
    if (found := _md5(file)) != source.md5:
        kept = _keep_aside(file, Path(file.name).with_name(f"{source.name}.wrong"))
        file.truncate(0)
        raise error(f"md5 {found} instead of {source.md5}{kept}")


def _keep_aside(file: BinaryIO, path: Path) -> str:
    """Copy the wrong content to `path`, for whoever wants to know what it is; what to tell of it."""
    file.seek(0)
    try:
        if path.is_symlink():  # atomic_write would follow it
            path.unlink()
        with serialization.atomic_write(path) as copy:
            shutil.copyfileobj(file, copy)
    except OSError:
        return ""
    return f" (kept as {path.name})"


def _receive(source: Source, url: str, file: BinaryIO, offset: int) -> None:
    """Append what the mirror sends from `offset` (bytes) on, or begin anew if it sends all; check the whole."""
    with _open(url, offset) as response:
        if response.status == HTTPStatus.PARTIAL_CONTENT and offset:
            if not re.match(rf"bytes {offset}-\d+/({source.size}|\*)$", response.headers.get("Content-Range", "")):
                raise _ResumeError("sends another part than asked for")
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
    """The body, as it comes in."""
    while True:
        try:
            block = response.read1(_BLOCK)
        except (OSError, HTTPException) as e:
            raise _MirrorError(_reason(e)) from e
        if not block:
            return
        yield block


class _NoRedirects(HTTPRedirectHandler):
    """Leaves redirects to :func:`_open`; its parent would also read the whole body of one, however long."""

    def http_error_302(self, *_args):
        """Not handled here, so it becomes an HTTPError."""

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def _open(url: str, offset: int) -> HTTPResponse:
    """Ask for the file from `offset` (bytes) on, following redirects on the same host.

    Raises:
        _MirrorError: no answer, or another one than success.
        _ResumeError: it refuses the offset.
    """
    opener = build_opener(_NoRedirects)
    headers = {"User-Agent": USER_AGENT, "Accept": "*/*"} | ({"Range": f"bytes={offset}-"} if offset else {})
    for _ in range(_MAX_REDIRECTS + 1):
        try:
            return opener.open(Request(url, headers=headers), timeout=TIMEOUT)
        except HTTPError as e:
            e.close()
            status, location = e.code, e.headers.get("Location")
        except (OSError, HTTPException, ValueError) as e:  # the last: a URL that is none
            raise _MirrorError(_reason(e)) from e
        if status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and offset:
            raise _ResumeError(_status(status))
        if status not in _REDIRECTS or not location:
            raise _MirrorError(_status(status))
        url = _redirected(url, location)
    raise _MirrorError(f"redirects more than {_MAX_REDIRECTS} times")


def _redirected(url: str, location: str) -> str:
    """Where a redirect leads; refused when it leaves the host or goes from https to something else."""
    try:
        target = urljoin(url, location)
        old, new = urlsplit(url), urlsplit(target)
        if new.scheme not in ("http", "https") or (old.scheme, new.scheme) == ("https", "http"):
            raise _MirrorError(f"redirects from {old.scheme} to {_printable(new.scheme)}, which is not followed")
        if old.hostname != new.hostname:
            raise _MirrorError(f"redirects to another host ({_printable(new.hostname)}), which is not followed")
    except ValueError as e:
        raise _MirrorError("redirects to something that is no URL") from e
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
    """One short line, whatever a server put into it."""
    return " ".join("".join(c if c.isprintable() else " " for c in text or "nothing").split())[:120]


def main(
    module: str,
    description: str,
    default: str,
    names: Sequence[str],
    fetch: Callable[[Path], list[Path]],
    argv: Sequence[str] | None = None,
) -> int:
    """`python -m <module> FOLDER`: fetch what is missing there.

    Args:
        module: the module that is run.
        description: for --help.
        default: folder in the project if none is given.
        names: the files that belong there.
        fetch: fetches those that are missing in a folder and returns their paths.
        argv: command-line arguments; None for those of the process.

    Returns:
        the exit code: 0 done; 2 the input is wrong; 1 it failed.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument(
        "folder", nargs="?", default=PROJECT / default, help=f"where they belong (default: {default} here)"
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
