"""A party's state: which frames wait, which are dropped, and who may say what."""

from __future__ import annotations

import threading
import time

import pytest

from cutlayer.core.program import Tag
from cutlayer.errors import CutlayerError, PeerError, ProgramError, StageError, WireError
from cutlayer.transport import control
from cutlayer.transport.peer import Peer, Stream
from cutlayer.transport.session import Ready, SessionReset
from cutlayer.transport.steward import Steward
from tests.transport.parties import Cast, Everything, frame_of, tag_of

pytestmark = [pytest.mark.timeout(20), pytest.mark.usefixtures("no_thread_stays")]


class Office:
    """The lab's steward, with direct links to server and clinic, and what it told people."""

    def __init__(self, cast: Cast, party: str = "lab") -> None:
        cast.addressed = ("server", "clinic")
        settings = cast.settings(party)
        self.events: list[str] = []
        self.peers = {name: Peer(name, settings) for name in settings.others}
        self.steward = Steward(settings, self.peers, lambda name, facts: self.events.append(name))

    def start(self, session: int) -> None:
        self.steward.say(self.steward.member.begin(Ready({}, ())))
        message = control.Start(session, {}, -1, {"server": 1, "clinic": 2, "lab": 3})
        self.steward.heard("server", message)
        assert self.steward.member.take() is not None

    def open(self, session: int) -> None:
        self.start(session)
        self.steward.open(Everything(), {"server": 5, "clinic": 5})  # type: ignore[arg-type]

    def said(self, name: str) -> list[control.Message]:
        return [control.decode(one.kind, one.control) for one in self.peers[name].link.outbox.all()]


@pytest.fixture
def office(cast: Cast) -> Office:
    return Office(cast)


def label(session: int) -> tuple[Tag, str, tuple[int, ...]]:
    return tag_of(session, 0), "uint8", (1,), ()


def test_a_frame_of_the_open_session_is_admitted_and_one_of_an_older_is_dropped(office: Office):
    office.open(2)
    assert office.steward.admit("clinic", label(2), None)
    assert not office.steward.admit("clinic", label(1), None)


def test_a_frame_waits_for_its_session_on_a_direct_link(office: Office):
    admitted: list[bool] = []
    stream = Stream(cancel=lambda: None)
    waiting = threading.Thread(target=lambda: admitted.append(office.steward.admit("clinic", label(1), stream)))
    waiting.start()
    time.sleep(0.05)
    office.start(1)
    time.sleep(0.05)
    assert admitted == []
    office.steward.open(Everything(), {"clinic": 5})  # type: ignore[arg-type]
    waiting.join(5)
    assert admitted == [True]


def test_a_frame_of_an_older_life_is_dropped_at_once_where_start_would_come_first(office: Office):
    """It would stand in the way of the START that must come behind it."""
    stream = Stream(cancel=lambda: None)
    assert not office.steward.admit("server", label(1), stream)
    assert not office.steward.admit("clinic", label(1), None)  # relayed


@pytest.mark.parametrize("how", ["reset", "failure", "closing", "stream"])
def test_a_waiting_frame_is_dropped_when_it_can_no_longer_come(office: Office, how: str):
    office.start(1)
    steward, admitted = office.steward, []
    stream = Stream(cancel=lambda: None)
    waiting = threading.Thread(target=lambda: admitted.append(steward.admit("clinic", label(1), stream)))
    waiting.start()
    time.sleep(0.05)
    with steward.changed:
        if how == "reset":
            steward.heard("server", control.Reset(1, "clinic"))
        elif how == "failure":
            steward.fail(StageError("x"))
        elif how == "closing":
            steward.closing = True
        else:
            stream.end()
        steward.changed.notify_all()
    waiting.join(5)
    assert admitted == [False]


def test_a_reset_wakes_the_driver_once_and_the_next_session_is_clean(office: Office):
    office.open(1)
    office.steward.deliver("clinic", frame_of(1, 0, b"x"))
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            office.steward.take("clinic", tag_of(1, 9))
        except SessionReset as reset:
            caught.append(reset)

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.05)
    office.steward.heard("server", control.Reset(1, "clinic"))
    office.steward.heard("server", control.Reset(1, "clinic"))
    waiting.join(5)
    assert [str(reset) for reset in caught] == ["clinic restarted"]
    assert office.events == ["reset"]
    with pytest.raises(SessionReset):
        office.steward.check()
    office.open(2)
    office.steward.check()
    office.steward.deliver("clinic", frame_of(1, 1, b"old"))
    office.steward.deliver("clinic", frame_of(2, 0, b"new"))
    assert bytes(office.steward.take("clinic", tag_of(2, 0)).payload) == b"new"
    assert list(office.steward._mailbox._frames["clinic"]) == []


def test_another_process_of_a_third_party_ends_the_session_and_the_coordinator_learns_it(office: Office):
    office.open(1)
    office.steward.met("clinic", 2, known=False)
    office.steward.check()
    office.steward.met("clinic", 99, known=True)
    with pytest.raises(SessionReset):
        office.steward.check()
    office.steward.say(office.steward.member.begin(Ready({}, ())))
    assert office.said("server")[-1] == control.Ready(1, {}, ())


def test_a_session_is_held_with_the_processes_that_its_start_names(office: Office):
    office.peers["clinic"].link.adopt(9)  # met before it was restarted
    office.start(1)
    assert {name: peer.link.remote for name, peer in office.peers.items()} == {"server": 1, "clinic": 2}


def test_another_process_of_the_coordinator_ends_the_session_or_is_told_again(office: Office):
    office.steward.say(office.steward.member.begin(Ready({"train": 1}, ())))
    office.steward.met("server", 1, known=True)
    assert office.said("server") == [control.Ready(0, {"train": 1}, ())] * 2
    office.open(4)
    office.steward.met("server", 9, known=True)
    with pytest.raises(SessionReset):
        office.steward.check()


def test_the_first_failure_counts_and_is_told_once(office: Office):
    first = StageError("a stage failed", code="E301", remedy="mend it")
    office.steward.fail(first)
    office.steward.fail(StageError("later"))
    with pytest.raises(StageError) as caught:
        office.steward.check()
    assert caught.value is first
    assert office.said("server") == [control.Abort("lab", "E301", "a stage failed", "mend it")]
    assert office.said("clinic") == []
    assert office.events == ["aborted"]


@pytest.mark.provokes("E703")
def test_the_coordinator_hands_an_abort_on_to_all_others(cast: Cast):
    office = Office(cast, "server")
    message = control.Abort("lab", "E301", "a stage failed", "mend it")
    office.steward.heard("lab", message)
    assert office.said("clinic") == [message]
    assert office.said("lab") == []
    with pytest.raises(PeerError, match=r"lab failed: a stage failed.*got E301 at lab. at lab: mend it") as caught:
        office.steward.check()
    assert caught.value.code == "E703"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("clinic", control.Ready(0, {}, ())),
        ("clinic", control.Bye(1)),
        ("clinic", control.Start(1, {}, -1, {})),
        ("clinic", control.Reset(1, "server")),
        ("clinic", control.Abort("server", "E301", "", "")),
    ],
)
def test_sessions_are_the_coordinators_business(office: Office, source: str, message: control.Message):
    with pytest.raises(WireError) as caught:
        office.steward.heard(source, message)
    assert caught.value.code == "E513"
    assert office.steward.failure is None


def test_nothing_is_taken_outside_of_a_session(office: Office):
    with pytest.raises(ProgramError) as caught:
        office.steward.take("server", tag_of(1, 0))
    assert caught.value.code == "E430"
    office.start(1)
    office.steward.heard("server", control.Reset(1, "clinic"))
    with pytest.raises(SessionReset):
        office.steward.open(Everything(), {})  # type: ignore[arg-type]
    with pytest.raises((SessionReset, CutlayerError)):
        office.steward.take("server", tag_of(1, 0))
