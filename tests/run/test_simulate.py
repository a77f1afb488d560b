"""All parties in one process: what is refused, and what must stay at its party."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchmetrics.classification import BinaryAUROC, MulticlassConfusionMatrix

import cutlayer as cl
from cutlayer.core.bounds import mailbox_bounds
from cutlayer.core.compile import Roster, compile_plan
from cutlayer.engine.snapshot import restore, snapshot
from cutlayer.errors import ConfigError, DataError
from tests.run import plans

U = {"cut": "float32[batch, 5]", "back": "float32[batch, 4]", "output": "float32[batch, 3]"}


def _sgd(parameters):
    return torch.optim.SGD(parameters, 0.1)


def _hospital(name, rows, loss, **settings):
    x, y = torch.randn(rows, 6), torch.randint(0, 3, (rows,))
    modules = {"head": nn.Linear(6, 5), "tail": nn.Linear(4, 3), "loss": loss}
    data = cl.TensorTable(x=x, y=y)
    return cl.Party(name, modules=modules, data=data, evaluation=data, optimizer=_sgd, seed=1, **settings)


def _server():
    return cl.Party("s", modules={"body": nn.Linear(5, 4)}, optimizer=_sgd, seed=1)


@pytest.mark.parametrize("order", ["relay", "parallel"])
def test_what_a_loss_holds_stays_at_its_party(order):
    """Class weights tell how frequent classes are: a hospital's own must neither leave nor be overwritten."""
    plan = cl.u_shaped(["a", "b"], "s", **U, batch_size=4, order=order)
    own = {"a": torch.tensor([1.0, 9.0, 2.0]), "b": torch.tensor([5.0, 2.0, 3.0])}
    parties = [_hospital(name, 8, nn.CrossEntropyLoss(weight=weight.clone())) for name, weight in own.items()]
    result = cl.simulate(plan, [*parties, _server()])
    for lane, (name, weight) in enumerate(own.items()):
        assert torch.equal(result.workers[name].site.stages["loss", lane].module.weight, weight)


def test_a_large_metric_of_replicas_is_added():
    plan = cl.u_shaped(["a", "b"], "s", **{**U, "output": "float32[batch, 100]"}, batch_size=4)
    metrics = {"loss": lambda: {"confusion": MulticlassConfusionMatrix(100)}}
    parties = [_hospital(name, 8, nn.CrossEntropyLoss(), metrics=metrics) for name in ("a", "b")]
    for party in parties:
        party.modules["tail"] = nn.Linear(4, 100)
    result = cl.simulate(plan, [*parties, _server()])
    assert sum(map(sum, result.metrics("evaluate")["loss"]["confusion"])) == 16


def test_a_metric_that_keeps_lists_is_in_a_snapshot():
    plan = cl.Plan([
        cl.Stage("head", at="a", inputs=["data.x"], output="float32[batch]"),
        cl.Loss("loss", at="a", inputs=["head", "data.y"]),
    ])  # fmt: skip
    modules = {"head": nn.Sequential(nn.Linear(6, 1), nn.Flatten(0)), "loss": nn.BCEWithLogitsLoss()}
    data = cl.TensorTable(x=torch.randn(40, 6), y=torch.arange(40).remainder(2).float())
    party = cl.Party(
        "a",
        modules=modules,
        data=data,
        evaluation=data,
        optimizer=_sgd,
        metrics={"loss": lambda: {"auc": BinaryAUROC()}},
    )
    worker = cl.simulate(plan, [party]).workers["a"]
    before, kept = worker.site.books["loss", 0].values(), snapshot(worker.site)
    worker.begin("evaluate", 2)
    assert worker.site.books["loss", 0].values() == {}
    restore(worker.site, kept, "test")
    assert worker.site.books["loss", 0].values() == before
    assert 0 <= before["auc"] <= 1


def test_a_hub_never_runs_ahead_of_a_lane_without_samples():
    plan = cl.u_shaped(["a", "b"], "s", **U, batch_size=4, order="parallel")
    bounds = []
    for samples in (80, 4000):
        programs = compile_plan(plan, Roster({"train": {"a": samples, "b": 8}}))
        bounds.append(mailbox_bounds(programs, plan.training.window)["a", "b"])
        tells_each_step = [
            job for block in programs["b"]["train"].blocks for job in block.instructions
            if getattr(job, "name", "") == "add_gradients" and job.stage == "head"
        ]  # fmt: skip
        assert tells_each_step
    assert bounds[0] == bounds[1] < 40
    parties = [_hospital("a", 80, nn.CrossEntropyLoss()), _hospital("b", 8, nn.CrossEntropyLoss()), _server()]
    flows = cl.simulate(plan, parties).ledgers["b"].flows
    heard = {row.messages for key, row in flows.items() if key[:4] == ("received", "a", "train", "exchange")}
    said = {row.messages for key, row in flows.items() if key[:4] == ("sent", "a", "train", "exchange")}
    assert 18 in heard  # the steps in which only a has samples: b gets the sum in each,
    assert 18 in said  # and says a word in each, so that a waits for it


def test_a_plan_without_anything_to_train_runs():
    plan = cl.Plan([
        cl.Stage("head", at="a", inputs=["data.x"], output="float32[batch, 3]", frozen=True),
        cl.Loss("loss", at="b", inputs=["head", "data.y"]),
    ], training=cl.Training(batch_size=4))  # fmt: skip
    x, y = cl.TensorTable(x=torch.randn(40, 6)), cl.TensorTable(y=torch.randint(0, 3, (40,)))
    a = cl.Party("a", modules={"head": nn.Linear(6, 3)}, data=x, evaluation=x)
    b = cl.Party("b", modules={"loss": nn.CrossEntropyLoss()}, data=y, evaluation=y)
    assert cl.simulate(plan, [a, b]).metrics()["loss"]["loss"] > 0


@pytest.mark.provokes("E226")
def test_one_module_at_two_parties_is_refused():
    plan = cl.u_shaped(["a", "b"], "s", **U, batch_size=4)
    first, second = _hospital("a", 8, nn.CrossEntropyLoss()), _hospital("b", 8, nn.CrossEntropyLoss())
    second.modules["head"] = first.modules["head"]
    with pytest.raises(ConfigError, match="share one module") as caught:
        cl.simulate(plan, [first, second, _server()])
    assert caught.value.code == "E226"


@pytest.mark.provokes(by="code")
@pytest.mark.parametrize(
    ("settings", "code", "words"),
    [
        (
            {"optimizer": torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.1)},
            "E227",
            "optimizer .* is no function .party alpha, optimizer.*got SGD",
        ),
        (
            {"scheduler": torch.optim.lr_scheduler.StepLR(torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.1), 1)},
            "E227",
            r"expected a function that makes it, such as lambda optimizer: torch.optim.lr_scheduler.StepLR\(optimizer",
        ),
        (
            {"scheduler_every": "epochs"},
            "E227",
            r"\(party alpha, scheduler_every\): expected epoch or step, got epochs",
        ),
        (
            {"metrics": {"los": dict}},
            "E223",
            r"los, which is no loss of the plan \(party alpha, metrics\)\. name a loss: metrics=\{'loss': lambda: ",
        ),
        (
            {"scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau},
            "E221",
            "needs a metric at each step.*use a scheduler",
        ),
    ],
)
def test_slips_in_a_party_are_told(settings, code, words):
    case = plans.u_shaped()
    party, server = case.build("alpha"), case.build("server")
    merged = {"modules": party.modules, "data": party.data, "optimizer": _sgd, **settings}
    with pytest.raises(ConfigError, match=words) as caught:
        cl.simulate(case.plan, [cl.Party("alpha", **merged), server])
    assert caught.value.code == code


@pytest.mark.provokes("E225")
def test_other_parties_than_the_plans_are_refused():
    case = plans.u_shaped()
    with pytest.raises(ConfigError, match="not those of the plan") as caught:
        cl.simulate(case.plan, case.parties()[:1])
    assert caught.value.code == "E225"


@pytest.mark.provokes("E259")
def test_no_sample_left_is_told():
    case = plans.relay(batch_size=40)
    with pytest.raises(DataError, match="enough samples") as caught:
        cl.simulate(case.plan, case.parties())
    assert caught.value.code == "E259"


def test_prediction_needs_no_optimizer_but_data():
    case = plans.u_shaped()
    hospital, server = case.build("alpha"), case.build("server")
    with pytest.raises(DataError, match="predict") as caught:
        cl.predict(case.plan, [hospital, server])
    assert caught.value.code == "E252"
    bare = cl.Party("alpha", modules=hospital.modules, prediction=hospital.data)
    found = cl.predict(case.plan, [bare, cl.Party("server", modules=server.modules)])
    whole = nn.Sequential(hospital.modules["head"], server.modules["body"], hospital.modules["tail"]).eval()
    expected = torch.cat([whole(part) for part in torch.split(hospital.data.fields["x"], 4)])
    assert list(found) == ["tail"]
    assert torch.allclose(found["tail"], expected.detach(), atol=1e-6)
