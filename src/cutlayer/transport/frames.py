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
from dataclasses import dataclass
from typing import Final

import numpy as np

from cutlayer.core.program import Tag
from cutlayer.engine.wire import HEADER, KIND_DATA, Buffer, Frame, Header, parse_control, parse_header
from cutlayer.errors import WireError
from cutlayer.transport import control
from cutlayer.transport.seal import OFFER_LIMIT

__all__ = ["MESSAGE_MAX", "PIECE", "RELAY_PIECE", "Arrival", "Assembler", "messages", "run_number"]

PIECE: Final = 2**20
"""Payload bytes of a message on a stream."""
RELAY_PIECE: Final = PIECE - 2**16 - 2**12
"""Payload bytes of a relayed message, which with header, control part and seal must fit into one piece."""
MESSAGE_MAX: Final = 2 * PIECE
"""Longest message that a stream carries, in bytes."""
LIMITS: Final[Mapping[int, int]] = {control.RELAY: PIECE, control.SEAL_OFFER: OFFER_LIMIT}
"""Longest payload by kind; data frames are checked against the program, all other kinds have none."""


def run_number(run: str) -> int:
    """Return what the frames of this run carry: the first eight bytes of the SHA-256 of its name."""
    return int.from_bytes(hashlib.sha256(run.encode()).digest()[:8], "little")


def messages(header: Header, part: bytes, payload: Buffer, *, piece: int = PIECE) -> Iterator[bytes]:
    """Yield the messages of a frame, each made only when it is asked for.

    `part` is the control part. Header and payload must agree on the payload's length.
    """
    view = memoryview(payload)
    view = view.cast("B") if view.nbytes else memoryview(b"")
    yield b"".join((header.pack(), part, view[:piece]))
    for start in range(piece, view.nbytes, piece):
        yield bytes(view[start : start + piece])


@dataclass(frozen=True)
class Arrival:
    """A complete frame.

    Attributes:
        header, control: As they came.
        payload: Writable, in memory of its own; empty if `skipped`.
        label: What a data frame says of itself: tag, dtype, shape.
        skipped: It came whole, but was not wanted.
    """

    header: Header
    control: bytes
    payload: memoryview
    label: tuple[Tag, str, tuple[int, ...]] | None = None
    skipped: bool = False

    @property
    def frame(self) -> Frame:
        """Return a data frame. Raises TypeError for another kind."""
        if self.label is None:
            raise TypeError(f"kind {self.header.kind}")
        return Frame(*self.label, self.payload)


Accept = Callable[[Arrival], bool]


class Assembler:
    """Puts frames together from the messages of one stream.

    Args:
        run: The run's number; frames of others are refused.
        accept: Called with header and control part of each frame *before* memory is taken for its payload (which is
            then empty): True to take it, False to skip it, or it raises.
        piece: Payload bytes of a message.
    """

    def __init__(self, run: int, accept: Accept, *, piece: int = PIECE) -> None:
        """Start with no frame."""
        self._run, self._accept, self._piece = run, accept, piece
        self._head: Arrival | None = None
        self._buffer = np.empty(0, np.uint8)
        self._filled = 0
        self._skipping = False

    def feed(self, message: bytes | memoryview) -> Iterator[Arrival]:
        """Take the next message; give the frames that it completes, each before the next one is looked at.

        Raises:
            WireError: it is not what must come next. The stream cannot go on.
            ContractError: `accept` refuses a frame.
        """
        rest = memoryview(message)
        while True:
            if self._head is None:
                self._head, rest = self._begin(rest)
            head = self._head
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
            if not self._skipping and expected:
                self._buffer[self._filled : self._filled + expected] = np.frombuffer(rest[:expected], np.uint8)
            self._filled += expected
            rest = rest[expected:]
            if whole:
                yield self._end(head)
            if not rest.nbytes:
                return

    def _begin(self, message: memoryview) -> tuple[Arrival, memoryview]:
        """Read a frame's first message and take memory; return its head, and the message's part of the payload."""
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
        _check_kind(header)
        part = bytes(message[HEADER.size : start])
        label = parse_control(part, header.payload_length) if header.kind == KIND_DATA else None
        head = Arrival(header, part, memoryview(b""), label)
        self._skipping = not self._accept(head)
        self._buffer = np.empty(0 if self._skipping else header.payload_length, np.uint8)
        self._filled = 0
        return head, message[start:]

    def _end(self, head: Arrival) -> Arrival:
        buffer = self._buffer
        self._head, self._buffer = None, np.empty(0, np.uint8)
        return Arrival(head.header, head.control, buffer.data, head.label, self._skipping)


def _check_kind(header: Header) -> None:
    """Check what can be checked without the control part: kind, numbering, size."""
    kind = header.kind
    refusal = kind == control.ABORT and header.sequence == 0
    numbered = kind == KIND_DATA or (kind in control.KINDS and kind not in control.UNNUMBERED)
    known = numbered or kind in control.UNNUMBERED
    limit = LIMITS.get(kind, 0)
    if not known or (numbered != (header.sequence > 0) and not refusal) or header.sequence >= 2**63:
        raise WireError(
            "a frame of a kind that may not be here",
            expected="a known kind, numbered from 1 unless it belongs to the stream",
            got=f"kind {kind}, number {header.sequence}",
            remedy="install the same release of cutlayer at all parties",
            code="E513",
        )
    if kind != KIND_DATA and header.payload_length > limit:
        raise WireError(
            "a message carries too much",
            expected=f"at most {limit} bytes with kind {kind}",
            got=str(header.payload_length),
            remedy="install the same release of cutlayer at all parties",
            code="E513",
        )
