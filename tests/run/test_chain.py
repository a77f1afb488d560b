"""Chains of served stages: a server in the middle asks the next one itself, and each party sees what the plan says."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import cutlayer as cl
from cutlayer.core.gate import retry_after
from cutlayer.core.serving import ways_of
from cutlayer.errors import (
    CertificateError,
    ConfigError,
    CutlayerError,
    DeadlineError,
    LinkError,
    PeerError,
    ProgramError,
)
from cutlayer.run.chain import Asked, Lobby, read
from cutlayer.run.prediction import SERVED, ask, asking, dialled
from cutlayer.run.results import write_results
from cutlayer.run.serving import Service
from cutlayer.transport.control import Abort
from cutlayer.transport.network import Network, NetworkSettings, Ready
from cutlayer.transport.pki import create_authority, issue
from cutlayer.transport.tls import load_credentials
from tests.run import plans
from tests.run.cluster import free_ports
from tests.run.test_serving import ALONE, Halting, ThreadOf, Told, at_once, only, refusal, rows
from tests.run.trial import DEADLINES, FAST
from tests.transport.parties import Cable

pytestmark = pytest.mark.timeout(90)
WARDS = ("anna", "ben", "cleo")
NEAR = replace(ALONE, patience=2)


def built(stages: list[Any], sizes: Mapping[str, tuple[int, int]], **training: Any) -> plans.Case:
    """A plan whose stages are blocks of these sizes; each client has a part of the data."""
    settings = cl.Training(batch_size=8, microbatches=2, drop_last=True, **training)
    plan = cl.Plan(stages, training=settings, name="chain")

    def build(name: str) -> cl.Party:
        mine = [stage.name for stage in plan.stages if name in stage.places and stage.name in sizes]
        modules: dict[str, nn.Module] = {stage: plans._block(*sizes[stage], len(stage)) for stage in mine}
        if any(name in stage.places for stage in plan.stages if stage.name == "loss"):
            modules["loss"] = nn.CrossEntropyLoss()
        table = plans._table(plans.HOSPITALS.get(name, slice(None)))
        return plans._party(name, modules, table if name in plan.graph.data_holders else None)

    return plans.Case(plan, build, plan.parties[-1])


def through(client: str | list[str] = "alpha", order: str = "relay") -> plans.Case:
    """The answer goes from the last party to the client: no edge of the plan leads it through the hub."""
    stages = [
        cl.Stage("head", at=client, inputs=["data.x"], output="float32[batch, 8]"),
        cl.Stage("near", at="hub", inputs=["head"], output="float32[batch, 7]"),
        cl.Stage("far", at="cloud", inputs=["near"], output="float32[batch, 5]"),
        cl.Stage("tail", at=client, inputs=["far"], output="float32[batch, 3]"),
        cl.Loss("loss", at=client, inputs=["tail", "data.y"]),
    ]
    return built(stages, {"head": (6, 8), "near": (8, 7), "far": (7, 5), "tail": (5, 3)}, order=order)


def back() -> plans.Case:
    """The answer goes the way that the request came."""
    stages = [
        cl.Stage("head", at="alpha", inputs=["data.x"], output="float32[batch, 8]"),
        cl.Stage("near", at="hub", inputs=["head"], output="float32[batch, 7]"),
        cl.Stage("far", at="cloud", inputs=["near"], output="float32[batch, 5]"),
        cl.Stage("homeward", at="hub", inputs=["far"], output="float32[batch, 4]"),
        cl.Stage("tail", at="alpha", inputs=["homeward"], output="float32[batch, 3]"),
        cl.Loss("loss", at="alpha", inputs=["tail", "data.y"]),
    ]
    return built(stages, {"head": (6, 8), "near": (8, 7), "far": (7, 5), "homeward": (5, 4), "tail": (4, 3)})


class Both(nn.Module):
    """Takes the values of two."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = plans._block(8, 5, 1), plans._block(7, 5, 2)

    def forward(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return self.one(one) + self.other(other)


def forked() -> plans.Case:
    """The cloud takes values of the client and of the hub."""
    stages = [
        cl.Stage("head", at="alpha", inputs=["data.x"], output="float32[batch, 8]"),
        cl.Stage("near", at="hub", inputs=["head"], output="float32[batch, 7]"),
        cl.Stage("far", at="cloud", inputs=["head", "near"], output="float32[batch, 5]"),
        cl.Stage("tail", at="alpha", inputs=["far"], output="float32[batch, 3]"),
        cl.Loss("loss", at="alpha", inputs=["tail", "data.y"]),
    ]
    case = built(stages, {"head": (6, 8), "near": (8, 7), "tail": (5, 3)})

    def build(name: str) -> cl.Party:
        party = case.build(name)
        return replace(party, modules={"far": Both()}) if name == "cloud" else party

    return replace(case, build=build)


def answered() -> plans.Case:
    """Four parties in a chain, the labels at the last one, whose outputs the first one may have."""
    case = plans.hops(epochs=1)
    return replace(case, plan=case.plan.with_extras(cl.Answer("hop-four", to="one")))


class Ways:
    """Where the servers of a chain and its clients meet."""

    def __init__(self, folder: Path, case: plans.Case, *, secure: bool = True) -> None:
        self.case, self.plan, self.folder, self.weights = case, case.plan, folder, folder / "trained"
        self.weights.mkdir()
        write_results(self.weights, cl.simulate(case.plan, case.parties()))
        self.way = ways_of(case.plan)[0]
        self.client, *self.servers = self.way.parties
        ports = free_ports(len(self.servers))
        self.addresses = {name: f"127.0.0.1:{port}" for name, port in zip(self.servers, ports, strict=True)}
        self.secure = secure
        if secure:
            authority = create_authority(folder / "ca", name="study")
            for name in (*self.servers, *WARDS):
                issue(authority, name, folder)

    def settings(self, identity: str, role: str, **changes: Any) -> NetworkSettings:
        values = {
            "party": role,
            "parties": self.plan.parties,
            "coordinator": self.servers[-1],
            "addresses": self.addresses,
            "run": "trial",
            "digest": self.plan.digest(),
            "credentials": load_credentials(self.folder / identity, identity) if self.secure else None,
            "identity": identity if self.secure else "",
            "deadlines": DEADLINES,
            "rhythm": FAST,
        }
        return NetworkSettings(**{**values, **changes})

    def party(self, data: Any, role: str = "") -> cl.Party:
        data = cl.TensorTable(x=data) if isinstance(data, torch.Tensor) else data
        return replace(self.case.build(role or self.client), data=None, evaluation=None, prediction=data)

    def asking(
        self, identity: str, data: Any, role: str = "", wait: float = 10, **changes: Any
    ) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            network, party = self.settings(identity, role or self.client, **changes), self.party(data, role)
            return only(cl.predict(self.plan, party, network=network, weights=self.weights, served=True, wait=wait))

        return run

    def expected(self, data: torch.Tensor, role: str = "") -> torch.Tensor:
        parties = [replace(p, data=None, evaluation=None) for p in self.case.parties()]
        parties = [
            replace(p, prediction=cl.TensorTable(x=data)) if p.name == (role or self.client) else p for p in parties
        ]
        return only(cl.predict(self.plan, parties, weights=self.weights))

    @contextmanager
    def serving(self, *names: str, **limits: cl.Serving) -> Iterator[dict[str, Told]]:
        """Serve at these, or at all servers; `limits` are of a server, or of `all` of them."""
        found = {name: Told() for name in names or self.servers}
        with ExitStack() as stack:
            for name, told in found.items():
                serving = limits.get(name, limits.get("all", ALONE))
                told.service = Service(
                    self.plan,
                    replace(self.case.build(name), data=None, evaluation=None),
                    network=self.settings(name, name),
                    weights=self.weights,
                    serving=serving,
                    notify=told.note,
                )
                stack.enter_context(told.service)
            yield found


@pytest.fixture(scope="module")
def ways(tmp_path_factory: pytest.TempPathFactory) -> Ways:
    return Ways(tmp_path_factory.mktemp("through"), through())


@pytest.fixture(scope="module")
def returning(tmp_path_factory: pytest.TempPathFactory) -> Ways:
    return Ways(tmp_path_factory.mktemp("back"), back())


# --- what clients get ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [through, back, answered])
@pytest.mark.parametrize("secure", [True, False])
def test_a_chain_gives_the_bits_of_one_process(case: Callable[[], plans.Case], secure: bool, tmp_path: Path):
    ways = Ways(tmp_path, case(), secure=secure)
    data = {"anna": rows(21, 1), "ben": rows(3, 2), "cleo": rows(16, 3)}
    with ways.serving() as told:
        found = at_once({name: ways.asking(name, x) for name, x in data.items()})
        for one in told.values():
            one.wait("went", 3)
    for name, x in data.items():
        assert torch.equal(found[name], ways.expected(x)), found[name]
    for name, one in told.items():
        served = one.service.served()
        stages = sum(
            name in stage.places and stage.name in ways.plan.graph.ancestors(ways.plan.graph.outputs)
            for stage in ways.plan.stages
        )
        assert served.forwards == stages * (6 + 2 + 4), name
        assert {facts["code"] for facts in one.wait("went")} == {""}


def test_requests_of_several_clients_are_put_together_at_each_server(ways: Ways):
    data = {name: rows(4, seed) for seed, name in enumerate(WARDS)}
    with ways.serving(all=cl.Serving(batch=64, wait=0.4)) as told:
        found = at_once({name: ways.asking(name, x) for name, x in data.items()})
    for name, x in data.items():
        torch.testing.assert_close(found[name], ways.expected(x), rtol=1e-6, atol=1e-6)
    assert all(one.service.served().largest > 2 for one in told.values())


def test_who_sees_what(ways: Ways):
    """The client's ledger has the cut to the hub and the one from the cloud, and the servers' tallies fit it."""
    with ways.serving() as told:
        result = ask(ways.plan, ways.party(rows(21)), network=ways.settings("anna", "alpha"), weights=ways.weights)
        for one in told.values():
            one.wait("went", 1)
        told["cloud"].wait("went", 2)
    ledger = result.ledgers["alpha"]
    flows = {(key[0], key[1], key[3]): row.payload for key, row in ledger.flows.items()}
    assert flows.pop(("sent", "cloud", "credit"), 0) == flows.pop(("received", "hub", "credit"), 0) == 0
    assert flows == {("sent", "hub", "up"): 21 * 8 * 4, ("received", "cloud", "up"): 21 * 5 * 4}
    tallies = {name: one.service.served().identities for name, one in told.items()}
    assert {name: sorted(found) for name, found in tallies.items()} == {"hub": ["anna"], "cloud": ["anna", "hub"]}
    hub, client, middle = tallies["hub"]["anna"], tallies["cloud"]["anna"], tallies["cloud"]["hub"]
    assert (hub.sent, hub.received) == (0, 21 * 8 * 4)
    assert (client.sent, client.received, client.samples) == (21 * 5 * 4, 0, 21)
    assert (middle.sent, middle.received, middle.samples, middle.sessions) == (0, 21 * 7 * 4, 21, 1)


def test_where_the_plan_leads_back_the_client_meets_the_hub_alone(returning: Ways):
    with returning.serving() as told:
        addresses = {"hub": returning.addresses["hub"]}  # it does not even know where the cloud is
        found = returning.asking("anna", rows(9), addresses=addresses, coordinator="hub")()
        told["cloud"].wait("went")
    assert torch.equal(found, returning.expected(rows(9)))
    assert list(told["cloud"].service.served().identities) == ["hub"]
    assert told["cloud"].service.roles == ("hub",)


def test_each_replica_takes_its_own_way_through_shared_servers(tmp_path: Path):
    ways = Ways(tmp_path, through(["alpha", "beta"], "parallel"))
    with ways.serving() as told:
        found = at_once({role: ways.asking("anna", rows(9), role) for role in ("alpha", "beta")})
        assert told["cloud"].service.roles == ("alpha", "beta", "hub")
    for role, value in found.items():
        assert torch.equal(value, ways.expected(rows(9), role)), role
    assert not torch.equal(found["alpha"], found["beta"])


@pytest.mark.parametrize("place", ["ways", "returning"])
def test_a_connection_keeps_all_links(place: str, request: pytest.FixtureRequest):
    ways: Ways = request.getfixturevalue(place)
    data = [rows(21, 1), rows(3, 2), rows(3, 2), rows(16, 4)]
    with ways.serving() as told:
        network = ways.settings("anna", "alpha")
        with cl.connect(ways.plan, ways.party(None), network=network, weights=ways.weights, wait=10) as connection:
            found = [only(connection.predict(cl.TensorTable(x=x))) for x in data]
        went = [facts for one in told.values() for facts in one.wait("went", 1)]
        if place == "ways":
            went = [told["hub"].wait("went")[0], *told["cloud"].wait("went", 2)]
    for x, value in zip(data, found, strict=True):
        assert torch.equal(value, ways.expected(x))
    assert [(facts["session"], facts["samples"], facts["code"]) for facts in went if facts["session"] == 1]
    assert {(facts["samples"], facts["code"]) for facts in went} == {(43, "")}
    for one in told.values():
        assert {tally.sessions for tally in one.service.served().identities.values()} == {1}


def test_a_server_asks_anew_where_the_next_has_let_it_go(returning: Ways):
    with returning.serving(cloud=replace(ALONE, idle=0.3)) as told:
        network = returning.settings("anna", "alpha")
        with cl.connect(
            returning.plan, returning.party(None), network=network, weights=returning.weights, wait=10
        ) as connection:
            first = only(connection.predict(cl.TensorTable(x=rows(3, 1))))
            assert told["cloud"].wait("went")[0]["code"] == "E621"
            threading.Event().wait(0.5)  # the cloud's last word is on its way
            second = only(connection.predict(cl.TensorTable(x=rows(3, 2))))
        told["hub"].wait("went")
    assert torch.equal(first, returning.expected(rows(3, 1)))
    assert torch.equal(second, returning.expected(rows(3, 2)))


def test_a_server_that_lets_go_just_when_it_is_asked_again_is_dialled_anew(returning: Ways):
    """Its last word crosses the next request: nothing of that has run, and nobody is told."""
    with returning.serving(cloud=ALONE) as told:
        network = returning.settings("anna", "alpha")
        with cl.connect(
            returning.plan, returning.party(None), network=network, weights=returning.weights, wait=10
        ) as connection:
            connection.predict(cl.TensorTable(x=rows(3, 1)))
            (guest,) = told["hub"].service._hall._guests.values()
            (far,) = told["cloud"].service._hall._guests.values()
            (chain,) = [alarm.args[0] for alarm in guest.alarms]
            link = chain._dialled["cloud"]
            rendezvous = link.rendezvous

            def late(ready: Ready) -> Any:
                far.network.abort(DeadlineError("nothing came", remedy="ask again", code="E621"))
                return rendezvous(ready)

            link.rendezvous = late
            found = only(connection.predict(cl.TensorTable(x=rows(3, 2))))
    assert torch.equal(found, returning.expected(rows(3, 2)))


# --- what they may ask for -------------------------------------------------------------------------------------------


def test_each_server_counts_by_itself(ways: Ways):
    """The hub's quota at the cloud bounds all its clients together; their own bound each."""
    limits = replace(ALONE, window=300, quotas={"hub": cl.Quota(samples=20)})
    with ways.serving(cloud=limits) as told:
        ways.asking("anna", rows(15))()
        error = refusal(ways.asking("ben", rows(6)))
        assert error.code == "E614"
        assert "'hub' has used up its quota" in str(error)
        assert 290 < (retry_after(error) or 0) <= 300
        assert torch.equal(ways.asking("cleo", rows(5))(), ways.expected(rows(5)))
    assert told["hub"].service.served().identities["ben"].samples == 0


def test_a_quota_at_the_last_holds_for_the_client_too(ways: Ways):
    limits = replace(ALONE, window=300, quotas={"anna": cl.Quota(samples=4)})
    with ways.serving(cloud=limits):
        with pytest.raises(LinkError, match=r"E614.*'anna' asks for more than it ever may.*got 5 samples"):
            ways.asking("anna", rows(5))()
        assert torch.equal(ways.asking("anna", rows(4))(), ways.expected(rows(4)))


def test_who_is_refused_has_used_nothing_up_for_any_of_those_who_ask(ways: Ways):
    """The cloud counts for the client and the hub together, and only once both are there."""
    limits = replace(ALONE, window=300, quotas={"anna": cl.Quota(samples=10), "hub": cl.Quota(samples=7)})
    with ways.serving("cloud", cloud=replace(limits, patience=0.3)) as told:
        for number in range(3):
            counts = {"predict": 4, "lane": 0, "request": number}
            assert meet(ways, "anna", "alpha", "cloud", counts).code == "E702"  # the hub does not come
        with ways.serving("hub"):
            assert torch.equal(ways.asking("anna", rows(4))(), ways.expected(rows(4)))
            for _ in range(3):
                assert "'hub' has used up its quota" in refusal(ways.asking("anna", rows(4))).what
            assert torch.equal(ways.asking("anna", rows(3))(), ways.expected(rows(3)))
        assert told["cloud"].service.served().identities["anna"].samples == 7
        assert sum(facts["samples"] for facts in told["cloud"].wait("came", 4)) == 14


def test_a_server_in_the_middle_has_so_many_sessions_at_the_next(returning: Ways):
    data = Halting(rows(9), free=4)
    limits = replace(ALONE, quota=cl.Quota(sessions=1))
    with returning.serving(cloud=limits), ThreadOf(returning.asking("anna", data)) as first:
        assert data.there.wait(10)
        with pytest.raises(LinkError, match=r"E613.*'hub' has as many sessions as it may have") as caught:
            returning.asking("ben", rows(1))()
        assert (retry_after(caught.value), caught.value.where) == (5, "reported by cloud, told by hub")
        data.go.set()
        assert torch.equal(first.result(), returning.expected(rows(9)))


# --- what fails, and where -------------------------------------------------------------------------------------------


def test_the_next_of_the_middle_is_not_there(returning: Ways):
    with returning.serving("hub", hub=replace(NEAR, patience=1)) as told:
        error = refusal(returning.asking("anna", rows(3)))
        assert told["hub"].wait("went")[0]["code"] == "E702"
    assert isinstance(error, PeerError)
    assert (error.code, error.what, error.where) == ("E702", "cloud did not come", "reported by hub")
    assert "ask the operator of cloud whether `cutlayer serve` runs there" in error.remedy


def test_the_last_is_not_there(ways: Ways):
    with ways.serving("hub", hub=NEAR):
        error = refusal(ways.asking("anna", rows(3), wait=1))
    assert (error.code, error.what) == ("E702", "cloud did not come")


def test_the_middle_is_not_there(ways: Ways):
    with ways.serving("cloud", cloud=NEAR):
        error = refusal(ways.asking("anna", rows(3), wait=1))
    assert (error.code, error.what) == ("E702", "hub did not come")


@pytest.mark.parametrize("place", ["ways", "returning"])
@pytest.mark.parametrize(("lost", "left"), [("cloud", "hub"), ("hub", "cloud")])
def test_a_server_that_is_lost_is_named(place: str, lost: str, left: str, request: pytest.FixtureRequest):
    """It goes in the middle of a prediction, without a word: all its links are cut."""
    ways: Ways = request.getfixturevalue(place)
    cable = Cable(ways.addresses[lost])
    data, before = Halting(rows(24), free=8), dict(ways.addresses)
    try:
        with ways.serving(lost, all=NEAR) as gone:
            ways.addresses[lost] = cable.address
            with ways.serving(left, all=NEAR) as told, ThreadOf(ways.asking("anna", data, wait=1)) as client:
                assert data.there.wait(10)
                gone[lost].wait("came")
                told[left].wait("came")
                cable.cut()
                data.go.set()
                error = client.error()
                told[left].wait("went")
            assert gone[lost].wait("went")[0]["code"]
    finally:
        ways.addresses.update(before)
        cable.close()
    assert (error.code, error.what) == ("E701", f"{lost} was lost and did not come back"), error
    assert error.where.startswith("reported by hub" if (place, lost) == ("returning", "cloud") else "party alpha")


@pytest.mark.parametrize("place", ["ways", "returning"])
@pytest.mark.parametrize("where", ["hub", "cloud"])
def test_a_stage_that_fails_is_named(place: str, where: str, request: pytest.FixtureRequest):
    ways: Ways = request.getfixturevalue(place)

    def fail(_module: object, _inputs: object) -> None:
        raise RuntimeError("a value that stays here")

    with ways.serving() as told:
        for (_, _), stage in told[where].service._worker.site.stages.items():
            stage.module.register_forward_pre_hook(fail)
        error = refusal(ways.asking("anna", rows(3)))
        for one in told.values():
            one.wait("went")
    assert error.code == "E703", error
    assert f" at {where}" in error.got
    assert "a value that stays here" not in str(error)


def test_a_client_that_is_lost_frees_all_places(ways: Ways):
    cables = {name: Cable(address) for name, address in ways.addresses.items()}
    data = Halting(rows(9), free=4)
    try:
        lost = ways.asking("anna", data, wait=1, addresses={name: cable.address for name, cable in cables.items()})
        with ways.serving(all=replace(ALONE, places=2, patience=0.5)) as told, ThreadOf(lost) as client:
            assert data.there.wait(10)
            for cable in cables.values():
                cable.cut()
            assert told["hub"].wait("went")[0]["code"] in ("E701", "E703")
            told["cloud"].wait("went", 2)
            assert torch.equal(ways.asking("ben", rows(3))(), ways.expected(rows(3)))
            data.go.set()
            assert client.error().code == "E701"
    finally:
        for cable in cables.values():
            cable.close()


@pytest.mark.parametrize("place", ["ways", "returning"])
def test_a_client_that_is_lost_frees_its_place_while_others_are_waited_for(place: str, request: pytest.FixtureRequest):
    """Only its link to one server goes, which then waits for another party: the cloud for the hub, or the reverse."""
    ways: Ways = request.getfixturevalue(place)
    server = "cloud" if place == "ways" else "hub"
    cable, halt, began = Cable(ways.addresses[server]), threading.Event(), threading.Event()
    wait = replace(ALONE, patience=0.5, idle=20)

    def hang(_module: object, _inputs: object) -> None:
        began.set()
        halt.wait(20)

    try:
        with ways.serving(all=wait) as told:
            other = "hub" if place == "ways" else "cloud"
            for stage in told[other].service._worker.site.stages.values():
                stage.module.register_forward_pre_hook(hang)
            client = ways.asking("anna", rows(3), wait=8, addresses={**ways.addresses, server: cable.address})
            with ThreadOf(client) as running:
                assert began.wait(10)
                told[server].wait("came")
                cable.cut()
                went = told[server].wait("went")[0]
                assert (went["identity"], went["code"]) == ("anna", "E701")
                assert went["seconds"] < 6
                halt.set()
                running.error()
    finally:
        halt.set()
        cable.close()


def test_a_lent_link_that_is_lost_ends_the_request(tmp_path: Path):
    """The hub's link to the cloud goes without a word, while the cloud waits for the client."""
    ways = Ways(tmp_path, forked())
    cable, before = Cable(ways.addresses["cloud"]), dict(ways.addresses)
    data = Halting(rows(24), free=8)
    limits = replace(ALONE, patience=0.5, idle=30)
    try:
        with ways.serving("cloud", cloud=limits) as told:
            ways.addresses["cloud"] = cable.address
            with ways.serving("hub", hub=replace(limits, patience=8)):
                asked = ways.asking("anna", data, wait=8, addresses=before)
                with ThreadOf(asked) as client:
                    assert data.there.wait(10)
                    told["cloud"].wait("came", 2)
                    cable.cut()
                    went = told["cloud"].wait("went", 2)
                    assert {(one["identity"], one["code"]) for one in went} == {("anna", "E701"), ("hub", "E701")}
                    assert max(one["seconds"] for one in went) < 6
                    data.go.set()
                    assert client.error().what.startswith("hub was lost")
    finally:
        data.go.set()
        ways.addresses.update(before)
        cable.close()


def test_a_server_waits_for_the_next_no_longer_than_for_a_client(ways: Ways):
    hub = replace(ways.case.build("hub"), data=None)
    for limits, most in ((cl.Serving(idle=5, deadline=7), 7), (cl.Serving(idle=50, deadline=7), 50)):
        service = Service(ways.plan, hub, network=ways.settings("hub", "hub"), weights=ways.weights, serving=limits)
        assert service.servers["cloud"].deadlines.receive == most


def test_a_service_that_closes_leaves_no_session_behind(returning: Ways):
    """The next server hangs in a forward, with several requests of this one under way."""
    halt = threading.Event()
    with returning.serving("cloud", cloud=NEAR) as far:
        for stage in far["cloud"].service._worker.site.stages.values():
            stage.module.register_forward_pre_hook(lambda *_: halt.wait(20) and None)
        with ExitStack() as clients:
            with returning.serving("hub", hub=replace(NEAR, drain=0.2)) as told:
                running = [clients.enter_context(ThreadOf(returning.asking(n, rows(1), wait=2))) for n in WARDS]
                told["hub"].wait("came", 3)
                far["cloud"].wait("came", 3)
                begin = time.monotonic()
            assert time.monotonic() - begin < 3
            assert {facts["code"] for facts in told["hub"].wait("went", 3)} == {"E615"}
            assert not [one.name for one in threading.enumerate() if one.name.startswith("cutlayer-hub-session")]
            assert {one.error().code for one in running} == {"E615"}
            halt.set()


def test_all_servers_hear_of_a_link_that_failed_whatever_becomes_of_notify():
    heard = []

    def notify(event: str, _facts: Mapping[str, Any]) -> None:
        heard.append(event)
        raise RuntimeError("of the caller")

    settings = NetworkSettings(
        party="alpha",
        parties=("hub", "alpha"),
        coordinator="hub",
        addresses={"hub": "127.0.0.1:9"},
        run="r",
        digest="d",
    )
    link = dialled({"hub": settings}, notify, "hub", lambda: heard.append("alarm"))
    link.abort(LinkError("x", code="E615"))
    link.close()
    assert heard == ["alarm", "aborted"]


def test_services_that_close_answer_what_is_under_way(ways: Ways):
    data = Halting(rows(9), free=4)
    with ThreadOf(ways.asking("anna", data)) as client:
        with ways.serving() as told:
            assert data.there.wait(10)
            told["cloud"].wait("came", 2)  # all its links are there
            threading.Timer(0.3, data.go.set).start()  # while they close, the cloud first
        assert torch.equal(client.result(), ways.expected(rows(9)))


def test_a_server_without_an_address_is_told_before_anything_is_dialled(ways: Ways):
    addresses = {"hub": ways.addresses["hub"]}
    with pytest.raises(ConfigError, match="E212"):
        ways.asking("anna", rows(3), addresses=addresses, coordinator="hub")()
    hub = replace(ways.case.build("hub"), data=None)
    with pytest.raises(ConfigError, match="E212"):
        Service(ways.plan, hub, network=ways.settings("hub", "hub", addresses=addresses, coordinator="hub"))


# --- who breaks rules ------------------------------------------------------------------------------------------------


def coming(ways: Ways, identity: str, role: str, server: str) -> NetworkSettings:
    """Settings of who comes to a server alone."""
    settings = ways.settings(identity, role, parties=(server, role), coordinator=server, run="trial" + SERVED)
    return replace(settings, addresses={server: ways.addresses[server]}, task="served")


def meet(ways: Ways, identity: str, role: str, server: str, counts: Mapping[str, int]) -> CutlayerError:
    """Come to a server with a request of one's own making, and return what it says."""
    with Network(coming(ways, identity, role, server), lambda *_: None) as link:

        def ask_for_it() -> None:
            link.rendezvous(Ready(counts, ()))
            link.finish()

        return refusal(ask_for_it)


@pytest.mark.provokes("E665")
@pytest.mark.parametrize(("identity", "role"), [("two", "one"), ("two", "three"), ("anna", "three")])
def test_the_role_of_a_server_is_its_own_and_its_only_one(identity: str, role: str, tmp_path: Path):
    """A server that knows the number of a request does not get the answer; no client comes in a server's place."""
    ways = Ways(tmp_path, answered())
    with ways.serving("four", four=NEAR) as told:
        error = meet(ways, identity, role, "four", {"predict": 3, "lane": 0, "request": 17})
        assert told["four"].wait("refused") == [{"identity": identity, "code": "E665", "what": error.what}]
    assert isinstance(error, CertificateError), error
    assert error.what == "a server's certificate and its role go together"
    assert (error.expected, error.got) == (f"{role} as {role}, or a client as a client", f"{identity} as {role}")
    assert "in its own role" in error.remedy


@pytest.mark.parametrize("role", ["alpha", "hub"])
def test_a_request_has_one_link_in_each_role(ways: Ways, role: str):
    counts = {"predict": 3, "lane": 0, "request": 18}
    names = WARDS[:2] if role == "alpha" else ("hub", "hub")
    jobs = {str(n): lambda name=name: meet(ways, name, role, "cloud", counts) for n, name in enumerate(names)}
    with ways.serving("cloud", cloud=NEAR) as told:
        found = at_once(jobs)
        codes = sorted(facts["code"] for facts in told["cloud"].wait("went", 2))
    assert codes == ["E456", "E702"]
    (error,) = [error for error in found.values() if error.code == "E703"]
    assert "the links of a request do not fit together" in error.what
    assert "E456 at cloud" in error.got
    assert "ask again" in error.remedy


@pytest.mark.provokes("E702")
@pytest.mark.parametrize(("identity", "role", "missing"), [("anna", "alpha", "hub"), ("hub", "hub", "the client")])
def test_who_comes_alone_is_told_who_is_missing(ways: Ways, identity: str, role: str, missing: str):
    counts = {"predict": 3, "lane": 0, "request": 19}
    with ways.serving("cloud", cloud=replace(NEAR, patience=0.5)):
        error = meet(ways, identity, role, "cloud", counts)
    assert (error.code, error.what) == ("E702", f"{missing} did not come with its part of a request")
    assert "look at the terminals of cloud" in error.remedy


@pytest.mark.parametrize("named", ["cloud", "hub", "nobody"])
def test_nobody_puts_words_in_the_mouth_of_another(returning: Ways, named: str):
    """A client says that a party has refused it which it cannot have heard; the hub takes it for the client's word."""
    with returning.serving(all=NEAR) as told:
        settings = asking(returning.plan, "alpha", returning.settings("anna", "alpha"), 5)["hub"]
        with Network(settings, lambda *_: None) as link:
            link.rendezvous(Ready({"predict": 3, "lane": 0, "request": 22}, ()))
            told["cloud"].wait("came")
            (guest,) = told["hub"].service._hall._guests.values()
            link._steward.fail(LinkError("x", code="E614"), tell=Abort(named, "E614", "'hub' has used it up", "pay me"))
            told["hub"].wait("went")
            told["cloud"].wait("went")
        error = guest.network._steward.failure
        assert (error.code, error.where, error.origin) == ("E614", "reported by alpha", "alpha")
        for name, identity in (("hub", "anna"), ("cloud", "hub")):
            tally = told[name].service.served().identities[identity]
            assert (tally.failed, tally.refused) == (1, 0)


@pytest.mark.parametrize("lane", [1, 2**60])
def test_a_lane_that_there_is_not_is_refused(ways: Ways, lane: int):
    with ways.serving("cloud", cloud=NEAR) as told:
        error = meet(ways, "hub", "hub", "cloud", {"predict": 3, "lane": lane, "request": 20})
        assert told["cloud"].wait("went")[0]["code"] == "E456"
    assert isinstance(error, PeerError)
    assert "E456 at cloud" in error.got


def test_what_is_too_much_is_refused_before_anybody_is_dialled(ways: Ways):
    with ways.serving("hub", hub=replace(NEAR, longest=100)):
        error = meet(ways, "anna", "alpha", "hub", {"predict": 2**60, "lane": 0, "request": 21})
    assert (error.code, error.where) == ("E614", "reported by hub")


def test_the_lobby_keeps_nothing_of_what_did_not_fit(ways: Ways):
    with ways.serving("cloud", cloud=replace(NEAR, patience=0.3)) as told:
        for number in range(2):
            meet(ways, "hub", "hub", "cloud", {"predict": 3, "lane": 0, "request": number})
        lobby: Lobby = told["cloud"].service.lobby
        assert lobby._loans == {}


@pytest.mark.parametrize("anew", ["anna", "hub"])
def test_who_asks_anew_is_heard_while_the_others_of_its_old_request_are_waited_for(ways: Ways, anew: str):
    """As a client does when a server has restarted: its next request does not wait for the end of the last one."""
    counts = {"predict": 3, "lane": 0}
    with ways.serving("cloud", cloud=replace(ALONE, patience=20)) as told, ExitStack() as stack:
        links = {
            name: stack.enter_context(Network(coming(ways, name, role, "cloud"), lambda *_: None))
            for name, role in (("anna", "alpha"), ("hub", "hub"))
        }
        links[anew].rendezvous(Ready({**counts, "request": 20}, ()))
        begin = time.monotonic()
        for link in links.values():
            link.rendezvous(Ready({**counts, "request": 21}, ()))
        assert {facts["identity"] for facts in told["cloud"].wait("came", 2)} == {"anna", "hub"}
        assert time.monotonic() - begin < 10
        assert told["cloud"].service.lobby._loans == {}


@pytest.mark.provokes("E456")
def test_what_a_request_says_is_read_by_the_role_of_who_says_it(ways: Ways):
    from cutlayer.transport.session import Start

    said = {"predict": {"hub": 5, "cloud": 7}, "lane": {"hub": 0}, "request": {"hub": 9}}
    found, way = read((ways.way,), "cloud", "hub", Start(1, said, -1))
    assert found == Asked(0, 9, 5)
    assert way is ways.way
    with pytest.raises(ProgramError, match=r"E456.*hub takes part in, got -1"):
        read((ways.way,), "cloud", "hub", Start(1, {"predict": {"hub": 5}}, -1))
