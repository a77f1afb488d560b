"""What other tests show in one process holds between parties over gRPC with mutual TLS: the same bits and bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import cutlayer as cl
from cutlayer.errors import ConfigError
from tests.run import test_export, test_loop, test_preprocessing, test_tasks
from tests.run.trial import Trial


def joined(plan: cl.Plan, parties: Sequence[cl.Party], folder: Path) -> Mapping[str, cl.Result]:
    trial = Trial(plan, folder, coordinator="server")
    found = trial.play(
        {
            one.name: lambda one=one: cl.join(
                plan, one, network=trial.settings(one.name), folder=folder / f"of-{one.name}"
            )
            for one in parties
        }
    )
    assert all(isinstance(result, cl.Result) for result in found.values()), found
    return found


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_halves_under_autocast_are_those_of_fit(kind: str, tmp_path: Path):
    def made() -> cl.Split:
        return cl.split(test_loop.Net(), ("stem", "deep"), example=torch.zeros(2, 6), autocast=kind)

    own = {"scheduler": test_loop.cosine, "autocast": kind, "seed": 1}
    loss, settings = nn.CrossEntropyLoss(), test_loop.SETTINGS
    fitted = cl.fit(made(), test_loop.rows(), loss=loss, optimizer=test_loop.sgd, party=own, **settings).state_dict()
    parts = made()
    plan = parts.plan("client", "server", training=cl.Training(**settings))
    assert kind in {edge.spec.dtype for edge in plan.graph.edges if edge.spec is not None}
    client = cl.Party(
        "client",
        modules={**parts.modules("client"), "loss": loss},
        data=test_loop.rows(),
        fields=["x", "label"],
        optimizer=test_loop.sgd,
        **own,
    )
    server = cl.Party("server", modules=parts.modules("server"), optimizer=test_loop.sgd, **own)
    joined(plan, [client, server], tmp_path)
    stages = {**parts.modules("client"), **parts.modules("server")}
    found = {name: value for module in stages.values() for name, value in module.state_dict().items()}
    assert found.keys() == fitted.keys()
    assert all(torch.equal(found[name], value) for name, value in fitted.items())


@pytest.mark.parametrize("name", test_tasks.TASKS)
def test_losses_and_metrics_of_a_task_are_those_of_one_process(name: str, tmp_path: Path):
    """With labels, ignored places and sample weights of any dtype and shape, at two clinics that take turns."""
    case = test_tasks.TASKS[name].case(test_tasks.COUNTS)
    here, oracle = test_tasks.both(case)
    assert test_tasks.difference(here, oracle) == 0.0
    parties = [replace(one, evaluation=one.data) for one in case.parties()]
    compared = 0
    for party, result in joined(case.plan, parties, tmp_path).items():
        for place, stage in result.workers[party].site.stages.items():
            wanted = here.workers[party].site.stages[place].module.state_dict()
            own = stage.module.state_dict()
            assert own.keys() == wanted.keys()
            assert all(torch.equal(own[key], value) for key, value in wanted.items())
            compared += len(own)
        assert result.metrics() == {"server": {}}.get(party, here.metrics())
    assert compared > 0


def test_shared_preprocessing_is_agreed_alike(tmp_path: Path):
    plan = test_preprocessing.plan()
    here = cl.simulate(plan, test_preprocessing.parties())
    there = joined(plan, test_preprocessing.parties(), tmp_path)
    for name, result in there.items():
        mine = here.workers[name].site
        assert result.agreed.get(name) == here.agreed.get(name)
        for place, stage in result.workers[name].site.stages.items():
            wanted = mine.stages[place].module.state_dict()
            assert all(torch.equal(value, wanted[key]) for key, value in stage.module.state_dict().items())
        flows = (
            {key: (row.payload, row.messages) for key, row in one.ledgers[name].flows.items()} for one in (here, result)
        )
        assert len({str(sorted(one.items())) for one in flows}) == 1
    assert set(test_preprocessing.NAMES) <= set(here.agreed)


def test_the_party_that_the_contract_allows_has_the_whole_model_and_no_other(tmp_path: Path):
    plan, whole = test_export.plan(assemble_at=["server"]), test_export.uncut()
    ends = {"head": test_export.Named(first=whole.first), "tail": test_export.Named(last=whole.last)}
    dice = torch.Generator().manual_seed(1)
    data = cl.TensorTable(x=torch.randn(16, 4, generator=dice), y=torch.randint(0, 2, (16,), generator=dice))
    sgd = test_export.sgd
    a = cl.Party("a", modules={**ends, "loss": nn.CrossEntropyLoss()}, data=data, optimizer=sgd)
    server = cl.Party("server", modules={"body": test_export.Named(norm=whole.norm)}, optimizer=sgd)
    for name, result in joined(plan, [a, server], tmp_path).items():
        (tmp_path / f"run-{name}").mkdir()
        test_export.keep(tmp_path / f"run-{name}", plan, result)
    found = cl.assemble(tmp_path / "run-server")
    test_export.uncut().load_state_dict(found, strict=True)
    assert all(torch.equal(found[name], value) for name, value in whole.state_dict().items())
    with pytest.raises(ConfigError, match="E229"):
        cl.assemble(tmp_path / "run-a")
