"""Character-level Penn Treebank, spelled from the three files of words in one of the two streams of
:mod:`trellisnet.data.spelling`; and enwik8 and text8, byte by byte.
"""

import dataclasses
import functools
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C leaves no traceback; partial downloads are kept

from trellisnet.data import corpus, download, penn, wikipedia
from trellisnet.data.corpus import SPLITS, Corpus
from trellisnet.data.spelling import SPACE, STREAMS, UNDERSCORE

# Published counts: symbols of train, valid and test, and types.
ALPHABET = 50
SYMBOLS = {"authors": (5_101_618, 399_782, 449_945), "standard": (5_017_482, 393_042, 442_423)}


def symbols(texts: list[str]) -> dict[str, dict[str, int]]:
    """Count the symbols of each split in each stream."""
    return {
        name: {split: len(list(stream.tokens(text))) for split, text in zip(SPLITS, texts, strict=True)}
        for name, stream in STREAMS.items()
    }


def load(
    folder: str | Path,
    download: bool = False,
    stream: str = "authors",
    order: str = "appearance",
    dataset: str = "ptb",
) -> Corpus:
    """Read and encode the corpus; other arguments and errors as in :func:`trellisnet.data.penn.load`.

    Args:
        stream: a name in `STREAMS`.
        order: order of the alphabet, see :func:`trellisnet.data.corpus.reordered`.
        dataset: "ptb", or one of :func:`trellisnet.data.wikipedia.load`, to which stream and order do not apply.
    """
    if dataset != "ptb":
        return wikipedia.load(dataset, folder, download)
    loaded, texts = penn.load(folder, download, STREAMS[stream].tokens)
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
