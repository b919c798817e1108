"""Words as ids for texts that are too large for lists: read in blocks, kept in files, mapped into memory."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from trellisnet import serialization
from trellisnet.data.corpus import EMPTY, EOS, NOT_UTF8, ORDERS, SPLITS, UNREADABLE, ZERO_BYTES, Corpus
from trellisnet.errors import UserError, unwritable

_FORMAT = 1  # part of the key: another one is needed whenever other ids or other files would be written
_BLOCK = 1 << 16  # bytes; what is made of a block should fit into the cache of the processor
_IDS = 1 << 20  # ids that are renumbered at once
_VOCABULARY = "vocabulary.txt"
_STREAMS = {split: f"{split}.i32" for split in SPLITS}
_STORED = np.dtype("<i4")

# White space for str.split() that is not ASCII.
_SPACE = re.compile(rb"\xc2[\x85\xa0]|\xe1\x9a\x80|\xe2(?:\x80[\x80-\x8a\xa8\xa9\xaf]|\x81\x9f)|\xe3\x80\x80")
_ASCII = bytes(range(0x80))

_BITS = 20  # of the number of slots
_PACKED = np.dtype("<u8")
_MASKS = np.array([(1 << 8 * min(length, 8)) - 1 for length in range(10)], _PACKED)  # the first bytes of eight
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # Fibonacci hashing: 2^64 over the golden ratio


def encode_files(paths: Sequence[Path], cache: Path, *, order: str = "appearance", label: str) -> Corpus:
    """:func:`corpus.encode <trellisnet.data.corpus.encode>` of the words of three files, in little memory.

    The ids are kept in `cache`, in a folder named after the content of the files, and checked against their sums before
    they are used again. Only a complete folder gets its name; several processes may encode the same files at once.

    Args:
        paths: UTF-8 texts: train, valid, test.
        cache: folder, made if need be.
        order: of the ids. "appearance": first appearance over train, valid, test. "frequency": see
            :func:`corpus.by_frequency <trellisnet.data.corpus.by_frequency>`.
        label: what to call the corpus.

    Returns:
        streams 1-D int32, mapped from the files; what is written to them stays in this process.

    Raises:
        ValueError: unknown order.
        UserError: a file that :func:`corpus.read_text <trellisnet.data.corpus.read_text>` refuses, or that changes
            while it is read, or a cache that cannot be written.
        RunError: the disk is full.
    """
    if order not in ORDERS:
        raise ValueError(f"order: expected one of {', '.join(ORDERS)}, got {order!r}")
    total = hashlib.sha256()
    sizes = [sum(map(len, _read(path, total))) for path in paths]
    sha256 = total.hexdigest()
    key = hashlib.sha256(f"{_FORMAT} {order} {sha256} {sizes}".encode()).hexdigest()
    folder = cache / f"words-{key[:32]}"
    content = _load(folder, sha256, order)
    if content is None:
        try:
            content = _build(paths, sizes, sha256, order, folder)
        except OSError as e:  # those of reading the texts are UserErrors
            raise unwritable(f"{cache}: the encoded text cannot be written there", e) from e
    vocabulary, streams = content
    return Corpus(vocabulary, *streams, sha256=sha256, label=label)


def _read(path: Path, total) -> Iterator[bytes]:
    """The content of a file in blocks, which are added to the sum `total`."""
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                total.update(block)
                yield block
    except OSError as e:
        raise UserError(UNREADABLE.format(path, e.strerror)) from e


def _load(folder: Path, sha256: str, order: str) -> tuple[list[str], list[Tensor]] | None:
    """Vocabulary and streams of a cache; None if it is missing, damaged, or that of another text or order."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if (meta["format"], meta["text_sha256"], meta["order"]) != (_FORMAT, sha256, order):
            return None
        if any(_sum(folder / name) != meta["sha256"][name] for name in (_VOCABULARY, *_STREAMS.values())):
            return None
        content = _open(folder)
        return content if meta["counts"] == _counts(*content) else None
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):  # the last: torch, of a file that is just gone
        return None


def _counts(vocabulary: list[str], streams: list[Tensor]) -> dict[str, int]:
    return {"types": len(vocabulary)} | dict(zip(SPLITS, map(len, streams), strict=True))


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open(folder: Path) -> tuple[list[str], list[Tensor]]:
    vocabulary = (folder / _VOCABULARY).read_bytes().decode("utf-8").split("\n")
    paths = [folder / name for name in _STREAMS.values()]
    sizes = [path.stat().st_size // _STORED.itemsize for path in paths]
    return vocabulary, [
        torch.from_file(str(path), shared=False, size=size, dtype=torch.int32)
        for path, size in zip(paths, sizes, strict=True)
    ]


def _build(
    paths: Sequence[Path], sizes: list[int], sha256: str, order: str, folder: Path
) -> tuple[list[str], list[Tensor]]:
    """Encode the files into `folder`, or use what another process puts there meanwhile."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _workspace(folder.parent) as space:
        with contextlib.suppress(FileNotFoundError):
            os.rename(folder, space / "damaged")
        new = space / "new"
        new.mkdir()
        vocabulary = _encode(paths, sizes, sha256, new)
        if order == "frequency":
            vocabulary = _renumber(vocabulary, new)
        (new / _VOCABULARY).write_bytes("\n".join(vocabulary).encode("utf-8"))
        content = _open(new)  # while nobody else knows it
        sums = {name: _sum(new / name) for name in (_VOCABULARY, *_STREAMS.values())}
        meta = {"format": _FORMAT, "order": order, "text_sha256": sha256, "counts": _counts(*content), "sha256": sums}
        (new / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
        try:
            os.rename(new, folder)
        except OSError:
            content = _load(folder, sha256, order)
            if content is None:
                raise
    return content


@contextlib.contextmanager
def _workspace(cache: Path) -> Iterator[Path]:
    """A temporary folder in `cache`. Those that killed processes left there are removed: nobody holds their locks."""
    with contextlib.ExitStack() as stack:
        with _locked(cache, wait=True):  # so that nobody takes a folder without its lock yet for one that was left
            for left in cache.glob(".words-*.tmp"):
                with _locked(left, wait=False) as held:
                    if held:
                        shutil.rmtree(left, ignore_errors=True)
            folder = Path(tempfile.mkdtemp(dir=cache, prefix=".words-", suffix=".tmp"))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            stack.enter_context(_locked(folder, wait=True))
        yield folder


@contextlib.contextmanager
def _locked(folder: Path, *, wait: bool) -> Iterator[bool]:
    """Hold the lock of a folder, which a kill releases too; whether it could be had."""
    descriptor = None
    with contextlib.suppress(OSError):  # gone meanwhile, or somebody else's
        descriptor = serialization.lock(folder, wait=wait)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            os.close(descriptor)


class _Numbering(dict):
    """Id of every word (as UTF-8); a new word gets the next one."""

    def __missing__(self, word: bytes) -> int:
        number = self[word] = len(self)
        return number


class _Encoder:
    """Numbers words by first appearance.

    Looking up one word after the other would take most of the time, so this is done for all words of a piece of text at
    once, in a table with the first word that fell into each slot. It has words of up to eight bytes, each packed into a
    number. Longer ones, new ones, and those whose slot was taken are looked up singly in `known`, which has all.
    """

    def __init__(self):
        self.known = _Numbering()
        self.words = np.zeros(1 << _BITS, _PACKED)  # 0: free; no word is, because the text has no zero bytes
        self.numbers = np.zeros(1 << _BITS, _STORED)

    def __call__(self, text: bytes) -> np.ndarray:
        """The ids of the words of a text in UTF-8 without zero bytes, separated by white space in ASCII: 1-D int32."""
        text = b" " + text + b" " * _PACKED.itemsize  # so that every word has an end, and can be read as a whole number
        letters = np.frombuffer(text, np.uint8)
        space = (letters - 0x09 < 5) | (letters - 0x1C < 5)  # what is less than the first wraps around
        edges = np.flatnonzero(space[1:] != space[:-1]) + 1
        starts, ends = edges[::2], edges[1::2]
        lengths = np.minimum(ends - starts, _PACKED.itemsize + 1)
        everywhere = np.ndarray(len(text) - _PACKED.itemsize + 1, _PACKED, text, strides=1)
        words = everywhere[starts] & _MASKS[lengths]
        slots = (words * _FACTOR >> np.uint64(64 - _BITS)).astype(np.intp)
        numbers = self.numbers[slots]
        short = lengths <= _PACKED.itemsize
        rest = np.flatnonzero((self.words[slots] != words) | ~short)
        singly = map(text.__getitem__, map(slice, starts[rest].tolist(), ends[rest].tolist()))
        numbers[rest] = np.fromiter(map(self.known.__getitem__, singly), _STORED, len(rest))
        fresh = rest[short[rest] & (self.words[slots[rest]] == 0)][::-1]  # where two want a slot, the first gets it
        self.words[slots[fresh]] = words[fresh]
        self.numbers[slots[fresh]] = numbers[fresh]
        return numbers


def _encode(paths: Sequence[Path], sizes: list[int], sha256: str, folder: Path) -> list[str]:
    """Write the streams, numbered by first appearance.

    Returns:
        the vocabulary.
    """
    encoder, total = _Encoder(), hashlib.sha256()
    with tqdm(
        total=sum(sizes), desc="encoding", unit="B", unit_scale=True, disable=None, dynamic_ncols=True, leave=False
    ) as bar:
        for path, name in zip(paths, _STREAMS.values(), strict=True):
            with (folder / name).open("wb") as out:
                for text in _texts(path, total, bar):
                    out.write(encoder(text).data)
    if total.hexdigest() != sha256:
        raise UserError(f"{paths[0].parent}: the text changed while it was read; try again when nothing writes to it")
    return [token.decode("utf-8") for token in encoder.known]


def _texts(path: Path, total, bar: tqdm) -> Iterator[bytes]:
    """A file in pieces that :class:`_Encoder` takes, with the ends of the lines as words."""
    offset, blank = 0, True
    for piece in _pieces(_read(path, total)):
        text = _with_plain_spaces(piece, path, offset)
        blank = blank and text.isspace()
        offset += len(piece)
        bar.update(len(piece))
        yield text.replace(b"\n", f" {EOS} ".encode())
    if blank:
        raise UserError(EMPTY.format(path))


def _pieces(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes cut after white space, so neither within a word nor within a character; the last line ended."""
    begun, end = [], b"\n"
    for block in blocks:
        end = block[-1:]
        if cut := max(block.rfind(b"\n"), block.rfind(b" ")) + 1:
            yield b"".join([*begun, block[:cut]])
            begun = []
        begun.append(block[cut:])
    if end != b"\n":
        yield b"".join([*begun, b"\n"])


def _with_plain_spaces(piece: bytes, path: Path, offset: int) -> bytes:
    """A piece of text with spaces in the place of white space that is not ASCII.

    Raises:
        UserError: not UTF-8, or zero bytes; `offset` is that of the piece in the file.
    """
    try:
        piece.decode("utf-8")
    except UnicodeDecodeError as e:
        raise UserError(NOT_UTF8.format(path, offset + e.start)) from e
    if b"\0" in piece:
        raise UserError(ZERO_BYTES.format(path))
    suspicious = piece.translate(None, _ASCII)  # few bytes, so the search is short
    return _SPACE.sub(b" ", piece) if _SPACE.search(suspicious) else piece


def _renumber(vocabulary: list[str], folder: Path) -> list[str]:
    """Number the streams by frequency, in place; the vocabulary in its new order."""
    counts = np.zeros(len(vocabulary), np.int64)
    with (folder / _STREAMS["train"]).open("rb") as file:
        for ids in _ids(file):
            counts += np.bincount(ids, minlength=len(vocabulary))
    order = np.argsort(-counts, kind="stable")
    ranks = np.empty(len(vocabulary), _STORED)
    ranks[order] = np.arange(len(vocabulary))
    for name in _STREAMS.values():
        with (folder / name).open("r+b") as file:
            for ids in _ids(file):
                file.seek(-ids.nbytes, os.SEEK_CUR)
                file.write(ranks[ids].data)
    return [vocabulary[i] for i in order]


def _ids(file: BinaryIO) -> Iterator[np.ndarray]:
    """The ids in a file, some at a time."""
    while block := file.read(_IDS * _STORED.itemsize):
        yield np.frombuffer(block, _STORED)
