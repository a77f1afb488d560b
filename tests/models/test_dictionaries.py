"""A forward that takes one dictionary of tensors: its keys name the inputs of the pieces."""

from __future__ import annotations

import copy
from collections import OrderedDict, UserDict
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import cutlayer as cl
from cutlayer.errors import StageError
from cutlayer.models.cut import compose, cut

BATCH = {
    "x": torch.randn(12, 6, generator=torch.Generator().manual_seed(1)),
    "mask": torch.arange(72).view(12, 6) % 4 > 0,
    "site": torch.arange(12) % 5,
}
Y = torch.arange(12) % 3


class Net(nn.Module):
    """Reads by key, asks for keys that may be absent, and keeps a value of its own in the dictionary."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.site, self.two = nn.Linear(6, 6), nn.Embedding(5, 6), nn.Linear(6, 6)
        self.drop, self.out = nn.Dropout(0.0), nn.Linear(6, 3)

    def forward(self, batch: dict[str, Any], scale: float = 1.0) -> Tensor:
        hidden = self.one(batch["x"]) * batch["mask"]
        if "site" in batch:
            hidden = hidden + self.site(batch["site"])
        batch["hidden"] = self.two(hidden).relu() * batch.get("gain", 1.0)
        return self.out(self.drop(batch["hidden"]) * scale)


class Samples(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return len(Y)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {**{name: value[index] for name, value in BATCH.items()}, "grade": Y[index]}


def some(first: int, last: int, **more: Any) -> dict[str, Any]:
    return {**{name: value[first:last] for name, value in BATCH.items()}, **more}


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


@pytest.mark.parametrize(("at", "labels"), [("one", "client"), ("site", "client"), ("two", "server")])
def test_it_trains_and_predicts_as_uncut(at: str, labels: str):
    model, loss = Net(), nn.CrossEntropyLoss()
    uncut = copy.deepcopy(model)
    optimizer = momentum(uncut.parameters())
    for _ in range(2):
        for first in range(0, 12, 4):
            optimizer.zero_grad()
            loss(uncut(some(first, first + 4)), Y[first : first + 4]).backward()
            optimizer.step()
    made = cl.split(model, at, example=(some(0, 3),), labels=labels, release=["mask", "site"])
    assert made.cut.inputs == ("x", "mask", "site")
    run = cl.fit(made, Samples(), loss=loss, optimizer=momentum, epochs=2, shuffle=False, batch_size=4)
    trained = run.state_dict()
    assert run.label == "grade"
    assert [name for name, value in uncut.state_dict().items() if not torch.equal(value, trained[name])] == []
    assert torch.equal(run.predict(Samples()), uncut.eval()(some(0, 12)))


@pytest.mark.parametrize(
    "example", [(some(0, 2, gain=3.0),), [some(0, 2, gain=3.0)], {"batch": some(0, 2, gain=3.0), "scale": 2.0}]
)
def test_other_entries_and_arguments_are_constants(example: Any):
    model = Net()
    made = cut(model, "two", example=example)
    scale = example["scale"] if isinstance(example, dict) else 1.0
    wanted = model(some(0, 12, gain=3.0), scale)
    assert torch.equal(compose(made, BATCH), wanted)
    assert torch.equal(compose(made, (some(0, 12),)), wanted)
    assert torch.equal(compose(made, {"batch": some(0, 12)}), wanted)


def test_a_sequential_whose_first_module_takes_it():
    model = nn.Sequential(Net(), nn.ReLU(), nn.Linear(3, 2))
    made = cut(model, 1, example=(some(0, 3),))
    assert made.pieces[0].inputs == ("data.x", "data.mask", "data.site")
    assert torch.equal(compose(made, BATCH), model(some(0, 12)))


@pytest.mark.provokes("E325")
@pytest.mark.parametrize(
    ("example", "words"),
    [
        (
            some(0, 3),
            r"missing a required argument: 'batch'.*if forward takes one dictionary of tensors, example=\(\{...\},\)",
        ),
        ((some(0, 3, site=np.arange(3)),), "'site' is a numpy array.*torch.from_numpy"),
        ((some(0, 3, site=[torch.arange(3)]),), "'site' is a list that holds tensors"),
        ((some(0, 3), torch.zeros(3)), "'batch' is a dict that holds tensors.*all tensors in one dictionary"),
        ((UserDict(some(0, 3)), torch.zeros(3)), "'batch' is a UserDict that holds tensors.*all tensors in one dict"),
        ((some(0, 3, more=UserDict(some(0, 3))),), "'more' is a UserDict that holds tensors.*none beside it or deeper"),
        (({1: torch.zeros(3, 6)},), "'batch' is a dict that holds tensors"),
    ],
)
def test_what_does_not_fit_is_refused(example: Any, words: str):
    with pytest.raises(StageError, match=f"E325.*{words}"):
        cut(Net(), "one", example=example)


class Encoding(UserDict):
    """Has its entries as attributes too, as transformers' BatchEncoding."""

    def __getattr__(self, name: str) -> Any:
        if name == "data" or name not in self.data:
            raise AttributeError(name)
        return self.data[name]


class Output(OrderedDict):
    """Has its entries as attributes too, as transformers' ModelOutput."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]


@pytest.mark.parametrize("kind", [UserDict, Encoding, Output])
def test_any_mapping_that_is_read_by_key_is_taken(kind: Any):
    made = cut(Net(), "one", example=(kind(some(0, 3)),))
    assert torch.equal(compose(made, BATCH), Net()(some(0, 12)))


class ByAttribute(Net):
    def forward(self, batch: Any) -> Tensor:
        return self.out(self.two(self.one(batch.x) * batch.mask))


class Wrapped(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.kind, self.net = kind, ByAttribute()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.net(self.kind({"x": x, "mask": mask}))


@pytest.mark.provokes("E325")
@pytest.mark.parametrize("kind", [Encoding, Output])
def test_one_whose_entries_are_read_as_attributes_is_refused_and_the_advice_helps(kind: Any):
    given = {name: BATCH[name][:3] for name in ("x", "mask")}
    words = rf"forward takes a {kind.__name__}, and no plain dictionary.*no attribute 'x'.*read them so.*batch\['x'\]"
    with pytest.raises(StageError, match=f"E325.*{words}.*calls this model with a {kind.__name__} of them"):
        cut(ByAttribute(), "one", example=(kind(given),))
    made = cut(Wrapped(kind), "net.one", example=given)
    assert torch.equal(compose(made, {name: BATCH[name] for name in given}), ByAttribute()(kind(BATCH)))


def test_an_example_that_does_not_fit_in_any_type_is_told_as_such():
    with pytest.raises(StageError, match=r"E325.*does not fit the model's forward.*correct the example"):
        cut(ByAttribute(), "one", example=(Encoding({"x": torch.zeros(3, 5)}),))
