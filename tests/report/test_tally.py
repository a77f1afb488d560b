"""The report's sums, against the ledgers themselves and against what a hand computes."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from pathlib import Path

import pytest

import cutlayer as cl
from cutlayer.report.record import Record
from cutlayer.report.tally import KINDS, costs, exchanged, flat, moved, series, totals
from tests.report import synthetic
from tests.report.conftest import BATCH, EPOCHS, HELD_OUT, SAMPLES, Real

PLANS = synthetic.topologies()
CUT, BACK = 6 * 4, 5 * 4  # bytes of a sample on the two cuts


def test_every_frame_is_there_once(real: Real):
    ledgers = real.result.ledgers
    rows = moved(real.record)
    found = {(r.sender, r.receiver, r.mode, r.direction, r.edge): (r.payload, r.framing, r.messages) for r in rows}
    assert len(found) == len(rows)
    told = {
        (party, peer, mode, direction, edge): (row.payload, row.framing, row.messages)
        for party, ledger in ledgers.items()
        for (way, peer, mode, direction, edge), row in ledger.flows.items()
        if way == "sent"
    }
    assert found == told
    assert {row.seen_by for row in rows} == {"sender"}
    received = sum(ledger.total("received") for ledger in ledgers.values())
    assert sum(row.payload for row in rows) == received


def test_bytes_are_those_that_a_hand_computes(real: Real):
    """A cut carries samples x bytes of a sample each round, up in training and evaluation, down in training."""
    by_what = {
        (row.sender, row.receiver, row.what): row for row in totals(moved(real.record)) if row.planned is not None
    }
    expected = {}
    for name, count in SAMPLES.items():
        up, down = EPOCHS * (count + HELD_OUT), EPOCHS * count
        expected |= {
            (name, "server", "activations of head"): up * CUT,
            ("server", name, "gradient at head->body"): down * CUT,
            ("server", name, "activations of body"): up * BACK,
            (name, "server", "gradient at body->tail"): down * BACK,
        }
    assert {key: row.payload for key, row in by_what.items()} == expected
    assert {key: row.planned for key, row in by_what.items()} == expected
    frames = {name: EPOCHS * (math.ceil(n / BATCH) + math.ceil(HELD_OUT / BATCH)) for name, n in SAMPLES.items()}
    assert {row.sender: row.messages for (_, _, w), row in by_what.items() if w == "activations of head"} == frames


def test_totals_lose_nothing(real: Real):
    rows = moved(real.record)
    whole = totals(rows)
    for part in ("payload", "framing", "messages"):
        assert sum(getattr(row, part) for row in whole) == sum(getattr(row, part) for row in rows)
    names = Counter((row.sender, row.receiver, row.what) for row in whole)
    assert set(names.values()) == {1}, "one row for each thing that crossed"


@pytest.mark.parametrize("name", PLANS)
def test_totals_of_any_plan(tmp_path: Path, name: str):
    rows = moved(synthetic.record(tmp_path, PLANS[name]))
    whole = totals(rows)
    assert sum(row.payload for row in whole) == sum(row.payload for row in rows) > 0
    assert all(row.payload == row.planned for row in whole if row.direction in ("up", "down"))
    assert all(row.raw == (row.what == "RAW data.y (declared release)") for row in rows)
    place = {party: number for number, party in enumerate(PLANS[name].parties)}
    assert [place[row.sender] for row in rows] == sorted(place[row.sender] for row in rows)


def test_a_join_knows_what_it_sent_and_received_and_nothing_else(tmp_path: Path):
    rows = moved(synthetic.record(tmp_path, PLANS["vertical-8"], known=["north"]))
    assert all("north" in (row.sender, row.receiver) for row in rows)
    cuts = {(row.sender, row.receiver) for row in rows if row.direction in ("up", "down")}
    assert cuts == {("north", "server"), ("server", "north")}
    assert {row.seen_by for row in rows if row.sender == "north"} == {"sender"}
    assert {row.seen_by for row in rows if row.sender == "server"} == {"receiver"}


def test_more_than_the_plan_says_is_seen(tmp_path: Path):
    document = synthetic.summary(PLANS["vanilla-1"])
    row = next(row for row in document["ledgers"]["north"]["flows"] if row["direction"] == "up")
    row["payload"] += 1
    synthetic.write(tmp_path, document)
    over = [r for r in totals(moved(_read(tmp_path))) if r.planned is not None and r.payload > r.planned]
    assert [(r.sender, r.payload - (r.planned or 0)) for r in over] == [("north", 1)]


def test_no_samples_no_prediction(tmp_path: Path):
    rows = moved(synthetic.record(tmp_path, PLANS["vanilla-1"]))
    assert any(row.planned is not None for row in rows)
    synthetic.write(tmp_path, {**synthetic.summary(PLANS["vanilla-1"]), "samples": {}})
    assert {row.planned for row in moved(_read(tmp_path))} == {None}


def test_costs_are_those_of_the_ledgers(real: Real):
    for row in costs(real.record):
        ledger = real.result.ledgers[row.party]
        assert row.flops["forward"] == sum(n for (kind, _), n in ledger.flops.items() if kind == "forward") > 0
        assert row.flops["backward"] == sum(n for (kind, _), n in ledger.flops.items() if kind == "backward") > 0
        for way, sums in (("sent", row.sent), ("received", row.received)):
            for part in ("payload", "framing", "messages"):
                assert sums[part] == ledger.total(way, part)
        assert sum(row.seconds.values()) == pytest.approx(sum(ledger.seconds.values()))
        assert row.process == tuple(real.result.ledgers)


def test_a_process_of_its_own_has_no_time_unaccounted_for(tmp_path: Path):
    plan = PLANS["vanilla-1"]
    processes = [
        {"parties": ["north"], "seconds": 2.5, "memory": 7},
        {"parties": ["server"], "seconds": 0.25, "memory": 0},  # less than it counted: restarted
    ]
    synthetic.write(tmp_path, {**synthetic.summary(plan), "processes": processes})
    north, server = costs(_read(tmp_path))
    assert sum(north.seconds.values()) == pytest.approx(2.5)
    assert north.seconds["other"] == pytest.approx(2.5 - 0.75)
    assert server.seconds["other"] == 0.0
    assert (north.memory, server.memory) == (7, 0)
    assert set(north.seconds) == {*KINDS.values(), "other"}


def test_series_are_the_history(real: Real):
    lines = {(line.metric, line.mode): line for line in series(real.record) if not line.own}
    assert set(lines) == {
        (metric, mode)
        for metric in ("loss", "accuracy", "recall[0]", "recall[1]", "recall[2]")
        for mode in ("train", "evaluate")
    }
    for (metric, mode), line in lines.items():
        name, _, place = metric.rstrip("]").partition("[")
        rows = [row for row in real.result.history if row["mode"] == mode and row["party"] == "clinic"]
        values = [(row["round"], row["metrics"][name][int(place)] if place else row["metrics"][name]) for row in rows]
        assert list(line.points) == values
        assert line.who == ("clinic", "lab")  # they tell the same
        assert len(values) == EPOCHS
    assert [line.metric for line in series(real.record)][:2] == ["loss", "loss"]
    assert [line.mode for line in series(real.record)][:2] == ["train", "evaluate"]


def test_own_series_are_those_of_each_clients_samples(real: Real):
    lines = [line for line in series(real.record) if line.own]
    assert {line.who for line in lines} == {("clinic",), ("lab",)}
    for line in lines:
        name, _, place = line.metric.rstrip("]").partition("[")
        rows = [row for row in real.result.history if row["mode"] == line.mode and (row["party"],) == line.who]
        values = [(row["round"], row["own"][0]["metrics"][name]) for row in rows]
        assert list(line.points) == [(at, value[int(place)] if place else value) for at, value in values]


def test_own_series_have_the_names_of_those_who_hold_the_samples(tmp_path: Path):
    """Of the server's loss: each lane's clients, several where they hold the same people."""
    at = [["a", "c"], ["b", "d"]]
    plan = cl.Plan(
        [
            cl.Stage("left", at=at[0], inputs=["data.x"], output="float32[batch, 2]"),
            cl.Stage("right", at=at[1], inputs=["data.z"], output="float32[batch, 2]"),
            cl.Stage("body", at="server", inputs=["left", "right"], output="float32[batch, 2]"),
            cl.Loss("loss", at="server", inputs=["body", "data.y@left"]),
        ],
        training=cl.Training(order="parallel"),
        releases=[cl.Release("y", at="left", to="server", spec="int64[batch]")],
    )
    assert plan.graph.lane_names == ("a, b", "c, d")
    document = synthetic.summary(plan)
    for row in document["history"]:
        row["own"] = [{"lane": lane, "samples": 4, "metrics": {"loss": float(lane)}} for lane in range(2)]
    synthetic.write(tmp_path, document)
    assert [line.who for line in series(_read(tmp_path)) if line.own] == [("a, b",), ("c, d",)]


def test_a_holder_of_several_lanes_has_their_numbers():
    plan = cl.u_shaped(
        ("a", "a", "b"),
        "server",
        cut="float32[batch, 2]",
        back="float32[batch, 2]",
        output="float32[batch, 2]",
    )
    assert plan.graph.lane_names == ("a 0", "a 1", "b")


def test_replicas_that_differ_are_series_of_their_own(tmp_path: Path):
    document = synthetic.summary(PLANS["u-shaped-parallel"])
    for row in document["history"]:
        row["metrics"] = {"loss": float(row["party"] == "east") + row["round"]}
    synthetic.write(tmp_path, document)
    others = tuple(name for name in synthetic.NAMES[:7] if name != "east")
    assert [line.who for line in series(_read(tmp_path))] == [others, ("east",)]


def test_two_replicas_at_one_party_have_their_lanes(tmp_path: Path):
    names = ["north", "south"]
    plan = cl.Plan(
        [
            cl.Stage("head", at=names, inputs=["data.x"], output="float32[batch, 2]"),
            cl.Stage("body", at=["server", "server"], inputs=["head"], output="float32[batch, 2]"),
            cl.Loss("loss", at=["server", "server"], inputs=["body", "data.y@head"]),
        ],
        training=cl.Training(order="parallel"),
        releases=[cl.Release("y", at="head", to="server", spec="int64[batch]")],
    )
    document = synthetic.summary(plan)
    for row in document["history"]:
        row["metrics"] = {"loss": float(row["lane"])}
    synthetic.write(tmp_path, document)
    assert [line.who for line in series(_read(tmp_path))] == [(f"server {lane}",) for lane in range(2)]


def test_flat():
    metrics = {"a": 1, "b": [0.5, [1.5, None], 2], "c": None, "d": "text", "e": -0.25, "f": []}
    assert flat(metrics) == [("a", 1.0), ("b[0]", 0.5), ("b[1][0]", 1.5), ("b[2]", 2.0), ("e", -0.25)]


def test_exchanges_in_few_words(tmp_path: Path):
    rows = moved(synthetic.record(tmp_path, PLANS["u-shaped-8"]))
    assert exchanged(rows) == "state of tail, head; metric sums"
    row = next(row for row in rows if row.direction == "exchange" and row.payload)
    plug_in = [dataclasses.replace(row, exchange=("my_own", ""), payload=1)]
    assert exchanged(plug_in) == "my own"


def _read(folder: Path) -> Record:
    from cutlayer.report.record import read_record

    return read_record(folder)
