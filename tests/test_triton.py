"""The Triton kernels, run by Triton's interpreter on the CPU, in a separate process."""

import importlib.util
import os
import subprocess
import sys

import pytest

from trellisnet import TrellisNet, ops
from trellisnet.training.config import PROJECT

# Runs in the child, where the interpreter is on.
CHILD = """
import sys
import torch
sys.path.insert(0, {tests!r})
from test_fused import on_a_gpu, random_inputs, relative, run
from trellisnet import ops
from trellisnet.ops import fused, gates, triton_gates

on_a_cpu, calls = fused._sums_x, []
sum_rows = triton_gates.sum_rows

def counted(dx, dz, layers, add):
    calls.append(add)
    sum_rows(dx, dz, layers, add)

triton_gates.sum_rows = counted
triton_gates.BLOCK = 4
for low in (None, torch.bfloat16):
    for k, dilation, length in ((2, (1,), 3), (3, (1, 2), 4)):
        inputs = {{name: t.float() for name, t in random_inputs(k, length, hidden=6).items()}}
        scale = torch.tensor([[1.5, 0, 1.5, 0, 1.5, 1.5], [0, 1.5, 1.5, 1.5, 0, 1.5]])[:, :, None]
        for num_layers, carried, start, inject_every, recompute in (
            (1, True, 0, 1, 0), (3, False, length - 1, 1, 0), (4, True, 1, 2, 2),
            *[(7, True, 0, 1, 0)] * (k == 2 and low is None),
        ):
            options = {{"num_layers": num_layers, "dilation": dilation, "output_size": 5, "start": start}}
            options |= {{"aux_every": 2, "inject_every": inject_every, "carried": carried, "autocast": low}}
            options |= {{"hidden_scale": None if num_layers == 3 else scale, "recompute": recompute, "gemm": "mm"}}
            fused._sums_x = on_a_gpu(on_a_cpu)
            ours, steps = run("triton", inputs, **options)
            fused._sums_x = on_a_cpu
            theirs, same = run("fused", inputs, gates="eager", **options)
            assert steps == same
            for a, b in zip(ours, theirs, strict=True):
                error = relative(a, b.double())
                assert error < (4e-6 if low is None else 5e-2), (low, error)

assert True in calls and False in calls  # several sums for one dilation, too
for dtype in (torch.float32, torch.bfloat16):
    plan = fused.pruning.plan(9, ops.TrellisSpec(4, 1, ops.ACTIVATIONS["lstm"], (2,)), 6, torch.device("cpu"))
    held = [(layer, 2 + 40 * i) for i, layer in enumerate(plan.layers)]
    dz, dx = torch.randn(160, 8).to(dtype), torch.full((sum(map(len, [plan.layers[0].x])), 2, 8), float("nan"))
    expected = torch.zeros(dx.shape, dtype=torch.float64)
    gates.sum_rows(expected, dz, held, add=True)
    triton_gates.sum_rows(dx, dz, held, add=False)
    assert relative(dx, expected) < 1e-6
    triton_gates.sum_rows(dx, dz, held, add=True)
    assert relative(dx, 2 * expected) < 1e-6

x = torch.cat([torch.logspace(-20, 3, 2000), torch.linspace(0, 20, 2000)])
x = torch.cat([x, -x])
spec = ops.TrellisSpec(1, 1, ops.ACTIVATIONS["lstm"])
layer = fused.pruning.plan(1, spec, 0, x.device).layers[0]
gates, inputs = torch.zeros(1, 1, 4 * x.numel()), torch.zeros(1, 1, 4 * x.numel())
inputs[..., 2 * x.numel() : 3 * x.numel()] = x
triton_gates.BLOCK = 1024
cell = torch.empty(1, 1, x.numel())
triton_gates.forward(fused.Step(spec.activation, layer, None, 0, gates, inputs, cell, None, None, None))
ours, exact = gates[0, 0, 2 * x.numel() : 3 * x.numel()], x.double().tanh()
assert ((ours - exact).abs() <= 1e-6 * exact.abs()).all(), ((ours - exact).abs() / exact.abs()).max()
print("same")
"""

installed = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the extra triton")


@installed
def test_the_kernels_agree_with_torch():
    child = CHILD.format(tests=str(PROJECT / "tests"))
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", child], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "same\n"


# Runs in a child, where the interpreter is off: compiling needs no device.
COMPILER = """
import re
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from trellisnet.ops import triton_gates

flags = dict.fromkeys("X BELOW LEFT SCALE TAPS OUT DTAPS ABOVE DC DZ DX ADD".split(), True)
for H in (1400, 136):
    for kernel, indices in ((triton_gates._forward, 5), (triton_gates._backward, 8), (triton_gates._sum_rows, 1)):
        channels = 4 * H if kernel is triton_gates._sum_rows else H
        block, warps = triton_gates.launch_shape(channels)
        known = {"H": H, "GH": channels, "LAYERS": 50, "out_from": H - 96, "K": 2, "BLOCK": block, **flags}
        types, constants, aligned = {}, {}, {}
        for i, name in enumerate(kernel.arg_names):
            if name in known:
                types[name], constants[i,] = "constexpr", known[name]
            elif name in ("S", "N", "P", "product"):
                types[name] = "i32"
            else:
                low = name in ("gates", "x", "taps", "dtaps", "dz")
                types[name] = "*i32" if name.endswith(("_row", "readers")) else "*bf16" if low else "*fp32"
                aligned[i,] = [["tt.divisibility", 16]]
        source, target = ASTSource(kernel, types, constants, aligned), GPUTarget("cuda", 90, 32)
        made = compile(source, target=target, options={"num_warps": warps})
        accesses = re.findall(r"(?:ld|st)\\.global\\S*", made.asm["ptx"])
        narrow = [access for access in accesses if not access.endswith(".v4.b32")]
        assert narrow == ["ld.global.b32"] * indices, (H, kernel, narrow)
        assert len(accesses) > indices
print("compiled")
"""


@installed
def test_they_compile_for_a_gpu_with_wide_accesses(tmp_path):
    """All loads and stores but those of indices are 16 bytes wide, in bfloat16, too."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", COMPILER], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "compiled\n"), done.stderr


@installed
def test_a_program_has_no_more_channels_than_there_are():
    from trellisnet.ops import triton_gates

    shapes = {channels: triton_gates.launch_shape(channels) for channels in (1400, 512, 256, 130, 4)}
    assert shapes == {1400: (512, 2), 512: (512, 2), 256: (256, 1), 130: (256, 1), 4: (4, 1)}


def test_it_is_refused_where_it_cannot_run(monkeypatch):
    import torch

    if importlib.util.find_spec("triton") is not None:
        with pytest.raises(ValueError, match="gates: triton cannot run, Triton needs a CUDA device, got cpu"):
            TrellisNet(3, 4, 2, backend="triton")(torch.randn(1, 5, 3))
    monkeypatch.setattr(ops.fused, "no_triton", lambda: "the package triton is not installed")
    with pytest.raises(ValueError, match="backend: triton cannot run this, the package triton is not installed; expec"):
        TrellisNet(3, 4, 2, backend="triton")
    with pytest.raises(ValueError, match="backend: triton cannot run this, it has no gru gates"):
        TrellisNet(3, 4, 2, backend="triton", activation="gru")
