"""Character-level Penn Treebank, spelled from the word-level files in one of two ways.

`authors`: every character is a symbol, including the spaces at both ends of a line, and a line feed is `<eos>`.
`standard`: Mikolov's character files, which AWD-LSTM and most of the literature use. Lines are stripped, a space is `_`
and every line ends with `<eos>`. The two streams differ by two spaces per line, which carry no information. The Penn
Treebank contains no `_`; in the standard stream of another text it becomes `<underscore>`, to distinguish it from a
space.
"""

import dataclasses
import functools
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C leaves no traceback; partial downloads are kept

from trellisnet.data import corpus, download, penn
from trellisnet.data.corpus import EOS, SPLITS, Corpus

SPACE, UNDERSCORE = "_", "<underscore>"
_AUTHORS = {"\n": EOS}
_STANDARD = {"\n": EOS, " ": SPACE, SPACE: UNDERSCORE}
# Published counts: symbols of train, valid and test, and types.
ALPHABET = 50
SYMBOLS = {"authors": (5_101_618, 399_782, 449_945), "standard": (5_017_482, 393_042, 442_423)}


def authors(text: str) -> Iterator[str]:
    """Yield the characters of `text`, with `<eos>` for a line feed."""
    return map(_AUTHORS.get, text, text)


def standard(text: str) -> Iterator[str]:
    """Yield the characters of every stripped line, with `_` for a space and `<underscore>` for `_`, then `<eos>`."""
    stripped = "".join(f"{line.strip()}\n" for line in text.removesuffix("\n").split("\n"))
    return map(_STANDARD.get, stripped, stripped)


def open_authors(text: str) -> list[str]:
    """Spell a text to be continued as :func:`authors` does."""
    return list(authors(text))


def open_standard(text: str) -> list[str]:
    """Spell a text to be continued as :func:`standard` does, without stripping its end."""
    *lines, last = text.split("\n")
    complete = standard("\n".join([*lines, ""])) if lines else ()
    last = last.lstrip()
    return [*complete, *map(_STANDARD.get, last, last)]


def _joined(tokens: Iterable[str], characters: dict[str, str]) -> str:
    """Join symbols to text."""
    return "".join(characters.get(token, token) for token in tokens)


STREAMS: dict[str, Callable[[str], Iterator[str]]] = {"authors": authors, "standard": standard}
# Prompt → symbols, and generated symbols → text.
PROMPTS: dict[str, Callable[[str], list[str]]] = {"authors": open_authors, "standard": open_standard}
TEXTS: dict[str, Callable[[Iterable[str]], str]] = {
    name: functools.partial(_joined, characters={symbol: character for character, symbol in symbols.items()})
    for name, symbols in (("authors", _AUTHORS), ("standard", _STANDARD))
}


def symbols(texts: list[str]) -> dict[str, dict[str, int]]:
    """Count the symbols of each split in each stream."""
    return {
        name: {split: len(list(spell(text))) for split, text in zip(SPLITS, texts, strict=True)}
        for name, spell in STREAMS.items()
    }


def load(folder: str | Path, download: bool = False, stream: str = "authors", order: str = "appearance") -> Corpus:
    """Read and encode the corpus; other arguments and errors as in :func:`trellisnet.data.penn.load`.

    Args:
        stream: a name in `STREAMS`.
        order: order of the alphabet, see :func:`trellisnet.data.corpus.reordered`.
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
