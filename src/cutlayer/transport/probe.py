"""Measure the way to a server: round trip, bytes a second up and down, the difference of the clocks.

A call of its own, `/cutlayer.Link/Probe`, apart from any run: it needs a certificate of the same authority, and neither
plan nor session. The bytes sent are random filler. `cutlayer.transport.probe_service` answers.

| code | error | meaning |
| --- | --- | --- |
| E611 | LinkError | the server does not let itself be measured |
"""

from __future__ import annotations

import contextlib
import queue
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

import grpc
import msgspec

from cutlayer.errors import LinkError
from cutlayer.transport.addresses import joined
from cutlayer.transport.certificates import printable
from cutlayer.transport.contact import Target
from cutlayer.transport.control import PROTOCOL, TEXT_MAX
from cutlayer.transport.frames import PIECE
from cutlayer.transport.grpc_common import SERVICE, channel_to
from cutlayer.transport.tls import Credentials

__all__ = ["FILLER_MAX", "PROBE", "TOTAL_MAX", "Answer", "Measured", "Question", "measure"]

PROBE: Final = "Probe"
FILLER_MAX: Final = PIECE
"""The most bytes of filler in one question or answer."""
TOTAL_MAX: Final = 8 * PIECE
"""The most bytes of filler in one call, both ways together."""
_PINGS: Final = 5
_FIRST: Final = 16 * 1024  # bytes that are moved first
_EACH_WAY: Final = TOTAL_MAX // 2  # bytes, in all
_ENOUGH: Final = 0.4  # seconds that a measurement is to take
_LEAST_TIME: Final = 1e-4  # seconds; below that a clock says nothing

_Text = Annotated[str, msgspec.Meta(max_length=TEXT_MAX)]
_Filler = Annotated[bytes, msgspec.Meta(max_length=FILLER_MAX)]


class Question(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a client sends: "hello" asks who is there, "take" brings filler, "give" asks for `size` bytes of it.

    `digest` is that of the contract that the client has, or empty.
    """

    kind: Literal["hello", "take", "give"]
    digest: _Text = ""
    size: Annotated[int, msgspec.Meta(ge=0, le=FILLER_MAX)] = 0
    filler: _Filler = b""


class Answer(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What the server says to each question, in their order.

    `clock` is its time in milliseconds since 1970 UTC; `plan` says whether the client's digest is that of its contract.
    """

    clock: Annotated[int, msgspec.Meta(ge=0, le=2**62)]
    party: _Text
    protocol: Annotated[int, msgspec.Meta(ge=0, le=2**31)]
    release: _Text
    plan: Literal["same", "other", "unknown"]
    filler: _Filler = b""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured. Seconds, and bytes a second.

    Attributes:
        round_trip: The shortest of five.
        up: From here to the server, bytes a second; None if there was no time to measure it.
        down: From the server to here; None likewise.
        ahead: How many seconds the server's clock is ahead of this one's; exact to half a round trip.
        release: The server's release of cutlayer.
        protocol_same: Whether it speaks this version of the protocol.
        plan: Whether it has the contract that was asked about: "same", "other" or "unknown".
    """

    round_trip: float
    up: float | None
    down: float | None
    ahead: float
    release: str
    protocol_same: bool
    plan: str


def measure(
    target: Target,
    credentials: Credentials,
    *,
    digest: str = "",
    seconds: float,
    clock: Callable[[], float] = time.time,
) -> Measured:
    """Measure the way to a server; takes at most about `seconds`.

    Args:
        target: The server, and the proxy on the way to it.
        credentials: This party's.
        digest: Of the contract that the server is asked about.
        seconds: After so many the measurement ends; what is not measured by then is None.
        clock: This machine's clock, in seconds since 1970.

    Raises:
        LinkError: E611, no connection, or the server does not answer.
    """
    deadline = time.monotonic() + seconds
    channel = channel_to(target.party, joined(target.host, target.port), credentials, target.proxy)
    questions: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    try:
        call = channel.stream_stream(f"/{SERVICE}/{PROBE}")(iter(questions.get, None), timeout=seconds)
        talk = _Talk(questions, call)
        found = _converse(talk, digest, deadline, clock)
        talk.end()
        return found
    except (grpc.RpcError, StopIteration, msgspec.MsgspecError) as error:
        raise _unanswered(target, credentials.party, error) from error
    finally:
        questions.put(None)
        channel.close()


class _Talk:
    """A call of questions and answers."""

    def __init__(self, questions: queue.SimpleQueue[bytes | None], call: Any) -> None:  # noqa: ANN401 - grpc has no types
        self._questions, self._call = questions, call

    def ask(self, *questions: Question) -> tuple[list[Answer], float]:
        """Ask all at once; return the answers and the seconds until the last came."""
        texts = [msgspec.msgpack.encode(question) for question in questions]
        begin = time.monotonic()
        for text in texts:
            self._questions.put(text)
        got = [next(self._call) for _ in questions]
        return [msgspec.msgpack.decode(one, type=Answer) for one in got], time.monotonic() - begin

    def end(self) -> None:
        """Wait for the server to end the call, so that it has done with it and takes the next one."""
        self._questions.put(None)
        with contextlib.suppress(grpc.RpcError):  # what was wanted is there
            for _ in self._call:
                continue


def _converse(talk: _Talk, digest: str, deadline: float, clock: Callable[[], float]) -> Measured:
    hello = Question("hello", digest)
    (first,), _ = talk.ask(hello)  # also waits for the connection
    best, ahead = float("inf"), 0.0
    for _ in range(_PINGS):
        before = clock()
        (answer,), seconds = talk.ask(hello)
        if seconds < best:
            best, ahead = seconds, answer.clock / 1000 - (before + seconds / 2)
    up = _rate(lambda size: talk.ask(*_pieces("take", size))[1], best, deadline)
    down = _rate(lambda size: talk.ask(*_pieces("give", size))[1], best, deadline)
    return Measured(
        round_trip=best,
        up=up,
        down=down,
        ahead=ahead,
        release=printable(first.release),
        protocol_same=first.protocol == PROTOCOL,
        plan=first.plan,
    )


def _rate(move: Callable[[int], float], round_trip: float, deadline: float) -> float | None:
    """Return bytes a second, from moving more and more until it takes long enough to be trusted."""
    size, left, speed = _FIRST, _EACH_WAY, None
    try:
        while size and time.monotonic() < deadline:
            seconds = move(size)
            speed, left = size / max(_LEAST_TIME, seconds - round_trip), left - size
            if seconds > _ENOUGH:
                break
            size = min(left, max(2 * size, int(speed * _ENOUGH)))
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
            raise
    return speed


def _pieces(kind: Literal["take", "give"], size: int) -> list[Question]:
    sizes = [min(FILLER_MAX, size - start) for start in range(0, size, FILLER_MAX)]
    if kind == "give":
        return [Question(kind, "", one) for one in sizes]
    return [Question(kind, "", 0, secrets.token_bytes(one)) for one in sizes]  # random: nothing on the way shrinks it


def _unanswered(target: Target, party: str, error: Exception) -> LinkError:
    got = printable(f"{error.code().name.lower()}: {error.details()}") if isinstance(error, grpc.RpcError) else ""
    return LinkError(
        "the server does not let itself be measured",
        where=f"party {party}, server {target.party} at {joined(target.host, target.port)}",
        expected="answers to a probe",
        got=got or "something else",
        remedy="try again in a minute; else let the server's party run `cutlayer doctor --serve` of the same release",
        code="E611",
    )
