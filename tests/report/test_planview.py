"""The drawing of a plan says what the plan and the ledgers say: who runs what, what crosses, what stays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

import cutlayer as cl
from cutlayer.report.palette import STYLES
from cutlayer.report.planview import draw_plan, layers
from cutlayer.report.record import Record
from cutlayer.report.scene import Box, Group, Label, Line, Scene, Shape, width
from cutlayer.report.tally import exchanged, moved, totals
from cutlayer.report.words import size
from tests.report import synthetic
from tests.report.conftest import Real

PLANS = synthetic.topologies()
LONG = "hospital-of-the-university-of-a-town-with-a-very-long-name-indeed"[:63].rstrip("-")


def every(items: Sequence[Shape]) -> Iterator[Shape]:
    for item in items:
        if isinstance(item, Group):
            yield from every(item.items)
        else:
            yield item


def labels(scene: Scene) -> list[Label]:
    return [item for item in every(scene.items) if isinstance(item, Label)]


def texts(scene: Scene) -> list[str]:
    return [label.text for label in labels(scene)]


def arrows(scene: Scene) -> list[Line]:
    """The lines between parties: those that say what they carry."""
    return [item for item in every(scene.items) if isinstance(item, Line) and item.title]


def draw(folder: Path, plan: cl.Plan, **settings: object) -> tuple[Record, Scene]:
    record = synthetic.record(folder, plan, **settings)  # type: ignore[arg-type]
    return record, draw_plan(record)


@pytest.mark.parametrize("name", PLANS)
def test_every_plan_is_drawn_whole(tmp_path: Path, name: str):
    plan = PLANS[name]
    _, scene = draw(tmp_path, plan)
    shown = texts(scene)
    for party in plan.parties:
        assert party in shown
    for stage in plan.stages:
        assert shown.count(stage.name) >= len(set(stage.places))
    lines = arrows(scene)
    for lane in range(plan.lanes):
        for edge in plan.graph.cuts(lane):
            a, b = plan.graph.origin(edge, lane), plan.graph.place(edge.target, lane)
            mine = [line for line in lines if f"{a} to {b}: {edge.origin}," in line.title]
            assert len(mine) == 1, (a, b, edge.label)
            assert (f"{b} to {a}: gradient at {edge.label}" in mine[0].title) == edge.trained
            assert mine[0].kind == ("raw-line" if edge.source.field else "value-line")
    assert {item.kind for item in every(scene.items)} <= set(STYLES)


@pytest.mark.parametrize("name", PLANS)
def test_no_drawing_is_wider_than_a_page(tmp_path: Path, name: str):
    _, scene = draw(tmp_path, PLANS[name])
    assert scene.width <= 1160
    for item in every([item for item in scene.items if not isinstance(item, Group)]):
        if isinstance(item, Box):
            assert item.x >= 0
            assert item.x + item.width <= scene.width
            assert item.y + item.height <= scene.height
        if isinstance(item, Label):
            taken = width(item.text, item.size, bold=item.bold)
            left = {"start": item.x, "middle": item.x - taken / 2, "end": item.x - taken}[item.anchor]
            assert left >= 0
            assert left + taken <= scene.width


def test_bytes_are_those_of_the_ledgers(real: Real):
    shown = {line.title: line for line in arrows(draw_plan(real.record))}
    flows = real.result.ledgers["clinic"].flows
    sent = {key: row for key, row in flows.items() if key[0] == "sent"}
    up = sum(row.payload for key, row in sent.items() if key[1] == "server" and key[3] == "up")
    down = sum(row.payload for key, row in sent.items() if key[1] == "server" and key[3] == "down")
    assert [t for t in shown if f"clinic to server: head, float32[batch, 6], {size(up)}" in t.splitlines()]
    assert [t for t in shown if f"clinic to server: gradient at body->tail, {size(down)}" in t.splitlines()]
    exchanged = sum(row.payload for key, row in sent.items() if key[1] == "lab" and key[3] == "exchange")
    assert size(exchanged) in texts(draw_plan(real.record))


def test_what_stays_is_locked_in_and_what_leaves_is_named(tmp_path: Path):
    _, scene = draw(tmp_path, PLANS["vanilla-1"])  # labels go to the server
    shown = texts(scene)
    assert shown.count("never leaves") == 2
    assert "data.x" in shown
    assert shown.count("its weights") == 2
    assert "data.y (label): leaves, raw" in shown
    assert "data.y (label)" not in shown
    assert "RAW data.y  int64[batch]" in shown
    _, scene = draw(tmp_path, PLANS["u-shaped-8"])
    shown = texts(scene)
    assert shown.count("data.y (label)") == 7
    assert shown.count("weights: leave by exchange") == 7  # handed on in a relay
    assert shown.count("its weights") == 1
    assert not [text for text in shown if "raw" in text.lower()]


def test_labels_that_can_be_read_are_not_locked_in(tmp_path: Path):
    """The server gets the gradient at the loss: the labels do not leave, and it has them."""
    stages = [
        cl.Stage("head", at="hospital", inputs=["data.x"], output="float32[batch, 4]"),
        cl.Stage("body", at="server", inputs=["head"], output="float32[batch, 3]"),
        cl.Loss("loss", at="hospital", inputs=["body", "data.y"]),
    ]
    _, scene = draw(tmp_path, cl.Plan(stages))
    (mark,) = [label for label in labels(scene) if label.text.startswith("data.y")]
    assert (mark.text, mark.kind) == ("data.y (label): can be read", "raw")
    assert (
        "hospital runs head, loss; never leaves: data.x, its weights. With an open lock: data.y (label): can be read."
        in scene.about
    )


def test_what_a_stage_makes_of_a_label_is_not_locked_in(tmp_path: Path):
    stages = [
        cl.Stage("head", at="hospital", inputs=["data.x"], output="float32[batch, 4]"),
        cl.Stage("body", at="server", inputs=["head"], output="float32[batch, 3]"),
        cl.Stage("target", at="hospital", inputs=["data.y"], output="float32[batch, 3]", frozen=True),
        cl.Loss("loss", at="hospital", inputs=["body", "target"]),
    ]
    _, scene = draw(tmp_path, cl.Plan(stages))
    (mark,) = [label for label in labels(scene) if label.text.startswith("data.y")]
    assert (mark.text, mark.kind) == ("data.y: can be read", "raw")


def test_all_that_leaves_of_a_field_is_drawn_raw_first(tmp_path: Path):
    """Labels released to one party, told for preprocessing, and readable by another party."""
    stages = [
        cl.Stage("own", at="a", inputs=["data.x"], output="float32[batch, 3]"),
        cl.Loss("first", at="b", inputs=["own", "data.y"]),
        cl.Stage("other", at="c", inputs=["data.z"], output="float32[batch, 3]"),
        cl.Loss("second", at="c", inputs=["other", "data.y@b"]),
    ]
    _, scene = draw(tmp_path, cl.Plan(stages, releases=[cl.Release("y", at="b", to="c", spec="int64[batch]")]))
    drawn = [label.text for label in labels(scene) if label.text.startswith("data.y")]
    assert drawn == ["data.y (label): leaves, raw", "data.y (label): can be read"]
    stages = [
        cl.Stage("head", at=["a", "b"], inputs=["data.x"], output="float32[batch, 3]"),
        cl.Stage("body", at="s", inputs=["head"], output="float32[batch, 3]"),
        cl.Loss("loss", at=["a", "b"], inputs=["body", "data.y"]),
    ]
    _, scene = draw(tmp_path, cl.Plan(stages, preprocessing=[cl.Shared("y", at="loss", kind="classes")]))
    drawn = [(label.text, label.kind) for label in labels(scene) if label.text.startswith("data.y")]
    assert drawn == [("data.y (label): can be read", "raw"), ("data.y: values leave", "exchange")] * 2


def test_of_shared_preprocessing_rows_stay_and_what_is_told_leaves(tmp_path: Path):
    shared = [cl.Shared("x", at="head"), cl.Shared("y", at="head", kind="classes")]
    settings = {"cut": "float32[batch, 4]", "back": "float32[batch, 4]", "output": "float32[batch, 3]"}
    _, scene = draw(tmp_path, cl.u_shaped(["a", "b"], "s", **settings, preprocessing=shared))
    shown = texts(scene)
    for text in ("rows of data.x", "rows of data.y (label)"):
        assert shown.count(text) == 2
    for text in ("data.x: means leave", "data.y: values leave"):
        assert shown.count(text) == 2
        assert {label.kind for label in labels(scene) if label.text == text} == {"exchange"}
    assert "data.x" not in shown


def test_a_line_says_that_something_of_the_data_is_told(real: Real):
    rows = totals(moved(real.record))
    told = [replace(rows[0], direction="exchange", exchange=("agree", f"data.{name}")) for name in ("x", "ward")]
    state = replace(rows[0], direction="exchange", exchange=("hand_on", "head"), payload=10**9)
    assert exchanged([state, told[0]]) == "what is told of data.x; state of head"
    assert exchanged([state, *told]) == "what is told of 2 fields; state of head"


def test_the_description_says_what_stays(real: Real):
    about = draw_plan(real.record).about
    assert "clinic runs head, tail, loss; never leaves: data.x, data.y (label)." in about
    assert "server runs body; never leaves: its weights." in about


def test_what_this_party_did_not_see_is_not_shown(tmp_path: Path):
    _, scene = draw(tmp_path, PLANS["vertical-8"], known=["north"])
    there = [line.title for line in arrows(scene)]
    assert len([title for title in there if "not seen here" in title]) == 6
    assert [title for title in there if "not seen here" not in title and title.startswith("north to server")]
    assert [text for text in texts(scene) if text.endswith("param.")] == ["1.2 k param."]  # its own stage only


def test_sizes_of_stages(real: Real):
    shown = texts(draw_plan(real.record))
    assert shown.count("30 param.") == 2  # head: 4 * 6 + 6
    assert shown.count("18 param.") == 2
    assert shown.count("35 param.") == 1
    assert "20 training samples" in shown
    assert "no training data" in shown


def test_layers():
    assert layers(PLANS["multihop-4"]) == {"north": 0, "south": 1, "east": 2, "west": 3}
    assert layers(PLANS["vanilla-8"]) == {**dict.fromkeys(synthetic.NAMES[:7], 0), "server": 1}
    assert layers(PLANS["u-shaped-1"]) == {"north": 0, "server": 1}


def test_frozen_stages_say_so(tmp_path: Path):
    plan = cl.Plan(
        [
            cl.Stage("head", at="north", inputs=["data.x"], output="float32[batch, 2]", frozen=True),
            cl.Stage("body", at="server", inputs=["head"], output="float32[batch, 2]"),
            cl.Loss("grade", at="north", inputs=["body", "data.y"]),
        ]
    )
    _, scene = draw(tmp_path, plan)
    assert "1.2 k param., frozen" in texts(scene)
    assert "loss" in texts(scene)  # what `grade` is
    (line,) = [line for line in arrows(scene) if "head" in line.title]
    assert "gradient" not in line.title  # none comes back


def test_long_names_are_cut_and_told_in_full(tmp_path: Path):
    assert len(LONG) > 60
    plan = cl.u_shaped(
        LONG,
        "server",
        cut="float32[batch, 1024, 1024, 16]",
        back="float32[batch, 1, 2, 3, 4, 5]",
        output="float32[batch, 10]",
    )
    _, scene = draw(tmp_path, plan)
    (name,) = [label for label in labels(scene) if label.title == LONG]
    assert "…" in name.text
    assert scene.width <= 1160
    boxes = [item for item in every(scene.items) if isinstance(item, Box) and item.kind == "party"]
    box = next(box for box in boxes if box.x < name.x < box.x + box.width)
    assert name.x + width(name.text, name.size, bold=True) <= box.x + box.width


def test_one_party_alone(tmp_path: Path):
    plan = cl.Plan(
        [
            cl.Stage("net", at="north", inputs=["data.x"], output="float32[batch, 2]"),
            cl.Loss("loss", at="north", inputs=["net", "data.y"]),
        ]
    )
    record, scene = draw(tmp_path, plan)
    assert arrows(scene) == []
    assert {"north", "net", "its weights", "data.x", "data.y (label)"} <= set(texts(scene))
    assert record.complete
