"""WikiText-103: three text files, `<eos>` at the end of every line, even of blank ones."""

import functools
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C leaves no traceback; partial downloads are kept

from trellisnet.data import archive, corpus, download, encoder, synthetic
from trellisnet.data.corpus import SPLITS, Corpus, cache_folder
from trellisnet.data.download import Source
from trellisnet.data.text import Texts, find

# Published counts of tokens and types. They identify the corpus, whose text has no published checksum.
TOKENS = (103_227_021, 217_646, 245_569)
VOCABULARY = 267_735
LABEL = "WikiText-103"
# The sample: WikiText's validation text for training, and the halves of its test text for validation and test.
SAMPLE_SHA256 = "ee8e179331812a9025fac9f2602faeb12e773d051d55ee6e50ce15da3bc784c1"
SAMPLE_LABEL = "WikiText sample"

ARCHIVE = Source(
    "wikitext-103-v1.zip",
    (
        "https://wikitext.smerity.com/wikitext-103-v1.zip",
        "https://s3.amazonaws.com/research.metamind.io/wikitext/wikitext-103-v1.zip",
    ),
    "9ddaacaf6af0710eda8c456decff7832",
    190_229_076,
)
NAMES = [f"wiki.{split}.tokens" for split in SPLITS]
LAYOUTS = (NAMES, [f"{split}.txt" for split in SPLITS])
MAX_SIZE = 10**9  # bytes of an extracted file; the training text has 540 million


def fetch(folder: str | Path) -> list[Path]:
    """Download the archive into `folder` unless it is there, and extract the missing texts.

    Returns:
        paths of the texts that were missing.

    Raises:
        UserError, RunError: as in `trellisnet.data.download.fetch_all` and `trellisnet.data.archive.extract`.
    """
    folder = Path(folder)
    missing = [name for name in NAMES if not (folder / name).exists()]
    if not missing:
        return []
    path = download.fetch(ARCHIVE, folder)
    return archive.extract(path, {f"wikitext-103/{name}": name for name in missing}, folder, max_size=MAX_SIZE)


def load(folder: str | Path, download: bool = False, order: str = "appearance") -> Corpus:
    """Read and encode the corpus as int32 streams mapped from a file.

    Args:
        folder: folder with the three texts, under their published names or as train.txt, valid.txt, test.txt; a single
            text file, which is divided into them; or "synthetic" for a small generated corpus.
        download: download WikiText-103 if `folder` holds no text, or only some of its texts and the archive.
        order: order of the vocabulary, see :func:`trellisnet.data.encoder.encode_files`.

    Raises:
        UserError: files are missing, empty or unreadable, or cannot be downloaded.
        RunError: the disk is full.
    """
    if str(folder) == "synthetic":
        texts = synthetic.texts()
        encoded = corpus.encode(map(corpus.words, texts), sha256=corpus.digest(texts), label="synthetic")
        return corpus.by_frequency(encoded) if order == "frequency" else encoded
    folder = Path(folder)
    there = any((folder / name).exists() for names in LAYOUTS for name in names)
    if download and (not there or (folder / ARCHIVE.name).exists()):  # an archive: continue an interrupted extraction
        fetch(folder)
    texts = Texts(find(folder, LAYOUTS))
    loaded = texts.describe(encoder.encode_files(texts, cache_folder(), order=order, label="own corpus"))
    counts = tuple(getattr(loaded, split).numel() for split in SPLITS)
    if loaded.sha256 == SAMPLE_SHA256:
        return loaded.renamed(SAMPLE_LABEL)
    if (*counts, len(loaded.vocabulary)) == (*TOKENS, VOCABULARY):
        return loaded.renamed(LABEL)
    return loaded


main = functools.partial(download.main, "wt103.data", "Fetch WikiText-103 (190 MB).", "data/wikitext-103", NAMES, fetch)

if __name__ == "__main__":
    sys.exit(main())
