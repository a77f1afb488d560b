"""Loggers of a run's events: TensorBoard files and MLflow, both at the site that asks for them, neither by default.

A logger is a context manager that gives a `notify` function for `simulate` and `join`. It only listens: it changes
nothing of a run, and `guarded` keeps its errors away from it.

| code | error | meaning |
| --- | --- | --- |
| E283 | ConfigError | the package of a logger is not installed |
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cutlayer.errors import ConfigError
from cutlayer.report.tally import KINDS, flat

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["Notify", "fan_out", "guarded", "mlflow", "tensorboard"]

Notify = Callable[[str, Mapping[str, Any]], None]
Scalar = tuple[str, float, int]  # name, value, step

_LATE = 30.0  # seconds that MLflow may still take when a run has ended
_BATCH = 1000  # metrics that MLflow takes at once
_MLFLOW_NAME = re.compile(r"[^\w\-. :/]", re.ASCII)


@contextmanager
def tensorboard(folder: Path, *, party: str = "", parameters: Mapping[str, object] | None = None) -> Iterator[Notify]:
    """Write events as TensorBoard files into `folder`; after a restart they go on there.

    Args:
        folder: Created if missing; show it with `tensorboard --logdir FOLDER`.
        party: Log this party's events only; empty: those of all parties.
        parameters: What the run was started with, kept as text.

    Raises:
        ConfigError: E283, the package is not installed.
    """
    _need("tensorboard", "tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder), flush_secs=10)
    scalars = _Scalars(party)
    if parameters:
        writer.add_text("run", f"    {json.dumps(dict(parameters), indent=2, default=str)}".replace("\n", "\n    "))

    def notify(event: str, details: Mapping[str, Any]) -> None:
        for name, value, step in scalars.of(event, details):
            writer.add_scalar(name, value, step)

    try:
        yield notify
    finally:
        writer.close()


@contextmanager
def mlflow(
    uri: str, *, folder: Path, experiment: str, party: str = "", parameters: Mapping[str, object] | None = None
) -> Iterator[Notify]:
    """Log events to MLflow: a file "sqlite:////PATH/mlflow.db", or a server that this site runs, "http://host:port".

    Nothing is sent anywhere else: MLflow's own reports of use are switched off. Calls are made by a thread beside the
    run, which never waits for them; an error of one is raised by the next event.

    Args:
        uri: Where MLflow keeps its runs.
        folder: The run's folder; it keeps the MLflow run's identifier, so that a restart goes on with it.
        experiment: Name of the experiment; made if missing.
        party: Log this party's events only; empty: those of all parties.
        parameters: What the run was started with.

    Raises:
        ConfigError: E283, a package is not installed.
    """
    _need("mlflow", "mlflow")
    if uri.startswith("sqlite:"):
        _need("sqlalchemy", "mlflow")
    scalars, waiting = _Scalars(party), list[Scalar]()
    worker = ThreadPoolExecutor(1, thread_name_prefix="mlflow")
    begun = worker.submit(_begin_mlflow, uri, folder, experiment, party, parameters or {})
    pending: list[Future[Any]] = [begun]

    def send() -> None:
        rows, waiting[:] = list(waiting), []
        pending.append(worker.submit(lambda: _log_mlflow(*begun.result(), rows)))

    def notify(event: str, details: Mapping[str, Any]) -> None:
        while pending and pending[0].done():
            pending.pop(0).result()
        waiting.extend(scalars.of(event, details))
        if event == "round" or len(waiting) >= _BATCH:
            send()

    status = "FAILED"
    try:
        yield notify
        status = "FINISHED"
    finally:
        send()
        last = worker.submit(lambda: _end_mlflow(*begun.result(), status))
        worker.shutdown(wait=False)
        last.result(_LATE)


def fan_out(*notifies: Notify) -> Notify:
    """Return a function that passes each event to all of these, in their order."""

    def notify(event: str, details: Mapping[str, Any]) -> None:
        for one in notifies:
            one(event, details)

    return notify


@contextmanager
def guarded(name: str, logger: AbstractContextManager[Notify], tell: Callable[[str], None]) -> Iterator[Notify]:
    """Keep a logger's errors away from the run: the first is told, and no event is passed on after it.

    Only a missing package is an error, raised before anything has begun.
    """
    live: list[Notify] = []
    stack, failed = ExitStack(), None

    def dropped(error: Exception) -> None:
        live.clear()
        tell(f"{name} is not logged to any more: {type(error).__name__}: {str(error)[:300]}")

    def notify(event: str, details: Mapping[str, Any]) -> None:
        try:
            fan_out(*live)(event, details)
        except Exception as error:
            dropped(error)

    try:
        live.append(stack.enter_context(logger))
    except ConfigError:
        raise
    except Exception as error:
        dropped(error)
    try:
        yield notify
    except BaseException as error:
        failed = error
        raise
    finally:
        _close(stack, failed, dropped if live else None)


def _close(stack: ExitStack, failed: BaseException | None, dropped: Callable[[Exception], None] | None) -> None:
    """End a logger, telling it whether the run failed; of an error that is its own, `dropped` is told."""
    try:
        stack.__exit__(type(failed) if failed else None, failed, failed.__traceback__ if failed else None)
    except Exception as error:
        if dropped is not None and error is not failed:
            dropped(error)


@dataclass
class _Scalars:
    """Turns events into named numbers. Steps are counted through the rounds, by party and mode."""

    party: str
    steps: Counter[tuple[str, str]] = field(default_factory=Counter)

    def of(self, event: str, details: Mapping[str, Any]) -> list[Scalar]:
        if event == "round":
            return self._round(details)
        if event == "step" and self.party in ("", details["party"]):
            return self._step(details)
        return []

    def _round(self, details: Mapping[str, Any]) -> list[Scalar]:
        rows = [{"party": details.get("party", ""), **row} for row in details["history"]]
        places = Counter((row["loss"], row["party"], row["mode"], row["round"]) for row in rows)
        found: list[Scalar] = []
        for row in rows:
            if self.party in ("", row["party"]):
                several = places[row["loss"], row["party"], row["mode"], row["round"]] > 1
                who = f"{row['party']}.{row['lane']}" if several else row["party"]
                prefix = f"{row['mode']}/{row['loss']}"
                found += [(f"{prefix}/{name}/{who}", value, row["round"]) for name, value in flat(row["metrics"])]
                for own in row.get("own", ()):
                    whose = f"own/{own['client']}"
                    found += [(f"{prefix}/{name}/{whose}", value, row["round"]) for name, value in flat(own["metrics"])]
        return found

    def _step(self, details: Mapping[str, Any]) -> list[Scalar]:
        party, mode = str(details["party"]), str(details["mode"])
        sums: Counter[str] = Counter()
        for flow, nbytes in details["bytes"].items():
            sums[f"{flow.partition(' ')[0]}_bytes"] += nbytes
        for work, seconds in details["seconds"].items():
            kind = work.partition(" ")[0]
            sums[f"{KINDS.get(kind, 'other')}_seconds"] += seconds
        number = self.steps[party, mode]
        if "steps" in details:  # of a round; a run that was gone on with counts on
            number = max(0, details["round"] - 1) * details["steps"] + details["step"]
        self.steps[party, mode] = number + 1
        return [(f"step/{mode}/{name}/{party}", float(value), number) for name, value in sorted(sums.items())]


def _need(package: str, extra: str) -> None:
    if find_spec(package) is None:
        raise ConfigError(
            f"the package {package!r}, which logging needs, is not installed",
            where="[logging] of the party file",
            expected=package,
            remedy=f"pip install 'cutlayer[{extra}]', or leave the key out",
            code="E283",
        )


def _begin_mlflow(
    uri: str, folder: Path, experiment: str, party: str, parameters: Mapping[str, object]
) -> tuple[MlflowClient, str]:
    """Open the run of this folder, or a new one; return the client and the run's identifier."""
    from mlflow import MlflowClient
    from mlflow.entities import Param

    _keep_to_this_site()
    client, kept = MlflowClient(tracking_uri=uri), folder / f"mlflow-{party or 'run'}.txt"
    if kept.exists():
        return client, client.get_run(kept.read_text().strip()).info.run_id
    known = client.get_experiment_by_name(experiment)
    number = known.experiment_id if known else client.create_experiment(experiment)
    run = client.create_run(number, run_name=f"{folder.name} {party}".strip(), tags={"cutlayer.party": party})
    kept.write_text(run.info.run_id)
    texts = [Param(name, str(value)[:500]) for name, value in parameters.items()]
    client.log_batch(run.info.run_id, params=texts)
    return client, run.info.run_id


def _keep_to_this_site() -> None:
    """Switch off MLflow's reports and remarks, and keep a silent server from holding this thread for long."""
    from mlflow import environment_variables, telemetry

    settings: Any = environment_variables
    reports: Any = telemetry
    settings.MLFLOW_DISABLE_TELEMETRY.set(True)
    reports.set_telemetry_client()  # there is none from now on
    if not settings.MLFLOW_HTTP_REQUEST_MAX_RETRIES.is_set():
        settings.MLFLOW_HTTP_REQUEST_MAX_RETRIES.set(2)
    if not settings.MLFLOW_HTTP_REQUEST_TIMEOUT.is_set():
        settings.MLFLOW_HTTP_REQUEST_TIMEOUT.set(10)
    if not settings.MLFLOW_LOGGING_LEVEL.is_set():
        logging.getLogger("mlflow").setLevel(logging.WARNING)


def _log_mlflow(client: MlflowClient, run: str, rows: list[Scalar]) -> None:
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    metrics = [Metric(_MLFLOW_NAME.sub("_", name), value, now, step) for name, value, step in rows]
    for start in range(0, len(metrics), _BATCH):
        client.log_batch(run, metrics=metrics[start : start + _BATCH])


def _end_mlflow(client: MlflowClient, run: str, status: str) -> None:
    client.set_terminated(run, status)
