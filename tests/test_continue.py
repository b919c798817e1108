"""README's way to continue a run on another machine from small files: weights in float16, settings, and the log."""

import json
import shutil

import pytest
import torch

from word_ptb.train import main

MODEL = """--data synthetic --emsize 8 --nhid 6 --nout 8 --nlevels 3 --horizon 3 --seq_len 43 --batch_size 80
--aux_freq 2 --threads 1 --max_eval_tokens 4000 --lr 5 --dropouth 0.1""".split()


def events(folder, kind):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["event"] == kind]


def test_a_run_continues_from_small_files(tmp_path, capsys):
    whole, run, small, again = (tmp_path / name for name in ("whole", "run", "small", "again"))
    assert main([*MODEL, "--epochs", "3", "--out", str(whole)]) == 0
    assert main([*MODEL, "--epochs", "1", "--out", str(run)]) == 0

    small.mkdir()
    weights = torch.load(run / "weights.pkl", weights_only=True)
    torch.save({name: tensor.half() for name, tensor in weights.items()}, small / "weights.pkl")
    for name in ("config.json", "metrics.jsonl"):
        shutil.copy(run / name, small)
    largest = max(file.stat().st_size for file in small.iterdir())
    assert largest < 0.8 * (run / "last.pt").stat().st_size
    shutil.rmtree(run)

    lr = events(small, "epoch")[-1]["lr"]
    flags = ["--config", str(small / "config.json"), "--load_weight", str(small / "weights.pkl"), "--lr", str(lr)]
    flags += "--epochs 2 --seed 2 --device auto --threads 0 --gemm auto --gates auto --cuda_graph auto".split()
    capsys.readouterr()
    assert main([*flags, "--out", str(again)]) == 0, capsys.readouterr().err

    before, ours, theirs = events(small, "epoch"), events(again, "epoch"), events(whole, "epoch")
    assert [e["valid_loss"] for e in before] == [e["valid_loss"] for e in theirs[:1]]
    assert ours[0]["train_loss"] < before[0]["train_loss"] - 0.1  # it does not start over
    for ours_, theirs_ in zip(ours, theirs[1:], strict=True):
        assert ours_["train_loss"] == pytest.approx(theirs_["train_loss"], rel=0.02)
        assert ours_["valid_loss"] == pytest.approx(theirs_["valid_loss"], rel=0.02)
    now, then = (json.loads((folder / "config.json").read_text())["settings"] for folder in (again, small))
    changed = {name for name in now if now[name] != then[name]}
    assert changed <= {"load_weight", "lr", "epochs", "seed", "device"}


def test_rounding_to_float16_hardly_changes_a_score(tmp_path):
    assert main([*MODEL, "--epochs", "1", "--out", str(tmp_path / "run")]) == 0
    weights = torch.load(tmp_path / "run" / "weights.pkl", weights_only=True)
    torch.save({name: tensor.half() for name, tensor in weights.items()}, tmp_path / "half.pkl")
    scores = []
    for file in (tmp_path / "run" / "weights.pkl", tmp_path / "half.pkl"):
        metrics = tmp_path / "metrics.json"
        assert main([*MODEL, "--eval", "--load_weight", str(file), "--metrics", str(metrics)]) == 0
        scores.append(json.loads(metrics.read_text())["test"]["loss"])
    assert scores[0] != scores[1]
    assert scores[1] == pytest.approx(scores[0], abs=2e-3)
