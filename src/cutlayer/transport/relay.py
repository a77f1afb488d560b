"""Frames between two parties that cannot reach each other: through the coordinator, sealed from end to end.

Each message of a stream becomes the payload of one RELAY frame, small enough to be one message itself. Offers of keys
travel as SEAL_OFFER frames. All belong to one session: the next has new keys. The coordinator looks at names, sizes and
the session only, and acknowledges a frame when its receiver has: the sender's window bounds what it keeps.

| code | error | meaning |
| --- | --- | --- |
| E513 | WireError | something other than a tensor is to be relayed |
| E529 | ContractError | a relayed frame has names, a size, a counter or a form that it may not have |
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from cutlayer.engine.wire import CONTROL_MAX, HEADER, KIND_DATA, Buffer, Frame, Header
from cutlayer.errors import ContractError, WireError
from cutlayer.transport import control
from cutlayer.transport.control import Relay, SealOffer
from cutlayer.transport.frames import PIECE, RELAY_PIECE, Arrival, Assembler, flat, messages, run_number
from cutlayer.transport.link import Parcel
from cutlayer.transport.peer import Peer
from cutlayer.transport.seal import OVERHEAD, Seal
from cutlayer.transport.session import SessionReset
from cutlayer.transport.settings import NetworkSettings, route
from cutlayer.transport.steward import Steward

__all__ = ["Forwarder", "Relays"]


class Forwarder:
    """The coordinator's part: checks names and sizes, and hands on what it cannot read."""

    def __init__(self, settings: NetworkSettings, steward: Steward) -> None:
        """Start; the peers are the steward's."""
        self._settings, self._steward = settings, steward
        self._peers: Mapping[str, Peer] = steward.peers
        self._most = min(PIECE, settings.limit + HEADER.size + CONTROL_MAX + OVERHEAD)

    def forward(self, peer: Peer, message: Relay | SealOffer, arrival: Arrival) -> None:
        """Hand on a frame that came whole from `peer`.

        Raises:
            ContractError: E529, sender, receiver or size are not as they must be.
        """
        ends = (message.source, message.target)
        closed = all(name in self._peers and name not in self._settings.addresses for name in ends)
        size = arrival.payload.nbytes
        if message.source != peer.name or message.target == peer.name or not closed or size > self._most:
            raise _misused(
                self._settings.party,
                peer.name,
                f"a frame from {peer.name} for a party without an address, of at most {self._most} bytes",
                f"from {message.source} for {message.target}, {size} bytes",
            )
        conductor = self._steward.conductor
        with self._steward.changed:
            if conductor is None or not conductor.active or message.session != conductor.session:
                return
            ticket = peer.hold(size)
            self._peers[message.target].put(
                Parcel(
                    kind=arrival.header.kind,
                    control=arrival.control,
                    payload=arrival.payload,
                    size=size,
                    urgent=isinstance(message, SealOffer),
                    done=lambda: peer.release(ticket),
                )
            )


@dataclass
class _Channel:
    """One session's way to one party. `seal` is None in plaintext; `offered`: our offer is on its way."""

    seal: Seal | None
    incoming: Assembler
    offered: bool = False
    sent: int = 0
    received: int = 0
    frames: int = 0

    @property
    def ready(self) -> bool:
        return self.seal is None or self.seal.ready


class Relays:
    """A member's part: seals what it sends through the coordinator, and opens what it gets."""

    def __init__(self, settings: NetworkSettings, steward: Steward) -> None:
        """Start without any session."""
        self._settings, self._steward = settings, steward
        self._run = run_number(settings.run)
        self._names = frozenset(name for name in settings.others if route(settings, name) == "relay")
        self._lock = threading.Lock()  # of the channels; the one below makes tensors leave one after the other
        self._sending = threading.Lock()
        self._session = 0
        self._channels: dict[str, _Channel] = {}

    def send(self, to: str, frame: Frame, check: Callable[[], None]) -> None:
        """Queue a frame; see `base.Transport.send`. `check` raises if the session is over."""
        with self._sending:
            check()
            session = frame.tag.session
            with self._lock:
                channel = self._channel(to, session)
                self._offer(to, session, channel)
            header = Header(KIND_DATA, len(frame.control), frame.nbytes, channel.frames + 1, self._run)
            parcels = [
                self._parcel(channel.seal, Relay(session, self._settings.party, to, channel.seal is not None, n), piece)
                for n, piece in enumerate(_pieces(header, frame), channel.sent)
            ]
            coordinator = self._steward.peers[self._settings.coordinator]
            coordinator.put_waiting(parcels, self._settings.deadlines.send, check, park=to)
            channel.sent += len(parcels)
            channel.frames += 1
            if channel.ready:
                coordinator.unpark(to)

    def take(self, message: Relay | SealOffer, arrival: Arrival) -> None:
        """Take in what the coordinator has handed on.

        Raises:
            ContractError: E529, or what a seal or the program refuses.
            WireError: it is not what the other party can have sent.
            CertificateError: the other party's certificate.
        """
        if message.target != self._settings.party or message.source not in self._names:
            raise self._misused(
                message.source,
                f"a frame for {self._settings.party} from {', '.join(sorted(self._names))}",
                f"from {message.source} for {message.target}",
            )
        member = self._steward.member
        if message.session != member.session or message.session <= member.ended:
            return  # of an older life: START comes before what is relayed
        if isinstance(message, SealOffer):
            self._accept(message, bytes(arrival.payload))
        else:
            self._open(message, arrival)

    def _accept(self, message: SealOffer, offer: bytes) -> None:
        coordinator = self._steward.peers[self._settings.coordinator]
        with self._lock:
            channel = self._channel(message.source, message.session)
            if channel.seal is None:
                raise self._misused(message.source, "plaintext, as this party has no certificate", "an offer of keys")
            self._offer(message.source, message.session, channel)
            channel.seal.accept(offer, now=datetime.now(UTC))
        coordinator.unpark(message.source)

    def _open(self, message: Relay, arrival: Arrival) -> None:
        with self._lock:
            channel = self._channel(message.source, message.session)
        if message.sealed != (channel.seal is not None) or message.counter != channel.received:
            raise self._misused(
                message.source,
                f"{'plain' if channel.seal is None else 'sealed'}, number {channel.received}",
                f"{'sealed' if message.sealed else 'plain'}, number {message.counter}",
            )
        plain: bytes | memoryview = arrival.payload
        if channel.seal is not None:
            plain = channel.seal.open(arrival.payload, arrival.control)
        channel.received += 1
        for whole in channel.incoming.feed(plain):
            if not whole.skipped:
                self._steward.deliver(message.source, whole.frame)

    def _channel(self, name: str, session: int) -> _Channel:
        """Return the way to a party in a session, made when first needed; the lock is held."""
        if session < self._session:
            raise SessionReset("the session is over")
        if session > self._session:
            self._session, self._channels = session, {}
        if name not in self._channels:
            seal, settings = None, self._settings
            if settings.credentials is not None:
                context = "\0".join((settings.run, settings.digest, str(session)))
                seal = Seal(settings.credentials, name, context.encode())
            self._channels[name] = _Channel(
                seal, Assembler(self._run, lambda head: self._admit(name, head), piece=RELAY_PIECE)
            )
        return self._channels[name]

    def _admit(self, name: str, head: Arrival) -> bool | None:
        if head.label is None:
            raise WireError(
                "only tensors are relayed",
                where=f"from {name}",
                got=f"kind {head.header.kind}",
                remedy="install the same release of cutlayer at all parties",
                code="E513",
            )
        return self._steward.admit(name, head.label, None)

    def _offer(self, to: str, session: int, channel: _Channel) -> None:
        if channel.seal is None or channel.offered:
            return
        channel.offered = True
        message = SealOffer(session, self._settings.party, to)
        offer = channel.seal.offer()
        self._steward.peers[self._settings.coordinator].put(
            Parcel(
                kind=control.SEAL_OFFER,
                control=control.encode(message),
                payload=offer,
                size=len(offer),
                urgent=True,
            )
        )

    @staticmethod
    def _parcel(seal: Seal | None, message: Relay, piece: _Piece) -> Parcel:
        """Return one piece as a frame; it is sealed when it leaves, so that counters are in order."""
        part = control.encode(message)
        render = piece.make if seal is None else (lambda: seal.seal(memoryview(piece.make()), part))
        return Parcel(kind=control.RELAY, control=part, size=piece.size, render=render)

    def _misused(self, source: str, expected: str, got: str) -> ContractError:
        return _misused(self._settings.party, source, expected, got)


@dataclass(frozen=True)
class _Piece:
    """A message of a frame that is still to be made, and its size."""

    size: int
    make: Callable[[], Buffer]


def _pieces(header: Header, frame: Frame) -> list[_Piece]:
    view = flat(frame.payload)

    def first() -> Buffer:
        return next(messages(header, frame.control, view, piece=RELAY_PIECE))

    def further(piece: memoryview) -> _Piece:
        return _Piece(piece.nbytes, lambda: piece)

    return [
        _Piece(frame.framing + min(view.nbytes, RELAY_PIECE), first),
        *(further(view[start : start + RELAY_PIECE]) for start in range(RELAY_PIECE, view.nbytes, RELAY_PIECE)),
    ]


def _misused(party: str, source: str, expected: str, got: str) -> ContractError:
    return ContractError(
        "a relayed frame is not what it may be",
        where=f"party {party}, relayed from {source}",
        expected=expected,
        got=got,
        remedy="install the same release of cutlayer, and the same contract, at all parties",
        code="E529",
    )
