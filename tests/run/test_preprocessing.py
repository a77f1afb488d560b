"""Preprocessing declared in the plan: replicas train as if one party had scaled all samples."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cutlayer.core.parts import Loss, Shared, Stage, Training
from cutlayer.core.plan import Plan
from cutlayer.core.topologies import vertical
from cutlayer.data.sources import TensorTable
from cutlayer.engine.agree import summarise
from cutlayer.engine.preprocess import Preprocess
from cutlayer.errors import DataError, PlanError, StageError
from cutlayer.run.config import Contract, dump_contract, parse_contract
from cutlayer.run.party import Party
from cutlayer.run.prediction import predict
from cutlayer.run.results import write_results
from cutlayer.run.simulate import simulate
from cutlayer.transport.handshake import abort_of

NAMES = ("a", "b", "c")
SHARED = (
    Shared("x", at="head"),
    Shared("ward", at="head", kind="categories", least=2),
    Shared("y", at="head", kind="classes", least=1),
)


class Rows(torch.utils.data.Dataset):
    """Rows with a text column, as a table gives them."""

    def __init__(self, x: Tensor, ward: list[str], y: Tensor) -> None:
        self.x, self.ward, self.y = x, ward, y

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, place: int) -> dict[str, object]:
        return {"x": self.x[place], "ward": self.ward[place], "y": self.y[place]}


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.line = nn.Embedding(4, 3), nn.Linear(2, 3)

    def forward(self, x: Tensor, ward: Tensor) -> Tensor:
        return torch.relu(self.line(x) + self.table(ward))


def plan(preprocessing=SHARED, **training) -> Plan:
    stages = [
        Stage("head", at=NAMES, inputs=["data.x", "data.ward"], output="float32[batch, 3]"),
        Stage("body", at="server", inputs=["head"], output="float32[batch, 3]"),
        Loss("loss", at=NAMES, inputs=["body", "data.y"]),
    ]
    settings = Training(epochs=2, batch_size=5, shuffle=False, **training)
    return Plan(stages, training=settings, preprocessing=preprocessing)


def rows_of(seed: int) -> Rows:
    """Each hospital has another scale, a ward of its own, and gaps."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(10, 2, generator=generator) * (seed + 1) + 40 * seed
    x[seed, 1] = float("nan")
    wards = ["surgery", "surgery", "icu", "icu", f"only-{seed}"] * 2
    wards[9] = f"rare-{seed}"
    return Rows(x, wards, torch.randint(0, 3, (10,), generator=generator) * 10 + 5)


def modules() -> dict[str, nn.Module]:
    torch.manual_seed(4)
    return {"head": Head(), "body": nn.Linear(3, 3), "loss": nn.CrossEntropyLoss()}


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.05)


def parties(**more) -> list[Party]:
    found = []
    for seed, name in enumerate(NAMES):
        mine = {key: copy.deepcopy(module) for key, module in modules().items() if key != "body"}
        found.append(Party(name, data=rows_of(seed), optimizer=sgd, modules=mine, **more))
    return [*found, Party("server", optimizer=sgd, modules={"body": modules()["body"]})]


def uncut() -> dict[str, nn.Module]:
    """A relay over samples that numpy has scaled, all together."""
    tables = [rows_of(seed) for seed in range(3)]
    pooled = np.concatenate([table.x.numpy() for table in tables]).astype(np.float64)
    mean, deviation = np.nanmean(pooled, 0), np.nanstd(pooled, 0)
    wards = {name: place + 1 for place, name in enumerate(sorted({"surgery", "icu"}))}  # the others are rare
    made = modules()
    optimizer = sgd([p for module in made.values() for p in module.parameters()])
    for _ in (1, 2):
        for table in tables:
            scaled = np.nan_to_num((table.x.numpy() - mean) / deviation, nan=0.0)
            x = torch.from_numpy(scaled).float()
            ward, y = torch.tensor([wards.get(name, 0) for name in table.ward]), (table.y - 5) // 10
            for rows in (slice(0, 5), slice(5, 10)):
                made["loss"](made["body"](made["head"](x[rows], ward[rows])), y[rows]).backward()
                optimizer.step()
                optimizer.zero_grad()
    return made


def test_training_is_that_of_one_party_with_all_samples():
    result = simulate(plan(), parties())
    expected = uncut()
    site = result.workers["c"].site
    mine = [
        *site.stages["head", 2].module.parameters(),
        *result.workers["server"].site.stages["body", 0].module.parameters(),
    ]
    theirs = [*expected["head"].parameters(), *expected["body"].parameters()]
    for one, other in zip(mine, theirs, strict=True):
        assert torch.allclose(one, other, atol=2e-6)
    assert result.agreed["a"] == result.agreed["c"]
    assert result.agreed["a"]["ward"].values == ("icu", "surgery")
    assert result.agreed["a"]["y"].values == (5, 15, 25)


@pytest.mark.provokes("E262")
def test_a_prediction_uses_what_training_agreed_on():
    trained = simulate(plan(), parties())
    rest = {name: trained.agreed[name] for name in NAMES}
    asked = [
        Party(
            party.name,
            modules={k[0]: s.module for k, s in trained.workers[party.name].site.stages.items()},
            prediction=party.data,
            agreed=rest.get(party.name, {}),
        )
        for party in parties()
    ]
    found = predict(plan(), asked)["body"]
    head = trained.workers["a"].site.stages["head", 0].module
    prepared = trained.workers["a"].site.preprocess.prepare({"x": rows_of(0).x, "ward": rows_of(0).ward}, "here")
    body = trained.workers["server"].site.stages["body", 0].module
    assert torch.allclose(found[:10], body(head(prepared["x"], prepared["ward"])), atol=1e-6)
    with pytest.raises(DataError) as caught:
        predict(plan(), [replace(party, agreed={}) for party in asked])
    assert caught.value.code == "E262"
    assert "give Party(agreed=result.agreed['a'])" in str(caught.value)


def test_what_is_told_is_said_and_counted():
    made = plan()
    text = str(made)
    assert (
        "sends   counts, means and deviations of data.x (each column of at least 5 samples of a party), once, by way"
        in text
    )
    assert (
        "sends   the list of values of data.ward (at most 1,024, each in at least 2 samples of a party), once," in text
    )
    assert (
        "gets    the list of values of data.y (at most 1,024, also of one sample) from each of a, b, c, to put together"
        in text
    )
    assert made.digest() != plan(SHARED[:2]).digest()
    result = simulate(made, parties())
    flows = result.ledgers["b"].flows.items()
    assert sum(row.messages for key, row in flows if key[:3] == ("sent", "a", "start")) == len(SHARED) + 1  # a barrier


@pytest.mark.parametrize(
    ("least", "words"),
    [
        (1, "(also of one sample: then they are its values)"),
        (2, "(also of two samples: then they tell both values)"),
        (3, "(each column of at least 3 samples of a party)"),
    ],
)
def test_the_plan_warns_where_single_values_are_told(least: int, words: str):
    assert f"sends   counts, means and deviations of data.x {words}, once" in str(
        plan((Shared("x", at="head", least=least),))
    )


def numbers(rows: int) -> Tensor:
    return torch.randn(rows, 2, generator=torch.Generator().manual_seed(rows)) * rows + 60


def table(rows: int) -> TensorTable:
    return TensorTable(x=numbers(rows), y=torch.arange(rows) % 3)


def scaled(rows: dict[str, int], order: str, least: int = 5, made=table, **training: bool):
    """A run of hospitals with so many rows each, whose numbers are scaled."""
    names = tuple(rows)
    stages = [
        Stage("head", at=names, inputs=["data.x"], output="float32[batch, 3]"),
        Stage("body", at="server", inputs=["head"], output="float32[batch, 3]"),
        Loss("loss", at=names, inputs=["body", "data.y"]),
    ]
    whole = Plan(
        stages,
        preprocessing=[Shared("x", at="head", least=least)],
        training=Training(batch_size=4, order=order, hub="server", metrics_least=1, **training),
    )
    people = [Party("server", modules={"body": nn.Linear(3, 3)}, optimizer=sgd)]
    for name, count in rows.items():
        torch.manual_seed(0)
        mine = {"head": nn.Linear(2, 3), "loss": nn.CrossEntropyLoss()}
        people.append(Party(name, data=made(count), modules=mine, optimizer=sgd))
    return simulate(whole, people)


@pytest.mark.parametrize("order", ["relay", "parallel"])
@pytest.mark.parametrize("rows", [{"a": 1, "b": 9, "c": 7}, {"a": 9, "b": 4, "c": 7}])
def test_a_hospital_of_few_rows_tells_nothing_and_scales_as_all_do(order: str, rows: dict[str, int]):
    result = scaled(rows, order)
    told = [numbers(count).double().numpy() for count in rows.values() if count >= 5]
    agreed = result.agreed["a"]["x"]
    assert agreed.count == (16, 16)
    assert agreed.mean == pytest.approx(np.concatenate(told).mean(0), rel=1e-12)
    assert agreed.deviation == pytest.approx(np.concatenate(told).std(0), rel=1e-12)
    assert result.agreed == {name: {"x": agreed} for name in rows}
    assert scaled(rows, order, least=1).agreed["a"]["x"].count == (sum(rows.values()),) * 2


def dropping(count: int) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(Rows(numbers(count), [""] * count, torch.arange(count) % 3), 4, drop_last=True)


@pytest.mark.parametrize("made", [table, dropping])
@pytest.mark.parametrize("shuffle", [True, False])
def test_samples_of_a_dropped_batch_count_as_for_an_uncut_scaler(made, shuffle: bool):
    """What scikit-learn's StandardScaler does, fitted to all rows: 6 + 11 of them, in batches of 4."""
    agreed = scaled({"a": 6, "b": 11}, "relay", made=made, drop_last=True, shuffle=shuffle).agreed["a"]["x"]
    pooled = np.concatenate([numbers(6), numbers(11)]).astype(np.float64)
    assert agreed.count == (17, 17)
    assert agreed.mean == pytest.approx(pooled.mean(0), rel=1e-12)
    assert agreed.deviation == pytest.approx(pooled.std(0), rel=1e-12)


@pytest.mark.provokes("E261")
def test_columns_that_only_few_have_are_refused_before_round_0():
    with pytest.raises(DataError) as caught:
        scaled({"a": 3, "b": 4}, "relay")
    assert caught.value.code == "E261"
    assert "at least 5 samples of column 0, got fewer here, and at all others" in str(caught.value)
    assert caught.value.where.endswith("training data")


def test_evaluation_data_are_read_once_for_all_classes():
    reads = []

    class Read:
        def every(self):
            reads.append(self)
            yield {"y": ["a", "b"], "z": ["c", "d"]}

    shared = [Shared(field, at="head", kind="classes", least=1) for field in "yz"]
    stages = [
        Stage("head", at="a", inputs=["data.x"], output="float32[batch, 2]"),
        *(Loss(f"of-{field}", at="a", inputs=["head", f"data.{field}"]) for field in "yz"),
    ]
    train, evaluation = Read(), Read()
    own = Preprocess(Plan(stages, preprocessing=shared), "a", {"train": train, "evaluate": evaluation})
    for name in ("data.y", "data.z"):
        own.take(name, own.merge(name, [("a", own.summary(name))]), "a")
    assert reads.count(evaluation) == 1


@pytest.mark.provokes("E261")
@pytest.mark.parametrize("loader", [False, True])
def test_a_class_of_the_evaluation_data_alone_is_refused_before_round_1(loader: bool):
    told, odd = [], rows_of(1)
    odd.y[7] = 99
    evaluation = torch.utils.data.DataLoader(odd, batch_size=5) if loader else odd
    given = [replace(p, evaluation=evaluation if p.name == "b" else p.data) for p in parties()]
    with pytest.raises(DataError) as caught:
        simulate(plan(), given, notify=lambda *event: told.append(event))
    assert (caught.value.code, [details for _, details in told if details.get("mode") == "train"]) == ("E261", [])
    assert caught.value.where == "party b, preprocessing of 'y' in the evaluation data, batch 1"
    assert caught.value.got == "99, and so 1 in a batch"
    odd.y[7] = 5
    assert simulate(plan(), given).metrics()


@pytest.mark.provokes("E261")
@pytest.mark.parametrize(
    ("given", "got"),
    [(["a", None], "None at place 1"), (["a", "b", 3.0], "float at place 2"), ([1, 2], "int at place 0")],
)
def test_what_is_no_text_in_a_batch_is_named(given: list[object], got: str):
    with pytest.raises(DataError) as caught:
        summarise(Shared("y", at="a", kind="classes"), [given], "here")
    assert (caught.value.code, caught.value.got) == ("E261", f"{got} of this batch, counted from 0")


def test_the_run_folder_keeps_what_was_agreed(tmp_path):
    result = simulate(plan(), parties())
    write_results(tmp_path, result)
    text = (tmp_path / "b.preprocessing.json").read_text()
    assert '"values":["icu","surgery"]' in text
    assert "only-" not in text


def test_the_contract_file_round_trips():
    contract = Contract(plan=plan(), coordinator="server", addresses={"server": "127.0.0.1:7000"})
    again = parse_contract(dump_contract(contract), where="here")
    assert again.plan == contract.plan
    assert again.plan.preprocessing == SHARED


def test_features_of_vertical_parties_are_their_own():
    """One holder: nothing is sent at all."""
    stages = [
        Stage("left", at="a", inputs=["data.x"], output="float32[batch, 2]"),
        Stage("right", at="b", inputs=["left", "data.x"], output="float32[batch, 2]"),
        Loss("loss", at="b", inputs=["right", "data.y"]),
    ]

    class Add(nn.Module):
        def forward(self, one: Tensor, two: Tensor) -> Tensor:
            return one + two

    made = Plan(stages, preprocessing=[Shared("x", at="a"), Shared("x", at="b")], training=Training(batch_size=10))
    x = torch.randn(10, 2) * 9
    people = [
        Party("a", data=TensorTable(x=x), modules={"left": nn.Identity()}),
        Party("b", data=TensorTable(x=x + 5, y=x), modules={"right": Add(), "loss": nn.MSELoss()}),
    ]
    assert "counts, means" not in str(made)
    result = simulate(made, people)
    assert result.agreed["a"]["x"].mean != result.agreed["b"]["x"].mean
    assert [key for key in result.ledgers["a"].flows if key[2:4] == ("start", "exchange") and key[4] != 0] == []


def test_a_vertical_topology_with_preprocessing_trains_as_on_data_scaled_by_hand():
    class Add(nn.Module):
        def forward(self, one: Tensor, two: Tensor) -> Tensor:
            return one + two

    def trained(x: Tensor, z: Tensor, preprocessing: list[Shared]) -> dict[str, Tensor]:
        torch.manual_seed(1)
        heads = {"a": nn.Linear(2, 2), "b": nn.Linear(3, 2)}
        cuts = dict.fromkeys(heads, "float32[batch, 2]")
        made = vertical(cuts, "s", output="float32[batch, 2]", batch_size=5, epochs=2, preprocessing=preprocessing)
        people = [
            Party(name, data=TensorTable(x=data), modules={f"head-{name}": heads[name]}, optimizer=sgd)
            for name, data in (("a", x), ("b", z))
        ]
        people.append(Party("s", data=TensorTable(y=torch.ones(10, 2)), modules={"body": Add(), "loss": nn.MSELoss()}))
        simulate(made, people)
        return {f"{name}.{key}": value for name, head in heads.items() for key, value in head.state_dict().items()}

    x, z = torch.randn(10, 2) * 9 + 4, torch.randn(10, 3)
    scaled = (x - x.mean(0)) / x.std(0, correction=0)
    found = trained(x, z, [Shared("x", at="head-a")])
    for name, value in trained(scaled, z, []).items():
        torch.testing.assert_close(found[name], value)
        assert not torch.allclose(value, trained(x, z, [])[name], atol=1e-3)


@pytest.mark.provokes(by="code")
@pytest.mark.parametrize(
    ("shared", "code", "words"),
    [
        (Shared("z", at="head"), "E112", "'a' cannot preprocess the field 'z': expected one of its fields ward, x, y"),
        (Shared("x", at="server"), "E112", "expected one of its fields (none)"),
        (Shared("x", at="nobody"), "E110", "unknown holder of 'x': 'nobody'"),
        (Shared("x", at="head", kind="minmax"), "E110", "unknown preprocessing of 'x': 'minmax'"),
        (Shared("x", at="head", limit=0), "E110", "limit of the preprocessing of 'x' is 0"),
    ],
)
def test_preprocessing_that_cannot_be_is_refused(shared, code, words):
    with pytest.raises(PlanError) as caught:
        plan((shared,))
    assert caught.value.code == code
    assert words in f"{caught.value.what}: {caught.value.why()}"
    assert caught.value.where == f"preprocessing of {shared.field!r}" + f", at {shared.at}" * (code == "E112")


def test_a_field_is_preprocessed_once():
    with pytest.raises(PlanError, match="each once"):
        plan((SHARED[0], Shared("x", at="a")))


@pytest.mark.provokes("E268")
def test_data_that_fail_while_they_are_scanned_are_named():
    class Broken(TensorTable):
        def batch(self, indices):
            raise KeyError("bp")

    stages = [
        Stage("head", at="a", inputs=["data.x"], output="float32[batch, 3]"),
        Loss("loss", at="a", inputs=["head", "data.y"]),
    ]
    table = Broken(x=torch.ones(6, 2), y=torch.arange(6) % 3)
    modules = {"head": nn.Linear(2, 3), "loss": nn.CrossEntropyLoss()}
    party = Party("a", data=table, modules=modules, optimizer=torch.optim.SGD)
    broken = Plan(stages, training=Training(batch_size=3), preprocessing=(Shared("x", at="head"),))
    with pytest.raises(DataError, match=r"E268.*party a, preprocessing of 'x', batch 0.*KeyError: 'bp'"):
        simulate(broken, [party])


@pytest.mark.provokes("E307")
def test_too_few_outputs_for_the_classes_that_were_agreed_on_are_told_their_number():
    stages = [
        Stage("head", at=NAMES, inputs=["data.x", "data.ward"], output="float32[batch, 3]"),
        Stage("body", at="server", inputs=["head"], output="float32[batch, 2]"),
        Loss("loss", at=NAMES, inputs=["body", "data.y"]),
    ]
    narrow = Plan(stages, training=Training(epochs=1, batch_size=10, shuffle=False), preprocessing=SHARED)
    held = [replace(one, modules={"body": nn.Linear(3, 2)}) if one.name == "server" else one for one in parties()]
    with pytest.raises(StageError) as caught:
        simulate(narrow, held)
    error = caught.value
    assert error.code == "E307"
    assert error.got.endswith("labels 0 to 2, where 2 outputs take 0 to 1; the parties agreed on 3 classes of y")
    assert error.remedy.startswith("give the model one output for each class")
    assert error.remedy.endswith(
        "`Result.agreed` lists them after a run, and PARTY.preprocessing.json in the run's folder"
    )
    assert not any(value in str(error) for value in ("15", "25"))
    told = abort_of(error, "a")
    assert "3 classes" not in told.what + told.remedy
