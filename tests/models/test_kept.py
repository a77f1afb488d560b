"""A model that is changed after it was cut: what the pieces follow is followed, all else is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import cutlayer as cl
from cutlayer.errors import PlanError

ROWS = TensorDataset(torch.randn(8, 6, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3)
LOSS = nn.CrossEntropyLoss()


class Cooled(nn.Module):
    """Stays whole: its own attribute is read at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.by = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x / self.by


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.cooled, self.calls, self.tau = Cooled(), 0, 1.0
        self.settings, self.steps = SimpleNamespace(power=1, name="net"), [1, float("nan")]
        self.register_buffer("heat", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = self.cooled(self.b(torch.relu(self.a(x)))) / self.tau * self.heat
        return self.c(torch.relu(h**self.settings.power)) * self.steps[0]


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def uncut(model: nn.Module) -> None:
    optimizer = sgd(list(model.parameters()))
    for x, y in DataLoader(ROWS, batch_size=4):
        optimizer.zero_grad()
        LOSS(model(x), y).backward()
        optimizer.step()


def split(model: nn.Module) -> cl.Split:
    return cl.split(model, "a", example=ROWS.tensors[0][:2], labels="server")


def fit(cut: cl.Split) -> cl.Run:
    return cl.fit(cut, DataLoader(ROWS, batch_size=4), loss=LOSS, optimizer=sgd)


CHANGES: dict[str, tuple[str, Callable[[Net], object]]] = {
    "number": ("'tau'.*expected 1.0.*got 0.25", lambda model: setattr(model, "tau", 0.25)),
    "settings": ("'settings'", lambda model: setattr(model.settings, "power", 2)),
    "list": ("'steps'", lambda model: model.steps.__setitem__(0, 2)),
    "layer": ("'b'.*got a Linear, another one", lambda model: setattr(model, "b", nn.Linear(6, 6))),
    "removed": ("'tau'.*got none", lambda model: delattr(model, "tau")),
    "buffer": ("'heat'.*another one", lambda model: setattr(model, "heat", torch.zeros(()))),
}


@pytest.mark.parametrize("change", list(CHANGES))
@pytest.mark.provokes("E335")
def test_a_change_that_the_pieces_would_not_follow_is_refused(change: str):
    text, apply = CHANGES[change]
    model = Net()
    cut = split(model)
    run = fit(cut)
    apply(model)
    for use in (cut.plan, lambda: cut.modules("client"), lambda: fit(cut), lambda: run.predict(ROWS)):
        with pytest.raises(PlanError, match=f"E335.*{text}.*cut the model again"):
            use()


def test_a_slice_of_a_sequential_is_held_to_its_layers():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    cut = cl.split(model, 0, example=ROWS.tensors[0][:2], labels="server")
    model[1] = nn.Tanh()
    with pytest.raises(PlanError, match=r"E335.*'1'.*expected a ReLU.*got a Tanh"):
        cut.plan()


def test_an_object_that_use_writes_to_is_no_change():
    """As `save_pretrained` and a call with labels write to the configuration of a model of `transformers`."""
    transformers = pytest.importorskip("transformers")
    config = transformers.DistilBertConfig(vocab_size=9, dim=8, n_layers=2, n_heads=2, hidden_dim=8, num_labels=2)
    model = transformers.DistilBertForSequenceClassification(config)
    words = torch.ones(2, 4, dtype=torch.long)
    cut = cl.split(model, 0, example={"input_ids": words})
    model(input_ids=words, labels=torch.zeros(2, dtype=torch.long))
    assert config.problem_type == "single_label_classification"
    cut.plan()
    model.config = copy.copy(config)
    with pytest.raises(PlanError, match=r"E335.*'config'.*another one"):
        cut.plan()


def test_what_the_error_advises_trains_as_uncut():
    """Cut again; a buffer that is filled; an attribute of a submodule that stays whole."""
    plain = Net()
    model = copy.deepcopy(plain)
    cut = split(model)
    for tau, heat, by in ((1.0, 1.0, 1.0), (0.25, 1.0, 1.0), (0.25, 2.0, 1.0), (0.25, 2.0, 3.0)):
        for net in (plain, model):
            net.tau, net.cooled.by = tau, by
            net.heat.fill_(heat)
        model(ROWS.tensors[0])
        uncut(plain)
        cut = split(model) if tau != 1.0 and heat == 1.0 else cut
        run = fit(cut)
        assert all(torch.equal(value, run.state_dict()[name]) for name, value in plain.state_dict().items())


class Classy(Net):
    power = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.power


@pytest.mark.provokes("E335")
@pytest.mark.parametrize("name", ["power", "forward"])
def test_what_hides_an_attribute_of_the_class_is_refused(name: str):
    model = Classy()
    cut = split(model)
    model.extra = 3  # is nothing that the class has
    assert cut.plan()
    setattr(model, name, 5.0 if name == "power" else lambda x: x)
    with pytest.raises(PlanError, match=rf"E335\] '{name}' of the model has changed since it was cut"):
        cut.plan()
