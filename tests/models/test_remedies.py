"""Refusals whose cause is easily taken for another: what each names, and that what it advises trains."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import cutlayer as cl
from cutlayer.errors import StageError

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))


def trains(model: nn.Module, at: str, target: Tensor, loss: nn.Module, x: Tensor = X) -> bool:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made = cl.split(model, at, example=x[:2], labels="server")
    found = cl.fit(made, TensorDataset(x, target), loss=loss, batch_size=4).state_dict()
    return all(value.isfinite().all() and not torch.equal(value, before[name]) for name, value in found.items())


class Forces(nn.Module):
    """Gives the gradient of an energy: of the whole model, or of its last part alone."""

    def __init__(self, *, whole: bool) -> None:
        super().__init__()
        self.a, self.b, self.head, self.whole = nn.Linear(6, 6), nn.Linear(6, 6), Energy(), whole

    def forward(self, x: Tensor) -> Tensor:
        if not self.whole:
            return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))
        x.requires_grad_()
        energy = self.head.last(torch.tanh(self.b(torch.tanh(self.a(x)))))
        return -torch.autograd.grad(energy.sum(), x, create_graph=True)[0]


class Energy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(6, 1, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        with torch.enable_grad():
            h = h if h.requires_grad else h.detach().requires_grad_()
            return -torch.autograd.grad(self.last(torch.tanh(h)).sum(), h, create_graph=True)[0]


@pytest.mark.provokes("E325")
def test_a_forward_that_takes_gradients():
    with pytest.raises(StageError, match=r"E325.*takes gradients itself.*torch.enable_grad\(\):`, in a submodule"):
        cl.split(Forces(whole=True), "a", example=X[:2], labels="server")
    assert trains(Forces(whole=False), "a", torch.randn(8, 6), nn.MSELoss())


class Real(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.view_as_real(x)


class Waves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Linear(6, 6, dtype=torch.cfloat) for _ in range(2))
        self.real, self.out = Real(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.b(torch.view_as_complex(self.real(self.a(x.to(torch.cfloat))))).abs())


@pytest.mark.provokes("E319")
def test_complex_numbers_do_not_cross():
    with pytest.raises(StageError, match=r"E319.*cannot cross.*got complex64.*torch.view_as_real\(x\) cross"):
        cl.split(Waves(), "a", example=X[:2], labels="server")
    assert trains(Waves(), "real", torch.arange(8) % 3, nn.CrossEntropyLoss())


class Token(nn.Module):
    """Puts a token before those of each sample."""

    def __init__(self, *, by_len: bool) -> None:
        super().__init__()
        self.patch, self.first, self.by_len = nn.Linear(6, 6), nn.Parameter(torch.ones(1, 1, 6)), by_len
        self.mlp, self.out = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x)
        x = torch.cat([self.first.expand(len(x) if self.by_len else x.size(0), -1, -1), x], 1)
        return self.out(torch.relu(self.mlp(x))[:, 0])


@pytest.mark.provokes("E314")
def test_the_batch_as_a_number():
    x = X[:, None].repeat(1, 3, 1)
    with pytest.raises(StageError, match=r"E314.*for another batch size.*take the batch as x.size\(0\)"):
        cl.split(Token(by_len=True), "patch", example=x[:2], labels="server")
    made = cl.split(Token(by_len=False), "patch", example=x[:2], labels="server")
    assert cl.fit(made, TensorDataset(x, torch.arange(8) % 3), loss=nn.CrossEntropyLoss(), batch_size=4).result
