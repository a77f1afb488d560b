"""One thread that calls functions: at once, in the order given, or after some time."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["Timer", "Timers"]


@dataclass(order=True)
class Timer:
    """A call to come, at a time of the monotonic clock."""

    at: float
    number: int
    call: Callable[[], None] | None = field(compare=False)

    def cancel(self) -> None:
        """Do not call, unless that has begun."""
        self.call = None


class Timers:
    """Calls are made one after the other, so they must be short.

    Args:
        name: Of the thread.
        failed: Called in that thread with what a call raised.
    """

    def __init__(self, name: str, failed: Callable[[BaseException], None]) -> None:
        """Make the thread; `start` starts it."""
        self._failed = failed
        self._changed = threading.Condition()
        self._posted: deque[Callable[[], None]] = deque()
        self._timers: list[Timer] = []
        self._numbers = itertools.count()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def post(self, call: Callable[[], None]) -> None:
        """Call soon, in the order of posting."""
        with self._changed:
            self._posted.append(call)
            self._changed.notify()

    def after(self, seconds: float, call: Callable[[], None]) -> Timer:
        """Call after some seconds, unless the timer is cancelled or all is closed before."""
        timer = Timer(time.monotonic() + seconds, next(self._numbers), call)
        with self._changed:
            heapq.heappush(self._timers, timer)
            self._changed.notify()
        return timer

    def close(self, seconds: float) -> None:
        """Make the posted calls, forget the timers, and wait for the thread. Not from within a call."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join(seconds)

    def _run(self) -> None:
        while (call := self._next()) is not None:
            try:
                call()
            except Exception as error:
                self._failed(error)

    def _next(self) -> Callable[[], None] | None:
        with self._changed:
            while True:
                if self._posted:
                    return self._posted.popleft()
                if self._closed:
                    return None
                while self._timers and self._timers[0].call is None:
                    heapq.heappop(self._timers)
                left = self._timers[0].at - time.monotonic() if self._timers else None
                if left is not None and left <= 0:
                    call = heapq.heappop(self._timers).call
                    if call is not None:
                        return call
                    continue
                self._changed.wait(left)
