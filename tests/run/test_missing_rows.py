"""Vertical parties that miss some of the people, against a model written by hand that never sees the missing rows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cutlayer as cl
from cutlayer.core.topologies import extended_vanilla, hybrid, multitask, vertical
from cutlayer.data.missing import spread
from cutlayer.errors import DataError, PlanError, StageError
from cutlayer.models.rows import Absent, Present, fill
from cutlayer.run.prediction import predict
from cutlayer.run.preflight import try_party
from cutlayer.run.simulate import roster_of, simulate
from tests.run.trial import Trial

COUNT, BATCH, EPOCHS = 24, 8, 3
WIDTHS = {"clinic": 2, "lab": 3, "scan": 5}
CUTS = dict.fromkeys(WIDTHS, "float32[batch, 4]")
OPTIONAL = ("lab", "scan")


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, 1e-2)


def momentum(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 1e-1, momentum=0.9, weight_decay=1e-2)


def data() -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Features and presence of each clinic, and labels. Nobody of the second batch is at the laboratory."""
    generator = torch.Generator().manual_seed(0)
    x = {name: torch.randn(COUNT, width, generator=generator) for name, width in WIDTHS.items()}
    present = {name: torch.rand(COUNT, generator=generator) < 0.6 for name in OPTIONAL}
    present["lab"][BATCH : 2 * BATCH] = False
    for name in OPTIONAL:
        x[name][~present[name]] = float("nan")  # whoever looks at these is found out
    return x, present, torch.randint(0, 3, (COUNT,), generator=generator)


class Merge(nn.Module):
    """Joins the clinic's values with each optional party's: zeros where missing, and who is there."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(14, 3)

    def forward(self, clinic: Tensor, *others: Tensor) -> Tensor:
        parts = [clinic]
        for rows, present in zip(others[::2], others[1::2], strict=True):
            parts += [fill(rows, present), present[:, None].to(rows.dtype)]
        return self.out(torch.cat(parts, 1))


def heads() -> dict[str, nn.Module]:
    torch.manual_seed(3)
    return {name: nn.Sequential(nn.Linear(width, 4), nn.Tanh()) for name, width in WIDTHS.items()}


def parties(optimizer: Callable = adam, **more: object) -> tuple[list[cl.Party], dict[str, nn.Module]]:
    """All parties, and the modules that they train."""
    x, present, y = data()
    made, body = heads(), Merge()
    found = [cl.Party("server", data=cl.TensorTable(y=y), modules={"body": body, "loss": nn.CrossEntropyLoss()},
                      optimizer=optimizer, **more)]  # fmt: skip
    for name, head in made.items():
        fields = {"x": x[name], **({"present": present[name]} if name in OPTIONAL else {})}
        module = Present(head, (4,)) if name in OPTIONAL else head
        table = cl.TensorTable(**fields)
        found.append(
            cl.Party(name, data=table, prediction=table, modules={f"head-{name}": module}, optimizer=optimizer, **more)
        )
    return found, {**made, "body": body}


def uncut_forward(modules: dict[str, nn.Module], rows: slice) -> Tensor:
    """The whole model by hand: each head on the rows that are there, zeros in the other places."""
    x, present, _ = data()
    values = [modules["clinic"](x["clinic"][rows])]
    for name in OPTIONAL:
        here = present[name][rows]
        filled = torch.zeros(len(here), 4)
        filled[here] = modules[name](x[name][rows][here])  # also of no rows: a gradient of zero
        values += [filled, here[:, None].float()]
    return modules["body"].out(torch.cat(values, 1))


def uncut(modules: dict[str, nn.Module], optimizer: Callable, microbatches: int) -> None:
    labels, trainer = data()[2], optimizer([p for module in modules.values() for p in module.parameters()])
    for _ in range(EPOCHS):
        for begin in range(0, COUNT, BATCH):
            size = BATCH // microbatches
            for part in range(begin, begin + BATCH, size):
                rows = slice(part, part + size)
                score = nn.functional.cross_entropy(uncut_forward(modules, rows), labels[rows])
                (score / microbatches).backward()
            trainer.step()
            trainer.zero_grad()


def plan_of(**training: object) -> cl.Plan:
    settings = {"batch_size": BATCH, "epochs": EPOCHS, "shuffle": False, **training}
    return vertical(CUTS, "server", output="float32[batch, 3]", optional=OPTIONAL, **settings)


def same(mine: dict[str, nn.Module], theirs: dict[str, nn.Module]) -> None:
    for name, module in theirs.items():
        own = mine[name].state_dict()
        assert all(torch.equal(own[key], value) for key, value in module.state_dict().items()), name


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("optimizer", [momentum, adam])
def test_training_equals_a_model_that_never_sees_the_missing_rows(optimizer, microbatches):
    """Also in a batch in which the laboratory knows nobody: momentum goes on as it does in the uncut model."""
    plan = plan_of(microbatches=microbatches, schedule="1f1b")
    members, mine = parties(optimizer)
    theirs = copy.deepcopy(mine)
    result = simulate(plan, members)
    uncut(theirs, optimizer, microbatches)
    same(mine, theirs)
    present = data()[1]
    for name in OPTIONAL:
        here = int(present[name].sum())
        flows = result.ledgers[name].flows
        edges = {e.source.port: e.index for e in plan.graph.cuts(0) if e.source.stage == f"head-{name}"}
        assert flows["sent", "server", "train", "up", edges["rows"]].payload == EPOCHS * here * 4 * 4
        assert flows["received", "server", "train", "down", edges["rows"]].payload == EPOCHS * here * 4 * 4
        assert flows["sent", "server", "train", "up", edges["present"]].payload == EPOCHS * COUNT
        assert ("received", "server", "train", "down", edges["present"]) not in flows


def test_a_batch_with_nobody_gives_a_gradient_of_zero_and_runs_nothing():
    head = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    before = copy.deepcopy(head.state_dict())
    module = Present(head, (4,), torch.bfloat16)
    given = module(torch.full((5, 3), float("nan")), torch.zeros(5, dtype=torch.bool))
    assert (given["rows"].shape, given["rows"].dtype) == ((0, 4), torch.bfloat16)
    fill(given["rows"], given["present"]).sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in head.parameters())
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())


def test_over_the_network_the_bits_and_bytes_are_the_same(tmp_path: Path):
    plan = plan_of(microbatches=2)
    here, mine = parties(seed=1)
    local = simulate(plan, here)
    there, theirs = parties(seed=1)
    trial = Trial(plan, tmp_path, coordinator="server")

    def part(party: cl.Party) -> Callable[[], cl.Result]:
        return lambda: cl.join(plan, party, network=trial.settings(party.name), folder=tmp_path / "run" / party.name)

    found = trial.play({party.name: part(party) for party in there})
    assert {name: type(one) for name, one in found.items()} == dict.fromkeys(plan.parties, cl.Result)
    same(mine, theirs)
    for name, result in found.items():
        ledger = result.ledgers[name]
        assert ledger.flows == local.ledgers[name].flows
        assert ledger.total("sent") == local.ledgers[name].total("sent") > 0


def test_each_party_can_be_tried_alone():
    members, mine = parties()
    for party in members:
        try_party(plan_of(microbatches=2), party, roster_of(members))
    _, fresh = parties()
    for name, module in mine.items():
        changed = zip(module.parameters(), fresh[name].parameters(), strict=True)
        assert not all(torch.equal(one, other) for one, other in changed), f"{name} has made one step"


# --- prediction ------------------------------------------------------------------------------------------------------


def test_predictions_for_people_whom_some_parties_do_not_know():
    members, mine = parties()
    found = predict(plan_of(), members)["body"]
    with torch.no_grad():
        expected = torch.cat([uncut_forward(mine, slice(begin, begin + BATCH)) for begin in range(0, COUNT, BATCH)])
    assert torch.equal(found, expected)


@pytest.mark.parametrize("absent", [["lab"], ["scan", "lab"]])
def test_predictions_without_a_party(absent):
    """A party that takes no part counts as one that knows nobody."""
    members, _ = parties()
    plan = vertical(
        CUTS, "server", output="float32[batch, 3]", optional=OPTIONAL, absent=absent, batch_size=BATCH
    )  # fmt: skip
    assert set(plan.parties) == {"server", *WIDTHS} - set(absent)
    stand_ins = {f"head-{name}": Absent((4,)) for name in absent}
    fewer = [p for p in members if p.name not in absent]
    fewer = [cl.Party("server", modules={**p.modules, **stand_ins}) if p.name == "server" else p for p in fewer]
    nobody = [
        cl.Party(p.name, modules=p.modules, prediction=cl.TensorTable(**{**p.data.fields, "present": torch.zeros(COUNT,
                 dtype=torch.bool)})) if p.name in absent else p
        for p in members
    ]  # fmt: skip
    assert torch.equal(predict(plan, fewer)["body"], predict(plan_of(), nobody)["body"])


# --- the plan --------------------------------------------------------------------------------------------------------


TWO = {"a": "float32[ batch, 4]", "b": "float32[batch, 2]"}
ONE = "float32[batch]"
PLANS = {
    "vertical": lambda **m: vertical(TWO, "s", output=ONE, **m),
    "extended_vanilla": lambda **m: extended_vanilla(TWO, "m", "s", cut="float32[batch, 2]", output=ONE, **m),
    "multitask": lambda **m: multitask(TWO, {"s": ONE, "t": ONE}, **m),
    "hybrid": lambda **m: hybrid(TWO, {"s": "float32[batch, 2]"}, output=ONE, **m),
}


@pytest.mark.parametrize("make", PLANS.values(), ids=PLANS.keys())
def test_any_topology_that_merges_may_have_optional_parties(make):
    plan = make(optional=["a"])
    assert {port: str(spec) for port, spec in plan.stage("head-a").ports.items()} == {
        "rows": "float32[rows<=batch, 4]",
        "present": "bool[batch]",
    }
    takers = [s for s in plan.stages if "head-b" in s.inputs]
    assert takers
    assert all(s.inputs == ("head-a.rows", "head-a.present", "head-b") for s in takers)
    assert plan.stage("head-a").inputs == ("data.x", "data.present")


@pytest.mark.provokes("E113")
@pytest.mark.parametrize(
    ("names", "words"),
    [
        ({"optional": ["c"]}, "expected a list of a, b, got c"),
        ({"optional": "a"}, "expected a list of a, b, got 'a'"),
        ({"optional": ["a"], "absent": ["b"]}, "expected a list of a, not of all, got b"),
        ({"optional": ["a", "b"], "absent": ["a", "b"]}, "expected a list of a, b, not of all, got a, b"),
    ],
)
def test_parties_that_cannot_be_missing_are_refused(names, words):
    with pytest.raises(PlanError) as caught:
        PLANS["vertical"](**names)
    assert caught.value.code == "E113"
    assert words in str(caught.value)


def test_a_head_that_is_not_told_who_is_present_says_so():
    with pytest.raises(StageError, match="expected an input, then which of its rows are present") as caught:
        Present(nn.Linear(3, 4), (4,))(torch.ones(4, dtype=torch.bool))
    assert caught.value.code == "E306"


def test_a_plan_that_forgets_who_is_optional_is_told():
    with pytest.raises(StageError, match=r"E306.*name the party in the plan's optional=\[...\]") as caught:
        Present(nn.Linear(3, 4), (4,))(torch.ones(4, 3))
    assert "got float32[4, 3]" in str(caught.value)
    with pytest.raises(StageError, match=r"bool\[4\], got int64\[4\]. give the data's field 'present' as bool"):
        Present(nn.Linear(3, 4), (4,))(torch.ones(4, 3), torch.ones(4).long())


# --- data ------------------------------------------------------------------------------------------------------------


def test_rows_are_put_in_the_places_of_their_people():
    with pytest.warns(UserWarning, match="1 of 3 identifiers in 'own' are not in 'everyone': their rows are left out"):
        table = spread(
            ["p1", "p2", "p3", "p4"], ["p4", "p9", "p1"], x=torch.tensor([[4.0], [9], [1]]), k=torch.tensor([4, 9, 1])
        )
    assert table.fields["present"].tolist() == [True, False, False, True]
    assert table.fields["k"].tolist() == [1, 0, 0, 4]
    assert table.fields["x"][[0, 3]].tolist() == [[1.0], [4.0]]
    assert table.fields["x"][1:3].isnan().all()
    assert spread(torch.tensor([7, 8]), torch.tensor([8]), x=torch.ones(1, 2)).fields["present"].tolist() == [
        False,
        True,
    ]


@pytest.mark.parametrize(
    ("everyone", "own", "words"),
    [([1, 1], [1, 2], "identifiers twice in 'everyone'"), ([1, 2], [2, 2], "identifiers twice in 'own'"),
     ([1, 2], [1, 2, 3], "{'x': 2}"),
     ([1, 2], ["1", "2"], "2 others (str)"),
     ([1, "2"], [3, "4"], "2 others (int, str)"),
     ([1, 2], [1, "2"], "int, str"),
     ([1, 2], [1.0, 2.0], "float"),
     (["p1", ""], ["p1", ""], "1 text that says that none is there, at row 1"),
     (["7", "8"], ["7", "8.0"], "1 text of a decimal number, at row 1")],
)  # fmt: skip
def test_rows_that_cannot_be_placed_are_refused(everyone, own, words):
    with pytest.raises(DataError) as caught:
        spread(everyone, own, x=torch.ones(2))
    assert caught.value.code == "E254"
    assert words in caught.value.got


def test_whole_numbers_of_numpy_and_torch_are_those_of_python():
    for own in (np.array([8, 7]), torch.tensor([8, 7]), [8, 7]):
        assert spread(range(7, 10), own, x=torch.tensor([8, 7])).fields["x"].tolist() == [7, 8, 0]


def test_rows_may_be_all_that_a_table_takes():
    table = spread(["p1", "p2", "p3"], ["p3", "p1"], ward=["icu", "eye"], age=[70, 60], dose=[0.5, 1.5])
    assert table.fields["ward"] == ("eye", "", "icu")
    assert table.fields["age"].tolist() == [60, 0, 70]
    assert table.fields["dose"][[0, 2]].tolist() == [1.5, 0.5]
    with pytest.raises(DataError, match="the field 'day' of a table is neither numbers nor texts"):
        spread(["p1"], ["p1"], day=[None])


def test_a_party_with_nobody_has_a_table_without_rows_of_its_own():
    assert spread(["p1", "p2"], [], x=torch.ones(0, 3)).fields["present"].tolist() == [False, False]
