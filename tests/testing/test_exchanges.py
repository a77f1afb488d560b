"""The check of exchanges: cutlayer's own barrier passes, and each kind of fault is named."""

from __future__ import annotations

import pytest

from cutlayer.core.crossing import PlannedExchange
from cutlayer.engine.exchange import EXCHANGES, Hear, Say
from cutlayer.testing import check_exchange

GROUP = ("a", "b", "c")
PLANNED = PlannedExchange("own", GROUP, says="nothing", limit=4, messages=2)
LOCALS = dict.fromkeys(GROUP)


def test_the_barrier_keeps_to_it():
    check_exchange(EXCHANGES["barrier"], PLANNED, LOCALS)


def ring(job, me, _local):
    following = job.group[(job.group.index(me) + 1) % len(job.group)]
    before = job.group[job.group.index(me) - 1]
    yield Say(following, b"x")
    yield Hear(before)


def test_a_ring_keeps_to_it():
    check_exchange(ring, PLANNED, LOCALS)


def unheard(job, me, _local):
    if me == "a":
        yield Say("b", b"x")


def deadlock(job, me, _local):
    yield Hear("b" if me == "a" else "a")


def long(job, me, _local):
    if me == "a":
        yield Say("b", b"12345")


def many(job, me, _local):
    for _ in range(3):
        if me == "a":
            yield Say("b", b"")
        elif me == "b":
            yield Hear("a")


def stranger(job, me, _local):
    yield Say("d", b"")


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (unheard, "all messages to be heard"),
        (deadlock, "every member to come to its end; waiting for each other"),
        (long, "at most 4 bytes; got 5"),
        (many, "at most 2 messages from a to b"),
        (stranger, "messages among a, b, c only; 'd'"),
    ],
)
def test_a_wrong_exchange_is_named(function, words: str):
    with pytest.raises(AssertionError, match=words):
        check_exchange(function, PLANNED, LOCALS)


def test_each_member_needs_its_own():
    with pytest.raises(AssertionError, match="one `Local` for each of a, b, c"):
        check_exchange(ring, PLANNED, {"a": None})
