"""The mailbox: bounded, by tag, and nobody waits for ever."""

from __future__ import annotations

import threading
import time

import pytest

from cutlayer.core.program import Tag
from cutlayer.engine.wire import Frame
from cutlayer.errors import ContractError, DeadlineError, PeerError
from cutlayer.transport.mailbox import Mailbox
from cutlayer.transport.session import SessionReset

pytestmark = pytest.mark.timeout(30)


def tag(step: int) -> Tag:
    return Tag(1, "train", 0, step, 0, 0, 0, "up")


def frame(step: int) -> Frame:
    return Frame(tag(step), "bytes", (1,), bytes([step]))


def test_frames_are_taken_by_source_and_tag_in_any_order():
    box = Mailbox("server", {"a": 3, "b": 1})
    for step in range(3):
        box.put("a", frame(step))
    box.put("b", frame(0))
    assert [box.take("a", tag(step), 1).payload for step in (2, 0, 1)] == [b"\2", b"\0", b"\1"]
    assert box.take("b", tag(0), 1).payload == b"\0"


@pytest.mark.provokes("E621")
def test_a_frame_is_taken_once():
    box = Mailbox("server", {"a": 3})
    box.put("a", frame(0))
    box.take("a", tag(0), 1)
    with pytest.raises(DeadlineError) as caught:
        box.take("a", tag(0), 0.05)
    assert caught.value.code == "E621"
    assert "'a'" in caught.value.what
    assert "step 0" in caught.value.where


def test_take_waits_for_what_comes_later():
    box = Mailbox("server", {"a": 3})
    threading.Timer(0.1, lambda: box.put("a", frame(1))).start()
    assert box.take("a", tag(1), 5).payload == b"\1"


@pytest.mark.provokes("E530")
@pytest.mark.parametrize("method", ["check", "put"])
@pytest.mark.parametrize(("source", "step"), [("a", 9), ("a", 0), ("stranger", 0)])
def test_what_exceeds_the_bound_or_comes_twice_is_refused(method: str, source: str, step: int):
    box = Mailbox("server", {"a": 2})
    for number in range(2):
        box.put("a", frame(number))
    with pytest.raises(
        ContractError, match=r"sent (a frame twice|more than can be under way).*the sender breaks the contract"
    ) as caught:
        box.check(source, tag(step)) if method == "check" else box.put(source, frame(step))
    assert caught.value.code == "E530"
    assert len(box._frames["a"]) == 2


def test_a_tag_twice_is_refused_though_there_is_room():
    box = Mailbox("server", {"a": 5})
    box.put("a", frame(1))
    with pytest.raises(ContractError):
        box.check("a", tag(1))


@pytest.mark.parametrize("failure", [PeerError("gone", code="E701"), SessionReset("b restarted")])
def test_a_failure_reaches_all_who_wait_and_all_who_come_later(failure: Exception):
    box = Mailbox("server", {"a": 3})
    box.put("a", frame(0))
    caught: list[BaseException] = []

    def wait(step: int) -> None:
        try:
            box.take("a", tag(step), 10)
        except (PeerError, SessionReset) as error:
            caught.append(error)

    waiting = [threading.Thread(target=wait, args=(step,)) for step in (1, 2, 3)]
    for thread in waiting:
        thread.start()
    time.sleep(0.05)
    begin = time.monotonic()
    box.fail(failure)
    box.fail(PeerError("later", code="E703"))  # the first counts
    for thread in waiting:
        thread.join(5)
    assert time.monotonic() - begin < 2
    assert caught == [failure] * 3
    with pytest.raises(type(failure)):
        box.take("a", tag(0), 1)


def test_one_who_wakes_for_anothers_frame_does_not_take_its_call():
    box, first, second = Mailbox("server", {"a": 9}), threading.Event(), threading.Event()

    def wait(step: int, there: threading.Event) -> None:
        box.take("a", tag(step), 10)
        there.set()

    for _ in range(100):
        first.clear(), second.clear()
        waiting = [threading.Thread(target=wait, args=(step, there)) for step, there in enumerate((first, second))]
        for thread in waiting:
            thread.start()
        time.sleep(0.002)
        box.put("a", frame(1))
        assert second.wait(1)
        assert not first.is_set()
        box.put("a", frame(0))
        for thread in waiting:
            thread.join(5)


def test_one_who_waited_in_vain_leaves_nothing_that_misleads_the_next():
    box = Mailbox("server", {"a": 9})
    for _ in range(3):
        with pytest.raises(DeadlineError):
            box.take("a", tag(0), 0.01)
    box.put("a", frame(1))
    begin = time.monotonic()
    with pytest.raises(DeadlineError):
        box.take("a", tag(0), 0.2)
    assert time.monotonic() - begin >= 0.2
    assert box.take("a", tag(1), 1).payload == b"\1"


def test_what_comes_after_a_failure_is_dropped():
    box = Mailbox("server", {"a": 9})
    box.fail(SessionReset("b restarted"))
    box.put("a", frame(1))
    assert box._frames["a"] == {}
