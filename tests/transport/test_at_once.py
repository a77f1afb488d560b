"""What gRPC's own thread takes in of a message, and what it leaves to the reader because it may have to wait."""

from __future__ import annotations

import gc
import threading
import tracemalloc
from collections.abc import Iterator
from contextlib import nullcontext

import pytest

from cutlayer.engine.wire import Buffer
from cutlayer.transport import control
from cutlayer.transport.frames import run_number
from cutlayer.transport.handshake import single
from cutlayer.transport.link import Parcel
from cutlayer.transport.peer import Peer, Stream
from cutlayer.transport.reception import TAKEN, Reception
from cutlayer.transport.relay import Relays
from cutlayer.transport.session import Ready
from cutlayer.transport.steward import Steward
from cutlayer.transport.timers import Timers
from cutlayer.transport.watch import Watch
from tests.transport.parties import Cast, Everything, frame_of, tag_of

pytestmark = [pytest.mark.timeout(20), pytest.mark.usefixtures("no_thread_stays")]


class Desk:
    """The lab, with a stream from the clinic that it has begun to read."""

    def __init__(self, cast: Cast) -> None:
        cast.addressed = ("server", "clinic")
        settings = cast.settings("lab")
        self.run = settings.run
        self.peer = Peer("clinic", settings)
        peers = {"clinic": self.peer, "server": Peer("server", settings)}
        self.steward = Steward(settings, peers, lambda name, facts: None)
        watch = Watch(settings, self.steward, Timers("timers", lambda error: None))
        self.reception = Reception(settings, self.steward, watch, Relays(settings, self.steward))
        self.stream = Stream(cancel=lambda: None)
        self.peer.attach(self.stream, control.LinkHello(1, "x", "clinic", "d", self.run, 2, 0, 1), 5)
        self.read()

    def open(self, session: int = 1) -> None:
        self.steward.say(self.steward.member.begin(Ready({}, ())))
        self.steward.heard("server", control.Start(session, {}, -1, {"server": 1, "clinic": 2, "lab": 3}))
        assert self.steward.member.take() is not None
        self.steward.open(Everything(), {"server": 5, "clinic": 5})  # type: ignore[arg-type]

    def tensor(self, number: int, payload: bytes = b"x", session: int = 1) -> bytes:
        frame = frame_of(session, number, payload)
        return frame.head(number, run_number(self.run)) + payload

    def read(self, *messages: Buffer) -> None:
        """Give messages to the reader, as gRPC does with what `hear` returned."""
        ear = self.stream.ear

        def given() -> Iterator[Buffer]:
            nonlocal ear
            ear = ear or self.stream.ear
            yield from messages

        self.reception.read(self.peer, self.stream, given())
        assert self.stream.ear is None
        self.stream.ear = ear

    def here(self) -> list[int]:
        return [tag.step for tag in self.steward._mailbox._frames["clinic"]]


@pytest.fixture
def desk(cast: Cast) -> Desk:
    return Desk(cast)


def test_before_anybody_reads_all_is_left():
    assert Stream(cancel=lambda: None).hear(b"hello") == b"hello"


def test_small_tensors_of_the_open_session_are_taken_in_at_once(desk: Desk):
    desk.open()
    assert desk.stream.hear(desk.tensor(1) + desk.tensor(2)) is TAKEN
    assert desk.here() == [1, 2]
    assert desk.peer.link.inbox.wanted == 3
    desk.read(TAKEN)  # what the reader gets then
    assert desk.steward.failure is None


def test_a_driver_that_waits_gets_it_without_a_reader(desk: Desk):
    desk.open()
    taken: list[bytes] = []
    waiting = threading.Thread(target=lambda: taken.append(bytes(desk.steward.take("clinic", tag_of(1, 1)).payload)))
    waiting.start()
    assert desk.stream.hear(desk.tensor(1, b"abc")) is TAKEN
    waiting.join(5)
    assert taken == [b"abc"]


def test_acknowledgements_are_taken_in_at_once(desk: Desk):
    desk.peer.put(Parcel(kind=control.BYE, control=control.encode(control.Bye(1)), urgent=True))
    assert desk.peer.link.outbox.next() is not None
    assert desk.stream.hear(single(control.Ack(1), desk.run) + single(control.Heartbeat(), desk.run)) is TAKEN
    assert desk.peer.link.outbox.empty


def test_what_may_wait_is_left_with_all_that_follows_it(desk: Desk):
    desk.open()
    notice = single(control.Leave(), desk.run)
    rest = desk.stream.hear(desk.tensor(1) + notice + desk.tensor(2))
    assert rest == notice + desk.tensor(2)
    assert desk.here() == [1]
    assert not desk.peer.left
    desk.read(rest)
    assert desk.peer.left
    assert desk.here() == [1, 2]


@pytest.mark.parametrize("kept", [0, 1], ids=["first", "second"])
def test_a_tensor_of_a_session_that_is_not_open_waits_with_the_reader(desk: Desk, kept: int):
    if kept:
        desk.open()
    early = desk.tensor(1 + kept, b"early", session=1 + kept)
    before = desk.tensor(1) if kept else b""
    assert desk.stream.hear(before + early) == early
    assert desk.steward._mailbox._frames.get("clinic", {}).keys() == ({tag_of(1, 1)} if kept else set())
    reader = threading.Thread(target=desk.read, args=(early,))
    reader.start()
    desk.open(1 + kept)
    reader.join(5)
    assert desk.here() == [1 + kept]
    assert bytes(desk.steward.take("clinic", tag_of(1 + kept, 1 + kept)).payload) == b"early"


def test_many_frames_in_one_message_keep_that_thread_for_a_few_only(desk: Desk):
    beat = single(control.Heartbeat(), desk.run)
    assert desk.stream.hear(32 * beat) is TAKEN
    assert desk.stream.hear(100 * beat) == 68 * beat
    desk.read(68 * beat)
    assert desk.steward.failure is None


def test_what_has_come_of_a_frame_goes_with_its_stream(desk: Desk):
    desk.open()
    payload = bytes(2**21)
    first = frame_of(1, 1, payload).head(1, run_number(desk.run)) + payload[: 2**20]
    tracemalloc.start()
    gc.disable()
    try:
        desk.reception.read(desk.peer, desk.stream, iter([first]))
        assert tracemalloc.get_traced_memory()[0] < 2**20
        assert tracemalloc.get_traced_memory()[1] > 2**21
    finally:
        gc.enable()
        tracemalloc.stop()


@pytest.mark.parametrize("busy", [False, True])
def test_an_empty_message_is_wrong_whoever_gets_it(desk: Desk, busy: bool):
    def messages() -> Iterator[Buffer]:
        with desk.peer.inbound if busy else nullcontext():
            given = desk.stream.hear(b"")
        yield given

    desk.reception.read(desk.peer, desk.stream, messages())
    assert desk.steward.failure is not None
    assert desk.steward.failure.code == "E501"


def test_a_long_message_is_left_to_the_reader(desk: Desk):
    desk.open()
    message = desk.tensor(1, bytes(2**17))
    assert desk.stream.hear(message) is message
    assert desk.here() == []
    desk.read(message)
    assert desk.here() == [1]


def test_a_last_short_piece_of_a_long_frame_is_taken_in_at_once(desk: Desk):
    desk.open()
    payload = bytes(2**20) + b"end"
    head = frame_of(1, 1, payload).head(1, run_number(desk.run))
    first = head + payload[: 2**20]
    reading = threading.Event()

    def messages() -> Iterator[Buffer]:
        yield desk.stream.hear(first)
        reading.set()
        assert desk.stream.hear(payload[2**20 :]) is TAKEN

    desk.reception.read(desk.peer, desk.stream, messages())
    assert reading.is_set()
    assert bytes(desk.steward.take("clinic", tag_of(1, 1)).payload) == payload


def test_nothing_is_taken_in_while_an_older_stream_acts(desk: Desk):
    desk.open()
    with desk.peer.inbound:
        message = desk.tensor(1)
        assert desk.stream.hear(message) is message
    assert desk.here() == []
    assert desk.stream.hear(message) is TAKEN
    assert desk.here() == [1]


@pytest.mark.parametrize("wrong", [b"nonsense", b""], ids=["nonsense", "empty"])
def test_what_is_wrong_fails_the_run_at_once_and_the_peer_is_told(desk: Desk, wrong: bytes):
    desk.open()

    def messages() -> Iterator[Buffer]:
        for message in (desk.tensor(1), wrong, desk.tensor(2)):
            yield desk.stream.hear(message)

    desk.reception.read(desk.peer, desk.stream, messages())
    assert desk.steward.failure is not None
    assert desk.steward.failure.code == "E501"
    assert b"E501" in desk.stream.farewell
    assert desk.peer.link.inbox.wanted == 2


def test_what_a_replaced_stream_still_brings_is_dropped(desk: Desk):
    desk.open()
    old, new = desk.stream, Stream(cancel=lambda: None)
    desk.peer.attach(new, control.LinkHello(1, "x", "clinic", "d", desk.run, 2, 5, 1), 5)
    old.hear(desk.tensor(1))
    assert desk.here() == []
    old.closed = False  # as if it had been heard just before
    old.hear(desk.tensor(1))
    old.hear(b"nonsense")
    assert desk.here() == []
    assert desk.steward.failure is None
