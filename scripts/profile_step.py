"""Show where the time of a training step goes: times of whole steps, of their kernels, and with other launch shapes.

    python scripts/profile_step.py                            times, then kernels, of five steps: two minutes on a GPU
    python scripts/profile_step.py sweep                      two steps with other blocks and warps of the gate kernels
    python scripts/profile_step.py times --steps char_ptb:paper       a task and one of its presets

Steps are those of scripts/bench.py, on random data of the real shapes: the fused operator in bfloat16, on CUDA
replayed as a graph. Kernels are listed for a step without a graph, whose replay launches the same ones; the rest of the
replayed step's time is idle. On a CPU, operators are listed instead of kernels.
"""

import argparse
import contextlib
import functools
import gc
import signal
import statistics
import sys
from collections.abc import Callable, Sequence

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main takes signals: no traceback from an import

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from scripts.common import check_bounds
from scripts.workload import PRESETS, Variant, Work, seconds, synchronize
from trellisnet.errors import RunError, UserError
from trellisnet.ops import fused
from trellisnet.training.cli import guarded, is_out_of_memory
from trellisnet.training.config import Parser, RunConfig
from trellisnet.training.graphs import WARM_UP

ACTIONS = ("times", "kernels", "sweep")
STEPS = ("word_ptb:paper", "pmnist:default", "pmnist:8m", "cifar10:8m", "char_ptb:paper")
SWEPT = ("word_ptb:paper", "pmnist:8m")  # many channels; fewer channels, but more layers and positions
SHAPES = ((256, 2), (512, 2), (512, 4), (1024, 4), (1024, 8))  # channels and warps of a program
ROWS = 24  # kernels to list


def times(work: Work, repeats: int) -> str:
    """Time of a step, how it was computed, and the memory that the device holds, as a line."""
    variant = Variant("fused", "bf16", graph=work.device.type == "cuda")
    for _ in range(WARM_UP + 3):  # the graph is recorded in one of these
        work.run("step", variant)
    measured = [1e3 * seconds(lambda: work.run("step", variant), work.device) for _ in range(repeats)]
    line = f"{statistics.median(measured):8.2f} ms ({min(measured):.2f} to {max(measured):.2f}), {variant.name}"
    line += f", {work.chosen[variant.precision].gates} gates"
    if work.device.type == "cuda":
        line += f", {torch.cuda.max_memory_reserved(work.device) / 1e9:.2f} GB reserved"
    return line


def kernels(work: Work, repeats: int) -> str:
    """Table of a step's kernels, the longest first; `repeats` has no effect.

    Raises:
        RunError: the profiler saw none, for example because it may not use the device's counters.
    """
    variant, on_gpu, found = Variant("fused", "bf16"), work.device.type == "cuda", []
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] * on_gpu)]
    for _ in range(2):
        work.run("step", variant)
    synchronize(work.device)
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        work.run("step", variant)
        synchronize(work.device)
    for event in profile.key_averages():
        if on_gpu and event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            found.append((event.self_device_time_total / 1e3, event.count, event.key))
        elif not on_gpu:
            found.append((event.self_cpu_time_total / 1e3, event.count, event.key))
    if not found:
        raise RunError("the profiler saw no kernel; its messages above say why")
    found.sort(reverse=True)
    total = sum(milliseconds for milliseconds, *_ in found)
    lines = [f"{total:8.2f} ms in {sum(count for _, count, _ in found)} launches of {len(found)} kernels"]
    for milliseconds, count, name in found[:ROWS]:
        lines.append(f"  {milliseconds:8.3f} ms {milliseconds / max(total, 1e-9):4.0%} {count:6d}  {name[:90]}")
    return "\n".join(lines)


@contextlib.contextmanager
def launched_as(block: int, warps: int, device: torch.device):
    """Give the gate kernels another launch shape within the context.

    Raises:
        UserError: Triton's gate kernels cannot run here.
    """
    if reason := fused.reason_against("triton", device, torch.bfloat16, "lstm"):
        raise UserError(f"sweep: needs Triton's gate kernels, but {reason}; leave it out")
    from trellisnet.ops import triton_gates

    before = triton_gates.BLOCK, triton_gates.WARPS
    triton_gates.BLOCK, triton_gates.WARPS = block, warps
    try:
        yield
    finally:
        triton_gates.BLOCK, triton_gates.WARPS = before


def measure(action: Callable[[Work, int], str], step: str, label: str, args: argparse.Namespace) -> bool:
    """Print the result of an action for a step, TASK:PRESET; False if the step does not fit into memory."""
    task, _, preset = step.partition(":")
    if task not in PRESETS:
        raise UserError(f"--steps {step}: expected TASK:PRESET, the task one of {', '.join(PRESETS)}")
    device = torch.device(args.device)
    flags = ["--preset", preset] if preset else []
    fits = True
    try:
        found = action(Work(task, args.quick, device, flags), args.repeats)
    except RuntimeError as e:
        if not is_out_of_memory(e):
            raise
        found, fits = "out of memory", False
    print(f"{label:36s} {found}", flush=True)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return fits


def run(argv: Sequence[str]) -> int:
    """Take every action for every step; 1 if a step does not fit into memory.

    Raises:
        UserError: an unknown action, device, task or preset.
    """
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("actions", nargs="*", metavar="ACTION", help=f"{', '.join(ACTIONS)}; default: times kernels")
    parser.add_argument("--steps", nargs="+", metavar="TASK:PRESET", help=f"default: {' '.join(STEPS)}")
    parser.add_argument("--repeats", type=int, default=15, help="steps to time (default: 15)")
    parser.add_argument("--quick", action="store_true", help="small networks")
    parser.add_argument("--device", default="cuda", help="default: cuda")
    args = parser.parse_args(argv)
    check_bounds(args, repeats=1)
    if unknown := [action for action in args.actions if action not in ACTIONS]:
        raise UserError(f"{unknown[0]}: expected {', '.join(ACTIONS)}")
    device = RunConfig(device=args.device).torch_device()
    fit = []
    for action in args.actions or ("times", "kernels"):  # times of all steps first: a profiler leaves traces
        if action == "sweep":
            for step in args.steps or SWEPT:
                for block, warps in SHAPES:
                    with launched_as(block, warps, device):
                        fit.append(measure(times, step, f"{step} block {block} warps {warps}", args))
        else:
            for step in args.steps or STEPS:
                fit.append(measure(kernels if action == "kernels" else times, step, f"{step} {action}", args))
    return 0 if all(fit) else 1


main = functools.partial(guarded, run)

if __name__ == "__main__":
    sys.exit(main())
