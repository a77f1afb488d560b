"""Answer probes of those who have a certificate of this authority: a little, and not too often. See `probe`.

A probe touches no run: it reads and changes nothing of one. Whoever asks learns this party's name, clock and release,
and whether the contract that they have is the same.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Final

import grpc
import msgspec

from cutlayer.transport.control import PROTOCOL
from cutlayer.transport.handshake import release
from cutlayer.transport.probe import TOTAL_MAX, Answer, Question

__all__ = ["CALLS_AT_ONCE", "ProbeService"]

CALLS_AT_ONCE: Final = 2
"""Probes that are answered at one time, of all parties together."""
_QUESTIONS_MAX: Final = 256  # of one call
_LONGEST: Final = 20.0  # seconds that a call may take
_WINDOW: Final = 60.0  # seconds
_CALLS_IN_WINDOW: Final = 12  # of one party
_NAMES_MAX: Final = 1000  # parties that are remembered for that


class ProbeService:
    """Answers probes.

    Args:
        party: This party.
        digest: Of its contract; it is compared and never told.
        name_of: Returns whom a call comes from, by certificate; empty refuses it.
    """

    def __init__(self, party: str, digest: str, name_of: Callable[[Any], str]) -> None:
        """Nothing is opened: `answer` is for a gRPC server."""
        self._party, self._digest, self._name_of = party, digest, name_of
        self._lock = threading.Lock()
        self._busy: set[str] = set()
        self._begun: dict[str, deque[float]] = {}

    def answer(self, incoming: Iterator[bytes], context: Any) -> Iterator[bytes]:  # noqa: ANN401 - grpc has no types
        """Serve one call."""
        name = self._name_of(context)
        if not name:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "no certificate with one name")
        refusal = self._enter(name)
        if refusal:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, refusal)
        timer = threading.Timer(_LONGEST, context.cancel)
        timer.daemon = True
        timer.start()
        try:
            yield from self._answers(incoming, context)
        except grpc.RpcError:
            return
        finally:
            timer.cancel()
            with self._lock:
                self._busy.discard(name)

    def _enter(self, name: str) -> str:
        """Return why this party may not probe now; empty if it may, and now does."""
        now = time.monotonic()
        with self._lock:
            for known in [known for known, times in self._begun.items() if now - times[-1] > _WINDOW]:
                del self._begun[known]
            times = self._begun.setdefault(name, deque(maxlen=_CALLS_IN_WINDOW))
            if name in self._busy or len(self._busy) >= CALLS_AT_ONCE:
                refusal = "another probe is being answered"
            elif len(times) == _CALLS_IN_WINDOW and now - times[0] < _WINDOW:
                refusal = f"more than {_CALLS_IN_WINDOW} probes in {_WINDOW:g} seconds"
            elif len(self._begun) > _NAMES_MAX:
                refusal = "too many parties"
            else:
                times.append(now)
                self._busy.add(name)
                return ""
            if not times:
                del self._begun[name]
            return refusal

    def _answers(self, incoming: Iterator[bytes], context: Any) -> Iterator[bytes]:  # noqa: ANN401
        passed = 0
        for number, data in enumerate(incoming):
            try:
                question = msgspec.msgpack.decode(data, type=Question)
            except (msgspec.MsgspecError, ValueError, RecursionError):
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no question of a probe")
            size = question.size if question.kind == "give" else 0
            passed += size + len(question.filler)
            if passed > TOTAL_MAX or number >= _QUESTIONS_MAX:
                context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"more than {TOTAL_MAX} bytes in one probe")
            plan = "unknown" if not question.digest else "same" if question.digest == self._digest else "other"
            clock = time.time_ns() // 1_000_000
            yield msgspec.msgpack.encode(
                Answer(clock, self._party, PROTOCOL, release(), plan, secrets.token_bytes(size))  # type: ignore[arg-type]
            )
