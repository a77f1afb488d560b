"""A trained stage served to many clients: what they get, what they may ask for, and what one cannot do to others."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import cutlayer as cl
from cutlayer.core.gate import retry_after
from cutlayer.errors import CheckpointError, CutlayerError, LinkError, PeerError
from cutlayer.run.prediction import SERVED, ask
from cutlayer.run.results import write_results
from cutlayer.run.serving import Service
from cutlayer.transport.network import Network, NetworkSettings, Ready
from cutlayer.transport.pki import create_authority, issue
from cutlayer.transport.tls import load_credentials
from tests.run import plans
from tests.run.cluster import free_ports
from tests.run.trial import DEADLINES, FAST
from tests.transport.parties import Cable

pytestmark = pytest.mark.timeout(60)
ALONE = cl.Serving(batch=1)
NAMES = ("anna", "ben", "cleo")


def rows(count: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


class Halting(torch.utils.data.Dataset):
    """Gives the first `free` samples at once, and the others when `go` is set; `there` says that it halts."""

    def __init__(self, x: torch.Tensor, free: int) -> None:
        self.x, self.free, self.go, self.there = x, free, threading.Event(), threading.Event()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, place: int) -> Mapping[str, torch.Tensor]:
        if place >= self.free:
            self.there.set()
            assert self.go.wait(20)
        return {"x": self.x[place]}


class Place:
    """Where a server and its clients meet: certificates, an address, the weights of a training run."""

    def __init__(self, folder: Path, case: plans.Case) -> None:
        self.case, self.plan, self.folder, self.weights = case, case.plan, folder, folder / "trained"
        self.weights.mkdir()
        write_results(self.weights, cl.simulate(case.plan, case.parties()))
        self.authority = create_authority(folder / "ca", name="study")
        self.address = f"127.0.0.1:{free_ports(1)[0]}"
        for name in ("server", *NAMES):
            issue(self.authority, name, folder)

    def settings(self, identity: str, role: str, **changes: Any) -> NetworkSettings:
        values = {
            "party": role,
            "parties": self.plan.parties,
            "coordinator": "server",
            "addresses": {"server": self.address},
            "run": "trial",
            "digest": self.plan.digest(),
            "credentials": load_credentials(self.folder / identity, identity),
            "identity": identity,
            "deadlines": DEADLINES,
            "rhythm": FAST,
        }
        return NetworkSettings(**{**values, **changes})

    def client(self, data: Any, role: str = "alpha") -> cl.Party:
        return replace(self.case.build(role), data=None, evaluation=None, prediction=data)

    def asking(
        self, identity: str, data: Any, role: str = "alpha", wait: float = 10, **changes: Any
    ) -> Callable[[], torch.Tensor]:
        data = cl.TensorTable(x=data) if isinstance(data, torch.Tensor) else data

        def run() -> torch.Tensor:
            network = self.settings(identity, role, **changes)
            party = self.client(data, role)
            return only(cl.predict(self.plan, party, network=network, weights=self.weights, served=True, wait=wait))

        return run

    def expected(self, data: torch.Tensor, role: str = "alpha") -> torch.Tensor:
        """What all parties in one process give; those of other lanes have nothing to ask."""
        parties = [replace(p, data=None, evaluation=None) for p in self.case.parties()]
        parties = [replace(p, prediction=cl.TensorTable(x=data)) if p.name == role else p for p in parties]
        return only(cl.predict(self.plan, parties, weights=self.weights))

    @contextmanager
    def serving(self, limits: cl.Serving = ALONE, **changes: Any) -> Iterator[Told]:
        told = Told()
        network = self.settings("server", "server", **changes)
        server = replace(self.case.build("server"), data=None)
        with Service(
            self.plan, server, network=network, weights=self.weights, serving=limits, notify=told.note
        ) as told.service:
            yield told


class Told:
    """The events of a service."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.changed = threading.Condition()
        self.service: Any = None

    def note(self, name: str, facts: Mapping[str, Any]) -> None:
        with self.changed:
            self.events.append((name, dict(facts)))
            self.changed.notify_all()

    def wait(self, name: str, count: int = 1) -> list[dict[str, Any]]:
        def found() -> list[dict[str, Any]]:
            return [facts for event, facts in self.events if event == name]

        with self.changed:
            assert self.changed.wait_for(lambda: len(found()) >= count, 15), self.events
            return found()


def only(outputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    (value,) = outputs.values()
    return value


def at_once(jobs: Mapping[Any, Callable[[], Any]]) -> dict[Any, Any]:
    """Run each in a thread; return what it gave or raised."""
    found: dict[Any, Any] = {}

    def run(name: Any) -> None:
        try:
            found[name] = jobs[name]()
        except CutlayerError as error:
            found[name] = error

    threads = [threading.Thread(target=run, args=(name,)) for name in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40)
    assert not any(thread.is_alive() for thread in threads), "a client hangs"
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("place"), plans.u_shaped(epochs=1))


# --- what clients get ------------------------------------------------------------------------------------------------


def test_without_batching_each_client_gets_the_bits_of_one_process(place: Place):
    data = {("anna", 1): rows(21, 1), ("anna", 2): rows(3, 2), ("ben", 1): rows(16, 3), ("cleo", 1): rows(1, 4)}
    with place.serving() as told:
        found = at_once({key: place.asking(key[0], x) for key, x in data.items()})
        went = told.wait("went", 4)
    for key, x in data.items():
        assert torch.equal(found[key], place.expected(x)), key
    assert [facts["code"] for facts in went] == [""] * 4
    served = told.service.served()
    assert {name: (t.sessions, t.samples) for name, t in served.identities.items()} == {
        "anna": (2, 24),
        "ben": (1, 16),
        "cleo": (1, 1),
    }
    assert served.requests == served.forwards == 6 + 2 + 4 + 1  # batches of 8, cut in two
    assert served.largest == 4


def test_with_batching_the_last_bits_may_differ_and_no_others(place: Place):
    data = {name: rows(16, seed) for seed, name in enumerate(NAMES)}
    with place.serving(cl.Serving(batch=64, wait=0.2)) as told:
        found = at_once({name: place.asking(name, x) for name, x in data.items()})
    for name, x in data.items():
        torch.testing.assert_close(found[name], place.expected(x), rtol=1e-6, atol=1e-6)
    served = told.service.served()
    assert served.requests == 12
    assert served.forwards < 12
    assert served.largest > 4


def test_each_role_of_a_plan_can_be_played(tmp_path: Path):
    case = plans.parallel(epochs=1)
    place = Place(tmp_path, case)
    roles = dict(zip(NAMES, ("alpha", "beta", "alpha"), strict=True))
    with place.serving() as told:
        found = at_once({name: place.asking(name, rows(9), role) for name, role in roles.items()})
        assert told.service.roles == ("alpha", "beta", "gamma")
    expected = {role: place.expected(rows(9), role) for role in set(roles.values())}
    assert not torch.equal(expected["alpha"], expected["beta"])  # a head and a tail of its own
    for name, role in roles.items():
        assert torch.equal(found[name], expected[role])


def test_what_crosses_is_the_cut_and_the_number_of_samples(place: Place):
    with place.serving() as told:
        party = place.client(cl.TensorTable(x=rows(21)))
        result = ask(place.plan, party, network=place.settings("anna", "alpha"), weights=place.weights)
    ledger = result.ledgers["alpha"]
    tally = told.service.served().identities["anna"]
    assert (tally.sent, tally.received) == (ledger.total("received"), ledger.total("sent"))
    assert result.samples == {"predict": {"alpha": 21}}
    flows = {(key[0], key[1], key[3]): row.payload for key, row in ledger.flows.items()}
    assert flows == {("sent", "server", "up"): 21 * 8 * 4, ("received", "server", "up"): 21 * 5 * 4}


def test_the_weights_are_read_before_anything_is_dialled(place: Place, tmp_path: Path):
    (tmp_path / "other").mkdir()
    tensors = {"head.weight": torch.zeros(1)}
    safetensors.torch.save_file(tensors, tmp_path / "other" / "alpha.safetensors")
    party = place.client(cl.TensorTable(x=rows(3)))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        network = place.settings("anna", "alpha", addresses={"server": f"127.0.0.1:{listener.getsockname()[1]}"})
        for folder, code in (("nothing", "E811"), ("other", "E812")):
            with pytest.raises(CheckpointError, match=code):
                ask(place.plan, party, network=network, weights=tmp_path / folder, wait=1)
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_a_link_that_breaks_is_taken_up_again(place: Place):
    cable = Cable(place.address)
    try:
        data = Halting(rows(24), free=8)
        with place.serving(), ThreadOf(place.asking("anna", data, addresses={"server": cable.address})) as client:
            assert data.there.wait(10)
            cable.cut()
            data.go.set()
            cable.restore()
            assert torch.equal(client.result(), place.expected(rows(24)))
    finally:
        cable.close()


# --- what they may ask for -------------------------------------------------------------------------------------------


@pytest.mark.provokes("E613")
def test_an_identity_has_so_many_sessions(place: Place):
    data = Halting(rows(9), free=4)
    with place.serving(replace(ALONE, quota=cl.Quota(sessions=1))) as told:
        with ThreadOf(place.asking("anna", data)) as first:
            assert data.there.wait(10)
            with pytest.raises(LinkError, match=r"E613.*'anna' has as many sessions.*ask again in 5 s"):
                place.asking("anna", rows(1))()
            assert torch.equal(place.asking("ben", rows(1))(), place.expected(rows(1)))  # another identity
            data.go.set()
            assert torch.equal(first.result(), place.expected(rows(9)))
        told.wait("went", 2)
        assert torch.equal(place.asking("anna", rows(1))(), place.expected(rows(1)))  # its place is free again
        assert told.wait("refused")[0]["code"] == "E613"
    assert told.service.served().identities["anna"].refused == 1


@pytest.mark.provokes("E612")
def test_a_server_has_so_many_places(place: Place):
    data = Halting(rows(9), free=4)
    with place.serving(replace(ALONE, places=1)), ThreadOf(place.asking("anna", data)):
        assert data.there.wait(10)
        with pytest.raises(LinkError, match=r"E612.*all places at server are taken.*expected at most 1 sessions"):
            place.asking("ben", rows(1))()
        data.go.set()


@pytest.mark.provokes("E614")
def test_an_identity_has_so_many_samples(place: Place):
    limits = replace(ALONE, window=300, quota=cl.Quota(samples=20), quotas={"ben": cl.Quota(requests=2)}, longest=30)
    with place.serving(limits) as told:
        place.asking("anna", rows(15))()
        with pytest.raises(LinkError, match=r"E614.*'anna' has used up its quota.*15 samples so far") as caught:
            place.asking("anna", rows(6))()
        assert 290 < (retry_after(caught.value) or 0) <= 300
        place.asking("anna", rows(5))()
        with pytest.raises(LinkError, match=r"E614.*at most 20 samples in 300 s.*got 21 samples.*fewer samples"):
            place.asking("cleo", rows(21))()
        with pytest.raises(LinkError, match=r"at most 30 samples in one prediction"):
            place.asking("ben", rows(31))()
        place.asking("ben", rows(8))()  # one batch, two microbatches
        with pytest.raises(LinkError, match=r"'ben' has used up its quota"):
            place.asking("ben", rows(1))()
    tallies = told.service.served().identities
    assert (tallies["anna"].sessions, tallies["anna"].samples, tallies["anna"].refused) == (2, 20, 1)
    assert (tallies["ben"].sessions, tallies["ben"].requests, tallies["ben"].refused) == (1, 2, 2)


# --- clients that break down or break rules --------------------------------------------------------------------------


def test_a_client_that_is_lost_frees_its_place(place: Place):
    cable = Cable(place.address)
    data = Halting(rows(9), free=4)
    limits = replace(ALONE, places=1, patience=0.3)
    try:
        lost = place.asking("anna", data, wait=1, addresses={"server": cable.address})
        with place.serving(limits) as told, ThreadOf(lost) as client:
            assert data.there.wait(10)
            cable.cut()
            assert told.wait("went")[0]["code"] == "E701"
            assert torch.equal(place.asking("ben", rows(3))(), place.expected(rows(3)))
            data.go.set()
            assert client.error().code == "E701"
    finally:
        cable.close()


def test_a_client_that_sends_nothing_frees_its_place(place: Place):
    data = Halting(rows(9), free=4)
    with place.serving(replace(ALONE, places=1, idle=0.3)) as told, ThreadOf(place.asking("anna", data)) as client:
        assert data.there.wait(10)
        assert told.wait("went")[0]["code"] == "E621"
        assert torch.equal(place.asking("ben", rows(3))(), place.expected(rows(3)))
        data.go.set()
        error = client.error()
        assert isinstance(error, PeerError)
        assert "did not send in time" in error.what


def test_what_one_sends_fails_its_own_session_only(place: Place):
    """A client that does not look at its values sends a NaN; the server does. Another is served meanwhile."""
    bad = rows(9)
    bad[3, 2] = float("nan")
    party = replace(place.client(cl.TensorTable(x=bad)), finite=False)
    network = place.settings("anna", "alpha")
    with place.serving(cl.Serving(batch=64, wait=0.2)) as told:
        found = at_once(
            {
                "anna": lambda: cl.predict(place.plan, party, network=network, weights=place.weights, served=True),
                "ben": place.asking("ben", rows(16)),
            }
        )
        codes = {facts["identity"]: facts["code"] for facts in told.wait("went", 2)}
    assert codes == {"anna": "E351", "ben": ""}
    assert "E351 at server" in found["anna"].got
    torch.testing.assert_close(found["ben"], place.expected(rows(16)), rtol=1e-6, atol=1e-6)


def test_another_plan_is_refused_and_the_service_goes_on(place: Place):
    with place.serving() as told:
        with pytest.raises(CutlayerError, match="E642"):
            place.asking("anna", rows(3), digest="0" * 64)()
        with pytest.raises(CutlayerError, match="E643"):
            cl.predict(place.plan, place.client(cl.TensorTable(x=rows(3))), network=place.settings("anna", "alpha"))
        assert {facts["code"] for facts in told.wait("refused", 2)} == {"E642", "E643"}
        assert torch.equal(place.asking("anna", rows(3))(), place.expected(rows(3)))


def test_a_client_cannot_make_the_server_compile_without_end(place: Place):
    """Counts are only said: a client that says absurd ones, for modes that nobody serves, is refused at once."""
    network = replace(place.settings("anna", "alpha"), parties=("server", "alpha"), run="trial" + SERVED)
    with place.serving() as told:
        for counts in ({"predict": 2**60}, {"train": 2**60, "predict": 0}):
            with Network(network, lambda *_: None) as link:
                assert refusal(lambda link=link, counts=counts: meet(link, counts)).code in ("E614", "E703")
        assert [facts["code"] for facts in told.wait("went", 2)] == ["E614", "E252"]
        assert torch.equal(place.asking("ben", rows(3))(), place.expected(rows(3)))


# --- the end ---------------------------------------------------------------------------------------------------------


@pytest.mark.provokes("E615")
def test_who_is_there_may_end_and_nobody_else_comes_in(place: Place):
    data = Halting(rows(9), free=4)
    with ThreadOf(place.asking("anna", data)) as client:
        with place.serving(), ThreadOf(lambda: None) as late:
            assert data.there.wait(10)

            def come_late() -> None:
                late.refusal = refusal(place.asking("ben", rows(1)))
                data.go.set()

            threading.Timer(0.3, come_late).start()  # while the service closes
        assert torch.equal(client.result(), place.expected(rows(9)))
    assert late.refusal.code == "E615"
    assert late.refusal.what == "server closes its service"


def test_who_does_not_end_is_ended(place: Place):
    data = Halting(rows(9), free=4)
    with ThreadOf(place.asking("anna", data)) as client:
        with place.serving(replace(ALONE, drain=0.1)):
            assert data.there.wait(10)
        data.go.set()
        assert client.error().code == "E615"


def test_serve_ends_when_told(place: Place):
    stop, told = threading.Event(), Told()
    network = place.settings("server", "server")
    job = lambda: cl.serve(  # noqa: E731
        place.plan, place.case.build("server"), network=network, weights=place.weights, notify=told.note, stop=stop
    )
    with ThreadOf(job) as server:
        assert told.wait("serving") == [{"address": place.address, "roles": ("alpha",)}]
        place.asking("anna", rows(3))()
        stop.set()
        served = server.result()
    assert served.identities["anna"].samples == 3


class ThreadOf:
    """A job in a thread, which has ended when the `with` ends."""

    def __init__(self, job: Callable[[], Any]) -> None:
        self.found: dict[str, Any] = {}
        self.refusal: Any = None
        self.thread = threading.Thread(target=lambda: self.found.update(at_once({"job": job})))

    def __enter__(self) -> ThreadOf:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.thread.join(40)
        assert not self.thread.is_alive()

    def result(self) -> Any:
        self.thread.join(40)
        found = self.found["job"]
        if isinstance(found, CutlayerError):
            raise found
        return found

    def error(self) -> CutlayerError:
        self.thread.join(40)
        found = self.found["job"]
        assert isinstance(found, CutlayerError), found
        return found


def meet(link: Network, counts: Mapping[str, int]) -> None:
    """Say these counts, and wait for what the server says to them."""
    link.rendezvous(Ready(counts, ()))
    link.finish()


def refusal(job: Callable[[], Any]) -> CutlayerError:
    with pytest.raises(CutlayerError) as caught:
        job()
    return caught.value
