"""One thread that tells people what happens: whatever they do with it, the network goes on."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import Final

__all__ = ["Notifier", "Notify"]

Notify = Callable[[str, Mapping[str, object]], None]
_WAITING_MAX: Final = 1000  # events that wait for a callback that does not return; further ones are dropped


class Notifier:
    """Calls back with one event after the other.

    Args:
        name: Of the thread.
        notify: Called in that thread. May take long: events wait, up to a bound.
        failed: Called in that thread with what `notify` raised.
    """

    def __init__(self, name: str, notify: Notify, failed: Callable[[BaseException], None]) -> None:
        """Make the thread; `start` starts it."""
        self._notify, self._failed = notify, failed
        self._changed = threading.Condition()
        self._waiting: deque[tuple[str, Mapping[str, object]]] = deque()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def post(self, name: str, facts: Mapping[str, object]) -> None:
        """Call back soon, in the order of posting; returns at once."""
        with self._changed:
            if len(self._waiting) < _WAITING_MAX:
                self._waiting.append((name, facts))
                self._changed.notify()

    def close(self, seconds: float) -> None:
        """Wait until all that was posted was told, for at most some seconds. Not from within the callback."""
        with self._changed:
            again, self._closed = self._closed, True
            self._changed.notify()
        if self._thread.ident is not None and not again:
            self._thread.join(seconds)

    def _run(self) -> None:
        while (event := self._next()) is not None:
            try:
                self._notify(*event)
            except Exception as error:
                self._failed(error)

    def _next(self) -> tuple[str, Mapping[str, object]] | None:
        with self._changed:
            while not (self._waiting or self._closed):
                self._changed.wait()
            return self._waiting.popleft() if self._waiting else None
