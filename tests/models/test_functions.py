"""A user's own `torch.autograd.Function` in a forward that is cut: its own backward is what trains."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from cutlayer.errors import StageError
from cutlayer.models.cut import compose, cut

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


class Reversed(Function):
    """The identity, as it is: nothing inside could be recorded. Its gradient changes sign and size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * grad, None


class Rounded(Function):
    """Straight through: rounds, and hands the gradient on."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.round(4 * x) / 4

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Mixed(Function):
    """Two tensors, a weight, an option and None in; two tensors out, one of them of whole numbers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, weight: Tensor, mode: str, nothing: None) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        places = x.argsort(dim=1)
        ctx.mark_non_differentiable(places)
        return x @ weight + y, places

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return grad @ weight.t() * (x > 0), None, 2 * x.t() @ grad, None, None


class Written(Function):
    """Writes in place, and says so."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * grad


class Called(Function):
    """Calls what it is given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
        return call(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


rounded = Rounded.apply  # under a name of its own, as torch's own pages do it


class Net(nn.Module):
    def __init__(self, body: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.three = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.randn(6, 6))
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def reversal(self: Net, x: Tensor) -> Tensor:
    return self.three(Reversed.apply(self.two(self.one(x)), 0.5))


def straight(self: Net, x: Tensor) -> Tensor:
    return self.three(rounded(self.two(rounded(self.one(x))).relu()))


def mixed(self: Net, x: Tensor) -> Tensor:
    first = self.one(x)
    out, places = Mixed.apply(self.two(first), first, self.scale, "sum", None)
    return self.three(out) + places


def written(self: Net, x: Tensor) -> Tensor:
    return self.three(Written.apply(self.two(self.one(x)).relu() + 1))


def checkpointed(self: Net, x: Tensor) -> Tensor:
    first = checkpoint(self.one, x, use_reentrant=True)  # of data alone, torch trains nothing inside
    return self.three(checkpoint(lambda y: self.two(y).relu(), first + self.scale[:1], use_reentrant=True))


def gradients(model: nn.Module, run: Callable[[], Tensor]) -> dict[str, Tensor | None]:
    model.zero_grad()
    (run() * torch.arange(24.0).view(4, 6)).sum().backward()
    return {name: value.grad for name, value in model.named_parameters()}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("at", ["one", "two", ["one", "two"]])
@pytest.mark.parametrize("body", [reversal, straight, mixed, written, checkpointed])
def test_its_backward_trains_the_pieces(body: Callable[[Any, Tensor], Tensor], at: str | list[str]):
    model = Net(body)
    made = cut(model, at, example=X[:2])
    assert torch.equal(compose(made, X), model(X))
    wanted, got = (gradients(model, run) for run in (lambda: model(X), lambda: compose(made, X)))
    assert [name for name in wanted if (wanted[name] is None) != (got[name] is None)] == []
    assert all(torch.equal(value, got[name]) for name, value in wanted.items() if value is not None)


def test_without_an_example():
    model = Net(reversal)
    made = cut(model, "two")
    wanted, got = (gradients(model, run) for run in (lambda: model(X), lambda: compose(made, X)))
    assert all(torch.equal(wanted[name], got[name]) for name in ("one.weight", "two.weight", "three.weight"))
    assert torch.autograd.Function.apply.__code__.co_filename == torch.autograd.function.__file__


@pytest.mark.provokes("E313")
def test_one_that_is_given_a_part_of_the_model():
    def whole(self: Net, x: Tensor) -> Tensor:
        return self.three(Called.apply(self.one(x), self.two))

    def closed(self: Net, x: Tensor) -> Tensor:
        return self.three(Called.apply(self.one(x), lambda y: self.two(y)))

    for body in (whole, closed):
        with pytest.raises(StageError, match=r"E313.*Called.apply is given a submodule or a function") as caught:
            cut(Net(body), "one", example=X)
        assert caught.value.remedy.startswith("put the operation into a submodule of its own")
    plain = Net(lambda self, x: self.three(Called.apply(self.one(x), torch.relu)))
    assert cut(plain, "one", example=X).checked


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("old", [True, False])
def test_averages_within_a_checkpoint_move_once(old: bool):
    """PyTorch runs the norm again in the backward, and moves them twice: the one thing that is not as uncut."""

    def body(self: Net, x: Tensor) -> Tensor:
        return self.three(checkpoint(lambda y: self.norm(self.two(y)), self.one(x), use_reentrant=old))

    model = Net(body)
    model.norm = nn.BatchNorm1d(6)
    made = cut(model, "one", example=X)
    wanted = gradients(model, lambda: model(X))
    assert model.norm.num_batches_tracked == 2
    got = gradients(model, lambda: compose(made, X))
    assert model.norm.num_batches_tracked == 3
    assert all(torch.equal(value, got[name]) for name, value in wanted.items() if value is not None)


@pytest.mark.provokes("E313")
def test_checkpoints_of_old_need_an_example():
    with pytest.raises(StageError, match=r"E313.*needs an example; or set use_reentrant=False"):
        cut(Net(checkpointed), "one")


def test_cuts_in_several_threads_and_training_beside_them():
    model, done = Net(reversal), Event()

    def trained(net: Net) -> dict[str, Tensor | None]:
        return gradients(net, lambda: net(X))

    def cuts(net: Net) -> list[dict[str, Tensor | None]]:
        made = [cut(net, "two", example=X[:2]) for _ in range(5)]
        return [gradients(net, lambda one=one: compose(one, X)) for one in made]

    def beside(net: Net) -> list[dict[str, Tensor | None]]:
        found = [trained(net)]
        while not done.is_set():
            found.append(trained(net))
        return found

    wanted = trained(model)
    with ThreadPoolExecutor(3) as threads:
        training = threads.submit(beside, Net(reversal))
        cutting = [threads.submit(cuts, Net(reversal)) for _ in range(2)]
        try:
            got = [one for each in cutting for one in each.result()]
        finally:
            done.set()
        got += training.result()
    assert len(got) > 10
    used = [name for name, value in wanted.items() if value is not None]
    assert all(torch.equal(wanted[name], one[name]) for one in got for name in used)
