"""pmnist and cifar10 from the command line, on synthetic images."""

import hashlib
import json
import re
import signal
import warnings

import numpy as np
import pytest
import torch

import cifar10.train
import word_ptb.train
from trellisnet.data import pixels
from trellisnet.models import TrellisClassifier, count_parameters
from trellisnet.training import checkpoint, programs
from trellisnet.training.classification import DILATION
from trellisnet.training.config import PROJECT, build_parser, parse
from trellisnet.training.engine import Trainer
from trellisnet.training.runlog import runnable
from trellisnet.weights import save_weights

SMALL = """--data synthetic --nhid 4 --nlevels 11 --batch_size 50 --epochs 2 --max_steps 60 --lr 0.01 --dropouti 0
--dropout 0 --wdrop 0 --dropouth 0 --log-interval 20 --max_eval_tokens 200 --threads 1""".split()
TASKS = {task: programs.get(task) for task in ("pmnist", "cifar10")}


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(tmp_path, capsys):
    def call(*argv, task="pmnist", out="run", base=True):
        metrics = tmp_path / "metrics.json"
        metrics.unlink(missing_ok=True)
        code = TASKS[task].main(
            [str(a) for a in (*(SMALL if base else ()), "--out", tmp_path / out, "--metrics", metrics, *argv)]
        )
        printed = capsys.readouterr()
        return code, printed.out, printed.err, json.loads(metrics.read_text()) if metrics.exists() else None

    return call


@pytest.mark.parametrize("task", TASKS)
def test_train_resume_and_score(run, tmp_path, task):
    steps, cut = {"pmnist": (40, 23), "cifar10": (6, 3)}[task]
    code, out, err, whole = run("--max_steps", steps, task=task)
    assert (code, err) == (0, "")
    if task == "pmnist":
        assert whole["test"]["accuracy"] > 0.15  # of ten classes
    assert whole["test"]["examples"] == 256
    assert set(whole["valid"]) == {"loss", "accuracy", "examples", "partial"}
    assert re.search(r"^epoch +1.*  lr 0.01  train accuracy 0\.\d{4}  valid accuracy 0\.\d{4}.* seq/s$", out, re.M)
    assert re.search(r"^test accuracy 0\.\d{4}  loss [\d.]+ nats  256 examples \(partial\)$", out, re.M)
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    length = {"pmnist": 784, "cifar10": 1024}[task]
    if task == "pmnist":
        order = torch.tensor(stored["permutation"])
        assert sorted(order.tolist()) == list(range(length)) != order.tolist()
        assert whole["vocabulary"] == hashlib.sha256(order.numpy()).hexdigest()
    else:
        assert "permutation" not in stored

    run("--max_steps", cut, task=task, out="parts")
    code, _, err, parts = run("--resume", "--max_steps", steps, task=task, out="parts")
    assert (code, err) == (0, "")
    weights = [torch.load(tmp_path / out / "weights.pkl", weights_only=True) for out in ("run", "parts")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert list(weights[0])[-2:] == ["linear.weight", "linear.bias"]
    assert parts["test"] == whole["test"]

    scored = run("--eval", "--load_weight", tmp_path / "run" / "weights.pkl", task=task, out="unused")[3]
    assert scored["test"] == whole["test"]
    again = run("--eval", "--load_weight", tmp_path / "run" / "weights.pkl", "--eval_batch_size", "7", task=task)[3]
    assert again["test"]["accuracy"] == pytest.approx(whole["test"]["accuracy"], abs=0.1)  # of 203 examples, not 256


def test_weights_of_another_permutation_are_refused(run, tmp_path):
    run("--max_steps", "2")
    weights = tmp_path / "run" / "weights.pkl"
    for other in (["--no-permute"], ["--permutation_seed", "7"]):
        code, _, err, _ = run("--eval", "--load_weight", weights, *other)
        assert code == 2
        assert "another order of the pixels" in err
    code, _, err, _ = run("--resume", "--permutation_seed", "7")
    assert code == 2
    assert "--permutation_seed 7: the run in" in err
    assert run("--eval", "--load_weight", weights, "--seed", "5")[0] == 0  # --seed does not determine the permutation


def test_more_slices_than_rows_in_the_last_batch(run):
    """With 2,700 images the last batch has one."""
    flags = ("--batch_size", "2699", "--accumulate", "8", "--max_steps", "2", "--nlevels", "2", "--dilation", "400")
    code, _, err, metrics = run(*flags)
    assert (code, err) == (0, "")
    assert metrics["steps"] == 2


def test_files_of_another_task_are_refused_by_name(run, tmp_path, capsys):
    run("--max_steps", "1")
    folder = tmp_path / "run"
    weights, last = str(folder / "weights.pkl"), folder / "last.pt"
    code, _, err, _ = run("--eval", "--load_weight", weights, task="cifar10")
    assert code == 2
    assert "weights.pkl: holds weights of pmnist, not of cifar10; load them with pmnist/train.py" in err
    before = last.read_bytes()
    assert cifar10.train.main(["--resume", str(last)]) == 2
    way = f"belongs to a run of pmnist; continue it with {runnable('pmnist/train.py', ['--resume', str(last)])}"
    assert capsys.readouterr().err == f"error: {last}: {way}\n"
    assert last.read_bytes() == before
    assert cifar10.train.main(["--config", str(folder / "config.json"), "--out", str(tmp_path / "new")]) == 2
    assert "config.json: holds settings of pmnist, not of cifar10" in capsys.readouterr().err
    assert word_ptb.train.main(["--data", "synthetic", "--preset", "tiny", "--eval", "--load_weight", weights]) == 2
    assert "holds weights of pmnist, not of word_ptb" in capsys.readouterr().err


@pytest.mark.parametrize("augment", [False, True], ids=["plain", "augment"])
@pytest.mark.parametrize("task", TASKS)
def test_batches_need_no_copy_to_the_device(task, augment):
    """A tensor made from Python numbers would be copied to the device, and synchronise with it, in every step."""
    config, _ = parse(TASKS[task].config_class, [*SMALL[:10], *(["--augment"] if augment else [])])
    task, splits, *_ = TASKS[task].setup(config, torch.device("cpu"))
    batches = task.batches(splits.train)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        inputs, _ = batches[0]
    assert "aten::lift_fresh" not in {event.key for event in profile.key_averages()}
    assert inputs.shape[0] == 50
    mean, std = config.mean, config.std
    order = np.random.default_rng([config.seed, 0]).permutation(len(splits.train[1]))[:50]
    stored = splits.train[0][torch.from_numpy(order)]
    if augment:
        random = np.random.default_rng([config.seed, 0, 1])
        stored = config.augmentation(stored, config.augmentation.draw(len(splits.train[1]), random)[:50])
    if config.permute:
        stored = stored[:, pixels.permutation(stored.shape[1], config.permutation_seed)]
    torch.testing.assert_close(inputs, pixels.normalise(stored, mean, std), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*MNIST")
def test_without_validation_the_last_epoch_is_scored(run, tmp_path):
    folder, draw = tmp_path / "tiny", np.random.default_rng(0)
    folder.mkdir()
    for split, n in (("train", 60), ("t10k", 20)):
        for kind, array in (
            ("images-idx3", draw.integers(256, size=(n, 5, 5), dtype=np.uint8)),
            ("labels-idx1", draw.integers(10, size=n, dtype=np.uint8)),
        ):
            (folder / f"{split}-{kind}-ubyte").write_bytes(pixels.idx_header(array) + array.tobytes())
    argv = ("--data", folder, "--no-validation", "--max_eval_tokens", "0")
    code, out, _, metrics = run(*argv, "--max_steps", "0")
    assert code == 0
    assert metrics["valid"] is None
    assert (metrics["best_epoch"], metrics["epochs"], metrics["complete"]) == (2, 2, True)
    assert "60 training images, 25 pixels" in out
    assert not re.search("^valid|valid accuracy", out, re.M)
    code, _, _, scored = run(*argv, "--eval", "--load_weight", tmp_path / "run" / "weights.pkl")
    assert code == 0
    assert scored["valid"] is None
    assert scored["test"] == metrics["test"]
    assert scored["test"]["examples"] == 20


def test_a_model_that_does_not_see_the_whole_image_gives_a_warning(run):
    with warnings.catch_warnings(action="default"):
        code, _, err, _ = run("--nlevels", "2", "--dilation", "1", "--max_steps", "1")
    assert code == 0
    assert err == "warning: the model sees only the last 3 of 784 pixels; raise --nlevels\n"


@pytest.mark.parametrize(
    ("task", "preset", "size", "steps"),
    [
        ("pmnist", "default", 137_910, (1_571, 8_624)),
        ("pmnist", "paper", 99_110, (4_831, 12_544)),
        ("pmnist", "8m", 8_020_110, (4_831, 12_544)),
        ("pmnist", "small", 137_910, (1_571, 8_624)),
        ("pmnist", "best", 137_910, (1_571, 8_624)),
        ("pmnist", "gpu", 2_010_110, (1_571, 8_624)),
        ("cifar10", "default", 139_990, (2_047, 11_264)),
        ("cifar10", "paper", 100_870, (6_222, 16_384)),
        ("cifar10", "8m", 8_036_110, (6_222, 16_384)),
        ("cifar10", "small", 139_990, (2_047, 11_264)),
        ("cifar10", "best", 139_990, (2_047, 11_264)),
        ("cifar10", "gpu", 2_018_110, (2_047, 11_264)),
    ],
)
def test_sizes_and_layer_steps(task, preset, size, steps):
    program = TASKS[task]
    config, _ = parse(program.config_class, ["--preset", preset])
    model = program.build_model(config, {"pmnist": 1, "cifar10": 3}[task], 10)
    assert count_parameters(model) == size
    length = {"pmnist": 784, "cifar10": 1024}[task]
    assert (model.core.layer_steps(length, last_only=True), model.core.layer_steps(length)) == steps
    assert model.core.receptive_field >= length


@pytest.mark.parametrize("task", TASKS)
def test_defaults_are_those_of_the_authors_script(task):
    config = TASKS[task].config_class
    c = parse(config, [])[0]
    released = {
        "nhid": 120, "lr": 4e-3, "clip": 0.5, "epochs": 200, "batch_size": 64, "nlevels": 11, "dropout": 0.1,
        "dropouti": 0.2, "wdrop": 0.1, "dropouth": 0.2, "wdecay": 0, "seed": 1111, "anneal": 10, "cuda": True,
        "wnorm": True, "temporalwdrop": True, "optim": "Adam", "aux": 0, "aux_freq": 1e4, "log_interval": 100,
        "when": [50, 75, 90], "ksize": 2, "dilation": [1, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512], "load": "",
        "eval_batch_size": 64, "permute": task == "pmnist",
    }  # fmt: skip
    assert {name: getattr(c, name) for name in released} == released
    assert c.dilation == DILATION
    flags = {flag for action in build_parser(config)._actions for flag in action.option_strings}
    assert {f"--{name.replace('log_', 'log-')}" for name in released} <= flags
    assert c.data_folder() == str(PROJECT / "data" / {"pmnist": "mnist", "cifar10": "cifar10"}[task])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data", "nowhere"], "error: nowhere: no such folder"),
        (["--dilation", "0"], "error: --dilation: expected integers ≥ 1"),
        (["--dropouti", "1"], "error: --dropouti: expected a probability"),
        (["--permutation_seed", "-1"], "error: --permutation_seed: expected at least 0"),
        (["--nhid", "9" * 22], "error: --nhid: expected less than 2**31"),
        (["--dilation", "1", "9" * 22], "error: --dilation: expected less than 2**31"),
        (["--threads", "9" * 14], "error: --threads: expected less than 2**31"),
        (["--eval", "--metrics", "/nowhere/new/metrics.json"], "error: --metrics /nowhere/new/metrics.json: cannot be"),
        (["--load_weight", "nothing.pkl"], "error: nothing.pkl: no such file"),
    ],
)
def test_bad_input_gives_one_line_and_exit_code_2(run, argv, message):
    code, _, err, _ = run(*argv)
    assert code == 2
    assert err.startswith(message)
    assert err.count("\n") == 1


def test_weights_that_do_not_fit_name_the_flag(run, tmp_path):
    def of(channels=1, classes=10, hidden=14, **options):
        model = TrellisClassifier(channels, classes, hidden, 2, output_size=10, **options)
        save_weights(model, tmp_path / "w.pkl")
        code, _, err, _ = run("--eval", "--load_weight", tmp_path / "w.pkl")
        assert code == 2
        return err

    assert "pass --nhid 6" in of(hidden=16)
    assert "the file is for images with 3 channels and 10 classes" in of(channels=3)
    assert "pass --ksize 3" in of(kernel_size=3)
    assert "pass --no-wnorm" in of(weight_norm=False)


RECIPES = {
    "step": "--schedule step --warmup 10 --decay 2 --ema 0.9",
    "cosine": "--schedule cosine --warmup 5 --label_smoothing 0.1 --optim AdamW --wdecay 0.01",
    "onecycle": "--schedule onecycle --ema 0.9 --label_smoothing 0.1 --dropouth 0.1 --precision bf16",
}


@pytest.mark.parametrize(("task", "name"), [("pmnist", "step"), ("cifar10", "cosine"), ("pmnist", "onecycle")])
def test_resumed_recipes_and_augmentation_are_bit_equal(run, tmp_path, monkeypatch, task, name):
    """Stop within an epoch of three batches, and after an epoch."""
    monkeypatch.setattr(pixels, "TRAIN_IMAGES", 33)
    flags = [*RECIPES[name].split(), "--augment", "--batch_size", "10", "--epochs", "3", "--max_steps", "0"]
    flags += ["--max_eval_tokens", "64", "--eval_batch_size", "64"]
    code, out, err, whole = run(*flags, task=task)
    assert code == 0, err
    assert "augmentation shifts up to" in out
    assert (whole["augment"], whole["schedule"], whole["steps"]) == (True, name, 9)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["settings"]["augment"]
    step = Trainer._step
    for at in (2, 3, 7):

        def interrupted(self, batch, at=at):
            means = step(self, batch)
            if self.step == at:
                signal.raise_signal(signal.SIGINT)
            return means

        monkeypatch.setattr(Trainer, "_step", interrupted)
        start = flags if at == 2 else ["--resume"]
        assert run(*start, task=task, out="parts", base=start is flags)[0] == 130
    monkeypatch.setattr(Trainer, "_step", step)
    code, _, err, parts = run("--resume", task=task, out="parts", base=False)
    assert code == 0, err
    assert (parts["test"], parts["valid"], parts["augment"]) == (whole["test"], whole["valid"], True)
    a, b = (checkpoint.load(tmp_path / out / "last.pt") for out in ("run", "parts"))
    for part in ("model", "average") if a["average"] else ("model",):
        assert all(torch.equal(a[part][k], b[part][k]) for k in a[part])
    weights = [torch.load(tmp_path / out / "weights.pkl", weights_only=True) for out in ("run", "parts")]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])

    for flag, value in (("--epochs", 4), ("--max_steps", 5)):
        code, _, err, _ = run("--resume", flag, value, task=task, out="parts", base=False)
        assert code == (0 if name == "step" else 2), err
        if name != "step":
            reason = f"--schedule {name} spreads the learning rate over all updates of the run: leave the flag out"
            assert f"error: {flag} {value}: the run in" in err
            assert reason in err


def test_augmentation_changes_the_run_and_needs_square_images(run, tmp_path):
    plain = run("--max_steps", "3", out="plain")[3]
    varied = run("--max_steps", "3", "--augment", out="varied")[3]
    assert (plain["augment"], varied["augment"]) == (False, True)
    assert plain["test"] != varied["test"]
    scored = run("--eval", "--load_weight", tmp_path / "varied" / "weights.pkl")[3]
    assert scored["test"] == varied["test"]
    assert "augment" not in scored
    assert "# augmentation" not in (tmp_path / "plain" / "log.txt").read_text()
    assert "# augmentation: shifts up to 2 pixels, rot" in (tmp_path / "varied" / "log.txt").read_text()
