"""Who waits for what usually comes at once stays awake; who waits long sleeps, and a process has one who is awake."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import pytest

from cutlayer.core.program import Tag
from cutlayer.engine.wire import Frame
from cutlayer.transport import vigil
from cutlayer.transport.mailbox import Mailbox
from cutlayer.transport.settings import Rhythm
from cutlayer.transport.steward import Steward
from cutlayer.transport.vigil import Vigil
from tests.transport.parties import Cast

pytestmark = pytest.mark.timeout(30)


@pytest.fixture(autouse=True)
def several_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vigil, "_processors", lambda: 2)


def looks(one: Vigil, come: Callable[[], bool] = lambda: False) -> int:
    """Return how often a watch looked."""
    count = 0

    def counted() -> bool:
        nonlocal count
        count += 1
        return come()

    one.watch(counted)
    return count


def test_it_watches_for_twice_as_long_as_is_usual_and_no_longer():
    one = Vigil(0.05)
    begin = time.monotonic()
    assert looks(one) > 10
    assert 0.1 <= time.monotonic() - begin < 5


def test_it_stops_as_soon_as_it_has_come():
    one, seen = Vigil(20), []
    threading.Timer(0.05, lambda: seen.append(1)).start()
    begin = time.monotonic()
    looks(one, lambda: bool(seen))
    assert time.monotonic() - begin < 10


def test_other_threads_run_meanwhile():
    one, seen = Vigil(20), list[int]()

    def work() -> None:
        for number in range(2000):
            seen.append(number)

    thread = threading.Thread(target=work)
    thread.start()
    looks(one, lambda: len(seen) == 2000)
    thread.join()
    assert len(seen) == 2000


def test_long_waits_are_slept_through_until_short_ones_are_usual_again():
    one = Vigil(0.001)
    assert looks(one)
    one.took(60)  # counts for no more than a few short ones: it may be for a checkpoint
    assert not looks(one)
    for _ in range(10):
        one.took(0.0002)
    assert looks(one)


@pytest.mark.parametrize("without", ["seconds", "processors", "yielding"])
def test_it_never_watches_without(without: str, monkeypatch: pytest.MonkeyPatch):
    if without == "processors":
        monkeypatch.setattr(vigil, "_processors", lambda: 1)
    if without == "yielding":
        monkeypatch.setattr(vigil, "_yield", None)
    one = Vigil(0 if without == "seconds" else 0.001)
    assert not looks(one)
    one.took(0)
    assert not looks(one)


def test_one_thread_of_a_process_watches_at_a_time():
    first, second = Vigil(20), Vigil(20)
    inside, done = threading.Event(), threading.Event()

    def come() -> bool:
        inside.set()
        return done.is_set()

    thread = threading.Thread(target=first.watch, args=(come,))
    thread.start()
    assert inside.wait(10)
    assert not looks(second)
    done.set()
    thread.join()
    assert looks(second, lambda: True) == 1


def test_one_that_fails_lets_the_next_one_watch():
    def fails() -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Vigil(20).watch(fails)
    assert looks(Vigil(20), lambda: True) == 1


def test_a_mailbox_notes_what_its_waits_took():
    one = Vigil(0.5)
    box, tag = Mailbox("server", {"a": 3}, one), Tag(1, "train", 0, 0, 0, 0, 0, "up")
    threading.Timer(0.1, lambda: box.put("a", Frame(tag, "bytes", (1,), b"x"))).start()
    assert box.take("a", tag, 10).payload == b"x"
    assert 0.1 < one._usual < 0.5


def test_a_failure_wakes_who_watches():
    box, tag = Mailbox("server", {"a": 3}, Vigil(20)), Tag(1, "train", 0, 0, 0, 0, 0, "up")
    threading.Timer(0.05, lambda: box.fail(KeyError("gone"))).start()
    begin = time.monotonic()
    with pytest.raises(KeyError):
        box.take("a", tag, 30)
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize(
    ("task", "awake", "watches"), [("training", 0.001, 1), ("served", 0.001, 0), ("training", 0, 0)]
)
def test_only_a_training_watches(cast: Cast, task: Literal["training", "served"], awake: float, watches: int):
    """Threads that serve would take the interpreter's lock from each other."""
    settings = replace(cast.settings("server"), task=task, rhythm=Rhythm(awake=awake))
    steward = Steward(settings, {}, lambda name, facts: None)
    assert min(looks(steward._mailbox.vigil), 1) == watches
