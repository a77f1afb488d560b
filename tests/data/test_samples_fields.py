"""Fields that no stage takes: samples may lack them, also labels in a prediction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

import cutlayer as cl
from cutlayer.data.collating import collated
from cutlayer.errors import DataError


class Rows(Dataset[dict[str, Any]]):
    """Eight samples; `change` is done to each of them."""

    def __init__(self, change: Callable[[int, dict[str, Any]], object]) -> None:
        self.change = change

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = {"x": torch.full((4,), float(index)), "y": index % 3, "note": 1.0}
        self.change(index, row)
        return row


def lack(name: str, *places: int) -> Rows:
    return Rows(lambda index, row: row.pop(name) if index in places else None)


def empty(name: str, *places: int) -> Rows:
    return Rows(lambda index, row: row.update({name: None}) if index in places else None)


PLAN = cl.Plan(
    [
        cl.Stage("head", at="a", inputs=["data.x"], output="float32[batch, 3]"),
        cl.Loss("loss", at="a", inputs=["head", "data.y"]),
    ],
    training=cl.Training(batch_size=4, shuffle=False, metrics_least=1),
)


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def trained(data: Rows) -> torch.Tensor:
    torch.manual_seed(0)
    head = nn.Linear(4, 3)
    party = cl.Party("a", modules={"head": head, "loss": nn.CrossEntropyLoss()}, data=data, optimizer=sgd, seed=1)
    cl.simulate(PLAN, [party])
    return head.weight


def predicted(data: Rows) -> torch.Tensor:
    torch.manual_seed(0)
    modules = {"head": nn.Linear(4, 3), "loss": nn.CrossEntropyLoss()}
    return cl.predict(PLAN, [cl.Party("a", modules=modules, prediction=data, seed=1)])["head"]


@pytest.mark.parametrize("data", [lack("note", 0), lack("note", 6), empty("note", 5)], ids=["first", "one", "None"])
def test_a_field_that_no_stage_takes_may_be_missing(data: Rows):
    assert torch.equal(trained(data), trained(lack("")))


@pytest.mark.parametrize("data", [lack("y", 5), lack("y", 0), empty("y", 5)], ids=["one", "first", "None"])
def test_a_prediction_takes_no_labels_whoever_has_them(data: Rows):
    assert torch.equal(predicted(data), predicted(lack("")))


@pytest.mark.provokes("E253")
def test_a_field_that_is_taken_may_not():
    with pytest.raises(DataError, match=r"E253.*no field y in sample 5, counted from 0; sample 7 has it"):
        trained(lack("y", 5))
    with pytest.raises(DataError, match=r"E253.*no field x in sample 5, counted from 0; sample 7 has it"):
        predicted(lack("x", 5))


def test_of_a_misspelt_field_all_that_are_there_are_told():
    batch = collated([{"x": 1, "Y": 2}], taken=("x", "y"))
    assert list(batch) == ["x", "Y"]


@pytest.mark.parametrize("name", ["y", "label"])
@pytest.mark.parametrize("place", [0, 7])
def test_fit_takes_the_label_alone(place: int, name: str):
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    split = cl.split(net, 1, example=torch.zeros(2, 4), labels="server")

    def change(index: int, row: dict[str, Any]) -> None:
        row["input"], row[name] = row.pop("x"), row.pop("y")
        if index != place:
            del row["note"]

    told = {"label": name} if name == "y" else {}
    run = cl.fit(split, Rows(change), loss=nn.CrossEntropyLoss(), optimizer=sgd, epochs=1, batch_size=4, **told)
    assert run.result.history
