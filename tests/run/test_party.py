"""A party as its owner describes it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import cutlayer as cl
from cutlayer.core.topologies import u_shaped, vertical
from cutlayer.data.sources import LoaderBatches, OrderedBatches, TensorTable
from cutlayer.errors import ConfigError
from cutlayer.run.party import Party, build, counts
from cutlayer.run.simulate import roster_of, simulate
from tests.small import C, Case, difference, float32, plain

PLAN = u_shaped("a", "server", cut=float32(6), back=float32(4), output=C, batch_size=8)


class Pairs(Dataset):
    """The rows of a case's data, as tuples."""

    def __init__(self, fields: dict[str, torch.Tensor]) -> None:
        self.x, self.y = fields["x"], fields["y"]

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int):
        return self.x[index], self.y[index]


def test_only_counts_are_told():
    table = TensorTable(x=torch.zeros(5, 2))
    assert counts(Party("a")) == {}
    assert counts(Party("a", data=table, prediction=table)) == {"train": 5, "predict": 5}
    assert roster_of([Party("a", data=table), Party("b", evaluation=table)]).samples == {
        "train": {"a": 5},
        "evaluate": {"b": 5},
    }


@pytest.mark.parametrize(
    "make",
    [
        lambda pairs: (pairs, ["x", "y"]),
        lambda pairs: (DataLoader(pairs, batch_size=8, num_workers=0), ("x", "y")),
    ],
    ids=["tuples", "loader of tuples"],
)
def test_any_data_set_trains_like_a_table(make):
    case = Case.of(PLAN.with_training(shuffle=False, epochs=2))
    data, fields = make(Pairs(case.data["a"]))
    assert difference(case.cut(data=data, fields=fields), case.uncut()) == 0.0


def test_a_loaders_own_order_is_used_where_no_other_party_needs_it():
    case = Case.of(PLAN.with_training(shuffle=False))
    turned = list(range(22))[::-1]
    loader = DataLoader(Pairs(case.data["a"]), batch_size=8, sampler=turned)
    fields = {name: tensor[torch.tensor(turned)] for name, tensor in case.data["a"].items()}
    expected = Case.of(case.plan, data={"a": fields}).uncut()
    assert difference(case.cut(data=loader, fields=("x", "y")), expected) == 0.0


def test_which_data_the_plan_orders():
    plan = vertical({"a": C}, "server", output=C, batch_size=8)
    table = TensorTable(x=torch.zeros(16, 5), y=torch.zeros(16, dtype=torch.int64))
    loader = DataLoader(table, batch_size=8)
    modules = {"head-a": nn.Linear(5, 3)}
    for made, party, kind in (
        (plan, Party("a", modules=modules, data=loader, optimizer=plain), OrderedBatches),  # labels are elsewhere
        (PLAN, Party("a", modules=dict.fromkeys(["head", "tail", "loss"], nn.Identity()), data=loader), LoaderBatches),
        (PLAN, Party("a", modules=dict.fromkeys(["head", "tail", "loss"], nn.Identity()), data=table), OrderedBatches),
    ):
        worker = build(made, party, roster_of([party, Party("server", data=table)]))
        assert isinstance(worker.parts.batches["train"], kind)


def test_evaluation_data_keep_their_own_order():
    case = Case.of(PLAN)
    seen = []

    class Watched(TensorTable):
        def batch(self, indices):
            seen.extend(indices)
            return super().batch(indices)

    parties = case.parties(evaluation=None)
    watched = Watched(**case.data["a"])
    parties = [
        Party("a", modules=parties[0].modules, data=parties[0].data, evaluation=watched, optimizer=plain, seed=1),
        Party("server", modules=parties[1].modules, optimizer=plain, seed=1),
    ]
    simulate(PLAN.with_training(drop_last=True), parties)
    assert seen == list(range(22))


@pytest.mark.provokes("E227")
@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"device": "gpu"}, r"device of party 'a' is not here .party a, device.: expected one of cpu.*got 'gpu'"),
        ({"device": "cuda:77"}, r"expected one of cpu.*got 'cuda:77'"),
        ({"device": None}, r"device.*got 'None'"),
        ({"seed": "a"}, r"the seed of party 'a' cannot be used .*a whole number, or None, got 'a'"),
        ({"seed": True}, r"the seed .*got True"),
        ({"seed": 0.5}, r"the seed .*got 0\.5"),
        ({"threads": 0}, r"the threads of party 'a' cannot be used .*a whole number, 1 or more, got 0"),
        ({"threads": None}, r"the threads .*got None"),
        ({"metrics": dict}, r"the metrics of party 'a' have no loss.*got type.*metrics=\{'loss'"),
        (
            {"scheduler": torch.optim.lr_scheduler.StepLR},
            r"the scheduler .* needs more .*of the optimizer alone, got a function of \(optimizer, step_size\)",
        ),
        ({"optimizer": lambda parameters, rate: None}, r"\(parameters, rate\)\. .*lambda params: torch.optim.Adam"),
        ({"metrics": {"loss": lambda p, y: (p == y).float().mean()}}, r"metrics of 'loss'.*a function of \(p, y\)"),
    ],
)
def test_arguments_that_would_fail_later_are_refused_at_once(given: dict, told: str):
    with pytest.raises(ConfigError, match=told):
        Party("a", **given)


def test_arguments_of_other_kinds_that_do_are_taken():
    def make(kind: type = dict) -> dict:
        return kind()

    party = Party("a", seed=np.int64(3), threads=2, device=torch.device("cpu", 0), metrics={"loss": make, "b": dict})
    assert (party.seed, party.threads) == (3, 2)
    assert Party("b", seed=-1).seed == -1


@pytest.mark.provokes("E227")
def test_cards_are_counted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [Party("a", device=name).device for name in ("cuda", "cuda:1")] == ["cuda", "cuda:1"]
    with pytest.raises(ConfigError, match=r"one of cpu, cuda:0, cuda:1.*got 'cuda:2'"):
        Party("a", device="cuda:2")


@pytest.mark.parametrize(("size", "drop_last", "said"), [(3, True, True), (4, True, False), (3, False, False)])
def test_a_party_of_which_drop_last_leaves_nothing_is_warned_of(
    size: int, drop_last: bool, said: bool, recwarn: pytest.WarningsRecorder
):
    stages = [
        cl.Stage("head", at=["a", "b"], inputs=["data.x"], output="float32[batch, 2]"),
        cl.Loss("loss", at=["a", "b"], inputs=["head", "data.y"]),
    ]
    plan = cl.Plan(stages, training=cl.Training(batch_size=4, drop_last=drop_last, metrics_least=3))
    data = {name: cl.TensorTable(x=torch.ones(n, 2), y=torch.zeros(n).long()) for name, n in (("a", 8), ("b", size))}
    parties = [
        cl.Party(
            name,
            data=table,
            modules={"head": torch.nn.Linear(2, 2), "loss": torch.nn.CrossEntropyLoss()},
            optimizer=torch.optim.Adam,
        )
        for name, table in data.items()
    ]
    result = cl.simulate(plan, parties)
    assert repr(result).startswith(f"<Result of {plan.name}: a, b; ")
    assert len(repr(result)) < 100
    told = [str(one.message) for one in recwarn if "drop_last" in str(one.message)]
    assert bool(told) == said
    assert all(text.startswith("party b: none of its 3 samples is trained on") for text in told)
