"""Several ranks compute what one process would, print one message and end together."""

import contextlib
import json
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import time

import numpy
import pytest
import torch

import trellisnet
import word_ptb.train
import wt103.train
from scripts import compare_ranks
from trellisnet import serialization, weights
from trellisnet.data import corpus
from trellisnet.errors import UserError
from trellisnet.models import TrellisLanguageModel
from trellisnet.ops import compiled
from trellisnet.training import checkpoint
from trellisnet.training.config import PROJECT
from trellisnet.training.distributed import Ranks, StepStatus
from trellisnet.training.hardware import HardwareConfig
from trellisnet.training.runlog import runnable

# With dropout, so that random numbers matter; the state is carried, and Adam has one of its own.
MODEL = """--data synthetic --emsize 8 --nhid 6 --nout 8 --nlevels 3 --repack --seq_len 0 --horizon 40 --batch_size 24
--eval_batch_size 3 --aux 0.1 --aux_freq 2 --optim Adam --lr 0.01 --log-interval 20 --threads 1 --max_eval_tokens 1000
--epochs 2 --dropout 0.1 --wdrop 0.1 --accumulate 2""".split()
# Every rank calls a program's main once for every list of flags, and writes down the exit codes. A list may begin with
# "signal", rank and step: then that rank sends itself a SIGTERM there.
DRIVER = """
import importlib, json, os, signal, sys
from trellisnet.training.engine import Trainer
rank, step = int(os.environ["RANK"]), Trainer._step
at = None
def signalled(self, batch):
    out = step(self, batch)
    if at == [rank, self.step]:
        os.kill(os.getpid(), signum)
    return out
Trainer._step = signalled
plan, out = sys.argv[1:3]
codes = []
for argv in json.load(open(plan)):
    task, at, signum = argv.pop(0), None, signal.SIGTERM
    if argv[0] in ("signal", "kill"):
        signum = signal.SIGKILL if argv[0] == "kill" else signal.SIGTERM
        at, argv = [int(argv[1]), int(argv[2])], argv[3:]
    codes.append(importlib.import_module(f"{task}.train").main(argv))
    names = [open(f"/proc/self/task/{thread}/comm").read() for thread in os.listdir("/proc/self/task")]
    json.dump([codes, [name for name in names if "gloo" in name]], open(f"{out}/codes-{rank}.json", "w"))
sys.exit(codes[-1])
"""


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def torchrun(tmp_path):
    """Call mains on `size` ranks: a list of exit codes for each rank, standard output and standard error."""

    def call(size, *plan, flags=(), timeout=200):
        (tmp_path / "driver.py").write_text(DRIVER)
        (tmp_path / "plan.json").write_text(json.dumps([[str(flag) for flag in argv] for argv in plan]))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(size), *flags]
        command += [str(tmp_path / "driver.py"), str(tmp_path / "plan.json"), str(tmp_path)]
        environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=timeout)
        files = [tmp_path / f"codes-{rank}.json" for rank in range(size)]
        found = [json.loads(file.read_text()) for file in files if file.exists()]
        for codes, threads in found:  # a thread of gloo that is left may abort the process while it ends
            assert codes[-1] != 0 or not threads, threads
        return [codes for codes, _ in found], done.stdout, done.stderr

    return call


def assert_same(ours, theirs):
    """Compare weights, optimiser, carried state and all random numbers."""
    a, b = (checkpoint.load(folder / "last.pt") for folder in (ours, theirs))
    for key in ("model", "optimizer", "carry", "rng", "rng_others", "step", "epoch", "schedule", "best"):
        assert checkpoint.sha256_of(a[key]) == checkpoint.sha256_of(b[key]), key


# -- one process -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_parts_are_stretches_of_nearly_equal_length_in_the_order_of_ranks(size):
    for items in (list(range(10)), range(10), torch.arange(10), [], [5]):
        parts = [Ranks(rank, size).part(items) for rank in range(size)]
        assert [int(item) for part in parts for item in part] == [int(item) for item in items]
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_rows_that_cannot_be_divided_are_an_error():
    Ranks(1, 4).check_rows(16)
    with pytest.raises(UserError, match="--batch_size 15: its rows cannot be divided among 4 ranks; pass .* 16"):
        Ranks(1, 4).check_rows(15)


def test_only_torchrun_makes_ranks(monkeypatch):
    names = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    alone = Ranks.of_environment()
    assert (alone.rank, alone.size, alone.first, alone.launcher()) == (0, 1, True, ["python"])
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    ranks = Ranks.of_environment()
    assert (ranks.rank, ranks.size, ranks.local_rank, ranks.first) == (5, 8, 1, False)
    assert ranks.launcher() == ["torchrun", "--nnodes", "2", "--nproc_per_node", "4"]


def test_ranks_that_compute_on_the_cpu_need_no_cuda_devices(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    cpu = (HardwareConfig(cuda=False), HardwareConfig(device="cpu"))
    for rank in range(2):
        for config in cpu:
            Ranks(rank, 2, rank, 2).device(config.wanted_device())
    assert not taken
    Ranks(0, 2, 0, 2).device(HardwareConfig().wanted_device())
    assert taken == [0]
    with pytest.raises(UserError, match="--nproc_per_node 2: there are 1 CUDA devices?; start no more processes, or"):
        Ranks(1, 2, 1, 2).device(HardwareConfig().wanted_device())
    with pytest.raises(UserError, match="--device cuda:0: every rank needs a device of its own; pass --device cuda"):
        Ranks(1, 2, 1, 2).device("cuda:0")
    Ranks().device("cuda:0")


def test_every_rank_but_the_first_has_random_numbers_of_its_own():
    drawn = []
    for rank in range(3):
        torch.manual_seed(1)
        Ranks(rank, 3).seed(1)
        drawn.append(torch.rand(()).item())
    torch.manual_seed(1)
    assert drawn[0] == torch.rand(()).item()
    assert len(set(drawn)) == 3


@pytest.mark.parametrize("index", range(4))
def test_the_status_of_a_step_names_what_is_not_finite(index):
    """Of the loss, the gradient, and the two tensors of a carried state."""
    finite = torch.ones(4, dtype=torch.bool)
    assert Ranks().reduce_status(finite, late=False, signum=0) == StepStatus(True, True, True, False, 0)
    finite[index] = False
    status = Ranks().reduce_status(finite, late=True, signum=15)
    assert status == StepStatus(index != 0, index != 1, index < 2, late=True, signum=15)
    assert not status.finite
    assert Ranks().reduce_status(torch.tensor([True, True]), late=False, signum=0).finite  # no state is carried


# -- several -----------------------------------------------------------------------------------------------------------


def compared(sizes, cases, tmp_path):
    bounds, train = compare_ranks.BOUNDS.items(), compare_ranks.train
    alone = {kind: {case: train(case, getattr(torch, kind), Ranks()) for case in cases} for kind, _ in bounds}
    for size in sizes:
        found = compare_ranks.launch(size, tmp_path / "found.pt", cases)
        for kind, bound in bounds:
            for case in cases:
                differ = compare_ranks.differences(found[kind][case], alone[kind][case])
                assert differ.keys() == {"losses", "gradients", "weights", "scores"}
                assert max(differ.values()) <= bound, (case, kind, size, differ)


@pytest.mark.filterwarnings("ignore:the model sees only the last .* pixels")
def test_two_ranks_compute_what_one_does(tmp_path):
    compared([2], ["word_ptb, carried, mixture, 2 slices", "pmnist"], tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the model sees only the last .* pixels")
def test_ranks_compute_what_one_does(tmp_path):
    compared([1, 3, 4], compare_ranks.CASES, tmp_path)


def test_a_run_of_two_ranks_is_one_run(tmp_path, torchrun, capsys):
    """Bad settings, a full run, one that a signal to one rank stops, its continuation, one that fails, a score."""
    capsys.readouterr()
    short, bands = [*MODEL, "--max_steps", "80"], ["--cutoffs", 20, 50]
    to = lambda name: ["--metrics", tmp_path / f"{name}.json"]  # noqa: E731
    assert word_ptb.train.main([*MODEL, "--max_steps", "30", "--out", str(tmp_path / "alone")]) == 0
    out = {name: tmp_path / name for name in ("whole", "parts", "bad")}
    plan = [
        ["word_ptb", *MODEL, "--batch_size", "25", "--out", out["bad"]],
        ["wt103", *short, *bands, "--out", out["whole"], *to("whole")],
        ["wt103", "signal", 1, 70, *short, *bands, "--out", out["parts"]],
        ["wt103", "--resume", out["parts"] / "last.pt", *to("parts")],
        ["word_ptb", *MODEL, "--lr", "1e30", "--clip", "0", "--optim", "SGD", "--out", out["bad"]],
        ["wt103", *MODEL, *bands, "--eval", "--load_weight", out["whole"] / "weights.pkl", *to("eval")],
        ["word_ptb", "--resume", tmp_path / "alone" / "last.pt", "--max_steps", "34"],
    ]
    codes, printed, err = torchrun(2, *plan)
    assert codes == [[2, 0, 143, 0, 1, 0, 0]] * 2, err
    lines = [line for line in err.splitlines() if line.startswith(("error", "failed", "interrupted"))]
    resume = ["--resume", str(out["parts"] / "last.pt")]
    way_on = runnable("wt103/train.py", resume, ["torchrun", "--nproc_per_node", "2"])
    assert lines[0].startswith("error: --batch_size 25: its rows cannot be divided among 2 ranks; pass --batch_size 24")
    assert lines[1] == f"interrupted; the last checkpoint is kept; continue with: {way_on}"
    assert lines[2].startswith("failed: the ")
    assert len(lines) == 3
    assert "Traceback" not in err
    assert "Warning" not in err
    assert printed.count(f"run folder: {out['whole']}") == 1

    assert_same(out["parts"], out["whole"])
    whole, parts, score = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("whole", "parts", "eval"))
    assert (whole["test"], whole["valid"]) == (parts["test"], parts["valid"]) == (score["test"], score["valid"])
    assert whole["ranks"] == 2
    assert len(whole["peak_memory_ranks"]) == 2
    assert whole["peak_memory"] == max(whole["peak_memory_ranks"]) > 10**7
    assert whole["command"].startswith("torchrun --nproc_per_node 2 wt103/train.py ")
    log = (out["whole"] / "log.txt").read_text()
    assert "# ranks: 2\n" in log
    assert "peak memory: rank 0 0." in log
    assert json.loads((out["whole"] / "config.json").read_text())["ranks"] == 2

    # One process continues the run of two, and two have continued the run of one.
    last = checkpoint.load(out["whole"] / "last.pt")
    assert last["carry"][0].size(0) == 24
    assert len(last["rng_others"]) == 1
    capsys.readouterr()
    assert wt103.train.main(["--resume", str(out["whole"] / "last.pt"), "--max_steps", "84"]) == 0
    assert "NOTICE: the checkpoint was written by 2 ranks, this run has 1: " in capsys.readouterr().out
    assert checkpoint.load(out["whole"] / "last.pt")["step"] == 84
    assert (
        "NOTICE: the checkpoint was written by 1 rank, this run has 2: " in (tmp_path / "alone" / "log.txt").read_text()
    )
    assert checkpoint.load(tmp_path / "alone" / "last.pt")["step"] == 34


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


def started(tmp_path, size, *argv, code=DRIVER, plan=None):
    """Ranks without torchrun, so that their exit codes and messages can be told apart."""
    (port,) = free_ports(1)
    (tmp_path / "driver.py").write_text(code)
    (tmp_path / "plan.json").write_text(json.dumps(plan or [[str(flag) for flag in argv]]))
    names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "x", "PYTHONPATH": PROJECT}
    processes = []
    for rank in range(size):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        environment = {**os.environ, **{name: str(value) for name, value in (names | own).items()}}
        command = [sys.executable, tmp_path / "driver.py", tmp_path / "plan.json", tmp_path]
        options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, env=environment, **options))
    return processes


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_others_with_a_message(tmp_path):
    flags = [*MODEL, "--checkpoint_steps", "20", "--out", tmp_path / "run"]
    processes = started(tmp_path, 2, "word_ptb", "kill", 1, 50, *flags)
    assert processes[1].wait(timeout=120) == -signal.SIGKILL
    begin = time.monotonic()
    _, err = processes[0].communicate(timeout=60)
    assert time.monotonic() - begin < 20
    assert processes[0].returncode == 1
    processes[1].communicate()
    assert err.startswith("failed: a process of this run has ended or can no longer be reached; the last checkpoint")
    assert err.count("\n") == 1
    assert checkpoint.load(tmp_path / "run" / "last.pt")["step"] == 40


@pytest.mark.slow
@pytest.mark.parametrize("dies", [0, 1])
def test_torchrun_ends_when_a_rank_dies_and_three_continue(tmp_path, torchrun, dies):
    flags = [*MODEL, "--checkpoint_steps", "20", "--max_steps", "90"]
    codes, _, err = torchrun(3, ["word_ptb", "kill", dies, 50, *flags, "--out", tmp_path / "parts"], timeout=120)
    assert codes == [[1], [1]]
    assert err.count("failed: a process of this run has ended or can no longer be reached; the last checkpoint") == 1
    assert "exitcode  : -9" in err
    resumed = ["word_ptb", "--resume", tmp_path / "parts" / "last.pt"]
    codes, _, err = torchrun(3, resumed, ["word_ptb", *flags, "--out", tmp_path / "whole"])
    assert codes == [[0, 0]] * 3, err
    assert_same(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.slow
def test_a_signal_from_outside_ends_all_ranks_with_a_checkpoint(tmp_path):
    program = str(PROJECT / "word_ptb" / "train.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", program]
    command += [*MODEL, "--epochs", "99", "--out", str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 100
        while not (tmp_path / "run" / "last.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert err.count("interrupted; the last checkpoint is kept; continue with: ") == 1
    assert checkpoint.load(tmp_path / "run" / "last.pt")["step"] > 0


TALK = """
import sys, torch
from trellisnet.errors import RunError, UserError
from trellisnet.training.distributed import Ranks, StepStatus
ranks = Ranks.of_environment()
ranks.join()
for raised in (UserError("nothing there"), OSError(28, "full", "x")):
    try:
        with ranks.agreed():
            if ranks.rank == 1:
                raise raised
    except (UserError, RunError, OSError) as e:
        print(type(e).__name__, e, file=sys.stderr)
value = {"a": [torch.arange(3), (torch.tensor(2.5), None)], "b": torch.zeros(0, 2), "c": torch.tensor([True])}
shared = ranks.share(value if ranks.first else None)
for index in range(4):
    finite = torch.tensor([ranks.first or index != at for at in range(4)])
    status = ranks.reduce_status(finite, late=ranks.first, signum=2 + ranks.rank)
    assert (status.finite_loss, status.finite_gradient, status.finite_state) == (index != 0, index != 1, index < 2)
    assert (status.late, status.signum) == (True, 3)
    status = ranks.reduce_status(torch.tensor([True, True]), late=False, signum=0)
    assert (status.finite, status.late, status.signum) == (True, False, 0)
print(shared, ranks.gather(ranks.rank), ranks.sum(0.5, ranks.rank), ranks.claims(), file=sys.stderr)
model = torch.nn.Linear(2, 1)
ranks.copy(model)
sums = ranks.gather(sum(p.sum().item() for p in model.parameters()))
assert sums[0] == sums[1]
ranks.leave()
"""


def test_values_that_ranks_exchange(tmp_path):
    said = [process.communicate(timeout=100)[1].splitlines() for process in started(tmp_path, 2, code=TALK)]
    assert said[0][:2] == ["UserError rank 1: nothing there", "RunError rank 1: full (x)"]
    assert said[1][:2] == ["UserError nothing there", "RunError full (x)"]
    value = "{'a': [tensor([0, 1, 2]), (tensor(2.5000), None)], 'b': tensor([], size=(0, 2)), 'c': tensor([True])}"
    assert {said[0][2], said[1][2]} == {f"{value} [0, 1] (1.0, 1) {claims}" for claims in (True, False)}


@pytest.mark.slow
def test_two_machines_are_one_run(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{port}", "--rdzv_id", "both"]
    command += [str(PROJECT / "word_ptb" / "train.py"), *MODEL, "--max_steps", "5", "--out", str(tmp_path / "run")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sum(text.count("test ppl ") for text in printed) == 1
    head = (tmp_path / "run" / "log.txt").read_text().splitlines()[0]
    assert "  torchrun --nnodes 2 --nproc_per_node 1 word_ptb/train.py --data synthetic" in head


@pytest.mark.slow
def test_an_error_of_the_first_ranks_folder_is_printed_once(tmp_path, torchrun):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "foreign").write_text("x")
    codes, _, err = torchrun(2, ["word_ptb", *MODEL, "--out", tmp_path / "run"])
    assert codes == [[2], [2]]
    assert err.count("error: ") == 1


# Each rank has its own working directory, as on a machine of its own, and rank 1 differs as the plan says.
DIFFERENT = """
import json, os, sys
import torch, trellisnet, numpy, word_ptb.train
from trellisnet.ops import compiled
plan, out = sys.argv[1:3]
rank = os.environ["RANK"]
os.chdir(f"{out}/{rank}")
codes = []
for (what, *argv), port in json.load(open(plan)):
    # Without torchrun rank 0 holds the store, and the other one must not find that of the program before.
    os.environ["MASTER_PORT"] = str(port)
    library, versions = compiled._library, [(m, m.__version__) for m in (torch, trellisnet, numpy)]
    if rank == "1" and what == "gates":
        compiled._library = lambda: "it has not been built"
    if rank == "1" and what == "versions":
        torch.__version__, trellisnet.__version__, numpy.__version__ = "1.0", "0.0.1", "0.9"
    if rank == "1" and what == "flags":
        argv += ["--lr", "7"]
    codes.append(word_ptb.train.main(argv))
    compiled._library = library
    for module, version in versions:
        module.__version__ = version
print(codes, file=sys.stderr)
"""


def test_ranks_that_differ_are_refused_by_name(tmp_path):
    """Other data, other sizes of splits with the same text in all, other weights, gates and versions."""
    text = "the cat sat on the mat\n" * 40
    splits = {"0": [text, text, text], "1": [text, text, text.replace("mat", "cat")]}
    model = TrellisLanguageModel(6, 8, 14, 3, output_size=8, weight_norm=False)
    for rank, texts in splits.items():
        for name, (train, valid, test) in {
            "same": [text] * 3,
            "other": texts,
            "moved": [text * 3, text * 2, text] if rank == "0" else [text * 2, text * 3, text],
        }.items():
            (tmp_path / rank / name).mkdir(parents=True)
            for split, content in zip(corpus.SPLITS, (train, valid, test), strict=True):
                (tmp_path / rank / name / f"{split}.txt").write_text(content)
        for path in ("same.pkl", "other.pkl"):
            with torch.no_grad():
                model.head.bias.fill_(float(rank) * (path == "other.pkl"))
            weights.save_weights(model, tmp_path / rank / path)
    flags = [*MODEL, "--batch_size", 2, "--no-download", "--max_steps", 1, "--out", tmp_path / "run", "--data"]
    score = [*MODEL, "--eval", "--data", "same", "--load_weight"]
    plan = [
        ["data", *flags, "other"],
        ["data", *flags, "moved"],
        ["data", *score, "same.pkl"],
        ["data", *score, "other.pkl"],
        ["data", *score, "other.pkl", "--data", "other"],
        ["versions", *flags, "same"],
        ["flags", *flags, "same"],
        ["gates", *flags, "same"],
    ]
    plan = [([str(flag) for flag in argv], port) for argv, port in zip(plan, free_ports(len(plan)), strict=True)]
    processes = started(tmp_path, 2, plan=plan, code=DIFFERENT)
    (_, err), (_, other) = (process.communicate(timeout=200) for process in processes)
    *lines, codes = [line for line in err.splitlines() if not line.startswith("warning: none of this is the Penn")]
    built = not compiled.reason_against(torch.device("cpu"), torch.float32, "lstm")
    assert json.loads(codes) == [2, 2, 0, 2, 2, 2, 2, 2 if built else 0], err
    assert other.splitlines() == [codes]
    host = platform.node()
    shas = {rank: corpus.digest(texts)[:16] for rank, texts in splits.items()}
    sums = {rank: serialization.sha256_of_file(tmp_path / rank / "other.pkl")[:16] for rank in splits}
    expected = [
        f"error: rank 1 on {host} has data sha256 {shas['1']}…; rank 0 on {host} has data sha256 "
        f"{shas['0']}…; give all ranks the same files",
        r"error: rank 1 on .* has data sizes \(560, 840, 280\); rank 0 on .* has data sizes \(840, 560, 280\); give .*",
        f"error: rank 1 on {host} has weights sha256 {sums['1']}…; rank 0 on .* has weights sha256 {sums['0']}…; .*",
        "error: rank 1 on .* has data sha256 .*, weights sha256 .*; rank 0 on .* has data sha256 .*; give .*",
        f"error: rank 1 on {host} has numpy 0.9, torch 1.0, trellisnet 0.0.1 .*; rank 0 on {host} has numpy "
        f"{numpy.__version__}, torch {re.escape(torch.__version__)}, trellisnet {trellisnet.__version__} .*; run .*",
        f"error: rank 1 on {host} has lr 7.0; rank 0 on {host} has lr 0.01; start all ranks with the same flags",
        *[f"error: rank 1 on {host} has gates eager; rank 0 on {host} has gates compiled; build .*"] * built,
    ]
    for line, pattern in zip(lines, expected, strict=True):
        assert re.fullmatch(pattern, line), line
    assert built == (not (tmp_path / "run").exists())


HANG = """
import os, sys, time
from trellisnet.training import watch
from trellisnet.training.distributed import Ranks, StepStatus
watch.LIMIT = 1.0
ranks = Ranks.of_environment()
ranks.join()
with ranks.watched():
    print(ranks.gather(os.getpid()), file=sys.stderr)
    for late in (1, 0):
        if ranks.rank == late:
            time.sleep(3)
        ranks.gather(None)
ranks.leave()
"""


@pytest.mark.slow
def test_a_rank_that_hangs_is_named(tmp_path):
    processes = started(tmp_path, 2, code=HANG)
    said = [process.communicate(timeout=100)[1].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    pids = json.loads(said[0][0])
    for rank, (_, first, *more) in enumerate(said):
        name = rf"rank {1 - rank} \({platform.node()}, pid {pids[1 - rank]}\)"
        waiting = rf"NOTICE: rank {rank} has been waiting for \d\.\d seconds"
        assert re.fullmatch(rf"{waiting} for {name}; .*", first), first
        for line in more:  # the other may arrive at the very moment of a look
            assert re.fullmatch(rf"{waiting} (for {name}|although all ranks have arrived); .*", line), line
        assert len(more) <= 2  # after about 1, 2 and, on a slow machine, 4 seconds
