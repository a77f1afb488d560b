"""The state of one party's link with another: numbers, outbox, acknowledgements, resumption. Sans-I/O, no clock.

A link belongs to a pair of incarnations, and outlives streams: when a stream breaks, the next one begins with the
first frame that the receiver lacks. Numbers are given as frames leave, so urgent messages (control) overtake tensors
that still wait. A frame is kept until it is acknowledged. The caller serialises calls.

| code | error | meaning |
| --- | --- | --- |
| E510 | WireError | a frame is missing before this one |
| E511 | WireError | something was acknowledged, or is wanted, that was never sent or is no longer kept |
| E529 | ContractError | a party sends more than it may have under way |
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Literal

import msgspec

from cutlayer.engine.wire import Buffer
from cutlayer.errors import ContractError, WireError

__all__ = ["Inbox", "Limits", "Link", "Outbox", "Parcel", "Ticket"]

_FRAMING: Final = 256  # bytes that a frame costs besides its payload


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of a link, in frames and in bytes.

    Attributes:
        queued_frames, queued_bytes: From here on the outbox is full; the tensor that fills it still fits.
        window_frames, window_bytes: With this much unacknowledged, no further tensor leaves.
        ack_frames, ack_bytes: After this much, the receiver acknowledges at once; else when it is idle.
    """

    queued_frames: int = 4096
    queued_bytes: int = 2**28
    window_frames: int = 256
    window_bytes: int = 2**26
    ack_frames: int = 16
    ack_bytes: int = 2**22


class Parcel(msgspec.Struct, eq=False, kw_only=True):
    """A frame to be sent. With `render`, the payload is made from it when the frame first leaves, and then kept.

    `size` is that of the payload, in bytes; an `urgent` frame overtakes those that are not, and counts towards no
    bound; `done` is called when the frame is acknowledged or given up.
    """

    kind: int
    control: bytes
    payload: Buffer = b""
    size: int = 0
    urgent: bool = False
    render: Callable[[], Buffer] | None = None
    done: Callable[[], None] | None = None

    def make(self) -> None:
        """Make the payload, once."""
        if self.render is not None:
            self.payload, self.render = self.render(), None


@dataclass(frozen=True)
class Ticket:
    """A received frame whose acknowledgement is held back, in one life of a link."""

    life: int
    sequence: int


class Outbox:
    """What is to be sent, in this order: what must be sent again, urgent frames, tensors."""

    def __init__(self, limits: Limits) -> None:
        """Start empty."""
        self._limits = limits
        self._urgent: deque[Parcel] = deque()
        self._tensors: deque[Parcel] = deque()
        self._parked: dict[str, deque[Parcel]] = {}
        self._sent: deque[tuple[int, Parcel]] = deque()
        self._cursor = 0  # in `_sent`: from here on, frames must be sent again
        self._number = 1  # of the next frame that has none yet
        self._frames = self._bytes = 0  # tensors here, whether sent or not
        self._away = 0  # bytes of tensors that were sent

    @property
    def full(self) -> bool:
        """Whether a sender of tensors has to wait."""
        return self._frames >= self._limits.queued_frames or self._bytes >= self._limits.queued_bytes

    @property
    def empty(self) -> bool:
        """Whether all that was given has been acknowledged."""
        return not (self._urgent or self._tensors or self._sent or self._parked)

    def push(self, parcel: Parcel) -> None:
        """Queue a frame."""
        if parcel.urgent:
            self._urgent.append(parcel)
        else:
            self._tensors.append(parcel)
            self._frames += 1
            self._bytes += parcel.size + _FRAMING

    def park(self, name: str, parcel: Parcel) -> None:
        """Keep a tensor back until `unpark(name)`; it counts towards the bounds."""
        self._parked.setdefault(name, deque()).append(parcel)
        self._count(parcel, 1)

    def unpark(self, name: str) -> None:
        """Queue, in order, what was parked under this name."""
        self._tensors.extend(self._parked.pop(name, ()))

    def next(self) -> tuple[int, Parcel] | None:
        """Return the next frame to be sent and its number; None if there is none, or the window is full."""
        if self._cursor < len(self._sent):
            self._cursor += 1
            return self._sent[self._cursor - 1]
        limits = self._limits
        if self._urgent:
            lane = self._urgent
        elif self._tensors and len(self._sent) < limits.window_frames and self._away < limits.window_bytes:
            lane = self._tensors
        else:
            return None
        if lane[0].render is not None:
            lane[0].make()
        parcel = lane.popleft()
        if not parcel.urgent:
            self._away += parcel.size + _FRAMING
        item = (self._number, parcel)
        self._sent.append(item)
        self._number += 1
        self._cursor += 1
        return item

    def acknowledged(self, received: int) -> list[Parcel]:
        """Forget frames up to number `received` and return them.

        Raises:
            WireError: E511, this was never sent.
        """
        if received >= self._number:
            raise _never_sent("acknowledged", received, f"at most {self._number - 1}")
        gone = []
        while self._sent and self._sent[0][0] <= received:
            parcel = self._sent.popleft()[1]
            self._cursor = max(0, self._cursor - 1)
            if not parcel.urgent:
                self._away -= _cost(parcel)
                self._count(parcel, -1)
            gone.append(parcel)
        return gone

    def resume(self, wanted: int) -> None:
        """Send again from this number on.

        Raises:
            WireError: E511, it was never sent, or is no longer kept.
        """
        first = self._sent[0][0] if self._sent else self._number
        if not first <= wanted <= self._number:
            raise _never_sent("asked for", wanted, f"{first} to {self._number}")
        self._cursor = wanted - first

    def drop_unsent(self) -> list[Parcel]:
        """Give up tensors that have not left yet, because their session is over, and return them."""
        gone = [*self._tensors, *_chain(self._parked.values())]
        self._tensors.clear()
        self._parked.clear()
        for parcel in gone:
            self._count(parcel, -1)
        return gone

    def all(self) -> list[Parcel]:
        """Return all that is kept."""
        return [*(parcel for _, parcel in self._sent), *self._urgent, *self._tensors, *_chain(self._parked.values())]

    def _count(self, parcel: Parcel, sign: int) -> None:
        self._frames += sign
        self._bytes += sign * _cost(parcel)


class Inbox:
    """What has come: each frame once, in order, and what the sender has been told of it."""

    def __init__(self, limits: Limits, life: int) -> None:
        """Start with nothing received."""
        self._limits, self._life = limits, life
        self._received = self._told = 0
        self._frames = self._bytes = 0  # since the last acknowledgement
        self._held: dict[int, int] = {}
        self._held_bytes = 0

    @property
    def wanted(self) -> int:
        """Return the number of the frame that must come next."""
        return self._received + 1

    def judge(self, sequence: int) -> bool:
        """Return whether a frame with this number is new; a known one is to be dropped.

        Raises:
            WireError: E510, one before it is missing.
        """
        wanted = self._received + 1
        if sequence > wanted:
            raise WireError(
                "a frame is missing",
                expected=f"number {wanted}",
                got=f"number {sequence}",
                remedy="the sender, or what is between, loses frames; report it with both releases",
                code="E510",
            )
        return sequence == wanted

    def complete(self, sequence: int, size: int) -> bool:
        """Note that this frame of `size` bytes has come whole; False if it had come before."""
        if not self.judge(sequence):
            return False
        self._received = sequence
        self._frames += 1
        self._bytes += size
        return True

    @property
    def pressing(self) -> bool:
        """Whether the frame that came last must be acknowledged at once, or is the first to wait for that."""
        limits = self._limits
        return self._frames in (1, limits.ack_frames) or self._bytes >= limits.ack_bytes

    def hold(self, size: int) -> Ticket:
        """Hold back the acknowledgement of the frame that came last, until `release`.

        Raises:
            ContractError: E529, more is held than the peer may have under way.
        """
        limits = self._limits
        self._held[self._received] = size
        self._held_bytes += size
        if len(self._held) > 2 * limits.window_frames or self._held_bytes > 2 * limits.window_bytes:
            raise ContractError(
                "a party relays more than it may have under way",
                expected=f"at most {limits.window_frames} frames and {limits.window_bytes} bytes",
                got=f"{len(self._held)} frames and {self._held_bytes} bytes",
                remedy="install the same release of cutlayer at all parties",
                code="E529",
            )
        return Ticket(self._life, self._received)

    def release(self, ticket: Ticket) -> None:
        """Let a held frame be acknowledged; a ticket of an earlier life is ignored."""
        if ticket.life == self._life:
            self._held_bytes -= self._held.pop(ticket.sequence, 0)

    def due(self) -> tuple[int, bool] | None:
        """Return what can be acknowledged, and whether that must be at once; None if the sender knows it."""
        received = min(self._held) - 1 if self._held else self._received
        if received <= self._told:
            return None
        return received, self._frames >= self._limits.ack_frames or self._bytes >= self._limits.ack_bytes

    def told(self, received: int) -> None:
        """Note that `received` was acknowledged; 0: the stream is new, tell it all again."""
        self._told, self._frames, self._bytes = received, 0, 0


class Link:
    """Outbox and inbox for one incarnation of the peer; `remote` is its number, 0 before the first meeting."""

    def __init__(self, limits: Limits | None = None) -> None:
        """Start with an unknown peer and nothing queued."""
        self.limits = limits or Limits()
        self.remote = 0
        self.life = 0
        self.outbox, self.inbox = Outbox(self.limits), Inbox(self.limits, 0)

    def adopt(self, incarnation: int) -> tuple[Literal["first", "same", "restarted"], list[Parcel]]:
        """Take note of the peer's incarnation; a new one begins a new life, with nothing received and nothing queued.

        What was queued before the first meeting is kept. The second item is what was dropped.
        """
        if incarnation == self.remote:
            return "same", []
        first, self.remote = self.remote == 0, incarnation
        self.life += 1
        self.inbox = Inbox(self.limits, self.life)
        if first:
            return "first", []
        dropped, self.outbox = self.outbox.all(), Outbox(self.limits)
        return "restarted", dropped

    def resume(self, wanted: int) -> None:
        """Begin a stream: send again from number `wanted` on, and acknowledge anew what has come.

        Raises:
            WireError: E511, it was never sent, or is no longer kept.
        """
        self.outbox.resume(wanted)
        self.inbox.told(0)


def _cost(parcel: Parcel) -> int:
    return parcel.size + _FRAMING


def _chain(lanes: Iterable[Iterable[Parcel]]) -> Iterable[Parcel]:
    return (parcel for lane in lanes for parcel in lane)


def _never_sent(what: str, number: int, expected: str) -> WireError:
    return WireError(
        f"a frame was {what} that cannot be",
        expected=expected,
        got=str(number),
        remedy="install the same release of cutlayer at all parties",
        code="E511",
    )
