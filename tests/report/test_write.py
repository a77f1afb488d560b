"""What lies in a run's folder when its report is written, for runs of every kind."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import cutlayer as cl
from cutlayer.errors import ConfigError
from cutlayer.report import raster, write_report
from cutlayer.run.results import write_results
from tests.report import synthetic
from tests.report.conftest import Real
from tests.report.reading import Page, page, table
from tests.run import plans

PLANS = synthetic.topologies()
TEXTS = {"costs.csv", "curves.csv", "curves.svg", "cuts.csv", "plan.svg", "time.svg"}
PICTURES = {"curves.png", "plan.png", "time.png"}


def test_all_files_are_there(real: Real):
    assert real.report.page == real.folder / "report.html"
    assert {file.name for file in real.report.files} == TEXTS | PICTURES
    assert {file.parent for file in real.report.files} == {real.folder / "report"}
    assert all(file.stat().st_size > 100 for file in (real.report.page, *real.report.files))
    assert real.report.drawn
    for name in PICTURES:
        assert (real.folder / "report" / name).read_bytes().startswith(b"\x89PNG")


def test_the_same_from_the_same_folder(real: Real, tmp_path: Path):
    (tmp_path / "summary.json").write_bytes((real.folder / "summary.json").read_bytes())
    write_report(tmp_path, png=False)
    for name in ("report.html", *(f"report/{name}" for name in TEXTS)):
        assert (tmp_path / name).read_bytes() == (real.folder / name).read_bytes()


def test_without_matplotlib_there_is_no_png(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(raster, "find_spec", lambda _name: None)
    synthetic.write(tmp_path, synthetic.summary(PLANS["vanilla-1"]))
    report = write_report(tmp_path)
    assert not report.drawn
    assert {file.name for file in report.files} == TEXTS


def test_an_earlier_report_is_replaced(tmp_path: Path):
    synthetic.write(tmp_path, synthetic.summary(PLANS["vanilla-1"]))
    write_report(tmp_path, png=False)
    before = (tmp_path / "report.html").read_text()
    synthetic.write(tmp_path, synthetic.summary(PLANS["vertical-2"]))
    write_report(tmp_path, png=False)
    after = (tmp_path / "report.html").read_text()
    assert "<h1>vanilla</h1>" in before
    assert "<h1>vertical</h1>" in after


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
    synthetic.write(tmp_path, {**synthetic.summary(PLANS["vertical-2"]), **changes})
    report = write_report(tmp_path, png=False)
    assert "north" in page(tmp_path).words
    curves = "history" not in changes
    assert {file.name for file in report.files} == (TEXTS if curves else TEXTS - {"curves.svg"})
    assert bool(table(tmp_path, "curves.csv")) == curves


@pytest.mark.parametrize("summary", ["", "{"], ids=["none", "damaged"])
def test_a_folder_without_results_gets_no_report(summary: str, tmp_path: Path):
    if summary:
        (tmp_path / "summary.json").write_text(summary)
    with pytest.raises(ConfigError, match=r"holds no results|cannot be read") as caught:
        write_report(tmp_path)
    assert caught.value.code == ("E282" if summary else "E281")
    assert [path.name for path in tmp_path.iterdir()] == (["summary.json"] if summary else [])


@pytest.mark.parametrize("name", PLANS)
def test_a_report_of_any_topology(name: str, tmp_path: Path):
    synthetic.record(tmp_path, PLANS[name])
    report = write_report(tmp_path, png=False)
    assert {file.name for file in report.files} == TEXTS
    found = page(tmp_path)
    ids = [given["id"] for _, given in found.tags if "id" in given]
    assert len(ids) == len(set(ids))
    links = [given["href"] for _, given in found.tags if "href" in given]
    assert all(link.startswith("#") and link[1:] in ids for link in links)
    assert not {"script", "img", "link", "image"} & {tag for tag, _ in found.tags}
    assert all(party in found.words for party in PLANS[name].parties)
    for file in report.files:
        if file.suffix == ".svg":
            root = ET.fromstring(file.read_text(encoding="utf-8"))  # noqa: S314 - our own drawing
            assert root.tag.endswith("svg")
            assert root.find("{http://www.w3.org/2000/svg}title") is not None


@pytest.mark.parametrize("name", PLANS)
def test_numbers_of_any_topology_are_those_of_the_run(name: str, tmp_path: Path):
    document = synthetic.summary(PLANS[name])
    synthetic.write(tmp_path, document)
    write_report(tmp_path, png=False)
    sent = {party: [f for f in one["flows"] if f["way"] == "sent"] for party, one in document["ledgers"].items()}
    cuts = table(tmp_path, "cuts.csv")
    keys = ("from", "to", "mode", "direction", "edge", "payload_bytes")
    assert {tuple(row[key] for key in keys) for row in cuts} == {
        (party, f["peer"], f["mode"], f["direction"], str(f["edge"]), str(f["payload"]))
        for party, flows in sent.items()
        for f in flows
    }
    planned = [row for row in cuts if row["direction"] in ("up", "down")]
    assert planned
    assert all(row["planned_bytes"] == row["payload_bytes"] for row in planned)
    costs = {row["party"]: row for row in table(tmp_path, "costs.csv")}
    assert costs.keys() == sent.keys()
    for party, flows in sent.items():
        for column, part in (("payload_bytes", "payload"), ("framing_bytes", "framing"), ("messages", "messages")):
            assert int(costs[party][f"sent_{column}"]) == sum(flow[part] for flow in flows)
    curves = {(r["loss"], r["party"], int(r["round"]), float(r["value"])) for r in table(tmp_path, "curves.csv")}
    assert curves == {(r["loss"], r["party"], r["round"], r["metrics"]["loss"]) for r in document["history"]}


def test_a_real_run_with_parallel_replicas(tmp_path: Path):
    case = plans.parallel(epochs=2)
    result = cl.simulate(case.plan, case.parties())
    write_results(tmp_path, result)
    write_report(tmp_path, png=False)
    assert all(name in page(tmp_path).words for name in case.plan.parties)
    for row in table(tmp_path, "costs.csv"):
        ledger = result.ledgers[row["party"]]
        assert int(row["sent_payload_bytes"]) == ledger.total("sent")
        assert int(row["forward_flops"]) + int(row["backward_flops"]) == sum(ledger.flops.values())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, 0.0, -1e300, 1e-300])
def test_odd_numbers_are_drawn(value: float | None, tmp_path: Path):
    document = synthetic.summary(PLANS["vanilla-1"])
    for row in document["history"][:2]:
        row["metrics"] = {"loss": value}
    synthetic.write(tmp_path, document)
    write_report(tmp_path, png=False)
    svg = (tmp_path / "report" / "curves.svg").read_text()
    assert "nan" not in re.sub(r"<(title|text|desc)[^>]*>.*?</\1>", "", svg, flags=re.S).lower()


def test_a_long_run_is_drawn_with_few_points(tmp_path: Path):
    document = synthetic.summary(PLANS["vanilla-1"])
    row = document["history"][0]
    document["history"] = [{**row, "round": n, "metrics": {"loss": 1 / n}} for n in range(1, 5001)]
    synthetic.write(tmp_path, document)
    assert write_report(tmp_path, png=False).page.stat().st_size < 1_500_000


def test_ten_hospitals_with_long_names(tmp_path: Path):
    names = tuple(f"hospital-of-the-district-of-the-north-and-the-{n:02}" for n in range(10))
    plan = cl.u_shaped(
        names, "server", cut="float32[batch, 64, 16, 16]", back="float32[batch, 9]", output="float32[batch, 2]"
    )
    synthetic.write(tmp_path, synthetic.summary(plan))
    report = write_report(tmp_path, png=False)
    found = page(tmp_path)
    assert list(found.column("Cost by party", "sent")) == [*names, "server"]
    assert {f"What left {name}" for name in plan.parties} <= set(found.tables)
    assert {row["party"] for row in table(tmp_path, "costs.csv")} == set(plan.parties)
    assert len({(row["from"], row["to"]) for row in table(tmp_path, "cuts.csv") if row["direction"] == "up"}) == 20
    assert report.page.stat().st_size < 300_000
    shown = [text for text in found.words.splitlines() if text.startswith("hospital") and "…" in text]
    assert len(set(shown)) >= 10, "told apart, though cut"


def test_one_party_alone(tmp_path: Path):
    plan = cl.Plan(
        [
            cl.Stage("net", at="north", inputs=["data.x"], output="float32[batch, 2]"),
            cl.Loss("loss", at="north", inputs=["net", "data.y"]),
        ]
    )
    synthetic.write(tmp_path, synthetic.summary(plan))
    write_report(tmp_path, png=False)
    words = page(tmp_path).words
    assert "Nothing left this party." in words
    assert "It ran in one process." in words
    assert "by 1 party: north" in words
    assert table(tmp_path, "cuts.csv") == []


def test_a_report_of_fit(tmp_path: Path):
    torch.manual_seed(0)
    x = torch.randn(12, 4)
    loader = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=4)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    run = cl.fit(cl.split(model, at="1", example=x[:4], labels="server"), loader, loss=nn.CrossEntropyLoss(), epochs=2)
    where = run.report(tmp_path / "mine.html")
    assert where == tmp_path / "mine.html"
    assert [file.name for file in tmp_path.iterdir()] == ["mine.html"]
    found = Page(where.read_text(encoding="utf-8"))
    sent = {party: f"{ledger.total('sent'):,}" for party, ledger in run.result.ledgers.items()}
    assert {party: found.tables[f"What left {party}"][-1][1] for party in sent} == sent
    last = run.result.metrics("train")["loss"]["loss"]
    assert f"loss {last:.4f} in the last round of training" in " ".join(found.words.split())
