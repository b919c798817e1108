"""enwik8 and text8, byte by byte: 10⁸ bytes of the English Wikipedia of March 2006, raw and reduced to lower-case
letters and spaces (Mahoney, http://mattmahoney.net/dc/textdata.html). The last five million bytes are the test text,
the five million before them the valid text, as in published results.
"""

import dataclasses
import functools
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C leaves no traceback; partial downloads are kept

from trellisnet.data import archive, corpus, download, encoder, synthetic
from trellisnet.data.corpus import SPLITS, Corpus, cache_folder
from trellisnet.data.download import Source
from trellisnet.data.spelling import BYTES
from trellisnet.errors import UserError

SIZE = 100_000_000
SYMBOLS = (90_000_000, 5_000_000, 5_000_000)
MIRRORS = (
    "https://mattmahoney.net/dc/{}.zip",
    "https://cs.fit.edu/~mmahoney/compression/{}.zip",
    "https://data.deepai.org/{}.zip",
)


class Dataset(NamedTuple):
    """A published file.

    Args:
        archive: the zip that holds it.
        sha256: of the file.
        alphabet: number of its byte values.
    """

    archive: Source
    sha256: str
    alphabet: int


def _dataset(name: str, sha256_of_archive: str, size: int, sha256: str, alphabet: int) -> Dataset:
    urls = tuple(url.format(name) for url in MIRRORS)
    return Dataset(Source(f"{name}.zip", urls, sha256_of_archive, size), sha256, alphabet)


DATASETS = {
    "enwik8": _dataset(
        "enwik8", "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc", 36_445_475,
        "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8", 205,
    ),
    "text8": _dataset(
        "text8", "a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232", 31_344_016,
        "6e890197040d37d85beb962ae1f041ff1d9a9ca8d20c7d99c85027eebf51dca7", 27,
    ),
}  # fmt: skip


def fetch(name: str, folder: str | Path) -> list[Path]:
    """Download the archive of a dataset into `folder` unless it is there, and extract the file if it is missing.

    Returns:
        path of the file if it was missing.

    Raises:
        UserError, RunError: as in `trellisnet.data.download.fetch_all` and `trellisnet.data.archive.extract`.
    """
    folder = Path(folder)
    if (folder / name).exists():
        return []
    path = download.fetch(DATASETS[name].archive, folder)
    return archive.extract(path, {name: name}, folder, max_size=SIZE)


def load(name: str, data: str | Path, download: bool = False) -> Corpus:
    """Read a dataset as int32 streams mapped from a file, its byte values numbered by first appearance.

    Args:
        name: a key of `DATASETS`.
        data: folder with the file of this name; any other file, which is divided in the same way, 18 : 1 : 1; or
            "synthetic" for a small generated text.
        download: download the dataset if the folder lacks it.

    Raises:
        UserError: the file is missing, unreadable or too short, or cannot be downloaded.
        RunError: the disk is full.
    """
    if str(data) == "synthetic":
        texts = synthetic.texts()
        return corpus.encode(map(BYTES.tokens, texts), sha256=corpus.digest(texts), label="synthetic")
    path = Path(data)
    if not path.is_file():
        if download:
            fetch(name, path)
        path /= name
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; put {name} there, name its folder or any file with --data, or try --data synthetic"
        )
    loaded = encoder.encode_bytes(path, cache_folder(), label="own corpus")
    if loaded.sha256 == DATASETS[name].sha256:
        loaded.check(SYMBOLS, DATASETS[name].alphabet)
        return loaded.renamed(name)
    sizes = ", ".join(f"{getattr(loaded, split).numel():,} for {split}" for split in SPLITS)
    return dataclasses.replace(loaded, notices=(f"{path}: not the published {name}; split by bytes, {sizes}",))


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m trellisnet.data.wikipedia NAME [FOLDER]`, which downloads a dataset; return the exit code."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["no name"]
    if name not in DATASETS:
        print(f"error: {name}: expected {' or '.join(DATASETS)}, optionally followed by a folder", file=sys.stderr)
        return 2
    size = DATASETS[name].archive.size / 1e6
    program = f"trellisnet.data.wikipedia {name}", f"Fetch {name} ({size:.0f} MB).", f"data/{name}", [name]
    return download.main(*program, functools.partial(fetch, name), rest)


if __name__ == "__main__":
    sys.exit(main())
