"""scripts/plot.py: the numbers it reads and, with matplotlib, the pictures it draws."""

import hashlib
import json
import math
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from cases import committed
from scripts import plot
from scripts.reports import charts
from scripts.reports.pictures import draw_contexts, draw_speeds, mean_text
from scripts.reports.records import read_memories, read_speeds
from scripts.reports.trellis import trellis
from trellisnet import TrellisNet
from trellisnet.errors import UserError
from trellisnet.training.config import PROJECT
from trellisnet.training.runlog import pip_install


def epoch(number, train, valid, score=math.exp):
    return {
        "event": "epoch", "epoch": number, "finished": True, "seconds": 60.0 * number, "train_loss": train,
        "valid_loss": valid, "train_score": score(train), "valid_score": None if valid is None else score(valid),
    }  # fmt: skip


def written(folder, *records):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


UNWRITABLE = "cannot be written; name a file in a folder that exists and is writable"
METRICS = {
    "task": "word_ptb", "preset": "small", "complete": True, "corpus": "Penn Treebank", "params": 5, "epochs": 1,
    "commit": "a1", "data": "f", "machine": "CPU, 2 cores", "threads": 2, "torch": "2", "steps": 500, "seed": 1,
    "backend": "fused", "command": "python word_ptb/train.py --out runs/tables/compare-13-minutes/x",
    "load_weight": "", "valid": {"ppl": 60.0, "tokens": 7}, "test": {"ppl": 60.0, "tokens": 7}, "peak_memory": 4.5e9,
}  # fmt: skip


def metrics(ppl=60.0, **changes):
    return METRICS | {"test": METRICS["test"] | {"ppl": ppl}} | changes


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.fixture
def root(tmp_path):
    """A project with records of every kind."""
    for row, scores in (("trellisnet", (58.5, 59.5)), ("tcn", (90.0,))):
        for seed, ppl in enumerate(scores):
            for table in ("table1", "compare-30-minutes"):
                write(tmp_path / "runs" / "tables" / table / row / f"seed-{seed}" / "metrics.json", metrics(ppl))
    results = tmp_path / "results"
    records = [
        {"task": "word_ptb", "part": part, "variant": variant, "seconds": 2.0 / (i + 1), "ratio": i + 1.0,
         "per_second": 5.0, **({"gflops": 3.0} if part == "step" else {})}
        for part in ("step", "generation") for i, variant in enumerate(("reference", "fused"))
    ]  # fmt: skip
    for part in ("memory", "head memory"):
        records.append({"task": "word_ptb", "part": part, "variant": "reference", "bytes": 3e9})
    content = {"machine": "CPU, 2 cores", "command": "python scripts/bench.py", "commit": "a1", "records": records}
    for name in ("word_ptb", "word_ptb_recompute"):  # with the same parts
        write(results / "speed" / f"{name}.json", content)
    for network, ppl in (("trellisnet", 130.0), ("rhn", 150.0)):
        folder = results / "compare_13_minutes" / network
        write(folder / "metrics.json", metrics(ppl))
        written(folder, epoch(1, 6.0, 5.0))
        (folder / "log.txt").touch()
    static, dynamic = {"ppl": 101.0, "tokens": 7}, {"ppl": 89.0, "tokens": 7}
    content = metrics(test_static=static, valid_static=static, test_dynamic=dynamic, valid_dynamic=dynamic)
    write(results / "adapted" / "word_ptb_small.json", content)
    for task in ("pmnist", "word_ptb"):
        write(results / "memory" / f"{task}.json", metrics(task=task))
    for name, ppl in (("trellisnet", 300.0), ("activation_tanh", 9e5), ("mixed_group_2", 400.0)):
        write(results / "table6_small" / f"{name}.json", metrics(ppl, complete=False))
    for precision in ("fp32", "bf16"):
        for seed in (1, 2):
            content = metrics(100.0 + seed, precision=precision, seed=seed)
            write(results / "precision" / f"{precision}-{seed}.json", content)
    return tmp_path


def test_a_curve_holds_the_scores_of_finished_epochs(tmp_path):
    # The second epoch was logged twice, before and after a kill; an unfinished epoch does not count.
    cut = epoch(3, 4.0, 4.0) | {"finished": False}
    run = written(tmp_path / "a", {"event": "train"}, epoch(1, 6, 5), epoch(2, 9, 9), epoch(2, 5.5, 4.5), cut)
    curve = charts.read_curve(run, "a")
    assert (curve.label, curve.score, curve.epochs, curve.minutes) == ("a", "ppl", [1, 2], [1.0, 2.0])
    assert curve.train == [math.exp(6), math.exp(5.5)]
    assert curve.valid == [math.exp(5), math.exp(4.5)]
    run = written(tmp_path / "b", epoch(1, 1.2, None, lambda loss: loss / math.log(2)))
    assert charts.read_curve(run / "metrics.jsonl", "b")[1:] == ("bpc", [1], [1.0], [1.2 / math.log(2)], [])
    run = written(tmp_path / "c", epoch(1, 1.2, 1.3, lambda loss: 0.5))
    assert charts.read_curve(run, "c").score == "accuracy"
    run = written(tmp_path / "d", epoch(1, 0.2, 0.3, lambda loss: loss))  # the adding problem
    assert charts.read_curve(run, "d").score == "mse"


def test_scores_that_are_not_finite_leave_a_gap(tmp_path):
    """A perplexity beyond all numbers is recorded as null, and so is the score of an epoch whose steps were skipped."""
    null = {"train_score": None}
    run = written(tmp_path / "a", epoch(1, 6.0, 5.0) | {"train_loss": 900.0} | null, epoch(2, 5.5, 4.5))
    curve = charts.read_curve(run, "a")
    assert math.isnan(curve.train[0])
    assert (curve.train[1], curve.valid) == (math.exp(5.5), [math.exp(5), math.exp(4.5)])
    other = charts.read_curve(written(tmp_path / "b", epoch(1, 6.0, None) | null, epoch(2, 5.5, None)), "b")
    assert (other.score, other.valid) == ("ppl", [])
    with pytest.raises(UserError, match="no epoch has a finite score"):
        charts.read_curve(written(tmp_path / "c", epoch(1, 6.0, None) | null), "c")
    pytest.importorskip("matplotlib")
    assert plot.main(["curves", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "curves.svg")]) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file; name the folder of a run"),
        ("", "no epoch is finished yet"),
        ('{"event": "train"}\n', "no epoch is finished yet"),
        ("{", "no epoch is finished yet"),  # a torn line, which the run will write again
        ("{\n", "corrupt or of another kind"),
        ('{"event": "epoch", "finished": true, "epoch": 1}\n', "corrupt or of another kind"),
        ("3\n", "corrupt or of another kind"),
    ],
)
def test_files_without_a_curve_are_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        charts.read_curve(tmp_path, "x")


def test_committed_results_have_curves():
    runs = [path.parent for path in committed("results/*/metrics.jsonl")]
    assert len(runs) > 4
    for run in runs:
        curve = charts.read_curve(run, run.name)
        task = json.loads((run / "metrics.json").read_text())["task"]
        assert curve.score == {"word_ptb": "ppl", "wt103": "ppl", "char_ptb": "bpc"}.get(task, "accuracy")


def test_labels_tell_runs_apart(tmp_path):
    paths = [tmp_path / "a" / "seed-1", tmp_path / "b" / "seed-1"]
    assert charts.labels(paths) == ["a/seed-1", "b/seed-1"]
    assert charts.labels([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
    assert charts.labels([tmp_path / "a", tmp_path / "a"]) == ["a", "a"]


def test_charts_hold_the_scores_of_the_files(root):
    tables = {table.name: table for table in charts.read_charts(root)}
    ours = ["table6_small", "precision", "compare_13_minutes", "adapted_word_ptb_small"]
    assert list(tables) == [*ours, "table1", "compare-30-minutes"]
    rows = [(row.label, row.ours) for row in tables["compare_13_minutes"].rows]
    assert rows == [("TrellisNet", [130.0]), ("Recurrent highway network", [150.0])]
    rows = [(row.label, row.ours) for row in tables["adapted_word_ptb_small"].rows]
    assert rows == [("static", [101.0]), ("+ dynamic evaluation", [89.0])]
    rows = {row.label: row for row in tables["table1"].rows}
    assert rows["TrellisNet"] == ("TrellisNet", 56.97, [58.5, 59.5])
    assert rows["Generic TCN"].ours == [90.0]
    assert rows["TrellisNet-MoS"] == ("TrellisNet-MoS", 54.67, [])
    assert (tables["table1"].title, tables["table1"].axis) == ("Table 1. Word-level Penn Treebank", "test perplexity")
    assert [row.ours for row in tables["table6_small"].rows] == [[300.0], [400.0], [9e5]]
    assert [(row.label, row.ours) for row in tables["precision"].rows] == [("fp32", [101, 102]), ("bf16", [101, 102])]
    assert list(read_memories(root)) == ["word_ptb", "pmnist"]
    counts = {name: len(content["records"]) for name, content in read_speeds(root).items()}
    assert counts == {"word_ptb": 6, "word_ptb_recompute": 6}
    write(root / "results" / "table6_small" / "trellisnet.json", metrics(test={}))
    with pytest.raises(UserError, match="trellisnet.json: corrupt or of another kind"):
        charts.read_charts(root)
    path = root / "results" / "memory" / "pmnist.json"
    write(path, json.loads(path.read_text()) | {"resumed_with": "python pmnist/train.py --resume"})
    with pytest.raises(UserError, match="pmnist.json: of a resumed run"):
        read_memories(root)


def test_contexts_in_different_units_are_refused(tmp_path):
    content = {
        "task": "word_ptb", "name": "a", "token": "words", "receptive_field": None, "corpus": "c", "split": "valid",
        "targets": 9, "records": [{"context": 1, "loss": 2.0, "error": 0.1}],
    }  # fmt: skip
    damaged = ({"records": []}, {"records": [{"context": 1}]}, {"targets": None}, {"records": 3})
    for name, changes in zip("abcdefg", ({}, {}, {"token": "symbols"}, *damaged), strict=True):
        (tmp_path / f"{name}.json").write_text(json.dumps(content | changes))
    a, b, c, *others = (tmp_path / f"{name}.json" for name in "abcdefg")
    assert [label for label, _ in charts.read_contexts([a])] == ["word_ptb a"]
    assert [label for label, _ in charts.read_contexts([a, b])] == ["a.json", "b.json"]
    with pytest.raises(UserError, match="plot them one by one"):
        charts.read_contexts([a, c])
    for other in others:
        with pytest.raises(UserError, match="corrupt or of another kind"):
            charts.read_contexts([other])


def test_a_picture_of_contexts_names_all_texts():
    pytest.importorskip("matplotlib")
    records = [{"context": n, "loss": 2.0, "error": 0.1} for n in (1, 2)]
    content = {"token": "words", "receptive_field": None, "split": "valid", "targets": 9, "records": records}
    (axes,) = draw_contexts([(text, content | {"corpus": text}) for text in ("a", "b", "a")]).axes
    assert axes.get_title(loc="left").startswith("a, valid, 9 targets; b, valid, 9 targets; bands: ")


def test_a_spread_has_the_digits_of_its_mean():
    assert mean_text([1.158, 1.161]) == "1.1595 ± 0.0021"
    assert mean_text([58.5, 59.5]) == "59.00 ± 0.71"
    assert mean_text([1234.5]) == "1,234.50"


def test_scores_by_depth_are_read_from_the_working_directory(tmp_path, monkeypatch):
    result = {"loss": 4.6, "tokens": 9, "nlevels": 8, "receptive_field": 9, "ppl": 99.0}
    scores = dict.fromkeys(("valid", "test"), result)
    scores |= dict.fromkeys(("valid_depth_16", "test_depth_16"), result | {"nlevels": 16})
    write(tmp_path / "words.json", metrics() | scores)
    monkeypatch.chdir(tmp_path)
    ((name, pairs),) = charts.read_depths([Path("words.json")])
    assert (name, [test["nlevels"] for _, test in pairs]) == ("words", [8, 16])


def test_scores_by_depth_are_drawn_with_the_receptive_fields(tmp_path):
    pytest.importorskip("matplotlib")
    for name, score in (("words", "ppl"), ("symbols", "bpc")):
        content = metrics()
        for key, layers in (("", 8), ("_depth_16", 16)):
            result = {"loss": 4.6, "tokens": 9, "nlevels": layers, "receptive_field": 100 + layers, score: 2.5 + layers}
            content |= {f"{split}{key}": result for split in ("valid", "test")}
        write(tmp_path / f"{name}.json", content)
    files = [str(tmp_path / f"{name}.json") for name in ("words", "symbols")]
    assert plot.main(["depth", *files, "--out", str(tmp_path / "depth.svg")]) == 0
    drawn = (tmp_path / "depth.svg").read_text()
    for part in ("words", "symbols", "108", "116", "perplexity", "bits per character", "validation"):
        assert f">{part}<" in drawn
    other = tmp_path / "a" / "words.json"
    write(other, content)
    paths = [tmp_path / "words.json", other]
    assert len({name for name, _ in charts.read_depths(paths)}) == 2
    write(other, metrics())
    with pytest.raises(UserError, match="words.json: .* no scores by depth"):
        charts.read_depths([other])


def test_corrupt_measurements_are_one_line(root):
    write(root / "results" / "memory" / "pmnist.json", metrics(peak_memory=None))
    with pytest.raises(UserError, match="pmnist.json: corrupt or of another kind"):
        list(plot.pictures(root))
    head = {"command": "c", "machine": "m", "commit": "a1"}
    for content in ({}, head | {"records": [{"part": "step"}]}):
        write(root / "results" / "speed" / "word_ptb.json", content)
        with pytest.raises(UserError, match="word_ptb.json: corrupt or of another kind"):
            list(plot.pictures(root))


def test_bars_do_not_hide_each_other():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    for content in read_speeds(PROJECT).values():
        figure = draw_speeds(content)
        for axes in figure.axes:
            places = [round(bar.get_y(), 6) for bar in axes.patches]
            assert len(places) == len(set(places))
        colours = {bars.patches[0].get_facecolor() for bars in figure.axes[0].containers if len(bars)}
        assert len(colours) == sum(bool(len(bars)) for bars in figure.axes[0].containers)
        pyplot.close(figure)


@pytest.mark.parametrize(("kernel_size", "dilation"), [(2, [1]), (2, [1, 2]), (3, [1]), (2, [2, 1])])
def test_the_trellis_shows_the_receptive_field(kernel_size, dilation):
    text = trellis(3, kernel_size, [dilation], 10)
    picture = ElementTree.fromstring(text)
    assert picture.tag.endswith("svg")
    inputs = re.findall(r'<rect class="(x[^"]*)"', text)
    field = TrellisNet(1, 1, 3, kernel_size=kernel_size, dilation=tuple(dilation)).receptive_field
    assert len(inputs) == 10
    first = min(i for i, kind in enumerate(inputs) if kind == "x")
    assert 10 - first == field
    assert f"y sees {field} inputs" in text


def test_the_committed_trellis_is_up_to_date(tmp_path, capsys):
    assert plot.main(["trellis", "--out", str(tmp_path / "new" / "trellis.svg")]) == 0
    committed = PROJECT / "results" / "figures" / "trellis.svg"
    assert (tmp_path / "new" / "trellis.svg").read_text() == committed.read_text()
    assert "results/figures/trellis.svg" in (PROJECT / "README.md").read_text()


def test_without_matplotlib_a_line_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plot.main(["curves", str(written(tmp_path, epoch(1, 6, 5)))]) == 2
    assert capsys.readouterr().err == f"error: plots need matplotlib: {pip_install('matplotlib')}\n"


def test_drawing_twice_gives_the_same_files(root, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    run = written(tmp_path / "a", epoch(1, 6, 5), epoch(2, 5.5, 4.5))
    other = written(tmp_path / "b", epoch(1, 1.2, None, lambda loss: 0.5))
    record = {"context": 1, "loss": 5.0, "error": 0.1}
    content = {
        "task": "word_ptb", "name": "a", "token": "words", "receptive_field": 2, "corpus": "c", "split": "valid",
        "targets": 9, "records": [record, record | {"context": 2}, record | {"context": 4}],
    }  # fmt: skip
    (tmp_path / "context.json").write_text(json.dumps(content))
    sums = []
    for _ in range(2):
        assert plot.main(["curves", str(run), str(other), "--out", "p/curves.svg"]) == 0
        assert plot.main(["curves", str(run), "--by", "minutes", "--out", "p/curves.png"]) == 0
        assert plot.main(["context", "context.json", "--out", "p/context.svg"]) == 0
        assert plot.main(["tables", "--root", str(root), "--out", "p"]) == 0
        sums.append({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "p").iterdir()})
    names = {"memory", "table6_small", "precision", "table1", "compare-30-minutes", "context", "curves"}
    names |= {"speed_word_ptb", "speed_word_ptb_recompute", "compare_13_minutes", "adapted_word_ptb_small"}
    assert set(sums[0]) == {f"{name}.svg" for name in names} | {"curves.png"}
    assert sums[0] == sums[1]


@pytest.mark.parametrize(
    ("command", "out", "message"),
    [
        (["trellis"], "x.png", "x.png: end the name in .svg"),
        (["trellis"], "x", "x: end the name in .svg"),
        (["trellis"], "last.pt", "last.pt: end the name in .svg"),
        (["curves", "run"], "x.xyz", "x.xyz: end the name in .svg, .png or .pdf"),
        (["context", "x.json"], "x", "x: end the name in .svg, .png or .pdf"),
        (["trellis"], "plain.svg", "plain.svg: holds something else, which is not overwritten; name a new file"),
        (["curves", "run"], "other.png", "other.png: holds something else, which is not overwritten; name a new file"),
        (["tables", "--root", "root"], "plain.svg", f"plain.svg/table1.svg: {UNWRITABLE}"),
    ],
)
def test_other_files_are_not_replaced(tmp_path, monkeypatch, capsys, command, out, message):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "root" / "runs" / "tables" / "table1" / "trellisnet" / "seed-1"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(METRICS))
    contents = {"last.pt": b"PK", "plain.svg": b"years of work", "other.png": b"<svg>"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    assert plot.main([*command, "--out", out]) == 2
    assert capsys.readouterr() == ("", f"error: --out {message}\n")
    assert {name: (tmp_path / name).read_bytes() for name in contents} == contents


def test_an_earlier_picture_is_replaced(tmp_path):
    (tmp_path / "x.SVG").write_text("<svg>")
    assert plot.main(["trellis", "--out", str(tmp_path / "x.SVG")]) == 0
    assert (tmp_path / "x.SVG").read_text() == trellis()
