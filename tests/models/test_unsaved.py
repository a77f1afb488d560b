"""Weights and buffers that no checkpoint holds are refused at the cut, and what the error advises can be cut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.ao.nn import quantized
from torch.utils.data import TensorDataset

import cutlayer as cl
from cutlayer.errors import StageError

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))


class Graph(nn.Module):
    """A layer over the neighbours in a graph, kept as it is handed in."""

    def __init__(self, graph: Tensor, *, buffer: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.three = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        if buffer:
            self.register_buffer("graph", graph)
        else:
            self.graph = graph

    def forward(self, x: Tensor) -> Tensor:
        return self.three(self.two(self.one((self.graph @ x.T).T)))


@pytest.mark.provokes("E318")
@pytest.mark.parametrize("kind", ["coo", "csr"])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_a_sparse_buffer_is_refused_and_the_remedies_work(kind: str):
    graph = torch.eye(6).roll(1, 0)
    sparse = graph.to_sparse() if kind == "coo" else graph.to_sparse_csr()
    with pytest.raises(StageError, match=r"E318.*sparse tensor.*\(Graph, graph\).*to_dense.*a plain attribute"):
        cl.split(Graph(sparse, buffer=True), "one", example=X)
    outputs = []
    for model in (Graph(graph, buffer=True), Graph(graph.to_sparse(), buffer=False)):
        run = cl.fit(cl.split(model, "one", example=X), TensorDataset(X, -X), loss=nn.MSELoss(), epochs=1, seed=1)
        outputs.append(run.state_dict()["one.weight"])
    assert torch.allclose(*outputs)


class Bags(nn.Module):
    def __init__(self, bag: nn.Module) -> None:
        super().__init__()
        self.bag, self.one, self.two = bag, nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, words: Tensor) -> Tensor:
        return self.two(torch.relu(self.one(self.bag(words))))


@pytest.mark.provokes("E318")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, torch.quantize_per_channel:UserWarning")
def test_a_quantised_layer_is_refused_and_the_remedy_works():
    bag = quantized.EmbeddingBag(12, 8, mode="sum")
    words, labels = torch.arange(84).reshape(12, 7) % 12, torch.arange(12) % 3
    for layer in (bag, nn.Sequential(nn.EmbeddingBag(12, 8, mode="sum"), quantized.Linear(8, 8))):
        with pytest.raises(StageError, match=r"E318.*quantised tensor.*\(Bags, bag.*_packed.*dequantize"):
            cl.split(Bags(layer), "bag", example=words)
    made = cl.split(Bags(nn.EmbeddingBag.from_pretrained(bag.weight().dequantize(), mode="sum")), "bag", example=words)
    run = cl.fit(made, TensorDataset(words, labels), loss=nn.CrossEntropyLoss(), epochs=1, batch_size=6)
    assert set(run.state_dict()) == set(made.model.state_dict())
