"""A real run, made once: two hospitals with labels of their own in a U-shape, and a server."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

import cutlayer as cl
from cutlayer.report.record import Record, read_record
from cutlayer.report.write import Report, write_report
from cutlayer.run.outcome import Result
from cutlayer.run.results import write_results

SAMPLES = {"clinic": 20, "lab": 12}
EPOCHS, BATCH, HELD_OUT = 3, 8, 6


@dataclass(frozen=True)
class Real:
    """A run, the events it told, its folder, what was read back from it, and its report."""

    result: Result
    events: list[tuple[str, dict[str, object]]]
    folder: Path
    record: Record
    report: Report


def plan() -> cl.Plan:
    cut, back, output = "float32[batch, 6]", "float32[batch, 5]", "float32[batch, 3]"
    training = {"epochs": EPOCHS, "batch_size": BATCH, "evaluate_every": 1}
    return cl.u_shaped(tuple(SAMPLES), "server", cut=cut, back=back, output=output, **training)


def party(name: str) -> cl.Party:
    torch.manual_seed(len(name))

    def data(count: int) -> cl.TensorTable:
        x = torch.randn(count, 4)
        return cl.TensorTable(x=x, y=(x[:, 0] > 0).long() + (x[:, 1] > 0).long())

    def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.1)

    if name == "server":
        return cl.Party(name, modules={"body": nn.Linear(6, 5)}, optimizer=sgd, seed=1)
    modules = {"head": nn.Linear(4, 6), "tail": nn.Linear(5, 3), "loss": nn.CrossEntropyLoss()}
    metrics = {"loss": lambda: {"accuracy": MulticlassAccuracy(3), "recall": MulticlassAccuracy(3, average="none")}}
    return cl.Party(
        name,
        modules=modules,
        data=data(SAMPLES[name]),
        evaluation=data(HELD_OUT),
        optimizer=sgd,
        metrics=metrics,
        seed=1,
    )


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> Real:
    folder = tmp_path_factory.mktemp("real")
    events: list[tuple[str, dict[str, object]]] = []
    run = plan()
    result = cl.simulate(
        run, [party(name) for name in run.parties], notify=lambda name, d: events.append((name, {**d}))
    )
    write_results(folder, result)
    report = write_report(folder)
    return Real(result, events, folder, read_record(folder), report)
