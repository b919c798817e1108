"""enwik8 and text8: bytes of a file, their division, cache, download and models."""

import dataclasses
import hashlib
import json
import os
import shutil
import zipfile

import numpy as np
import pytest
import torch

from char_ptb import data
from char_ptb.model import Config, build_model
from char_ptb.train import main
from scripts import generate
from trellisnet.data import corpus, download, wikipedia
from trellisnet.data.corpus import SPLITS
from trellisnet.data.spelling import BYTE_TOKENS, BYTES
from trellisnet.data.vocabulary import Vocabulary
from trellisnet.errors import UserError
from trellisnet.evaluation.pretrained import Pretrained
from trellisnet.models import TrellisLanguageModel, count_parameters
from trellisnet.training.config import parse

SIZE = 200_000
TINY = """--emsize 6 --nhid 8 --nout 6 --nlevels 3 --horizon 12 --batch_size 8 --eval_batch_size 3 --aux_freq 2
--epochs 1 --max_steps 5 --max_eval_tokens 500 --threads 1""".split()


def layout(alphabet, size=SIZE):
    """Bytes of a file with that many different values, each of which occurs at its start."""
    values = np.random.default_rng(0).permutation(256)[:alphabet].astype(np.uint8)
    drawn = np.minimum(np.random.default_rng(1).geometric(0.05, size), alphabet) - 1
    drawn[:alphabet] = np.arange(alphabet)
    return values[drawn].tobytes()


@pytest.fixture(params=["enwik8", "text8"])
def published(request, monkeypatch, tmp_path):
    """A generated file in the place of a dataset, with the number of its byte values and a fiftieth of its size."""
    name, content = request.param, layout(wikipedia.DATASETS[request.param].alphabet, 2_000_000)
    monkeypatch.setattr(corpus, "CACHE", tmp_path / "cache")
    changed = wikipedia.DATASETS[name]._replace(sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(wikipedia.DATASETS, name, changed)
    monkeypatch.setattr(wikipedia, "SYMBOLS", (1_800_000, 100_000, 100_000))
    return name, content


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "CACHE", tmp_path / "cache")
    path = tmp_path / "book"
    path.write_bytes(layout(60))
    return path


def test_a_dataset_is_divided_18_to_1_to_1_by_bytes(published, tmp_path):
    name, content = published
    (tmp_path / name).write_bytes(content)
    loaded = data.load(tmp_path, dataset=name)
    assert (loaded.label, loaded.notices) == (name, ())
    streams = [getattr(loaded, split) for split in SPLITS]
    assert all(stream.dtype == torch.int32 for stream in streams)
    assert (
        b"".join(bytes(BYTE_TOKENS.index(loaded.vocabulary[i]) for i in s.tolist()) for s in streams[1:])
        == (content[1_800_000:])
    )
    first = dict.fromkeys(content)  # by first appearance
    assert loaded.vocabulary == [BYTE_TOKENS[byte] for byte in first]
    assert len(first) == {"enwik8": 205, "text8": 27}[name]
    # 5,000,000 of 100,000,000 bytes, as of these.
    assert [20 * part for part in wikipedia.SYMBOLS[1:]] == [len(content)] * 2


def test_published_sizes_and_sums():
    for name, size in (("enwik8", 36_445_475), ("text8", 31_344_016)):
        source = wikipedia.DATASETS[name].archive
        assert (source.name, source.size, source.algorithm) == (f"{name}.zip", size, "sha256")
        assert source.urls[0] == f"https://mattmahoney.net/dc/{name}.zip"
    assert sum(wikipedia.SYMBOLS) == wikipedia.SIZE == 10**8
    assert wikipedia.SYMBOLS[1:] == (5_000_000, 5_000_000)


@pytest.mark.parametrize(
    ("preset", "alphabet", "size"),
    [
        ("rhn-enwik8", 205, 45_994_730),
        ("rhn-text8", 27, 45_152_256),
        ("rhn-enwik8-depth-5", 205, 27_630_205),
        ("enwik8", 205, 45_994_413),
        ("text8", 27, 45_135_499),
    ],
)
def test_sizes_of_the_presets(preset, alphabet, size, file):
    config, _ = parse(Config, ["--preset", preset])
    assert config.data_folder().endswith(f"data/{config.dataset}")
    assert wikipedia.DATASETS[config.dataset].alphabet == alphabet
    file.write_bytes(layout(alphabet))
    loaded = data.load(file, **config.data_options())
    with torch.device("meta"):
        assert count_parameters(build_model(config, len(loaded.vocabulary))) == size


def test_it_is_encoded_once_and_a_cache_that_does_not_match_is_replaced(file, tmp_path, monkeypatch):
    first = data.load(file, dataset="enwik8")
    vocabulary = list(first.vocabulary)
    (cached,) = (tmp_path / "cache").iterdir()
    assert cached.name.startswith("bytes-")
    made = (cached / "meta.json").stat().st_mtime_ns
    again = data.load(file, dataset="text8")
    assert (cached / "meta.json").stat().st_mtime_ns == made
    assert all(torch.equal(getattr(first, split), getattr(again, split)) for split in SPLITS)
    ids = first.train.clone()
    for damage in ("ids", "vocabulary"):
        meta = json.loads((cached / "meta.json").read_text())
        path = cached / ("train.i32" if damage == "ids" else "vocabulary.txt")
        content = bytearray(path.read_bytes())
        content[-4 if damage == "ids" else 0] ^= 1
        path.write_bytes(content)
        meta["sha256"][path.name] = hashlib.sha256(content).hexdigest()
        (cached / "meta.json").write_text(json.dumps(meta))
        repaired = data.load(file, dataset="enwik8")
        assert repaired.vocabulary == vocabulary
        assert torch.equal(repaired.train, ids)


def test_other_files_and_what_is_refused(file, tmp_path):
    loaded = data.load(file, dataset="enwik8")
    assert loaded.label == "own corpus"
    assert loaded.notices == (
        f"{file}: not the published enwik8; split by bytes, 180,000 for train, 10,000 for valid, 10,000 for test",
    )
    assert data.load("synthetic", dataset="text8").label == "synthetic"
    with pytest.raises(UserError, match="enwik8: no such file; put enwik8 there"):
        data.load(tmp_path, dataset="enwik8")
    file.write_bytes(b"too short")
    with pytest.raises(UserError, match="9 bytes cannot be cut into train, valid, test"):
        data.load(file, dataset="enwik8")


def test_the_archive_is_taken_apart(published, tmp_path, monkeypatch):
    name, content = published
    with zipfile.ZipFile(tmp_path / f"{name}.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(name, content)
    archive = (tmp_path / f"{name}.zip").read_bytes()
    changed = wikipedia.DATASETS[name]
    source = dataclasses.replace(changed.archive, checksum=hashlib.sha256(archive).hexdigest(), size=len(archive))
    monkeypatch.setitem(wikipedia.DATASETS, name, changed._replace(archive=source))
    asked = []

    def serve(wanted, folder):
        asked.append(wanted)
        folder.mkdir(exist_ok=True)
        shutil.copy(tmp_path / f"{name}.zip", folder)
        assert download.is_there(wanted, folder)
        return folder / wanted.name

    monkeypatch.setattr(download, "fetch", serve)
    folder = tmp_path / "data"
    assert data.load(folder, download=True, dataset=name).label == name
    assert (folder / name).read_bytes() == content
    assert wikipedia.main([name, str(folder)]) == 0  # it is there
    assert asked == [source]
    (folder / f"{name}.zip").write_bytes(archive[:-1] + b"x")
    with pytest.raises(UserError, match=f"{name}.zip: has sha256 .*, expected {source.checksum}; it is not"):
        download.is_there(source, folder)
    assert wikipedia.main(["enwik9"]) == 2


def test_bytes_are_spelled_as_they_are():
    text = "a é\n\t€"
    tokens = BYTES.tokens(text)
    assert tokens == ["a", " ", "<c3>", "<a9>", "<0a>", "<09>", "<e2>", "<82>", "<ac>"]
    assert BYTES.text(tokens) == text
    assert BYTES.text(tokens[:3]) == "a \ufffd"  # cut within a character
    vocabulary = Vocabulary(BYTE_TOKENS, BYTES)
    read = list(b"\xef\xbb\xbfa\r\nb\r")  # not without its byte order mark, nor with other line ends
    assert (vocabulary.encode("\ufeffa\r\nb\r"), vocabulary.encode_prompt("\ufeffa\r\nb\r")) == ((read, {}), read)
    assert vocabulary.encode_prompt(os.fsdecode(b"a\xff")) == list(b"a\xff")
    assert len(set(BYTE_TOKENS)) == 256


@pytest.mark.parametrize("model", ["trellisnet", "rhn"])
def test_training_scores_bits_per_character(file, tmp_path, capsys, model):
    flags = ["--preset", {"trellisnet": "enwik8", "rhn": "rhn-text8"}[model], *TINY, "--data", str(file)]
    flags += ["--nhid", "8", "--nout", "8", "--no-tied"] if model == "rhn" else []
    metrics = tmp_path / "metrics.json"
    code = main([*flags, "--out", str(tmp_path / "run"), "--metrics", str(metrics)])
    printed = capsys.readouterr()
    assert (code, printed.err) == (0, "")
    result = json.loads(metrics.read_text())
    assert {key for key in result["test"] if key.startswith("bpc")} == {"bpc"}
    assert result["test"]["bpc"] < 6.5  # 60 values
    assert "60 symbols" in printed.out
    vocabulary = json.loads((tmp_path / "run" / "vocabulary.json").read_text())
    assert vocabulary["spelling"] == "bytes"
    assert len(vocabulary["ids"]) == 60
    assert "<0a>" not in vocabulary["ids"]
    assert generate.main(["--run", str(tmp_path / "run")]) == 2
    expected = "error: --prompt: expected some text; the symbols of the vocabulary include no line end\n"
    assert capsys.readouterr().err == expected


def test_an_empty_prompt_of_bytes_is_a_line_feed():
    vocabulary = Vocabulary(["a", "<0a>", "<ff>"], BYTES)
    model = TrellisLanguageModel(3, 4, 6, 2, output_size=4).eval()
    loaded = Pretrained(model, Config(dataset="enwik8"), torch.device("cpu"), vocabulary)
    assert vocabulary.line_end() == [1]
    assert loaded.generate("", 9) == loaded.generate("\n", 9)[1:]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--stream", "standard"], "error: --stream: has no effect with --dataset enwik8"),
        (["--vocab_order", "frequency"], "error: --vocab_order frequency: with --dataset enwik8 expected appearance"),
        (["--emb_blocks", "2", "--emb_density", "0.5"], "error: --vocab_order frequency_up: with --dataset enwik8"),
    ],
)
def test_settings_that_bytes_do_not_have(capsys, argv, message):
    assert main(["--dataset", "enwik8", "--data", "synthetic", *argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith(message)
    assert err.count("\n") == 1
