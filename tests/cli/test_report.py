"""`cutlayer report`, the report at the end of a run, and `[logging]` in party files."""

from __future__ import annotations

import webbrowser
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cutlayer.report import loggers, raster
from cutlayer.run.config import load_contract
from tests.cli.conftest import write_site
from tests.report.reading import page, table

Call = Callable[..., Any]
ALL = ("contract.toml", "hospital.toml", "server.toml")


@pytest.fixture
def out(call: Call, demo: Path) -> Path:
    """The folder of a run that has ended."""
    assert call("run", *ALL, "--folder", "out", "-q").code == 0
    return demo / "out"


def test_a_run_leaves_a_report_of_itself(call: Call, out: Path):
    names = {path.name for path in (out / "report").iterdir()}
    assert names == {"costs.csv", "curves.csv", "curves.svg", "cuts.csv", "plan.svg", "time.svg"}
    found = page(out)
    assert "hospital (40 samples) and server" in " ".join(found.words.split())
    bytes_up = 2 * 40 * 8 * 4 + 20 * 8 * 4  # rounds x samples x width x float32, and the evaluation at the end
    rows = [row for row in table(out, "cuts.csv") if row["what"] == "activations of head"]
    assert sum(int(row["payload_bytes"]) for row in rows) == bytes_up
    assert f"{bytes_up:,}" in found.words


def test_report_again_with_pictures(call: Call, out: Path):
    (out / "report.html").unlink()
    result = call("report", "out")
    assert (result.code, result.out, result.err) == (0, ["report: out/report.html"], [])
    assert {path.suffix for path in (out / "report").iterdir()} == {".csv", ".png", ".svg"}
    assert page(out).tables


def test_report_as_json(call: Call, out: Path):
    document = call("report", "out", "--json").json()
    assert document["report"] == str(out / "report.html")
    assert {Path(file).name for file in document["files"]} == {path.name for path in (out / "report").iterdir()}


def test_report_without_matplotlib_says_what_is_missing(call: Call, out: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(raster, "find_spec", lambda _name: None)
    (line,) = call("report", "out").out
    assert line == "report: out/report.html (its drawings as PNG need matplotlib: pip install 'cutlayer[plot]')"


def test_open_shows_the_page(call: Call, out: Path, monkeypatch: pytest.MonkeyPatch):
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda address: opened.append(address))
    assert call("report", "out").code == 0
    assert opened == []
    assert call("report", "out", "--open").code == 0
    assert opened == [(out / "report.html").as_uri()]


@pytest.mark.provokes("E281")
def test_report_of_no_run(call: Call, demo: Path):
    result = call("report", ".")
    assert (result.code, result.err[0]) == (2, "E281 the folder holds no results of a run")
    assert list(demo.glob("report*")) == []


@pytest.mark.provokes("E281")
@pytest.mark.parametrize(("kind", "works"), [("simulate", False), ("processes", True), ("join", True)])
def test_report_of_a_run_that_was_stopped_says_what_works(call: Call, out: Path, kind: str, works: bool):
    (out / "summary.json").unlink()
    record = out / "launch.json"
    record.write_text(record.read_text().replace('"simulate"', f'"{kind}"'))
    result = call("report", "out")
    assert (result.code, result.err[0]) == (2, "E281 the folder holds no results of a run")
    assert ("cutlayer resume out" in result.err[3]) is works
    assert ("start the run again in a new folder" in result.err[3]) is not works
    if not works:
        assert (
            call("resume", "out").err[0]
            == "E208 a run of all parties in one process keeps no checkpoints to go on from"
        )
        assert call("run", "contract.toml", "hospital.toml", "server.toml", "--folder", "new", "-q").code == 0


@pytest.mark.provokes("E282")
def test_report_of_a_damaged_run(call: Call, out: Path):
    (out / "summary.json").write_text("{}")
    result = call("report", "out")
    assert (result.code, result.err[0]) == (2, "E282 the summary of the run cannot be read")


# --- [logging] --------------------------------------------------------------------------------------------------------


def test_tensorboard_is_written_for_the_party_that_asks(call: Call, demo: Path):
    from tests.report.test_loggers import scalars

    write_site(demo, "hospital", more="[logging]\ntensorboard = true\n")
    assert call("run", *ALL, "--folder", "out", "-q").code == 0
    assert [path.name for path in (demo / "out" / "tensorboard").iterdir()] == ["hospital"]
    found = scalars(demo / "out" / "tensorboard" / "hospital")
    curve = [float(row["value"]) for row in table(demo / "out", "curves.csv") if row["mode"] == "train"]
    assert [value for _, value in found["train/loss/loss/hospital"]] == pytest.approx(curve)
    assert {name.rpartition("/")[2] for name in found} == {"hospital"}


def test_nothing_is_logged_unless_asked_for(call: Call, out: Path):
    assert not (out / "tensorboard").exists()
    assert not list(out.glob("mlflow*"))


def test_mlflow_is_told_where_and_by_whom(call: Call, demo: Path, monkeypatch: pytest.MonkeyPatch):
    """tests/report/test_loggers.py reads back what it then holds."""
    given: list[tuple[str, dict[str, Any]]] = []
    events: list[str] = []

    @contextmanager
    def mlflow(uri: str, **settings: Any) -> Iterator[loggers.Notify]:
        given.append((uri, settings))
        yield lambda event, _details: events.append(event)

    monkeypatch.setattr(loggers, "mlflow", mlflow)
    write_site(demo, "server", more='[logging]\nmlflow = "runs.db"\n')
    assert call("run", *ALL, "--folder", "out", "-q").code == 0
    ((uri, settings),) = given
    assert uri == f"sqlite:///{demo / 'runs.db'}"
    assert (settings["party"], settings["experiment"], settings["folder"]) == ("server", "demo", Path("out"))
    assert settings["parameters"]["epochs"] == 2
    assert settings["parameters"]["contract_digest"] == load_contract(demo / "contract.toml").digest()
    logged = [line.split('"')[3] for line in (demo / "out" / "metrics.jsonl").read_text().splitlines()]
    assert events == logged


def test_a_tracker_that_fails_does_not_stop_the_run(call: Call, demo: Path):
    write_site(demo, "hospital", more="[logging]\ntensorboard = true\n")
    (demo / "out").mkdir()
    (demo / "out" / "tensorboard").write_text("in the way")
    result = call("run", *ALL, "--folder", "out")
    assert (result.code, result.out[-1]) == (0, "results: out/report.html")
    told = [line for line in result.err if line.startswith("TensorBoard is not logged to any more: ")]
    assert len(told) == 1


@pytest.mark.provokes("E283")
def test_a_tracker_that_is_not_installed_stops_it_before_it_begins(
    call: Call, demo: Path, monkeypatch: pytest.MonkeyPatch
):
    write_site(demo, "hospital", more="[logging]\ntensorboard = true\n")
    monkeypatch.setattr(loggers, "find_spec", lambda _name: None)
    result = call("run", *ALL, "--folder", "out")
    assert result.code == 2
    assert result.err[-4] == "E283 the package 'tensorboard', which logging needs, is not installed"
    assert result.err[-1].startswith("  do:    pip install 'cutlayer[tensorboard]', or leave the key out")
    assert not (demo / "out" / "summary.json").exists()
