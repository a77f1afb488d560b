"""Checks before a run: real modules on one batch, certificates, and nothing sent."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch
from torch import nn

from cutlayer.core.parts import Loss, Stage
from cutlayer.core.plan import Plan
from cutlayer.core.topologies import u_shaped, vanilla
from cutlayer.data.sources import TensorTable
from cutlayer.errors import ConfigError, ContractError, DataError, StageError
from cutlayer.run.config import Contract
from cutlayer.run.launch import assumed_roster
from cutlayer.run.party import Party, counts
from cutlayer.run.partyfile import load_party_file
from cutlayer.run.preflight import preflight, try_party
from cutlayer.transport.pki import create_authority, issue

NOW = datetime.now(UTC).replace(microsecond=0)
PLAN = u_shaped("a", "b", cut="float32[batch, 8]", back="float32[batch, 4]", output="float32[batch, 2]", batch_size=4)

CODE = """
import torch
from torch import nn
from cutlayer import Party, TensorTable

def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)

def a(name):
    table = TensorTable(x=torch.randn(9, 3), y=torch.zeros(9, dtype=torch.int64))
    modules = {"head": nn.Linear(3, 8), "tail": nn.Linear(4, 2), "loss": nn.CrossEntropyLoss()}
    return Party(name, modules=modules, data=table, optimizer=sgd)

def b(name):
    return Party(name, modules={"body": nn.Linear(8, 4)}, optimizer=sgd)

def wide(name):
    return Party(name, modules={"body": nn.Linear(8, 5)}, optimizer=sgd)
"""


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def owner(**changes: object) -> Party:
    modules = {"head": nn.Linear(3, 8), "tail": nn.Linear(4, 2), "loss": nn.CrossEntropyLoss()}
    table = TensorTable(x=torch.randn(9, 3), y=torch.zeros(9, dtype=torch.int64))
    return Party("a", **{"modules": modules, "data": table, "optimizer": sgd, **changes})  # type: ignore[arg-type]


def attempt(party: Party, plan=PLAN) -> None:
    try_party(plan, party, assumed_roster(plan, {party.name: counts(party)}))


def test_party_that_fits_passes_and_its_step_is_a_real_one():
    party = owner()
    before = party.modules["head"].weight.detach().clone()  # type: ignore[union-attr]
    attempt(party)
    assert not torch.equal(before, party.modules["head"].weight)  # type: ignore[union-attr]


def test_evaluation_data_is_tried_as_well():
    odd = TensorTable(x=torch.randn(4, 7), y=torch.zeros(4, dtype=torch.int64))
    with pytest.raises(StageError, match="head"):
        attempt(owner(evaluation=odd))


def test_prediction_data_is_tried_as_well_and_needs_no_label():
    attempt(owner(prediction=TensorTable(x=torch.randn(4, 3))))
    with pytest.raises(DataError, match="no usable field 'x'") as caught:
        attempt(owner(prediction=TensorTable(z=torch.randn(4, 3))))
    assert "predict round" in caught.value.where


@pytest.mark.parametrize("order", ["relay", "parallel"])
def test_replicas_are_tried_without_the_others(order: str):
    plan = vanilla(["c", "a"], "b", cut="float32[batch, 8]", output="float32[batch, 2]", batch_size=4, order=order)
    table = TensorTable(x=torch.randn(9, 3), y=torch.zeros(9, dtype=torch.int64))
    attempt(Party("a", modules={"head": nn.Linear(3, 8)}, data=table, optimizer=sgd), plan)
    attempt(Party("b", modules={"body": nn.Linear(8, 2), "loss": nn.CrossEntropyLoss()}, optimizer=sgd), plan)
    with pytest.raises(StageError, match="body"):
        attempt(Party("b", modules={"body": nn.Linear(8, 3), "loss": nn.CrossEntropyLoss()}, optimizer=sgd), plan)


@pytest.mark.parametrize(
    ("party", "error", "message"),
    [
        (Party("c"), ConfigError, "'c' is no party of the plan"),
        (owner(data=None), DataError, "no data for train"),
        (owner(modules={}), ConfigError, "no module for stage"),
        (owner(data=TensorTable(x=torch.randn(9, 3))), DataError, "no usable field 'y'"),
        (owner(data=TensorTable(x=torch.full((9, 3), torch.nan), y=torch.zeros(9).long())), Exception, "NaN"),
        (Party("b", modules={"body": nn.Linear(8, 5)}, optimizer=sgd), StageError, "body"),
        (Party("b", modules={"body": nn.Linear(9, 4)}, optimizer=sgd), StageError, "body"),
    ],
    ids=["stranger", "no data", "no module", "no field", "nan", "wide output", "wide input"],
)
def test_party_that_does_not_fit(party: Party, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        attempt(party)


def test_released_data_of_another_dtype_is_found():
    plan = vanilla("a", "b", cut="float32[batch, 8]", output="float32[batch, 2]", label="int32[batch]")
    with pytest.raises(ContractError, match="int64"):
        attempt(owner(modules={"head": nn.Linear(3, 8)}), plan)


def site(folder: Path, *, days: int, body: str = "b") -> list[Path]:
    create_authority(folder / "ca", name="test", now=NOW)
    (folder / "code.py").write_text(CODE)
    paths = []
    for name, builder in (("a", "a"), ("b", body)):
        issue(folder / "ca", name, folder / "kits", days=days, now=NOW)
        paths.append(folder / f"{name}.toml")
        paths[-1].write_text(
            f'party = "{name}"\n[code]\nbuilder = "code.py:{builder}"\n[network]\ncredentials = "kits/{name}"\n'
        )
    return paths


def findings(folder: Path, now: datetime, **settings: object) -> list[tuple[str, str, str]]:
    contract = Contract(plan=PLAN, coordinator="b", addresses={"b": "b.example.org:1"})
    files = [load_party_file(path) for path in site(folder, **settings)]  # type: ignore[arg-type]
    found = list(preflight(contract, files, now=now))
    assert all((finding.error is not None) == (finding.level == "fail") for finding in found)
    return [(f.level, f.subject, f.error.code if f.error else f.text) for f in found]


def test_all_is_well(tmp_path: Path):
    found = findings(tmp_path, NOW, days=200)
    assert [row[:2] for row in found] == [("ok", name) for name in ("contract", "a", "b", "a", "b")]
    assert found[0][2].startswith("4 stages, 2 parties, 2 cuts, digest ")
    assert found[1][2].endswith("200 more days")
    assert found[3][2] == "one batch through head, tail, loss; samples: train 9"


def test_labels_that_can_be_read_from_gradients_are_a_warning(tmp_path: Path):
    """Not a failure: a plan by hand is its author's."""
    stages = [
        Stage("head", at="a", inputs=["data.x"], output="float32[batch, 8]"),
        Stage("body", at="b", inputs=["head"], output="float32[batch, 4]"),
        Stage("tail", at="a", inputs=["body"], output="float32[batch, 2]"),
        Loss("loss", at="a", inputs=["tail", "body", "data.y"]),
    ]
    contract = Contract(plan=Plan(stages), coordinator="b", addresses={"b": "b.example.org:1"})
    found = list(preflight(contract, [], now=NOW))
    assert [finding.level for finding in found] == ["ok", "warn"]
    assert found[1].subject == "contract"
    assert found[1].text.startswith("b can read data.y of a from the gradient at body->loss")
    assert found[1].do.startswith("put a stage with weights, at the party of the loss, before the loss (a tail)")


def test_dates_of_certificates(tmp_path: Path):
    assert findings(tmp_path / "soon", NOW, days=20)[1][0] == "warn"
    late = findings(tmp_path / "late", NOW + timedelta(days=21), days=20)
    assert late[1] == ("fail", "a", "E661")
    assert late[-1][0] == "ok"


def test_party_without_network_settings_can_still_be_run_here(tmp_path: Path):
    paths = site(tmp_path, days=200)
    paths[0].write_text(paths[0].read_text().split("[network]")[0])
    contract = Contract(plan=PLAN, coordinator="b", addresses={"b": "b.example.org:1"})
    found = list(preflight(contract, [load_party_file(paths[0])], now=NOW))
    assert [finding.level for finding in found] == ["ok", "warn", "ok"]
    assert "not for `cutlayer join`" in found[1].text


def test_one_failure_does_not_hide_the_others(tmp_path: Path):
    found = findings(tmp_path, NOW, days=200, body="wide")
    assert [(level, subject) for level, subject, _ in found[-2:]] == [("ok", "a"), ("fail", "b")]
    assert found[-1][2].startswith("E30")
