"""The report of a run: what is written, that its numbers are the run's, and that it loads and runs nothing."""

from __future__ import annotations

import csv
import io
import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import cutlayer as cl
from cutlayer.errors import ConfigError
from cutlayer.report.record import read_record, restored_plan
from cutlayer.report.tables import costs_csv, curves_csv, cuts_csv
from cutlayer.report.write import write_report
from tests.report.synthetic import record, summary, topologies, write
from tests.run import plans

PLANS = topologies()
LOADS = {"src", "srcset", "action", "formaction", "data", "poster", "background", "ping", "manifest"}


class Reader(HTMLParser):
    """Notes what a page would load or run, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in LOADS or name.startswith("on") or (name in ("href", "xlink:href") and tag in ("link", "image")):
                self.loads.append(f"{tag} {name}={value}")
            if name == "id":
                self.ids.append(value or "")
            if name == "href":
                self.links.append(value or "")

    def handle_data(self, data: str) -> None:
        self.text += f" {data}"


def read(page: Path) -> Reader:
    reader = Reader()
    reader.feed(page.read_text(encoding="utf-8"))
    return reader


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


@pytest.mark.parametrize("name", PLANS)
def test_a_page_for_any_topology_loads_and_runs_nothing(name: str, tmp_path: Path):
    record(tmp_path, PLANS[name])
    made = write_report(tmp_path, png=False)
    assert made.page == tmp_path / "report.html"
    text = made.page.read_text(encoding="utf-8")
    reader = read(made.page)
    assert reader.loads == []
    assert "script" not in reader.tags
    assert not re.search(r"@import|url\(\s*['\"]?(?!#)|https?://(?!www\.w3\.org)", text)
    assert len(reader.ids) == len(set(reader.ids))
    assert all(link.startswith("#") and link[1:] in reader.ids for link in reader.links)
    for party in PLANS[name].parties:
        assert party in reader.text
    assert {file.name for file in made.files} >= {"costs.csv", "curves.csv", "cuts.csv", "plan.svg", "time.svg"}
    assert not made.drawn
    for file in made.files:
        if file.suffix == ".svg":
            root = ET.fromstring(file.read_text(encoding="utf-8"))  # noqa: S314 - our own drawing
            assert root.tag.endswith("svg")
            assert root.find("{http://www.w3.org/2000/svg}title") is not None


@pytest.mark.parametrize("name", PLANS)
def test_bytes_in_the_tables_are_those_of_the_ledgers(name: str, tmp_path: Path):
    made = record(tmp_path, PLANS[name])
    document = json.loads((tmp_path / "summary.json").read_text())
    sent = {
        (party, flow["peer"], flow["mode"], flow["direction"], flow["edge"]): flow["payload"]
        for party, ledger in document["ledgers"].items()
        for flow in ledger["flows"]
        if flow["way"] == "sent"
    }
    found = {
        (row["from"], row["to"], row["mode"], row["direction"], int(row["edge"])): int(row["payload_bytes"])
        for row in rows(cuts_csv(made))
    }
    assert found == sent
    planned = [row for row in rows(cuts_csv(made)) if row["direction"] in ("up", "down")]
    assert planned
    assert all(row["planned_bytes"] == row["payload_bytes"] for row in planned)
    costs = {row["party"]: row for row in rows(costs_csv(made))}
    assert set(costs) == set(PLANS[name].parties)
    for party, row in costs.items():
        own = [flow for flow in document["ledgers"][party]["flows"] if flow["way"] == "sent"]
        assert int(row["sent_payload_bytes"]) == sum(flow["payload"] for flow in own)
        assert int(row["sent_messages"]) == sum(flow["messages"] for flow in own)
        assert int(row["sent_framing_bytes"]) == sum(flow["framing"] for flow in own)


def test_every_number_of_every_metric_is_in_the_curves(tmp_path: Path):
    made = record(tmp_path, PLANS["multitask-4-4"])
    document = json.loads((tmp_path / "summary.json").read_text())
    found = {(r["loss"], r["party"], r["mode"], int(r["round"]), float(r["value"])) for r in rows(curves_csv(made))}
    want = {(r["loss"], r["party"], r["mode"], r["round"], r["metrics"]["loss"]) for r in document["history"]}
    assert found == want


def test_a_real_run(tmp_path: Path):
    """From `simulate` to the page, by way of the files that a run writes."""
    from cutlayer.run.results import write_results

    case = plans.parallel(epochs=2)
    result = cl.simulate(case.plan, case.parties())
    write_results(tmp_path, result)
    page = read(write_report(tmp_path, png=False).page)
    for name in case.plan.parties:
        assert name in page.text
    total = sum(f.payload for ledger in result.ledgers.values() for key, f in ledger.flows.items() if key[0] == "sent")
    table = rows((tmp_path / "report" / "costs.csv").read_text())
    assert sum(int(row["sent_payload_bytes"]) for row in table) == total
    flops = sum(result.ledgers["server"].flops.values())
    (server,) = [row for row in table if row["party"] == "server"]
    assert int(server["forward_flops"]) + int(server["backward_flops"]) == flops


def test_one_partys_own_report_says_so_and_knows_no_others_ledger(tmp_path: Path):
    record(tmp_path, PLANS["u-shaped-8"], known=["north"])
    write_report(tmp_path, png=False)
    table = rows((tmp_path / "report" / "costs.csv").read_text())
    assert [row["party"] for row in table] == ["north"]
    assert {row["from"] for row in rows((tmp_path / "report" / "cuts.csv").read_text())} == {"north", "server"}
    assert "north" in read(tmp_path / "report.html").text


HOSTILE = "<script>alert(1)</script>\"'&"


def test_hostile_names_stay_text(tmp_path: Path):
    plan = PLANS["u-shaped-1"]
    document = summary(plan)
    document["metrics"]["train"]["loss"][HOSTILE] = 0.5
    for row in document["history"]:
        row["metrics"] = {**row["metrics"], HOSTILE: 0.25, "=cmd|' /C calc'!A0": 1.0}
    document["versions"][HOSTILE] = HOSTILE
    write(tmp_path, document)
    write_report(tmp_path, png=False)
    reader = read(tmp_path / "report.html")
    assert "script" not in reader.tags
    assert "<script>alert(1)</script>" in reader.text
    cells = [row["metric"] for row in rows((tmp_path / "report" / "curves.csv").read_text())]
    assert any(cell == "'=cmd|' /C calc'!A0" for cell in cells)
    assert not any(cell.startswith("=") for cell in cells)


@pytest.mark.parametrize(
    "changes",
    [
        {"history": [], "metrics": {}},
        {"processes": []},
        {"parameters": {}},
        {"weights_sha256": {}},
        {"seconds": 0.0},
        {"samples": {}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_a_run_may_lack(changes: dict[str, Any], tmp_path: Path):
    write(tmp_path, {**summary(PLANS["vertical-2"]), **changes})
    made = write_report(tmp_path, png=False)
    assert "north" in read(made.page).text
    if changes.get("history") == []:
        assert "curves.svg" not in [file.name for file in made.files]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, 0.0, -1e300, 1e-300])
def test_odd_numbers_are_drawn(value: float | None, tmp_path: Path):
    document = summary(PLANS["vanilla-1"])
    for row in document["history"][:2]:
        row["metrics"] = {"loss": value}
    write(tmp_path, document)
    write_report(tmp_path, png=False)
    svg = (tmp_path / "report" / "curves.svg").read_text()
    assert "nan" not in re.sub(r"<(title|text|desc)[^>]*>.*?</\1>", "", svg, flags=re.S).lower()


def test_a_long_run_is_drawn_with_few_points(tmp_path: Path):
    document = summary(PLANS["vanilla-1"])
    row = document["history"][0]
    document["history"] = [{**row, "round": n, "metrics": {"loss": 1 / n}} for n in range(1, 5001)]
    write(tmp_path, document)
    assert write_report(tmp_path, png=False).page.stat().st_size < 1_500_000


def test_drawings_as_png(tmp_path: Path):
    record(tmp_path, PLANS["vanilla-1"])
    made = write_report(tmp_path)
    assert made.drawn
    drawn = [file for file in made.files if file.suffix == ".png"]
    assert {file.name for file in drawn} == {"plan.png", "curves.png", "time.png"}
    assert all(file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for file in drawn)


def test_a_second_report_replaces_the_first(tmp_path: Path):
    record(tmp_path, PLANS["vanilla-1"])
    write_report(tmp_path, png=False)
    first = (tmp_path / "report.html").read_bytes()
    write_report(tmp_path, png=False)
    assert (tmp_path / "report.html").read_bytes() == first


# --- what cannot be read ---------------------------------------------------------------------------------------------


@pytest.mark.provokes("E281")
def test_a_folder_without_results(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"E281.*holds no results of a run.*cutlayer resume"):
        write_report(tmp_path)


@pytest.mark.provokes("E282")
@pytest.mark.parametrize(
    "spoil",
    [
        lambda document: "{",
        lambda document: "[]",
        lambda document: {**document, "version": 99},
        lambda document: {**document, "ledgers": 5},
        lambda document: {**document, "plan": {**document["plan"], "digest": "0" * 64}},
        lambda document: {**document, "plan": {**document["plan"], "document": {}}},
    ],
    ids=["cut", "list", "version", "type", "digest", "plan"],
)
def test_a_summary_that_cannot_be_read(spoil: Any, tmp_path: Path):
    spoilt = spoil(summary(PLANS["vanilla-1"]))
    if isinstance(spoilt, str):
        (tmp_path / "summary.json").write_text(spoilt)
    else:
        write(tmp_path, spoilt)
    with pytest.raises(ConfigError, match=r"E282.*summary of the run cannot be read"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_plan_with_extras_comes_back(tmp_path: Path):
    plan = cl.u_shaped("a", "b", cut="float32[batch, 4]", back="float32[batch, 2]", output="float32[batch, 2]")
    told = cl.PlannedExchange("capacity", ["a", "b"], says="x")
    plan = cl.Plan(plan.stages, extras=[cl.Crossing("head", codec="int8", defences=["gaussian"]), told])
    assert restored_plan(json.loads(json.dumps(plan.document()))) == plan
    record(tmp_path, plan)
    assert read_record(tmp_path).plan.digest() == plan.digest()
