"""The state of a link: with cuts, restarts and full windows, each frame arrives once, in order, or is given up."""

from __future__ import annotations

import random
from collections import deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cutlayer.errors import ContractError, WireError
from cutlayer.transport.link import Inbox, Limits, Link, Outbox, Parcel, Ticket

TIGHT = Limits(queued_frames=6, queued_bytes=4000, window_frames=4, window_bytes=2000, ack_frames=2, ack_bytes=1000)


def parcel(name: str, *, size: int = 0, urgent: bool = False, **rest: object) -> Parcel:
    return Parcel(kind=1, control=name.encode(), size=size, urgent=urgent, **rest)  # type: ignore[arg-type]


def name_of(item: tuple[int, Parcel]) -> str:
    return item[1].control.decode()


class Side:
    """One process: its link, what it put on the wire, what it got, and what was done with its own frames."""

    def __init__(self, incarnation: int) -> None:
        self.incarnation = incarnation
        self.link = Link(TIGHT)
        self.wire: deque[tuple[str, int, str, int]] = deque()
        self.got: list[str] = []
        self.tickets: list[Ticket] = []
        self.finished: list[str] = []
        self.owed: list[str] = []  # given to the link in this life of it
        self.count = 0

    def hello(self) -> tuple[int, int, int]:
        return self.incarnation, self.link.remote, self.link.inbox.wanted

    def meet(self, hello: tuple[int, int, int]) -> None:
        incarnation, known, wanted = hello
        meeting, dropped = self.link.adopt(incarnation)
        if meeting == "restarted":
            self.owed.clear()
            self.got.clear()
            self.tickets.clear()
        self.finished += [one.control.decode() for one in dropped]
        self.link.resume(wanted if known == self.incarnation else 1)


WEIGHTS = {
    "push": 5, "park": 1, "write": 6, "acknowledge": 3, "read": 6, "release": 2, "give_up": 1,
    "cut": 1, "mend": 3, "blink": 1, "kill": 1,
}  # fmt: skip
ACTIONS = [action for action, weight in WEIGHTS.items() for _ in range(weight)]


class Cable(RuleBasedStateMachine):
    """Two processes, a cable between them that can be cut, and processes that can be killed.

    One rule, so that each example has everything: hypothesis leaves out some of the rules in each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.incarnations = iter(range(1, 10**6))
        self.sides = [Side(next(self.incarnations)), Side(next(self.incarnations))]
        self.up, self.delivered = False, 0
        self.mend(0, 0)

    @rule(action=st.sampled_from(ACTIONS), side=st.integers(0, 1), number=st.integers(0, 5))
    def step(self, action: str, side: int, number: int) -> None:
        getattr(self, action)(side, number)

    def push(self, side: int, number: int) -> None:
        one, urgent, size = self.sides[side], number > 3, (0, 10, 700, 5000, 0, 10)[number]
        if not urgent and one.link.outbox.full:
            return
        one.count += 1
        name = f"{'u' if urgent else 't'}{one.incarnation}.{one.count}"
        one.owed.append(name)
        one.link.outbox.push(parcel(name, size=size, urgent=urgent))

    def park(self, side: int, number: int) -> None:
        one = self.sides[side]
        for _ in range(number):
            if not one.link.outbox.full:
                one.count += 1
                one.owed.append(f"t{one.incarnation}.{one.count}")
                one.link.outbox.park("x", parcel(one.owed[-1]))
        one.link.outbox.unpark("x")

    def write(self, side: int, number: int) -> None:
        one = self.sides[side]
        for _ in range(number + 1):
            item = one.link.outbox.next() if self.up else None
            if item is not None:
                one.wire.append(("frame", item[0], name_of(item), item[1].size))

    def acknowledge(self, side: int, number: int) -> None:
        one = self.sides[side]
        due = one.link.inbox.due() if self.up else None
        if due is not None:
            one.link.inbox.told(due[0])
            one.wire.append(("ack", due[0], "", 0))

    def read(self, side: int, number: int) -> None:
        sender, receiver = self.sides[side], self.sides[1 - side]
        for _ in range(number + 1):
            if sender.wire:
                self.take(receiver, *sender.wire.popleft(), hold=number == 5)

    def take(self, receiver: Side, what: str, number: int, name: str, size: int, *, hold: bool) -> None:
        inbox = receiver.link.inbox
        if what == "ack":
            receiver.finished += [one.control.decode() for one in receiver.link.outbox.acknowledged(number)]
        elif inbox.judge(number):
            assert inbox.complete(number, size)
            receiver.got.append(name)
            self.delivered += 1
            if hold and size < 1000 and len(receiver.tickets) < TIGHT.window_frames:
                receiver.tickets.append(inbox.hold(size))
        else:
            assert not inbox.complete(number, size)

    def release(self, side: int, number: int) -> None:
        one = self.sides[side]
        if one.tickets:
            one.link.inbox.release(one.tickets.pop(number % len(one.tickets)))

    def give_up(self, side: int, number: int) -> None:
        one = self.sides[side]
        gone = {each.control.decode() for each in one.link.outbox.drop_unsent()}
        assert all(name.startswith("t") for name in gone)
        one.owed = [name for name in one.owed if name not in gone]
        one.finished += sorted(gone)

    def cut(self, side: int, number: int) -> None:
        self.up = False
        for one in self.sides:
            one.wire.clear()

    def mend(self, side: int, number: int) -> None:
        if not self.up:
            first, second = self.sides
            dialled = first.hello()
            second.meet(dialled)
            first.meet(second.hello())
            self.up = True

    def blink(self, side: int, number: int) -> None:
        """Cut and mend at once; what was on its way is lost."""
        self.cut(side, number)
        self.mend(side, number)

    def kill(self, side: int, number: int) -> None:
        self.cut(side, number)
        self.sides[side] = Side(next(self.incarnations))

    @invariant()
    def each_frame_once_and_each_lane_in_order(self) -> None:
        for side in (0, 1):
            sender, receiver = self.sides[side], self.sides[1 - side]
            if receiver.link.remote != sender.incarnation or sender.link.remote != receiver.incarnation:
                continue
            for lane in "ut":
                got = [name for name in receiver.got if name[0] == lane]
                owed = [name for name in sender.owed if name[0] == lane]
                assert got == owed[: len(got)]

    @invariant()
    def nothing_is_finished_twice(self) -> None:
        for one in self.sides:
            assert len(one.finished) == len(set(one.finished))

    @invariant()
    def windows_are_kept(self) -> None:
        for one in self.sides:
            tensors = [each for _, each in one.link.outbox._sent if not each.urgent]
            assert len(tensors) <= TIGHT.window_frames
            assert sum(each.size for each in tensors[:-1]) < TIGHT.window_bytes

    def teardown(self) -> None:
        """With a cable that holds, all that is owed arrives and is acknowledged."""
        self.mend(0, 0)
        for one in self.sides:
            for ticket in one.tickets:
                one.link.inbox.release(ticket)
            one.tickets.clear()
        for _ in range(1000):
            if all(one.link.outbox.empty and not one.wire for one in self.sides):
                break
            for side in (0, 1):
                self.write(side, 0)
                self.acknowledge(side, 0)
                self.read(side, 1)
        for side in (0, 1):
            sender, receiver = self.sides[side], self.sides[1 - side]
            assert sorted(receiver.got) == sorted(sender.owed)
            assert sender.link.outbox.empty
            assert (sender.link.outbox._frames, sender.link.outbox._bytes, sender.link.outbox._away) == (0, 0, 0)
        self.each_frame_once_and_each_lane_in_order()


Cable.TestCase.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
TestCable = Cable.TestCase


def test_long_random_walks():
    """Longer and busier than what hypothesis draws, and the same each time."""
    delivered = 0
    for seed in range(300):
        dice, cable = random.Random(seed), Cable()
        for _ in range(150):
            action = dice.choice(ACTIONS)
            if action in ("cut", "kill") and dice.random() < 0.7:
                continue
            getattr(cable, action)(dice.randrange(2), dice.randrange(6))
            cable.each_frame_once_and_each_lane_in_order()
            cable.nothing_is_finished_twice()
            cable.windows_are_kept()
        delivered += cable.delivered
        cable.teardown()
    assert delivered > 3000, delivered


# --- the rules one by one ----------------------------------------------------------------------------------------


def test_urgent_frames_overtake_tensors_but_not_what_was_numbered():
    outbox = Outbox(Limits())
    outbox.push(parcel("a"))
    outbox.push(parcel("b"))
    assert name_of(outbox.next()) == "a"
    outbox.push(parcel("c", urgent=True))
    assert [name_of(outbox.next()) for _ in range(2)] == ["c", "b"]
    assert outbox.next() is None
    outbox.resume(1)
    assert [(item[0], name_of(item)) for item in (outbox.next(), outbox.next(), outbox.next())] == [
        (1, "a"),
        (2, "c"),
        (3, "b"),
    ]


def test_an_outbox_is_full_by_frames_or_bytes_and_empties_by_acknowledgement():
    outbox = Outbox(Limits(queued_frames=2, queued_bytes=10_000))
    outbox.push(parcel("a"))
    assert not outbox.full
    outbox.push(parcel("b"))
    assert outbox.full
    for _ in range(2):
        outbox.next()
    assert outbox.full
    assert [one.control for one in outbox.acknowledged(1)] == [b"a"]
    assert not outbox.full
    outbox.acknowledged(2)
    outbox.push(parcel("huge", size=10**9))
    assert outbox.full
    assert not outbox.empty


def test_the_window_holds_tensors_back_and_lets_urgent_frames_pass():
    outbox = Outbox(Limits(window_frames=2))
    for name in "abc":
        outbox.push(parcel(name))
    assert [name_of(outbox.next()) for _ in range(2)] == ["a", "b"]
    assert outbox.next() is None
    outbox.push(parcel("now", urgent=True))
    assert name_of(outbox.next()) == "now"
    assert outbox.next() is None
    outbox.acknowledged(2)
    assert name_of(outbox.next()) == "c"


def test_the_window_is_one_of_bytes_too():
    outbox = Outbox(Limits(window_bytes=1000))
    for name in "ab":
        outbox.push(parcel(name, size=2000))
    assert name_of(outbox.next()) == "a"
    assert outbox.next() is None
    outbox.acknowledged(1)
    assert name_of(outbox.next()) == "b"


def test_a_new_stream_tells_again_what_has_come():
    link = Link()
    link.adopt(7)
    link.inbox.complete(1, 0)
    link.inbox.told(1)  # and the stream breaks before that arrives
    assert link.inbox.due() is None
    link.resume(1)
    assert link.inbox.due() == (1, False)


def test_a_payload_is_made_when_it_leaves_and_only_once():
    made: list[str] = []

    def make() -> bytes:
        made.append("x")
        return b"payload"

    outbox = Outbox(Limits())
    outbox.push(parcel("a", render=make))
    assert not made
    assert outbox.next()[1].payload == b"payload"
    outbox.resume(1)
    assert outbox.next()[1].payload == b"payload"
    assert made == ["x"]


def test_a_payload_that_cannot_be_made_stays_queued():
    def fail() -> bytes:
        raise ContractError("no", code="E528")

    outbox = Outbox(Limits())
    outbox.push(parcel("a", render=fail))
    with pytest.raises(ContractError):
        outbox.next()
    assert [one.control for one in outbox.all()] == [b"a"]


@pytest.mark.provokes("E511")
@pytest.mark.parametrize("received", [1, 2, 2**62])
def test_what_was_never_sent_cannot_be_acknowledged(received: int):
    with pytest.raises(WireError, match=r"a frame was acknowledged that cannot be.*expected at most 0") as caught:
        Outbox(Limits()).acknowledged(received)
    assert caught.value.code == "E511"


def test_an_old_acknowledgement_changes_nothing():
    outbox = Outbox(Limits())
    for name in "ab":
        outbox.push(parcel(name))
        outbox.next()
    outbox.acknowledged(2)
    assert outbox.acknowledged(1) == []


@pytest.mark.parametrize("wanted", [0, 1, 4, 2**62])
def test_what_is_not_kept_cannot_be_resumed(wanted: int):
    outbox = Outbox(Limits())
    for name in "ab":
        outbox.push(parcel(name))
        outbox.next()
    outbox.acknowledged(1)
    with pytest.raises(WireError) as caught:
        outbox.resume(wanted)
    assert caught.value.code == "E511"


@pytest.mark.provokes("E510")
def test_a_gap_is_refused():
    inbox = Inbox(Limits(), 1)
    assert inbox.complete(1, 0)
    with pytest.raises(WireError, match=r"a frame is missing.*expected number 2, got number 3") as caught:
        inbox.judge(3)
    assert caught.value.code == "E510"


def test_acknowledgements_are_due_after_enough_frames_or_bytes():
    limits = Limits(ack_frames=3, ack_bytes=100)
    inbox = Inbox(limits, 1)
    assert inbox.due() is None
    inbox.complete(1, 0)
    assert inbox.due() == (1, False)
    inbox.complete(2, 99)
    assert inbox.due() == (2, False)
    inbox.complete(3, 0)
    assert inbox.due() == (3, True)
    inbox.told(3)
    assert inbox.due() is None
    inbox.complete(4, 100)
    assert inbox.due() == (4, True)


def test_what_is_held_is_not_acknowledged_until_released():
    inbox = Inbox(Limits(), 1)
    inbox.complete(1, 5)
    ticket = inbox.hold(5)
    inbox.complete(2, 5)
    assert inbox.due() is None
    inbox.release(Ticket(7, 1))  # of another life
    assert inbox.due() is None
    inbox.release(ticket)
    assert inbox.due() == (2, False)


@pytest.mark.provokes("E529")
def test_who_ignores_the_window_is_refused():
    inbox = Inbox(Limits(window_frames=2), 1)
    for number in range(1, 5):
        inbox.complete(number, 1)
        inbox.hold(1)
    inbox.complete(5, 1)
    with pytest.raises(ContractError, match=r"relays more than it may have under way.*at most 2 frames") as caught:
        inbox.hold(1)
    assert caught.value.code == "E529"


def test_a_restart_drops_what_was_queued_for_the_other_life():
    link = Link()
    link.outbox.push(parcel("before"))
    assert link.adopt(5) == ("first", [])
    assert not link.outbox.empty
    assert link.adopt(5) == ("same", [])
    link.outbox.next()
    link.outbox.push(parcel("after"))
    meeting, dropped = link.adopt(6)
    assert meeting == "restarted"
    assert [one.control for one in dropped] == [b"before", b"after"]
    assert link.outbox.empty
    assert link.inbox.wanted == 1
