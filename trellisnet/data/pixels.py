"""Images as sequences of pixels: IDX files, splits, normalisation, a fixed permutation, and synthetic drawings.

Letters: n images, L pixels (row by row), C colours.
"""

import contextlib
import gzip
import hashlib
import itertools
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trellisnet.errors import UserError
from trellisnet.serialization import open_regular

VALIDATION = 5000  # images held out, as in the paper; of small sets, a tenth
CLASSES = 10
SYNTHETIC = "synthetic"
OWN = "own images"

_BLOCK = 1 << 16  # bytes
_MAX_SIZE = 1 << 30  # bytes of an unpacked IDX file
_GZIP = b"\x1f\x8b"
_IDX_BYTES = b"\0\0\x08"  # magic number for unsigned bytes; the number of dimensions follows


class Split(NamedTuple):
    """Images with their classes: pixels (n, L, C) uint8, labels (n,) int64."""

    pixels: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Images:
    """A data set of images.

    Args:
        train, valid, test: the splits; valid is None if nothing is held out.
        n_classes: number of classes; labels are below it.
        sha256: digest of the content, the same for every validation split.
        label: name of the data set in logs and results.
    """

    train: Split
    valid: Split | None
    test: Split
    n_classes: int
    sha256: str
    label: str


def assemble(train: Split, test: Split, *, validation: bool, label: str) -> Images:
    """Make a data set with 10 classes; `validation` holds out 5,000 training images, but at most a tenth.

    Raises:
        UserError: fewer than ten training images, too few to hold out a tenth.
    """
    total = hashlib.sha256()
    for tensor in (*train, *test):
        total.update(f"{tuple(tensor.shape)}".encode())
        total.update(tensor.contiguous().numpy())
    held_out = min(VALIDATION, len(train.labels) // 10) if validation else 0
    if validation and not held_out:
        raise UserError(
            f"{len(train.labels)} training images are too few to hold out a tenth for validation; add some, or hold "
            "none out"
        )
    train, valid = split_validation(train, held_out)
    return Images(train, valid, test, CLASSES, total.hexdigest(), label)


def split_validation(train: Split, n: int) -> tuple[Split, Split | None]:
    """Hold out the last `n` images, without copying; the second split is None for n = 0.

    Raises:
        ValueError: n is negative, or no image would be left.
    """
    rest = len(train.labels) - n
    if not 0 < rest <= len(train.labels):
        raise ValueError(f"n: expected 0 to {len(train.labels) - 1} of {len(train.labels)} images, got {n}")
    return Split(*(t[:rest] for t in train)), Split(*(t[rest:] for t in train)) if n else None


def normalise(pixels: Tensor, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> Tensor:
    """Return (pixels / 255 - mean) / std, colour by colour.

    Args:
        pixels: (n, L, C) uint8.
        mean, std: C numbers on the scale from 0 to 1. Anything but float32 tensors on the device of `pixels` is copied
            there, which synchronises with a CUDA device.

    Returns:
        (n, L, C) float32, on the device of `pixels`.
    """
    mean, std = (torch.as_tensor(values, dtype=torch.float32, device=pixels.device) for values in (mean, std))
    return pixels.to(torch.float32).div_(255).sub_(mean).div_(std)


def permutation(length: int, seed: int) -> Tensor:
    """Return a permutation of 0 … length - 1, (length,) int64, fixed by the seed; the global RNG is not used."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed))


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read an IDX file of unsigned bytes, plain or compressed by gzip (recognised by content, not by name).

    Args:
        path: the file.
        dimensions: expected number of dimensions: 1 for labels, 3 for grey images.

    Returns:
        uint8, with the sizes in its header.

    Raises:
        UserError: missing or unreadable, not an IDX file, corrupt, empty, or longer or shorter than its header says.
    """
    with _unpacked(path) as file:
        magic = file.read(4)
        if magic != _IDX_BYTES + bytes([dimensions]):
            raise UserError(
                f"{path}: is not an IDX file of unsigned bytes in {dimensions} dimension(s): it begins with "
                f"{magic.hex() or 'nothing'} instead of {_IDX_BYTES.hex()}{dimensions:02x}; put the right file there"
            )
        header = file.read(4 * dimensions)
        if len(header) < 4 * dimensions:
            raise UserError(f"{path}: ends within its header; get it again")
        sizes = np.frombuffer(header, ">u4").tolist()
        size = math.prod(sizes)
        if not 0 < size <= _MAX_SIZE:
            claim = " × ".join(map(str, sizes))
            raise UserError(f"{path}: claims {claim} bytes, expected 1 to {_MAX_SIZE:,}; put the right file there")
        content = bytearray()
        while len(content) <= size and (block := file.read(min(_BLOCK, size + 1 - len(content)))):
            content += block
    if len(content) != size:
        relation = "more" if len(content) > size else "fewer"
        raise UserError(f"{path}: holds {relation} bytes than the {size:,} that its header claims; get it again")
    return np.frombuffer(content, np.uint8).reshape(sizes)


@contextlib.contextmanager
def _unpacked(path: Path) -> Iterator[BinaryIO]:
    try:
        with open_regular(path) as file:
            packed = file.read(2) == _GZIP
            file.seek(0)
            with gzip.GzipFile(fileobj=file) if packed else contextlib.nullcontext(file) as unpacked:
                yield unpacked
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise UserError(f"{path}: corrupt gzip file ({e}); get it again") from e
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); put it there or name another folder") from e


def idx_header(array: np.ndarray) -> bytes:
    """Return the header of an IDX file of these unsigned bytes."""
    return _IDX_BYTES + bytes([array.ndim]) + np.array(array.shape, ">u4").tobytes()


def idx_md5(array: np.ndarray) -> str:
    """Return the md5 of the unpacked IDX file of this array; the array determines all its bytes."""
    total = hashlib.md5(idx_header(array), usedforsecurity=False)
    total.update(array)
    return total.hexdigest()


def as_split(pixels: np.ndarray, labels: np.ndarray, labels_at: Path) -> Split:
    """Make a split from pixels (n, L, C) and labels (n,), both uint8, after checking the labels.

    Raises:
        UserError: the file `labels_at` holds a label above 9.
    """
    if labels.max() >= CLASSES:
        raise UserError(f"{labels_at}: holds the label {labels.max()}, expected 0 to {CLASSES - 1}; get it again")
    return Split(torch.from_numpy(pixels), torch.from_numpy(labels.astype(np.int64)))


def check_folder(folder: Path) -> None:
    """Raise UserError unless `folder` is a folder."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name the folder of the images with --data, or try --data synthetic")


# -- drawings ----------------------------------------------------------------------------------------------------------

TRAIN_IMAGES, TEST_IMAGES = 3000, 500
SEED = 2019

_D = 0.7071
_RING = [(1, 0), (_D, _D), (0, 1), (-_D, _D), (-1, 0), (-_D, -_D), (0, -1), (_D, -_D), (1, 0)]
# Polylines of each class: points (x, y), x to the right and y down, both from -1 to 1.
_SHAPES = [
    [_RING],
    [[(0, -1), (0, 1)]],
    [[(-1, 0), (1, 0)]],
    [[(-1, -1), (1, 1)]],
    [[(-1, 1), (1, -1)]],
    [[(0, -1), (0, 1)], [(-1, 0), (1, 0)]],
    [[(-1, -1), (1, 1)], [(-1, 1), (1, -1)]],
    [[(-1, -1), (1, -1), (1, 1), (-1, 1), (-1, -1)]],
    [_RING[:5]],
    [_RING[4:]],
]


def synthetic_strokes(*, colour: bool, seed: int = SEED) -> tuple[Split, Split]:
    """Draw small images of strokes, crosses, arcs and boxes: 28 × 28 in grey, or 32 × 32 in colour.

    Size, position, slant, thickness and brightness vary, and noise is added. The images are artificial, so scores on
    them are not comparable with any others.

    Returns:
        train and test split, determined by the seed on every machine.
    """
    side, colours = (32, 3) if colour else (28, 1)
    n = TRAIN_IMAGES + TEST_IMAGES
    # Numpy promises to keep only the raw output of generators stable. The rest is arithmetic and square roots, which
    # every machine rounds alike.
    draw = np.random.PCG64(seed).random_raw
    labels = (draw(n) % np.uint64(CLASSES)).astype(np.int64)
    x, y, size, slant, thickness, *tones = (draw(n * (5 + 2 * colours)) >> np.uint64(11)).reshape(-1, n) / 2.0**53
    ink = 0.7 + 0.3 * np.stack(tones[:colours], -1)[:, None]
    paper = (0.4 if colour else 0.0) * np.stack(tones[colours:], -1)[:, None]
    noise = draw(n * side * side * colours // 8).astype("<u8").view(np.uint8).reshape(n, side * side, colours)
    pixels = np.empty_like(noise)
    for label, lines in enumerate(_SHAPES):
        members = labels == label
        x_, y_, size_, slant_, thickness_ = (v[members, None] for v in (x, y, size, slant, thickness))
        radius = side * (0.2 + 0.12 * size_)
        distance = _distance(side, lines, side * (0.4 + 0.2 * x_), side * (0.4 + 0.2 * y_), radius, 0.4 * slant_ - 0.2)
        coverage = np.clip(1.5 + thickness_ - distance, 0, 1)[..., None]
        tone = paper[members] + (ink[members] - paper[members]) * coverage
        pixels[members] = (224 * tone).astype(np.uint8) + (noise[members] >> 3)
    return split_validation(Split(torch.from_numpy(pixels), torch.from_numpy(labels)), TEST_IMAGES)


def _distance(side, lines, x, y, radius, slant):
    """Return the distance in pixels of every pixel (row by row) to the nearest line, (n, side²); parameters (n, 1)."""
    rows, columns = (axis.reshape(1, -1) for axis in np.indices((side, side)) + 0.5)
    nearest = np.inf
    for line in lines:
        corners = [(x + radius * (u + slant * v), y + radius * v) for u, v in line]
        for (x1, y1), (x2, y2) in itertools.pairwise(corners):
            dx, dy = x2 - x1, y2 - y1
            along = np.clip(((columns - x1) * dx + (rows - y1) * dy) / (dx * dx + dy * dy), 0, 1)
            across, down = columns - x1 - along * dx, rows - y1 - along * dy
            nearest = np.minimum(nearest, across * across + down * down)
    return np.sqrt(nearest)
