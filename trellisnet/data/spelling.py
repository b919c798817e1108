"""From text to tokens and back: words, characters in one of two streams, or bytes.

`words`: split at white space, `<eos>` at the end of every line. `authors`: every character is a symbol, the two spaces
around a line of the Penn Treebank too, and the line feed is `<eos>`. `standard`: the stream of Mikolov's character
files, which AWD-LSTM and most of the literature use: lines are stripped, a space is `_`, and every line ends with
`<eos>`. On the Penn Treebank the two streams differ by two spaces per line, which carry no information. It contains no
`_`; one in another text becomes `<underscore>` in the standard stream, so that it is not taken for a space. `bytes`:
every byte of UTF-8 is a symbol.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from trellisnet.data.corpus import EOS, joined_words, open_words, words

SPACE, UNDERSCORE = "_", "<underscore>"
_AUTHORS = {"\n": EOS}
_STANDARD = {"\n": EOS, " ": SPACE, SPACE: UNDERSCORE}
# Token of every byte: an ASCII character, or the hexadecimal value of one that cannot be printed.
BYTE_TOKENS = [chr(byte) if 0x20 <= byte < 0x7F else f"<{byte:02x}>" for byte in range(256)]
BYTE_VALUES = {token: byte for byte, token in enumerate(BYTE_TOKENS)}


@dataclass(frozen=True)
class Spelling:
    """Conversion between text and tokens.

    Args:
        name: key in `SPELLINGS`.
        noun: the tokens in the plural.
        tokens: from whole lines to their tokens; a missing line feed at the end may be added.
        open_tokens: from a text with an unfinished last line, such as a prompt, to its tokens.
        text: from tokens to text.
    """

    name: str
    noun: str
    tokens: Callable[[str], Iterable[str]]
    open_tokens: Callable[[str], list[str]]
    text: Callable[[Iterable[str]], str]


def _authors(text: str) -> Iterator[str]:
    return map(_AUTHORS.get, text, text)


def _open_authors(text: str) -> list[str]:
    return list(_authors(text))


def _standard(text: str) -> Iterator[str]:
    stripped = "".join(f"{line.strip()}\n" for line in text.removesuffix("\n").split("\n"))
    return map(_STANDARD.get, stripped, stripped)


def _open_standard(text: str) -> list[str]:
    """Return the standard tokens of a text to be continued: the end of the last line is not stripped."""
    *lines, last = text.split("\n")
    ended = _standard("\n".join([*lines, ""])) if lines else ()
    last = last.lstrip()
    return [*ended, *map(_STANDARD.get, last, last)]


def _joined(tokens: Iterable[str], characters: dict[str, str]) -> str:
    return "".join(characters.get(token, token) for token in tokens)


def _inverse(symbols: dict[str, str]) -> Callable[[Iterable[str]], str]:
    return functools.partial(_joined, characters={symbol: character for character, symbol in symbols.items()})


def _bytes(text: str) -> list[str]:
    # In the arguments of a program, Python escapes bytes that are not UTF-8 as surrogates.
    return [BYTE_TOKENS[byte] for byte in text.encode("utf-8", "surrogateescape")]


def _text_of_bytes(tokens: Iterable[str]) -> str:
    """Return the text of bytes; those that are not UTF-8 become U+FFFD."""
    return bytes(map(BYTE_VALUES.__getitem__, tokens)).decode("utf-8", "replace")


WORDS = Spelling("words", "words", words, open_words, joined_words)
STREAMS = {
    "authors": Spelling("authors", "symbols", _authors, _open_authors, _inverse(_AUTHORS)),
    "standard": Spelling("standard", "symbols", _standard, _open_standard, _inverse(_STANDARD)),
}
BYTES = Spelling("bytes", "symbols", _bytes, _bytes, _text_of_bytes)
SPELLINGS = {WORDS.name: WORDS, **STREAMS, BYTES.name: BYTES}
