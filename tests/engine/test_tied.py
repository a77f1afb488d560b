"""Shared weights: gradients are added in the order of the uncut backward, use by use."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from cutlayer.core.spec import TensorSpec
from cutlayer.engine.stage import Context, ModuleStage
from cutlayer.engine.tied import ties

WIDTH, ROWS = 7, 5
CPU = torch.device("cpu")


class Uses(nn.Module):
    """Uses one weight several times, as an embedding of encoder and decoder is used."""

    def __init__(self, linear: nn.Linear, times: int) -> None:
        super().__init__()
        self.linear, self.times = linear, times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = torch.tanh(self.linear(x))
        return x


def chain(times: tuple[int, ...]) -> tuple[nn.Linear, list[ModuleStage]]:
    """Return a weight, and stages in a row that use it so many times each."""
    torch.manual_seed(0)
    linear = nn.Linear(WIDTH, WIDTH)
    ports = {"": TensorSpec.parse(f"float32[batch, {WIDTH}]")}
    stages = [
        ModuleStage(f"s{place}", Uses(linear, count), ports=ports, seed=0, device=CPU)
        for place, count in enumerate(times)
    ]
    for name, tied in ties({stage.name: stage.parameters() for stage in stages}).items():
        stages[int(name[1:])].tied = tied
    return linear, stages


def batches(count: int) -> list[Tensor]:
    return list(torch.randn(count, ROWS, WIDTH, generator=torch.Generator().manual_seed(1)))


def run(stages: list[ModuleStage], batch: Tensor, micro: int) -> None:
    for stage in stages:
        context = Context(key=(0, micro), batch=ROWS, training=True, wanted=(stage is not stages[0],))
        (batch,) = stage.forward([batch], context)


def back(stages: list[ModuleStage], gradient: Tensor, micro: int) -> None:
    given: list[Tensor | None] = [gradient]
    for stage in reversed(stages):
        given = list(stage.backward(given, (0, micro)))


@pytest.mark.parametrize("times", [(2, 1), (1, 1), (3, 2, 2), (1, 0, 2)], ids=str)
@pytest.mark.parametrize("ahead", [False, True], ids=["one after another", "all forwards first"])
def test_gradients_are_those_of_one_backward_to_the_bit(times: tuple[int, ...], ahead: bool):
    """Of a microbatch after another, too: each is summed up before it is added."""
    linear, stages = chain(times)
    plain = copy.deepcopy(linear)
    for batch in batches(3):
        Uses(plain, sum(times))(batch).backward(torch.ones(ROWS, WIDTH))
    for micro, batch in enumerate(batches(3)):
        run(stages, batch, micro)
        if not ahead:
            back(stages, torch.ones(ROWS, WIDTH), micro)
    for micro in range(3) if ahead else ():
        back(stages, torch.ones(ROWS, WIDTH), micro)
    assert torch.equal(linear.weight.grad, plain.weight.grad)
    assert torch.equal(linear.bias.grad, plain.bias.grad)


def test_a_hook_sees_each_part_of_the_gradient_once():
    linear, stages = chain((2, 1))
    plain = copy.deepcopy(linear)
    linear.weight.register_hook(lambda gradient: gradient / 2)
    (batch,) = batches(1)
    Uses(plain, 3)(batch).backward(torch.ones(ROWS, WIDTH))
    run(stages, batch, 0)
    back(stages, torch.ones(ROWS, WIDTH), 0)
    torch.testing.assert_close(linear.weight.grad, plain.weight.grad / 2)
    assert torch.equal(linear.bias.grad, plain.bias.grad)


def test_a_stage_that_gives_no_gradient_keeps_that_of_the_later_ones():
    """As one whose output its consumers detach."""
    linear, stages = chain((1, 1))
    (batch,) = batches(1)
    run(stages, batch, 0)
    plain = copy.deepcopy(linear)
    Uses(plain, 1)(stages[0].module(batch).detach()).backward(torch.ones(ROWS, WIDTH))
    stages[1].backward([torch.ones(ROWS, WIDTH)], (0, 0))
    assert linear.weight.grad is None
    stages[0].backward([None], (0, 0))
    assert torch.equal(linear.weight.grad, plain.weight.grad)


def test_a_roll_back_drops_what_is_kept_aside():
    linear, stages = chain((1, 1))
    (batch,) = batches(1)
    run(stages, batch, 0)
    stages[1].backward([torch.ones(ROWS, WIDTH)], (0, 0))
    for stage in stages:
        stage.forget()
    run(stages, batch, 0)
    back(stages, torch.ones(ROWS, WIDTH), 0)
    once = linear.weight.grad.clone()
    linear.weight.grad = None
    run(stages, batch, 0)
    back(stages, torch.ones(ROWS, WIDTH), 0)
    assert torch.equal(linear.weight.grad, once)


def test_stages_that_share_nothing_go_back_as_before():
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    assert ties({"one": list(one.parameters()), "other": [*other.parameters(), *other.parameters()]}) == {}
