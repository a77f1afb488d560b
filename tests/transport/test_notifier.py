"""What people are told, and that a callback which does not return holds up nobody."""

from __future__ import annotations

import threading
import time

import pytest

from cutlayer.transport.notifier import Notifier

pytestmark = pytest.mark.timeout(20)


def test_events_are_told_in_order_and_all_before_the_end():
    said: list[tuple[str, object]] = []
    notifier = Notifier("test-notify", lambda name, facts: said.append((name, facts["number"])), lambda error: None)
    for number in range(50):
        notifier.post("event", {"number": number})
    notifier.start()
    notifier.close(5)
    assert said == [("event", number) for number in range(50)]


def test_a_callback_that_fails_is_reported_and_called_again():
    errors: list[BaseException] = []
    notifier = Notifier("test-notify", lambda name, facts: [][0], errors.append)
    notifier.start()
    notifier.post("first", {})
    notifier.post("second", {})
    notifier.close(5)
    assert [type(error) for error in errors] == [IndexError, IndexError]


def test_a_callback_that_does_not_return_costs_bounded_time_and_memory():
    release, said = threading.Event(), []

    def notify(name: str, facts: object) -> None:
        release.wait(15)
        said.append(name)

    notifier = Notifier("test-notify", notify, lambda error: None)
    notifier.start()
    begin = time.monotonic()
    for _ in range(3000):
        notifier.post("event", {})
    notifier.close(0.2)
    notifier.close(0.2)
    assert time.monotonic() - begin < 2
    release.set()
    notifier._thread.join(10)
    assert 1000 <= len(said) <= 1001
