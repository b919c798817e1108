"""MNIST: four IDX files, plain or compressed, read as sequences of 784 grey pixels."""

import functools
import signal
import sys
import warnings
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C leaves no traceback; partial downloads are kept

import numpy as np

from trellisnet.data import download, pixels
from trellisnet.data.download import Source
from trellisnet.data.pixels import OWN, SYNTHETIC, Images, Split
from trellisnet.errors import UserError

LABEL = "MNIST"
MEAN, STD = (0.1307,), (0.3081,)  # of the training pixels, in [0, 1]

MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "http://yann.lecun.com/exdb/mnist/",
)
# Name, number of dimensions, md5 of the unpacked content, md5 and size of the published file.
_FILES = [
    ("train-images-idx3-ubyte", 3, "6bbc9ace898e44ae57da46a324031adb", "f68b3c2dcbeaaa9fbdd348bbdeb94873", 9_912_422),
    ("train-labels-idx1-ubyte", 1, "a25bea736e30d166cdddb491f175f624", "d53e105ee54ea40749a09fcbcd1e9432", 28_881),
    ("t10k-images-idx3-ubyte", 3, "2646ac647ad5339dbf082846283269ea", "9fb629c4189551a2d022fa330f9573f3", 1_648_877),
    ("t10k-labels-idx1-ubyte", 1, "27ae3e4e09519cfbb04c329615203637", "ec29112dd5afa0611ce80d1b7f02629c", 4_542),
]
DIMENSIONS = {name: dimensions for name, dimensions, *_ in _FILES}
MD5 = {name: md5 for name, _, md5, *_ in _FILES}
SOURCES = {
    name: Source(f"{name}.gz", tuple(f"{mirror}{name}.gz" for mirror in MIRRORS), md5, size)
    for name, _, _, md5, size in _FILES
}


def find(name: str, folder: Path) -> Path | None:
    """Find the file in `folder`, with or without `.gz`; None if it is missing."""
    paths = (folder / name, folder / f"{name}.gz")
    return next((path for path in paths if path.exists()), None)


def fetch(folder: str | Path) -> list[Path]:
    """Download the missing files of MNIST into `folder`, compressed as published.

    Returns:
        paths of the files that were missing.

    Raises:
        UserError: an existing file is not MNIST's, so nothing is downloaded; or as in
            :func:`trellisnet.data.download.fetch_all`.
        RunError: the disk is full.
    """
    folder = Path(folder)
    there = {name: path for name in MD5 if (path := find(name, folder))}
    if len(there) < len(MD5):
        for name, path in there.items():
            if pixels.idx_md5(pixels.read_idx(path, DIMENSIONS[name])) != MD5[name]:
                raise UserError(
                    f"{path}: not the file of MNIST, so the missing files beside it are not downloaded; add the files "
                    "that belong to it, or move it away"
                )
    return download.fetch_all([source for name, source in SOURCES.items() if name not in there], folder)


def load(folder: str | Path, download: bool = False, validation: bool = True) -> Images:
    """Read the images, with a warning if files are not those of MNIST.

    Args:
        folder: folder with the four files, each with or without `.gz`; or "synthetic" for small generated drawings.
        download: download missing files of MNIST, see :func:`fetch`.
        validation: hold out the last training images, see :func:`trellisnet.data.pixels.assemble`.

    Returns:
        sequences of one colour, (n, 784, 1); the length of other images is their number of pixels.

    Raises:
        UserError: files are missing or corrupt, do not belong together, or cannot be downloaded.
        RunError: the disk is full.
    """
    if str(folder) == SYNTHETIC:
        return pixels.assemble(*pixels.synthetic_strokes(colour=False), validation=validation, label=SYNTHETIC)
    folder = Path(folder)
    if download:
        fetch(folder)
    paths = _paths(folder)
    arrays = {name: pixels.read_idx(path, DIMENSIONS[name]) for name, path in paths.items()}
    (train, train_size), (test, test_size) = (
        _split(paths[images], arrays[images], paths[labels], arrays[labels])
        for images, labels in zip(list(MD5)[::2], list(MD5)[1::2], strict=True)
    )
    if train_size != test_size:
        raise UserError(
            f"{folder}: the training images are {train_size}, the test images {test_size}; put images of one size there"
        )
    others = [paths[name].name for name, array in arrays.items() if pixels.idx_md5(array) != MD5[name]]
    if others:
        which = "these are" if len(others) == len(MD5) else f"{', '.join(others)} {'is' if len(others) == 1 else 'are'}"
        warnings.warn(f"{folder}: {which} not of {LABEL}; continuing with images of your own", stacklevel=2)
    return pixels.assemble(train, test, validation=validation, label=OWN if others else LABEL)


def _paths(folder: Path) -> dict[str, Path]:
    """Return the path of every file, by name."""
    pixels.check_folder(folder)
    paths = {name: find(name, folder) for name in MD5}
    if missing := [name for name, path in paths.items() if path is None]:
        raise UserError(
            f"{folder}: {', '.join(missing)} (or with .gz) not found there; add the missing files or name another "
            "folder with --data"
        )
    return paths


def _split(images_at: Path, images: np.ndarray, labels_at: Path, labels: np.ndarray) -> tuple[Split, str]:
    """Return a split, and the size of its images in words."""
    if len(images) != len(labels):
        raise UserError(
            f"{labels_at}: holds {len(labels):,} labels for the {len(images):,} images of {images_at}; put files that "
            "belong together there"
        )
    count, height, width = images.shape
    return pixels.as_split(images.reshape(count, height * width, 1), labels, labels_at), f"{height} × {width}"


main = functools.partial(
    download.main,
    "pmnist.data",
    "Fetch MNIST (12 MB).",
    "data/mnist",
    [source.name for source in SOURCES.values()],
    fetch,
)

if __name__ == "__main__":
    sys.exit(main())
