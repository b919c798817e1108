"""Choices that a run makes once and keeps: backend, products, precision; and the notices of them."""

import json

import pytest
import torch

from pmnist.train import main as pmnist_main
from trellisnet import ops
from trellisnet.models import TrellisLanguageModel
from trellisnet.ops import gemm
from trellisnet.training import checkpoint, cores
from trellisnet.training.config import parse
from word_ptb.model import Config
from word_ptb.train import main as word_main

TEXT = "--data synthetic --preset tiny --nhid 8 --max_eval_tokens 200 --log-interval 1".split()
IMAGES = "--data synthetic --preset small --nhid 8 --batch_size 8 --max_eval_tokens 16 --log-interval 1".split()


@pytest.fixture
def run(tmp_path, capsys):
    def call(main, *argv, out="run"):
        metrics = tmp_path / f"{out}.json"
        code = main([*map(str, argv), "--out", str(tmp_path / out), "--metrics", str(metrics)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err, json.loads(metrics.read_text()) if metrics.exists() else None

    return call


def losses(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [r["loss"] for r in records if r["event"] == "train"]


@pytest.mark.parametrize(("main", "flags"), [(word_main, TEXT), (pmnist_main, IMAGES)])
def test_training_in_bfloat16_follows_training_in_float32(run, tmp_path, main, flags):
    found = {}
    for precision in ("fp32", "bf16"):
        code, out, err, metrics = run(main, *flags, "--max_steps", 12, "--precision", precision, out=precision)
        assert (code, err) == (0, "")
        assert metrics["precision"] == precision
        kernels = ops.resolve_gates("auto", torch.device("cpu"), cores.COMPUTE[precision])
        assert out.splitlines()[0].endswith(f", {precision}, fused, {kernels} gates")
        found[precision] = losses(tmp_path / precision)
    assert len(found["bf16"]) == 12
    assert found["bf16"] != found["fp32"]
    assert found["bf16"] == pytest.approx(found["fp32"], rel=0.02)
    weights = torch.load(tmp_path / "bf16" / "weights.pkl", weights_only=True)
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())


def test_tf32_needs_a_cuda_device(run):
    code, _, err, metrics = run(word_main, *TEXT, "--device", "cpu", "--precision", "tf32")
    assert (code, err) == (2, "error: --precision tf32: needs a CUDA device, got cpu; pass fp32 or bf16\n")
    assert metrics is None


def test_a_run_in_tf32_can_be_continued_without_cuda(run, tmp_path):
    assert run(word_main, *TEXT, "--max_steps", "4", out="whole")[0] == 0
    assert run(word_main, *TEXT, "--max_steps", "2")[0] == 0
    content = checkpoint.load(tmp_path / "run" / "last.pt")
    content["settings"]["precision"] = "tf32"
    checkpoint.save(tmp_path / "run" / "last.pt", content)
    (tmp_path / "run" / "config.json").unlink()
    code, _, err, metrics = run(word_main, "--resume", "--max_steps", "4", "--device", "cpu")
    assert (code, err) == (0, "")
    assert metrics["precision"] == "tf32"
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "tf32"])
def test_tf32_is_on_only_when_requested(precision):
    """For convolutions and other products alike; torch's default is TF32 for convolutions alone."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with Config(precision=precision).float32_products():
        asked = precision == "tf32"
        assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == asked
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


def test_bfloat16_works_with_every_head_and_the_reference(run):
    for flags in (["--n_experts", "2"], ["--backend", "reference"], ["--activation", "gru"], ["--mixed_group", "2"]):
        code, _, err, metrics = run(word_main, *TEXT, "--max_steps", 2, "--precision", "bf16", "--overwrite", *flags)
        assert (code, err) == (0, ""), flags
        assert metrics["test"]["loss"] < 12


@pytest.mark.parametrize("flags", [["--activation", "gru"], ["--mixed_group", "2"]])
def test_a_fallback_to_the_reference_is_reported(run, tmp_path, flags):
    code, out, _, metrics = run(word_main, *TEXT, *flags, "--max_steps", 1)
    assert code == 0
    assert metrics["backend"] == "reference"
    assert "backend reference, slower than fused: it has no " in out
    assert "# notice: backend reference, slower than fused: it has no " in (tmp_path / "run" / "log.txt").read_text()
    code, _, err, _ = run(word_main, *TEXT, *flags, "--backend", "fused", out="asked")
    assert code == 2
    assert err.startswith("error: --backend: fused cannot run this, it has no ")
    assert err.count("\n") == 1
    assert not (tmp_path / "asked").exists()


def test_slow_gates_are_reported(run, tmp_path, monkeypatch):
    monkeypatch.setattr(ops.fused.compiled, "_library", lambda: "it has not been built")
    code, out, err, metrics = run(word_main, *TEXT, "--max_steps", 1)
    assert (code, err, metrics["gates"]) == (0, "", "eager")
    first, *lines = out.splitlines()
    assert first.endswith(", fp32, fused, eager gates")
    notice = "gates eager, slower than compiled: it has not been built"
    assert notice in lines
    assert f"# notice: {notice}\n" in (tmp_path / "run" / "log.txt").read_text()
    code, out, *_ = run(word_main, *TEXT, "--max_steps", 1, "--backend", "reference", out="reference")
    assert code == 0
    assert out.splitlines()[0].endswith(", fp32, reference")
    code, _, err, _ = run(word_main, *TEXT, "--gates", "compiled", out="asked")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("error: --gates: compiled cannot run, it has not been built; expected auto or eager")


@pytest.mark.parametrize(
    ("flags", "notices"),
    [
        (["--gates", "eager"], ["gates eager, slower than triton: no compiler"]),
        (["--gates", "triton"], []),
        (["--gates", "eager", "--backend", "reference"], []),
        (["--model", "awd-lstm"], ["no CUDA graph: --model awd-lstm is not recorded"]),
        (["--model", "awd-lstm", "--eval"], []),
    ],
)
def test_what_slows_a_cuda_device_down_is_reported(monkeypatch, flags, notices):
    monkeypatch.setattr(ops.fused, "reason_against", lambda choice, *_: "no compiler" if choice == "triton" else "")
    config, _ = parse(Config, flags)
    assert config.notices(torch.device("cuda")) == notices


def test_a_broken_triton_counts_as_missing(monkeypatch):
    def broken():
        raise ImportError("libstdc++.so.6: version not found\nmore")

    monkeypatch.setattr(ops.fused.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(ops.fused, "_triton", broken)
    reason = "the package triton cannot be imported (libstdc++.so.6: version not found)"
    assert ops.slow_gates(torch.device("cuda"), torch.float32) == f"slower than triton: {reason}"
    assert ops.resolve_gates("auto", torch.device("cuda"), torch.float32) == "eager"
    with pytest.raises(ValueError, match="gates: triton cannot run, the package triton cannot be imported"):
        ops.resolve_gates("triton", torch.device("cuda"), torch.float32)


def test_products_are_chosen_once(run, tmp_path, monkeypatch):
    """By measurement where it matters; a resumed run keeps the choice, a deterministic one follows a fixed rule."""
    monkeypatch.setattr(cores, "MEASURED", 1)
    monkeypatch.setattr(gemm, "fastest", lambda *_: "mm")
    assert run(word_main, *TEXT, "--max_steps", 1)[3]["gemm"] == "mm"
    settings = json.loads((tmp_path / "run" / "config.json").read_text())["settings"]
    assert (settings["gemm"], settings["backend"], settings["precision"]) == ("mm", "fused", "fp32")
    monkeypatch.setattr(gemm, "fastest", lambda *_: "onednn")
    folder = tmp_path / "run"
    assert word_main(["--resume", str(folder / "last.pt"), "--max_steps", "2"]) == 0
    assert json.loads((folder / "config.json").read_text())["settings"]["gemm"] == "mm"
    assert run(word_main, *TEXT, "--max_steps", 1, out="measured")[3]["gemm"] == "onednn"
    rule = "onednn" if gemm.usable("onednn", torch.device("cpu"), torch.float32) else "mm"
    monkeypatch.setattr(gemm, "fastest", lambda *_: pytest.fail("measured"))
    metrics = run(word_main, *TEXT, "--max_steps", 1, "--deterministic", out="fixed")[3]
    assert (metrics["gemm"], metrics["deterministic"]) == (rule, True)


def test_products_that_do_not_work_here_are_refused(run, monkeypatch):
    monkeypatch.setattr(gemm, "usable", lambda route, *_: route == "mm")
    code, _, err, _ = run(word_main, *TEXT, "--gemm", "onednn")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("error: --gemm: onednn does not work with torch.float32 on cpu here; expected auto or mm")
    assert run(word_main, *TEXT, "--max_steps", 1)[3]["gemm"] == "mm"


def test_a_run_continued_elsewhere_uses_the_products_available_there(run, tmp_path, monkeypatch, capsys):
    assert run(word_main, *TEXT, "--max_steps", 1, "--gemm", "onednn")[3]["gemm"] == "onednn"
    monkeypatch.setattr(gemm, "usable", lambda route, *_: route == "mm")
    last = str(tmp_path / "run" / "last.pt")
    metrics = tmp_path / "again.json"
    assert word_main(["--resume", last, "--max_steps", "2", "--metrics", str(metrics)]) == 0
    assert json.loads(metrics.read_text())["gemm"] == "mm"


def test_a_mixture_in_bfloat16_is_normalised():
    torch.manual_seed(0)
    model = TrellisLanguageModel(50, 8, 16, 3, output_size=8, n_experts=15)
    tokens = torch.randint(50, (2, 9))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        log_p = model.log_prob(model(tokens).output)
    assert log_p.dtype == torch.float32
    assert log_p.exp().sum(-1) == pytest.approx(1, abs=1e-5)


@pytest.fixture(autouse=True)
def as_before():
    yield
    torch.use_deterministic_algorithms(False)


def test_a_continued_run_keeps_its_precision(run, tmp_path, capsys):
    run(word_main, *TEXT, "--max_steps", 1)
    last = str(tmp_path / "run" / "last.pt")
    assert word_main(["--resume", last, "--max_steps", "2", "--precision", "bf16"]) == 2
    assert "--precision bf16: the run in" in capsys.readouterr().err


@pytest.mark.parametrize("model", [[], ["--model", "awd-lstm", "--preset", "small", "--emsize", 8, "--nout", 8]])
def test_a_cpu_without_bfloat16_computes_the_same_and_reports_it(run, monkeypatch, model):
    monkeypatch.setattr(ops.gemm, "usable", lambda route, device, dtype: route == "mm")
    code, out, err, metrics = run(word_main, *TEXT, *model, "--precision", "bf16", "--max_steps", 1)
    assert (code, err, metrics["precision"]) == (0, "", "bf16")
    notice = "this CPU has no bfloat16 instructions; --precision fp32 is several times faster on it"
    assert notice in out.splitlines()
    assert notice not in run(word_main, *TEXT, *model, "--max_steps", 1, out="fp32")[1]
