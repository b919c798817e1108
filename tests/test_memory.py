"""scripts/memory.py: the copy task and the adding problem."""

import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from scripts import memory
from scripts.reports.tables import MEMORY
from trellisnet.errors import UserError
from trellisnet.models import count_parameters
from trellisnet.training.config import PROJECT, parse
from trellisnet.training.distributed import Ranks


def test_the_targets_of_copying_are_the_first_digits():
    x, y = memory.copy_examples(3, 7, np.random.default_rng(0))
    assert x.shape == (3, 27, 1)
    assert y.shape == (3, 27)
    digits = x[:, :10, 0]
    assert digits.min() >= 1
    assert digits.max() <= 8
    assert (x[:, 10:16] == 0).all()
    assert (x[:, 16:] == 9).all()
    assert (y[:, :-10] == 0).all()
    assert torch.equal(y[:, -10:], digits)  # 17 = T + 10 steps after they were read


def test_the_target_of_adding_is_the_sum_of_two_different_numbers():
    x, y = memory.adding_examples(500, 6, np.random.default_rng(0))
    marks = x[:, :, 1]
    assert (marks.sum(1) == 2).all()
    assert marks.unique().tolist() == [0, 1]
    assert_close(y, torch.stack([row[mark == 1].sum() for row, mark in zip(x[:, :, 0], marks, strict=True)]))
    assert len({tuple(row.nonzero().flatten().tolist()) for row in marks}) == 15  # every pair of places
    assert abs(((y - 1) ** 2).mean().item() - memory.chance("adding", 6)) < 0.02


def test_chance_is_the_loss_of_a_network_that_guesses_the_digits():
    logits = torch.full((1, 27, 10), -1e4)
    logits[:, :17, 0] = 0
    logits[:, 17:, 1:9] = 0
    _, y = memory.copy_examples(1, 7, np.random.default_rng(0))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.long().flatten())
    assert_close(loss.item(), memory.chance("copy", 7))
    assert_close(memory.chance("copy", 1000), 10 * math.log(8) / 1020)


@pytest.mark.parametrize("preset", ["default", "adding"])
def test_all_networks_have_the_same_size(preset):
    def size(model):
        config, _ = parse(memory.Config, ["--preset", preset, "--model", model])
        return count_parameters(memory.build_model(config))

    ours, *others = (size(model) for model in ("trellisnet", "awd-lstm", "tcn", "rhn"))
    assert all(abs(other / ours - 1) < 0.02 for other in others)


@pytest.fixture
def run(tmp_path, capsys):
    def call(*flags):
        out = tmp_path / "run"
        argv = [*flags, "--threads", 1, "--out", out, "--overwrite", "--metrics", tmp_path / "metrics.json"]
        threads = torch.get_num_threads()
        code = memory.main([str(argument) for argument in argv])
        torch.set_num_threads(threads)
        printed = capsys.readouterr()
        return code, printed, json.loads((tmp_path / "metrics.json").read_text()) if code == 0 else None

    return call


def test_a_trellis_learns_to_copy_within_its_receptive_field(run):
    flags = "--length 2 --nlevels 4 --dilation 4 --nhid 24 --examples 1500 --epochs 4 --lr 0.03".split()
    code, printed, metrics = run(*flags)
    assert code == 0, printed
    assert "loss by chance 0.9452" in printed.out
    assert metrics["test"]["accuracy"] > 0.9
    assert metrics["test"]["examples"] == 1000
    assert (metrics["problem"], metrics["length"], metrics["receptive_field"]) == ("copy", 2, 17)
    assert metrics["chance"] == memory.chance("copy", 2)


def test_too_small_a_receptive_field_gives_a_notice(run):
    flags = "--length 30 --nlevels 2 --dilation 4 --examples 64 --max_steps 1 --max_eval_tokens 1".split()
    code, printed, _ = run(*flags)
    assert code == 0
    assert "the model sees 9 steps, too few to reach what it must remember, 40 steps back" in printed.out.splitlines()
    assert "too few" not in run(*flags, "--nlevels", 10)[1].out


@pytest.mark.parametrize("model", ["trellisnet", "awd-lstm", "tcn", "rhn"])
def test_every_network_adds(run, model):
    flags = ["--preset", "adding", "--model", model, "--length", 12, "--examples", 64, "--epochs", 1]
    code, printed, metrics = run(*flags, "--nhid", 8, "--max_eval_tokens", 200)
    assert code == 0, printed
    assert metrics["test"]["mse"] == metrics["test"]["loss"] < 10


def test_a_plateau_divides_the_rate():
    config = memory.Config(schedule="step", anneal=1, lr=1.0, examples=32, length=4, dilation=[7])
    schedule = memory.setup(config, torch.device("cpu"), Ranks())[2]
    assert [schedule.step(epoch, 1.0 + epoch) for epoch in (1, 2, 3)] == [1.0, 1.0, 0.25]


@pytest.mark.parametrize("problem", ["copy", "adding"])
def test_a_rank_that_a_signal_stops_at_once_has_no_mean(problem):
    config, _ = parse(memory.Config, ["--problem", problem, "--examples", "1", "--length", "2", "--dilation", "1"])
    task, splits, *_ = memory.setup(config, torch.device("cpu"), Ranks())
    result = task.evaluate(splits.valid, progress=lambda batches, total: ())
    assert (math.isnan(result["loss"]), math.isnan(result[task.score_name]), result["examples"]) == (True, True, 0)


def test_data_folders_are_refused(run):
    code, printed, _ = run("--data", "somewhere")
    assert (code, printed.err.count("\n")) == (2, 1)
    assert printed.err.startswith("error: --data somewhere: expected synthetic")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--label_smoothing 0.1", "--label_smoothing: has no effect on these problems; leave it out"),
        ("--mc_dropout 2", "--mc_dropout: has no effect on these problems; leave it out"),
        ("--preset adding --length 1", "--length 1: two numbers are added; expected at least 2"),
    ],
)
def test_settings_without_a_meaning_are_refused(flags, message):
    with pytest.raises(UserError) as e:
        parse(memory.Config, flags.split())
    assert str(e.value) == message


def test_an_equilibrium_remembers_too(run):
    flags = "--length 3 --dilation 1 --equilibrium --tolerance 0.5 --examples 64 --max_steps 1 --max_eval_tokens 1"
    code, printed, _ = run(*flags.split())
    assert code == 0, printed


def test_every_row_of_the_script_is_a_command_of_this_program():
    text = (PROJECT / "scripts" / "memory.sh").read_text()
    rows = dict(re.findall(r"^(\w+)\(\) { train memory (.*); }$", text, re.MULTILINE))
    assert set(text.replace("\\\n", " ").rsplit("\nrows ", 1)[1].split()) == set(rows)
    assert {row.partition("_")[2] for row in rows} == set(MEMORY)
    for row, flags in rows.items():
        config, _ = parse(memory.Config, flags.split())
        assert config.problem == row.partition("_")[0]
        recipe = config.recipe()
        needed = config.size() + 11 if config.problem == "copy" else config.size()
        assert ((recipe["receptive_field"] or math.inf) < needed) == row.endswith("_short")


@pytest.mark.slow
def test_the_script_trains_a_row(tmp_path):
    environment = os.environ | {"PY": sys.executable, "OMP_NUM_THREADS": "1", "SMOKE": "1", "ROWS": "copy_rhn"}
    command = ["bash", str(PROJECT / "scripts" / "memory.sh")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "memory copy_rhn, seed 1111: python scripts/memory.py --preset rhn" in done.stdout
    metrics = json.loads((PROJECT / "runs/smoke/memory/copy_rhn/seed-1111/metrics.json").read_text())
    assert (metrics["problem"], metrics["length"], metrics["steps"]) == ("copy", 20, 2)
