"""Convert JPEG pictures in an .npz file to batches in CIFAR-10's binary format, labelled as JPEG.

    python scripts/cifar_from_jpeg.py pictures.npz data/cifar10-jpeg
    python cifar10/train.py --data data/cifar10-jpeg

For each of train and test, the .npz file holds NAME_jpeg (uint8: the files, one after the other), NAME_offsets (n + 1
integers: the start of each file, and the end of the last) and NAME_labels (n integers from 0 to 9). Needs Pillow.
"""

import functools
import io
import itertools
import signal
import struct
import sys
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main takes signals: no traceback from an import

import numpy as np

try:
    from PIL import Image
except ImportError:  # reported when it is needed
    Image = None

from cifar10.data import COLOURS, NAMES, RECORD, SIDE, SOURCE_NAME, TRAIN_NAMES
from trellisnet import serialization
from trellisnet.data.pixels import CLASSES
from trellisnet.errors import UserError, unwritable
from trellisnet.training.cli import guarded
from trellisnet.training.config import Parser
from trellisnet.training.runlog import pip_install

LABEL = "CIFAR-10 (JPEG)"
KEYS = [f"{split}_{key}" for split in ("train", "test") for key in ("jpeg", "offsets", "labels")]

# Exceptions of numpy on a corrupt file; MemoryError if it claims too large a size.
_DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, ValueError, KeyError, MemoryError)


def read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of the file.

    Raises:
        UserError: the file is missing or corrupt, or lacks one of the keys.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; name the .npz with the pictures")
    try:
        with path.open("rb") as file:
            content = np.load(file, allow_pickle=False)
            if not isinstance(content, np.lib.npyio.NpzFile):
                raise UserError(f"{path}: is a single array; expected an .npz with {', '.join(KEYS)}")
            if missing := [key for key in KEYS if key not in content]:
                raise UserError(f"{path}: does not hold {', '.join(missing)}; name another file")
            return {key: np.asarray(content[key]) for key in KEYS}  # members that are not arrays are read as bytes
    except UserError:
        raise
    except _DAMAGE as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0][:120]
        raise UserError(f"{path}: corrupt, or not an .npz file of plain arrays ({reason}); get it again") from e


def records(path: Path, arrays: dict[str, np.ndarray], split: str) -> np.ndarray:
    """Label and colour planes of every picture of a split, uint8 (n, 3073).

    Raises:
        UserError: the arrays do not fit together; a picture cannot be decoded or has another size.
    """
    jpeg, offsets, labels = (arrays[f"{split}_{key}"] for key in ("jpeg", "offsets", "labels"))
    integers = offsets.dtype.kind in "iu" and labels.dtype.kind in "iu"
    if (jpeg.dtype, jpeg.ndim, offsets.ndim, labels.ndim) != (np.uint8, 1, 1, 1) or not integers:
        raise UserError(
            f"{path}: {split}_jpeg must be 1-D uint8, {split}_offsets and {split}_labels 1-D integers, not "
            f"{jpeg.ndim}-D {jpeg.dtype}, {offsets.ndim}-D {offsets.dtype} and {labels.ndim}-D {labels.dtype}"
        )
    if not len(labels) or len(offsets) != len(labels) + 1:
        raise UserError(f"{path}: {len(offsets)} {split}_offsets for {len(labels)} {split}_labels; expected one more")
    if offsets[0] != 0 or offsets[-1] != len(jpeg) or (offsets[1:] <= offsets[:-1]).any():
        raise UserError(f"{path}: {split}_offsets must rise from 0 to {len(jpeg)}, the length of {split}_jpeg")
    if labels.min() < 0 or labels.max() >= CLASSES:
        raise UserError(f"{path}: {split}_labels are {labels.min()} to {labels.max()}, expected 0 to {CLASSES - 1}")
    found = np.empty((len(labels), RECORD), np.uint8)
    found[:, 0] = labels
    for number, (start, end) in enumerate(itertools.pairwise(offsets)):
        try:
            found[number, 1:] = decode(jpeg[start:end].tobytes())
        except UserError as e:
            raise UserError(f"{path}: picture {number} of {split} {e}") from e
    return found


def decode(jpeg: bytes) -> np.ndarray:
    """Colour planes of a picture, one after the other, uint8 (3072,).

    Raises:
        UserError: not a JPEG file, a corrupt one, or a picture of another size.
    """
    try:
        with (
            warnings.catch_warnings(action="ignore"),  # about pictures that are refused for their size
            Image.open(io.BytesIO(jpeg), formats=["JPEG"]) as picture,
        ):
            if picture.size != (SIDE, SIDE):
                raise UserError(f"has {picture.width} × {picture.height} pixels, expected {SIDE} × {SIDE}")
            pixels = np.asarray(picture.convert("RGB"))
    except UserError:
        raise
    except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError) as e:
        raise UserError("cannot be decoded; expected a JPEG file") from e
    return pixels.reshape(SIDE * SIDE, COLOURS).T.ravel()


def convert(source: Path, folder: Path) -> dict[str, np.ndarray]:
    """Write the batches and SOURCE.txt; return the batches by name.

    Raises:
        UserError: Pillow is missing; :func:`read` or :func:`records` refuses the file; the folder holds other batches
            or cannot be written.
        RunError: the disk is full.
    """
    if Image is None:
        raise UserError(f"Pillow, which decodes the pictures, is not installed: {pip_install('pillow')}")
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if (others := sorted(there.intersection(NAMES))) and SOURCE_NAME not in there:
        raise UserError(f"{folder}: holds other batches ({others[0]}); name another folder")
    if foreign := sorted(there - {SOURCE_NAME, *NAMES}):
        raise UserError(f"{folder}: holds {foreign[0]}, which is no batch; name another folder")
    arrays = read(source)
    train, test = (records(source, arrays, split) for split in ("train", "test"))
    if len(train) < len(TRAIN_NAMES):
        raise UserError(f"{source}: {len(train)} training pictures are too few for {len(TRAIN_NAMES)} batches")
    batches = dict(zip(NAMES, [*np.array_split(train, len(TRAIN_NAMES)), test], strict=True))
    try:
        with serialization.atomic_folder(folder) as new:  # so that batches of two sources are never mixed
            for name, content in {SOURCE_NAME: f"{LABEL}\n".encode(), **batches}.items():
                with (new / name).open("wb") as file:
                    file.write(content)
    except OSError as e:
        raise unwritable(f"{folder}: the batches cannot be written there", e) from e
    return batches


def run(argv: Sequence[str]) -> None:
    """Parse, convert, list."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help=".npz file with the pictures")
    parser.add_argument("folder", type=Path, help="folder for the batches, created if missing")
    args = parser.parse_args(argv)
    for name, batch in convert(args.source, args.folder).items():
        print(f"{args.folder / name}: {len(batch):,} pictures")


main = functools.partial(guarded, run)

if __name__ == "__main__":
    sys.exit(main())
