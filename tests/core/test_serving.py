"""Which plans can be served, by whom to whom, and what a served session runs."""

from __future__ import annotations

from dataclasses import replace

import pytest

import cutlayer as cl
from cutlayer.core.compile import Roster, compile_plan
from cutlayer.core.program import Credit, Exchange, Forward, Recv, Send
from cutlayer.core.serving import Way, behind, clients_of, requests_in, served_plan, served_programs, server_of, ways_of
from cutlayer.errors import ProgramError
from tests.run import plans

U = {"cut": "float32[batch, 8]", "back": "float32[batch, 5]", "output": "float32[batch, 3]"}


def test_a_u_shape_is_served_to_its_data_holders():
    assert clients_of(plans.u_shaped().plan, "server") == ("alpha",)
    assert clients_of(plans.relay().plan, "server") == ("alpha", "beta", "gamma")
    assert server_of(plans.relay().plan, "beta") == "server"


def vanilla() -> cl.Plan:
    return cl.vanilla("alpha", "server", cut="float32[batch, 8]", output="float32[batch, 3]")


@pytest.mark.provokes("E453")
@pytest.mark.parametrize(
    ("plan", "server", "reason"),
    [
        (vanilla(), "server", "the output 'server' stays at server: the client would get nothing"),
        (plans.vertical().plan, "registry", "2 parties give data for each: clinic, laboratory"),
        (plans.hops().plan, "two", "the output 'hop-four' stays at four: the client would get nothing"),
    ],
)
def test_why_a_plan_cannot_be_served(plan: cl.Plan, server: str, reason: str):
    with pytest.raises(ProgramError) as caught:
        clients_of(plan, server)
    assert caught.value.code == "E453"
    assert caught.value.got == reason.replace("'server'", repr(plan.graph.outputs[0]))
    client = next(name for name in plan.parties if name != server)
    with pytest.raises(ProgramError, match=r"E453|E454"):
        server_of(plan, client)


def test_whose_words_a_party_may_hand_on():
    """Those of parties that it is connected with not by way of who hears it."""
    way = Way(("one", "two", "three", "four"), frozenset({("one", "two"), ("two", "three"), ("three", "four")}))
    assert behind([way], "three", "two") == {"four"}
    assert behind([way], "two", "three") == {"one"}
    assert behind([way], "one", "two") == behind([way], "four", "two") == set()
    ring = replace(way, links=way.links | {("one", "four")})
    assert behind([way, ring], "one", "two") == {"three", "four"}


@pytest.mark.provokes("E453")
def test_replicas_whose_servers_stand_in_other_orders_are_refused():
    """Who comes first in one replica leads its requests at the cloud; it cannot be lent in the other one."""
    both = ["alpha", "beta"]

    def plan(near: list[str], following: list[str]) -> cl.Plan:
        stages = [
            cl.Stage("head", at=both, inputs=["data.x"], output="float32[batch, 8]"),
            cl.Stage("near", at=near, inputs=["head"], output="float32[batch, 7]"),
            cl.Stage("next", at=following, inputs=["near"], output="float32[batch, 6]"),
            cl.Stage("far", at="cloud", inputs=["near", "next"], output="float32[batch, 5]"),
            cl.Stage("back", at=near, inputs=["far"], output="float32[batch, 4]"),
            cl.Stage("tail", at=both, inputs=["back"], output="float32[batch, 3]"),
            cl.Loss("loss", at=both, inputs=["tail", "data.y"]),
        ]
        return cl.Plan(stages, training=cl.Training(order="parallel"))

    assert clients_of(plan(["hub", "hub"], ["mid", "mid"]), "cloud") == ("hub", "mid")
    crossed = plan(["hub", "mid"], ["mid", "hub"])
    for ask in (lambda: clients_of(crossed, "cloud"), lambda: server_of(crossed, "alpha")):
        with pytest.raises(ProgramError) as caught:
            ask()
        assert caught.value.code == "E453"
        assert caught.value.got == "hub asks cloud first in one replica, and after another in the next"
        assert caught.value.remedy == "let the servers of all replicas stand in the same order"


def test_a_server_with_data_of_its_own_is_refused():
    stages = [
        cl.Stage("head", at="alpha", inputs=["data.x"], output="float32[batch, 8]"),
        cl.Stage("body", at="server", inputs=["head", "data.z@server"], output="float32[batch, 5]"),
        cl.Stage("tail", at="alpha", inputs=["body"], output="float32[batch, 3]"),
        cl.Loss("loss", at="alpha", inputs=["tail", "data.y"]),
    ]
    with pytest.raises(ProgramError, match=r"E453.*server would have to give data for each"):
        clients_of(cl.Plan(stages), "server")


@pytest.mark.parametrize("plan", [plans.u_shaped().plan, plans.relay().plan, vanilla()])
def test_a_client_is_told_who_serves(plan: cl.Plan):
    """An answer would not help: the output may be there already."""
    with pytest.raises(ProgramError, match="E453") as caught:
        clients_of(plan, "alpha")
    assert caught.value.got == "alpha gives the data for each: it is a client of the stage at server"
    assert caught.value.remedy == "serve as server; alpha asks there: cutlayer predict --served"


def test_what_one_party_predicts_alone_is_not_served():
    stages = [
        cl.Stage("head", at="alpha", inputs=["data.x"], output="float32[batch, 8]"),
        cl.Loss("loss", at="beta", inputs=["head", "data.y@beta"]),
    ]
    with pytest.raises(ProgramError, match=r"E453.*got alpha makes each alone. predict there"):
        clients_of(cl.Plan(stages), "alpha")


@pytest.mark.provokes("E454")
def test_who_is_no_server_and_no_client():
    plan = plans.u_shaped().plan
    with pytest.raises(ProgramError, match=r"E454.*'nobody' has no stage to serve"):
        clients_of(plan, "nobody")
    with pytest.raises(ProgramError, match=r"E454.*'server' cannot ask a server"):
        server_of(plan, "server")


@pytest.mark.parametrize("case", [plans.u_shaped, plans.relay, plans.parallel])
def test_a_session_runs_the_plans_own_prediction_without_the_barrier(case):
    plan = case().plan
    whole = compile_plan(plan, Roster({"predict": {"alpha": 21}}))
    found = served_programs(plan, Roster({"predict": {"alpha": 21}, "train": {"alpha": 2**60}}), ("server", "alpha"))
    assert set(found) == {"server", "alpha"}
    for party, modes in found.items():
        assert set(modes) == {"predict"}
        kept = [
            (block.repeat, [j for j in block.instructions if not isinstance(j, Exchange)])
            for block in whole[party]["predict"].blocks
        ]
        assert [(block.repeat, list(block.instructions)) for block in modes["predict"].blocks] == kept
        jobs = [job for block in modes["predict"].blocks for job in block.instructions]
        assert {job.to for job in jobs if isinstance(job, Send)} | {j.source for j in jobs if isinstance(j, Recv)} == {
            "server" if party == "alpha" else "alpha"
        }
    forwards = sum(
        block.repeat * sum(isinstance(job, Forward) for job in block.instructions)
        for block in found["server"]["predict"].blocks
    )
    assert requests_in(found["server"]["predict"]) == forwards > 0


def chain(*places: str) -> cl.Plan:
    """Stages one after the other at these parties, the first with the data, the last before the loss."""
    sources = ["data.x", *(f"part-{place}" for place in range(len(places) - 1))]
    stages = [
        cl.Stage(f"part-{place}", at=at, inputs=[source], output="float32[batch, 8]")
        for place, (at, source) in enumerate(zip(places, sources, strict=True))
    ]
    return cl.Plan([*stages, cl.Loss("loss", at=places[-1], inputs=[stages[-1].name, "data.y"])])


@pytest.mark.parametrize(
    ("plan", "parties", "links"),
    [
        (chain("a", "b", "a"), "ab", {"ab"}),
        (chain("a", "b", "c", "a"), "abc", {"ab", "bc", "ac"}),
        (chain("a", "b", "c", "b", "a"), "abc", {"ab", "bc"}),
        (chain("a", "b", "c", "d", "c", "a"), "abcd", {"ab", "bc", "cd", "ac"}),
        (chain("a", "d", "c", "b", "a"), "adcb", {"ad", "dc", "cb", "ab"}),  # not the order of names
    ],
)
def test_the_earlier_one_asks_the_later_one(plan: cl.Plan, parties: str, links: set[str]):
    way = ways_of(plan)[0]
    assert (way.client, "".join(way.parties)) == ("a", parties)
    assert {"".join(link) for link in way.links} == links
    for server in parties[1:]:
        assert set(clients_of(plan, server)) == {one for one, other in links if other == server}
        assert way.asking(server) == tuple(one for one in parties if one + server in links)
        assert way.asked_by(server) == tuple(other for other in parties if server + other in links)
    assert server_of(plan, "a") in parties[1:]


@pytest.mark.parametrize(
    "plan",
    [
        chain("a", "b", "c", "a"),
        chain("a", "b", "c", "b", "a"),
        plans.hops().plan.with_extras(cl.Answer("hop-four", to="one")),
    ],
)
def test_programs_of_a_chain_talk_over_its_links_and_no_others(plan: cl.Plan):
    way = ways_of(plan)[0]
    found = served_programs(plan, Roster({"predict": {way.client: 40}}), way.parties)
    for party, modes in found.items():
        jobs = [job for block in modes["predict"].blocks for job in block.instructions]
        peers = {job.to for job in jobs if isinstance(job, Send)} | {j.source for j in jobs if isinstance(j, Recv)}
        peers |= {job.peer for job in jobs if isinstance(job, Credit)}
        assert peers == {*way.asking(party), *way.asked_by(party)}


def test_a_chain_with_an_answer_ends_at_the_client():
    plan = plans.hops().plan.with_extras(cl.Answer("hop-four", to="one"))
    way = ways_of(plan)[0]
    assert way.parties == ("one", "two", "three", "four")
    assert way.links == {("one", "two"), ("two", "three"), ("three", "four"), ("one", "four")}
    assert ways_of(served_plan(plan))[0] == way


def test_several_data_holders_are_no_client():
    plan = cl.extended_vanilla(
        {"clinic": "float32[batch, 4]", "laboratory": "float32[batch, 3]"},
        "hub",
        "cloud",
        cut="float32[batch, 5]",
        output="float32[batch, 3]",
    )
    for server in ("hub", "cloud", "clinic"):
        with pytest.raises(ProgramError, match=r"E453.*got 2 parties give data for each: clinic, laboratory.*--join"):
            clients_of(plan, server)
