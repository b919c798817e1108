"""Atomic files and checkpoints: writing, reading back, and refusing corrupt ones."""

import contextlib
import errno
import math
import os
import random
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from trellisnet import serialization
from trellisnet.errors import UserError
from trellisnet.training import checkpoint


def content(**changes):
    """Return the content of a small checkpoint."""
    plain = {
        "task": "word_ptb", "settings": {}, "command": "", "data": ["abc", 1, 2, 3, None], "average": None,
        "optimizer": {"state": {}, "param_groups": []}, "schedule": {"lr": 1.0, "history": [], "averaging": False},
        "epoch": 0, "batch": 0, "carry": None, "step": 0, "best": None, "seconds": 0.0, "running": {}, "skipped": 0,
        "rng_others": [],
    }  # fmt: skip
    return {**plain, "model": {"w": torch.arange(3)}, "rng": checkpoint.rng_state(), **changes}


def test_round_trip_and_format(tmp_path):
    checkpoint.save(tmp_path / "last.pt", content(step=7))
    loaded = checkpoint.load(tmp_path / "last.pt")
    assert loaded["step"] == 7
    assert torch.load(tmp_path / "last.pt", weights_only=True)["format"] == checkpoint.FORMAT
    assert torch.equal(loaded["model"]["w"], torch.arange(3))


def test_random_number_generators_resume(tmp_path):
    checkpoint.save(tmp_path / "last.pt", content())
    draw = lambda: (torch.rand(5).tolist(), np.random.rand(5).tolist(), random.random(), random.gauss(0, 1))  # noqa: E731
    expected = draw()
    assert draw() != expected
    checkpoint.set_rng_state(checkpoint.load(tmp_path / "last.pt")["rng"])
    assert draw() == expected


@pytest.mark.parametrize("there", [0, 1, 2])
def test_random_number_generators_resume_on_another_device(monkeypatch, there):
    found, states = [], {0: 5, 1: 6, 2: 7}
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: device)
    monkeypatch.setattr("torch.cuda.get_rng_state", lambda: states[device])
    monkeypatch.setattr("torch.cuda.set_rng_state", found.append)
    device = 1
    state, device = checkpoint.rng_state(), there
    assert state["cuda"] == [6]
    checkpoint.set_rng_state(state)
    checkpoint.set_rng_state(state | {"cuda": [3, 4]})  # of a file with the states of two devices
    checkpoint.set_rng_state(state | {"cuda": []})  # of a run on the CPU
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: False)
    checkpoint.set_rng_state(state)  # in a run on the CPU
    assert found == [6, [3, 4, 4][there]]


VALUES = {
    "float32": torch.arange(6.0).view(2, 3),
    "bfloat16": torch.randn(3, 5).bfloat16(),
    "bool": torch.tensor([True, False]),
    "complex": torch.randn(2, dtype=torch.complex64),
    "number": torch.tensor(7),
    "empty": torch.empty(0, 3),
    "transposed": torch.randn(4, 3).t(),
    "strided": torch.arange(12)[1::3],
    "nested": [1, (2.5, None, [True, "a\nb'ü\ud800"]), {"x": {3: -0.0, 4: math.inf}}, [], (), {}],
}


def test_any_content_survives_a_round_trip_with_the_same_digest(tmp_path):
    tensors = {name: value for name, value in VALUES.items() if isinstance(value, torch.Tensor)}
    whole = content(model=OrderedDict(tensors), settings=VALUES)
    checkpoint.save(tmp_path / "last.pt", whole)
    for mmap in (False, True):
        loaded = checkpoint.load(tmp_path / "last.pt", mmap=mmap)
        assert checkpoint.sha256_of(loaded) == checkpoint.sha256_of(whole)
        for name, value in VALUES.items():
            assert type(loaded["settings"][name]) is type(value)
            if isinstance(value, torch.Tensor):
                assert loaded["settings"][name].dtype == loaded["model"][name].dtype == value.dtype
                assert torch.equal(loaded["settings"][name], value)
                assert torch.equal(loaded["model"][name], value)
            else:
                assert loaded["settings"][name] == value


def test_every_change_changes_the_digest():
    digest = checkpoint.sha256_of
    kinds = [
        None, "None", 0, False, 0.0, -0.0, 5e-324, "", "0", [], (), {}, [[]], [0], (0,), [0, 0], [[0], 0], [0, [0]],
        {0: 0}, {0.0: 0}, {"0": 0}, {0: {}}, [{}, 0], {"a": 1, "b": 2}, {"b": 2, "a": 1}, ["a", "b"], ["ab"],
        torch.zeros(0), torch.zeros(0, 1), torch.zeros(1, 0), torch.zeros(()), torch.zeros(1), torch.zeros(2),
        torch.zeros(1, 1), torch.zeros(1, dtype=torch.int32), torch.zeros(2, dtype=torch.bfloat16),
        [torch.zeros(1), torch.zeros(1)],
    ]  # fmt: skip
    assert len({digest(kind) for kind in kinds}) == len(kinds)
    assert digest({"a": 1}) == digest(OrderedDict(a=1))
    assert digest(torch.ones(2, 3).t()) == digest(torch.ones(3, 2))
    for name, value in VALUES.items():
        if isinstance(value, torch.Tensor) and value.is_contiguous():
            before, numbers = digest(value), value.clone().view(-1).view(torch.uint8)
            for i in range(numbers.numel()):
                numbers[i] ^= 1
                assert digest(numbers.view(value.dtype).view(value.shape)) != before, (name, i)
                numbers[i] ^= 1
            assert digest(numbers.view(value.dtype).view(value.shape)) == before
    with pytest.raises(TypeError, match="tensors and plain values, not <class 'set'>"):
        digest([{1}])


def test_content_that_differs_from_its_digest_is_refused(tmp_path):
    checkpoint.save(tmp_path / "last.pt", content())
    file = torch.load(tmp_path / "last.pt", weights_only=True)
    loop = []
    loop.append(loop)
    for change in (
        {"sha256": "0" * 64}, {"sha256": None}, {"content": 7}, {"content": content(step=8)}, {"content": {}},
        {"content": {"step": {1}}}, {"content": {"step": torch.eye(2).to_sparse()}}, {"content": {"step": loop}},
    ):  # fmt: skip
        torch.save(file | change, tmp_path / "other.pt")
        for mmap in (False, True):
            with pytest.raises(UserError, match="corrupt"):
                checkpoint.load(tmp_path / "other.pt", mmap=mmap)


def test_other_formats_are_refused(tmp_path):
    for version in (1, 99):
        torch.save({"format": version}, tmp_path / "other.pt")
        with pytest.raises(UserError, match=f"checkpoint format {version}, this version reads format 2"):
            checkpoint.load(tmp_path / "other.pt")
    torch.save({"format": checkpoint.FORMAT, "model": {}}, tmp_path / "part.pt")
    with pytest.raises(UserError, match="or corrupt"):
        checkpoint.load(tmp_path / "part.pt")
    for inner in ({"model": {}}, [1, 2]):
        sha256 = checkpoint.sha256_of(inner)
        torch.save({"format": 2, "sha256": sha256, "content": inner}, tmp_path / "inner.pt")
        with pytest.raises(UserError, match="or corrupt"):
            checkpoint.load(tmp_path / "inner.pt")
    torch.save({"encoder.weight": torch.zeros(1)}, tmp_path / "weights.pkl")
    with pytest.raises(UserError, match="loaded with --load_weight"):
        checkpoint.load(tmp_path / "weights.pkl")


def test_mapped_files_may_be_replaced_and_any_container_is_read(tmp_path):
    for legacy in (False, True):
        serialization.save(tmp_path / "file", {"w": torch.ones(5000)}, legacy=legacy)
        mapped = serialization.load(tmp_path / "file", "weights", mmap=True)
        serialization.save(tmp_path / "file", {"w": torch.zeros(5000)})
        assert torch.equal(mapped["w"], torch.ones(5000))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_found_anywhere(value):
    assert serialization.all_finite(torch.empty(0, 3))
    tensor = torch.zeros(3, serialization._PART // 2)
    assert serialization.all_finite(tensor)
    for i in (0, -1):
        corrupted = tensor.clone()
        corrupted[i, i] = value
        assert not serialization.all_finite(corrupted)


MEMORY = """
import sys
import torch
from test_checkpoint import content as new
from trellisnet.training import checkpoint

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

content = new()
checkpoint.save(sys.argv[1], content)
checkpoint.load(sys.argv[1])
before = peak()
content["model"] = {str(i): torch.ones(10_000_000) for i in range(4)}
print(peak() - before)
checkpoint.save(sys.argv[1], content)
print(peak() - before)
content = None
content = checkpoint.load(sys.argv[1])
print(peak() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs the kernel's count of memory")
@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="torch 2.6 reads a tensor by way of a second one")
def test_writing_and_reading_need_no_second_copy(tmp_path):
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "file")]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    tensors, saved, loaded = map(int, done.stdout.split())
    assert 150_000 < tensors <= saved <= loaded < tensors + 40_000


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
def test_a_full_disk_leaves_nothing_else_on_standard_error():
    code = """
import torch
from trellisnet import serialization
for legacy in (False, True):
    try:
        serialization.save("/dev/full", {"w": torch.zeros(13_000_000)}, legacy=legacy)
    except OSError as e:
        print(e.strerror)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "No space left on device\n" * 2, "")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(5, "Input/output error"), ValueError("why")])
def test_an_exception_while_writing_propagates_and_leaves_the_old_file(tmp_path, monkeypatch, legacy, error):
    """At each of torch's writes."""
    atomic_write = serialization.atomic_write

    class File:
        writes, fails_at = 0, None

        def __init__(self, file):
            self.file = file

        def write(self, data):
            File.writes += 1
            if File.writes == File.fails_at:
                raise error
            self.file.write(data)

    @contextlib.contextmanager
    def failing(path):
        with atomic_write(path) as file:
            yield File(file)

    monkeypatch.setattr(serialization, "atomic_write", failing)
    path = tmp_path / "file"
    serialization.save(path, {"w": torch.zeros(5)}, legacy=legacy)
    before, writes = path.read_bytes(), File.writes
    assert writes > 5
    for at in range(1, writes + 1):
        File.writes, File.fails_at = 0, at
        with pytest.raises(type(error)) as raised:
            serialization.save(path, {"w": torch.ones(5)}, legacy=legacy)
        assert raised.value is error
        assert os.listdir(tmp_path) == ["file"]
        assert path.read_bytes() == before


def test_the_previous_file_is_kept(tmp_path):
    path, previous = tmp_path / "last.pt", tmp_path / "last.previous.pt"
    for number in (1, 2, 3):
        serialization.keep(path, previous)
        serialization.save(path, number)
    assert (serialization.load(previous, "x"), serialization.load(path, "x")) == (2, 3)


@pytest.mark.parametrize("links", [True, False])
def test_the_target_of_a_link_is_kept(tmp_path, monkeypatch, links):
    def refuse(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    if not links:
        monkeypatch.setattr("trellisnet.serialization.os.link", refuse)
    path, previous, target = tmp_path / "last.pt", tmp_path / "last.previous.pt", tmp_path / "elsewhere"
    path.symlink_to(target)
    for number in (1, 2, 3):
        serialization.keep(path, previous)
        serialization.save(path, number)
    assert (path.resolve(), previous.is_symlink()) == (target.resolve(), False)
    assert (serialization.load(previous, "x"), serialization.load(path, "x")) == (2, 3)


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs the names of open files")
def test_a_renamed_file_is_synced_with_its_name(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")) or fsync(fd))
    serialization.save(tmp_path / "file", 1)
    assert len(synced) == 2
    assert synced[0].startswith(f"{tmp_path}/.file.")
    assert synced[1] == str(tmp_path)
    serialization.keep(tmp_path / "file", tmp_path / "other")
    assert synced[2:] == [str(tmp_path)]


def test_a_system_that_cannot_sync_is_tolerated(tmp_path, monkeypatch):
    def refuse(_):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    serialization.sync_folder(tmp_path)
    serialization.sync_folder(tmp_path / "nowhere")


def rng(**changes):
    return checkpoint.rng_state() | changes


numpy_state, python_state = rng()["numpy"], rng()["python"]
WRONG = {
    "task": [7, None], "settings": [None, [], {1: 2}], "command": [None, 7],
    "data": [None, [], ["abc", 1, 2, 3], [1, 2, 3, 4, None]],
    "model": [None, {"w": "x"}, {1: torch.ones(1)}], "average": [7, {"w": 1.0}],
    "optimizer": [None, {}, {"state": [], "param_groups": []}, {"state": {0: {"step": "x"}}, "param_groups": []}],
    "schedule": [
        None, {"lr": 1.0}, {"lr": "x", "history": [], "averaging": False},
        {"lr": math.inf, "history": [], "averaging": False}, {"lr": 1.0, "history": ["x"], "averaging": False},
        {"lr": 1.0, "history": [], "averaging": 7},
    ],
    "epoch": [math.inf, 1.0, -1, None, "1", True], "batch": [2**70, -1], "step": [2**70, math.nan], "skipped": [None],
    "carry": [7, [7], [torch.ones(2, dtype=torch.int64)], [torch.tensor([math.nan])]],
    "best": [7, {}, {"epoch": math.inf, "valid": None}, {"epoch": 1, "valid": 7}],
    "seconds": [math.nan, math.inf, None, "x"], "running": [None, {"loss": "x"}, {"loss": math.inf}],
    "rng": [
        None, torch.ones(3), {}, rng(torch="x"), rng(torch=torch.ones(3)), rng(torch=torch.ones(3).byte()), rng(cuda=7),
        rng(numpy=None), rng(numpy=["PCG64", *numpy_state[1:]]), rng(numpy=[numpy_state[0], torch.ones(3), 0, 0, 0.0]),
        rng(numpy=[*numpy_state[:2], 10**9, 0, 0.0]), rng(numpy=[*numpy_state[:3], "x", 0.0]), rng(python=7),
        rng(python=(3, (1, 2), None)), rng(python=(*python_state[:2], "x")),
        rng(python=(3, (*python_state[1][:-1], 2**70), None)),
    ],
    "rng_others": [None, 7, [None], [rng(), torch.ones(3)]],
}  # fmt: skip


@pytest.mark.parametrize("key", WRONG)
@pytest.mark.filterwarnings("error")
def test_values_of_wrong_type_or_range_are_named(tmp_path, key):
    for value in WRONG[key]:
        checkpoint.save(tmp_path / "last.pt", content(**{key: value}))
        with pytest.raises(UserError, match=rf"last.pt: a corrupt checkpoint \({key}: wrong type or value\)"):
            checkpoint.load(tmp_path / "last.pt")


def test_trying_random_states_draws_nothing(tmp_path):
    checkpoint.save(tmp_path / "last.pt", content())
    before = checkpoint.sha256_of(checkpoint.rng_state())
    checkpoint.load(tmp_path / "last.pt")
    assert checkpoint.sha256_of(checkpoint.rng_state()) == before
