"""All programs: interrupts, output that cannot be written, wrong arguments."""

import io
import os
import shlex
import signal
import subprocess
import sys

import pytest

from trellisnet.training import programs
from trellisnet.training.cli import guarded
from trellisnet.training.config import PROJECT, parse
from trellisnet.training.programs import TASKS

PROGRAMS = [f"{task}/{name}.py" for task in TASKS for name in ("train", "data")]
SCRIPTS = [path for path in sorted((PROJECT / "scripts").glob("*.py")) if "__main__" in path.read_text()]
PROGRAMS += [path.relative_to(PROJECT).as_posix() for path in SCRIPTS]


@pytest.mark.parametrize("program", PROGRAMS)
def test_an_interrupt_during_the_imports_ends_in_silence(program, tmp_path):
    """The stand-ins for numpy and torch receive a Ctrl-C while they are imported."""
    for package in ("numpy", "torch"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(
            "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(10)\n"
        )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(PROJECT / program)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_program_cleans_up_and_says_so(signum, code, capsys):
    cleaned = []

    def script(argv):
        try:
            os.kill(os.getpid(), signum)
        finally:
            cleaned.append(argv)

    before = signal.getsignal(signum)
    assert guarded(script, ["a"]) == code
    assert cleaned == [["a"]]
    assert capsys.readouterr() == ("", "interrupted\n")
    assert signal.getsignal(signum) == before


@pytest.fixture
def demo(tmp_path):
    """Return a function that runs the demo with a stub of Python: exit code, programs called, last lines."""
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    (scripts / "demo.sh").write_text((PROJECT / "scripts" / "demo.sh").read_text())
    (scripts / "venv.sh").write_text(f"ROOT={tmp_path} PY={tmp_path}/python\nuse_venv() {{ :; }}\n")
    (tmp_path / "python").write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/calls\nexit $CODE\n')
    (tmp_path / "python").chmod(0o755)

    def run(code, *flags):
        (tmp_path / "calls").unlink(missing_ok=True)
        done = subprocess.run(
            ["bash", scripts / "demo.sh", *flags], env=os.environ | {"CODE": str(code)}, cwd=tmp_path,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        calls = [line.split()[0] for line in (tmp_path / "calls").read_text().splitlines()]
        return done.returncode, calls, [line.strip() for line in done.stdout.splitlines()[-3:]]

    return run


def test_the_demo_stops_after_an_interrupted_download(demo, tmp_path):
    assert demo(130)[:2] == (130, ["-m"])
    assert demo(2)[:2] == (2, ["-m", f"{tmp_path}/word_ptb/train.py"])  # without the data: on synthetic ones


def test_the_demo_ends_with_commands_that_go_on(demo, tmp_path):
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "weights.pkl").touch()
    called = [f"{tmp_path}/word_ptb/train.py", f"{tmp_path}/scripts/generate.py"]
    generate = "python scripts/generate.py --run runs/demo --length 60 --samples 3"
    longer = "python word_ptb/train.py --preset small --precision bf16 --out runs/longer"
    assert demo(0) == (0, ["-m", *called], [". .venv/bin/activate", generate, longer])
    (tmp_path / "runs" / "longer").mkdir()
    (tmp_path / "runs" / "longer" / "last.pt").touch()
    code, calls, lines = demo(0, "--data", "my book.txt")
    assert (code, calls, lines[2]) == (0, called, rf"{longer} --data my\ book.txt --resume")
    config, _ = parse(programs.get("word_ptb").config_class, shlex.split(lines[2])[2:])
    assert config.data == "my book.txt"


def test_text_that_a_console_cannot_encode_is_escaped(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="cp1252"))
    assert guarded(lambda _: print("a \u4e2d\udcff"), []) == 0
    assert written.getvalue() == b"a \\u4e2d\\udcff\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_unwritten_output_is_a_failure(monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert guarded(lambda _: print("a text"), []) == 1
    assert capsys.readouterr().err.startswith("NOTICE: standard output cannot be written (No space left on device)")
