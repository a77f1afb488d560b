"""A peer's threads: what waits is woken, what is replaced ends, and a full outbox says so."""

from __future__ import annotations

import threading
import time
from itertools import islice

import pytest

from cutlayer.engine.wire import HEADER
from cutlayer.errors import DeadlineError, HandshakeError, PeerError
from cutlayer.transport import control
from cutlayer.transport.control import LinkHello
from cutlayer.transport.frames import MESSAGE_MAX, PIECE
from cutlayer.transport.link import Limits, Parcel
from cutlayer.transport.peer import Peer, Stream, parcel_of, write
from cutlayer.transport.settings import Rhythm
from tests.transport.parties import Cast

pytestmark = [pytest.mark.timeout(20), pytest.mark.usefixtures("no_thread_stays")]
OWN = 5


@pytest.fixture
def peer(cast: Cast) -> Peer:
    rhythm = Rhythm(heartbeat=0.05, idle_ack=0.02)
    return Peer("clinic", cast.settings("server", rhythm=rhythm, limits=Limits(queued_frames=2)))


def hello(incarnation: int = 7, known: int = 0, wanted: int = 1) -> LinkHello:
    return LinkHello(1, "1", "clinic", "d", "test", incarnation, known, wanted)


def attached(peer: Peer, greeting: LinkHello | None = None) -> Stream:
    stream = Stream(cancel=lambda: None)
    peer.attach(stream, greeting or hello(), OWN)
    return stream


def read(message: bytes) -> control.Message:
    return control.decode(message[5], message[HEADER.size :])


def parts(message: bytes) -> list[bytes]:
    """Return the frames of a message, but for further pieces."""
    found = []
    while message:
        _, _, _, _, control_length, payload, _, _ = HEADER.unpack_from(message)
        size = HEADER.size + control_length + min(payload, PIECE)
        found.append(message[:size])
        message = message[size:]
    return found


def tensor(name: bytes = b"x") -> Parcel:
    return Parcel(kind=1, control=name)


def nothing() -> None:
    pass


@pytest.mark.provokes("E622")
def test_a_full_outbox_is_waited_for_and_then_named(peer: Peer):
    attached(peer)
    for _ in range(2):
        peer.put_waiting([tensor()], 1, nothing)
    begin = time.monotonic()
    with pytest.raises(DeadlineError) as caught:
        peer.put_waiting([tensor()], 0.1, nothing)
    assert time.monotonic() - begin < 1
    assert caught.value.code == "E622"
    assert "clinic" in caught.value.what


def test_who_waits_for_room_goes_on_when_frames_are_acknowledged(peer: Peer):
    stream = attached(peer)
    for _ in range(2):
        peer.put_waiting([tensor()], 1, nothing)
    list(islice(write(peer, stream), 2))
    threading.Timer(0.05, lambda: peer.acknowledged(stream, 2)).start()
    peer.put_waiting([tensor(b"third")], 5, nothing)
    assert [one.control for one in peer.link.outbox.all()] == [b"third"]


def test_an_acknowledgement_on_a_replaced_stream_counts_for_nothing(peer: Peer):
    old = attached(peer)
    peer.put(tensor())
    list(islice(write(peer, old), 1))
    new = attached(peer, hello(known=OWN, wanted=2))
    peer.acknowledged(old, 1)
    assert not peer.link.outbox.empty
    peer.acknowledged(new, 1)
    assert peer.link.outbox.empty


def test_who_waits_for_room_learns_of_a_failure(peer: Peer):
    failed = threading.Event()

    def check() -> None:
        if failed.is_set():
            raise PeerError("gone", code="E701")

    for _ in range(2):
        peer.put_waiting([tensor()], 1, check)

    def fail() -> None:
        failed.set()
        with peer.changed:
            peer.changed.notify_all()

    threading.Timer(0.05, fail).start()
    with pytest.raises(PeerError):
        peer.put_waiting([tensor()], 5, check)


def test_an_idle_stream_carries_heartbeats_and_acknowledges_what_came(peer: Peer):
    stream = attached(peer)
    writer = write(peer, stream)
    assert read(next(writer)) == control.Heartbeat()
    assert peer.complete(stream, 1, 0)
    assert read(next(writer)) == control.Ack(1)
    assert read(next(writer)) == control.Heartbeat()


def test_a_drained_stream_acknowledges_and_takes_its_leave(peer: Peer):
    stream = attached(peer)
    peer.complete(stream, 1, 0)
    stream.draining = True
    assert [read(message) for message in write(peer, stream)] == [control.Ack(1), control.Leave()]


def test_a_new_stream_of_the_same_process_goes_on_where_the_old_one_ended(peer: Peer):
    old = attached(peer)
    peer.put(parcel_of(control.Bye(1)), parcel_of(control.Bye(2)))
    assert [read(part) for part in parts(next(write(peer, old)))] == [control.Bye(1), control.Bye(2)]
    peer.complete(old, 1, 0)
    new = attached(peer, hello(known=OWN, wanted=2))
    assert list(write(peer, old)) == []
    assert not peer.complete(old, 2, 0)  # what still comes from the old one does not count
    assert [read(message) for message in islice(write(peer, new), 2)] == [control.Bye(2), control.Ack(1)]


def test_small_frames_leave_together_and_a_large_one_ends_the_message(peer: Peer):
    stream = attached(peer)
    sizes = [10, 20, PIECE // 2 - 50, PIECE + 1, 30]
    peer.put(*(Parcel(kind=1, control=b"x", payload=bytes(size), size=size, urgent=True) for size in sizes))
    for number in range(3):
        peer.complete(stream, number + 1, 2**22)
    leaving = write(peer, stream)
    first = parts(next(leaving))
    assert read(first[0]) == control.Ack(3)
    assert [len(part) - HEADER.size - 1 for part in first[1:]] == [10, 20, PIECE // 2 - 50]
    [large] = parts(next(leaving))
    assert len(large) == HEADER.size + 1 + PIECE <= MESSAGE_MAX
    assert next(leaving) == bytes(1)
    assert len(next(leaving)) == HEADER.size + 1 + 30


def test_what_a_peer_wants_of_an_earlier_process_of_ours_does_not_count(peer: Peer):
    peer.put(parcel_of(control.Bye(1)))
    stream = attached(peer, hello(known=OWN + 1, wanted=50))
    assert read(next(write(peer, stream))) == control.Bye(1)


def test_a_new_process_begins_anew_and_the_old_one_is_told(peer: Peer):
    given_up: list[str] = []
    old = attached(peer)
    peer.complete(old, 1, 0)
    peer.put(Parcel(kind=13, control=b"", done=lambda: given_up.append("x")))
    new = Stream(cancel=lambda: None)
    assert peer.attach(new, hello(incarnation=8), OWN) == 1
    assert given_up == ["x"]
    [last] = write(peer, old)
    message = read(last)
    assert isinstance(message, control.Abort)
    assert message.code == "E644"
    assert read(next(write(peer, new))) == control.Heartbeat()


def test_a_session_with_another_process_ends_the_stream_of_this_one(peer: Peer):
    cancelled: list[str] = []
    stream = Stream(cancel=lambda: cancelled.append("x"))
    peer.attach(stream, hello(incarnation=7), OWN)
    peer.expect(7)
    assert not stream.closed
    peer.expect(8)
    assert stream.closed
    assert cancelled == ["x"]


def test_an_ended_stream_ends_its_writer_at_once(peer: Peer):
    stream = attached(peer)
    threading.Timer(0.02, stream.end).start()
    begin = time.monotonic()
    assert all(isinstance(read(message), control.Heartbeat) for message in write(peer, stream))
    assert time.monotonic() - begin < 1


@pytest.mark.provokes("E649")
def test_who_is_busy_counts_as_alive_for_as_long_as_silence_may_last_once_another_process_asks(cast: Cast):
    """A busy reader hears nothing: of a process that went away without a word nobody would ever know."""
    peer = Peer("clinic", cast.settings("server", rhythm=Rhythm(silence=0.3)))
    stream = attached(peer)
    peer.busy, stream.heard = True, time.monotonic() - 60
    later = Stream(cancel=nothing)
    with pytest.raises(HandshakeError, match="E649"):
        peer.attach(later, hello(8), OWN, patient=True)
    time.sleep(0.35)
    peer.attach(later, hello(8), OWN, patient=True)
    assert peer.stream is later
    peer.busy, later.heard = True, time.monotonic() - 60
    with pytest.raises(HandshakeError, match="E649"):  # the time of the one before does not count
        peer.attach(Stream(cancel=nothing), hello(9), OWN, patient=True)


@pytest.mark.provokes("E644")
def test_a_restart_that_only_tells_why_it_failed_is_heard_once_the_process_before_is_gone(cast: Cast):
    peer = Peer("clinic", cast.settings("server"))
    stream = attached(peer)
    with pytest.raises(HandshakeError, match="E644"):
        peer.attach(Stream(cancel=nothing), hello(8, wanted=0), OWN)
    peer.detach(stream)
    later = Stream(cancel=nothing)
    peer.attach(later, hello(8, wanted=0), OWN)
    assert peer.stream is later
