"""scripts/profile_step.py: times, kernels, launch shapes, and bad arguments in one line."""

from collections import Counter

import pytest
import torch

from scripts import profile_step
from scripts.workload import Variant, Work
from test_graphs import Player
from trellisnet.ops import fused

SMALL = ["--nhid", "8", "--nlevels", "6"]


@pytest.fixture(autouse=True)
def no_warm_up(monkeypatch):
    monkeypatch.setattr(profile_step, "WARM_UP", 0)


@pytest.fixture
def work():
    return Work("pmnist", True, torch.device("cpu"), SMALL)


def test_times_are_of_the_fused_operator_in_bfloat16(work, monkeypatch):
    asked = []
    monkeypatch.setattr(work, "run", lambda part, variant: asked.append((part, variant.name)))
    seconds = iter([3.0, 1.0, 2.5])
    monkeypatch.setattr(profile_step, "seconds", lambda function, device: function() or next(seconds))
    gates = work.chosen["bf16"].gates
    assert profile_step.times(work, 3) == f" 2500.00 ms (1000.00 to 3000.00), fused bf16, {gates} gates"
    assert set(asked) == {("step", "fused bf16")}
    assert len(asked) == 3 + 3


def test_kernels_are_listed_by_their_time(work):
    head, *lines = profile_step.kernels(work, 1).splitlines()
    total, launches = float(head.split()[0]), int(head.split()[3])
    listed = [float(line.split()[0]) for line in lines]
    assert listed == sorted(listed, reverse=True)
    assert 0 < sum(listed) <= total * 1.01 + 0.01 * len(lines)
    assert 0 < sum(int(line.split()[3]) for line in lines) <= launches
    assert any(line.endswith("_TrellisBackward") for line in lines)


def test_on_cuda_a_graph_is_timed(work, monkeypatch):
    counts = Counter()
    monkeypatch.setattr(Work, "recorder", lambda work: Player(list(work.model.parameters()), counts))
    graph = Variant("fused", "bf16", graph=True)
    monkeypatch.setattr(profile_step, "Variant", lambda *_, **__: graph)
    monkeypatch.setattr(profile_step, "WARM_UP", 3)
    assert "fused bf16 graph" in profile_step.times(work, 2)
    assert counts["recorded"] == 1
    assert counts["replayed"] == 3 + 2


def test_launch_shapes_are_put_back(monkeypatch):
    triton_gates = pytest.importorskip("trellisnet.ops.triton_gates")
    monkeypatch.setattr(fused, "reason_against", lambda *_: "")
    monkeypatch.setattr(triton_gates, "BLOCK", 512)
    monkeypatch.setattr(triton_gates, "WARPS", 4)
    with profile_step.launched_as(256, 2, torch.device("cpu")):
        assert (triton_gates.BLOCK, triton_gates.WARPS) == (256, 2)
    assert (triton_gates.BLOCK, triton_gates.WARPS) == (512, 4)


def test_a_step_that_does_not_fit_does_not_end_the_others(monkeypatch, capsys):
    def times(work, repeats):
        if work.name == "pmnist":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "1 ms"

    monkeypatch.setattr(profile_step, "times", times)
    argv = ["times", "--quick", "--device", "cpu", "--steps", "pmnist:default", "cifar10:default"]
    assert profile_step.main(argv) == 1
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["pmnist:default", "times", "out", "of", "memory"],
        ["cifar10:default", "times", "1", "ms"],
    ]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--repeats", "0"], "--repeats: expected at least 1, got 0"),
        (["trace"], "trace: expected times, kernels, sweep"),
        (["--device", "nowhere"], "--device nowhere: not usable here"),
        (
            ["--device", "cpu", "--steps", "mnist:8m"],
            "--steps mnist:8m: expected TASK:PRESET, ",
        ),
        (["--device", "cpu", "--steps", "pmnist:9m"], "argument --preset: "),
    ],
)
def test_bad_arguments(capsys, argv, message):
    assert profile_step.main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
