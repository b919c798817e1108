"""The gates of :mod:`trellisnet.ops.gates` as Triton kernels: one pass over memory, for LSTM gates on CUDA.

Imported only when it is asked for, because `triton` is an extra. With the environment variable TRITON_INTERPRET=1 the
kernels run on the CPU, slowly, which is how they are tested without a GPU.

A program computes BLOCK channels of one row, a row being a (position, sequence). What the arguments are is said by
:class:`trellisnet.ops.gates.Step`; index arrays come from :func:`trellisnet.ops.pruning.places`.
"""

import contextlib
import functools

import torch
import triton
import triton.language as tl

from trellisnet.ops import pruning
from trellisnet.ops.gates import Step

BLOCK = 512  # channels of a program: loads are 8 or 16 bytes wide, and of 1,400 channels few places are left over
WARPS = 4  # of a program


@triton.jit
def _tanh(x):
    """From exp(−2|x|), which does not overflow; by its series where the difference from one would lose digits."""
    size = tl.abs(x)
    e = tl.exp(-2 * size)
    large = (1 - e) / (1 + e)
    s = x * x
    small = size * (1 + s * (-1.0 / 3 + s * (2.0 / 15 + s * (-17.0 / 315 + s * (62.0 / 2835)))))
    result = tl.where(size < 0.25, small, large)
    return tl.where(x < 0, -result, result)


@triton.jit
def _load(pointer, mask):
    """Numbers in single precision; zero where the mask is not."""
    return tl.where(mask, tl.load(pointer, mask=mask).to(tl.float32), 0.0)


@triton.jit
def _sum(product, x, made, inside):
    """What goes into a gate."""
    return _load(product, made) + _load(x, inside)


@triton.jit
def _before(c_below, cell_row, c0, s, n, N, H: tl.constexpr, u, inside, BELOW: tl.constexpr, LEFT: tl.constexpr):
    """What the cell path reads: a row of the layer below, what lies before the first step, or zero."""
    row = tl.load(cell_row + s)
    before = tl.zeros_like(u).to(tl.float32)
    if BELOW:
        before += _load(c_below + (row.to(tl.int64) * N + n) * H + u, inside & (row >= 0))
    if LEFT:
        before += _load(c0 + n * H + u, inside & (row < 0))
    return before


@triton.jit
def _write_taps(taps, tap_row, h, s, n, S, N, H: tl.constexpr, u, inside, K: tl.constexpr):
    """h, masked, to every tap of the layer above that reads it."""
    for j in tl.static_range(K):
        row = tl.load(tap_row + j * S + s)
        place = ((row.to(tl.int64) * N + n) * K + j) * H + u
        tl.store(taps + place, h.to(taps.dtype.element_ty), mask=inside & (row >= 0))


# H is a constant, so that the compiler knows which rows begin where wide loads may; one kernel for every length.
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
    made = inside & (s < product)
    i = tl.sigmoid(_sum(here, there, made, inside))
    o = tl.sigmoid(_sum(here + H, there + H, made, inside))
    g = _tanh(_sum(here + 2 * H, there + 2 * H, made, inside))
    f = tl.sigmoid(_sum(here + 3 * H, there + 3 * H, made, inside))
    kind = gates.dtype.element_ty
    tl.store(here, i.to(kind), mask=inside)
    tl.store(here + H, o.to(kind), mask=inside)
    tl.store(here + 2 * H, g.to(kind), mask=inside)
    tl.store(here + 3 * H, f.to(kind), mask=inside)
    now = i * g + f * _before(c_below, cell_row, c0, s, n, N, H, u, inside, BELOW, LEFT)
    tl.store(c + row.to(tl.int64) * H + u, now, mask=inside)
    h = o * _tanh(now)
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
    DC: tl.constexpr, DZ: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
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
    before = _before(c_below, cell_row, c0, s, n, N, H, u, inside, BELOW, LEFT)
    dz_i, dz_o = d * g * i * (1 - i), dh * t * o * (1 - o)
    dz_g, dz_f = d * i * (1 - g * g), d * before * f * (1 - f)
    if DC:
        tl.store(dc + row.to(tl.int64) * H + u, d * f, mask=inside)
    if TAPS:
        _write_taps(taps, tap_row, h, s, n, S, N, H, u, inside, K)
    place = s.to(tl.int64)
    if X:
        place = tl.load(x_row + s).to(tl.int64)
    there = dx + (place * N + n) * 4 * H + u
    if ADD:
        tl.store(there, _load(there, inside) + dz_i, mask=inside)
        tl.store(there + H, _load(there + H, inside) + dz_o, mask=inside)
        tl.store(there + 2 * H, _load(there + 2 * H, inside) + dz_g, mask=inside)
        tl.store(there + 3 * H, _load(there + 3 * H, inside) + dz_f, mask=inside)
    else:
        tl.store(there, dz_i, mask=inside)
        tl.store(there + H, dz_o, mask=inside)
        tl.store(there + 2 * H, dz_g, mask=inside)
        tl.store(there + 3 * H, dz_f, mask=inside)
    if DZ:
        kind = dz.dtype.element_ty
        made = inside & (s < product)
        rows = dz + row.to(tl.int64) * 4 * H + u
        tl.store(rows, dz_i.to(kind), mask=made)
        tl.store(rows + H, dz_o.to(kind), mask=made)
        tl.store(rows + 2 * H, dz_g.to(kind), mask=made)
        tl.store(rows + 3 * H, dz_f.to(kind), mask=made)


KERNELS = {"lstm": (_forward, _backward)}


@triton.jit
def _nothing(numbers):
    tl.store(numbers, 1.0)


@functools.lru_cache
def _broken(device: torch.device) -> str:
    """Why no kernel can be compiled and launched on a CUDA device; empty if one can. Tried once."""
    try:
        numbers = torch.empty(1, device=device)
        with _on(numbers):
            _nothing[(1,)](numbers)
    except torch.OutOfMemoryError:
        raise
    except Exception as e:  # there is no C compiler, the device is too old, …
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0][:80]
        return f"Triton does not work here ({reason})"
    return ""


def reason_against(device: torch.device, compute: torch.dtype, activation: str) -> str:
    """Why these kernels cannot run this; empty if they can."""
    if device.type != "cuda" and isinstance(_forward, triton.JITFunction):  # else it is interpreted
        return f"Triton needs a CUDA device, not {device.type}"
    if compute not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its kernels have no {str(compute).removeprefix('torch.')}"
    if activation not in KERNELS:
        return f"its kernels have no {activation} gates"
    return _broken(device) if device.type == "cuda" else ""


def _on(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, whatever that of its arguments is."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _common(step: Step) -> tuple[pruning.Places, tuple[int, int], dict]:
    size, N, GH = step.gates.shape
    H = GH // step.activation.gates
    places = pruning.places(step.layer, step.above, step.gates.device)
    sizes = {"S": size, "N": N, "H": H, "product": step.product, "K": len(step.layer.taps)}
    sizes |= {"BLOCK": BLOCK, "num_warps": WARPS}
    sizes["out_from"] = 0 if step.out is None else H - step.out.size(2)
    flags = {
        "X": step.layer.x is not None, "BELOW": step.c_below is not None, "LEFT": step.c0 is not None,
        "SCALE": step.scale is not None, "TAPS": step.taps is not None, "OUT": step.out is not None,
    }  # fmt: skip
    return places, (size * N, triton.cdiv(H, BLOCK)), sizes | flags


def forward(step: Step) -> None:
    """As :func:`trellisnet.ops.gates.forward`."""
    places, grid, options = _common(step)
    if 0 in grid:
        return
    some = step.gates  # stands for what is not there
    given = [step.c_below, places.cell, step.c0, step.scale, step.taps, places.taps, step.out, places.out]
    given = [some if tensor is None else tensor for tensor in given]
    kernel, _ = KERNELS[step.activation.name]
    with _on(some):
        kernel[grid](some, step.x, some if places.x is None else places.x, step.c, *given, **options)


def backward(step: Step) -> None:
    """As :func:`trellisnet.ops.gates.backward`."""
    places, grid, options = _common(step)
    if 0 in grid:
        return
    some = step.gates
    given = [
        step.gates, places.x, step.c, step.c_below, places.cell, step.c0, step.scale, step.taps, places.taps, step.out,
        places.out, step.dtaps, step.dc_above, places.dc, step.dz, step.dc, step.dx,
    ]  # fmt: skip
    flags = {
        "DTAPS": step.dtaps is not None, "ABOVE": step.dc_above is not None, "DC": step.dc is not None,
        "DZ": step.dz is not None and step.dz.numel() > 0, "ADD": step.add,
    }  # fmt: skip
    _, kernel = KERNELS[step.activation.name]
    with _on(some):
        kernel[grid](*(some if tensor is None else tensor for tensor in given), **options, **flags)
