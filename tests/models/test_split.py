"""The plan of a split model leaves room for the state of its pieces, also of large ones."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import cutlayer as cl
from cutlayer.core.parts import STATE_LIMIT
from cutlayer.engine.optim import Bundle, stage_state
from cutlayer.engine.stage import ModuleStage
from cutlayer.engine.tensors import pack


class Words(nn.Module):
    """A table of words at the client, which may be large, a body at the server and a last layer at the client."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(words, width), nn.BatchNorm1d(width)
        self.body, self.out = nn.Linear(width, 4), nn.Linear(4, 2)

    def forward(self, word: Tensor) -> Tensor:
        return self.out(torch.relu(self.body(self.norm(self.table(word)))))


WORDS = torch.arange(4)


def test_two_data_holders_hand_on_a_state_that_is_larger_than_the_usual_limit():
    net = Words(750_000, 8)
    trained = 3 * 4 * net.table.weight.numel()  # the values and Adam's two moments, in float32
    assert trained > STATE_LIMIT
    held = [TensorDataset(WORDS, torch.zeros(4, dtype=torch.int64)) for _ in range(2)]
    run = cl.fit(cl.split(net, ("norm", "body"), example=WORDS), held, loss=nn.CrossEntropyLoss(), batch_size=4)
    assert trained < run.result.plan.stage("head").state_limit < 2 * trained
    assert run.result.plan.stage("tail").state_limit == STATE_LIMIT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, partial(torch.optim.Adam, amsgrad=True)])
def test_the_limit_holds_the_state_and_little_more(dtype, kind, monkeypatch):
    monkeypatch.setattr("cutlayer.models.split.STATE_LIMIT", 1)
    made = cl.split(Words(2_000, 100).to(dtype), ("norm", "body"), example=WORDS)
    limit = made.plan(["a", "b"]).stage("head").state_limit
    stage = ModuleStage("head", made.modules("client")["head"], ports=None, seed=0, device=torch.device("cpu"))
    bundle = Bundle({"head": stage}, lambda parameters: kind(parameters, lr=0.01), None)
    stage.module(WORDS).sum().backward()
    bundle.step(each_step=True)
    size = len(pack(stage_state(stage, bundle)))
    values = sum(p.numel() for p in stage.parameters())
    assert size < limit < 4 * values * max(4, dtype.itemsize) + 1.1 * 2**20
