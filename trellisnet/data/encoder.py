"""Encoding of texts too large for lists of words: read in blocks, cached in files, mapped into memory."""

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
from trellisnet.data.spelling import BYTE_TOKENS, BYTE_VALUES
from trellisnet.data.text import HELD_OUT, Part, Texts, reading
from trellisnet.errors import UserError, unwritable

_FORMAT = 2  # part of the key; increase it whenever the ids or the files change
_IDS = 1 << 20  # ids handled at a time
_VOCABULARY = "vocabulary.txt"
_STREAMS = {split: f"{split}.i32" for split in SPLITS}
_STORED = np.dtype("<i4")

# White space by the rules of str.split() beyond ASCII.
_SPACE = re.compile(rb"\xc2[\x85\xa0]|\xe1\x9a\x80|\xe2(?:\x80[\x80-\x8a\xa8\xa9\xaf]|\x81\x9f)|\xe3\x80\x80")
_ASCII = bytes(range(0x80))

_BITS = 20  # log2 of the number of slots
_PACKED = np.dtype("<u8")
_MASKS = np.array([(1 << 8 * min(length, 8)) - 1 for length in range(10)], _PACKED)  # keep the first `length` bytes
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # Fibonacci hashing: 2^64 divided by the golden ratio


def encode_files(texts: Texts, cache: Path, *, order: str = "appearance", label: str) -> Corpus:
    """Encode the words of three texts as :func:`corpus.encode <trellisnet.data.corpus.encode>` does, in low memory.

    The ids are cached in a folder of `cache` that is named after the content of the texts. Before they are reused, the
    files are checked against their digests, the ids against the vocabulary, and both against the text. Only a complete
    folder gets its name, so several processes may encode the same texts at once.

    Args:
        texts: train, valid, test.
        cache: folder, created if missing.
        order: order of the ids. "appearance": first appearance over train, valid, test. "frequency": see
            :func:`corpus.by_frequency <trellisnet.data.corpus.by_frequency>`.
        label: name of the corpus.

    Returns:
        the corpus, with 1-D int32 streams mapped from the files; writes to them stay in this process.

    Raises:
        ValueError: unknown order.
        UserError: a file is refused by :meth:`Part.pieces <trellisnet.data.text.Part.pieces>` or changes while it is
            read, or the cache cannot be written.
        RunError: the disk is full.
    """
    return _encoded(_Words(texts), cache, order, label)


def encode_bytes(path: Path, cache: Path, *, label: str) -> Corpus:
    """Number the byte values of a file by first appearance, and divide it into train, valid and test by bytes.

    The last twentieth is the test text, the twentieth before it the valid text. Tokens are those of
    :data:`trellisnet.data.spelling.BYTES`. The cache, the result and the errors are those of :func:`encode_files`; a
    file of fewer than 20 bytes is a UserError too.
    """
    return _encoded(_Bytes(path), cache, "appearance", label)


def _encoded(source: "_Words | _Bytes", cache: Path, order: str, label: str) -> Corpus:
    if order not in ORDERS:
        raise ValueError(f"order: expected one of {', '.join(ORDERS)}, got {order!r}")
    key = hashlib.sha256(f"{_FORMAT} {order} {source.sha256} {source.sizes}".encode()).hexdigest()
    folder = cache / f"{source.kind}-{key[:32]}"
    content = _load(folder, source, order)
    if content is None:
        try:
            content = _build(source, order, folder)
        except OSError as e:  # from writing: errors in reading the texts are UserErrors
            raise unwritable(f"{cache}: the encoded text cannot be written there", e) from e
    vocabulary, streams = content
    return Corpus(vocabulary, *streams, sha256=source.sha256, label=label)


class _Words:
    """Words of three texts."""

    kind = "words"

    def __init__(self, texts: Texts):
        self.texts, self.sha256, self.sizes = texts, texts.sha256, texts.sizes

    def encode(self, folder: Path) -> list[str]:
        return _encode(self.texts, folder)

    def matches(self, vocabulary: list[str], streams: list[Tensor]) -> bool:
        return _are_ids_of(self.texts, vocabulary, streams)


class _Bytes:
    """Bytes of one file."""

    kind = "bytes"

    def __init__(self, path: Path):
        self.path = path
        try:
            self.sha256, size = serialization.sha256_of_file(path), path.stat().st_size
        except OSError as e:
            raise UserError(f"{path}: cannot be read ({e.strerror}); name another file with --data") from e
        if size < HELD_OUT:
            raise UserError(f"{path}: {size} bytes cannot be cut into {', '.join(SPLITS)}; name a longer file")
        held_out = size // HELD_OUT
        self.sizes = [size - 2 * held_out, held_out, held_out]

    def _blocks(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield the bytes block by block, each with its split."""
        with reading(self.path), serialization.open_regular(self.path) as file:
            for split, size in zip(SPLITS, self.sizes, strict=True):
                for start in range(0, size, _IDS):
                    yield split, np.frombuffer(file.read(min(_IDS, size - start)), np.uint8)

    def encode(self, folder: Path) -> list[str]:
        ids, total = Numbering(), hashlib.sha256()
        table = np.full(256, -1, _STORED)
        with contextlib.ExitStack() as stack:
            files = {split: stack.enter_context((folder / name).open("wb")) for split, name in _STREAMS.items()}
            for split, block in self._blocks():
                total.update(block)
                values = np.flatnonzero(np.bincount(block, minlength=256))
                for byte in sorted(values[table[values] < 0], key=lambda byte: np.argmax(block == byte)):
                    table[byte] = ids[BYTE_TOKENS[byte]]
                files[split].write(table[block].data)
        if total.hexdigest() != self.sha256:
            raise UserError(f"{self.path}: changed while it was read; try again when nothing writes to it")
        return list(ids)

    def matches(self, vocabulary: list[str], streams: list[Tensor]) -> bool:
        if len(set(vocabulary)) < len(vocabulary) or list(map(len, streams)) != self.sizes:
            return False
        table, ends = np.array([BYTE_VALUES[token] for token in vocabulary], np.uint8), dict.fromkeys(SPLITS, 0)
        read = dict(zip(SPLITS, streams, strict=True))
        for split, block in self._blocks():
            start, ends[split] = ends[split], ends[split] + len(block)
            ids = read[split][start : ends[split]].numpy()
            if ids.min() < 0 or ids.max() >= len(vocabulary) or not np.array_equal(table[ids], block):
                return False
        return True


def _load(folder: Path, source: _Words | _Bytes, order: str) -> tuple[list[str], list[Tensor]] | None:
    """Load vocabulary and streams of a cache; None if it is missing, corrupt, or for another text or order."""
    try:
        meta = json.loads(serialization.read_regular(folder / "meta.json"))
        if (meta["format"], meta["text_sha256"], meta["order"]) != (_FORMAT, source.sha256, order):
            return None
        names = (_VOCABULARY, *_STREAMS.values())
        if any(serialization.sha256_of_file(folder / name) != meta["sha256"][name] for name in names):
            return None
        content = _open(folder)
        return content if meta["counts"] == _counts(*content) and source.matches(*content) else None
    except UserError:  # from the text, not from the cache
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):  # RuntimeError: torch, if a file vanishes
        return None


def _are_ids_of(texts: Texts, vocabulary: list[str], streams: list[Tensor]) -> bool:
    """Return whether the streams can be the ids of these texts; digests only prove that the cache is unchanged.

    Every id must have its own word, there must be one `<eos>` per line, and the first words of each text must be right.
    A cache that was forged after those words, with matching digests, passes: detecting that would require decoding the
    whole text, which takes as long as encoding it again.
    """
    if len(set(vocabulary)) < len(vocabulary) or EOS not in vocabulary:
        return False
    eos = vocabulary.index(EOS)
    for part, lines, ids in zip(texts.parts, texts.lines, streams, strict=True):
        if not (ids.numel() and ids.min() >= 0 and ids.max() < len(vocabulary)):
            return False
        ends = sum(int((block == eos).sum()) for block in ids.split(_IDS))
        if not lines <= ends <= lines + texts.eos:
            return False
        with contextlib.closing(part.pieces()) as pieces:
            first_words = list(words(next(pieces)))[:-2]  # without the last word, which may be cut, and its <eos>
        if [vocabulary[i] for i in ids[: len(first_words)].tolist()] != first_words:
            return False
    return True


def _counts(vocabulary: list[str], streams: list[Tensor]) -> dict[str, int]:
    return {"types": len(vocabulary)} | dict(zip(SPLITS, map(len, streams), strict=True))


def _open(folder: Path) -> tuple[list[str], list[Tensor]]:
    vocabulary = (folder / _VOCABULARY).read_bytes().decode("utf-8").split("\n")
    paths = [folder / name for name in _STREAMS.values()]
    sizes = [path.stat().st_size // _STORED.itemsize for path in paths]
    return vocabulary, [
        torch.from_file(str(path), shared=False, size=size, dtype=torch.int32)
        for path, size in zip(paths, sizes, strict=True)
    ]


def _build(source: _Words | _Bytes, order: str, folder: Path) -> tuple[list[str], list[Tensor]]:
    """Encode the texts into `folder`, or load the cache that another process has put there in the meantime."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _workspace(folder.parent) as space:
        with contextlib.suppress(FileNotFoundError):
            os.rename(folder, space / "refused")
        new = space / "new"
        new.mkdir()
        vocabulary = source.encode(new)
        if order == "frequency":
            vocabulary = _renumber(vocabulary, new)
        (new / _VOCABULARY).write_bytes("\n".join(vocabulary).encode("utf-8"))
        content = _open(new)  # before the rename, after which another process may replace the files
        digests = {name: serialization.sha256_of_file(new / name) for name in (_VOCABULARY, *_STREAMS.values())}
        meta = {"format": _FORMAT, "order": order, "text_sha256": source.sha256, "counts": _counts(*content)}
        meta["sha256"] = digests
        (new / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
        try:
            os.rename(new, folder)
        except OSError:
            content = _load(folder, source, order)
            if content is None:
                raise
    return content


@contextlib.contextmanager
def _workspace(cache: Path) -> Iterator[Path]:
    """Make a temporary folder in `cache`, and remove those of killed processes, whose locks are free."""
    with contextlib.ExitStack() as stack:
        with _locked(cache, wait=True):  # or another process could remove our folder before it is locked
            for leftover in cache.glob(".words-*.tmp"):
                with _locked(leftover, wait=False) as locked:
                    if locked:
                        shutil.rmtree(leftover, ignore_errors=True)
            folder = Path(tempfile.mkdtemp(dir=cache, prefix=".words-", suffix=".tmp"))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            stack.enter_context(_locked(folder, wait=True))
        yield folder


@contextlib.contextmanager
def _locked(folder: Path, *, wait: bool) -> Iterator[bool]:
    """Try to hold the lock of a folder, which a kill releases too, and yield whether that succeeded."""
    descriptor = None
    with contextlib.suppress(OSError):  # the folder has vanished, or another process holds the lock
        descriptor = serialization.lock(folder, wait=wait)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            os.close(descriptor)


class _Encoder:
    """Numbering of words by first appearance.

    Looking up words one by one would take most of the time. So all words of a piece of text are looked up at once in a
    hash table, which keeps the first word of up to eight bytes, packed into an integer, that fell into each slot.
    Longer and new words, and those whose slot is taken, are looked up one by one in `ids`, which has all.
    """

    def __init__(self):
        self.ids = Numbering()  # of words as UTF-8
        self.words = np.zeros(1 << _BITS, _PACKED)  # 0: free; never a word, because the text has no zero bytes
        self.numbers = np.zeros(1 << _BITS, _STORED)

    def __call__(self, text: bytes) -> np.ndarray:
        """Return the ids, 1-D int32, of the words of UTF-8 text without zero bytes, separated by ASCII white space."""
        text = b" " + text + b" " * _PACKED.itemsize  # so that every word has an end, and eight bytes can be read there
        characters = np.frombuffer(text, np.uint8)
        space = (characters - 0x09 < 5) | (characters - 0x1C < 5)  # smaller values wrap around
        edges = np.flatnonzero(space[1:] != space[:-1]) + 1
        starts, ends = edges[::2], edges[1::2]
        lengths = np.minimum(ends - starts, _PACKED.itemsize + 1)
        packed = np.ndarray(len(text) - _PACKED.itemsize + 1, _PACKED, text, strides=1)  # the eight bytes from each on
        words = packed[starts] & _MASKS[lengths]
        slots = (words * _FACTOR >> np.uint64(64 - _BITS)).astype(np.intp)
        numbers = self.numbers[slots]
        short = lengths <= _PACKED.itemsize
        rest = np.flatnonzero((self.words[slots] != words) | ~short)
        single_words = map(text.__getitem__, map(slice, starts[rest].tolist(), ends[rest].tolist()))
        numbers[rest] = np.fromiter(map(self.ids.__getitem__, single_words), _STORED, len(rest))
        fresh = rest[short[rest] & (self.words[slots[rest]] == 0)][::-1]  # reversed: the first word gets the slot
        self.words[slots[fresh]] = words[fresh]
        self.numbers[slots[fresh]] = numbers[fresh]
        return numbers


def _encode(texts: Texts, folder: Path) -> list[str]:
    """Write the streams, numbered by first appearance, and return the vocabulary."""
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
    return [token.decode("utf-8") for token in encoder.ids]


def _blocks(part: Part, total) -> Iterator[bytes]:
    """Yield a text as UTF-8, block by block, and add it to the digest `total`."""
    for piece in part.pieces():
        block = piece.encode("utf-8")
        total.update(block)
        yield block


def _pieces(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the same bytes, divided after white space and so never within a word, with a line feed at the end."""
    pending, end = [], b"\n"
    for block in blocks:
        end = block[-1:]
        if cut := max(block.rfind(b"\n"), block.rfind(b" ")) + 1:
            yield b"".join([*pending, block[:cut]])
            pending = []
        pending.append(block[cut:])
    if end != b"\n":
        yield b"".join([*pending, b"\n"])


def _with_plain_spaces(piece: bytes) -> bytes:
    """Replace white space that is not ASCII by spaces."""
    non_ascii = piece.translate(None, _ASCII)  # few bytes, so the search is short
    return _SPACE.sub(b" ", piece) if _SPACE.search(non_ascii) else piece


def _renumber(vocabulary: list[str], folder: Path) -> list[str]:
    """Renumber the streams by frequency, in place, and return the vocabulary in its new order."""
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
    """Yield the ids in a file, block by block."""
    while block := file.read(_IDS * _STORED.itemsize):
        yield np.frombuffer(block, _STORED)
