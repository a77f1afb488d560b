"""Losses and metrics of every task: weights equal to the uncut model's, metrics to textbook formulas."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchmetrics as tm
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import classification as tc
from torchmetrics import regression as tr
from torchmetrics.text import Perplexity
from torchmetrics.wrappers import ClasswiseWrapper, LambdaInputTransformer

import cutlayer as cl
from cutlayer.core.parts import Loss, Stage, Training
from cutlayer.core.plan import Plan
from cutlayer.run.simulate import Result, simulate
from tests import formulas
from tests.small import Case, difference, momentum

COUNTS = (13, 9)
WORDS, LENGTH, SIDE = 7, 5, 4
Fields = dict[str, Tensor]


def dense(width: int, *, drop: bool = False) -> dict[str, nn.Module]:
    last = [nn.Flatten(0)] if drop else []
    return {
        "head": nn.Sequential(nn.Linear(4, 8), nn.ReLU()),
        "body": nn.Sequential(nn.Linear(8, 6), nn.Tanh()),
        "tail": nn.Sequential(nn.Linear(6, width), *last),
    }


def pixels() -> dict[str, nn.Module]:
    return {
        "head": nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU()),
        "body": nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
        "tail": nn.Conv2d(4, 3, 1),
    }


def words() -> dict[str, nn.Module]:
    return {
        "head": nn.Embedding(WORDS, 6),
        "body": nn.Sequential(nn.Linear(6, 6), nn.Tanh()),
        "tail": nn.Linear(6, WORDS),
    }


def table(count: int, label: Callable[[Tensor], Tensor]) -> Fields:
    x = torch.randn(count, 4)
    return {"x": x, "y": label(x + 0.5 * torch.randn(count, 4))}


def scans(count: int) -> Fields:
    x = torch.randn(count, 1, SIDE, SIDE)
    y = (x[:, 0] > 0.2).long() + (x[:, 0] > 0.9).long()
    y[torch.rand(y.shape) < 0.2] = 255
    return {"x": x, "y": y}


def sentences(count: int) -> Fields:
    x = torch.randint(0, WORDS, (count, LENGTH))
    y = (x * 3 + 1) % WORDS
    y[torch.rand(y.shape) < 0.2] = -100
    return {"x": x, "y": y}


def next_word(score: Tensor, text: Tensor) -> Tensor:
    """Compare the score at each word with the word after it."""
    return F.cross_entropy(score[:, :-1].transpose(1, 2), text[:, 1:])


def shifted() -> dict[str, tm.Metric]:
    return {"perplexity": LambdaInputTransformer(Perplexity(), lambda score: score[:, :-1], lambda text: text[:, 1:])}


def weighted(score: Tensor, weight: Tensor, label: Tensor) -> Tensor:
    return (F.cross_entropy(score, label, reduction="none") * weight).mean()


@dataclass(frozen=True)
class Task:
    """Stages, specs of what the stages give (behind the batch), loss, data, metrics, and these by another library."""

    stages: Callable[[], dict[str, nn.Module]]
    shapes: tuple[str, str, str]
    loss: Callable[..., Tensor]
    data: Callable[[int], Fields]
    metrics: Callable[[], Any]
    other: Callable[[np.ndarray, np.ndarray], Mapping[str, Any]]
    inputs: tuple[str, ...] = ("tail", "data.y")

    def case(self, counts: tuple[int, ...], **training: Any) -> Case:
        names = [f"clinic-{place}" for place in range(len(counts))]
        at = names if len(names) > 1 else names[0]
        cut, back, output = (f"float32[{', '.join(('batch', *s.split()))}]" for s in self.shapes)
        stages = [
            Stage("head", at=at, inputs=["data.x"], output=cut),
            Stage("body", at="server", inputs=["head"], output=back),
            Stage("tail", at=at, inputs=["body"], output=output),
            Loss("loss", at=at, inputs=self.inputs),
        ]
        settings = {"epochs": 2, "batch_size": 6, "microbatches": 2, "schedule": "1f1b", **training}
        torch.manual_seed(5)
        loss = self.loss if isinstance(self.loss, nn.Module) else Called(self.loss)
        return Case(
            plan=Plan(stages, training=Training(**settings)),
            counts=counts,
            modules={**self.stages(), "loss": loss},
            data={name: self.data(count) for name, count in zip(names, counts, strict=True)},
            extra={"metrics": {"loss": self.metrics}},
        )


class Called(nn.Module):
    """A function as a module, for the oracle."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


TASKS = {
    "binary": Task(
        lambda: dense(1, drop=True), ("8", "6", ""), nn.BCEWithLogitsLoss(pos_weight=torch.tensor(2.0)),
        lambda n: table(n, lambda x: (x.sum(1) > 0).float()),
        lambda: {"auroc": tc.BinaryAUROC(thresholds=1001), "accuracy": tc.BinaryAccuracy()},
        lambda s, y: {"auroc": (formulas.roc_auc(y, s), 0.01), "accuracy": formulas.accuracy(y, s > 0)},
    ),
    "multi-class": Task(
        lambda: dense(3), ("8", "6", "3"), nn.CrossEntropyLoss(torch.tensor([1.0, 2, 3]), label_smoothing=0.1),
        lambda n: table(n, lambda x: x[:, :3].argmax(1)),
        lambda: tm.MetricCollection(
            {"accuracy": tc.MulticlassAccuracy(3, average="micro"), "table": tc.MulticlassConfusionMatrix(3)}
        ),
        lambda s, y: {
            "accuracy": formulas.accuracy(y, s.argmax(1)),
            "table": formulas.confusion(y, s.argmax(1), 3),
        },
    ),
    "multi-label": Task(
        lambda: dense(4), ("8", "6", "4"), nn.BCEWithLogitsLoss(), lambda n: table(n, lambda x: (x > 0).float()),
        lambda: {"f1": tc.MultilabelF1Score(4), "each": ClasswiseWrapper(tc.MultilabelF1Score(4, average=None))},
        lambda s, y: {"f1": np.mean([formulas.f1(y[:, i] > 0, s[:, i] > 0) for i in range(4)])}
        | {f"each.multilabelf1score_{i}": formulas.f1(y[:, i] > 0, s[:, i] > 0) for i in range(4)},
    ),
    "regression": Task(
        lambda: dense(1), ("8", "6", "1"), nn.MSELoss(), lambda n: table(n, lambda x: x.sum(1, keepdim=True)),
        lambda: {"mse": tr.MeanSquaredError(), "r2": tr.R2Score()},
        lambda s, y: {"mse": formulas.mse(y, s), "r2": formulas.r2(y, s)[0]},
    ),
    "several numbers": Task(
        lambda: dense(3), ("8", "6", "3"), F.huber_loss, lambda n: table(n, lambda x: x[:, :3]),
        lambda: {"mae": tr.MeanAbsoluteError(), "r2": tr.R2Score(multioutput="raw_values")},
        lambda s, y: {
            "mae": formulas.mae(y, s), "r2": formulas.r2(y, s),
        },
    ),
    "counts": Task(
        lambda: dense(1, drop=True), ("8", "6", ""), nn.PoissonNLLLoss(),
        lambda n: table(n, lambda x: x.sum(1).exp().clamp(max=9).long()),
        lambda: LambdaInputTransformer(tr.MeanAbsoluteError(), torch.exp),
        lambda s, y: {"LambdaInputTransformer": formulas.mae(y, np.exp(s))},
    ),
    "segmentation": Task(
        pixels, ("4 4 4", "4 4 4", "3 4 4"), nn.CrossEntropyLoss(ignore_index=255), scans,
        lambda: {"jaccard": tc.MulticlassJaccardIndex(3, ignore_index=255)},
        lambda s, y: {
            "jaccard": np.mean([formulas.jaccard((y == c)[y != 255], (s.argmax(1) == c)[y != 255]) for c in range(3)])
        },
    ),
    "language": Task(
        words, ("5 6", "5 6", "5 7"), lambda s, y: F.cross_entropy(s.transpose(1, 2), y, ignore_index=-100), sentences,
        lambda: {"perplexity": Perplexity(ignore_index=-100)},
        lambda s, y: {"perplexity": formulas.perplexity(y, s)},
    ),
    "next word": Task(
        words, ("5 6", "5 6", "5 7"), next_word, lambda n: {"x": (x := sentences(n)["x"]), "y": x}, shifted,
        lambda s, y: {"perplexity": formulas.perplexity(y[:, 1:], s[:, :-1])},
    ),
    "weighted samples": Task(
        lambda: dense(3), ("8", "6", "3"), weighted,
        lambda n: {**table(n, lambda x: x[:, :3].argmax(1)), "w": torch.rand(n)},
        lambda: tc.MulticlassF1Score(3),
        lambda s, y: {"MulticlassF1Score": np.mean([formulas.f1(y == c, s.argmax(1) == c) for c in range(3)])},
        inputs=("tail", "data.w", "data.y"),
    ),
}  # fmt: skip


def both(case: Case) -> tuple[Result, Any]:
    parties = [replace(p, evaluation=p.data) for p in case.parties()]
    return simulate(case.plan, parties), case.uncut()


def check_metrics(task: Task, score: Tensor, label: Tensor, result: Result) -> None:
    """Compare the metrics of the evaluation with those of another library."""
    values, wanted = result.metrics()["loss"], task.other(score.numpy(), label.numpy())
    assert values.keys() == {"loss", *wanted}
    for key, expected in wanted.items():
        value, tolerance = expected if isinstance(expected, tuple) else (expected, 1e-5)
        assert np.abs(np.array(values[key]) - value).max() < tolerance, key


@pytest.mark.parametrize("counts", [(13,), COUNTS], ids=["one clinic", "two clinics"])
@pytest.mark.parametrize("name", TASKS)
def test_a_task_equals_the_uncut_model(name, counts):
    task = TASKS[name]
    case = task.case(counts)
    result, oracle = both(case)
    assert difference(result, oracle) == 0.0
    fields = {f: torch.cat([data[f] for data in case.data.values()]) for f in next(iter(case.data.values()))}
    whole = nn.Sequential(*(oracle.modules[stage] for stage in ("head", "body", "tail"))).eval()
    with torch.no_grad():
        score = whole(fields["x"])
    check_metrics(task, score, fields["y"], result)


def test_a_loss_over_microbatches_of_unequal_numbers_of_labels():
    """`reduction="sum"` adds up whatever the microbatches hold; the mean is one of means, weighted by samples."""
    task = replace(
        TASKS["language"],
        loss=lambda s, y: F.cross_entropy(s.transpose(1, 2), y, ignore_index=-100, reduction="sum") / 100,
    )
    whole, cut = (task.case((12,), microbatches=parts) for parts in (1, 3))
    for case in (whole, cut):
        stages = [replace_reduction(stage) for stage in case.plan.stages]
        object.__setattr__(case, "plan", Plan(stages, training=case.plan.training))
    (first, oracle), (second, other) = both(whole), both(cut)
    assert difference(first, oracle) == difference(second, other) == 0.0
    losses = [result.metrics()["loss"]["loss"] for result in (first, second)]
    assert abs(losses[0] - losses[1]) < 1e-6


def replace_reduction(stage: Stage | Loss) -> Stage | Loss:
    return Loss(stage.name, at=stage.at, inputs=stage.inputs, reduction="sum") if isinstance(stage, Loss) else stage


def test_an_exact_area_under_the_curve_at_one_party():
    task = replace(TASKS["binary"], metrics=lambda: {"auroc": tc.BinaryAUROC(), "curve": tc.BinaryROC(thresholds=3)})
    case = task.case((13,))
    result, oracle = both(case)
    whole = nn.Sequential(*(oracle.modules[stage] for stage in ("head", "body", "tail"))).eval()
    fields = case.data["clinic-0"]
    values = result.metrics()["loss"]
    with torch.no_grad():
        score = whole(fields["x"])
    assert abs(values["auroc"] - formulas.roc_auc(fields["y"].numpy(), score.numpy())) < 1e-6
    assert [len(values[f"curve.{place}"]) for place in range(3)] == [3, 3, 3]


def test_a_loss_without_a_label():
    """Several predictions and no label: two views of one sample."""
    stages = [
        Stage("left", at="a", inputs=["data.x"], output="float32[batch, 3]"),
        Stage("right", at="b", inputs=["data.x"], output="float32[batch, 3]"),
        Loss("loss", at="a", inputs=["left", "right"]),
    ]
    case = Case.of(
        Plan(stages, training=Training(epochs=2, batch_size=6)),
        (13,),
        modules={"left": nn.Linear(5, 3), "right": nn.Linear(5, 3), "loss": Called(alike)},
    )
    assert difference(*both(case)) == 0.0


def alike(left: Tensor, right: Tensor) -> Tensor:
    return F.cross_entropy(left @ right.T, torch.arange(len(left)))


def test_checkpoints_keep_what_wrapped_metrics_have_added():
    """Also of a metric whose states take their shape from the first batch."""
    from cutlayer.engine.metrics import MetricBook

    def make() -> dict[str, tm.Metric]:
        return {"mae": LambdaInputTransformer(tr.MeanAbsoluteError(), torch.exp), "r2": tr.R2Score()}

    book, other = MetricBook("loss", make, shared=True), MetricBook("loss", make, shared=True)
    for one in (2, 5):
        book.update(torch.ones(()), [torch.rand(one, 3), torch.rand(one, 3)], one, "mean")
    other.set_state(book.state(), "here")
    assert other.values() == book.values()
    other.reset()
    assert other.values() == {}


# --- the same with `cl.split` and `cl.fit`, from a model that knows of no parties ------------------------------------


class Mixed(nn.Module):
    """Numbers, categories and truth values side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers, self.ward = nn.Linear(3, 4), nn.Embedding(5, 4)
        self.join, self.body, self.tail = nn.Identity(), nn.Linear(9, 8), nn.Linear(8, 3)

    def forward(self, numbers: Tensor, ward: Tensor, smoker: Tensor) -> Tensor:
        joined = torch.cat([self.numbers(numbers), self.ward(ward), smoker[:, None].float()], 1)
        return self.tail(torch.relu(self.body(self.join(joined))))


class Masked(nn.Module):
    """Attention over words, with a padding mask that is used on both sides of the cut."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.tail = nn.Embedding(WORDS, 8, padding_idx=0), nn.Linear(8, WORDS)
        self.join, self.body = (nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True) for _ in range(2))

    def forward(self, words: Tensor, mask: Tensor) -> Tensor:
        x = self.join(self.table(words), src_key_padding_mask=mask)
        return self.tail(self.body(x, src_key_padding_mask=mask))


def mixed(count: int) -> Fields:
    ward, smoker = torch.randint(0, 5, (count,)), torch.rand(count) < 0.5
    return {"numbers": torch.randn(count, 3), "ward": ward, "smoker": smoker, "y": ward % 3}


def masked(count: int) -> Fields:
    text = torch.randint(1, WORDS, (count, LENGTH))
    mask = torch.arange(LENGTH) >= torch.randint(2, LENGTH + 1, (count, 1))
    return {"words": text, "mask": mask, "y": text.masked_fill(mask, -100)}


def whole(name: str) -> tuple[nn.Module, tuple[str, str], Task]:
    """The uncut model of a task, where it is cut, and the task."""
    torch.manual_seed(5)
    if name == "mixed table":
        return Mixed(), ("join", "body"), replace(TASKS["multi-class"], data=mixed)
    if name == "masked words":
        return Masked(), ("join", "body"), replace(TASKS["language"], data=masked)
    return nn.Sequential(OrderedDict(TASKS[name].stages())), ("head", "body"), TASKS[name]


@pytest.mark.parametrize("labels", ["client", "server"])
@pytest.mark.parametrize(
    "name", [*(name for name in TASKS if name != "weighted samples"), "mixed table", "masked words"]
)
def test_a_whole_model_that_is_split(name: str, labels: str):
    """With labels of any dtype and shape, which are released as they are where the loss is at the server."""
    model, at, task = whole(name)
    uncut, fields = copy.deepcopy(model), task.data(22)
    *inputs, label = fields.values()
    loader = DataLoader(TensorDataset(*inputs, label), batch_size=8)
    optimizer = momentum(list(uncut.parameters()))
    for _ in range(2):
        for *batch, truth in loader:
            task.loss(uncut(*batch), truth).backward()
            optimizer.step()
            optimizer.zero_grad()
    places = at if labels == "client" else at[:1]
    example, release = tuple(inputs), ["mask"] if "mask" in fields else []
    split = cl.split(model, places, example=example, labels=labels, release=release)
    settings = {"loss": task.loss, "optimizer": momentum, "party": {"metrics": {"loss": task.metrics}}}
    run = cl.fit(split, loader, evaluation=loader, epochs=2, **settings)
    assert all(torch.equal(run.state_dict()[key], value) for key, value in uncut.state_dict().items())
    with torch.no_grad():
        score = uncut.eval()(*inputs)
    check_metrics(task, score, label, run.result)
