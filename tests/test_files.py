"""Whatever stands where a regular file is expected: one line, at once."""

import os
import socket

import pytest

from trellisnet import serialization
from trellisnet.errors import UserError
from trellisnet.models import TrellisLanguageModel
from trellisnet.training import checkpoint
from trellisnet.training.config import read_config_file
from trellisnet.weights import load_weights
from word_ptb.model import Config

KINDS = {
    "pipe": "a named pipe, not a regular file",
    "socket": "a socket, not a regular file",
    "device": "a device, not a regular file",
    "folder": "Is a directory",
    "x\0y": "no valid file name",
    "x\ud800y": "no valid file name",
}


@pytest.fixture(params=KINDS)
def special(request, tmp_path, monkeypatch):
    """A path that is no regular file, and what is said of it."""
    path = tmp_path / request.param
    if request.param == "pipe":
        os.mkfifo(path)
    elif request.param == "socket":
        monkeypatch.chdir(tmp_path)  # the name of a socket may not be long
        with socket.socket(socket.AF_UNIX) as s:
            s.bind("socket")
    elif request.param == "device":
        path = "/dev/zero"
    elif request.param == "folder":
        path.mkdir()
    return path, KINDS[request.param]


def test_readers_refuse_what_is_no_regular_file(special):
    path, said = special
    model = TrellisLanguageModel(5, 4, 4, 2, output_size=4)
    for read in (
        lambda: load_weights(model, path),
        lambda: checkpoint.load(path),
        lambda: read_config_file(Config, path),
    ):
        with pytest.raises(UserError) as raised:
            read()
        assert f"cannot be read ({said})" in str(raised.value)


def test_a_regular_file_is_opened_through_links(tmp_path):
    (tmp_path / "file").write_bytes("é".encode())
    (tmp_path / "link").symlink_to("file")
    assert serialization.read_regular(tmp_path / "link") == "é"
