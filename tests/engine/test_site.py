"""What one party has: stages with generators of their own, replicas that are copies, bundles that step together."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from cutlayer.core.parts import Loss, Stage, Training
from cutlayer.core.plan import Plan
from cutlayer.engine.site import Parts, Site, stage_seed
from cutlayer.errors import ConfigError, ContractError
from tests.small import C, plain


def plan(frozen: bool = False) -> Plan:
    """A server with a stage of its own and copies of another for two clients."""
    stages = [
        Stage("head", at=["a", "b"], inputs=["data.x"], output=C),
        Stage("body", at=["s", "s"], inputs=["head"], output=C, frozen=frozen),
        Stage("tail", at="s", inputs=["body"], output=C),
        Loss("loss", at="s", inputs=["tail"]),
    ]
    return Plan(stages, training=Training(order="parallel"))


def site(**changes: object) -> Site:
    frozen = bool(changes.pop("frozen", False))
    modules = {"body": nn.Linear(3, 3), "tail": nn.Linear(3, 3), "loss": nn.Identity()}
    return Site(plan(frozen), Parts(**{"party": "s", "modules": modules, "optimizer": plain, "seed": 4, **changes}))


def test_each_generator_has_a_seed_of_its_own():
    """By party, stage and lane: two replicas at one party do not drop the same units. Written down for ever."""
    keys = list(itertools.product((0, 1), ("head", "body"), (0, 1)))
    assert len({stage_seed(*key) for key in keys}) == len(keys)
    assert stage_seed(7, "head", 1) == 39577075498913745
    made = site()
    states = [made.stages[place].generator for place in (("body", 0), ("body", 1), ("tail", 0))]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(states, 2))


def test_replicas_at_one_party_begin_as_copies():
    made = site()
    first, second = (made.stages["body", lane].module for lane in (0, 1))
    assert first is not second
    assert torch.equal(first.weight, second.weight)
    assert set(made.stages) == {("body", 0), ("body", 1), ("tail", 0), ("loss", 0)}


def test_what_steps_together():
    made = site()
    assert {lane: len(bundle.parameters) for lane, bundle in made.bundles.items()} == {0: 2, 1: 2, None: 2}
    assert made.stepping((1,)) == [made.bundles[1], made.bundles[None]]
    assert site(frozen=True).bundles[0].optimizer is None


def test_a_gradient_that_does_not_fit_is_refused():
    made = site()
    for gradients in ({"other": torch.ones(3)}, {"weight": torch.ones(3, 2)}, {"bias": torch.ones(3).double()}):
        with pytest.raises(ContractError) as caught:
            made.set_gradients("body", 1, gradients, "exchange add_gradients of body, from a")
        assert caught.value.code == "E524"
        assert next(iter(gradients)) in caught.value.where
    given = {"bias": torch.ones(3)}
    made.set_gradients("body", 1, given, "here")
    given["bias"].zero_()
    assert made.stages["body", 1].module.bias.grad.sum() == 3
    assert made.stages["body", 0].module.bias.grad is None


def test_a_loss_has_nothing_to_train():
    with pytest.raises(ConfigError) as caught:
        site(modules={"body": nn.Linear(3, 3), "tail": nn.Linear(3, 3), "loss": nn.Linear(3, 1)})
    assert caught.value.code == "E223"
    assert "'loss' has parameters to train" in str(caught.value)


def test_an_unfinished_step_is_forgotten():
    made = site()
    made.set_gradients("body", 0, {"bias": torch.ones(3)}, "here")
    made.clear()
    assert made.stages["body", 0].module.bias.grad is None
