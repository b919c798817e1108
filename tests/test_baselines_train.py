"""Baselines from the command line: training, scoring, resuming, weights and error messages."""

import json
import re

import pytest
import torch

import char_ptb.train
import pmnist.train
import word_ptb.train
from test_resume import assert_same, outcome, text_to_get_worse_at
from trellisnet.data import penn
from trellisnet.errors import UserError
from trellisnet.training import checkpoint
from trellisnet.training.config import PROJECT, parse
from word_ptb import data
from word_ptb.model import Config

WORDS = """--data synthetic --emsize 12 --nhid 12 --nout 12 --nlevels 2 --batch_size 80 --eval_batch_size 10
--max_eval_tokens 1500 --log-interval 20 --threads 1 --epochs 2""".split()
MODELS = {
    "awd-lstm": "--model awd-lstm --horizon 20 --lr 5",
    "tcn": "--model tcn --preset small --horizon 10 --seq_len 30 --lr 1",
    "rhn": "--model rhn --horizon 20",
    "sparse-lstm": "--model sparse-lstm --horizon 20 --lr 5 --emb_blocks 4 --emb_density 0.5",
}


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(tmp_path, capsys):
    """Return a function that runs a program: exit code, standard output, standard error, metrics (or None)."""

    def call(*argv, main=word_ptb.train.main, base=WORDS, out="run"):
        metrics = tmp_path / "metrics.json"
        metrics.unlink(missing_ok=True)
        code = main([str(a) for a in (*base, "--out", tmp_path / out, "--metrics", metrics, *argv)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err, json.loads(metrics.read_text()) if metrics.exists() else None

    return call


@pytest.mark.parametrize("name", MODELS)
def test_every_core_learns_and_its_weights_score_the_same(run, tmp_path, name):
    flags = MODELS[name].split()
    code, out, err, metrics = run(*flags, "--mc_dropout", "2")
    assert (code, err) == (0, "")
    assert (metrics["preset"].startswith(name), metrics["backend"]) == (True, "reference")
    assert metrics["valid"]["ppl"] < 130 < metrics["corpus"].count("") * 1e3  # 154 at first
    assert metrics["test_mc"]["passes"] == 2
    assert re.search(r"^test_mc ppl [\d.]+ ", out, re.M)
    weights = ("--load_weight", tmp_path / "run" / "weights.pkl", "--eval")
    scored = run(*flags, *weights)[3]
    assert scored["test"] == metrics["test"]
    other = "rhn" if name != "rhn" else "awd-lstm"
    code, _, err, _ = run(*MODELS[other].split(), *weights)
    assert code == 2
    assert err.endswith(f"weights.pkl: was trained with another core; pass --model {name}\n")
    code, _, err, _ = run(*flags, *weights, "--nlevels", "3")
    assert code == 2
    assert "the sizes that it was trained with (see the config.json of its run)" in err
    code, _, err, _ = run(*"--horizon 20 --repack --seq_len 0 --aux 0".split(), *weights)
    assert (code, "pass --model " + name in err) == (2, True)


@pytest.mark.parametrize("name", MODELS)
def test_resumed_within_an_epoch_it_ends_bit_equal(run, tmp_path, name):
    flags = MODELS[name].split()
    assert run(*flags, out="whole")[0] == 0
    whole = outcome(tmp_path / "whole")
    assert run(*flags, "--max_steps", whole[1]["step"] // 2 + 2, out="parts")[0] == 0
    carry = checkpoint.load(tmp_path / "parts" / "last.pt")["carry"]
    assert (carry is None) == (name == "tcn")
    assert run("--resume", "--max_steps", "0", base=[], out="parts")[0] == 0
    assert_same(outcome(tmp_path / "parts"), whole)


def test_separate_masks_and_passes_in_a_file(run, tmp_path):
    flags = [*MODELS["rhn"].split(), "--rhn_masks", "separate"]
    assert run(*flags, "--max_steps", "30")[0] == 0
    weights = (*flags, "--load_weight", tmp_path / "run" / "weights.pkl", "--eval")
    whole = run(*weights, "--mc_dropout", "3")[3]
    passes = ("--mc_file", tmp_path / "passes")
    parts = [run(*weights, *passes, "--mc_dropout", n)[3] for n in (3, 3)]
    assert [part["test_mc"] for part in parts] == [whole["test_mc"]] * 2
    more = run(*weights, *passes, "--mc_dropout", "4")[3]
    assert (more["test_mc"]["passes"], more["test"]) == (4, whole["test"])
    for argv, message in (
        (passes, "error: --mc_file: has no effect without --mc_dropout"),
        ((*passes, "--mc_dropout", "2"), f"error: {passes[1]}: holds 4 passes of valid; ask for as many"),
        ((*passes, "--mc_dropout", "9", "--dropout", "0.1"), f"error: {passes[1]}: holds passes with other weights"),
        (
            ("--mc_file", tmp_path / "no" / "x", "--mc_dropout", "2"),
            f"error: --mc_file {tmp_path / 'no' / 'x'}: no such",
        ),
    ):
        code, _, err, _ = run(*weights, *argv)
        assert (code, err.count("\n"), message in err) == (2, 1, True), err
    code, _, err, _ = run(*flags, "--mc_dropout", "9", *passes, out="more")
    assert (code, "holds passes, but the weights are yet to be trained; name a new file\n" in err) == (2, True)
    code, _, err, _ = run(*MODELS["tcn"].split(), "--rhn_masks", "separate")
    assert (code, err) == (2, "error: --rhn_masks: has no effect on --model tcn; leave it out\n")


def test_nonmonotone_averaging(run, tmp_path):
    text = text_to_get_worse_at(tmp_path / "text")
    flags = "--model awd-lstm --horizon 20 --optim Adam --lr 0.03 --nonmono 1 --epochs 5".split()
    flags += "--dropout 0 --dropouti 0 --wdrop 0 --batch_size 40".split()
    code, out, err, _ = run(*flags, "--data", text)
    assert (code, err) == (0, "")
    assert "averaging from here on" in out
    last = checkpoint.load(tmp_path / "run" / "last.pt")
    assert last["schedule"]["averaging"]
    assert last["schedule"]["lr"] == 0.03
    assert last["average"] is not None


@pytest.mark.parametrize("name", [*MODELS, "trellisnet", "mixture"])
def test_every_core_is_finetuned_from_its_weights(run, tmp_path, name):
    others = {
        "trellisnet": "--horizon 20 --seq_len 40 --aux 0",
        "mixture": "--model awd-lstm --preset mos --horizon 20 --mos_epsilon 0",
    }
    flags = [*{**MODELS, **others}[name].split(), "--optim", "SGD", "--lr", "2"]
    assert run(*flags, "--max_steps", "20")[0] == 0
    weights = ("--load_weight", tmp_path / "run")
    code, out, err, metrics = run(
        *flags, *weights, "--finetune", "--nonmono", "1", "--max_steps", "20", out="finetuned"
    )
    assert (code, err, "as loaded: valid ppl " in out) == (0, "", True)
    assert (metrics["best_epoch"], metrics["steps"]) == (0, 20)  # no epoch is finished
    last = checkpoint.load(tmp_path / "finetuned" / "last.pt")
    assert last["schedule"]["averaging"]
    assert last["average"] is not None
    assert run(*flags, *weights, "--eval")[3]["test"] == metrics["test"]


def test_finetuning_that_makes_no_sense_is_refused(run):
    for flags, message in (
        (["--finetune"], "error: --finetune: has no effect without --load_weight"),
        (["--preset", "finetune"], "error: --finetune: has no effect without --load_weight"),
        (["--preset", "finetune", "--load_weight", "x", "--schedule", "cosine"], "error: --schedule cosine: "),
        (["--min_epochs", "3"], "error: --min_epochs: has no effect without --finetune"),
        (["--finetune", "--load_weight", "x", "--ema", "0.9"], "error: --ema: --finetune averages the weights as well"),
    ):
        code, _, err, _ = run(*MODELS["awd-lstm"].split(), *flags)
        assert (code, err.count("\n"), err.startswith(message)) == (2, 1, True), err


def test_learning_to_recite(run):
    flags = "--model awd-lstm --preset recite --horizon 20 --epochs 3".split()
    code, out, err, metrics = run(*flags)
    assert (code, err) == (0, "")
    assert metrics["test"].keys() >= {"accuracy", "ppl", "loss", "tokens"}
    accuracies = [float(a) for a in re.findall(r"train accuracy ([\d.]+)", out)]
    assert accuracies == sorted(accuracies)
    assert 0.1 < accuracies[-1] < 1
    code, _, err, _ = run(*flags, "--eval_all")
    assert (code, err.startswith("error: --recite: ")) == (2, True)


@pytest.mark.parametrize("name", ["awd-lstm", "tcn"])
def test_characters(run, name):
    flags = {"awd-lstm": "--horizon 30", "tcn": "--horizon 10 --seq_len 40 --no-repack"}[name].split()
    base = [*WORDS, "--model", name, "--max_steps", "12", *flags]
    code, _, err, metrics = run(main=char_ptb.train.main, base=base)
    assert (code, err) == (0, "")
    assert metrics["valid"]["bpc"] < 6


def test_images(run):
    base = "--data synthetic --model tcn --nhid 4 --nlevels 7 --max_steps 3 --max_eval_tokens 64 --mc_dropout 2".split()
    code, _, err, metrics = run(main=pmnist.train.main, base=base)
    assert (code, err) == (0, "")
    assert metrics["test_mc"].keys() >= {"accuracy", "passes"}
    code, _, err, _ = run("--preset", "8m", main=pmnist.train.main, base=base)
    assert code == 2
    assert err == "error: --preset 8m: not a preset of --model tcn; expected tcn\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--model lstm", "argument --model: invalid choice: 'lstm'"),
        ("--model rhn --preset paper", "--preset paper: not a preset of --model rhn; expected rhn, rhn-depth-1"),
        ("--preset depth-3", "--preset: expected one of default, paper"),
        (
            "--model trellisnet --preset rhn",
            "--preset rhn: not a preset of --model trellisnet; expected default",
        ),
        ("--model rhn --ksize 5", "--ksize: has no effect on --model rhn"),
        ("--model rhn --wdrop .5", "--wdrop: has no effect on --model rhn"),
        ("--model awd-lstm --aux 0.1", "--aux: has no effect on --model awd-lstm"),
        ("--sparse_mode sparse_all", "--sparse_mode: has no effect on --model trellisnet"),
        (
            "--model rhn --nhid 500",
            "--nout 830: the output of a recurrent highway network is its state; pass --nout 500",
        ),
        ("--model tcn --repack", "--repack: a TCN carries no state"),
        ("--model tcn --nlevels 31", "--nlevels 31: expected at most 30"),
        ("--model rhn --backend fused", "--backend fused: only TrellisNet has it; --model rhn needs auto or reference"),
        ("--random_length", "--random_length: needs windows that lie end to end"),
        ("--emb_blocks 0", "--emb_blocks: expected at least 1"),
        ("--emb_blocks 4 --emb_density .1", "--emb_density: expected 1/4 to 1 with 4 blocks, got 0.1"),
        ("--model sparse-lstm --sparse_fract 0", "--sparse_fract: expected more than 0 and at most 1, got 0.0"),
        ("--mc_dropout -1", "--mc_dropout: expected at least 0"),
        ("--momentum 1", "--momentum: expected a probability in [0, 1), got 1.0"),
        ("--decay 0.5", "--decay: expected at least 1, got 0.5"),
        ("--anneal_by 0.5", "--anneal_by: expected at least 1, or 0 for the default, got 0.5"),
        ("--vocab_order down", "argument --vocab_order: invalid choice: 'down'"),
    ],
)
def test_invalid_settings_are_named(argv, message):
    with pytest.raises(UserError) as e:
        parse(Config, argv.split())
    assert message in str(e.value)
    assert "\n" not in str(e.value)


def test_sizes_that_leave_nothing_give_one_line(run):
    code, _, err, _ = run("--model", "sparse-lstm", "--sparse_fract", "0.01")
    assert code == 2
    assert err.startswith("error: --model sparse-lstm: reduce_in, reduce_out: ")
    assert err.count("\n") == 1


def test_presets_of_a_core_have_two_names(tmp_path):
    short, long = (parse(Config, argv.split())[0] for argv in ("--model rhn --preset small", "--preset rhn-small"))
    assert short == long
    assert (short.model, short.preset, short.name) == ("rhn", "rhn-small", "rhn-small")
    assert parse(Config, ["--model", "rhn"])[0].nlevels == 10


def test_a_sparse_embedding_sorts_the_vocabulary():
    assert parse(Config, [])[0].order() == "appearance"
    assert parse(Config, ["--emb_blocks", "2", "--emb_density", ".6"])[0].order() == "frequency_up"
    assert parse(Config, ["--emb_blocks", "2", "--vocab_order", "random"])[0].order() == "random"


@pytest.mark.skipif(not (PROJECT / "data" / "penn" / "test.txt").is_file(), reason="needs Penn Treebank in data/penn")
def test_the_penn_treebank_from_rare_to_frequent():
    corpus = data.load(PROJECT / "data" / "penn", order="frequency_up")
    assert corpus.label == penn.LABEL
    assert corpus.vocabulary[:3] == ["aer", "banknote", "berlitz"]
    assert corpus.vocabulary[-4:] == ["N", "<eos>", "<unk>", "the"]
    counts = torch.bincount(corpus.train)
    assert counts[-4:].tolist() == [32_481, 42_068, 45_020, 50_770]
    assert (counts.diff() >= 0).all()
    assert data.load(PROJECT / "data" / "penn", order="frequency").vocabulary[0] == "the"
