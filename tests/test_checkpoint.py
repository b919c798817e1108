"""Files that are whole or not there, and reading them back."""

import contextlib
import hashlib
import io
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from trellisnet import serialization
from trellisnet.errors import UserError
from trellisnet.training import checkpoint


def content(**changes):
    return {
        **dict.fromkeys(checkpoint._KEYS),
        "model": {"w": torch.arange(3)},
        "rng": checkpoint.rng_state(),
        **changes,
    }


def test_round_trip_and_format(tmp_path):
    checkpoint.save(tmp_path / "last.pt", content(step=7))
    loaded = checkpoint.load(tmp_path / "last.pt")
    assert loaded["step"] == 7
    assert torch.load(tmp_path / "last.pt", weights_only=True)["format"] == checkpoint.FORMAT
    assert torch.equal(loaded["model"]["w"], torch.arange(3))


def test_random_numbers_go_on_where_they_were(tmp_path):
    checkpoint.save(tmp_path / "last.pt", content())
    draw = lambda: (torch.rand(5).tolist(), np.random.rand(5).tolist(), random.random(), random.gauss(0, 1))  # noqa: E731
    expected = draw()
    assert draw() != expected
    checkpoint.set_rng_state(checkpoint.load(tmp_path / "last.pt")["rng"])
    assert draw() == expected


def test_content_that_differs_from_its_sum_is_refused(tmp_path):
    checkpoint.save(tmp_path / "last.pt", content())
    file = torch.load(tmp_path / "last.pt", weights_only=True)
    for change in ({"sha256": "0" * 64}, {"sha256": None}, {"content": file["content"].flip(0)}, {"content": 7}):
        torch.save(file | change, tmp_path / "other.pt")
        with pytest.raises(UserError, match="damaged"):
            checkpoint.load(tmp_path / "other.pt")


def test_other_formats_are_refused(tmp_path):
    torch.save({"format": 99}, tmp_path / "later.pt")
    with pytest.raises(UserError, match="checkpoint format 99, this version reads format 1"):
        checkpoint.load(tmp_path / "later.pt")
    torch.save({"format": checkpoint.FORMAT, "model": {}}, tmp_path / "part.pt")
    with pytest.raises(UserError, match="or a damaged one"):
        checkpoint.load(tmp_path / "part.pt")
    for inner in ({"model": {}}, [1, 2]):
        buffer = io.BytesIO()
        torch.save(inner, buffer)
        data = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
        sums = hashlib.sha256(buffer.getvalue()).hexdigest()
        torch.save({"format": checkpoint.FORMAT, "sha256": sums, "content": data}, tmp_path / "inner.pt")
        with pytest.raises(UserError, match="or a damaged one"):
            checkpoint.load(tmp_path / "inner.pt")
    torch.save({"encoder.weight": torch.zeros(1)}, tmp_path / "weights.pkl")
    with pytest.raises(UserError, match="loaded with --load_weight"):
        checkpoint.load(tmp_path / "weights.pkl")


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_truncated_files_are_refused(tmp_path, keep):
    checkpoint.save(tmp_path / "last.pt", content())
    whole = (tmp_path / "last.pt").read_bytes()
    end = int(len(whole) * keep) if isinstance(keep, float) else keep
    (tmp_path / "last.pt").write_bytes(whole[:end])
    with pytest.raises(UserError, match=r"last.pt: not a checkpoint of a run"):
        checkpoint.load(tmp_path / "last.pt")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write():
        with serialization.atomic_write(path) as file:
            file.write(b"ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_files_get_ordinary_permissions(tmp_path):
    with serialization.atomic_write(tmp_path / "file") as file:
        file.write(b"x")
    (tmp_path / "plain").write_bytes(b"x")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
@pytest.mark.parametrize("legacy", [False, True])
def test_a_full_disk_is_an_oserror(legacy):
    with pytest.raises(OSError, match="No space left"):
        serialization.save("/dev/full", {"w": torch.zeros(10_000)}, legacy=legacy)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
@pytest.mark.parametrize("legacy", [False, True])
def test_a_full_disk_leaves_nothing_else_on_standard_error(legacy):
    code = f"""
import torch
from trellisnet import serialization
try:
    serialization.save("/dev/full", {{"w": torch.zeros(13_000_000)}}, legacy={legacy})
except OSError as e:
    print(e.strerror)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "No space left on device\n", "")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(5, "Input/output error"), ValueError("why")])
def test_what_is_raised_in_writing_gets_through_and_leaves_the_old_file(tmp_path, monkeypatch, legacy, error):
    """At every one of the writes that torch makes."""
    atomic_write = serialization.atomic_write
    writes, fails_at = 0, None

    class File:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            nonlocal writes
            writes += 1
            if writes == fails_at:
                raise error
            self.file.write(data)

    @contextlib.contextmanager
    def failing(path):
        with atomic_write(path) as file:
            yield File(file)

    monkeypatch.setattr(serialization, "atomic_write", failing)
    path = tmp_path / "file"
    serialization.save(path, {"w": torch.zeros(5)}, legacy=legacy)
    before = path.read_bytes()
    assert writes > 5
    for fails_at in range(1, writes + 1):
        writes = 0
        with pytest.raises(type(error)) as raised:
            serialization.save(path, {"w": torch.ones(5)}, legacy=legacy)
        assert raised.value is error
        assert os.listdir(tmp_path) == ["file"]
        assert path.read_bytes() == before
