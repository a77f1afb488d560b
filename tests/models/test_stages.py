"""Vision models of Hugging Face whose blocks make the hidden state smaller: they are traced."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import cutlayer as cl
from cutlayer.errors import StageError
from cutlayer.models.cut import cut

X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(4) % 3
WINDOWS = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 2], "num_heads": [2, 2], "window_size": 4}
STAGES = {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16], "strides": [4, 2]}
STAGES |= {"patch_sizes": [7, 3], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]}
PATCHES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
PATCHES |= {"image_size": 32, "patch_size": 8, "decoder_hidden_size": 8, "decoder_num_hidden_layers": 1}
PATCHES |= {"decoder_num_attention_heads": 2, "decoder_intermediate_size": 16}


def built(kind: str, model: str, **sizes: Any) -> nn.Module:
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    still = {name: 0.0 for name in vars(getattr(hf, f"{kind}Config")()) if name.endswith(("dropout_prob", "path_rate"))}
    return getattr(hf, model)(getattr(hf, f"{kind}Config")(**sizes | still)).train()


MODELS = {
    "swin": partial(built, "Swin", "SwinForImageClassification", num_labels=3, **WINDOWS),
    "swinv2": partial(built, "Swinv2", "Swinv2ForImageClassification", num_labels=3, **WINDOWS),
    "pvt": partial(built, "PvtV2", "PvtV2ForImageClassification", num_labels=3, image_size=32, **STAGES),
    "segformer": partial(built, "Segformer", "SegformerForImageClassification", num_labels=3, **STAGES),
}


def trained_uncut(model: nn.Module, loss: nn.Module, labels: Tensor) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for rows in (slice(0, 2), slice(2, 4)):
        optimizer.zero_grad()
        loss(model(pixel_values=X[rows]).logits, labels[rows]).backward()
        optimizer.step()
    return model.state_dict()


def trains_as_uncut(model: nn.Module, at: str, labels: Tensor, place: str = "server") -> None:
    uncut, loss = copy.deepcopy(model), nn.CrossEntropyLoss()
    made = cl.split(model, at, example={"pixel_values": X[:2]}, labels=place)
    loader, sgd = DataLoader(TensorDataset(X, labels), 2), partial(torch.optim.SGD, lr=0.1)
    found = cl.fit(made, loader, loss=loss, optimizer=sgd).state_dict()
    for name, value in trained_uncut(uncut, loss, labels).items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("swin", "swin.embeddings"),
        ("swin", "swin.encoder.layers.0"),
        ("swin", "swin.encoder.layers.0.blocks.0"),
        ("swinv2", "swinv2.embeddings"),
        ("swinv2", "swinv2.encoder.layers.0"),
        ("pvt", "pvt_v2.encoder.layers.0"),
        ("pvt", "pvt_v2.encoder.layers.1.blocks.0.attention"),
        ("segformer", "segformer.stages.0.patch_embeddings"),
    ],
)
def test_stages_of_several_sizes_train_as_uncut(name: str, at: str):
    trains_as_uncut(MODELS[name](), at, LABELS)


@pytest.mark.parametrize("at", ["vit.embeddings", "vit.layers.0"])
def test_embeddings_that_give_more_than_one_tensor(at: str):
    model = built("ViTMAE", "ViTMAEForPreTraining", **PATCHES)
    assert cut(model, at, example={"pixel_values": X[:2]}, output="logits").checked


class Sized(nn.Module):
    """Gives a map of features as rows, and its height."""

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        return x.flatten(1), x.shape[2]


class ByHeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.rows, self.two = nn.Conv2d(3, 2, 1), Sized(), nn.LazyLinear(3)

    def forward(self, pixel_values: Tensor) -> Tensor:
        rows, height = self.rows(self.one(pixel_values))
        return self.two(rows) / height


@pytest.mark.provokes("E322")
def test_a_number_does_not_cross_and_is_held():
    model = ByHeight()
    model(X)
    made = cut(model, "rows", example=X)
    assert made.pieces[0].outputs == ("getitem",)
    with pytest.raises(StageError, match=r"E322.*another size.*expected 32, got 16"):
        made.pieces[0].module(X[:, :, :16])


class ByBatch(ByHeight):
    def forward(self, pixel_values: Tensor) -> Tensor:
        rows, count = self.rows(self.one(pixel_values))
        return self.two(rows) / count


class Counted(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        return x.flatten(1), len(x)


@pytest.mark.provokes("E315")
def test_a_number_that_goes_with_the_batch_does_not_cross():
    model = ByBatch()
    model.rows = Counted()
    model(X)
    with pytest.raises(StageError, match=r"E315.*not a tensor.*got int"):
        cut(model, "two", example=X)


@pytest.mark.parametrize("at", ["segformer.stages.0", "segformer.stages.1", "segformer"])
def test_outputs_that_hooks_collect_cross(at: str):
    model = built("Segformer", "SegformerForSemanticSegmentation", num_labels=3, decoder_hidden_size=8, **STAGES)
    model.decode_head.dropout.p = 0.0
    trains_as_uncut(model, at, torch.randint(0, 3, (4, 8, 8), generator=torch.Generator().manual_seed(2)))


class Collects(nn.Module):
    """Hooks keep what two layers give; the last layer gets it from there."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Bilinear(6, 6, 3)
        self.kept = list[Tensor]()
        for layer in (self.one, self.two):
            layer.register_forward_hook(lambda _module, _args, output: self.kept.append(output))

    def forward(self, x: Tensor) -> Tensor:
        self.kept.clear()
        self.two(torch.relu(self.one(x)))
        return self.out(*self.kept)


def test_what_hooks_collect_crosses_as_the_step_that_made_it():
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    made = cut(Collects(), "one", example=x)
    assert made.pieces[0].outputs == ("one",)
    assert made.pieces[1].inputs == ("0.one",)
