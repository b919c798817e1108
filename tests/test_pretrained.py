"""Small weight files: their export, and that those in results/ have the recorded scores."""

import hashlib
import json
import math
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from cases import committed
from scripts import collect, export
from scripts.reports.charts import read_charts
from scripts.reports.tables import PUBLISHED
from trellisnet import load_pretrained, serialization
from trellisnet.errors import UserError
from trellisnet.models import TrellisLanguageModel
from trellisnet.training import programs
from trellisnet.training.config import PROJECT
from trellisnet.weights import WHAT, load_weights, round_weights, save_weights
from word_ptb.train import main as word_ptb_main

FOUND = [path.parent for path in committed("results/*/weights.pkl")]


def model(**options):
    settings = {"output_size": 4, "weight_norm": False, "dtype": torch.float32} | options
    return TrellisLanguageModel(20, 4, 7, 3, **settings)


# --- rounding


@pytest.mark.parametrize("options", [{}, {"weight_norm": True}, {"tied": False}, {"n_experts": 2}, {"cutoffs": [5]}])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_weights_load_rounded_to_nearest(tmp_path, options, dtype):
    first, second = model(**options), model(**options)
    save_weights(first, tmp_path / "w.pkl", vocabulary="abc")
    round_weights(tmp_path / "w.pkl", tmp_path / "small.pkl", dtype)
    load_weights(second, tmp_path / "small.pkl", vocabulary="abc")
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert q.dtype == torch.float32
        assert torch.equal(p.to(dtype).float(), q)
    with pytest.raises(UserError, match="was trained on another vocabulary"):  # the metadata is kept
        load_weights(second, tmp_path / "small.pkl", vocabulary="def")


def test_the_file_has_half_the_size_and_repeated_tensors_once(tmp_path):
    module = TrellisLanguageModel(5000, 40, 60, 3, output_size=40)
    save_weights(module, tmp_path / "w.pkl")
    round_weights(tmp_path / "w.pkl", tmp_path / "small.pkl", torch.float16)
    numbers = sum(p.numel() for p in module.parameters())
    assert 2 * numbers < (tmp_path / "small.pkl").stat().st_size < 2.1 * numbers
    state = serialization.load(tmp_path / "small.pkl", WHAT)
    assert all(tensor.dtype == torch.float16 for tensor in state.values())
    assert list(state) == list(serialization.load(tmp_path / "w.pkl", WHAT))


def test_numbers_that_are_too_large_are_refused(tmp_path):
    module = model()
    with torch.no_grad():
        module.core.weight_h[0, 0, 0] = 1e6
    save_weights(module, tmp_path / "w.pkl")
    with pytest.raises(UserError, match="weight2_raw holds numbers that are too large for torch.float16"):
        round_weights(tmp_path / "w.pkl", tmp_path / "small.pkl", torch.float16)
    assert not (tmp_path / "small.pkl").exists()
    wide = model(dtype=torch.float64)
    with torch.no_grad():
        wide.core.weight_h[0, 0, 0] = 1e300
    save_weights(wide, tmp_path / "wide.pkl")
    before = {name: p.clone() for name, p in module.named_parameters()}
    with pytest.raises(UserError, match="weight2_raw holds numbers that are too large for torch.float32"):
        load_weights(module, tmp_path / "wide.pkl")
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())


def test_other_dtypes_are_refused(tmp_path):
    state = {"encoder.weight": torch.zeros(3, 3).to(torch.float8_e4m3fn)}
    torch.save(state, tmp_path / "w.pkl")
    with pytest.raises(UserError, match="encoder.weight has dtype torch.float8_e4m3fn"):
        load_weights(model(), tmp_path / "w.pkl")


# --- the program


def test_an_export_has_the_scores_it_records(run_folder, tmp_path, capsys):
    out = tmp_path / "results" / "tiny"
    assert export.main([str(run_folder), str(out), "--partial", "150"]) == 0
    assert re.search(r"weights.pkl: 0.01 MB, float16; scores in", capsys.readouterr().out)
    recorded = json.loads((out / "weights.json").read_text())
    assert recorded["sha256"] == hashlib.sha256((out / "weights.pkl").read_bytes()).hexdigest()
    assert recorded["bytes"] == (out / "weights.pkl").stat().st_size
    assert recorded["valid"]["tokens"] > recorded["partial"]["valid"]["tokens"] >= 150
    assert "partial" not in recorded["valid"]
    ends = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert recorded["before_rounding"]["valid"] == ends[-1]["valid"]
    check(out, tmp_path, "valid", recorded["partial"]["valid"], "--max_eval_tokens", "150")
    check(out, tmp_path, "test", recorded["test"])
    config = json.loads((out / "config.json").read_text())
    assert not {"command", "device", "threads"} & set(config)
    assert config["settings"]["gemm"] == config["settings"]["gates"] == config["settings"]["device"] == "auto"
    assert (out / "log.txt").read_bytes() == (run_folder / "log.txt").read_bytes()

    capsys.readouterr()
    assert export.main([str(run_folder), str(out)]) == 2
    assert re.fullmatch(
        r"error: .*: holds weights.pkl of another export or run; .*--overwrite\n", capsys.readouterr().err
    )
    (out / "log.txt").write_text("of another run")
    (out / "weights.pkl").unlink()
    assert export.main([str(run_folder), str(out)]) == 2
    assert "holds log.txt of another" in capsys.readouterr().err


def test_an_export_keeps_the_depth_that_validated_best(tmp_path, sizes):
    run, out = tmp_path / "run", tmp_path / "words"
    flags = "--data synthetic --max_steps 3 --max_eval_tokens 200 --eval_depths 2 9 --eval_nlevels auto".split()
    assert word_ptb_main([*sizes, *flags, "--out", str(run)]) == 0
    assert export.main([str(run), str(out), "--partial", "50", "--max_eval_tokens", "200"]) == 0
    recorded = json.loads((out / "weights.json").read_text())
    layers = recorded["test"]["nlevels"]
    assert layers in (2, 9, json.loads((run / "config.json").read_text())["settings"]["nlevels"])
    settings = json.loads((out / "config.json").read_text())["settings"]
    assert (settings["eval_nlevels"], settings["eval_depths"]) == (layers, [])
    assert {recorded["partial"][split]["nlevels"] for split in ("valid", "test")} == {layers}
    assert load_pretrained(out).model.core.num_layers == layers  # without a warning


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_export_of_any_name_can_be_read(run_folder, tmp_path, capsys):
    """By everything that reads results/, beside the existing ones."""
    root = tmp_path / "project"
    for path in (*committed("results/**/*"), *committed("*.md")):
        copy = root / path.relative_to(PROJECT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)  # some are written
    out = root / "results" / "my_words"
    assert export.main([str(run_folder), str(out), "--partial", "50", "--max_eval_tokens", "50"]) == 0
    record = json.loads((out / "weights.json").read_text()) | {"commit": "0123456789ab"}  # this one may be uncommitted
    (out / "weights.json").write_text(json.dumps(record))
    for name in ("cifar_of_words", "table6_mine", "precision", "compare_5_minutes"):
        shutil.rmtree(root / "results" / name, ignore_errors=True)
        shutil.copytree(out, root / "results" / name)
    tables = {chart.name for chart in read_charts(root)}
    assert "table6_small" in tables
    assert not {"table6_mine", "precision", "compare_5_minutes"} & tables
    capsys.readouterr()
    assert collect.main(["--root", str(root)]) == 0  # none of these has a metrics.json
    assert capsys.readouterr().err.count("has no metrics.json, so it is left out\n") == 5
    for name in ("log.txt", "metrics.jsonl", "metrics.json", "weights.json"):
        (out / name).write_bytes((PROJECT / "results" / "word_ptb_small" / name).read_bytes())
    assert collect.main(["--root", str(root)]) == 0
    before, headings = (
        re.findall("^## (word_ptb|char_ptb|wt103|pmnist|cifar10),.*", (folder / "RESULTS.md").read_text(), re.M)
        for folder in (PROJECT, root)
    )
    assert headings == sorted(headings, key=list(PUBLISHED).index)
    assert headings.count("word_ptb") == before.count("word_ptb") + 1


def test_an_export_takes_no_files_of_another_run(tmp_path):
    run, out, new = folders = [tmp_path / name for name in ("run", "out", "new")]
    for folder in folders:
        folder.mkdir()
    (run / "weights.pkl").write_text("of this run")
    for name in (*export.WRITTEN, *export.COPIED):
        (out / name).write_text("of another run")
    export.copy(run, out, new, overwrite=True)
    assert contents(new) == {}


def test_scores_before_rounding_are_those_of_the_last_epoch(run_folder, tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes((run_folder / "metrics.jsonl").read_bytes())
    assert export.before(tmp_path).keys() == {"valid", "test"}
    with (tmp_path / "metrics.jsonl").open("a") as file:  # by --resume, and killed before the end
        file.write('{"event": "epoch"}\n')
    assert export.before(tmp_path) is None


@pytest.fixture
def earlier(run_folder, tmp_path):
    """An export whose scores differ from those of its run by now."""
    out = tmp_path / "results" / "my_words"
    assert export.main([str(run_folder), str(out), "--partial", "150", "--max_eval_tokens", "150"]) == 0
    (out / "weights.json").write_text("{}")
    (out / "metrics.json").write_text('{"given": "by hand"}')
    return out


@pytest.mark.parametrize("how", ["fails", "is stopped", pytest.param("is killed", marks=pytest.mark.slow)])
def test_an_interrupted_export_leaves_the_earlier_one_intact(run_folder, earlier, how, monkeypatch, capsys):
    before = contents(earlier)
    argv = [str(run_folder), str(earlier), "--overwrite"]
    if how == "is killed":
        code = "import os, signal, sys\nfrom scripts import export\n"
        code += "export.score = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\nexport.main(sys.argv[1:])"
        done = subprocess.run([sys.executable, "-c", code, *argv], cwd=PROJECT, check=False)
        assert done.returncode == -signal.SIGKILL
    else:
        program = programs.get("word_ptb")
        main = {"fails": lambda _: 1, "is stopped": lambda _: 143}[how]
        monkeypatch.setattr(program, "main", main)
        assert export.main(argv) == {"fails": 1, "is stopped": 143}[how]
        assert [path.name for path in earlier.parent.iterdir()] == ["my_words"]
        monkeypatch.undo()
    assert contents(earlier) == before
    if how == "is killed":  # its leftovers do not hinder the next export
        assert export.main([*argv, "--partial", "150", "--max_eval_tokens", "150"]) == 0
        assert [path.name for path in earlier.parent.iterdir()] == ["my_words"]
        after = contents(earlier)
        assert json.loads(after["weights.json"])["sha256"] == hashlib.sha256(after["weights.pkl"]).hexdigest()
        assert after["metrics.json"] == before["metrics.json"]  # of the same run


def test_an_export_replaces_nothing_but_exports(run_folder, earlier, capsys):
    (earlier / "README.md").write_text("a card")  # of which scripts/collect.py writes one block anew
    assert export.main([str(run_folder), str(earlier), "--overwrite", "--max_eval_tokens", "50"]) == 0
    assert (earlier / "README.md").read_text() == "a card"
    (earlier / "thesis.tex").write_text("years of work")
    assert export.main([str(run_folder), str(earlier), "--overwrite"]) == 2
    assert "my_words: holds thesis.tex, which no export wrote; name another folder" in capsys.readouterr().err
    file = earlier / "thesis.tex"
    assert export.main([str(run_folder), str(file), "--overwrite"]) == 2
    assert capsys.readouterr().err == f"error: {file}: is a file; name another folder\n"
    assert file.read_text() == "years of work"


def test_a_folder_that_a_kill_left_under_its_hidden_name_is_restored(tmp_path):
    (tmp_path / ".a.old").mkdir()
    (tmp_path / ".a.old" / "file").write_text("old")
    with pytest.raises(RuntimeError), serialization.atomic_folder(tmp_path / "a"):
        raise RuntimeError
    assert (tmp_path / "a" / "file").read_text() == "old"
    with serialization.atomic_folder(tmp_path / "a") as new:
        (new / "file").write_text("new")
        with pytest.raises(UserError, match="another process is at work there"):
            serialization.atomic_folder(tmp_path / "a").__enter__()
    assert (tmp_path / "a" / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_mistakes_are_one_line(run_folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_bytes((run_folder / "config.json").read_bytes())
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"task": "word_ptb", "settings": {"data": 3}}')
    for arguments, message in [
        ([run_folder, tmp_path / "out", "--max_mb", "0.001"], "its weights take 0.0 MB in float16; see --max_mb"),
        ([tmp_path, tmp_path / "out"], "config.json: no such file"),
        ([tmp_path / "empty", tmp_path / "out"], "has no weights.pkl"),
        ([tmp_path / "odd", tmp_path / "out"], "config.json: data expects str, got 3"),
        ([run_folder, run_folder], "is the folder of the run itself; name another"),
        ([run_folder], "the following arguments are required: out"),
    ]:
        assert export.main([str(a) for a in arguments]) == 2
        assert re.fullmatch(f"error: .*{message}.*\n", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_folders_within_the_project_are_named_from_there():
    def data(folder):
        return export.portable({"task": "word_ptb", "settings": {"data": folder}, "command": "x"})["settings"]["data"]

    assert data("") == ""
    assert data("synthetic") == "synthetic"
    assert data(str(PROJECT / "data" / "penn")) == ""
    assert data(str(PROJECT / "data" / "wikitext")) == "data/wikitext"
    assert data("/elsewhere") == "/elsewhere"


def test_git_tracks_weights_of_results_and_no_other_pickles():
    def ignored(path):
        command = ["git", "check-ignore", "-q", "--no-index", path]
        return subprocess.run(command, cwd=PROJECT, check=False).returncode == 0

    if subprocess.run(["git", "rev-parse"], cwd=PROJECT, capture_output=True, check=False).returncode:
        pytest.skip("needs the git checkout")
    assert not ignored("results/word_ptb_small/weights.pkl")
    assert not ignored("tests/fixtures/lm_plain_k2_tied.pkl")
    for path in ("weights.pkl", "results/weights.pkl", "results/a/last.pkl", "results/a/b/weights.pkl", "x/y.pkl"):
        assert ignored(path)


# --- those in results/


def check(folder, tmp_path, split, recorded, *flags):
    """Score the weights in a folder, and compare."""
    program = programs.get(json.loads((folder / "config.json").read_text())["task"])
    command = ["--config", folder / "config.json", "--load_weight", folder / "weights.pkl", "--eval", "--no-download"]
    command += [*data_of(folder), *flags, "--metrics", tmp_path / "again.json"]
    assert program.main([str(part) for part in command]) == 0
    again = json.loads((tmp_path / "again.json").read_text())
    tolerance = 1e-4 if again["precision"] == "fp32" else 5e-3
    assert math.isclose(again[split]["loss"], recorded["loss"], abs_tol=tolerance)
    for count in ("tokens", "examples"):
        assert again[split].get(count) == recorded.get(count)


def data_of(folder):
    """Return the flag for the data of a result, relative to the project; skip if they are missing."""
    config = json.loads((folder / "config.json").read_text())
    if config["settings"]["data"] == "synthetic":
        return []
    data = PROJECT / (config["settings"]["data"] or programs.get(config["task"]).config_class.default_data)
    if not data.is_dir() or not any(data.iterdir()):
        pytest.skip(f"needs {data.relative_to(PROJECT)}")
    return ["--data", data] if config["settings"]["data"] else []


@pytest.mark.parametrize("folder", FOUND, ids=lambda path: path.name)
def test_the_file_matches_its_metrics(folder):
    recorded = json.loads((folder / "weights.json").read_text())
    content = (folder / "weights.pkl").read_bytes()
    assert recorded["sha256"] == hashlib.sha256(content).hexdigest()
    assert len(content) <= 10e6
    assert recorded["commit"]
    assert not recorded["commit"].endswith("-dirty")
    state = serialization.load(folder / "weights.pkl", WHAT)
    assert {str(tensor.dtype) for tensor in state.values()} == {f"torch.{recorded['dtype']}"}
    assert sum(t.numel() for t in {t.data_ptr(): t for t in state.values()}.values()) == recorded["params"]


# The smaller one of each kind of task; all are scored in full below.
@pytest.mark.parametrize(
    "folder",
    [
        pytest.param(path, marks=[pytest.mark.slow] * (path.name == "pmnist_small"))
        for path in FOUND
        if path.name in ("char_ptb_small", "pmnist_small")
    ],
    ids=lambda path: path.name,
)
def test_their_first_scores_are_the_recorded_ones(folder, tmp_path):
    recorded = json.loads((folder / "weights.json").read_text())["partial"]
    check(folder, tmp_path, "test", recorded["test"], "--max_eval_tokens", str(recorded["max_eval_tokens"]))


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOUND, ids=lambda path: path.name)
def test_their_scores_are_the_recorded_ones(folder, tmp_path):
    check(folder, tmp_path, "test", json.loads((folder / "weights.json").read_text())["test"])
