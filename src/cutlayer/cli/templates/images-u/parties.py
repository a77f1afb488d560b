"""Two hospitals with images and labels, and a server: each function gives one party's modules and data.

Neither images nor labels leave a hospital. Replace `digits` by your own data, and the modules by your own layers; the
contract says what each gives.
"""

from __future__ import annotations

import torch
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

import cutlayer as cl
from cutlayer.data.images import mnist_5k

TEST = 500


def adam(parameters):
    return torch.optim.Adam(parameters, lr=2e-3)


def digits(place: int) -> tuple[cl.TensorTable, cl.TensorTable]:
    """Half of 5,000 real images each: 2,000 for training, and 500 others for evaluation."""
    images, labels = mnist_5k()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    mine = order[place::2]
    train, test = mine[TEST:], mine[:TEST]
    return cl.TensorTable(image=images[train], label=labels[train]), cl.TensorTable(
        image=images[test], label=labels[test]
    )


def hospital(name: str) -> cl.Party:
    data, evaluation = digits(["hospital-a", "hospital-b"].index(name))
    modules = {
        "head": nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        "tail": nn.Linear(64, 10),
        "loss": nn.CrossEntropyLoss(),
    }
    metrics = {"loss": lambda: {"accuracy": MulticlassAccuracy(10, average="micro")}}
    held = {"data": data, "evaluation": evaluation, "prediction": evaluation}  # a prediction needs no labels
    return cl.Party(name, modules=modules, optimizer=adam, metrics=metrics, **held)


def server(name: str) -> cl.Party:
    body = nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * 49, 64), nn.ReLU()
    )
    return cl.Party(name, modules={"body": body}, optimizer=adam)
