"""Word-level Penn Treebank: three files of words, `<eos>` at the end of every line, ids by first appearance."""

import functools
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback; what has arrived is kept

from trellisnet.data import corpus, download, penn
from trellisnet.data.corpus import Corpus

# What the Penn Treebank must come to.
TOKENS = (929_589, 73_760, 82_430)
VOCABULARY = 10_000


def load(folder: str | Path, download: bool = False, order: str = "appearance") -> Corpus:
    """Read and encode the corpus; other arguments and errors as in :func:`trellisnet.data.penn.load`.

    Args:
        order: of the vocabulary, see :func:`trellisnet.data.corpus.reordered`.
    """
    loaded, _ = penn.load(folder, download, corpus.words)
    if loaded.label == penn.LABEL:
        loaded.check(TOKENS, VOCABULARY)
    return corpus.reordered(loaded, order)


main = functools.partial(
    download.main, "word_ptb.data", "Fetch the Penn Treebank.", "data/penn", penn.NAMES, penn.fetch
)

if __name__ == "__main__":
    sys.exit(main())
