"""Steps that are recorded and replayed. No device here records, so a stand-in calls the function again and copies its
results and gradients to where the recorded ones lie: everything but CUDA's own part runs as it does there."""

import contextlib
import json
from collections import Counter

import pytest
import torch
from torch import nn

import char_ptb.model
import pmnist.model
import word_ptb.model
import wt103.model
from pmnist.train import main as pmnist_main
from test_engine import Regression
from test_engine import run as fit_line
from trellisnet.training import engine
from trellisnet.training.config import RunConfig, parse
from trellisnet.training.graphs import WARM_UP, Recorded
from word_ptb.train import main as word_main

CUDA = torch.device("cuda")


class Player:
    """A recorder whose replays are calls. Recording computes nothing, so it restores the random numbers."""

    def __init__(self, parameters, counts):
        self.parameters, self.counts = parameters, counts

    @contextlib.contextmanager
    def beside(self):
        self.counts["eager"] += 1
        yield

    def record(self, function):
        state = torch.get_rng_state()
        results = function()
        gradients = [p.grad for p in self.parameters]
        torch.set_rng_state(state)
        self.counts["recorded"] += 1
        kept = [t for t in (*results, *gradients) if t is not None]
        for t in kept:
            t.detach().fill_(float("nan") if t.is_floating_point() else 0)

        def replay():
            self.counts["replayed"] += 1
            again = [*function(), *(p.grad for p in self.parameters)]
            for target, source in zip(kept, [t for t in again if t is not None], strict=True):
                target.detach().copy_(source.detach())

        return results, replay


@pytest.fixture
def counts(monkeypatch):
    """Numbers of recordings and replays of runs on the CPU with --cuda_graph on."""
    found = Counter()
    monkeypatch.setattr(RunConfig, "no_graph", lambda *_: "")
    monkeypatch.setattr(engine, "CUDARecorder", lambda device: None)
    monkeypatch.setattr(engine, "Recorded", lambda f, ps, _: Recorded(f, ps, Player(ps, found)))
    return found


def kept(folder):
    """The results of a run: its last weights and optimiser state, and all losses."""
    content = torch.load(folder / "last.pt", weights_only=True)["content"]
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    content["settings"].pop("cuda_graph", None)
    tensors = [*content["model"].values(), *(content["average"] or {}).values()]
    tensors += [t for state in content["optimizer"]["state"].values() for t in state.values() if t is not None]
    return tensors, [r["loss"] for r in records if r["event"] == "train"], content["rng"]["torch"]


def assert_same(ours, theirs):
    for a, b in zip(ours[0], theirs[0], strict=True):
        assert torch.equal(a, b)
    assert ours[1] == theirs[1]
    assert torch.equal(ours[2], theirs[2])


TEXT = """--data synthetic --emsize 8 --nhid 6 --nout 8 --nlevels 3 --horizon 40 --batch_size 50 --aux_freq 2
--log-interval 1 --max_eval_tokens 500 --epochs 1 --clip 0.2 --threads 1""".split()
IMAGES = """--data synthetic --preset small --nhid 8 --batch_size 4 --max_eval_tokens 16 --log-interval 1
--max_steps 9 --threads 1 --permutation_seed 3""".split()


@pytest.mark.parametrize(
    ("main", "flags"),
    [
        (word_main, [*TEXT, "--repack", "--seq_len", "0", "--lr", "5"]),
        (word_main, [*TEXT, "--repack", "--seq_len", "0", "--lr", "0.01", "--optim", "Adam", "--accumulate", "3"]),
        (word_main, [*TEXT, "--horizon", "20", "--seq_len", "50", "--lr", "5", "--n_experts", "2"]),
        (pmnist_main, IMAGES),
        (pmnist_main, [*IMAGES, *"--augment --ema 0.8 --label_smoothing 0.1 --schedule onecycle".split()]),
    ],
    ids=["carried", "accumulate", "history", "images", "recipe"],
)
def test_a_replayed_run_equals_the_run(main, flags, counts, tmp_path, capsys):
    for graph in ("off", "on"):
        assert main([*flags, "--out", str(tmp_path / graph), "--cuda_graph", graph]) == 0, capsys.readouterr().err
    assert_same(kept(tmp_path / "on"), kept(tmp_path / "off"))
    assert counts["recorded"] == 1
    assert counts["replayed"] > counts["eager"] >= WARM_UP
    if main is word_main:
        assert counts["eager"] > WARM_UP  # the last window of an epoch is a shorter one
    settings = json.loads((tmp_path / "on" / "config.json").read_text())["settings"]
    assert settings["cuda_graph"] == "on"


@pytest.mark.parametrize(
    ("flags", "depths"),
    [("--random_depth 1", 3), pytest.param("--grow 1:1 2:1 --epochs 3", 3, marks=pytest.mark.slow)],
)
def test_every_depth_has_a_recording(flags, depths, counts, tmp_path):
    flags = [*TEXT, *"--horizon auto --seq_len 44 --lr 5".split(), *flags.split()]
    for graph in ("off", "on"):
        assert word_main([*flags, "--out", str(tmp_path / graph), "--cuda_graph", graph]) == 0
    assert_same(kept(tmp_path / "on"), kept(tmp_path / "off"))
    assert counts["recorded"] == depths
    assert counts["replayed"] > counts["eager"] >= depths * WARM_UP


def test_a_replayed_run_is_continued(counts, tmp_path, capsys):
    flags = [*TEXT, "--repack", "--seq_len", "0", "--lr", "5", "--cuda_graph", "on"]
    assert word_main([*flags, "--out", str(tmp_path / "whole")]) == 0
    assert word_main([*flags, "--out", str(tmp_path / "run"), "--max_steps", "7"]) == 0
    assert word_main(["--resume", str(tmp_path / "run" / "last.pt"), "--max_steps", "0"]) == 0, capsys.readouterr().err
    ours, theirs = kept(tmp_path / "run"), kept(tmp_path / "whole")
    assert_same((ours[0], [], ours[2]), (theirs[0], [], theirs[2]))


def test_a_replayed_run_skips_a_step_that_is_not_finite(counts, tmp_path):
    weights = []
    for graph in ("off", "on"):
        # While it records, the function is called once more.
        task = Regression(bad_at=[9 + (graph == "on")])
        fit_line(tmp_path / graph, task=task, skip_bad_steps=1, cuda_graph=graph)
        weights.append([p.detach().clone() for p in task.model.parameters()])
    assert counts["replayed"] > 5
    for a, b in zip(*weights, strict=True):
        assert torch.equal(a, b)


def test_one_shape_is_recorded_and_others_are_computed():
    model, found = nn.Linear(3, 1), Counter()

    def function(batch, carry):
        model.zero_grad()
        total = model(batch[0]).sum() + (0 if carry is None else carry[0].sum())
        total.backward()
        return total, batch[0].sum(0)

    recorded = Recorded(function, model.parameters(), Player(list(model.parameters()), found))
    for call in range(12):
        x, carry = torch.randn(2 + call % 2, 3), (torch.randn(2),) if call % 3 else None
        total, last = recorded((x,), carry)
        assert not total.requires_grad
        assert torch.equal(last, x.sum(0))
        assert torch.equal(model.weight.grad, x.sum(0, keepdim=True))
        torch.testing.assert_close(total, model(x).sum().detach() + (0 if carry is None else carry[0].sum()))
    assert found["recorded"] == found["replayed"] == 1
    x = torch.randn(2, 3)
    _, last = recorded((x,), (torch.randn(2),))
    recorded((torch.randn(2, 3),), (torch.randn(2),))
    assert found["replayed"] == 3
    assert torch.equal(last, x.sum(0))  # results are the caller's


def test_what_cannot_be_recorded_fails_in_one_line(counts, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(Player, "record", refuse)
    code = word_main([*TEXT, "--out", str(tmp_path / "run"), "--cuda_graph", "on"])
    err = capsys.readouterr().err
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith(
        "failed: a step cannot be recorded as a CUDA graph (CUDA error: operation not permitted when stream is "
        "capturing); pass --cuda_graph off; "
    )

    # A recording that breaks off complains over what broke it.
    for error, line in (
        (torch.OutOfMemoryError("CUDA out of memory"), "failed: out of memory; "),
        (
            RuntimeError("a copy from the CPU"),
            "failed: a step cannot be recorded as a CUDA graph (a copy from the CPU)",
        ),
    ):

        def broken(*_, error=error):
            try:
                raise error
            finally:
                raise RuntimeError("capture_end: the capture was invalidated")

        def alone(*_, error=error):
            raise error

        for record in (broken, alone):
            monkeypatch.setattr(Player, "record", record)
            assert word_main([*TEXT, "--out", str(tmp_path / "run"), "--overwrite", "--cuda_graph", "on"]) == 1
            assert capsys.readouterr().err.startswith(line)


@pytest.mark.parametrize(
    ("config", "flags", "reason"),
    [
        (word_ptb.model, [], ""),
        (char_ptb.model, [], ""),
        (pmnist.model, [], ""),
        (wt103.model, [], "the bands of the softmax are sorted on the CPU"),
        (wt103.model, ["--cutoffs", "0"], ""),
        (word_ptb.model, ["--model", "awd-lstm"], "--model awd-lstm is not recorded"),
        (char_ptb.model, ["--random_length"], "--random_length makes windows of many shapes"),
    ],
)
def test_where_steps_are_recorded(config, flags, reason, monkeypatch):
    settings, _ = parse(config.Config, flags)
    assert settings.no_graph(CUDA) == reason
    for name, value in {"TORCHELASTIC_RUN_ID": "1", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    for size in ("1", "2"):  # a single process of torchrun trains alone
        monkeypatch.setenv("WORLD_SIZE", size)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", size)
        alone = settings.no_graph(CUDA) == reason
        assert alone == (size == "1")
    assert settings.no_graph(torch.device("cpu")) == "needs a CUDA device, got cpu"


def test_graphs_are_refused_without_a_cuda_device(tmp_path, capsys):
    assert word_main([*TEXT, "--out", str(tmp_path / "run"), "--device", "cpu", "--cuda_graph", "on"]) == 2
    error = "error: --cuda_graph on: needs a CUDA device, got cpu; pass auto or off\n"
    assert capsys.readouterr().err == error
    assert word_main([*TEXT, "--out", str(tmp_path / "run"), "--device", "cpu", "--max_steps", "1"]) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["settings"]["cuda_graph"] == "off"
