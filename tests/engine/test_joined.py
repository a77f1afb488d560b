"""A loss and the stage before it at one party are one graph of autograd, where that changes no bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from cutlayer.core.parts import Loss, Stage, Training
from cutlayer.core.plan import Plan
from cutlayer.core.spec import TensorSpec
from cutlayer.engine import stage as stages
from cutlayer.errors import CutlayerError, StageError
from tests.small import Case, difference, float32, modules_for

CPU, KEY = torch.device("cpu"), (0, 0)
SPEC = TensorSpec.parse("float32[batch, 3]")


def context(*wanted: bool, after: stages.ModuleStage | None = None) -> stages.Context:
    return stages.Context(key=KEY, batch=4, training=True, wanted=wanted, after=after)


class Called(nn.Module):
    """Calls a function."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def plan_of(*more: Stage | Loss, loss_at: str = "a", **training: object) -> Plan:
    stages_ = [
        Stage("head", at="a", inputs=["data.x"], output=float32(4)),
        Stage("tail", at="a", inputs=["head"], output=float32(3)),
        Loss("loss", at=loss_at, inputs=["tail", "data.y"]),
        *more,
    ]
    return Plan(stages_, training=Training(**{"batch_size": 8, "microbatches": 2, **training}))


def runs_of_autograd(case: Case, monkeypatch: pytest.MonkeyPatch) -> int:
    calls = []
    known = stages.go_back
    monkeypatch.setattr(stages, "go_back", lambda *given: (calls.append(1), known(*given))[1])
    assert difference(case.cut(), case.uncut()) == 0.0
    return len(calls)


def test_one_run_of_autograd_goes_through_the_loss_and_the_stage_before_it(monkeypatch):
    """Batches of 8, 8 and 6 in halves: two shapes, 4 and 3, whose FLOPs are counted alone first."""
    microbatches = 6
    assert runs_of_autograd(Case.of(plan_of()), monkeypatch) == 3 * microbatches - (microbatches - 2)


@pytest.mark.parametrize(
    "more",
    [
        (Loss("second", at="a", inputs=["tail", "data.y"]),),
        (Stage("side", at="a", inputs=["tail"], output=float32(3)), Loss("second", at="a", inputs=["side", "data.y"])),
    ],
    ids=["a second loss", "a second stage"],
)
def test_an_output_that_others_take_too_is_a_graph_of_its_own(more, monkeypatch):
    """The side has one consumer, its loss, and is joined with it."""
    alone = 3 + len(more)
    joined = len(more) - 1
    assert runs_of_autograd(Case.of(plan_of(*more)), monkeypatch) == alone * 6 - joined * 4


def test_a_loss_that_stops_giving_gradients_is_an_error_in_a_later_step_too():
    calls = []

    def loss(output, label):
        calls.append(1)
        value = nn.functional.cross_entropy(output, label)
        return value if len(calls) < 4 else value.detach()

    case = Case.of(plan_of(), modules={**modules_for(plan_of()), "loss": Called(loss)})
    with pytest.raises(CutlayerError, match="gives no gradient") as caught:
        case.cut()
    assert caught.value.code == "E340"
    assert len(calls) == 4


def test_a_loss_may_change_its_prediction_in_place():
    """As it may where it is a graph of its own."""

    def loss(output, label):
        return nn.functional.cross_entropy(output.mul_(2.0), label)

    torch.manual_seed(0)
    head, tail = nn.Linear(5, 4), nn.Linear(4, 3)
    whole = copy.deepcopy(nn.Sequential(head, tail))
    batches = [(torch.randn(4, 5), torch.randint(0, 3, (4,))) for _ in range(3)]
    made = stages.ModuleStage("tail", tail, ports={"": TensorSpec.parse("float32[batch, 3]")}, seed=1, device=CPU)
    scored = stages.ModuleStage("loss", Called(loss), ports=None, seed=1, device=CPU)
    for x, y in batches:
        value = head(x)
        (output,) = made.forward([value.detach()], stages.Context(key=KEY, batch=4, training=True, wanted=(True,)))
        given = stages.Context(key=KEY, batch=4, training=True, wanted=(True, False), after=made)
        scored.forward([output, y], given)
        seed, _ = scored.backward(1.0, KEY)
        (gradient,) = made.backward([seed], KEY)
        value.backward(gradient)
        loss(whole(x), y).backward()
    for own, other in zip([*head.parameters(), *tail.parameters()], whole.parameters(), strict=True):
        assert torch.equal(own.grad, other.grad)


def work_of(loss, *, joined: bool) -> list[int]:
    """FLOPs of each backward, over sequences of two lengths whose outputs have one shape."""
    layer, found = nn.Linear(5, 3), []
    made = stages.ModuleStage("tail", Called(lambda x: layer(x).mean(1)), ports={"": SPEC}, seed=1, device=CPU)
    made.module.layer = layer
    scored = stages.ModuleStage("loss", Called(loss), ports=None, seed=1, device=CPU)
    for length in (2, 7):
        (output,) = made.forward([torch.randn(4, length, 5)], context(True))
        scored.forward([output, torch.zeros(4, dtype=torch.long)], context(True, False, after=made if joined else None))
        seed, _ = scored.backward(1.0, KEY)
        found.append(scored.spent)
        made.backward([seed], KEY)
        found.append(made.spent)
    return found


def test_the_work_of_a_loss_is_not_counted_at_the_stage_before_it():
    weight = torch.randn(3, 3)

    def loss(output, label):
        return nn.functional.cross_entropy(output @ weight, label)

    assert work_of(loss, joined=True) == work_of(loss, joined=False)


@pytest.mark.parametrize("joined", [False, True])
def test_a_write_in_place_to_what_the_stage_before_needs_is_an_error_in_the_first_step(joined):
    """As of the uncut model, where autograd sees it. The gradient would be that of other numbers."""

    def loss(output, label):
        return nn.functional.cross_entropy(output.mul_(2.0), label)

    module = nn.Sequential(nn.Linear(4, 3), nn.Sigmoid())
    made = stages.ModuleStage("tail", module, ports={"": SPEC}, seed=1, device=CPU)
    scored = stages.ModuleStage("loss", Called(loss), ports=None, seed=1, device=CPU)
    (output,) = made.forward([torch.randn(4, 4)], context(True))
    scored.forward([output, torch.zeros(4, dtype=torch.long)], context(True, False, after=made if joined else None))
    seed, _ = scored.backward(1.0, KEY)
    with pytest.raises(StageError, match="modified by an inplace operation") as caught:
        made.backward([seed], KEY)
    assert caught.value.code == "E304"
    assert "let it take x.clone() first" in caught.value.remedy


def test_a_hook_of_the_loss_counts_where_the_stage_before_gives_its_input():
    def loss(output, label):
        output.register_hook(lambda gradient: gradient * 3)
        return nn.functional.cross_entropy(output, label)

    made = stages.ModuleStage("tail", nn.Identity(), ports={"": SPEC}, seed=1, device=CPU)
    scored = stages.ModuleStage("loss", Called(loss), ports=None, seed=1, device=CPU)
    label = torch.zeros(4, dtype=torch.long)
    for _ in range(2):
        value = torch.randn(4, 3, requires_grad=True)
        (output,) = made.forward([value.detach()], context(True))
        scored.forward([output, label], context(True, False, after=made))
        seed, _ = scored.backward(1.0, KEY)
        (found,) = made.backward([seed], KEY)
        (expected,) = torch.autograd.grad(loss(value.clone(), label), value)
        assert torch.equal(found, expected)


class Failing(torch.autograd.Function):
    """Gives what it takes; its backward fails."""

    @staticmethod
    def forward(_context, value):
        return value.clone()

    @staticmethod
    def backward(_context, _gradient):
        raise ValueError("no way back")


def in_second_step(loss, module: nn.Module) -> StageError:
    """Return what a step raises that follows one with a plain loss, so that loss and stage are one graph in it."""
    made = stages.ModuleStage("tail", module, ports={"": SPEC}, seed=1, device=CPU)
    scored = stages.ModuleStage("loss", Called(nn.functional.cross_entropy), ports=None, seed=1, device=CPU)
    for function in (nn.functional.cross_entropy, loss):
        scored.module.function = function
        (output,) = made.forward([torch.randn(4, 4)], context(True))
        given = [output, torch.zeros(4, dtype=torch.long)]
        try:
            scored.forward(given, context(True, False, after=made))
            seed, _ = scored.backward(1.0, KEY)
            made.backward([seed], KEY)
        except StageError as error:
            return error
    raise AssertionError("no error")


def test_a_loss_that_fails_in_its_backward_is_named_though_the_stage_before_runs_it():
    def loss(output, label):
        return nn.functional.cross_entropy(Failing.apply(output), label)

    error = in_second_step(loss, nn.Linear(4, 3))
    assert (error.code, error.where) == ("E307", "stage loss")
    assert "ValueError: no way back" in error.got


def test_a_stage_that_fails_in_its_backward_is_named_though_a_loss_ends_its_graph():
    calls = []

    def module(value):
        calls.append(1)
        return Failing.apply(value) if len(calls) == 2 else value * 1.0

    error = in_second_step(nn.functional.cross_entropy, nn.Sequential(nn.Linear(4, 3), Called(module)))
    assert (error.code, "stage tail" in error.where) == ("E304", True)


def of_views(loss, steps: int) -> Tensor:
    """Return the last step's gradient at a stage that gives one of several views; `loss` is that of the last step."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 6)
    module = nn.Sequential(layer, Called(lambda value: value.split(3, 1)[0]))
    made = stages.ModuleStage("tail", module, ports={"": SPEC}, seed=1, device=CPU)
    scored = stages.ModuleStage("loss", Called(loss), ports=None, seed=1, device=CPU)
    for step in range(1, steps + 1):
        scored.module.function = loss if step == steps else nn.functional.cross_entropy
        layer.zero_grad()
        (output,) = made.forward([torch.randn(4, 4)], context(True))
        scored.forward([output, torch.zeros(4, dtype=torch.long)], context(True, False, after=made))
        seed, _ = scored.backward(1.0, KEY)
        made.backward([seed], KEY)
    return layer.weight.grad


def doubled(output: Tensor, label: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.mul_(2.0), label)


def test_a_write_in_place_to_one_of_several_views_is_an_error_in_the_first_step():
    """As of the uncut model."""
    with pytest.raises(StageError, match="its base has been modified inplace") as caught:
        of_views(doubled, 1)
    assert caught.value.code == "E304"
    assert "let it take x.clone() first" in caught.value.remedy


def test_a_write_in_place_to_one_of_several_views_is_no_error_of_a_later_step():
    """The loss takes no view where both are one graph: it was E307 there."""
    assert torch.equal(of_views(doubled, 2), of_views(lambda output, label: doubled(output.clone(), label), 2))


def test_a_loss_that_writes_in_place_to_one_of_several_views_is_told_what_to_do():
    def loss(output, label):
        output.split(1, 1)[0].mul_(2.0)
        return nn.functional.cross_entropy(output, label)

    error = in_second_step(loss, nn.Linear(4, 3))
    assert error.code == "E307"
    assert "let it take x.clone() first" in error.remedy
