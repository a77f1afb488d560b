"""Metrics of each client's own samples: beside those of all, where they are counted, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy

import cutlayer as cl
from tests.run import plans
from tests.run.test_loop import same, with_raw

ROWS = {name: len(range(*part.indices(plans.ROWS))) for name, part in plans.HOSPITALS.items()}


def metrics() -> dict[str, Any]:
    return {"accuracy": MulticlassAccuracy(3, average="micro")}


def at_the_server(order: str, **training: Any) -> plans.Case:
    """Three hospitals with labels at the server, which has one loss for all of them."""
    names, at = tuple(plans.HOSPITALS), {"head": list(plans.HOSPITALS)}
    stages = [
        cl.Stage("head", at=at["head"], inputs=["data.x"], output="float32[batch, 8]"),
        cl.Stage("body", at="server", inputs=["head", "data.x@head"], output="float32[batch, 3]"),
        cl.Loss("loss", at="server", inputs=["body", "data.y@head"]),
    ]
    releases = [
        cl.Release("x", at="head", to="server", spec="float32[batch, 6]"),
        cl.Release("y", at="head", to="server", spec="int64[batch]"),
    ]
    settings = cl.Training(**{"order": order, "batch_size": 8, "epochs": 2, "evaluate_every": 1, **training})
    plan = cl.Plan(stages, training=settings, releases=releases)

    def build(name: str) -> cl.Party:
        if name in names:
            return plans._party(name, {"head": plans._block(6, 8, 1)}, plans._table(plans.HOSPITALS[name]))
        return plans._party(name, {"body": plans.Merge(14, 3, 2), "loss": nn.CrossEntropyLoss()})

    return plans.Case(plan, build, "server")


def run(case: plans.Case) -> cl.Result:
    losses = [replace(p, metrics={"loss": metrics} if "loss" in p.modules else {}) for p in case.parties()]
    return cl.simulate(case.plan, losses)


CASES: dict[str, Callable[[], plans.Case]] = {
    "u-shaped relay": lambda: plans.relay(epochs=2, evaluate_every=1),
    "u-shaped parallel": lambda: plans.parallel(epochs=2, evaluate_every=1),
    "server relay": lambda: at_the_server("relay"),
    "server parallel": lambda: at_the_server("parallel"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_weighted_mean_of_each_clients_own_is_what_is_told_of_all(name: str):
    case = CASES[name]()
    history = run(case).history
    for mode in ("train", "evaluate"):
        for number in (1, 2):
            rows = [row for row in history if (row["mode"], row["round"]) == (mode, number)]
            own = [one for row in rows for one in row["own"]]
            assert [one["lane"] for one in own] == [0, 1, 2]
            counts = [one["samples"] for one in own]
            assert mode == "train" or counts == list(ROWS.values())
            for metric in ("loss", "accuracy"):
                values = [one["metrics"][metric] for one in own]
                assert len(set(values)) > 1, "other data, other curves"
                mean = sum(v * n for v, n in zip(values, counts, strict=True)) / sum(counts)
                assert {row["metrics"][metric] for row in rows} == {rows[0]["metrics"][metric]}
                assert mean == pytest.approx(rows[0]["metrics"][metric], rel=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_own_values_are_where_the_labels_are(name: str):
    """In a U-shape each client has its own and no other's; a server that has the labels has them of each."""
    case = CASES[name]()
    told = {(row["party"], tuple(one["lane"] for one in row["own"])) for row in run(case).history}
    if name.startswith("u-shaped"):
        assert told == {("alpha", (0,)), ("beta", (1,)), ("gamma", (2,))}
    else:
        assert told == {("server", (0, 1, 2))}


def test_own_values_are_those_of_the_samples_alone():
    """After the last round: what a client has of its own is the loss of its rows, computed with its own modules."""
    case = plans.parallel(epochs=1, evaluate_every=1)
    result = run(case)
    body = result.workers["server"].site.stages["body", 0].module.eval()
    for row in result.history:
        if row["mode"] == "evaluate":
            data = case.build(row["party"]).evaluation
            own_stages = result.workers[row["party"]].site.stages
            head, tail = (own_stages[name, row["lane"]].module.eval() for name in ("head", "tail"))
            with torch.no_grad():
                output = tail(body(head(data.fields["x"])))
            (own,) = row["own"]
            expected = nn.functional.cross_entropy(output, data.fields["y"])
            assert own["metrics"]["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_of_one_client_nothing_is_told_twice():
    assert all("own" not in row for row in run(plans.u_shaped(epochs=1)).history)


@pytest.mark.parametrize("order", ["relay", "parallel"])
def test_ones_own_loop_counts_each_client_apart_too(order: str):
    case = at_the_server(order, schedule="sequential")
    expected = cl.simulate(case.plan, case.parties())
    mine, others = case.build("server"), [case.build(name) for name in plans.HOSPITALS]
    with cl.session(case.plan, mine, others=others) as session:
        with_raw(session, mine)
    same(session.result(), expected, "server")
    assert len(expected.history[0]["own"]) == 3


class Picky(BinaryAUROC):
    """Cannot be computed of a client whose labels are all alike."""

    def compute(self) -> torch.Tensor:
        if float(self.confmat[0].sum(1).min()) == 0:
            raise ValueError("one class only")
        return super().compute()


def test_a_metric_that_a_clients_samples_do_not_allow_is_left_out_of_its_own():
    def table(labels: list[int]) -> cl.TensorTable:
        return cl.TensorTable(x=torch.randn(4, 3), y=torch.tensor(labels).float())

    plan = cl.u_shaped(
        ("one", "two"), "server", cut="float32[batch, 3]", back="float32[batch, 2]", output="float32[batch]",
        batch_size=4, metrics_least=4,
    )  # fmt: skip
    torch.manual_seed(0)
    parties = [cl.Party("server", modules={"body": nn.Linear(3, 2)}, optimizer=plans._adam, seed=1)]
    for name, labels in (("one", [0, 1, 0, 1]), ("two", [1, 1, 1, 1])):
        tail = nn.Sequential(nn.Linear(2, 1), nn.Flatten(0))
        modules = {"head": nn.Linear(3, 3), "tail": tail, "loss": nn.BCEWithLogitsLoss()}
        made = {"loss": lambda: {"auc": Picky(thresholds=10)}}
        parties.append(cl.Party(name, modules=modules, data=table(labels), optimizer=plans._adam, metrics=made, seed=1))
    history = cl.simulate(plan, parties).history
    assert [set(row["metrics"]) for row in history] == [{"loss", "auc"}] * 2
    assert [set(row["own"][0]["metrics"]) for row in history] == [{"loss", "auc"}, {"loss"}]
