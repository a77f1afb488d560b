"""Where the tail of a U-shape begins, and that the server gets no gradient from which it could read the labels."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.data import TensorDataset

import cutlayer as cl
from cutlayer.errors import PlanError
from cutlayer.models.tail import tail_points

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
Y = torch.arange(8) % 3


class Lora(nn.Module):
    """A frozen layer with a low-rank change beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Net(nn.Module):
    """Three layers, others that a test adds, and a forward that it gives in one line."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **layers: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.scale, self.table = nn.Parameter(torch.ones(3)), nn.Parameter(torch.randn(3, 6))
        self.gain = nn.Parameter(torch.ones(6))
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.body = forward

    def forward(self, x: Tensor) -> Any:
        return self.body(self, torch.relu(self.b(torch.relu(self.a(x)))))


class Residual(nn.Module):
    """Adds something to what comes in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def auxiliary(self: Net, h: Tensor) -> tuple[Tensor, Tensor]:
    return self.fc(h), self.aux(h)


def test_the_tail_begins_before_the_last_layer_with_parameters():
    layers = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.Softmax(1))
    assert list(tail_points(layers)) == ["1"]
    net = Net(lambda self, h: self.fc(h), fc=Lora(nn.Linear(6, 3)))
    assert list(islice(tail_points(net), 4)) == ["fc.down", "b", "fc.base", "a"]


@pytest.mark.provokes("E330")
def test_a_model_without_a_last_layer():
    with pytest.raises(PlanError, match=r"E330.*no last layer to keep at the client.*name both cut points"):
        list(tail_points(nn.Sequential(nn.Linear(2, 2), nn.ReLU())))


NETS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], list[str]]] = {
    "plain": (lambda: Net(lambda self, h: self.fc(h)), {}, ["fc"]),
    "an adapter": (lambda: Net(lambda self, h: self.fc(h), fc=Lora(nn.Linear(6, 3))), {}, ["fc.base"]),
    "another head behind": (lambda: Net(auxiliary, aux=nn.Linear(6, 3)), {"output": 0}, ["fc"]),
    "another head before": (lambda: Net(auxiliary, aux=nn.Linear(6, 3)), {"output": 1}, ["aux"]),
    "a scale behind": (lambda: Net(lambda self, h: self.norm(self.fc(h)), norm=nn.LayerNorm(3)), {}, ["fc"]),
    "a skip over the last layer": (
        lambda: Net(lambda self, h: (z := self.fc(h)) + self.last(z), last=nn.Linear(3, 3)), {}, ["fc", "last"],
    ),
    "a normed layer": (
        lambda: Net(lambda self, h: self.fc(h), fc=parametrizations.weight_norm(nn.Linear(6, 3))), {}, ["fc"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_what_goes_back_to_the_server_has_passed_the_last_layer(name: str):
    """And the gradients at the server are not those at the output: read off as an attacker would."""
    make, options, kept = NETS[name]
    torch.manual_seed(0)
    model = make()
    made = cl.split(model, "a", example=X[:2], **options)
    inside = {key for key, _ in made.modules("client")["tail"].named_modules()}
    assert inside.issuperset(kept)
    assert any(key for key, _ in made.modules("server")["body"].named_parameters())
    guessed: list[Tensor] = []
    made.modules("server")["body"].register_full_backward_hook(lambda _m, _i, out: guessed.append(out[0]))
    cl.fit(made, TensorDataset(X, Y), loss=nn.CrossEntropyLoss(), batch_size=8, party={"seed": 1}, shuffle=False)
    assert guessed
    assert all(seen.shape[-1] != 3 or not torch.equal(seen.argmin(1), Y) for seen in guessed)


LEAKS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "nothing": (lambda: nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3), nn.LogSoftmax(1)), {"at": (0, 1)}),
    "a scale": (lambda: Net(lambda self, h: self.fc(h) * self.scale), {}),
    "a norm": (lambda: Net(lambda self, h: self.norm(self.fc(h)), norm=nn.LayerNorm(3)), {}),
    "a branch": (lambda: Net(lambda self, h: (z := self.fc(h)) + self.last(z), last=nn.Linear(3, 3)), {}),
    "in place": (lambda: Net(lambda self, h: torch.add(self.fc(h), 1).mul_(2)), {}),
    "a softmax": (lambda: Net(lambda self, h: torch.softmax((z := self.fc(h)) - z.detach(), 1)), {}),
    "a residual block": (lambda: Net(lambda self, h: self.last(self.fc(h)), last=Residual(3)), {}),
    "the other operand": (lambda: Net(lambda self, h: torch.addmm(self.fc(h), h.detach(), self.table.t())), {}),
    "a shape": (lambda: Net(lambda self, h: self.fc(h).view(h.size(0), 3)), {}),
}


@pytest.mark.provokes("E334")
@pytest.mark.parametrize("name", LEAKS)
def test_a_last_cut_that_tells_the_labels_is_refused(name: str):
    make, options = LEAKS[name]
    given = {"at": ("a", "fc"), **options}
    with pytest.raises(PlanError, match=r"E334\] the server could read the labels.*at='(fc|1)'.*labels='server'"):
        cl.split(make(), example=X[:2], **given)
    allowed = cl.split(make(), given["at"][0], example=X[:2], labels="server")
    assert allowed.places == ("client", "server")


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, h: F.linear(h, self.table),
        lambda self, h: h @ self.table.t(),
        lambda self, h: F.linear(h, F.normalize(self.table)).view(h.size(0), -1) * self.scale,
        lambda self, h: torch.einsum("bi,oi->bo", h, self.table).log_softmax(1),
        lambda self, h: self.fc(h) + h.detach()[:, :3],
        lambda self, h: F.linear(h, self.table[:1]),
        lambda self, h: h @ (self.table * self.gain).t().to(h.dtype),
        lambda self, h: (h[:, None] * self.table).sum(2),
    ],
)
def test_weights_that_are_no_layer_count(forward: Callable[[Any, Tensor], Tensor]):
    assert cl.split(Net(forward), ("a", "b"), example=X[:2]).places == ("client", "server", "client")


def test_a_model_whose_every_tail_would_tell_the_labels():
    """The error is about the tail that was tried first."""
    net = Net(lambda self, h: self.fc(h) + h[:, :3])
    with pytest.raises(PlanError, match=r"E334\].*what it gives after 'b' becomes the output"):
        cl.split(net, "a", example=X[:2])
    assert cl.split(net, "a", example=X[:2], labels="server").places == ("client", "server")
