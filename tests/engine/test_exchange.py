"""Replicas: relay, parallel steps and global clipping equal one uncut model; exchanges refuse what does not fit."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as rates

from cutlayer.core.parts import Loss, Release, Stage, Training
from cutlayer.core.plan import Plan
from cutlayer.core.topologies import u_shaped, vanilla
from cutlayer.engine import site
from cutlayer.errors import ContractError
from cutlayer.run.simulate import simulate
from tests import oracle
from tests.small import (
    C,
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

CLIENTS = ("a", "b", "c")
COUNTS = (12, 10, 16)


def replicas(**training: object) -> Plan:
    """Three clients with unequal data, and a server."""
    numbers = {"batch_size": 6, "microbatches": 2, "epochs": 2, "schedule": "1f1b", **training}
    return u_shaped(CLIENTS, "server", cut=float32(6), back=float32(4), output=C, **numbers)


def servers(**training: object) -> Plan:
    """A copy of the server's stage for each client, and labels released to it."""
    stages = [
        Stage("head", at=CLIENTS, inputs=["data.x"], output=float32(4)),
        Stage("body", at=["server"] * 3, inputs=["head"], output=C),
        Loss("loss", at=["server"] * 3, inputs=["body", "data.y@head"]),
    ]
    release = Release("y", at="head", to="server", spec="int64[batch]")
    return Plan(stages, training=Training(**{"batch_size": 6, "epochs": 2, **training}), releases=[release])


PLANS = {
    "one server": replicas,
    "labels released": lambda **t: vanilla(
        CLIENTS, "server", cut=float32(5), output=C, **{"batch_size": 6, "epochs": 2, **t}
    ),
    "a server each": servers,
}

# --- relay -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [adam, momentum], ids=lambda make: make.__name__)
@pytest.mark.parametrize("make", PLANS.values(), ids=PLANS)
def test_relay_is_the_uncut_model_on_the_same_batches(make, optimizer):
    """With dropout and BatchNorm. At the end all replicas have the last state."""
    case = Case.of(make(), COUNTS, optimizer=optimizer)
    assert difference(case.cut(), case.uncut()) == 0.0


@pytest.mark.parametrize("left_out", ["optimizer", "generator", "buffers"])
def test_relay_needs_all_of_the_state(left_out, monkeypatch):
    """If any part stays behind at each hand-on, the result is another."""
    load = site.load_stage_state

    def load_some(stage, bundle, state, where):
        own = {f"b.{name}": buffer for name, buffer in stage.module.named_buffers()}
        kept = {
            "optimizer": {name: tensor for name, tensor in state.items() if not name.startswith("o.")},
            "generator": {**state, "g.cpu": stage.generator},
            "buffers": {**state, **own},
        }
        load(stage, bundle, kept[left_out], where)

    case = Case.of(replicas(), COUNTS)
    expected = case.uncut()
    assert difference(case.cut(), expected, lane=0) == 0.0
    monkeypatch.setattr(site, "load_stage_state", load_some)
    assert parameters_far(case, expected, lane=0) > 1e-6 or left_out == "buffers"
    assert buffers_far(case, expected, lane=0) > 1e-6


def parameters_far(case: Case, expected: oracle.Uncut, lane: int) -> float:
    stage = case.cut().workers[CLIENTS[lane]].site.stages["head", lane]
    return far(stage.module.linear.weight, expected.modules["head"].linear.weight)


def buffers_far(case: Case, expected: oracle.Uncut, lane: int) -> float:
    stage = case.cut().workers[CLIENTS[lane]].site.stages["head", lane]
    return far(stage.module.norm.running_mean, expected.modules["head"].norm.running_mean)


RATES = {
    "step": ("epoch", lambda o: rates.StepLR(o, 1, gamma=0.5)),
    "cosine": ("step", lambda o: rates.CosineAnnealingLR(o, 20)),
    "milestones": ("step", lambda o: rates.MultiStepLR(o, [3, 8])),
    "function": ("step", lambda o: rates.LambdaLR(o, lambda step: 1 / (1 + step))),
    "one cycle": ("step", lambda o: rates.OneCycleLR(o, 0.1, total_steps=40)),  # changes betas, a tuple
    "warm-up": (  # schedulers within a scheduler
        "step",
        lambda o: rates.SequentialLR(o, [rates.LinearLR(o, 0.1, total_iters=5), rates.ExponentialLR(o, 0.7)], [5]),
    ),
    "epochs": (
        "epoch",
        lambda o: rates.ChainedScheduler([rates.ConstantLR(o, 0.1, total_iters=1), rates.ExponentialLR(o, 0.5)]),
    ),
}


@pytest.mark.parametrize("order", ["relay", "parallel"])
@pytest.mark.parametrize(("every", "scheduler"), RATES.values(), ids=RATES)
def test_learning_rate_schedulers_go_on_at_the_next_client(every, scheduler, order):
    case = Case.of(replicas(order=order, epochs=3), COUNTS, extra={"scheduler": scheduler, "scheduler_every": every})
    result, expected = case.cut(), case.uncut()
    assert difference(result, expected) == 0.0
    for worker in result.workers.values():
        for bundle in worker.site.bundles.values():
            assert bundle.optimizer.param_groups[0]["lr"] == expected.trainer.param_groups[0]["lr"]
    constant = replace(case, extra={}).uncut()
    assert difference(result, constant) > 1e-6


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.Adafactor(p, lr=1e-2),  # state smaller than the parameter
        lambda p: torch.optim.NAdam(p, lr=1e-2),
        lambda p: torch.optim.Rprop(p, lr=1e-2),
        lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
        lambda p: torch.optim.Adam([{"params": p[:2], "lr": 1e-1}, {"params": p[2:]}], lr=1e-2),  # two groups
    ],
    ids=["Adafactor", "NAdam", "Rprop", "AMSGrad", "groups"],
)
def test_relay_hands_on_the_state_of_any_optimizer(optimizer):
    """Compared with one client that holds all data, since parameter groups are a party's own."""
    case = Case.of(replicas(shuffle=False, batch_size=4), (8, 8, 8), optimizer=optimizer)
    plan = u_shaped("a", "server", cut=float32(6), back=float32(4), output=C).with_training(
        **vars(replicas(shuffle=False, batch_size=4).training)
    )
    joined = {name: torch.cat([case.data[client][name] for client in CLIENTS]) for name in ("x", "y")}
    whole = Case(plan=plan, modules=case.modules, data={"a": joined}, counts=(24,), optimizer=optimizer)
    relayed, single = case.cut(), whole.cut()
    for name in ("head", "tail"):
        mine = relayed.workers["c"].site.stages[name, 2].module.state_dict()
        other = single.workers["a"].site.stages[name, 0].module.state_dict()
        assert max(far(mine[key], other[key]) for key in mine) == 0.0


# --- parallel --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["sequential", "gpipe", "1f1b"])
@pytest.mark.parametrize("make", PLANS.values(), ids=PLANS)
def test_parallel_is_one_model_whose_replicas_differ_in_buffers_only(make, schedule):
    """Gradients are weighted by samples and added in the order of lanes. Dropout and BatchNorm are on."""
    case = Case.of(make(order="parallel", schedule=schedule), COUNTS)
    assert difference(case.cut(), case.uncut()) == 0.0


def one_model(case: Case, *, at_once: bool) -> dict[str, nn.Module]:
    """One uncut model that takes all lanes' samples in each step, lane by lane or at once."""
    modules, training = copy.deepcopy(dict(case.modules)), case.plan.training
    optimizer = case.optimizer([p for module in modules.values() for p in module.parameters()])
    for epoch in range(1, training.epochs + 1):
        rows = [torch.tensor(oracle.sample_order(training.seed, epoch, lane, n)) for lane, n in enumerate(case.counts)]
        batches = [lane.split(training.batch_size) for lane in rows]
        for step in range(max(map(len, batches))):
            taken = [(CLIENTS[lane], mine[step]) for lane, mine in enumerate(batches) if step < len(mine)]
            parts = [{name: case.data[client][name][row] for name in ("x", "y")} for client, row in taken]
            if at_once:
                parts = [{name: torch.cat([part[name] for part in parts]) for name in ("x", "y")}]
            total = sum(len(part["y"]) for part in parts)
            for part in parts:
                value = modules["tail"](modules["body"](modules["head"](part["x"])))
                (modules["loss"](value, part["y"]) * (len(part["y"]) / total)).backward()
            optimizer.step()
            optimizer.zero_grad()
    return modules


@pytest.mark.parametrize("optimizer", [adam, momentum], ids=lambda make: make.__name__)
def test_parallel_is_one_step_of_one_model(optimizer):
    plan = replicas(order="parallel", microbatches=1)
    case = Case.of(plan, COUNTS, optimizer=optimizer, modules=modules_for(plan, norm=False, drop=0.0))
    expected = one_model(case, at_once=False)
    result = case.cut()
    for client in CLIENTS:
        assert replica_far(result, client, expected) == 0.0


def test_parallel_is_one_large_batch():
    plan = in_float64(replicas(order="parallel"))
    modules = modules_for(plan, norm=False, drop=0.0, dtype=torch.float64)
    data = data_for(plan, COUNTS, torch.float64)
    case = Case.of(plan, COUNTS, optimizer=momentum, modules=modules, data=data)
    assert replica_far(case.cut(), "b", one_model(case, at_once=True)) < 1e-11


def replica_far(result, client: str, modules: dict[str, nn.Module]) -> float:
    return max(
        far(own, modules[name].state_dict()[key])
        for party in (client, "server")
        for (name, _), stage in result.workers[party].site.stages.items()
        for key, own in stage.module.state_dict().items()
    )


@pytest.mark.parametrize("order", ["relay", "parallel"])
def test_replicas_are_equal_after_each_epoch(order):
    """In a relay only the first replica is up to date between epochs; at the end all are."""
    case = Case.of(replicas(order=order, epochs=3), COUNTS)
    parties = case.parties()
    for place, party in enumerate(parties[1:3]):  # begin with other weights: the first client's are what counts
        party.modules["head"].load_state_dict(modules_for(case.plan, seed=place)["head"].state_dict())
    heads = [party.modules["head"] for party in parties[:3]]
    seen = []

    def notify(kind, details):
        if kind == "round":
            weights = [torch.cat([p.detach().flatten() for p in head.parameters()]) for head in heads]
            seen.append((details["mode"], all(torch.equal(weights[0], other) for other in weights)))

    result = simulate(case.plan, parties, notify=notify)
    equal = [("train", order == "parallel")] * 3
    assert seen == [("start", order == "parallel"), *equal, ("finish", True)]
    assert difference(result, case.uncut()) == 0.0


# --- global clipping -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["relay", "parallel"])
@pytest.mark.parametrize("largest", [0.05, 1e6])
def test_global_clipping_adds_squares_in_plan_order(order, largest):
    case = Case.of(replicas(order=order, clip_norm=largest, clip="global"), COUNTS, optimizer=plain)
    assert difference(case.cut(), case.uncut()) == 0.0
    unclipped = difference(case.but(clip_norm=None).cut(), case.uncut())
    assert unclipped == 0.0 if largest > 1 else unclipped > 1e-6


def test_global_clipping_is_not_clipping_by_party():
    case = Case.of(replicas(clip_norm=0.05, clip="global"), COUNTS, optimizer=plain)
    assert difference(case.cut(), case.but(clip="party").uncut()) > 1e-6


@pytest.mark.parametrize("frozen", [False, True])
def test_global_clipping_is_that_of_the_whole_model(frozen):
    """In float64, against `clip_grad_norm_` of all trained parameters of the uncut model."""
    plan = in_float64(u_shaped("a", "server", cut=float32(6), back=float32(4), output=C, batch_size=8))
    stages = [replace_frozen(stage, frozen) for stage in plan.stages]
    plan = Plan(stages, training=replace(plan.training, clip_norm=0.05, clip="global"))
    modules = modules_for(plan, norm=False, drop=0.0, dtype=torch.float64)
    case = Case.of(plan, (24,), optimizer=plain, modules=modules, data=data_for(plan, (24,), torch.float64))
    expected = copy.deepcopy(modules)
    expected["body"].requires_grad_(not frozen)
    parameters = [p for module in expected.values() for p in module.parameters() if p.requires_grad]
    optimizer = plain(parameters)
    for batch in torch.tensor(oracle.sample_order(0, 1, 0, 24)).split(8):
        value = expected["tail"](expected["body"](expected["head"](case.data["a"]["x"][batch])))
        expected["loss"](value, case.data["a"]["y"][batch]).backward()
        assert nn.utils.clip_grad_norm_(parameters, 0.05) > 0.05
        optimizer.step()
        optimizer.zero_grad()
    assert replica_far(case.cut(), "a", expected) < 1e-12


def replace_frozen(stage: Stage | Loss, frozen: bool) -> Stage | Loss:
    if stage.name != "body":
        return stage
    return Stage("body", at=stage.at, inputs=stage.inputs, output=stage.output, frozen=frozen)


# --- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.provokes("E531")
def test_an_exchange_may_not_send_more_than_the_plan_says():
    plan = replicas()
    stages = [
        Stage(s.name, at=s.at, inputs=s.inputs, output=s.output, state_limit=5_000 if s.name == "head" else 2**20)
        if not isinstance(s, Loss)
        else s
        for s in plan.stages
    ]
    case = Case.of(Plan(stages, training=plan.training), COUNTS)
    with pytest.raises(ContractError) as caught:
        case.cut()
    assert caught.value.code == "E531"
    assert "stage head" in caught.value.where
    assert "state_limit" in caught.value.remedy
