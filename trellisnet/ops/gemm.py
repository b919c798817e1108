"""Matrix products of the fused operator, by one of several routes to the same result.

On a CPU `torch.mm` in single precision may be half as fast as oneDNN on the same machine (AMD), and torch offers
oneDNN's product only under a private name; so that route is used if it is there and works, and nothing depends on it.

Letters: M, K, N rows and columns of any matrices.
"""

import time
from collections.abc import Callable

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
    """Whether a route gives right products here."""
    if route == "mm":
        return True
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return False
    a = torch.arange(6.0, dtype=dtype).view(2, 3)
    try:
        return torch.equal(ROUTES[route](a, a), a @ a.t())
    except (RuntimeError, AttributeError, NotImplementedError):
        return False


def resolve(route: str, device: torch.device, dtype: torch.dtype) -> Product:
    """The product a, b ↦ a · bᵀ of a route, (M, K) and (N, K) to (M, N); `auto`: oneDNN where it works, else `mm`.

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


def fastest(device: torch.device, dtype: torch.dtype, shapes: list[tuple[int, int, int]]) -> str:
    """The route that is fastest for products of these shapes (M, K, N) here, measured in a fraction of a second."""
    seconds = {}
    factory = {"device": device, "dtype": dtype}
    matrices = [(torch.ones(M, K, **factory), torch.ones(N, K, **factory)) for M, K, N in shapes]
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
