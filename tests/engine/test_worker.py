"""Every plan equals the uncut model: weights, buffers, generators and optimizer states, to the last bit."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torchmetrics import MeanAbsoluteError, SumMetric

from cutlayer.core.parts import Loss, Release, Stage, Training
from cutlayer.core.plan import Plan
from cutlayer.core.program import Backward, Send
from cutlayer.data.sources import TensorTable
from cutlayer.engine.values import Values
from cutlayer.engine.worker import Parcel, Worker
from cutlayer.run import simulate as simulation
from cutlayer.run.party import Party
from tests import oracle
from tests.small import (
    TOPOLOGIES,
    Case,
    adam,
    data_for,
    difference,
    far,
    float32,
    in_float64,
    modules_for,
    momentum,
    plain,
)

SCHEDULES = ["sequential", "gpipe", "1f1b"]


def fan_out(**training: object) -> Plan:
    """A head with four consumers at three parties, two losses, one label released."""
    stages = [
        Stage("head", at="a", inputs=["data.x"], output=float32(4)),
        Stage("left", at="a", inputs=["head", "data.x"], output=float32(3)),
        Stage("right", at="b", inputs=["head", "left"], output=float32(3)),
        Stage("sum", at="c", inputs=["head", "right", "head"], output=float32(3)),
        Loss("first", at="c", inputs=["sum", "data.y"], weight=0.7),
        Loss("second", at="b", inputs=["right", "data.y@a"], weight=0.2, reduction="sum"),
    ]
    release = Release("y", at="a", to="b", spec="int64[batch]")
    return Plan(stages, training=Training(**{"batch_size": 8, "microbatches": 3, **training}), releases=[release])


@pytest.mark.parametrize("microbatches", [1, 3])
@pytest.mark.parametrize("optimizer", [adam, momentum], ids=lambda make: make.__name__)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_equals_the_uncut_model(topology, schedule, optimizer, microbatches):
    """With dropout and BatchNorm; batches of 8, 8 and 6."""
    plan = TOPOLOGIES[topology](batch_size=8, microbatches=microbatches, schedule=schedule)
    case = Case.of(plan, optimizer=optimizer)
    assert difference(case.cut(), case.uncut()) == 0.0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_equals_the_uncut_model_over_several_epochs(schedule):
    case = Case.of(fan_out(epochs=3, schedule=schedule, drop_last=True))
    assert difference(case.cut(), case.uncut()) == 0.0


def test_samples_are_used_in_their_own_order_without_shuffling():
    case = Case.of(fan_out(shuffle=False))
    assert difference(case.cut(), case.uncut()) == 0.0
    assert difference(case.cut(), case.but(shuffle=True).uncut()) > 0.0
    assert difference(case.cut(), case.but(seed=1).uncut()) == 0.0


def whole_batches(case: Case) -> dict[str, nn.Module]:
    """The plainest loop there is: no microbatches, no branches, no generators; one optimizer."""
    modules, training = copy.deepcopy(dict(case.modules)), case.plan.training
    optimizer = case.optimizer([p for module in modules.values() for p in module.parameters()])
    for epoch in range(1, training.epochs + 1):
        rows = torch.tensor(oracle.sample_order(training.seed, epoch, 0, case.counts[0]))
        for batch in rows.split(training.batch_size):
            values, total = {}, torch.zeros(())
            for stage in case.plan.stages:
                inputs = [
                    values[text] if text in values else field_of(case, stage, text)[batch] for text in stage.inputs
                ]
                values[stage.name] = modules[stage.name](*inputs)
                if isinstance(stage, Loss):
                    total = total + values[stage.name] * stage.weight
            total.backward()
            optimizer.step()
            optimizer.zero_grad()
    return modules


def field_of(case: Case, stage: Stage | Loss, text: str) -> torch.Tensor:
    name, _, owner = text.removeprefix("data.").partition("@")
    return case.data[case.plan.stage(owner or stage.name).at][name]


def weights_far(case: Case, modules: dict[str, nn.Module]) -> float:
    """The largest difference of weights and buffers between the engine's modules and those of the plain loop."""
    found = [
        far(own, modules[name].state_dict()[key])
        for worker in case.cut().workers.values()
        for (name, _), stage in worker.site.stages.items()
        for key, own in stage.module.state_dict().items()
    ]
    return max(found)


@pytest.mark.parametrize("optimizer", [adam, momentum], ids=lambda make: make.__name__)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_batch_norm_is_exact_at_one_microbatch(topology, optimizer):
    """Against a loop that knows no microbatches at all."""
    plan = TOPOLOGIES[topology](batch_size=8)
    case = Case.of(plan, optimizer=optimizer, modules=modules_for(plan, drop=0.0))
    assert weights_far(case, whole_batches(case)) == 0.0


def test_batch_norm_is_not_exact_at_two():
    plan = TOPOLOGIES["u_shaped"](batch_size=8, microbatches=2)
    case = Case.of(plan, modules=modules_for(plan, drop=0.0))
    assert weights_far(case, whole_batches(case)) > 1e-4


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_microbatches_give_the_whole_batch(topology, schedule):
    """In float64, without BatchNorm and dropout, up to the rounding of another order of additions."""
    plan = in_float64(TOPOLOGIES[topology](batch_size=8, microbatches=3, schedule=schedule, epochs=3))
    modules = modules_for(plan, norm=False, drop=0.0, dtype=torch.float64)
    case = Case.of(plan, optimizer=momentum, modules=modules, data=data_for(plan, (22,), torch.float64))
    assert weights_far(case, whole_batches(case)) < 1e-11


# --- the comparison notices ------------------------------------------------------------------------------------------


def changed_scales(change):
    """Programs whose losses begin with other gradients."""

    def compiled(plan, roster):
        programs = compile_plan(plan, roster)
        for modes in programs.values():
            blocks = [
                replace(b, instructions=tuple(change(i) if isinstance(i, Backward) else i for i in b.instructions))
                for b in modes["train"].blocks
            ]
            modes["train"] = replace(modes["train"], blocks=tuple(blocks))
        return programs

    compile_plan = simulation.compile_plan
    return compiled


def test_notices_equal_shares_for_unequal_microbatches(monkeypatch):
    case = Case.of(TOPOLOGIES["u_shaped"](batch_size=8, microbatches=3))
    monkeypatch.setattr(
        simulation, "compile_plan", changed_scales(lambda b: b if b.scale == 1.0 else replace(b, scale=1 / 3))
    )
    assert difference(case.cut(), case.uncut()) > 1e-6


def test_notices_another_order_of_additions(monkeypatch):
    """Four consumers: autograd's own order, and the reverse of the plan's, give other last bits."""
    case = Case.of(fan_out(epochs=2))
    assert difference(case.cut(), case.uncut()) == 0.0
    forward = Values.added

    def backwards(self, stage, lane, micro, device):
        edges = self._trained[stage]
        self._trained[stage] = [numbers[::-1] for numbers in edges]
        try:
            return forward(self, stage, lane, micro, device)
        finally:
            self._trained[stage] = edges

    monkeypatch.setattr(Values, "added", backwards)
    assert difference(case.cut(), case.uncut()) > 0.0


def test_notices_another_generator():
    case = Case.of(TOPOLOGIES["vertical"](batch_size=8))
    assert difference(case.cut(seed=1), case.uncut()) > 1e-6


def test_notices_a_global_generator_in_place_of_each_stages_own(monkeypatch):
    case = Case.of(TOPOLOGIES["vertical"](batch_size=8))
    monkeypatch.setattr(oracle.Uncut, "_call", lambda self, name, lane, inputs: self.modules[name](*inputs))
    assert difference(case.cut(), case.uncut()) > 1e-6


# --- frozen stages, reductions, clipping -----------------------------------------------------------------------------


def chain(*, frozen: tuple[str, ...] = (), **training: object) -> Plan:
    stages = [
        Stage("head", at="a", inputs=["data.x"], output=float32(4), frozen="head" in frozen),
        Stage("body", at="b", inputs=["head"], output=float32(4), frozen="body" in frozen),
        Stage("tail", at="a", inputs=["body"], output=float32(3), frozen="tail" in frozen),
        Loss("loss", at="a", inputs=["tail", "data.y"]),
    ]
    return Plan(stages, training=Training(**{"batch_size": 8, "microbatches": 2, **training}))


@pytest.mark.parametrize("frozen", [("head",), ("body",), ("tail",), ("head", "body")])
def test_frozen_stages_equal_the_uncut_model(frozen):
    case = Case.of(chain(frozen=frozen, epochs=2), optimizer=momentum)
    result = case.cut()
    assert difference(result, case.uncut()) == 0.0
    for name in ("head", "body", "tail"):
        worker = result.workers[case.plan.stage(name).at]
        weight = worker.site.stages[name, 0].module.linear.weight
        assert torch.equal(weight, case.modules[name].linear.weight) == (name in frozen)


def test_no_gradient_is_sent_where_nothing_before_is_trained():
    for frozen, expected in (("head", False), ("body", True)):
        ledger = Case.of(chain(frozen=(frozen,))).cut().ledgers["b"]
        assert any(way == "sent" and direction == "down" for way, _, _, direction, _ in ledger.flows) is expected


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_loss_may_give_any_shape_of_one_number(shape):
    class Shaped(nn.Module):
        def forward(self, prediction, label):
            return nn.functional.cross_entropy(prediction, label).reshape(shape)

    case = Case.of(chain())
    shaped = replace(case, modules={**case.modules, "loss": Shaped()})
    assert difference(shaped.cut(), case.uncut()) == 0.0


@pytest.mark.parametrize("largest", [0.05, 1e6])
def test_clips_each_party_by_its_own_norm(largest):
    case = Case.of(fan_out(clip_norm=largest), optimizer=plain)
    assert difference(case.cut(), case.uncut()) == 0.0
    unclipped = difference(case.but(clip_norm=None).cut(), case.uncut())
    assert unclipped == 0.0 if largest > 1 else unclipped > 0.0


def test_clipping_skips_frozen_stages():
    case = Case.of(chain(frozen=("body",), clip_norm=0.05), optimizer=plain)
    assert difference(case.cut(), case.uncut()) == 0.0


# --- metrics ---------------------------------------------------------------------------------------------------------


class Noted(SumMetric):
    """A metric that notes when it is updated."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def update(self, prediction: torch.Tensor, label: torch.Tensor) -> None:
        self.seen.append("metric")
        super().update(prediction.sum())


@pytest.mark.parametrize("microbatches", [1, 2])
def test_nobody_waits_for_metrics(monkeypatch: pytest.MonkeyPatch, microbatches: int):
    """The gradient has left before they are updated; they are before another microbatch comes, or the step ends."""
    seen, packed, end = list[str](), Worker.packed, Worker.end_step

    def noted(self: Worker, job: Send, step: int, value: torch.Tensor) -> Parcel:
        seen.extend(["gradient"] if job.direction == "down" else [])
        return packed(self, job, step, value)

    def ended(self: Worker) -> None:
        end(self)
        seen.extend(["end"] if seen[-1:] == ["metric"] else [])

    monkeypatch.setattr(Worker, "packed", noted)
    monkeypatch.setattr(Worker, "end_step", ended)
    case = Case.of(TOPOLOGIES["vanilla"](batch_size=11, epochs=1, microbatches=microbatches))
    simulation.simulate(case.plan, case.parties(metrics={"loss": lambda: {"sum": Noted(seen)}}))
    assert seen == [*["gradient", "metric"] * microbatches, "end"] * 2


class Bare(nn.Module):
    """Gives its own parameter for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bias.expand(len(x), 1)


class Writing(nn.Linear):
    """Writes to what it is given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.mul_(100))


def errors_of(plan: Plan, **modules: nn.Module) -> list[dict[str, float]]:
    """Train and evaluate on one batch; return loss and mean absolute error of the loss `loss` of each round."""
    torch.manual_seed(4)
    table = TensorTable(x=torch.randn(8, 5), y=torch.full((8, 1), 2.0))
    parties = [
        Party(
            name,
            modules={s.name: modules[s.name] for s in plan.stages if name in s.places},
            optimizer=plain,
            data=table if name == "a" else None,
            evaluation=table if name == "a" else None,
            metrics={"loss": lambda: {"mae": MeanAbsoluteError()}} if name in plan.stage("loss").places else {},
        )
        for name in plan.parties
    ]
    history = [row for worker in simulation.simulate(plan, parties).workers.values() for row in worker.history]
    return [row["metrics"] for row in history if row["loss"] == "loss"]


def test_metrics_are_of_the_weights_before_the_step():
    """Also where the prediction is a parameter, which the step writes to."""
    stages = [
        Stage("head", at="a", inputs=["data.x"], output=float32(1)),
        Loss("loss", at="a", inputs=["head", "data.y"]),
    ]
    train, evaluation = errors_of(Plan(stages, training=Training(batch_size=8)), head=Bare(), loss=nn.L1Loss())
    assert train == {"loss": 2.0, "mae": 2.0}
    assert evaluation["loss"] == evaluation["mae"] < 2


def test_metrics_see_what_the_loss_saw():
    """Also where another stage writes to it."""
    stages = [
        Stage("head", at="a", inputs=["data.x"], output=float32(1)),
        Loss("loss", at="s", inputs=["head", "data.y@a"]),
        Stage("more", at="s", inputs=["head"], output=float32(1)),
        Loss("other", at="s", inputs=["more", "data.y@a"]),
    ]
    releases = [Release("y", at="a", to="s", spec="float32[batch, 1]")]
    plan = Plan(stages, training=Training(batch_size=8), releases=releases)
    modules = {"head": nn.Linear(5, 1), "loss": nn.L1Loss(), "more": Writing(1, 1), "other": nn.L1Loss()}
    for row in errors_of(plan, **modules):
        assert row["mae"] == pytest.approx(row["loss"])


# --- evaluation ------------------------------------------------------------------------------------------------------


def test_evaluation_changes_no_bit():
    """The same training with and without an evaluation after each epoch."""
    case = Case.of(fan_out(epochs=3, evaluate_every=1))
    expected = case.uncut()
    parties = case.parties()
    parties = [replace(party, evaluation=party.data) for party in parties]
    result = simulation.simulate(case.plan, parties)
    assert len([row for row in result.history if row["mode"] == "evaluate" and row["loss"] == "first"]) == 3
    assert difference(result, expected) == 0.0


def test_evaluation_runs_in_evaluation_mode():
    """Its loss is that of the final model with running statistics and without dropout."""
    case = Case.of(chain(epochs=2))
    parties = [replace(party, evaluation=party.data) for party in case.parties()]
    result = simulation.simulate(case.plan, parties)
    model = nn.Sequential(*(case.uncut().modules[name] for name in ("head", "body", "tail")))

    def loss_of(model: nn.Module) -> float:
        with torch.no_grad():
            return float(nn.functional.cross_entropy(model(case.data["a"]["x"]), case.data["a"]["y"]))

    assert result.metrics()["loss"]["loss"] == pytest.approx(loss_of(model.eval()), rel=1e-6)
    assert result.metrics()["loss"]["loss"] != pytest.approx(loss_of(model.train()), rel=1e-4)
