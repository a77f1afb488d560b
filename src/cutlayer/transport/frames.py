"""Frames as the messages of a stream, and back. Sans-I/O: bytes go in, complete frames come out.

A frame is one message with header, control part and the first piece of the payload, then one message a further piece.
Every piece but the last has exactly `PIECE` bytes. Small frames may go together in one message. The receiver takes
memory once, after all checks, and fills it.

| code | error | meaning |
| --- | --- | --- |
| E512 | WireError | a message does not have the size that its frame announced |
| E513 | WireError | a frame of this kind may not be here, or not of this size |
| E514 | WireError | the frame belongs to another run |
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Final

import msgspec
import numpy as np

from cutlayer.engine.wire import (
    HEADER,
    KIND_DATA,
    PAYLOAD_MAX,
    Buffer,
    Frame,
    Header,
    Label,
    parse_control,
    parse_header,
)
from cutlayer.errors import WireError
from cutlayer.transport import control
from cutlayer.transport.seal import OFFER_LIMIT

__all__ = [
    "MESSAGE_MAX",
    "PIECE",
    "RELAY_PIECE",
    "Arrival",
    "Assembler",
    "flat",
    "further",
    "messages",
    "opening",
    "run_number",
]

PIECE: Final = 2**20
"""Payload bytes of a message on a stream."""
RELAY_PIECE: Final = PIECE - 2**16 - 2**12
"""Payload bytes of a relayed message, which with header, control part and seal must fit into one piece."""
MESSAGE_MAX: Final = 2 * PIECE
"""Longest message that a stream carries, in bytes."""
LIMITS: Final[Mapping[tuple[int, bool], int]] = {
    **{(kind, kind not in control.UNNUMBERED): 0 for kind in control.KINDS},
    (control.ABORT, False): 0,  # as a refusal, it belongs to no link
    (control.RELAY, True): PIECE,
    (control.SEAL_OFFER, True): OFFER_LIMIT,
    (KIND_DATA, True): PAYLOAD_MAX,  # checked against the program
}
"""Longest payload by kind and whether the frame is numbered; others there are not."""
_NOTHING: Final = memoryview(bytearray())
_LONG: Final = 2**16  # bytes


def run_number(run: str) -> int:
    """Return what the frames of this run carry: the first eight bytes of the SHA-256 of its name."""
    return int.from_bytes(hashlib.sha256(run.encode()).digest()[:8], "little")


def opening(header: Header, part: bytes, payload: Buffer, *, piece: int = PIECE) -> tuple[Buffer, ...]:
    """Return what a frame's first message consists of. `part` is the control part.

    Header and payload must agree on the payload's length.
    """
    return header.pack(), part, flat(payload)[:piece]


def further(payload: Buffer, *, piece: int = PIECE) -> Iterator[bytes]:
    """Yield a frame's further messages, each made only when it is asked for."""
    view = flat(payload)
    for start in range(piece, view.nbytes, piece):
        yield bytes(view[start : start + piece])


def messages(header: Header, part: bytes, payload: Buffer, *, piece: int = PIECE) -> Iterator[bytes]:
    """Yield all messages of a frame, each made only when it is asked for."""
    yield b"".join(opening(header, part, payload, piece=piece))
    yield from further(payload, piece=piece)


def flat(payload: Buffer) -> memoryview:
    """Return a payload as single bytes."""
    view = memoryview(payload)
    return view.cast("B") if view.nbytes else memoryview(b"")


class Arrival(msgspec.Struct):
    """A frame that comes in.

    Attributes:
        header, control: As they came.
        payload: Writable, in memory of its own; empty until it is complete, or if `skipped`.
        label: What a data frame says of itself: tag, dtype, shape, order.
        skipped: It is not wanted.
    """

    header: Header
    control: bytes
    payload: memoryview
    label: Label | None = None
    skipped: bool = False

    @property
    def frame(self) -> Frame:
        """Return a data frame. Raises TypeError for another kind."""
        if self.label is None:
            raise TypeError(f"kind {self.header.kind}")
        tag, dtype, shape, order = self.label
        return Frame(tag, dtype, shape, self.payload, order).came_with(self.control)


Accept = Callable[[Arrival], bool | None]


class Assembler:
    """Puts frames together from the messages of one stream.

    Args:
        run: The run's number; frames of others are refused.
        accept: Called with header and control part of each frame *before* memory is taken for its payload (which is
            then empty): True to take it, False to skip it, None to be asked again later, or it raises.
        piece: Payload bytes of a message.

    Attributes:
        left: What `accept` has put off of the message that was fed last: to be fed before any other.
    """

    def __init__(self, run: int, accept: Accept, *, piece: int = PIECE) -> None:
        """Start with no frame."""
        self.left = _NOTHING
        self._run, self._accept, self._piece = run, accept, piece
        self._head: Arrival | None = None
        self._filled = 0

    def feed(self, message: Buffer) -> Iterator[Arrival]:
        """Take the next message; give the frames that it completes, each before the next one is looked at.

        Raises:
            WireError: it is not what must come next. The stream cannot go on.
            ContractError: `accept` refuses a frame.
        """
        rest, self.left = memoryview(message), _NOTHING
        while True:
            head = self._head
            if head is None:
                head, start = self._begin(rest)
                if head is None:
                    self.left = rest
                    return
                self._head, self._filled, rest = head, 0, rest[start:]
            length = head.header.payload_length
            expected = min(length - self._filled, self._piece)
            whole = self._filled + expected == length
            if len(rest) < expected or (len(rest) > expected and not whole):
                self._head = None
                raise WireError(
                    "a message does not have the announced size",
                    expected=f"{expected} bytes of payload",
                    got=f"{len(rest)}",
                    remedy="install the same release of cutlayer at all parties",
                    code="E512",
                )
            if expected and not head.skipped:
                self._fill(head, rest[:expected])
            self._filled += expected
            if whole:
                self._head = None
                yield head
            if len(rest) == expected:
                return
            rest = rest[expected:]

    def _begin(self, message: memoryview) -> tuple[Arrival | None, int]:
        """Read a frame's first message and take memory; return its head, None if put off, and its length in bytes."""
        header = parse_header(message)
        if header.run != self._run:
            raise WireError(
                "a frame of another run",
                expected=f"{self._run:016x}",
                got=f"{header.run:016x}",
                remedy="give all parties of a run the same name of it",
                code="E514",
            )
        start = HEADER.size + header.control_length
        if len(message) < start:
            raise WireError(
                "a frame's control part is cut short",
                got=f"{len(message)} bytes",
                remedy="install the same release of cutlayer at all parties",
                code="E512",
            )
        kind, sequence, size = header.kind, header.sequence, header.payload_length
        limit = LIMITS.get((kind, sequence > 0))
        if limit is None or size > limit or sequence >= 2**63:
            raise _refusal(header)
        part = bytes(message[HEADER.size : start])
        label = parse_control(part, size) if kind == KIND_DATA else None
        head = Arrival(header, part, _NOTHING, label)
        wanted = self._accept(head)
        if wanted is None:
            return None, 0
        head.skipped = not wanted
        return head, start

    def _fill(self, head: Arrival, piece: memoryview) -> None:
        """Copy a piece of the payload into memory of its own, which is taken with the first one.

        Long pieces are copied by numpy, which lets other threads run meanwhile.
        """
        size, begin = head.header.payload_length, self._filled
        if piece.nbytes == size < _LONG:
            head.payload = memoryview(bytearray(piece))
            return
        if not begin:
            head.payload = np.empty(size, np.uint8).data
        np.frombuffer(head.payload, np.uint8)[begin : begin + piece.nbytes] = np.frombuffer(piece, np.uint8)


def _refusal(header: Header) -> WireError:
    """Return the error of a kind, number or size that may not be."""
    kind, length = header.kind, header.payload_length
    limit = LIMITS.get((kind, header.sequence > 0))
    if limit is None or header.sequence >= 2**63:
        return WireError(
            "a frame of a kind that may not be here",
            expected="a known kind, numbered from 1 unless it belongs to the stream",
            got=f"kind {kind}, number {header.sequence}",
            remedy="install the same release of cutlayer at all parties",
            code="E513",
        )
    return WireError(
        "a message carries too much",
        expected=f"at most {limit} bytes with kind {kind}",
        got=str(length),
        remedy="install the same release of cutlayer at all parties",
        code="E513",
    )
