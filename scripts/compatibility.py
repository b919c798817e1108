"""Test which ways of running a network work with which backend, and print a table.

    python scripts/compatibility.py [--device cuda] [--json results/compatibility/cpu.json]

Every cell runs a small network and compares its outputs (and, where it says so, gradients) with those of the reference
in plain Python. The cell says `yes` if the backend of the column ran, `reference` if that ran instead, and otherwise
the reason. `scripts/collect.py` writes the records of results/compatibility/ into trellisnet/README.md.
"""

import functools
import importlib.util
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main takes signals: no traceback from an import

import torch
from torch import Tensor

from scripts.common import origin
from scripts.reports.markdown import table
from trellisnet import TrellisNet
from trellisnet.ops import fused, reference
from trellisnet.training.cli import guarded
from trellisnet.training.config import Parser, RunConfig
from trellisnet.training.runlog import check_json_path, write_json

# Columns: `auto` with these gate kernels, which it passes over where only the reference can run.
BACKENDS = {
    "reference": {"backend": "reference"},
    "fused, torch's gates": {"gates": "eager"},
    "fused, C gates": {"gates": "compiled"},
    "fused, Triton gates": {"gates": "triton"},
}
GATES = {"fused, C gates": "compiled", "fused, Triton gates": "triton"}
OPERATOR = "trellisnet.trellis"  # in a graph
NOT_TRIED = "not tried here"
N, L, C = 2, 9, 3
# Of single precision and another order of summation.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}

Compute = Callable[[Tensor], Any]


def network(device: torch.device, **options: Any) -> TrellisNet:
    """Make a network whose weights are large enough for differences to show."""
    torch.manual_seed(1)
    net = TrellisNet(C, 16, 4, dilation=(1, 2), output_size=8, device=device, **options).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.3)
    return net


@contextmanager
def called() -> Iterator[list[str]]:
    """List the backends that are called directly meanwhile."""
    names, modules = [], {"reference": reference, "fused": fused}
    kept = {name: module.trellis for name, module in modules.items()}

    def spy(name: str) -> Callable:
        def run(*args: Any, **options: Any) -> Any:
            names.append(name)
            return kept[name](*args, **options)

        return run

    for name, module in modules.items():
        module.trellis = spy(name)
    try:
        yield names
    finally:
        for name, module in modules.items():
            module.trellis = kept[name]


def with_gradients(run: Compute, net: TrellisNet) -> Compute:
    """Return outputs and the gradients of the parameters."""

    def compute(x: Tensor) -> tuple[Tensor, ...]:
        output = run(x).output
        return output, *torch.autograd.grad(output.square().sum(), list(net.parameters()))

    return compute


def direct(function: Callable[[TrellisNet], Compute]) -> Callable[[TrellisNet, Tensor], tuple[Any, bool]]:
    """Make a row of the table from a function that calls the network in plain Python, or traces it."""

    def row(net: TrellisNet, x: Tensor) -> tuple[Any, bool]:
        with called() as names:
            result = function(net)(x)
        return result, "fused" in names

    return row


def compiled(net: TrellisNet, x: Tensor) -> tuple[Any, bool]:
    targets = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return torch._dynamo.lookup_backend("inductor")(graph, inputs)

    torch._dynamo.reset()
    run = torch.compile(net, backend=backend, fullgraph=True)
    return with_gradients(run, net)(x), any(OPERATOR in target for target in targets)


def exported(net: TrellisNet, x: Tensor) -> tuple[Any, bool]:
    with torch.no_grad():
        program = torch.export.export(net, (x,))
    return program.module()(x).output, any(OPERATOR in str(node.target) for node in program.graph.nodes)


def onnx(net: TrellisNet, x: Tensor) -> tuple[Any, bool]:
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), called() as names:
        path = Path(folder) / "net.onnx"
        torch.onnx.export(net, (x,), path, dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        outputs = session.run(None, {session.get_inputs()[0].name: x.cpu().numpy()})
    return torch.from_numpy(outputs[0]).to(x.device), "fused" in names


def graph(net: TrellisNet, x: Tensor) -> tuple[Any, bool]:
    run, recorded = with_gradients(net, net), torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with called() as names, torch.cuda.stream(stream):
        for _ in range(3):
            run(x)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(recorded):
        results = run(x)
    recorded.replay()
    return results, "fused" in names


def _output(net: TrellisNet) -> Compute:
    return lambda x: net(x).output


def _grad(net: TrellisNet) -> Compute:
    return torch.func.grad(lambda x: net(x).output.square().sum())


def _vmap(net: TrellisNet) -> Compute:
    return lambda x: torch.func.vmap(_output(net))(x.expand(3, N, L, C))


def _jvp(net: TrellisNet) -> Compute:
    return lambda x: torch.func.jvp(_output(net), (x,), (x,))[1]


def _traced(net: TrellisNet) -> Compute:
    return lambda x: torch.jit.trace(net, (x,), check_trace=False)(x)[0]  # the check would call the network itself


# Row: what is expected, by the reference in plain Python, and what is tried: result, and whether the fused backend ran.
ROWS: dict[str, tuple[Callable[[TrellisNet], Compute], Callable[[TrellisNet, Tensor], tuple[Any, bool]]]] = {
    "eager, with gradients": (
        lambda net: with_gradients(net, net), direct(lambda net: with_gradients(net, net)),
    ),
    "`torch.compile(fullgraph=True)`, with gradients": (lambda net: with_gradients(net, net), compiled),
    "`torch.export`": (_output, exported),
    "ONNX, run by onnxruntime": (_output, onnx),
    "`torch.func.grad`": (_grad, direct(_grad)),
    "`torch.func.vmap`": (_vmap, direct(_vmap)),
    "`torch.func.jvp`": (_jvp, direct(_jvp)),
    "`torch.jit.trace`": (_output, direct(_traced)),
    "CUDA graph, with gradients": (lambda net: with_gradients(net, net), graph),
}  # fmt: skip


def lacking(row: str, column: str, device: torch.device) -> bool:
    """Return whether this machine lacks what a cell needs."""
    if row.startswith("CUDA") and device.type != "cuda":
        return True
    if row.startswith("ONNX") and not all(map(importlib.util.find_spec, ("onnx", "onnxruntime", "onnxscript"))):
        return True
    gates = GATES.get(column)
    return gates is not None and bool(fused.reason_against(gates, device, torch.float32, "lstm"))


def cell(row: str, column: str, device: torch.device) -> str:
    """Try one cell."""
    if lacking(row, column, device):
        return NOT_TRIED
    reference, tried = ROWS[row]
    x = torch.randn(N, L, C, generator=torch.Generator().manual_seed(2)).to(device)
    expected = reference(network(device, backend="reference"))(x)
    try:
        with warnings.catch_warnings(action="ignore"):  # of torch, about its own future
            result, by_fused = tried(network(device, **BACKENDS[column]), x)
        torch.testing.assert_close(result, expected, **TOLERANCE)
    except Exception as e:  # any exception is an entry of the table
        return f"no: {(str(e).strip().splitlines() or [type(e).__name__])[0][:100]}"
    return "yes" if by_fused or column == "reference" else "reference"


def run(argv: Sequence[str]) -> int:
    """Parse, try and print."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", help="also write the record to this file")
    args = parser.parse_args(argv)
    device = RunConfig(device=args.device).torch_device()
    if args.json:
        check_json_path(args.json, "--json", ("command", "cells"))
    head = origin("scripts/compatibility.py", argv, device)
    cells = {row: {column: cell(row, column, device) for column in BACKENDS} for row in ROWS}
    print("\n".join(table(["", *BACKENDS], ([row, *entries.values()] for row, entries in cells.items()))))
    if args.json:
        write_json(args.json, "--json", {**head, "cells": cells})
    return 0


main = functools.partial(guarded, run)

if __name__ == "__main__":
    sys.exit(main())
