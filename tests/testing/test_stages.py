"""The check of stages: a module stage passes, and stages with one fault each do not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from cutlayer.core.spec import TensorSpec
from cutlayer.engine.stage import ModuleStage
from cutlayer.testing import check_stage

PORTS = {"": TensorSpec.parse("float32[batch, 3]")}


def maker(kind: type[ModuleStage] = ModuleStage) -> Callable[[], ModuleStage]:
    def make() -> ModuleStage:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
        return kind("body", module, ports=PORTS, seed=4, device=torch.device("cpu"))

    return make


def test_a_module_stage_keeps_to_it():
    check_stage(maker(), ["float32[batch, 5]"], "float32[batch, 3]")


class Attached(ModuleStage):
    def forward(self, inputs, context):
        return tuple(output.requires_grad_() for output in super().forward(inputs, context))


class Forgetful(ModuleStage):
    """Keeps one forward only."""

    def forward(self, inputs, context):
        self.forget()
        return super().forward(inputs, context)


class Dicing(ModuleStage):
    """Draws from torch's own generator."""

    def forward(self, inputs, context):
        (output,) = super().forward(inputs, context)
        return (output + torch.rand(()) * 0,) if context.training else (output + torch.rand(()),)


class Silent(ModuleStage):
    """Gives no gradient back."""

    def backward(self, gradients, context_key):
        super().backward(gradients, context_key)
        return [None]


class Greedy(ModuleStage):
    def forward(self, inputs, context):
        found = super().forward(inputs, context)
        inputs[0].zero_()
        return found


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Attached, "without a graph behind it"),
        (Dicing, "evaluation to give the same twice"),
        (Silent, "a gradient for each input that wants one"),
        (Greedy, "inputs not to be changed"),
    ],
)
def test_a_wrong_stage_is_named(kind: type[ModuleStage], words: str):
    with pytest.raises(AssertionError, match=words):
        check_stage(maker(kind), ["float32[batch, 5]"], "float32[batch, 3]")


def test_a_stage_that_keeps_one_forward_only_fails():
    with pytest.raises(Exception, match="no forward to go back from"):
        check_stage(maker(Forgetful), ["float32[batch, 5]"], "float32[batch, 3]")


def test_what_is_no_stage_is_named():
    with pytest.raises(AssertionError, match="StageProtocol"):
        check_stage(lambda: nn.Linear(5, 3), ["float32[batch, 5]"], "float32[batch, 3]")  # type: ignore[arg-type,return-value]
