"""The vocabulary of a language model, and its file beside the weights."""

import functools
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from trellisnet.data.corpus import digest_of_tokens, unknown_tokens
from trellisnet.data.spelling import BYTES, SPELLINGS, Spelling
from trellisnet.data.text import normalised
from trellisnet.errors import NAME, UserError, counted, shown
from trellisnet.serialization import atomic_write, read_regular

FILE = "vocabulary.json"  # in a run's folder
UNKNOWN = "<unk>"


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that the ids of a language model stand for.

    Args:
        tokens: token of every id.
        spelling: how text is spelled in them.
    """

    tokens: Sequence[str] = field(repr=False)
    spelling: Spelling

    def __len__(self) -> int:
        return len(self.tokens)

    @functools.cached_property
    def ids(self) -> dict[str, int]:
        """Id of every token."""
        return {token: i for i, token in enumerate(self.tokens)}

    @functools.cached_property
    def sha256(self) -> str:
        """Digest of the tokens, which weights carry."""
        return digest_of_tokens(self.tokens)

    def text(self, ids: Iterable[int]) -> str:
        """Text of a sequence of ids."""
        return self.spelling.text(self.tokens[i] for i in ids)

    def encode(self, text: str) -> tuple[list[int], dict[str, int]]:
        """Encode a text of whole lines, with `<unk>` for unknown words.

        Returns:
            the ids, and how often each unknown word occurs.

        Raises:
            UserError: a token is unknown and the vocabulary has no `<unk>`.
        """
        tokens = list(self.spelling.tokens(self._as_read(text)))
        unknown: dict[str, int] = {}
        for token in tokens:
            if token not in self.ids:
                unknown[token] = unknown.get(token, 0) + 1
        if unknown and UNKNOWN not in self.ids:
            raise self._refusal("text", list(unknown))
        return [self.ids[UNKNOWN if token in unknown else token] for token in tokens], unknown

    def encode_prompt(self, prompt: str) -> list[int]:
        """Encode the beginning of a text, whose last line is unfinished.

        Raises:
            UserError: a token is unknown.
        """
        tokens = self.spelling.open_tokens(self._as_read(prompt))
        if unknown := unknown_tokens(tokens, self.ids):
            raise self._refusal("prompt", unknown)
        return [self.ids[token] for token in tokens]

    def line_end(self) -> list[int]:
        """Return the ids that an empty prompt stands for: `<eos>`, or in bytes a line feed.

        Raises:
            UserError: the vocabulary has no line end; that of text8 has none.
        """
        try:
            return self.encode_prompt("\n")
        except UserError as e:
            noun = self.spelling.noun
            raise UserError(f"prompt: expected some text; the {noun} of the vocabulary include no line end") from e

    def _as_read(self, text: str) -> str:
        """Return a text as it is read from a file; bytes are never normalised."""
        return text if self.spelling is BYTES else normalised(text)

    def _refusal(self, name: str, unknown: list[str]) -> UserError:
        known = [token for token in (unknown[0].lower(), UNKNOWN) if token in self.ids]
        advice = f"write {' or '.join(known)} for it" if known else "leave it out"
        first, more = repr(self.spelling.text(unknown[:1])), f" (nor are others in the {name})" * (len(unknown) > 1)
        return UserError(
            f"{name}: {shown(first, NAME)} is not among the {counted(len(self), self.spelling.noun)} of the "
            f"vocabulary{more}; {advice}"
        )

    # -- the file ------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike) -> None:
        """Write the tokens with their ids, in alphabetical order, atomically.

        Raises:
            OSError: the disk is full, or the like.
        """
        content = {"spelling": self.spelling.name, "ids": dict(sorted(self.ids.items()))}
        with atomic_write(path) as file:
            file.write((json.dumps(content, indent=0, ensure_ascii=False) + "\n").encode())

    @classmethod
    def load(cls, path: str | os.PathLike) -> Self:
        """Read the file that :meth:`save` writes.

        Raises:
            UserError: missing, unreadable or corrupt.
        """
        try:
            content = json.loads(read_regular(path))
        except FileNotFoundError as e:
            raise UserError(
                f"{path}: no such file; python scripts/export.py --vocabulary FOLDER makes it from the data of the run"
            ) from e
        except OSError as e:
            raise UserError(f"{path}: cannot be read ({e.strerror})") from e
        except (ValueError, RecursionError) as e:
            raise UserError(f"{path}: not a vocabulary, or corrupt ({e})") from e
        if not _is_vocabulary(content):
            expected = f"a spelling ({', '.join(SPELLINGS)}) and an id for every token, from 0 on"
            raise UserError(f"{path}: not a vocabulary, or corrupt; expected {expected}")
        return cls(sorted(content["ids"], key=content["ids"].get), SPELLINGS[content["spelling"]])


def _is_vocabulary(content: Any) -> bool:
    if not isinstance(content, dict) or not isinstance(content.get("ids"), dict):
        return False
    spelling, ids = content.get("spelling"), list(content["ids"].values())
    if not isinstance(spelling, str) or spelling not in SPELLINGS or not all(type(i) is int for i in ids):
        return False
    return bool(ids) and sorted(ids) == list(range(len(ids)))
