"""What the pages on the report and on trackers say is so."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from cutlayer.report.tally import KINDS
from cutlayer.run.partyfile import load_party_file
from tests.cli.test_docs import blocks
from tests.report.conftest import Real
from tests.report.reading import page, table
from tests.report.test_loggers import scalars
from tests.report.test_page import check_alone

HOW_TO = Path(__file__).parents[2] / "docs" / "how-to"
READ, LOG = HOW_TO / "read-the-report.md", HOW_TO / "log-to-trackers.md"


def test_the_pictures_are_drawings_of_a_run():
    pictures = re.findall(r"!\[[^\]]{20,}\]\(([\w.-]+)\)", READ.read_text())
    assert pictures == ["report-plan.svg", "report-time.svg"]
    for name in pictures:
        found = check_alone((HOW_TO / name).read_text(encoding="utf-8"))
        assert "hospital-c" in found.words


def test_the_page_has_the_parts_that_are_explained(real: Real):
    heads = set(re.findall(r"(?m)^## (.+)$", READ.read_text())) - {"Beside the page"}
    assert len(heads) == 5
    for head in heads:
        assert head in page(real.folder).words


def test_the_files_beside_it_are_named_with_their_columns(real: Real):
    text = READ.read_text()
    for file in (file for file in real.report.files if file.suffix in (".csv", ".svg")):
        assert f"`{file.name}`" in text
    for name in ("curves.csv", "cuts.csv"):
        (row,) = re.findall(rf"(?m)^\| `{name}` \| (.+) \|$", text)
        named = re.findall(r"`(\w+)`", row)
        assert named
        assert set(named) <= set(table(real.folder, name)[0])
    assert re.findall(r"`(\w+)`", re.findall(r"(?m)^\| `curves.csv` .+$", text)[0].split("|", 2)[2]) == list(
        table(real.folder, "curves.csv")[0]
    )


def test_kinds_of_time_are_explained():
    text = READ.read_text()
    explained = {kind for words in re.findall(r"(?m)^- \*([\w, ]+)\*:", text) for kind in words.split(", ")}
    assert explained == {*KINDS.values(), "other"}


@pytest.mark.parametrize("title", ["hospital.toml", "cloud.toml"])
def test_party_files_of_the_page_can_be_read(tmp_path: Path, title: str):
    text = next(text for _, name, text in blocks(LOG) if name == title)
    (tmp_path / title).write_text(text)
    file = load_party_file(tmp_path / title)
    assert file.tensorboard == (title == "hospital.toml")
    assert file.mlflow == ("" if title == "hospital.toml" else f"sqlite:///{tmp_path / 'mlflow.db'}")


def test_logging_from_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "watch.py").write_text(next(text for _, name, text in blocks(LOG) if name == "watch.py"))
    runpy.run_path(str(tmp_path / "watch.py"))
    assert capsys.readouterr().out.startswith("u-shaped: ")
    names = scalars(tmp_path / "tb")
    assert "train/loss/loss/hospital" in names
    patterns = {
        re.sub("[A-Z]+", r"[\\w-]+", name)
        for row in re.findall(r"(?m)^\| (`[A-Za-z/_]+`.*)$", LOG.read_text())
        for name in re.findall(r"`(\S*/\S+)`", row)
    }
    patterns.add(r"step/[\w-]+/received_bytes/[\w-]+")
    assert len(patterns) == 5
    assert [name for name in names if not any(re.fullmatch(pattern, name) for pattern in patterns)] == []


def test_a_report_from_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    title = "report_of_a_result.py"
    (tmp_path / title).write_text(next(text for _, name, text in blocks(READ) if name == title))
    runpy.run_path(str(tmp_path / title))
    assert capsys.readouterr().out == "mine/report.html\n"
    assert page(tmp_path / "mine").tables
