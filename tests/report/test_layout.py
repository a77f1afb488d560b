"""Boxes, lines and labels never lie on each other, whatever the plan."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cutlayer.report.layout import Layout, Link, Node, Rect, arrange


def overlap(one: Rect, other: Rect, room: float = 0.0) -> bool:
    return (
        one.x < other.x + other.width + room
        and other.x < one.x + one.width + room
        and one.y < other.y + other.height + room
        and other.y < one.y + one.height + room
    )


def pieces(points: tuple[tuple[float, float], ...]) -> list[Rect]:
    """The straight pieces of a line, as thin rectangles."""
    found = []
    for (x1, y1), (x2, y2) in pairwise(points):
        assert x1 == x2 or y1 == y2, "at right angles"
        found.append(Rect(min(x1, x2), min(y1, y2), abs(x1 - x2), abs(y1 - y2)))
    return found


def check(nodes: list[Node], links: list[Link], layout: Layout) -> None:
    boxes = layout.boxes
    assert set(boxes) == {node.name for node in nodes}
    for node in nodes:
        assert boxes[node.name].width >= node.width
        assert boxes[node.name].height >= node.height
    for one, other in combinations(boxes.values(), 2):
        assert not overlap(one, other, 10.0)
    for link, route in zip(links, layout.routes, strict=True):
        for name, (x, y) in ((link.a, route.points[0]), (link.b, route.points[-1])):
            box = boxes[name]
            assert x in (box.x, box.x + box.width)
            assert box.y < y < box.y + box.height
        inner = [Rect(b.x + 0.5, b.y + 0.5, b.width - 1.0, b.height - 1.0) for b in boxes.values()]
        assert not [piece for piece in pieces(route.points) for box in inner if overlap(piece, box)]
        assert route.label.width >= link.width
        assert not [box for box in boxes.values() if overlap(route.label, box)]
        for rect in (*boxes.values(), route.label, *pieces(route.points)):
            assert rect.x >= 0
            assert rect.y >= 0
            assert rect.x + rect.width <= layout.width
            assert rect.y + rect.height <= layout.height
    for one_route, other_route in combinations(layout.routes, 2):
        assert not overlap(one_route.label, other_route.label, -0.01)


def test_two_boxes_side_by_side():
    nodes, links = [Node("a", 0, 100, 80), Node("b", 1, 120, 60)], [Link("a", "b", 90, 40)]
    layout = arrange(nodes, links)
    check(nodes, links, layout)
    (begin, end), a, b = layout.routes[0].points, layout.boxes["a"], layout.boxes["b"]
    assert begin[1] == end[1], "a straight line"
    assert (begin[0], end[0]) == (a.x + a.width, b.x)
    assert b.x - (a.x + a.width) >= 90


def test_one_box_alone():
    layout = arrange([Node("a", 0, 100, 80)], [])
    assert layout.routes == ()
    assert layout.width >= 100
    assert layout.height >= 80


def test_more_layers_than_columns_go_into_bands():
    nodes = [Node(f"n{place}", place, 100, 60) for place in range(7)]
    links = [Link(f"n{place}", f"n{place + 1}", 80, 40) for place in range(6)]
    layout = arrange(nodes, links, columns=3)
    check(nodes, links, layout)
    tops = [layout.boxes[node.name].y for node in nodes]
    assert tops[0] < tops[3] < tops[6]
    assert layout.boxes["n0"].x == layout.boxes["n3"].x


def test_the_same_every_time():
    nodes = [Node(f"n{place}", place % 3, 100, 60) for place in range(9)]
    links = [Link(f"n{a}", f"n{(a * 5 + 1) % 9}", 60, 40) for a in range(9) if a != (a * 5 + 1) % 9]
    assert arrange(nodes, links) == arrange(nodes, links)


@st.composite
def graphs(draw: st.DrawFn) -> tuple[list[Node], list[Link], int]:
    count = draw(st.integers(2, 10))
    layers = [0, *(draw(st.integers(0, 4)) for _ in range(count - 1))]
    used = sorted(set(layers))
    sizes = st.integers(40, 200)
    nodes = [Node(f"n{n}", used.index(layer), draw(sizes), draw(sizes)) for n, layer in enumerate(layers)]
    ends = st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)).filter(lambda pair: pair[0] != pair[1])
    pairs = draw(st.lists(ends, max_size=12))
    return nodes, [Link(f"n{a}", f"n{b}", draw(st.integers(10, 235)), 40) for a, b in pairs], draw(st.integers(2, 6))


@settings(max_examples=100)
@given(graphs())
def test_nothing_lies_on_anything_else(graph: tuple[list[Node], list[Link], int]):
    nodes, links, columns = graph
    check(nodes, links, arrange(nodes, links, columns=columns))


@pytest.mark.parametrize("count", [10, 25])
def test_many_boxes_around_one(count: int):
    nodes = [*(Node(f"n{n}", 0, 150, 120) for n in range(count)), Node("server", 1, 150, 120)]
    links = [Link(f"n{n}", "server", 200, 40) for n in range(count) for _ in range(2)]
    links += [Link(f"n{n}", f"n{(n + 1) % count}", 150, 40) for n in range(count)]
    check(nodes, links, arrange(nodes, links))
