"""Character-level Penn Treebank, spelled from the three files of words in one of two ways.

`authors`: every character is a symbol, the two spaces around a line too, and the line feed is `<eos>`. `standard`: the
stream of Mikolov's character files, which AWD-LSTM and most of the literature use: lines are stripped, a space is `_`,
and every line ends with `<eos>`. The two differ by two spaces a line, which carry no information. The Penn Treebank has
no `_` of its own; that of another text is `<underscore>` in the standard stream, lest it be taken for a space.
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

SPACE, UNDERSCORE = "_", "<underscore>"
_AUTHORS = {"\n": EOS}
_STANDARD = {"\n": EOS, " ": SPACE, SPACE: UNDERSCORE}
# What the Penn Treebank must come to.
ALPHABET = 50
SYMBOLS = {"authors": (5_101_618, 399_782, 449_945), "standard": (5_017_482, 393_042, 442_423)}


def authors(text: str) -> Iterator[str]:
    """Every character of `text` as it is, `<eos>` for a line feed."""
    return map(_AUTHORS.get, text, text)


def standard(text: str) -> Iterator[str]:
    """The characters of every stripped line, `_` for a space and `<underscore>` for a `_`, then `<eos>`."""
    stripped = "".join(f"{line.strip()}\n" for line in text.removesuffix("\n").split("\n"))
    return map(_STANDARD.get, stripped, stripped)


def open_authors(text: str) -> list[str]:
    """:func:`authors` of a text whose last line goes on."""
    return list(authors(text))


def open_standard(text: str) -> list[str]:
    """:func:`standard` of a text whose last line goes on: the end of that is not stripped."""
    *lines, last = text.split("\n")
    whole = standard("\n".join([*lines, ""])) if lines else ()
    last = last.lstrip()
    return [*whole, *map(_STANDARD.get, last, last)]


def _joined(tokens: Iterable[str], characters: dict[str, str]) -> str:
    """Symbols as text."""
    return "".join(characters.get(token, token) for token in tokens)


STREAMS: dict[str, Callable[[str], Iterator[str]]] = {"authors": authors, "standard": standard}
# From a prompt to its symbols, and back from what a model of the stream has generated.
PROMPTS: dict[str, Callable[[str], list[str]]] = {"authors": open_authors, "standard": open_standard}
TEXTS: dict[str, Callable[[Iterable[str]], str]] = {
    name: functools.partial(_joined, characters={symbol: character for character, symbol in symbols.items()})
    for name, symbols in (("authors", _AUTHORS), ("standard", _STANDARD))
}


def symbols(texts: list[str]) -> dict[str, dict[str, int]]:
    """In how many symbols each stream spells each split."""
    return {
        name: {split: len(list(spell(text))) for split, text in zip(SPLITS, texts, strict=True)}
        for name, spell in STREAMS.items()
    }


def load(folder: str | Path, download: bool = False, stream: str = "authors", order: str = "appearance") -> Corpus:
    """Read and encode the corpus; other arguments and errors as in :func:`trellisnet.data.penn.load`.

    Args:
        stream: a name in `STREAMS`.
        order: of the alphabet, see :func:`trellisnet.data.corpus.reordered`.
    """
    loaded, texts = penn.load(folder, download, STREAMS[stream])
    if loaded.label == penn.LABEL:
        loaded.check(SYMBOLS[stream], ALPHABET)
    changed = [loaded.changed] if loaded.changed else []
    if UNDERSCORE in loaded.vocabulary:
        changed.append(f"with {UNDERSCORE} for every {SPACE} in it")
    return dataclasses.replace(corpus.reordered(loaded, order), spelled=symbols(texts), changed=", ".join(changed))


main = functools.partial(
    download.main, "char_ptb.data", "Fetch the Penn Treebank.", "data/penn", penn.NAMES, penn.fetch
)

if __name__ == "__main__":
    sys.exit(main())
