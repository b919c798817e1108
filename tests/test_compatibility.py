"""scripts/compatibility.py: what a cell says, and the table on a page."""

import json

import pytest
import torch

from scripts import collect, compatibility

CPU = torch.device("cpu")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("column", ["reference", "fused, torch's gates"])
def test_a_cell_names_the_backend_that_ran(column):
    fallback = "yes" if column == "reference" else "reference"
    for row, entry in (
        ("eager, with gradients", "yes"),
        ("`torch.export`", "yes"),
        ("`torch.func.grad`", fallback),
        ("`torch.func.vmap`", fallback),
        ("`torch.func.jvp`", fallback),
        ("`torch.jit.trace`", fallback),
    ):
        assert compatibility.cell(row, column, CPU) == entry


def test_a_cell_says_what_failed_and_what_could_not_be_tried(monkeypatch):
    row, column = "eager, with gradients", "fused, torch's gates"
    assert compatibility.cell("CUDA graph, with gradients", column, CPU) == compatibility.NOT_TRIED
    assert compatibility.cell(row, "fused, Triton gates", CPU) == compatibility.NOT_TRIED
    expected, _ = compatibility.ROWS[row]

    def wrong(net, x):
        return tuple(2 * part for part in expected(net)(x)), True

    def fails(net, x):
        raise NotImplementedError("torch has\nno such thing")

    for tried, entry in ((wrong, "no: Tensor-likes are not close!"), (fails, "no: torch has")):
        monkeypatch.setitem(compatibility.ROWS, row, (expected, tried))
        assert compatibility.cell(row, column, CPU) == entry


def test_the_table_is_printed_recorded_and_written_into_a_page(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compatibility, "ROWS", {"eager, with gradients": ..., "ONNX": ...})
    monkeypatch.setattr(compatibility, "cell", lambda row, column, device: f"{row[0]}{len(column)}")
    monkeypatch.setattr(compatibility, "origin", lambda *_: {"command": "python c.py", "machine": "M"})
    folder = tmp_path / "results" / "compatibility"
    folder.mkdir(parents=True)
    assert compatibility.main(["--json", str(folder / "cpu.json")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[2] == "| eager, with gradients | e9 | e20 | e14 | e19 |"
    (tmp_path / "README.md").write_text("<!-- compatibility: begin -->\n<!-- compatibility: end -->\n")
    record = json.loads((folder / "cpu.json").read_text()) | {"torch": "2", "commit": "0123"}
    (folder / "cpu.json").write_text(json.dumps(record))
    assert collect.main(["--root", str(tmp_path)]) == 0
    page = (tmp_path / "README.md").read_text()
    assert "\n".join(printed) in page
    assert "Tried by `python c.py` on M, torch 2, commit `0123`." in page
    record["cells"]["ONNX"].popitem()
    for bad in (record, {**record, "commit": "0-dirty"}, {**record, "cells": {}}):
        (folder / "cpu.json").write_text(json.dumps(bad))
        assert collect.main(["--root", str(tmp_path)]) == 2
