"""Text as streams of ids: vocabulary, encoding, rows.

Letters: N batch (rows), L length.
"""

import contextlib
import dataclasses
import hashlib
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from trellisnet import serialization
from trellisnet.data import PROJECT
from trellisnet.errors import UserError

CACHE = PROJECT / "data" / "cache"
_FORMAT = 2  # of what is cached; another one is needed whenever other ids would be made of the same text
EOS = "<eos>"
SPLITS = ("train", "valid", "test")
ORDERS = ("appearance", "frequency")
ALL_ORDERS = (*ORDERS, "frequency_up", "random")  # of text that fits into lists

# Why a file is refused, for str.format: its path, and what the system or the codec says.
UNREADABLE = "{}: cannot be read ({}); put it there or name its folder with --data"
NOT_UTF8 = "{}: not UTF-8 text (byte {}); convert it to UTF-8"
ZERO_BYTES = "{}: holds zero bytes, so it is no text; name the folder of the text with --data"
EMPTY = "{}: is empty; put the text there or name its folder with --data"


@dataclass(frozen=True)
class Corpus:
    """An encoded corpus.

    Args:
        vocabulary: token of every id.
        train, valid, test: streams of ids, 1-D int64, or int32 where they are mapped from a file.
        sha256: digest of the content that the streams were made from.
        label: what to call the corpus in logs and results.
        spelled: for text that can be spelled in several ways: name of the spelling → split → symbols.
    """

    vocabulary: list[str]
    train: Tensor
    valid: Tensor
    test: Tensor
    sha256: str
    label: str
    spelled: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def vocabulary_sha256(self) -> str:
        """Digest of the tokens in the order of their ids, joined by line feeds."""
        return hashlib.sha256("\n".join(self.vocabulary).encode("utf-8")).hexdigest()

    def renamed(self, label: str) -> "Corpus":
        """The same under another label."""
        return dataclasses.replace(self, label=label)

    def check(self, tokens: tuple[int, int, int], types: int) -> None:
        """Assert that a known corpus came to the known numbers of tokens (train, valid, test) and types."""
        found = tuple(getattr(self, split).numel() for split in SPLITS)
        assert found == tokens, f"the encoder is broken: {found} tokens instead of {tokens}"
        assert len(self.vocabulary) == types, f"the encoder is broken: {len(self.vocabulary)} types instead of {types}"


def words(text: str) -> Iterator[str]:
    """The words of `text`, separated by white space, and `<eos>` at the end of every line, blank ones too."""
    for line in io.StringIO(text):  # lines end at a line feed only, unlike str.splitlines()
        yield from line.split()
        yield EOS


def open_words(text: str) -> list[str]:
    """:func:`words` of a text whose last line goes on: no `<eos>` at its end unless there is a line feed."""
    tokens = list(words(text))
    return tokens if text.endswith("\n") else tokens[:-1]


def unknown_tokens(tokens: Iterable[str], vocabulary: Iterable[str]) -> list[str]:
    """Those that are not in the vocabulary, each once."""
    known = set(vocabulary)
    return [token for token in dict.fromkeys(tokens) if token not in known]


def joined_words(tokens: Iterable[str]) -> str:
    """Words as text: spaces between them, a line feed for `<eos>`."""
    return re.sub(" ?\n ?", "\n", " ".join("\n" if token == EOS else token for token in tokens))


def encode(splits: Iterable[Iterable[str]], *, sha256: str, label: str) -> Corpus:
    """Number the tokens of train, valid and test by first appearance, in this order, from 0."""
    ids: dict[str, int] = {}
    streams = [
        torch.tensor([ids.setdefault(token, len(ids)) for token in tokens], dtype=torch.int64) for tokens in splits
    ]
    return Corpus(list(ids), *streams, sha256=sha256, label=label)


def by_frequency(corpus: Corpus) -> Corpus:
    """The corpus with its tokens numbered anew: the most frequent ones of the training split first.

    Ties, and the tokens that only valid and test have, keep the order that they were in.

    Args:
        corpus: streams 1-D int64.

    Returns:
        streams 1-D int64.
    """
    counts = torch.bincount(corpus.train, minlength=len(corpus.vocabulary))
    return _renumbered(corpus, torch.argsort(counts, descending=True, stable=True))


def reordered(corpus: Corpus, order: str, seed: int = 0) -> Corpus:
    """The corpus with its tokens numbered anew.

    Args:
        corpus: numbered by first appearance, streams 1-D int64.
        order: "appearance": as it is. "frequency": :func:`by_frequency`. "frequency_up": the rarest tokens of the
            training split first, ties in the order that they were in. "random": the tokens of the training split in an
            order drawn from `seed`. What only valid and test have comes last.

    Raises:
        ValueError: unknown order.
    """
    if order not in ALL_ORDERS:
        raise ValueError(f"order: expected one of {', '.join(ALL_ORDERS)}, got {order!r}")
    if order == "appearance":
        return corpus
    if order == "frequency":
        return by_frequency(corpus)
    counts = torch.bincount(corpus.train, minlength=len(corpus.vocabulary))
    known, new = counts.nonzero().squeeze(1), (counts == 0).nonzero().squeeze(1)
    if order == "random":
        ranked = torch.randperm(known.numel(), generator=torch.Generator().manual_seed(seed))
    else:
        ranked = torch.argsort(counts[known], stable=True)
    return _renumbered(corpus, torch.cat([known[ranked], new]))


def _renumbered(corpus: Corpus, order: Tensor) -> Corpus:
    """The corpus with token order[i], of its ids so far, as number i."""
    ranks = torch.argsort(order)
    streams = {split: ranks[getattr(corpus, split)] for split in SPLITS}
    return dataclasses.replace(corpus, vocabulary=[corpus.vocabulary[i] for i in order.tolist()], **streams)


def cache_folder() -> Path:
    """Where encoded text is kept: `data/cache` in the project, or the user's cache if nothing can be written there."""
    folders = [CACHE]
    with contextlib.suppress(RuntimeError):  # no home
        folders.append(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trellisnet")
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
    return CACHE


def cached(folder: Path, texts: list[str], tokenize: Callable[[str], Iterable[str]], *, label: str) -> Corpus:
    """:func:`encode` of the tokenised texts, kept in `folder` under a name made from their content.

    A cache that cannot be read or written only costs time: the texts are encoded again.
    """
    sha256 = digest(texts)
    borders = "-".join(str(len(text)) for text in texts)
    key = f"{tokenize.__name__}-{hashlib.sha256(f'{_FORMAT}-{sha256}-{borders}'.encode()).hexdigest()[:32]}"
    path = folder / f"{key}.pt"
    if path.is_file():
        with contextlib.suppress(UserError, KeyError, TypeError, RuntimeError):  # damaged: made again below
            file = serialization.load(path, "an encoded corpus")
            content = file["content"]
            if file["sha256"] == serialization.sha256_of([key, content]):
                streams = [content[split].to(torch.int64) for split in SPLITS]
                return Corpus(content["vocabulary"], *streams, sha256=sha256, label=label)
    corpus = encode(map(tokenize, texts), sha256=sha256, label=label)
    content = {"vocabulary": corpus.vocabulary} | {split: getattr(corpus, split).to(torch.int32) for split in SPLITS}
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        serialization.save(path, {"sha256": serialization.sha256_of([key, content]), "content": content})
    return corpus


def read_text(path: Path) -> str:
    """A whole UTF-8 text file.

    Raises:
        UserError: missing, unreadable, empty or not UTF-8 text.
    """
    try:
        content = path.read_bytes()
    except OSError as e:
        raise UserError(UNREADABLE.format(path, e.strerror)) from e
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as e:
        raise UserError(NOT_UTF8.format(path, e.start)) from e
    if "\0" in text:
        raise UserError(ZERO_BYTES.format(path))
    if not text.strip():
        raise UserError(EMPTY.format(path))
    return text


def read_splits(folder: Path) -> list[str]:
    """The texts of `train.txt`, `valid.txt` and `test.txt` in `folder`.

    Raises:
        UserError: a file that :func:`read_text` refuses, or no such folder.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder; make it with train.txt, valid.txt and test.txt, name another with --data, "
            "or try --data synthetic"
        )
    return [read_text(folder / f"{split}.txt") for split in SPLITS]


def digest(texts: Iterable[str]) -> str:
    """sha256 of the texts one after the other, as hexadecimal; blind to where one ends and the next begins."""
    total = hashlib.sha256()
    for text in texts:
        total.update(text.encode("utf-8"))
    return total.hexdigest()


def batchify(ids: Tensor, batch_size: int) -> Tensor:
    """Cut a stream into rows that lie side by side in a batch.

    Args:
        ids: 1-D int64 or int32.
        batch_size: N.

    Returns:
        (N, length), dtype of `ids`: contiguous rows of the stream, the tail that does not fill them trimmed. They share
        the memory of a contiguous stream.

    Raises:
        ValueError: wrong shape or dtype, or fewer ids than rows.
    """
    if ids.dim() != 1 or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"ids: expected 1-D int64 or int32, got {ids.dim()}-D {ids.dtype}")
    length = ids.numel() // batch_size if batch_size > 0 else 0
    if length < 1:
        raise ValueError(f"batch_size: expected 1 to {ids.numel()} (the number of ids), got {batch_size}")
    return ids[: length * batch_size].view(batch_size, length).contiguous()
