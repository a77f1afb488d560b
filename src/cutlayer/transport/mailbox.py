"""Frames that have arrived and wait to be taken, by source and tag. Safe for threads.

| code | error | meaning |
| --- | --- | --- |
| E530 | ContractError | a party sent more than can be under way, or a tag twice |
| E621 | DeadlineError | the frame did not come in time |
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Mapping
from contextlib import suppress

from cutlayer.core.program import Tag
from cutlayer.engine.wire import Frame
from cutlayer.errors import ContractError, DeadlineError
from cutlayer.transport.vigil import Vigil

__all__ = ["Mailbox"]


class Mailbox:
    """The frames of one session.

    Args:
        party: Who receives; for messages.
        bounds: Source -> the most frames of it that may wait at once; others may send nothing.
        vigil: Says how long who waits stays awake; None: not at all.
    """

    def __init__(self, party: str, bounds: Mapping[str, int], vigil: Vigil | None = None) -> None:
        """Start empty."""
        self._party, self.vigil = party, vigil or Vigil(0)
        self._bounds = dict(bounds)
        self._frames: dict[str, dict[Tag, Frame]] = {source: {} for source in bounds}
        self._lock = threading.Lock()
        self._bells: list[queue.SimpleQueue[None]] = []  # of those who wait: these wake them sooner than a condition
        self._failure: BaseException | None = None

    def check(self, source: str, tag: Tag) -> None:
        """Raise `ContractError` E530 if this frame would be one too many, or is there already."""
        with self._lock:
            held = self._frames.get(source)
            if held is None or tag in held or len(held) >= self._bounds[source]:
                raise self._refusal(source, tag)

    def put(self, source: str, frame: Frame) -> None:
        """Keep a frame until it is taken, unless all has failed. Raises `ContractError` E530 as `check` does."""
        with self._lock:
            if self._failure is not None:
                return
            held = self._frames.get(source)
            if held is None or frame.tag in held or len(held) >= self._bounds[source]:
                raise self._refusal(source, frame.tag)
            held[frame.tag] = frame
            if self._bells:
                self._ring()

    def take(self, source: str, tag: Tag, seconds: float) -> Frame:
        """Wait for a frame and remove it.

        Raises:
            DeadlineError: E621, it did not come within `seconds`; names source and tag.
            BaseException: what `fail` was given, before or while this waits.
        """
        begin, held = time.monotonic(), self._frames.get(source, {})
        deadline = begin + seconds
        if tag not in held:
            self.vigil.watch(lambda: tag in held or self._failure is not None)
        while True:
            with self._lock:
                if self._failure is not None:
                    raise self._failure
                frame = held.pop(tag, None)
                if frame is not None:
                    break
                left = deadline - time.monotonic()
                if left <= 0:
                    raise _late(self._party, source, tag, seconds)
                bell: queue.SimpleQueue[None] = queue.SimpleQueue()
                self._bells.append(bell)
            with suppress(queue.Empty):
                bell.get(timeout=left)
                continue
            with self._lock, suppress(ValueError):
                self._bells.remove(bell)
        self.vigil.took(time.monotonic() - begin)
        return frame

    def fail(self, failure: BaseException) -> None:
        """Make every `take`, waiting or to come, raise this; the first failure stays. Drops all frames."""
        with self._lock:
            if self._failure is None:
                self._failure = failure
            for frames in self._frames.values():
                frames.clear()
            self._ring()

    def _ring(self) -> None:
        """Wake all who wait; the lock is held."""
        for bell in self._bells:
            bell.put(None)
        self._bells.clear()

    def _refusal(self, source: str, tag: Tag) -> ContractError:
        held, bound = self._frames.get(source, {}), self._bounds.get(source, 0)
        return ContractError(
            f"{source!r} sent a frame twice" if tag in held else f"{source!r} sent more than can be under way",
            where=f"party {self._party}, {place(tag)}",
            expected=f"at most {bound} frames at once, each of them once",
            got=f"{len(held)} waiting",
            remedy="the sender breaks the contract: stop, and compare its plan and release with yours",
            code="E530",
        )


def place(tag: Tag) -> str:
    """Return a tag as people read it."""
    return (
        f"{tag.mode} round {tag.round}, step {tag.step}, edge {tag.edge}, lane {tag.lane}, "
        f"microbatch {tag.micro}, {tag.direction}"
    )


def _late(party: str, source: str, tag: Tag, seconds: float) -> DeadlineError:
    return DeadlineError(
        f"{source!r} did not send in time",
        where=f"party {party}, waiting for {place(tag)}",
        expected=f"a frame within {seconds:g} seconds",
        remedy=f"look at {source}'s terminal; if its steps take longer than this, raise deadlines.receive",
        code="E621",
    )
