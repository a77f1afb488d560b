"""Parts of a model to which no gradient comes back: their stages are frozen, and the rest trains as uncut."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import cutlayer as cl
from cutlayer.errors import PlanError
from cutlayer.models import reach

X, Y = torch.randn(12, 6, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 3


class Net(nn.Module):
    """A backbone with a norm, whose averages move in train mode, and two layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6))
        self.two, self.out = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.two(self.backbone(x)).relu())


class Extractor(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.backbone(x)
        return self.out(self.two(h).relu())


class Detached(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.two(self.backbone(x).detach()).relu())


class Between(Net):
    """What is under no_grad lies in the middle; nothing of it, nor before it, trains."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.backbone(x)
        with torch.no_grad():
            h = self.two(h)
        return self.out(h[:, :6])


class Beside(Net):
    """The same, but what lies before it trains by another way."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.backbone(x)
        with torch.no_grad():
            g = self.two(h)
        return self.out(g + h)


class Aside(nn.Module):
    """What crosses beside the convolution's output is detached there, but trains through the convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.turn, self.out = nn.BatchNorm1d(4), nn.Conv1d(6, 6, 3, padding=1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x[:, None] * torch.ones(4, 1)) * 2
        return self.out((self.turn(h.transpose(1, 2)).transpose(1, 2).relu() + 0.1 * h.detach()).mean(1))


class Tied(Extractor):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(6, 6)
        self.out.weight = self.backbone[0].weight


class Dropped(nn.Module):
    """A layer that is left out by chance."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x) if self.training and random.random() < 0.5 else self.layer(x)


class Chance(Net):
    def __init__(self) -> None:
        super().__init__()
        self.two = Dropped()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.two(self.backbone(x)))


def decayed(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "at", "labels", "frozen"),
    [
        (Extractor, "backbone", "server", {"head"}),
        (Extractor, "backbone", "client", {"head"}),
        (Extractor, ("backbone.1", "backbone"), "client", {"head", "body"}),
        (Detached, "backbone", "server", {"head"}),
        (Detached, "backbone.1", "client", {"head"}),
        (Between, ("backbone", "two"), "client", {"head", "body"}),
        (Beside, ("backbone", "two"), "client", {"body"}),
        (Aside, "turn", "server", set()),
    ],
)
def test_it_trains_as_uncut(kind: type[nn.Module], at: str | tuple[str, str], labels: str, frozen: set[str]):
    model, loss = kind(), nn.CrossEntropyLoss()
    uncut = copy.deepcopy(model)
    optimizer = decayed(uncut.parameters())
    for _ in range(2):
        for begin in range(0, 12, 4):
            optimizer.zero_grad()
            loss(uncut(X[begin : begin + 4]), Y[begin : begin + 4]).backward()
            optimizer.step()
    made = cl.split(model, at, example=X[:3], labels=labels)
    assert {stage.name for stage in made.plan().stages if getattr(stage, "frozen", False)} == frozen
    loader = DataLoader(TensorDataset(X, Y), batch_size=4)
    got = cl.fit(made, loader, loss=loss, optimizer=decayed, epochs=2, shuffle=False).state_dict()
    assert [name for name, value in uncut.state_dict().items() if not torch.equal(value, got[name])] == []


def test_no_gradient_of_zeros_comes_back_to_what_is_detached_after_the_cut():
    """Such zeros would be added in another order of memory, and change the last bits."""
    made = cl.split(Aside(), "turn", example=X[:3], labels="server")
    (head, body) = made.ports
    assert (head.detached, head.trained, body.detached) == (("mul_1",), True, ())
    assert made.plan().stages[0].detached == ("mul_1",)


@pytest.mark.provokes("E332")
def test_a_weight_that_is_trained_elsewhere_is_not_frozen():
    with pytest.raises(PlanError, match=r"E332.*trains the weight 'out.weight', and another, to which no") as caught:
        cl.split(Tied(), "backbone", example=X[:3])
    assert caught.value.where == "piece 0 (up to 'backbone') and piece 2 (after 'two')"
    assert caught.value.remedy == "cut so that both uses are in one piece, or give each its own weight"


def test_what_is_left_out_by_chance_is_not_frozen():
    for seed in range(6):
        random.seed(seed)
        model = Chance()
        before, seeded = model.backbone[0].weight.detach().clone(), random.getstate()
        made = cl.split(model, "backbone", example=X[:3], labels="server")
        assert random.getstate() == seeded
        assert not any(getattr(stage, "frozen", False) or stage.detached for stage in made.plan().stages)
    cl.fit(made, DataLoader(TensorDataset(X, Y), batch_size=2), loss=nn.CrossEntropyLoss(), optimizer=decayed)
    assert not torch.equal(model.backbone[0].weight, before)


@pytest.mark.provokes("E333")
class Inside(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach()


class Backless(torch.autograd.Function):
    """Gives no gradient, not even one of zeros."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> None:
        return None


class DetachedInside(Net):
    def __init__(self) -> None:
        super().__init__()
        self.inside = Inside()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.two(self.inside(self.backbone(x))).relu())


class DetachedByFunction(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.two(Backless.apply(self.backbone(x))).relu())


class DetachedByWriting(Net):
    """The detached value is not all that the written one is made of."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.backbone(x)
        held = torch.zeros_like(h)
        held.copy_(h)
        return self.out(self.two(held).relu())


@pytest.mark.parametrize(
    ("kind", "runs", "detached"),
    [
        (Net, 1, False),
        (Detached, 1, True),
        (Extractor, 1, False),  # what needs no gradient by itself is not asked for
        (DetachedInside, 10, True),  # it might be by chance: nobody looks into a submodule
        (DetachedByFunction, 10, True),
        (DetachedByWriting, 1, False),
    ],
)
def test_one_run_tells_unless_a_submodule_may_decide(
    kind: type[Net], runs: int, detached: bool, monkeypatch: pytest.MonkeyPatch
):
    count: list[int] = []
    once = reach._once
    monkeypatch.setattr(reach, "_once", lambda *args: count.append(1) or once(*args))
    made = cl.split(kind(), "backbone", example=X[:3], labels="server")
    assert len(count) == runs
    assert bool(made.ports[0].detached) == (detached or kind is Extractor)


def test_what_is_unfrozen_after_the_cut_is_refused():
    model, loader = Net(), DataLoader(TensorDataset(X, Y), batch_size=4)
    model.forward = lambda x: model.out(model.two(model.backbone(x)).relu())
    model.backbone.requires_grad_(False)
    made = cl.split(model, "backbone", example=X[:3], labels="server")
    cl.fit(made, loader, loss=nn.CrossEntropyLoss(), optimizer=decayed)
    before = model.backbone[0].weight.detach().clone()
    model.backbone[0].requires_grad_(True)
    with pytest.raises(PlanError, match=r"E333.*'backbone.0.weight' was frozen.*cut the model again"):
        cl.fit(made, loader, loss=nn.CrossEntropyLoss(), optimizer=decayed)
    again = cl.split(model, "backbone", example=X[:3], labels="server")
    cl.fit(again, loader, loss=nn.CrossEntropyLoss(), optimizer=decayed)
    assert not torch.equal(model.backbone[0].weight, before)


def test_unfreezing_where_gradients_come_anyway_needs_no_new_cut():
    model, loader = Net(), DataLoader(TensorDataset(X, Y), batch_size=4)
    model.forward = lambda x: model.out(model.two(model.backbone(x)).relu())
    model.backbone[0].requires_grad_(False)
    made = cl.split(model, "backbone", example=X[:3], labels="server")
    before = model.backbone[0].weight.detach().clone()
    model.backbone[0].requires_grad_(True)
    cl.fit(made, loader, loss=nn.CrossEntropyLoss(), optimizer=decayed)
    assert not torch.equal(model.backbone[0].weight, before)
