"""Schedules: legal orders, the order of torch's own pipelines, and no more activations than promised."""

from __future__ import annotations

import itertools
from unittest.mock import MagicMock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cutlayer.core.batching import microbatch_sizes
from cutlayer.core.graph import Graph
from cutlayer.core.parts import Loss, Stage
from cutlayer.core.plan import Plan
from cutlayer.core.schedules import Action, forwards_only, grid, schedule
from cutlayer.core.topologies import multihop, u_shaped
from cutlayer.errors import ProgramError
from tests.small import C, float32

SCHEDULES = ["sequential", "gpipe", "1f1b"]


def chain(stages: int) -> Graph:
    return multihop({f"p{place}": float32(3) for place in range(stages)}).graph


def of_stage(actions: list[Action], stage: str) -> list[str]:
    return [f"{action.kind}{action.micro}" for action in actions if action.stage == stage]


# --- torch's own order -----------------------------------------------------------------------------------------------


def torch_order(kind: str, stages: int, place: int, microbatches: int) -> list[str]:
    """What `torch.distributed.pipelining` does at one stage: its schedule is run on a stage that only takes notes.

    `pipeline_order` of these classes is not used: it is for drawing, and wrong for the last stage in torch 2.13.
    """
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules", exc_type=ImportError)
    name = {"gpipe": "ScheduleGPipe", "1f1b": "Schedule1F1B"}[kind]
    made = getattr(schedules, name, None)
    if made is None or not hasattr(made, "_step_microbatches"):
        pytest.skip(f"this torch has no {name}._step_microbatches")
    notes: list[str] = []
    stage = MagicMock(num_stages=stages, stage_index=place, is_first=place == 0, is_last=False, has_backward=True)
    stage.forward_one_chunk.side_effect = lambda micro, *_args, **_named: notes.append(f"F{micro}")
    stage.backward_one_chunk.side_effect = lambda micro, *_args, **_named: notes.append(f"B{micro}")
    for ops in ("fwd_recv", "fwd_send", "bwd_recv", "bwd_send"):
        getattr(stage, f"get_{ops}_ops").return_value = []
    runner = made(stage, microbatches, loss_fn=lambda *_args: None)
    runner._initialize_stage = lambda *_args: None
    runner._step_microbatches([()] * microbatches, [{}] * microbatches)
    return notes


PAIRS = [(s, m) for s, m in itertools.product([1, 2, 3, 4, 6], [1, 2, 3, 4, 5, 8, 13]) if m >= s]  # torch asks for it


@pytest.mark.parametrize("kind", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("stages", "microbatches"), PAIRS)
def test_a_chain_runs_in_torchs_order(kind, stages, microbatches):
    actions = schedule(chain(stages), ((1,) * microbatches,), kind)
    for place in range(stages):
        expected = torch_order(kind, stages, place, microbatches)
        assert len(expected) == 2 * microbatches
        assert of_stage(actions, f"hop-p{place}") == expected
    assert of_stage(actions, "loss") == torch_order(kind, stages, stages - 1, microbatches)


def test_the_two_orders_are_not_the_same():
    orders = [of_stage(schedule(chain(3), ((1,) * 4,), kind), "hop-p1") for kind in SCHEDULES]
    assert orders == [
        ["F0", "B0", "F1", "B1", "F2", "B2", "F3", "B3"],
        ["F0", "F1", "F2", "F3", "B0", "B1", "B2", "B3"],
        ["F0", "F1", "B0", "F2", "B1", "F3", "B2", "B3"],
    ]


# --- every graph -----------------------------------------------------------------------------------------------------


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Any DAG; replicated or not; some stages frozen, some giving whole numbers."""
    lanes = draw(st.integers(1, 3))
    stages: list[Stage | Loss] = []
    for place in range(draw(st.integers(1, 6))):
        at = draw(st.sampled_from([["p0", "p1", "p2"][:lanes], ["q0", "q1", "q2"][:lanes], "r", "s"]))
        inputs = draw(st.lists(st.sampled_from([*(s.name for s in stages), "data.x"]), min_size=1, max_size=3))
        dtype = "int64" if draw(st.integers(0, 5)) == 0 else "float32"
        frozen = draw(st.integers(0, 3)) == 0
        stages.append(Stage(f"s{place}", at=at, inputs=inputs, output=f"{dtype}[batch, 2]", frozen=frozen))
    taken = {text for stage in stages for text in stage.inputs}
    ends = [stage.name for stage in stages if stage.name not in taken]
    losses = [
        Loss(f"loss{place}", at=draw(st.sampled_from(["r", "t"])), inputs=[end]) for place, end in enumerate(ends)
    ]
    return Graph((*stages, *losses))


@st.composite
def sizes(draw: st.DrawFn, lanes: int) -> tuple[tuple[int, ...] | None, ...]:
    found = [
        draw(st.none() | st.integers(1, 5).map(lambda n: microbatch_sizes(n + 2, n))) if lane else (1,) * 3
        for lane in range(lanes)
    ]
    return tuple(found)


@given(st.data(), st.sampled_from(SCHEDULES))
def test_every_order_is_complete_and_legal(data, name):
    """Each forward and backward once, after all that it needs, at every stage of any graph."""
    graph = data.draw(graphs())
    batch = data.draw(sizes(graph.lanes))
    actions = schedule(graph, batch, name)
    items = [(lane, micro) for lane, parts in enumerate(batch) if parts for micro in range(len(parts))]
    expected = {Action("F", stage.name, *item) for stage in graph.stages for item in items}
    expected |= {
        Action("B", stage.name, *item) for stage in graph.stages if graph.trained[stage.name] for item in items
    }
    assert len(actions) == len(expected)
    assert set(actions) == expected
    place = {action: number for number, action in enumerate(actions)}
    for edge in graph.edges:
        for item in items if edge.source.stage else ():
            source, target = edge.source.stage, edge.target
            assert place[Action("F", source, *item)] < place[Action("F", target, *item)]
            if edge.trained:
                assert place[Action("B", target, *item)] < place[Action("B", source, *item)]
            elif graph.trained[source]:  # its value is dropped before its backward: all that take it have run
                assert place[Action("F", target, *item)] < place[Action("B", source, *item)]
    for stage in graph.stages:
        if graph.trained[stage.name]:
            for item in items:
                assert place[Action("F", stage.name, *item)] < place[Action("B", stage.name, *item)]


@pytest.mark.parametrize("batch", [((1, 1, 1), (1, 1, 1)), ((1,) * 9, (1,), (1,), (1,)), ((1,), (1,) * 9)], ids=str)
def test_a_server_between_clients_is_far_enough_ahead_for_all_of_them(batch):
    """The server's stage serves all lanes, its neighbours one each. Counted in samples of any lane, it would starve."""
    at = [f"c{lane}" for lane in range(len(batch))]
    stages = (
        Stage("head", at=at, inputs=["data.x"], output=C),
        Stage("body", at="s", inputs=["head"], output=C),
        Stage("tail", at=at, inputs=["body"], output=C),
        Stage("end", at="t", inputs=["tail"], output=C),
        Loss("loss", at="t", inputs=["end"]),
    )
    actions = schedule(Graph(stages), batch, "1f1b")
    assert len(actions) == 2 * len(stages) * sum(map(len, batch))


@given(st.data())
def test_all_schedules_add_gradients_in_one_order(data):
    """Per stage, forwards come in one order and backwards in the same one: so all schedules give the same bits."""
    graph = data.draw(graphs())
    batch = data.draw(sizes(graph.lanes))
    orders = [schedule(graph, batch, name) for name in SCHEDULES]
    for stage, kind in itertools.product(graph.stages, "FB"):
        for lanes in [{lane} for lane in range(graph.lanes)] if stage.replicated else [set(range(graph.lanes))]:
            items = [
                [(a.micro, a.lane) for a in order if (a.stage, a.kind) == (stage.name, kind) and a.lane in lanes]
                for order in orders
            ]
            assert items[0] == items[1] == items[2] == sorted(items[0])


@pytest.mark.parametrize(("name", "most"), [("sequential", 1), ("gpipe", 8), ("1f1b", 3)])
def test_activations_held_at_once(name, most):
    """1F1B holds, at each stage, one microbatch more than there are cuts to the end."""
    graph = chain(3)
    actions = schedule(graph, ((1,) * 8,), name)
    for place in range(3):
        held = list(itertools.accumulate(1 if a[0] == "F" else -1 for a in of_stage(actions, f"hop-p{place}")))
        assert max(held) == (most - place if name == "1f1b" else most)


def test_only_forwards_of_what_is_asked_for():
    graph = u_shaped("a", "b", cut=C, back=C, output=C).graph
    actions = forwards_only(graph, ((2, 1),), {"head", "body", "tail"})
    assert [str(a) for a in actions] == ["head:F0", "body:F0", "tail:F0", "head:F1", "body:F1", "tail:F1"]


def test_the_grid_shows_who_waits():
    graph = u_shaped("a", "b", cut=C, back=C, output=C).graph
    assert grid(graph, schedule(graph, ((1, 1),), "1f1b")).splitlines() == [
        "a | head:F0 head:F1 tail:F0 loss:F0 loss:B0 tail:B0 tail:F1 head:B0 loss:F1 loss:B1 tail:B1 .       head:B1",
        "b | .       body:F0 body:F1 .       .       .       body:B0 .       .       .       .       body:B1",
    ]


def test_an_action_names_its_lane():
    assert str(Action("B", "head", 0, 2)) == "head:B2"
    assert str(Action("F", "head", 1, 0)) == "head@1:F0"


@pytest.mark.provokes("E401")
def test_a_schedule_that_cannot_go_on_says_where(monkeypatch):
    """A graph whose stages wait for each other cannot be built; so one is bent by hand."""
    plan = Plan([Stage("head", at="a", inputs=["data.x"], output=C), Loss("loss", at="a", inputs=["head"])])
    graph = plan.graph
    monkeypatch.setitem(graph.sources, "head", graph.sources["loss"])
    with pytest.raises(ProgramError) as caught:
        schedule(graph, ((1,),), "gpipe")
    assert caught.value.code == "E401"
    assert "head:F0" in caught.value.where
