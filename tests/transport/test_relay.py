"""The relay: the coordinator sees names and sizes, never contents, and hands on nothing that it should not."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from cutlayer.engine.wire import Header
from cutlayer.errors import CertificateError, ContractError, PeerError, WireError
from cutlayer.transport import control, relay
from cutlayer.transport.control import Relay, SealOffer
from cutlayer.transport.frames import Arrival
from cutlayer.transport.network import Network
from cutlayer.transport.peer import Peer, Stream
from cutlayer.transport.relay import Forwarder, Relays
from cutlayer.transport.seal import Seal
from cutlayer.transport.session import Start
from cutlayer.transport.steward import Steward
from tests.transport.parties import Cast, Everything, frame_of, meet, tag_of

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("no_thread_stays")]
TO_NOBODY = ("clinic", "server", "nobody", "desk")
CANARY = b"canary-7f3a9c-patient-record"


@pytest.fixture
def forwarded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bytes, bytes]]:
    """What the coordinator hands on: control parts and payloads."""
    seen: list[tuple[bytes, bytes]] = []
    original = Forwarder.forward

    def forward(self: Forwarder, peer: Peer, message: Any, arrival: Arrival) -> None:
        seen.append((arrival.control, bytes(arrival.payload)))
        original(self, peer, message, arrival)

    monkeypatch.setattr(Forwarder, "forward", forward)
    return seen


@pytest.mark.parametrize("secure", [True, False], ids=["sealed", "plain"])
def test_the_coordinator_cannot_read_what_it_relays(cast: Cast, forwarded: list[tuple[bytes, bytes]], secure: bool):
    if secure:
        cast.certify()
    payload = CANARY * 100_000  # more than two pieces

    def server(network: Network) -> None:
        meet(network, {})
        network.finish()

    def clinic(network: Network) -> None:
        session = meet(network, {"lab": 1})
        network.send("lab", frame_of(session, 0, payload))
        assert bytes(network.recv("lab", tag_of(session, 1)).payload) == payload[::-1]
        network.finish()

    def lab(network: Network) -> None:
        session = meet(network, {"clinic": 1})
        got = bytes(network.recv("clinic", tag_of(session, 0)).payload)
        assert got == payload
        network.send("clinic", frame_of(session, 1, got[::-1]))
        network.finish()

    assert cast.play({"server": server, "clinic": clinic, "lab": lab}) == dict.fromkeys(cast.names)
    everything = b"".join(part + body for part, body in forwarded)
    assert len(everything) > 2 * len(payload)
    seen = CANARY in everything or CANARY[::-1] in everything
    assert seen != secure  # in plaintext it must be seen, or this test could not fail
    if secure:
        packed = np.frombuffer(b"".join(body for _, body in forwarded), np.uint8)
        assert abs(np.bincount(packed, minlength=256) / packed.size - 1 / 256).max() < 0.001  # as random bytes are


def test_a_coordinator_that_changes_a_sealed_frame_is_found_out(cast: Cast, monkeypatch: pytest.MonkeyPatch):
    cast.certify()
    original = Forwarder.forward

    def forward(self: Forwarder, peer: Peer, message: Any, arrival: Arrival) -> None:
        if isinstance(message, Relay):
            arrival.payload[30] ^= 1
        original(self, peer, message, arrival)

    monkeypatch.setattr(Forwarder, "forward", forward)
    results = cast.play({"server": waits("clinic"), "clinic": sends_to("lab"), "lab": waits("clinic")})
    assert isinstance(results["lab"], WireError)
    assert results["lab"].code == "E516"
    for name in ("server", "clinic"):
        assert isinstance(results[name], PeerError)
        assert "lab" in results[name].what


def test_a_coordinator_that_puts_itself_between_is_found_out(cast: Cast, monkeypatch: pytest.MonkeyPatch):
    cast.certify()
    original = Forwarder.forward

    def forward(self: Forwarder, peer: Peer, message: Any, arrival: Arrival) -> None:
        if isinstance(message, SealOffer):
            own = Seal(cast.credentials["server"], message.target, b"\0".join((b"test", b"0123456789abcdef" * 4, b"1")))
            arrival = Arrival(arrival.header, arrival.control, memoryview(bytearray(own.offer())))
        original(self, peer, message, arrival)

    monkeypatch.setattr(Forwarder, "forward", forward)
    results = cast.play({"server": waits("clinic"), "clinic": sends_to("lab"), "lab": waits("clinic")})
    assert isinstance(results["lab"], CertificateError), results
    assert results["lab"].code == "E665"


def sends_to(other: str):
    def run(network: Network) -> None:
        session = meet(network)
        network.send(other, frame_of(session, 0, b"hello" * 10))
        network.recv(other, tag_of(session, 9))

    return run


def waits(source: str):
    def run(network: Network) -> None:
        network.recv(source, tag_of(meet(network), 0))

    return run


def test_many_small_and_large_frames_both_ways_at_once(cast: Cast):
    """More than a window each way: acknowledgements from the far end keep everything moving."""
    steps, sizes = 400, [0, 100, 50_000, 3_000_000]

    def talk(other: str):
        def run(network: Network) -> None:
            session = meet(network, {other: steps})
            got: list[int] = []

            def take() -> None:
                got.extend(network.recv(other, tag_of(session, step)).nbytes for step in range(steps))

            taker = threading.Thread(target=take)
            taker.start()
            for step in range(steps):
                network.send(other, frame_of(session, step, bytes(sizes[step % 97 % 4] if step % 97 < 4 else 10)))
            taker.join(40)
            assert got == [sizes[step % 97 % 4] if step % 97 < 4 else 10 for step in range(steps)]
            network.finish()

        return run

    def server(network: Network) -> None:
        meet(network, {})
        network.finish()

    results = cast.play({"server": server, "clinic": talk("lab"), "lab": talk("clinic")})
    assert results == dict.fromkeys(cast.names)


# --- what the coordinator refuses --------------------------------------------------------------------------------


def arrival(message: Relay | SealOffer, payload: bytes) -> Arrival:
    part = control.encode(message)
    header = Header(control.kind_of(message), len(part), len(payload), 1, 0)
    return Arrival(header, part, memoryview(bytearray(payload)))


@pytest.fixture
def office(cast: Cast) -> tuple[Forwarder, Steward]:
    """A coordinator in session 1, without any stream."""
    cast.names = ("server", "clinic", "lab", "desk")
    cast.addressed = ("server", "desk")
    settings = cast.settings("server", limit=1000)
    peers = {name: Peer(name, settings) for name in settings.others}
    steward = Steward(settings, peers, lambda name, facts: None)
    assert steward.conductor is not None
    for number, name in enumerate(cast.names):
        steward.conductor.meet(name, number + 1)
        steward.conductor.on_ready(name, control.Ready(0, {}, ()))
    return Forwarder(settings, steward), steward


def queued(steward: Steward) -> dict[str, int]:
    return {name: len(peer.link.outbox.all()) for name, peer in steward.peers.items()}


def test_a_proper_frame_is_handed_on_as_it_is_and_acknowledged_when_it_has_arrived(office):
    forwarder, steward = office
    hello = control.LinkHello(control.PROTOCOL, "1", "lab", "d", "test", 3, 0, 1)
    sender, receiver = steward.peers["clinic"], steward.peers["lab"]
    sender.link.inbox.complete(1, 10)
    forwarder.forward(sender, message := Relay(1, "clinic", "lab", True, 0), frame := arrival(message, b"x" * 10))
    assert sender.link.inbox.due() is None
    [parcel] = receiver.link.outbox.all()
    assert (parcel.kind, parcel.control, bytes(parcel.payload)) == (control.RELAY, frame.control, b"x" * 10)
    receiver.attach(stream := Stream(cancel=lambda: None), hello, steward.incarnation)
    receiver.link.outbox.next()
    assert sender.link.inbox.due() is None
    receiver.acknowledged(stream, 1)
    assert sender.link.inbox.due() == (1, False)


@pytest.mark.parametrize("make", [lambda *ends: Relay(1, *ends, True, 0), lambda *ends: SealOffer(1, *ends)])
@pytest.mark.parametrize(
    "ends",
    [tuple(pair.split()) for pair in ("lab clinic", "server lab", *(f"clinic {to}" for to in TO_NOBODY))],
    ids="-".join,
)
def test_a_frame_in_anothers_name_or_for_nobody_is_refused(office, make, ends: tuple[str, str]):
    forwarder, steward = office
    message = make(*ends)
    with pytest.raises(ContractError) as caught:
        forwarder.forward(steward.peers["clinic"], message, arrival(message, b""))
    assert caught.value.code == "E529"
    assert set(queued(steward).values()) == {0}


def test_a_frame_above_the_limit_is_refused(office):
    forwarder, steward = office
    message = Relay(1, "clinic", "lab", True, 0)
    with pytest.raises(ContractError):
        forwarder.forward(steward.peers["clinic"], message, arrival(message, bytes(1000 + 2**16 + 100)))


@pytest.mark.parametrize("session", [0, 2])
def test_a_frame_of_another_session_is_dropped(office, session: int):
    forwarder, steward = office
    message = Relay(session, "clinic", "lab", True, 0)
    forwarder.forward(steward.peers["clinic"], message, arrival(message, b""))
    assert set(queued(steward).values()) == {0}


# --- what a member refuses ---------------------------------------------------------------------------------------


@pytest.fixture
def member(cast: Cast) -> tuple[Relays, Steward]:
    """The lab in session 2, open, in plaintext."""
    settings = cast.settings("lab")
    steward = Steward(settings, {"server": Peer("server", settings)}, lambda name, facts: None)
    steward.member.begin(start_with := relay_ready())
    assert start_with.counts == {}
    steward.member.on_start(control.Start(2, {}, -1, {}))
    assert steward.member.take() == Start(2, {}, -1)
    steward.open(Everything(), {"clinic": 5})  # type: ignore[arg-type]
    return Relays(settings, steward), steward


def relay_ready() -> Any:
    from cutlayer.transport.session import Ready

    return Ready({}, ())


def plain(step: int, number: int, payload: bytes = b"abc", session: int = 2) -> bytes:
    frame = frame_of(session, step, payload)
    return frame.head(number, relay.run_number("test")) + payload


def test_a_plain_frame_is_taken_in_order(member):
    relays, steward = member
    for step in range(3):
        message = Relay(2, "clinic", "lab", False, step)
        relays.take(message, arrival(message, plain(step, step + 1)))
    assert bytes(steward.take("clinic", tag_of(2, 2)).payload) == b"abc"


@pytest.mark.parametrize(
    ("message", "payload"),
    [
        (Relay(2, "clinic", "server", False, 0), plain(0, 1)),
        (Relay(2, "server", "lab", False, 0), plain(0, 1)),
        (Relay(2, "nobody", "lab", False, 0), plain(0, 1)),
        (Relay(2, "clinic", "lab", True, 0), plain(0, 1)),
        (Relay(2, "clinic", "lab", False, 1), plain(0, 1)),
        (Relay(2, "clinic", "lab", False, 0), b"nonsense"),
        (Relay(2, "clinic", "lab", False, 0), Header(control.BYE, 0, 0, 1, relay.run_number("test")).pack()),
        (SealOffer(2, "clinic", "lab"), b"offer"),
    ],
    ids=["target", "server", "nobody", "sealed", "counter", "nonsense", "kind", "offer"],
)
def test_what_is_relayed_wrongly_is_refused(member, message: Relay | SealOffer, payload: bytes):
    relays, _ = member
    with pytest.raises((ContractError, WireError)):
        relays.take(message, arrival(message, payload))


@pytest.mark.parametrize("session", [1, 3])
def test_what_belongs_to_another_session_is_dropped(member, session: int):
    relays, steward = member
    message = Relay(session, "clinic", "lab", False, 0)
    relays.take(message, arrival(message, plain(0, 1, session=session)))
    message = Relay(2, "clinic", "lab", False, 0)
    relays.take(message, arrival(message, plain(0, 1)))
    assert list(steward._mailbox._frames["clinic"]) == [tag_of(2, 0)]


def test_plaintext_is_refused_where_there_are_certificates(cast: Cast):
    cast.certify()
    settings = cast.settings("lab")
    steward = Steward(settings, {"server": Peer("server", settings)}, lambda name, facts: None)
    steward.member.begin(relay_ready())
    steward.member.on_start(control.Start(2, {}, -1, {}))
    message = Relay(2, "clinic", "lab", False, 0)
    with pytest.raises(ContractError) as caught:
        Relays(settings, steward).take(message, arrival(message, plain(0, 1)))
    assert caught.value.code == "E529"
