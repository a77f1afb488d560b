"""NaN in the data is said to be in the data: in which field, of how many samples, and what fills it; never a value."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cutlayer.core.parts import Loss, Shared, Stage, Training
from cutlayer.core.plan import Plan
from cutlayer.data.sources import TensorTable
from cutlayer.errors import NonFiniteError
from cutlayer.run.party import Party
from cutlayer.run.simulate import simulate
from cutlayer.transport.handshake import abort_of
from tests.small import adam


def ruined(x: Tensor, y: Tensor, preprocessing: tuple[Shared, ...] = (), **own: nn.Module) -> None:
    stages = [
        Stage("head", at="ward", inputs=["data.x"], output="float32[batch, 2]"),
        Stage("body", at="server", inputs=["head"], output="float32[batch]"),
        Loss("loss", at="ward", inputs=["body", "data.y"]),
    ]
    plan = Plan(stages, training=Training(batch_size=8, microbatches=2, shuffle=False), preprocessing=preprocessing)
    modules = {"head": nn.Linear(3, 2), "loss": nn.MSELoss(), **own}
    ward = Party("ward", data=TensorTable(x=x, y=y), modules=modules, optimizer=adam)
    server = Party("server", modules={"body": nn.Sequential(nn.Linear(2, 1), nn.Flatten(0))}, optimizer=adam)
    simulate(plan, [ward, server])


def caught(x: Tensor, y: Tensor, **more: nn.Module) -> NonFiniteError:
    with pytest.raises(NonFiniteError) as found:
        ruined(x, y, **more)
    assert found.value.code == "E351"
    return found.value


def rows() -> tuple[Tensor, Tensor]:
    return torch.rand(16, 3), torch.rand(16)


@pytest.mark.provokes("E351")
def test_missing_values_of_a_field_are_counted_and_what_fills_them_is_named():
    x, y = rows()
    x[0, 1] = x[0, 2] = x[3, 0] = x[5, 0] = float("nan")  # the last is in the second microbatch
    error = caught(x, y)
    assert error.what == "the data hold a NaN or an infinity in x, and so: a tensor at a cut holds a NaN or an infinity"
    assert error.where == "party ward, cut head->body, train round 1, microbatch 0"
    assert error.got == "x: NaN in 2 of 4 samples of this microbatch"
    assert '[[preprocessing]] field = "x", at = "head", kind = "scale" in the contract' in error.remedy
    assert "learning rate" not in error.remedy
    told = abort_of(error, "ward")
    assert "2 of 4" not in told.what + told.remedy  # how many stays here
    ruined(x, y, (Shared("x", at="head"),))  # and it does fill them


def test_an_infinity_is_to_be_corrected():
    x, y = rows()
    x[1, 1] = -float("inf")
    error = caught(x, y)
    assert error.got == "x: an infinity in 1 of 4 samples of this microbatch"
    assert error.remedy == "correct x, or leave these samples out"


def test_a_missing_label_is_no_matter_of_scaling():
    x, y = rows()
    y[6] = float("nan")
    error = caught(x, y)
    assert error.what == "the data hold a NaN or an infinity in y, and so: the loss 'loss' is a NaN or an infinity"
    assert error.where == "party ward, train round 1, microbatch 1 of lane 0"
    assert (error.got, error.remedy) == (
        "y: NaN in 1 of 4 samples of this microbatch",
        "leave out the samples that have no y",
    )


def test_a_module_that_makes_it_of_good_data_is_advised_as_before():
    class Bad(nn.Linear):
        def forward(self, value: Tensor) -> Tensor:
            return super().forward(value) / 0

    error = caught(*rows(), head=Bad(3, 2))
    assert error.what == "a tensor at a cut holds a NaN or an infinity"
    assert "lower the learning rate" in error.remedy
    assert error.got == ""


class Filled(nn.Module):
    """Takes missing values as zeros; from the call `fails` on it gives a NaN for each sample, as what diverged does."""

    def __init__(self, fails: int) -> None:
        super().__init__()
        self.layer, self.left = nn.Linear(3, 2), fails

    def forward(self, value: Tensor) -> Tensor:
        self.left -= 1
        return self.layer(value.nan_to_num()) / (1 if self.left > 0 else 0)


LOWER = "lower the learning rate, clip gradients (training.clip_norm), or look for bad samples"


def test_where_the_model_takes_missing_values_the_learning_rate_is_blamed_first():
    """Also if each sample has one: batches before this went well."""
    x, y = rows()
    x[8] = float("nan")
    for filled in (x, torch.full_like(x, float("nan"))):
        error = caught(filled, y, head=Filled(3))
        assert error.what == "a tensor at a cut holds a NaN or an infinity; the data hold one too, in x"
        assert error.where == "party ward, cut head->body, train round 1, microbatch 0"
        assert error.remedy.startswith(f"{LOWER}; if the model does not take such data, fill x with the mean of its")


def test_in_the_first_step_the_data_are_blamed_first_where_samples_without_a_nan_have_one_now():
    x, y = rows()
    x[1, 0] = float("nan")
    error = caught(x, y, head=Filled(1))
    assert error.what == "a tensor at a cut holds a NaN or an infinity; the data hold one too, in x"
    assert error.remedy.startswith("fill x with the mean of its column")
    assert error.remedy.endswith(f"or leave these samples out; if the model takes such data, {LOWER}")


def test_of_a_batch_that_is_normalised_one_missing_value_is_blamed_for_all_samples():
    x, y = rows()
    x[9, 0] = float("nan")
    error = caught(x, y, head=nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)))
    assert error.remedy.startswith("fill x with the mean of its column")


def test_a_loss_that_makes_it_of_finite_numbers_is_blamed_on_the_data_last():
    class Overflow(nn.Module):
        def forward(self, prediction: Tensor, label: Tensor) -> Tensor:
            return nn.functional.mse_loss(prediction, label) * float("inf")

    x, y = rows()
    x[0, 0] = float("nan")
    error = caught(x, y, head=Filled(9), loss=Overflow())
    assert error.what == "the loss 'loss' is a NaN or an infinity; the data hold one too, in x"
    assert error.remedy.startswith("lower the learning rate; or look for bad samples")


def test_of_two_parties_with_a_field_of_one_name_the_stage_of_the_one_is_named():
    stages = [
        Stage("first", at="ward", inputs=["data.x"], output="float32[batch, 2]"),
        Stage("second", at="lab", inputs=["data.x"], output="float32[batch, 2]"),
        Stage("body", at="server", inputs=["first", "second"], output="float32[batch, 1]"),
        Loss("loss", at="ward", inputs=["body", "data.y"]),
    ]
    plan = Plan(stages, training=Training(batch_size=8, shuffle=False))
    x, y = rows()
    bad = x.clone()
    bad[0, 0] = float("nan")
    ward = {"first": nn.Linear(3, 2), "loss": nn.MSELoss()}
    parties = [
        Party("ward", data=TensorTable(x=x, y=y), modules=ward, optimizer=adam),
        Party("lab", data=TensorTable(x=bad), modules={"second": nn.Linear(3, 2)}, optimizer=adam),
        Party("server", modules={"body": nn.Bilinear(2, 2, 1)}, optimizer=adam),
    ]
    with pytest.raises(NonFiniteError) as found:
        simulate(plan, parties)
    assert found.value.where.startswith("party lab")
    assert 'field = "x", at = "second"' in found.value.remedy
