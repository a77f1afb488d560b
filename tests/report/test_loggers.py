"""Loggers: what they write can be read back, and none of their errors reaches the run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import cutlayer as cl
from cutlayer.errors import ConfigError
from cutlayer.report import loggers
from cutlayer.report.loggers import fan_out, guarded, tensorboard
from tests.run import plans


def test_tensorboard_has_the_runs_numbers(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    case = plans.u_shaped(epochs=3)
    with tensorboard(tmp_path, parameters={"epochs": 3}) as notify:
        result = cl.simulate(case.plan, case.parties(), notify=notify)
    events = EventAccumulator(str(tmp_path)).Reload()
    tags = events.Tags()["scalars"]
    assert any("train" in tag and "loss" in tag for tag in tags), tags
    wanted = {row["round"]: row["metrics"]["loss"] for row in result.history if row["mode"] == "train"}
    (tag,) = [tag for tag in tags if "train" in tag and tag.count("loss") >= 1 and not tag.startswith("step")][:1]
    found = {event.step: event.value for event in events.Scalars(tag)}
    assert found == pytest.approx(wanted, rel=1e-6)


@pytest.mark.provokes("E283")
@pytest.mark.parametrize(
    ("open_logger", "package"),
    [
        (lambda folder: tensorboard(folder), "tensorboard"),
        (lambda folder: loggers.mlflow("http://127.0.0.1:1", folder=folder, experiment="x"), "mlflow"),
    ],
    ids=["tensorboard", "mlflow"],
)
def test_a_missing_package_is_said_before_anything_begins(
    open_logger: Any, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(loggers, "find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match=rf"E283.*pip install 'cutlayer\[{package}\]', or leave the key out"):
        open_logger(tmp_path).__enter__()


def test_mlflow_has_the_runs_numbers(tmp_path: Path):
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    from mlflow import MlflowClient

    uri, case = f"sqlite:///{tmp_path}/mlflow.db", plans.u_shaped(epochs=2)
    with loggers.mlflow(uri, folder=tmp_path, experiment="study", parameters={"epochs": 2}) as notify:
        result = cl.simulate(case.plan, case.parties(), notify=notify)
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("study")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["epochs"] == "2"
    last = result.metrics("train")["loss"]["loss"]
    assert any(value == pytest.approx(last) for name, value in run.data.metrics.items() if "train" in name)


@contextmanager
def broken(when: str) -> Iterator[Any]:
    if when == "open":
        raise OSError("no room")

    def notify(event: str, _details: Mapping[str, Any]) -> None:
        if when == "event":
            raise OSError("no room")

    yield notify
    if when == "close":
        raise OSError("no room")


@pytest.mark.parametrize("when", ["open", "event", "close"])
def test_a_loggers_error_is_told_once_and_the_run_goes_on(when: str):
    told: list[str] = []
    case = plans.u_shaped(epochs=1)
    with guarded("the logger", broken(when), told.append) as notify:
        result = cl.simulate(case.plan, case.parties(), notify=notify)
    assert told == ["the logger is not logged to any more: OSError: no room"]
    assert result.history == cl.simulate(case.plan, plans.u_shaped(epochs=1).parties()).history


def test_an_error_of_the_run_is_the_runs():
    told: list[str] = []
    with pytest.raises(KeyError), guarded("the logger", broken("never"), told.append):
        raise KeyError("the run's own")
    assert told == []


def test_all_are_told():
    heard: list[tuple[int, str]] = []
    fan_out(lambda event, _: heard.append((1, event)), lambda event, _: heard.append((2, event)))("step", {})
    assert heard == [(1, "step"), (2, "step")]
