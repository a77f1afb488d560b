"""What a party does with the messages of a stream: the one place where bytes of others come in.

Every frame is checked before memory is taken for it, taken once and in order, and acted upon. Whatever is wrong with it
fails the run here, and the others are told.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final

from cutlayer.engine.wire import KIND_DATA, Buffer
from cutlayer.errors import CutlayerError, WireError
from cutlayer.transport import control
from cutlayer.transport.frames import Arrival, Assembler, run_number
from cutlayer.transport.handshake import abort_of, error_of, single, typed
from cutlayer.transport.peer import Peer, Stream
from cutlayer.transport.relay import Forwarder, Relays
from cutlayer.transport.session import SessionReset
from cutlayer.transport.settings import NetworkSettings
from cutlayer.transport.steward import Steward
from cutlayer.transport.watch import Watch

__all__ = ["TAKEN", "Reception"]

TAKEN: Final = bytearray()
"""What the reader of a stream gets for a message of which nothing is left."""
_AT_ONCE: Final = 2**17  # bytes: copying more would keep gRPC's thread from other streams
_FEW: Final = 32  # frames of one message
_BRIEF: Final = frozenset({KIND_DATA, control.ACK, control.HEARTBEAT})


@dataclass(eq=False)
class _Reading:
    """A stream that is being read.

    `prompt`: by gRPC's thread just now, which has seen so many `frames`. `deaf`: nothing more is taken from it.
    """

    peer: Peer
    stream: Stream
    prompt: bool = False
    frames: int = 0
    deaf: bool = False


class Reception:
    """Reads streams, one thread each. gRPC's own threads take in what keeps nobody waiting; see `at_once`."""

    def __init__(self, settings: NetworkSettings, steward: Steward, watch: Watch, relays: Relays) -> None:
        """Connect what acts upon frames."""
        self._settings, self._steward, self._watch, self._relays = settings, steward, watch, relays
        self._forwarder = Forwarder(settings, steward)
        self._run = run_number(settings.run)

    def read(self, peer: Peer, stream: Stream, incoming: Iterable[Buffer]) -> None:
        """Take in all messages of a stream until it ends. One that is wrong fails the run, and the peer is told.

        Raises what `incoming` raises.
        """
        reading = _Reading(peer, stream)
        assembler = Assembler(self._run, partial(self._accept, reading))
        stream.ear = partial(self.at_once, reading, assembler)
        try:
            for message in incoming:
                if message is TAKEN or stream.closed or reading.deaf:
                    continue  # until the call ends, so that what was said last arrives
                self._hear(reading, assembler, message)
        finally:
            stream.ear = None  # which keeps what has come of a frame

    def at_once(self, reading: _Reading, assembler: Assembler, message: bytes) -> Buffer:
        """Take in what can be of a message without waiting for others; return what is left of it, or `TAKEN`.

        Called by the thread in which gRPC says that a message is there, one after the other. That thread also says
        what was sent, of a server to all clients, so it must not be kept: it takes few frames, and short ones, and
        waits for a lock only while another thread puts one frame in its place. But what it does itself waits for no
        other thread: a tensor reaches the driver one change of threads sooner.
        """
        peer, stream = reading.peer, reading.stream
        if len(message) > _AT_ONCE or stream.closed or reading.deaf or not peer.inbound.acquire(blocking=False):
            return message
        reading.prompt, reading.frames = True, 0
        try:
            self._hear(reading, assembler, message)
            return assembler.left if assembler.left.nbytes else TAKEN
        finally:
            reading.prompt = False
            peer.inbound.release()

    def _hear(self, reading: _Reading, assembler: Assembler, message: Buffer) -> None:
        """Take in one message. Keeps nothing: a tensor belongs to whoever takes it."""
        peer, stream = reading.peer, reading.stream
        stream.heard = time.monotonic()
        try:
            for arrival in assembler.feed(message):
                if reading.prompt:
                    self._take(peer, stream, arrival)
                else:
                    with peer.inbound:
                        self._take(peer, stream, arrival)
        except Exception as error:  # whatever it is, nobody else would learn of it
            reading.deaf = True
            if peer.carries(stream):  # what a replaced stream still brings does no harm
                self._fail(peer, stream, typed(error, f"party {self._settings.party}, link with {peer.name}"))

    def _fail(self, peer: Peer, stream: Stream, error: CutlayerError) -> None:
        self._steward.fail(error)
        with peer.changed:
            stream.farewell = single(abort_of(error, self._settings.party), self._settings.run)
            peer.changed.notify_all()

    def _accept(self, reading: _Reading, head: Arrival) -> bool | None:
        """Say whether a frame is wanted, before memory is taken for it; None: that cannot be said at once."""
        peer, header, label = reading.peer, head.header, head.label
        reading.frames += 1
        if reading.prompt and (header.kind not in _BRIEF or reading.frames > _FEW):
            return None
        if header.kind == control.LINK_HELLO:
            raise WireError(
                "a second hello on one stream",
                remedy="install the same release of cutlayer at all parties",
                code="E513",
            )
        if not peer.wants(reading.stream, header.sequence):
            return False
        if header.kind != KIND_DATA:
            return True
        if label is None:
            raise TypeError("a data frame without label")
        if reading.prompt:
            return self._steward.admit(peer.name, label, reading.stream, wait=False)
        with _busy(peer):
            return self._steward.admit(peer.name, label, reading.stream)

    def _take(self, peer: Peer, stream: Stream, arrival: Arrival) -> None:
        """Act upon a frame; `peer.inbound` is held."""
        header = arrival.header
        if header.sequence and not peer.complete(stream, header.sequence, arrival.payload.nbytes):
            return
        if header.kind != KIND_DATA:
            if header.sequence or peer.carries(stream):
                self._act(peer, stream, control.decode(header.kind, arrival.control), arrival)
        elif not arrival.skipped:
            self._steward.deliver(peer.name, arrival.frame)

    def _act(self, peer: Peer, stream: Stream, message: control.Message, arrival: Arrival) -> None:
        """Act upon a message other than a tensor."""
        if isinstance(message, control.Ack):
            peer.acknowledged(stream, message.received)
        elif isinstance(message, control.Leave):
            with peer.changed:
                peer.left = peer.left or peer.carries(stream)
        elif isinstance(message, control.Relay | control.SealOffer):
            self._relayed(peer, message, arrival)
        elif isinstance(message, control.Abort) and not arrival.header.sequence:
            self._steward.fail(error_of(message, peer.name, self._settings), tell=message, besides=peer.name)
        elif isinstance(message, control.Notice) and message.event in ("lost", "returned"):
            if peer.name == self._settings.coordinator:
                self._watch.noticed(message)
        elif not isinstance(message, control.Heartbeat):
            self._steward.heard(peer.name, message)
            self._watch.tell_missing()

    def _relayed(self, peer: Peer, message: control.Relay | control.SealOffer, arrival: Arrival) -> None:
        if self._settings.coordinates:
            self._forwarder.forward(peer, message, arrival)
        elif peer.name == self._settings.coordinator:
            with _busy(peer), contextlib.suppress(SessionReset):
                self._relays.take(message, arrival)
        else:
            raise WireError(
                "only the coordinator relays",
                got=f"a relayed frame from {peer.name}",
                remedy="install the same release of cutlayer at all parties",
                code="E513",
            )


@contextlib.contextmanager
def _busy(peer: Peer) -> Iterator[None]:
    """Say that this party waits for itself: silence of the peer's stream means nothing."""
    peer.busy = True
    try:
        yield
    finally:
        peer.busy = False
        stream = peer.stream
        if stream is not None:
            stream.heard = time.monotonic()
