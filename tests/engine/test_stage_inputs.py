"""What a module may do to its inputs and their gradients: cut, it trains to the bits of the uncut model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from types import MethodType

import pytest
import torch
from torch import Tensor, nn

from cutlayer.core.spec import TensorSpec
from cutlayer.engine.stage import Context, ModuleStage
from tests.small import momentum

WIDTH, STEPS = 6, 5
SIZES = (4, 4, 3)  # samples of a step's microbatches


class Doing(nn.Module):
    """Does something to its inputs, given as a function of the module and the inputs; then a linear layer."""

    def __init__(self, do: Callable[..., Tensor]) -> None:
        super().__init__()
        self.do, self.calls, self.kept = do, 0, list[Tensor]()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, *inputs: Tensor) -> Tensor:
        self.calls += 1
        self.seen += 1
        return self.linear(self.do(self, *inputs))


class Loss(nn.Module):
    """A mean of squares, and what is done to it."""

    def __init__(self, do: Callable[[Tensor], object] = lambda _loss: None) -> None:
        super().__init__()
        self.do = do

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        loss = ((output - target) ** 2).mean()
        self.do(loss)
        return loss


def without_graph(value: Tensor) -> Tensor:
    with torch.no_grad():
        return value.clamp_(min=0)


def fifth(change: Callable[[Tensor], object]) -> Callable[[Doing, Tensor], Tensor]:
    def do(module: Doing, value: Tensor) -> Tensor:
        if module.calls == 5:  # inputs of this shape were not changed before
            change(value)
        return value

    return do


def hooked(_module: Doing, value: Tensor) -> Tensor:
    value.register_hook(lambda gradient: gradient * 0.3)
    return value


def hooked_between_changes(_module: Doing, value: Tensor) -> Tensor:
    value.register_hook(lambda gradient: gradient * 0.3)
    value.mul_(3)
    value.register_hook(lambda gradient: gradient.sin())
    return value


def watched(module: Doing, value: Tensor) -> Tensor:
    """Scales by the gradient that an earlier input got."""
    value.retain_grad()
    scale = module.kept.pop(0).grad.abs().sum() if module.kept and module.kept[0].grad is not None else 1
    module.kept.append(value)
    return value * scale


def pre_hooked() -> nn.Module:
    layer = nn.Linear(WIDTH, WIDTH)
    layer.register_forward_pre_hook(lambda _layer, given: given[0].mul_(2))
    return layer


def replaced() -> nn.Module:
    """A layer of PyTorch with a forward of its own, which changes its input at the fifth call."""
    layer = nn.Linear(WIDTH, WIDTH)

    def forward(self: nn.Linear, value: Tensor) -> Tensor:
        self.calls += 1
        return nn.functional.linear(value.relu_() if self.calls == 5 else value, self.weight, self.bias)

    layer.calls, layer.forward = 0, MethodType(forward, layer)
    return layer


class Turning(torch.autograd.Function):
    """Gives back a gradient of other strides than its input's."""

    @staticmethod
    def forward(_context: object, value: Tensor) -> Tensor:
        return value * 2

    @staticmethod
    def backward(_context: object, gradient: Tensor) -> Tensor:
        return gradient.t().contiguous().t()


def layers(*some: nn.Module) -> nn.Module:
    return nn.Sequential(*some, nn.Linear(WIDTH, WIDTH), nn.Tanh())


BODIES: dict[str, Callable[[], nn.Module]] = {
    "nothing is changed": layers,
    "changed at each forward": lambda: layers(nn.ReLU(inplace=True)),
    "a view of it is changed": lambda: layers(nn.Unflatten(1, (2, 3)), nn.Flatten(), nn.ReLU(inplace=True)),
    "dropped at random": lambda: layers(nn.Dropout(0.5, inplace=True)),
    "nothing at all": nn.Identity,
    "no layers": nn.Sequential,
    "changed at the fifth forward": lambda: Doing(fifth(lambda value: value.relu_())),
    "changed in some shapes": lambda: Doing(lambda _module, value: value.mul_(2) if len(value) == 3 else value),
    "changed without a graph": lambda: Doing(lambda _module, value: without_graph(value)),
    "changed without a graph at the fifth": lambda: Doing(fifth(without_graph)),
    "changed as another tensor": lambda: Doing(lambda _module, value: [value.detach().mul_(2), value][1]),
    "a hook on it": lambda: Doing(hooked),
    "hooks on it and changes": lambda: Doing(hooked_between_changes),
    "its gradient is kept": lambda: Doing(watched),
    "a hook before the forward": pre_hooked,
    "another forward": replaced,
    "its gradient is turned": lambda: Doing(lambda _module, value: Turning.apply(value)),
    "its gradient is one number": lambda: Doing(lambda _module, value: value.sum() * torch.ones(len(value), WIDTH)),
}


def parts(body: nn.Module, heads: int = 1) -> tuple[list[nn.Module], nn.Module]:
    torch.manual_seed(4)
    return [nn.Linear(WIDTH, WIDTH) for _ in range(heads)], body


def data() -> Iterable[list[tuple[Tensor, Tensor]]]:
    generator = torch.Generator().manual_seed(9)
    for _ in range(STEPS):
        yield [
            (torch.randn(size, WIDTH, generator=generator), torch.randn(size, WIDTH, generator=generator))
            for size in SIZES
        ]


def scale(micro: int) -> float:
    return SIZES[micro] / sum(SIZES)


def stage_of(module: nn.Module, *, loss: bool = False) -> ModuleStage:
    ports = None if loss else {"": TensorSpec.parse(f"float32[batch, {WIDTH}]")}
    return ModuleStage("body", module, ports=ports, seed=5, device=torch.device("cpu"))


def context(size: int, micro: int, *wanted: bool) -> Context:
    return Context(key=(0, micro), batch=size, training=True, wanted=wanted)


def cut(
    heads: Sequence[nn.Module], body: nn.Module, loss: nn.Module, change: Callable[[int, nn.Module], None]
) -> list[Tensor]:
    """Train stage by stage, all microbatches in flight; return the losses."""
    ends, middle, last, found = [stage_of(head) for head in heads], stage_of(body), stage_of(loss, loss=True), []
    trainer = momentum([p for module in (*heads, body) for p in module.parameters()])
    for step, micros in enumerate(data()):
        change(step, body)
        for micro, (x, y) in enumerate(micros):
            values = [end.forward([x], context(len(x), micro, False))[0] for end in ends]
            output = middle.forward(values, context(len(x), micro, *[True] * len(values)))
            found += last.forward([*output, y], context(len(x), micro, True, False))
        for micro in range(len(micros)):
            gradients = middle.backward(last.backward(scale(micro), (0, micro))[:1], (0, micro))
            for end, gradient in zip(ends, gradients, strict=True):
                end.backward([gradient], (0, micro))
        trainer.step()
        trainer.zero_grad()
    return found


def uncut(
    heads: Sequence[nn.Module], body: nn.Module, loss: nn.Module, change: Callable[[int, nn.Module], None]
) -> list[Tensor]:
    """Train as one graph; return the losses."""
    trainer, found = momentum([p for module in (*heads, body) for p in module.parameters()]), []
    dice = torch.Generator().manual_seed(5).get_state()
    for step, micros in enumerate(data()):
        change(step, body)
        losses = []
        for x, y in micros:
            values = [head(x) for head in heads]
            with torch.random.fork_rng():
                torch.set_rng_state(dice)
                output = body(*values)
                dice = torch.get_rng_state()
            losses.append(loss(output, y))
        for micro, one in enumerate(losses):
            one.backward(torch.full_like(one, scale(micro)))
        trainer.step()
        trainer.zero_grad()
        found += [one.detach() for one in losses]
    return found


def same(
    heads: Sequence[nn.Module],
    body: nn.Module,
    loss: nn.Module | None = None,
    change: Callable[[int, nn.Module], None] = lambda _step, _body: None,
) -> None:
    """Assert that both ways give the same losses, weights and buffers, to the last bit."""
    before = copy.deepcopy(list(heads))
    others = [copy.deepcopy(head) for head in heads], copy.deepcopy(body), loss or Loss()
    for mine, theirs in zip(cut(heads, body, loss or Loss(), change), uncut(*others, change), strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip([*heads, body], [*others[0], others[1]], strict=True):
        own, expected = mine.state_dict(), theirs.state_dict()
        assert all(torch.equal(own[name], expected[name]) for name in own.keys() | expected.keys())
    for mine, first in zip(heads, before, strict=True):
        assert not torch.equal(mine.weight, first.weight), "no gradient came through"


@pytest.mark.parametrize("name", BODIES)
def test_equals_the_uncut_model(name: str):
    heads, body = parts(BODIES[name]())
    same(heads, body)


@pytest.mark.parametrize("changed", [0, 1])
@pytest.mark.parametrize("when", [1, 5])
def test_one_of_several_inputs_may_be_changed(changed: int, when: int):
    def do(module: Doing, *values: Tensor) -> Tensor:
        if module.calls >= when:
            values[changed].relu_()
        return values[0] * 0.5 + values[1]

    heads, body = parts(Doing(do), heads=2)
    same(heads, body)


@pytest.mark.parametrize("step", [1, 3])
def test_a_layer_of_pytorch_may_be_told_to_change_its_input(step: int):
    """It did not in the first steps, so its input was given as it is; what it draws at random stays the same."""

    def change(now: int, body: nn.Module) -> None:
        if now == step:
            body[0].p = 0.5

    heads, body = parts(layers(nn.Dropout(0.0, inplace=True)))
    same(heads, body, change=change)


@pytest.mark.parametrize("place", [0, 1], ids=["of the module", "of its first layer"])
def test_a_hook_may_come_later(place: int):
    def change(now: int, body: nn.Module) -> None:
        if now == 2:
            hooked_one = [body, body[0]][place]
            hooked_one.register_forward_pre_hook(
                lambda _layer, given: given[0].register_hook(lambda gradient: gradient * 0.3) and None
            )

    heads, body = parts(layers())
    same(heads, body, change=change)


CHANGES: dict[str, Callable[[Tensor], object]] = {
    "another": lambda gradient: gradient * 3,
    "in place": lambda gradient: gradient.mul_(3),
    "in place, unseen by autograd": lambda gradient: gradient.data.mul_(3) and None,
    "through numpy": lambda gradient: gradient.numpy().__imul__(3) is None or None,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_hook_on_a_loss_may_change_the_gradient_it_gets(change: Callable[[Tensor], object]):
    """Each microbatch's begins anew."""
    heads, body = parts(layers())
    same(heads, body, Loss(lambda loss: loss.register_hook(change)))


# --- how an input is given -------------------------------------------------------------------------------------------


def run(stage: ModuleStage, size: int = 4) -> Tensor:
    """One forward and backward on ones; return the gradient."""
    output = stage.forward([torch.ones(size, WIDTH)], context(size, 0, True))
    gradient = stage.backward([torch.ones_like(value) for value in output], (0, 0))[0]
    assert gradient is not None
    return gradient


@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_module_may_give_its_input_another_shape(training: bool, wanted: bool):
    """Whoever else takes the value does not see it."""

    class Loss(nn.Module):
        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            target.unsqueeze_(1).requires_grad_()
            return (output - target).mean()

    output, target = torch.ones(4, 1), torch.ones(4)
    key = Context(key=(0, 0), batch=4, training=training, wanted=(True, wanted))
    stage_of(Loss(), loss=True).forward([output, target], key)
    assert target.shape == (4,)
    assert not target.requires_grad


@pytest.mark.parametrize("function", [Turning.apply, lambda value: value.sum().expand(4, WIDTH)])
def test_a_gradient_keeps_its_strides(function: Callable[[Tensor], Tensor]):
    """They are those that it has in the uncut model."""
    seen = []
    value = (torch.ones(4, WIDTH).requires_grad_() * 1).requires_grad_()
    value.register_hook(lambda gradient: seen.append(gradient.stride()))
    function(value).backward(torch.ones(4, WIDTH))

    class Module(nn.Module):
        def forward(self, given: Tensor) -> Tensor:
            return function(given)

    stage = stage_of(Module())
    assert [run(stage).stride() for _ in range(3)] == seen * 3
    assert seen != [(WIDTH, 1)]


@pytest.mark.parametrize("training", [True, False])
def test_one_sample_comes_to_the_module_with_its_strides(training: bool):
    """That of a dimension of one step too: it tells a convolution whether channels are last."""
    seen = []

    class Module(nn.Module):
        def forward(self, given: Tensor) -> Tensor:
            seen.append(given.stride())
            return given.mul_(2).mean((2, 3))

    value = torch.ones(1, 4, 5, WIDTH).permute(0, 3, 1, 2)
    stage = stage_of(Module())
    stage.forward([value], Context(key=(0, 0), batch=1, training=training, wanted=(True,)))
    assert seen == [value.stride()]
    assert value._version == 1
    if training:
        (gradient,) = stage.backward([torch.ones(1, WIDTH)], (0, 0))
        assert gradient is not None
        assert torch.equal(gradient, torch.full_like(value, 2 / 20))
