"""The CSV files hold the ledgers' numbers to the byte, and nothing that a spreadsheet would run."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from cutlayer.report.record import read_record
from cutlayer.report.tables import costs_csv, curves_csv, cuts_csv
from tests.report import synthetic
from tests.report.conftest import Real
from tests.report.reading import table

PLANS = synthetic.topologies()


def test_curves_are_the_history_to_the_last_bit(real: Real):
    found = [
        (
            int(r["round"]),
            r["mode"],
            r["loss"],
            r["party"],
            int(r["lane"]),
            r["client"],
            r["samples"],
            r["metric"],
            float(r["value"]),
        )
        for r in table(real.folder, "curves.csv")
    ]
    expected = []
    for row in real.result.history:
        place = (row["round"], row["mode"], row["loss"], row["party"], row["lane"])
        (own,) = row["own"]
        keys = [(*place, "", ""), (*place, row["party"], str(own["samples"]))]
        for key, metrics in zip(keys, (row["metrics"], own["metrics"]), strict=True):
            for name, value in metrics.items():
                if isinstance(value, list):
                    expected += [(*key, f"{name}[{place}]", part) for place, part in enumerate(value)]
                else:
                    expected.append((*key, name, value))
    assert found == expected


def test_costs_are_the_ledgers(real: Real):
    rows = {row["party"]: row for row in table(real.folder, "costs.csv")}
    assert list(rows) == ["clinic", "lab", "server"]
    for party, ledger in real.result.ledgers.items():
        row = rows[party]
        for way in ("sent", "received"):
            for part, unit in (("payload", "_bytes"), ("framing", "_bytes"), ("messages", "")):
                assert int(row[f"{way}_{part}{unit}"]) == ledger.total(way, part)
        for kind in ("forward", "backward"):
            assert int(row[f"{kind}_flops"]) == sum(n for (k, _), n in ledger.flops.items() if k == kind)
        seconds = [
            float(value) for name, value in row.items() if name.endswith("_seconds") and name != "process_seconds"
        ]
        assert sum(seconds) == pytest.approx(sum(ledger.seconds.values()), abs=1e-5)
        assert int(row["process_memory_bytes"]) > 50_000_000  # Python and torch alone are more
        assert row["process_parties"] == "clinic lab server"


def test_cuts_are_the_ledgers(real: Real):
    rows = table(real.folder, "cuts.csv")
    found = {
        (r["from"], r["to"], r["mode"], r["direction"], int(r["edge"])): tuple(
            int(r[part]) for part in ("payload_bytes", "framing_bytes", "messages")
        )
        for r in rows
    }
    expected = {
        (party, peer, mode, direction, edge): (row.payload, row.framing, row.messages)
        for party, ledger in real.result.ledgers.items()
        for (way, peer, mode, direction, edge), row in ledger.flows.items()
        if way == "sent"
    }
    assert found == expected
    planned = {r["direction"] for r in rows if r["planned_bytes"]}
    assert planned == {"up", "down"}
    assert all(r["planned_bytes"] == r["payload_bytes"] for r in rows if r["planned_bytes"])


@pytest.mark.parametrize("name", PLANS)
def test_every_row_is_as_long_as_its_head(tmp_path: Path, name: str):
    record = synthetic.record(tmp_path, PLANS[name])
    for text in (curves_csv(record), costs_csv(record), cuts_csv(record)):
        head, *rows = list(csv.reader(io.StringIO(text)))
        assert rows
        assert {len(row) for row in rows} == {len(head)}
        assert len(set(head)) == len(head)


@pytest.mark.parametrize("name", ["=cmd|' /C calc'!A0", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", " \n=1"])
def test_no_text_is_a_formula(tmp_path: Path, name: str):
    history = [
        {"mode": "train", "round": 1, "loss": "loss", "party": "server", "metrics": {name: -0.5, f"a,{name}": 1}}
    ]
    synthetic.write(tmp_path, {**synthetic.summary(PLANS["vanilla-1"]), "history": history})
    first, second = csv.DictReader(io.StringIO(curves_csv(read_record(tmp_path))))
    assert first["metric"] == "'" + name.replace("\t", " ").replace("\r", " ").replace("\n", " ")
    assert first["value"] == "-0.5"  # a number stays one
    assert second["metric"].split(",")[1][-1] == name[-1]


def test_nothing_known_is_an_empty_cell(tmp_path: Path):
    synthetic.write(
        tmp_path, {**synthetic.summary(PLANS["vanilla-1"]), "parameters": {}, "samples": {}, "processes": []}
    )
    record = read_record(tmp_path)
    for row in csv.DictReader(io.StringIO(costs_csv(record))):
        assert (row["parameters"], row["process_memory_bytes"]) == ("", "")
    assert {row["planned_bytes"] for row in csv.DictReader(io.StringIO(cuts_csv(record)))} == {""}
