"""The tables beside the drawings hold the numbers that the drawings show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cutlayer.report.charts import curves
from cutlayer.report.numbers import metric_tables, missing, time_table
from cutlayer.report.record import Record, read_record
from cutlayer.report.words import duration
from tests.report import synthetic
from tests.report.conftest import EPOCHS, Real

PLANS = synthetic.topologies()


def with_history(folder: Path, rows: list[dict[str, Any]], name: str = "vanilla-1") -> Record:
    history = [{"mode": "train", "loss": "loss", "party": "server", **row} for row in rows]
    synthetic.write(folder, {**synthetic.summary(PLANS[name]), "history": history})
    return read_record(folder)


def test_a_table_for_each_drawing(real: Real):
    tables = metric_tables(real.record)
    assert [table.caption for table in tables] == [scene.title for scene in curves(real.record)]
    loss = tables[0]
    whose = ("all together", "clinic", "lab")
    assert loss.head == ("round", *(f"{mode}, {name}" for name in whose for mode in ("train", "evaluate")))
    rows = [row for row in real.result.history if row["party"] == "lab"]
    expected = [
        (
            str(at),
            *(
                f"{row['metrics']['loss']:.4f}"
                for mode in ("train", "evaluate")
                for row in rows
                if (row["round"], row["mode"]) == (at, mode)
            ),
        )
        for at in range(1, EPOCHS + 1)
    ]
    assert [row[:3] for row in loss.rows] == expected
    own = [row["own"][0]["metrics"]["loss"] for row in rows if row["mode"] == "evaluate"]
    assert [row[-1] for row in loss.rows] == [f"{value:.4f}" for value in own]


def test_a_round_without_a_value_has_a_dash(tmp_path: Path):
    rows = [{"round": at, "metrics": {"loss": value}} for at, value in ((1, 0.5), (2, None), (3, 0.25))]
    rows.append({"round": 2, "mode": "evaluate", "metrics": {"loss": 0.125}})
    (table,) = metric_tables(with_history(tmp_path, rows))
    assert table.rows == (("1", "0.5000", "–"), ("2", "–", "0.1250"), ("3", "0.2500", "–"))


def test_many_rounds_are_shown_in_part(tmp_path: Path):
    rows = [{"round": at, "metrics": {"loss": 1 / at}} for at in range(1, 1001)]
    (table,) = metric_tables(with_history(tmp_path, rows))
    assert len(table.rows) == 16
    assert (table.rows[0][0], table.rows[-1][0]) == ("1", "1000")
    assert len({row[0] for row in table.rows}) == 16
    assert table.caption == "loss by round: 16 of 1000 rounds, all of them in report/curves.csv"


def test_many_replicas_are_counted(tmp_path: Path):
    (table,) = metric_tables(synthetic.record(tmp_path, PLANS["u-shaped-8"]))
    assert table.head == ("round", "train, north and 6 more, all the same")


def test_time(real: Real):
    table = time_table(real.record)
    assert [row[0] for row in table.rows] == ["clinic", "lab", "server"]
    for row in table.rows:
        seconds = real.result.ledgers[row[0]].seconds
        for kind in ("forward", "backward", "step", "load"):
            assert row[table.head.index(kind)] == duration(sum(s for (k, _), s in seconds.items() if k == kind))
        assert row[-1] == duration(sum(seconds.values()))


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([], []),
        ([{"round": 1, "metrics": {"loss": 0.5}}], []),
        ([{"round": 2, "metrics": {"loss": None}}], ["loss of loss (train) in round 2"]),
        (
            [{"round": at, "metrics": {"loss": None, "auc": [0.5, None]}} for at in (3, 1)],
            ["loss of loss (train) in rounds 1, 3", "auc of loss (train) in rounds 1, 3"],
        ),
        (
            [{"round": at, "metrics": {"loss": None}} for at in range(1, 21)],
            ["loss of loss (train) in rounds 1, 2, 3, 4, 5, 6, 7, 8 and 12 more"],
        ),
    ],
)
def test_what_is_not_finite_is_named(tmp_path: Path, rows: list[dict[str, Any]], told: list[str]):
    assert missing(with_history(tmp_path, rows)) == told
