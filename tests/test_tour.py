"""scripts/tour.ipynb: its cells run, its pictures are those in git, and it stays small."""

import json

import pytest

from trellisnet.training.config import PROJECT

NOTEBOOK = PROJECT / "scripts" / "tour.ipynb"
NEEDS = "needs the extra notebook: pip install -e .[notebook]"


def outputs(cells):
    """Type of every output by cell."""
    return [[sorted(out.get("data", [out["output_type"]])) for out in cell.get("outputs", [])] for cell in cells]


def test_it_is_small_and_holds_its_pictures():
    assert NOTEBOOK.stat().st_size < 100_000
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert sum("image/svg+xml" in kinds for cell in outputs(cells) for kinds in cell) == 5
    assert all(len(line) <= 120 for cell in cells for line in "".join(cell["source"]).splitlines())


def test_its_cells_assert_what_its_text_says(monkeypatch):
    pytest.importorskip("matplotlib", reason=NEEDS)
    pytest.importorskip("IPython", reason=NEEDS)
    monkeypatch.setenv("MPLBACKEND", "agg")
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    names = {"__name__": "__main__"}
    for number, source in enumerate(sources):
        assert number == 0 or "assert " in source
        exec(compile(source, f"tour.ipynb, cell {number}", "exec"), names)


@pytest.mark.slow
def test_a_kernel_runs_it_from_any_folder_to_the_outputs_in_git(tmp_path):
    nbformat = pytest.importorskip("nbformat", reason=NEEDS)
    nbclient = pytest.importorskip("nbclient", reason=NEEDS)
    committed = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(committed)
    run = nbformat.from_dict(json.loads(json.dumps(committed)))
    nbclient.NotebookClient(run, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert outputs(run.cells) == outputs(committed.cells)
