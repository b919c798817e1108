"""Character-level Penn Treebank, spelled from the three files of words in one of two ways.

`authors`: every character is a symbol, the two spaces around a line too, and the line feed is `<eos>`. `standard`: the
stream of Mikolov's character files, which AWD-LSTM and most of the literature use: lines are stripped, a space is `_`,
and every line ends with `<eos>`. The two differ by two spaces a line, which carry no information.
"""

import dataclasses
import functools
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback; what has arrived is kept

from trellisnet.data import corpus, download, penn
from trellisnet.data.corpus import EOS, SPLITS, Corpus

SPACE = "_"
# What the Penn Treebank must come to.
ALPHABET = 50
SYMBOLS = {"authors": (5_101_618, 399_782, 449_945), "standard": (5_017_482, 393_042, 442_423)}


def authors(text: str) -> Iterator[str]:
    """Every character of `text` as it is, `<eos>` for a line feed."""
    return (EOS if character == "\n" else character for character in text)


def standard(text: str) -> Iterator[str]:
    """The characters of every stripped line, `_` for a space, then `<eos>`."""
    for line in text.removesuffix("\n").split("\n"):
        yield from line.strip().replace(" ", SPACE)
        yield EOS


def open_authors(text: str) -> list[str]:
    """:func:`authors` of a text whose last line goes on."""
    return list(authors(text))


def open_standard(text: str) -> list[str]:
    """:func:`standard` of a text whose last line goes on: the end of that is not stripped."""
    *lines, last = text.split("\n")
    whole = standard("\n".join([*lines, ""])) if lines else ()
    return [*whole, *last.lstrip().replace(" ", SPACE)]


def joined(tokens: Iterable[str], space: str = " ") -> str:
    """Characters as text: a line feed for `<eos>`, a space for `space`."""
    return "".join({EOS: "\n", space: " "}.get(token, token) for token in tokens)


STREAMS: dict[str, Callable[[str], Iterator[str]]] = {"authors": authors, "standard": standard}
# From a prompt to its symbols, and back from what a model of the stream has generated.
PROMPTS: dict[str, Callable[[str], list[str]]] = {"authors": open_authors, "standard": open_standard}
TEXTS: dict[str, Callable[[Iterable[str]], str]] = {
    "authors": joined,
    "standard": functools.partial(joined, space=SPACE),
}


def symbols(texts: list[str]) -> dict[str, dict[str, int]]:
    """In how many symbols each stream spells each split."""
    return {
        name: {split: sum(1 for _ in spell(text)) for split, text in zip(SPLITS, texts, strict=True)}
        for name, spell in STREAMS.items()
    }


def load(folder: str | Path, download: bool = False, stream: str = "authors", order: str = "appearance") -> Corpus:
    """Read and encode the corpus; other arguments and errors as in :func:`trellisnet.data.penn.texts`.

    Args:
        stream: a name in `STREAMS`.
        order: of the alphabet, see :func:`trellisnet.data.corpus.reordered`.
    """
    texts, label = penn.texts(folder, download)
    loaded = corpus.cached(corpus.cache_folder(), texts, STREAMS[stream], label=label)
    if label == penn.LABEL:
        loaded.check(SYMBOLS[stream], ALPHABET)
    return dataclasses.replace(corpus.reordered(loaded, order), spelled=symbols(texts))


main = functools.partial(
    download.main, "char_ptb.data", "Fetch the Penn Treebank.", "data/penn", penn.NAMES, penn.fetch
)

if __name__ == "__main__":
    sys.exit(main())
