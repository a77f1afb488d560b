"""The plan drawn: a box for each party with what runs and what stays in it, and an arrow for all that crosses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cutlayer.core.describe import agreed, keeps
from cutlayer.core.graph import Edge
from cutlayer.core.parts import Loss, Stage
from cutlayer.core.plan import Plan
from cutlayer.core.readable import readable
from cutlayer.report.layout import Layout, Link, Node, Rect, Route, arrange
from cutlayer.report.record import Record
from cutlayer.report.scene import Box, Group, Label, Line, Scene, Shape, arrow, fit, fit_name, lock, width
from cutlayer.report.tally import Moved, exchanged, moved, totals
from cutlayer.report.words import compact, size

__all__ = ["draw_plan", "layers", "plan_layout"]

_TEXT, _NAME, _SMALL = 11.0, 14.0, 10.0
_ROW = 24.0  # a stage in a box
_LINE = 17.0  # a line of what stays inside
_HEAD = 42.0
_MOST = 235.0  # the widest label of an arrow
_BOX = (156.0, 226.0)
_PAGE = 1160.0  # wider than this, a drawing gets too small to read on the page


@dataclass(frozen=True)
class Arrow:
    """What crosses between two parties on one line: from `a` to `b`, or both ways.

    Attributes:
        kind: "value", "raw" or "exchange".
        what: Above the line.
        there, back: Under the line, bytes in words; empty: nothing goes that way.
    """

    a: str
    b: str
    kind: str
    what: str
    there: str
    back: str
    title: str


@dataclass(frozen=True)
class Inside:
    """What is drawn in a party's box. `kept` and `released` are data fields and weights; stages are name, remark.

    `kept` has a closed lock. `released` has an open one: the text, and its kind, "raw" or "exchange".
    """

    name: str
    remark: str
    stages: tuple[tuple[str, str, bool], ...]
    kept: tuple[str, ...]
    released: tuple[tuple[str, str], ...]


def draw_plan(record: Record) -> Scene:
    """Return the drawing of a run's plan, with the bytes that crossed."""
    inside = [_inside(record, party) for party in record.plan.parties]
    arrows = _arrows(record.plan, totals(moved(record)))
    layout = plan_layout(record.plan, inside, arrows)
    items: list[Shape] = []
    for arrow_, route in zip(arrows, layout.routes, strict=True):
        items += _draw_arrow(arrow_, route)
    for one in inside:
        items += _draw_party(one, layout.boxes[one.name])
    title = f"Plan {record.plan.name}: {len(record.plan.parties)} parties and what crosses between them"
    legend = _legend(arrows)
    most = max(layout.width, _legend_width(legend) + 28.0)
    items.append(Group(14.0, layout.height + 10.0, tuple(legend)))
    about = ". ".join([*(_about(one) for one in inside), *(one.title.replace("\n", ". ") for one in arrows)])
    return Scene(most, layout.height + 24.0, tuple(items), title, f"{about}.")


def plan_layout(plan: Plan, inside: Sequence[Inside], arrows: Sequence[Arrow]) -> Layout:
    """Return where the boxes and arrows of a plan go."""
    layer = layers(plan)
    nodes = [Node(one.name, layer[one.name], _width(one), _height(one)) for one in inside]
    links = [Link(one.a, one.b, _label_width(one), 40.0) for one in arrows]
    tried = (arrange(nodes, links, columns=columns) for columns in (6, 5, 4, 3, 2))
    return next((layout for layout in tried if layout.width <= _PAGE), arrange(nodes, links, columns=2))


def layers(plan: Plan) -> dict[str, int]:
    """Return party -> layer: 0 for who begins with its own data, else one behind those whose values it takes first."""
    graph, found = plan.graph, dict[str, int]()
    for stage in graph.order:
        for lane in range(len(stage.places)):
            party = graph.place(stage.name, lane)
            if party not in found:
                origins = [graph.origin(edge, lane) for edge in graph.inputs_of[stage.name] if edge.source.stage]
                found[party] = max((found[name] + 1 for name in origins if name != party), default=0)
    return found


def _about(one: Inside) -> str:
    """Return in words what is drawn in a party's box."""
    runs = ", ".join(name for name, _, _ in one.stages) or "nothing"
    open_ = [text for text, _ in one.released if text.startswith("data.")]
    rest = f". With an open lock: {', '.join(open_)}" if open_ else ""
    return f"{one.name} runs {runs}; never leaves: {', '.join(one.kept) or 'nothing'}{rest}"


def _inside(record: Record, party: str) -> Inside:
    plan = record.plan
    counts = record.summary.parameters.get(party)
    held = record.summary.samples.get("train", {}).get(party)
    kept, released = _locks(plan, party)
    return Inside(
        name=party,
        remark=f"{held:,} training samples" if held else "no training data",
        stages=tuple(
            (stage.name, _remark(stage, counts.stages if counts else {}), isinstance(stage, Loss))
            for stage in plan.stages
            if party in stage.places
        ),
        kept=kept,
        released=released,
    )


def _locks(plan: Plan, party: str) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Return what of a party is under a closed lock, `kept`, and under an open one, `released`."""
    graph = plan.graph
    labels = {edge.source.field for edge in graph.edges if isinstance(plan.stage(edge.target), Loss)}
    fields = sorted({name for lane in range(plan.lanes) for name in graph.data_fields(lane).get(party, ())})
    whole = keeps(plan, party)
    told = {one.field: "means leave" if one.kind == "scale" else "values leave" for one in agreed(plan, party)}
    read = {one.field for one in readable(plan) if one.holder == party}
    cuts = [(edge, lane) for lane in range(plan.lanes) for edge in graph.cuts(lane)]
    sent = {edge.source.field for edge, lane in cuts if graph.origin(edge, lane) == party}
    kept, released = list[str](), list[tuple[str, str]]()
    for name in fields:
        text = f"data.{name}{' (label)' if name in labels else ''}"
        if f"data.{name}" in whole:
            kept.append(text)
        elif any(one.startswith(f"rows of data.{name} ") for one in whole):
            kept.append(f"rows of {text}")
        released += [(f"{text}: leaves, raw", "raw")] if name in sent else []
        released += [(f"{text}: can be read", "raw")] if name in read else []
        released += [(f"data.{name}: {told[name]}", "exchange")] if name in told else []
    if "its weights" in whole:
        kept.append("its weights")
    else:
        released.append(("weights: leave by exchange", "exchange"))
    return tuple(kept), tuple(released)


def _remark(stage: Stage | Loss, counts: Mapping[str, int]) -> str:
    if isinstance(stage, Loss):
        return "loss" if stage.name != "loss" else ""
    mine = [count for name, count in counts.items() if name.partition("@")[0] == stage.name]
    words = [f"{compact(max(mine))} param."] if mine else []
    return ", ".join([*words, *(["frozen"] if stage.frozen else [])])


def _arrows(plan: Plan, rows: Sequence[Moved]) -> list[Arrow]:
    """Return an arrow for each cut of each pair of parties, and one for all exchanges of a pair."""
    seen = {(row.sender, row.receiver, row.direction, row.edge): row for row in rows}
    found: dict[tuple[int, str, str], Arrow] = {}
    for lane in range(plan.lanes):
        for edge in plan.graph.cuts(lane):
            a, b = plan.graph.origin(edge, lane), plan.graph.place(edge.target, lane)
            carried = plan.graph.carrier(edge, lane) == edge
            if carried or edge.trained:
                up, down = seen.get((a, b, "up", edge.index)), seen.get((b, a, "down", edge.index))
                there = _bytes(up) if carried else ""
                found[edge.index, a, b] = _cut(edge, (a, b), there, _bytes(down) if edge.trained else "")
    return [*found.values(), *_exchanges(plan, rows)]


def _cut(edge: Edge, ends: tuple[str, str], there: str, back: str) -> Arrow:
    raw = bool(edge.source.field)
    what = f"{'RAW ' if raw else ''}{edge.origin}  {edge.wire()}"
    parts = [f"{ends[0]} to {ends[1]}: {edge.origin}, {edge.wire()}, {there}"] if there else []
    parts += [f"{ends[1]} to {ends[0]}: gradient at {edge.label}, {back}"] if back else []
    return Arrow(*ends, "raw" if raw else "value", what, there, back, "\n".join(parts))


def _exchanges(plan: Plan, rows: Sequence[Moved]) -> list[Arrow]:
    pairs: dict[tuple[str, str], list[Moved]] = {}
    place = {party: number for number, party in enumerate(plan.parties)}
    for row in rows:
        if row.direction == "exchange" and row.payload:
            a, b = sorted((row.sender, row.receiver), key=place.__getitem__)
            pairs.setdefault((a, b), []).append(row)
    found: list[Arrow] = []
    for (a, b), mine in pairs.items():
        ways = [sum(row.payload for row in mine if row.sender == sender) for sender in (a, b)]
        title = "\n".join(f"{row.sender} to {row.receiver}: {row.what}, {row.payload:,} bytes" for row in mine)
        texts = [size(nbytes) if nbytes else "" for nbytes in ways]
        found.append(Arrow(a, b, "exchange", exchanged(mine), texts[0], texts[1], title))
    return found


def _bytes(row: Moved | None) -> str:
    return "not seen here" if row is None else size(row.payload)


def _under(one: Arrow) -> list[tuple[str, str]]:
    """Return the texts under an arrow, each with its kind."""
    word, kind = ("back", "exchange") if one.kind == "exchange" else ("gradient", "gradient")
    return [(one.there, one.kind)] * bool(one.there) + [(f"{word} {one.back}", kind)] * bool(one.back)


def _label_width(one: Arrow) -> float:
    under = sum(width(text, _TEXT) + 14.0 for text, _ in _under(one))
    return min(_MOST, max(width(one.what, _TEXT), under))


def _draw_arrow(one: Arrow, route: Route) -> list[Shape]:
    room, points = route.label, route.points
    middle = room.y + room.height / 2
    kind = "gradient" if one.kind == "value" and not one.there else one.kind
    items: list[Shape] = [Line(points, f"{kind}-line", one.title)]
    if one.there:
        items.append(arrow(points[-1], points[-2], one.kind))
    if one.back:
        items.append(arrow(points[0], points[1], "exchange" if one.kind == "exchange" else "gradient"))
    text = fit(one.what, room.width, _TEXT)
    items.append(Label(room.x, middle - 5.5, text, one.kind, _TEXT, bold=one.kind == "raw", title=one.title))
    x = room.x
    for text, colour in _under(one):
        items.append(Label(x, middle + 13.5, fit(text, room.x + room.width - x, _TEXT), colour, _TEXT))
        x += width(text, _TEXT) + 14.0
    return items


def _width(one: Inside) -> float:
    texts = [width(one.name, _NAME, bold=True), width(one.remark, _SMALL)]
    texts += [width(name, _TEXT, bold=True) + width(remark, _SMALL) + 28.0 for name, remark, _ in one.stages]
    texts += [width(text, _TEXT) + 32.0 for text in (*one.kept, *(text for text, _ in one.released))]
    return min(_BOX[1], max(_BOX[0], max(texts) + 24.0))


def _height(one: Inside) -> float:
    kept = _LINE * len(one.kept) + 24.0 if one.kept else 0.0
    return (
        _HEAD + _ROW * len(one.stages) + 6.0 + kept + _LINE * len(one.released) + (6.0 if one.released else 0.0) + 8.0
    )


def _draw_party(one: Inside, box: Rect) -> list[Shape]:
    """Draw a party: its name, its stages, what never leaves, and what the plan lets go."""
    most = box.width - 24.0
    items: list[Shape] = [
        Box(box.x, box.y, box.width, box.height, "party", 9.0),
        Label(
            box.x + 12.0,
            box.y + 20.0,
            fit_name(one.name, most, _NAME, bold=True),
            "ink",
            _NAME,
            bold=True,
            title=one.name,
        ),
        Label(box.x + 12.0, box.y + 34.0, fit(one.remark, most, _SMALL), "soft", _SMALL),
    ]
    y = box.y + _HEAD
    for name, remark, loss in one.stages:
        items += _draw_stage(
            name, remark, "loss" if loss else "stage", Rect(box.x + 10.0, y, box.width - 20.0, _ROW - 4.0)
        )
        y += _ROW
    y += 6.0
    if one.kept:
        height = _LINE * len(one.kept) + 20.0
        items.append(Box(box.x + 10.0, y, box.width - 20.0, height, "inside", 6.0))
        items.append(Label(box.x + 18.0, y + 13.0, "never leaves", "keep", _SMALL, bold=True))
        for place, text in enumerate(one.kept):
            items += _locked(box, y + 19.0 + place * _LINE, text, "keep")
        y += height + 4.0
    for place, (text, kind) in enumerate(one.released):
        items += _locked(box, y + 2.0 + place * _LINE, text, kind)
    return items


def _draw_stage(name: str, remark: str, kind: str, place: Rect) -> list[Shape]:
    side = width(remark, _SMALL)
    text = fit_name(name, place.width - side - 24.0, _TEXT, bold=True)
    base = place.y + place.height / 2 + 4.0
    return [
        Box(place.x, place.y, place.width, place.height, kind, 5.0, name),
        Label(place.x + 8.0, base, text, "ink", _TEXT, bold=True, title=name),
        Label(place.x + place.width - 8.0, base, remark, "soft", _SMALL, "end"),
    ]


def _locked(box: Rect, y: float, text: str, kind: str) -> list[Shape]:
    closed = kind == "keep"
    label = fit(text, box.width - 46.0, _TEXT)
    return [
        *lock(box.x + 18.0, y, kind, closed=closed),
        Label(box.x + 33.0, y + 10.0, label, "ink" if closed else kind, _TEXT, title=text),
    ]


_LEGEND = {
    "value": "values of a cut", "gradient": "gradients", "raw": "raw data, a declared release",
    "exchange": "exchange",
}  # fmt: skip


def _legend(arrows: Sequence[Arrow]) -> list[Shape]:
    kinds = {one.kind for one in arrows} | {"gradient" for one in arrows if one.back and one.kind != "exchange"}
    items: list[Shape] = []
    x = 0.0
    for kind, text in _LEGEND.items():
        if kind in kinds:
            items += [Line(((x, 0.0), (x + 26.0, 0.0)), f"{kind}-line"), arrow((x + 28.0, 0.0), (x, 0.0), kind)]
            items.append(Label(x + 36.0, 4.0, text, "soft", _SMALL))
            x += 36.0 + width(text, _SMALL) + 22.0
    return items


def _legend_width(legend: Sequence[Shape]) -> float:
    return max((shape.x + width(shape.text, shape.size) for shape in legend if isinstance(shape, Label)), default=0.0)
