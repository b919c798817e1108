"""Markdown: tables, and the blocks of README.md that come from records."""

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.reports import records
from scripts.reports.records import Finished, read_row, refusing, score_of, without
from scripts.reports.tables import COMPARED, TABLES
from trellisnet.training.reporting import epoch_line, score_line

# Flags of a measurement that do not change how much memory it takes, or that only keep it short.
HERE_ONLY = """max_steps max_eval_tokens metrics out epochs data checkpoint_steps log-interval overwrite
no-download""".split()


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of a table; the columns whose name ends with a colon are aligned to the right."""
    names = [column.removesuffix(":") for column in columns]
    lines = ["|" + "".join(f" {name} |" if name else " |" for name in names)]
    lines.append("|" + "".join("--:|" if column.endswith(":") else "---|" for column in columns))
    return [*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)]


def threads(record: Mapping[str, Any]) -> str:
    """Number of threads of a record."""
    return f"{record['threads']} thread{'s' * (record['threads'] != 1)}"


# -- README.md ---------------------------------------------------------------------------------------------------------


def output(folder: Path) -> list[str]:
    """The last lines that a run printed: its epochs and final scores."""
    run = records.read_run(folder)
    with refusing(folder):
        score = score_of(run.metrics["test"])
        lines = [epoch_line(score, epoch) for epoch in run.epochs]
        lines += [score_line(score, name, result) for name, result in run.evaluations.items()]
    return ["```", *lines, "```"]


def speed(root: Path) -> list[str]:
    """Speed and memory of the backends, a table for each file in results/speed."""
    lines = []
    for name, content in records.read_speeds(root).items():
        with refusing(root / "results" / "speed" / f"{name}.json"):
            variants = list(dict.fromkeys(r["variant"] for r in content["records"]))
            rows: dict[tuple[str, str], dict[str, str]] = {}
            first: dict[tuple[str, str], dict[str, Any]] = {}
            for r in content["records"]:
                key = r["task"], r["part"]
                cells, base = rows.setdefault(key, {}), first.setdefault(key, r)
                if "bytes" in r:
                    cell = f"{r['bytes'] / 1e9:.2f} GB" + (f", 1/{base['bytes'] / r['bytes']:.1f}" if cells else "")
                else:
                    cell = records.speed_text(r) + (f", **{r['ratio']:.2f}x**" if cells else "")
                    cell += f" ({r['share_of_peak']:.0%})" if "gflops" in r else ""
                cells[r["variant"]] = cell
            lines += [
                f"`{content['command']}` on {content['machine']}, {threads(content)}, torch {content['torch']}, "
                f"commit `{content['commit']}`; medians, in brackets the share of one large product's rate:",
                "",
                *table(
                    ["task", "", *(f"{variant}:" for variant in variants)],
                    ([*key, *(cells.get(variant, "") for variant in variants)] for key, cells in rows.items()),
                ),
                "",
            ]
    return lines[:-1]


def memory(root: Path) -> list[str]:
    """Memory of training, a row for each file in results/memory."""
    return table(
        ["command", "parameters:", "peak:"],
        (
            (f"`{without(m['command'], *HERE_ONLY)}`", f"{m['params']:,}", f"{m['peak_memory'] / 1e9:.1f} GB")
            for m in records.read_memories(root).values()
        ),
    )


def readme(text: str, root: Path) -> str:
    """README.md with its blocks `<!-- NAME: begin -->` … `<!-- NAME: end -->` of records written anew."""

    def block(found: re.Match) -> str:
        name = found[1]
        if name.startswith("output of "):
            lines = output(root / "results" / name.removeprefix("output of "))
        elif name in BLOCKS:
            lines = BLOCKS[name](root)
        else:
            return found[0]
        return "\n".join([f"<!-- {name}: begin -->", *lines, f"<!-- {name}: end -->"])

    return re.sub(r"<!-- ([\w ]+): begin -->\n.*?<!-- \1: end -->", block, text, flags=re.DOTALL)


BLOCKS = {"speed": speed, "memory": memory}


# -- the papers' tables ------------------------------------------------------------------------------------------------


def ours(found: Finished | None) -> tuple[str, str]:
    """Score, mean ± spread (number of runs), and parameters of the finished runs of a row."""
    if found is None:
        return "not run", ""
    digits, values = 4 if found.score_name == "bpc" else 2, found.values
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    kind = f"n = {len(values)}, {found.epochs} epochs" + (", augmented" if found.augmented else "")
    return f"{statistics.mean(values):.{digits}f}{spread} ({kind})", f"{found.params:,}"


def paper_table(name: str, root: Path) -> str:
    """A table of a paper beside our runs."""
    title, score, script, rows = TABLES[name]
    recited = "; reciting, training accuracy in percent" if any(row.recited for row in rows) else ""
    folder = root / "runs" / "tables" / script
    cells = (
        (row.label, row.size, "" if row.paper is None else row.paper, *ours(read_row(folder / row.name, row.recited)))
        for row in rows
    )
    lines = table(["model", "size:", "paper:", "ours:", "parameters:"], cells)
    return "\n".join([f"{title}, {score}{recited}", "", *lines])


def comparisons(root: Path) -> str:
    """Networks of one size after about the same time: what scripts/compare.sh has finished."""
    lines = []
    for folder in sorted((root / "runs" / "tables").glob("compare-*-minutes")):
        rows = []
        for name, label in COMPARED.items():
            found = read_row(folder / name)
            minutes = ", ".join(f"{value:.0f}" for value in found.minutes) if found else ""
            rows.append((label, *ours(found), minutes))
        lines += [f"Word-level Penn Treebank, {folder.name.split('-')[1]} minutes of training each", ""]
        lines += [*table(["model", "test perplexity:", "parameters:", "minutes:"], rows), ""]
    return "\n".join(lines) or "nothing has been compared yet: bash scripts/compare.sh"
