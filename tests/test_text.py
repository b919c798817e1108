"""Text files: line ends, byte order marks, refusals, single files, and the notices of runs."""

import hashlib
import os
import warnings

import pytest

import char_ptb.data
import char_ptb.train
import cifar10.data
import word_ptb.data
import word_ptb.train
import wt103.data
import wt103.train
from char_ptb.model import Config, build_model
from trellisnet import weights
from trellisnet.data import corpus
from trellisnet.data import text as text_files
from trellisnet.data.corpus import EOS, SPLITS
from trellisnet.data.spelling import STREAMS, UNDERSCORE
from trellisnet.data.text import Part, Texts, normalised
from trellisnet.errors import UserError
from trellisnet.training import checkpoint
from trellisnet.training.config import PROJECT, parse

TEXTS = ["the cat sat\n\n on the mat \n", "a cat_s dog\nsat on\n", "the dog\n a mat"]
LOADS = {
    "word_ptb": word_ptb.data.load,
    "wt103": wt103.data.load,
    "authors": char_ptb.data.load,
    "standard": lambda folder: char_ptb.data.load(folder, stream="standard"),
}
MAINS = {"word_ptb": word_ptb.train.main, "char_ptb": char_ptb.train.main, "wt103": wt103.train.main}
SMALL = """--emsize 6 --nhid 6 --nout 6 --nlevels 2 --horizon 3 --batch_size 2 --eval_batch_size 1 --aux 0 --repack
--seq_len 0 --epochs 1 --max_steps 4 --optim Adam --lr 0.01 --threads 1""".split()
PENN = PROJECT / "data" / "penn"
STORED = {
    "LF": lambda text: text.encode(),
    "CR LF": lambda text: text.replace("\n", "\r\n").encode(),
    "CR": lambda text: text.replace("\n", "\r").encode(),
    "mark": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "mark, CR LF": lambda text: b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode(),
}


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(corpus, "CACHE", tmp_path_factory.mktemp("cache"))


def written(folder, texts=TEXTS, store=STORED["LF"]):
    folder.mkdir(exist_ok=True)
    for split, text in zip(SPLITS, texts, strict=True):
        (folder / f"{split}.txt").write_bytes(store(text))
    return folder


def content(loaded):
    return [loaded.vocabulary, loaded.sha256, *(getattr(loaded, split).tolist() for split in SPLITS)]


# -- line ends and byte order marks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", list(STORED))
@pytest.mark.parametrize("load", list(LOADS))
def test_every_task_reads_the_same_whatever_the_line_ends(tmp_path, load, stored):
    plain = LOADS[load](written(tmp_path / "plain"))
    other = LOADS[load](written(tmp_path / "other", store=STORED[stored]))
    assert content(other) == content(plain)
    assert other.sha256 == hashlib.sha256("".join(TEXTS).encode()).hexdigest()
    notices = [notice for notice in other.notices if "the text is read" in notice]
    bytes_ = b"".join((tmp_path / "other" / f"{split}.txt").read_bytes() for split in SPLITS)
    assert other.stored_sha256 == hashlib.sha256(bytes_).hexdigest()
    if stored == "LF":
        assert notices == []
        return
    (notice,) = notices
    met = {"mark": "byte order mark", "mark, CR LF": "CR LF, byte order mark"}.get(stored, stored)
    assert notice == (
        "the text is read without byte order marks, and with LF for CR LF and CR "
        f"(train.txt: {met}; valid.txt: {met}; test.txt: {met})"
    )


def test_only_normalised_files_are_named(tmp_path):
    folder = written(tmp_path / "text")
    (folder / "valid.txt").write_bytes(b"a\rb\r\nc\n")
    assert Texts([folder / f"{split}.txt" for split in SPLITS]).notices == [
        "the text is read without byte order marks, and with LF for CR LF and CR (valid.txt: CR, CR LF)"
    ]


@pytest.mark.parametrize("block", [1, 2, 3, 5, 1 << 16])
def test_blocks_are_normalised_like_the_whole_text(tmp_path, monkeypatch, block):
    monkeypatch.setattr(text_files, "_BLOCK", block)
    path = tmp_path / "text"
    for text in ("\ufeffé\r\n\r\r\n\n\r中\r", "\ufeff\ufeffa\n", "a\ufeff\r", "\r\n\r\na", "😀\r\n"):
        path.write_bytes(text.encode())
        plain = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
        assert "".join(Part(path).pieces()) == normalised(text) == plain
        whole = Texts([path] * 3)
        assert whole.sizes == [len(plain.encode())] * 3
        assert whole.lines == [plain.count("\n") + (not plain.endswith("\n"))] * 3


def test_only_a_line_feed_or_carriage_return_ends_a_line(tmp_path):
    folder = written(tmp_path / "text", ["a\u2028b\x85c\x0cd\xa0e\x1cf\n", "a\n", "b"])
    loaded = word_ptb.data.load(folder)
    assert loaded.vocabulary == ["a", "b", "c", "d", "e", "f", EOS]
    assert [loaded.test.tolist(), loaded.notices[:-1]] == [[1, 6], ()]
    assert char_ptb.data.load(folder).vocabulary[:4] == ["a", "\u2028", "b", "\x85"]
    assert content(wt103.data.load(folder)) == content(loaded)


@pytest.mark.skipif(not (PENN / "test.txt").is_file(), reason="needs Penn Treebank in data/penn")
def test_the_penn_treebank_is_recognised_by_its_text(tmp_path):
    texts = [(PENN / f"{split}.txt").read_text() for split in SPLITS]
    loaded = word_ptb.data.load(written(tmp_path / "penn", texts, STORED["mark, CR LF"]))
    assert loaded.label == "Penn Treebank"
    assert loaded.vocabulary_sha256 == word_ptb.data.load(PENN).vocabulary_sha256
    assert word_ptb.data.load(PENN).notices == ()


def test_a_byte_order_mark_before_the_source_of_images_is_ignored(tmp_path):
    (tmp_path / "SOURCE.txt").write_bytes(b"\xef\xbb\xbfthumbnails\r\n")
    assert cifar10.data._source(tmp_path / "SOURCE.txt") == "thumbnails"


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", ["word_ptb", "wt103"])
@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (None, "expected train.txt, valid.txt, test.txt there, found only train.txt, test.txt; put them there, name"),
        (b"", "valid.txt: is empty"),
        (b"\xef\xbb\xbf", "valid.txt: is empty"),
        (b" \r\n \xe3\x80\x80\r\n", "valid.txt: is empty"),
        (b"a b\xff\xfe", r"valid.txt: not UTF-8 text \(byte 3\); convert it to UTF-8$"),
        (b"\xef\xbb\xbfa\r\nb\r\n\xc3\xa9\xff", r"valid.txt: not UTF-8 text \(byte 11\)"),
        (b"ab\r\xe4\xb8", r"valid.txt: not UTF-8 text \(byte 3\)"),
        (b"a\xed\xa0\x80", r"valid.txt: not UTF-8 text \(byte 1\)"),
        (b"a\0b", "valid.txt: holds zero bytes"),
        ("a cat\n".encode("utf-16"), r"not UTF-8 text \(byte 0\); convert it to UTF-8 \(iconv -f UTF-16 -t UTF-8\)"),
        ("a cat\n".encode("utf-16-le"), r"holds zero bytes.*if it is UTF-16, convert it to UTF-8 \(iconv"),
        ("folder", r"valid.txt: cannot be read \(Is a directory\)"),
        ("pipe", r"valid.txt: cannot be read \(a named pipe, not a regular file\); put it there or name its folder"),
        ("device", r"valid.txt: cannot be read \(a device, not a regular file\)"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path, load, stored, message):
    folder = written(tmp_path / "text")
    path = folder / "valid.txt"
    path.unlink()
    if stored == "folder":
        path.mkdir()
    elif stored == "pipe":
        os.mkfifo(path)
    elif stored == "device":
        path.symlink_to("/dev/zero")
    elif stored is not None:
        path.write_bytes(stored)
    if stored is None and load == "wt103":
        message = message.replace("expected ", "expected wiki.train.tokens, .* or ")
    with pytest.raises(UserError, match=message) as caught:
        LOADS[load](folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("load", list(LOADS))
def test_missing_files_are_named_with_advice(tmp_path, load):
    with pytest.raises(UserError, match=r"no such folder or file; make a folder with train.txt, .*--data synthetic"):
        LOADS[load](tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", "named pipe"), ("/dev/zero", "device")):
        with pytest.raises(UserError, match=rf"cannot be read \(a {kind}, not a regular file\)"):
            LOADS[load](path)


@pytest.mark.parametrize("block", [1, 2, 3, 1 << 16])
@pytest.mark.parametrize("before", ["", "é\r\n", "\ufeff中", "\ufeff"])
def test_the_wrong_byte_is_counted_in_the_file(tmp_path, monkeypatch, block, before):
    monkeypatch.setattr(text_files, "_BLOCK", block)
    path = tmp_path / "text"
    for bad in (b"\xff", b"\xc3(", b"\xf0\x9f\x98", b"\xe4\xb8"):
        path.write_bytes(before.encode() + b"ab" + bad)
        with pytest.raises(UserError, match=rf"not UTF-8 text \(byte {len(before.encode()) + 2}\)"):
            Texts([path] * 3)


# -- a single file -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "sizes"), [(3, (1, 1, 1)), (19, (17, 1, 1)), (100, (90, 5, 5)), (219, (199, 10, 10))]
)
@pytest.mark.parametrize("block", [1, 7, 1 << 16])
def test_a_single_file_is_divided_by_lines(tmp_path, monkeypatch, lines, sizes, block):
    monkeypatch.setattr(text_files, "_BLOCK", block)
    path, all_lines = tmp_path / "book.txt", [f"line é {i} \r\n" for i in range(lines)]
    path.write_bytes("".join(all_lines).removesuffix("\r\n").encode())
    texts = Texts([path])
    plain = [line.replace("\r", "") for line in all_lines]
    plain[-1] = plain[-1].removesuffix("\n")
    ends = [sizes[0], sizes[0] + sizes[1]]
    assert texts.read() == ["".join(plain[: ends[0]]), "".join(plain[ends[0] : ends[1]]), "".join(plain[ends[1] :])]
    assert texts.lines == list(sizes)
    assert texts.notices[0] == (
        f"book.txt is split by lines: {sizes[0]:,} for train, then {sizes[1]:,} for valid and {sizes[2]:,} for test"
    )


@pytest.mark.parametrize("load", list(LOADS))
def test_every_task_divides_a_single_file_like_three(tmp_path, load):
    lines = [f"a{i % 7} b{i % 3}_{i % 2}\n" for i in range(60)]
    path = tmp_path / "book.txt"
    path.write_text("".join(lines))
    whole = LOADS[load](path)
    folder = written(tmp_path / "text", ["".join(lines[:54]), "".join(lines[54:57]), "".join(lines[57:])])
    assert content(whole) == content(LOADS[load](folder)) == content(LOADS[load](path))
    assert whole.label == "own corpus"


def test_a_single_file_of_too_few_lines_is_refused(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("one long line without an end")
    with pytest.raises(UserError, match=r"book.txt: 1 line\(s\) cannot be cut into train, valid, test; break the text"):
        word_ptb.data.load(path)
    path.write_text("a\nb\n" + "\n" * 30)
    with pytest.raises(UserError, match=r"book.txt, lines 31 to 31: is empty"):
        word_ptb.data.load(path)


# -- <eos> and _ -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", ["word_ptb", "wt103", "authors"])
@pytest.mark.parametrize("block", [1, 3, 1 << 16])
def test_an_end_of_line_in_the_text_is_warned_of(tmp_path, monkeypatch, load, block):
    monkeypatch.setattr(text_files, "_BLOCK", block)
    with warnings.catch_warnings(action="error"):
        LOADS[load](written(tmp_path / "plain", [f"{text}\n<eo s><eos\n" for text in TEXTS]))
    folder = written(tmp_path / "text", ["a <eos>\nb <eos>\n", "c\n", "d <eos>\n"])
    with pytest.warns(UserWarning, match=r"the text holds <eos> 3 times.*already end in <eos> now have two.*sed -i"):
        LOADS[load](folder)
    with pytest.warns(UserWarning, match="the text holds <eos> 3 times"):  # read from a cache, too
        LOADS[load](folder)


def test_in_the_standard_stream_a_space_is_not_an_underscore(tmp_path):
    text = " a_b c \n_\n"
    underscore, standard, authors = UNDERSCORE, STREAMS["standard"], STREAMS["authors"]
    assert list(standard.tokens(text)) == ["a", underscore, "b", "_", "c", EOS, underscore, EOS]
    assert list(authors.tokens(text)) == [*" a_b c ", EOS, "_", EOS]
    for stream, spelled in (("standard", "a_b c\n_\n"), ("authors", text)):
        tokens = list(STREAMS[stream].tokens(text))
        assert STREAMS[stream].text(tokens) == spelled
        assert STREAMS[stream].open_tokens(text) == tokens
    assert standard.open_tokens("a\n b_ ") == ["a", EOS, "b", underscore, "_"]
    loads = [char_ptb.data.load(written(tmp_path / t, [f"a{t}b\n", "a b\n", "b\n"]), stream="standard") for t in "_ "]
    assert [load.vocabulary for load in loads] == [["a", underscore, "b", EOS, "_"], ["a", "_", "b", EOS]]
    assert [load.changed for load in loads] == ["with <underscore> for every _ in it", ""]


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, capsys):
    def call(task, *argv):
        code = MAINS[task]([*map(str, argv)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


LONG = ["the cat sat on the mat\n" * 20, "a cat sat\n" * 9, "the dog ran off\n" * 9]


@pytest.mark.parametrize("task", list(MAINS))
def test_a_run_says_and_logs_how_its_text_was_read(run, tmp_path, task):
    folder = written(tmp_path / "text", LONG, STORED["CR LF"])
    code, out, err = run(task, *SMALL, "--data", folder, "--out", tmp_path / "run")
    assert (code, err) == (0, "")
    assert out.count("the text is read without byte order marks, and with LF for CR LF and CR (train.txt: CR LF;") == 1
    unit, counts = {
        "char_ptb": ("symbols", "test 4 (45 occurrences)"),
    }.get(task, ("words", "valid 1 (9 occurrences), test 3 (27 occurrences)"))
    assert f"{unit} that the training text lacks: {counts}\n" in out
    log = (tmp_path / "run" / "log.txt").read_text()
    (line,) = [line for line in log.splitlines() if line.startswith("# notice: ")]
    assert "the text is read" in line
    assert counts in line


@pytest.mark.parametrize("task", list(MAINS))
def test_a_run_says_that_two_splits_are_the_same_text(run, tmp_path, task):
    folder = written(tmp_path / "text", [LONG[0], LONG[2], LONG[2]])
    code, out, _ = run(task, *SMALL, "--data", folder, "--out", tmp_path / "a")
    assert code == 0
    assert out.count("are the same text") == 1
    assert "valid and test are the same text, so the test score is not one of unseen text\n" in out
    folder = written(tmp_path / "others", LONG)
    code, out, _ = run(task, *SMALL, "--data", folder, "--out", tmp_path / "b")
    assert code == 0
    assert "are the same text" not in out


@pytest.mark.parametrize("task", list(MAINS))
def test_a_single_file_trains(run, tmp_path, task):
    (tmp_path / "book.txt").write_text("the cat sat on the mat\na dog ran off the mat\n" * 60)
    code, out, err = run(task, *SMALL, "--data", tmp_path / "book.txt", "--out", tmp_path / "run")
    assert (code, err) == (0, "")
    assert "book.txt is split by lines: 108 for train, then 6 for valid and 6 for test\n" in out
    assert out.count("\n") < 20
    resumed = run(task, "--resume", tmp_path / "run" / "last.pt", "--max_steps", 5)
    assert (resumed[0], resumed[2]) == (0, "")


def test_weights_that_were_trained_on_another_text_are_reported(run, tmp_path):
    """The lines that are now the test text were training lines."""
    book, notice = tmp_path / "book.txt", f"NOTICE: {tmp_path / 'run'}: was trained on other data (sha256 "
    book.write_text("the cat sat on the mat\na dog ran off the mat\n" * 60)
    assert run("word_ptb", *SMALL, "--data", book, "--out", tmp_path / "run")[0] == 0
    for lines, said in ((60, False), (40, True)):
        book.write_text("the cat sat on the mat\na dog ran off the mat\n" * lines)
        code, out, err = run("word_ptb", "--run", tmp_path / "run", "--eval")
        assert (code, err, notice in out) == (0, "", said)


def started_by_an_earlier_version(path, sha256, vocabulary=None):
    """Give a checkpoint the digests that an earlier version would have written."""
    stored = checkpoint.load(path)
    stored["data"] = [sha256, *stored["data"][1:4], vocabulary or stored["data"][4]]
    checkpoint.save(path, stored)


def test_a_checkpoint_of_a_text_that_was_read_otherwise_is_refused_with_this_reason(run, tmp_path):
    folder, last = written(tmp_path / "text", LONG), tmp_path / "run" / "last.pt"
    assert run("word_ptb", *SMALL, "--data", folder, "--out", tmp_path / "run")[0] == 0
    written(folder, LONG, STORED["CR LF"])
    assert run("word_ptb", "--resume", last, "--max_steps", 5)[0] == 0  # it is the same text
    stored = b"".join((folder / f"{split}.txt").read_bytes() for split in SPLITS)
    started_by_an_earlier_version(last, hashlib.sha256(stored).hexdigest(), "0" * 64)
    (tmp_path / "run" / "best.pt").unlink(missing_ok=True)
    code, _, err = run("word_ptb", "--resume", last, "--max_steps", 6)
    assert code == 2
    assert err == (
        "error: the run was started by a version that read these data differently: now they are read without byte "
        "order marks, and with LF for CR LF and CR; start a new run, or continue it with that version "
        "(see its log.txt)\n"
    )
    started_by_an_earlier_version(last, "0" * 64)
    assert "the data differ from those the run was started on" in run("word_ptb", "--resume", last)[2]


@pytest.mark.parametrize("stream", ["standard", "authors"])
def test_a_checkpoint_of_the_same_symbols_from_other_files_is_continued(run, tmp_path, stream):
    """An earlier version dropped CR at the end of a line with the spaces of the standard stream; to the authors' stream
    it was a symbol of its own."""
    folder, last = written(tmp_path / "text", LONG, STORED["CR LF"]), tmp_path / "run" / "last.pt"
    assert run("char_ptb", *SMALL, "--stream", stream, "--data", folder, "--out", tmp_path / "run")[0] == 0
    stored = b"".join((folder / f"{split}.txt").read_bytes() for split in SPLITS)
    old = [*char_ptb.data.load(folder, stream=stream).vocabulary]
    old += ["\r"] * (stream == "authors")
    sha256, vocabulary = (hashlib.sha256(content).hexdigest() for content in (stored, "\n".join(old).encode()))
    started_by_an_earlier_version(last, sha256, vocabulary)
    code, _, err = run("char_ptb", "--resume", last, "--max_steps", 6)
    assert (code, "now they are read without" in err) == ((2, True) if stream == "authors" else (0, False))


def test_a_checkpoint_of_a_stream_without_underscores_is_refused_with_this_reason(run, tmp_path):
    folder, last = written(tmp_path / "text", ["a_b c\n" * 99] * 3), tmp_path / "run" / "last.pt"
    assert run("char_ptb", *SMALL, "--stream", "standard", "--data", folder, "--out", tmp_path / "run")[0] == 0
    sha256 = hashlib.sha256(("a_b c\n" * 297).encode()).hexdigest()
    started_by_an_earlier_version(last, sha256, hashlib.sha256(b"a\n_\nb\nc\n<eos>").hexdigest())
    (tmp_path / "run" / "best.pt").unlink(missing_ok=True)
    code, _, err = run("char_ptb", "--resume", last, "--max_steps", 6)
    assert code == 2
    assert "now they are read with <underscore> for every _ in it; start a new run" in err


def test_weights_of_a_text_that_was_read_otherwise_are_refused_with_this_reason(run, tmp_path):
    folder = written(tmp_path / "text", LONG, STORED["CR LF"])
    file, loaded = tmp_path / "weights.pkl", char_ptb.data.load(folder)
    old = [*loaded.vocabulary, "\r"]  # as an earlier version had it
    model = build_model(parse(Config, SMALL)[0], len(old))
    weights.save_weights(model, file, vocabulary=hashlib.sha256("\n".join(old).encode()).hexdigest())
    code, _, err = run("char_ptb", *SMALL, "--data", folder, "--eval", "--load_weight", file)
    assert code == 2
    assert "was trained on another vocabulary" in err
    assert err.endswith(
        "; if it was this very text, train again: version 0.1.0 read it differently, now it is read without byte "
        "order marks, and with LF for CR LF and CR\n"
    )
