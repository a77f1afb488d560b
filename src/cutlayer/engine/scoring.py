"""Whether predictions and labels fit a loss or a metric, and what to do if not: dtypes and shapes, never values.

| code | error | meaning |
| --- | --- | --- |
| E307 | StageError | a loss does not take what it is given |
| E308 | StageError | a metric does not take what it is given |
| E309 | StageError | a loss would stretch prediction and label to each other |
| E340 | StageError | a loss gives no gradient |
| E341 | StageError | a loss goes back to weights that are not its party's |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cutlayer.engine.tensors import dtype_name
from cutlayer.errors import StageError

if TYPE_CHECKING:
    from torchmetrics import Metric  # takes seconds to import: only who uses metrics pays

__all__ = [
    "LEFT_OUT",
    "Pairs",
    "check_reach",
    "loss_error",
    "metric_error",
    "metric_inputs",
    "mixed_error",
    "no_gradient",
    "probable",
    "shown",
]

_HALVES = (torch.bfloat16, torch.float16)
_BY_ELEMENT = frozenset({"mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "poisson_nll_loss", "kl_div"})
LEFT_OUT = -100  # torch's own mark of labels to leave out
_SCALES = {"binary_cross_entropy_with_logits": "sigmoid", "cross_entropy": "softmax"}


def shown(tensors: Sequence[Tensor]) -> str:
    """Return dtypes and shapes, such as "float32[8, 3], int64[8]"."""
    return ", ".join(f"{dtype_name(tensor.dtype)}{list(tensor.shape)}" for tensor in tensors)


class Pairs(TorchFunctionMode):
    """While a loss runs: refuse what torch computes, with a warning at most, for shapes that do not pair up.

    `mse_loss` of (batch, 1) and (batch) is a mean over all batch x batch pairs. Watched are torch's losses by element,
    and the subtraction of (batch) from (batch, 1) where these are the loss's own inputs. `scale` is what turns the
    prediction into probabilities, if the loss shows it: "sigmoid", "softmax" or "".

    Args:
        name: The loss.
        inputs: What it is given.
    """

    def __init__(self, name: str, inputs: Sequence[Tensor]) -> None:
        """Watch one call."""
        super().__init__()
        self.name, self.own = name, {id(value): value for value in inputs}
        self._scales: set[str] = set()

    @property
    def scale(self) -> str:
        """Return what the loss takes the prediction to be before: the one function that it was seen to apply."""
        return next(iter(self._scales)) if len(self._scales) == 1 else ""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        _types: Any,  # noqa: ANN401 - as torch calls it
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever the function gives
        """Raise `StageError` E309 if two tensors would be stretched to each other; else do as without."""
        named = kwargs or {}
        kind = getattr(function, "__name__", "")
        if kind in _SCALES:
            self._scales.add(_SCALES[kind])
        if kind in _BY_ELEMENT or kind == "sub":
            given = [*args, *(named[key] for key in ("input", "target", "other") if key in named)]
            first, second = (*given, None, None)[:2]
            both = isinstance(first, Tensor) and isinstance(second, Tensor) and _stretched(first, second)
            own = kind != "sub" or ({id(first), id(second)} <= self.own.keys() and first.numel() == second.numel())
            if both and own:
                raise StageError(
                    f"the loss {self.name!r} would stretch prediction and label to each other",
                    where=f"stage {self.name}",
                    expected="prediction and label of one shape",
                    got=shown([first, second]),
                    remedy=_same_shape(first, second),
                    code="E309",
                )
        return function(*args, **named)


def loss_error(name: str, inputs: Sequence[Tensor], error: Exception, ignored: object = LEFT_OUT) -> StageError:
    """Return the error for a loss that fails on its inputs: what they are, and what most likely helps.

    Labels outside the classes are told in `got`, which stays at this party, and nowhere else: they are values.
    `ignored` is the label that the loss leaves out.
    """
    prediction, label = _pair(inputs)
    bounds = isinstance(error, IndexError) or "out of bounds" in str(error)  # of `gather`, a RuntimeError
    outside = _no_class(prediction, label, ignored) if bounds else ""
    why = f"{type(error).__name__}: {error}"
    if outside:
        why = f"a label that is no class: {outside}"
    elif "out of bounds" in str(error):  # torch's words hold the label
        outside = why = "a label, or another index, out of bounds"
    return StageError(
        f"the loss {name!r} does not take what it is given",
        where=f"stage {name}",
        got=f"{shown(inputs)}; {why}",
        remedy=_remedy(prediction, label, str(error), outside=bool(outside)),
        code="E307",
    )


def no_gradient(name: str) -> StageError:
    """Return the error for a loss from which no gradient goes back, so that nothing would be trained."""
    return StageError(
        f"the loss {name!r} gives no gradient",
        where=f"stage {name}",
        expected="a loss that autograd can follow back to the prediction",
        got="one that depends on no parameter",
        remedy="compute it from the prediction with torch's functions, without detach, argmax, item, numpy or no_grad",
        code="E340",
    )


def check_reach(name: str, outputs: Sequence[Tensor], own: frozenset[int]) -> None:
    """Raise `StageError` E341 if a loss goes back to parameters other than its party's, `own` by `id`.

    Such as a penalty on `model.parameters()` in the loss: in processes of their own, others' weights are not there.
    """
    ahead, seen = [output.grad_fn for output in outputs], set[object]()
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        ahead += [following for following, _ in node.next_functions]
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, nn.Parameter) and id(leaf) not in own:
            raise StageError(
                f"the loss {name!r} goes back to weights that are not its party's",
                where=f"stage {name}",
                expected="a loss of its inputs, and of weights of stages at its party if need be",
                got=f"one of a parameter of shape {list(leaf.shape)} besides",
                remedy="let each party penalise its own weights, by its optimizer's weight_decay; what the loss itself "
                "trains is a stage, with a plain loss after it",
                code="E341",
            )


def metric_inputs(name: str, metric: Metric, inputs: Sequence[Tensor], scale: str = "") -> tuple[Tensor, Tensor]:
    """Return (prediction, label) for a metric: the first and the last input of its loss, on the CPU, detached.

    bfloat16 and float16 become float32. Metrics of torchmetrics for classification get int64 labels, also where the
    loss takes floats (binary cross-entropy), and are checked here, because some of them check nothing: they would
    give a number that means nothing. They get probabilities where `scale` says how: torchmetrics itself makes them
    only of batches that hold a number outside 0..1, so a small batch of logits may be taken for probabilities.

    Raises:
        StageError: E308, shapes or labels do not fit the metric.
    """
    prediction, label = _ready(inputs[0]), _ready(inputs[-1])
    kind = _kind(metric)
    if not kind:
        return prediction, label
    shapes = [prediction.shape]
    if kind == "multiclass":
        shapes.append(torch.Size([*prediction.shape[:1], *prediction.shape[2:]]))
    if label.shape not in shapes:
        remedy = _same_shape(prediction, label) if kind != "multiclass" else _classes_second(prediction, label)
        raise _misfit(name, metric, inputs, f"labels of shape {' or '.join(str(list(s)) for s in shapes)}", remedy)
    if kind == "regression":
        return prediction, label
    whole = label.long()
    if label.is_floating_point() and not torch.equal(whole.to(label.dtype), label):
        raise _misfit(name, metric, inputs, "labels that are classes", "choose a metric that takes soft labels")
    count = 2 if kind == "binary" else int(getattr(metric, "num_classes", None) or 0)
    if count and _outside(whole, count, getattr(metric, "ignore_index", None)):
        remedy = "name the metric's number of classes, or ignore_index for labels that are to be left out"
        raise _misfit(name, metric, inputs, f"labels in 0..{count - 1}", remedy)
    if scale == "sigmoid" and kind == "binary":
        prediction = prediction.sigmoid()
    elif scale == "softmax" and kind == "multiclass" and prediction.dim() > label.dim():
        prediction = prediction.softmax(1)
    return prediction, whole


def probable(metric: Metric, prediction: Tensor) -> bool | None:
    """Return whether torchmetrics takes a batch for probabilities: no number is outside 0..1. None: it never asks."""
    asks = _kind(metric) == "binary" or (_kind(metric) == "multiclass" and hasattr(metric, "thresholds"))
    if not asks or not prediction.is_floating_point():
        return None
    return not bool(((prediction < 0) | (prediction > 1)).any())


def mixed_error(name: str, metric: Metric, inputs: Sequence[Tensor]) -> StageError:
    """Return the error for a metric that would take some batches for probabilities and others for logits."""
    return _misfit(
        name,
        metric,
        inputs,
        "probabilities: some batches hold numbers outside 0..1 and some do not",
        "let the metric make them: LambdaInputTransformer(metric, torch.sigmoid), of torchmetrics.wrappers",
    )


def metric_error(name: str, metric: Metric, inputs: Sequence[Tensor], error: Exception) -> StageError:
    """Return the error for a metric that fails. Its own words are given only where they hold no values."""
    words = str(error)
    own = "" if "tensor(" in words or "values" in words else f": {words}"
    return StageError(
        f"the metric {name!r} cannot be computed",
        where=type(metric).__name__,
        got="; ".join(part for part in (shown(inputs), f"{type(error).__name__}{own}") if part),
        remedy="it gets the first and the last input of its loss: try it alone on tensors of these dtypes and shapes",
        code="E308",
    )


def _misfit(name: str, metric: Metric, inputs: Sequence[Tensor], expected: str, remedy: str) -> StageError:
    return StageError(
        f"the metric {name!r} does not take what it is given",
        where=type(metric).__name__,
        expected=expected,
        got=f"prediction {shown(inputs[:1])}, label {shown(inputs[-1:])}",
        remedy=remedy,
        code="E308",
    )


def _ready(value: Tensor) -> Tensor:
    value = value.detach().cpu()
    return value.float() if value.dtype in _HALVES else value


def _kind(metric: Metric) -> str:
    """Return "binary" (also for several labels), "multiclass" or "regression" for classes of torchmetrics, else ""."""
    while type(metric).__name__ in ("ClasswiseWrapper", "MinMaxMetric"):  # they hand on what they get
        metric = getattr(metric, "metric", None) or metric._base_metric  # type: ignore[assignment]
    home = type(metric).__module__
    if home.startswith("torchmetrics.regression"):
        return "" if "cosine" in home or "kl_div" in home else "regression"
    if not home.startswith("torchmetrics.classification"):
        return ""  # also a user's subclass, which may change what it gets
    name = type(metric).__name__
    if name.startswith(("Binary", "Multilabel")) and "Fairness" not in name:
        return "binary"
    return "multiclass" if name.startswith("Multiclass") and "ExactMatch" not in name else ""


def _outside(labels: Tensor, count: int, ignored: int | None) -> bool:
    wrong = (labels < 0) | (labels >= count)
    if ignored is not None:
        wrong &= labels != ignored
    return bool(wrong.any())


def _pair(inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return what are most likely prediction and label: the first floats, and the one input of whole numbers."""
    floats = [value for value in inputs if value.is_floating_point()]
    classes = [value for value in inputs if not value.is_floating_point() and value.dtype != torch.bool]
    if floats and len(classes) == 1:
        return floats[0], classes[0]
    return inputs[0], inputs[-1]


def _no_class(prediction: Tensor, label: Tensor, ignored: object) -> str:
    """Return in words from where to where labels go that are not all classes of the prediction; else ""."""
    if not prediction.dim() or label.is_floating_point() or label.is_complex():
        return ""
    counted = label[label != ignored] if isinstance(ignored, int) else label
    count = prediction.shape[1 if prediction.dim() > 1 else 0]
    if not counted.numel() or not _outside(counted, count, None):
        return ""
    return f"labels {int(counted.min())} to {int(counted.max())}, where {count} outputs take 0 to {count - 1}"


def _stretched(first: Tensor, second: Tensor) -> bool:
    return first.shape != second.shape and first.dim() > 0 and second.dim() > 0


def _remedy(prediction: Tensor, label: Tensor, words: str, *, outside: bool) -> str:
    if outside:
        return (
            "give the model one output for each class, and labels that count them from 0: label - 1 in the data set, "
            "where they begin at 1; or set the loss's ignore_index for labels to leave out"
        )
    if "is a view and is being modified inplace" in words:
        return "the loss writes in place to one of several views: let it take x.clone() first"
    if "class probabilities" in words or ("multi-target" in words and label.shape == prediction.shape):
        return _of_classes(prediction, label)
    if "Long" in words and label.dtype != torch.int64 and "cast" not in words:
        return "give the labels as classes, int64: label.long() in the data set"
    if "between 0 and 1" in words:
        return _of_probabilities(prediction, words)
    plain = "can't be cast" in words or "Found dtype" in words or "bool tensor" in words
    if plain and label.dtype != prediction.dtype:
        return "give the labels in the dtype of the prediction: label.float() in the data set"
    if label.dim() == prediction.dim() - 1 >= 2 and label.shape == prediction.shape[:-1]:
        return _classes_second(prediction, label)
    if prediction.shape != label.shape and prediction.numel() == label.numel():
        return _same_shape(prediction, label)
    if label.dim() == prediction.dim() and label.shape != prediction.shape and label.shape[-1:] == (1,):
        return "give the labels without their last dimension: label.squeeze(-1)"
    return "run the loss alone on tensors of these dtypes and shapes"


def _of_classes(prediction: Tensor, label: Tensor) -> str:
    """Return what to do about labels with one number for each output, which a loss of classes does not take."""
    if prediction.dim() < 2 or prediction.shape[1] == 1:
        return "one output is no choice among classes: take BCEWithLogitsLoss and label.float(), or give more outputs"
    whole = "label.int()" if label.dtype == torch.bool else "label"
    return f"give one-hot labels as classes, {whole}.argmax(1); CrossEntropyLoss also takes label.float()"


def _of_probabilities(prediction: Tensor, words: str) -> str:
    if "target" in words:
        return "give labels in 0..1 in the data set"
    if not bool(prediction.isfinite().all()):
        return "the prediction has NaN or infinite numbers: lower the learning rate, or look at the data"
    return "the prediction is no probability: take BCEWithLogitsLoss, or let the model end with a sigmoid"


def _classes_second(prediction: Tensor, label: Tensor) -> str:
    if label.dim() == prediction.dim() - 1 and label.shape == prediction.shape[:-1]:
        return "the classes are the second dimension, not the last: prediction.movedim(-1, 1)"
    return "let the classes be the second dimension of the prediction, and the labels have all others"


def _same_shape(first: Tensor, second: Tensor) -> str:
    if first.numel() == second.numel() and first.dim() == second.dim() + 1:
        return "let the model end with .squeeze(-1), or give labels of the prediction's shape: label.unsqueeze(-1)"
    if first.numel() == second.numel() and first.dim() == second.dim() - 1:
        return "give labels of the prediction's shape: label.squeeze(-1)"
    return "let model and data set give one shape"
