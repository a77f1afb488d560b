"""`cl.split` runs a model on the example, and leaves it as it was, whatever its forward writes to."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import cutlayer as cl

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


class Renormed(nn.Module):
    """Its embedding brings the rows that it looks up to a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.c = nn.Linear(6, 6), nn.Embedding(10, 6, max_norm=0.5), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.c(torch.relu(h) + self.norm((h[:, 0].detach() * 3).long().clamp(0, 9)))


class Started(nn.Module):
    """As ActNorm: its first batch gives it its scale, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.scale = nn.Parameter(torch.zeros(6)), nn.Parameter(torch.ones(6))
        self.register_buffer("ready", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not self.ready:
            self.shift.data.copy_(-x.detach().mean(0))
            self.scale.data = 1 / (x.detach().std(0) + 1e-6)
            self.shift.requires_grad_(False)
            self.ready.fill_(True)
        return self.scale * (x + self.shift)


class Flowing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.c = nn.Linear(6, 6), Started(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.norm(self.a(x))))


@pytest.mark.parametrize("kind", [Renormed, Flowing])
@pytest.mark.parametrize("at", ["a", "norm"])
def test_a_split_leaves_the_weights_alone(kind: type[nn.Module], at: str):
    torch.manual_seed(0)
    model = kind()
    gradient = torch.ones_like(model.a.weight)
    model.a.weight.grad = gradient
    before, memory = copy.deepcopy(model.state_dict()), [p.data_ptr() for p in model.parameters()]
    chance = torch.get_rng_state()
    cl.split(model, at, example=X, labels="server")
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert [p.data_ptr() for p in model.parameters()] == memory
    assert all(p.requires_grad for p in model.parameters())
    assert model.a.weight.grad is gradient
    assert torch.equal(gradient, torch.ones(6, 6))
    assert torch.equal(torch.get_rng_state(), chance)
