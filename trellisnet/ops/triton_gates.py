"""The gates of :mod:`trellisnet.ops.gates` as Triton kernels: LSTM gates on CUDA, in one pass over memory.

Imported only on demand, because `triton` is an extra. With the environment variable TRITON_INTERPRET=1 the kernels run
on the CPU, slowly; that is how they are tested without a GPU.

A program computes BLOCK channels of one row, a (position, sequence). The arguments are those of
:class:`trellisnet.ops.gates.Step`; the index arrays come from :func:`trellisnet.ops.pruning.places`.
"""

import contextlib
import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from trellisnet.ops import pruning
from trellisnet.ops.gates import Step

BLOCK = 512  # channels per program, or fewer if there are fewer: 1,400 channels leave few lanes idle
WARPS = 2  # for a whole block: 8 channels per thread, so that accesses are 16 bytes wide in bfloat16 too


@triton.jit
def _tanh(x):
    """Compute tanh from exp(−2|x|), which cannot overflow; near 0, where 1 − e would lose digits, by its series."""
    magnitude = tl.abs(x)
    e = tl.exp(-2 * magnitude)
    large = (1 - e) / (1 + e)
    s = x * x
    small = magnitude * (1 + s * (-1.0 / 3 + s * (2.0 / 15 + s * (-17.0 / 315 + s * (62.0 / 2835)))))
    result = tl.where(magnitude < 0.25, small, large)
    return tl.where(x < 0, -result, result)


@triton.jit
def _load(pointer, mask):
    """Load float32 values; zero where the mask is off."""
    return tl.where(mask, tl.load(pointer, mask=mask).to(tl.float32), 0.0)


@triton.jit
def _sum(product, x, has_product, inside):
    """Gate pre-activation, float32."""
    return _load(product, has_product) + _load(x, inside)


@triton.jit
def _c_shifted(c_below, cell_row, c0, s, n, N, H: tl.constexpr, u, inside, BELOW: tl.constexpr, LEFT: tl.constexpr):
    """Cell at t − d of the layer below, from c0 before the first step, or zero; float32."""
    row = tl.load(cell_row + s)
    c = tl.zeros_like(u).to(tl.float32)
    if BELOW:
        c += _load(c_below + (row.to(tl.int64) * N + n) * H + u, inside & (row >= 0))
    if LEFT:
        c += _load(c0 + n * H + u, inside & (row < 0))
    return c


@triton.jit
def _write_taps(taps, tap_row, h, s, n, S, N, H: tl.constexpr, u, inside, K: tl.constexpr):
    """Write h, already masked, to every tap of the layer above that reads it."""
    for j in tl.static_range(K):
        row = tl.load(tap_row + j * S + s)
        place = ((row.to(tl.int64) * N + n) * K + j) * H + u
        tl.store(taps + place, h.to(taps.dtype.element_ty), mask=inside & (row >= 0))


# H is a constant, so that the compiler knows the alignment of rows; lengths are not, so one kernel serves them all.
@triton.jit(do_not_specialize=["S", "N", "product"])
def _forward(
    gates, x, x_row, c, c_below, cell_row, c0, scale, taps, tap_row, out, out_row, S, N, product,
    H: tl.constexpr, out_from: tl.constexpr, K: tl.constexpr, X: tl.constexpr, BELOW: tl.constexpr, LEFT: tl.constexpr,
    SCALE: tl.constexpr, TAPS: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    s, n = row // N, row % N
    u = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = u < H
    here = gates + row.to(tl.int64) * 4 * H + u
    there = x + u
    if X:
        there += (tl.load(x_row + s).to(tl.int64) * N + n) * 4 * H
    has_product = inside & (s < product)
    i = tl.sigmoid(_sum(here, there, has_product, inside))
    o = tl.sigmoid(_sum(here + H, there + H, has_product, inside))
    g = _tanh(_sum(here + 2 * H, there + 2 * H, has_product, inside))
    f = tl.sigmoid(_sum(here + 3 * H, there + 3 * H, has_product, inside))
    dtype = gates.dtype.element_ty
    tl.store(here, i.to(dtype), mask=inside)
    tl.store(here + H, o.to(dtype), mask=inside)
    tl.store(here + 2 * H, g.to(dtype), mask=inside)
    tl.store(here + 3 * H, f.to(dtype), mask=inside)
    c_new = i * g + f * _c_shifted(c_below, cell_row, c0, s, n, N, H, u, inside, BELOW, LEFT)
    tl.store(c + row.to(tl.int64) * H + u, c_new, mask=inside)
    h = o * _tanh(c_new)
    if OUT:
        place = tl.load(out_row + s)
        where = (place.to(tl.int64) * N + n) * (H - out_from) + u - out_from
        tl.store(out + where, h, mask=inside & (place >= 0) & (u >= out_from))
    if TAPS:
        if SCALE:
            h *= _load(scale + n * H + u, inside)
        _write_taps(taps, tap_row, h, s, n, S, N, H, u, inside, K)


@triton.jit(do_not_specialize=["S", "N", "product"])
def _backward(
    gates, x_row, c, c_below, cell_row, c0, scale, taps, tap_row, out, out_row, dtaps, dc_above, dc_row, dz, dc, dx,
    S, N, product,
    H: tl.constexpr, out_from: tl.constexpr, K: tl.constexpr, X: tl.constexpr, BELOW: tl.constexpr, LEFT: tl.constexpr,
    SCALE: tl.constexpr, TAPS: tl.constexpr, OUT: tl.constexpr, DTAPS: tl.constexpr, ABOVE: tl.constexpr,
    DC: tl.constexpr, DZ: tl.constexpr, DX: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    s, n = row // N, row % N
    u = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = u < H
    here = gates + row.to(tl.int64) * 4 * H + u
    i = _load(here, inside)
    o = _load(here + H, inside)
    g = _load(here + 2 * H, inside)
    f = _load(here + 3 * H, inside)
    t = _tanh(_load(c + row.to(tl.int64) * H + u, inside))
    dh = tl.zeros_like(t)
    if DTAPS:
        for j in tl.static_range(K):
            tap = tl.load(tap_row + j * S + s)
            place = ((tap.to(tl.int64) * N + n) * K + j) * H + u
            dh += _load(dtaps + place, inside & (tap >= 0))
    h = o * t
    if SCALE:
        factor = _load(scale + n * H + u, inside)
        dh *= factor
        h *= factor
    if OUT:
        place = tl.load(out_row + s)
        where = (place.to(tl.int64) * N + n) * (H - out_from) + u - out_from
        dh += _load(out + where, inside & (place >= 0) & (u >= out_from))
    # dL/dc: through h = o tanh(c), and through the cell path of the layer above
    d = dh * o * (1 - t * t)
    if ABOVE:
        reader = tl.load(dc_row + s)
        d += _load(dc_above + (reader.to(tl.int64) * N + n) * H + u, inside & (reader >= 0))
    c_shifted = _c_shifted(c_below, cell_row, c0, s, n, N, H, u, inside, BELOW, LEFT)
    dz_i, dz_o = d * g * i * (1 - i), dh * t * o * (1 - o)
    dz_g, dz_f = d * i * (1 - g * g), d * c_shifted * f * (1 - f)
    if DC:
        tl.store(dc + row.to(tl.int64) * H + u, d * f, mask=inside)
    if TAPS:
        _write_taps(taps, tap_row, h, s, n, S, N, H, u, inside, K)
    place = s.to(tl.int64)
    if X:
        place = tl.load(x_row + s).to(tl.int64)
    there = dx + (place * N + n) * 4 * H + u
    if DX and ADD:
        tl.store(there, _load(there, inside) + dz_i, mask=inside)
        tl.store(there + H, _load(there + H, inside) + dz_o, mask=inside)
        tl.store(there + 2 * H, _load(there + 2 * H, inside) + dz_g, mask=inside)
        tl.store(there + 3 * H, _load(there + 3 * H, inside) + dz_f, mask=inside)
    elif DX:
        tl.store(there, dz_i, mask=inside)
        tl.store(there + H, dz_o, mask=inside)
        tl.store(there + 2 * H, dz_g, mask=inside)
        tl.store(there + 3 * H, dz_f, mask=inside)
    if DZ:
        dtype = dz.dtype.element_ty
        has_product = inside & (s < product)
        rows = dz + row.to(tl.int64) * 4 * H + u
        tl.store(rows, dz_i.to(dtype), mask=has_product)
        tl.store(rows + H, dz_o.to(dtype), mask=has_product)
        tl.store(rows + 2 * H, dz_g.to(dtype), mask=has_product)
        tl.store(rows + 3 * H, dz_f.to(dtype), mask=has_product)


@triton.jit(do_not_specialize=["P", "N"])
def _sum_rows(dx, dz, readers, P, N, GH: tl.constexpr, LAYERS: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    p, n = row // N, row % N
    u = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = u < GH
    there = dx + row.to(tl.int64) * GH + u
    total = tl.zeros_like(u).to(tl.float32)
    if ADD:
        total += _load(there, inside)
    for layer in range(LAYERS):
        reader = tl.load(readers + layer * P + p)
        total += _load(dz + (reader.to(tl.int64) + n) * GH + u, inside & (reader >= 0))
    tl.store(there, total, mask=inside)


KERNELS = {"lstm": (_forward, _backward)}


@triton.jit
def _store_one(target):
    tl.store(target, 1.0)


@functools.lru_cache
def _broken(device: torch.device) -> str:
    """Say why a kernel cannot be compiled and launched on a CUDA device; empty if it can. Tried once per device."""
    try:
        target = torch.empty(1, device=device)
        with _on(target):
            _store_one[(1,)](target)
    except torch.OutOfMemoryError:
        raise
    except Exception as e:  # no C compiler, too old a device, …
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0][:80]
        return f"Triton does not work here ({reason})"
    return ""


def reason_against(device: torch.device, compute: torch.dtype, activation: str) -> str:
    """Say why these kernels cannot run this; empty if they can."""
    if device.type != "cuda" and isinstance(_forward, triton.JITFunction):  # interpreted kernels have another type
        return f"Triton needs a CUDA device, got {device.type}"
    if compute not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its kernels have no {str(compute).removeprefix('torch.')}"
    if activation not in KERNELS:
        return f"its kernels have no {activation} gates"
    return _broken(device) if device.type == "cuda" else ""


def _on(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Make the device of `tensor` the current one, because Triton launches there wherever its arguments are."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def launch_shape(channels: int) -> tuple[int, int]:
    """Return the channels and the warps of a program."""
    block = min(BLOCK, triton.next_power_of_2(channels))
    return block, max(1, WARPS * block // BLOCK)


def _common(step: Step) -> tuple[pruning.Places, tuple[int, int], dict]:
    size, N, GH = step.gates.shape
    H = GH // step.activation.gates
    places = pruning.places(step.layer, step.above, step.gates.device)
    sizes = {"S": size, "N": N, "H": H, "product": step.product, "K": len(step.layer.taps)}
    sizes["BLOCK"], sizes["num_warps"] = launch_shape(H)
    sizes["out_from"] = 0 if step.out is None else H - step.out.size(2)
    flags = {
        "X": step.layer.x is not None, "BELOW": step.c_below is not None, "LEFT": step.c0 is not None,
        "SCALE": step.scale is not None, "TAPS": step.taps is not None, "OUT": step.out is not None,
    }  # fmt: skip
    return places, (size * N, triton.cdiv(H, sizes["BLOCK"])), sizes | flags


def forward(step: Step) -> None:
    """Do the work of :func:`trellisnet.ops.gates.forward`."""
    places, grid, options = _common(step)
    arguments = (
        step.gates, step.x, places.x, step.c, step.c_below, places.cell, step.c0, step.scale, step.taps, places.taps,
        step.out, places.out,
    )  # fmt: skip
    _launch(KERNELS[step.activation.name][0], grid, arguments, options)


def backward(step: Step) -> None:
    """Do the work of :func:`trellisnet.ops.gates.backward`."""
    places, grid, options = _common(step)
    arguments = (
        step.gates, places.x, step.c, step.c_below, places.cell, step.c0, step.scale, step.taps, places.taps, step.out,
        places.out, step.dtaps, step.dc_above, places.dc, step.dz, step.dc, step.dx,
    )  # fmt: skip
    flags = {
        "DTAPS": step.dtaps is not None, "ABOVE": step.dc_above is not None, "DC": step.dc is not None,
        "DZ": step.dz is not None and step.dz.numel() > 0, "DX": step.dx is not None, "ADD": step.add,
    }  # fmt: skip
    _launch(KERNELS[step.activation.name][1], grid, arguments, options | flags)


def sum_rows(dx: torch.Tensor, dz: torch.Tensor, layers: Sequence[tuple[pruning.Layer, int]], add: bool) -> None:
    """Do the work of :func:`trellisnet.ops.gates.sum_rows`, writing `dx` once."""
    P, N, GH = dx.shape
    readers = pruning.readers_of_x(layers, P, N, dx.device)
    block, warps = launch_shape(GH)
    options = {"P": P, "N": N, "GH": GH, "LAYERS": len(layers), "ADD": add, "BLOCK": block, "num_warps": warps}
    _launch(_sum_rows, (P * N, triton.cdiv(GH, block)), (dx, dz, readers), options)


def _launch(kernel, grid: tuple[int, int], arguments: Sequence[torch.Tensor | None], options: dict) -> None:
    if 0 not in grid:
        unused = arguments[0]  # any tensor: a flag keeps the kernel from reading it
        with _on(unused):
            kernel[grid](*(unused if tensor is None else tensor for tensor in arguments), **options)
