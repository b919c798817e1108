"""Runs that are killed or interrupted and continued end bit-equal to uninterrupted ones."""

import functools
import json
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from trellisnet.data import synthetic
from trellisnet.training import checkpoint
from trellisnet.training.config import PROJECT
from trellisnet.training.engine import Trainer
from trellisnet.training.interrupts import Interrupted
from trellisnet.training.runlog import alone, runnable
from word_ptb.train import main

MODEL = """--data synthetic --emsize 8 --nhid 6 --nout 8 --nlevels 3 --horizon 3 --seq_len 13 --batch_size 50
--aux_freq 2 --log-interval 20 --threads 1 --max_eval_tokens 2000 --epochs 2""".split()
MODES = {
    "sgd": "--lr 5",
    "adam": "--optim Adam --lr 0.01",
    "asgd": "--asgd --anneal 1 --optim Adam --lr 0.03 --epochs 5 --data",  # on text that it gets worse at
    "repack": "--repack --seq_len 0 --horizon 25 --lr 5",
    "mixture": "--n_experts 2 --lr 5 --accumulate 2",
}
# Runs main, and a second signal comes while the first one's checkpoint is written.
TWICE = """
import os, signal, sys
from trellisnet.training.engine import Trainer
from word_ptb.train import main
step, save = Trainer._step, Trainer._save
def signalled(self, batch):
    out = step(self, batch)
    if self.step == 13:
        os.kill(os.getpid(), signal.SIGINT)
    return out
def saved(self, best):
    os.kill(os.getpid(), signal.SIGTERM)
    save(self, best)
Trainer._step, Trainer._save = signalled, saved
sys.exit(main(sys.argv[1:]))
"""
# Runs main with a signal to itself after a number of updates, in the middle of the loop.
CHILD = """
import os, sys
from trellisnet.training.engine import Trainer
from word_ptb.train import main
at, signum, step = int(sys.argv[1]), int(sys.argv[2]), Trainer._step
def signalled(self, batch):
    out = step(self, batch)
    if self.step == at:
        os.kill(os.getpid(), signum)
    return out
Trainer._step = signalled
sys.exit(main(sys.argv[3:]))
"""


def interrupted(at, signum, *argv):
    command = [sys.executable, "-c", CHILD, str(at), str(int(signum)), *map(str, argv)]
    hear = functools.partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, preexec_fn=hear)


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def outcome(folder):
    weights = torch.load(folder / "weights.pkl", weights_only=True)
    last = checkpoint.load(folder / "last.pt")
    return weights, last


def epochs_of(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [r for r in records if r["event"] == "epoch"]


def assert_same(ours, theirs):
    assert all(torch.equal(ours[0][name], theirs[0][name]) for name in theirs[0])
    assert all(torch.equal(ours[1]["model"][name], theirs[1]["model"][name]) for name in theirs[1]["model"])
    for key in ("step", "epoch", "best", "schedule"):
        assert ours[1][key] == theirs[1][key]


def text_to_get_worse_at(folder):
    """Validation lines read backwards: the better the training text is learned, the worse they are predicted."""
    folder.mkdir()
    lines = synthetic.texts()[0].splitlines()[:2000]
    (folder / "train.txt").write_text("\n".join(lines) + "\n")
    for split in ("valid", "test"):
        (folder / f"{split}.txt").write_text("\n".join(" ".join(line.split()[::-1]) for line in lines[:600]) + "\n")
    return str(folder)


@pytest.mark.parametrize(
    "mode", [mode if mode == "repack" else pytest.param(mode, marks=pytest.mark.slow) for mode in MODES]
)
def test_killed_twice_at_any_step_it_ends_bit_equal(tmp_path, mode):
    argv = [*MODEL, *MODES[mode].split()]
    if mode == "asgd":
        argv.append(text_to_get_worse_at(tmp_path / "text"))
    assert main([*argv, "--out", str(tmp_path / "whole")]) == 0
    whole = outcome(tmp_path / "whole")
    assert whole[1]["schedule"]["averaging"] == (mode == "asgd")
    first, second = sorted(random.Random(mode).sample(range(8, whole[1]["step"] - 1), 2))

    out = ["--out", tmp_path / "parts"]
    assert interrupted(first, signal.SIGKILL, *argv, *out, "--checkpoint_steps", 7).returncode == -signal.SIGKILL
    assert checkpoint.load(tmp_path / "parts" / "last.pt")["step"] <= first
    resumed = interrupted(second, signal.SIGKILL, *out, "--resume", "--checkpoint_steps", 7)
    assert resumed.returncode == -signal.SIGKILL, resumed.stderr
    assert main(["--out", str(tmp_path / "parts"), "--resume"]) == 0
    assert_same(outcome(tmp_path / "parts"), whole)


@pytest.mark.parametrize(
    ("signum", "code"),
    [
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow),
    ],
)
def test_a_signal_writes_a_checkpoint_and_prints_how_to_continue(tmp_path, signum, code):
    argv = [*MODEL, "--lr", "5"]
    stopped = interrupted(13, signum, *argv, "--out", tmp_path / "parts")
    assert stopped.returncode == code
    last = tmp_path / "parts" / "last.pt"
    way_on = runnable("word_ptb/train.py", ["--resume", str(last)])
    way_out = f"no epoch is finished; score and save the weights as they are with: {way_on} --max_steps 1"
    assert stopped.stderr.splitlines() == [
        f"interrupted; the last checkpoint is kept; continue with: {way_on}",
        *([] if (last.parent / "weights.pkl").exists() else [way_out]),
    ]
    assert checkpoint.load(last)["step"] == 13
    assert main(["--resume", str(last)]) == 0
    assert main([*argv, "--out", str(tmp_path / "whole")]) == 0
    assert_same(outcome(tmp_path / "parts"), outcome(tmp_path / "whole"))
    ours, theirs = ([r["train_loss"] for r in epochs_of(tmp_path / out)] for out in ("parts", "whole"))
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.slow
def test_a_signal_from_outside_is_handled_at_any_moment(tmp_path):
    command = [sys.executable, str(PROJECT / "word_ptb" / "train.py"), *MODEL, "--epochs", "99", "--out", "run"]
    options = {"cwd": tmp_path, "stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command, **options) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "run" / "last.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert err.startswith("interrupted; the last checkpoint is kept")
    assert err.count("\n") == 1
    assert checkpoint.load(tmp_path / "run" / "last.pt")["step"] > 0


@pytest.mark.parametrize("schedule", ["step", "cosine"])
def test_a_run_whose_rate_is_planned_has_no_way_out(tmp_path, capsys, monkeypatch, schedule):
    def stopped(trainer, resume_from=None):
        trainer._save(best=False)
        raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr(Trainer, "fit", stopped)
    assert main([*MODEL, "--schedule", schedule, "--out", str(tmp_path / "run")]) == 143
    assert ("no epoch is finished; score and save" in capsys.readouterr().err) == (schedule == "step")


@pytest.mark.parametrize(
    "flags", [("--checkpoint_steps", "4"), pytest.param(("--checkpoint_minutes", "1e-9"), marks=pytest.mark.slow)]
)
def test_checkpoints_come_by_steps_and_by_minutes(tmp_path, flags):
    died = interrupted(9, signal.SIGKILL, *MODEL, "--lr", "5", "--out", tmp_path / "run", *flags)
    assert died.returncode == -signal.SIGKILL
    assert checkpoint.load(tmp_path / "run" / "last.pt")["step"] == 8


@pytest.mark.parametrize("windows", ["--max_steps 1", "--max_steps 3 --repack --seq_len 0 --horizon 7"])
def test_slices_of_a_batch_give_its_gradient(tmp_path, windows):
    """Updates in three slices equal those of undivided batches; without dropout, whose masks each slice draws anew."""
    argv = [*MODEL, *windows.split(), *"--lr 5 --clip 0".split()]
    argv += "--dropout 0 --dropouti 0 --dropouth 0 --emb_dropout 0 --wdrop 0".split()
    for slices in ("1", "3"):
        assert main([*argv, "--out", str(tmp_path / slices), "--accumulate", slices]) == 0
    a, b = (outcome(tmp_path / slices)[1]["model"] for slices in ("1", "3"))
    for name in a:
        assert (a[name] - b[name]).abs().max() <= 1e-6 * max(1.0, a[name].abs().max().item())


def test_a_second_signal_does_not_interrupt_the_checkpoint(tmp_path):
    command = [sys.executable, "-c", TWICE, *MODEL, "--lr", "5", "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert done.stderr.startswith("interrupted; the last checkpoint is kept")
    assert checkpoint.load(tmp_path / "run" / "last.pt")["step"] == 13


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run cut short in its second epoch, with best.pt, last.previous.pt and last.pt; and the uninterrupted run."""
    folder, argv = tmp_path_factory.mktemp("trained"), [*MODEL, "--lr", "5", "--checkpoint_steps", "7"]
    assert main([*argv, "--out", str(folder / "whole")]) == 0
    steps = checkpoint.load(folder / "whole" / "last.pt")["step"] // 2
    assert main([*argv, "--out", str(folder / "run"), "--max_steps", str(steps + 9)]) == 0
    return folder / "run", outcome(folder / "whole")


@pytest.fixture
def cut(trained, tmp_path):
    """The two of `trained`; the first is a copy."""
    run, whole = trained
    return shutil.copytree(run, tmp_path / "run"), whole


@pytest.mark.parametrize("gone", [["last.pt"], ["last.pt", "last.previous.pt"]])
@pytest.mark.parametrize("damage", ["changed", "cut", "missing"])
def test_a_corrupt_checkpoint_is_replaced_by_the_previous_one(cut, capsys, gone, damage):
    folder, whole = cut
    assert len({checkpoint.load(folder / name)["step"] for name in ("last.pt", "last.previous.pt", "best.pt")}) == 3
    for name in gone:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 4
        (folder / name).unlink()  # the names may stand for one file
        if damage != "missing":
            (folder / name).write_bytes(content if damage == "changed" else content[:1000])
    capsys.readouterr()
    assert main(["--resume", str(folder / "last.pt"), "--max_steps", "0"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("NOTICE: ")]
    instead = "best.pt" if len(gone) == 2 else "last.previous.pt"
    assert line.startswith(f"NOTICE: {folder / 'last.pt'}: ")
    assert f"; continuing from {instead}, step " in line
    assert line in (folder / "log.txt").read_text()
    assert_same(outcome(folder), whole)


def test_lack_of_an_intact_checkpoint_is_one_line(cut, capsys):
    folder, _ = cut
    for name in ("last.pt", "last.previous.pt", "best.pt"):
        (folder / name).unlink()
        (folder / name).write_bytes(b"x" * 5000)
    capsys.readouterr()
    assert main(["--resume", str(folder / "last.pt")]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {folder / 'last.pt'}: not a checkpoint of a run")
    assert err.count("\n") == 1


def test_a_checkpoint_beside_the_settings_of_another_run_is_refused(cut, capsys):
    folder, _ = cut
    config = json.loads((folder / "config.json").read_text())
    config["settings"]["seed"] = 7
    (folder / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert main(["--resume", str(folder / "last.pt")]) == 2
    assert capsys.readouterr().err == (
        f"error: {folder / 'config.json'}: says seed 7, the checkpoint beside it 1111; put the files of one run "
        "together, or delete this one if it is corrupt\n"
    )
    (folder / "config.json").write_text("{")
    assert main(["--resume", str(folder / "last.pt"), "--max_steps", "1"]) == 0


def test_a_run_without_effect_of_averaging_that_an_earlier_version_started_is_continued(cut):
    folder, _ = cut
    content = checkpoint.load(folder / "last.pt")
    content["settings"] |= {"asgd": True, "anneal": 0}
    checkpoint.save(folder / "last.pt", content)
    (folder / "config.json").unlink()
    assert main(["--resume", str(folder / "last.pt"), "--max_steps", "1"]) == 0


def test_one_process_per_folder(tmp_path, capsys):
    argv = [*MODEL, "--lr", "5", "--max_steps", "3", "--out", str(tmp_path / "run")]
    assert main(argv) == 0
    capsys.readouterr()
    with alone(tmp_path / "run"):
        for flags in (argv, [*argv, "--overwrite"], ["--resume", str(tmp_path / "run" / "last.pt")]):
            assert main(flags) == 2
            err = capsys.readouterr().err
            assert err.startswith(f"error: {tmp_path / 'run'}: another process is at work there; wait for it")
            assert err.count("\n") == 1
    assert main(["--resume", str(tmp_path / "run" / "last.pt"), "--max_steps", "4"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("threads", ["1", "2"])
def test_deterministic_runs_are_bit_equal(tmp_path, threads):
    argv = [*MODEL, "--lr", "5", "--max_steps", "12", "--deterministic", "--threads", threads]
    for out in ("a", "b"):
        code = f"import sys; from word_ptb.train import main; sys.exit(main({[*argv, '--out', str(tmp_path / out)]}))"
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert_same(outcome(tmp_path / "a"), outcome(tmp_path / "b"))
