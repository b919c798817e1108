"""wt103: files, bands of the softmax, weights without bands, and runs from the command line."""

import json
import zipfile

import pytest
import torch

from trellisnet.data import corpus, download, synthetic
from trellisnet.data.corpus import SPLITS, by_frequency, encode, words
from trellisnet.errors import UserError
from trellisnet.heads import LinearSoftmax, SplitSoftmax
from trellisnet.models import count_parameters
from trellisnet.training.config import PROJECT, build_parser, parse
from trellisnet.weights import authors_state_dict
from wt103 import data
from wt103.model import Config, build_model
from wt103.train import main

SMALL = """--emsize 8 --nhid 6 --nout 8 --nlevels 3 --horizon 5 --batch_size 16 --eval_batch_size 3 --aux_freq 2
--epochs 2 --lr 0.02 --max_eval_tokens 1500 --log-interval 50 --cutoffs 20 50""".split()
SAMPLE = PROJECT / "data" / "wikitext"
LINES = {"train": 40, "valid": 20, "test": 20}


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(corpus, "CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for split, content in zip(SPLITS, synthetic.texts(seed=5), strict=True):
        lines = content.splitlines()[: 25 * LINES[split]]
        (folder / f"wiki.{split}.tokens").write_text("".join(f" {line} \n \n" for line in lines))
    return folder


@pytest.fixture
def run(tmp_path, text, capsys):
    def call(*argv, out="run"):
        metrics = tmp_path / "metrics.json"
        metrics.unlink(missing_ok=True)
        argv = [*SMALL, "--data", text, "--out", tmp_path / out, "--metrics", metrics, *argv]
        code = main([str(a) for a in argv])
        printed = capsys.readouterr()
        return code, printed.out, printed.err, json.loads(metrics.read_text()) if metrics.exists() else None

    return call


# -- data --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", corpus.ORDERS)
def test_both_layouts_are_encoded_like_texts_in_memory(text, tmp_path, order):
    texts = [(text / f"wiki.{split}.tokens").read_text() for split in SPLITS]
    expected = encode(map(words, texts), sha256=corpus.digest(texts), label="")
    expected = by_frequency(expected) if order == "frequency" else expected
    plain = tmp_path / "plain"
    plain.mkdir()
    for split, content in zip(SPLITS, texts, strict=True):
        (plain / f"{split}.txt").write_text(content)
    for folder in (text, plain):
        loaded = data.load(folder, order=order)
        assert (loaded.vocabulary, loaded.sha256, loaded.label) == (expected.vocabulary, expected.sha256, "own corpus")
        for split in SPLITS:
            assert getattr(loaded, split).tolist() == getattr(expected, split).tolist()
    (plain / "test.txt").unlink()
    with pytest.raises(UserError, match=r"plain: expected wiki.train.tokens, .* or train.txt, valid.txt, test.txt"):
        data.load(plain, order=order)


def test_synthetic_text_in_either_order():
    first, frequent = (data.load("synthetic", order=order) for order in corpus.ORDERS)
    assert first.label == frequent.label == "synthetic"
    assert sorted(first.vocabulary) == sorted(frequent.vocabulary)
    assert first.vocabulary_sha256 != frequent.vocabulary_sha256
    counts = torch.bincount(frequent.train)
    assert (counts.diff() <= 0).all()


def test_published_corpora_are_named(text, monkeypatch):
    loaded = data.load(text)
    monkeypatch.setattr(data, "SAMPLE_SHA256", loaded.sha256)
    assert data.load(text).label == "WikiText sample"
    monkeypatch.setattr(data, "SAMPLE_SHA256", "")
    monkeypatch.setattr(data, "TOKENS", tuple(getattr(loaded, split).numel() for split in SPLITS))
    monkeypatch.setattr(data, "VOCABULARY", len(loaded.vocabulary))
    assert data.load(text).label == "WikiText-103"


@pytest.mark.skipif(not (SAMPLE / "test.txt").is_file(), reason="needs the WikiText sample in data/wikitext")
def test_the_sample_has_its_published_counts():
    loaded = data.load(SAMPLE)
    assert loaded.label == "WikiText sample"
    assert loaded.train.numel() == 217_646  # WikiText's validation text
    assert loaded.valid.numel() + loaded.test.numel() == 245_569  # and its test text
    assert len(loaded.vocabulary) == 18_328
    assert loaded.vocabulary[:4] == ["<eos>", "=", "Homarus", "gammarus"]


@pytest.fixture
def archive(text, tmp_path, monkeypatch):
    """Serve the text as a zip instead of the published archive."""
    path = tmp_path / "source.zip"
    with zipfile.ZipFile(path, "w") as file:
        for split in SPLITS:
            file.write(text / f"wiki.{split}.tokens", f"wikitext-103/wiki.{split}.tokens")

    def fetch(source, folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / source.name).write_bytes(path.read_bytes())
        return folder / source.name

    monkeypatch.setattr(download, "fetch", fetch)
    return path


def test_the_archive_is_downloaded_and_extracted_if_there_is_no_text(archive, text, tmp_path, capsys):
    folder = tmp_path / "fresh"
    with pytest.raises(UserError, match="fresh: no such folder"):
        data.load(folder)
    assert data.load(folder, download=True).sha256 == data.load(text).sha256
    (folder / "wiki.valid.tokens").unlink()
    assert data.load(folder, download=True).sha256 == data.load(text).sha256  # an interrupted extraction
    (folder / "wiki.valid.tokens").unlink()
    (folder / "wikitext-103-v1.zip").unlink()
    with pytest.raises(UserError, match="expected wiki.train.tokens"):
        data.load(folder, download=True)  # without an archive nothing is added to the files of a user
    assert data.main([str(folder)]) == 0  # unless the user asks for it
    out = capsys.readouterr().out.splitlines()
    assert [line.rsplit(": ")[1] for line in out] == ["already there", "fetched", "already there"]
    assert data.main([str(folder)]) == 0


def test_a_malicious_archive_is_refused(archive, tmp_path, capsys):
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr("../outside.txt", "x")
    assert data.main([str(tmp_path / "fresh")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert "'../outside.txt', which leads out of its folder" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "outside.txt").exists()
    assert [p.name for p in (tmp_path / "fresh").iterdir()] == ["wikitext-103-v1.zip"]


# -- model -------------------------------------------------------------------------------------------------------------


def config(*argv):
    return parse(Config, argv)[0]


@pytest.mark.parametrize(
    ("argv", "size", "bands"),
    [
        ([], 75_000, None),
        ([], 75_001, [2800, 20000]),
        ([], 76_000, [2800, 20000]),
        ([], 76_001, [2800, 20000, 76000]),
        ([], 267_735, [2800, 20000, 76000]),
        (["--cutoffs", "0"], 267_735, None),
        (["--cutoffs", "5", "9"], 10, [5, 9]),
        (["--cutoffs", "0", "--n_experts", "2"], 267_735, None),
    ],
)
def test_bands(argv, size, bands):
    assert config(*argv).bands(size) == bands


@pytest.mark.parametrize(("preset", "size"), [("default", 181_710_042), ("paper", 178_000_042)])
def test_sizes_on_the_whole_corpus(preset, size):
    with torch.device("meta"):
        model = build_model(config("--preset", preset), 267_735)
    assert count_parameters(model) == size
    assert isinstance(model.head, SplitSoftmax)
    assert model.head.tail_vectors.numel() + model.head.tail_bias.numel() == 1_539
    assert model.head.weight is model.embedding.weight


def test_size_of_the_small_preset_on_the_sample():
    model = build_model(config("--preset", "small"), 18_328)
    assert isinstance(model.head, LinearSoftmax)
    assert count_parameters(model) == 2_995_992


def test_defaults_are_those_of_the_authors_script():
    c = config()
    released = {
        "name": "Trellis_wordWT103", "emsize": 512, "nhid": 1600, "nout": 512, "lr": 1e-3, "clip": 0.07, "epochs": 25,
        "batch_size": 40, "nlevels": 75, "horizon": 75, "dropout": 0.1, "dropouti": 0.1, "wdrop": 0, "emb_dropout": 0,
        "dropouth": 0.1, "wdecay": 0, "tied": True, "seed": 1111, "anneal": 5, "cuda": True, "wnorm": True,
        "temporalwdrop": True, "optim": "Adam", "repack": True, "aux": 0.1, "aux_freq": 25, "seq_len": 0,
        "log_interval": 100, "when": [15, 20], "ksize": 2, "dilation": [1], "n_experts": 0, "load": "",
        "load_weight": "", "eval_batch_size": 1, "eval": False, "vocab_order": "appearance",
    }  # fmt: skip
    assert {name: getattr(c, name) for name in released} == released
    assert c.data_folder() == str(PROJECT / "data" / "wikitext-103")
    flags = {flag for action in build_parser(Config)._actions for flag in action.option_strings}
    assert {f"--{name.replace('log_', 'log-')}" for name in released} <= flags
    assert [config("--preset", p).vocab_order for p in ("paper", "small")] == ["frequency", "frequency"]


# -- command line ------------------------------------------------------------------------------------------------------


def test_train_resume_and_score(run, tmp_path):
    code, out, err, whole = run()
    assert (code, err) == (0, "")
    assert "softmax split at 20, 50" in out
    assert "softmax: split at 20, 50" in (tmp_path / "run" / "log.txt").read_text()
    assert whole["test"]["ppl"] < 40  # 100 at first
    assert whole["peak_memory"] > 10**8
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["vocabulary"] == whole["vocabulary"]

    run("--epochs", "1", out="parts")
    code, _, err, parts = run("--epochs", "2", "--resume", out="parts")
    assert (code, err) == (0, "")
    weights = [torch.load(tmp_path / out / "weights.pkl", weights_only=True) for out in ("run", "parts")]
    assert list(weights[0])[-2:] == ["criterion.tail_vectors", "criterion.tail_bias"]
    assert weights[0]["criterion.tail_vectors"].abs().min() > 0  # trained
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert parts["test"] == whole["test"]

    scored = run("--eval", "--load_weight", tmp_path / "run" / "weights.pkl", out="unused")[3]
    assert scored["test"] == whole["test"]


def test_weights_without_tail_vectors_are_refused_or_mark_the_score(run, text, tmp_path):
    model = build_model(config(*SMALL), len(data.load(text).vocabulary))
    state = {name: t for name, t in authors_state_dict(model).items() if not name.startswith("criterion.")}
    torch.save(state, tmp_path / "theirs.pkl")
    code, _, err, _ = run("--eval", "--load_weight", tmp_path / "theirs.pkl")
    assert code == 2
    assert "criterion.tail_vectors: the authors' script trains the tail vectors but does not save them" in err
    assert err.count("\n") == 1
    code, out, err, metrics = run("--eval", "--load_weight", tmp_path / "theirs.pkl", "--init_tail")
    assert (code, err) == (0, "")
    assert metrics["test"]["init_tail"]
    assert "(partial, tail vectors not trained)" in out
    flags = "--load_weight", tmp_path / "theirs.pkl", "--init_tail", "--max_steps", "1", "--eval_depths", "2"
    hardly = run(*flags, out="hardly")[3]
    assert all(hardly[split]["init_tail"] for split in ("valid", "test", "valid_depth_2", "test_depth_2"))
    trained = run("--load_weight", tmp_path / "theirs.pkl", "--init_tail", "--epochs", "1")[3]
    assert "init_tail" not in trained["test"]
    code, _, err, _ = run("--eval", "--load_weight", tmp_path / "theirs.pkl", "--init_tail", "--cutoffs", "0")
    assert code == 2
    assert err.endswith("only a split softmax (one with cutoffs) has tail vectors; pass --no-init_tail\n")


def test_weights_of_another_vocabulary_order_are_refused(run, tmp_path):
    run("--max_steps", "2")
    weights = tmp_path / "run" / "weights.pkl"
    code, _, err, _ = run("--eval", "--load_weight", weights, "--vocab_order", "frequency")
    assert code == 2
    assert "was trained on another vocabulary" in err
    assert "--vocab_order" in err
    code, _, err, _ = run("--resume", "--vocab_order", "frequency", "--epochs", "3")
    assert code == 2
    assert "--vocab_order frequency: the run in" in err


def test_an_unwritable_cache_is_replaced_by_one_in_the_home_folder(run, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(corpus, "CACHE", tmp_path / "file" / "cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    assert run("--max_steps", "1")[0] == 0
    assert len(list((tmp_path / "own" / "trellisnet").glob("words-*"))) == 1


def test_weights_of_other_bands_are_refused(run, tmp_path):
    """The number of bands, and so all shapes, are the same."""
    run("--max_steps", "2")
    weights = tmp_path / "run" / "weights.pkl"
    code, _, err, _ = run("--eval", "--load_weight", weights, "--cutoffs", "30", "60")
    assert code == 2
    assert "was trained with another split of the softmax; pass --cutoffs 20 50" in err
    run("--max_steps", "1", "--cutoffs", "0", out="plain")
    code, _, err, _ = run("--eval", "--load_weight", tmp_path / "plain" / "weights.pkl", "--init_tail")
    assert code == 2
    assert "pass --cutoffs 0" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--cutoffs", "50", "20"], "error: --cutoffs 50 20: expected increasing numbers above 0"),
        (["--cutoffs", "20", "20"], "error: --cutoffs 20 20: expected increasing numbers above 0"),
        (["--cutoffs", "0", "20"], "error: --cutoffs 0 20: expected increasing numbers above 0"),
        (["--cutoffs", "20", "5000"], "error: --cutoffs 5000: must be less than the "),
        (["--n_experts", "2"], "error: --n_experts 2: a mixture of softmaxes has no bands"),
        (["--label_smoothing", "0.1"], "error: --label_smoothing: needs the log-probabilities of all words, but"),
        (["--data", "nowhere"], "error: nowhere: no such folder"),
        (["--vocab_order", "random"], "error: argument --vocab_order: invalid choice"),
        (["--batch_size", "99999"], "error: the corpus is too short for these settings"),
        (["--load_weight", "nothing.pkl"], "error: nothing.pkl: no such file"),
    ],
)
def test_bad_input_gives_one_line_and_exit_code_2(run, argv, message):
    code, _, err, _ = run(*argv)
    assert code == 2
    assert err.startswith(message)
    assert err.count("\n") == 1
