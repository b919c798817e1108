"""Optional C library for the CPU: LSTM gates, and products of a few rows.

gates.c computes the gates of :mod:`trellisnet.ops.gates` in one pass over memory, for products in float32 or bfloat16.
product.c multiplies a few rows, as a step of a stream needs, as fast as the matrix can be read from memory.

`pip install -e .` builds the library if there is a C compiler. It is optional: it makes the gates faster and changes
results only by rounding.
"""

import ctypes
import hashlib
import itertools
from functools import lru_cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trellisnet.ops import pruning
from trellisnet.ops.gates import Step

SOURCES = ("common.h", "gates.c", "gates.h", "product.c")
# Functions of gates.c by activation: forward, backward.
KERNELS = {"lstm": ("trellis_gates_forward", "trellis_gates_backward")}
FEW = 4  # rows up to which product.c is the fastest
BLOCK = 64  # that of product.c
# Index arrays: name in gates.c → name in pruning.Places.
ROWS = {"x_row": "x", "cell_row": "cell", "out_row": "out", "dc_row": "dc", "tap_row": "taps"}
HERE = Path(__file__).parent
POINTER = ctypes.c_void_p


class _Arguments(ctypes.Structure):
    """`Layer` of gates.c."""

    _fields_ = [(name, ctypes.c_int64) for name in ("S", "N", "H", "k", "product")] + [
        (name, ctypes.c_int64 if name in ("out_from", "add") else POINTER)
        for name in (
            "gates", "x", "x_row", "c", "c_below", "cell_row", "c0", "scale", "taps", "tap_row", "out", "out_row",
            "out_from", "dtaps", "dc_above", "dc_row", "dz", "dc", "dx", "add",
        )
    ]  # fmt: skip


class _Product(ctypes.Structure):
    """`Product` of product.c."""

    _fields_ = [(name, ctypes.c_int64) for name in ("N", "inputs", "outputs")] + [
        (name, POINTER) for name in ("w", "x", "y", "copy")
    ]


def fingerprint(folder: Path = HERE) -> str:
    """Return the digest of the C source, which setup.py builds into the library."""
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in SOURCES)).hexdigest()[:16]


@lru_cache
def _library() -> ctypes.CDLL | str:
    """Load the library, or return the reason why there is none."""
    path = next((p for suffix in EXTENSION_SUFFIXES if (p := HERE / f"_compiled{suffix}").exists()), None)
    if path is None:
        return "it has not been built (pip install -e . builds it where there is a C compiler)"
    try:
        library = ctypes.CDLL(str(path))
        library.trellis_gates_source.restype = ctypes.c_char_p
        if library.trellis_gates_source().decode() != fingerprint():
            return "it was built from another version of its source (pip install -e . builds it again)"
        for name in itertools.chain(*KERNELS.values()):
            function = getattr(library, name)
            function.argtypes, function.restype = [ctypes.POINTER(_Arguments), ctypes.c_int, ctypes.c_int], None
        library.trellis_product.argtypes = [ctypes.POINTER(_Product), ctypes.c_int, ctypes.c_int]
        library.trellis_product.restype = None
    except (OSError, AttributeError) as e:
        return f"it cannot be loaded ({e})"
    return library


def reason_against(device: torch.device, compute: torch.dtype, activation: str) -> str:
    """Say why the compiled gates cannot run this; empty if they can."""
    if device.type != "cpu":
        return f"it does not run on {device.type}"
    if compute not in (torch.float32, torch.bfloat16):
        return f"it has no {str(compute).removeprefix('torch.')}"
    if activation not in KERNELS:
        return f"it has no {activation} gates"
    library = _library()
    return library if isinstance(library, str) else ""


def _arguments(step: Step) -> tuple[_Arguments, list[Tensor]]:
    """Return the structure, and the tensors it points into, which must outlive it."""
    places, arguments, tensors = pruning.places(step.layer, step.above, torch.device("cpu")), _Arguments(), []

    def point(name: str, tensor: Tensor, dtype: torch.dtype = torch.float32) -> None:
        if tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(f"{name}: expected contiguous {dtype}, got {tensor.dtype} with {tensor.stride()}")
        tensors.append(tensor)
        setattr(arguments, name, tensor.data_ptr())

    size, N, GH = step.gates.shape
    real, H = step.gates.dtype, GH // step.activation.gates
    arguments.S, arguments.N, arguments.H, arguments.product = size, N, H, step.product
    arguments.k = len(step.layer.taps)
    for name in ("gates", "x", "taps", "dtaps", "dz"):
        if (tensor := getattr(step, name)) is not None:
            point(name, tensor, real)
    for name in ("c", "c_below", "c0", "scale", "out", "dc_above", "dc", "dx"):
        if (tensor := getattr(step, name)) is not None:
            point(name, tensor)
    for name, place in ROWS.items():
        if (tensor := getattr(places, place)) is not None:
            point(name, tensor, torch.int32)
    arguments.add = step.add
    arguments.out_from = 0 if step.out is None else H - step.out.size(2)
    return arguments, tensors


def _run(name: str, step: Step) -> None:
    arguments, tensors = _arguments(step)
    function = getattr(_library(), name)
    function(ctypes.byref(arguments), step.gates.dtype == torch.bfloat16, torch.get_num_threads())
    del tensors  # alive until here


def forward(step: Step) -> None:
    """Do the work of :func:`trellisnet.ops.gates.forward`."""
    _run(KERNELS[step.activation.name][0], step)


def backward(step: Step) -> None:
    """Do the work of :func:`trellisnet.ops.gates.backward`."""
    _run(KERNELS[step.activation.name][1], step)


class Packed(NamedTuple):
    """A matrix (outputs, inputs) in the layout of product.c, float32 or bfloat16."""

    blocks: Tensor
    outputs: int


def pack(weight: Tensor) -> Packed:
    """Pack `weight` (outputs, inputs), float32 or bfloat16, for :func:`add_product`."""
    outputs, inputs = weight.shape
    weight = F.pad(weight, (0, inputs % 2, 0, -outputs % BLOCK))
    pair = 1 if weight.dtype == torch.float32 else 2
    blocks = weight.view(-1, BLOCK, weight.size(1) // pair, pair).transpose(1, 2)
    return Packed(blocks.contiguous(), outputs)


def add_product(target: Tensor, rows: Tensor, weight: Packed) -> None:
    """Add rows (N, inputs) · weightᵀ to target (N, outputs) in place; sums are in float32.

    Raises:
        ValueError: the three differ in dtype, are not contiguous, or do not fit in size.
    """
    N, inputs, blocks = *rows.shape, weight.blocks
    even = blocks.size(1) * blocks.size(3)
    for name, tensor, shape in (("target", target, (N, weight.outputs)), ("rows", rows, (N, even - inputs % 2))):
        if tensor.shape != shape or tensor.dtype != blocks.dtype or not tensor.is_contiguous():
            raise ValueError(f"{name}: expected contiguous {blocks.dtype} {shape}, got {tensor.dtype} {tensor.shape}")
    copy = rows.new_empty(N, even, dtype=torch.float32)
    pointers = (tensor.data_ptr() for tensor in (blocks, rows, target, copy))
    arguments = _Product(N, inputs, weight.outputs, *pointers)
    _library().trellis_product(ctypes.byref(arguments), blocks.dtype == torch.bfloat16, torch.get_num_threads())
