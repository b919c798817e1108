"""Special files and hostile names: one printable line, at once."""

import errno
import json
import os
import socket
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

import cifar10.data
from trellisnet import serialization
from trellisnet.data import archive, download, pixels
from trellisnet.data.download import Source
from trellisnet.errors import LINE, RunError, UserError, from_system, of_system, shown
from trellisnet.models import TrellisLanguageModel
from trellisnet.training import checkpoint
from trellisnet.training.config import parse, read_config_file
from trellisnet.training.runlog import RunFolder
from trellisnet.weights import load_weights
from word_ptb.model import Config
from word_ptb.train import main

KINDS = {
    "pipe": "a named pipe, not a regular file",
    "socket": "a socket, not a regular file",
    "device": "a device, not a regular file",
    "folder": "Is a directory",
    "x\0y": "not a valid file name",
    "x\ud800y": "not a valid file name",
}


HOSTILE = ["\x1b[2Jx", "two\nlines", "\u202etxt", "\x9b31m", "\ud800", "x" * 1_000_000, "\x1b" * 1_000_000]


def small():
    return TrellisLanguageModel(5, 4, 4, 2, output_size=4)


def assert_fit_to_print(error, limit=600):
    assert str(error).isprintable()
    assert len(str(error)) < limit


@pytest.fixture(params=KINDS)
def special(request, tmp_path, monkeypatch):
    """A path that is not a regular file, and its description in messages."""
    path = tmp_path / request.param
    if request.param == "pipe":
        os.mkfifo(path)
    elif request.param == "socket":
        monkeypatch.chdir(tmp_path)  # the name of a socket must be short
        with socket.socket(socket.AF_UNIX) as s:
            s.bind("socket")
    elif request.param == "device":
        path = "/dev/zero"
    elif request.param == "folder":
        path.mkdir()
    return path, KINDS[request.param]


def test_readers_refuse_special_files(special, tmp_path):
    path, said = special
    model = small()
    for read in (
        lambda: load_weights(model, path),
        lambda: checkpoint.load(path),
        lambda: read_config_file(Config, path),
        lambda: pixels.read_idx(Path(path), 3),
        lambda: cifar10.data.read_batch(Path(path)),
        lambda: archive.extract(Path(path), {"x": "x"}, tmp_path, max_size=9),
    ):
        with pytest.raises(UserError) as raised:
            read()
        hint = "the folder holds no "  # config.json or weights.pkl
        assert f"cannot be read ({said})" in str(raised.value) or (
            said == KINDS["folder"] and hint in str(raised.value)
        )


def test_a_pipe_instead_of_a_file_to_download_is_refused(tmp_path):
    os.mkfifo(tmp_path / "x")
    with pytest.raises(UserError, match="x: cannot be read .a named pipe, not a regular file.; move it away"):
        download.is_there(Source("x", ("https://example.org/x",), "0" * 32, 1), tmp_path)


def test_a_regular_file_is_opened_through_links(tmp_path):
    (tmp_path / "file").write_bytes("é".encode())
    (tmp_path / "link").symlink_to("file")
    assert serialization.read_regular(tmp_path / "link") == "é"


@pytest.mark.parametrize(
    ("text", "limit", "expected"),
    [
        ("é “quoted” naïve 語", None, "é “quoted” naïve 語"),
        ("a\x1b[31mb\nc\r", None, "a\\x1b[31mb\\nc\\r"),
        ("\x9b\u202e\ud800", 80, "\\x9b\\u202e\\ud800"),
        ("0123456789", 10, "0123456789"),
        ("0123456789x", 10, "012345…89x"),
        ("\x1b" * 10, 10, "\\x1b\\x…x1b"),
        ("x" * 10**6, None, "x" * 10**6),
        (5, None, "5"),
    ],
)
def test_shown_text_is_one_printable_line(text, limit, expected):
    assert shown(text, limit) == expected


def test_messages_are_printable_lines():
    for kind in (UserError, RunError):
        assert str(kind("one\x1b[0m\n", "two")) == "one\\x1b[0m\\n\ntwo"
        assert len(str(kind("x" * 10**7))) == LINE
        assert str(kind(f"{'x' * 10**7}; what to do")).endswith("; what to do")
    assert of_system(OSError(28, "full", "a\nb")) == "full (a\\nb)"
    assert of_system(OSError(28, "full"), "folder") == "full (folder)"
    assert of_system(OSError("full")) == "full"


@pytest.mark.parametrize("number", [errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.ENOSPC, errno.EIO])
def test_a_path_that_cannot_be_reached_is_the_users_and_a_full_disk_is_not(number):
    error, users = from_system(OSError(number, "no", "x")), number not in (errno.ENOSPC, errno.EIO)
    assert type(error) is (UserError if users else RunError)
    assert str(error) == "no (x)" + "; name another path" * users


@pytest.mark.parametrize("text", HOSTILE)
def test_text_from_files_is_printed_as_one_short_line(tmp_path, text):
    path = tmp_path / "file"
    metadata_of_files = [{"model": text}, {"cutoffs": [text] * 9}, {"activation": text}, {"vocabulary": text}]
    files = [{text: torch.zeros(1)}, {"encoder.weight": torch.zeros(1), text: torch.zeros(1)}]
    files += [OrderedDict({"encoder.weight": torch.zeros(1)}) for _ in metadata_of_files]
    for state, metadata in zip(files[2:], metadata_of_files, strict=True):
        state._metadata = OrderedDict(trellisnet=metadata)
    for state in files if text != "\ud800" else []:  # torch cannot write this one
        torch.save(state, path)
        with pytest.raises(UserError) as raised:
            load_weights(small(), path, vocabulary="0" * 64)
        assert_fit_to_print(raised.value)

    for content in ({text: 1}, {"nlevels": text}, {"backend": text}, {"settings": {}, "task": text}, {"preset": text}):
        path.write_text(json.dumps(content))
        with pytest.raises(UserError) as raised:
            parse(Config, ["--config", str(path)])
        assert_fit_to_print(raised.value)


@pytest.mark.parametrize("text", [text for text in HOSTILE if text != "\ud800"])
def test_text_from_checkpoints_is_printed_as_one_short_line(tmp_path, text):
    path = tmp_path / "file"
    for content in ({"format": text}, {"format": 2, "content": {text: 1, 5: 2}, "sha256": "x"}):
        if "content" in content:
            content["sha256"] = checkpoint.sha256_of(content["content"])
        torch.save(content, path)
        with pytest.raises(UserError) as raised:
            checkpoint.load(path)
        assert_fit_to_print(raised.value)


def test_line_ends_within_a_line_of_the_log_are_escaped(tmp_path):
    folder = RunFolder(tmp_path / "run", fresh=True)
    folder.log_head("python x.py --name 'a\n\x1b[2J'", {"machine": "b\rc"}, {"corpus": "d\ne"})
    folder.close()
    head = (tmp_path / "run" / "log.txt").read_text().splitlines()
    assert head[0].endswith("  python x.py --name 'a\\n\\x1b[2J'")
    assert head[1:] == ["# machine: b\\rc", "# corpus: d\\ne"]


def test_names_on_the_command_line_are_printed_as_one_line(tmp_path, capfd):
    sizes = "--data synthetic --emsize 4 --nhid 4 --nout 4 --nlevels 2 --aux 0 --threads 1".split()
    for flags in (["--data", f"{tmp_path}/a\n\x1b[2J"], ["--load_weight", "a\n\x1b[2J"], ["--a\n\x1b[2J"]):
        assert main([*sizes, *flags]) == 2
        said = capfd.readouterr().err
        assert "a\\n\\x1b[2J" in said
        assert said.removesuffix("\n").isprintable()
