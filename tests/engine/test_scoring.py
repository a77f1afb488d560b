"""What is said of a loss that fails: which of its inputs is the label, and which label it leaves out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cutlayer.engine.scoring import loss_error
from cutlayer.engine.stage import Context, ModuleStage
from cutlayer.errors import StageError


def weighted(prediction: torch.Tensor, label: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (nn.functional.cross_entropy(prediction, label, reduction="none") * weight).mean()


NINE = torch.tensor([1, 2, 9])


@pytest.mark.parametrize(
    ("loss", "inputs", "ignored", "got"),
    [
        (weighted, [torch.ones(3, 4), NINE, torch.ones(3)], -100, "labels 1 to 9, where 4 outputs take 0 to 3"),
        (lambda y, x: nn.functional.nll_loss(x, y), [NINE, torch.ones(3, 4)], -100, "labels 1 to 9, where 4 outputs"),
        (nn.CrossEntropyLoss(ignore_index=0), [torch.ones(2, 4), torch.tensor([-100, 0])], 0, "labels -100 to -100"),
        (nn.CrossEntropyLoss(ignore_index=255), [torch.ones(3, 3), torch.tensor([255, 1, 3])], 255, "labels 1 to 3,"),
        (lambda x, y: x[0, y[1]], [torch.ones(3, 4), torch.tensor([0, -100, 1])], -100, "a label, or another index"),
    ],
    ids=["a weight behind", "labels first", "ignore_index=0", "ignore_index=255", "no range"],
)
def test_labels_that_are_no_class_wherever_they_stand(loss, inputs, ignored, got):
    with pytest.raises(IndexError) as caught:
        loss(*inputs)
    error = loss_error("loss", inputs, caught.value, ignored)
    assert got in error.got
    assert "IndexError" not in error.got
    assert "one output for each class" in error.remedy


def test_the_label_that_a_loss_leaves_out_is_its_own():
    loss = nn.CrossEntropyLoss(ignore_index=255)
    stage = ModuleStage("loss", loss, ports=None, seed=0, device=torch.device("cpu"))
    context = Context(key=(0, 0), batch=4, training=True, wanted=(True, False))
    with pytest.raises(StageError) as caught:
        stage.forward([torch.ones(4, 3), torch.tensor([255, 1, 3, 0])], context)
    assert caught.value.got.endswith("a label that is no class: labels 0 to 3, where 3 outputs take 0 to 2")
