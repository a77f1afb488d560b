"""Parties as processes that are killed: all go back to a common checkpoint, and the result has the same bits."""

from __future__ import annotations

import hashlib
import time
from typing import Any

import pytest

from tests.transport.parties import NAMES, Cast

pytestmark = pytest.mark.timeout(90)
STEPS = 30


@pytest.fixture
def jobs(cast: Cast) -> dict[str, dict[str, Any]]:
    """Every pair of kinds: a direct link (server and the others), one between two members, a relayed one."""
    cast.names = (*NAMES, "ward")
    cast.addressed = ("server", "lab")
    cast.certify()
    cast.settings("server")
    folder = cast.folder / "checkpoints"
    folder.mkdir()
    common = {
        "names": cast.names,
        "addresses": cast.addresses,
        "certificates": str(cast.folder),
        "folder": str(folder),
        "play": "train",
        "steps": STEPS,
        "pause": 0.02,
        "deadlines": {"join": 20, "patience": 15, "receive": 30, "close": 3},
        "rhythm": {"hello": 3, "heartbeat": 0.5, "silence": 5, "idle_ack": 0.02, "retry": 0.3},
    }
    return {name: {**common, "party": name} for name in cast.names}


def values(actors: dict[str, Any]) -> dict[str, str]:
    result = {name: actor.wait_for("done", 40)["value"] for name, actor in actors.items()}
    assert {name: actor.end() for name, actor in actors.items()} == dict.fromkeys(actors, 0)
    return result


@pytest.fixture
def undisturbed(jobs: dict[str, Any]) -> dict[str, str]:
    """What each party must end with, by the same arithmetic without a network."""
    state = {name: name for name in jobs}
    for _ in range(STEPS):
        state = {
            name: hashlib.sha256(
                b"".join([state[name].encode(), *(state[other].encode() * 1000 for other in jobs if other != name)])
            ).hexdigest()
            for name in jobs
        }
    return state


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "victims",
    [
        ["ward"],
        ["clinic", "server"],
        pytest.param(["lab"], marks=slow),
        pytest.param(["server"], marks=slow),
        pytest.param(["lab", "clinic"], marks=slow),
    ],
    ids="+".join,
)
def test_killed_parties_come_back_and_the_result_is_the_same(spawn, jobs, undisturbed, victims: list[str]):
    actors = {name: spawn(**job) for name, job in jobs.items()}
    for round_, step in enumerate((8, 21)):
        for victim in victims:
            actors[victim].wait_for("step", 40, count=step if round_ == 0 else 7)
        for victim in victims:
            actors[victim].kill()
        for victim in victims:
            actors[victim] = spawn(**jobs[victim])
    assert values(actors) == undisturbed
    survivors = [actors[name] for name in jobs if name not in victims]
    for actor in survivors:
        assert [line for line in actor.lines if line["what"] == "reset"]
        starts = [line for line in actor.lines if line["what"] == "start"]
        assert starts[0]["checkpoint"] == -1
        assert starts[-1]["checkpoint"] >= 5
        assert [line["session"] for line in starts] == sorted({line["session"] for line in starts})


def test_a_party_that_dies_before_its_end_gets_all_back_from_theirs(spawn, jobs, undisturbed):
    """The others have done all their steps and wait for it in `finish`."""
    actors = {name: spawn(**{**job, "linger": 30 if name == "clinic" else 0}) for name, job in jobs.items()}
    actors["clinic"].wait_for("step", 40, count=STEPS)
    for name in ("server", "lab", "ward"):
        actors[name].wait_for("step", 40, count=STEPS)
    actors["clinic"].kill()
    actors["clinic"] = spawn(**jobs["clinic"])
    assert values(actors) == undisturbed
    for name in ("server", "lab", "ward"):
        assert [line for line in actors[name].lines if line["what"] == "reset"]


@pytest.mark.parametrize("victim", ["lab", pytest.param("ward", marks=slow), pytest.param("server", marks=slow)])
def test_a_killed_party_that_stays_dead_ends_the_run_everywhere(spawn, jobs, victim: str):
    for job in jobs.values():
        job["deadlines"] = {"join": 20, "patience": 1.5, "receive": 30, "close": 2}
        job["steps"] = 10_000
    actors = {name: spawn(**job) for name, job in jobs.items()}
    actors[victim].wait_for("step", 30, count=3)
    actors[victim].kill()
    begin = time.monotonic()
    for name, actor in actors.items():
        if name == victim:
            continue
        actor.wait_for("lost", 20)
        assert victim in [line["party"] for line in actor.lines if line["what"] == "lost"]
        error = actor.wait_for("error", 20)
        assert error["kind"] == "PeerError"
        assert error["code"] == "E701"
        assert victim in error["text"]
        assert actor.end() == 1
    assert time.monotonic() - begin < 10


def test_a_party_that_is_stopped_by_a_signal_is_named_at_once(spawn, jobs):
    for job in jobs.values():
        job["steps"] = 10_000
    actors = {name: spawn(**job) for name, job in jobs.items()}
    actors["ward"].wait_for("step", 30, count=3)
    actors["ward"].process.send_signal(2)  # as Ctrl-C does
    begin = time.monotonic()
    for name in ("server", "clinic", "lab"):
        error = actors[name].wait_for("error", 10)
        assert error["code"] == "E704"
        assert "ward stopped: Ctrl-C" in error["text"]
    assert time.monotonic() - begin < 5
    actors["ward"].end()
