"""The whole model put together again: only where the plan says so, and equal to the uncut one."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from cutlayer.core.parts import Loss, Stage, Training
from cutlayer.core.plan import Plan
from cutlayer.data.sources import TensorTable
from cutlayer.errors import CheckpointError, ConfigError, PlanError
from cutlayer.run.config import Contract, dump_contract
from cutlayer.run.export import JOINED, assemble, export
from cutlayer.run.loop import session
from cutlayer.run.party import Party
from cutlayer.run.results import write_results
from cutlayer.run.simulate import simulate


class Named(nn.Module):
    """Layers under the names that they have in the uncut model."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, value):
        for layer in self.children():
            value = layer(value)
        return value


def uncut() -> nn.Module:
    torch.manual_seed(0)
    return Named(first=nn.Linear(4, 5), norm=nn.BatchNorm1d(5), last=nn.Linear(5, 2))


def plan(at: object = "a", order: str = "relay", **rest) -> Plan:
    stages = [
        Stage("head", at=at, inputs=["data.x"], output="float32[batch, 5]"),
        Stage("body", at="server", inputs=["head"], output="float32[batch, 5]"),
        Stage("tail", at=at, inputs=["body"], output="float32[batch, 2]"),
        Loss("loss", at=at, inputs=["tail", "data.y"]),
    ]
    return Plan(stages, training=Training(batch_size=8, order=order), **rest)


def run(made: Plan, clients: tuple[str, ...] = ("a",), **more):
    model = uncut()
    table = TensorTable(x=torch.randn(16, 4), y=torch.randint(0, 2, (16,)))
    parties = [Party("server", modules={"body": Named(norm=model.norm)}, optimizer=sgd)]
    for name in clients:
        own = copy.deepcopy({"head": Named(first=model.first), "tail": Named(last=model.last)})
        parties.append(Party(name, modules={**own, "loss": nn.CrossEntropyLoss()}, data=table, optimizer=sgd, **more))
    return simulate(made, parties)


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.1)


def contract_text(made: Plan) -> str:
    return dump_contract(Contract(plan=made, coordinator="server", addresses={"server": "127.0.0.1:7000"}))


def keep(folder: Path, made: Plan, result) -> Path:
    write_results(folder, result, contract_text=contract_text(made))
    return folder


def test_a_result_gives_the_uncut_models_weights():
    result = run(plan())
    model = uncut()
    model.load_state_dict(assemble(result), strict=True)
    site = result.workers["a"].site
    assert torch.equal(model.first.weight, site.stages["head", 0].module.first.weight)
    assert model.norm.num_batches_tracked == 2


def test_the_party_that_may_gets_all_weights_at_the_end(tmp_path):
    made = plan(assemble_at=["server"])
    result = run(made)
    keep(tmp_path, made, result)
    joined = safetensors.torch.load_file(tmp_path / JOINED)
    uncut().load_state_dict(joined, strict=True)
    for key, tensor in assemble(result).items():
        assert torch.equal(joined[key], tensor)
    assert set(result.workers["server"].site.gathered) == {"head", "tail"}
    assert result.workers["a"].site.gathered == {}
    flows = result.ledgers["a"].flows.items()
    assert sum(row.messages for key, row in flows if key[:3] == ("sent", "server", "finish")) == 3  # and a barrier
    assert export(tmp_path, tmp_path / "model.safetensors") == len(joined)


@pytest.mark.parametrize("order", ["relay", "parallel"])
@pytest.mark.parametrize("evaluated", [False, True])
def test_replicas_are_those_of_the_last_turn(order, evaluated):
    made = plan(["a", "b", "c"], order, assemble_at=["server"])
    more = {"evaluation": TensorTable(x=torch.ones(8, 4), y=torch.zeros(8).long())} if evaluated else {}
    result = run(made, ("a", "b", "c"), **more)
    gathered = result.workers["server"].site.gathered["head"]["first.weight"]
    for lane, name in enumerate("abc"):
        assert torch.equal(gathered, result.workers[name].site.stages["head", lane].module.first.weight)


@pytest.mark.provokes("E229")
def test_nobody_may_unless_the_contract_says_so(tmp_path):
    made = plan()
    keep(tmp_path, made, run(made))
    assert not (tmp_path / JOINED).exists()
    with pytest.raises(ConfigError) as caught:
        assemble(tmp_path)
    assert caught.value.code == "E229"
    assert "allows nobody to put the whole model together" in str(caught.value)
    assert "agree on it with all parties" in str(caught.value)


def test_a_party_that_may_not_has_not_all_of_it(tmp_path):
    made = plan(assemble_at=["server"])
    keep(tmp_path, made, run(made))
    (tmp_path / JOINED).unlink()
    (tmp_path / "server.safetensors").unlink()
    with pytest.raises(ConfigError) as caught:
        assemble(tmp_path)
    assert caught.value.code == "E229"
    assert "the weights of the stages body are not here" in str(caught.value)


def test_all_parties_of_one_machine_are_joined_from_their_files(tmp_path):
    made = plan(assemble_at=["server"])
    result = run(made)
    keep(tmp_path, made, result)
    (tmp_path / JOINED).unlink()
    for source in (tmp_path, str(tmp_path)):
        assert assemble(source).keys() == assemble(result).keys()
        for key, tensor in assemble(source).items():
            assert torch.equal(tensor, assemble(result)[key])


@pytest.mark.provokes("E229")
def test_a_run_that_has_not_ended_is_to_be_gone_on_with(tmp_path):
    made = plan(assemble_at=["server"])
    keep(tmp_path, made, run(made))
    for path in (*tmp_path.glob("*.safetensors"), tmp_path / "summary.json"):
        path.unlink(missing_ok=True)
    (tmp_path / "launch.json").write_text('{"kind": "join", "digest": "", "party_files": []}')
    with pytest.raises(ConfigError, match=r"E229.*has not ended.*cutlayer resume"):
        assemble(tmp_path)


@pytest.mark.provokes("E806")
def test_a_damaged_file_and_a_folder_without_a_run(tmp_path):
    with pytest.raises(ConfigError, match="holds no run with a contract"):
        assemble(tmp_path)
    made = plan(assemble_at=["server"])
    keep(tmp_path, made, run(made))
    (tmp_path / JOINED).write_bytes(b"damaged")
    with pytest.raises(CheckpointError) as caught:
        assemble(tmp_path)
    assert caught.value.code == "E806"
    assert "copy it again" in caught.value.remedy


def test_names_that_stages_have_in_common_get_the_stage_before_them():
    stages = [
        Stage("head", at="a", inputs=["data.x"], output="float32[batch, 4]"),
        Stage("body", at="b", inputs=["head"], output="float32[batch, 2]"),
        Loss("loss", at="b", inputs=["body"]),
    ]
    torch.manual_seed(1)
    parties = [
        Party("a", modules={"head": nn.Linear(4, 4)}, optimizer=sgd, data=TensorTable(x=torch.randn(8, 4))),
        Party("b", modules={"body": nn.Linear(4, 2), "loss": torch.mean}, optimizer=sgd),
    ]
    found = assemble(simulate(Plan(stages, training=Training(batch_size=8)), parties))
    assert found.keys() == {"head.weight", "head.bias", "body.weight", "body.bias"}


def test_the_printed_plan_says_who_may():
    text = str(plan(assemble_at=["server"]))
    assert "its weights of head to server, at the end (it may put the whole model together)" in text
    assert "keeps   data.x\n" in text  # who gets the tail, and has its gradients, can read labels
    assert "keeps   data.x, data.y, its weights" in str(plan())
    assert plan().digest() != plan(assemble_at=["server"]).digest()


@pytest.mark.parametrize(("wrong", "words"), [(["nobody"], "unknown party in assemble_at"), ("server", "one text")])
def test_a_stranger_may_not(wrong, words):
    with pytest.raises(PlanError, match=words):
        plan(assemble_at=wrong)


@pytest.mark.provokes("E229")
def test_what_assemble_is_given(tmp_path: Path):
    for wrong, words in (
        (str(tmp_path / "nowhere"), "E229.*holds no run with a contract.*nowhere"),
        (
            session(plan(), Party("a"), others=[Party("server")]),
            r"E229.*got Session\. give cl\.assemble\(session\.result\(\)\)",
        ),
        (3, r"E229.*expected what fit or simulate gave, or the folder of a run, got int.*cl.assemble\(run\)"),
    ):
        with pytest.raises(ConfigError, match=words):
            assemble(wrong)
