"""Standard output and error that are closed, full or gone: a program may lose what it prints, but nothing else."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import SMALL
from trellisnet import console
from trellisnet.training import checkpoint
from trellisnet.training.config import PROJECT
from word_ptb.train import main

fcntl, pty, termios = (
    pytest.importorskip(name, reason="needs terminals as Unix has them") for name in ("fcntl", "pty", "termios")
)
needs_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
TRAIN = [sys.executable, str(PROJECT / "word_ptb" / "train.py")]
SHORT = [*SMALL, "--max_steps", "3"]


def shell(command: str, *argv: str) -> subprocess.CompletedProcess:
    """Run a command in a shell with arguments "$@" and a PYTHONPATH for a quick `import console`."""
    env = os.environ | {"PYTHONPATH": str(PROJECT / "trellisnet")}
    return subprocess.run(["bash", "-c", command, "bash", *argv], capture_output=True, text=True, check=False, env=env)


@pytest.fixture
def dead_terminal():
    """A stream to a terminal that has vanished."""
    ours, theirs = pty.openpty()
    stream = open(theirs, "w")  # noqa: SIM115 (closed below)
    os.close(ours)
    yield stream
    console._empty(stream)
    stream.close()


def test_a_terminal_that_vanishes_does_not_end_a_run(tmp_path, dead_terminal, monkeypatch, run_folder):
    with pytest.raises(OSError, match="Input/output error"):
        print("x", file=dead_terminal, flush=True)
    monkeypatch.setattr(sys, "stdout", dead_terminal)
    monkeypatch.setattr(sys, "stderr", dead_terminal)
    assert main([*SMALL, "--out", str(tmp_path / "run")]) == 0
    assert main([*SMALL, "--out", str(tmp_path / "run")]) == 2  # with a message
    assert (tmp_path / "run" / "weights.pkl").read_bytes() == (run_folder / "weights.pkl").read_bytes()
    assert sys.stdout is dead_terminal


@needs_full
def test_a_full_output_is_reported_once_and_does_not_end_a_run(tmp_path, monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main([*SHORT, "--out", str(tmp_path / "run")]) == 0
    notice = "NOTICE: standard output cannot be written (No space left on device); continuing without it\n"
    assert capsys.readouterr().err == notice
    assert checkpoint.load(tmp_path / "run" / "last.pt")["step"] == 3


def test_characters_that_cannot_be_encoded_are_escaped(tmp_path, monkeypatch):
    with open(tmp_path / "out", "w", encoding="ascii") as ascii_only:
        monkeypatch.setattr(sys, "stdout", ascii_only)
        with console.lenient():
            print("weiß")
    assert (tmp_path / "out").read_text() == "wei\\xdf\n"


CLOSED = """
import os, sys
import console
with console.lenient():
    print("out"), print("err", file=sys.stderr), sys.stdout.flush()
    with open(sys.argv[1], "w") as file:
        os.write(1, b"a library"), os.write(2, b"another")
        file.write("alone")
sys.exit(7)
"""


def test_no_file_takes_the_number_of_a_closed_stream(tmp_path):
    done = shell('exec 0<&- 1>&- 2>&-; "$@"', sys.executable, "-c", CLOSED, str(tmp_path / "file"))
    assert done.returncode == 7
    assert (tmp_path / "file").read_text() == "alone"


ENDS = """
import sys
import console
with console.lenient():
    print("much" * 10000)
    print("more", file=sys.stderr)
sys.exit(7)
"""


@needs_full
def test_nothing_fails_when_the_interpreter_exits():
    done = shell('"$@" >/dev/full', sys.executable, "-c", ENDS)
    assert done.returncode == 7
    assert "Exception ignored" not in done.stderr
    assert done.stderr.endswith("more\n")


def start_and_hang_up(folder: Path, action: signal.Handlers) -> tuple[subprocess.Popen, int]:
    """Start a run on its own terminal, and close the terminal after its first checkpoint."""
    ours, theirs = pty.openpty()
    argv = [*TRAIN, *SMALL, "--max_steps", "0", "--epochs", "99", "--checkpoint_steps", "1"]

    def take_terminal():
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, action)

    options = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "preexec_fn": take_terminal}
    process = subprocess.Popen([*argv, "--out", str(folder)], **options)
    os.close(theirs)
    os.set_blocking(ours, False)
    deadline = time.monotonic() + 100
    while not (folder / "last.pt").exists() and process.poll() is None and time.monotonic() < deadline:
        try:
            os.read(ours, 65536)
        except BlockingIOError:
            time.sleep(0.02)
    step = checkpoint.load(folder / "last.pt")["step"]
    os.close(ours)
    return process, step


@pytest.mark.slow
def test_hanging_up_writes_a_checkpoint(tmp_path):
    process, step = start_and_hang_up(tmp_path / "run", signal.SIG_DFL)
    assert process.wait(60) == 128 + signal.SIGHUP
    assert checkpoint.load(tmp_path / "run" / "last.pt")["step"] > step


@pytest.mark.slow
def test_an_ignored_hang_up_stays_ignored(tmp_path):
    process, step = start_and_hang_up(tmp_path / "run", signal.SIG_IGN)  # as nohup does
    try:
        deadline = time.monotonic() + 60
        while checkpoint.load(tmp_path / "run" / "last.pt")["step"] < step + 5 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert process.poll() is None
    finally:
        process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
