"""Pictures of results; the format is that of the file's name (svg, png, pdf).

    python scripts/plot.py curves runs/word_ptb/small results/word_ptb_small --out curves.svg
    python scripts/plot.py tables --out pictures                 every table that there are numbers for
    python scripts/plot.py context context.json --out context.svg   what scripts/context.py has measured
    python scripts/plot.py trellis --out results/figures/trellis.svg

All but the last need matplotlib: pip install -e .[plot]. The functions that read numbers need nothing.
"""

import contextlib
import functools
import math
import re
import signal
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main takes signals: no traceback from an import

from scripts import collect
from trellisnet.errors import UserError
from trellisnet.ops.pruning import dependencies
from trellisnet.serialization import atomic_write
from trellisnet.training.cli import guarded
from trellisnet.training.config import PROJECT, Parser
from trellisnet.training.runlog import check_output, pip_install

# What colour-blind readers tell apart (Okabe & Ito, 2008), and two more.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999", "#882255"]
AXES = {"ppl": "perplexity", "bpc": "bits per character", "accuracy": "accuracy"}
FORMATS = ("svg", "png", "pdf")
BEGINNINGS = {"svg": (b"<?xml", b"<svg"), "png": b"\x89PNG", "pdf": b"%PDF"}  # of files
FAR = 20  # times the median, from where on a score is off the axis
WIDE = 2.5  # from this ratio of the largest to the smallest on, an axis is logarithmic


# --- numbers ----------------------------------------------------------------------------------------------------------


class Curve(NamedTuple):
    """Scores of a run by epoch; `valid` is empty without validation data."""

    label: str
    score: str  # ppl, bpc or accuracy
    epochs: list[int]
    minutes: list[float]
    train: list[float]
    valid: list[float]


class Row(NamedTuple):
    """A row of a table: the paper's score, and those of our runs."""

    label: str
    paper: float | None
    ours: list[float]


class Table(NamedTuple):
    """Scores that are comparable with each other."""

    name: str
    title: str
    axis: str
    rows: list[Row]


def score_name(loss: float, score: float) -> str:
    """What a score is called, from the loss that it was computed of."""
    if loss < 700 and math.isclose(score, math.exp(loss), rel_tol=1e-6):
        return "ppl"
    return "bpc" if math.isclose(score, loss / math.log(2), rel_tol=1e-6) else "accuracy"


def curve(path: Path, label: str) -> Curve:
    """The learning curve of a run, from the metrics.jsonl in its folder.

    Raises:
        UserError: no such file, a damaged one, or no epoch that is done.
    """
    file = path / "metrics.jsonl" if path.is_dir() else path
    try:
        records = collect.parsed_lines(file)
        # A continued run may tell of an epoch twice; the last time counts.
        epochs = list({r["epoch"]: r for r in records if r["event"] == "epoch" and r["finished"]}.values())
        if not epochs:
            raise UserError(f"{file}: no epoch is done yet")
        split = "train" if epochs[0]["valid_score"] is None else "valid"
        return Curve(
            label,
            score_name(epochs[0][f"{split}_loss"], epochs[0][f"{split}_score"]),
            [e["epoch"] for e in epochs],
            [e["seconds"] / 60 for e in epochs],
            [e["train_score"] for e in epochs],
            [] if split == "train" else [e["valid_score"] for e in epochs],
        )
    except OSError as e:
        raise UserError(f"{file}: cannot be read ({e.strerror}); name the folder of a run") from e
    except UserError:
        raise
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{file}: not the metrics.jsonl of a run, or a damaged one ({e})") from e


def labels(paths: Sequence[Path]) -> list[str]:
    """Short names of folders that tell them apart: as many of their last parts as that takes."""
    parts = [path.absolute().parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-count:]) for p in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names


def speeds(root: Path) -> list[tuple[str, dict[str, Any]]]:
    """Name and content of the files in results/speed, each of them one measurement."""
    return [(path.stem, _json(path)) for path in sorted((root / "results" / "speed").glob("*.json"))]


def memories(root: Path) -> list[tuple[str, float]]:
    """Task and peak in GB of the files in results/memory, in the order of the paper."""
    paths = sorted((root / "results" / "memory").glob("*.json"), key=collect.place)
    try:
        return [(path.stem, _json(path)["peak_memory"] / 1e9) for path in paths]
    except (KeyError, TypeError) as e:
        raise UserError(f"{root / 'results' / 'memory'}: a field is missing or of another kind ({e})") from e


def ablations(folder: Path) -> Table:
    """Rows of Table 6 after equally many updates, from results/table6_<preset>."""
    found = {path.stem: _json(path) for path in folder.glob("*.json")}
    rows = [
        Row(model, None, [found[name]["test"]["ppl"]])
        for model, _, _, name in collect.TABLES[6][1]
        if name in found
    ]  # fmt: skip
    steps = next(iter(found.values()))["steps"]
    preset = folder.name.removeprefix("table6_")
    return Table(folder.name, f"Rows of Table 6, preset {preset}, {steps:,} updates each", "test perplexity", rows)


def precisions(folder: Path) -> Table:
    """Test scores by precision, from results/precision."""
    found = [_json(path) for path in sorted(folder.glob("*.json"))]
    name, _ = collect.score_of(found[0]["test"])
    kinds = sorted({run["precision"] for run in found}, reverse=True)
    rows = [Row(kind, None, [run["test"][name] for run in found if run["precision"] == kind]) for kind in kinds]
    return Table("precision", f"{found[0]['task']}, preset {found[0]['preset']}", f"test {AXES[name]}", rows)


def equal_time(folder: Path) -> Table:
    """Test scores of different networks after the same time, from results/compare_<minutes>_minutes."""
    rows = [
        Row(model, None, [collect.score_of(_json(folder / name / "metrics.json")["test"])[1]])
        for name, model in collect.COMPARED.items()
        if (folder / name).is_dir()
    ]
    minutes = folder.name.split("_")[1]
    return Table(folder.name, f"Word-level PTB, about {minutes} minutes of training each", "test perplexity", rows)


def adaptations(path: Path) -> Table:
    """Test scores with a cache and dynamic evaluation, from a file in results/adapted."""
    metrics = _json(path)
    name, _ = collect.score_of(metrics["test_static"])
    ways = {label: metrics.get(f"test_{way}") for way, label in collect.ADAPTED.items()}
    rows = [Row(label, None, [found[name]]) for label, found in ways.items() if found]
    title = f"Cache and dynamic evaluation, {metrics['task']}, preset {metrics['preset']}"
    return Table(f"adapted_{path.stem}", title, f"test {AXES[name]}", rows)


def ours(folder: Path) -> list[float]:
    """Scores of the finished runs of a row."""
    return collect.finished_runs(folder)[1]


def trained_tables(root: Path) -> list[Table]:
    """The tables of the papers of which something has been trained, and the comparisons, from runs/tables."""
    tables, runs = [], root / "runs" / "tables"
    of_papers = {
        f"table{number}": (f"Table {number}. {title}", rows) for number, (title, rows) in collect.TABLES.items()
    }
    of_papers |= {script: (title, rows) for title, script, rows in collect.OTHER_TABLES.values()}
    for script, (title, entries) in of_papers.items():
        title, _, axis = title.partition("; ")[0].rpartition(", ")
        rows, recited = [], []  # these have another score
        for model, _, paper, name in entries:
            row = Row(model, paper, ours(runs / script / name) if name else [])
            (recited if name and name.startswith("recite") else rows).append(row)
        tables.append(Table(script, title or axis, axis, rows))
        tables.append(Table(f"{script}_recite", "Learning to recite", "training accuracy in percent", recited))
    for folder in sorted(runs.glob("compare-*-minutes")):
        rows = [Row(model, None, ours(folder / name)) for name, model in collect.COMPARED.items()]
        minutes = folder.name.split("-")[1]
        tables.append(
            Table(folder.name, f"Word-level PTB, {minutes} minutes of training each", "test perplexity", rows)
        )
    return [table for table in tables if any(row.ours for row in table.rows)]


def tables(root: Path) -> list[Table]:
    """All tables of scores that there are numbers for.

    Raises:
        UserError: a damaged file.
    """
    results = root / "results"
    readers: list[tuple[Path, Callable[[Path], Table]]] = [(p, ablations) for p in sorted(results.glob("table6_*"))]
    readers += [(p, precisions) for p in results.glob("precision")]
    readers = [(path, read) for path, read in readers if any(path.glob("*.json"))]
    readers += [(p, equal_time) for p in sorted(results.glob("compare_*_minutes"))]
    readers = [(path, read) for path, read in readers if not collect.is_result(path)]
    readers += [(p, adaptations) for p in sorted(results.glob("adapted/*.json"))]
    try:
        return [read(path) for path, read in readers] + trained_tables(root)
    except (KeyError, TypeError, StopIteration) as e:
        raise UserError(f"{results}: a field is missing or of another kind ({e})") from e
    except collect.BadResultError as e:
        raise UserError(str(e)) from e


def contexts(paths: Sequence[Path]) -> list[tuple[str, dict[str, Any]]]:
    """What scripts/context.py has written, and what to call it.

    Raises:
        UserError: another file, or losses of words beside losses of characters.
    """
    found = [_json(path) for path in paths]
    for path, content in zip(paths, found, strict=True):
        try:
            [content[key] for key in ("task", "name", "token", "receptive_field", "corpus", "split")]
            numbers = [float(r[key]) for r in content["records"] for key in ("context", "loss", "error")]
            if not numbers or not all(map(math.isfinite, [*numbers, content["targets"]])):
                raise ValueError("not a number")
        except (KeyError, TypeError, ValueError) as e:
            raise UserError(f"{path}: not what scripts/context.py writes, or damaged ({e})") from e
    if len({content["token"] for content in found}) > 1:
        raise UserError("losses of words and of characters do not belong on one axis; plot them one by one")
    names = [f"{content['task']} {content['name']}" for content in found]
    if len(set(names)) < len(names):
        names = labels(paths)
    return list(zip(names, found, strict=True))


def _json(path: Path) -> Any:
    try:
        return collect.parsed(path)
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: not JSON ({e})") from e


# --- the trellis, as text ---------------------------------------------------------------------------------------------

STEP, FLOOR, RADIUS = 46, 62, 8  # pixels between time steps and between layers, and of a unit
# Middle tones, which stand out from white and from black.
PAST, NOW, INPUT, TEXT = "#d9662b", "#3f86d6", "#2f9e6e", "#7b8794"
STYLE = f"""<style>
text {{ font: 14px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: {TEXT}; }}
.head {{ font-size: 15px; font-weight: 600; }}
.sub {{ font-size: 10px; }}
.past, .now, .input {{ stroke-width: 2; fill: none; }}
.past {{ stroke: {PAST}; }} .now {{ stroke: {NOW}; }} .input {{ stroke: {INPUT}; }}
.unit {{ fill: {NOW}; }} .x {{ fill: {INPUT}; }} .unseen {{ opacity: 0.22; }}
.brace {{ stroke: {TEXT}; stroke-width: 1.5; fill: none; }}
</style>"""


def _panel(
    title: str, left: int, top: int, steps: int, layers: int, kernel_size: int, dilation: list[int]
) -> list[str]:
    """One trellis; what the last output of the last layer depends on stands out from the rest."""
    seen = dict(enumerate(map(set, dependencies(steps, layers, dilation, kernel_size)), 1))
    reach = [dilation[(i - 1) % len(dilation)] for i in range(1, layers + 1)]
    taps = [(layer, t, j * reach[layer - 1]) for layer in seen for t in range(steps) for j in range(kernel_size)]
    taps = [(layer, t, back) for layer, t, back in taps if t >= back]
    seen[0] = {t - back for layer, t, back in taps if t in seen[layer]}  # every layer reads x

    def at(layer: int, t: int) -> tuple[int, int]:
        return left + t * STEP, top + (layers - layer) * FLOOR

    lines = [f'<text class="head" x="{left - RADIUS}" y="{top - 34}">{title}</text>']
    for layer, t, back in sorted(taps, key=lambda tap: tap[1] in seen[tap[0]]):  # what is seen lies on top
        (x1, y1), (x2, y2) = at(layer - 1, t - back), at(layer, t)
        length = math.hypot(x2 - x1, y2 - y1)
        dx, dy = (x2 - x1) / length * (RADIUS + 2), (y2 - y1) / length * (RADIUS + 2)
        kind = "input" if layer == 1 else "past" if back else "now"
        faint = "" if t in seen[layer] else " unseen"
        ends = (x1 + dx, y1 + dy, x2 - dx, y2 - dy)
        lines.append('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>'.format(kind + faint, *ends))
    for layer in range(layers + 1):
        for t in range(steps):
            x, y = at(layer, t)
            faint = "" if t in seen[layer] else " unseen"
            if layer > 1:  # x̃ comes in here too
                lines.append(f'<path class="input{faint}" d="M{x + 17},{y + 13} L{x + 7},{y + 6}"/>')
            if layer:
                lines.append(f'<circle class="unit{faint}" cx="{x}" cy="{y}" r="{RADIUS}"/>')
            else:
                corner = f'x="{x - RADIUS}" y="{y - RADIUS}" width="{2 * RADIUS}" height="{2 * RADIUS}" rx="2"'
                lines.append(f'<rect class="x{faint}" {corner}/>')
    x, y = at(layers, steps - 1)
    lines.append(f'<text x="{x}" y="{y - 15}" text-anchor="middle">y<tspan class="sub" dy="4">t</tspan></text>')
    for layer in range(1, layers + 1):
        lines.append(f'<text x="{left - 28}" y="{at(layer, 0)[1] + 5}" text-anchor="end">layer {layer}</text>')
    x, y = at(0, 0)
    lines.append(f'<text x="{x - 28}" y="{y + 5}" text-anchor="end">input x</text>')
    for t in range(steps):
        x, _ = at(0, t)
        when = f"t−{steps - 1 - t}" if t < steps - 1 else "t"
        lines.append(f'<text x="{x}" y="{y + 27}" text-anchor="middle" class="sub">{when}</text>')
    first, last = min(seen[0]), max(seen[0])
    (x1, _), (x2, _) = at(0, first), at(0, last)
    lines.append(f'<path class="brace" d="M{x1 - 9},{y + 36} v7 H{x2 + 9} v-7"/>')
    told = f"y sees {last - first + 1} inputs: 1 + {kernel_size - 1} · ({' + '.join(map(str, reach))})"
    lines.append(f'<text x="{(x1 + x2) / 2:g}" y="{y + 62}" text-anchor="middle">{told}</text>')
    return lines


def trellis(
    layers: int = 4, kernel_size: int = 2, dilations: Sequence[list[int]] = ([1], [1, 2]), steps: int = 8
) -> str:
    """Trellises side by side, as the text of an SVG file; the same text on every machine."""
    top, left, lines = 62, 84, []
    for dilation in dilations:
        shown = (
            f"dilation {dilation[0]}" if len(dilation) == 1 else f"dilations {', '.join(map(str, dilation))} in turn"
        )
        lines += _panel(shown, left, top, steps, layers, kernel_size, dilation)
        left += steps * STEP + 94
    width, bottom = left - 94, top + layers * FLOOR + 100
    legend = [("now", "Wʰ, newest tap"), ("past", "Wʰ, older tap (both the same in every layer)")]
    legend += [("input", "x̃ = Wˣ ∗ x + b, into every layer")]
    x = 84 - RADIUS
    for kind, text in legend:
        lines.append(f'<line class="{kind}" x1="{x}" y1="{bottom - 5}" x2="{x + 24}" y2="{bottom - 5}"/>')
        lines.append(f'<text x="{x + 32}" y="{bottom}">{text}</text>')
        x += 60 + round(7.2 * len(text))
    size = f'width="{width}" height="{bottom + 18}" viewBox="0 0 {width} {bottom + 18}"'
    told = "A trellis network: units by layer and time step, and the inputs that one output sees."
    head = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">', f"<title>{told}</title>", STYLE]
    return "\n".join([*head, *lines, "</svg>"]) + "\n"


# --- pictures ---------------------------------------------------------------------------------------------------------


def pyplot() -> Any:
    """matplotlib.pyplot, set up so that the same numbers give the same file.

    Raises:
        UserError: it is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("agg")
        import matplotlib.pyplot as plt
    except ImportError as e:
        raise UserError(f"plots need matplotlib: {pip_install('matplotlib')}") from e
    plt.rcParams.update(
        {
            "svg.hashsalt": "trellisnet", "svg.fonttype": "none", "font.size": 10, "figure.dpi": 150,
            "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
            "axes.axisbelow": True, "legend.frameon": False, "figure.constrained_layout.use": True,
            "axes.prop_cycle": matplotlib.cycler(color=COLOURS),
        }
    )  # fmt: skip
    return plt


def check_picture(path: Path, formats: Sequence[str] = FORMATS) -> None:
    """Check before the work that a picture can be written, and replaces nothing but a picture of its format.

    Raises:
        UserError: it cannot, or its ending is of no format.
    """
    kind = path.suffix[1:].lower()
    if kind not in formats:
        *others, last = [f".{name}" for name in formats]
        raise UserError(f"--out {path}: end the name in {' or '.join([', '.join(others)] * bool(others) + [last])}")

    def is_picture(real: str) -> bool:
        with open(real, "rb") as file:
            return file.read(8).startswith(BEGINNINGS[kind])

    check_output(path, "--out", is_picture, later=not path.parent.exists())


@contextlib.contextmanager
def written(path: Path) -> Iterator[BinaryIO]:
    """Write a picture's file, its folder included, and name it when it is done.

    Raises:
        UserError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            yield file
    except OSError as e:
        raise UserError(f"--out {path}: cannot be written ({e.strerror})") from e
    print(path)


def save(figure: Any, path: Path) -> None:
    """Write a figure, on white, without a date.

    Raises:
        UserError: the file cannot be written.
    """
    kind = path.suffix[1:].lower()
    dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    try:
        with written(path) as file:
            figure.savefig(file, format=kind, facecolor="white", metadata=dates.get(kind))
    finally:
        pyplot().close(figure)


def _numbers(axis: Any, wide: bool) -> None:
    """Plain numbers at the ticks; of a logarithmic axis the more in a decade the fewer decades it has."""
    from matplotlib import ticker

    plain = ticker.FuncFormatter(lambda value, _: f"{value:,.10g}")
    if wide:
        low, high = axis.get_view_interval()
        subs = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8) if high < 6 * low else (1, 2, 5) if high < 200 * low else (1,)
        axis.set_major_locator(ticker.LogLocator(subs=subs, numticks=20))
        axis.set_minor_locator(ticker.NullLocator())
    axis.set_major_formatter(plain)


def draw_curves(curves: Sequence[Curve], by: str) -> Any:
    """A panel for every kind of score: validation solid, training dashed."""
    plt = pyplot()
    kinds = list(dict.fromkeys(c.score for c in curves))
    figure, panels = plt.subplots(1, len(kinds), figsize=(0.8 + 5.4 * len(kinds), 4.2), squeeze=False)
    for score, axes in zip(kinds, panels[0], strict=True):
        own = [c for c in curves if c.score == score]
        for i, c in enumerate(own):
            x, colour = (c.epochs if by == "epoch" else c.minutes), COLOURS[i % len(COLOURS)]
            style = {"color": colour, "marker": "o", "markersize": 3.5}
            if c.valid:
                axes.plot(x, c.valid, label=c.label, **style)
            axes.plot(x, c.train, "--", alpha=0.6, label=None if c.valid else c.label, **style)
        values = [v for c in own for v in (*c.train, *c.valid)]
        wide = score == "ppl" and max(values) > WIDE * min(values)
        if wide:
            axes.set_yscale("log")
        _numbers(axes.yaxis, wide)
        if by == "epoch":
            axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("epoch" if by == "epoch" else "minutes")
        axes.set_ylabel(AXES[score])
        handles, names = axes.get_legend_handles_labels()
        grey = [plt.Line2D([], [], color="grey", linestyle=line) for line in ("-", "--")]
        axes.legend([*handles, *grey], [*names, "validation", "training, with dropout"], fontsize=9)
    return figure


def draw_table(table: Table) -> Any:
    """A line for every row: a dot for each of our runs, a ring for the paper."""
    plt = pyplot()
    rows = [row for row in table.rows if row.ours or row.paper is not None]
    values = [v for row in rows for v in (*row.ours, *([] if row.paper is None else [row.paper]))]
    limit = FAR * statistics.median(values)
    shown = [v for v in values if v <= limit]  # what has diverged would press all others into one place
    figure, axes = plt.subplots(figsize=(8.5, 1.3 + 0.34 * len(rows)))
    for i, row in enumerate(rows):
        label = "ours" if i == next(k for k, r in enumerate(rows) if r.ours) else None
        if near := [v for v in row.ours if v <= limit]:
            axes.plot(near, [i] * len(near), "o", color=COLOURS[0], label=label)
        if len(near) < len(row.ours):
            axes.plot([1], [i], ">", color=COLOURS[0], transform=axes.get_yaxis_transform(), clip_on=False)
        if row.paper is not None:
            paper = "paper" if i == next(k for k, r in enumerate(rows) if r.paper is not None) else None
            axes.plot([row.paper], [i], "o", mfc="none", mec=COLOURS[1], ms=8, mew=1.5, label=paper)
        if row.ours:
            mean = statistics.mean(row.ours)
            spread = f" ± {statistics.stdev(row.ours):.2f}" if len(row.ours) > 1 else ""
            told = f"{mean:,.{4 if mean < 10 else 2}f}{spread}"
            axes.annotate(told, (1.02, i), xycoords=("axes fraction", "data"), va="center", fontsize=9)
    wide = max(shown) > WIDE * min(shown)
    if wide:
        axes.set_xscale("log")
    axes.margins(x=0.06)
    _numbers(axes.xaxis, wide)
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel(table.axis)
    axes.set_title(table.title, fontsize=11, loc="left")
    if any(row.paper is not None for row in rows):
        figure.legend(loc="outside lower right", ncols=2)
    return figure


def draw_speeds(content: dict[str, Any]) -> Any:
    """How many times as fast as the reference, and memory, in bars: what `scripts/bench.py` has written."""
    plt = pyplot()
    records = content["records"]
    timed = [r for r in records if r["part"] != "memory"]
    weighed = [r for r in records if r["part"] == "memory"]
    panels = [
        ("times as fast as the reference", timed, lambda r: r["ratio"], _rate),
        ("peak memory, GB", weighed, lambda r: r["bytes"] / 1e9, lambda r: f"{r['bytes'] / 1e9:.2f} GB"),
    ]
    panels = [panel for panel in panels if panel[1]]
    variants = list(dict.fromkeys(r["variant"] for r in records))
    heights = [len({(r["task"], r["part"]) for r in shown}) for _, shown, _, _ in panels]
    figure, all_axes = plt.subplots(
        len(panels), 1, figsize=(8.5, 1.5 + 0.3 * len(variants) * sum(heights)), squeeze=False,
        gridspec_kw={"height_ratios": heights},
    )  # fmt: skip
    for axes, (title, shown, value, told) in zip(all_axes[:, 0], panels, strict=True):
        groups = list(dict.fromkeys((r["task"], r["part"]) for r in shown))
        bar = 0.8 / len(variants)
        for i, variant in enumerate(variants):
            own = [r for r in shown if r["variant"] == variant]
            at = [groups.index((r["task"], r["part"])) + (i - (len(variants) - 1) / 2) * bar for r in own]
            bars = axes.barh(at, [value(r) for r in own], 0.9 * bar, color=COLOURS[i % len(COLOURS)], label=variant)
            axes.bar_label(bars, [told(r) for r in own], padding=3, fontsize=9)
        wide = shown is timed
        if wide:
            axes.set_xscale("log")
            axes.set_xlim(0.8, 2 * max(map(value, shown)))
        else:
            axes.set_xlim(0, 1.2 * max(map(value, shown)))
        _numbers(axes.xaxis, wide)
        axes.set_yticks(range(len(groups)), [f"{task}\n{part}" for task, part in groups])
        axes.set_ylim(len(groups) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(title)
    handles, names = all_axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=min(4, len(names)))
    told = f"{re.sub(r' --json .+', '', content['command'])}\n{content['machine']}"
    all_axes[0, 0].set_title(told, fontsize=7, loc="left", color="grey", wrap=True)
    return figure


def _rate(record: dict[str, Any]) -> str:
    if record["part"] in ("evaluation", "generation"):
        return f"{record['per_second']:.3g} tokens/s"
    return f"{record['seconds']:.3g} s"


def draw_memories(found: Sequence[tuple[str, float]]) -> Any:
    """Peak memory of training the released settings in bars, below the line that they are to stay under."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7, 1.3 + 0.4 * len(found)))
    bars = axes.barh(range(len(found)), [gb for _, gb in found], 0.6, color=COLOURS[0])
    axes.bar_label(bars, [f"{gb:.1f} GB" for _, gb in found], padding=3)
    axes.axvline(8, color=COLOURS[1], linestyle="--", linewidth=1)
    axes.annotate("8 GB", (8, -0.5), xytext=(3, 0), textcoords="offset points", color=COLOURS[1], va="top")
    axes.set_yticks(range(len(found)), [task for task, _ in found])
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_xlim(0, max(9, 1.15 * max(gb for _, gb in found)))
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("peak memory of training, GB")
    return figure


def draw_contexts(found: Sequence[tuple[str, dict[str, Any]]]) -> Any:
    """Loss against visible tokens; twice the standard error of the difference from the longest context as a band."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(6.4, 4.2))
    for i, (label, content) in enumerate(found):
        colour, records = COLOURS[i % len(COLOURS)], content["records"]
        x, loss = [r["context"] for r in records], [r["loss"] for r in records]
        low, high = ([r["loss"] + sign * 2 * r["error"] for r in records] for sign in (-1, 1))
        axes.plot(x, loss, "o-", color=colour, markersize=4, label=label)
        axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        if (field := content["receptive_field"]) and field <= x[-1]:
            axes.axvline(field, color=colour, linestyle=":", linewidth=1.2, label=f"sees {field} {content['token']}")
    from matplotlib import ticker

    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    _numbers(axes.yaxis, False)
    first = found[0][1]
    unit = first["token"].removesuffix("s")
    axes.set_xlabel(f"{first['token']} visible before the target")
    axes.set_ylabel(f"loss, nats per {unit}")
    what = f"{first['corpus']}, {first['split']}, {first['targets']:,} targets"
    axes.set_title(f"{what}; bands: ± 2 s.e. of the difference from the longest", fontsize=9, loc="left")
    axes.legend(fontsize=9)
    return figure


# --- the program ------------------------------------------------------------------------------------------------------


def pictures(root: Path) -> Iterable[tuple[str, Callable[[], Any]]]:
    """Name, and what draws it, of everything in results/ and runs/tables/ that there are numbers for."""
    for name, content in speeds(root):
        yield f"speed_{name}", functools.partial(_speeds, name, content)
    if found := memories(root):
        yield "memory", functools.partial(draw_memories, found)
    for table in tables(root):
        yield table.name, functools.partial(draw_table, table)


def _speeds(name: str, content: dict[str, Any]) -> Any:
    try:
        return draw_speeds(content)
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(f"results/speed/{name}.json: not what scripts/bench.py writes ({e})") from e


def run(argv: Sequence[str]) -> None:
    """Parse, read, draw, write."""
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="what", required=True, parser_class=Parser)
    command = commands.add_parser("curves", help="learning curves of runs")
    command.add_argument("runs", nargs="+", type=Path, help="folders with a metrics.jsonl")
    command.add_argument("--by", choices=("epoch", "minutes"), default="epoch", help="(default: epoch)")
    command.add_argument("--out", type=Path, default=Path("curves.svg"))
    command = commands.add_parser("tables", help="speed, memory and tables of scores, a picture each")
    command.add_argument("--format", choices=FORMATS, default="svg")
    command.add_argument("--out", type=Path, default=Path("pictures"), help="folder (default: pictures)")
    command.add_argument("--root", type=Path, default=PROJECT, help="folder with results/ and runs/tables/")
    command = commands.add_parser("context", help="loss against context length")
    command.add_argument("files", nargs="+", type=Path, help="what scripts/context.py --json has written")
    command.add_argument("--out", type=Path, default=Path("context.svg"))
    command = commands.add_parser("trellis", help="the trellis and what an output of it sees (svg)")
    command.add_argument("--out", type=Path, default=PROJECT / "results" / "figures" / "trellis.svg")
    args = parser.parse_args(argv)
    if args.what == "tables":
        drawn = {args.out / f"{name}.{args.format}": draw for name, draw in pictures(args.root)}
        if not drawn:
            raise UserError(f"{args.root}: has nothing in results/ or runs/tables/ to draw")
        for path in drawn:
            check_picture(path)
        for path, draw in drawn.items():
            save(draw(), path)
        return
    check_picture(args.out, ["svg"] if args.what == "trellis" else FORMATS)
    if args.what == "curves":
        save(draw_curves(list(map(curve, args.runs, labels(args.runs))), args.by), args.out)
    elif args.what == "context":
        save(draw_contexts(contexts(args.files)), args.out)
    else:
        with written(args.out) as file:
            file.write(trellis().encode())


main = functools.partial(guarded, run)

if __name__ == "__main__":
    sys.exit(main())
