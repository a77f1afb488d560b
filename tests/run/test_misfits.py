"""What does not fit between model, loss, metric and data is named, with a remedy, and no value of a sample is told."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchmetrics as tm
from torch import Tensor, nn
from torchmetrics import classification as tc
from torchmetrics import regression as tr
from torchmetrics.text import Perplexity
from torchmetrics.wrappers import LambdaInputTransformer, MinMaxMetric

from cutlayer.core.parts import Loss, Stage, Training
from cutlayer.core.plan import Plan
from cutlayer.data.sources import TensorTable
from cutlayer.engine.advice import after_failure
from cutlayer.engine.scoring import loss_error
from cutlayer.errors import ConfigError, CutlayerError, DataError, NonFiniteError, StageError
from cutlayer.run.party import Party
from cutlayer.run.simulate import Result, simulate
from cutlayer.transport.handshake import abort_of


def tried(x: Tensor, y: Tensor, loss: Any, metric: Any = None, module: nn.Module | None = None) -> Result:
    """One party's head gives `x` to a loss at another party with labels `y`."""
    spec = f"{str(x.dtype).removeprefix('torch.')}[{', '.join(['batch', *map(str, x.shape[1:])])}]"
    stages = [
        Stage("head", at="a", inputs=["data.x"], output=spec),
        Loss("loss", at="b", inputs=["head", "data.y"]),
    ]
    metrics = {"loss": metric} if metric else {}
    return simulate(
        Plan(stages, training=Training(batch_size=len(x))),
        [
            Party("a", data=TensorTable(x=x), modules={"head": module or Scale()}, optimizer=torch.optim.SGD),
            Party("b", data=TensorTable(y=y), modules={"loss": loss}, metrics=metrics),
        ],
    )


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor.to(x.dtype)


def refused(*given: Any, code: str) -> CutlayerError:
    with pytest.raises(CutlayerError) as caught:
        tried(*given)
    assert caught.value.code == code, caught.value
    return caught.value


FOUR = torch.tensor([0, 1, 2, 0])
LOSSES = {
    "int32 labels": (torch.ones(4, 3), FOUR.int(), nn.CrossEntropyLoss(), "label.long()"),
    "float labels": (torch.ones(4, 3), FOUR.float(), nn.CrossEntropyLoss(), "label.long()"),
    "labels as a column": (torch.ones(4, 3), FOUR[:, None], nn.CrossEntropyLoss(), "label.squeeze(-1)"),
    "too few outputs": (torch.ones(4, 2), FOUR, nn.CrossEntropyLoss(), "one output for each class"),
    "classes last": (torch.ones(4, 5, 3), torch.ones(4, 5).long(), nn.CrossEntropyLoss(), "prediction.movedim(-1, 1)"),
    "whole labels": (torch.ones(4, 3), torch.ones(4, 3).long(), nn.BCEWithLogitsLoss(), "label.float()"),
    "double labels": (torch.ones(4), torch.ones(4).double(), nn.HuberLoss(), "label.float()"),
    "one column": (torch.ones(4, 1), torch.ones(4), nn.BCEWithLogitsLoss(), ".squeeze(-1)"),
    "a function": (torch.ones(4, 3), FOUR, lambda s, y: s @ y, "run the loss alone"),
    "bool labels": (torch.ones(4, 1), torch.ones(4, 1).bool(), nn.BCEWithLogitsLoss(), "label.float()"),
    "logits": (torch.full((4, 1), 2.0), torch.ones(4, 1), nn.BCELoss(), "take BCEWithLogitsLoss"),
    "no share": (torch.full((4, 1), 0.5), torch.full((4, 1), 2.0), nn.BCELoss(), "give labels in 0..1"),
    "one-hot": (torch.ones(4, 3), F.one_hot(FOUR), nn.CrossEntropyLoss(), "label.argmax(1)"),
    "one-hot, NLL": (torch.ones(4, 3), F.one_hot(FOUR), nn.NLLLoss(), "label.argmax(1)"),
    "one output": (torch.ones(4, 1), FOUR[:, None], nn.CrossEntropyLoss(), "take BCEWithLogitsLoss and label.float()"),
    "row and column": (torch.ones(4, 1), torch.ones(4), nn.SoftMarginLoss(), ".squeeze(-1)"),
}


@pytest.mark.provokes("E307")
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_that_does_not_fit_says_what_to_do(name):
    x, y, loss, remedy = LOSSES[name]
    error = refused(x, y, loss, code="E307")
    assert isinstance(error, StageError)
    assert "the loss 'loss' does not take what it is given" in str(error)
    assert remedy in error.remedy
    assert f"float32{list(x.shape)}, " in error.got


def test_a_prediction_that_is_no_number_is_not_taken_for_logits():
    x, y = torch.full((4, 1), torch.nan), torch.ones(4, 1)
    with pytest.raises(RuntimeError) as caught:
        nn.BCELoss()(x, y)
    assert "NaN or infinite" in loss_error("loss", [x, y], caught.value).remedy


CURES = {
    "label.long()": lambda x, y, loss: (x, y.long(), loss),
    "label.argmax(1)": lambda x, y, loss: (x, y.argmax(1), loss),
    "label.int().argmax(1)": lambda x, y, loss: (x, y.int().argmax(1), loss),
    "label.squeeze(-1)": lambda x, y, loss: (x, y.squeeze(-1), loss),
    "label.unsqueeze(-1)": lambda x, y, loss: (x, y.unsqueeze(-1), loss),
    "label.float()": lambda x, y, loss: (x, y.float(), loss),
    "BCEWithLogitsLoss": lambda x, y, loss: (x, y, nn.BCEWithLogitsLoss()),
}


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.NLLLoss(), nn.BCELoss(), nn.BCEWithLogitsLoss()], ids=repr)
def test_doing_what_is_said_ends(loss, dtype, shape):
    """Whatever the labels: to do as told, again and again, comes to a loss that works, or to no word at all."""
    for wide in [(4, 1), (4, 3)]:
        x, function = torch.linspace(-2, 2, torch.Size(wide).numel()).reshape(wide), loss
        y = torch.eye(3)[FOUR].to(dtype) if shape == (4, 3) else torch.ones(shape).to(dtype)
        for _ in range(4):
            try:
                function(x, y)
            except Exception as error:
                remedy = loss_error("loss", [x, y], error).remedy
            else:
                break
            cures = [cure for word, cure in CURES.items() if word in remedy]
            if not cures:
                break
            for cure in cures[:1] if "one-hot" in remedy else cures:
                x, y, function = cure(x, y, function)
        else:
            pytest.fail(f"{wide}: still {remedy!r}")


@pytest.mark.provokes("E307")
@pytest.mark.parametrize(
    ("labels", "got"),
    [
        ([0, 1, 4711, 0], "a label that is no class: labels 0 to 4711, where 3 outputs take 0 to 2"),
        ([1, 2, 3, -100], "a label that is no class: labels 1 to 3, where 3 outputs take 0 to 2"),
        ([-1, 2, 0, 0], "a label that is no class: labels -1 to 2, where 3 outputs take 0 to 2"),
    ],
)
def test_labels_that_are_no_class_are_told_at_this_party_alone(labels: list[int], got: str):
    """What to do does not depend on them: the others read it."""
    error = refused(torch.ones(4, 3), torch.tensor(labels), nn.CrossEntropyLoss(), code="E307")
    assert error.got == f"float32[4, 3], int64[4]; {got}"
    assert "label - 1 in the data set, where they begin at 1" in error.remedy
    assert "ignore_index" in error.remedy
    told = abort_of(error, "a")
    other = refused(torch.ones(4, 3), torch.tensor([0, 1, 5, 0]), nn.CrossEntropyLoss(), code="E307")
    assert (told.what, told.remedy) == (abort_of(other, "a").what, abort_of(other, "a").remedy)
    assert "4711" not in told.what + told.remedy


def test_an_index_error_of_anything_else_tells_no_labels():
    def loss(prediction: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        raise IndexError("Dimension out of range")

    error = refused(torch.ones(4, 3), torch.tensor([0, 1, 2, 0]), loss, code="E307")
    assert error.got == "float32[4, 3], int64[4]; IndexError: Dimension out of range"
    assert error.remedy == "run the loss alone on tensors of these dtypes and shapes"


STRETCHED = {
    "MSELoss": nn.MSELoss(),
    "L1Loss": nn.L1Loss(),
    "HuberLoss": nn.HuberLoss(),
    "named": lambda s, y: F.mse_loss(target=y, input=s),
    "by hand": lambda s, y: ((s - y) ** 2).mean(),
    "Poisson": nn.PoissonNLLLoss(),
}


@pytest.mark.provokes("E309")
@pytest.mark.parametrize(
    ("name", "shapes"),
    [*itertools.product(STRETCHED, [((4, 1), (4,)), ((4,), (4, 1))]), ("MSELoss", ((4, 3), (4, 1)))],
)
def test_a_loss_never_compares_each_with_each(name, shapes):
    x, y = (torch.ones(shape) for shape in shapes)
    error = refused(x, y, STRETCHED[name], code="E309")
    assert "would stretch prediction and label to each other" in error.what
    assert error.got == f"float32{list(shapes[0])}, float32{list(shapes[1])}"
    assert ("squeeze(-1)" in error.remedy) == (shapes[0] != (4, 3))


def test_a_loss_may_pair_samples_when_it_means_to():
    """As Cox's partial likelihood does: the pairs are made from other tensors than the loss's inputs."""

    def cox(risk: Tensor, time: Tensor) -> Tensor:
        later = time[:, None] <= time[None, :]
        return -(risk[:, 0] - (risk[:, 0].exp() * later).sum(1).log()).mean()

    by_hand = STRETCHED["by hand"]  # one label for all columns, written so
    for x, y, loss in ((torch.rand(4, 1), torch.rand(4), cox), (torch.rand(4, 3), torch.rand(4, 1), by_hand)):
        (row,) = tried(x, y, loss).history
        assert row["metrics"]["loss"] == pytest.approx(float(loss(x, y)), rel=1e-6)  # `Scale` begins with 1


METRICS = {
    "a column": (torch.rand(4, 1), torch.tensor([0, 1, 0, 1]), lambda: tc.BinaryAUROC(thresholds=9), "squeeze(-1)"),
    "a class too many": (torch.rand(4, 2), FOUR, lambda: tc.MulticlassAccuracy(2), "number of classes"),
    "a label to leave out": (torch.rand(4, 3), FOUR - 1, lambda: tc.MulticlassF1Score(3), "ignore_index"),
    "soft labels": (torch.rand(4), torch.rand(4), tc.BinaryF1Score, "soft labels"),
    "classes last": (torch.rand(4, 5, 3), torch.ones(4, 5).long(), lambda: tc.MulticlassAccuracy(3), "movedim(-1, 1)"),
    "regression": (torch.rand(4, 1), torch.rand(4), tr.R2Score, "squeeze(-1)"),
    "other classes": (torch.rand(4, 3), FOUR, lambda: tc.MulticlassAccuracy(4), "first and the last input"),
    "a text's": (torch.rand(4, 3), FOUR, Perplexity, "first and the last input"),
    "one sample": (torch.rand(1), torch.rand(1), tr.R2Score, "first and the last input"),
}  # fmt: skip


@pytest.mark.provokes("E308")
@pytest.mark.parametrize("name", METRICS)
def test_a_metric_that_does_not_fit_says_what_to_do(name):
    x, y, metric, remedy = METRICS[name]
    error = refused(x, y, lambda s, t: s.mean(), lambda: {"mine": metric()}, code="E308")
    assert "the metric 'mine'" in error.what
    assert remedy in error.remedy
    assert error.where == type(metric()).__name__


def test_a_metric_never_tells_a_value():
    class Loud(tm.MeanMetric):
        def update(self, score: Tensor, label: Tensor) -> None:
            raise ValueError(f"Detected the following values: {label.tolist()}")

    error = refused(torch.rand(4), torch.full((4,), 4711), lambda s, t: s.mean(), Loud, code="E308")
    assert "4711" not in " ".join(error.lines())


@pytest.mark.parametrize("loss", [nn.BCEWithLogitsLoss(), F.binary_cross_entropy_with_logits])
def test_logits_within_0_and_1_are_not_taken_for_probabilities(loss):
    """Torchmetrics guesses for each batch; here the loss says what the predictions are."""
    x, y = torch.tensor([0.4, 0.3, -2.0, 3.0]), torch.tensor([0.0, 0.0, 0.0, 1.0])
    stages = [
        Stage("head", at="a", inputs=["data.x"], output="float32[batch]"),
        Loss("loss", at="a", inputs=["head", "data.y"]),
    ]
    party = Party(
        "a", data=TensorTable(x=x, y=y), modules={"head": Scale(), "loss": loss}, optimizer=still,
        metrics={"loss": lambda: {"auroc": tc.BinaryAUROC(), "accuracy": tc.BinaryAccuracy()}},
    )  # fmt: skip
    values = simulate(Plan(stages, training=Training(batch_size=2, shuffle=False)), [party]).metrics("train")["loss"]
    assert values["auroc"] == 1.0
    assert values["accuracy"] == 0.5


def test_what_may_be_logits_or_probabilities_is_refused():
    stages = [
        Stage("head", at="a", inputs=["data.x"], output="float32[batch]"),
        Loss("loss", at="a", inputs=["head", "data.y"]),
    ]
    x, y = torch.tensor([0.4, 0.3, -2.0, 3.0]), torch.tensor([0.0, 0.0, 0.0, 1.0])
    modules = {"head": Scale(), "loss": lambda s, t: (s.sigmoid() - t).square().mean()}
    plan = Plan(stages, training=Training(batch_size=2, shuffle=False))
    party = Party("a", data=TensorTable(x=x, y=y), modules=modules, optimizer=still)
    with pytest.raises(StageError, match=r"E308.*probabilities: some batches.*torch\.sigmoid"):
        simulate(plan, [replace(party, metrics={"loss": tc.BinaryAUROC})])
    wrapped = replace(party, metrics={"loss": lambda: {"a": LambdaInputTransformer(tc.BinaryAUROC(), torch.sigmoid)}})
    assert simulate(plan, [wrapped]).metrics("train")["loss"]["a"] == 1.0


def still(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.0)


def test_metrics_of_halves_are_computed_in_float32():
    x, y = torch.rand(8, 3).bfloat16(), torch.randint(0, 3, (8,))
    found = tried(x, y, lambda s, t: F.cross_entropy(s.float(), t), lambda: tc.MulticlassAUROC(3, thresholds=9))
    direct = tc.MulticlassAUROC(3, thresholds=9)
    direct.update(x.float().softmax(1), y)
    assert found.metrics("train")["loss"]["MulticlassAUROC"] == float(direct.compute())


@pytest.mark.provokes("E222")
@pytest.mark.parametrize(
    ("metric", "words"),
    [
        (lambda: {"one": 3.0}, "got float"),
        (dict, "got dict"),
        (lambda: {"a": {"b": nn.ReLU()}}, "got ReLU"),
    ],
)
def test_what_is_no_metric_is_refused(metric, words):
    error = refused(torch.rand(4), torch.rand(4), nn.MSELoss(), metric, code="E222")
    assert words in str(error)


def test_a_wrapped_metric_that_would_send_samples_is_refused():
    stages = [
        Stage("head", at=["a", "b"], inputs=["data.x"], output="float32[batch]"),
        Loss("loss", at=["a", "b"], inputs=["head", "data.y"]),
    ]
    metrics = {"loss": lambda: MinMaxMetric(tc.BinaryAUROC())}
    parties = [
        Party(n, data=TensorTable(x=torch.ones(5), y=torch.ones(5)), metrics=metrics, optimizer=torch.optim.SGD,
              modules={"head": Scale(), "loss": nn.MSELoss()})
        for n in ("a", "b")
    ]  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        simulate(Plan(stages), parties)
    assert caught.value.code == "E222"
    assert "its state 'preds' is no sum" in str(caught.value)
    assert "AUROC with thresholds=100" in caught.value.expected


def test_a_metric_instead_of_a_function_is_refused():
    with pytest.raises(ConfigError, match=r"the metrics of 'loss' at party 'a' are no function.*got BinaryAUROC"):
        Party("a", metrics={"loss": tc.BinaryAUROC()})


def test_a_loss_that_adds_where_the_plan_means_is_refused():
    error = refused(torch.rand(4), torch.rand(4), nn.MSELoss(reduction="sum"), code="E223")
    assert "expected reduction='mean', got 'sum'" in str(error)
    assert "Loss(..., reduction='sum')" in error.remedy


@pytest.mark.provokes("E351")
def test_a_loss_over_no_label_is_refused():
    """Also where no cut would stop it: the loss and what it trains are at one party."""
    stages = [
        Stage("head", at="a", inputs=["data.x"], output="float32[batch, 3]"),
        Loss("loss", at="a", inputs=["head", "data.y"]),
    ]
    table = TensorTable(x=torch.rand(4, 3), y=torch.tensor([0, 1, -100, -100]))
    party = Party("a", data=table, modules={"head": Scale(), "loss": nn.CrossEntropyLoss()}, optimizer=still)
    with pytest.raises(NonFiniteError, match=r"the loss 'loss' is a NaN.*microbatch 0 of lane 0.*ignore_index"):
        simulate(Plan(stages, training=Training(batch_size=2, shuffle=False)), [party])
    simulate(Plan(stages, training=Training(batch_size=4, shuffle=False)), [party])


def test_a_loss_of_each_sample_says_what_to_do():
    error = refused(torch.rand(4), torch.rand(4), nn.MSELoss(reduction="none"), code="E301")
    assert "reduction='mean'" in error.remedy


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64])
@pytest.mark.parametrize("layer", [nn.Linear(4, 2), nn.Conv2d(1, 2, 2)], ids=["linear", "conv"])
def test_pictures_of_whole_numbers_are_told_how_to_be_floats(layer: nn.Module, dtype: torch.dtype):
    picture = torch.zeros(2, 1, 4, 4).to(dtype)
    with pytest.raises(RuntimeError) as caught:
        layer(picture)
    assert ".float() in the data set" in after_failure(layer, [picture], caught.value)


def test_samples_of_unequal_length_need_a_collate_function():
    rows = [{"x": torch.ones(length)} for length in (2, 3)]
    plan = Plan(
        [Stage("head", at="a", inputs=["data.x"], output="float32[batch]"), Loss("loss", at="a", inputs=["head"])],
        training=Training(batch_size=2),
    )
    with pytest.raises(DataError, match=r"cannot be put together.*collate_fn that pads") as caught:
        simulate(
            plan, [Party("a", data=rows, modules={"head": Scale(), "loss": torch.mean}, optimizer=torch.optim.SGD)]
        )
    assert caught.value.code == "E253"


@pytest.mark.provokes("E340")
@pytest.mark.parametrize(
    "loss",
    [
        lambda s, y: F.cross_entropy(s.detach(), y),
        lambda s, y: (s.argmax(1) == y).float().mean(),
        lambda s, y: torch.tensor(F.cross_entropy(s, y).item()),
    ],
    ids=["detached", "accuracy", "item"],
)
def test_a_loss_from_which_no_gradient_goes_back_is_refused(loss):
    error = refused(torch.ones(4, 3), FOUR, loss, code="E340")
    assert "gives no gradient" in error.what
    assert "without detach, argmax, item" in error.remedy


def test_a_loss_of_what_nobody_trains_needs_no_gradient():
    stages = [
        Stage("head", at="a", inputs=["data.x"], output="float32[batch, 3]", frozen=True),
        Loss("loss", at="b", inputs=["head", "data.y"]),
    ]
    parties = [
        Party("a", data=TensorTable(x=torch.ones(4, 3)), modules={"head": Scale()}),
        Party("b", data=TensorTable(y=FOUR), modules={"loss": nn.CrossEntropyLoss()}),
    ]
    assert simulate(Plan(stages, training=Training(batch_size=4)), parties).history
