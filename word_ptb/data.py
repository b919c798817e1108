"""Word-level Penn Treebank: three text files, `<eos>` at the end of every line, ids by first appearance."""

import functools
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C leaves no traceback; partial downloads are kept

from trellisnet.data import corpus, download, penn
from trellisnet.data.corpus import Corpus

# Published counts: tokens of train, valid and test, and types.
TOKENS = (929_589, 73_760, 82_430)
VOCABULARY = 10_000


def load(folder: str | Path, download: bool = False, order: str = "appearance") -> Corpus:
    """Read and encode the corpus; other arguments and errors as in :func:`trellisnet.data.penn.load`.

    Args:
        order: order of the vocabulary, see :func:`trellisnet.data.corpus.reordered`.
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
