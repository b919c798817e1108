"""`python -m trellisnet`: the contents of a bug report."""

import re

import pytest
import torch

import trellisnet
from trellisnet import __main__ as report
from trellisnet.ops import fused
from trellisnet.training.config import PROJECT


def printed(capsys):
    report.main()
    return dict(re.fullmatch(r"(\w+): +(.+)", line).groups() for line in capsys.readouterr().out.splitlines())


def test_it_says_what_runs_here_and_where_things_lie(capsys):
    lines = printed(capsys)
    assert list(lines) == [*"trellisnet software system device backends gates products data models runs".split()]
    assert lines["trellisnet"].startswith(f"{trellisnet.__version__}, commit ")
    assert f"torch {torch.__version__}, " in lines["software"]
    assert lines["device"].endswith(f"threads: {torch.get_num_threads()}")
    assert lines["backends"].startswith("reference, fused")
    assert "eager" in lines["gates"].partition(";")[0]
    assert lines["products"].startswith("mm (fp32, bf16), onednn (")
    place, _, names = lines["models"].partition(": ")
    assert place == str(PROJECT / "results")
    assert {"char_ptb_small", "word_ptb_small"} <= set(names.split(", "))
    assert lines["data"].startswith(f"{PROJECT / 'data'}: ")


def test_it_gives_the_reason_for_what_cannot_run(capsys, monkeypatch):
    monkeypatch.setattr(fused, "no_triton", lambda: "the package triton is not installed")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    lines = printed(capsys)
    assert lines["backends"] == "reference, fused; not triton: the package triton is not installed"
    assert lines["gates"].endswith("not triton: the package triton is not installed")
    assert lines["device"].startswith("cpu (")


@pytest.mark.parametrize("label", report.LINES)
def test_a_broken_installation_is_reported_too(label, capsys, monkeypatch):
    def broken():
        raise OSError("libcuda.so: cannot open\nshared object")

    monkeypatch.setitem(report.LINES, label, broken)
    assert printed(capsys)[label] == r"unknown (OSError: libcuda.so: cannot open\nshared object)"


def test_nothing_is_needed_in_the_working_directory(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "PROJECT", tmp_path)
    (tmp_path / "data" / "penn").mkdir(parents=True)  # as a failed download leaves it
    lines = printed(capsys)
    assert (lines["data"], lines["runs"]) == (f"{tmp_path / 'data'}: none", f"{tmp_path / 'runs'}: none")
