"""One other party, as the threads of this process see it: its link's state, and the stream that carries it just now.

Locks: `lock`, with its condition `changed`, guards the link and the choice of the stream; `inbound` makes one frame
after the other be taken in and acted upon, even while an old stream's reader ends. Nothing is called back with `lock`
held.

| code | error | meaning |
| --- | --- | --- |
| E622 | DeadlineError | no room in the outbox in time |
| E644 | HandshakeError | another process runs as this party, and was met later |
| E647 | HandshakeError | a new process asks for what was sent to an earlier one |
| E649 | HandshakeError | another process runs as this party, and is alive: the later one has to wait |
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from cutlayer.engine.wire import HEADER, Buffer, Header
from cutlayer.errors import DeadlineError, HandshakeError
from cutlayer.transport import control
from cutlayer.transport.frames import PIECE, further, opening, run_number
from cutlayer.transport.handshake import single
from cutlayer.transport.link import Link, Parcel, Ticket
from cutlayer.transport.settings import NetworkSettings

__all__ = ["Peer", "Stream", "dismiss", "finish", "parcel_of", "write"]

_LOOK: Final = 1.0  # seconds between two looks at a link that is down
_TOGETHER: Final = PIECE // 2  # bytes of frames that leave in one message, before the last of them
_REMEMBERED: Final = 256  # processes of a party that another one has replaced


@dataclass(eq=False)
class Stream:
    """One bidirectional gRPC call.

    Attributes:
        cancel: Ends the call, from any thread.
        closed: Nothing more is sent or taken from it.
        draining: What must be said is said, then it is closed.
        farewell: A last message, instead of all others, even if the peer has nothing more to say.
        heard: When something last came, by the monotonic clock.
        peer: Whose it is, once that is known.
        ear: Takes in what it can of a message at once, and returns the rest; None: nobody reads yet.
    """

    cancel: Callable[[], object]
    closed: bool = False
    draining: bool = False
    farewell: bytes = b""
    heard: float = field(default_factory=time.monotonic)
    peer: Peer | None = None
    ear: Callable[[bytes], Buffer] | None = None

    def hear(self, message: bytes) -> Buffer:
        """Give what a reader of the stream is to get for a message: gRPC's deserializer, called in its own thread."""
        return self.ear(message) if self.ear is not None else message

    def end(self) -> None:
        """Close the stream; its writer and its reader stop."""
        self.closed = True
        if self.peer is not None:
            with self.peer.lock:
                self.peer.changed.notify_all()


def parcel_of(message: control.Message, *, urgent: bool = True) -> Parcel:
    """Return a message as a frame to be sent."""
    return Parcel(kind=control.kind_of(message), control=control.encode(message), urgent=urgent)


class Peer:
    """The link with `name`. `busy` is true while its reader waits on this party, so that silence means nothing."""

    def __init__(self, name: str, settings: NetworkSettings) -> None:
        """Start without a stream."""
        self.name = name
        self.party, self.run, self.rhythm = settings.party, settings.run, settings.rhythm
        self.patience = settings.deadlines.patience
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.inbound = threading.Lock()
        self.link = Link(settings.limits)
        self.stream: Stream | None = None
        self.left = False
        self.busy = False
        self.asked = 0.0  # when another process of the peer's first asked for the link, while this party was busy
        self._replaced: deque[int] = deque(maxlen=_REMEMBERED)  # incarnations that must not come back

    # --- sending ---

    def put(self, *parcels: Parcel) -> None:
        """Queue frames, without waiting for room."""
        with self.lock:
            for parcel in parcels:
                self.link.outbox.push(parcel)
            self.changed.notify_all()

    def put_waiting(self, parcels: list[Parcel], seconds: float, check: Callable[[], None], park: str = "") -> None:
        """Queue the frames of one tensor, or park them under a name, once there is room.

        While the link is down, the time does not count, but for what is beyond `patience`: then `check` should raise.

        Raises:
            DeadlineError: E622, there was none within `seconds`.
            BaseException: what `check` raises, which is called whenever something changed.
        """
        deadline, spare = time.monotonic() + seconds, self.patience + _LOOK
        with self.lock:
            check()
            while self.link.outbox.full:
                left, begin, down = deadline - time.monotonic(), time.monotonic(), self.stream is None
                if left <= 0:
                    raise _no_room(self, seconds)
                self.changed.wait(_LOOK if down else left)
                if down:
                    passed = min(time.monotonic() - begin, spare)
                    deadline, spare = deadline + passed, spare - passed
                check()
            for parcel in parcels:
                if park:
                    self.link.outbox.park(park, parcel)
                else:
                    self.link.outbox.push(parcel)
            self.changed.notify_all()

    def unpark(self, name: str) -> None:
        """Send what was parked under a name."""
        with self.lock:
            self.link.outbox.unpark(name)
            self.changed.notify_all()

    def drop_unsent(self) -> None:
        """Give up tensors that have not left, and wake all who wait for room."""
        with self.lock:
            gone = self.link.outbox.drop_unsent()
            self.changed.notify_all()
        finish(gone)

    # --- receiving ---

    def wants(self, stream: Stream, sequence: int) -> bool:
        """Return whether a frame with this number, 0 for none, is new, and comes on the stream that counts.

        Raises:
            WireError: E510, one before it is missing.
        """
        with self.lock:
            if self.stream is not stream or stream.closed:
                return False
            return not sequence or self.link.inbox.judge(sequence)

    def complete(self, stream: Stream, sequence: int, size: int) -> bool:
        """Note that a frame has come whole; False if this stream no longer counts, or another brought it first."""
        with self.lock:
            if stream.closed or self.stream is not stream:
                return False
            inbox = self.link.inbox
            if not inbox.complete(sequence, size):
                return False
            if inbox.pressing:  # else the writer knows that it has something to acknowledge
                self.changed.notify_all()
            return True

    def hold(self, size: int) -> Ticket:
        """Hold back the acknowledgement of the frame that came last. Raises `ContractError` E529 for too many."""
        with self.lock:
            return self.link.inbox.hold(size)

    def release(self, ticket: Ticket) -> None:
        """Let a held frame be acknowledged."""
        with self.lock:
            self.link.inbox.release(ticket)
            self.changed.notify_all()

    def carries(self, stream: Stream) -> bool:
        """Return whether what comes on this stream still counts."""
        with self.lock:
            return self.stream is stream and not stream.closed

    def acknowledged(self, stream: Stream, received: int) -> None:
        """The peer has everything up to this number. Raises `WireError` E511 if that was never sent."""
        with self.lock:
            if not self.carries(stream):
                return
            gone = self.link.outbox.acknowledged(received)
            self.changed.notify_all()
        finish(gone)

    # --- streams ---

    def attach(self, stream: Stream, hello: control.LinkHello, own: int, *, patient: bool = False) -> int:
        """Let this stream carry the link from now on; the old one ends. `own` is this process's incarnation.

        With `patient`, another process of the peer's is let in only once the one that has the link is gone or silent.

        Returns:
            The sequence number that this side wants next.

        Raises:
            WireError: E511, the peer wants a frame that cannot be had.
            HandshakeError: E644, this process of it was replaced, or only tells of an error while another takes part;
                E647, it is new, and wants what an earlier one did; E649, it has to wait.
        """
        with self.lock:
            old, previous = self.stream, self.link.remote
            only_tells = hello.wanted == 0
            other = previous not in (0, hello.incarnation)
            if hello.incarnation in self._replaced or (only_tells and other and _alive(self)):
                raise _late(self)
            if hello.incarnation != previous:
                if patient and other and _alive(self):
                    raise _second(self)
                if hello.known == own and hello.wanted > 1:
                    raise _presumptuous(self, hello.wanted)
                self._replaced.append(previous)
            _, dropped = self.link.adopt(hello.incarnation)
            self.link.resume(hello.wanted if hello.known == own and not only_tells else 1)
            self.stream, stream.peer, self.left = stream, self, False
            stream.heard, self.asked = time.monotonic(), 0.0
            if old is not None and previous != hello.incarnation:
                old.farewell = single(_replaced(self), self.run)
            if old is not None:
                old.closed = True  # a farewell is still sent
            self.changed.notify_all()
            wanted = self.link.inbox.wanted
        finish(dropped)
        return wanted

    def detach(self, stream: Stream) -> None:
        """A stream has ended."""
        stream.end()
        with self.lock:
            if self.stream is stream:
                self.stream = None

    def expect(self, incarnation: int) -> None:
        """A session with this incarnation starts: another one's stream ends, and what was queued for it is void."""
        with self.lock:
            if incarnation in self._replaced:
                return  # the coordinator has not met its successor yet, and will say RESET
            if incarnation != self.link.remote:
                self._replaced.append(self.link.remote)
            meeting, dropped = self.link.adopt(incarnation)
            old = self.stream if meeting == "restarted" else None
        finish(dropped)
        if old is not None:
            old.end()
            old.cancel()


def dismiss(peer: Peer) -> None:
    """The peer was refused, and told why: nothing else is to be said to it."""
    with peer.changed:
        peer.left = True
        peer.changed.notify_all()


def finish(parcels: Iterable[Parcel]) -> None:
    """Tell those who gave these frames that they were acknowledged or given up."""
    for parcel in parcels:
        if parcel.done is not None:
            parcel.done()


def write(peer: Peer, stream: Stream) -> Iterator[bytes]:
    """Yield what a stream is to carry, until it ends: the writer's side of a call."""
    number = run_number(peer.run)
    while (due := _due(peer, stream)) is not None:
        parts = list[Buffer]()
        last: Buffer = b""
        for sequence, parcel in due[1]:
            last = parcel.payload
            header = Header(parcel.kind, len(parcel.control), memoryview(last).nbytes, sequence, number)
            parts += opening(header, parcel.control, last)
        yield b"".join((due[0], *parts))
        yield from further(last)


def _due(peer: Peer, stream: Stream) -> tuple[bytes, list[tuple[int, Parcel]]] | None:
    """Wait for something to send: a message of the stream itself, numbered frames; None: the stream ends.

    The frames fit into one message, but for further pieces of the last.
    """
    idle = False
    with peer.lock:
        while stream.farewell or not stream.closed:
            if stream.farewell:
                last, stream.farewell, stream.closed = stream.farewell, b"", True
                return last, []
            told, ack = b"", peer.link.inbox.due()
            if ack is not None and (ack[1] or idle or stream.draining):
                peer.link.inbox.told(ack[0])
                told = single(control.Ack(ack[0]), peer.run)
            if stream.draining and not told:
                stream.farewell = single(control.Leave(), peer.run)
                continue
            items = [] if stream.draining else _together(peer)
            if told or items:
                return told, items
            if idle:
                return single(control.Heartbeat(), peer.run), []
            idle = not peer.changed.wait(peer.rhythm.heartbeat if ack is None else peer.rhythm.idle_ack)
    return None


def _together(peer: Peer) -> list[tuple[int, Parcel]]:
    """Return the frames that leave in the next message: small ones go together, for each message costs as much."""
    items, size = list[tuple[int, Parcel]](), 0
    while size < _TOGETHER and (item := peer.link.outbox.next()) is not None:
        items.append(item)
        size += HEADER.size + len(item[1].control) + memoryview(item[1].payload).nbytes
    return items


def _alive(peer: Peer) -> bool:
    """Return whether the process that has the link is there: its stream is up, and was heard within `silence`.

    While this party is busy it hears nothing, so `silence` begins when another process asks first.
    """
    stream, now = peer.stream, time.monotonic()
    if stream is None or stream.closed or peer.left:
        return False
    if now - stream.heard <= peer.rhythm.silence or not peer.busy:
        peer.asked = 0.0
        return now - stream.heard <= peer.rhythm.silence
    peer.asked = peer.asked or now
    return now - peer.asked <= peer.rhythm.silence


def _replaced(peer: Peer) -> control.Abort:
    return control.Abort(
        peer.party, "E644", f"another process runs as {peer.name}", "stop one of the two; a party is one process"
    )


def _late(peer: Peer) -> HandshakeError:
    told = _replaced(peer)
    return HandshakeError(told.what, where=f"party {peer.party}", remedy=told.remedy, code=told.code)


def _second(peer: Peer) -> HandshakeError:
    return HandshakeError(
        f"another process runs as {peer.name}, and is alive",
        where=f"party {peer.party}, link with {peer.name}",
        expected="one process of each party",
        got="a second one",
        remedy="stop this one, and let the other go on; or stop the other, then `cutlayer resume` its run's folder",
        code="E649",
    )


def _presumptuous(peer: Peer, wanted: int) -> HandshakeError:
    return HandshakeError(
        "a new process asks for what was sent to an earlier one",
        where=f"party {peer.party}, link with {peer.name}",
        expected="number 1",
        got=f"number {wanted}",
        remedy="install the same release of cutlayer at all parties",
        code="E647",
    )


def _no_room(peer: Peer, seconds: float) -> DeadlineError:
    return DeadlineError(
        f"{peer.name!r} does not take what is sent to it",
        where=f"party {peer.party}, link with {peer.name}, {'up' if peer.stream else 'down'}",
        expected=f"room in the outbox within {seconds:g} seconds",
        remedy=f"look at {peer.name}'s terminal and at the link's speed, or raise deadlines.send",
        code="E622",
    )
