"""Places and quotas of a served stage: counted by identity, over a window of time that the test gives."""

from __future__ import annotations

import time

import pytest

from cutlayer.core.gate import Gate, closing, retry_after
from cutlayer.core.quota import Quota, Serving
from cutlayer.errors import ConfigError, LinkError


def refused(gate: Gate, identity: str, now: float = 0.0) -> LinkError:
    with pytest.raises(LinkError) as caught:
        gate.enter(identity, now)
    return caught.value


@pytest.mark.provokes("E612")
def test_places_are_for_all_identities_together():
    gate = Gate(Serving(places=2), "server")
    gate.enter("anna", 0)
    gate.enter("ben", 0)
    error = refused(gate, "cleo")
    assert (error.code, error.expected) == ("E612", "at most 2 sessions at one time")
    assert retry_after(error) == 5
    gate.leave("anna")
    gate.enter("cleo", 0)
    assert gate.inside == 2


@pytest.mark.provokes("E613")
def test_each_identity_has_its_own_number_of_sessions():
    gate = Gate(Serving(quota=Quota(sessions=1), quotas={"ben": Quota(sessions=2), "eve": Quota(sessions=0)}), "server")
    gate.enter("anna", 0)
    gate.enter("ben", 0)
    gate.enter("ben", 0)
    assert [refused(gate, name).code for name in ("anna", "ben")] == ["E613", "E613"]
    error = refused(gate, "eve")
    assert error.what == "server serves nothing to 'eve'"
    assert retry_after(error) is None
    gate.leave("ben")
    assert gate.sessions("ben") == 1
    gate.enter("ben", 0)


@pytest.mark.provokes("E614")
@pytest.mark.parametrize(("quota", "ask"), [(Quota(samples=10), (0, 4)), (Quota(requests=10), (4, 0))])
def test_a_window_slides(quota: Quota, ask: tuple[int, int]):
    gate = Gate(Serving(quota=quota, window=60), "server")
    gate.charge("anna", *ask, now=0)
    gate.charge("anna", *ask, now=20.5)
    with pytest.raises(LinkError, match=r"\[E614\] 'anna' has used up its quota .*ask again in 30 s") as caught:
        gate.charge("anna", *ask, now=30)
    assert retry_after(caught.value) == 30  # what was asked for at 0 counts no more at 60
    gate.charge("ben", *ask, now=30)  # nobody else's quota
    with pytest.raises(LinkError, match="ask again in 1 s"):
        gate.charge("anna", *ask, now=59.9)
    gate.charge("anna", *ask, now=60)
    with pytest.raises(LinkError):
        gate.charge("anna", *ask, now=60)


def test_who_has_used_up_all_does_not_come_in():
    gate = Gate(Serving(quota=Quota(samples=10), window=60), "server")
    gate.charge("anna", 1, 9, now=0)
    gate.enter("anna", 0)
    gate.charge("anna", 1, 1, now=1)
    assert retry_after(refused(gate, "anna", 2)) == 58
    assert gate.sessions("anna") == 1
    gate.enter("anna", 60)


def test_what_never_fits_is_said_so():
    gate = Gate(Serving(quota=Quota(samples=10), longest=20), "server")
    for ask, most in (
        (lambda: gate.charge("anna", 1, 11, now=0), "at most 10 samples in 60 s"),
        (lambda: gate.measure("anna", 21), "at most 20 samples in one prediction"),
    ):
        with pytest.raises(LinkError) as caught:
            ask()
        assert (caught.value.code, caught.value.expected) == ("E614", most)
        assert retry_after(caught.value) is None
    gate.charge("anna", 1, 10, now=0)  # the refused ones did not count


@pytest.mark.timeout(20)
@pytest.mark.parametrize("quota", [Quota(), Quota(requests=10**6), Quota(samples=10**6)])
def test_a_long_window_costs_no_time_at_each_request(quota: Quota):
    """All sessions wait for the gate: it must not look at the whole window."""
    gate = Gate(Serving(quota=quota, window=10**5), "server")
    for number in range(36_000):
        gate.charge("anna", 1, 1, now=number)
    begin = time.perf_counter()
    for _ in range(1000):
        gate.charge("anna", 1, 1, now=36_000)
    assert time.perf_counter() - begin < 0.5
    assert bool(gate._used) == (quota != Quota())


def test_both_limits_hold_and_the_later_one_says_when():
    gate = Gate(Serving(quota=Quota(requests=3, samples=10), window=60), "server")
    gate.charge("anna", 1, 1, now=0)
    gate.charge("anna", 1, 8, now=20)
    gate.charge("anna", 1, 1, now=30)
    for asked, wait in (((1, 1), 25), ((1, 2), 45), ((2, 1), 45), ((3, 1), 55), ((1, 10), 55), ((1, 9), 45)):
        with pytest.raises(LinkError, match="got 3 requests and 10 samples so far") as caught:
            gate.charge("anna", *asked, now=35)
        assert retry_after(caught.value) == wait, asked
    gate.charge("anna", 1, 1, now=60)
    with pytest.raises(LinkError, match=r"got 3 requests and 10 samples so far\. ask again in 20 s"):
        gate.charge("anna", 1, 1, now=60)


def test_nobody_is_remembered_without_need():
    gate = Gate(Serving(quota=Quota(samples=10), window=60), "server")
    for number in range(100):
        gate.enter(f"client-{number}", 0)
        gate.leave(f"client-{number}")
    assert not gate._used
    assert not gate._inside


def test_a_server_that_closes_gives_no_time():
    assert retry_after(closing("server")) is None


@pytest.mark.parametrize(
    "wrong", [{"batch": 0}, {"wait": -1}, {"places": True}, {"patience": float("nan")}, {"longest": 1.5}]
)
def test_limits_have_a_range(wrong: dict):
    with pytest.raises(ConfigError, match=rf"E202.*the value of '{next(iter(wrong))}' is wrong"):
        Serving(**wrong)
    with pytest.raises(ConfigError, match=r"quota\.samples"):
        Quota(samples=-1)
