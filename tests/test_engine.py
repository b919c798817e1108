"""The engine, driven by a task of this file: it must not depend on language models."""

import json
import math
import re
import shutil
import signal
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from trellisnet import serialization
from trellisnet.errors import RunError, UserError, counted
from trellisnet.training import checkpoint, cli
from trellisnet.training.config import RunConfig
from trellisnet.training.engine import Trainer
from trellisnet.training.interrupts import Interrupted
from trellisnet.training.optim import Schedule, make_optimizer, make_schedule
from trellisnet.training.reporting import Bar, duration, duration_line, epoch_line
from trellisnet.training.runlog import RunFolder, read_records
from trellisnet.training.tasks import Splits, Task


class Regression(Task):
    """Fit a line with noise injected, so that the random number generator matters."""

    score_name = "rmse"
    digits = 2
    unit, count = "pt", "points"

    def __init__(self, bad_at=(), fault="loss"):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.2), nn.Linear(8, 1)).double()
        self.bad_at, self.fault, self.calls = bad_at, fault, 0

    def batches(self, data, epoch):
        return [(data[i : i + 10],) for i in range(0, len(data), 10)]

    def size(self, batch):
        return len(batch[0])

    def _error(self, x):
        return (self.model(x) - x.sum(1, keepdim=True)).square().mean()

    def loss(self, x, state=None):
        self.calls += torch.is_grad_enabled()  # of training steps
        loss = self._error(x) + (0 if state is None else 0 * state[0].sum())
        carry = x[-1]
        if self.calls in self.bad_at:
            if self.fault == "loss":
                loss = loss * math.inf
            elif self.fault == "gradient":
                loss = loss + (self.model[0].weight.flatten()[:1] * 0).sqrt().sum()  # 0, of infinite slope
            carry = carry * math.nan
        return {"loss": loss, "raw": loss}, (carry,)

    @torch.no_grad()
    def evaluate(self, data, *, max_tokens=None, progress=None):
        self.model.eval()
        return {"loss": self._error(data).item(), "points": len(data)}

    @staticmethod
    def score(loss):
        return math.sqrt(loss)


@dataclass(kw_only=True)
class Config(RunConfig):
    task = "regression"


def splits(sha256="abc"):
    generator = torch.Generator().manual_seed(1)
    train, valid, test = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (60, 20, 20))
    return Splits(train, valid, test, label="line", sha256=sha256, sizes=(60, 20, 20))


def run(path, *, resume=None, task=None, sha256="abc", schedule=None, **options):
    config = Config(**{"epochs": 4, "lr": 0.05, "clip": 1.0, "log_interval": 2} | options)
    if isinstance(schedule, str):
        config = replace(config, schedule=schedule)
        schedule = make_schedule(config, lambda _: 6)
    task = task or Regression()
    torch.manual_seed(1)
    content = checkpoint.load(path / resume) if resume else None
    folder = RunFolder(path, fresh=resume is None)
    said = []
    try:
        result = Trainer(
            task, splits(sha256), config, folder, make_optimizer(task.model.parameters(), config),
            schedule or Schedule(config.lr), lambda model, file: serialization.save(file, model.state_dict()),
            command="python regression.py", say=said.append,
        ).fit(content)  # fmt: skip
    finally:
        folder.close()
    return task, result, said


@pytest.mark.parametrize("optim", ["SGD", "Adam", "AdamW", "RMSprop"])
def test_resumed_after_epochs_it_ends_bit_equal(tmp_path, optim):
    whole, result, _ = run(tmp_path / "whole", optim=optim)
    run(tmp_path / "parts", optim=optim, epochs=1)
    run(tmp_path / "parts", optim=optim, epochs=3, resume="last.pt")
    parts, again, _ = run(tmp_path / "parts", optim=optim, epochs=4, resume="last.pt")
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True))
    assert (result.test, result.best_epoch, result.steps) == (again.test, again.best_epoch, again.steps)


def test_a_run_with_nothing_left_to_train_says_so(tmp_path):
    run(tmp_path, max_steps=3)
    line = "NOTICE: nothing is left to train, so the run is only scored"
    assert run(tmp_path, max_steps=3, epochs=9, resume="last.pt")[2][0] == f"{line}; raise --max_steps to train on"
    assert not run(tmp_path, resume="last.pt")[2][0].startswith("NOTICE")
    assert run(tmp_path, resume="last.pt")[2][0] == f"{line}; raise --epochs to train on"


@pytest.mark.parametrize(
    "settings",
    [{"max_steps": 12}, {"max_steps": 9, "schedule": "cosine"}],  # at the end of an epoch of six, and within one
    ids=["step", "cosine"],
)
@pytest.mark.parametrize("files", [(), ("best.pt",)])  # written after the interrupted validation, before a kill
def test_a_validation_after_the_last_update_is_made_up_for(tmp_path, monkeypatch, settings, files):
    def interrupted(trainer, *args):
        if trainer.step == settings["max_steps"]:
            raise Interrupted(signal.SIGTERM)
        return evaluate(trainer, *args)

    def killed(path, content):
        if path.name not in files:
            raise KeyboardInterrupt
        save(path, content)

    _, whole, _ = run(tmp_path / "whole", **settings)
    assert whole.best_epoch == 2
    evaluate, save = Trainer._evaluate, checkpoint.save
    monkeypatch.setattr(Trainer, "_evaluate", interrupted)
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", **settings)
    monkeypatch.setattr(Trainer, "_evaluate", evaluate)
    monkeypatch.setattr(checkpoint, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", resume="last.pt", **settings)
    monkeypatch.setattr(checkpoint, "save", save)
    last = tmp_path / "parts" / "last.pt"
    newest, _ = cli._newest(last)
    assert newest["best"]["epoch"] == (2 if files else 1)
    save(last, newest)
    for _ in range(2):  # and it is not validated again
        _, result, _ = run(tmp_path / "parts", resume="last.pt", **settings)
        assert (result.valid, result.test, result.best_epoch) == (whole.valid, whole.test, whole.best_epoch)
    epochs = [r for r in read_records(tmp_path / "parts" / "metrics.jsonl") if r["event"] == "epoch"]
    assert [(r["epoch"], r["best"]) for r in epochs] == [(1, True), (2, True), *([] if files else [(2, True)])]


def test_resumed_within_an_epoch_it_ends_bit_equal(tmp_path):
    run(tmp_path / "whole")
    run(tmp_path / "parts", max_steps=8)
    assert checkpoint.load(tmp_path / "parts" / "last.pt")["batch"] == 2
    run(tmp_path / "parts", resume="last.pt")
    for file in ("last.pt", "best.pt"):
        a, b = (checkpoint.load(tmp_path / p / file) for p in ("whole", "parts"))
        assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
        assert (a["step"], a["best"], a["schedule"]) == (b["step"], b["best"], b["schedule"])
    weights = [torch.load(tmp_path / p / "weights.pkl", weights_only=True) for p in ("whole", "parts")]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_a_resumed_run_frees_the_checkpoint_and_copies_nothing(tmp_path, monkeypatch):
    run(tmp_path / "run", epochs=1, optim="Adam")
    written, read = [], []
    save, load = checkpoint.save, checkpoint.load
    monkeypatch.setattr(checkpoint, "save", lambda path, content: written.append(content) or save(path, content))
    monkeypatch.setattr(checkpoint, "load", lambda path, **options: read.append(load(path, **options)) or read[-1])
    task, _, _ = run(tmp_path / "run", epochs=2, optim="Adam", resume="last.pt")
    assert read[0] == {}
    own = {p.data_ptr() for p in task.model.parameters()}
    assert written
    assert all({p.data_ptr() for p in content["model"].values()} == own for content in written)


def test_a_checkpoint_has_the_weights_and_their_average(tmp_path):
    schedule = Schedule(0.05, anneal=1, asgd=True, history=[0.0, 0.0])  # averages after the first epoch
    run(tmp_path / "run", epochs=2, schedule=schedule)
    last = checkpoint.load(tmp_path / "run" / "last.pt")
    states = last["optimizer"]["state"].values()
    for weights, average, state in zip(last["model"].values(), last["average"].values(), states, strict=True):
        assert torch.equal(average, state["ax"])
        assert not torch.equal(average, weights)


@pytest.mark.parametrize(
    "settings",
    [{"schedule": "step", "warmup": 9}, {"schedule": "cosine", "warmup": 4}, {"schedule": "onecycle"}],
    ids=["step", "cosine", "onecycle"],
)
@pytest.mark.parametrize("cut", [3, 8, 12])  # within an epoch before there is a best one, later, and after an epoch
def test_recipes_are_continued_bit_equal(tmp_path, settings, cut):
    def start(path, *bad_at, **more):
        """Train on epochs of six batches; one batch of the run is skipped."""
        schedule = make_schedule(Config(lr=0.05, epochs=4, **settings), lambda _: 6)
        options = {"optim": "Adam", "ema": 0.8, "skip_bad_steps": 1}
        return run(path, task=Regression(bad_at=bad_at), schedule=schedule, **options, **more)

    whole, result, _ = start(tmp_path / "whole", 3)
    start(tmp_path / "parts", 3, max_steps=cut)
    parts, again, _ = start(tmp_path / "parts", resume="last.pt")
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True))
    assert (result.test, result.valid, result.best_epoch) == (again.test, again.valid, again.best_epoch)
    for file in ("last.pt", "best.pt"):
        a, b = (checkpoint.load(tmp_path / p / file) for p in ("whole", "parts"))
        assert all(torch.equal(a[part][k], b[part][k]) for part in ("model", "average") for k in a["model"])
        assert (a["step"], a["best"], a["schedule"]) == (b["step"], b["best"], b["schedule"])
    rates = [
        [(r["step"], r["lr"]) for r in map(json.loads, (tmp_path / p / "metrics.jsonl").read_text().splitlines())
         if r["event"] == "train" and r["step"] > cut]
        for p in ("whole", "parts")
    ]  # fmt: skip
    assert rates[0] == rates[1]
    assert len({lr for _, lr in rates[0]}) > 3 or settings["schedule"] == "step"


def test_a_moving_average_is_scored_and_saved_and_skipped_steps_are_not_in_it(tmp_path, monkeypatch):
    seen, step = [], Trainer._step

    def watched(self, batch):
        means = step(self, batch)
        if means is not None:
            seen.append({name: p.detach().clone() for name, p in self.task.model.named_parameters()})
        return means

    monkeypatch.setattr(Trainer, "_step", watched)
    task, result, _ = run(tmp_path / "run", epochs=1, ema=0.7, task=Regression(bad_at=[3]), skip_bad_steps=1)
    assert len(seen) == 5
    expected = seen[0]
    for now in seen[1:]:
        expected = {name: 0.7 * average + 0.3 * now[name] for name, average in expected.items()}
    last = checkpoint.load(tmp_path / "run" / "last.pt")
    weights = torch.load(tmp_path / "run" / "weights.pkl", weights_only=True)
    for name, average in expected.items():
        assert torch.equal(last["model"][name], seen[-1][name])
        assert torch.allclose(last["average"][name], average, rtol=1e-12)
        assert torch.equal(weights[name], last["average"][name])
        assert torch.equal(task.model.state_dict()[name], last["average"][name])
    assert result.test["loss"] == task.evaluate(splits().test)["loss"]
    assert result.valid["loss"] == task.evaluate(splits().valid)["loss"]

    seen.clear()
    cut, result, _ = run(tmp_path / "cut", ema=0.7, max_steps=3)  # no epoch was finished
    expected = 0.7 * (0.7 * seen[0]["0.bias"] + 0.3 * seen[1]["0.bias"]) + 0.3 * seen[2]["0.bias"]
    assert torch.allclose(cut.model[0].bias, expected, rtol=1e-12)
    assert torch.equal(torch.load(tmp_path / "cut" / "weights.pkl", weights_only=True)["0.bias"], cut.model[0].bias)
    assert result.test["loss"] == cut.evaluate(splits().test)["loss"]


def test_finetuning_averages_from_the_first_update_and_ends_with_the_plateau(tmp_path):
    """A large rate undoes what was loaded, so the first plateau comes early and the loaded weights stay the best."""
    trained, _, _ = run(tmp_path / "before", epochs=8)
    loaded = {name: value.clone() for name, value in trained.model.state_dict().items()}

    def finetune(path, lr, **options):
        task = Regression()
        task.model.load_state_dict(loaded)
        return run(path, task=task, epochs=9, lr=lr, schedule=Schedule(lr, anneal=1, finetune=True), **options)

    task, result, said = finetune(tmp_path / "whole", 1.0)
    assert said[0].startswith("as loaded: valid rmse ")
    assert (result.best_epoch, result.complete) == (0, True)
    assert 2 <= result.epochs < 9
    assert f"epoch {result.epochs:3d}  no gain in 1 epoch: finetuning ends" in said
    assert all(torch.equal(task.model.state_dict()[name], loaded[name]) for name in loaded)
    assert result.valid["loss"] == trained.evaluate(splits().valid)["loss"]
    assert not (tmp_path / "whole" / "last.previous.pt").exists()

    for cut in (0, 3, 9):  # before the first update, within the first epoch, and in a later one
        path = tmp_path / f"cut{cut}"
        if cut:
            assert not finetune(path, 1.0, max_steps=cut)[1].complete
        else:
            shutil.copytree(tmp_path / "whole", path)
            shutil.copy(path / "best.pt", path / "last.pt")
        _, again, _ = finetune(path, 1.0, resume="last.pt")
        assert again.test == result.test
        a, b = (checkpoint.load(p / "last.pt") for p in (tmp_path / "whole", path))
        assert all(torch.equal(a[part][k], b[part][k]) for part in ("model", "average") for k in a["model"])
        assert (a["step"], a["best"], a["schedule"]) == (b["step"], b["best"], b["schedule"])
    _, again, said = finetune(path, 1.0, resume="last.pt")
    assert again.steps == result.steps
    assert said[0] == "NOTICE: nothing is left to train, so the run is only scored"

    task, result, _ = finetune(tmp_path / "small", 0.02)
    assert result.best_epoch > 0
    assert result.valid["loss"] < trained.evaluate(splits().valid)["loss"]
    best = checkpoint.load(tmp_path / "small" / "best.pt")
    assert all(torch.equal(task.model.state_dict()[name], best["average"][name]) for name in loaded)


def test_files_and_lines_of_a_run(tmp_path):
    task, result, said = run(tmp_path / "run")
    files = {p.name for p in (tmp_path / "run").iterdir()}
    assert files == {"log.txt", "metrics.jsonl", "last.pt", "best.pt", "weights.pkl"}
    assert result.complete
    assert (result.epochs, result.steps) == (4, 24)
    assert result.test["rmse"] == pytest.approx(math.sqrt(result.test["loss"]))
    assert [line.split()[:2] for line in said[:4]] == [["epoch", str(i)] for i in range(1, 5)]
    assert said[-1].startswith("test rmse ")
    log = (tmp_path / "run" / "log.txt").read_text()
    assert re.search(r"^epoch 1 batch 2/6 step 2 loss [\d.]+ rmse [\d.]+ lr 0.05 [\d,]+ pt/s$", log, re.MULTILINE)
    records = [r for r in read_records(tmp_path / "run" / "metrics.jsonl") if r["event"] == "epoch"]
    assert [epoch_line(task, r) for r in records] == said[:4]  # the record holds all that was printed
    assert all(line in log for line in said)


def test_the_model_ends_with_the_best_weights(tmp_path):
    # A rate that grows every epoch undoes what was learned: the best epoch is not the last.
    schedule = Schedule(0.05, anneal=1, factor=0.02)
    task, result, _ = run(tmp_path / "run", epochs=8, schedule=schedule, optim="Adam")
    history = checkpoint.load(tmp_path / "run" / "last.pt")["schedule"]["history"]
    assert result.best_epoch == 1 + history.index(min(history))
    assert result.best_epoch < 8
    best = checkpoint.load(tmp_path / "run" / "best.pt")["model"]
    assert all(torch.equal(task.model.state_dict()[k], best[k]) for k in best)
    assert result.valid["loss"] == min(history)


def test_max_steps_counts_all_updates_and_marks_the_run(tmp_path):
    _, result, _ = run(tmp_path / "run", max_steps=8)
    assert (result.steps, result.epochs, result.complete) == (8, 1, False)


def test_resume_on_other_data_is_refused(tmp_path):
    run(tmp_path / "run", epochs=1)
    with pytest.raises(UserError, match="the data differ from those the run was started on"):
        run(tmp_path / "run", resume="last.pt", sha256="xyz")


FAULTS = {
    "loss": "the training loss became inf at step 8",
    "gradient": "the gradient is not finite at step 8",
    "carry": "the carried state is not finite at step 8",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_step_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path, fault):
    task = Regression(bad_at=[8], fault=fault)
    with pytest.raises(RunError) as raised:
        run(tmp_path / "run", task=task, log_interval=100)  # whatever is logged: it is found in its step
    said = str(raised.value)
    assert said.startswith(f"{FAULTS[fault]} (epoch 2, batch 2), after 10 points of the epoch; the largest gradient ")
    number = r"[\d.e+-]+" if fault == "carry" else "(inf|nan)"
    assert re.search(
        f"gradient norm is {number}, of [02].(weight|bias); lower --lr or --clip, or allow such steps", said
    )
    kept = checkpoint.load(tmp_path / "run" / "last.pt")
    assert kept["epoch"] == 1
    assert all(torch.isfinite(p).all() for p in (*kept["model"].values(), *task.model.parameters()))


@pytest.mark.parametrize("fault", FAULTS)
def test_steps_that_are_not_finite_can_be_skipped(tmp_path, fault):
    """They act as if missing from the data, random numbers aside; a continued run skips no more than allowed."""
    faulty = lambda *at: Regression(bad_at=at, fault=fault)  # noqa: E731
    options = {"skip_bad_steps": 2, "optim": "Adam"}
    whole, result, said = run(tmp_path / "whole", task=faulty(3, 8), **options)
    assert (result.steps, result.epochs) == (22, 4)
    assert all(torch.isfinite(p).all() for p in whole.model.parameters())
    skipped = [line for line in said if line.startswith("skipped: ")]
    assert len(skipped) == 2
    assert skipped[1].startswith(f"skipped: {FAULTS[fault].replace('step 8', 'step 7')} (epoch 2, batch 2), after 10 ")
    assert skipped[1].endswith("(2 of 2)")
    assert skipped[1] in (tmp_path / "whole" / "log.txt").read_text()
    records = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [(r["epoch"], r["batch"], r["step"]) for r in records if r["event"] == "skipped"] == [(1, 3, 2), (2, 2, 6)]

    run(tmp_path / "parts", task=faulty(3), max_steps=4, **options)  # calls 1 to 5
    last = checkpoint.load(tmp_path / "parts" / "last.pt")
    assert (last["skipped"], last["step"], last["batch"]) == (1, 4, 5)
    shutil.copytree(tmp_path / "parts", tmp_path / "stopped")
    with pytest.raises(RunError, match=r"1 skipped before it\); lower"):
        run(tmp_path / "stopped", task=faulty(3), resume="last.pt", skip_bad_steps=1, optim="Adam")
    parts, again, _ = run(tmp_path / "parts", task=faulty(3), resume="last.pt", **options)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True))
    assert (again.test, again.steps) == (result.test, result.steps)


def test_an_epoch_of_nothing_but_skipped_steps_ends(tmp_path):
    _, result, said = run(tmp_path / "run", task=Regression(bad_at=range(7, 13)), skip_bad_steps=6)
    assert (result.steps, result.epochs) == (18, 4)
    assert len([line for line in said if line.startswith("skipped: ")]) == 6
    # Its training loss is unknown; it once was 0, the best of all.
    epochs = [r for r in read_records(tmp_path / "run" / "metrics.jsonl") if r["event"] == "epoch"]
    assert [r["count"] for r in epochs] == [60, 0, 60, 60]
    assert (
        [r["train_loss"] is None for r in epochs]
        == [False, True, False, False]
        == [r["train_score"] is None for r in epochs]
    )
    assert all(checkpoint.load(tmp_path / "run" / "last.pt")["schedule"]["history"])


def test_the_previous_checkpoint_is_kept_until_the_run_is_done(tmp_path):
    run(tmp_path / "run", max_steps=8)
    assert checkpoint.load(tmp_path / "run" / "last.previous.pt")["step"] == 6
    assert checkpoint.load(tmp_path / "run" / "last.pt")["step"] == 8
    run(tmp_path / "run", resume="last.pt")
    assert not (tmp_path / "run" / "last.previous.pt").exists()


def test_exchanged_best_and_last_are_detected(tmp_path):
    run(tmp_path / "run", max_steps=8)
    last, best = (tmp_path / "run" / name for name in ("last.pt", "best.pt"))
    last.rename(tmp_path / "x")
    best.rename(last)
    (tmp_path / "x").rename(best)
    with pytest.raises(UserError, match=r"best.pt: was not written at the end of its epoch; put the files back"):
        run(tmp_path / "run", resume="last.pt")


def test_a_full_disk_fails_the_run_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    run(tmp_path / "run", epochs=1)
    before = (tmp_path / "run" / "last.pt").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trellisnet.serialization.os.fsync", full)
    with pytest.raises(RunError, match=r"could not be written \(No space left on device\)"):
        run(tmp_path / "run", resume="last.pt")
    assert (tmp_path / "run" / "last.pt").read_bytes() == before
    assert not list((tmp_path / "run").glob(".*.tmp"))


def test_a_run_cut_short_in_its_first_epoch_scores_what_it_has(tmp_path):
    _, result, _ = run(tmp_path / "run", max_steps=3)
    assert (result.best_epoch, result.epochs, result.complete) == (None, 0, False)
    assert result.test["rmse"] > 0
    assert (tmp_path / "run" / "weights.pkl").exists()
    _, resumed, _ = run(tmp_path / "run", resume="last.pt")
    _, whole, _ = run(tmp_path / "whole")
    assert (resumed.valid, resumed.test) == (whole.valid, whole.test)


def test_the_log_is_never_behind_a_checkpoint(tmp_path, monkeypatch):
    """Whenever last.pt appears, the records of everything in it are on the disk."""
    save, behind = checkpoint.save, []

    def saved(path, content):
        records = read_records(tmp_path / "run" / "metrics.jsonl")
        finished = [r["epoch"] for r in records if r["event"] == "epoch"]
        behind.append((content["epoch"], finished))
        save(path, content)

    monkeypatch.setattr(checkpoint, "save", saved)
    run(tmp_path / "run", epochs=3, checkpoint_steps=2)
    assert len(behind) > 6
    assert all(finished == [*range(1, epoch + 1)] for epoch, finished in behind)


@pytest.mark.parametrize("when", ["training", "scoring"])
def test_a_folder_that_is_deleted_during_the_run_is_named(tmp_path, when):
    class Deletes(Regression):
        def evaluate(self, data, **options):
            if (when == "scoring" and len(evaluated) == 4) or (when == "training" and len(evaluated) == 1):
                shutil.rmtree(tmp_path / "run")
            evaluated.append(len(data))
            return super().evaluate(data, **options)

    evaluated = []
    with pytest.raises(RunError, match=r"run: the run folder was deleted or moved during the run"):
        run(tmp_path / "run", task=Deletes())
    assert len(evaluated) == (2 if when == "training" else 5)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(5.25, "5.2s"), (65, "1m05s"), (3 * 3600, "3h00m"), (172_799.4, "47h59m"), (172_800, "2d00h"), (274_000, "3d04h")],
)
def test_durations(seconds, shown):
    assert duration(seconds) == shown


@pytest.mark.parametrize(
    ("max_steps", "shown"),
    [
        (0, "about 10m00s per epoch, 3h20m in all, without evaluation"),
        (1, "about 10.0s for 1 step, without evaluation"),
        (90, "about 15m00s for 90 steps, without evaluation"),
        (2000, "about 10m00s per epoch, 3h20m in all, without evaluation"),
    ],
)
def test_the_estimated_time_is_that_of_the_steps_to_come(max_steps, shown):
    assert duration_line(10.0, 60, Config(epochs=20, max_steps=max_steps)) == shown


@pytest.mark.parametrize(("max_steps", "end"), [(0, 60), (30, 13), (29, 12), (500, 60), (20, 12)])
def test_the_bar_ends_where_the_run_does(max_steps, end):
    trainer = Trainer.__new__(Trainer)
    trainer.config, trainer.batch, trainer.step = Config(max_steps=max_steps), 12, 29
    assert trainer._end(60) == end


@pytest.mark.parametrize("n", [0, 7, 12345])
@pytest.mark.parametrize("columns", [60, 80, 100, 200])
def test_a_narrow_bar_keeps_speed_and_remaining_time_and_cuts_no_number(columns, n):
    progress = Bar(total=12345, desc="epoch 12", unit="window", disable=True)
    progress.show(["loss 5.4321", "ppl 324.98", "lr 20", "24,435 tok/s"])
    line = Bar.format_meter(
        n, 12345, 45_000, ncols=columns, prefix="epoch 12", unit="window", postfix=progress.postfix, rate=n and 0.25
    )
    assert len(line) <= columns
    inside = re.fullmatch(r"epoch 12: +\d+%\|.+\| \d+/12345 \[12:30:00<([\d:]+|\?), (.+)\]", line)
    assert inside, line
    figures = ["24,435 tok/s", "loss 5.4321", "ppl 324.98", "lr 20"]
    assert inside[2].split("  ") in [figures[: i + 1] for i in range(4)]
    if columns == 200:
        assert inside[2].split("  ") == figures


def test_a_bar_without_figures_is_that_of_tqdm():
    assert "2.00window/s]" in Bar.format_meter(20, 60, 10, ncols=80, prefix="valid", unit="window")


def test_numbers_have_their_nouns():
    assert counted(1, "threads") == "1 thread"
    assert counted(0, "threads") == "0 threads"
    assert counted(1, "steps an epoch") == "1 step an epoch"
    assert counted(1234, "tokens") == "1,234 tokens"


def change_checkpoint(path, change):
    """Change a checkpoint and its digest with it."""
    content = checkpoint.load(path)
    change(content)
    checkpoint.save(path, content)


UNFIT = {
    "more batches than there are": (lambda c: c.update(batch=7), "batch 7 of an epoch of 6"),
    "a tensor of another shape": (
        lambda c: c["model"].update({"0.bias": torch.ones(9).double()}), "other weights than this model's: 0.bias"
    ),
    "a tensor of another type": (
        lambda c: c["model"].update({"0.bias": c["model"]["0.bias"].int()}), "other weights than this model's: 0.bias"
    ),
    "a missing tensor": (lambda c: c["model"].pop("2.weight"), "other weights than this model's: 2.weight"),
    "an infinite weight": (lambda c: c["model"]["0.bias"].fill_(math.inf), "weights that are not finite"),
    "a state of another shape": (
        lambda c: c["optimizer"]["state"][0].update(exp_avg=torch.ones(3)), "state has other entries or shapes"
    ),
    "a state without an entry": (
        lambda c: c["optimizer"]["state"][0].pop("exp_avg"), "state has other entries or shapes"
    ),
    "a state that is not finite": (
        lambda c: c["optimizer"]["state"][0]["exp_avg"].fill_(math.nan), "the optimiser's state is not finite"
    ),
    "a setting that is a text": (
        lambda c: c["optimizer"]["param_groups"][0].update(eps="x"), "eps of the optimiser is 'x'"
    ),
    "no groups": (lambda c: c["optimizer"].update(param_groups=[]), "parameter groups"),
    "no losses": (lambda c: c.update(running={}), "loss"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFIT)
def test_a_checkpoint_that_does_not_fit_is_named(tmp_path, name):
    change, reason = UNFIT[name]
    run(tmp_path / "run", max_steps=8, optim="Adam")
    change_checkpoint(tmp_path / "run" / "last.pt", change)
    with pytest.raises(UserError, match=f"the checkpoint does not fit this run, or is corrupt .*{reason}") as raised:
        run(tmp_path / "run", resume="last.pt", optim="Adam")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("valid", [{}, {"loss": "x", "rmse": 1.0, "points": 20}, {"loss": 1.0, "rmse": 1.0}])
def test_a_best_result_that_cannot_be_compared_is_named(tmp_path, valid):
    run(tmp_path / "run", max_steps=8)
    for name in ("last.pt", "best.pt"):
        change_checkpoint(tmp_path / "run" / name, lambda content: content["best"].update(valid=valid))
    with pytest.raises(UserError, match="the checkpoint does not fit this run, or is corrupt"):
        run(tmp_path / "run", resume="last.pt")


def test_best_weights_that_do_not_fit_are_named_before_training(tmp_path):
    run(tmp_path / "run", max_steps=8)
    change_checkpoint(tmp_path / "run" / "best.pt", lambda content: content.update(average={"w": torch.ones(1)}))
    with pytest.raises(UserError, match=r"best.pt: a corrupt checkpoint \(other weights than this model's: 0.bias\)"):
        run(tmp_path / "run", resume="last.pt")
