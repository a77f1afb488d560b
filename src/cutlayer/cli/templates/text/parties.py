"""A library that holds texts, and a server: a small language model in a U-shape, one letter after another.

Neither texts nor their continuations leave the library. Replace `letters` by your own texts, and the modules by your
own layers; the contract says what each gives.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchmetrics.text import Perplexity

import cutlayer as cl
from cutlayer.data.texts import shakespeare

LENGTH, WIDTH, SIGNS = 48, 32, 128


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=3e-3)


def letters() -> tuple[cl.TensorTable, cl.TensorTable]:
    """Plays of Shakespeare as rows of letters, and the same rows one letter on; the last rows are for evaluation."""
    text = "".join(shakespeare().values())[:400_000]
    codes = torch.tensor([min(ord(sign), SIGNS - 1) for sign in text])
    rows = codes[: (len(codes) - 1) // LENGTH * LENGTH].reshape(-1, LENGTH)
    following = codes[1 : rows.numel() + 1].reshape(-1, LENGTH)
    edge = len(rows) - 500
    return (
        cl.TensorTable(text=rows[:edge], following=following[:edge]),
        cl.TensorTable(text=rows[edge:], following=following[edge:]),
    )


class Embed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.letter, self.place = nn.Embedding(SIGNS, WIDTH), nn.Embedding(LENGTH, WIDTH)

    def forward(self, text: Tensor) -> Tensor:
        return self.letter(text) + self.place.weight


class Blocks(nn.Module):
    """Attention that looks back only."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.register_buffer("hidden", torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x, mask=self.hidden)


def next_letter(prediction: Tensor, following: Tensor) -> Tensor:
    return nn.functional.cross_entropy(prediction.flatten(0, 1), following.flatten())


def library(name: str) -> cl.Party:
    data, evaluation = letters()
    modules = {
        "head": Embed(),
        "tail": nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, SIGNS)),
        "loss": next_letter,
    }
    metrics = {"loss": lambda: {"perplexity": Perplexity()}}
    held = {"data": data, "evaluation": evaluation, "prediction": evaluation}  # a prediction needs no labels
    return cl.Party(name, modules=modules, optimizer=adam, metrics=metrics, **held)


def server(name: str) -> cl.Party:
    return cl.Party(name, modules={"body": Blocks()}, optimizer=adam)
