"""The run folder and what it refuses."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from trellisnet.errors import RunError, UserError
from trellisnet.training import runlog
from trellisnet.training.config import PROJECT
from trellisnet.training.runlog import (
    RunFolder,
    busy,
    check_metrics_path,
    command_line,
    environment,
    pip_install,
    read_records,
    runnable,
    write_json,
)
from word_ptb.model import Config


def test_an_earlier_run_is_never_overwritten_unasked(tmp_path):
    first = RunFolder(tmp_path / "run", fresh=True)
    first.log("one")
    first.close()
    with pytest.raises(UserError, match="holds an earlier run; continue it with --resume, replace it with --over"):
        RunFolder(tmp_path / "run", fresh=True)
    again = RunFolder(tmp_path / "run", fresh=False)
    again.log("two")
    again.close()
    assert (tmp_path / "run" / "log.txt").read_text() == "one\ntwo\n"
    RunFolder(tmp_path / "run", fresh=True, overwrite=True).close()
    assert (tmp_path / "run" / "log.txt").read_text() == ""


def test_overwrite_deletes_runs_only(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds thesis.tex, which no run wrote"):
        RunFolder(tmp_path, fresh=True, overwrite=True)
    assert (tmp_path / "thesis.tex").exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written \(.*\); choose another folder with --out"):
        RunFolder(tmp_path / "file" / "run", fresh=True)
    with pytest.raises(UserError, match=r"--metrics .*: cannot be written"):
        write_json(tmp_path / "nowhere" / "m.json", "--metrics", {})


def test_a_result_on_a_full_disk_is_no_wrong_input(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trellisnet.serialization.os.fsync", full)
    with pytest.raises(RunError, match=r"--metrics .*m.json: cannot be written \(No space left on device\); make room"):
        write_json(tmp_path / "m.json", "--metrics", {})


def test_config_log_and_records_of_a_run(tmp_path):
    folder = RunFolder(tmp_path / "run", fresh=True)
    folder.write_config(Config(), {"data": "abc"})
    folder.record("epoch", loss=1.5)
    folder.log_head("python x.py", environment(torch.device("cpu")), {"parameters": 5})
    folder.close()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["task"] == "word_ptb"
    assert config["settings"]["nlevels"] == 58
    assert config["data"] == "abc"
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text()) == {"event": "epoch", "loss": 1.5}
    head = (tmp_path / "run" / "log.txt").read_text()
    assert f"# torch: {torch.__version__}\n" in head
    assert "# parameters: 5\n" in head
    assert f"{os.cpu_count()} cores" in head


def test_commands_are_quoted_for_a_shell():
    assert command_line("word_ptb/train.py", ["--out", "a b"]) == "python word_ptb/train.py --out 'a b'"
    elsewhere = f"{PROJECT}x/runs"
    argv = ["--out", f"{PROJECT}/runs/a", f"--metrics={PROJECT}/m.json", elsewhere, f"{PROJECT}/"]
    assert command_line("t.py", argv) == f"python t.py --out runs/a --metrics=m.json {elsewhere} {PROJECT}/"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A checkout whose .venv has Python and torchrun, and nothing on PATH; the working directory is the checkout."""
    project = tmp_path / "a clone"
    there = project / ".venv" / "bin"
    (project / "word_ptb").mkdir(parents=True)
    there.mkdir(parents=True)
    for name in ("python", "python3", "torchrun"):
        (there / name).write_text('#!/bin/sh\necho "$0 $@"\n')
        (there / name).chmod(0o755)
    monkeypatch.setattr(runlog, "PROJECT", project)
    monkeypatch.setattr(sys, "executable", str(there / "python"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.chdir(project)
    return project


def test_commands_that_are_shown_run_as_they_are(elsewhere, monkeypatch, tmp_path):
    ranks = ["torchrun", "--nproc_per_node", "2"]

    def shown(launcher=("python",)):
        command = runnable("word_ptb/train.py", ["--resume", "a b/last.pt"], launcher)
        done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, check=True)
        assert done.stdout.endswith("word_ptb/train.py --resume a b/last.pt\n")
        return command

    assert shown() == ".venv/bin/python word_ptb/train.py --resume 'a b/last.pt'"
    assert shown(ranks).startswith(".venv/bin/python -m torch.distributed.run --nproc_per_node 2 word_ptb/train.py ")
    assert pip_install("pillow") == ".venv/bin/python -m pip install pillow"
    monkeypatch.chdir(tmp_path)
    assert shown() == "'a clone/.venv/bin/python' 'a clone/word_ptb/train.py' --resume 'a b/last.pt'"
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert shown() == f"'{elsewhere}/.venv/bin/python' '{elsewhere}/word_ptb/train.py' --resume 'a b/last.pt'"
    monkeypatch.setenv("PATH", f"{elsewhere}/.venv/bin:/usr/bin:/bin")  # as `activate` does
    assert shown() == f"python '{elsewhere}/word_ptb/train.py' --resume 'a b/last.pt'"
    assert shown(ranks).startswith("torchrun --nproc_per_node 2 ")
    (elsewhere / ".venv" / "bin" / "python").write_text("another one\n")
    monkeypatch.setattr(sys, "executable", f"{elsewhere}/.venv/bin/python3")
    assert runlog.python() == ["python3"]


def test_a_command_can_be_shown_when_the_working_directory_is_gone(elsewhere, monkeypatch, tmp_path):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert runnable("word_ptb/train.py", []) == f"'{elsewhere}/.venv/bin/python' '{elsewhere}/word_ptb/train.py'"


def test_hidden_files_of_others_are_kept(tmp_path):
    (tmp_path / ".git").mkdir()
    (tmp_path / ".last.pt.abc.tmp").write_text("left by a killed run")
    with pytest.raises(UserError, match=r"holds \.git, which no run wrote"):
        RunFolder(tmp_path, fresh=True, overwrite=True)
    (tmp_path / ".git").rmdir()
    RunFolder(tmp_path, fresh=True, overwrite=True).close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.txt", "metrics.jsonl"]


def test_numbers_that_are_not_finite_are_null_in_the_metrics(tmp_path):
    folder = RunFolder(tmp_path / "run", fresh=True)
    folder.record("epoch", loss=float("inf"))
    folder.close()
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text())["loss"] is None


def test_metrics_in_the_runs_folder_have_one_name(tmp_path):
    check_metrics_path(str(tmp_path / "run" / "metrics.json"), tmp_path / "run")
    with pytest.raises(UserError, match=r"the file is called metrics\.json"):
        check_metrics_path(str(tmp_path / "run" / "m.json"), tmp_path / "run")
    for name in ("last.pt", "log.txt", "config.json"):
        with pytest.raises(UserError, match=r"the file is called metrics\.json"):
            check_metrics_path(str(tmp_path / "run" / name), tmp_path / "run")
        (tmp_path / "link.json").unlink(missing_ok=True)
        (tmp_path / "link.json").symlink_to(tmp_path / "run" / name)
        with pytest.raises(UserError, match=r"the file is called metrics\.json"):
            check_metrics_path(str(tmp_path / "link.json"), tmp_path / "run")


@pytest.mark.parametrize("content", [b"PK\3\4", b"{}", b'{"task": "x", "command": "y"}', b"[1]", b"{", b"\xff", b" "])
def test_metrics_replace_nothing_but_metrics(tmp_path, content):
    (tmp_path / "m.json").write_bytes(content)
    with pytest.raises(UserError, match=r"m.json: holds something else, which is not overwritten; name a new file"):
        check_metrics_path(str(tmp_path / "m.json"), None)
    with pytest.raises(UserError, match=r"best.pt: runs keep something else under this name"):
        check_metrics_path(str(tmp_path / "best.pt"), None)
    for allowed in (b"", b'{"task": "x", "command": "y", "valid": null, "test": {}}'):
        (tmp_path / "m.json").write_bytes(allowed)
        check_metrics_path(str(tmp_path / "m.json"), None)
    check_metrics_path(str(tmp_path / "new.json"), None)
    for special in ("/dev/null", "/dev/stdout"):
        check_metrics_path(special, None)
    os.mkfifo(tmp_path / "pipe")
    check_metrics_path(str(tmp_path / "pipe"), None)


def test_metrics_go_to_standard_output_whatever_that_is(tmp_path):
    """To the open file, behind what was printed; it is never replaced."""
    code = 'from trellisnet.training.runlog import write_json; print("before", flush=True)'
    code += "; write_json('/dev/stdout', '--metrics', {'a': 1}); print('after')"
    expected = 'before\n{\n "a": 1\n}\nafter\n'
    with (tmp_path / "out").open("w") as out:
        subprocess.run([sys.executable, "-c", code], stdout=out, check=True)
    assert (tmp_path / "out").read_text() == expected
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == expected


@pytest.mark.parametrize(("torn", "kept"), [('{"event": "epo', ""), ('{"event": "epoch"}', '{"event": "epoch"}\n')])
def test_a_torn_last_line_does_not_corrupt_the_next(tmp_path, torn, kept):
    folder = RunFolder(tmp_path, fresh=True)
    folder.record("train", loss=1.5)
    folder.close()
    for name, text in (("metrics.jsonl", torn), ("log.txt", "epoch 1 wi")):
        with (tmp_path / name).open("a") as file:
            file.write(text)
    first, after = {"event": "train", "loss": 1.5}, [{"event": "epoch"}] * bool(kept)
    assert read_records(tmp_path / "metrics.jsonl") == [first, *after]
    folder = RunFolder(tmp_path, fresh=False)
    folder.record("train", loss=0.5)
    folder.log("epoch 1 window 2")
    folder.close()
    assert read_records(tmp_path / "metrics.jsonl") == [first, *after, {"event": "train", "loss": 0.5}]
    assert (tmp_path / "metrics.jsonl").read_text().splitlines()[1:-1] == kept.splitlines()
    assert (tmp_path / "log.txt").read_text() == "epoch 1 wi\nepoch 1 window 2\n"


@pytest.mark.parametrize(("line", "reason"), [('{"event": "ep{"event": "train"}', ": a torn record and "), ("x", "; ")])
def test_records_that_cannot_be_read_are_named(tmp_path, line, reason):
    (tmp_path / "metrics.jsonl").write_text(f'{{"event": "train"}}\n{line}\n{{"event": "train"}}\n')
    with pytest.raises(ValueError, match=f"line 2 is no JSON object{reason}"):
        read_records(tmp_path / "metrics.jsonl")


def test_a_folder_that_is_gone_is_named(tmp_path):
    folder = RunFolder(tmp_path / "run", fresh=True)
    folder.sync()
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").mkdir()  # another one under its name will not do
    with pytest.raises(RunError, match=r"run: the run folder was deleted or moved during the run"):
        folder.sync()
    folder.close()


@pytest.mark.parametrize(
    ("load", "cores", "threads", "free"),
    [
        (0.0, 2, 2, 0),
        (0.4, 2, 2, 0),
        (1.0, 2, 2, 1),
        (9.0, 2, 2, 1),
        (9.0, 2, 1, 0),
        (10.0, 64, 64, 0),
        (30.5, 64, 64, 33),
    ],
)
def test_a_busy_machine_is_reported(monkeypatch, load, cores, threads, free):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0), raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores), raising=False)
    found = busy(threads)
    assert bool(found) == bool(free)
    assert not free or (f"load {load} on {cores} cores" in found and found.endswith(f"than --threads {free}"))
