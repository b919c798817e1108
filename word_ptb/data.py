"""Word-level Penn Treebank: three files of words, `<eos>` at the end of every line, ids by first appearance."""

from pathlib import Path

from trellisnet.data import corpus, synthetic
from trellisnet.data.corpus import Corpus

PTB_LABEL = "Penn Treebank"
# Mikolov's version of the corpus: sha256 of the three files one after the other (cat train.txt valid.txt test.txt |
# sha256sum), where one ends and the next begins, and what they hold.
PTB_SHA256 = "0b6c7d63ba3b5066369952976bfedb370ca0eee0eaffe6f524af316c6beaca3d"
PTB_CHARACTERS = [5_101_618, 399_782, 449_945]
PTB_TOKENS = {"train": 929_589, "valid": 73_760, "test": 82_430}
PTB_VOCABULARY = 10_000


def load(folder: str | Path) -> Corpus:
    """Read and encode the corpus.

    Args:
        folder: holds `train.txt`, `valid.txt`, `test.txt`; or "synthetic" for a small generated corpus.

    Raises:
        UserError: missing, empty or unreadable files.
    """
    if str(folder) == "synthetic":
        texts, label = synthetic.texts(), "synthetic"
    else:
        texts = corpus.read_splits(Path(folder))
        label = "own corpus"
    sha256 = corpus.digest(texts)
    if sha256 == PTB_SHA256 and [len(text) for text in texts] == PTB_CHARACTERS:
        label = PTB_LABEL
    loaded = corpus.encode(map(corpus.words, texts), sha256=sha256, label=label)
    if label == PTB_LABEL:
        tokens = {split: getattr(loaded, split).numel() for split in PTB_TOKENS}
        assert tokens == PTB_TOKENS, f"the encoder is broken: {tokens} tokens instead of {PTB_TOKENS}"
        assert len(loaded.vocabulary) == PTB_VOCABULARY, f"the encoder is broken: {len(loaded.vocabulary)} words"
    return loaded
