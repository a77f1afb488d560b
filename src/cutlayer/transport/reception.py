"""What a party does with the messages of a stream: the one place where bytes of others come in.

Every frame is checked before memory is taken for it, taken once and in order, and acted upon. Whatever is wrong with it
fails the run here, and the others are told.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator

from cutlayer.engine.wire import KIND_DATA
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

__all__ = ["Reception"]


class Reception:
    """Reads streams, one thread each."""

    def __init__(self, settings: NetworkSettings, steward: Steward, watch: Watch, relays: Relays) -> None:
        """Connect what acts upon frames."""
        self._settings, self._steward, self._watch, self._relays = settings, steward, watch, relays
        self._forwarder = Forwarder(settings, steward)
        self._run = run_number(settings.run)

    def read(self, peer: Peer, stream: Stream, incoming: Iterable[bytes]) -> None:
        """Take in all messages of a stream until it ends. One that is wrong fails the run, and the peer is told.

        Raises what `incoming` raises.
        """
        assembler = Assembler(self._run, lambda head: self._accept(peer, stream, head))
        deaf = False
        for message in incoming:
            stream.heard = time.monotonic()
            if stream.closed or deaf:
                continue  # until the call ends, so that what was said last arrives
            deaf = not self._hear(peer, stream, assembler, message)

    def _hear(self, peer: Peer, stream: Stream, assembler: Assembler, message: bytes) -> bool:
        """Take in one message; False if it fails the run. Keeps nothing: a tensor belongs to whoever takes it."""
        try:
            for arrival in assembler.feed(message):
                self._take(peer, stream, arrival)
        except Exception as error:  # whatever it is, nobody else would learn of it
            if not peer.carries(stream):
                return False  # what a replaced stream still brings does no harm
            self._fail(peer, stream, typed(error, f"party {self._settings.party}, link with {peer.name}"))
            return False
        return True

    def _fail(self, peer: Peer, stream: Stream, error: CutlayerError) -> None:
        self._steward.fail(error)
        with peer.changed:
            stream.farewell = single(abort_of(error, self._settings.party), self._settings.run)
            peer.changed.notify_all()

    def _accept(self, peer: Peer, stream: Stream, head: Arrival) -> bool:
        """Say whether a frame is wanted, before memory is taken for it."""
        header = head.header
        if header.kind == control.LINK_HELLO:
            raise WireError(
                "a second hello on one stream",
                remedy="install the same release of cutlayer at all parties",
                code="E513",
            )
        if not peer.carries(stream):
            return False
        if header.sequence and not peer.judge(header.sequence):
            return False
        if header.kind != KIND_DATA:
            return True
        if head.label is None:
            raise TypeError("a data frame without label")
        with _busy(peer):
            return self._steward.admit(peer.name, head.label, stream)

    def _take(self, peer: Peer, stream: Stream, arrival: Arrival) -> None:
        with peer.inbound:
            header = arrival.header
            if not peer.carries(stream):
                return
            if header.sequence and not peer.complete(stream, header.sequence, arrival.payload.nbytes):
                return
            if header.kind == KIND_DATA:
                if not arrival.skipped:
                    self._steward.deliver(peer.name, arrival.frame)
                return
            self._act(peer, stream, control.decode(header.kind, arrival.control), arrival)

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
            self._steward.fail(error_of(message, peer.name), tell=message, besides=peer.name)
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
