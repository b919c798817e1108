"""`load_pretrained`: models of every kind from the folders of their runs, without data, and `vocabulary.json`."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import trellisnet
from cases import committed
from scripts import export
from scripts import generate as script
from trellisnet import load_pretrained
from trellisnet.data import corpus, synthetic
from trellisnet.data.spelling import SPELLINGS, WORDS
from trellisnet.data.vocabulary import FILE, Vocabulary
from trellisnet.errors import UserError
from trellisnet.evaluation.pretrained import read_vocabulary
from trellisnet.models import TrellisClassifier
from trellisnet.ops import gemm
from trellisnet.training import programs
from trellisnet.training.config import PROJECT, parse, read_run_config

SIZES = "--emsize 8 --nhid 6 --nout 8 --nlevels 3 --horizon 5 --batch_size 8 --aux 0".split()
RUN = "--epochs 1 --max_steps 12 --eval_batch_size 2".split()
CARRIED = ["--repack", "--seq_len", "0"]
KINDS = {
    "words": ("word_ptb", [*SIZES, *CARRIED]),
    "overlapping windows": ("word_ptb", [*SIZES, "--seq_len", "17"]),
    "another depth": ("word_ptb", [*SIZES, *"--seq_len 9 --horizon auto --eval_nlevels 12".split()]),
    "mixture": ("word_ptb", [*SIZES, *CARRIED, "--n_experts", "2"]),
    "awd-lstm": ("word_ptb", ["--model", "awd-lstm", *SIZES, *CARRIED]),
    "authors' stream": ("char_ptb", SIZES),
    "standard stream": ("char_ptb", [*SIZES, "--stream", "standard"]),
    "bands": ("wt103", [*SIZES, "--cutoffs", "10", "40", "--vocab_order", "frequency"]),
}
IMAGES = ["--nhid", "4", "--nlevels", "3", "--epochs", "1", "--max_steps", "1", "--max_eval_tokens", "20"]
PENN = PROJECT / "data" / "penn"


def task_of(folder):
    return programs.get(read_run_config(folder)["task"])


def metrics_of(folder, tmp_path, *flags):
    """Score a run with its task's program."""
    path = tmp_path / "metrics.json"
    argv = ["--run", folder, "--eval", "--max_eval_tokens", 0, "--metrics", path, *flags]
    assert task_of(folder).main([str(word) for word in argv]) == 0
    return json.loads(path.read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_every_kind_scores_and_generates_as_its_program_does(kind, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(corpus, "CACHE", tmp_path / "cache")
    lines, (task, flags), folder = synthetic.texts()[0].splitlines(keepends=True), KINDS[kind], tmp_path / "run"
    splits = {"train": lines[:120], "valid": lines[:10], "test": lines[40:50]}
    for split, part in splits.items():
        (tmp_path / f"{split}.txt").write_text("".join(part))
    assert programs.get(task).main([*flags, *RUN, "--data", str(tmp_path), "--out", str(folder)]) == 0
    loaded = load_pretrained(folder)
    text = "".join(splits["test"])
    expected = metrics_of(folder, tmp_path, "--eval_all")["test_all"]
    result = loaded.score(text)
    assert math.isclose(result["loss"], expected["loss"], abs_tol=1e-6)
    assert {key: result[key] for key in ("tokens", "unknown")} == {"tokens": expected["tokens"], "unknown": {}}
    name = "bpc" if task == "char_ptb" else "ppl"
    assert result[name] == pytest.approx(expected[name], rel=1e-6)
    assert result.keys() == {"loss", name, "tokens", "unknown"}
    assert not loaded.model.training

    prompt = text[:9].rsplit(" ", 1)[0]
    written = loaded.generate(prompt, 20, temperature=0.8, top_k=7, seed=3)
    assert written.startswith(prompt)
    capsys.readouterr()
    sampling = ["--temperature", "0.8", "--top_k", "7", "--seed", "3", "--length", "20", "--width", "0"]
    assert script.main(["--run", str(folder), "--prompt", prompt, *sampling]) == 0
    assert capsys.readouterr().out == f"{written}\n"


@pytest.fixture(scope="module")
def loaded(run_folder):
    return load_pretrained(run_folder)


@pytest.fixture
def copied(run_folder, tmp_path):
    return Path(shutil.copytree(run_folder, tmp_path / "copy"))


def test_the_seed_determines_the_text(loaded):
    assert loaded.generate("the", 30, seed=5) == loaded.generate("the", 30, seed=5)
    assert loaded.generate("the", 30, seed=5) != loaded.generate("the", 30, seed=6)
    best = loaded.generate("the", 12, temperature=0)
    assert best == loaded.generate("the", 12, top_k=1, seed=9)
    assert len(loaded.vocabulary.spelling.open_tokens(best)) == 13
    assert len(loaded.vocabulary.spelling.open_tokens(loaded.generate(length=7))) == 7  # from <eos>, not shown


def test_short_texts_are_scored_from_their_second_token_on(loaded):
    assert loaded.model.core.receptive_field > 3
    ids, _ = loaded.vocabulary.encode("the old boat")  # shorter than the history of a window
    with torch.no_grad():
        out = loaded.model(torch.tensor([ids[:-1]])).output
        expected = loaded.model.loss(out, torch.tensor([ids[1:]])).item()
    result = loaded.score("the old boat")
    assert math.isclose(result["loss"], expected, abs_tol=1e-6)
    assert result["tokens"] == 3  # old boat <eos>
    with pytest.raises(UserError, match="text: expected at least 2 words, <eos> included, got 1"):
        loaded.score("\n")


def test_a_vocabulary_without_unk_refuses_unknown_words(loaded):
    with pytest.raises(UserError, match="text: 'Zebra' is not among the .* words of the vocabulary .*; leave it out"):
        loaded.score("the Zebra sat on the Veranda")
    with pytest.raises(UserError, match="prompt: 'The' is not among .*; write the for it"):
        loaded.generate("The boat")


@pytest.mark.filterwarnings("ignore:the model sees only")
def test_images_have_a_model_only(tmp_path):
    for task, channels in (("pmnist", 1), ("cifar10", 3)):
        folder = tmp_path / task
        argv = [*IMAGES, "--data", "synthetic", "--out", str(folder)]
        assert programs.get(task).main(argv) == 0
        loaded = load_pretrained(folder)
        assert isinstance(loaded.model, TrellisClassifier)
        assert loaded.vocabulary is None
        assert not (folder / FILE).exists()
        assert loaded.model(torch.zeros(2, 9, channels)).logits.shape == (2, 10)
        for method in (loaded.score, loaded.generate):
            with pytest.raises(UserError, match="needs a language model; this one classifies images"):
                method("text")


def test_nothing_but_the_package_is_imported_and_only_on_demand(run_folder, tmp_path):
    code = f"""
import sys, trellisnet
assert not [name for name in sys.modules if name.startswith(("trellisnet.training", "trellisnet.evaluation"))]
trellisnet.load_pretrained({str(run_folder)!r}).score("the boat")
assert not set({programs.TASKS!r}).intersection(name.partition(".")[0] for name in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    with pytest.raises(AttributeError, match="has no attribute 'load_petrained'"):
        trellisnet.load_petrained  # noqa: B018


# --- those in results/

LANGUAGE = [
    path.parent for path in committed("results/*/weights.pkl") if "emsize" in path.with_name("config.json").read_text()
]


@pytest.mark.parametrize("folder", LANGUAGE, ids=lambda path: path.name)
def test_shipped_language_models_have_their_vocabulary(folder):
    vocabulary = read_vocabulary(folder / "weights.pkl")
    assert vocabulary.sha256 == json.loads((folder / "config.json").read_text())["vocabulary"]
    content = json.loads((folder / FILE).read_text())
    assert list(content["ids"]) == sorted(content["ids"])


def test_shipped_models_are_named(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    loaded = load_pretrained("word_ptb_small")
    assert len(loaded.vocabulary) == 10_000
    text = "the company said it expects to report a loss\nanalysts said the zebra is Big\n"
    result = loaded.score(text)
    assert result["loss"] == pytest.approx(2.535, abs=0.01)
    assert result["ppl"] == pytest.approx(math.exp(result["loss"]))
    assert (result["tokens"], result["unknown"]) == (16, {"zebra": 1, "Big": 1})
    replaced = text.replace("zebra", "<unk>").replace("Big", "<unk>")
    assert loaded.score(replaced) == {**result, "unknown": {}}
    with pytest.raises(UserError, match="text: 'é' is not among the 50 symbols of the vocabulary; leave it out"):
        load_pretrained("char_ptb_small").score("café")


@pytest.mark.skipif(not (PENN / "test.txt").is_file(), reason="needs Penn Treebank in data/penn")
@pytest.mark.filterwarnings("ignore:.*train.txt of the Penn Treebank, but valid.txt, test.txt of another text")
def test_the_score_of_a_text_is_that_of_the_program_on_it_as_data(tmp_path):
    lines = (PENN / "test.txt").read_text().splitlines(keepends=True)
    text = "".join(lines[100:120])
    for split in ("valid", "test"):
        (tmp_path / f"{split}.txt").write_text(text)
    (tmp_path / "train.txt").symlink_to(PENN / "train.txt")  # the vocabulary is that of the whole corpus
    folder = PROJECT / "results" / "word_ptb_small"
    expected = metrics_of(folder, tmp_path, "--data", tmp_path, "--eval_batch_size", 1, "--precision", "fp32")["test"]
    result = load_pretrained("word_ptb_small", precision="fp32").score(text)
    assert math.isclose(result["loss"], expected["loss"], abs_tol=1e-6)
    assert (result["tokens"], result["unknown"]) == (expected["tokens"], {})
    assert 50 < result["ppl"] < 200


# --- vocabulary.json


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
def test_a_vocabulary_comes_back(spelling, tmp_path):
    tokens = ["the", "<eos>", "é", "\x1b[2J", '"', "\\", "_"]
    Vocabulary(tokens, spelling).save(tmp_path / FILE)
    again = Vocabulary.load(tmp_path / FILE)
    assert (list(again.tokens), again.spelling) == (tokens, spelling)
    assert again.sha256 == corpus.digest_of_tokens(tokens)


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", "{", '{"ids": {"a": 0}}',
        '{"spelling": "runes", "ids": {"a": 0}}', '{"spelling": "words", "ids": {}}',
        '{"spelling": ["words"], "ids": {"a": 0}}', '{"spelling": "words", "ids": {"a": 1}}',
        '{"spelling": "words", "ids": {"a": 0, "b": 0}}', '{"spelling": "words", "ids": {"a": false}}',
        '{"spelling": "words", "ids": ["a"]}', '{"spelling": "words", "ids": {"a": 0.0}}', "[" * 100_000,
    ],
)  # fmt: skip
def test_a_corrupt_vocabulary_is_refused(content, copied):
    (copied / FILE).write_text(content)
    with pytest.raises(UserError, match=f"^{re.escape(str(copied / FILE))}: not a vocabulary, or corrupt"):
        load_pretrained(copied)


def test_files_of_other_runs_are_refused(copied):
    own = Vocabulary.load(copied / FILE)
    Vocabulary([*own.tokens[1:], own.tokens[0]], WORDS).save(copied / FILE)
    line = f"{copied / FILE}: is not the vocabulary of weights.pkl beside it (sha256 "
    with pytest.raises(UserError, match=f"^{re.escape(line)}.*; copy both from one run$"):
        load_pretrained(copied)
    (copied / FILE).unlink()
    with pytest.raises(UserError, match=r"no such file; python scripts/export.py --vocabulary FOLDER makes it"):
        load_pretrained(copied)
    assert export.main(["--vocabulary", str(copied)]) == 0
    assert load_pretrained(copied).vocabulary.tokens == own.tokens
    (copied / "weights.pkl").unlink()
    with pytest.raises(UserError, match="the folder holds no weights.pkl"):
        load_pretrained(copied)
    (copied / "config.json").unlink()
    with pytest.raises(UserError, match="config.json: no such file; name the folder of a run"):
        load_pretrained(copied)


def test_settings_that_make_no_sense_are_refused(copied):
    path = copied / "config.json"
    content = json.loads(path.read_text())
    for name, value, message in [
        ("nlevels", -1, "--nlevels: expected at least 1, got -1"),
        ("nlevels", "3", "config.json: nlevels expects int, got '3'"),
        ("emsize", 9, r"--model trellisnet: .*|encoder.weight has shape \(\d+, 8\), the model needs \(\d+, 9\)"),
        ("model", "transformer", "config.json: model expects one of"),
    ]:
        path.write_text(json.dumps(content | {"settings": content["settings"] | {name: value}}))
        with pytest.raises(UserError, match=message):
            load_pretrained(copied)
    settings = {name: value for name, value in content["settings"].items() if name != "emsize"}
    path.write_text(json.dumps(content | {"settings": settings, "task": "memory"}))
    with pytest.raises(UserError, match="is a run of memory, not of a language or image model"):
        load_pretrained(copied)
    path.write_text("{")
    with pytest.raises(UserError, match=r"config.json: not JSON"):
        load_pretrained(copied)


def test_arguments_that_make_no_sense_are_refused(run_folder):
    with pytest.raises(UserError, match="^precision: expected one of fp32, tf32, bf16, got 'fp16'"):
        load_pretrained(run_folder, precision="fp16")
    with pytest.raises(UserError, match="--precision tf32: needs a CUDA device, got cpu"):
        load_pretrained(run_folder, device="cpu", precision="tf32")
    with pytest.raises(UserError, match="--device warp: not usable here"):
        load_pretrained(run_folder, device="warp")


def test_bf16_is_not_emulated_unless_asked_for(copied, monkeypatch):
    path = copied / "config.json"
    path.write_text(path.read_text().replace('"precision": "fp32"', '"precision": "bf16"'))
    usable = gemm.usable
    for native, precision in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(
            gemm, "usable", lambda *args, native=native: native if args[2] == torch.bfloat16 else usable(*args)
        )
        assert load_pretrained(copied, device="cpu").config.precision == precision
    assert load_pretrained(copied, device="cpu", precision="bf16").config.precision == "bf16"


def test_programs_take_names_of_shipped_models_from_any_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert script.main(["--run", "word_ptb_small", "--prompt", "the", "--length", "3"]) == 0
    assert capsys.readouterr().out.startswith("the ")
    assert script.main(["--run", "word_ptb_smal"]) == 2
    assert capsys.readouterr().err == "error: word_ptb_smal: no such folder; did you mean word_ptb_small?\n"
    # The folder of its data is in the project, not here.
    config, _ = parse(programs.get("cifar10").config_class, ["--run", "cifar10_best", "--eval"])
    assert config.data == str(PROJECT / "data" / "cifar10-jpeg")


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match="^word_ptb_smal: no such folder; did you mean word_ptb_small"):
        load_pretrained("word_ptb_smal")
    with pytest.raises(UserError, match="^qq: no such folder; name the folder of a run, or one of .*word_ptb_small"):
        load_pretrained("qq")


def test_the_file_is_written_with_the_weights_and_taken_by_the_programs(run_folder, copied, tmp_path, capsys):
    assert (run_folder / FILE).read_text().startswith('{\n"spelling": "words",\n"ids": {\n')
    assert export.main([str(run_folder), str(tmp_path / "small"), "--max_eval_tokens", "50"]) == 0
    assert (tmp_path / "small" / FILE).read_bytes() == (run_folder / FILE).read_bytes()
    path = copied / "config.json"
    path.write_text(path.read_text().replace('"data": "synthetic"', '"data": "/nowhere"'))
    capsys.readouterr()
    assert script.main(["--run", str(copied), "--length", "5"]) == 0
    assert capsys.readouterr().out
    (copied / FILE).unlink()
    assert script.main(["--run", str(copied), "--length", "5"]) == 2
    assert "error: /nowhere: no such folder or file" in capsys.readouterr().err


# --- train.py --run


def test_a_run_is_scored_by_its_folder(run_folder, tmp_path, capsys):
    by_run = metrics_of(run_folder, tmp_path)
    argv = ["--config", run_folder, "--load_weight", run_folder / "weights.pkl", "--max_eval_tokens", 0]
    argv += ["--eval", "--metrics", tmp_path / "other.json"]
    assert task_of(run_folder).main([str(word) for word in argv]) == 0
    other = json.loads((tmp_path / "other.json").read_text())
    assert by_run["test"] == other["test"]
    assert by_run["command"] == f"python word_ptb/train.py --run {run_folder} --eval --max_eval_tokens 0 " + (
        f"--metrics {tmp_path / 'metrics.json'}"
    )


def test_mistakes_with_run_are_one_line(run_folder, tmp_path, capsys):
    main = programs.get("word_ptb").main
    folder = str(run_folder)
    for flags, message in [
        (["--run", folder], f"--run {folder}: scores a run, with --eval; continue it with --resume {folder}, or start"),
        (["--run", folder, "--eval", "--config", folder], "--run and --config exclude each other"),
        (["--run", folder, "--eval", "--load_weight", folder], "--run and --load_weight exclude each other"),
        (["--run", folder, "--eval", "--resume"], "--run and --resume exclude each other"),
        (["--run", str(tmp_path), "--eval"], f"--run {tmp_path}: the folder holds no config.json"),
        (["--run", "word_ptb_smal", "--eval"], "word_ptb_smal: no such folder; did you mean word_ptb_small?"),
    ]:
        assert main(flags) == 2
        assert capsys.readouterr().err.startswith(f"error: {message}")
    assert programs.get("char_ptb").main(["--run", folder, "--eval"]) == 2
    assert "config.json: holds settings of word_ptb, not of char_ptb" in capsys.readouterr().err
