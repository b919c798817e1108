"""scripts/gpu_check.sh with a stub of Python: time limits, packed results, exit codes."""

import os
import signal
import subprocess
import sys
import tarfile
import time

import pytest
import torch

from trellisnet.training.config import PROJECT

SCRIPT = PROJECT / "scripts" / "gpu_check.sh"

# Writes its arguments to $CALLS; a command that matches $FAIL fails, and one that matches $HANG never ends.
STUB = r"""#!/usr/bin/env bash
if [ "$1" = - ]; then
    cat >/dev/null
    if [ $# = 1 ]; then echo "python 3, torch 2"; else cp "$2" "$3"; fi
    exit
fi
echo "$PYTHONPATH $*" >>"$CALLS"
for argument in "$@"; do
    case "$before" in
    --out) run="$argument" ;;
    --metrics) printf '{\n "gates": "%s",\n "cuda_graph": "on"\n}\n' "${GATES:-triton}" >"$argument" ;;
    --junitxml) echo "<testsuite tests=\"70\" skipped=\"${SKIPPED:-0}\">" >"$argument" ;;
    esac
    before="$argument"
done
if [ -n "$run" ]; then
    mkdir -p "$run"
    echo "epoch 1 window 20/100 step 20 loss 1.0" >"$run/log.txt"
    echo "{}" | tee "$run/config.json" >"$run/metrics.jsonl"
    echo weights >"$run/weights.pkl"
fi
if [ -n "$HANG" ] && [[ "$*" == $HANG ]]; then
    trap 'echo checkpoint; exit 143' TERM
    echo hanging
    for i in {1..600}; do sleep 0.1; done
fi
if [ -n "$FAIL" ] && [[ "$*" == $FAIL ]]; then echo "failed: a reason" >&2; exit 1; fi
echo done
"""


def default_signals():
    for signum in (signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_DFL)


@pytest.fixture
def start(tmp_path):
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)

    def call(*parts, **environment):
        environment = {
            **os.environ, "PYTHON": str(stub), "OUT": str(tmp_path / "out"), "RUNS": str(tmp_path / "runs"),
            "CALLS": str(tmp_path / "calls"), **environment,
        }  # fmt: skip
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        # bash cannot trap what was ignored when it started, as SIGHUP is under nohup and SIGINT in a background job.
        return subprocess.Popen(["bash", str(SCRIPT), *parts], env=environment, preexec_fn=default_signals, **streams)

    return call


@pytest.fixture
def check(start):
    def call(*parts, **environment):
        process = start(*parts, **environment)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    return call


def packed(tmp_path):
    """Names and contents of the packed results."""
    with tarfile.open(tmp_path / "out.tar") as tar:
        return {m.name.removeprefix("out/"): tar.extractfile(m).read().decode() for m in tar if m.isfile()}


def verdicts(tmp_path):
    """Names and verdicts in the summary, without seconds."""
    lines = [line for line in packed(tmp_path)["summary.txt"].splitlines() if line.startswith("== ")]
    return [tuple(line.removeprefix("== ").split(",")[0].split(": ")) for line in lines]


def test_short_is_look_tests_and_profile(check, tmp_path):
    code, out, err = check("short")
    assert code == 0, err
    names = ["look_graph_on", "look_graph_off", "tests", "profile_times", "profile_kernels"]
    assert verdicts(tmp_path) == [(name, "passed") for name in names]
    calls = (tmp_path / "calls").read_text().splitlines()
    assert all(line.startswith(f"{PROJECT} ") for line in calls)  # the package is found without an installation
    assert [line.split(" ", 1)[1].split(" --")[0] for line in calls] == [
        "word_ptb/train.py", "word_ptb/train.py", "-m pytest -v -n 8", "scripts/profile_step.py times",
        "scripts/profile_step.py kernels",
    ]  # fmt: skip
    assert "--cuda_graph on" in calls[0]
    assert "--cuda_graph off" in calls[1]
    assert "--dist worksteal" in calls[2]
    content = packed(tmp_path)
    assert content["versions.txt"] == "python 3, torch 2\n"
    assert "step 20" in content["look_graph_on.log.txt"]
    assert {"look_graph_off.metrics.jsonl", "look_graph_off.config.json", "tests.xml"} <= content.keys()
    assert "look_graph_on.weights.pkl" not in content
    assert out.splitlines()[-1] == f"passed: short; results in {tmp_path}/out.tar"


def test_relative_paths_start_from_the_callers_directory(check, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = check("look", OUT="out", RUNS="here/runs")
    assert code == 0, err
    assert verdicts(tmp_path) == [("look_graph_on", "passed"), ("look_graph_off", "passed")]
    assert (tmp_path / "here" / "runs" / "look_graph_on").is_dir()
    assert out.splitlines()[-1] == f"passed: look; results in {tmp_path}/out.tar"


def test_a_failure_does_not_end_the_rest(check, tmp_path):
    code, out, err = check("look", "sweep", FAIL="*--cuda_graph on*")
    assert code == 1
    assert err.splitlines()[-1] == f"failed: look_graph_on; results in {tmp_path}/out.tar"
    assert "failed: a reason" in out
    expected = [("look_graph_on", "exit code 1"), ("look_graph_off", "passed"), ("sweep", "passed")]
    assert verdicts(tmp_path) == expected


def test_time_is_limited_and_omissions_are_reported(check, tmp_path):
    began = time.monotonic()
    code, _, err = check("profile", HANG="*times*", BUDGET="3")
    assert time.monotonic() - began < 20
    assert code == 1
    assert verdicts(tmp_path) == [("profile_times", "time limit"), ("profile_kernels", "left out")]
    assert "checkpoint" in packed(tmp_path)["profile_times.txt"]  # it was asked to end and awaited
    assert err.splitlines()[-1].startswith("failed: profile_times profile_kernels; ")


@pytest.mark.parametrize(("signum", "expected"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_signal_ends_the_command_and_keeps_the_results(start, tmp_path, signum, expected):
    process = start("sweep", "pixels", "words", HANG="*pmnist/train.py*")
    deadline = time.monotonic() + 30
    while "hanging" not in (text := "".join(p.read_text() for p in tmp_path.glob("out/pixels.txt"))):
        assert time.monotonic() < deadline, text
        time.sleep(0.05)
    assert verdicts(tmp_path) == [("sweep", "passed")]  # packed before the next one began
    process.send_signal(signum)
    process.communicate(timeout=30)
    assert process.returncode == expected
    assert verdicts(tmp_path) == [("sweep", "passed"), ("pixels", "interrupted")]
    content = packed(tmp_path)
    assert "checkpoint" in content["pixels.txt"]
    assert content["pixels.weights.pkl"] == "weights\n"
    assert "words" not in (tmp_path / "calls").read_text()


def test_a_training_starts_from_the_weights_of_the_previous_one(check, tmp_path):
    code, _, err = check("words", MORE="--max_steps 20 --seed 3")
    assert code == 0, err
    first, second = (tmp_path / "calls").read_text().splitlines()
    assert "--max_steps 20 --seed 3 --out" in first
    assert f"--load_weight {tmp_path}/runs/words_10_layers/weights.pkl" in second
    assert {"words_10_layers.weights.pkl", "words_55_layers.weights.pkl"} <= packed(tmp_path).keys()


def test_a_run_without_tritons_gates_has_not_passed(check, tmp_path):
    code, *_ = check("look", GATES="eager")
    assert code == 1
    assert verdicts(tmp_path)[-1][0] == "look"


def test_a_skipped_test_has_not_passed(check, tmp_path):
    code, *_ = check("tests", SKIPPED="3")
    assert code == 1
    assert verdicts(tmp_path) == [("tests", "passed"), ("tests", "3 of them skipped")]


def test_results_of_an_earlier_call_are_not_those_of_a_failed_one(check, tmp_path):
    (tmp_path / "out").mkdir()
    for name in ("look_graph_on.weights.pkl", "bench.json", "other.json"):
        (tmp_path / "out" / name).write_text("old")
    assert check("look", "bench", FAIL="*bench.py*")[0] == 1
    assert {"look_graph_on.weights.pkl", "bench.json", "other.json"} & packed(tmp_path).keys() == {"other.json"}


def test_later_calls_add_to_the_results(check, tmp_path):
    assert check("sweep")[0] == 0
    assert check("profile")[0] == 0
    assert [name for name, _ in verdicts(tmp_path)] == ["sweep", "profile_times", "profile_kernels"]
    assert {"sweep.txt", "profile_times.txt"} <= packed(tmp_path).keys()


@pytest.mark.parametrize(
    ("parts", "environment", "message"),
    [
        (["short", "all"], {}, "error: expected one of short look tests "),
        (["short"], {"BUDGET": "5m"}, "error: BUDGET: expected a number of seconds, got 5m"),
        (["short"], {"PYTHON": "/nowhere/python"}, "error: /nowhere/python cannot use the device ("),
    ],
)
def test_bad_arguments_are_one_line(check, tmp_path, parts, environment, message):
    code, out, err = check(*parts, **environment)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(message)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_nothing_is_checked(check, tmp_path):
    assert check("short", PYTHON=sys.executable) == (2, "", "error: no CUDA device; nothing was checked\n")
    assert not (tmp_path / "out").exists()
