"""Tests that need a CUDA device and are skipped without one; `bash scripts/gpu_check.sh` fails without one."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from test_graphs import assert_same, kept
from test_ops import random_inputs, trellis
from trellisnet import TrellisNet, heads
from trellisnet.models import TrellisLanguageModel
from trellisnet.ops import fused, gemm
from trellisnet.training import graphs, programs
from trellisnet.training.config import PROJECT, parse
from trellisnet.training.tasks import LanguageModeling
from word_ptb.model import Config
from word_ptb.train import main

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CUDA = torch.device("cuda")
# Relative to the norm of the float64 results on the CPU.
TOLERANCE = {"fp32": 1e-4, "tf32": 1e-2, "bf16": 8e-2}
BACKENDS = [("reference", "auto"), ("fused", "eager"), ("triton", "auto")]
IMAGES = ("pmnist", "cifar10")
ON_BOTH = pytest.mark.parametrize("precision", TOLERANCE)


def assert_near(ours, exact, tolerance, what=""):
    error = (ours.cpu().double() - exact).norm() / exact.norm().clamp_min(1e-3)  # some norms are exactly 0
    assert error <= tolerance, (what, error.item())


def computed(inputs, device, dtype, precision="fp32", carried=True, **options):
    """Return all outputs, and the gradients of fixed functions of them."""
    device = torch.device(device)
    tensors = {name: t.detach().to(device, dtype).requires_grad_() for name, t in inputs.items()}
    wanted = list(tensors.values())
    state = (tensors.pop("h0"), tensors.pop("c0"))
    options = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in options.items()}
    if options.get("hidden_scale") is not None:
        options["hidden_scale"] = options["hidden_scale"].to(dtype)
    config = Config(precision=precision)
    with config.float32_products():
        with config.autocast(device):
            out = trellis(**tensors, state=state if carried else None, **options)
        outs = [out.output, *out.state, *out.aux]
        generator = torch.Generator().manual_seed(9)
        probes = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(device, o.dtype) for o in outs]
        results = torch.autograd.grad(outs, wanted, probes, allow_unused=True)
    return [*outs, *(torch.zeros_like(t) if g is None else g for t, g in zip(wanted, results, strict=True))]


@ON_BOTH
@pytest.mark.parametrize(("backend", "gates"), BACKENDS, ids=["reference", "fused", "triton"])
@pytest.mark.parametrize(
    ("k", "dilation", "start", "inject_every", "masked", "carried", "recompute"),
    [
        (2, (1,), 0, 1, True, True, 0),
        (2, (1, 2, 4), 30, 1, False, False, 0),
        (3, (1, 2), 39, 2, True, True, 3),
        (2, (1, 1, 2, 4, 8), 39, 1, True, False, 0),
    ],
    ids=["plain", "dilated", "k3", "last"],
)
def test_outputs_and_gradients(precision, backend, gates, k, dilation, start, inject_every, masked, carried, recompute):
    inputs = random_inputs(k, 40, n=3, channels=20, hidden=72)  # neither a power of two nor a multiple of 16
    inputs["weight_h"] *= 0.2
    mask = torch.rand(3, 72, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64).gt(0.3) / 0.7
    options = {
        "num_layers": 10, "dilation": dilation, "output_size": 24, "start": start, "aux_every": 4, "carried": carried,
        "inject_every": inject_every, "hidden_scale": mask if masked else None,
    }  # fmt: skip
    exact = computed(inputs, "cpu", torch.float64, backend="reference", **options)
    options |= {"gates": gates, "recompute": recompute if backend != "reference" else 0}
    ours = computed(inputs, "cuda", torch.float32, precision, backend=backend, **options)
    for number, (a, b) in enumerate(zip(ours, exact, strict=True)):
        assert_near(a, b, TOLERANCE[precision], number)


def test_rows_of_several_lengths():
    inputs = random_inputs(2, 12, n=3, channels=5, hidden=16)
    options = {"num_layers": 5, "dilation": (1, 2), "output_size": 4, "lengths": torch.tensor([12, 3, 7])}
    exact = computed(inputs, "cpu", torch.float64, backend="reference", **options)
    for a, b in zip(computed(inputs, "cuda", torch.float32, backend="triton", **options), exact, strict=True):
        assert_near(a, b, 1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_gradient_of_the_kernel_by_one_product_or_several(precision, monkeypatch):
    inputs = random_inputs(2, 40, n=4, channels=8, hidden=64)
    inputs["weight_h"] *= 0.2
    options = {"num_layers": 12, "dilation": (1,), "output_size": 8, "start": 20, "backend": "fused"}
    exact = computed(inputs, "cpu", torch.float64, **options)
    results = []
    for arena in (1 << 31, 0):
        monkeypatch.setattr(fused, "ARENA", arena)
        results.append(computed(inputs, "cuda", torch.float32, precision, **options))
        for a, b in zip(results[-1], exact, strict=True):
            assert_near(a, b, TOLERANCE[precision])
    one, several = (grads[-4].double().cpu() for grads in results)  # of weight_h
    assert_near(one, several, 1e-5)  # both are summed in float32


def test_products_of_bfloat16_return_float32():
    assert gemm.widens(torch.zeros(1, device="cuda").device, torch.bfloat16), torch.__version__


@pytest.mark.parametrize("gates", ["triton", "eager"])
def test_streams_equal_one_long_pass(gates):
    torch.manual_seed(0)
    net = TrellisNet(6, 48, 6, output_size=20, dilation=[1, 2], gates=gates).to(CUDA).eval()
    x = torch.randn(3, 40, 6, device=CUDA)
    whole = net(x).output.detach()
    stream = net.init_stream(3)
    first, stream = net.stream(x[:, :17], stream)
    second, stream = net.stream(x[:, 17:31], stream)
    last = []
    for t in range(31, 40):
        y, stream = net.step(x[:, t], stream)
        last.append(y)
    assert_near(torch.cat([first, second, torch.stack(last, 1)], 1), whole.cpu().double(), 1e-5)


@ON_BOTH
@pytest.mark.parametrize("kind", ["plain", "mixture", "split"])
def test_losses_and_their_gradients(precision, kind):
    torch.manual_seed(0)
    make = {
        "plain": lambda: heads.LinearSoftmax(32, 3001),
        "mixture": lambda: heads.MixtureOfSoftmaxes(32, 3001, 4, 32),
        "split": lambda: heads.SplitSoftmax(32, 3001, [500, 1500]),
    }
    head = make[kind]()
    x, target = torch.randn(2, 8, 20, 32, dtype=torch.float64), torch.randint(3001, (8, 20))

    def found(head, x, target):
        x = x.clone().requires_grad_()
        config = Config(precision=precision if x.is_cuda else "fp32")
        head.zero_grad()
        with config.float32_products():
            with config.autocast(x.device):
                loss, each = head.losses(x, target, [1.0, 0.3])
            loss.backward()
        return [loss.detach(), each.detach(), x.grad, *(p.grad.clone() for p in head.parameters())]

    exact = found(head.double(), x, target)
    ours = found(head.float().to(CUDA), x.float().to(CUDA), target.to(CUDA))
    for a, b in zip(ours, exact, strict=True):
        assert_near(a, b, TOLERANCE[precision])


def test_training_follows_that_on_the_cpu():
    results = []
    rows = torch.randint(60, (4, 120), generator=torch.Generator().manual_seed(0))
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = TrellisLanguageModel(60, 16, 48, 6, output_size=16).to(device)
        task = LanguageModeling(model, horizon=10, repackage=True, aux_weight=0.1, aux_every=3, alpha=1.0, beta=1.0)
        optimizer, state, losses = torch.optim.SGD(model.parameters(), lr=1.0), None, []
        for inputs, targets in task.batches(rows.to(device)):
            optimizer.zero_grad()
            terms, state = task.loss(inputs, targets, state)
            terms["loss"].backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            losses.append(terms["loss"].item())
        results.append(losses)
    assert results[1] == pytest.approx(results[0], rel=1e-3)


TEXT = """--data synthetic --emsize 16 --nhid 40 --nout 16 --nlevels 6 --horizon 20 --repack --seq_len 0 --batch_size 20
--aux_freq 3 --log-interval 1 --max_eval_tokens 2000 --epochs 2 --optim Adam --lr 0.01 --device cuda
--deterministic""".split()


def train(folder, *flags):
    """Train in a separate process, because cuBLAS reads its setting for determinism only once."""
    command = [sys.executable, str(PROJECT / "word_ptb" / "train.py"), *flags]
    command += ["--out", str(folder)] if "--resume" not in flags else []
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=PROJECT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def everything(folder):
    ours = kept(folder)
    content = torch.load(folder / "last.pt", weights_only=True, map_location="cpu")["content"]
    return [*ours[0], *content["rng"]["cuda"], *(content["carry"] or ())], ours[1], ours[2]


@pytest.mark.parametrize("graph", ["off", "on"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_is_continued_bit_for_bit(tmp_path, graph, precision):
    flags = [*TEXT, "--cuda_graph", graph, "--precision", precision]
    train(tmp_path / "whole", *flags, "--max_steps", "14")
    train(tmp_path / "run", *flags, "--max_steps", "9")
    train(tmp_path / "run", "--resume", str(tmp_path / "run" / "last.pt"), "--max_steps", "14")
    ours, theirs = everything(tmp_path / "run"), everything(tmp_path / "whole")
    assert_same(ours, theirs)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_a_graph_computes_the_same_bits(tmp_path, precision):
    for graph in ("off", "on"):
        train(tmp_path / graph, *TEXT, "--precision", precision, "--cuda_graph", graph, "--max_steps", "14")
    assert_same(everything(tmp_path / "on"), everything(tmp_path / "off"))


def test_a_graph_was_replayed(monkeypatch, tmp_path, capsys):
    """Random masks differ between replays, and other shapes bypass the graph."""
    replays = []
    record = graphs.CUDARecorder.record

    def recorded(self, function):
        results, replay = record(self, function)
        return results, lambda: replays.append(1) or replay()

    monkeypatch.setattr(graphs.CUDARecorder, "record", recorded)
    flags = [flag for flag in TEXT if flag != "--deterministic"]
    assert main([*flags, "--out", str(tmp_path / "run")]) == 0, capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "config.json").read_text())["settings"]["cuda_graph"] == "on"
    assert len(replays) > 5
    losses = kept(tmp_path / "run")[1]
    assert len(set(losses)) == len(losses)
    assert losses[-1] < losses[0]


def test_masks_differ_from_replay_to_replay():
    parameter = nn.Parameter(torch.ones(1000, device=CUDA))

    def function(batch, carry):
        parameter.grad = None
        loss = nn.functional.dropout(parameter * batch[0], 0.5).sum()
        loss.backward()
        return (loss,)

    torch.manual_seed(3)
    eager = [function((torch.full((1000,), 2.0, device=CUDA),), None)[0].item() for _ in range(9)]
    torch.manual_seed(3)
    recorded = graphs.Recorded(function, [parameter], graphs.CUDARecorder(CUDA))
    assert [recorded((torch.full((1000,), 2.0, device=CUDA),), None)[0].item() for _ in range(9)] == eager
    assert len(set(eager)) > 5


@pytest.mark.parametrize(("here", "there"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_weights_and_checkpoints_move_between_devices(tmp_path, capsys, here, there):
    flags = [flag for flag in TEXT if flag not in ("--deterministic", "--device", "cuda")]
    metrics = [tmp_path / f"{device}.json" for device in (here, there)]
    run = tmp_path / "run"
    assert main([*flags, "--device", here, "--max_steps", "5", "--out", str(run), "--metrics", str(metrics[0])]) == 0
    weights = str(run / "weights.pkl")
    assert all(not t.is_cuda for t in torch.load(weights, weights_only=True).values())
    score = [*flags, "--eval", "--load_weight", weights, "--device", there, "--metrics", str(metrics[1])]
    assert main(score) == 0, capsys.readouterr().err
    losses = [json.loads(path.read_text())["test"]["loss"] for path in metrics]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    resume = ["--resume", str(run / "last.pt"), "--device", there, "--max_steps", "8"]
    assert main(resume) == 0, capsys.readouterr().err
    settings = json.loads((run / "config.json").read_text())["settings"]
    assert settings["cuda_graph"] == {"cuda": "on", "cpu": "off"}[here]


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # torch says that it is a prototype
@pytest.mark.parametrize("task", programs.TASKS)
def test_making_batches_does_not_synchronise(task):
    program = programs.get(task)
    config, _ = parse(program.config_class, ["--data", "synthetic", "--nhid", "8", *["--augment"] * (task in IMAGES)])
    task, splits, *_ = program.setup(config, CUDA)
    batches = task.batches(splits.train)
    torch.cuda.set_sync_debug_mode("error")
    try:
        inputs, targets = batches[0]
        batches[1]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert inputs.is_cuda
    assert len(inputs) == len(targets) == config.batch_size


def test_too_little_memory_is_reported_in_one_line(tmp_path, capsys):
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(CUDA).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (64 << 20)) / total)
    try:
        flags = ["--nhid", "1000", "--nlevels", "20", "--out", str(tmp_path / "run"), "--max_steps", "1"]
        code = main([*(flag for flag in TEXT if flag != "--deterministic"), *flags])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    err = capsys.readouterr().err
    assert code == 1
    assert err.startswith("failed: out of memory; lower --batch_size or the sizes; ")
    assert err.count("\n") == 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("gates", ["eager", "auto"])
@pytest.mark.parametrize("options", [{}, {"last_only": True}, {"aux_every": 2}], ids=str)
def test_a_compiled_network_equals_an_eager_one(gates, options):
    torch.manual_seed(0)
    torch._dynamo.reset()
    net, x = TrellisNet(3, 16, 6, dilation=(1, 2), gates=gates, device=CUDA), torch.randn(3, 9, 3, device=CUDA)
    pairs = []
    for call in (torch.compile(net, backend="aot_eager", fullgraph=True), net):
        out = call(x, **options)
        loss = sum(part.square().sum() for part in (out.output, *out.state, *out.aux))
        pairs.append([out.output, *out.state, *out.aux, *torch.autograd.grad(loss, list(net.parameters()))])
    torch.testing.assert_close(*pairs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("flags", ["word_ptb --no-memory", "pmnist --parts step"])
def test_the_benchmark_runs(tmp_path, flags):
    command = [sys.executable, str(PROJECT / "scripts" / "bench.py"), "--quick", "--device", "cuda", "--repeats", "1"]
    command += ["--json", str(tmp_path / "bench.json"), "--tasks", *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    records = json.loads((tmp_path / "bench.json").read_text())["records"]
    variants = {r["variant"] for r in records if r["part"] == "step"}
    assert {"reference tf32", "fused bf16", "fused bf16 graph"} <= variants
    assert all(r["bytes"] > 1 << 20 for r in records if "bytes" in r)
