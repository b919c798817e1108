"""scripts/pos_tagging.py and scripts/bench_sparse.py: a sparse embedding, ways of computing a sparse layer."""

import json
import math
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from scripts import bench_sparse as bench
from scripts import pos_tagging as pos
from scripts.reports.tables import TABLES
from trellisnet.data.corpus import ALL_ORDERS
from trellisnet.errors import UserError
from trellisnet.models import count_parameters
from trellisnet.ops import hide_padding
from trellisnet.training.config import PROJECT, parse
from trellisnet.training.distributed import Ranks
from trellisnet.training.gradients import Gradients

SMALL = "--emsize 8 --nhid 6 --threads 1 --lr 0.02".split()


@pytest.fixture
def run(tmp_path, capsys):
    def call(*argv, base=("--data", "synthetic", *SMALL)):
        metrics = tmp_path / "metrics.json"
        metrics.unlink(missing_ok=True)
        threads = torch.get_num_threads()
        code = pos.main([str(a) for a in (*base, "--out", tmp_path / "run", "--metrics", metrics, *argv)])
        torch.set_num_threads(threads)
        printed = capsys.readouterr()
        return code, printed.out, printed.err, json.loads(metrics.read_text()) if metrics.exists() else None

    return call


@pytest.mark.parametrize(("emsize", "blocks", "density", "others"), [(5, 1, 1.0, 2_109), (20, 20, 0.25, 3_309)])
def test_the_papers_sizes(emsize, blocks, density, others):
    model = pos.Tagger(1000, 49, emsize, 10, emb_blocks=blocks, emb_density=density)
    assert count_parameters(model.embedding) == 5_000
    assert count_parameters(model) == 5_000 + others


def test_the_rows_of_the_table(tmp_path, capsys):
    shutil.copytree(PROJECT / "scripts", tmp_path / "scripts")
    (tmp_path / "python").write_text(f'#!/bin/sh\n(IFS="\t"; echo "$*") >>{tmp_path}/calls\n')
    (tmp_path / "python").chmod(0o755)
    command, environment = ["bash", tmp_path / "scripts" / "pos_table.sh"], {**os.environ, "PY": tmp_path / "python"}
    subprocess.run(command, env={**environment, "SMOKE": "1", "ARGS": "--threads 1"}, check=True)
    subprocess.run(command, env={**environment, "ARGS": "--data wsj"}, check=True)
    calls = [line.split("\t")[1:] for line in (tmp_path / "calls").read_text().splitlines()]
    rows = [Path(flags[-1]).parts[-3] for flags in calls]
    assert rows == [row.name for row in TABLES["pos"].rows] * 2
    threads, sizes = torch.get_num_threads(), {}
    for flags in calls[:5]:
        assert pos.main(flags) == 0, capsys.readouterr().err
    torch.set_num_threads(threads)
    for row, flags in zip(rows[5:], calls[5:], strict=True):
        c, _ = parse(pos.Config, flags)
        layers = c.nlevels if c.model == "trellisnet" else None
        model = pos.Tagger(
            1000, 49, c.emsize, c.nhid, num_layers=layers, emb_blocks=c.emb_blocks, emb_density=c.emb_density
        )
        sizes[row] = count_parameters(model) - 5_000
    assert sizes == {
        "dense": 2_109, "sparse": 3_309, "sparse_vocab_down": 3_309, "dense_trellisnet": 2_009,
        "sparse_trellisnet": 3_061,
    }  # fmt: skip


@pytest.mark.parametrize("num_layers", [None, 3])
def test_padding_changes_nothing(num_layers):
    torch.manual_seed(0)
    model, words = pos.Tagger(30, 4, 6, 5, num_layers=num_layers), torch.randint(30, (3, 9))
    lengths = torch.tensor([9, 4, 1])
    together = model(words, lengths)
    for i, n in enumerate(lengths.tolist()):
        assert_close(together[i, :n], model(words[i : i + 1, :n], lengths[i : i + 1])[0])
    assert not torch.equal(model(words[:, :5], torch.tensor([5, 4, 1]))[0], together[0, :5])  # it reads both ways


def test_files_are_read_with_and_without_a_last_blank_line():
    text = "the\tDT\ncat\tNN\n\n\nit\tPRP\nruns\tVBZ"
    expected = [[("the", "DT"), ("cat", "NN")], [("it", "PRP"), ("runs", "VBZ")]]
    assert pos.sentences(text) == pos.sentences(text + "\n\n") == expected
    assert pos.sentences("1 the _ DT\n") == [[("1", "DT")]]
    odd = "10\u00a0000\tCD\na\x85b\tNN\nc\u2028d NN\n \n"  # white space, but not between columns
    assert pos.sentences(odd) == [[("10\u00a0000", "CD"), ("a\x85b", "NN"), ("c\u2028d", "NN")]]
    for bad, message in (
        ("the\tDT\ncat\n", "f, line 2: expected a word and its tag, got 'cat'"),
        ("\n\n", "f: holds no"),
    ):
        with pytest.raises(UserError, match=message):
            pos.sentences(bad, "f")


def test_columns_of_other_formats():
    conllu = (
        "# sent_id = 1\n# text = Don't go\n1-2\tDon't\t_\t_\n1\tDo\tdo\tAUX\n2\tn't\tnot\tPART\n3\t#\t#\tSYM\n"
        "3.1\tgo\tgo\tVERB\n\n# sent_id = 2\n1\tGo\tgo\tVERB\n"
    )
    expected = [[("Do", "AUX"), ("n't", "PART"), ("#", "SYM")], [("Go", "VERB")]]
    assert pos.sentences(conllu, columns=(2, 4)) == expected
    blanks = "1\t10 000\t10000\tNUM\n2\t Đây là\t\tđây là \tPRON\t\n"  # words of French and Vietnamese
    assert pos.sentences(blanks, columns=(2, 4)) == [[("10 000", "NUM"), ("Đây là", "PRON")]]
    assert pos.sentences("EU NNP I-NP I-ORG\n", columns=(1, 2)) == [[("EU", "NNP")]]  # CoNLL-2003
    assert pos.sentences("# #\n$ $\n") == [[("#", "#"), ("$", "$")]]  # words of the Wall Street Journal
    with pytest.raises(UserError, match="text, line 1: expected a word and its tag, got '1 a'"):
        pos.sentences("1 a", columns=(2, 4))


def test_weights_of_another_order_of_the_words_are_refused(run, tmp_path):
    assert run("--vocab_order", "down", "--max_steps", "1")[0] == 0
    weights = ["--eval", "--load_weight", tmp_path / "run" / "weights.pkl"]
    assert run(*weights, "--vocab_order", "frequency")[0] == 0
    code, _, err, _ = run(*weights)
    assert code == 2
    assert "weights.pkl: was trained on another vocabulary (sha256 " in err


def test_a_checkpoint_without_a_vocabulary_is_of_the_same_data():
    config = parse(pos.Config, ["--data", "synthetic"])[0]
    splits = pos.setup(config, torch.device("cpu"), Ranks())[1]
    splits.check_same(splits.fingerprint)
    splits.check_same([*splits.fingerprint[:-1], None])
    with pytest.raises(UserError, match="the data differ"):
        splits.check_same([*splits.fingerprint[:-1], "0" * 64])


def test_unknown_tags_are_errors_without_a_loss():
    torch.manual_seed(0)
    words, tags = {pos.PAD: 0, pos.UNKNOWN: 1, "a": 2, "b": 3}, {"X": 0, "Y": 1}
    known, unknown = [("a", "X"), ("b", "Y"), ("b", "X")], [("a", "Z")]
    task = pos.Tagging(pos.Tagger(4, 2, 4, 3), batch_size=2, eval_batch_size=2, seed=0)
    scores, both = (task.evaluate(pos.encode(data, words, tags, "cpu")) for data in ([known], [known, unknown]))
    assert (scores["tokens"], both["tokens"]) == (3, 4)
    assert both["loss"] == pytest.approx(scores["loss"])
    assert both["accuracy"] == pytest.approx(scores["accuracy"] * 3 / 4)


def test_the_papers_commands(tmp_path, capsys):
    """The three of its README, on a folder of files and on a single one."""
    parts = pos.synthetic()
    lines = ["\n\n".join("\n".join(f"{w}\t{t}" for w, t in sentence) for sentence in part[:40]) for part in parts]
    folder = tmp_path / "wsj"
    folder.mkdir()
    for name, text in zip(("wsj_train.conll", "wsj_dev.conll", "wsj_test.conll"), lines, strict=True):
        (folder / name).write_text(text)
    (tmp_path / "all.conll").write_text("\n\n".join(lines))
    common = "--nhid 10 --epochs 50 --dropouti 0.2 --wdrop 0.2".split()
    threads, sparse = torch.get_num_threads(), "--emsize 20 --emb_density 0.25 --emb_blocks 20".split()
    for name, data, flags in (
        ("pos_dense", folder, ["--emsize", "5"]),
        ("pos_sparse", folder, sparse),
        ("pos_sparse_vocab_down", tmp_path / "all.conll", [*sparse, "--vocab_order", "down"]),
    ):
        argv = [
            *flags,
            *common,
            "--save",
            tmp_path / "logs" / name,
            "--data",
            data,
            "--max_steps",
            "3",
            "--threads",
            "1",
        ]
        assert pos.main([str(a) for a in argv]) == 0, capsys.readouterr().err
        assert (tmp_path / "logs" / name / "weights.pkl").is_file()
    torch.set_num_threads(threads)
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "all.conll: 108 sentences for train, then 6 for valid and 6 for test" in printed.out
    again = ["--resume", "--save", str(tmp_path / "logs" / "pos_dense"), "--max_steps", "5"]
    assert pos.main(again) == 0, capsys.readouterr().err
    torch.set_num_threads(threads)
    assert "run folder: " + str(tmp_path / "logs" / "pos_dense") in capsys.readouterr().out


def test_their_names_of_orders():
    assert set(pos.THEIR_ORDERS.values()) == set(ALL_ORDERS)


def test_padding_and_unknown_words_come_first_from_rare_to_frequent():
    counts = pos.Counter({"<pad>": 0, "<unk>": 0, "a": 3, "b": 1, "c": 3, "d": 2})
    assert pos.ordered(counts, "frequency_up") == ["<pad>", "<unk>", "b", "d", "a", "c"]
    assert pos.ordered(counts, "frequency")[:2] == ["a", "c"]
    assert pos.ordered(counts, "appearance") == list(counts)
    assert sorted(pos.ordered(counts, "random")) == sorted(counts)


def test_it_learns_and_its_weights_score_the_same(run, tmp_path):
    flags = "--emb_blocks 4 --emb_density 0.5 --dropouti 0.1 --wdrop 0.1 --epochs 2".split()
    code, _, err, metrics = run(*flags)
    assert (code, err) == (0, "")
    assert metrics["test"]["accuracy"] > 0.7
    assert "pos_tagging.py" in metrics["command"]
    scored = run(*flags, "--eval", "--load_weight", tmp_path / "run" / "weights.pkl")[3]
    assert scored["test"] == metrics["test"]
    assert run("--resume", "--epochs", "3", base=())[3]["epochs"] == 3


def test_slices_of_a_batch_count_by_their_words():
    """As `--accumulate` promises, they give the gradient and the means of the batch, whose loss is one per word."""
    torch.manual_seed(0)
    task = pos.Tagging(pos.Tagger(9, 3, 4, 4).double(), batch_size=4, eval_batch_size=4, seed=0)
    lengths = torch.tensor([7, 1, 2, 4])
    batch = torch.randint(9, (4, 7)), torch.randint(3, (4, 7)), lengths
    results = []
    for slices in (1, 2, 3):
        config = pos.Config(data="synthetic", batch_size=4, accumulate=slices)
        _, *numbers = Gradients(task, config, Ranks())(batch, None)
        results.append([*numbers, *(parameter.grad.clone() for parameter in task.model.parameters())])
    assert_close(results[1], results[0])
    assert_close(results[2], results[0])


def test_a_plateau_divides_the_rate():
    schedule = pos.setup(pos.Config(data="synthetic", anneal=1, lr=1.0), torch.device("cpu"), Ranks())[2]
    assert [schedule.step(epoch, 1.0 + epoch) for epoch in (1, 2, 3)] == [1.0, 1.0, 0.25]


def test_a_trellisnet_reads_both_ways(run, tmp_path):
    flags = "--model trellisnet --nlevels 3 --epochs 1".split()
    code, _, err, metrics = run(*flags)
    assert (code, err) == (0, "")
    assert metrics["test"]["accuracy"] > 0.5
    names = torch.load(tmp_path / "run" / "weights.pkl", weights_only=True)
    assert {"forwards.weight_h_v", "backwards.weight_h_v"} <= names.keys()
    assert run(*flags, "--eval", "--load_weight", tmp_path / "run" / "weights.pkl")[3]["test"] == metrics["test"]


def test_records_name_the_backend_that_ran(run):
    short = "--model trellisnet --nlevels 2 --max_steps 1".split()
    for flags, expected in (
        ([*short, "--backend", "reference"], "reference"),
        ([*short, "--backend", "fused", "--gates", "eager", "--gemm", "mm"], "fused"),
        (["--max_steps", "1"], "reference"),
    ):
        code, _, err, metrics = run(*flags, "--overwrite")
        assert (code, err, metrics["backend"]) == (0, "", expected)
        if expected == "fused":
            assert (metrics["gates"], metrics["gemm"]) == ("eager", "mm")
    model = pos.Tagger(9, 3, 4, 5, num_layers=2, backend="reference")
    assert model.forwards.backend == model.backwards.backend == "reference"
    config, _ = parse(pos.Config, ["--data", "synthetic"])
    assert config.no_graph(torch.device("cuda")) == "sentences make batches of many shapes"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--nlevels 3", "--nlevels: has no effect on --model lstm; leave it out"),
        ("--backend fused", "--backend fused: only TrellisNet has it; --model lstm needs auto or reference"),
    ],
)
def test_an_lstm_has_no_settings_of_a_trellis(flags, message):
    with pytest.raises(UserError) as e:
        parse(pos.Config, ["--data", "synthetic", *flags.split()])
    assert str(e.value) == message


def test_files_from_the_command_line(run, tmp_path):
    files = []
    for split, part in zip(("train", "valid", "test"), pos.synthetic(), strict=True):
        path = tmp_path / f"{split}.conll"
        path.write_text("\n\n".join("\n".join(f"{w}\t{t}" for w, t in sentence) for sentence in part[:60]))
        files += [f"--{split}", path]
    code, _, err, metrics = run(*files, "--epochs", "1", base=SMALL)
    assert (code, err, metrics["corpus"]) == (0, "", "tagged sentences")
    (tmp_path / "empty").mkdir()
    (tmp_path / "others.conll").write_text("w3-4\tnoun\n")
    for path in files[1::2]:
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    code, out, err, same = run(*files, "--epochs", "1", "--overwrite", base=SMALL)
    assert (code, err, same["data"]) == (0, "", metrics["data"])
    assert "the text is read without byte order marks, and with LF for CR LF and CR (train.conll: CR LF, byte " in out
    for argv, message in (
        (files[:4], "--train, --valid and --test: all three files are needed"),
        (["--data", tmp_path, *files[:2]], "--data: excludes --train, --valid and --test"),
        (["--data", tmp_path / "empty"], "expected one file with train in its name, found none; name three"),
        (["--data", tmp_path / "nowhere"], "nowhere: cannot be read"),
        (["--data", "synthetic", "--columns", "1"], "--columns: expected two numbers other than 0, got 1"),
        (["--data", "synthetic", "--save", "x"], "--save and --out both name the folder of the run"),
        ([*files, "--emb_blocks", "4", "--emb_density", "0.1"], "--emb_density: expected 1/4 to 1"),
        ([*files[:5], tmp_path / "nothing"], "nothing: cannot be read"),
        ([*files[:5], tmp_path / "others.conll"], "test: has no tag of the training text; name the column of the tags"),
    ):
        code, _, err, _ = run(*argv, "--overwrite", base=SMALL)
        assert (code, err.count("\n")) == (2, 1)
        assert message in err


def test_the_ways_of_computing_a_sparse_layer_agree(capsys):
    assert bench.main(["--quick"]) == 0
    assert "40 → 60, 5 parts: parts " in capsys.readouterr().out


def test_a_rank_that_a_signal_stops_at_once_has_no_mean():
    task = pos.Tagging(pos.Tagger(9, 3, 4, 4), batch_size=4, eval_batch_size=4, seed=0)
    result = task.evaluate(SimpleNamespace(lengths=torch.ones(5)), progress=lambda batches, total: ())
    assert (math.isnan(result["loss"]), math.isnan(result["accuracy"]), result["tokens"]) == (True, True, 0)


def test_ids_beyond_a_sentence_have_no_influence():
    torch.manual_seed(0)
    model = pos.Tagger(9, 4, 3, 5)
    task = pos.Tagging(model, batch_size=3, eval_batch_size=3, seed=0)
    words, tags, lengths = torch.randint(9, (3, 7)), torch.randint(4, (3, 7)), torch.tensor([3, 7, 1])
    found = []
    for word, tag in ((0, pos.NO_TAG), (8, 2), (-1, 99)):
        losses, _ = task.loss(hide_padding(words, lengths, word), hide_padding(tags, lengths, tag), lengths)
        found.append([*losses.values(), *torch.autograd.grad(losses["loss"], list(model.parameters()))])
    for other in found[1:]:
        assert_close(other, found[0], rtol=0, atol=0)
    assert_close(model(words, lengths.tolist()), model(words, lengths), rtol=0, atol=0)
