"""Models whose `train` keeps parts in evaluation mode: pieces keep them so too, at any depth, and train to the bit."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

import cutlayer as cl
from cutlayer.models.cut import compose, cut

X, Y = torch.randn(6, 6, generator=torch.Generator().manual_seed(1)), torch.arange(6) % 3


def norm_off(model: nn.Module, mode: bool) -> nn.Module:
    """Switch the mode, and keep each BatchNorm in evaluation, as detection models do."""
    nn.Module.train(model, mode)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eval()
    return model


class Nested(nn.Module):
    """Norms of its own, in a Sequential, and in a Sequential inside that."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)
        deep = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
        self.block = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), deep)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.block(self.norm(self.one(x)).relu()))

    def train(self, mode: bool = True) -> nn.Module:
        return norm_off(self, mode)


class Line(nn.Sequential):
    """The same, as a Sequential that overrides `train`: slices of it would lose that."""

    def __init__(self) -> None:
        super().__init__(OrderedDict(Nested().named_children()))

    def train(self, mode: bool = True) -> nn.Module:
        return norm_off(self, mode)


@pytest.mark.parametrize("at", ["one", "norm", "block.0", "block.1", "block.3.0", "block"])
@pytest.mark.parametrize("kind", [Nested, Line])
def test_frozen_norms_stay_as_they_are_between_evaluations(kind: type[nn.Module], at: str):
    whole, model = kind(), kind()
    made = cut(model, at, example=X[:3])
    pieces = [piece.module for piece in made.pieces]
    ours = torch.optim.SGD([p for piece in pieces for p in piece.parameters()], lr=0.05, momentum=0.9)
    theirs = torch.optim.SGD(whole.parameters(), lr=0.05, momentum=0.9)
    for step in range(4):
        for run, modules, optimizer in ((whole, [whole], theirs), (lambda x: compose(made, x), pieces, ours)):
            for module in modules:
                module.eval()
            run(X)
            for module in modules:
                module.train()
            optimizer.zero_grad()
            nn.functional.cross_entropy(run(X + step), Y).backward()
            optimizer.step()
    found = {key: value for piece in pieces for key, value in piece.state_dict().items()}
    expected = whole.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    norms = [module for piece in pieces for module in piece.modules() if isinstance(module, nn.BatchNorm1d)]
    assert len(norms) == 3
    assert not any(norm.training or norm.num_batches_tracked.item() for norm in norms)


def test_frozen_blocks_of_a_stack_stay_as_they_are():
    transformers = pytest.importorskip("transformers")

    class Tuned(transformers.BertModel):
        def train(self, mode: bool = True) -> nn.Module:
            super().train(mode)
            self.encoder.layer[0].attention.eval()
            return self

    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    torch.manual_seed(0)
    model = Tuned(transformers.BertConfig(vocab_size=9, max_position_embeddings=8, **sizes))
    words = torch.arange(12).reshape(3, 4) % 9
    made = cut(model, "encoder.layer.0", example={"input_ids": words}, output="last_hidden_state")
    for piece in made.pieces:
        piece.module.train()
    first = made.pieces[0].module.get_submodule("encoder.layer.0")
    assert first.output.dropout.training
    assert not any(module.training for module in first.attention.modules())
    torch.manual_seed(1)
    expected = model.train()(input_ids=words).last_hidden_state
    torch.manual_seed(1)
    assert torch.equal(compose(made, {"input_ids": words}), expected)


def test_a_run_keeps_frozen_norms():
    run = cl.fit(
        cl.split(Nested(), "block", example=X[:3], labels="server"),
        torch.utils.data.TensorDataset(X, Y),
        loss=nn.CrossEntropyLoss(),
        epochs=2,
    )
    counts = [value for key, value in run.state_dict().items() if key.endswith("num_batches_tracked")]
    assert len(counts) == 3
    assert not any(int(count) for count in counts)
