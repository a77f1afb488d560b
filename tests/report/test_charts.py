"""Curves and bars show the numbers that they are made of."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import cutlayer as cl
from cutlayer.report.charts import curves, grid, panels, ticks, time_bars
from cutlayer.report.numbers import metric_tables
from cutlayer.report.palette import STYLES
from cutlayer.report.record import read_record
from cutlayer.report.scene import Box, Dot, Label, Line, Scene, width
from tests.report import synthetic
from tests.report.conftest import EPOCHS, Real
from tests.report.test_planview import every, labels, texts

PLANS = synthetic.topologies()


def drawn(folder: Path, rows: list[tuple[int, Any]], *, name: str = "vanilla-1", **changes: Any) -> list[Scene]:
    """Curves of a run whose loss had these values."""
    history = [
        {"mode": "train", "round": at, "loss": "loss", "party": "server", "metrics": {"loss": value}}
        for at, value in rows
    ]
    synthetic.write(folder, {**synthetic.summary(PLANS[name]), "history": history, **changes})
    return curves(read_record(folder))


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 10), st.booleans())
@example(low=0.0, span=1.0, most=6, whole=False)
@example(low=0.0, span=1e-9, most=6, whole=False)
def test_ticks_are_round_and_within(low: float, span: float, most: int, whole: bool):
    span *= max(1.0, abs(low) / 1e3)  # narrower ones are lost in the rounding of the numbers themselves
    high = low + span
    marks = ticks(low, high, most, whole=whole)
    assert len(marks) <= most
    slack = 1e-6 * span + (2e-9 if whole else 0.0)  # steps of 1 may be far wider than the span
    assert all(low - slack <= mark <= high + slack for mark in marks)
    steps = {float(f"{b - a:.6e}") for a, b in pairwise(marks)}
    if span > 1e-6 * abs(low):  # else the marks' own rounding shows
        for step in steps:
            lead = step / 10.0 ** math.floor(math.log10(step * (1 + 1e-9)))
            assert min(abs(lead - one) for one in (1, 2, 5, 10)) < 1e-3
        assert len(marks) >= 2 or most < 4 or whole
    if whole:
        assert all(mark == round(mark) for mark in marks)


def test_points_are_at_their_values(real: Real):
    scene = curves(real.record)[0]
    dots = [item for item in every(scene.items) if isinstance(item, Dot)]
    rows = [row for row in real.result.history if row["party"] == "clinic"]
    train = {row["round"]: row["metrics"]["loss"] for row in rows if row["mode"] == "train"}
    mine = {dot.title.splitlines()[-1]: dot for dot in dots if dot.title.startswith("train loss, all together")}
    assert set(mine) == {f"round {at}: {value:.4f}" for at, value in train.items()}
    one, two, three = (mine[f"round {at}: {train[at]:.4f}"] for at in (1, 2, 3))
    assert two.x - one.x == pytest.approx(three.x - two.x)
    scale = (two.y - one.y) / (train[2] - train[1])
    assert scale < 0, "up is more"
    assert three.y - one.y == pytest.approx(scale * (train[3] - train[1]))
    marks = [label for label in labels(scene) if label.anchor == "end"]  # the axis says the same
    by_mark = {float(label.text): label.y - 3.5 for label in marks}
    assert len(by_mark) >= 2
    for value, y in by_mark.items():
        assert y == pytest.approx(one.y + scale * (value - train[1]), abs=0.01)
    assert len(dots) == 3 * 2 * EPOCHS  # of all, and of each clinic's own samples; training and evaluation


def test_what_is_of_all_is_bold_and_what_is_a_clients_own_is_thin(real: Real):
    scene = curves(real.record)[0]
    lines = [item for item in every(scene.items) if isinstance(item, Line) and item.title]
    kinds = {line.title: line.kind for line in lines}
    assert kinds == {
        "train loss, all together": "line-all",
        "evaluate loss, all together": "dash-all",
        "train loss, clinic": "thin-c1",
        "evaluate loss, clinic": "thindash-c1",
        "train loss, lab": "thin-c2",
        "evaluate loss, lab": "thindash-c2",
    }
    assert STYLES["line-all"].width > 2 * STYLES["thin-c1"].width
    assert [line.kind for line in lines][-1] == "line-all", "drawn last, so on top"
    legend = [text.split(", ")[1] for text in texts(scene) if text.startswith("train")]
    assert legend == ["all together", "clinic", "lab"]
    heights = {line.title: [y for _, y in line.points] for line in lines}
    assert heights["train loss, clinic"] != heights["train loss, lab"]


def test_clients_that_are_more_than_colours_share_one_entry(tmp_path: Path):
    names = [f"client-{number:02}" for number in range(20)]
    document = with_own(cl.vanilla(names, "server", cut="float32[batch, 3]", output="float32[batch, 2]"))
    synthetic.write(tmp_path, document)
    record = read_record(tmp_path)
    (scene,) = curves(record)
    lines = [item for item in every(scene.items) if isinstance(item, Line) and item.title]
    assert {line.title for line in lines} == {f"train loss, {name}" for name in (*names, "all together")}
    legend = [text for text in texts(scene) if text.startswith("train") or "more" in text]
    assert [text.partition(", ")[2] for text in legend] == ["all together", *names[:7], "each by its own"]
    assert legend[-1].startswith("13 more")
    (table,) = metric_tables(record)
    assert table.head == ("round", *(f"train, {name}" for name in ("all together", *names[:7])))
    assert table.caption == "loss by round; 13 more by their own samples are in report/curves.csv"


def with_own(plan: cl.Plan) -> dict[str, Any]:
    """Return a summary whose losses also have values of each lane's own samples."""
    document = synthetic.summary(plan)
    for row in document["history"]:
        row["own"] = [
            {"lane": lane, "samples": 8, "metrics": {"loss": (lane + 1) / row["round"]}} for lane in range(plan.lanes)
        ]
    return document


def test_panels_leave_lists_to_the_csv(real: Real):
    assert [lines[0].metric for lines in panels(real.record)] == ["loss", "accuracy"]
    assert [scene.title for scene in curves(real.record)] == ["loss by round", "accuracy by round"]


def test_legend_says_the_last_value(real: Real):
    last = [row["metrics"]["loss"] for row in real.result.history if row["mode"] == "train"][-1]
    assert f"train {last:.4f}, all together" in texts(curves(real.record)[0])


def test_a_single_value_is_a_point_in_the_legend_too(tmp_path: Path):
    rows = [("train", 1, 0.5), ("train", 2, 0.4), ("evaluate", 2, 0.3)]
    history = [
        {"mode": mode, "round": at, "loss": "loss", "party": "server", "metrics": {"loss": value}}
        for mode, at, value in rows
    ]
    [scene] = drawn(tmp_path, [], history=history)
    legend = [item for item in every(scene.items) if isinstance(item, Line | Dot) and not item.title]
    assert [item.kind for item in legend if "-c" in item.kind] == ["line-c1", "fill-c2"]  # no dashes: none are drawn


def test_replicas_that_tell_the_same_are_one_line(tmp_path: Path):
    (scene,) = curves(synthetic.record(tmp_path, PLANS["u-shaped-parallel"]))
    assert "train 0.3333, the same at 7 replicas" in texts(scene)


def test_each_metric_is_one_drawing(tmp_path: Path):
    rows = [{"mode": mode, "round": 1, "loss": "loss", "party": "server"} for mode in ("train", "evaluate")]
    history = [{**row, "metrics": {"loss": 1.0, "f1": 0.5, "accuracy": 0.5}} for row in rows]
    synthetic.write(tmp_path, {**synthetic.summary(PLANS["vanilla-1"]), "history": history})
    found = [[(line.metric, line.mode) for line in lines] for lines in panels(read_record(tmp_path))]
    assert found == [[(name, "train"), (name, "evaluate")] for name in ("loss", "f1", "accuracy")]


@pytest.mark.parametrize("rows", [[(1, 0.5)], [(1, 0.0), (2, 0.0)], [(1, 1e9), (2, 3e9)], [(7, 1e-9), (8, 2e-9)]])
def test_odd_values_are_drawn(tmp_path: Path, rows: list[tuple[int, float]]):
    (scene,) = drawn(tmp_path, rows)
    dots = [item for item in every(scene.items) if isinstance(item, Dot) and item.title]
    assert len(dots) == len(rows)
    for dot in dots:
        assert 56 <= dot.x <= 456
        assert 0 <= dot.y <= scene.height
    lines = [item for item in every(scene.items) if isinstance(item, Line) and item.title]
    assert len(lines) == (len(rows) > 1)


def test_what_was_not_finite_is_left_out(tmp_path: Path):
    (scene,) = drawn(tmp_path, [(1, 0.5), (2, None), (3, 0.25)])
    assert len([item for item in every(scene.items) if isinstance(item, Dot)]) == 2
    assert "round 2" not in scene.about
    assert drawn(tmp_path, [(1, None), (2, None)]) == []


def test_no_round_no_curve(tmp_path: Path):
    assert drawn(tmp_path, []) == []


def test_many_rounds_have_no_dots(tmp_path: Path):
    (scene,) = drawn(tmp_path, [(at, 1 / at) for at in range(1, 501)])
    assert not [item for item in every(scene.items) if isinstance(item, Dot)]
    (line,) = [item for item in every(scene.items) if isinstance(item, Line) and item.title]
    assert len(line.points) == 500
    assert "1.0000 in round 1, 0.0020 in round 500, between 0.0020 and 1.0000" in scene.about


def test_more_replicas_than_colours_are_all_there(tmp_path: Path):
    document = synthetic.summary(PLANS["u-shaped-parallel"])
    for row in document["history"]:
        row["metrics"] = {"loss": len(row["party"]) + synthetic.NAMES.index(row["party"]) / 10}
    synthetic.write(tmp_path, document)
    (scene,) = curves(read_record(tmp_path))
    legend = [text for text in texts(scene) if text.startswith("train")]
    assert [text.split(", ")[1] for text in legend] == list(synthetic.NAMES[:7])
    assert all(label.x + width(label.text, label.size) <= scene.width for label in labels(scene))


def test_bars_are_as_long_as_their_seconds(tmp_path: Path):
    record = synthetic.record(tmp_path, PLANS["vanilla-1"])
    scene = time_bars(record)
    bars = {item.title.split(" (")[0]: item for item in every(scene.items) if isinstance(item, Box) and item.title}
    assert set(bars) == {f"{p}: {k}" for p in ("north", "server") for k in ("forward 0.500 s", "wait 0.250 s")}
    forward, wait = bars["north: forward 0.500 s"], bars["north: wait 0.250 s"]
    assert forward.width == pytest.approx(2 * wait.width)
    assert wait.x == pytest.approx(forward.x + forward.width)
    axis = {label.text: label.x for label in labels(scene) if label.anchor == "middle"}
    assert axis["0 s"] == forward.x
    assert axis["0.6 s"] - axis["0 s"] == pytest.approx(forward.width * 0.6 / 0.5)


@pytest.mark.parametrize(
    ("seconds", "marks"),
    [
        (150.0, ["0 s", "50 s", "100 s", "150 s"]),
        (600.0, ["0 min", "2 min", "10 min"]),
        (36000.0, ["0 h", "2 h", "10 h"]),
    ],
)
def test_long_runs_have_minutes_and_hours(tmp_path: Path, seconds: float, marks: list[str]):
    document = synthetic.summary(PLANS["vanilla-1"])
    for ledger in document["ledgers"].values():
        ledger["seconds"] = [{"kind": "forward", "stage": "", "seconds": seconds}]
    synthetic.write(tmp_path, document)
    scene = time_bars(read_record(tmp_path))
    axis = [label.text for label in labels(scene) if label.anchor == "middle"]
    assert set(marks) <= set(axis)
    assert len(axis) <= 6


def test_no_time_at_all(tmp_path: Path):
    document = synthetic.summary(PLANS["vanilla-1"])
    for ledger in document["ledgers"].values():
        ledger["seconds"] = []
    synthetic.write(tmp_path, document)
    scene = time_bars(read_record(tmp_path))
    assert scene.about == "north: next to nothing. server: next to nothing."


def test_grid_holds_all():
    one = Scene(100, 50, (Label(10, 10, "a", "ink"),), "one")
    whole = grid([one] * 5, "all", columns=2)
    assert (whole.width, whole.height, len(whole.items)) == (200, 150, 5)
    assert len(texts(whole)) == 5
    assert grid([], "none").items == ()


def test_kinds_have_styles(real: Real):
    for scene in [*curves(real.record), time_bars(real.record)]:
        assert {item.kind for item in every(scene.items)} <= set(STYLES)
