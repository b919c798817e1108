"""The README pages: which there are, and their blocks that come from records and settings."""

import re
from pathlib import Path
from typing import Any

from scripts.reports import records
from scripts.reports.flags import flags
from scripts.reports.markdown import HERE_ONLY, table, threads
from scripts.reports.records import refusing, score_of, without
from scripts.reports.tables import PUBLISHED
from trellisnet.training.reporting import epoch_line, score_line

# The front page, and one for each folder that has something to say.
PAGES = ("README.md", "[!.]*/README.md", "trellisnet/*/README.md", "results/*/README.md")


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


def shipped(root: Path) -> list[str]:
    """Models whose weights lie in results/, a row for each."""
    rows = []
    for name, (weights, metrics) in records.read_shipped(root).items():
        with refusing(root / "results" / name):
            score, published = score_of(weights["test"]), PUBLISHED[weights["task"]]
            paper, order = published.score, ""
            if "permute" in metrics and published.not_permuted:
                order = ", permuted" if metrics["permute"] else ", sequential"
                paper = published.score if metrics["permute"] else published.not_permuted
            ours = f"{100 * score.value:.2f} %" if score.score_name == "accuracy" else f"{score} {score.score_name}"
            start = Path(metrics["load_weight"]).parent.name
            minutes = f"{metrics['seconds'] / 60:.0f}" + (f" after `{start}`" if start else "")
            rows.append(
                (
                    f"`{name}`", weights["task"] + order, f"{weights['params']:,}", ours, paper,
                    metrics["machine"], minutes, f"{weights['bytes'] / 1e6:.1f} MB",
                )
            )  # fmt: skip
    return table("name in `results/`|task|parameters:|test:|paper:|trained on|minutes:|file:".split("|"), rows)


def blocks(text: str, root: Path) -> str:
    """A page with its blocks `<!-- NAME: begin -->` … `<!-- NAME: end -->` of records written anew."""

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


BLOCKS = {"speed": speed, "memory": memory, "shipped": shipped, "flags": lambda root: flags()}
