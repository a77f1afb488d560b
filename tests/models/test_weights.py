"""Forwards that reach weights in other ways than as `module.weight` train as the uncut model does, or are refused.

Each model is trained by a plain loop and by `cl.fit`, and all weights are compared bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader, TensorDataset

import cutlayer as cl
from cutlayer.errors import PlanError, StageError
from cutlayer.models.steps import PieceModule

GENERATOR = torch.Generator().manual_seed(0)
ROWS = TensorDataset(torch.randn(8, 6, generator=GENERATOR), torch.arange(8) % 3)
LOSS = nn.CrossEntropyLoss()


class Net(nn.Module):
    """Three layers, and a second one that follows the middle one; each test gives a forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.slow = copy.deepcopy(self.b).requires_grad_(False)
        with torch.no_grad():
            self.slow.weight.add_(0.1)
        self.bias_1, self.bias_2 = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(3))
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("running", torch.ones(6))

    def tail(self, h: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.relu(h))))


def scripted(weight: Tensor) -> Tensor:
    return weight.abs().mean()


Forward = Callable[[Net, Tensor], Tensor]
KINDS: dict[str, Forward] = {}


def kind(forward: Forward) -> Forward:
    KINDS[forward.__name__] = forward
    return forward


@kind
def parameters_scaled(self: Net, x: Tensor) -> Tensor:
    scale = sum(p.detach().norm() for p in self.b.parameters())
    return self.tail(self.a(x)) / scale


@kind
def penalty(self: Net, x: Tensor) -> Tensor:
    return self.tail(self.a(x)) + 0.01 * sum(p.pow(2).sum() for p in self.b.parameters())


@kind
def found_by_name(self: Net, x: Tensor) -> Tensor:
    return self.tail(self.a(x)) + sum(p for name, p in self.named_parameters() if name.startswith("bias_"))


@kind
def from_state_dict(self: Net, x: Tensor) -> Tensor:
    return self.tail(self.a(x)) / self.b.state_dict()["weight"].abs().mean()


@kind
def from_the_table(self: Net, x: Tensor) -> Tensor:
    return self.tail(self.a(x)) / self.b._parameters["weight"].abs().mean()


@kind
def as_a_vector(self: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = parameters_to_vector(self.b.parameters()).abs().mean()
    return self.tail(self.a(x)) / scale


@kind
def got_by_path(self: Net, x: Tensor) -> Tensor:
    return self.tail(self.a(x)) / self.get_parameter("b.weight").detach().abs().mean()


@kind
def data_set(self: Net, x: Tensor) -> Tensor:
    h = self.a(x)
    self.c.weight.data = F.normalize(self.c.weight.data, dim=1)
    return self.tail(h)


@kind
def data_clamped(self: Net, x: Tensor) -> Tensor:
    h = self.a(x)
    for p in self.c.parameters():
        p.data.clamp_(-0.2, 0.2)
    return self.tail(h)


class Sign(torch.autograd.Function):
    """Passes the gradient through."""

    @staticmethod
    def forward(ctx: object, weight: Tensor) -> Tensor:
        del ctx
        return weight.sign()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        del ctx
        return gradient


@kind
def by_a_function_of_its_own(self: Net, x: Tensor) -> Tensor:
    return self.c(torch.relu(self.a(x)) @ Sign.apply(next(self.b.parameters())))


def followed(move: Callable[[Iterable[Tensor], Iterable[Tensor]], None]) -> Forward:
    def forward(self: Net, x: Tensor) -> Tensor:
        h = self.a(x)
        if self.training:
            with torch.no_grad():
                move(self.slow.parameters(), self.b.parameters())
        return self.tail(h) + self.slow(h)[:, :3].detach()

    return forward


def multiplied(slow: Iterable[Tensor], fast: Iterable[Tensor]) -> None:
    for t, s in zip(slow, fast, strict=True):
        t.data.mul_(0.9).add_(s.data, alpha=0.1)


def replaced(slow: Iterable[Tensor], fast: Iterable[Tensor]) -> None:
    for t, s in zip(slow, fast, strict=True):
        t.data = t.data * 0.9 + s.data * 0.1


def written(slow: Iterable[Tensor], fast: Iterable[Tensor]) -> None:
    for t, s in zip(slow, fast, strict=True):
        t *= 0.9
        t[:] += 0.1 * s


def together(slow: Iterable[Tensor], fast: Iterable[Tensor]) -> None:
    slow = list(slow)
    torch._foreach_mul_(slow, 0.9)
    torch._foreach_add_(slow, list(fast), alpha=0.1)


KINDS |= {f"followed_{move.__name__}": followed(move) for move in (multiplied, replaced, written, together)}


@kind
def buffers_moved(self: Net, x: Tensor) -> Tensor:
    h = self.a(x)
    for name, value in self.named_buffers():
        if name == "mean":
            value.data.mul_(0.9).add_(0.1)
    return self.tail(h + self.mean)


def net(forward: Forward) -> Net:
    return type("Made", (Net,), {"forward": forward})()  # type: ignore[no-any-return]


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in parameters if p.requires_grad], lr=0.1, momentum=0.9)


def uncut(model: nn.Module) -> dict[str, Tensor]:
    optimizer = sgd(model.parameters())
    for _ in range(2):
        for x, y in DataLoader(ROWS, batch_size=4):
            optimizer.zero_grad()
            LOSS(model(x), y).backward()
            optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize("name", list(KINDS))
def test_weights_reached_in_other_ways_train_as_uncut(name: str):
    plain, model = net(KINDS[name]), net(KINDS[name])
    before = copy.deepcopy(model.state_dict())
    expected = uncut(plain)
    split = cl.split(model, "a", example=ROWS.tensors[0][:2], labels="server")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    run = cl.fit(split, DataLoader(ROWS, batch_size=4), loss=LOSS, optimizer=sgd, epochs=2)
    trained = run.state_dict()
    assert all(torch.equal(value, trained[key]) for key, value in expected.items())
    plain.eval()
    assert torch.equal(run.predict(TensorDataset(ROWS.tensors[0])), plain(ROWS.tensors[0]))


@pytest.mark.provokes("E332")
def test_a_penalty_of_all_weights_is_refused_with_its_place():
    def forward(self: Net, x: Tensor) -> Tensor:
        return self.tail(self.a(x)) + 0.01 * sum(p.pow(2).sum() for p in self.parameters())

    with pytest.raises(PlanError, match=r"E332.*'a.weight'.*one weight, at two parties") as caught:
        cl.split(net(forward), "a", example=ROWS.tensors[0], labels="server")
    assert "piece 1 fetches it at test_weights.py:" in caught.value.got
    assert "self.parameters()" in caught.value.got
    assert "let forward read or write 'a.weight' by itself only where its layer runs" in caught.value.remedy
    assert "weight_decay" in caught.value.remedy


@pytest.mark.parametrize("made", ["a view", "its memory", "a product"])
@pytest.mark.provokes("E313")
def test_what_was_made_from_weights_before_forward_is_refused(made: str):
    def forward(self: Net, x: Tensor) -> Tensor:
        return self.tail(self.a(x) @ self.kept[0])

    model = net(forward)
    model.kept = [
        {"a view": model.b.weight.t(), "its memory": model.b.weight.data, "a product": model.b.weight * 2}[made]
    ]
    with pytest.raises(StageError, match=r"E313.*made from a weight before it ran.*test_weights.py") as caught:
        cl.split(model, "a", example=ROWS.tensors[0], labels="server")
    assert "compute it in forward from the weight" in caught.value.remedy

    def remedied(self: Net, x: Tensor) -> Tensor:
        return self.tail(self.a(x) @ self.b.weight.detach())

    cl.split(net(remedied), "a", example=ROWS.tensors[0], labels="server")


@pytest.mark.provokes("E313")
def test_a_gradient_is_neither_read_nor_set_in_forward():
    def read(self: Net, x: Tensor) -> Tensor:
        return self.tail(self.a(x)) * (1 if next(self.b.parameters()).grad is None else 2)

    def set_(self: Net, x: Tensor) -> Tensor:
        self.b.weight.grad = None
        return self.tail(self.a(x))

    for forward, verb in ((read, r"reads \.grad of a weight"), (set_, r"sets \.grad of a tensor")):
        with pytest.raises(StageError, match=f"E313.*{verb}.*test_weights.py"):
            cl.split(net(forward), "a", example=ROWS.tensors[0], labels="server")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("way", ["vmap", "script"])
@pytest.mark.provokes("E313")
def test_what_is_computed_from_weights_out_of_sight_is_refused(way: str):
    mean = torch.jit.script(scripted) if way == "script" else torch.vmap(scripted)

    def forward(self: Net, x: Tensor) -> Tensor:
        h = self.a(x)
        with torch.no_grad():
            scale = mean(next(self.b.parameters())).mean()
        return self.tail(h) / scale

    with pytest.raises(StageError, match=r"(?s)E313.*cannot be followed.*test_weights.py.*submodule of its own"):
        cl.split(net(forward), "a", example=ROWS.tensors[0], labels="server")


@pytest.mark.provokes("E316")
def test_a_buffer_that_is_written_by_its_data_on_the_other_side_is_refused():
    def forward(self: Net, x: Tensor) -> Tensor:
        self.mean.data.mul_(0.9).add_(0.1)
        return self.tail(self.a(x) + self.mean)

    with pytest.raises((StageError, PlanError), match=r"E316.*mul_.*test_weights.py"):
        cl.split(net(forward), "a", example=ROWS.tensors[0], labels="server")


def test_sizes_of_weights_may_be_asked_for():
    def forward(self: Net, x: Tensor) -> Tensor:
        wide = sum(p.numel() for p in self.b.parameters() if p.requires_grad and p.dim() > 1)
        return self.tail(self.a(x)) / wide

    model = net(forward)
    split = cl.split(model, "a", example=ROWS.tensors[0], labels="server")
    tail = split.cut.pieces[-1].module
    assert isinstance(tail, PieceModule)
    assert tail.routines[True].steps[-1].args[1] == 36
