"""Encoding in blocks: the same ids as in memory, and a cache that survives kills, corruption and concurrency."""

import errno
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from trellisnet.data import encoder
from trellisnet.data import text as text_files
from trellisnet.data.corpus import SPLITS, by_frequency, digest, encode, words
from trellisnet.data.text import Texts, normalised
from trellisnet.errors import RunError, UserError

TEXTS = ["b a b\n\nc c c\n", "d a\nc", "e d\n"]


@pytest.fixture
def paths(tmp_path):
    """Paths of three small files in their own folder."""
    return written(tmp_path / "text", TEXTS)


def written(folder, texts):
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{split}.txt" for split in SPLITS]
    for path, text in zip(paths, texts, strict=True):
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return paths


def encode_files(paths, cache, **options):
    return encoder.encode_files(Texts(paths), cache, **options)


def same(ours, expected):
    assert ours.vocabulary == expected.vocabulary
    assert ours.sha256 == expected.sha256
    for split in SPLITS:
        stream = getattr(ours, split)
        assert stream.dtype == torch.int32
        assert torch.equal(stream.to(torch.int64), getattr(expected, split))


def reference(texts, order="appearance"):
    texts = list(map(normalised, texts))
    corpus = encode(map(words, texts), sha256=digest(texts), label="x")
    return by_frequency(corpus) if order == "frequency" else corpus


def left(cache):
    return sorted(path.name for path in cache.iterdir())


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64, 1 << 16])
def test_any_text_is_encoded_as_in_memory(tmp_path, monkeypatch, block):
    monkeypatch.setattr(text_files, "_BLOCK", block)
    monkeypatch.setattr(encoder, "_IDS", 5)
    monkeypatch.setattr(encoder, "_BITS", 3)  # several words per slot
    draw = random.Random(block)
    spaces = [c for c in map(chr, range(sys.maxunicode + 1)) if c.isspace()]
    odd = [
        "\n",
        "\n\n",
        "\r\n",
        "\r",
        "\u200b",
        "\u2030",
        "é",
        "à",
        "中",
        "😀",
        "\ufeff",
        "<eos>",
        "\x7f",
        "\u0080",
        "\x01",
        "\x0e",
    ]
    odd += ["abcdefg", "abcdefgh", "abcdefghi", "中" * 5, "x" * 300]
    for number in range(25):
        common = [*"ab     ", *odd, draw.choice(spaces)]
        texts = [
            draw.choice(["", "\n", "\ufeff"])
            + "".join(draw.choices(draw.choice([common, spaces, common + spaces]), k=draw.randrange(200)))
            + draw.choice(["x", "x\n", "x\n\n", "é", "x ", "x\n ", "x\u3000"])
            for _ in SPLITS
        ]
        order = draw.choice(["appearance", "frequency"])
        ours = encode_files(written(tmp_path / f"{number}", texts), tmp_path / "cache", order=order, label="x")
        same(ours, reference(texts, order))
        assert ours.label == "x"


def test_every_unicode_space_separates(tmp_path):
    spaces = [c for c in map(chr, range(sys.maxunicode + 1)) if c.isspace()]
    texts = ["".join(f"a{c}b" for c in spaces), "a\n", "b\n"]
    assert len(spaces) == 29
    same(encode_files(written(tmp_path / "text", texts), tmp_path / "cache", label="x"), reference(texts))


@pytest.mark.parametrize("order", ["appearance", "frequency"])
def test_the_cache_is_reused(paths, tmp_path, monkeypatch, order, capsys):
    cache = tmp_path / "new" / "cache"
    first = encode_files(paths, cache, order=order, label="one")
    same(first, reference(TEXTS, order))
    (name,) = left(cache)
    assert re.fullmatch("words-[0-9a-f]{32}", name)
    assert left(cache / name) == ["meta.json", "test.i32", "train.i32", "valid.i32", "vocabulary.txt"]
    assert (cache / name / "vocabulary.txt").read_text().split("\n") == first.vocabulary
    first.train.zero_()  # private: the file is unchanged
    monkeypatch.setattr(encoder, "_build", None)
    second = encode_files(paths, cache, order=order, label="two")
    same(second, reference(TEXTS, order))
    assert second.label == "two"
    assert capsys.readouterr() == ("", "")  # the progress bar is for terminals


def test_the_key_depends_on_content_borders_and_order(paths, tmp_path):
    cache = tmp_path / "cache"
    variants = [TEXTS, ["b a b\n\nc c c\nd", " a\nc", "e d\n"], ["b a b\n\nc c c\n", "d a\nc", "e e\n"]]
    for texts in variants:
        for order in ("appearance", "frequency"):
            same(
                encode_files(written(tmp_path / "text", texts), cache, order=order, label="x"), reference(texts, order)
            )
    assert len(left(cache)) == 6


def test_an_unknown_order_is_refused(paths, tmp_path):
    with pytest.raises(ValueError, match="order: expected one of appearance, frequency, got 'alphabet'"):
        encode_files(paths, tmp_path / "cache", order="alphabet", label="x")


@pytest.mark.parametrize("block", [2, 1 << 16])
@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b" \n\xe3\x80\x80\n",
        b"a b\xff\xfe",
        b"a\nb \xe2\x82",
        "a\n中 b".encode()[:-3],
        b"a\xed\xa0\x80",
        b"a\0b",
    ],
)
def test_bad_files_are_refused_as_in_memory(paths, tmp_path, monkeypatch, block, content):
    monkeypatch.setattr(text_files, "_BLOCK", block)
    paths[1].unlink()
    if content is not None:
        paths[1].write_bytes(content)
    with pytest.raises(UserError) as expected:
        "".join(text_files.Part(paths[1]).pieces())
    with pytest.raises(UserError) as raised:
        encode_files(paths, tmp_path / "cache", label="x")
    assert str(raised.value) == str(expected.value)
    assert not (tmp_path / "cache").exists() or left(tmp_path / "cache") == []


def test_a_text_that_changes_while_it_is_read_is_refused(paths, tmp_path, monkeypatch):
    build = encoder._build

    def changed(*args):
        paths[2].write_text("e f\n")
        return build(*args)

    monkeypatch.setattr(encoder, "_build", changed)
    with pytest.raises(UserError, match="text: the text changed while it was read; try again"):
        encode_files(paths, tmp_path / "cache", label="x")
    assert left(tmp_path / "cache") == []


@pytest.mark.parametrize("name", ["meta.json", "test.i32", "train.i32", "vocabulary.txt"])
@pytest.mark.parametrize("damage", ["missing", "cut", "altered", "empty"])
def test_a_corrupt_cache_is_rebuilt(paths, tmp_path, name, damage):
    cache = tmp_path / "cache"
    encode_files(paths, cache, label="x")
    (folder,) = cache.iterdir()
    path = folder / name
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        changed = {"cut": content[:-4], "altered": content[:-1] + bytes([content[-1] ^ 1]), "empty": b""}
        path.write_bytes(changed[damage])
    same(encode_files(paths, cache, label="x"), reference(TEXTS))
    assert left(cache) == [folder.name]
    assert path.read_bytes() == content


def forge(folder, vocabulary=None, counts=None, **streams):
    """Write other content into a cache, with matching digests."""
    meta = json.loads((folder / "meta.json").read_text())
    if vocabulary is not None:
        (folder / "vocabulary.txt").write_text("\n".join(vocabulary))
        meta["counts"]["types"] = len(vocabulary)
    for split, ids in streams.items():
        (folder / f"{split}.i32").write_bytes(np.array(ids, "<i4").tobytes())
        meta["counts"][split] = len(ids)
    meta["sha256"] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in meta["sha256"]}
    meta |= {} if counts is None else {"counts": counts}
    (folder / "meta.json").write_text(json.dumps(meta))


@pytest.mark.parametrize(
    "content",
    [
        {"valid": [0] * 5},  # valid ids, and the right number of them
        {"valid": [0, 1, 2, 3, 4, 2]},
        {"valid": []},
        {"train": [2, 0, 1, 2, 2, 3, 3, 3, 2]},  # as many `<eos>`, other words
        {"test": [5, 6, 2]},
        {"test": [5, -1, 2]},
        {"vocabulary": ["b", "a", "<eos>", "c", "d", "b"]},
        {"vocabulary": ["b", "a", "<eos>", "c", "d"]},
        {"vocabulary": ["b", "a", "end", "c", "d", "e"]},
        {"counts": 6},
        {"counts": {"types": "6", "train": 9, "valid": 5, "test": 3}},
    ],
)
def test_a_cache_with_matching_digests_and_wrong_content_is_rebuilt(paths, tmp_path, content):
    encode_files(paths, tmp_path / "cache", label="x")
    (folder,) = (tmp_path / "cache").iterdir()
    forge(folder)
    before = (folder / "meta.json").stat().st_ino
    same(encode_files(paths, tmp_path / "cache", label="x"), reference(TEXTS))
    assert (folder / "meta.json").stat().st_ino == before  # forged with its own content, it is accepted
    forge(folder, **content)
    same(encode_files(paths, tmp_path / "cache", label="x"), reference(TEXTS))
    same(encode_files(paths, tmp_path / "cache", label="x"), reference(TEXTS))
    assert (folder / "meta.json").stat().st_ino != before


@pytest.mark.parametrize("meta", ["7", "[]", "null", '{"format": 2}', "[" * 100_000, "\ufeff{}"])
def test_a_cache_with_other_metadata_is_rebuilt(paths, tmp_path, meta):
    encode_files(paths, tmp_path / "cache", label="x")
    (folder,) = (tmp_path / "cache").iterdir()
    (folder / "meta.json").write_text(meta)
    same(encode_files(paths, tmp_path / "cache", label="x"), reference(TEXTS))


def test_a_pipe_in_a_cache_is_not_waited_for(paths, tmp_path):
    encode_files(paths, tmp_path / "cache", label="x")
    (folder,) = (tmp_path / "cache").iterdir()
    for name in ("meta.json", "train.i32"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
        same(encode_files(paths, tmp_path / "cache", label="x"), reference(TEXTS))


def test_the_cache_of_another_text_is_not_used(paths, tmp_path):
    cache = tmp_path / "cache"
    encode_files(paths, cache, label="x")
    encode_files(paths, cache, order="frequency", label="x")
    one, two = cache.iterdir()
    one.rename(cache / "x")
    two.rename(one)
    (cache / "x").rename(two)
    for order in ("appearance", "frequency"):
        same(encode_files(paths, cache, order=order, label="x"), reference(TEXTS, order))


def test_counts_are_compared_too(paths, tmp_path):
    encode_files(paths, tmp_path / "cache", label="x")
    (folder,) = (tmp_path / "cache").iterdir()
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["counts"] == {"types": 6, "train": 9, "valid": 5, "test": 3}
    (folder / "meta.json").write_text(json.dumps({**meta, "counts": {**meta["counts"], "train": 8}}))
    same(encode_files(paths, tmp_path / "cache", label="x"), reference(TEXTS))
    assert json.loads((folder / "meta.json").read_text()) == meta


def test_a_cache_that_cannot_be_written_is_named(paths, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file: the encoded text cannot be written there \(File exists\); make "):
        encode_files(paths, tmp_path / "file", label="x")

    def full(*_args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(encoder._Encoder, "__call__", full)
    with pytest.raises(RunError, match=r"cache: the encoded text cannot be written there \(No space left on device\)"):
        encode_files(paths, tmp_path / "cache", label="x")
    assert left(tmp_path / "cache") == []


SLOW = """
import sys, time
from pathlib import Path
from trellisnet.data import encoder
from trellisnet.data.text import Texts
def slow(vocabulary, folder):
    print("half-way", flush=True)
    time.sleep(60)
encoder._renumber = slow
encoder.encode_files(Texts([Path(p) for p in sys.argv[2:]]), Path(sys.argv[1]), order="frequency", label="x")
"""


def test_a_kill_leaves_nothing_under_the_name(paths, tmp_path):
    cache = tmp_path / "cache"
    with subprocess.Popen([sys.executable, "-c", SLOW, cache, *paths], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "half-way\n"
            encode_files(paths, cache, label="x")  # must not remove the folder of the other process
            assert [name.startswith(".words-") for name in left(cache)] == [True, False]
        finally:
            process.send_signal(signal.SIGKILL)
    assert [name.startswith(".words-") for name in left(cache)] == [True, False]
    same(encode_files(paths, cache, order="frequency", label="x"), reference(TEXTS, "frequency"))
    assert [name.startswith("words-") for name in left(cache)] == [True, True]


@pytest.mark.parametrize("damaged", [False, True])
def test_several_may_build_at_once(paths, tmp_path, monkeypatch, damaged):
    cache, encodings, encoded = tmp_path / "cache", [], encoder._encode
    if damaged:
        encode_files(paths, cache, label="x")
        (folder,) = cache.iterdir()
        (folder / "train.i32").unlink()
    barrier = threading.Barrier(4)

    def together(*args):
        vocabulary = encoded(*args)
        barrier.wait(30)
        return vocabulary

    monkeypatch.setattr(encoder, "_encode", together)
    others = [
        threading.Thread(target=lambda: encodings.append(encode_files(paths, cache, label="x"))) for _ in range(4)
    ]
    for other in others:
        other.start()
    for other in others:
        other.join()
    assert len(encodings) == 4
    for corpus in encodings:
        same(corpus, reference(TEXTS))
    assert len(left(cache)) == 1


MEMORY = """
import resource, sys
from pathlib import Path
from trellisnet.data.encoder import encode_files
from trellisnet.data.text import Texts
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
corpus = encode_files(Texts([Path(p) for p in sys.argv[2:]]), Path(sys.argv[1]), order="frequency", label="x")
print(len(corpus.train), (peak() - before) // 1024)
"""


@pytest.mark.slow
def test_memory_stays_small(tmp_path):
    draw = random.Random(0)
    lines = [" ".join(f"w{int(200_000 ** draw.random())}" for _ in range(50)) for _ in range(100_000)]
    paths = written(tmp_path / "text", ["\n".join(lines), lines[0], lines[1]])
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, tmp_path / "cache", *paths], capture_output=True, text=True, check=True
    )
    tokens, megabytes = map(int, done.stdout.split())
    assert tokens == 5_100_000
    assert megabytes < 150
