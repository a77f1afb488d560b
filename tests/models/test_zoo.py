"""Models cut everywhere: in a U-shape or with the labels at the server, each trains as the uncut model, to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import cutlayer as cl
from cutlayer.errors import PlanError
from cutlayer.models.costs import candidates
from tests.models.zoo import SUBJECTS, TRANSPOSED, Subject

EPOCHS, BATCH = 1, 3  # two steps: the second sees what the first did


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def uncut(subject: Subject) -> dict[str, Tensor]:
    """Train by a plain loop; dropout is off, as each stage has a generator of its own."""
    model, output = undropped(subject.make()), None
    optimizer = sgd([p for p in model.parameters() if p.requires_grad])
    rows = subject.rows()
    for _ in range(EPOCHS):
        for batch in DataLoader(rows, batch_size=BATCH):
            label = batch.pop("label")
            output = model(**batch)
            output = output if isinstance(output, Tensor) else output["logits"]
            subject.loss(output, label).backward()
            optimizer.step()
            optimizer.zero_grad()
    return {name: value.clone() for name, value in model.state_dict().items()}


def undropped(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
        for name in ("attention_dropout", "dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


_uncut: dict[str, dict[str, Tensor]] = {}


def difference(name: str, at: object, labels: str) -> float:
    """Return the largest difference of any weight or buffer after training, assembled strictly into a new model."""
    subject = (SUBJECTS | TRANSPOSED)[name]
    if name not in _uncut:
        _uncut[name] = uncut(subject)
    model = undropped(subject.make())
    before = [key for key, _ in model.named_parameters()]
    example = {key: value[:2] for key, value in subject.inputs.items()}
    made = cl.split(model, at, example=example, labels=labels, release=subject.release)
    run = cl.fit(made, DataLoader(subject.rows(), batch_size=BATCH), loss=subject.loss, optimizer=sgd, epochs=EPOCHS)
    fresh = subject.make()
    fresh.load_state_dict(run.state_dict(), strict=True)
    assert [key for key, _ in model.named_parameters()] == before
    assert _uncut[name].keys() == fresh.state_dict().keys()
    found = fresh.state_dict()
    return max(float((found[key].double() - value.double()).abs().max()) for key, value in _uncut[name].items())


def boundaries(name: str) -> list[str]:
    """Return all submodules after which a model might be cut, but its last layer."""
    model = SUBJECTS[name].make()
    return [path for path, module in model.named_modules() if path and not isinstance(module, nn.ModuleList)][:-1]


RESNET = boundaries("resnet18")


@pytest.mark.parametrize("at", RESNET)
def test_resnet18_at_every_submodule(at: str):
    last = at in ("avgpool",)
    assert difference("resnet18", at, "server" if last else "client") == 0.0


def test_resnet18_has_all_its_boundaries():
    assert len(RESNET) == 66
    assert {"layer1.0.conv1", "layer2.0.downsample.0", "layer4.1.bn2", "maxpool", "avgpool"} <= set(RESNET)


@pytest.mark.parametrize(
    ("name", "at", "labels"),
    [
        ("densenet121", "features.denseblock2.denselayer3", "client"),
        ("densenet121", "features.denseblock2.denselayer3.layers.conv1", "client"),
        ("densenet121", "features.transition1", "server"),
        *(("unet", at, "client") for at in ("down1", "down1.0", "down2", "bottom", "up2", "join2", "up1")),
        ("unet", ("down2", "join2"), "client"),
        ("unet", "bottom", "server"),
        *(
            ("basicunet", at, "server")
            for at in ("down_2", "upcat_3.upsample", "upcat_3.convs.conv_0", "upcat_3.convs")
        ),
        ("lstm", "table", "client"),
        ("lstm", "lstm", "client"),
        ("lstm", "lstm", "server"),
        *(("pooled", at, labels) for at, labels in (("lstm", "server"), (("lstm", "inner"), "client"))),
        *(("channels-last", at, labels) for at, labels in (("two", "server"), (("one", "two"), "client"))),
        *(("last", at, labels) for at, labels in (("lstm", "server"), (("gru", "lstm"), "client"))),
        ("transformer", "both.decoder.layers.0", "server"),
        ("transformer", "both.encoder.layers.1", "server"),
        ("encoder", "encoder.layers.2", "server"),
        ("transformer", ("both.encoder", "both.decoder.layers.1"), "client"),
        *(("writer", at, "server") for at in ("first", "second")),
        ("tied", "table", "client"),
        ("tied", ("middle", "norm"), "client"),
        ("tied", "middle.1", "client"),
        *(("deberta-relative", f"deberta.{at}", "server") for at in ("embeddings", "encoder")),
        ("deberta-relative", ("deberta.embeddings", "deberta.encoder"), "client"),
    ],
)
def test_across_skips_states_and_ties(name: str, at: object, labels: str):
    assert difference(name, at, labels) == 0.0


@pytest.mark.parametrize(
    ("name", "at"),
    [
        *(("aliases", at) for at in ("first", "second", "body.0", "body.1", "body.2", "body")),
        *(("dynunet", at) for at in boundaries("dynunet") if not at.startswith("output_block")),
        *(("dynunet", f"skip_layers.{at}") for at in ("next_layer.next_layer.conv1", "next_layer.downsample.lrelu")),
    ],
)
def test_modules_with_several_names_at_each(name: str, at: str):
    assert difference(name, at, "server") == 0.0


@pytest.mark.parametrize("name", ["aliases", "dynunet"])
def test_candidates_lists_all_names(name: str):
    subject = SUBJECTS[name]
    named = dict(subject.make().named_modules(remove_duplicate=False))
    last = ("last", "output_block")
    expected = [key for key, one in named.items() if key and not isinstance(one, nn.ModuleList)]
    found = candidates(subject.make(), dict(subject.inputs))
    assert found == [key for key in expected if not key.startswith(last)]


def test_modules_with_several_names_are_one_parameter_in_the_models_order():
    subject = SUBJECTS["aliases"]
    model = subject.make()
    made = cl.split(model, "first", example=subject.inputs["x"][:2], labels="server")
    assert made.cut.points == ("body.0",)
    head, body = (piece.module for piece in made.cut.pieces)
    assert list(map(id, head.parameters())) == list(map(id, model.first.parameters()))
    assert list(map(id, body.parameters())) == [id(p) for part in (model.second, model.last) for p in part.parameters()]
    run = cl.fit(made, DataLoader(subject.rows(), batch_size=BATCH), loss=subject.loss, optimizer=sgd)
    assembled = cl.assemble(run)
    assert assembled.keys() == model.state_dict().keys()
    assert torch.equal(assembled["first.weight"], assembled["body.0.weight"])


@pytest.mark.parametrize("labels", ["client", "server"])
@pytest.mark.parametrize("block", [0, 1, 2])
@pytest.mark.parametrize(
    "name", ["gpt2", "llama", "bert", "vit", "encoder", "phi", "granite", "bloom", "modernbert", "deberta"]
)
def test_stacks_of_blocks_at_every_block(name: str, block: int, labels: str):
    if name == "gpt2" and labels == "server":
        pytest.skip("its embedding and its last layer are one weight: only a U-shape keeps them together")
    assert difference(name, (1, 2) if block == 2 and labels == "client" else block, labels) == 0.0


SWIN = ("swin.embeddings", "encoder.layers.0.blocks.0", "encoder.layers.0.blocks.1.layernorm_after", "encoder.layers.0")


@pytest.mark.parametrize(
    ("name", "at", "labels"),
    [
        *(("swin", at, labels) for at in (*SWIN, "encoder.layers.1.blocks.0.mlp") for labels in ("client", "server")),
        *(("clip", f"text.encoder.layers.{block}", "server") for block in range(3)),
        *(("clip", f"text.encoder.layers.{block}", "client") for block in range(2)),
        *(("states", block, "server") for block in range(3)),
        *(("bart", f"model.decoder.layers.{block}", labels) for block in (0, 1) for labels in ("client", "server")),
        *(("bart", ("model.encoder.layers.0", f"model.decoder.layers.{block}"), "client") for block in (0, 1)),
        ("t5", ("encoder.block.1", "decoder.block.1"), "client"),
        ("t5", ("encoder", "decoder"), "client"),
    ],
)
def test_transformers_that_are_followed(name: str, at: object, labels: str):
    """Stacks to which no hidden state can be handed in, whose other states are used, or that are no stack."""
    assert difference(name, at, labels) == 0.0


@pytest.mark.provokes("E332")
@pytest.mark.parametrize("labels", ["client", "server"])
def test_a_table_of_all_blocks_is_not_cut_between_them(labels: str):
    """Cuts before and after them, which the error advises, are tried above."""
    subject = SUBJECTS["deberta-relative"]
    with pytest.raises(
        PlanError, match=r"E332.*two uses of 'deberta.encoder.rel_embeddings.weight' are one weight"
    ) as caught:
        cl.split(subject.make(), 0, example=dict(subject.inputs), labels=labels)
    assert caught.value.remedy == "cut before 'deberta.encoder', which uses it in several of its parts, or after it"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes_are_kept(dtype: torch.dtype):
    subject = SUBJECTS["unet"]
    inputs = subject.inputs["x"].to(dtype)
    model, uncut_model = subject.make().to(dtype), subject.make().to(dtype)
    made = cl.split(model, "down2", example=inputs[:2])
    assert {spec.dtype for ports in made.ports for spec in ports.specs.values()} == {str(dtype).removeprefix("torch.")}
    rows = [{"x": x, "label": y} for x, y in zip(inputs, subject.labels, strict=True)]
    run = cl.fit(made, DataLoader(rows, batch_size=BATCH), loss=subject.loss, optimizer=sgd)
    optimizer = sgd(list(uncut_model.parameters()))
    for batch in DataLoader(rows, batch_size=BATCH):
        subject.loss(uncut_model(batch["x"]), batch["label"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = uncut_model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in run.state_dict().items())


def test_frozen_parts_stay_as_they_are_and_cost_no_gradient():
    subject = SUBJECTS["resnet18"]
    model = subject.make()
    for part in (model.conv1, model.bn1, model.layer1):
        part.requires_grad_(False)
    before = {key: value.clone() for key, value in model.named_parameters() if not value.requires_grad}
    made = cl.split(model, "layer1", example=subject.inputs["x"][:2])
    assert made.plan().stage("head").frozen
    run = cl.fit(made, DataLoader(subject.rows(), batch_size=BATCH), loss=subject.loss, optimizer=sgd)
    assert all(torch.equal(run.state_dict()[key], value) for key, value in before.items())
    edge = made.plan().graph.inputs_of["body"][0]
    assert not edge.trained
    assert not [key for key in run.result.ledgers["server"].flows if key[3] == "down" and key[4] == edge.index]
