"""Fields that a mode does not take stay as they are; what is hardly meant in the others is said at their party."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import cutlayer as cl
from cutlayer.errors import DataError
from cutlayer.run.preflight import try_party
from cutlayer.run.simulate import roster_of
from tests.run import plans
from tests.run.test_serving import Place, only
from tests.run.trial import Trial

pytestmark = pytest.mark.timeout(90)
WARDS = ["icu", "heart"] * 10
GRADES = ["ill", "well"] * 10


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


# --- labels of a prediction ------------------------------------------------------------------------------------------


def graded() -> plans.Case:
    """A U-shape whose labels are texts."""

    def build(name: str) -> cl.Party:
        if name == "server":
            return plans._party(name, {"body": plans._block(8, 5, 2)})
        torch.manual_seed(3)
        modules = {"head": plans._block(6, 8, 1), "tail": nn.Linear(5, 3), "loss": nn.CrossEntropyLoss()}
        x = torch.randn(20, 6, generator=torch.Generator().manual_seed(2))
        return plans._party(name, modules, cl.TensorTable(x=x, y=GRADES))

    shared = [cl.Shared("y", at="alpha", kind="classes")]
    return plans.Case(cl.u_shaped("alpha", "server", **plans.U, batch_size=8, preprocessing=shared), build, "server")


LABELS = {"unknown": ["", "new", ""], "numbers": [1, 2, 3], "decimals": [0.5, float("nan"), 1.0]}


@pytest.mark.parametrize("kind", LABELS)
def test_a_prediction_leaves_labels_as_they_are(kind: str, tmp_path: Path):
    """In this process, over the network, and asking a served stage; what was agreed on of them is not needed either."""
    place = Place(tmp_path, graded())
    x = torch.randn(3, 6)
    wanted, table = place.expected(x), cl.TensorTable(x=x, y=LABELS[kind])
    parties = [place.client(table), replace(place.case.build("server"), data=None)]
    assert torch.equal(only(cl.predict(place.plan, parties, weights=place.weights)), wanted)
    with place.serving():
        assert torch.equal(place.asking("anna", table)(), wanted)
    (tmp_path / "joint").mkdir()
    trial = Trial(place.plan, tmp_path / "joint")
    (place.weights / "alpha.preprocessing.json").unlink()
    found = trial.play(
        {
            p.name: (lambda p=p: cl.predict(place.plan, p, network=trial.settings(p.name), weights=place.weights))
            for p in parties
        }
    )
    assert torch.equal(only(found["alpha"]), wanted)


@pytest.mark.provokes("E261")
def test_labels_that_a_mode_takes_are_looked_at():
    case = graded()
    odd = cl.TensorTable(x=torch.randn(20, 6), y=["new", "well"] * 10)
    with pytest.raises(DataError, match="E261"):
        cl.simulate(case.plan, [replace(p, evaluation=odd) if p.name == "alpha" else p for p in case.parties()])
    stages = [
        cl.Stage("head", at="a", inputs=["data.y"], output="float32[batch, 2]"),
        cl.Loss("loss", at="a", inputs=["head", "data.y"]),
    ]
    plan = cl.Plan(stages, training=cl.Training(batch_size=10), preprocessing=[cl.Shared("y", at="a", kind="classes")])
    modules = {"head": nn.Embedding(2, 2), "loss": nn.CrossEntropyLoss()}
    party = cl.Party("a", data=cl.TensorTable(y=GRADES), prediction=odd, modules=modules, optimizer=sgd)
    agreed = cl.simulate(plan, [party]).agreed["a"]
    with pytest.raises(DataError, match=r"E261.*predict round 0, batch 0.*got 'new'"):
        cl.predict(plan, [replace(party, agreed=agreed)])


# --- warnings --------------------------------------------------------------------------------------------------------


@contextmanager
def heard() -> Iterator[list[str]]:
    """Give what is warned of, each text as often as Python is told of it."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield texts
    texts += [str(one.message) for one in seen]


class Ward(nn.Module):
    def __init__(self, columns: int) -> None:
        super().__init__()
        self.table, self.line = nn.Embedding(9, 4), nn.Linear(columns, 4)

    def forward(self, ward: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self.table(ward) + self.line(x)


def run(tables: dict[str, Any], evaluation: Sequence[str] | torch.Tensor | None = None, **training: Any) -> cl.Result:
    """Hospitals with wards and numbers; the first one alone evaluates."""
    names = list(tables)
    stages = [
        cl.Stage("head", at=names, inputs=["data.ward", "data.x"], output="float32[batch, 4]"),
        cl.Stage("body", at="server", inputs=["head"], output="float32[batch, 2]"),
        cl.Loss("loss", at=names, inputs=["body", "data.y"]),
    ]
    shared = [cl.Shared("ward", at="head", kind="categories"), cl.Shared("x", at="head")]
    settings = cl.Training(batch_size=10, hub="server", metrics_least=1, **training)
    plan = cl.Plan(stages, training=settings, preprocessing=shared)
    people = [cl.Party("server", modules={"body": nn.Linear(4, 2)}, optimizer=sgd)]
    for name, (ward, x) in tables.items():
        data = cl.TensorTable(ward=ward, x=x, y=torch.arange(20) % 2)
        tested = None
        if name == names[0] and evaluation is not None:
            tested = cl.TensorTable(ward=evaluation, x=x[: len(evaluation)], y=torch.arange(len(evaluation)) % 2)
        modules = {"head": Ward(x.shape[1]), "loss": nn.CrossEntropyLoss()}
        people.append(cl.Party(name, data=data, evaluation=tested, modules=modules, optimizer=sgd))
    return cl.simulate(plan, people)


def numbers(*missing: int) -> torch.Tensor:
    x = torch.randn(20, 3)
    x[:, list(missing)] = float("nan")
    return x


def test_data_as_they_are_meant_warn_of_nothing():
    with heard() as texts:
        run({"a": (WARDS, numbers(1)), "b": (WARDS, numbers(2))}, ["new", "icu"])
    assert texts == []


def test_a_round_of_which_no_value_is_in_the_list_is_said_with_a_few_of_its_values():
    with heard() as texts:
        run({"a": (WARDS, numbers()), "b": (WARDS, numbers())}, ["ICU", "Heart", "ICU", "x", "y"], epochs=2)
    assert set(texts) == {
        "party a: none of the 5 values of 'ward' in the evaluation data is among the 2 that the parties agreed on: "
        "'ICU', 'Heart', 'x' become 0, like all others; write them as in the training data"
    }


def test_a_party_whose_training_data_are_all_unknown_is_told():
    rare = [f"w{place // 4}" for place in range(20)]
    with heard() as texts:
        run({"a": (WARDS, numbers()), "b": (rare, numbers())})
    assert len(texts) == 1
    assert texts[0].startswith("party b: none of the 20 values of 'ward' in the training data is among the 2")


@pytest.mark.provokes("E261")
def test_texts_in_training_and_numbers_in_evaluation_are_refused():
    with pytest.raises(DataError, match=r"E261.*evaluate round 1.*expected texts, .*, got whole numbers"):
        run({"a": (["1", "2"] * 10, numbers())}, torch.tensor([1, 2]))


def test_a_column_that_nobody_has_is_said_at_each_party_before_round_1():
    with heard() as texts:
        run({"a": (WARDS, numbers(0, 2)), "b": (WARDS, numbers(0, 1, 2))})
    text = "no training sample of any party has a value of 'x' in column 0, 2, counted from 0: it is trained as zeros"
    assert [one.partition(";")[0] for one in texts] == [f"party {name}: {text}" for name in ("a", "b")]


def test_values_that_look_the_same_are_said_where_they_are():
    """At one party before anything is told; of several parties, at each of them."""
    with heard() as texts:
        run({"a": (["icu", "icu "] * 10, numbers()), "b": (["caf\u00e9", "cafe\u0301", "icu", "x"] * 5, numbers())})
    assert sorted(texts) == [
        f"party {party}: values of 'ward' at {place} differ in nothing but spaces around them, or how Unicode writes a "
        f"letter: {pair}. They count as different ones; write them alike"
        for party, place, pair in (
            ("a", "several parties", r"'cafe\u0301', 'caf\xe9'"),
            ("a", "this party", "'icu', 'icu '"),
            ("b", "several parties", "'icu', 'icu '"),
            ("b", "this party", r"'cafe\u0301', 'caf\xe9'"),
        )
    ]


def test_a_check_of_one_party_says_so_too():
    case = graded()
    odd = cl.TensorTable(x=torch.randn(20, 6), y=["ill", "ill "] * 10)
    alpha = replace(case.build("alpha"), data=odd, evaluation=odd)
    with pytest.warns(UserWarning, match="party alpha: values of 'y' at this party differ in nothing but spaces"):
        try_party(case.plan, alpha, roster_of([alpha]))
