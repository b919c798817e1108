"""Images as sequences: valid and invalid IDX files, splits, normalisation, permutation, synthetic drawings."""

import errno
import gzip
import hashlib
import os
import tracemalloc

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from trellisnet.data import pixels
from trellisnet.data.pixels import (
    Split,
    assemble,
    normalise,
    permutation,
    read_idx,
    split_validation,
    synthetic_strokes,
)
from trellisnet.errors import UserError

ARRAY = (np.arange(3 * 5 * 7) % 251).astype(np.uint8).reshape(3, 5, 7)
IDX = bytes([0, 0, 8, 3, 0, 0, 0, 3, 0, 0, 0, 5, 0, 0, 0, 7]) + ARRAY.tobytes()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "images"


def refusal(path, content=None, dimensions=3):
    """Return the message, one printable line that begins with the file."""
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_idx(path, dimensions)
    assert str(caught.value).isprintable()
    return str(caught.value).removeprefix(f"{path}: ")


# -- IDX files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("name", ["images", "images.gz"])
def test_gzip_is_recognised_by_content(tmp_path, pack, name):
    (tmp_path / name).write_bytes(pack(IDX))
    result = read_idx(tmp_path / name, 3)
    assert result.dtype == np.uint8
    assert (result == ARRAY).all()
    assert pixels.idx_header(result) == IDX[:16]
    assert pixels.idx_md5(result) == hashlib.md5(IDX).hexdigest()
    torch.from_numpy(result)  # writable, or this warns


def test_many_blocks_and_members(path):
    array = np.random.default_rng(0).integers(0, 256, (4, 300, 200), np.uint8)
    content = pixels.idx_header(array) + array.tobytes()
    path.write_bytes(gzip.compress(content[:1000]) + gzip.compress(content[1000:]))
    assert (read_idx(path, 3) == array).all()


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_other_files_are_refused(path, pack):
    for content, magic in ((b"", "nothing"), (b"\0\0", "0000"), (b"hello", "68656c6c"), (b"\0\0\x0d\3", "00000d03")):
        message = refusal(path, pack(content))
        assert message == (
            f"is not an IDX file of unsigned bytes in 3 dimension(s): it begins with {magic} instead of 00000803; "
            "put the right file there"
        )
    assert "in 1 dimension(s): it begins with 00000803 instead of 00000801" in refusal(path, pack(IDX), dimensions=1)
    assert refusal(path, pack(IDX[:15])) == "ends within its header; get it again"
    assert refusal(path, pack(IDX[:-1])) == "holds fewer bytes than the 105 that its header claims; get it again"
    assert refusal(path, pack(IDX + b"x")) == "holds more bytes than the 105 that its header claims; get it again"


def test_corrupt_gzip_is_refused(path):
    packed = gzip.compress(IDX)
    assert refusal(path, packed[:-9]).startswith("corrupt gzip file (Compressed file ended before")
    assert refusal(path, packed[:-8] + b"\0" * 8).startswith("corrupt gzip file (CRC check failed")
    assert refusal(path, packed[:10] + b"\xff" * 20).startswith("corrupt gzip file (")
    assert refusal(path, packed + b"garbage").startswith("corrupt gzip file (Not a gzipped file")
    assert refusal(path, b"\x1f\x8b").startswith("corrupt gzip file (")


def test_unreadable_files_are_named(path, monkeypatch):
    assert refusal(path) == "cannot be read (No such file or directory); put it there or name another folder"
    path.mkdir()
    assert refusal(path).startswith("cannot be read (Is a directory)")

    def failing(*_args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    path.rmdir()
    path.write_bytes(gzip.compress(IDX))
    monkeypatch.setattr(gzip.GzipFile, "read", failing)
    assert refusal(path).startswith("cannot be read (Input/output error)")


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_absurd_claims_cost_no_memory(path, pack):
    most = b"\xff" * 12
    assert refusal(path, pack(IDX[:4] + most)).startswith("claims 4294967295 × 4294967295 × 4294967295 bytes, expected")
    assert "claims 0 × 5 × 7 bytes, expected 1 to " in refusal(path, pack(IDX[:7] + b"\0" + IDX[8:16]))
    below = np.array([1, 1, pixels._MAX_SIZE], ">u4").tobytes()
    for content, message in (
        (IDX[:4] + below + bytes(100), "holds fewer bytes than the 1,073,741,824 "),
        (IDX + bytes(20_000_000), "holds more bytes than the 105 "),
    ):
        path.write_bytes(pack(content))
        tracemalloc.start()
        assert refusal(path).startswith(message)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 2_000_000


# -- splits, normalisation, permutation --------------------------------------------------------------------------------


def numbered(n, test=2):
    return tuple(Split(torch.arange(k, dtype=torch.uint8).view(k, 1, 1), torch.arange(k) % 10) for k in (n, test))


def test_the_last_images_are_held_out():
    whole, _ = numbered(20)
    train, valid = split_validation(whole, 3)
    assert train.pixels.flatten().tolist() == list(range(17))
    assert valid.pixels.flatten().tolist() == [17, 18, 19]
    assert valid.labels.tolist() == [7, 8, 9]
    same, none = split_validation(whole, 0)
    assert none is None
    assert torch.equal(same.pixels, whole.pixels)
    for n in (-1, 20, 21):
        with pytest.raises(ValueError, match=f"n: expected 0 to 19 of 20 images, got {n}"):
            split_validation(whole, n)


@pytest.mark.parametrize(("n", "held_out"), [(10, 1), (59, 5), (50_000, 5000), (60_000, 5000)])
def test_five_thousand_are_held_out_but_at_most_a_tenth(n, held_out):
    whole = Split(torch.zeros(n, 1, 1, dtype=torch.uint8), torch.zeros(n, dtype=torch.int64))
    images = assemble(whole, whole, validation=True, label="x")
    assert (len(images.train.labels), len(images.valid.labels), len(images.test.labels)) == (n - held_out, held_out, n)
    assert (images.n_classes, images.label) == (10, "x")


def test_too_few_images_to_hold_out_a_tenth():
    with pytest.raises(UserError, match="9 training images are too few to hold out a tenth for validation"):
        assemble(*numbered(9), validation=True, label="x")
    assert assemble(*numbered(9), validation=False, label="x").valid is None


def test_the_digest_depends_on_the_content_alone():
    def digest(train, test, validation=True):
        return assemble(train, test, validation=validation, label="x").sha256

    train, test = numbered(20)
    whole = digest(train, test)
    assert digest(train, test, validation=False) == whole
    assert digest(train, Split(test.pixels, test.labels + 1)) != whole
    assert digest(train, Split(test.pixels + 1, test.labels)) != whole
    assert digest(Split(train.pixels.view(10, 2, 1), train.labels[:10]), test) != whole


def test_normalisation():
    x = torch.tensor([[[0], [51], [255]]], dtype=torch.uint8)
    result = normalise(x, (0.1307,), (0.3081,))
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, (x.double() / 255 - 0.1307).div(0.3081).float())
    assert x.flatten().tolist() == [0, 51, 255]
    result = normalise(torch.tensor([[[0, 255, 255]]], dtype=torch.uint8), (0.5, 0.5, 0.0), (0.5, 0.5, 2.0))
    assert result.tolist() == [[[-1.0, 1.0, 0.5]]]


def test_the_permutation_is_fixed_by_its_seed():
    state = torch.get_rng_state()
    result = permutation(784, 1111)
    assert torch.equal(state, torch.get_rng_state())
    assert result.dtype == torch.int64
    assert sorted(result.tolist()) == list(range(784))
    assert result[:8].tolist() == [604, 221, 359, 165, 644, 643, 204, 540]  # scores depend on it
    torch.manual_seed(5)
    assert torch.equal(permutation(784, 1111), result)
    assert not torch.equal(permutation(784, 1112), result)


# -- drawings ----------------------------------------------------------------------------------------------------------

SHA256 = {
    False: "f75ba6ea56f1670112f855a53f1f9eb9ded26d247a3a7ed0aef5b0be9a23162c",
    True: "21778a82b35f96283a6148d72617cb5c481833560cace07e956a3c787ab3bef8",
}


@pytest.mark.parametrize("colour", [False, True], ids=["grey", "colour"])
def test_the_drawings_are_the_same_everywhere(colour):
    state = np.random.get_state()[1].copy()
    train, test = synthetic_strokes(colour=colour)
    assert (np.random.get_state()[1] == state).all()
    assert assemble(train, test, validation=True, label="").sha256 == SHA256[colour]
    shape = (1024, 3) if colour else (784, 1)
    assert (train.pixels.shape, test.pixels.shape) == ((3000, *shape), (500, *shape))
    assert (train.pixels.dtype, train.labels.dtype) == (torch.uint8, torch.int64)
    assert train.labels.bincount().min() > 250
    other, _ = synthetic_strokes(colour=colour, seed=1)
    assert not torch.equal(other.pixels, train.pixels)


def test_the_classes_of_drawings_are_distinguishable():
    train, test = synthetic_strokes(colour=True)
    x, x_test = (normalise(split.pixels, (0.5,) * 3, (0.5,) * 3).flatten(1) for split in (train, test))
    weight = torch.zeros(10, x.shape[1], requires_grad=True)
    for _ in range(30):
        (gradient,) = torch.autograd.grad(F.cross_entropy(x @ weight.T, train.labels), weight)
        weight = (weight - 1e-3 * gradient).detach().requires_grad_()
    right = (x_test @ weight.T).argmax(1) == test.labels
    assert right.float().mean() > 0.5
