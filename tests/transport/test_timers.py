"""Timers: in order, once, cancellable, and a failing call does not end them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from cutlayer.transport.timers import Timers

pytestmark = [pytest.mark.timeout(20), pytest.mark.usefixtures("no_thread_stays")]


@pytest.fixture
def failures() -> list[BaseException]:
    return []


@pytest.fixture
def timers(failures: list[BaseException]) -> Iterator[Timers]:
    made = Timers("test-timers", failures.append)
    made.start()
    yield made
    made.close(5)


def test_calls_come_in_the_order_of_their_times(timers: Timers):
    said: list[str] = []
    done = threading.Event()
    timers.after(0.2, done.set)
    timers.after(0.1, lambda: said.append("second"))
    timers.after(0.05, lambda: said.append("first"))
    timers.post(lambda: said.append("at once"))
    assert done.wait(5)
    assert said == ["at once", "first", "second"]


def test_a_cancelled_timer_does_not_call(timers: Timers):
    said: list[str] = []
    done = threading.Event()
    timers.after(0.05, lambda: said.append("no")).cancel()
    timers.after(0.1, done.set)
    assert done.wait(5)
    assert said == []


def test_a_failing_call_is_reported_and_the_next_is_made(timers: Timers, failures: list[BaseException]):
    done = threading.Event()
    timers.post(lambda: [][0])
    timers.post(done.set)
    assert done.wait(5)
    assert [type(failure) for failure in failures] == [IndexError]


def test_closing_makes_the_posted_calls_and_forgets_the_timers(failures: list[BaseException]):
    said: list[int] = []
    timers = Timers("test-timers", failures.append)
    timers.start()
    timers.after(60, lambda: said.append(-1))
    for number in range(100):
        timers.post(lambda number=number: said.append(number))
    begin = time.monotonic()
    timers.close(5)
    assert time.monotonic() - begin < 2
    assert said == list(range(100))


def test_what_was_never_started_can_be_closed(failures: list[BaseException]):
    Timers("test-timers", failures.append).close(1)
    assert not failures
