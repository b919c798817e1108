"""Matrix products of the fused operator, by one of several routes to the same result.

On an AMD CPU, `torch.mm` in single precision may be half as fast as oneDNN. Torch exposes oneDNN's product only under a
private name, so that route is used only where it exists and works.

Letters: M, K, N rows and columns of any matrices.
"""

import contextlib
import time
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

Product = Callable[[Tensor, Tensor], Tensor]


def _mm(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b.t())


def _onednn(a: Tensor, b: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


ROUTES: dict[str, Product] = {"mm": _mm, "onednn": _onednn}
GEMMS = ("auto", *ROUTES)


def usable(route: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether a route works on this device for this dtype."""
    return route == "mm" or (device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and _works(route, dtype))


@lru_cache
@torch.inference_mode(False)
def _works(route: str, dtype: torch.dtype) -> bool:
    """Return whether the route multiplies a small matrix correctly on the CPU."""
    a = torch.arange(6.0, dtype=dtype, device="cpu").view(2, 3)
    try:
        return torch.equal(ROUTES[route](a, a), a @ a.t())
    except (RuntimeError, AttributeError, NotImplementedError):
        return False


def resolve(route: str, device: torch.device, dtype: torch.dtype) -> Product:
    """Return the product a, b ↦ a · bᵀ of a route, (M, K) and (N, K) to (M, N); `auto` is oneDNN if it works, else mm.

    Raises:
        ValueError: an unknown route, or one that does not work here.
    """
    if route not in GEMMS:
        raise ValueError(f"gemm: expected one of {', '.join(GEMMS)}, got {route!r}")
    if route == "auto":
        route = "onednn" if usable("onednn", device, dtype) else "mm"
    elif not usable(route, device, dtype):
        raise ValueError(f"gemm: {route} does not work with {dtype} on {device.type} here; expected auto or mm")
    return ROUTES[route]


def for_single_rows(device: torch.device, dtype: torch.dtype, product: Product) -> Product:
    """Return the product for matrices of few rows: oneDNN where it works, several times faster with packed weights."""
    return _onednn if usable("onednn", device, dtype) else product


def pack(weight: Tensor, rows: int, product: Product) -> Tensor:
    """Reorder `weight` (N, K) for repeated products with matrices of about `rows` rows.

    oneDNN's layout can only be read by its product; other routes take the weight as it is.
    """
    if product is _onednn and rows and weight.numel():
        with contextlib.suppress(RuntimeError, AttributeError, NotImplementedError):
            return torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return weight


def _wide(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a · b in `dtype`, wider than that of a and b, without rounding to the narrow type in between."""
    return torch.mm(a, b, out_dtype=dtype)


@lru_cache
@torch.inference_mode(False)
def widens(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether products of a 16-bit `dtype` can be returned in float32: on CUDA, by recent versions of torch."""
    if device.type != "cuda" or dtype.itemsize >= 4:
        return False
    a = torch.ones(16, 16, device=device, dtype=dtype)
    try:
        return torch.equal(_wide(a, a, torch.float32), torch.full((16, 16), 16.0, device=device))
    except (RuntimeError, TypeError, NotImplementedError):
        return False


def product_in(dtype: torch.dtype, a: Tensor, b: Tensor, product: Product) -> Tensor:
    """Return a · bᵀ in `dtype`, rounded to the type of a and b first where torch cannot avoid it."""
    if product is _mm and a.dtype != dtype and widens(a.device, a.dtype):
        return _wide(a, b.t(), dtype)
    return product(a, b).to(dtype)


def add_product(target: Tensor, a: Tensor, b: Tensor, product: Product) -> None:
    """Add a · bᵀ to `target` in place, in the type of `target`, by one call where torch can."""
    if product is _mm and target.dtype == a.dtype:
        target.addmm_(a, b.t())
    else:
        target += product_in(target.dtype, a, b, product)


def fastest(device: torch.device, dtype: torch.dtype, rows: int, inputs: int, outputs: int) -> str:
    """Measure which route is fastest for the three products of a layer here; takes a second at most.

    Args:
        rows, inputs, outputs: sizes of the input (rows, inputs), the output (rows, outputs) and the kernel
            (outputs, inputs).
    """
    x, z, w = (
        torch.ones(*shape, device=device).to(dtype) for shape in ((rows, inputs), (rows, outputs), (outputs, inputs))
    )
    matrices = [(x, w), (z, w.t().contiguous()), (z.t(), x.t())]  # output; gradients of input and kernel
    seconds = {}
    for route, product in ROUTES.items():
        if usable(route, device, dtype):
            times = []
            for _ in range(4):  # the first one warms up
                begin = time.perf_counter()
                for a, b in matrices:
                    product(a, b)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                times.append(time.perf_counter() - begin)
            seconds[route] = min(times[1:])
    return min(seconds, key=seconds.get)
