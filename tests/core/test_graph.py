"""What follows from a plan's parts: order, cuts, who carries a value, what is trained, how far it is to the end."""

from __future__ import annotations

from cutlayer.core.parts import Loss, Release, Source, Stage
from cutlayer.core.plan import Plan
from tests.small import C

LABEL = Release("y", at="head", to="s", spec="int64[batch]")


def plan(*, frozen: tuple[str, ...] = (), places: dict | None = None) -> Plan:
    """Written down in no particular order."""
    at = {"head": ["a", "b"], "left": "s", "right": "s", "join": "t", "loss": "s", **(places or {})}
    stages = [
        Loss("loss", at=at["loss"], inputs=["join", "data.y@head"]),
        Stage("join", at=at["join"], inputs=["left", "right", "left"], output=C, frozen="join" in frozen),
        Stage("right", at=at["right"], inputs=["head"], output=C, frozen="right" in frozen),
        Stage("left", at=at["left"], inputs=["head"], output=C, frozen="left" in frozen),
        Stage("head", at=at["head"], inputs=["data.x"], output=C, frozen="head" in frozen),
    ]
    return Plan(stages, releases=[LABEL])


def test_the_order_lets_every_stage_follow_its_inputs():
    """As early in plan order as may be."""
    assert [stage.name for stage in plan().graph.order] == ["head", "right", "left", "join", "loss"]


def test_edges_are_numbered_in_plan_order():
    edges = plan().graph.edges
    assert [edge.label for edge in edges] == [
        "join->loss",
        "data.y->loss",
        "left->join",
        "right->join",
        "left->join",
        "head->right",
        "head->left",
        "data.x->head",
    ]
    assert [edge.index for edge in edges] == list(range(8))
    assert [edge.position for edge in edges] == [0, 1, 0, 1, 2, 0, 0, 0]
    assert [str(edge.spec) for edge in edges] == [C, "int64[batch]", C, C, C, C, C, "None"]


def test_cuts_follow_from_where_stages_are():
    graph = plan().graph
    assert [edge.index for edge in graph.cuts(0)] == [0, 1, 2, 3, 4, 5, 6]
    assert [edge.index for edge in plan(places={"join": "s"}).graph.cuts(1)] == [1, 5, 6]
    moved = plan(places={"head": ["a", "s"]}).graph
    assert 5 in {edge.index for edge in moved.cuts(0)}
    assert 5 not in {edge.index for edge in moved.cuts(1)}


def test_a_value_travels_once_to_each_party():
    graph = plan().graph
    carriers = {edge.index: graph.carrier(edge, 0).index for edge in graph.edges}
    assert carriers[6] == carriers[5] == 5  # head to s, for right and left
    assert carriers[4] == carriers[2] == 2  # left to t, twice an input of join
    assert carriers[3] == 3


def test_places_and_origins():
    graph = plan().graph
    assert [graph.place("head", lane) for lane in (0, 1)] == ["a", "b"]
    assert [graph.place("left", lane) for lane in (0, 1)] == ["s", "s"]
    assert [graph.origin(graph.edges[1], lane) for lane in (0, 1)] == ["a", "b"]  # the label of the head's party
    assert graph.data_fields(1) == {"b": ("y", "x")}


def test_what_is_trained():
    """A frozen stage passes gradients on to trained ones before it, and none where all before it is frozen."""
    for frozen, trained in (
        ((), {"head", "right", "left", "join", "loss"}),
        (("left",), {"head", "right", "left", "join", "loss"}),
        (("head", "left"), {"right", "join", "loss"}),
        (("head", "left", "right"), {"join", "loss"}),
        (("head", "left", "right", "join"), set()),
    ):
        graph = plan(frozen=frozen).graph
        assert {name for name, value in graph.trained.items() if value} == trained
        for edge in graph.edges:
            expected = edge.source.stage in trained and edge.target in trained
            assert edge.trained == expected
    assert not any(edge.trained for edge in plan().graph.edges if edge.source.field)


def test_heights_count_cuts_to_the_end():
    assert plan().graph.heights[0] == {"loss": 0, "join": 1, "left": 2, "right": 2, "head": 3}
    moved = plan(places={"join": "s", "head": ["a", "s"]}).graph
    assert [heights["head"] for heights in moved.heights] == [1, 0]


def test_outputs_and_ancestors():
    graph = plan().graph
    assert graph.outputs == ("join",)
    assert graph.ancestors(("join",)) == {"head", "left", "right", "join"}
    assert graph.ancestors(("left",)) == {"head", "left"}


def test_sources_are_read_from_texts():
    assert Source.parse("head") == Source(stage="head")
    assert Source.parse("data.x") == Source(field="x")
    assert Source.parse("data.X_1@hospital-a") == Source(field="X_1", owner="hospital-a")
