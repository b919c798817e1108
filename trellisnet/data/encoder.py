"""Words as ids for texts that are too large for lists: read in blocks, kept in files, mapped into memory."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from trellisnet import serialization
from trellisnet.data.corpus import EOS, ORDERS, SPLITS, Corpus, Numbering, words
from trellisnet.data.text import Part, Texts
from trellisnet.errors import UserError, unwritable

_FORMAT = 2  # part of the key: another one is needed whenever other ids or other files would be written
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


def encode_files(texts: Texts, cache: Path, *, order: str = "appearance", label: str) -> Corpus:
    """:func:`corpus.encode <trellisnet.data.corpus.encode>` of the words of three texts, in little memory.

    The ids are kept in `cache`, in a folder named after the content of the texts. Before they are used again they are
    checked: the files against their sums, the ids against the vocabulary, and both against the text. Only a complete
    folder gets its name; several processes may encode the same texts at once.

    Args:
        texts: train, valid, test.
        cache: folder, made if need be.
        order: of the ids. "appearance": first appearance over train, valid, test. "frequency": see
            :func:`corpus.by_frequency <trellisnet.data.corpus.by_frequency>`.
        label: what to call the corpus.

    Returns:
        streams 1-D int32, mapped from the files; what is written to them stays in this process.

    Raises:
        ValueError: unknown order.
        UserError: a file that :meth:`Part.pieces <trellisnet.data.text.Part.pieces>` refuses, or that changes while it
            is read, or a cache that cannot be written.
        RunError: the disk is full.
    """
    if order not in ORDERS:
        raise ValueError(f"order: expected one of {', '.join(ORDERS)}, got {order!r}")
    key = hashlib.sha256(f"{_FORMAT} {order} {texts.sha256} {texts.sizes}".encode()).hexdigest()
    folder = cache / f"words-{key[:32]}"
    content = _load(folder, texts, order)
    if content is None:
        try:
            content = _build(texts, order, folder)
        except OSError as e:  # those of reading the texts are UserErrors
            raise unwritable(f"{cache}: the encoded text cannot be written there", e) from e
    vocabulary, streams = content
    return Corpus(vocabulary, *streams, sha256=texts.sha256, label=label)


def _load(folder: Path, texts: Texts, order: str) -> tuple[list[str], list[Tensor]] | None:
    """Vocabulary and streams of a cache; None if it is missing, corrupt, or that of another text or order."""
    try:
        meta = json.loads(serialization.read_regular(folder / "meta.json"))
        if (meta["format"], meta["text_sha256"], meta["order"]) != (_FORMAT, texts.sha256, order):
            return None
        if any(_sum(folder / name) != meta["sha256"][name] for name in (_VOCABULARY, *_STREAMS.values())):
            return None
        content = _open(folder)
        return content if meta["counts"] == _counts(*content) and _are_ids_of(texts, *content) else None
    except UserError:  # of the text
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):  # the last: torch, of a file that is just gone
        return None


def _are_ids_of(texts: Texts, vocabulary: list[str], streams: list[Tensor]) -> bool:
    """Whether streams can be the ids of a text: sums only say that the cache is as somebody wrote it.

    All ids must have a word, and no two the same; there must be as many `<eos>` as lines; and the words that a text
    begins with must be the right ones.
    """
    if len(set(vocabulary)) < len(vocabulary) or EOS not in vocabulary:
        return False
    eos = vocabulary.index(EOS)
    for part, lines, ids in zip(texts.parts, texts.lines, streams, strict=True):
        if not (ids.numel() and ids.min() >= 0 and ids.max() < len(vocabulary)):
            return False
        ends = sum(int((some == eos).sum()) for some in ids.split(_IDS))
        if not lines <= ends <= lines + texts.eos:
            return False
        with contextlib.closing(part.pieces()) as pieces:
            begin = list(words(next(pieces)))[:-2]  # without the last word, which may go on, and the `<eos>` after it
        if [vocabulary[i] for i in ids[: len(begin)].tolist()] != begin:
            return False
    return True


def _counts(vocabulary: list[str], streams: list[Tensor]) -> dict[str, int]:
    return {"types": len(vocabulary)} | dict(zip(SPLITS, map(len, streams), strict=True))


def _sum(path: Path) -> str:
    with serialization.open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open(folder: Path) -> tuple[list[str], list[Tensor]]:
    vocabulary = (folder / _VOCABULARY).read_bytes().decode("utf-8").split("\n")
    paths = [folder / name for name in _STREAMS.values()]
    sizes = [path.stat().st_size // _STORED.itemsize for path in paths]
    return vocabulary, [
        torch.from_file(str(path), shared=False, size=size, dtype=torch.int32)
        for path, size in zip(paths, sizes, strict=True)
    ]


def _build(texts: Texts, order: str, folder: Path) -> tuple[list[str], list[Tensor]]:
    """Encode the texts into `folder`, or use what another process puts there meanwhile."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _workspace(folder.parent) as space:
        with contextlib.suppress(FileNotFoundError):
            os.rename(folder, space / "damaged")
        new = space / "new"
        new.mkdir()
        vocabulary = _encode(texts, new)
        if order == "frequency":
            vocabulary = _renumber(vocabulary, new)
        (new / _VOCABULARY).write_bytes("\n".join(vocabulary).encode("utf-8"))
        content = _open(new)  # while nobody else knows it
        sums = {name: _sum(new / name) for name in (_VOCABULARY, *_STREAMS.values())}
        meta = {
            "format": _FORMAT,
            "order": order,
            "text_sha256": texts.sha256,
            "counts": _counts(*content),
            "sha256": sums,
        }
        (new / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
        try:
            os.rename(new, folder)
        except OSError:
            content = _load(folder, texts, order)
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


class _Encoder:
    """Numbers words by first appearance.

    Looking up one word after the other would take most of the time, so this is done for all words of a piece of text at
    once, in a table with the first word that fell into each slot. It has words of up to eight bytes, each packed into a
    number. Longer ones, new ones, and those whose slot was taken are looked up singly in `known`, which has all.
    """

    def __init__(self):
        self.known = Numbering()  # of words as UTF-8
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


def _encode(texts: Texts, folder: Path) -> list[str]:
    """Write the streams, numbered by first appearance.

    Returns:
        the vocabulary.
    """
    encoder, total = _Encoder(), hashlib.sha256()
    with tqdm(
        total=sum(texts.sizes), desc="encoding", unit="B", unit_scale=True, disable=None, dynamic_ncols=True,
        leave=False,
    ) as bar:  # fmt: skip
        for part, name in zip(texts.parts, _STREAMS.values(), strict=True):
            with (folder / name).open("wb") as out:
                for piece in _pieces(_blocks(part, total)):
                    bar.update(len(piece))
                    out.write(encoder(_with_plain_spaces(piece).replace(b"\n", f" {EOS} ".encode())).data)
    if total.hexdigest() != texts.sha256:
        folder = texts.parts[0].path.parent
        raise UserError(f"{folder}: the text changed while it was read; try again when nothing writes to it")
    return [token.decode("utf-8") for token in encoder.known]


def _blocks(part: Part, total) -> Iterator[bytes]:
    """A text as UTF-8, a block at a time, which is added to the sum `total`."""
    for piece in part.pieces():
        block = piece.encode("utf-8")
        total.update(block)
        yield block


def _pieces(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes cut after white space, so not within a word; the last line ended."""
    begun, end = [], b"\n"
    for block in blocks:
        end = block[-1:]
        if cut := max(block.rfind(b"\n"), block.rfind(b" ")) + 1:
            yield b"".join([*begun, block[:cut]])
            begun = []
        begun.append(block[cut:])
    if end != b"\n":
        yield b"".join([*begun, b"\n"])


def _with_plain_spaces(piece: bytes) -> bytes:
    """A piece of text with spaces in the place of white space that is not ASCII."""
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
