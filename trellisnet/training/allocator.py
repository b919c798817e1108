"""Settings of the C library's memory allocator."""

import ctypes
import sys

# Parameters of mallopt(3) of the GNU C library.
TRIM_THRESHOLD, MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let the process keep the memory it frees, for the next training step; False where the C library cannot.

    Blocks of many megabytes otherwise go back to the system when they are freed, and each new one is cleared page by
    page as it is touched, which may take longer than the computation in it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return mallopt is not None and bool(mallopt(MMAP_MAX, 0)) and bool(mallopt(TRIM_THRESHOLD, -1))
