"""scripts/bench.py: its measurements, and its refusal to time wrong results."""

import argparse
import json
import re
from collections import Counter

import pytest
import torch

from scripts import bench, workload
from test_graphs import Player
from trellisnet.errors import RunError
from trellisnet.training.config import PROJECT

SMALL = ["--flags", "--nhid", "8", "--nlevels", "6"]


@pytest.fixture
def program(capsys):
    """Run the program on small networks; return its exit code and output."""

    def call(*arguments):
        threads = torch.get_num_threads()
        code = bench.main(["--quick", "--threads", "1", *arguments, *SMALL])
        torch.set_num_threads(threads)
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def measured(program, tmp_path):
    """Measure a task; return the records."""

    def call(task, *arguments):
        code, out, err = program("--tasks", task, "--repeats", "1", "--json", str(tmp_path / "b.json"), *arguments)
        assert code == 0, err
        found = json.loads((tmp_path / "b.json").read_text())
        assert out.count("\n|") == len(found["records"]) + 2
        assert found["commit"]
        assert found["machine"]
        return found["records"]

    return call


def test_it_measures_every_part_and_variant(measured):
    records = measured("pmnist", "--no-memory")
    variants = ("reference", "fused", "fused bf16")
    assert [(r["part"], r["variant"]) for r in records] == [
        (part, variant) for part in ("forward", "core", "step") for variant in variants
    ]
    assert all(r["seconds"] > 0 and r["gflops"] > 0 for r in records)
    assert all(r["ratio"] == 1 for r in records if r["variant"] == "reference")


@pytest.mark.slow
def test_it_measures_memory_of_a_language_model(measured, monkeypatch):
    few = [workload.REFERENCE, workload.Variant("fused", "bf16", recompute=2)]  # each takes a process
    monkeypatch.setattr(bench, "variants_on", lambda *_: few)
    records = measured("char_ptb", "--parts", "step")
    assert [(r["part"], r["variant"]) for r in records[2:]] == [("memory", variant.name) for variant in few]
    assert all(r["bytes"] > 10_000_000 for r in records[2:])


def test_it_measures_every_variants_memory_of_steps_and_heads(measured, monkeypatch):
    monkeypatch.setattr(bench, "memory", lambda task, part, variant, args: 7)
    records = measured("word_ptb", "--parts", "head", "--recompute", "2")
    assert [r["part"] for r in records] == ["head"] * 3 + ["memory"] * 5 + ["head memory"] * 3
    assert records[7]["variant"] == "fused bf16 recompute 2"
    assert all(r["seconds"] > 0 for r in records[:3])
    assert all(r["bytes"] == 7 for r in records[3:])


@pytest.mark.parametrize(("device", "precisions"), [("cpu", ["fp32"]), ("cuda", ["fp32", "tf32", "bf16"])])
def test_the_reference_is_timed_in_every_precision_that_may_be_its_fastest(device, precisions):
    variants = workload.variants_on(torch.device(device), recompute=[4])
    assert variants[0] == workload.REFERENCE
    assert [v.precision for v in variants if v.backend == "reference"] == precisions
    assert {v.precision for v in variants if v.recompute == 4} == set(workload.PRECISIONS[device])


@pytest.mark.parametrize("task", ["word_ptb", "wt103"])  # streamed, and with repackaging
def test_it_measures_evaluation_and_generation(measured, task):
    records = measured(task, "--no-memory", "--parts", "evaluation", "generation")
    assert [r["part"] for r in records] == ["evaluation"] * 3 + ["generation"] * 3
    assert all(r["per_second"] > 0 for r in records)
    assert all(r["ratio"] == pytest.approx(r["per_second"] / records[3]["per_second"]) for r in records[3:])


@pytest.mark.parametrize(("parts", "measured"), [(["core", "step"], ["fp32", "bf16"]), (["head"], [])])
def test_the_peak_is_measured_once_per_precision(monkeypatch, parts, measured):
    asked = []
    monkeypatch.setattr(bench, "peak_gflops", lambda work, precision: asked.append(precision) or 2.0)
    monkeypatch.setattr(bench, "gate", lambda *_: None)
    args = argparse.Namespace(
        device="cpu", quick=True, flags=SMALL[1:], recompute=[], parts=parts, repeats=2, memory=False
    )
    records = list(bench.measure("word_ptb", args, bench.Display(0)))
    assert asked == measured
    assert len(records) == 3 * len(parts)
    for record in records:
        if measured:
            assert record["share_of_peak"] == record["gflops"] / 2.0
        else:
            assert "share_of_peak" not in record


def test_a_wrong_result_is_not_timed(monkeypatch):
    from trellisnet.ops import fused

    work = workload.Work("pmnist", True, torch.device("cpu"), SMALL[1:])
    workload.gate(work, workload.variants_on(work.device))
    right = fused._Trellis.apply

    def wrong(*args):
        h, *rest = right(*args)
        return h * 1.01, *rest

    monkeypatch.setattr(fused._Trellis, "apply", wrong)
    with pytest.raises(RunError, match="pmnist, fused: differs from the reference by 0.01; nothing is timed"):
        workload.gate(work, workload.variants_on(work.device))


def test_graphs_compute_the_same_as_their_variants(monkeypatch):
    counts = Counter()
    monkeypatch.setattr(workload.Work, "recorder", lambda work: Player(list(work.model.parameters()), counts))
    work = workload.Work("word_ptb", True, torch.device("cpu"), SMALL[1:])
    graph = workload.Variant("fused", "fp32", graph=True)
    assert graph.name == "fused graph"
    workload.gate(work, [workload.REFERENCE, graph], ["core"])
    for _ in range(6):
        work.run("step", graph)
    assert counts["recorded"] == 2
    assert counts["replayed"] == 1 + 3
    variants = workload.variants_on(torch.device("cuda"))
    assert [v.name for v in variants[-2:]] == ["fused bf16", "fused bf16 graph"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeats", "0"], "--repeats: expected at least 1, got 0"),
        (["--threads", "-1"], "--threads: expected at least 0, got -1"),
        (["--recompute", "2", "0"], "--recompute: expected at least 1, got 0"),
        (["--device", "warp"], "--device warp: not usable here (.*); try --device cpu"),
        (["--tasks", "nothing"], "argument --tasks: invalid choice: 'nothing'.*"),
        (["--json", "/no/where.json"], "--json /no/where.json: cannot be written; name a file in a folder that .*"),
        (["--json", str(PROJECT / "setup.py")], "--json .*setup.py: holds something else, .*"),
        (["--flags", "--emsize", "0"], "--emsize: expected at least 1, got 0"),
    ],
)
def test_mistakes_are_one_line_before_any_measurement(capsys, arguments, message):
    assert bench.main(["--quick", "--tasks", "word_ptb", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    said = [line for line in printed.err.splitlines() if not line.startswith("word_ptb: ")]
    assert len(said) == 1
    assert re.fullmatch(f"error: {message}", said[0])


def test_progress_is_printed(program, monkeypatch):
    monkeypatch.setattr(bench, "memory", lambda *_: 7)
    _, _, err = program("--tasks", "pmnist", "--repeats", "1", "--parts", "forward")
    assert err.splitlines() == ["pmnist: comparison with the reference", "pmnist: forward", "pmnist: memory"]
