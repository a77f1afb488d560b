"""Train and evaluation mode: what a round does is the same whether evaluations come between, and in one's own loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import cutlayer as cl

X, Y = torch.randn(8, 6, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 3
LOADER = DataLoader(TensorDataset(X, Y), batch_size=4)


class Net(nn.Module):
    """`frozen`: its BatchNorm stays in evaluation mode, also when the model is told to train."""

    def __init__(self, *, frozen: bool) -> None:
        super().__init__()
        self.first, self.norm, self.body, self.out = (
            nn.Linear(6, 6),
            nn.BatchNorm1d(6),
            nn.Linear(6, 6),
            nn.Linear(6, 3),
        )
        self.frozen = frozen

    def train(self, mode: bool = True) -> Net:
        super().train(mode)
        if self.frozen:
            self.norm.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(self.norm(self.first(x)).relu()))


def made(case: str) -> Net:
    torch.manual_seed(0)
    net = Net(frozen=case == "train() overridden")
    if case == "norm in evaluation mode":
        net.norm.eval()
    elif case == "all in evaluation mode":
        net.eval()
    return net


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def uncut(net: Net) -> dict[str, Tensor]:
    optimizer = sgd(net.parameters())
    for _ in range(2):
        net.train()
        for x, y in LOADER:
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        net.eval()
    return net.state_dict()


def by_fit(net: Net, *, evaluated: bool) -> dict[str, Tensor]:
    more = {"evaluation": LOADER, "evaluate_every": 1} if evaluated else {}
    pieces = cl.split(net, "body", example=X[:2], labels="server")
    run = cl.fit(pieces, LOADER, loss=nn.CrossEntropyLoss(), optimizer=sgd, epochs=2, **more)
    return run.state_dict()


def by_loop(net: Net) -> dict[str, Tensor]:
    pieces = cl.split(net, "body", example=X[:2], labels="server")
    plan = pieces.plan(training=cl.Training(epochs=2, batch_size=4, shuffle=False))
    data = cl.TensorTable(x=X, label=Y)
    client = cl.Party("client", modules=pieces.modules("client"), data=data, optimizer=sgd)
    modules = {**pieces.modules("server"), "loss": nn.CrossEntropyLoss()}
    with cl.session(plan, client, others=[cl.Party("server", modules=modules, optimizer=sgd)]) as session:
        for epoch in session.rounds():
            for part in epoch:
                session.remote(client.modules["head"](part["x"])).backward()
                session.optimizer.step()
                session.optimizer.zero_grad()
    return net.state_dict()


@pytest.mark.parametrize("case", ["as made", "norm in evaluation mode", "all in evaluation mode", "train() overridden"])
def test_each_round_of_training_begins_as_if_the_model_were_told_to_train(case):
    expected = uncut(made(case))
    for found in (by_fit(made(case), evaluated=False), by_fit(made(case), evaluated=True), by_loop(made(case))):
        assert {name: (found[name] - value).abs().max().item() for name, value in expected.items()} == dict.fromkeys(
            expected, 0.0
        )
    assert expected["norm.num_batches_tracked"] == (0 if case == "train() overridden" else 4)


def test_a_prediction_finds_its_model_in_evaluation_mode_and_leaves_it_alone():
    told = []

    class Told(Net):
        def train(self, mode: bool = True) -> Net:
            told.append(mode)
            return super().train(mode)

    net = Told(frozen=False).eval()
    plan = cl.vanilla("a", "s", cut="float32[batch, 3]", output="float32[batch, 3]", batch_size=4)
    modules = {"body": nn.Identity(), "loss": nn.CrossEntropyLoss()}
    parties = [cl.Party("a", modules={"head": net}, prediction=cl.TensorTable(x=X)), cl.Party("s", modules=modules)]
    told.clear()
    [found] = cl.predict(plan, parties).values()
    assert torch.allclose(found, net(X))
    assert told == []
