"""Charts drawn with matplotlib; the numbers come from charts.py and records.py."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from scripts.reports.charts import Chart, Curve
from scripts.reports.records import SCORES, Record, Run, score_of, speed_text
from trellisnet.errors import UserError
from trellisnet.training.runlog import pip_install

# Colours that colour-blind readers can tell apart (Okabe & Ito, 2008), and two more.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999", "#882255"]
FAR = 20  # times the median: a score beyond it is off the axis
WIDE = 2.5  # least ratio of the largest to the smallest score for a logarithmic axis


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


def _numbers(axis: Any, wide: bool) -> None:
    """Label an axis with plain numbers; a logarithmic axis gets more ticks per decade the fewer decades it spans."""
    from matplotlib import ticker

    plain = ticker.FuncFormatter(lambda value, _: f"{value:,.10g}")
    if wide:
        low, high = axis.get_view_interval()
        subs = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8) if high < 6 * low else (1, 2, 5) if high < 200 * low else (1,)
        axis.set_major_locator(ticker.LogLocator(subs=subs, numticks=20))
        axis.set_minor_locator(ticker.NullLocator())
    axis.set_major_formatter(plain)


def draw_curves(curves: Sequence[Curve], by: str) -> Any:
    """Draw learning curves, a panel for each kind of score: validation solid, training dashed."""
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
        values = [v for c in own for v in (*c.train, *c.valid) if math.isfinite(v)]
        wide = score == "ppl" and max(values) > WIDE * min(values)
        if wide:
            axes.set_yscale("log")
        _numbers(axes.yaxis, wide)
        if by == "epoch":
            axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("epoch" if by == "epoch" else "minutes")
        axes.set_ylabel(SCORES[score][0])
        handles, names = axes.get_legend_handles_labels()
        grey = [plt.Line2D([], [], color="grey", linestyle=line) for line in ("-", "--")]
        axes.legend([*handles, *grey], [*names, "validation", "training, with dropout"], fontsize=9)
    return figure


def mean_text(values: Sequence[float]) -> str:
    """Mean of the runs of a row, with their standard deviation in as many digits."""
    mean = statistics.mean(values)
    digits = 4 if mean < 10 else 2
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean:,.{digits}f}{spread}"


def draw_chart(chart: Chart) -> Any:
    """Draw scores, a line for each row: a dot for each of our runs, a ring for the paper."""
    plt = pyplot()
    rows = [row for row in chart.rows if row.ours or row.paper is not None]
    values = [v for row in rows for v in (*row.ours, *([] if row.paper is None else [row.paper]))]
    limit = FAR * statistics.median(values)
    shown = [v for v in values if v <= limit]  # a diverged run would squeeze all others together
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
            axes.annotate(mean_text(row.ours), (1.02, i), xycoords=("axes fraction", "data"), va="center", fontsize=9)
    wide = max(shown) > WIDE * min(shown)
    if wide:
        axes.set_xscale("log")
    axes.margins(x=0.06)
    _numbers(axes.xaxis, wide)
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel(chart.axis)
    axes.set_title(chart.title, fontsize=11, loc="left")
    if any(row.paper is not None for row in rows):
        figure.legend(loc="outside lower right", ncols=2)
    return figure


def draw_speeds(content: dict[str, Any]) -> Any:
    """Draw the speed of each variant relative to the reference, and its memory, as bars."""
    plt = pyplot()
    records = content["records"]
    timed = [r for r in records if "bytes" not in r]
    weighed = [r for r in records if "bytes" in r]
    panels = [
        ("times as fast as the reference", timed, lambda r: r["ratio"], speed_text),
        ("peak memory, GB", weighed, lambda r: r["bytes"] / 1e9, lambda r: f"{r['bytes'] / 1e9:.2f} GB"),
    ]
    panels = [panel for panel in panels if panel[1]]
    variants = list(dict.fromkeys(r["variant"] for r in records))
    heights = [len({(r["task"], r["part"]) for r in shown}) for _, shown, _, _ in panels]
    figure, all_axes = plt.subplots(
        len(panels), 1, figsize=(8.5, 1.5 + 0.3 * len(variants) * sum(heights)), squeeze=False,
        gridspec_kw={"height_ratios": heights},
    )  # fmt: skip
    for axes, (title, shown, value, text) in zip(all_axes[:, 0], panels, strict=True):
        groups = list(dict.fromkeys((r["task"], r["part"]) for r in shown))
        bar = 0.8 / len(variants)
        for i, variant in enumerate(variants):
            own = [r for r in shown if r["variant"] == variant]
            at = [groups.index((r["task"], r["part"])) + (i - (len(variants) - 1) / 2) * bar for r in own]
            bars = axes.barh(at, [value(r) for r in own], 0.9 * bar, color=COLOURS[i % len(COLOURS)], label=variant)
            axes.bar_label(bars, [text(r) for r in own], padding=3, fontsize=9)
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
    title = f"{content['command']}\n{content['machine']}"
    all_axes[0, 0].set_title(title, fontsize=7, loc="left", color="grey", wrap=True)
    return figure


def draw_memories(peaks: Mapping[str, float]) -> Any:
    """Draw the peak memory of training by task, in GB, as bars beside the limit of 8 GB."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7, 1.3 + 0.4 * len(peaks)))
    bars = axes.barh(range(len(peaks)), list(peaks.values()), 0.6, color=COLOURS[0])
    axes.bar_label(bars, [f"{gb:.1f} GB" for gb in peaks.values()], padding=3)
    axes.axvline(8, color=COLOURS[1], linestyle="--", linewidth=1)
    axes.annotate("8 GB", (8, -0.5), xytext=(3, 0), textcoords="offset points", color=COLOURS[1], va="top")
    axes.set_yticks(range(len(peaks)), list(peaks))
    axes.set_ylim(len(peaks) - 0.5, -0.5)
    axes.set_xlim(0, max(9, 1.15 * max(peaks.values())))
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("peak memory of training, GB")
    return figure


def draw_long_memory(problems: Mapping[str, Sequence[tuple[str, Run]]]) -> Any:
    """Draw validation loss by epoch, a panel for each problem, with the loss of a network that has forgotten."""
    plt = pyplot()
    figure, panels = plt.subplots(1, len(problems), figsize=(0.8 + 5.4 * len(problems), 4.2), squeeze=False)
    for (problem, runs), axes in zip(problems.items(), panels[0], strict=True):
        for i, (network, run) in enumerate(runs):
            m, colour = run.metrics, COLOURS[i % len(COLOURS)]
            label = f"{network}, T = {m['length']}"
            label += f", sees {m['receptive_field']:,}" if m["receptive_field"] else ""
            epochs, losses = zip(*((e["epoch"], e["valid_loss"]) for e in run.epochs), strict=True)
            axes.plot(epochs, losses, "o-", color=colour, markersize=3.5, label=label)
            axes.axhline(m["chance"], color=colour, linestyle=":", linewidth=1)
        axes.set_yscale("log")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("epoch")
        axes.set_ylabel("validation loss (dotted: by chance)")
        axes.set_title(problem, fontsize=11, loc="left")
        axes.legend(fontsize=8)
    return figure


def draw_depths(found: Sequence[tuple[str, Sequence[tuple[Record, Record]]]]) -> Any:
    """Draw scores against layers, a panel for each kind: validation solid, test dashed, with the receptive fields."""
    plt = pyplot()
    kinds = list(dict.fromkeys(score_of(pairs[0][1]).score_name for _, pairs in found))
    figure, panels = plt.subplots(1, len(kinds), figsize=(0.8 + 4.6 * len(kinds), 4.2), squeeze=False)
    for kind, axes in zip(kinds, panels[0], strict=True):
        own = [(name, pairs) for name, pairs in found if score_of(pairs[0][1]).score_name == kind]
        for i, (name, pairs) in enumerate(own):
            style = {"color": COLOURS[i % len(COLOURS)], "marker": "o", "markersize": 3.5}
            layers = [test["nlevels"] for _, test in pairs]
            valid, test = ([score_of(result).value for result in split] for split in zip(*pairs, strict=True))
            axes.plot(layers, valid, label=name, **style)
            axes.plot(layers, test, "--", alpha=0.6, **style)
            for x, y, (result, _) in zip(layers, valid, pairs, strict=True):
                sees = f"{result['receptive_field']:,}"
                axes.annotate(sees, (x, y), xytext=(0, 4), textcoords="offset points", fontsize=7, color=style["color"])
        axes.set_xlabel("layers (numbers: inputs that an output sees)")
        axes.set_ylabel(SCORES[kind][0])
        axes.xaxis.get_major_locator().set_params(integer=True)
        _numbers(axes.yaxis, False)
        handles, names = axes.get_legend_handles_labels()
        grey = [plt.Line2D([], [], color="grey", linestyle=line) for line in ("-", "--")]
        axes.legend([*handles, *grey], [*names, "validation", "test"], fontsize=8)
    return figure


def draw_contexts(found: Sequence[tuple[str, dict[str, Any]]]) -> Any:
    """Draw loss against visible tokens, with twice the standard error of the difference from the longest context."""
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
    texts = dict.fromkeys(f"{c['corpus']}, {c['split']}, {c['targets']:,} targets" for _, c in found)
    axes.set_title(f"{'; '.join(texts)}; bands: ± 2 s.e. of the difference from the longest", fontsize=9, loc="left")
    axes.legend(fontsize=9)
    return figure
