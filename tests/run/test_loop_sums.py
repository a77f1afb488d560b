"""A loop of one's own gives the bits of `simulate` also where a value goes to several places and is used here too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import cutlayer as cl
from tests.run.test_loop import learn

INPUTS = {"h": ["data.x"], "s1": ["h"], "s2": ["h", "s1"], "s4": ["s1", "h", "s2"], "t": ["h", "s4", "s2"]}
AT = {"h": "a", "s1": "b", "s2": "c", "s4": "b", "t": "a"}


class Cat(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, out)

    def forward(self, *values: Tensor) -> Tensor:
        return torch.tanh(self.layer(torch.cat(values, 1)))


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.3, momentum=0.9)


def made(seed: int) -> tuple[cl.Plan, list[cl.Party]]:
    stages = [
        cl.Stage(name, at=AT[name], inputs=given, output=f"float32[batch, {3 if name == 't' else 7}]")
        for name, given in INPUTS.items()
    ]
    loss = cl.Loss("loss", at="a", inputs=["t", "data.y"])
    training = cl.Training(epochs=2, batch_size=8, microbatches=2, shuffle=False, metrics_least=1)
    torch.manual_seed(seed)
    widths = {"h": (5, 7), "s1": (7, 7), "s2": (14, 7), "s4": (21, 7), "t": (21, 3)}
    modules: dict[str, Any] = {name: Cat(*width) for name, width in widths.items()}
    table = cl.TensorTable(x=torch.randn(32, 5), y=torch.randint(0, 3, (32,)))
    parties = []
    for place in ("a", "b", "c"):
        own = {name: module for name, module in modules.items() if AT[name] == place}
        given = {"modules": {**own, "loss": cross_entropy}, "data": table} if place == "a" else {"modules": own}
        parties.append(cl.Party(place, optimizer=sgd, seed=1, **given))
    return cl.Plan([*stages, loss], training=training), parties


def weights(parties: list[cl.Party]) -> list[Tensor]:
    return [p for party in parties for m in party.modules.values() if isinstance(m, nn.Module) for p in m.parameters()]


def test_gradients_that_come_back_from_several_stages_are_added_one_by_one():
    for seed in range(5):
        plan, expected = made(seed)
        cl.simulate(plan, expected)
        plan, parties = made(seed)
        head, tail = parties[0].modules["h"], parties[0].modules["t"]
        with cl.session(plan, parties[0], others=parties[1:]) as session:
            for round in session.rounds():
                for part in round:
                    value = head(part["x"])
                    got = session.remote(value)
                    learn(session, round, part, cross_entropy(tail(value, *got), part["y"]))
        for mine, theirs in zip(weights(parties), weights(expected), strict=True):
            assert torch.equal(mine, theirs)
