"""Many predictions of a served stage over one connection: one session at the server, the bits and quotas of many."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import cutlayer as cl
from cutlayer.errors import CheckpointError, CutlayerError, LinkError, ProgramError
from cutlayer.run.prediction import asking
from cutlayer.transport.network import Network
from tests.run import plans
from tests.run.test_answers import built, vanilla
from tests.run.test_serving import ALONE, Place, ThreadOf, Told, at_once, only, refusal, rows
from tests.run.trial import DEADLINES
from tests.transport.parties import Cable

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("place"), plans.u_shaped(epochs=1))


def connected(place: Place, identity: str = "anna", **changes: Any) -> cl.Connection:
    party = place.client(None)
    given = {"network": place.settings(identity, "alpha"), "weights": place.weights, "wait": 10, **changes}
    return cl.connect(place.plan, party, **given)


def asked(connection: cl.Connection, x: torch.Tensor) -> torch.Tensor:
    return only(connection.predict(cl.TensorTable(x=x)))


def test_many_predictions_are_one_session_and_have_the_bits_of_one_process(place: Place):
    """Also of the same number of samples again, where a session could take the old worker for the new one."""
    data = [rows(21, 1), rows(3, 2), rows(3, 3), rows(3, 3), rows(16, 4)]
    with place.serving() as told:
        with connected(place) as connection:
            found = [asked(connection, x) for x in data]
        (went,) = told.wait("went")
        came = told.wait("came", 5)
    for x, value in zip(data, found, strict=True):
        assert torch.equal(value, place.expected(x))
    assert (went["samples"], went["code"]) == (46, "")
    assert {facts["session"] for facts in came} == {1}
    tally = told.service.served().identities["anna"]
    assert (tally.sessions, tally.samples, tally.failed, tally.refused) == (1, 46, 0, 0)
    assert tally.requests == told.service.served().forwards == 6 + 2 + 2 + 2 + 4  # batches of 8, cut in two


def test_bytes_are_those_of_all_predictions(place: Place):
    with place.serving() as told:
        for _ in range(2):
            place.asking("ben", rows(8))()
        with connected(place) as connection:
            for _ in range(2):
                asked(connection, rows(8))
        told.wait("went", 3)
    anna, ben = (told.service.served().identities[name] for name in ("anna", "ben"))
    assert (anna.sent, anna.received) == (ben.sent, ben.received)
    assert anna.sent > 0


def test_a_session_that_ends_badly_counts_all_predictions_that_it_made(place: Place):
    with place.serving() as told:
        connection = connected(place)
        for seed in (1, 2):
            asked(connection, rows(8, seed))
        connection.__exit__(KeyError, KeyError(), None)
        (went,) = told.wait("went")
        with connected(place, "ben") as connection:
            asked(connection, rows(8, 1))
            asked(connection, rows(8, 2))
        told.wait("went", 2)
    served = told.service.served()
    anna, ben = (served.identities[name] for name in ("anna", "ben"))
    assert went["code"] == "E704"
    assert (anna.sessions, anna.failed, ben.sessions, ben.failed) == (0, 1, 1, 0)
    assert (anna.samples, anna.requests, anna.sent, anna.received) == (16, 4, ben.sent, ben.received)
    assert (ben.samples, ben.requests, served.forwards) == (16, 4, 8)


def test_a_quota_counts_each_prediction(place: Place):
    """Or one session could ask again and again for what it was let in with."""
    limits = replace(ALONE, window=300, quota=cl.Quota(samples=20))
    with place.serving(limits) as told:
        with connected(place) as connection:
            asked(connection, rows(8, 1))
            asked(connection, rows(8, 2))
            error = refusal(lambda: asked(connection, rows(8, 3)))
            assert error.code == "E614"
            assert "and 16 samples so far" in str(error)
            assert torch.equal(asked(connection, rows(4)), place.expected(rows(4)))  # what fits is let in, anew
        told.wait("went", 2)
    tally = told.service.served().identities["anna"]
    assert (tally.sessions, tally.refused, tally.samples) == (1, 1, 20)


def test_a_connection_that_the_server_ended_is_made_anew(place: Place):
    with place.serving(replace(ALONE, idle=0.3)) as told, connected(place) as connection:
        first = asked(connection, rows(3, 1))
        assert told.wait("went")[0]["code"] == "E621"
        until = time.monotonic() + 10
        while not connection._link.failed:  # the server's last word is on its way
            assert time.monotonic() < until
            time.sleep(0.02)
        second = asked(connection, rows(3, 2))
    assert torch.equal(first, place.expected(rows(3, 1)))
    assert torch.equal(second, place.expected(rows(3, 2)))
    assert told.service.served().identities["anna"].samples == 6


def test_a_server_that_closes_waits_for_nobody_who_asks_for_nothing(place: Place):
    """Who has dialled and has not said what it wants."""
    there = threading.Event()
    settings = asking(place.plan, "alpha", place.settings("anna", "alpha"), 10)["server"]
    with Network(settings, lambda event, _facts: there.set() if event == "connected" else None):
        with place.serving(replace(ALONE, drain=40)):
            assert there.wait(15)
            begin = time.monotonic()
        assert time.monotonic() - begin < 15


def test_a_server_that_closes_ends_who_rests_and_answers_what_is_under_way(place: Place):
    """One connection asks for nothing; predictions of another, and of a client without one, are under way."""
    there, go = threading.Semaphore(0), threading.Event()

    def slow(_module: object, _inputs: object) -> None:
        there.release()
        assert go.wait(20)

    def look(told: Told) -> Callable[[], CutlayerError]:
        def run() -> CutlayerError:
            try:
                assert [facts["identity"] for facts in told.wait("went")] == ["anna"]
                return refusal(lambda: asked(idle, rows(3, 2)))
            finally:
                go.set()

        return run

    with connected(place) as idle, connected(place, "ben", wait=3) as busy:
        with place.serving(replace(ALONE, drain=40)) as told:
            assert torch.equal(asked(idle, rows(3)), place.expected(rows(3)))
            told.service._worker.site.stages["body", 0].module.register_forward_pre_hook(slow)
            jobs = {"ben": lambda: asked(busy, rows(3, 3)), "cleo": place.asking("cleo", rows(3, 4))}
            clients = ThreadOf(lambda: at_once(jobs))
            clients.thread.start()
            assert there.acquire(timeout=15)
            told.wait("came", 3)  # who dials later is refused
            begin, watcher = time.monotonic(), ThreadOf(look(told))
            watcher.thread.start()
        took = time.monotonic() - begin
        found = clients.result()
        again = refusal(lambda: asked(busy, rows(3, 5)))
    error = watcher.error()
    assert (error.code, error.what) == ("E615", "server closes its service")
    assert torch.equal(found["ben"], place.expected(rows(3, 3)))
    assert torch.equal(found["cleo"], place.expected(rows(3, 4)))
    assert took < 15, "ended with its last answer"
    assert again.code in ("E615", "E702")
    tallies = told.service.served().identities
    assert {name: (t.sessions, t.failed, t.refused) for name, t in tallies.items()} == {
        "anna": (1, 0, 1),
        "ben": (1, 0, 0),
        "cleo": (1, 0, 0),
    }


def test_a_server_that_was_started_anew_is_asked_again(place: Place):
    with connected(place, wait=8) as connection:
        with place.serving():
            thread = threading.Thread(target=lambda: asked(connection, rows(3, 1)))
            thread.start()
            thread.join(20)
            assert not thread.is_alive()
            connection._close(finish=True)
        with place.serving(replace(ALONE, drain=0.3)):  # the connection stays until then
            assert torch.equal(asked(connection, rows(3, 2)), place.expected(rows(3, 2)))


@pytest.mark.parametrize("wait", [0.5, 30])
def test_a_server_that_is_lost_after_the_last_prediction_does_no_harm(place: Place, wait: float):
    """Whether patience with it is over first, or the time to take leave."""
    cable = Cable(place.address)
    network = place.settings(
        "anna", "alpha", addresses={"server": cable.address}, deadlines=replace(DEADLINES, close=2)
    )
    told = list[str]()
    try:
        with place.serving(replace(ALONE, patience=0.3)):
            with connected(place, network=network, wait=wait, notify=lambda event, _: told.append(event)) as connection:
                found = asked(connection, rows(3))
                cable.cut()
                begin = time.monotonic()
            assert time.monotonic() - begin < 10
    finally:
        cable.close()
    assert torch.equal(found, place.expected(rows(3)))
    assert "lost" in told


@pytest.mark.provokes("E455")
def test_a_closed_connection_stays_closed(place: Place):
    """It would hold one of the server's places, and nobody would give it back."""
    limits = replace(ALONE, places=1)
    with place.serving(limits) as told:
        with connected(place) as connection:
            asked(connection, rows(3))
        told.wait("went")
        with pytest.raises(ProgramError, match=r"E455.*the connection is closed.*make a new one with cl.connect"):
            asked(connection, rows(3))
        with pytest.raises(ProgramError, match="E455"), connection:
            pass
        assert torch.equal(place.asking("ben", rows(3))(), place.expected(rows(3)))
        told.wait("came", 2)


def test_data_that_fail_end_the_session_and_not_the_connection(place: Place):
    class Broken(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 2

        def __getitem__(self, _place: int) -> Any:
            raise RuntimeError("the disk is gone")

    with place.serving() as told, connected(place) as connection:
        with pytest.raises(CutlayerError, match="E268"):
            connection.predict(Broken())
        assert told.wait("went")[0]["code"] == "E703"
        assert torch.equal(asked(connection, rows(3)), place.expected(rows(3)))


def test_threads_take_turns(place: Place):
    with place.serving() as told:
        with connected(place) as connection:
            jobs = {seed: lambda seed=seed: asked(connection, rows(9, seed)) for seed in range(4)}
            found = at_once(jobs)
        told.wait("went")
    for seed, value in found.items():
        assert torch.equal(value, place.expected(rows(9, seed))), seed
    assert told.service.served().identities["anna"].sessions == 1


def test_answers_have_their_names(tmp_path: Path):
    place = Place(tmp_path, built(vanilla()))
    with place.serving(), connected(place) as connection:
        found = connection.predict(cl.TensorTable(x=rows(9)))
    assert list(found) == ["body"]
    assert torch.equal(found["body"], place.expected(rows(9)))


def test_what_cannot_be_is_said_before_anything_is_dialled(place: Place, tmp_path: Path):
    with pytest.raises(CheckpointError, match="E811"):
        connected(place, weights=tmp_path)
    with pytest.raises(ProgramError, match="E454"):
        cl.connect(place.plan, place.case.build("server"), network=place.settings("server", "server"))
    with connected(place):
        pass  # nothing asked: nobody had to be there
    with connected(place, wait=0.5) as connection, pytest.raises(CutlayerError, match=r"E702.*cutlayer serve"):
        asked(connection, rows(3))


def test_a_refused_client_is_told_so(place: Place):
    limits = replace(ALONE, quotas={"anna": cl.Quota(sessions=0)})
    with place.serving(limits), connected(place) as connection, pytest.raises(LinkError, match="E613"):
        asked(connection, rows(3))
