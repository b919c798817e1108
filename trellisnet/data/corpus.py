"""Text as streams of ids: vocabulary, encoding, rows.

Letters: N batch (rows), L length.
"""

import contextlib
import dataclasses
import hashlib
import io
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trellisnet.data import PROJECT

CACHE = PROJECT / "data" / "cache"
EOS = "<eos>"
SPLITS = ("train", "valid", "test")
ORDERS = ("appearance", "frequency")
ALL_ORDERS = (*ORDERS, "frequency_up", "random")  # of text that fits into lists


@dataclass(frozen=True)
class Corpus:
    """An encoded corpus.

    Args:
        vocabulary: token of every id.
        train, valid, test: streams of ids, 1-D int64, or int32 where they are mapped from a file.
        sha256: digest of the content that the streams were made from.
        label: what to call the corpus in logs and results.
        spelled: for text that can be spelled in several ways: name of the spelling → split → symbols.
        notices: what the user should know of how the text was read.
        changed: how the text is read where version 0.1.0 read it otherwise, in words that follow "it is read"; or "".
        stored_sha256: digest of the text as it is stored, which differs from `sha256` if line ends were normalised.
    """

    vocabulary: list[str]
    train: Tensor
    valid: Tensor
    test: Tensor
    sha256: str
    label: str
    spelled: dict[str, dict[str, int]] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    changed: str = ""
    stored_sha256: str = ""

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


class Numbering(dict):
    """Id of every token; a new one gets the next id."""

    def __missing__(self, token: str | bytes) -> int:
        number = self[token] = len(self)
        return number


def encode(splits: Iterable[Iterable[str]], *, sha256: str, label: str) -> Corpus:
    """Number the tokens of train, valid and test by first appearance, in this order, from 0."""
    ids = Numbering()
    streams = [torch.from_numpy(np.fromiter(map(ids.__getitem__, tokens), np.int64)) for tokens in splits]
    return Corpus(list(ids), *streams, sha256=sha256, label=label)


def only_held_out(corpus: Corpus) -> dict[str, tuple[int, int]]:
    """How many types of valid and of test, and tokens of these types there, the training text does not have.

    In every order of the vocabulary the training text's types come first.
    """
    known, found = int(corpus.train.max()) + 1, {}
    for split in SPLITS[1:]:
        ids = getattr(corpus, split)
        new = ids[ids >= known]
        if new.numel():
            found[split] = new.unique().numel(), new.numel()
    return found


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
