"""word_ptb from the command line: training, scoring, resuming and error messages."""

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import cases
from trellisnet import serialization
from trellisnet.data import penn
from trellisnet.models import count_parameters
from trellisnet.training import checkpoint
from trellisnet.training.config import PROJECT
from trellisnet.training.runlog import pip_install, runnable
from trellisnet.weights import load_weights, save_weights
from word_ptb import data
from word_ptb.model import Config, build_model
from word_ptb.train import main

SMALL = """--emsize 8 --nhid 6 --nout 8 --nlevels 3 --horizon 3 --seq_len 13 --batch_size 4 --aux_freq 2 --epochs 2
--optim Adam --lr 0.03 --dropout 0.1 --dropouti 0 --dropouth 0.1 --wdrop 0.1 --emb_dropout 0
--log-interval 10""".split()
PENN = PROJECT / "data" / "penn"
HAS_PENN = (PENN / "test.txt").is_file()


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for split, lines in (("train", 60), ("valid", 20), ("test", 20)):
        (folder / f"{split}.txt").write_text("the cat sat on the mat\n a dog ran off \n" * lines)
    return folder


@pytest.fixture
def run(tmp_path, text, capsys):
    """Return a function that runs main: exit code, standard output, standard error, metrics (or None)."""

    def call(*argv, out="run"):
        metrics = tmp_path / "metrics.json"
        metrics.unlink(missing_ok=True)
        argv = [*SMALL, "--data", text, "--out", tmp_path / out, "--metrics", metrics, *argv]
        code = main([str(a) for a in argv])
        printed = capsys.readouterr()
        return code, printed.out, printed.err, json.loads(metrics.read_text()) if metrics.exists() else None

    return call


def test_train_score_and_the_files_of_a_run(run, tmp_path):
    code, out, err, metrics = run()
    assert (code, err) == (0, "")
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "config.json", "log.txt", "metrics.jsonl", "last.pt", "best.pt", "weights.pkl", "vocabulary.json",
    }  # fmt: skip
    wanted = "task preset command version commit params data epochs steps best_epoch complete valid test seconds"
    assert set(f"{wanted} device threads precision backend seed".split()) <= metrics.keys()
    assert metrics["complete"]
    assert metrics["epochs"] == 2
    assert metrics["backend"] == "fused"
    untrained = run("--lr", "0", out="untrained")[3]["test"]["ppl"]
    assert metrics["test"]["ppl"] < 0.7 * untrained
    assert re.search(r"own corpus: [\d,]+ parameters, 720 training tokens, 10 words, \d+ steps an epoch", out)
    assert len(re.findall(r"^epoch +\d.* valid ppl", out, re.M)) == 2

    code, out, err, scored = run("--eval", "--load_weight", tmp_path / "run" / "weights.pkl", out="unused")
    assert (code, err) == (0, "")
    assert scored["valid"] == metrics["valid"]
    assert scored["test"] == metrics["test"]
    assert not (tmp_path / "unused").exists()  # scoring leaves no run folder


def test_resume_ends_with_the_same_weights(run, tmp_path):
    whole = run()
    run("--epochs", "1", out="parts")
    code, _, err, parts = run("--epochs", "2", "--resume", out="parts")
    assert (code, err) == (0, "")
    weights = [torch.load(tmp_path / out / "weights.pkl", weights_only=True) for out in ("run", "parts")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert parts["test"] == whole[3]["test"]
    code, _, err, _ = run("--preset", "paper", "--resume", out="parts")
    assert code == 2
    assert "--preset paper: the run in" in err
    code, _, err, _ = run("--lr", "7", "--resume", out="parts")
    assert code == 2
    assert "--lr 7.0: the run in" in err
    assert "was started with 0.03" in err
    code, _, err, _ = run("--resume", out="nowhere")
    assert code == 2
    assert "last.pt: no such file; expected a checkpoint" in err


def test_resume_needs_only_the_folder(run, tmp_path):
    run("--epochs", "1")
    assert main(["--out", str(tmp_path / "run"), "--resume", "--epochs", "2"]) == 0
    there = tmp_path / "run"
    assert main(["--resume", str(there / "last.pt"), "--epochs", "3"]) == 0
    assert main(["--resume", str(there), "--epochs", "4"]) == 0
    lines = (there / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines if '"event": "epoch"' in line] == [1, 2, 3, 4]


def test_resumed_flags_are_validated_with_the_settings_of_the_run(run, tmp_path, capsys):
    run("--epochs", "1", "--mc_dropout", "2", "--eval_depths", "2")
    resume = ["--resume", str(tmp_path / "run"), "--nout", "8"]  # alone, --nout does not fit the default --emsize
    passes = tmp_path / "passes"
    assert main([*resume, "--mc_file", str(passes), "--eval_nlevels", "auto"]) == 0, capsys.readouterr().err
    assert passes.is_file()
    for flags, message in (
        (["--epochs", "0"], "--epochs: expected at least 1, got 0"),
        (["--eval_nlevels", "auto", "--eval_depths", "none"], "--eval_nlevels auto: has no depths to choose from"),
    ):
        assert main([*resume, *flags]) == 2
        assert message in capsys.readouterr().err


def test_resume_takes_only_the_named_run(run, tmp_path, monkeypatch, capsys):
    run("--epochs", "1", out="a")
    run("--epochs", "1", "--seed", "5", out="b")
    monkeypatch.chdir(tmp_path / "a")  # this folder holds a last.pt
    assert main(["--out", "../b", "--resume", "--epochs", "2"]) == 0
    assert '"epoch": 2' in (tmp_path / "b" / "metrics.jsonl").read_text()
    assert '"epoch": 2' not in (tmp_path / "a" / "metrics.jsonl").read_text()
    assert main(["--out", "../b", "--resume", "last.pt"]) == 2
    assert "--out ../b: --resume last.pt continues in its own folder" in capsys.readouterr().err
    assert main(["--out", "../b", "--resume", "."]) == 2
    assert "--out ../b: --resume last.pt continues in its own folder" in capsys.readouterr().err


def test_resume_accepts_the_same_data_in_another_folder(run, tmp_path, text):
    run("--epochs", "1")
    text.rename(tmp_path / "moved")
    argv = ["--out", str(tmp_path / "run"), "--resume", "--epochs", "2", "--data"]
    assert main([*argv, str(tmp_path / "moved")]) == 0
    train, valid = (tmp_path / "moved" / f"{split}.txt" for split in ("train", "valid"))
    last = train.read_text().splitlines(keepends=True)[-1]  # the same text, divided otherwise
    valid.write_text(last + valid.read_text())
    train.write_text(train.read_text()[: -len(last)])
    assert main([*argv, str(tmp_path / "moved")]) == 2


def test_resume_refuses_corrupt_files(run, tmp_path, capsys):
    run("--epochs", "1")
    folder = tmp_path / "run"
    whole, best = checkpoint.load(folder / "last.pt"), (folder / "best.pt").read_bytes()
    argv = ["--out", str(folder), "--resume", "--epochs", "2"]
    for change in (
        {"settings": []}, {"model": {}}, {"rng": {}}, {"schedule": {}}, {"epoch": "x"}, {"data": None},
        {"optimizer": {}}, {"best": 7}, {"carry": 5}, {"running": None},
    ):  # fmt: skip
        for name in ("last.pt", "best.pt"):  # an intact one would be used instead
            checkpoint.save(folder / name, whole | change)
        assert main(argv) == 2, change
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        assert err.count("\n") == 1
    checkpoint.save(folder / "last.pt", whole)
    (folder / "best.pt").write_bytes(best[: len(best) // 2])
    assert main(argv) == 2
    assert "best.pt: not a checkpoint of a run" in capsys.readouterr().err
    checkpoint.save(folder / "best.pt", whole | {"best": whole["best"] | {"epoch": 0}})
    assert main(argv) == 2
    assert "best.pt: holds epoch 0, but last.pt names epoch 1; put the files of one run together" in (
        capsys.readouterr().err
    )
    (folder / "best.pt").unlink()
    assert main(argv) == 2
    assert "best.pt: no such file" in capsys.readouterr().err


def test_settings_of_a_run_can_be_used_for_another_run(run, tmp_path):
    run("--epochs", "1", "--overwrite", "--seed", "9")
    before = (tmp_path / "run" / "last.pt").read_bytes()
    config = str(tmp_path / "run" / "config.json")
    assert main(["--config", config, "--out", str(tmp_path / "again")]) == 0
    assert main(["--config", config, "--out", str(tmp_path / "run")]) == 2  # --overwrite is not inherited
    assert (tmp_path / "run" / "last.pt").read_bytes() == before
    weights = [torch.load(tmp_path / out / "weights.pkl", weights_only=True) for out in ("run", "again")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_overwrite_deletes_nothing_if_the_input_is_bad(run, tmp_path):
    run("--epochs", "1")
    before = (tmp_path / "run" / "last.pt").read_bytes()
    wrong = ["--optim", "Sgd"], ["--optim", "Rprop"], ["--load_weight", "nothing.pkl"], ["--data", "nowhere"]
    for flags in (*wrong, ["--load_weight", tmp_path / "run"]):
        code, _, err, _ = run("--overwrite", *flags)
        assert code == 2
    assert err.startswith("error: --overwrite: would delete the weights of --load_weight ")
    assert (tmp_path / "run" / "last.pt").read_bytes() == before


def test_metrics_beside_the_run_through_links_and_pipes(run, tmp_path):
    target = tmp_path / "elsewhere.json"
    target.write_text("")
    (tmp_path / "link.json").symlink_to(target)
    assert run("--epochs", "1", "--metrics", tmp_path / "link.json")[0] == 0
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads(target.read_text())["complete"]
    for _ in range(2):  # in the folder of the run, which --overwrite may delete
        assert run("--epochs", "1", "--overwrite", "--metrics", tmp_path / "run" / "metrics.json")[0] == 0
    assert run("--epochs", "1", "--overwrite", "--metrics", "/dev/null")[0] == 0
    assert not os.path.isfile("/dev/null")


def test_a_disk_that_fills_up_outside_the_checkpoints_fails_the_run_in_one_line(run, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trellisnet.training.runlog.RunFolder.record", full)
    code, _, err, _ = run()
    assert code == 1
    assert err.startswith("failed: No space left on device")
    assert err.count("\n") == 1


@pytest.mark.parametrize("every", ["0", "1"])
@pytest.mark.parametrize("fails", ["best.pt", "weights.pkl", "last.pt"])
def test_a_run_killed_between_two_files_ends_like_an_uninterrupted_one(run, tmp_path, monkeypatch, fails, every):
    whole = run()[3]
    run("--epochs", "1", out="parts")
    last = checkpoint.load(tmp_path / "parts" / "last.pt")["step"]
    write = serialization.save

    def dies(path, content, **options):
        at_the_end = (tmp_path / "parts" / "last.pt").exists() and finished()
        if path.name == fails and at_the_end:
            raise OSError(28, "No space left on device")
        write(path, content, **options)

    def finished():  # with a checkpoint every step, last.pt exists before the end of the epoch
        return every == "0" or checkpoint.load(tmp_path / "parts" / "last.pt")["step"] == 2 * last

    with monkeypatch.context() as patch:
        patch.setattr(serialization, "save", dies)
        code, _, err, _ = run("--epochs", "2", "--resume", "--checkpoint_steps", every, out="parts")
        assert code == 1
        assert "could not be written (No space left on device)" in err
        way_on = runnable("word_ptb/train.py", ["--resume", str(tmp_path / "parts" / "last.pt")])
        assert f"continue with: {way_on}" in err
    again = run("--epochs", "2", "--resume", out="parts")[3]
    assert [again[key] for key in ("valid", "test", "best_epoch")] == [
        whole[key] for key in ("valid", "test", "best_epoch")
    ]
    weights = [torch.load(tmp_path / out / "weights.pkl", weights_only=True) for out in ("run", "parts")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_previous_checkpoint_is_named_where_files_have_no_second_name(run, tmp_path, monkeypatch):
    """Without hard links there is no last.pt until the new one is complete."""
    write, written = serialization.save, []

    def refused(*_):
        raise OSError(1, "Operation not permitted")

    def fails(path, content, **options):
        written.append(path.name)
        if path.name == "last.pt" and written.count("last.pt") == 2:
            raise OSError(28, "No space left on device")
        write(path, content, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", refused)
        patch.setattr(serialization, "save", fails)
        code, _, err, _ = run("--checkpoint_steps", "1")
    assert not (tmp_path / "run" / "last.pt").exists()
    way_on = runnable("word_ptb/train.py", ["--resume", str(tmp_path / "run" / "last.pt")])
    assert (code, err.endswith(f"; the last checkpoint is kept; continue with: {way_on}\n")) == (1, True)
    _, out, _, metrics = run("--resume")
    assert "continuing from last.previous.pt, step 1\n" in out
    assert metrics["test"] == run(out="whole")[3]["test"]


def test_only_the_seed_changes_the_result(run, tmp_path):
    results = [run("--seed", seed, out=name)[3]["test"] for seed, name in ((1, "a"), (1, "b"), (2, "c"))]
    assert results[0] == results[1]
    assert results[0] != results[2]


def test_limits_mark_the_result_partial(run):
    _, out, _, metrics = run("--max_steps", "3", "--max_eval_tokens", "50")
    assert (metrics["steps"], metrics["complete"]) == (3, False)
    assert metrics["test"]["partial"]
    assert metrics["test"]["tokens"] >= 50
    assert "(partial)" in out


@pytest.mark.parametrize(
    "flags",
    [
        "--wnorm",
        "--no-tied --nout 5",
        "--repack --seq_len 0",
        "--optim SGD --lr 20 --epochs 3 --no-repack",
        "--ksize 3 --dilation 1 2",
        "--no-temporalwdrop --wdrop 0.3",
        "--aux 0",
        "--alpha 0 --beta 0",
        "--n_experts 2 --nout 6 --mos_epsilon 1e-8",
        "--accumulate 3",
    ],
)
def test_flags_train(run, flags):
    code, _, err, metrics = run("--epochs", "1", *flags.split())
    assert (code, err) == (0, "")
    assert metrics["test"]["ppl"] < 9  # 10 at first, with ten words


@pytest.mark.filterwarnings("ignore:the text holds <eos>")  # in the middle, as in the authors' stream
def test_the_authors_weights_get_their_scores(tmp_path, capsys):
    """Score the final weights of a training fixture on its evaluation stream, written as text."""
    case = cases.load("traj_sgd_history")
    stream, rows = case.arrays["eval_stream"], case.meta["config"]["eval_batch"]
    folder = tmp_path / "text"
    folder.mkdir()
    count = case.config["ntoken"]
    # The training text lists the words by id; the last token of the stream is the end of its only line.
    vocabulary = [f"w{i}" for i in range(count)]
    vocabulary[int(stream[-1])] = "<eos>"
    (folder / "train.txt").write_text(" ".join(vocabulary) + "\n")
    for split in ("valid", "test"):
        (folder / f"{split}.txt").write_text(" ".join(vocabulary[i] for i in stream[:-1]) + "\n")
    c = case.config
    argv = f"""--data {folder} --emsize {c["ninp"]} --nhid {c["nhid"]} --nout {c["nout"]} --nlevels {c["nlevels"]}
    --horizon 10 --seq_len 24 --aux 0 --eval_batch_size {rows} --batch_size 1 --eval
    --load_weight {case.file(".final.pkl")} --metrics {tmp_path / "m.json"}"""
    assert main(argv.split()) == 0, capsys.readouterr().err
    result = json.loads((tmp_path / "m.json").read_text())
    assert result["valid"]["loss"] == pytest.approx(case.scalar("eval_loss_final"), abs=1e-4)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data", "nowhere"], "error: nowhere: no such folder"),
        (["--nlevel", "3"], "error: unknown argument --nlevel; did you mean --nlevels?"),
        (["--optim", "Sgd"], "error: --optim Sgd: no such optimiser in torch.optim"),
        (["--device", "warp"], "error: --device warp: not usable here"),
        (["--device", "meta"], "error: --device meta: not usable here"),
        (["--load_weight", "x" * 300], "error: xxx"),
        (["--resume", "x" * 300], "error: --out "),
        (
            ["--batch_size", "9999"],
            "error: the corpus is too short for these settings: --batch_size 9999: train has only ",
        ),
        (["--eval_batch_size", "60"], "error: the corpus is too short for these settings: valid: rows of 4 tokens"),
        (
            ["--eval_batch_size", "999"],
            "error: the corpus is too short for these settings: --eval_batch_size 999: valid",
        ),
        (
            ["--eval"],
            "error: --eval: scores trained weights; pass --run FOLDER or --load_weight FILE, for example --run ",
        ),
        (
            ["--eval_batch_size", "60", "--eval", "--load_weight", "x"],
            "error: the corpus is too short for these settings",
        ),
        (["--load_weight", "/"], "error: /: the folder holds no weights.pkl; name weights in the authors' layout"),
        (["--seq_len", "400", "--horizon", "399", "--batch_size", "8"], "error: the corpus is too short"),
        (["--load_weight", "nothing.pkl"], "error: nothing.pkl: no such file"),
        (["--load", "model.pt"], "error: --load model.pt: refused, because a pickled model"),
        (["--metrics", "/nowhere/m.json", "--max_steps", "1"], "error: --metrics /nowhere/m.json: cannot be written"),
    ],
)
def test_bad_input_gives_one_line_and_exit_code_2(run, argv, message):
    code, _, err, _ = run(*argv)
    assert code == 2
    assert err.startswith(message)
    assert err.count("\n") == 1


@pytest.mark.parametrize("path", ["a" * 5000, "/".join(["a" * 200] * 40)], ids=["name", "path"])
@pytest.mark.parametrize("flag", ["--data", "--out", "--load_weight", "--resume", "--metrics", "--config"])
def test_a_path_that_is_too_long_is_bad_input(run, tmp_path, monkeypatch, flag, path):
    monkeypatch.chdir(tmp_path)
    code, _, err, _ = run(flag, path, "--max_steps", "1")
    assert code == 2, err
    assert re.fullmatch("error: .*(File name too long|cannot be written|--out).*\n", err)
    assert len(err) < 2100
    assert list(tmp_path.iterdir()) == [tmp_path / "text"]


def test_weights_that_do_not_fit_name_the_flag(run, tmp_path):
    save_weights(build_model(Config(emsize=8, nhid=5, nout=8, nlevels=3), 10), tmp_path / "w.pkl")
    code, _, err, _ = run("--load_weight", tmp_path / "w.pkl", "--eval")
    assert code == 2
    assert "pass --nhid 5" in err
    save_weights(build_model(Config(emsize=7, nhid=6, nout=7, nlevels=3), 10), tmp_path / "w.pkl")
    assert run("--load_weight", tmp_path / "w.pkl", "--eval")[2].endswith("pass --emsize 7 --nout 7\n")
    save_weights(build_model(Config(emsize=8, nhid=6, nout=8, nlevels=3), 10), tmp_path / "w.pkl", vocabulary="other")
    assert run("--load_weight", tmp_path / "w.pkl", "--eval")[2].endswith(
        "pass the --data and the --vocab_order that it was trained with\n"
    )
    save_weights(build_model(Config(emsize=8, nhid=6, nout=8, nlevels=3, wnorm=True), 10), tmp_path / "w.pkl")
    assert run("--load_weight", tmp_path / "w.pkl", "--eval")[2].endswith("; pass --wnorm\n")
    save_weights(build_model(Config(emsize=8, nhid=6, nout=8, nlevels=3, mixed_group=2), 10), tmp_path / "w.pkl")
    assert run("--load_weight", tmp_path / "w.pkl", "--eval")[2].endswith("; pass --mixed_group 2\n")


def test_scoring_needs_weights_except_on_synthetic_text(run):
    code, out, _, metrics = run("--eval", "--data", "synthetic", "--max_eval_tokens", "100")
    assert code == 0
    assert "NOTICE: no --load_weight: scoring untrained weights" in out
    assert metrics["test"]["ppl"] > 1
    code, _, err, _ = run("--eval")
    shipped = re.search(r"for example --run (\S+)(?: \(or .+\))?\n", err)
    config = json.loads((Path(shipped[1]) / "config.json").read_text())
    assert (code, config["task"]) == (2, "word_ptb")


def test_a_run_stopped_in_its_first_epoch_says_how_to_get_its_weights(run, tmp_path, text, capsys):
    assert run("--max_steps", "3")[0] == 0
    last, file = tmp_path / "run" / "last.pt", tmp_path / "run" / "weights.pkl"
    file.unlink()  # like a run stopped in its first epoch
    code, _, err, _ = run("--eval", "--load_weight", tmp_path / "run")
    assert code == 2
    assert err.endswith(f"or with --schedule step now by train.py --resume {last} --max_steps 1\n")
    assert main(["--resume", str(last), "--max_steps", "1", "--data", str(text)]) == 0, capsys.readouterr().err
    model = build_model(Config(emsize=8, nhid=6, nout=8, nlevels=3), 10)
    load_weights(model, tmp_path / "run")
    trained = checkpoint.load(last)["model"]
    assert all(torch.equal(tensor, trained[name]) for name, tensor in model.state_dict().items())


def test_an_earlier_run_is_kept(run, tmp_path):
    run("--epochs", "1")
    before = (tmp_path / "run" / "last.pt").read_bytes()
    code, _, err, _ = run("--epochs", "1")
    assert code == 2
    assert "--resume" in err
    assert "--overwrite" in err
    assert (tmp_path / "run" / "last.pt").read_bytes() == before
    assert run("--epochs", "1", "--overwrite")[0] == 0


IMPOSSIBLE = {
    "--optim Adam --lr 1e38": (2, "error: --optim Adam: does not work with lr 1e+38, weight_decay"),
    "--wdecay 1e308": (2, "error: --wdecay: expected at most 3.4e+38 in size, got 1e+308"),
    "--nlevels 2147483647": (2, "error: --nlevels: expected at most 100,000, got 2,147,483,647"),
    "--clip -1": (2, "error: --clip: expected at least 0, got -1.0"),
    "--threads 2147483647": (2, "error: --threads: expected at most 1,024, got 2,147,483,647"),
    "--optim Adam --momentum 0.5": (2, "error: --optim Adam: does not work with lr 0.03, weight_decay"),
    "--optim LBFGS": (2, "error: --optim LBFGS: needs to evaluate the loss several times per step"),
    "--alpha 1e38": (1, "failed: the first batch has loss "),
    "--beta 1e38": (1, "failed: the first batch has loss "),
    "--metrics last.pt": (2, "error: --metrics last.pt: runs keep something else under this name"),
    "--seq_len 100000 --horizon 99999": (2, "error: the corpus is too short for these settings"),
}


@pytest.mark.parametrize("flags", IMPOSSIBLE)
def test_settings_that_cannot_be_trained_do_not_delete_an_earlier_run(run, tmp_path, flags):
    assert run("--max_steps", "2")[0] == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    code, _, err, _ = run("--overwrite", *flags.split())
    expected, message = IMPOSSIBLE[flags]
    assert (code, err[: len(message)], err.count("\n")) == (expected, message, 1)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_a_step_that_does_not_fit_into_memory_does_not_delete_an_earlier_run(run, tmp_path, monkeypatch):
    assert run("--max_steps", "2")[0] == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}

    def full(*_, **__):
        raise MemoryError

    monkeypatch.setattr("trellisnet.training.tasks.LanguageModeling.loss", full)
    code, _, err, _ = run("--overwrite")
    assert (code, err) == (1, "failed: out of memory; lower --batch_size or the sizes; nothing was written\n")
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_a_run_that_replaces_another_ends_like_one_in_a_new_folder(run, tmp_path):
    for out, flags in (("run", ()), ("run", ("--overwrite",)), ("new", ())):
        assert run("--max_steps", "3", *flags, out=out)[0] == 0
    assert (tmp_path / "run" / "weights.pkl").read_bytes() == (tmp_path / "new" / "weights.pkl").read_bytes()


def test_a_diverging_run_fails_with_exit_code_one(run):
    code, _, err, _ = run("--optim", "SGD", "--lr", "1e38", "--clip", "0")
    assert code == 1
    assert re.match(
        r"failed: the (training|valid) loss (became|is) (nan|inf).*no checkpoint had been written yet$", err
    )
    code, _, err, _ = run("--optim", "SGD", "--lr", "1e38", "--clip", "0", "--overwrite")
    assert err.endswith("no checkpoint had been written yet, and the earlier run is deleted (--overwrite)\n")
    code, _, err, _ = run(
        "--optim", "SGD", "--lr", "1e5", "--overwrite", "--clip", "100"
    )  # the loss is finite, its perplexity is not
    assert code == 1
    assert re.match(r"failed: the (training|valid) loss", err)


def test_sizes_beyond_all_memory_fail_in_one_line(run):
    code, _, err, _ = run("--nhid", "1000000000")
    assert code == 1
    assert err.startswith("failed: out of memory")
    assert err.count("\n") == 1


@pytest.mark.parametrize("how", [["word_ptb/train.py"], pytest.param(["-m", "word_ptb.train"], marks=pytest.mark.slow)])
def test_both_ways_to_start_it_from_another_folder(tmp_path, how):
    how = [str(PROJECT / how[0])] if len(how) == 1 else how
    done = subprocess.run(
        [sys.executable, *how, *SMALL, "--data", "synthetic", "--out", "here", "--max_steps", "2"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")  # no progress bar without a terminal
    assert (tmp_path / "here" / "weights.pkl").is_file()


def test_help_names_every_flag(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "--nlevels" in shown
    assert "default: 58" in shown


@pytest.mark.parametrize(
    ("preset", "size"), [("default", 24_175_600), ("paper", 24_175_600), ("paper-mos", 25_681_735)]
)
def test_the_papers_size(preset, size):
    config = Config(**Config.presets[preset])
    assert count_parameters(build_model(config, 10_000)) == size


def test_the_synthetic_corpus_loads():
    corpus = data.load("synthetic")
    assert corpus.label == "synthetic"
    assert corpus.train.numel() > 50_000


@pytest.mark.skipif(not HAS_PENN, reason="needs Penn Treebank in data/penn")
def test_the_penn_treebank_has_its_published_counts():
    corpus = data.load(PENN)
    assert corpus.label == penn.LABEL
    assert [s.numel() for s in (corpus.train, corpus.valid, corpus.test)] == [929_589, 73_760, 82_430]
    words = corpus.vocabulary
    assert len(words) == 10_000
    expected = {0: "aer", 1: "banknote", 23: "wachter", 24: "<eos>", 25: "pierre", 26: "<unk>", 27: "N", 28: "years"}
    assert {i: words[i] for i in expected} == expected
    assert words[29] == "old"
    assert words[9999] == "unilab"
    unk = words.index("<unk>")
    assert [(s == unk).sum().item() for s in (corpus.train, corpus.valid, corpus.test)] == [45_020, 3_485, 4_794]


@pytest.mark.slow
@pytest.mark.skipif(not HAS_PENN, reason="needs Penn Treebank in data/penn")
def test_the_paper_configuration_trains(tmp_path):
    argv = f"--preset paper --out {tmp_path / 'run'} --max_steps 2 --max_eval_tokens 600 --metrics {tmp_path / 'm'}"
    assert main(argv.split()) == 0
    metrics = json.loads((tmp_path / "m").read_text())
    assert metrics["params"] == 24_175_600
    assert metrics["steps"] == 2
    model = build_model(Config(**Config.presets["paper"]), 10_000)
    load_weights(model, tmp_path / "run" / "weights.pkl")


def test_every_token_can_be_scored(run, tmp_path, text):
    _, out, _, metrics = run("--eval_all", "--epochs", "1")
    corpus = data.load(text)
    assert metrics["valid_all"]["tokens"] == corpus.valid.numel() - 1
    assert metrics["test_all"]["tokens"] == corpus.test.numel() - 1
    assert metrics["valid"]["tokens"] < metrics["valid_all"]["tokens"]
    assert re.search(r"^test_all ppl [\d.]+ ", out, re.M)
    assert "test_all ppl " in (tmp_path / "run" / "log.txt").read_text()
    scored = run("--eval", "--eval_all", "--load_weight", tmp_path / "run" / "weights.pkl")[3]
    assert scored["test_all"] == metrics["test_all"]


def test_tensorboard_gets_the_numbers_of_the_metrics(run, tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert run("--tensorboard")[0] == 0
    board = event_accumulator.EventAccumulator(str(tmp_path / "run"))
    board.Reload()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    expected = [(r["step"], pytest.approx(r["valid_loss"], rel=1e-6)) for r in lines if r["event"] == "epoch"]
    assert [(e.step, e.value) for e in board.Scalars("epoch/valid_loss")] == expected
    assert run("--tensorboard", "--overwrite")[0] == 0  # which may delete its files


def test_tensorboard_is_optional(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    code, _, err, _ = run("--tensorboard")
    assert code == 2
    assert err == f"error: --tensorboard: needs the package tensorboard: {pip_install('tensorboard')}\n"


def test_published_mixtures_are_scored_with_their_epsilon(run, tmp_path):
    assert run("--n_experts", "2", "--epochs", "1")[0] == 0
    weights = ("--n_experts", "2", "--load_weight", tmp_path / "run" / "weights.pkl", "--eval")
    choices = ((), ("--mos_epsilon", "1e-8"), ("--mos_epsilon", "0"), ("--mos_epsilon", "1"))
    default, theirs, plain, huge = (run(*weights, *more)[3]["test"]["loss"] for more in choices)
    assert default == theirs
    assert theirs == pytest.approx(plain, abs=1e-5)
    assert huge < plain - 0.1
    code, _, err, _ = run("--load_weight", tmp_path / "run" / "weights.pkl", "--eval")
    assert code == 2
    assert "pass --n_experts 2" in err


def test_notices_and_warnings_are_one_line_each(run, text):
    with warnings.catch_warnings(action="default"):
        code, out, err, _ = run("--max_steps", "1", "--repack")
    assert code == 0
    assert out.splitlines()[1] == f"{text}: a text of your own, not the Penn Treebank"
    (line,) = err.splitlines()
    assert line.startswith("warning: repackaging with seq_len = 13: training windows overlap by 3 positions")
