"""Waiting without going to sleep, where what is waited for usually comes at once.

A thread that sleeps is woken late: the processor has left its fast states meanwhile, on a virtual machine the host has
given it to others, and the caches hold something else. Of a small step this costs more than the messages themselves.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Final

__all__ = ["Vigil"]

_WEIGHT: Final = 0.125  # of the last wait, in what is usual
_OUTLIER: Final = 4  # times `longest`: no single wait counts for more, such as that for a checkpoint
_yield: Final[Callable[[], object] | None] = getattr(os, "sched_yield", None)
_one = threading.Lock()  # of a process's threads one may stay awake: it takes the interpreter's lock from the others


class Vigil:
    """How long one party stays awake in a wait: twice as long as is usual, if that is short, and else not at all.

    Args:
        longest: A usual wait up to this, in seconds, is short. 0: always sleep.
    """

    def __init__(self, longest: float) -> None:
        """Begin awake, if there are processors for two threads."""
        self._longest = longest if _yield is not None and _processors() > 1 else 0.0
        self._usual = self._longest

    def watch(self, come: Callable[[], bool]) -> None:
        """Return as soon as `come` says so, or when it is time to go to sleep. Leaves the processor to who wants it.

        `come` is called often, and takes no lock.
        """
        if not 0 < self._usual <= self._longest or _yield is None or not _one.acquire(blocking=False):
            return
        try:
            until = time.monotonic() + 2 * self._usual
            while not come() and time.monotonic() < until:
                _yield()
        finally:
            _one.release()

    def took(self, seconds: float) -> None:
        """Note how long a wait was, asleep or awake."""
        self._usual += (min(seconds, _OUTLIER * self._longest) - self._usual) * _WEIGHT


def _processors() -> int:
    affinity: Callable[[int], set[int]] | None = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1
