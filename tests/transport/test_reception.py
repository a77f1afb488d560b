"""Messages of a stream that another one has replaced change nothing."""

from __future__ import annotations

from typing import Any

import pytest

from cutlayer.errors import HandshakeError
from cutlayer.transport import control
from cutlayer.transport.handshake import read_hello, single
from cutlayer.transport.link import Parcel
from cutlayer.transport.peer import Peer, Stream, write
from cutlayer.transport.reception import Reception
from cutlayer.transport.relay import Relays
from cutlayer.transport.settings import NetworkSettings
from cutlayer.transport.steward import Steward
from cutlayer.transport.timers import Timers
from cutlayer.transport.watch import Watch

OWN = 5


class Desk:
    """A coordinator whose member has process 11 on one stream, and then process 22 on another."""

    def __init__(self) -> None:
        settings = NetworkSettings(
            party="server",
            parties=("server", "clinic"),
            coordinator="server",
            addresses={"server": "127.0.0.1:7001"},
            run="r",
            digest="d",
        )
        self.peer = Peer("clinic", settings)
        self.steward = Steward(settings, {"clinic": self.peer}, lambda name, facts: None)
        watch = Watch(settings, self.steward, Timers("timers", lambda error: None))
        self.reception = Reception(settings, self.steward, watch, Relays(settings, self.steward))
        self.old, self.new = (Stream(cancel=lambda: None) for _ in range(2))

    def send(self, count: int) -> None:
        for number in range(count):
            self.peer.put(Parcel(kind=control.BYE, control=control.encode(control.Bye(number)), urgent=True))
            assert self.peer.link.outbox.next() is not None


def hello(incarnation: int, **changes: Any) -> control.LinkHello:
    fields = {"known": 0, "wanted": 1, **changes}
    return control.LinkHello(1, "x", "clinic", "d", "r", incarnation, fields["known"], fields["wanted"])


@pytest.fixture
def desk() -> Desk:
    desk = Desk()
    desk.peer.attach(desk.old, hello(11), OWN)
    desk.send(3)
    return desk


LATE = [
    single(control.Ack(1), "r"),
    single(control.Ack(3), "r"),
    single(control.Bye(1), "r", sequence=7),
    single(control.Bye(1), "r", sequence=1),
    single(control.Leave(), "r"),
    single(control.Abort("clinic", "E999", "late", ""), "r"),
    b"nonsense",
]


@pytest.mark.parametrize("closed", [True, False], ids=["closed", "open"])
@pytest.mark.parametrize("late", LATE, ids=["ack", "big ack", "gap", "next", "leave", "abort", "nonsense"])
def test_what_a_replaced_stream_still_brings_is_dropped(desk: Desk, late: bytes, closed: bool):
    desk.peer.attach(desk.new, hello(22), OWN)
    assert desk.old.closed
    desk.old.closed = closed  # as if it had been read just before
    desk.send(1)
    desk.reception.read(desk.peer, desk.old, iter([late]))
    assert desk.steward.failure is None
    assert not desk.peer.left
    assert desk.peer.link.inbox.wanted == 1
    assert not desk.peer.link.outbox.empty
    desk.reception.read(desk.peer, desk.new, iter([single(control.Ack(1), "r"), single(control.Leave(), "r")]))
    assert desk.peer.link.outbox.empty
    assert desk.peer.left


def test_the_replaced_process_is_told(desk: Desk):
    desk.peer.attach(desk.new, hello(22), OWN)
    (last,) = write(desk.peer, desk.old)
    message = read_hello(last)
    assert isinstance(message, control.Abort)
    assert message.code == "E644"


def test_a_replaced_process_is_never_taken_again(desk: Desk):
    desk.peer.attach(desk.new, hello(22), OWN)
    with pytest.raises(HandshakeError) as caught:
        desk.peer.attach(Stream(cancel=lambda: None), hello(11, known=OWN, wanted=4), OWN)
    assert caught.value.code == "E644"
    desk.peer.expect(11)  # a START that was said before the coordinator met its successor
    assert desk.peer.link.remote == 22
    assert desk.peer.stream is desk.new
    assert not desk.new.closed


def test_a_session_with_a_new_process_bars_the_old_one(desk: Desk):
    desk.peer.expect(22)
    assert desk.old.closed
    with pytest.raises(HandshakeError) as caught:
        desk.peer.attach(Stream(cancel=lambda: None), hello(11, known=OWN, wanted=4), OWN)
    assert caught.value.code == "E644"
    desk.peer.attach(desk.new, hello(22), OWN)
    assert desk.peer.stream is desk.new


@pytest.mark.provokes("E647")
def test_a_new_process_cannot_ask_for_what_an_earlier_one_was_sent(desk: Desk):
    with pytest.raises(
        HandshakeError, match=r"a new process asks for what was sent to an earlier one.*expected number 1, got number 2"
    ) as caught:
        desk.peer.attach(desk.new, hello(22, known=OWN, wanted=2), OWN)
    assert caught.value.code == "E647"
    assert desk.peer.stream is desk.old
    assert desk.peer.link.remote == 11
