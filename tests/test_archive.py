"""Extraction from archives, well-formed and hostile ones."""

import errno
import gzip
import io
import os
import stat
import tarfile
import zipfile

import pytest

from trellisnet.data import archive as module
from trellisnet.data.archive import extract
from trellisnet.errors import RunError, UserError

TEXT = b"some words\n" * 20_000  # more than one block
CONTENT = {"raw/train.tokens": TEXT, "raw/test.tokens": b"few\n", "raw/README": b"read me"}
WANTED = {"raw/test.tokens": "test.txt", "raw/train.tokens": "train.txt"}
SIZE = len(TEXT)
KINDS = ["zip", "tar", "tar.gz"]


def pack(path, content, extra=()):
    """Make an archive of the kind that its name says; `extra` are further, empty ZipInfos or TarInfos."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            for name, data in content.items():
                file.writestr(name, data)
            for info in extra:
                file.writestr(info, b"target")
    else:
        with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as file:
            for name, data in content.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
            for info in extra:
                file.addfile(info)
    return path


@pytest.fixture(params=KINDS)
def path(request, tmp_path):
    """Path for an archive of every kind."""
    return tmp_path / f"archive.{request.param}"


def names(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def refusal(path, folder, members=WANTED, max_size=SIZE, kind=UserError):
    """Return the message, one printable line that begins with the archive."""
    with pytest.raises(kind) as caught:
        extract(path, members, folder, max_size=max_size)
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_only_the_named_files_are_extracted(path, tmp_path):
    folder = tmp_path / "new" / "folder"
    assert extract(pack(path, CONTENT), WANTED, folder, max_size=SIZE) == [
        folder / "test.txt",
        folder / "train.txt",
    ]
    assert names(folder) == ["test.txt", "train.txt"]
    assert (folder / "train.txt").read_bytes() == TEXT
    (folder / "test.txt").write_text("older")
    (folder / "mine").write_text("mine")
    extract(path, {"raw/test.tokens": "test.txt"}, folder, max_size=4)
    assert (folder / "test.txt").read_bytes() == b"few\n"
    assert (folder / "mine").read_text() == "mine"


@pytest.mark.parametrize("target", ["outside", "missing", "/dev/null"])
def test_a_link_of_that_name_is_replaced_and_not_followed(path, tmp_path, target):
    folder = tmp_path / "out"
    folder.mkdir()
    (tmp_path / "outside").write_text("mine")
    (folder / "train.txt").symlink_to(tmp_path / target)
    assert "is larger than 1 bytes" in refusal(pack(path, CONTENT), folder, {"raw/train.tokens": "train.txt"}, 1)
    assert (folder / "train.txt").is_symlink()  # a failure leaves it alone
    extract(path, {"raw/train.tokens": "train.txt"}, folder, max_size=SIZE)
    assert not (folder / "train.txt").is_symlink()
    assert (folder / "train.txt").read_bytes() == TEXT
    assert (tmp_path / "outside").read_text() == "mine"
    assert not (tmp_path / "missing").exists()


def test_a_tar_that_ends_like_a_zip_is_a_tar(tmp_path):
    inner = pack(tmp_path / "inner.zip", {"a": b"x"}).read_bytes()
    extract(pack(tmp_path / "a.tar", {"inner.zip": inner}), {"inner.zip": "b.zip"}, tmp_path, max_size=len(inner))
    assert (tmp_path / "b.zip").read_bytes() == inner


@pytest.mark.parametrize("content", [b"", b"no archive at all" * 100, b"PK\3\4" + b"x" * 1000])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "a.zip").write_bytes(content)
    message = refusal(tmp_path / "a.zip", tmp_path / "out")
    assert message.startswith(f"{tmp_path}/a.zip: not a zip or tar archive, or corrupt (")
    assert "a.zip: cannot be read (No such file or directory); put the" in refusal(tmp_path / "no" / "a.zip", tmp_path)
    assert names(tmp_path / "out") == []


def test_a_truncated_archive_is_refused(path, tmp_path):
    content = pack(path, CONTENT).read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert "not a zip or tar archive, or corrupt (" in refusal(path, tmp_path / "out")
    assert names(tmp_path / "out") == []


def test_a_wrong_checksum_is_noticed(tmp_path):
    zipped = tmp_path / "a.zip"
    with zipfile.ZipFile(zipped, "w") as file:  # uncompressed, so that only the checksum can tell
        file.writestr("a", TEXT)
    zipped.write_bytes(zipped.read_bytes().replace(b"some", b"sOme", 1))
    assert "or corrupt (Bad CRC-32 for file 'a'); get it again" in refusal(zipped, tmp_path / "out", {"a": "a"})
    tarred = pack(tmp_path / "a.tar", {"a": TEXT}).read_bytes()
    packed = bytearray(gzip.compress(tarred))
    packed[-8] ^= 1
    (tmp_path / "a.tar.gz").write_bytes(packed)
    assert "or corrupt (CRC check failed" in refusal(tmp_path / "a.tar.gz", tmp_path / "out", {"a": "a"})
    assert names(tmp_path / "out") == []


@pytest.mark.parametrize(
    "name", ["/etc/x", "../x", "a/../../x", "..", "C:x", "C:/x", "a\\..\\..\\x", "\\x", "//host/x"]
)
def test_a_name_that_leads_out_of_the_folder_is_refused(path, tmp_path, name):
    message = refusal(pack(path, {**CONTENT, name: b"x"}), tmp_path / "out")
    assert message.startswith(f"{path}: holds {name!r}, which leads out of its folder, so nothing is extracted; get ")
    assert names(tmp_path) == [path.name]


def test_dots_that_stay_inside_are_harmless(path, tmp_path):
    pack(path, {"./a": b"x", "b/../c": b"y", "...": b"z", "d..e": b""})
    extract(path, {"./a": "a", "b/../c": "c"}, tmp_path, max_size=1)
    assert ((tmp_path / "a").read_bytes(), (tmp_path / "c").read_bytes()) == (b"x", b"y")


@pytest.mark.parametrize("what", ["link", "folder", "device", "hard link"])
def test_only_regular_files_are_extracted(path, tmp_path, what):
    if path.suffix == ".zip":
        if what == "hard link":
            pytest.skip("a zip has none")
        info = zipfile.ZipInfo(name := "odd/" if what == "folder" else "odd")
        info.create_system = 3  # Unix, to which these modes belong
        info.external_attr = {"link": stat.S_IFLNK, "folder": stat.S_IFDIR, "device": stat.S_IFCHR}[what] << 16
    else:
        info = tarfile.TarInfo(name := "odd")
        info.type = getattr(
            tarfile, {"link": "SYM", "folder": "DIR", "device": "CHR", "hard link": "LNK"}[what] + "TYPE"
        )
        info.linkname = "raw/train.tokens"
    pack(path, CONTENT, [info])
    message = refusal(path, tmp_path / "out", {"raw/test.tokens": "test.txt", name: "odd"})
    assert message == f"{path}: {name} is not a regular file in it; get the right archive"
    assert names(tmp_path / "out") == []
    extract(path, WANTED, tmp_path / "out", max_size=SIZE)  # harmless if not requested


def test_a_member_that_is_missing_or_there_twice_is_named(path, tmp_path):
    message = refusal(pack(path, CONTENT), tmp_path / "out", {**WANTED, "raw/valid.tokens": "valid.txt"})
    assert message.startswith(f"{path}: does not hold raw/valid.tokens; ")
    again = zipfile.ZipInfo("raw/test.tokens") if path.suffix == ".zip" else tarfile.TarInfo("raw/test.tokens")
    if path.suffix == ".zip":
        with pytest.warns(UserWarning, match="Duplicate name"):
            pack(path, CONTENT, [again])
    else:
        pack(path, CONTENT, [again])
    assert f"{path}: holds raw/test.tokens 2 times; " in refusal(path, tmp_path / "out")
    assert names(tmp_path / "out") == []


def test_the_size_is_limited(path, tmp_path):
    message = refusal(pack(path, CONTENT), tmp_path / "out", max_size=SIZE - 1)
    assert message == f"{path}: raw/train.tokens is larger than {SIZE - 1:,} bytes; get the right archive"
    assert names(tmp_path / "out") == ["test.txt"]  # the member before it


def test_a_bomb_that_lies_about_its_size_is_stopped(tmp_path):
    path = pack(tmp_path / "a.zip", {"a": bytes(10_000_000)})
    size, small = (10_000_000).to_bytes(4, "little"), (10).to_bytes(4, "little")
    content = path.read_bytes()
    assert content.count(size) == 2
    path.write_bytes(content.replace(size, small))
    assert "or corrupt (Bad CRC-32" in refusal(path, tmp_path / "out", {"a": "a"}, max_size=1000)
    assert names(tmp_path / "out") == []


def test_an_overlong_header_is_not_read(tmp_path):
    info = tarfile.TarInfo("a")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 5_000_000
    content = tarfile.TarInfo("b").tobuf() + info.tobuf(tarfile.GNU_FORMAT) + bytes(info.size) + bytes(1024)
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(content))
    assert "(a header of 5,000,000 bytes)" in refusal(tmp_path / "a.tar.gz", tmp_path / "out", {"a": "a"})


def test_an_encrypted_member_is_refused(tmp_path):
    path = pack(tmp_path / "a.zip", {"a": b"x"})
    content = bytearray(path.read_bytes())
    content[6] |= 1
    content[content.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(content)
    assert "is encrypted" in refusal(path, tmp_path / "out", {"a": "a"})


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    path = pack(tmp_path / "a.zip", CONTENT)
    (tmp_path / "file").write_text("")
    message = refusal(path, tmp_path / "file")
    assert (
        message == f"{tmp_path}/file: test.txt cannot be written there (File exists); make room or name another folder"
    )

    def full(*_args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module.serialization.os, "fsync", full)
    message = refusal(path, tmp_path / "out", kind=RunError)
    assert message.startswith(f"{tmp_path}/out: test.txt cannot be written there (No space left on device); make room")
    assert names(tmp_path / "out") == []


@pytest.mark.parametrize("name", ["", "..", "a/b", "a\\b", "a\0"])
def test_the_files_have_plain_names(tmp_path, name):
    with pytest.raises(ValueError, match="members: expected names of files without folder"):
        extract(tmp_path / "a.zip", {"a": name}, tmp_path, max_size=1)
