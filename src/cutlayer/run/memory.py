"""Memory of a party's process: what is freed is kept for the next batch."""

from __future__ import annotations

import ctypes

__all__ = ["keep_freed_memory"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
_KEPT = 128 * 2**20
_HEAP = 32 * 2**20  # glibc allows no more


def keep_freed_memory() -> bool:
    """Let glibc keep up to 128 MB of freed memory, and take blocks up to 32 MB from it; False where there is no glibc.

    Otherwise it gives each tensor that arrived back to the system, and the next one of this size costs a page fault
    every 4 KB: a tenth of a step whose cut carries 784 KB. Bits do not change.
    """
    try:
        change = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(change(_M_TRIM_THRESHOLD, _KEPT)) and bool(change(_M_MMAP_THRESHOLD, _HEAP))
