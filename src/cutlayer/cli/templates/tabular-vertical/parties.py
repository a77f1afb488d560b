"""Three parties that know the same patients: each function gives one party's modules and data.

The clinic has history, the laboratory blood values, the registry diagnoses; none of these leaves. Replace `patients` by
your own tables, with rows in the same order at all parties.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

import cutlayer as cl
from cutlayer.data.holdout import holdout
from cutlayer.data.records import DIAGNOSES, thyroid


def adam(parameters):
    return torch.optim.Adam(parameters, lr=3e-3)


class Join(nn.Module):
    """What clinic and laboratory say of a patient, together."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, len(DIAGNOSES)))

    def forward(self, clinic: Tensor, laboratory: Tensor) -> Tensor:
        return self.layers(torch.cat([clinic, laboratory], 1))


def patients(column: str, field: str) -> tuple[cl.TensorTable, cl.TensorTable]:
    """One party's columns of 9,172 real patients, split by person; gaps become 0, with a column that says so."""
    table = thyroid()
    split, values = holdout(table["patient"], share=0.25), table[column]
    if values.is_floating_point():
        values = values.log() if column == "laboratory" else values
        gaps, mine = values.isnan(), values[split.train]
        mean = mine.nanmean(0)
        deviation = (mine - mean).square().nanmean(0).sqrt().clamp(min=1e-6)
        values = torch.cat(
            [((values - mean) / deviation).nan_to_num(0.0), gaps[:, gaps[split.train].any(0)].float()], 1
        )
    return cl.TensorTable(**{field: values[split.train]}), cl.TensorTable(**{field: values[split.test]})


def member(name: str) -> cl.Party:
    data, evaluation = patients(name, "x")
    head = nn.Sequential(nn.Linear(data.fields["x"].shape[1], 32), nn.ReLU(), nn.Linear(32, 16))
    held = {"data": data, "evaluation": evaluation, "prediction": evaluation}
    return cl.Party(name, modules={f"head-{name}": head}, optimizer=adam, **held)


def registry(name: str) -> cl.Party:
    data, evaluation = patients("diagnosis", "y")
    metrics = {"loss": lambda: {"accuracy": MulticlassAccuracy(len(DIAGNOSES), average="micro")}}
    modules = {"body": Join(), "loss": nn.CrossEntropyLoss()}
    return cl.Party(name, modules=modules, data=data, evaluation=evaluation, optimizer=adam, metrics=metrics)
