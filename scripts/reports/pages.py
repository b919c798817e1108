"""The README pages, and their blocks that are generated from records and settings."""

import re
import statistics
from pathlib import Path
from typing import Any

from scripts.reports import records
from scripts.reports.flags import flags
from scripts.reports.markdown import HERE_ONLY, table, threads
from scripts.reports.records import comparable, refusing, score_of, started_from, without
from scripts.reports.tables import LICENCES, PUBLISHED
from trellisnet.training import programs
from trellisnet.training.language_model import LanguageModelConfig
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
                f"commit `{content['commit']}`; medians, with the share of a large matrix product's speed in brackets:",
                "",
                *table(
                    ["task", "", *(f"{variant}:" for variant in variants)],
                    ([*key, *(cells.get(variant, "") for variant in variants)] for key, cells in rows.items()),
                ),
                "",
            ]
    return lines[:-1]


def compatibility(root: Path) -> list[str]:
    """Ways of running a network that work with each backend, a table for each file in results/compatibility."""
    lines = []
    for name, content in records.read_compatibility(root).items():
        with refusing(root / "results" / "compatibility" / f"{name}.json"):
            cells = content["cells"]
            lines += [
                *table(["", *next(iter(cells.values()))], ([row, *entries.values()] for row, entries in cells.items())),
                "",
                f"Tried by `{content['command']}` on {content['machine']}, torch {content['torch']}, commit "
                f"`{content['commit']}`.",
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


def equilibrium(root: Path) -> list[str]:
    """Cost and gain of an equilibrium, from the records of scripts/equilibrium.sh."""
    found = records.read_equilibrium(root)
    with refusing(root / "results" / "equilibrium"):
        ways, score = ("unrolled", "equilibrium"), score_of(found.scores["equilibrium"]["test"])
        small, large = (m["params"] / 1e6 for m in (found.scores["equilibrium"], found.memories["equilibrium"]))
        quantities = {
            f"test {score.title}, {small:.1f}M parameters, 16 layers": (
                [score_of(found.scores[way]["test"]).value for way in ways], "{:.2f}"
            ),
            "seconds per update of this model": ([statistics.median(found.seconds[way]) for way in ways], "{:.2f}"),
            f"training memory, {large:.0f}M parameters, 55 layers": (
                [found.memories[way]["peak_memory"] / 1e9 for way in ways], "{:.2f} GB"
            ),
        }  # fmt: skip
        rows = (
            (name, *(form.format(value) for value in values), f"{100 * (values[1] / values[0] - 1):+.1f} %")
            for name, (values, form) in quantities.items()
        )
        return table(["", "unrolled:", "equilibrium:", "difference:"], rows)


def shipped(root: Path) -> list[str]:
    """Models whose weights lie in results/, a row for each."""
    rows = []
    for name, (weights, metrics) in records.read_shipped(root).items():
        with refusing(root / "results" / name):
            paper, order = _published(metrics)
            start = _continued(metrics)
            minutes = f"{metrics['seconds'] / 60:.0f}" + (f" after `{start}`" if start else "")
            score, text = comparable(weights["test"]), _score_text(weights["test"])
            rows.append(
                (
                    f"[`{name}`](results/{name})", weights["task"] + (f", {order}" if order else ""),
                    f"{weights['params']:,}",
                    text if text.endswith("%") else f"{text} {score.score_name}", paper,
                    metrics["machine"], minutes, f"{weights['bytes'] / 1e6:.1f} MB",
                )
            )  # fmt: skip
    return table("name in `results/`|task|parameters:|test:|paper:|trained on|minutes:|file:".split("|"), rows)


def _continued(metrics: records.Record) -> str:
    """Name in results/ of the model that a run continues, or nothing; runs/TASK/NAME is shipped as TASK_NAME."""
    start = Path(started_from(metrics))
    return "_".join(start.parts[1:]) if start.parts[:1] == ("runs",) else start.name


def _published(metrics: records.Record) -> tuple[str, str]:
    """The paper's score for the task of a run, and the order of its pixels if there are scores of two orders."""
    published = PUBLISHED[metrics["task"]]
    if "permute" not in metrics or not published.not_permuted:
        return published.score, ""
    return (published.score, "permuted") if metrics["permute"] else (published.not_permuted, "sequential")


def _score_text(result: records.Record) -> str:
    """The score of a split beside the paper's, an accuracy in percent."""
    score = comparable(result)
    return f"{100 * score.value:.2f} %" if score.score_name == "accuracy" else str(score)


_LANGUAGE = """from trellisnet import load_pretrained

model = load_pretrained("{name}")
print(model.score("the company said"))  # {{'loss': …}}
text = model.generate("the company said", length=50)"""
_IMAGES = """import torch
from trellisnet import load_pretrained

model = load_pretrained("{name}").model
print(model(torch.zeros(1, {pixels}, {colours})).logits.shape)  # torch.Size([1, {classes}])"""


def card(folder: Path) -> list[str]:
    """A shipped model: its scores, how to load it, how it was trained, its data and their licence."""
    name, root = folder.name, folder.parent.parent
    weights, metrics = records.read_shipped(root)[name]
    task, (paper, _) = weights["task"], _published(metrics)
    scores = [_score_text(weights[split]) if weights[split] else "" for split in ("valid", "test")]
    reference = f"{paper} ({PUBLISHED[task].setting})"
    start = _continued(metrics)
    begun = f"It continues [`{start}`](../{start}/README.md)." if start else "It started from random weights."
    licence = LICENCES.get(weights["corpus"], "see their source")
    config = programs.get(task).config_class
    commands = [f"python {task}/train.py --run results/{name} --eval"]
    if issubclass(config, LanguageModelConfig):
        example, pixels = _LANGUAGE.format(name=name), []
        commands.append(f"python scripts/generate.py --run results/{name}")
    else:
        size = records.read_json(folder / "config.json")["pixels"]
        example = _IMAGES.format(name=name, pixels=size, colours=len(config.mean), classes=config.classes)
        mean, std = (", ".join(map(str, values)) for values in (config.mean, config.std))
        permuted = "in the order of `permutation` in [config.json](config.json)"
        place = permuted if metrics["permute"] else "row by row"
        scaling = f"scaled to [0, 1] and normalised by the mean {mean} and the standard deviation {std}"
        pixels = [f"Pixels are read {place}, {scaling}.", ""]
    return [
        f"# {name}",
        "",
        f"Preset `{weights['preset']}` of [`{task}`](../../{task}/README.md), {weights['params']:,} parameters in "
        f"{weights['dtype']} ({weights['bytes'] / 1e6:.1f} MB).",
        "",
        *table(
            ["", "validation:", "test:", "test in the paper:"],
            [(score_of(weights["test"]).title, *scores, reference)],
        ),
        "",
        f"The scores are those of this file with `--precision {weights['precision']}`; "
        "[RESULTS.md](../../RESULTS.md) has those of the run.",
        "",
        "## Load",
        "",
        *["```python", *example.splitlines(), "```", "", *pixels, "```bash", *commands, "```", ""],
        "## Training",
        "",
        *["```bash", metrics["command"], "```", ""],
        f"{begun} Training took {metrics['seconds'] / 60:.0f} minutes on {metrics['machine']}, commit "
        f"`{metrics['commit']}`.",
        "",
        "## Data",
        "",
        f"{weights['corpus']}: {licence}. The data (SHA-256 `{weights['data']}`) are not part of this repository.",
    ]


def blocks(text: str, root: Path) -> str:
    """A page with its blocks `<!-- NAME: begin -->` … `<!-- NAME: end -->` of records written anew."""

    def block(found: re.Match) -> str:
        name = found[1]
        if name.startswith("output of "):
            lines = output(root / "results" / name.removeprefix("output of "))
        elif name.startswith("card of "):
            folder = root / "results" / name.removeprefix("card of ")
            with refusing(folder):
                lines = card(folder)
        elif name in BLOCKS:
            lines = BLOCKS[name](root)
        else:
            return found[0]
        return "\n".join([f"<!-- {name}: begin -->", *lines, f"<!-- {name}: end -->"])

    return re.sub(r"<!-- ([\w .-]+): begin -->\n.*?<!-- \1: end -->", block, text, flags=re.DOTALL)


BLOCKS = {
    "speed": speed, "compatibility": compatibility, "memory": memory, "shipped": shipped, "equilibrium": equilibrium,
    "flags": lambda root: flags(),
}  # fmt: skip
