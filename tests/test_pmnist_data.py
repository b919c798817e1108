"""Files of pmnist: compressed or not, MNIST or other images, downloads and errors."""

import gzip
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from pmnist import data
from trellisnet.data import download, pixels
from trellisnet.errors import UserError
from trellisnet.training.config import PROJECT

NAMES = list(data.MD5)
TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = NAMES
REAL = PROJECT / "data" / "mnist"


def idx(array):
    return pixels.idx_header(array) + array.tobytes()


def contents(train=30, test=10, side=(28, 28)):
    """Return arrays like those of MNIST, with fewer images."""
    draw = np.random.default_rng(train).integers
    return {
        TRAIN_IMAGES: draw(0, 256, (train, *side), np.uint8),
        TRAIN_LABELS: draw(0, 10, train, np.uint8),
        TEST_IMAGES: draw(0, 256, (test, *side), np.uint8),
        TEST_LABELS: draw(0, 10, test, np.uint8),
    }


@pytest.fixture
def arrays(monkeypatch):
    """Write a small data set that passes for MNIST."""
    arrays = contents()
    monkeypatch.setattr(data, "MD5", {name: pixels.idx_md5(array) for name, array in arrays.items()})
    return arrays


@pytest.fixture
def folder(tmp_path, arrays):
    for name, array in arrays.items():
        (tmp_path / name).write_bytes(idx(array))
    return tmp_path


@pytest.fixture
def fetched(arrays, monkeypatch):
    """Serve the compressed files, and return the names of those that were downloaded."""
    asked = []

    def fetch_all(sources, folder):
        folder.mkdir(parents=True, exist_ok=True)
        for source in sources:
            asked.append(source.name)
            (folder / source.name).write_bytes(gzip.compress(idx(arrays[source.name.removesuffix(".gz")])))
        return [folder / source.name for source in sources]

    monkeypatch.setattr(download, "fetch_all", fetch_all)
    return asked


def refusal(folder, **options):
    """Return the message of the error, which must be one printable line."""
    with pytest.raises(UserError) as caught:
        data.load(folder, **options)
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_images_become_sequences(folder, arrays):
    images = data.load(folder)
    assert (images.label, images.n_classes) == ("MNIST", 10)
    assert [split.pixels.shape for split in (images.train, images.valid, images.test)] == [
        (27, 784, 1),
        (3, 784, 1),
        (10, 784, 1),
    ]
    assert images.train.pixels.dtype == torch.uint8
    assert images.train.labels.dtype == torch.int64
    assert images.train.pixels[5, 28 * 3 + 7, 0] == arrays[TRAIN_IMAGES][5, 3, 7]  # row by row
    assert images.valid.labels.tolist() == arrays[TRAIN_LABELS][-3:].tolist()
    assert images.test.labels.tolist() == arrays[TEST_LABELS].tolist()
    whole = data.load(folder, validation=False)
    assert whole.valid is None
    assert len(whole.train.labels) == 30
    assert whole.sha256 == images.sha256


def test_compression_does_not_matter(folder, arrays):
    plain = data.load(folder).sha256
    for name, level in zip(NAMES, (1, 6, 9, 0), strict=True):
        (folder / name).unlink()
        (folder / f"{name}.gz").write_bytes(gzip.compress(idx(arrays[name]), level))
    packed = data.load(folder)
    assert (packed.label, packed.sha256) == ("MNIST", plain)


def test_other_images_are_labelled_as_such(folder):
    other = contents(train=40)
    (folder / TRAIN_IMAGES).write_bytes(idx(other[TRAIN_IMAGES][:30]))
    with warnings.catch_warnings(record=True, action="always") as caught:
        assert data.load(folder).label == "own images"
    (warning,) = caught
    assert str(warning.message) == f"{folder}: {TRAIN_IMAGES} is not of MNIST; continuing with images of your own"
    assert Path(warning.filename).name == Path(__file__).name  # it points at the caller
    for name, array in contents(train=40, side=(5, 7)).items():
        (folder / name).write_bytes(idx(array))
    with pytest.warns(UserWarning, match="these are not of MNIST; continuing with images of your own"):
        images = data.load(folder)
    assert images.train.pixels.shape == (36, 35, 1)
    assert images.label == "own images"


def test_synthetic_images():
    images = data.load("synthetic", download=True)
    assert images.label == "synthetic"
    assert [len(split.labels) for split in (images.train, images.valid, images.test)] == [2700, 300, 500]
    assert images.train.pixels.shape[1:] == (784, 1)
    assert data.load("synthetic", validation=False).valid is None


def test_files_that_do_not_belong_together_are_refused(folder, arrays):
    (folder / TRAIN_LABELS).write_bytes(idx(arrays[TRAIN_LABELS][:29]))
    assert refusal(folder) == (
        f"{folder}/{TRAIN_LABELS}: holds 29 labels for the 30 images of {folder}/{TRAIN_IMAGES}; put files that belong "
        "together there"
    )
    wrong = arrays[TRAIN_LABELS].copy()
    wrong[3] = 10
    (folder / TRAIN_LABELS).write_bytes(idx(wrong))
    assert f"{TRAIN_LABELS}: holds the label 10, expected 0 to 9" in refusal(folder)
    (folder / TRAIN_LABELS).write_bytes(idx(arrays[TRAIN_LABELS]))
    (folder / TEST_IMAGES).write_bytes(idx(contents(side=(28, 27))[TEST_IMAGES]))
    assert "the training images are 28 × 28, the test images 28 × 27; put images of one size" in refusal(folder)
    (folder / TEST_IMAGES).write_bytes(idx(arrays[TEST_LABELS]))
    assert f"{TEST_IMAGES}: is not an IDX file of unsigned bytes in 3 dimension(s)" in refusal(folder)


def test_missing_files_are_named(folder):
    (folder / TRAIN_LABELS).unlink()
    (folder / TEST_IMAGES).unlink()
    assert refusal(folder).startswith(f"{folder}: {TRAIN_LABELS}, {TEST_IMAGES} (or with .gz) not found there; add ")
    assert refusal(folder / "no").startswith(f"{folder}/no: no such folder; name the folder of the images with --data")


def test_only_missing_files_are_downloaded(folder, arrays, fetched):
    assert data.load(folder, download=True).label == "MNIST"
    assert fetched == []
    (folder / TRAIN_IMAGES).unlink()
    (folder / TEST_LABELS).rename(folder / f"{TEST_LABELS}.gz")  # not compressed, despite its name
    with pytest.raises(UserError, match="not found there"):
        data.load(folder)
    assert data.load(folder, download=True).label == "MNIST"
    assert fetched == [f"{TRAIN_IMAGES}.gz"]
    assert data.load(folder / "new", download=True).label == "MNIST"
    assert fetched[1:] == [f"{name}.gz" for name in NAMES]


def test_other_images_are_not_completed_with_mnist(folder, fetched):
    (folder / TRAIN_IMAGES).write_bytes(idx(contents(train=40)[TRAIN_IMAGES]))
    (folder / TEST_LABELS).unlink()
    message = refusal(folder, download=True)
    assert message.startswith(f"{folder}/{TRAIN_IMAGES}: not the file of MNIST, so the missing files beside it")
    (folder / TRAIN_IMAGES).write_bytes(b"broken")
    assert "is not an IDX file" in refusal(folder, download=True)
    assert fetched == []


def test_the_command_reports_what_it_did(folder, fetched, capsys, monkeypatch):
    (folder / TRAIN_IMAGES).unlink()
    assert data.main([str(folder)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"{folder}/{TRAIN_IMAGES}.gz: fetched"
    assert [line.rsplit(": ")[1] for line in out[1:]] == ["already there"] * 3

    def wrong(sources, _folder):
        raise UserError(f"{sources[0].name} could not be fetched: md5 0 instead of 1; try again")

    monkeypatch.setattr(download, "fetch_all", wrong)
    (folder / f"{TRAIN_IMAGES}.gz").unlink()
    assert data.main([str(folder)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == f"error: {TRAIN_IMAGES}.gz could not be fetched: md5 0 instead of 1; try again\n"


def test_mnist_has_three_mirrors():
    assert [source.size for source in data.SOURCES.values()] == [9_912_422, 28_881, 1_648_877, 4_542]
    assert data.SOURCES[TEST_LABELS].urls == (
        "https://ossci-datasets.s3.amazonaws.com/mnist/t10k-labels-idx1-ubyte.gz",
        "https://storage.googleapis.com/cvdf-datasets/mnist/t10k-labels-idx1-ubyte.gz",
        "http://yann.lecun.com/exdb/mnist/t10k-labels-idx1-ubyte.gz",
    )


@pytest.mark.skipif(any(data.find(name, REAL) is None for name in NAMES), reason="needs data/mnist")
def test_mnist_has_its_published_counts():
    images = data.load(REAL)
    assert images.label == "MNIST"
    assert [len(split.labels) for split in (images.train, images.valid, images.test)] == [55_000, 5_000, 10_000]
    assert images.train.labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert images.test.labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert images.train.pixels.shape == (55_000, 784, 1)
    parts = data.load(REAL, validation=False).train.pixels.split(10_000)
    moments = [(x.mean(), x.square().mean()) for x in (pixels.normalise(part, data.MEAN, data.STD) for part in parts)]
    assert torch.tensor(moments).mean(0).tolist() == pytest.approx([0, 1], abs=1e-3)
