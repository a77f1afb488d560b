"""Losses and metrics of each kind of task: the weights of the uncut model, and metrics as computed on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics import Metric
from torchmetrics import classification as tmc
from torchmetrics import regression as tmr
from torchmetrics.text import Perplexity

import cutlayer as cl

COUNT, BATCH, EPOCHS = 22, 8, 2


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def whole(high: int, *shape: int, seed: int = 2) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


class Rows(Dataset[dict[str, Tensor]]):
    """Samples as dictionaries."""

    def __init__(self, fields: Mapping[str, Tensor]) -> None:
        self.fields = fields

    def __len__(self) -> int:
        return len(next(iter(self.fields.values())))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[index] for name, value in self.fields.items()}


class Dense(nn.Module):
    def __init__(self, outputs: int, squeeze: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, outputs)
        self.squeeze = squeeze

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(torch.relu(self.second(torch.relu(self.first(x)))))
        return y.squeeze(1) if self.squeeze else y


class Pixels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(1, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 1, 1), nn.Conv2d(4, 3, 1)

    def forward(self, image: Tensor) -> Tensor:
        return self.last(torch.relu(self.second(torch.relu(self.first(image)))))


class Table(nn.Module):
    """Numbers, categories and truth values side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers, self.ward = nn.Linear(3, 4), nn.Embedding(5, 4)

    def forward(self, numbers: Tensor, ward: Tensor, smoker: Tensor) -> Tensor:
        return torch.cat([self.numbers(numbers), self.ward(ward), smoker[:, None].float()], 1)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = Table(), nn.Linear(9, 8), nn.Linear(8, 3)

    def forward(self, numbers: Tensor, ward: Tensor, smoker: Tensor) -> Tensor:
        return self.last(torch.relu(self.second(self.first(numbers, ward, smoker))))


class Words(nn.Module):
    """Attention over words, with a padding mask that is used on both sides of the cut."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8, padding_idx=0)
        self.first = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.second = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.last = nn.Linear(8, 11)

    def forward(self, words: Tensor, mask: Tensor) -> Tensor:
        x = self.first(self.table(words), src_key_padding_mask=mask)
        return self.last(self.second(x, src_key_padding_mask=mask))


def next_word(prediction: Tensor, label: Tensor) -> Tensor:
    return nn.functional.cross_entropy(prediction.flatten(0, 1), label.flatten(), ignore_index=-100)


@dataclass(frozen=True, kw_only=True)
class Task:
    make: Callable[[], nn.Module]
    inputs: Mapping[str, Tensor]
    label: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]
    metrics: Callable[[], dict[str, Metric]]
    at: tuple[str, ...] = ("first", "second")
    release: tuple[str, ...] = field(default=())


WORDS = whole(10, COUNT, 7) + 1
MASK = torch.arange(7)[None] >= (whole(6, COUNT, seed=5) + 2)[:, None]
LABELS = torch.where(MASK, -100, whole(11, COUNT, 7, seed=6))
TASKS = {
    "binary": Task(
        make=lambda: Dense(1, squeeze=True), inputs={"x": drawn(COUNT, 6)}, label=whole(2, COUNT).float(),
        loss=nn.BCEWithLogitsLoss(pos_weight=torch.tensor(2.0)), at=("first", "second"),
        metrics=lambda: {"accuracy": tmc.BinaryAccuracy(), "auroc": tmc.BinaryAUROC(thresholds=20)},
    ),
    "classes": Task(
        make=lambda: Dense(4), inputs={"x": drawn(COUNT, 6)}, label=whole(4, COUNT),
        loss=nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5, 1.0]), label_smoothing=0.1, reduction="mean"),
        metrics=lambda: {
            "accuracy": tmc.MulticlassAccuracy(4), "confusion": tmc.MulticlassConfusionMatrix(4),
            "f1": tmc.MulticlassF1Score(4, average="macro"),
        },
    ),
    "labels": Task(
        make=lambda: Dense(5), inputs={"x": drawn(COUNT, 6)}, label=whole(2, COUNT, 5).float(),
        loss=nn.BCEWithLogitsLoss(), metrics=lambda: {"f1": tmc.MultilabelF1Score(5)},
    ),
    "regression": Task(
        make=lambda: Dense(1, squeeze=True), inputs={"x": drawn(COUNT, 6)}, label=drawn(COUNT, seed=9),
        loss=nn.SmoothL1Loss(), metrics=lambda: {"mse": tmr.MeanSquaredError(), "r2": tmr.R2Score()},
    ),
    "several numbers": Task(
        make=lambda: Dense(2), inputs={"x": drawn(COUNT, 6)}, label=drawn(COUNT, 2, seed=9),
        loss=nn.MSELoss(), metrics=lambda: {"mae": tmr.MeanAbsoluteError()},
    ),
    "segmentation": Task(
        make=Pixels, inputs={"image": drawn(COUNT, 1, 6, 6)}, label=whole(3, COUNT, 6, 6),
        loss=nn.CrossEntropyLoss(), metrics=lambda: {"iou": tmc.MulticlassJaccardIndex(3)},
    ),
    "mixed table": Task(
        make=Mixed, inputs={"numbers": drawn(COUNT, 3), "ward": whole(5, COUNT), "smoker": whole(2, COUNT).bool()},
        label=whole(3, COUNT), loss=nn.CrossEntropyLoss(),
        metrics=lambda: {"accuracy": tmc.MulticlassAccuracy(3)}, release=(),
    ),
    "words": Task(
        make=Words, inputs={"words": WORDS, "mask": MASK}, label=LABELS, loss=next_word, release=("mask",),
        metrics=lambda: {"perplexity": Perplexity(ignore_index=-100)},
    ),
}  # fmt: skip


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def seeded(task: Task) -> nn.Module:
    torch.manual_seed(3)
    return task.make()


def by_hand(task: Task) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Train the uncut model, and compute the metrics at its end."""
    model, rows = seeded(task), Rows({**task.inputs, "label": task.label})
    optimizer = sgd(list(model.parameters()))
    for _ in range(EPOCHS):
        for batch in DataLoader(rows, batch_size=BATCH):
            label = batch.pop("label")
            task.loss(model(**batch), label).backward()
            optimizer.step()
            optimizer.zero_grad()
    metrics = task.metrics()
    with torch.no_grad():
        model.eval()
        for batch in DataLoader(rows, batch_size=BATCH):
            label = batch.pop("label")
            prediction = model(**batch)
            if isinstance(task.loss, nn.BCEWithLogitsLoss):
                prediction = prediction.sigmoid()  # torchmetrics would take numbers in 0..1 for probabilities
            for metric in metrics.values():
                metric.update(prediction, label.long() if "Binary" in type(metric).__name__ else label)
    return model.state_dict(), {name: metric.compute() for name, metric in metrics.items()}


@pytest.mark.parametrize("name", TASKS)
def test_weights_and_metrics_are_those_of_the_uncut_model(name: str):
    task = TASKS[name]
    expected, metrics = by_hand(task)
    rows = Rows({**task.inputs, "label": task.label})
    example = {key: value[:3] for key, value in task.inputs.items()}
    made = cl.split(seeded(task), task.at, example=example, release=task.release)
    run = cl.fit(
        made,
        DataLoader(rows, batch_size=BATCH),
        evaluation=DataLoader(rows, batch_size=BATCH),
        loss=task.loss,
        optimizer=sgd,
        epochs=EPOCHS,
        party={"metrics": {"loss": task.metrics}},
    )
    state = run.state_dict()
    assert state.keys() == expected.keys()
    assert max(float((state[key].double() - expected[key].double()).abs().max()) for key in expected) == 0.0
    found = run.result.metrics("evaluate")["loss"]
    for key, value in metrics.items():
        assert torch.allclose(torch.tensor(found[key]).float(), torch.as_tensor(value).float(), atol=1e-6), key
