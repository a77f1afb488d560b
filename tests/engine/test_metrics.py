"""Metrics: only sums travel, and sums over replicas give what all samples at once would give."""

from __future__ import annotations

import warnings

import pytest
import torch
from torchmetrics import CatMetric, MeanMetric, MeanSquaredError, MinMetric, PearsonCorrCoef, R2Score
from torchmetrics.classification import (
    BinaryAUROC,
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
)

from cutlayer.engine.metrics import MetricBook
from cutlayer.errors import ConfigError, ContractError

LOGITS = torch.randn(60, 4, generator=torch.Generator().manual_seed(1))
LABELS = torch.randint(0, 4, (60,), generator=torch.Generator().manual_seed(2))
PARTS = (7, 1, 20, 32)


def classified() -> dict:
    return {
        "accuracy": MulticlassAccuracy(4, average="micro"),
        "balanced": MulticlassAccuracy(4, average="macro"),
        "f1": MulticlassF1Score(4, average="none"),
        "auroc": MulticlassAUROC(4, thresholds=20),
        "confusion": MulticlassConfusionMatrix(4),
    }


def filled(make, logits: torch.Tensor, labels: torch.Tensor, parts: tuple[int, ...]) -> MetricBook:
    book = MetricBook("loss", make, shared=True)
    for value, label in zip(logits.split(list(parts)), labels.split(list(parts)), strict=True):
        book.update(torch.nn.functional.cross_entropy(value, label), [value, label], len(label), "mean")
    return book


def expected() -> dict:
    found = {"loss": float(torch.nn.functional.cross_entropy(LOGITS, LABELS))}
    for name, metric in classified().items():
        metric.update(LOGITS, LABELS)
        value = metric.compute()
        found[name] = value.tolist()
    return found


def same(values: dict, other: dict) -> None:
    assert values.keys() == other.keys()
    for name, value in values.items():
        assert torch.allclose(torch.tensor(value), torch.tensor(other[name]), rtol=1e-6), name


def test_parts_of_any_size_give_what_all_samples_at_once_give():
    """Of the loss too: each part counts by its samples."""
    same(filled(classified, LOGITS, LABELS, PARTS).values(), expected())


def test_sums_of_replicas_give_what_all_samples_at_once_give():
    books = [
        filled(classified, LOGITS[:8], LABELS[:8], (7, 1)),
        filled(classified, LOGITS[8:28], LABELS[8:28], (20,)),
        filled(classified, LOGITS[28:], LABELS[28:], (32,)),
        MetricBook("loss", classified, shared=True),  # a replica without samples
    ]
    total = books[0].sums()
    for book in books[1:]:
        total = {name: tensor + book.sums()[name] for name, tensor in total.items()}
    for book in books:
        book.set_sums(total, "here")
        same(book.values(), expected())


def test_sums_hold_no_sample():
    """The size of what leaves does not grow with the samples."""
    few, many = (
        {name: tensor.shape for name, tensor in filled(classified, LOGITS[:n], LABELS[:n], (n,)).sums().items()}
        for n in (2, 60)
    )
    assert few == many


@pytest.mark.parametrize("make", [MeanMetric, MeanSquaredError, R2Score], ids=lambda make: make.__name__)
def test_metrics_of_sums_are_taken(make):
    book = MetricBook("loss", lambda: {"metric": make()}, shared=True)
    assert {name.partition(".")[0] for name in book.sums()} == {"loss", "samples", "metric"}


@pytest.mark.provokes("E222")
@pytest.mark.parametrize(
    ("make", "state"),
    [
        (lambda: BinaryAUROC(thresholds=None), "preds"),
        (CatMetric, "value"),
        (MinMetric, "min_value"),
        (PearsonCorrCoef, "mean_x"),
    ],
)
def test_metrics_that_would_send_samples_are_refused(make, state):
    with pytest.raises(ConfigError) as caught:
        MetricBook("loss", lambda: {"metric": make()}, shared=True)
    assert caught.value.code == "E222"
    assert f"'metric' of 'loss' cannot be added over replicas: its state '{state}' is no sum" in str(caught.value)
    MetricBook("loss", lambda: {"metric": make()}, shared=False)  # at one party alone nothing is sent


@pytest.mark.parametrize(
    "spoil",
    [
        lambda sums: sums.pop("accuracy.tp"),
        lambda sums: sums.update(more=torch.zeros(())),
        lambda sums: sums.update(samples=torch.zeros(2, dtype=torch.int64)),
        lambda sums: sums.update(samples=torch.zeros(())),
    ],
)
def test_sums_of_other_metrics_are_refused(spoil):
    book = filled(classified, LOGITS, LABELS, PARTS)
    sums = book.sums()
    spoil(sums)
    with pytest.raises(ContractError) as caught:
        book.set_sums(sums, "exchange add_metrics of loss, from b")
    assert caught.value.code == "E524"
    same(book.values(), expected())


def test_sums_are_copies():
    book = filled(classified, LOGITS, LABELS, PARTS)
    for tensor in book.sums().values():
        tensor.zero_()
    same(book.values(), expected())


@pytest.mark.parametrize("look", ["values", "own", "sums", "state", "settle"])
def test_what_is_late_is_there_for_whoever_looks(look: str):
    book, prompt = (filled(classified, LOGITS[:60], LABELS[:60], PARTS) for _ in range(2))
    given = (torch.tensor(3.0), [LOGITS[:5], LABELS[:5]], 5, "mean")
    book.late.append(given)
    prompt.update(*given)
    getattr(book, look)()
    assert not book.late
    assert book.samples == 65
    same(book.values(), prompt.values())


def test_what_is_late_is_of_no_other_round():
    book = MetricBook("loss", classified, shared=True)
    book.late.append((torch.tensor(3.0), [LOGITS[:5], LABELS[:5]], 5, "mean"))
    book.reset()
    assert book.values() == {}


def test_a_round_begins_with_nothing():
    book = filled(classified, LOGITS, LABELS, PARTS)
    book.reset()
    assert book.values() == {}
    book = MetricBook("loss", None, shared=True)
    assert book.values() == {}


@pytest.mark.parametrize(("reduction", "loss"), [("mean", 2.0), ("sum", 0.75)])
def test_the_loss_is_a_mean_over_samples(reduction, loss):
    book = MetricBook("loss", None, shared=False)
    for batch, value in ((3, 1.0), (1, 5.0)):
        book.update(torch.tensor(value if reduction == "mean" else value / 2), [torch.zeros(batch)], batch, reduction)
    assert book.values() == {"loss": loss}


def test_lanes_are_counted_apart_and_go_on_after_a_restart():
    def book() -> MetricBook:
        return MetricBook("loss", classified, shared=False, lanes=[0, 1])

    def feed(one: MetricBook, start: int, stop: int, lane: int) -> None:
        value, label = LOGITS[start:stop], LABELS[start:stop]
        loss = torch.nn.functional.cross_entropy(value, label)
        one.update(loss, [value, label], stop - start, "mean", lane=lane)

    first, second = book(), book()
    feed(first, 0, 8, 0)
    feed(first, 8, 28, 1)
    second.set_state({name: tensor.clone() for name, tensor in first.state().items()}, "here")
    for one in (first, second):
        feed(one, 28, 60, 0)
        same(one.values(), expected())
        left, right = one.own()
        assert (left["lane"], left["samples"], right["lane"], right["samples"]) == (0, 40, 1, 20)
        same(right["metrics"], filled(classified, LOGITS[8:28], LABELS[8:28], (20,)).values())
        own = torch.cat([LOGITS[:8], LOGITS[28:]]), torch.cat([LABELS[:8], LABELS[28:]])
        same(left["metrics"], filled(classified, *own, (40,)).values())
    first.reset()
    assert first.own() == []


def test_what_was_counted_here_outlives_the_sums_of_all():
    here, there = (filled(classified, LOGITS[at], LABELS[at], (n,)) for at, n in ((slice(8), 8), (slice(8, 60), 52)))
    alone, others = here.values(), there.sums()
    here.pool({name: tensor + others[name] for name, tensor in here.sums().items()}, "here")
    same(here.values(), expected())
    (own,) = here.own()
    same(own["metrics"], alone)


def test_a_client_without_samples_computes_nothing_of_its_own():
    """torchmetrics would warn of that."""
    make = lambda: {"accuracy": MulticlassAccuracy(3)}  # noqa: E731
    here, there = MetricBook("loss", make, shared=True), MetricBook("loss", make, shared=True)
    there.update(torch.tensor(1.0), [torch.eye(3), torch.arange(3)], 3)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        here.pool(there.sums(), "here")
        assert here.values() == there.values()
    assert (here.own(), [str(one.message) for one in told]) == ([], [])
