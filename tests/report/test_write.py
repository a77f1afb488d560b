"""What lies in a run's folder when its report is written, for runs of every kind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import cutlayer as cl
from cutlayer.errors import ConfigError
from cutlayer.report import raster, write_report
from tests.report import synthetic
from tests.report.conftest import Real
from tests.report.reading import Page, page, table

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


def test_no_rounds_no_curves(tmp_path: Path):
    synthetic.write(tmp_path, {**synthetic.summary(PLANS["vanilla-1"]), "history": [], "metrics": {}})
    report = write_report(tmp_path, png=False)
    assert {file.name for file in report.files} == TEXTS - {"curves.svg"}
    assert table(tmp_path, "curves.csv") == []


def test_no_folder_of_a_run(tmp_path: Path):
    with pytest.raises(ConfigError, match="holds no results"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


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
