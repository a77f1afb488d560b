"""The closed-form cost equals what the ledger measured, for plans of every kind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import cutlayer as cl
from cutlayer.core.cost import by_key, cut_flows, epoch_bytes
from cutlayer.run.simulate import roster_of, simulate

X, Y = torch.randn(23, 6), torch.randint(0, 3, (23,))


class _Merge(nn.Module):
    def __init__(self, size: int, out: int) -> None:
        super().__init__()
        self.layer = nn.Linear(size, out)

    def forward(self, *parts: torch.Tensor) -> torch.Tensor:
        return self.layer(torch.cat(parts, 1))


def _sgd(parameters):
    return torch.optim.SGD(parameters, 0.1)


def _party(name, modules, rows=slice(None), *, evaluation=True):
    data = cl.TensorTable(x=X[rows], y=Y[rows])
    return cl.Party(name, modules=modules, data=data, evaluation=data if evaluation else None, optimizer=_sgd, seed=1)


def _u_shaped(**training):
    plan = cl.u_shaped(
        ["a", "b"], "s", cut="float32[batch, 5]", back="float32[batch, 4]", output="float32[batch, 3]", **training
    )
    ends = lambda: {"head": nn.Linear(6, 5), "tail": nn.Linear(4, 3), "loss": nn.CrossEntropyLoss()}  # noqa: E731
    server = cl.Party("s", modules={"body": nn.Linear(5, 4)}, optimizer=_sgd, seed=1)
    return plan, [_party("a", ends(), slice(0, 9)), _party("b", ends(), slice(9, 23)), server]


def _vanilla(**training):
    plan = cl.vanilla("a", "s", cut="float32[batch, 5]", output="float32[batch, 3]", **training)
    server = cl.Party("s", modules={"body": nn.Linear(5, 3), "loss": nn.CrossEntropyLoss()}, optimizer=_sgd, seed=1)
    return plan, [_party("a", {"head": nn.Linear(6, 5)}), server]


def _vertical(**training):
    plan = cl.vertical(
        {"a": "float32[batch, 5]", "b": "float32[batch, 2]"}, "s", output="float32[batch, 3]", **training
    )
    heads = [_party("a", {"head-a": nn.Linear(6, 5)}), _party("b", {"head-b": nn.Linear(6, 2)})]
    return plan, [*heads, _party("s", {"body": _Merge(7, 3), "loss": nn.CrossEntropyLoss()})]


def _shared_output(**training):
    """One value taken by two stages of one party: it crosses once, its gradients twice."""
    plan = cl.Plan(
        [
            cl.Stage("head", at="a", inputs=["data.x"], output="float32[batch, 5]"),
            cl.Stage("left", at="s", inputs=["head"], output="float32[batch, 3]"),
            cl.Stage("right", at="s", inputs=["head"], output="float32[batch, 3]"),
            cl.Loss("one", at="s", inputs=["left", "data.y"]),
            cl.Loss("two", at="s", inputs=["right", "data.y"]),
        ],
        training=cl.Training(**training),
    )
    modules = {"left": nn.Linear(5, 3), "right": nn.Linear(5, 3)}
    losses = {"one": nn.CrossEntropyLoss(), "two": nn.CrossEntropyLoss()}
    return plan, [_party("a", {"head": nn.Linear(6, 5)}), _party("s", modules | losses)]


SETTINGS = [
    {"batch_size": 4, "microbatches": 2, "schedule": "1f1b", "epochs": 2},
    {"batch_size": 5, "microbatches": 3, "schedule": "gpipe", "drop_last": True},
    {"batch_size": 64, "evaluate_every": 1, "epochs": 3},
]


@pytest.mark.parametrize("training", SETTINGS)
@pytest.mark.parametrize("make", [_u_shaped, _vanilla, _vertical, _shared_output])
def test_closed_form_equals_ledger(make, training):
    plan, parties = make(**training)
    result = simulate(plan, parties)
    expected = {key: value for key, value in by_key(cut_flows(plan, roster_of(parties))).items() if value[1]}
    for way, mine in (("sent", 0), ("received", 1)):
        measured = {}
        for party, ledger in result.ledgers.items():
            for (direction_of_travel, peer, mode, direction, edge), row in ledger.flows.items():
                if direction_of_travel == way and direction in ("up", "down"):
                    ends = (party, peer) if mine == 0 else (peer, party)
                    measured[(*ends, mode, direction, edge)] = (row.payload, row.messages)
        assert measured == expected


def test_one_epoch_by_hand():
    plan, parties = _u_shaped(batch_size=4, epochs=7)
    roster = roster_of(parties)
    assert epoch_bytes(plan, roster, "a") == 9 * (5 + 4) * 4  # activations of head, gradients of tail
    assert epoch_bytes(plan, roster, "s") == 23 * (5 + 4) * 4


def test_a_shared_value_crosses_once_and_its_gradients_twice():
    plan, parties = _shared_output(batch_size=23)
    flows = by_key(cut_flows(plan, roster_of(parties)))
    up = [value for key, value in flows.items() if key[2:4] == ("train", "up")]
    down = [value for key, value in flows.items() if key[2:4] == ("train", "down")]
    assert up == [(23 * 5 * 4, 1)]
    assert down == [(23 * 5 * 4, 1)] * 2
