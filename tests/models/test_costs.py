"""What a cut costs: against numbers worked out by hand, and for each model where it can be cut."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import flop_registry

import cutlayer as cl
from cutlayer import models
from cutlayer.models.costs import candidates, costs
from tests.models.zoo import SUBJECTS


def test_costs_of_a_small_network_worked_out_by_hand():
    net = nn.Sequential(nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, 3, bias=False))
    found = {one.point: one for one in costs(net, torch.zeros(2, 6), batch=4)}
    assert [one.point for one in found.values() if one.error is None] == ["0", "1"]
    assert found["2"].error is not None
    assert found["2"].error.code == "E312"
    one = found["0"]
    assert one.tensors == ("float32[batch, 5]",)
    assert (one.up, one.down) == (4 * 5 * 4, 4 * 5 * 4)
    assert one.client is not None
    assert one.server is not None
    assert (one.client.parameters, one.server.parameters) == (30, 15)
    assert one.client.flops == 2 * 2 * 4 * 6 * 5  # forward, and backward for the weights: none goes on to the data
    assert one.server.flops == 3 * 2 * 4 * 5 * 3
    assert one.client.memory == 30 * 4 * 4 + 4 * 6 * 4  # Adam's four, and the input
    assert one.server.memory == 15 * 4 * 4 + 2 * 4 * 5 * 4 or one.server.memory == 15 * 4 * 4 + 4 * 5 * 4


def test_a_skip_is_paid_for():
    found = {one.point: one for one in costs(SUBJECTS["unet"].make(), SUBJECTS["unet"].inputs["x"], batch=2)}
    assert len(found["bottom"].tensors) == 3  # the bottom, and the two long skips
    assert found["bottom"].up == 2 * 4 * (8 * 2 * 2 + 8 * 4 * 4 + 4 * 8 * 8)
    assert found["down1"].up == 2 * 4 * 4 * 8 * 8


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.join, self.last = nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.last(self.join(self.one(x) * mask))


def test_a_raw_input_that_the_server_needs_is_told_and_counted():
    example = {"x": torch.rand(3, 3), "mask": torch.ones(3, 4, dtype=torch.int64)}
    found = {one.point: one for one in costs(Masked(), example, batch=2)}
    assert found["one"].tensors == ("float32[batch, 4]",)
    assert found["one"].raw == {"mask": "int64[batch, 4]"}
    plan = cl.split(Masked(), "one", example=example, labels="server", release=["mask"]).plan()
    (released,) = [one.spec.nbytes(2) for one in plan.releases if one.field == "mask"]
    assert found["one"].up == 2 * 4 * 4 + released == 2 * 4 * 4 + 2 * 4 * 8
    assert found["one"].down == 2 * 4 * 4
    assert found["join"].raw == {}
    assert found["join"].up == 2 * 4 * 4
    with pytest.raises(cl.CutlayerError, match="needs the raw input 'mask'"):
        cl.split(Masked(), "one", example=example, labels="server")


def test_whole_numbers_that_cross_bring_no_gradient_back():
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            chosen = (x[:, :1] * 10).long()
            return self.two(self.one(x)) * chosen

    (one,) = [c for c in costs(Masked(), torch.rand(3, 3), batch=2) if c.point == "one"]
    assert one.up == 2 * (4 * 4 + 8)
    assert one.down == 2 * 4 * 4


@pytest.mark.parametrize(("name", "least"), [("unet", 20), ("lstm", 3), ("gpt2", 4), ("tied", 4)])
def test_candidates_are_those_that_can_be_cut(name: str, least: int):
    subject = SUBJECTS[name]
    model = subject.make()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    names = candidates(model, dict(subject.inputs))
    assert len(names) >= least
    assert models.candidates is candidates
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_page_of_cuts_is_current_for_small_models():
    path = Path(__file__).parents[2] / "scripts" / "cuts_page.py"
    spec = importlib.util.spec_from_file_location("cuts_page", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    text = script.PAGE.read_text(encoding="utf-8")
    assert set(re.findall(r"(?m)^## ([\w-]+)$", text)) == set(SUBJECTS) == set(script.TITLES)
    for name in ("unet", "lstm", "tied", "encoder"):
        row, section = script.section(name, SUBJECTS[name])
        assert row in text, "run python scripts/cuts_page.py"
        assert section in text, "run python scripts/cuts_page.py"


def test_operations_are_those_of_a_run():
    net = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2))
    (found,) = [one for one in costs(net, torch.zeros(2, 1, 8, 8), batch=4) if one.point == "1"]
    made = cl.split(net, "1", labels="server", example=torch.zeros(2, 1, 8, 8))
    data = TensorDataset(torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 0, 1]))
    run = cl.fit(made, DataLoader(data, batch_size=4), loss=nn.CrossEntropyLoss())
    ledgers = run.result.ledgers
    spent = {
        party: sum(number for (_, stage), number in ledgers[party].flops.items() if stage != "loss")
        for party in ledgers
    }
    assert found.client is not None
    assert found.server is not None
    assert spent == {"client": found.client.flops, "server": found.server.flops}


def test_a_formula_that_raises_counts_nothing(monkeypatch: pytest.MonkeyPatch):
    def unknown(*_shapes: object, **_other: object) -> int:
        raise ValueError("a new argument")

    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    monkeypatch.setitem(flop_registry, torch.ops.aten.addmm, unknown)  # the forward of a linear layer
    (found,) = [one for one in costs(net, torch.rand(3, 3), batch=3) if one.point == "0"]
    assert found.server is not None
    assert found.server.flops == 2 * (2 * 3 * 4 * 2)  # the backward's two products
