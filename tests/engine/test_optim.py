"""The state of a stage: what it holds, and that a state which does not fit changes nothing."""

from __future__ import annotations

import copy
from typing import Any

import msgspec
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as rates

from cutlayer.core.spec import TensorSpec
from cutlayer.engine.optim import Bundle, load_stage_state, squared_norm, stage_state
from cutlayer.engine.stage import Context, ModuleStage
from cutlayer.errors import ConfigError, ContractError
from tests.small import Block, adam, far

SPEC = TensorSpec.parse("float32[batch, 3]")


def trained(seed: int, optimizer=adam, scheduler=None) -> tuple[ModuleStage, Bundle]:
    """A stage after two steps."""
    torch.manual_seed(seed)
    stage = ModuleStage(
        "head", Block([5], 3, norm=True, drop=0.2), ports={"": SPEC}, seed=seed, device=torch.device("cpu")
    )
    bundle = Bundle({"head": stage}, optimizer, scheduler)
    for _ in range(2):
        advance(stage, bundle)
    return stage, bundle


def advance(stage: ModuleStage, bundle: Bundle) -> None:
    stage.forward([torch.ones(4, 5).cumsum(0)], Context(key=(0, 0), batch=4, training=True, wanted=(False,)))
    stage.backward([torch.ones(4, 3)], (0, 0))
    bundle.step(each_step=True)


def state_far(mine: dict, other: dict) -> float:
    assert mine.keys() == other.keys()
    return max(far(mine[name], other[name]) for name in mine)


def copied(state: dict) -> dict:
    return {name: tensor.clone() for name, tensor in state.items()}


def test_a_state_holds_everything_that_a_step_changes():
    stage, bundle = trained(1)
    before = copied(stage_state(stage, bundle))
    assert {name[:2] for name in before} == {"p.", "b.", "o.", "g.", "m"}
    advance(stage, bundle)
    after = stage_state(stage, bundle)
    same = {name for name in before if far(before[name], after[name]) == 0.0}
    assert same == {"m"}  # the numbers of the optimizer: no scheduler changes them


@pytest.mark.parametrize("scheduler", [None, lambda o: rates.CyclicLR(o, 1e-3, 1e-1, cycle_momentum=False)])
def test_a_stage_that_takes_over_a_state_goes_on_like_the_other(scheduler):
    stage, bundle = trained(1, scheduler=scheduler)
    other, others = trained(2, scheduler=scheduler)
    assert state_far(stage_state(stage, bundle), stage_state(other, others)) > 0.0
    load_stage_state(other, others, copied(stage_state(stage, bundle)), "here")
    assert state_far(stage_state(stage, bundle), stage_state(other, others)) == 0.0
    for _ in range(3):
        advance(stage, bundle)
        advance(other, others)
    assert state_far(stage_state(stage, bundle), stage_state(other, others)) == 0.0


def numbers(**changes: object) -> torch.Tensor:
    whole = {"optimizer": {}, "groups": [{}], "scheduler": None, **changes}
    return torch.frombuffer(bytearray(msgspec.msgpack.encode(whole)), dtype=torch.uint8)


BAD = {
    "a parameter is missing": lambda s: s.pop("p.linear.weight"),
    "a parameter too many": lambda s: s.update({"p.more": torch.ones(1)}),
    "another shape": lambda s: s.update({"p.linear.weight": torch.ones(5, 3)}),
    "another dtype": lambda s: s.update({"p.linear.bias": torch.ones(3, dtype=torch.float64)}),
    "a buffer is missing": lambda s: s.pop("b.norm.running_mean"),
    "a buffer of another dtype": lambda s: s.update({"b.norm.num_batches_tracked": torch.tensor(1.0)}),
    "a slot larger than its parameter": lambda s: s.update({"o.linear.bias.exp_avg": torch.ones(4)}),
    "a slot of no parameter": lambda s: s.update({"o.linear.other.exp_avg": torch.ones(1)}),
    "no generator": lambda s: s.pop("g.cpu"),
    "a generator of another size": lambda s: s.update({"g.cpu": s["g.cpu"][:-1]}),
    "a generator of another dtype": lambda s: s.update({"g.cpu": s["g.cpu"].to(torch.int16)}),
    "no numbers": lambda s: s.pop("m"),
    "numbers that are none": lambda s: s.update({"m": torch.tensor([193], dtype=torch.uint8)}),
    "numbers of another dtype": lambda s: s.update({"m": s["m"].to(torch.int16)}),
    "too many numbers": lambda s: s.update({"m": torch.zeros(70_000, dtype=torch.uint8)}),
    "numbers of another kind": lambda s: s.update({"m": numbers(groups={"lr": 1.0})}),
    "numbers without a name": lambda s: s.update({"m": numbers(more=1)}),
    "other parameter groups": lambda s: s.update({"m": numbers(groups=[{}, {}])}),
}


@pytest.mark.parametrize("spoil", BAD.values(), ids=BAD)
def test_a_state_that_does_not_fit_changes_nothing(spoil):
    stage, bundle = trained(1)
    other, others = trained(2)
    state, before = copied(stage_state(stage, bundle)), copied(stage_state(other, others))
    spoil(state)
    with pytest.raises(ContractError) as caught:
        load_stage_state(other, others, state, "exchange hand_on of head, from a")
    assert caught.value.code == "E524"
    assert "from a" in caught.value.where
    assert state_far(before, stage_state(other, others)) == 0.0


def test_a_state_cannot_put_new_attributes_into_a_scheduler():
    stage, bundle = trained(1, scheduler=lambda o: rates.StepLR(o, 1))
    state = copied(stage_state(stage, bundle))
    state["m"] = numbers(scheduler={"step": 1, "last_epoch": 7, "__class__": "x"})
    load_stage_state(stage, bundle, state, "here")
    assert bundle.scheduler.last_epoch == 7
    assert callable(bundle.scheduler.step)


def test_an_optimizer_whose_state_is_no_tensors_is_refused():
    class Odd(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.state[parameter]["history"] = {1, 2}

    stage, bundle = trained(1, optimizer=lambda p: Odd(p, lr=0.1))
    with pytest.raises(ConfigError) as caught:
        stage_state(stage, bundle)
    assert caught.value.code == "E221"
    assert "Odd" in caught.value.what


def test_a_stage_of_another_optimizer_forgets_what_it_had():
    """Adam's averages do not survive in a stage that takes over a state of plain SGD."""
    stage, bundle = trained(1, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    other, others = trained(2)
    assert others.optimizer.state
    load_stage_state(other, others, copied(stage_state(stage, bundle)), "here")
    assert not any(others.optimizer.state.values())


@pytest.mark.provokes("E221")
def test_parameters_need_an_optimizer():
    stage = ModuleStage("head", nn.Linear(2, 2), ports=None, seed=0, device=torch.device("cpu"))
    with pytest.raises(ConfigError) as caught:
        Bundle({"head": stage}, None, None)
    assert caught.value.code == "E221"
    assert "head" in caught.value.where
    frozen = copy.deepcopy(stage)
    frozen.module.requires_grad_(False)
    assert Bundle({"head": frozen}, None, None).optimizer is None


class Twice(torch.optim.SGD):
    """Computes the loss again after a first step, as sharpness-aware ones do."""

    def step(self, again):
        with torch.enable_grad():
            loss = again()
        super().step()
        return loss


@pytest.mark.provokes("E221")
@pytest.mark.parametrize("make", [torch.optim.LBFGS, Twice])
def test_an_optimizer_whose_step_needs_a_closure_is_refused(make: Any):
    stage = ModuleStage("head", nn.Linear(2, 2), ports=None, seed=0, device=torch.device("cpu"))
    words = rf"E221.*{make.__name__} runs the whole network again.*stages head.*without a closure.*SGD or Adam"
    with pytest.raises(ConfigError, match=words):
        Bundle({"head": stage}, make, None)


@pytest.mark.provokes("E221")
@pytest.mark.parametrize("given", [None, torch.optim.SGD])
def test_a_function_that_gives_no_optimizer_is_refused(given: Any):
    stage = ModuleStage("head", nn.Linear(2, 2), ports=None, seed=0, device=torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"E221.*gives none.*stages head.*got (NoneType|type).*return it: lambda"):
        Bundle({"head": stage}, lambda _: given, None)


@pytest.mark.provokes("E221")
def test_an_optimizer_over_other_parameters_only_is_refused():
    """It would train nothing, and nobody would see it: the loss of a small step hardly moves."""
    stage = ModuleStage("head", nn.Linear(2, 2), ports=None, seed=0, device=torch.device("cpu"))
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(
        ConfigError, match=r"E221.*holds none of the parameters.*stages head.*take the argument: lambda"
    ):
        Bundle({"head": stage}, lambda _: other, None)
    some = torch.optim.SGD([stage.module.bias, nn.Parameter(torch.zeros(1))], lr=0.1)  # with one of the user's own
    assert Bundle({"head": stage}, lambda _: some, None).optimizer is some


@pytest.mark.provokes("E221")
@pytest.mark.parametrize(("make", "sparse"), [(torch.optim.Adam, True), (torch.optim.SparseAdam, False)])
def test_an_optimizer_that_does_not_take_the_gradients_is_told(make: Any, sparse: bool):
    table = nn.Embedding(4, 2, sparse=sparse)
    stage = ModuleStage("head", table, ports=None, seed=0, device=torch.device("cpu"))
    bundle = Bundle({"head": stage}, make, None)
    table(torch.tensor([1, 2])).sum().backward()
    words = (
        rf"E221.*{make.__name__} does not take these.*stages head.*does not support.*SGD or Adagrad, or leave sparse"
    )
    with pytest.raises(ConfigError, match=words):
        bundle.step(False)


def test_an_optimizer_that_has_a_scheduler_already_is_taken():
    """Schedulers wrap the optimizer's own `step`, whose signature then says `self`."""

    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        made = torch.optim.SGD(parameters, lr=0.1)
        torch.optim.lr_scheduler.StepLR(made, 1)
        return made

    stage = ModuleStage("head", nn.Linear(2, 2), ports=None, seed=0, device=torch.device("cpu"))
    assert isinstance(Bundle({"head": stage}, make, None).optimizer, torch.optim.SGD)


def test_a_shared_parameter_is_stepped_once():
    layer = nn.Linear(2, 2, bias=False)
    stages = {
        name: ModuleStage(name, layer, ports=None, seed=0, device=torch.device("cpu")) for name in ("first", "second")
    }
    assert len(Bundle(stages, adam, None).parameters) == 1


def test_squares_are_added_in_float64():
    """1e4 squared and 1 squared: float32 would lose the second."""
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(3)]
    for parameter, value in zip(parameters, (1e4, 1.0, None), strict=True):
        parameter.grad = None if value is None else torch.tensor([value])
    assert squared_norm(parameters) == 1e8 + 1.0


class Counting(torch.optim.SGD):
    """Notes that its own `zero_grad` is called."""

    cleared = 0

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.cleared += 1
        super().zero_grad(set_to_none)


@pytest.mark.parametrize("own", ["class", "object", "none"])
def test_gradients_are_dropped_as_the_optimizer_does_it(own: str):
    """After each step, those of all groups; what somebody has put in the place of `zero_grad` is called."""
    calls = []

    def made(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        groups = [{"params": parameters[:1]}, {"params": parameters[1:]}]
        optimizer = (Counting if own == "class" else torch.optim.SGD)(groups, lr=0.1)
        if own == "object":
            before = optimizer.zero_grad
            optimizer.zero_grad = lambda set_to_none=True: (calls.append(set_to_none), before(set_to_none))
        return optimizer

    stage, bundle = trained(1, made)
    assert [parameter.grad for parameter in stage.parameters()] == [None] * 4
    assert getattr(bundle.optimizer, "cleared", len(calls)) == (0 if own == "none" else 2)
    stage.parameters()[3].grad = torch.ones_like(stage.parameters()[3])
    bundle.drop_gradients()
    assert stage.parameters()[3].grad is None
