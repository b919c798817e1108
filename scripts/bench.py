"""Time the backends side by side, at the shapes that the five tasks train with.

Every variant is first compared with the conv1d reference (one conv1d a layer on h, the x part once a dilation, nothing
pruned) on the very tensors that are timed; a wrong result is not timed. Then all variants take turns, so that a machine
that is slower for a while is slower for all. Text and images are random, of the real shapes; dropout is as in training.

    python scripts/bench.py                        what word_ptb and pmnist train with: some twenty minutes on two cores
    python scripts/bench.py --quick                small networks, a minute
    python scripts/bench.py --tasks word_ptb char_ptb wt103 pmnist cifar10 --json bench.json

`forward` is the core in evaluation mode, `core` its forward and backward pass, `step` a whole training step: loss with
auxiliary losses, backward, clipping, update. Memory is the peak of a process of its own that takes two such steps.
"""

import argparse
import contextlib
import dataclasses
import gc
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

import char_ptb.model  # noqa: E402
import cifar10.model  # noqa: E402
import pmnist.model  # noqa: E402
import word_ptb.model  # noqa: E402
import wt103.model  # noqa: E402
from trellisnet import ops  # noqa: E402
from trellisnet.errors import UserError  # noqa: E402
from trellisnet.ops import gemm  # noqa: E402
from trellisnet.training.allocator import keep_freed_memory  # noqa: E402
from trellisnet.training.config import parse  # noqa: E402
from trellisnet.training.optim import make_optimizer  # noqa: E402
from trellisnet.training.runlog import commit, machine, peak_memory  # noqa: E402
from trellisnet.training.tasks import LanguageModeling  # noqa: E402

# What is timed: the task's settings, and classes (or pixels and colours) of its data.
LANGUAGE = {"word_ptb": (word_ptb.model, 10_000), "char_ptb": (char_ptb.model, 50), "wt103": (wt103.model, 267_735)}
IMAGES = {"pmnist": (pmnist.model, 784, 1), "cifar10": (cifar10.model, 1024, 3)}
PRESETS = dict.fromkeys(LANGUAGE, "paper") | dict.fromkeys(IMAGES, "default")  # the authors' size for images
# --quick: every network in a size that takes a fraction of a second.
SMALLER = {name: ["--nhid", "120", "--nlevels", "12", "--batch_size", "8"] for name in LANGUAGE}
SMALLER["word_ptb"] += ["--emsize", "80", "--nout", "80", "--horizon", "12", "--seq_len", "36", "--aux_freq", "4"]
SMALLER["char_ptb"] += ["--emsize", "40", "--nout", "40", "--horizon", "36", "--aux_freq", "6"]
SMALLER["wt103"] += ["--emsize", "64", "--nout", "64", "--horizon", "12", "--aux_freq", "6"]
SMALLER |= {name: ["--batch_size", "8"] for name in IMAGES}
VARIANTS = {"reference": ("reference", "fp32"), "fused": ("fused", "fp32"), "fused bf16": ("fused", "bf16")}
# Largest difference from the reference, relative to the norm of what is compared.
TOLERANCE = {"fp32": 1e-3, "bf16": 0.1}
PARTS = ("forward", "core", "step")


class Work:
    """A task's model and one batch of its shape, computed by any variant."""

    def __init__(self, task: str, quick: bool, device: torch.device, flags: list[str]):
        self.name, self.device = task, device
        smaller = SMALLER[task] if quick else []
        module = (LANGUAGE.get(task) or IMAGES[task])[0]
        config, _ = parse(module.Config, ["--preset", PRESETS[task], *smaller, *flags])
        self.config = config
        # The products and gates that a run here would have.
        self.chosen = {p: dataclasses.replace(config, precision=p).chosen(device) for p in ("fp32", "bf16")}
        torch.manual_seed(1)
        N = self.config.batch_size
        if task in LANGUAGE:
            V = 2_000 if quick else LANGUAGE[task][1]
            self.model = module.build_model(self.config, V).to(device)
            c = self.config
            self.task = LanguageModeling(
                self.model, horizon=c.horizon, seq_len=c.task_seq_len(), repackage=c.repack, aux_weight=c.aux,
                aux_every=int(c.aux_freq), alpha=c.alpha, beta=c.beta,
            )  # fmt: skip
            rows = torch.randint(V, (N, max(c.horizon, c.seq_len) + 1), device=device)
            self.inputs, self.targets = self.task.batches(rows)[0]
            self.x = self.model.embed(self.inputs).detach()
            self.start = self.inputs.size(1) - self.task.size((self.inputs, self.targets)) // N
            self.aux_every = int(c.aux_freq) if c.aux > 0 else None
        else:
            _, length, channels = IMAGES[task]
            length = 256 if quick else length
            self.model = module.build_model(self.config, channels, 10).to(device)
            self.x = self.inputs = torch.randn(N, length, channels, device=device)
            self.targets = torch.randint(10, (N,), device=device)
            self.start, self.aux_every = length - 1, None
        core = self.model.core
        wanted = (self.x.size(1), core.num_layers, core.dilation, core.kernel_size, self.start)
        self.first = len(ops.dependencies(*wanted)[0])  # positions of the first layer
        self.optimizer = make_optimizer(self.model.parameters(), self.config)
        self.tokens = N * (self.inputs.size(1) - self.start) if task in LANGUAGE else N

    def use(self, variant: str) -> contextlib.AbstractContextManager:
        """Set the backend, and give the context of the precision."""
        backend, precision = VARIANTS[variant]
        core, chosen = self.model.core, self.chosen[precision]
        core.backend, core.gemm, core.gates = backend, chosen.gemm, chosen.gates
        return dataclasses.replace(self.config, precision=precision).autocast(self.device)

    def _everything(self, variant: str) -> dict[str, Any]:
        """What makes the reference compute all layer-steps, as a plain convolutional network does."""
        if variant != "reference" or self.name in LANGUAGE:
            return {}
        N, L, _ = self.x.shape
        return {"lengths": torch.full((N,), L, device=self.device)}

    def core(self, variant: str, training: bool) -> tuple[torch.Tensor, ...]:
        """Everything that the core makes of the batch: the wanted outputs, then the auxiliary ones."""
        self.model.core.train(training)
        torch.manual_seed(2)
        whole = self._everything(variant)
        with self.use(variant):
            aux_every = self.aux_every if training else None
            out = self.model.core(self.x, start=0 if whole else self.start, aux_every=aux_every, **whole)
        return (out.output[:, -1:] if whole else out.output, *out.aux)

    def gradients(self, variant: str) -> list[torch.Tensor]:
        """Outputs, then the gradients of a fixed function of them."""
        outs = self.core(variant, True)
        torch.manual_seed(3)
        loss = sum((out.float() * torch.randn(out.shape, device=self.device)).sum() for out in outs)
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        return [out.detach() for out in outs] + [p.grad for p in self.model.core.parameters()]

    def run(self, part: str, variant: str) -> None:
        if part == "forward":
            with torch.no_grad():
                self.core(variant, False)
        elif part == "core":
            self.gradients(variant)
        else:
            self.step(variant)

    def step(self, variant: str) -> None:
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        with self.use(variant):
            if self.name in LANGUAGE:
                loss = self.task.loss(self.inputs, self.targets)[0]["loss"]
            else:
                logits = self.model(self.inputs, **self._everything(variant)).logits
                loss = torch.nn.functional.cross_entropy(logits.float(), self.targets)
        loss.backward()
        if self.config.clip > 0:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()

    def flops(self, part: str, variant: str) -> float:
        """Floating-point operations of the core's products over h: what they must be for these layer-steps."""
        core, (N, L, _) = self.model.core, self.x.shape
        pruned = variant != "reference"
        # Below the first layer all is zero, which the fused operator knows.
        layer_steps = core.layer_steps(L, start=self.start) - self.first if pruned else core.num_layers * L
        products = 2 * core.kernel_size * core.hidden_size * core.bias.numel()
        return N * layer_steps * products * (1 if part == "forward" else 3)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def gate(work: Work) -> None:
    """Exit unless every variant computes what the reference does."""
    expected = work.gradients("reference")
    for variant, (_, precision) in VARIANTS.items():
        if variant == "reference":
            continue
        for ours, truth in zip(work.gradients(variant), expected, strict=True):
            error = ((ours.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-30)).item()
            if not error <= TOLERANCE[precision]:
                sys.exit(f"error: {work.name}, {variant}: differs from the reference by {error:.2g}; nothing is timed")


def seconds(function: Callable[[], None], device: torch.device) -> float:
    gc.collect()
    synchronize(device)
    begin = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - begin


def peak_gflops(work: Work, precision: str) -> float:
    """The rate of the fastest product of the shape of a layer's, GFLOP/s."""
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    core = work.model.core
    M, K, N = 2048, core.kernel_size * core.hidden_size, core.bias.numel()
    a, b = (torch.randn(rows, K, device=work.device).to(dtype) for rows in (M, N))
    best = math.inf
    for route, product in gemm.ROUTES.items():
        if gemm.usable(route, work.device, dtype):
            best = min(best, *(seconds(lambda p=product: p(a, b), work.device) for _ in range(5)))
    return 2 * M * K * N / best / 1e9


def memory(task: str, variant: str, args: argparse.Namespace) -> int:
    """Peak of two training steps in a process of their own, bytes."""
    command = [sys.executable, __file__, "--child", variant, "--tasks", task, "--device", args.device]
    command += ["--quick"] * args.quick + ["--threads", str(args.threads)] + ["--flags", *args.flags] * bool(args.flags)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: measuring memory failed: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout)


def prepare(task: str, device: torch.device) -> None:
    """What train.py does of this task before it starts."""
    if task in IMAGES and device.type == "cpu":
        keep_freed_memory()


def measure(task: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One record for every part and variant."""
    device = torch.device(args.device)
    prepare(task, device)
    work = Work(task, args.quick, device, args.flags)
    gate(work)
    rates = {precision: peak_gflops(work, precision) for precision in ("fp32", "bf16")}
    for part in args.parts:
        times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
        for variant in VARIANTS:
            work.run(part, variant)  # once unmeasured
        for _ in range(args.repeats):
            for variant, taken in times.items():
                taken.append(seconds(lambda v=variant, p=part: work.run(p, v), device))
        for variant, taken in times.items():
            median = statistics.median(taken)
            rate = work.flops(part, variant) / median / 1e9
            yield {
                "task": task, "part": part, "variant": variant, "seconds": median, "fastest": min(taken),
                "slowest": max(taken), "repeats": args.repeats, "per_second": work.tokens / median,
                "ratio": statistics.median(times["reference"]) / median, "gflops": rate,
                "share_of_peak": rate / rates[VARIANTS[variant][1]],
            }  # fmt: skip
    if args.memory:
        del work
        for variant in VARIANTS:
            yield {"task": task, "part": "memory", "variant": variant, "bytes": memory(task, variant, args)}


def table(records: list[dict[str, Any]]) -> str:
    """The records as markdown."""
    lines = ["| task | part | variant | seconds (range) | ratio | per second | GFLOP/s | of peak |"]
    lines.append("|---|---|---|--:|--:|--:|--:|--:|")
    for r in records:
        if r["part"] == "memory":
            base = next(m["bytes"] for m in records if m["task"] == r["task"] and m["part"] == "memory")
            cells = [f"{r['bytes'] / 1e9:.2f} GB", f"1/{base / r['bytes']:.1f}", "", "", ""]
        else:
            span = f"{r['seconds']:.3g} ({r['fastest']:.3g} to {r['slowest']:.3g})"
            cells = [span, f"{r['ratio']:.2f}x", f"{r['per_second']:,.0f}", f"{r['gflops']:,.0f}"]
            cells.append(f"{r['share_of_peak']:.0%}")
        lines.append(f"| {r['task']} | {r['part']} | {r['variant']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    tasks = [*LANGUAGE, *IMAGES]
    parser.add_argument("--tasks", nargs="+", choices=tasks, help="default: word_ptb and pmnist; with --quick all")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=3, help="measurements of which the median counts (default: 3)")
    parser.add_argument("--quick", action="store_true", help="small networks; ends in a minute")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="also measure memory")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's choice")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="further flags of train.py; must be last")
    parser.add_argument("--json", help="also write the records to this file")
    parser.add_argument("--child", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error("--repeats: expected at least 1")
    if args.tasks is None:
        args.tasks = tasks if args.quick else ["word_ptb", "pmnist"]
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    if args.child:
        prepare(args.tasks[0], device)
        work = Work(args.tasks[0], args.quick, device, args.flags)
        for _ in range(2):
            work.step(args.child)
        print(peak_memory(device))
        return 0
    records = []
    for task in args.tasks:
        try:
            for record in measure(task, args):
                records.append(record)
                if sys.stderr.isatty():
                    print(f"{task} {record['part']} {record['variant']}", file=sys.stderr)
        except UserError as e:
            parser.error(str(e))
    head = {
        "command": " ".join(["python scripts/bench.py", *(argv if argv is not None else sys.argv[1:])]),
        "machine": machine(device), "device": str(device), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "python": platform.python_version(), "commit": commit(),
    }  # fmt: skip
    print(f"{head['machine']}, {head['threads']} threads, torch {head['torch']}, commit {head['commit']}\n")
    print(table(records))
    if args.json:
        Path(args.json).write_text(json.dumps({**head, "records": records}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
