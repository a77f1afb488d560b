"""Vertical parties that miss some of the people: equal to a model that never sees the missing rows."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from cutlayer.core.topologies import vertical
from cutlayer.data.sources import TensorTable
from cutlayer.errors import StageError
from cutlayer.models.rows import Present, fill
from cutlayer.run.party import Party
from cutlayer.run.simulate import simulate

COUNT, SPEC = 40, "float32[batch, 4]"


class Merge(nn.Module):
    """Joins the clinic's values, the laboratory's (zeros where missing) and who was there."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(9, 2)

    def forward(self, clinic: Tensor, rows: Tensor, present: Tensor) -> Tensor:
        return self.out(torch.cat([clinic, fill(rows, present), present[:, None].float()], 1))


def laboratory() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU())


def adam(parameters):
    return torch.optim.Adam(parameters, 1e-2)


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, z = torch.randn(COUNT, 2, generator=generator), torch.randn(COUNT, 3, generator=generator)
    present = torch.rand(COUNT, generator=generator) < 0.6
    z[~present] = float("nan")  # never looked at
    return x, z, present, torch.randint(0, 2, (COUNT,), generator=generator)


def modules() -> dict[str, nn.Module]:
    torch.manual_seed(3)
    return {
        "head-clinic": nn.Linear(2, 4),
        "head-lab": Present(laboratory(), (4,)),
        "body": Merge(),
        "loss": nn.CrossEntropyLoss(),
    }


@pytest.mark.parametrize("microbatches", [1, 2])
def test_missing_rows_are_never_seen_and_cost_nothing(microbatches):
    plan = vertical(
        {"clinic": SPEC, "lab": SPEC}, "server", output="float32[batch, 2]", optional=["lab"], batch_size=20,
        microbatches=microbatches, epochs=3, shuffle=False,
    )  # fmt: skip
    x, z, present, y = data()
    made = copy.deepcopy(modules())
    result = simulate(
        plan,
        [
            Party("clinic", data=TensorTable(x=x), modules={"head-clinic": made["head-clinic"]}, optimizer=adam),
            Party(
                "lab", data=TensorTable(x=z, present=present), modules={"head-lab": made["head-lab"]}, optimizer=adam
            ),
            Party(
                "server", data=TensorTable(y=y), modules={"body": made["body"], "loss": made["loss"]}, optimizer=adam
            ),
        ],
    )
    uncut = modules()
    lab = uncut["head-lab"].module
    optimizer = adam([p for module in uncut.values() for p in module.parameters()])
    for _ in range(3):
        for begin in (0, 20):
            size = 20 // microbatches
            for part in range(begin, begin + 20, size):
                rows = slice(part, part + size)
                here = present[rows]
                filled = torch.zeros(size, 4)
                filled[here] = lab(z[rows][here])
                values = torch.cat([uncut["head-clinic"](x[rows]), filled, here[:, None].float()], 1)
                (uncut["loss"](uncut["body"].out(values), y[rows]) / microbatches).backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, module in uncut.items():
        own, theirs = made[name].state_dict(), module.state_dict()
        assert all(torch.equal(own[key], theirs[key]) for key in theirs), name
    edge = next(e.index for e in plan.graph.cuts(0) if e.source.port == "rows")
    flows = result.ledgers["lab"].flows
    assert flows["sent", "server", "train", "up", edge].payload == 3 * int(present.sum()) * 4 * 4
    assert flows["received", "server", "train", "down", edge].payload == 3 * int(present.sum()) * 4 * 4


def test_a_batch_in_which_nobody_is_present():
    module = Present(laboratory(), (4,))
    given = module(torch.ones(5, 3), torch.zeros(5, dtype=torch.bool))
    assert given["rows"].shape == (0, 4)
    assert torch.equal(fill(given["rows"], given["present"]), torch.zeros(5, 4))


@pytest.mark.provokes("E306")
def test_who_is_present_must_be_said_and_true():
    with pytest.raises(StageError, match=r"expected bool\[5\], got int64\[5\]") as caught:
        Present(laboratory(), (4,))(torch.ones(5, 3), torch.zeros(5, dtype=torch.int64))
    assert caught.value.code == "E306"
    with pytest.raises(StageError, match="expected 2 rows, got 3"):
        fill(torch.ones(3, 4), torch.tensor([True, False, True]))


def test_the_plan_says_that_rows_may_be_missing_and_who_is():
    plan = vertical({"clinic": SPEC, "lab": SPEC}, "server", output="float32[batch, 2]", optional=["lab"])
    text = str(plan)
    assert "activations of head-lab.rows to server: float32[rows<=batch, 4], at most 512 bytes a batch" in text
    assert "activations of head-lab.present to server: bool[batch], 32 bytes a batch" in text
    assert "gradient at head-lab.present" not in text
