"""char_ptb: spelling of the text, bits per character with both denominators, settings."""

import json
import math

import pytest

from char_ptb import data
from char_ptb.model import Config, build_model
from char_ptb.train import main
from trellisnet.data import corpus, penn
from trellisnet.data.corpus import EOS, SPLITS
from trellisnet.data.spelling import STREAMS
from trellisnet.models import count_parameters
from trellisnet.training.config import PROJECT, build_parser, parse

SMALL = """--emsize 6 --nhid 8 --nout 6 --nlevels 3 --horizon 12 --batch_size 8 --eval_batch_size 3 --aux_freq 2
--epochs 1 --lr 0.01 --max_steps 40 --max_eval_tokens 3000 --log-interval 20""".split()
PENN = PROJECT / "data" / "penn"
HAS_PENN = (PENN / "test.txt").is_file()


def test_the_two_spellings():
    text = " a bc \n d <unk> \n"
    assert list(STREAMS["authors"].tokens(text)) == [*" a bc ", EOS, *" d <unk> ", EOS]
    assert list(STREAMS["standard"].tokens(text)) == [*"a_bc", EOS, *"d_<unk>", EOS]
    # Only `standard` ends a last line without a line feed by `<eos>`.
    assert data.symbols([text, "x y", "\n"]) == {
        "authors": {"train": 17, "valid": 3, "test": 1}, "standard": {"train": 13, "valid": 4, "test": 1},
    }  # fmt: skip


@pytest.mark.skipif(not HAS_PENN, reason="needs Penn Treebank in data/penn")
def test_the_penn_treebank_has_its_published_counts():
    loaded = data.load(PENN)
    assert [getattr(loaded, split).numel() for split in SPLITS] == [5_101_618, 399_782, 449_945]
    alphabet = " aerbnkotlizcwyusfmghd-qpx\0<>Njv.'1950&$324867#\\/*"
    assert ["\0" if token == EOS else token for token in loaded.vocabulary] == list(alphabet)
    assert loaded.vocabulary.index(EOS) == 26
    used = {split: set(getattr(loaded, split).tolist()) for split in SPLITS}
    assert [len(used[split]) for split in SPLITS] == [50, 50, 48]
    assert {loaded.vocabulary[i] for i in used["train"] - used["test"]} == {"4", "*"}
    standard = data.load(PENN, stream="standard")
    assert [getattr(standard, split).numel() for split in SPLITS] == [5_017_482, 393_042, 442_423]
    assert len(standard.vocabulary) == 50
    assert standard.spelled == loaded.spelled
    ratio = loaded.spelled["authors"]["test"] / loaded.spelled["standard"]["test"]
    assert 1.158 * ratio == pytest.approx(1.1777, abs=5e-5)  # the paper's score on the standard stream
    assert 1.175 / ratio == pytest.approx(1.1554, abs=5e-5)  # a score that equals AWD-LSTM's
    lines = {split: (getattr(loaded, split) == 26).sum().item() for split in SPLITS}
    sizes = [loaded.spelled["authors"][split] - lines[split] for split in SPLITS]
    assert sizes == [5_059_550, 396_412, 446_184]  # as printed in the papers; neither stream has these sizes
    in_five_characters = loaded.spelled["authors"]["test"] + 4 * lines["test"]  # the TCN's `<eos>`
    assert in_five_characters == 464_989
    assert 1.31 * in_five_characters / loaded.spelled["standard"]["test"] == pytest.approx(1.377, abs=5e-4)


def test_other_text_need_not_have_the_counts_of_the_penn_treebank(monkeypatch, tmp_path):
    monkeypatch.setattr(corpus, "CACHE", tmp_path)
    assert data.load("synthetic").label == "synthetic"
    monkeypatch.setattr(penn, "LABEL", "synthetic")
    with pytest.raises(AssertionError, match="the encoder is broken"):
        data.load("synthetic")


@pytest.fixture
def text(tmp_path):
    """Write lines with a space at either end, like the files of the Penn Treebank."""
    folder = tmp_path / "text"
    folder.mkdir()
    for split, lines in (("train", 400), ("valid", 70), ("test", 90)):
        (folder / f"{split}.txt").write_text(" the cat sat on the mat \n a dog ran off \n" * lines)
    return folder


@pytest.fixture
def run(tmp_path, text, capsys):
    def call(*argv, out="run"):
        metrics = tmp_path / "metrics.json"
        argv = [*SMALL, "--data", text, "--out", tmp_path / out, "--metrics", metrics, "--overwrite", *argv]
        code = main([str(a) for a in argv])
        printed = capsys.readouterr()
        return code, printed.out, printed.err, json.loads(metrics.read_text()) if metrics.exists() else None

    return call


@pytest.mark.parametrize("stream", ["authors", "standard"])
def test_bits_per_character_with_both_denominators(run, text, tmp_path, stream):
    code, out, err, metrics = run("--stream", stream)
    assert (code, err) == (0, "")
    spelled = data.load(text).spelled
    for split in ("valid", "test"):
        result = metrics[split]
        assert result["bpc"] == pytest.approx(result["loss"] / math.log(2))
        assert result[f"bpc_{stream}"] == pytest.approx(result["bpc"])
        bits = {name: result[f"bpc_{name}"] * spelled[name][split] for name in STREAMS}
        assert bits["authors"] == pytest.approx(bits["standard"])  # the same bits, divided by different numbers
    assert metrics["test"]["bpc"] < 3.5  # 3.9 at first, of 15 symbols
    other = {"authors": "standard", "standard": "authors"}[stream]
    assert f"test bpc {metrics['test']['bpc']:.4f}  bpc_{other} {metrics['test'][f'bpc_{other}']:.4f}  loss" in out
    scored = run("--stream", stream, "--eval", "--load_weight", tmp_path / "run" / "weights.pkl", out="unused")[3]
    assert scored["test"] == metrics["test"]


def test_weights_of_the_other_stream_are_refused(run, tmp_path):
    """Both streams have the same number of symbols, so only the digest of the vocabulary can tell them apart."""
    run()
    code, _, err, _ = run("--stream", "standard", "--eval", "--load_weight", tmp_path / "run" / "weights.pkl")
    assert code == 2
    assert "another vocabulary" in err
    assert "--stream" in err


def test_defaults_are_those_of_the_authors_script():
    c, _ = parse(Config, [])
    released = {
        "dataset": "ptb", "name": "Trellis_charPTB", "emsize": 200, "nhid": 1050, "nout": 200, "lr": 2e-3,
        "clip": 0.2, "epochs": 400, "batch_size": 24, "nlevels": 140, "horizon": 140, "dropout": 0.1, "dropouti": 0.1,
        "wdrop": 0.26, "emb_dropout": 0.02, "dropouth": 0.29, "wdecay": 8e-7, "tied": True, "seed": 1111, "anneal": 5,
        "cuda": True, "wnorm": True, "temporalwdrop": True, "optim": "Adam", "repack": True, "eval": False, "aux": 0.3,
        "aux_freq": 80, "seq_len": 0, "log_interval": 100, "when": [220, 350], "ksize": 2, "dilation": [1],
        "n_experts": 0, "load": "", "load_weight": "", "eval_batch_size": 10, "alpha": 0, "beta": 0,
    }  # fmt: skip
    assert {name: getattr(c, name) for name in released} == released
    flags = {flag for action in build_parser(Config)._actions for flag in action.option_strings}
    assert {f"--{name.replace('log_', 'log-')}" for name in released} <= flags


def test_only_averaging_acts_on_plateaus():
    assert parse(Config, [])[0].patience() == 0
    assert parse(Config, ["--asgd"])[0].patience() == 5


@pytest.mark.parametrize(
    ("preset", "size"), [("default", 14_525_050), ("paper", 13_464_450), ("small", 990_130), ("tiny", 47_074)]
)
def test_sizes(preset, size):
    assert count_parameters(build_model(Config(**Config.presets[preset]), 50)) == size


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data", "nowhere"], "error: nowhere: no such folder"),
        (["--dataset", "text9"], "error: argument --dataset: invalid choice: 'text9'"),
        (["--stream", "x"], "error: argument --stream: invalid choice: 'x'"),
        (["--batch_size", "999999"], "error: the corpus is too short for these settings"),
        (["--no-repack"], "error: --seq_len 0: must be larger than --horizon 12"),
    ],
)
def test_bad_input_gives_one_line_and_exit_code_2(run, argv, message):
    code, _, err, _ = run(*argv)
    assert code == 2
    assert err.startswith(message)
    assert err.count("\n") == 1
