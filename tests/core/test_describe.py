"""The printed plan, as a privacy officer reads it. Whoever changes it changes these pages, and says why."""

from __future__ import annotations

import re

import pytest

from cutlayer.core.parts import Loss, Stage, Training
from cutlayer.core.plan import Plan
from cutlayer.core.topologies import u_shaped, vanilla
from cutlayer.run.launch import leaving
from tests.small import TOPOLOGIES, C, float32


def printed(plan: Plan) -> str:
    """Without the digest, which other tests hold fixed."""
    return re.sub(r"digest [0-9a-f]{16}", "digest ...", str(plan))


def test_labels_stay_in_a_u():
    plan = u_shaped("hospital", "server", cut=float32(64), back=float32(32), output=C, batch_size=16, microbatches=2)
    assert printed(plan) == U_SHAPED
    assert plan.digest()[:16] in str(plan)


def test_raw_labels_are_shouted():
    plan = vanilla("hospital", "server", cut="float16[batch, 64]", output=C, epochs=5, schedule="gpipe")
    assert printed(plan) == VANILLA


def test_what_a_relay_hands_on():
    plan = u_shaped(["a", "b", "c"], "server", cut=float32(64), back=float32(32), output=C)
    assert printed(plan) == RELAY


def test_what_parallel_replicas_share():
    plan = Plan(
        [
            Stage("head", at=["a", "b"], inputs=["data.x"], output=C, state_limit=10_000),
            Loss("loss", at=["a", "b"], inputs=["head", "data.y"]),
        ],
        training=Training(order="parallel", clip_norm=1.0, clip="global"),
        name="large-batch",
    )
    assert printed(plan) == PARALLEL


def test_a_hub_without_a_replica_sees_gradients_and_no_state():
    """The first replica's state goes to the others at once; only gradients are added up elsewhere."""
    plan = u_shaped(["a", "b"], "server", cut=C, back=C, output=C, order="parallel", hub="server")
    pages = pages_of(plan)
    for stage in ("head", "tail"):
        assert says(pages["a"], "sends", f"weight gradients of {stage}, by way of server to", "")
        assert says(pages["a"], "sends", f"its state of {stage}, once, to b", "")
        assert says(pages["b"], "gets", f"the state of {stage}, once, from a", "")
        assert says(pages["b"], "gets", f"the sum of all weight gradients of {stage} from server", "")
        assert says(pages["server"], "gets", f"weight gradients of {stage} from each of a, b, to add up", "")
    assert "state of" not in "".join(pages["server"])
    assert not says(pages["b"], "sends", "its state of", "")


def test_each_cut_of_each_plan_is_named_on_both_sides():
    """Nothing that crosses is left out: values, gradients, raw data."""
    for make in TOPOLOGIES.values():
        plan = make()
        graph, pages = plan.graph, pages_of(plan)
        for edge in graph.cuts(0):
            origin, target = graph.origin(edge, 0), graph.place(edge.target, 0)
            what = f"RAW data.{edge.source.field}" if edge.source.field else f"activations of {edge.source.stage}"
            if graph.carrier(edge, 0) == edge:
                assert says(pages[origin], "sends", what, f" {target}", f": {edge.spec}")
                assert says(pages[target], "gets", what, f"from {origin}: {edge.spec}")
            if edge.trained:
                assert says(pages[target], "sends", f"gradient at {edge.label}", f"to {origin}: {edge.spec}")
                assert says(pages[origin], "gets", f"gradient at {edge.label}", f"from {target}: {edge.spec}")
        sent = sum(line.startswith("  sends   activations") for page in pages.values() for line in page)
        assert sent == len({edge.source for edge in graph.cuts(0) if edge.source.stage})


def pages_of(plan: Plan) -> dict[str, list[str]]:
    pages: dict[str, list[str]] = {}
    for line in str(plan).splitlines()[2:]:
        if not line.startswith(" "):
            page: list[str] = []
            pages |= dict.fromkeys(line.removesuffix(" (each)").split(", "), page)
        else:
            page.append(line)
    return pages


def says(page: list[str], *parts: str) -> bool:
    return any(all(part in line for part in parts) for line in page)


def test_two_receivers_are_two():
    """Of one value at one time; clients that take turns are not."""
    pages = pages_of(TOPOLOGIES["multitask"]())
    assert says(pages["a"], "sends   activations of head-a to s and t: float32[batch, 4], 512 bytes a batch each")
    stages = [
        Stage("head", at=["a", "b"], inputs=["data.x"], output=C),
        Stage("body", at="s", inputs=["head"], output=C),
        Loss("loss", at=["a", "b"], inputs=["body", "data.y"]),
        Loss("more", at="t", inputs=["body", "head"]),
    ]
    pages = pages_of(Plan(stages))
    assert says(pages["s"], "sends   activations of body to a and t or b and t: ", "each")
    assert says(pages["a"], "sends   activations of head to s and t: ", "each")
    assert says(pages["s"], "gets    activations of head from a or b: ")


def test_a_frozen_stage_and_a_second_loss_are_marked():
    stages = [
        Stage("head", at="a", inputs=["data.x"], output=C, frozen=True),
        Stage("body", at="b", inputs=["head"], output=C),
        Loss("loss", at="b", inputs=["body", "data.y"]),
        Loss("more", at="b", inputs=["body", "data.y"]),
    ]
    text = str(Plan(stages))
    assert "runs    head (frozen)" in text
    assert "runs    body, loss, loss more" in text
    assert "gradient" not in text


def test_one_party_alone_sends_nothing():
    stages = [Stage("head", at="a", inputs=["data.x"], output=C), Loss("loss", at="a", inputs=["head", "data.y"])]
    plan = Plan(stages, training=Training(clip_norm=1.0, clip="global"))
    assert str(plan).splitlines()[2:] == [
        "a",
        "  runs    head, loss",
        "  data    data.x, data.y",
        "  sends   nothing",
        "  keeps   data.x, data.y, its weights",
    ]


U_SHAPED = """\
plan u-shaped: 4 stages at 2 parties, digest ...
  1 epochs, batches of 16 in 2 microbatches, schedule sequential
hospital
  runs    head, tail, loss
  data    data.x, data.y
  sends   activations of head to server: float32[batch, 64], 4,096 bytes a batch
  sends   gradient at body->tail to server: float32[batch, 32], 2,048 bytes a batch
  sends   its number of samples, once, to all parties
  gets    gradient at head->body from server: float32[batch, 64], 4,096 bytes a batch
  gets    activations of body from server: float32[batch, 32], 2,048 bytes a batch
  keeps   data.x, data.y, its weights
server
  runs    body
  sends   gradient at head->body to hospital: float32[batch, 64], 4,096 bytes a batch
  sends   activations of body to hospital: float32[batch, 32], 2,048 bytes a batch
  gets    activations of head from hospital: float32[batch, 64], 4,096 bytes a batch
  gets    gradient at body->tail from hospital: float32[batch, 32], 2,048 bytes a batch
  gets    the number of samples of each party that has data, once
  keeps   its weights"""

VANILLA = """\
plan vanilla: 3 stages at 2 parties, digest ...
  5 epochs, batches of 32 in 1 microbatches, schedule gpipe
hospital
  runs    head
  data    data.x, data.y
  sends   activations of head to server: float16[batch, 64], 4,096 bytes a batch
  sends   RAW data.y (declared release) to server: int64[batch], 256 bytes a batch
  sends   its number of samples, once, to all parties
  gets    gradient at head->body from server: float16[batch, 64], 4,096 bytes a batch
  keeps   data.x, its weights
server
  runs    body, loss
  sends   gradient at head->body to hospital: float16[batch, 64], 4,096 bytes a batch
  gets    activations of head from hospital: float16[batch, 64], 4,096 bytes a batch
  gets    RAW data.y (declared release) from hospital: int64[batch], 256 bytes a batch
  gets    the number of samples of each party that has data, once
  keeps   its weights"""

RELAY = """\
plan u-shaped: 4 stages at 4 parties, digest ...
  1 epochs, batches of 32 in 1 microbatches, schedule sequential; 3 lanes, relay
a
  runs    head, tail, loss
  data    data.x, data.y
  sends   activations of head to server: float32[batch, 64], 8,192 bytes a batch
  sends   gradient at body->tail to server: float32[batch, 32], 4,096 bytes a batch
  sends   all state of head to another of a, b, c: at most 67,108,864 bytes a turn
  sends   all state of tail to another of a, b, c: at most 67,108,864 bytes a turn
  sends   sums over its samples behind the metrics of loss, by way of a (at least 5: how many of each label, not whose)
  sends   its number of samples, once, to all parties
  gets    gradient at head->body from server: float32[batch, 64], 8,192 bytes a batch
  gets    activations of body from server: float32[batch, 32], 4,096 bytes a batch
  gets    sums behind the metrics of loss from each of a, b, c, to add up
  gets    all state of head from another of a, b, c
  gets    all state of tail from another of a, b, c
  gets    the number of samples of each party that has data, once
  keeps   data.x, data.y
b, c (each)
  runs    head, tail, loss
  data    data.x, data.y
  sends   activations of head to server: float32[batch, 64], 8,192 bytes a batch
  sends   gradient at body->tail to server: float32[batch, 32], 4,096 bytes a batch
  sends   all state of head to another of a, b, c: at most 67,108,864 bytes a turn
  sends   all state of tail to another of a, b, c: at most 67,108,864 bytes a turn
  sends   sums over its samples behind the metrics of loss, by way of a (at least 5: how many of each label, not whose)
  sends   its number of samples, once, to all parties
  gets    gradient at head->body from server: float32[batch, 64], 8,192 bytes a batch
  gets    activations of body from server: float32[batch, 32], 4,096 bytes a batch
  gets    all state of head from another of a, b, c
  gets    all state of tail from another of a, b, c
  gets    sums over all samples behind the metrics of loss from a
  gets    the number of samples of each party that has data, once
  keeps   data.x, data.y
server
  runs    body
  sends   gradient at head->body to a, b or c: float32[batch, 64], 8,192 bytes a batch
  sends   activations of body to a, b or c: float32[batch, 32], 4,096 bytes a batch
  gets    activations of head from a, b or c: float32[batch, 64], 8,192 bytes a batch
  gets    gradient at body->tail from a, b or c: float32[batch, 32], 4,096 bytes a batch
  gets    the number of samples of each party that has data, once
  keeps   its weights"""

PARALLEL = """\
plan large-batch: 2 stages at 2 parties, digest ...
  1 epochs, batches of 32 in 1 microbatches, schedule sequential; 2 lanes, parallel
a
  runs    head, loss
  data    data.x, data.y
  sends   weight gradients of head, by way of a to another of a, b: at most 10,000 bytes a step
  sends   its state of head, once, to b: at most 10,000 bytes
  sends   sums over its samples behind the metrics of loss, by way of a (at least 5: how many of each label, not whose)
  sends   one number a step, the squared norm of its gradients, by way of a (declared release)
  sends   its number of samples, once, to all parties
  gets    weight gradients of head from each of a, b, to add up
  gets    sums behind the metrics of loss from each of a, b, to add up
  gets    one number a step, the squared norm of gradients, from each party
  gets    the number of samples of each party that has data, once
  keeps   data.x, data.y
b
  runs    head, loss
  data    data.x, data.y
  sends   weight gradients of head, by way of a to another of a, b: at most 10,000 bytes a step
  sends   sums over its samples behind the metrics of loss, by way of a (at least 5: how many of each label, not whose)
  sends   one number a step, the squared norm of its gradients, by way of a (declared release)
  sends   its number of samples, once, to all parties
  gets    the sum of all weight gradients of head from a
  gets    the state of head, once, from a
  gets    sums over all samples behind the metrics of loss from a
  gets    one number a step, the squared norm of gradients, from a, of all together
  gets    the number of samples of each party that has data, once
  keeps   data.x, data.y"""


@pytest.mark.parametrize("order", ["relay", "parallel"])
def test_each_holder_of_a_replica_is_told_where_its_weights_go_in_the_end(order: str):
    plan = Plan(
        [
            Stage("head", at=("a", "b", "c"), inputs=["data.x"], output="float32[batch, 4]"),
            Stage("body", at="server", inputs=["head"], output="float32[batch, 4]"),
            Stage("tail", at=("a", "b", "c"), inputs=["body"], output="float32[batch, 2]"),
            Loss("loss", at=("a", "b", "c"), inputs=["tail", "data.y"]),
        ],
        training=Training(batch_size=8, order=order),
        assemble_at=["b", "server"],
    )
    end = "to server, at the end (it may put the whole model together)"
    for party in ("a", "b", "c"):
        told = [line for line in leaving(plan, party, {}).text.splitlines() if line.endswith(end)]
        way = "" if party == "a" else ", which a has as well, by way of a"
        assert told == [f"  sends   its weights of {stage}{way} {end}" for stage in ("head", "tail")]
    (told,) = [
        line for line in leaving(plan, "server", {}).text.splitlines() if "at the end" in line and "sends" in line
    ]
    assert told == "  sends   its weights of body to b, at the end (it may put the whole model together)"
