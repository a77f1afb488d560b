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


class Tripled(ModuleStage):
    """Gives back what is -3 times the gradient."""

    def backward(self, gradients, context_key):
        return [None if g is None else -3 * g for g in super().backward(gradients, context_key)]


class Skewed(ModuleStage):
    """Gives back a gradient that is five percent too large."""

    def backward(self, gradients, context_key):
        return [None if g is None else 1.05 * g for g in super().backward(gradients, context_key)]


class Partial(ModuleStage):
    """Gives back the gradient of one feature too few."""

    def backward(self, gradients, context_key):
        (found,) = super().backward(gradients, context_key)
        found[:, 0] = 0
        return [found]


class Heavy(ModuleStage):
    """Doubles the gradient of its parameters."""

    def backward(self, gradients, context_key):
        found = super().backward(gradients, context_key)
        for parameter in self.module.parameters():
            parameter.grad *= 2
        return found


class Foreign(ModuleStage):
    """Computes otherwise than its module, which so tells nothing of its slopes; gives back -3 times the gradient."""

    def forward(self, inputs, context):
        (output,) = super().forward(inputs, context)
        return (2 * output,)

    def backward(self, gradients, context_key):
        return [-6 * g for g in super().backward(gradients, context_key)]


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
        (Tripled, "the gradient of input 0 to be that of its module by autograd; or, .* a reference=MODULE"),
        (Skewed, "the gradient of input 0 to be that of its module"),
        (Partial, "the gradient of input 0 to be that of its module"),
        (Heavy, "the gradient of parameter 0.weight to be that of its module"),
        (Foreign, "the gradient of input 0 to be the slope of the output"),
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


class Own(torch.autograd.Function):
    """x * x * w, with a backward of its own; `wrong` is what it multiplies the gradient of x with."""

    @staticmethod
    def forward(ctx, value, weight, wrong):
        ctx.save_for_backward(value, weight)
        ctx.wrong = wrong
        return value * value * weight

    @staticmethod
    def backward(ctx, gradient):
        value, weight = ctx.saved_tensors
        return ctx.wrong * 2 * gradient * value * weight, (gradient * value * value).sum(0), None


class Squared(nn.Module):
    """The product of `Own` after a linear layer."""

    def __init__(self, wrong: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.weight, self.wrong = nn.Linear(5, 3), nn.Parameter(torch.randn(3)), wrong

    def forward(self, x):
        return Own.apply(self.first(x), self.weight, self.wrong)


@pytest.mark.parametrize("kind", [ModuleStage, Foreign])
@pytest.mark.parametrize("wrong", [1.0, -3.0, 2.0, 0.0])
def test_a_wrong_backward_of_ones_own_within_a_module_is_refused(wrong: float, kind: type[ModuleStage]):
    def make() -> ModuleStage:
        return kind("body", Squared(wrong), ports=PORTS, seed=4, device=torch.device("cpu"))

    specs = ["float32[batch, 5]"], "float32[batch, 3]"
    if wrong == 1.0 and kind is ModuleStage:
        check_stage(make, *specs)
        return
    with pytest.raises(AssertionError, match="the gradient of input 0 to be the slope of the output"):
        check_stage(make, *specs)


class Twofold(ModuleStage):
    """Computes otherwise than its module, rightly: its slopes can be had by its own forwards only."""

    def forward(self, inputs, context):
        (output,) = super().forward(inputs, context)
        return (2 * output,)

    def backward(self, gradients, context_key):
        return super().backward([2 * g for g in gradients], context_key)


class Straight(torch.autograd.Function):
    """Rounds; its gradient passes as if it did not."""

    @staticmethod
    def forward(ctx, value):
        return value.round()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Rounding(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(5, 8, dtype=dtype), nn.Linear(8, 3, dtype=dtype)

    def forward(self, x):
        return self.last(Straight.apply(4 * torch.relu(self.first(x))))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_reference_takes_the_place_of_differences(dtype: str):
    exact = getattr(torch, dtype)
    ports = {"": TensorSpec.parse(f"{dtype}[batch, 3]")}

    def make(kind: type[ModuleStage] = ModuleStage) -> ModuleStage:
        return kind("body", Rounding(exact), ports=ports, seed=4, device=torch.device("cpu"))

    specs = [f"{dtype}[batch, 5]"], f"{dtype}[batch, 3]"
    check_stage(make, *specs, reference=Rounding(exact))
    with pytest.raises(AssertionError, match="the gradient of input 0 to be that of the reference"):
        check_stage(lambda: make(Tripled), *specs, reference=Rounding(exact))
    with pytest.raises(AssertionError, match=r"the gradient of parameter first\.weight to be that of the reference"):
        check_stage(lambda: make(Heavy), *specs, reference=Rounding(exact))
    with pytest.raises(AssertionError, match="the output to be that of the reference"):
        check_stage(make, *specs, reference=nn.Linear(5, 3, dtype=exact))
    with pytest.raises(AssertionError, match="by differences; or, if it is meant to be another, a reference=MODULE"):
        check_stage(make, *specs)


def test_half_precision_whose_module_does_not_tell_needs_a_reference():
    def make() -> ModuleStage:
        torch.manual_seed(0)
        module = nn.Linear(5, 3, dtype=torch.bfloat16)
        ports = {"": TensorSpec.parse("bfloat16[batch, 3]")}
        return Twofold("body", module, ports=ports, seed=4, device=torch.device("cpu"))

    with pytest.raises(AssertionError, match="a reference=MODULE to compare with: in half precision"):
        check_stage(make, ["bfloat16[batch, 5]"], "bfloat16[batch, 3]")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("inner", [False, True])
def test_a_wrong_gradient_in_half_precision_is_refused(dtype: str, inner: bool):
    """Too noisy for slopes: the stage is compared with its module by autograd, and that in float64 with the slopes."""
    specs = [f"{dtype}[batch, 5]"], f"{dtype}[batch, 3]"

    def make() -> ModuleStage:
        module = Squared(2.0 if inner else 1.0).to(getattr(torch, dtype))
        kind, ports = ModuleStage if inner else Skewed, {"": TensorSpec.parse(specs[1])}
        return kind("body", module, ports=ports, seed=4, device=torch.device("cpu"))

    words = "the gradient of input 0 to be " + ("the slope" if inner else "that of its module by autograd")
    with pytest.raises(AssertionError, match=words):
        check_stage(make, *specs)


BENDS = [nn.ReLU, nn.Tanh, nn.GELU, lambda: nn.LayerNorm(40), lambda: nn.Dropout(0.3)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", ["float32", "float64", "bfloat16", "autocast", "own forwards"])
def test_right_gradients_of_many_kinds_pass(seed: int, kind: str):
    name = kind if kind in ("float64", "bfloat16") else "float32"
    dtype, autocast = getattr(torch, name), "bfloat16" if kind == "autocast" else ""
    out = "bfloat16" if autocast else name
    chosen = Twofold if kind == "own forwards" else ModuleStage

    def make() -> ModuleStage:
        torch.manual_seed(seed)
        norm = nn.Identity() if kind == "own forwards" else nn.BatchNorm1d(40)
        module = nn.Sequential(nn.Linear(5, 40), BENDS[seed % 5](), norm, nn.Linear(40, 3)).to(dtype)
        ports = {"": TensorSpec.parse(f"{out}[batch, 3]")}
        return chosen("body", module, ports=ports, seed=4, device=torch.device("cpu"), autocast=autocast)

    check_stage(make, [f"{name}[batch, 5]"], f"{out}[batch, 3]")


class RootMeanSquare(nn.Module):
    """Normalises in single precision, as language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x):
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class Soft(nn.Module):
    def forward(self, x):
        return torch.softmax(x, -1, dtype=torch.float32).to(x.dtype)


class Stopped(nn.Module):
    """No gradient goes through its gate."""

    def forward(self, x):
        return x * x.detach()


def convolutions() -> nn.Module:
    layers = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    for _ in range(3):
        layers += [nn.Conv2d(16, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))


ORDINARY = {
    "RMSNorm": (lambda: nn.Sequential(nn.Linear(5, 8), RootMeanSquare(), nn.Linear(8, 3)), "float32[batch, 5]"),
    "softmax in float32": (lambda: nn.Sequential(nn.Linear(5, 8), Soft(), nn.Linear(8, 3)), "float32[batch, 5]"),
    "a gate without gradient": (
        lambda: nn.Sequential(nn.Linear(5, 8), Stopped(), nn.Linear(8, 3)),
        "float32[batch, 5]",
    ),
    "convolutions": (convolutions, "float32[batch, 3, 16, 16]"),
    "an embedding": (lambda: nn.Sequential(nn.Embedding(9, 8), nn.Flatten(), nn.Linear(32, 3)), "int64[batch, 4]"),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", list(ORDINARY))
@pytest.mark.parametrize("kind", [ModuleStage, Twofold])
def test_ordinary_modules_pass(seed: int, name: str, kind: type[ModuleStage]):
    module, spec = ORDINARY[name]

    def make() -> ModuleStage:
        torch.manual_seed(seed)
        return kind("body", module(), ports=PORTS, seed=4, device=torch.device("cpu"))

    if name == "a gate without gradient" and kind is Twofold:
        with pytest.raises(
            AssertionError, match="by differences; or, if it is meant to be another, a reference=MODULE"
        ):
            check_stage(make, [spec], "float32[batch, 3]")
    else:
        check_stage(make, [spec], "float32[batch, 3]")


class Product(torch.autograd.Function):
    """x * y * w; multiplies the gradients with `wrong`."""

    @staticmethod
    def forward(ctx, x, y, weight, wrong):
        ctx.save_for_backward(x, y, weight)
        ctx.wrong = wrong
        return x * y * weight

    @staticmethod
    def backward(ctx, gradient):
        x, y, weight = ctx.saved_tensors
        found = gradient * y * weight, gradient * x * weight, (gradient * x * y).sum(0)
        return *(wrong * one for wrong, one in zip(ctx.wrong, found, strict=True)), None


class Gated(nn.Module):
    """The product of two inputs and a weight, between layers that compute in single precision or have kinks."""

    def __init__(self, wrong: tuple[float, float, float]) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 8), RootMeanSquare(), nn.Linear(8, 3)
        self.weight, self.wrong = nn.Parameter(torch.randn(8)), wrong

    def forward(self, x, y):
        return self.last(torch.relu(self.norm(Product.apply(self.first(x), y, self.weight, self.wrong))))


@pytest.mark.parametrize("kind", [ModuleStage, Twofold])
@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ((1.0, 1.0, 1.0), ""),
        ((1.0, 0.0, 1.0), "input 1"),
        ((1.0, 1.5, 1.0), "input 1"),
        ((-1.0, 1.0, 1.0), "input 0"),
        ((1.0, 1.0, 0.0), "parameter weight"),
        ((1.0, 1.0, -3.0), "parameter weight"),
    ],
)
def test_each_wrong_gradient_of_a_function_of_ones_own_is_named(
    wrong: tuple[float, float, float], named: str, kind: type[ModuleStage]
):
    def make() -> ModuleStage:
        torch.manual_seed(0)
        return kind("body", Gated(wrong), ports=PORTS, seed=4, device=torch.device("cpu"))

    specs = ["float32[batch, 5]", "float32[batch, 8]"], "float32[batch, 3]"
    if not named:
        check_stage(make, *specs)
        return
    with pytest.raises(AssertionError, match=f"the gradient of {named} to be the slope of the output"):
        check_stage(make, *specs)
