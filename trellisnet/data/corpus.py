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
ALL_ORDERS = (*ORDERS, "frequency_up", "random")  # for text that fits into lists


@dataclass(frozen=True)
class Corpus:
    """An encoded corpus.

    Args:
        vocabulary: token of every id.
        train, valid, test: streams of ids, 1-D int64, or int32 if mapped from a file.
        sha256: digest of the text.
        label: name of the corpus in logs and results.
        spelled: for text that can be spelled in several ways: spelling → split → number of symbols.
        notices: lines for the user on how the text was read.
        changed: normalisation that version 0.1.0 did not do, in words that follow "it is read"; or "".
        stored_sha256: digest of the files as stored, which differs from `sha256` if the text was normalised.
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
        """Digest of the vocabulary."""
        return digest_of_tokens(self.vocabulary)

    def renamed(self, label: str) -> "Corpus":
        """Return the same corpus under another label."""
        return dataclasses.replace(self, label=label)

    def check(self, tokens: tuple[int, int, int], types: int) -> None:
        """Assert that a published corpus has the published numbers of tokens (train, valid, test) and types."""
        numels = tuple(getattr(self, split).numel() for split in SPLITS)
        assert numels == tokens, f"the encoder is broken: {numels} tokens instead of {tokens}"
        assert len(self.vocabulary) == types, f"the encoder is broken: {len(self.vocabulary)} types instead of {types}"


def words(text: str) -> Iterator[str]:
    """Yield the words of `text`, separated by white space, and `<eos>` at the end of every line, even of blank ones."""
    for line in io.StringIO(text):  # lines end at a line feed only, unlike str.splitlines()
        yield from line.split()
        yield EOS


def open_words(text: str) -> list[str]:
    """Return the :func:`words` of a text to be continued: without `<eos>` at its end unless it ends in a line feed."""
    tokens = list(words(text))
    return tokens if text.endswith("\n") else tokens[:-1]


def unknown_tokens(tokens: Iterable[str], vocabulary: Iterable[str]) -> list[str]:
    """Return the tokens that are not in the vocabulary, each once."""
    vocabulary = set(vocabulary)
    return [token for token in dict.fromkeys(tokens) if token not in vocabulary]


def joined_words(tokens: Iterable[str]) -> str:
    """Join words to text: spaces between them, a line feed for `<eos>`."""
    return re.sub(" ?\n ?", "\n", " ".join("\n" if token == EOS else token for token in tokens))


class Numbering(dict):
    """Mapping from token to id that gives a new token the next id."""

    def __missing__(self, token: str | bytes) -> int:
        number = self[token] = len(self)
        return number


def encode(splits: Iterable[Iterable[str]], *, sha256: str, label: str) -> Corpus:
    """Number the tokens of train, valid and test, in this order, from 0 by first appearance."""
    ids = Numbering()
    streams = [torch.from_numpy(np.fromiter(map(ids.__getitem__, tokens), np.int64)) for tokens in splits]
    return Corpus(list(ids), *streams, sha256=sha256, label=label)


def only_held_out(corpus: Corpus) -> dict[str, tuple[int, int]]:
    """Count the types that occur in valid or test but not in train: split → (types, their tokens); without zeros.

    In every order of the vocabulary, the types of the training text come first.
    """
    train_types, counts = int(corpus.train.max()) + 1, {}
    for split in SPLITS[1:]:
        ids = getattr(corpus, split)
        new = ids[ids >= train_types]
        if new.numel():
            counts[split] = new.unique().numel(), new.numel()
    return counts


def by_frequency(corpus: Corpus) -> Corpus:
    """Renumber the tokens of a corpus, the most frequent ones of the training split first.

    Ties, and tokens that occur only in valid and test, keep their order. Streams are int64.
    """
    counts = torch.bincount(corpus.train, minlength=len(corpus.vocabulary))
    return _renumbered(corpus, torch.argsort(counts, descending=True, stable=True))


def reordered(corpus: Corpus, order: str, seed: int = 0) -> Corpus:
    """Renumber the tokens of a corpus.

    Args:
        corpus: numbered by first appearance, with int64 streams.
        order: "appearance": unchanged. "frequency": :func:`by_frequency`. "frequency_up": the rarest tokens of the
            training split first; ties keep their order. "random": the tokens of the training split in an order drawn
            from `seed`. Tokens that occur only in valid and test always come last.

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
    in_train, held_out = counts.nonzero().squeeze(1), (counts == 0).nonzero().squeeze(1)
    if order == "random":
        ranked = torch.randperm(in_train.numel(), generator=torch.Generator().manual_seed(seed))
    else:
        ranked = torch.argsort(counts[in_train], stable=True)
    return _renumbered(corpus, torch.cat([in_train[ranked], held_out]))


def _renumbered(corpus: Corpus, order: Tensor) -> Corpus:
    """Give the token with the old id order[i] the new id i."""
    ranks = torch.argsort(order)
    streams = {split: ranks[getattr(corpus, split)] for split in SPLITS}
    return dataclasses.replace(corpus, vocabulary=[corpus.vocabulary[i] for i in order.tolist()], **streams)


def cache_folder() -> Path:
    """Return the folder for encoded text: `data/cache` in the project, or the user's cache if that is not writable."""
    folders = [CACHE]
    with contextlib.suppress(RuntimeError):  # no home directory
        folders.append(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trellisnet")
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
    return CACHE


def digest(texts: Iterable[str]) -> str:
    """Return the sha256 of the concatenated texts in hexadecimal, regardless of the borders between them."""
    total = hashlib.sha256()
    for text in texts:
        total.update(text.encode("utf-8"))
    return total.hexdigest()


def digest_of_tokens(tokens: Iterable[str]) -> str:
    """Return the sha256 of a vocabulary in hexadecimal: of its tokens in order of their ids, joined by line feeds."""
    return hashlib.sha256("\n".join(tokens).encode("utf-8")).hexdigest()


def batchify(ids: Tensor, batch_size: int) -> Tensor:
    """Divide a stream into N contiguous rows, the rows of a batch, and drop the remainder.

    Args:
        ids: 1-D int64 or int32.
        batch_size: N.

    Returns:
        (N, length), in the dtype of `ids`. The rows share the memory of a contiguous stream.

    Raises:
        ValueError: wrong shape or dtype, or fewer ids than rows.
    """
    if ids.dim() != 1 or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"ids: expected 1-D int64 or int32, got {ids.dim()}-D {ids.dtype}")
    length = ids.numel() // batch_size if batch_size > 0 else 0
    if length < 1:
        raise ValueError(f"batch_size: expected 1 to {ids.numel()} (the number of ids), got {batch_size}")
    return ids[: length * batch_size].view(batch_size, length).contiguous()
