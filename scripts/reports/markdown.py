"""Tables in Markdown, and those of the papers."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.reports.records import Finished, read_row
from scripts.reports.tables import COMPARED, TABLES

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


# -- the papers' tables ------------------------------------------------------------------------------------------------


def ours(found: Finished | None) -> tuple[str, str]:
    """Score, mean ± spread (number of runs), and parameters of the finished runs of a row."""
    if found is None:
        return "not run", ""
    digits, values = 4 if found.score_name == "bpc" else 2, found.values
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    epochs = " to ".join(map(str, sorted({min(found.epochs), max(found.epochs)})))
    kind = f"n = {len(values)}, {epochs} epochs" + (", augmented" if found.augmented else "")
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
