"""What a cut does to sizes and strides: room for the state of large pieces, and an order in memory that stays."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import cutlayer as cl
from cutlayer.core.parts import STATE_LIMIT
from cutlayer.engine.optim import Bundle, stage_state
from cutlayer.engine.stage import ModuleStage
from cutlayer.engine.tensors import pack


class Words(nn.Module):
    """A table of words at the client, which may be large, a body at the server and a last layer at the client."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(words, width), nn.BatchNorm1d(width)
        self.body, self.out = nn.Linear(width, 4), nn.Linear(4, 2)

    def forward(self, word: Tensor) -> Tensor:
        return self.out(torch.relu(self.body(self.norm(self.table(word)))))


WORDS = torch.arange(5)


def test_two_data_holders_hand_on_a_state_that_is_larger_than_the_usual_limit():
    net = Words(750_000, 8)
    trained = 3 * 4 * net.table.weight.numel()  # the values and Adam's two moments, in float32
    assert trained > STATE_LIMIT
    held = [TensorDataset(WORDS, torch.zeros(5, dtype=torch.int64)) for _ in range(2)]
    run = cl.fit(cl.split(net, ("norm", "body"), example=WORDS), held, loss=nn.CrossEntropyLoss(), batch_size=5)
    assert trained < run.result.plan.stage("head").state_limit < 2 * trained
    assert run.result.plan.stage("tail").state_limit == STATE_LIMIT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, partial(torch.optim.Adam, amsgrad=True)])
def test_the_limit_holds_the_state_and_little_more(dtype, kind, monkeypatch):
    monkeypatch.setattr("cutlayer.models.split.STATE_LIMIT", 1)
    made = cl.split(Words(2_000, 100).to(dtype), ("norm", "body"), example=WORDS)
    limit = made.plan(["a", "b"]).stage("head").state_limit
    stage = ModuleStage("head", made.modules("client")["head"], ports=None, seed=0, device=torch.device("cpu"))
    bundle = Bundle({"head": stage}, lambda parameters: kind(parameters, lr=0.01), None)
    stage.module(WORDS).sum().backward()
    bundle.step(each_step=True)
    size = len(pack(stage_state(stage, bundle)))
    values = sum(p.numel() for p in stage.parameters())
    assert size < limit < 4 * values * max(4, dtype.itemsize) + 1.1 * 2**20


# --- the plan's keywords ----------------------------------------------------------------------------------------------


def test_a_plan_takes_the_keywords_of_the_topologies():
    made = cl.split(Words(20, 4), ("norm", "body"), example=WORDS)
    plan = made.plan(["a", "b"], "s", epochs=3, batch_size=8, preprocessing=[cl.Shared("word", at="head")])
    assert (plan.training, plan.preprocessing) == (cl.Training(epochs=3, batch_size=8), (cl.Shared("word", at="head"),))
    given = made.plan("a", "s", training=cl.Training(epochs=3, seed=4), batch_size=8, name="mine")
    assert (given.training, given.name) == (cl.Training(epochs=3, seed=4, batch_size=8), "mine")
    assert made.plan(training=None).training == made.plan().training == cl.Training()
    with pytest.raises(TypeError, match="no such argument: 'epoch'"):
        made.plan(epoch=3)


# --- strides ----------------------------------------------------------------------------------------------------------


class Turn(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


class Mean(nn.Module):
    """Adds up in the order of memory."""

    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.dims)


def turned() -> nn.Sequential:
    """BatchNorm, then a linear layer over the transposed values: the gradient that comes back is transposed."""
    return nn.Sequential(nn.BatchNorm1d(20), Turn(), nn.Linear(20, 6), Mean(1), nn.Linear(6, 3))


def pixels() -> nn.Sequential:
    """A convolution that gives channels last, and a mean over them."""
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3), nn.ReLU(), Mean(2, 3), nn.Linear(8, 3))
    return net.to(memory_format=torch.channels_last)


class Channels(nn.LayerNorm):
    """Normalises over channels, and gives them last in memory; the next layer keeps its own weights as they are."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def normed() -> nn.Sequential:
    """As in ConvNeXt: whether channels are last is told by the strides alone."""
    deep = nn.Conv2d(8, 8, 7, padding=3, groups=8)
    return nn.Sequential(nn.Conv2d(3, 8, 4, 4), Channels(8), deep, Mean(2, 3), nn.Linear(8, 3))


class Named(nn.Module):
    """The same layers with a forward of its own, so that it is traced."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def furthest(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


@pytest.mark.parametrize("traced", [False, True], ids=["sequential", "traced"])
@pytest.mark.parametrize("size", [16, 17], ids=["batches of 8", "a last batch of one"])
@pytest.mark.parametrize(
    ("make", "at", "shape"),
    [
        (turned, 0, (20, 37)),
        (turned, 1, (20, 37)),
        (pixels, 0, (1, 10, 10)),
        (pixels, 2, (1, 10, 10)),
        (normed, 1, (3, 16, 16)),
    ],
    ids=["transposed gradient", "transposed value", "channels last", "channels last behind ReLU", "channels normed"],
)
def test_strides_cross_a_cut_and_with_them_all_bits_stay(make, at, shape, size, traced):
    x, y = torch.randn(size, *shape, generator=torch.Generator().manual_seed(1)), torch.arange(size) % 3
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    cut, plain = drawn(make, traced), drawn(make, traced)
    place = f"layers.{at}" if traced else at + 1
    cl.fit(cl.split(cut, place, example=x[:2], labels="server"), loader, loss=nn.CrossEntropyLoss(), optimizer=sgd)
    optimizer = sgd(plain.parameters())
    for batch, label in loader:
        nn.functional.cross_entropy(plain(batch), label).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert furthest(cut, plain) == 0.0


def drawn(make: Callable[[], nn.Sequential], traced: bool) -> nn.Module:
    torch.manual_seed(0)
    return Named(make()) if traced else make()


# --- a value that is used several times -------------------------------------------------------------------------------


class Skips(nn.Module):
    """A first value that each of the further layers takes once, or one of them three times."""

    def __init__(self, attends: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.out, self.attends = nn.Sequential(nn.Linear(5, 8), nn.Tanh()), nn.Linear(8, 3), attends
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.sum, self.end = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.attends:
            seen = self.end(torch.tanh(self.a(h)) * torch.sigmoid(self.b(h)) + torch.sin(self.c(h)))
            return self.out(torch.relu(self.sum(seen + h)))
        last = self.c(torch.tanh(self.b(torch.tanh(self.a(h)) + h) + h))
        return self.out(last * h + h)


@pytest.mark.parametrize(
    ("at", "attends", "exact"),
    [
        (("first", "a", "b", "c"), False, True),
        (("first", "a"), False, True),
        (("first", "end"), True, False),
        (("first", "sum"), True, True),
        (("first.0", "end"), True, True),
    ],
    ids=["once in each", "often in the last", "several times before the last", "in one piece", "where it is made"],
)
def test_the_uses_of_a_value_are_added_as_uncut(at: tuple[str, ...], attends: bool, exact: bool):
    """But where a piece that is not the last to take it uses it several times: that differs in the last bits."""
    x, y = torch.randn(64, 5, generator=torch.Generator().manual_seed(5)), torch.arange(64) % 3
    cut, plain, fast = Skips(attends), Skips(attends), partial(torch.optim.SGD, lr=1.0)
    loader = DataLoader(TensorDataset(x, y), batch_size=64)
    cl.fit(cl.split(cut, at, example=x[:2]), loader, loss=nn.CrossEntropyLoss(), optimizer=fast, epochs=3)
    optimizer = fast(plain.parameters())
    for _ in range(3):
        nn.functional.cross_entropy(plain(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert 0.0 < furthest(cut, plain) < 1e-6 or exact
    assert furthest(cut, plain) == 0.0 or not exact
