"""scripts/torture.py on a small scale: runs and files survive its faults, and it notices those that do not."""

import json
import os
import random
import shutil
import subprocess
import sys

import pytest
import torch

from scripts import torture
from tests.faults import mutations, payloads, runs
from trellisnet.training.config import PROJECT

SCRIPT = PROJECT / "scripts" / "torture.py"


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder whose undisturbed run, of a quarter of the usual steps, the tests share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "FLAGS", [*runs.FLAGS, *"--batch_size 100 --max_eval_tokens 2000".split()])
        yield tmp_path_factory.mktemp("torture")


def test_the_records_of_a_run_tell_its_moment(tmp_path):
    job = runs.Job(tmp_path, 1, 1)
    assert job.now() == "step"
    (tmp_path / "config.json").write_text(json.dumps({"steps an epoch": 7}))
    for batch, moment in ((6, "step"), (7, "evaluation")):
        (tmp_path / "metrics.jsonl").write_text(json.dumps({"event": "train", "batch": batch}) + "\n")
        assert job.now() == moment
    (tmp_path / ".last.pt.1.tmp").touch()
    assert job.now() == "checkpoint"


@pytest.mark.slow
def test_a_run_survives_kills(folder):
    found = runs.kill(folder, 2, seed=1, epochs=1)
    assert sum(found[f"killed in {moment}"] for moment in runs.MOMENTS) == 2


@pytest.mark.slow
def test_a_run_survives_a_full_disk(folder):
    assert runs.full(folder, 5, seed=1, epochs=1)["no room"] == 5


@pytest.mark.slow
def test_a_run_survives_a_second_process(folder):
    assert runs.locks(folder, seed=1, epochs=1) == {"refused": 3}


def test_a_run_survives_jumping_clocks(folder):
    assert runs.clocks(folder, seed=1, epochs=1) == {"runs": 1}


def test_a_run_is_struck_only_once_it_has_begun(tmp_path):
    """The log of a run without a checkpoint stays until the next one overwrites it."""
    job = runs.Job(tmp_path, 1, 1)
    with job.started() as process:
        process.kill()
    left = (tmp_path / "log.txt").stat()
    assert left.st_size
    assert not job.last.exists()
    with job.started() as process:
        assert process.poll() is None
        assert (tmp_path / "log.txt").stat().st_mtime_ns > left.st_mtime_ns


def test_it_would_notice_a_difference(folder, tmp_path):
    expected = runs.reference(folder, seed=1, epochs=1)
    shutil.copytree(folder / "undisturbed-1-1", tmp_path / "run")
    job = runs.Job(tmp_path / "run", 1, 1)
    job.expect_outcome(expected, "nothing")
    content = runs.checkpoint.load(job.last)
    content["carry"] = (torch.zeros(1),)
    runs.checkpoint.save(job.last, content)
    with pytest.raises(runs.BrokenError, match="after this the run ended with other carry of last.pt than the unin"):
        job.expect_outcome(expected, "this")


def test_damage_is_detected_or_harmless(tmp_path):
    records = torture.damaged(tmp_path / "m", 200, seed=3)
    assert sum(r["tried"] for r in records) == 200
    for r in records:
        assert r["tried"] == r["detected"] + r["harmless"] + r["unnoticed"]
        assert r["detected"]
    unsummed = {r["target"] for r in records if not r["summed"]}
    assert unsummed == {"weights, 2019 container"}


def test_unnoticed_damage_is_reported(tmp_path):
    record = {"target": "x", "summed": True, "unnoticed": 2, "how": ["bit flip"]}
    assert mutations.broken([record]) == ["x: 2 not noticed (bit flip)"]
    assert mutations.broken([record | {"summed": False}]) == []
    assert mutations.broken([record | {"summed": False, "how": ["truncation"]}])
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    read = mutations.digest_of(lambda: list(path.read_bytes()))  # of a format without any check
    target = mutations.Target("x", path, read)
    assert ("bit flip", "unnoticed") in {mutations.try_one(target, random.Random(i)) for i in range(50)}
    assert path.read_bytes() == bytes(100)


def test_hostile_files_run_no_code_and_take_little_memory(tmp_path):
    found = torture.hostile(tmp_path / "p")
    assert found["executed"] == 0
    assert found["files"] > 200


def test_payloads_run_in_an_ordinary_unpickler(tmp_path):
    import pickle

    trap = tmp_path / "trap"
    for name, content in payloads.code(trap).items():
        if name in ("call of os.system", "call of eval", "call of nested", "a call as a key", "call of subprocess"):
            pickle.loads(pickle.dumps(content))
            assert trap.is_dir(), name
            trap.rmdir()


@pytest.mark.slow
def test_memory_is_watched(tmp_path):
    found = runs.soak(tmp_path, 0.05, seed=1)
    assert found["steps"] > 0
    assert found["resident at the end"] > 50_000_000
    assert runs.drift([1, 9, 9, *[5] * 3, *[6] * 9, *[7, 8, 7]]) == (5, 8)


def test_findings_are_written_with_their_origin(tmp_path, capsys):
    path = tmp_path / "t.json"
    argv = ["--kills", "0", "--writes", "0", "--mutations", "9", "--no-payloads", "--seed", "5", "--json", str(path)]
    assert torture.main(argv) == 0
    found = json.loads(path.read_text())
    assert found["command"].startswith("python scripts/torture.py --kills 0 ")
    assert found["seed"] == 5
    assert {"commit", "machine", "torch", "python"} <= found.keys()
    assert sum(r["tried"] for r in found["mutations"]) == 9
    assert "mutations: target " in capsys.readouterr().out


def test_a_loss_is_reported(monkeypatch, capsys):
    monkeypatch.setattr(payloads, "run", lambda _: {"executed": 1})
    assert torture.main(["--kills", "0", "--writes", "0", "--mutations", "0"]) == 1
    assert capsys.readouterr().err == "failed: payloads: a file ran code\n"


def test_bad_arguments(capsys):
    assert torture.main(["--kills", "-1"]) == 2
    assert capsys.readouterr().err == "error: --kills: expected at least 0, got -1\n"
    assert torture.main(["--json", "/no/where.json"]) == 2  # before anything is done
    assert capsys.readouterr().err.startswith("error: --json /no/where.json: cannot be written; ")


@pytest.mark.slow
def test_all_of_it(tmp_path):
    command = [sys.executable, str(SCRIPT), "--soak", "1", "--json", str(tmp_path / "t.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert (done.returncode, done.stderr) == (0, "")
