"""Draw pictures of results; the file's name determines the format (svg, png, pdf).

    python scripts/plot.py curves runs/word_ptb/small results/word_ptb_small --out curves.svg
    python scripts/plot.py tables --out pictures                 every table that has numbers
    python scripts/plot.py context context.json --out context.svg   measurements of scripts/context.py
    python scripts/plot.py depth depths.json --out depth.svg     metrics of --eval with --eval_depths
    python scripts/plot.py trellis --out results/figures/trellis.svg

All but the last need matplotlib: pip install -e .[plot].
"""

import contextlib
import functools
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main takes signals: no traceback from an import

from scripts.reports.charts import labels, read_charts, read_contexts, read_curve, read_depths
from scripts.reports.pictures import (
    draw_chart,
    draw_contexts,
    draw_curves,
    draw_depths,
    draw_long_memory,
    draw_memories,
    draw_speeds,
    pyplot,
)
from scripts.reports.records import read_long_memory, read_memories, read_speeds
from scripts.reports.trellis import trellis
from trellisnet.errors import UserError
from trellisnet.serialization import atomic_write
from trellisnet.training.cli import guarded
from trellisnet.training.config import PROJECT, Parser
from trellisnet.training.runlog import check_output

FORMATS = ("svg", "png", "pdf")
BEGINNINGS = {"svg": (b"<?xml", b"<svg"), "png": b"\x89PNG", "pdf": b"%PDF"}  # of files


def check_picture(path: Path, formats: Sequence[str] = FORMATS) -> None:
    """Check before the work that a picture can be written, and replaces nothing but a picture of its format.

    Raises:
        UserError: it cannot, or its name ends with no format.
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


def pictures(root: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Name of each picture that results/ and runs/tables/ have numbers for, and a function that draws it."""
    for name, content in read_speeds(root).items():
        yield f"speed_{name}", functools.partial(draw_speeds, content)
    if found := read_memories(root):
        peaks = {name: metrics["peak_memory"] / 1e9 for name, metrics in found.items()}
        yield "memory", functools.partial(draw_memories, peaks)
    if problems := read_long_memory(root):
        yield "long_memory", functools.partial(draw_long_memory, problems)
    for chart in read_charts(root):
        yield chart.name, functools.partial(draw_chart, chart)


def run(argv: Sequence[str]) -> None:
    """Parse, read, draw, write."""
    parser = Parser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="what", required=True, parser_class=Parser)
    command = commands.add_parser("curves", help="learning curves of runs")
    command.add_argument("runs", nargs="+", type=Path, help="folders with a metrics.jsonl")
    command.add_argument("--by", choices=("epoch", "minutes"), default="epoch", help="(default: epoch)")
    command.add_argument("--out", type=Path, default=Path("curves.svg"))
    command = commands.add_parser("tables", help="speed, memory and tables of scores, one picture each")
    command.add_argument("--format", choices=FORMATS, default="svg")
    command.add_argument("--out", type=Path, default=Path("pictures"), help="folder (default: pictures)")
    command.add_argument("--root", type=Path, default=PROJECT, help="folder with results/ and runs/tables/")
    command = commands.add_parser("context", help="loss against context length")
    command.add_argument("files", nargs="+", type=Path, help="what scripts/context.py --json has written")
    command.add_argument("--out", type=Path, default=Path("context.svg"))
    command = commands.add_parser("depth", help="scores against layers")
    command.add_argument("files", nargs="+", type=Path, help="what train.py --eval --eval_depths --metrics has written")
    command.add_argument("--out", type=Path, default=Path("depth.svg"))
    command = commands.add_parser("trellis", help="the trellis and the inputs that an output sees (svg)")
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
        save(draw_curves(list(map(read_curve, args.runs, labels(args.runs))), args.by), args.out)
    elif args.what == "depth":
        save(draw_depths(read_depths(args.files)), args.out)
    elif args.what == "context":
        save(draw_contexts(read_contexts(args.files)), args.out)
    else:
        with written(args.out) as file:
            file.write(trellis().encode())


main = functools.partial(guarded, run)

if __name__ == "__main__":
    sys.exit(main())
