"""Loggers hold the numbers that the run told, for their party only, and never disturb the run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

import cutlayer as cl
from cutlayer.errors import ConfigError
from cutlayer.report import loggers
from cutlayer.report.loggers import Notify, fan_out, guarded, tensorboard
from cutlayer.report.record import read_record
from cutlayer.report.tally import series
from cutlayer.run.results import write_results
from tests.report.conftest import EPOCHS, SAMPLES, Real
from tests.run.test_own_metrics import at_the_server

Values = dict[str, list[tuple[int, float]]]  # name -> step, value


def replay(real: Real, notify: Notify) -> None:
    for event, details in real.events:
        notify(event, details)


def read_back(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    return found


def scalars(folder: Path) -> Values:
    found = read_back(folder)
    return {name: [(s.step, s.value) for s in found.Scalars(name)] for name in found.Tags()["scalars"]}


def expected(real: Real, party: str) -> Values:
    """The metrics of a party's history by the loggers' names: of all samples, and of its own."""
    values: Values = {}
    for row in real.result.history:
        if row["party"] == party:
            (own,) = row["own"]
            assert row["metrics"] != own["metrics"]
            for who, metrics in ((party, row["metrics"]), (f"own/{party}", own["metrics"])):
                for name, value in metrics.items():
                    listed = isinstance(value, list)
                    parts = {f"{name}[{n}]": part for n, part in enumerate(value)} if listed else {name: value}
                    for part, number in parts.items():
                        key = f"{row['mode']}/{row['loss']}/{part}/{who}"
                        values.setdefault(key, []).append((row["round"], number))
    return values


def close(one: Values, other: Values) -> bool:
    """Whether names and steps are the same, and values as near as 32 bits allow."""
    return one.keys() == other.keys() and all(
        [step for step, _ in one[name]] == [step for step, _ in other[name]]
        and all(math.isclose(a, b, rel_tol=1e-6) for (_, a), (_, b) in zip(one[name], other[name], strict=True))
        for name in one
    )


# --- TensorBoard ------------------------------------------------------------------------------------------------------


def test_tensorboard_holds_what_the_run_told(real: Real, tmp_path: Path):
    with tensorboard(tmp_path, parameters={"epochs": EPOCHS, "note": "<b>"}) as notify:
        replay(real, notify)
    found = scalars(tmp_path)
    metrics = {name: values for name, values in found.items() if not name.startswith("step/")}
    assert close(metrics, expected(real, "clinic") | expected(real, "lab"))
    for party, ledger in real.result.ledgers.items():
        for way in ("sent", "received"):
            told = sum(value for _, value in found[f"step/train/{way}_bytes/{party}"])
            flows = {key: row.payload for key, row in ledger.flows.items() if key[0] == way and key[2] == "train"}
            assert told == sum(flows.values()) > 0
    steps = [step for step, _ in found["step/train/forward_seconds/server"]]
    batches = EPOCHS * sum(math.ceil(count / 8) for count in SAMPLES.values())
    assert steps == sorted(set(steps)), "counted through the rounds"
    assert len(steps) == batches
    text = read_back(tmp_path).Tensors("run/text_summary")[0].tensor_proto.string_val[0].decode()
    assert '"epochs": 3' in text


def test_tensorboard_of_one_party_holds_nothing_of_others(real: Real, tmp_path: Path):
    with tensorboard(tmp_path, party="clinic") as notify:
        replay(real, notify)
    found = scalars(tmp_path)
    assert {name.rpartition("/")[2] for name in found} == {"clinic"}
    assert close({n: v for n, v in found.items() if not n.startswith("step/")}, expected(real, "clinic"))


def test_tensorboard_goes_on_after_a_restart(real: Real, tmp_path: Path):
    half = len(real.events) // 2
    for part in (real.events[:half], real.events[half:]):
        with tensorboard(tmp_path, party="lab") as notify:
            for event, details in part:
                notify(event, details)
    found = scalars(tmp_path)
    assert close({n: v for n, v in found.items() if not n.startswith("step/")}, expected(real, "lab"))


def test_replicas_at_one_party_have_their_lanes(tmp_path: Path):
    rows = [
        {"mode": "train", "round": 1, "loss": "loss", "lane": lane, "party": "server", "metrics": {"loss": lane / 2}}
        for lane in (0, 1)
    ]
    with tensorboard(tmp_path) as notify:
        notify("round", {"mode": "train", "round": 1, "history": rows})
    assert scalars(tmp_path) == {"train/loss/loss/server.0": [(1, 0.0)], "train/loss/loss/server.1": [(1, 0.5)]}


@pytest.mark.parametrize("tracker", ["tensorboard", "mlflow"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
def test_a_server_that_has_the_labels_logs_each_client_as_the_report_names_it(
    tmp_path: Path, tracker: str, request: pytest.FixtureRequest
):
    case = at_the_server("parallel", epochs=1)
    logger: AbstractContextManager[Notify] = tensorboard(tmp_path, party="server")
    if tracker == "mlflow":
        store = request.getfixturevalue("store")
        logger = loggers.mlflow(store, folder=tmp_path, experiment="demo", party="server")
    with logger as notify:
        result = cl.simulate(case.plan, case.parties(), notify=notify)
    if tracker == "mlflow":
        found = mlflow_runs(store, "demo")[0].data.metrics
    else:
        found = {name: values[-1][1] for name, values in scalars(tmp_path).items()}
    clients, wanted = ["alpha", "beta", "gamma"], dict[str, float]()
    for row in result.history:
        assert [own["client"] for own in row["own"]] == clients
        wanted[f"{row['mode']}/loss/loss/server"] = row["metrics"]["loss"]
        for own in row["own"]:
            wanted[f"{row['mode']}/loss/loss/own/{own['client']}"] = own["metrics"]["loss"]
    assert len(set(wanted.values())) == len(wanted) == 8
    assert {n: v for n, v in found.items() if not n.startswith("step/")} == pytest.approx(wanted, rel=1e-6)
    write_results(tmp_path, result)
    assert list(dict.fromkeys(line.who[0] for line in series(read_record(tmp_path)) if line.own)) == clients


def test_steps_of_a_run_that_was_gone_on_with_count_on(tmp_path: Path):
    step = {"party": "lab", "mode": "train", "bytes": {"sent up 0": 3}, "seconds": {"wait a": 0.5, "odd": 0.25}}
    with tensorboard(tmp_path) as notify:
        notify("step", {**step, "round": 3, "step": 1, "steps": 4})
        notify("step", {**step, "round": 3, "step": 2, "steps": 4})
    found = scalars(tmp_path)
    assert found["step/train/sent_bytes/lab"] == [(9, 3.0), (10, 3.0)]
    assert found["step/train/wait_seconds/lab"][0] == (9, 0.5)
    assert found["step/train/other_seconds/lab"][0] == (9, 0.25)


@pytest.mark.provokes("E283")
@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])
def test_a_package_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setattr(loggers, "find_spec", lambda _name: None)
    made = {
        "tensorboard": lambda: tensorboard(tmp_path),
        "mlflow": lambda: loggers.mlflow("sqlite:///a.db", folder=tmp_path, experiment="demo"),
    }[name]()
    with pytest.raises(ConfigError, match=f"the package '{name}', which logging needs, is not installed") as caught:
        made.__enter__()
    assert caught.value.code == "E283"
    assert caught.value.where == "[logging] of the party file"
    assert caught.value.expected == name
    assert caught.value.remedy == f"pip install 'cutlayer[{name}]', or leave the key out"


# --- MLflow -----------------------------------------------------------------------------------------------------------


def mlflow_runs(uri: str, experiment: str) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    return [client.get_run(run.info.run_id) for run in client.search_runs([found.experiment_id])]


@pytest.fixture
def store(tmp_path: Path) -> str:
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
def test_mlflow_holds_what_the_run_told(real: Real, tmp_path: Path, store: str, capfd: pytest.CaptureFixture[str]):
    from mlflow import MlflowClient, telemetry

    settings = {"folder": tmp_path, "experiment": "demo", "party": "clinic"}
    half = len(real.events) // 2

    def interrupted() -> None:
        with loggers.mlflow(store, parameters={"epochs": EPOCHS}, **settings) as notify:
            for event, details in real.events[:half]:
                notify(event, details)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    (run,) = mlflow_runs(store, "demo")
    assert (run.info.status, run.data.params["epochs"]) == ("FAILED", str(EPOCHS))
    with loggers.mlflow(store, **settings) as notify:  # a restart goes on with the same run
        for event, details in real.events[half:]:
            notify(event, details)
    (run,) = mlflow_runs(store, "demo")
    assert run.info.status == "FINISHED"
    client = MlflowClient(tracking_uri=store)
    names = [name for name in run.data.metrics if not name.startswith("step/")]
    found = {name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)] for name in names}
    wanted = {name.replace("[", "_").replace("]", "_"): values for name, values in expected(real, "clinic").items()}
    assert close(found, wanted)
    assert {name.rpartition("/")[2] for name in run.data.metrics} == {"clinic"}
    assert telemetry.get_telemetry_client() is None, "nothing is reported anywhere"
    assert "INFO" not in capfd.readouterr().err


# --- what keeps a logger's errors away from the run -------------------------------------------------------------------


class Recorder:
    """A logger that notes what it is given, and fails where it is told to."""

    def __init__(self, *, at: str = "") -> None:
        self.seen: list[str] = []
        self.ended: list[str] = []
        self.at = at

    def logger(self) -> AbstractContextManager[Notify]:
        return self._logger()

    @contextmanager
    def _logger(self) -> Iterator[Notify]:
        if self.at == "begin":
            raise OSError("no disk")

        def notify(event: str, _details: Mapping[str, Any]) -> None:
            if event == self.at:
                raise OSError("no disk")
            self.seen.append(event)

        try:
            yield notify
        except BaseException as error:
            self.ended.append(type(error).__name__)
            raise
        else:
            self.ended.append("well")
        if self.at == "end":
            raise OSError("no disk")


TOLD = ["a logger is not logged to any more: OSError: no disk"]


@pytest.mark.parametrize(
    ("at", "seen", "told"),
    [("", ["a", "b", "c"], []), ("begin", [], TOLD), ("b", ["a"], TOLD), ("end", ["a", "b", "c"], TOLD)],
)
def test_an_error_of_a_logger_is_told_once_and_nothing_else_happens(at: str, seen: list[str], told: list[str]):
    one, words = Recorder(at=at), list[str]()
    with guarded("a logger", one.logger(), words.append) as notify:
        for event in ("a", "b", "c"):
            notify(event, {})
    assert (one.seen, words) == (seen, told)


def test_an_error_of_the_run_is_the_runs_own():
    one, words = Recorder(), list[str]()
    with pytest.raises(ValueError, match="the run failed"), guarded("a logger", one.logger(), words.append):
        raise ValueError("the run failed")
    assert (one.ended, words) == (["ValueError"], [])


def test_a_logger_that_fails_as_the_run_fails_does_not_hide_it():
    one, words = Recorder(at="b"), list[str]()

    def run() -> None:
        with guarded("a logger", one.logger(), words.append) as notify:
            notify("b", {})
            raise ValueError("the run failed")

    with pytest.raises(ValueError, match="the run failed"):
        run()
    assert words == TOLD


def test_a_missing_package_stops_the_run_before_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loggers, "find_spec", lambda _name: None)
    words: list[str] = []
    with pytest.raises(ConfigError) as caught, guarded("TensorBoard", tensorboard(tmp_path), words.append):
        pytest.fail("nothing may begin")
    assert (caught.value.code, words) == ("E283", [])


def test_fan_out_tells_all_in_their_order():
    seen: list[tuple[int, str]] = []

    def listener(number: int) -> Notify:
        return lambda event, _details: seen.append((number, event))

    fan_out(*(listener(number) for number in range(3)))("step", {})
    assert seen == [(0, "step"), (1, "step"), (2, "step")]
    fan_out()("step", {})
