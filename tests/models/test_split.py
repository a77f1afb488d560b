"""What a cut does to sizes and strides: room for the state of large pieces, and what comes over it is contiguous."""

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


WORDS = torch.arange(4)


def test_two_data_holders_hand_on_a_state_that_is_larger_than_the_usual_limit():
    net = Words(750_000, 8)
    trained = 3 * 4 * net.table.weight.numel()  # the values and Adam's two moments, in float32
    assert trained > STATE_LIMIT
    held = [TensorDataset(WORDS, torch.zeros(4, dtype=torch.int64)) for _ in range(2)]
    run = cl.fit(cl.split(net, ("norm", "body"), example=WORDS), held, loss=nn.CrossEntropyLoss(), batch_size=4)
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


# --- strides ----------------------------------------------------------------------------------------------------------


class Turned(nn.Module):
    """BatchNorm, then a linear layer over the transposed values: the gradient that comes back is transposed."""

    def __init__(self, straight: bool = False) -> None:
        super().__init__()
        self.norm, self.turn, self.body, self.out = nn.BatchNorm1d(20), Turn(), nn.Linear(20, 6), nn.Linear(6, 3)
        self.straight = straight

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        if self.straight:
            y.register_hook(Tensor.contiguous)
        return self.out(self.body(self.turn(y)).mean(1))


class Turn(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


class Pixels(nn.Module):
    """A convolution that gives channels last, then a mean that adds up in the order of memory."""

    def __init__(self, straight: bool = False) -> None:
        super().__init__()
        self.first, self.body, self.out = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 3)
        self.straight = straight
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(self.first(x))
        return self.out((y.contiguous() if self.straight else y).mean((2, 3)))


def drawn(make: Callable[..., nn.Module], **settings: bool) -> nn.Module:
    torch.manual_seed(0)
    return make(**settings)


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def furthest(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


@pytest.mark.parametrize(
    ("make", "at", "shape", "kept"),
    [(Turned, "norm", (20, 37), False), (Turned, "turn", (20, 37), True), (Pixels, "body", (1, 10, 10), True)],
    ids=["transposed gradient", "cut behind the transposition", "channels last"],
)
def test_what_crosses_is_contiguous_and_only_that_may_change_last_bits(make, at, shape, kept):
    """The bits are those of the uncut model that makes the value or gradient contiguous at the place of the cut."""
    x, y = torch.randn(16, *shape, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 3
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    cut, plain, straight = drawn(make), drawn(make), drawn(make, straight=True)
    cl.fit(cl.split(cut, at, example=x[:2], labels="server"), loader, loss=nn.CrossEntropyLoss(), optimizer=sgd)
    for net in (plain, straight):
        optimizer = sgd(net.parameters())
        for batch, label in loader:
            nn.functional.cross_entropy(net(batch), label).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert furthest(cut, plain if kept else straight) == 0.0
    assert furthest(cut, plain) < 1e-6
