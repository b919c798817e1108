"""Time the backends side by side, at the shapes of the five tasks.

    python scripts/bench.py                        word_ptb and pmnist: some twenty minutes on two cores
    python scripts/bench.py --quick                small networks, a few minutes
    python scripts/bench.py --tasks word_ptb char_ptb wt103 pmnist cifar10 --json bench.json

Text and images are random but have the real shapes; dropout is that of training. Before anything is timed, every
variant must reproduce the conv1d reference (one conv1d per layer on h, the x part once per dilation, nothing pruned)
on the same tensors that are timed. Variants then take turns, so that a slow spell of the machine affects all of them.

Parts:

    forward     the core in evaluation mode
    core        its forward and backward pass
    step        a training step: loss with auxiliary losses, backward pass, clipping, update
    evaluation  scoring a token: the reference in the authors' overlapping windows, the others as --eval does
    generation  the distribution of the next token: the reference from the shortest window that holds the whole history,
                the others by one step of a stream
    head        the loss of outputs and auxiliary outputs with its gradients, by the reference from the full table of
                log-probabilities

Only language models have the last three. Memory is the peak of a separate process that takes two training steps or
computes two such losses. `--recompute K …` adds variants that store the input of every K-th layer only. On CUDA the
reference is also timed in TF32 and bfloat16, and `graph` replays the training of the variant before it as a CUDA graph.
Shares are of the fastest product in the same precision, at a layer's shape or, on CUDA, of 8192 × 8192 matrices.
"""

import argparse
import contextlib
import functools
import json
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main takes signals: no traceback from an import

import torch
from tqdm import tqdm

from scripts.common import check_bounds, origin
from scripts.workload import (
    IMAGES,
    LANGUAGE,
    OF_LANGUAGE,
    PARTS,
    REFERENCE,
    TRAINING,
    Variant,
    Work,
    gate,
    parts_of,
    peak_gflops,
    seconds,
    variants_on,
)  # fmt: skip
from trellisnet.errors import RunError, counted
from trellisnet.training.cli import guarded
from trellisnet.training.config import Parser, RunConfig
from trellisnet.training.graphs import WARM_UP
from trellisnet.training.runlog import check_json_path, peak_memory, write_json


def weighed(task: str, args: argparse.Namespace) -> dict[str, str]:
    """Parts whose memory is measured → name of the measurement."""
    measured = {"step": "memory"} | ({"head": "head memory"} if "head" in parts_of(task, args.parts) else {})
    return measured if args.memory else {}


class Display:
    """Progress display: a bar on a terminal, elsewhere a line for each part.

    Args:
        total: number of parts, comparisons with the reference included.
    """

    def __init__(self, total: int):
        self.bar = tqdm(total=total, disable=None, dynamic_ncols=True, leave=False, unit="part")

    def begin(self, part: str) -> None:
        """Name the part that begins; the one before it is done."""
        if self.bar.disable:
            print(part, file=sys.stderr, flush=True)
        else:
            self.bar.update(self.bar.postfix is not None)
            self.bar.set_postfix_str(part)


def memory(task: str, part: str, variant: Variant, args: argparse.Namespace) -> int:
    """Peak memory in bytes of a process that runs a part twice.

    Raises:
        RunError: the process failed.
    """
    command = [sys.executable, __file__, "--child", json.dumps([part, *variant])]
    command += ["--tasks", task, "--device", args.device]
    command += ["--quick"] * args.quick + ["--threads", str(args.threads)] + ["--flags", *args.flags] * bool(args.flags)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise RunError(f"{task}, {variant.name}: measuring memory failed: {reason.removeprefix('failed: ')}")
    return json.loads(done.stdout)


def measure(task: str, args: argparse.Namespace, display: Display) -> Iterator[dict[str, Any]]:
    """Measure a task: a record for each part and variant."""
    display.begin(f"{task}: comparison with the reference")
    device = torch.device(args.device)
    work = Work(task, args.quick, device, args.flags)
    variants = variants_on(device, args.recompute)
    if work.config.no_graph(device):
        variants = [variant for variant in variants if not variant.graph]
    gate(work, variants, args.parts)
    parts = parts_of(task, args.parts)
    compared = set(parts) - set(OF_LANGUAGE)  # with the peak
    peaks = {precision: peak_gflops(work, precision) for precision in work.chosen} if compared else {}
    for part in parts:
        display.begin(f"{task}: {part}")
        times: dict[Variant, list[float]] = {
            v: [] for v in variants if not (v.recompute or v.graph) or part in TRAINING
        }
        for variant in times:
            for _ in range(WARM_UP if device.type == "cuda" else 0):
                work.run(part, variant)
        tokens = {variant: work.run(part, variant) for variant in times}  # once unmeasured
        for _ in range(args.repeats):
            for variant, taken in times.items():
                taken.append(seconds(lambda v=variant, p=part: work.run(p, v), device))
        base = statistics.median(times[REFERENCE]) / tokens[REFERENCE]
        for variant, taken in times.items():
            median = statistics.median(taken)
            record = {
                "task": task, "part": part, "variant": variant.name, "seconds": median, "fastest": min(taken),
                "slowest": max(taken), "repeats": args.repeats, "tokens": tokens[variant],
                "per_second": tokens[variant] / median, "ratio": base * tokens[variant] / median,
            }  # fmt: skip
            if part in compared:
                rate = work.flops(part, variant) / median / 1e9
                peak = peaks[variant.precision]
                record |= {"gflops": rate, "share_of_peak": rate / peak, "peak_gflops": peak}
            yield record
    if measured := weighed(task, args):
        del work
    for part, name in measured.items():
        display.begin(f"{task}: {name}")
        for variant in variants:
            if part == "step" or not (variant.recompute or variant.graph):
                used = memory(task, part, variant, args)
                yield {"task": task, "part": name, "variant": variant.name, "bytes": used}


def table(records: list[dict[str, Any]]) -> str:
    """The records as markdown."""
    lines = ["| task | part | variant | seconds (range) | ratio | per second | GFLOP/s | of peak |"]
    lines.append("|---|---|---|--:|--:|--:|--:|--:|")
    for r in records:
        if "bytes" in r:
            base = next(m["bytes"] for m in records if (m["task"], m["part"]) == (r["task"], r["part"]))
            cells = [f"{r['bytes'] / 1e9:.2f} GB", f"1/{base / r['bytes']:.1f}", "", "", ""]
        else:
            span = f"{r['seconds']:.3g} ({r['fastest']:.3g} to {r['slowest']:.3g})"
            cells = [span, f"{r['ratio']:.2f}x", f"{r['per_second']:,.4g}"]
            cells += [f"{r['gflops']:,.0f}", f"{r['share_of_peak']:.0%}"] if "gflops" in r else ["", ""]
        lines.append(f"| {r['task']} | {r['part']} | {r['variant']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def run(argv: Sequence[str]) -> None:
    """Parse, measure, print and write."""
    parser = Parser(description=__doc__.splitlines()[0])
    names = [*LANGUAGE, *IMAGES]
    parser.add_argument("--tasks", nargs="+", choices=names, help="default: word_ptb and pmnist; with --quick all")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS), help="default: all; no name: memory")
    parser.add_argument("--repeats", type=int, default=3, help="measurements, reduced to their median (default: 3)")
    parser.add_argument("--quick", action="store_true", help="small networks, a few minutes")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="also measure memory")
    parser.add_argument("--recompute", nargs="+", type=int, default=[], help="also with --recompute_every K")
    parser.add_argument("--device", default="auto", help="any torch device (default: cuda if there is one, else cpu)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's choice")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="further flags of train.py; must be last")
    parser.add_argument("--json", help="also write the records to this file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    check_bounds(args, repeats=1, threads=0, recompute=1)
    if args.json:
        check_json_path(args.json, "--json", ("command", "records"))
    if args.tasks is None:
        args.tasks = names if args.quick else ["word_ptb", "pmnist"]
    if args.threads:
        torch.set_num_threads(args.threads)
    device = RunConfig(device=args.device).torch_device()
    args.device = str(device)
    if args.child:
        part, *variant = json.loads(args.child)
        work = Work(args.tasks[0], args.quick, device, args.flags)
        variant = Variant(*variant)
        for _ in range(2 + WARM_UP * variant.graph):
            work.run(part, variant)
        print(peak_memory(device))
        return
    parts = [1 + len(parts_of(task, args.parts)) + len(weighed(task, args)) for task in args.tasks]
    display = Display(sum(parts))
    with contextlib.closing(display.bar):
        records = [record for task in args.tasks for record in measure(task, args, display)]
    head = {**origin("scripts/bench.py", argv, device), "device": str(device), "threads": torch.get_num_threads()}
    print(f"{head['machine']}, {counted(head['threads'], 'threads')}, torch {head['torch']}, commit {head['commit']}\n")
    print(table(records))
    if args.json:
        write_json(args.json, "--json", {**head, "records": records})


main = functools.partial(guarded, run)

if __name__ == "__main__":
    sys.exit(main())
