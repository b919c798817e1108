"""Text files, read the same way for every task: as UTF-8, without byte order mark, with LF as the line end.

A text is three files, or a single file whose lines are divided into three parts.
"""

import codecs
import contextlib
import dataclasses
import hashlib
import io
import itertools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trellisnet.data.corpus import EOS, SPLITS, Corpus
from trellisnet.errors import UserError
from trellisnet.serialization import open_regular

_BLOCK = 1 << 16  # bytes; small enough that a block's intermediate results stay in the processor's cache
_MARK = "\ufeff"
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
HELD_OUT = 20  # a single file is divided 18 : 1 : 1 into train, valid and test
_LINE_ENDS = {"\r\n": "CR LF", "\r": "CR"}

_CONVERT = "convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)"


def normalised(text: str) -> str:
    """Return `text` without a byte order mark at its start, and with LF for CR LF and CR."""
    return io.IncrementalNewlineDecoder(None, translate=True).decode(text.removeprefix(_MARK), final=True)


def find(data: Path, layouts: Sequence[Sequence[str]]) -> list[Path]:
    """Find the files of a text: three in the folder `data`, named as in one of `layouts`, or the single file `data`.

    Raises:
        UserError: `data` does not exist, or the folder has no complete set.
    """
    if not data.exists():
        raise UserError(
            f"{data}: no such folder or file; make a folder with {', '.join(layouts[-1])}, name one or a single text "
            "file with --data, or try --data synthetic"
        )
    if not data.is_dir():
        return [data]
    for names in layouts:
        if all((data / name).exists() for name in names):
            return [data / name for name in names]
    expected = " or ".join(", ".join(names) for names in layouts)
    present = [name for names in layouts for name in names if (data / name).exists()]
    state = f"found only {', '.join(present)}" if present else "found none of them"
    raise UserError(
        f"{data}: expected {expected} there, {state}; put them there, name their folder or a single text file with "
        "--data, or try --data synthetic"
    )


@dataclass(frozen=True)
class Part:
    """A range of lines of a text file, by default all.

    Args:
        path: the file.
        first, stop: first line, counted from 0, and the one after the last; None for the end of the file.
    """

    path: Path
    first: int = 0
    stop: int | None = None

    def pieces(self, changes: set[str] | None = None) -> Iterator[str]:
        """Yield the normalised text piece by piece.

        Args:
            changes: receives a description of the normalisation once the file has been read to its end.

        Raises:
            UserError: missing, unreadable, not a regular file, not UTF-8, or only white space in these lines.
        """
        blank = True
        for piece in self._cut(_decoded(self.path, set() if changes is None else changes)):
            blank = blank and piece.isspace()
            yield piece
        if blank:
            lines = "" if self.stop is None else f", lines {self.first + 1:,} to {self.stop:,}"
            raise UserError(f"{self.path}{lines}: is empty; put the text there or name its folder with --data")

    def _cut(self, pieces: Iterator[str]) -> Iterator[str]:
        if self.stop is None:
            yield from pieces
            return
        number = 0  # of the line in which the piece begins
        for piece in pieces:
            part = piece[_after(piece, self.first - number) : _after(piece, self.stop - number)]
            if part:
                yield part
            number += piece.count("\n")
            if number >= self.stop:
                return


def _after(piece: str, lines: int) -> int:
    """Return the index in `piece` after this many lines; its length if it has no more."""
    if lines <= 0:
        return 0
    *ended, rest = piece.split("\n", lines)
    return len(piece) - len(rest) if len(ended) == lines else len(piece)


def _decoded(path: Path, changes: set[str]) -> Iterator[str]:
    utf8 = codecs.getincrementaldecoder("utf-8")()
    decoder = io.IncrementalNewlineDecoder(utf8, translate=True)
    offset, start = 0, b""
    with reading(path), open_regular(path) as file:
        while True:
            block = file.read(_BLOCK)
            start = start or block[:2]
            pending = len(utf8.getstate()[0])
            try:
                piece = decoder.decode(block, final=not block)
            except UnicodeDecodeError as e:
                convert = _CONVERT if start in _UTF16 else "convert it to UTF-8"
                raise UserError(f"{path}: not UTF-8 text (byte {offset - pending + e.start}); {convert}") from e
            if b"\0" in block:
                raise UserError(
                    f"{path}: holds zero bytes, so it is not UTF-8 text; name the folder of the text with --data, or, "
                    f"if it is UTF-16, {_CONVERT}"
                )
            if offset == pending and piece.startswith(_MARK):
                changes.add("byte order mark")
                piece = piece[len(_MARK) :]
            if piece:
                yield piece
            if not block:
                break
            offset += len(block)
    ends = decoder.newlines or ()
    changes.update(_LINE_ENDS[end] for end in ([ends] if isinstance(ends, str) else ends) if end in _LINE_ENDS)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); put it there or name its folder with --data") from e


class Texts:
    """Train, valid and test text. The constructor reads the files once to check them; :meth:`read` reads them again.

    The lines of a single file are divided: the last twentieth is the test text, the twentieth before it the valid text.

    Args:
        paths: the three files, or the single one.

    Attributes:
        parts: the three texts.
        sizes: bytes of normalised UTF-8 per file. Together with `sha256` they identify a text and its division.
        lines: number of lines per text; a last one without a line feed counts.
        sha256: digest of the normalised text.
        eos: number of times that `<eos>` occurs in the text.
        changed: the normalisation, in words that follow "it is read"; or "".
        notices: lines for the user on how the text was read.

    Raises:
        UserError: a file is refused by :meth:`Part.pieces`, or a single one has fewer than three lines.
    """

    def __init__(self, paths: Sequence[Path]):
        self._paths = list(paths)
        self.sizes, self.eos, total = [], 0, hashlib.sha256()
        lines, normalised_files = [], []
        for path in self._paths:
            changes: set[str] = set()
            size, ends, last = 0, 0, "\n"
            for piece in Part(path).pieces(changes):
                content = piece.encode("utf-8")
                total.update(content)
                size += len(content)
                ends += piece.count("\n")
                self.eos += (last + piece).count(EOS)
                last = (last + piece)[1 - len(EOS) :]  # too short for a whole <eos>, which would count twice
            self.sizes.append(size)
            lines.append(ends + (not last.endswith("\n")))
            if changes:
                normalised_files.append(f"{path.name}: {', '.join(sorted(changes))}")
        self.sha256 = total.hexdigest()
        self.notices: list[str] = []
        self.parts, self.lines = self._split(lines)
        self.changed = ""
        if normalised_files:
            self.changed = "without byte order marks, and with LF for CR LF and CR"
            self.notices.append(f"the text is read {self.changed} ({'; '.join(normalised_files)})")

    def _split(self, lines: list[int]) -> tuple[list[Part], list[int]]:
        if len(self._paths) > 1:
            return [Part(path) for path in self._paths], lines
        (path,), (total,) = self._paths, lines
        if total < len(SPLITS):
            raise UserError(
                f"{path}: {total} line(s) cannot be cut into {', '.join(SPLITS)}; break the text into lines, or put "
                f"{', '.join(f'{split}.txt' for split in SPLITS)} into a folder and name that with --data"
            )
        held_out = max(1, total // HELD_OUT)
        borders = [0, total - 2 * held_out, total - held_out, total]
        self.notices.append(
            f"{path.name} is split by lines: {borders[1]:,} for train, then {held_out:,} for valid and {held_out:,} "
            "for test"
        )
        spans = list(itertools.pairwise(borders))
        return [Part(path, *span) for span in spans], [stop - first for first, stop in spans]

    @property
    def stored_sha256(self) -> str:
        """Digest of the files as stored, without normalisation; that is how version 0.1.0 read them."""
        if not self.changed:
            return self.sha256
        total = hashlib.sha256()
        for path in self._paths:
            with reading(path), open_regular(path) as file:
                while block := file.read(_BLOCK):
                    total.update(block)
        return total.hexdigest()

    def read(self) -> list[str]:
        """Return the three texts."""
        return ["".join(part.pieces()) for part in self.parts]

    def describe(self, corpus: Corpus) -> Corpus:
        """Add digests, notices and changes of these files to their corpus, and warn if they contain `<eos>`."""
        if self.eos:
            warnings.warn(
                f"the text holds {EOS} {self.eos:,} times, and every line gets one more at its end: lines that already "
                f"end in {EOS} now have two, which makes the perplexity too low; remove it from the files, for example "
                f"with sed -i 's/ *{EOS} *$//'",
                stacklevel=3,
            )
        return dataclasses.replace(
            corpus, notices=tuple(self.notices), changed=self.changed, stored_sha256=self.stored_sha256
        )
