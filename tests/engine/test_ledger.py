"""The ledger: both ends count the same, and what they count is the closed form."""

from __future__ import annotations

import json
import math

import pytest

from cutlayer.core.program import Tag
from cutlayer.core.spec import DTYPES
from cutlayer.engine.ledger import Ledger
from cutlayer.engine.wire import HEADER, Frame
from cutlayer.run.simulate import simulate
from tests.small import TOPOLOGIES, Case, plain

BATCH, COUNT, EVALUATED, EPOCHS = 8, 22, 22, 2


def ran(name: str, **training: object) -> tuple[Case, dict[str, Ledger]]:
    plan = TOPOLOGIES[name](batch_size=BATCH, microbatches=3, epochs=EPOCHS, **training)
    case = Case.of(plan, (COUNT,), optimizer=plain)
    parties = [party.__class__(**{**vars_of(party), "evaluation": party.data}) for party in case.parties()]
    return case, dict(simulate(plan, parties).ledgers)


def vars_of(party: object) -> dict[str, object]:
    return {name: value for name, value in vars(party).items() if name != "_"}


def bytes_of_a_sample(spec: object) -> int:
    """From the notation alone: "float32[batch, 4]" is 4 x 4 bytes."""
    dtype, _, dims = str(spec).rstrip("]").partition("[")
    return DTYPES[dtype] * math.prod(int(dim) for dim in dims.split(", ")[1:])


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_each_cut_carries_two_p_q(name):
    """Singh et al. 2019: n samples cross each cut, up in every epoch, and down where the stage before is trained."""
    case, ledgers = ran(name)
    graph, expected = case.plan.graph, {}
    frames = 3 + 3 + 3  # microbatches of 8, 8 and 6 samples
    for edge in graph.cuts(0):
        sender, receiver = graph.origin(edge, 0), graph.place(edge.target, 0)
        size = bytes_of_a_sample(edge.spec) * COUNT
        expected[sender, receiver, "train", "up", edge.index] = (EPOCHS * size, EPOCHS * frames)
        expected[sender, receiver, "evaluate", "up", edge.index] = (size, frames)
        if edge.source.stage:
            expected[receiver, sender, "train", "down", edge.index] = (EPOCHS * size, EPOCHS * frames)
    found = {
        (party, peer, mode, direction, edge): (row.payload, row.messages)
        for party, ledger in ledgers.items()
        for (way, peer, mode, direction, edge), row in ledger.flows.items()
        if way == "sent" and direction in ("up", "down")
    }
    assert found == expected


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_both_ends_count_the_same(name):
    _, ledgers = ran(name, clip_norm=1.0, clip="global")
    for party, ledger in ledgers.items():
        for (way, peer, *rest), row in ledger.flows.items():
            other = "received" if way == "sent" else "sent"
            assert ledgers[peer].flows[other, party, *rest] == row
    assert sum(ledger.total("sent") for ledger in ledgers.values()) == sum(
        ledger.total("received") for ledger in ledgers.values()
    )


def test_a_frame_costs_its_header_and_control_part():
    ledger = Ledger("a")
    frame = Frame(Tag(0, "train", 1, 2, 3, 0, 1, "up"), "float32", (2, 3), bytes(24))
    for _ in range(3):
        ledger.sent("b", frame)
    assert ledger.total("sent") == 72
    assert ledger.total("sent", "messages") == 3
    assert ledger.total("sent", "framing") == 3 * (HEADER.size + len(frame.control))
    assert ledger.total("received") == 0


def test_steps_are_closed_one_by_one():
    ledger = Ledger("a")
    frame = Frame(Tag(0, "train", 1, 2, 3, 0, 1, "up"), "float32", (2, 3), bytes(24))
    ledger.sent("b", frame)
    ledger.sent("c", frame)
    ledger.received("b", frame)
    assert ledger.close_step()["bytes"] == {"sent up 3": 48, "received up 3": 24}
    assert not any(ledger.close_step().values())
    assert ledger.total("sent") == 48


@pytest.mark.parametrize("looks", [False, True])
def test_a_step_that_ended_is_closed_later_and_apart_from_the_next(looks):
    """Whoever looks at the sums meanwhile sees all of both, and takes nothing away from them."""
    ledger = Ledger("a")
    frame = Frame(Tag(0, "train", 1, 2, 3, 0, 1, "up"), "float32", (2, 3), bytes(24))
    for seconds in (1.0, 2.0):
        ledger.sent("b", frame)
        ledger.spend("forward", "head", seconds)
        ledger.compute("forward", "head", 5)
        if looks:
            assert ledger.seconds["forward", "head"] == seconds * (seconds + 1) / 2
            assert ledger.total("sent") == 24 * seconds
        ledger.end_step()
    ledger.spend("step", "", 4.0)
    rows = [ledger.close_step() for _ in range(3)]
    assert [row["seconds"] for row in rows] == [{"forward head": 1.0}, {"forward head": 2.0}, {"step": 4.0}]
    assert [row["bytes"] for row in rows] == [{"sent up 3": 24}, {"sent up 3": 24}, {}]
    assert [row["flops"] for row in rows] == [{"forward head": 5}, {"forward head": 5}, {}]
    assert ledger.seconds == {("forward", "head"): 3.0, ("step", ""): 4.0}
    assert ledger.flops == {("forward", "head"): 10}
    assert ledger.total("sent", "messages") == 2


def test_a_ledger_goes_back_to_a_document():
    _, ledgers = ran("u_shaped")
    ledger = ledgers["a"]
    document = json.loads(json.dumps(ledger.document()))
    other = Ledger("a")
    other.spend("wait", "", 1.0)
    other.restore(document)
    assert other.document() == ledger.document() == document
    assert other.flows == ledger.flows


def test_time_and_arithmetic_are_noted_by_stage():
    case, ledgers = ran("u_shaped")
    ledger = ledgers["a"]
    assert {stage for kind, stage in ledger.seconds if kind == "forward"} == {"head", "tail", "loss"}
    assert all(seconds >= 0 for seconds in ledger.seconds.values())
    # head: 5 x 6, two per multiply-add, in two epochs and one evaluation; backwards for the weights only
    assert ledger.flops["forward", "head"] == 2 * 5 * 6 * COUNT * (EPOCHS + 1)
    assert ledger.flops["backward", "head"] == 2 * 5 * 6 * COUNT * EPOCHS
    assert ledger.flops["backward", "tail"] == 2 * (2 * 4 * 3 * COUNT * EPOCHS)
    assert case.plan.stage("tail").output.shape[1] == 3
