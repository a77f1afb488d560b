"""Where the boxes and lines of a drawing go: boxes in columns by layer, lines between them at right angles.

Deterministic, and without overlaps by construction. Columns are set apart by gutters, bands (rows of columns, when
there are more layers than fit side by side) by channels. A gutter has a room for labels and a strip for vertical
pieces, each piece at an x of its own; a channel has a track of its own for each line. Every line has its label where it
leaves the side of one box, at a height that no other line of that side has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

__all__ = ["Layout", "Link", "Node", "Rect", "Route", "arrange"]

_MARGIN = 14.0  # around the drawing
_GAP = 26.0  # between boxes of a column, and between bands
_PAD = 16.0  # between a box's corner and its first line
_STEP = 9.0  # between two vertical pieces, and between two tracks
_THIN = 16.0  # what a line without a label takes of a box's side

Side = Literal["left", "right"]


@dataclass(frozen=True)
class Node:
    """A box to place. `layer` counts from the left; `width` and `height` are what it needs for what is in it."""

    name: str
    layer: int
    width: float
    height: float


@dataclass(frozen=True)
class Link:
    """A line to draw from box `a` to box `b`; `width` and `height` are what its label needs."""

    a: str
    b: str
    width: float
    height: float


@dataclass(frozen=True)
class Rect:
    """A rectangle."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Route:
    """A line from a's border to b's. Its first or last piece runs through the middle of the room for its label."""

    points: tuple[tuple[float, float], ...]
    label: Rect


@dataclass(frozen=True)
class Layout:
    """Boxes by name, routes in the order of the links, and the size of it all."""

    boxes: Mapping[str, Rect]
    routes: tuple[Route, ...]
    width: float
    height: float


@dataclass
class _Wire:
    """A link on its way. `ends` has the box with the label first; `channel` is -1 for a line that needs none."""

    link: Link
    ends: tuple[str, str]
    sides: tuple[Side, Side]
    gutters: tuple[int, int]
    channel: int
    direct: bool
    track: float = 0.0
    y: dict[int, float] = field(default_factory=dict)  # end -> height of its slot
    x: dict[int, float] = field(default_factory=dict)  # end -> x of the vertical piece there

    def room(self, end: int) -> float:
        """Return the height that this line takes of the box's side at one of its ends."""
        return self.link.height if self.direct or end == 0 else _THIN


@dataclass
class _Box:
    node: Node
    band: int
    column: int
    slots: dict[Side, list[tuple[_Wire, int]]] = field(default_factory=lambda: {"left": [], "right": []})
    top: float = 0.0
    height: float = 0.0

    @property
    def need(self) -> float:
        """Return the height for what is in the box and for the lines at its sides."""
        sides = (sum(wire.room(end) for wire, end in slots) for slots in self.slots.values())
        return max(self.node.height, *(size + 2 * _PAD for size in sides))


def arrange(nodes: Sequence[Node], links: Sequence[Link], *, columns: int = 3) -> Layout:
    """Place boxes and lines; at most `columns` layers side by side, further ones in bands below."""
    layers = 1 + max(node.layer for node in nodes)
    bands = -(-layers // columns)
    across = -(-layers // bands)
    boxes = {node.name: _Box(node, node.layer // across, node.layer % across) for node in nodes}
    wires = [_wire(link, boxes) for link in links]
    for wire in wires:
        for end in (0, 1):
            boxes[wire.ends[end]].slots[wire.sides[end]].append((wire, end))
    height = _MARGIN
    for band in range(bands):
        height = _channel([wire for wire in wires if wire.channel == band], height)
        height = _place_band([box for box in boxes.values() if box.band == band], height) + _GAP
    _nudge(wires)
    lefts, widths, total = _spread(boxes, wires, across)
    rects = {name: Rect(lefts[box.column], box.top, widths[box.column], box.height) for name, box in boxes.items()}
    rooms = _rooms(wires, across)
    routes = tuple(_route(wire, rects, rooms) for wire in wires)
    return Layout(rects, routes, total, height - _GAP + _MARGIN)


def _wire(link: Link, boxes: Mapping[str, _Box]) -> _Wire:
    """Decide at which sides a line ends, through which gutters it goes, and which end has the label."""
    first, second = sorted((link.a, link.b), key=lambda name: (boxes[name].band, boxes[name].column))
    one, two = boxes[first], boxes[second]
    if (one.band, one.column) == (two.band, two.column):
        side: Side = "right" if one.column else "left"
        gutter = one.column + 1 if one.column else 0
        return _Wire(link, (link.a, link.b), (side, side), (gutter, gutter), -1, direct=False)
    direct = one.band == two.band and two.column - one.column == 1
    gutters = (one.column + 1, two.column)
    return _Wire(link, (first, second), ("right", "left"), gutters, -1 if direct else two.band, direct)


def _channel(wires: Sequence[_Wire], top: float) -> float:
    """Give each line that goes around boxes its track; return where the channel ends."""
    for place, wire in enumerate(wires):
        wire.track = top + (place + 0.5) * _STEP
    return top + len(wires) * _STEP + (_PAD if wires else 0.0)


def _place_band(boxes: Sequence[_Box], top: float) -> float:
    """Place the boxes of a band: the tallest column first, then its neighbours, along straight lines where possible."""
    columns: dict[int, list[_Box]] = {}
    for box in boxes:
        columns.setdefault(box.column, []).append(box)
    sizes = {number: sum(box.need + _GAP for box in column) - _GAP for number, column in columns.items()}
    anchor = max(sizes, key=lambda number: (sizes[number], -number))
    _stack(columns[anchor], top)
    lowest = top + sizes[anchor]
    for number in [n for n in sorted(columns) if n > anchor] + [n for n in sorted(columns, reverse=True) if n < anchor]:
        side: Side = "left" if number > anchor else "right"
        if not _align(columns[number], side, top):
            order = {id(box): _middle(box, side, place) for place, box in enumerate(columns[number])}
            column = sorted(columns[number], key=lambda box: order[id(box)])
            _stack(column, top + max(0.0, (sizes[anchor] - sizes[number]) / 2))
        lowest = max(lowest, *(box.top + box.height for box in columns[number]))
    return lowest


def _stack(column: Sequence[_Box], top: float) -> None:
    for box in column:
        box.top, box.height = top, box.need
        for side in ("left", "right"):
            _spaced(box, side)
        top += box.height + _GAP


def _spaced(box: _Box, side: Side) -> None:
    """Give the lines of one side their heights, in the order of their other ends where these are known."""
    slots = sorted(box.slots[side], key=lambda slot: (slot[0].channel < 0, not slot[0].direct, _other(slot, 0.0)))
    y = box.top + (box.height - sum(wire.room(end) for wire, end in slots)) / 2
    for wire, end in slots:
        wire.y[end] = y + wire.room(end) / 2
        y += wire.room(end)


def _align(column: Sequence[_Box], side: Side, top: float) -> bool:
    """Place boxes so that their lines to the neighbouring column are straight; return whether that is possible."""
    placed: list[tuple[float, float, _Box]] = []
    for box in column:
        fixed = [_other(slot, 0.0) for slot in box.slots[side] if slot[0].direct]
        rest = sum(wire.room(end) for wire, end in box.slots[side] if not wire.direct)
        if not fixed:
            return False
        low, high = min(fixed) - _PAD - 16.0, max(fixed) + _PAD + 16.0 + rest
        height = max(box.need, high - low)
        start = max(top, min(low, (low + high - height) / 2))
        placed.append((start, start + height, box))
    placed.sort(key=lambda row: row[0])
    if any(one[1] + _GAP > two[0] for one, two in pairwise(placed)):
        return False
    for start, end, box in placed:
        box.top, box.height = start, end - start
        _spaced(box, "right" if side == "left" else "left")
        _straight(box, side)
    return True


def _straight(box: _Box, side: Side) -> None:
    y = 0.0
    for slot in box.slots[side]:
        if slot[0].direct:
            slot[0].y[slot[1]] = _other(slot, 0.0)
            y = max(y, slot[0].y[slot[1]] + slot[0].room(slot[1]) / 2)
    for wire, end in box.slots[side]:
        if not wire.direct:
            wire.y[end] = y + wire.room(end) / 2
            y += wire.room(end)


def _nudge(wires: Sequence[_Wire]) -> None:
    """Move ends at left sides off the heights of other lines that come from the left, lest two lines look like one."""
    for wire in wires:
        if wire.sides[1] == "left" and wire.sides[0] == "right" and not (wire.direct and wire.y[0] == wire.y[1]):
            gutter = wire.gutters[1]
            taken = [
                other.y[end]
                for other in wires
                for end in (0, 1)
                if other.gutters[end] == gutter and (other is not wire or end == 0)
            ]
            tried = (wire.y[1] + offset for offset in (0.0, 6.0, -6.0, 12.0, -12.0))
            wire.y[1] = next((y for y in tried if all(abs(y - one) >= 4.0 for one in taken)), wire.y[1])


def _other(slot: tuple[_Wire, int], default: float) -> float:
    """Return the height of a line's other end, if it is known."""
    return slot[0].y.get(1 - slot[1], default)


def _middle(box: _Box, side: Side, place: int) -> tuple[float, int]:
    known = [_other(slot, 0.0) for slot in box.slots[side] if slot[0].direct]
    return (sum(known) / len(known) if known else 0.0, place)


def _spread(
    boxes: Mapping[str, _Box], wires: Sequence[_Wire], across: int
) -> tuple[dict[int, float], dict[int, float], float]:
    """Give the vertical pieces their x, and return the columns' left edges, widths, and the width of it all."""
    widths = {c: max((b.node.width for b in boxes.values() if b.column == c), default=0.0) for c in range(across)}
    rooms, pieces = _rooms(wires, across), _pieces(wires)
    lefts: dict[int, float] = {}
    x = _MARGIN
    for gutter in range(across + 1):
        strip = pieces.get(gutter, [])
        if gutter == 0:
            for place, (wire, end) in enumerate(reversed(strip)):
                wire.x[end] = x + place * _STEP
            x += len(strip) * _STEP + rooms[0]
        else:
            for place, (wire, end) in enumerate(strip):
                wire.x[end] = x + rooms[gutter] + (place + 0.5) * _STEP
            x += rooms[gutter] + len(strip) * _STEP + (12.0 if gutter < across and rooms[gutter] else 0.0)
            x += _GAP if gutter < across and not rooms[gutter] else 0.0
        if gutter < across:
            lefts[gutter] = x
            x += widths[gutter]
    return lefts, widths, x + _MARGIN


def _rooms(wires: Sequence[_Wire], across: int) -> list[float]:
    """Return the width of each gutter's room for labels."""
    return [
        max((wire.link.width + 20.0 for wire in wires if wire.gutters[0] == gutter), default=0.0)
        for gutter in range(across + 1)
    ]


def _pieces(wires: Sequence[_Wire]) -> dict[int, list[tuple[_Wire, int]]]:
    """Return the vertical pieces of each gutter, from its labels outwards, in an order with few crossings."""
    found: dict[int, list[tuple[tuple[int, float], _Wire, int]]] = {}
    for wire in wires:
        start, stop = wire.y[0], wire.y[1]
        if wire.channel >= 0:
            found.setdefault(wire.gutters[0], []).append(((2, start), wire, 0))
            found.setdefault(wire.gutters[1], []).append(((3, stop), wire, 1))
        elif not wire.direct:
            found.setdefault(wire.gutters[0], []).append(((1, abs(stop - start)), wire, 0))
        elif abs(stop - start) > 0.5:
            found.setdefault(wire.gutters[0], []).append(((0, start if stop < start else -start), wire, 0))
    return {
        gutter: [(wire, end) for _, wire, end in sorted(rows, key=lambda row: row[0])] for gutter, rows in found.items()
    }


def _route(wire: _Wire, rects: Mapping[str, Rect], rooms: Sequence[float]) -> Route:
    edges = [
        rects[name].x + (rects[name].width if side == "right" else 0.0)
        for name, side in zip(wire.ends, wire.sides, strict=True)
    ]
    begin, end = (edges[0], wire.y[0]), (edges[1], wire.y[1])
    between: list[tuple[float, float]] = []
    if wire.channel >= 0:
        between = [(wire.x[0], wire.y[0]), (wire.x[0], wire.track), (wire.x[1], wire.track), (wire.x[1], wire.y[1])]
    elif 0 in wire.x:
        between = [(wire.x[0], wire.y[0]), (wire.x[0], wire.y[1])]
    points = [begin, *between, end]
    if wire.ends[0] != wire.link.a:
        points.reverse()
    room = rooms[wire.gutters[0]]
    x = edges[0] - room + 10.0 if wire.sides[0] == "left" else edges[0] + 10.0
    return Route(tuple(points), Rect(x, wire.y[0] - wire.link.height / 2, room - 20.0, wire.link.height))
