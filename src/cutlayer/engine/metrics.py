"""Metrics of a loss, computed where the labels are. Between parties only sums travel.

| code | error | meaning |
| --- | --- | --- |
| E222 | ConfigError | something that is no metric, or one that would send samples |
| E524 | ContractError | sums of other metrics |
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cutlayer.engine.scoring import metric_error, metric_inputs, mixed_error, probable
from cutlayer.errors import ConfigError, ContractError, CutlayerError, StageError

if TYPE_CHECKING:
    from torchmetrics import Metric, MetricCollection  # takes seconds to import: only who uses metrics pays

__all__ = ["MetricBook", "MetricFactory", "Value"]

MetricFactory = Callable[[], "Mapping[str, Metric | MetricCollection] | Metric | MetricCollection"]
Value = float | list[Any]  # lists of lists for a matrix
_LANE = "@"  # before the number of a lane, in the names of a state


class MetricBook:
    """The mean loss and the torchmetrics of one loss, over a round.

    Args:
        stage: Name of the loss.
        make: Makes the metrics: name -> `torchmetrics.Metric`, or a collection of them; each gets (prediction, label),
            the first and the last input of the loss.
        shared: Whether sums of replicas will be added; then every metric state must be a sum.
        lanes: Replicas of the data whose samples are counted here, each apart too where they are several. What is
            counted apart stays at this party.

    Attributes:
        late: Microbatches to be added when there is time for it: arguments of `update`.
    """

    def __init__(self, stage: str, make: MetricFactory | None, *, shared: bool, lanes: Sequence[int] = (0,)) -> None:
        """Make the metrics; refuse those that would need samples to leave."""
        self.stage = stage
        self.metrics: dict[str, Metric] = dict(_named(stage, "", make())) if make else {}
        self.loss_sum, self.samples = 0.0, 0
        self._probable: dict[str, bool] = {}  # name -> whether the first batch held probabilities
        if shared:
            for name, metric in self.metrics.items():
                _check_sums(stage, name, metric)
        self._lane, self._lanes = lanes[0], dict[int, MetricBook]()
        for lane in lanes if len(lanes) > 1 else ():
            self._lanes[lane] = MetricBook(stage, None, shared=False)
            self._lanes[lane].metrics = copy.deepcopy(self.metrics)  # `make` may give the same objects again
        self._own: list[dict[str, Any]] | None = None  # what was counted here, once sums of others are in
        self.late: list[tuple[Any, ...]] = []

    def settle(self) -> None:
        """Add what is `late`, as whoever looks does too. Raises what `update` raises."""
        late, self.late = self.late, []
        for given in late:
            self.update(*given)

    def update(
        self,
        loss: Tensor,
        inputs: Sequence[Tensor],
        batch: int,
        reduction: str = "mean",
        scale: str = "",
        lane: int = 0,
    ) -> None:
        """Add one microbatch of a lane: its loss (a scalar), its inputs (prediction first, label last), its size.

        `scale`, "sigmoid" or "softmax", turns predictions into probabilities, if the loss is known to do that.

        Raises:
            StageError: E308, a metric does not take the inputs.
        """
        value = loss.item() * (batch if reduction == "mean" else 1)
        books = [self, *([self._lanes[lane]] if lane in self._lanes else [])]
        for book in books:
            book.loss_sum += value
            book.samples += batch
        for name, metric in self.metrics.items():
            with _naming(name, metric, (inputs[0], inputs[-1])):
                prediction, label = metric_inputs(name, metric, inputs, scale)
                probable_now = probable(metric, prediction)
                if probable_now is not None and self._probable.setdefault(name, probable_now) != probable_now:
                    raise mixed_error(name, metric, (inputs[0], inputs[-1]))
                for book in books:
                    book.metrics[name].update(prediction, label)

    def reset(self) -> None:
        """Forget all, at the start of a round."""
        self.late.clear()
        self.loss_sum, self.samples = 0.0, 0
        self._probable.clear()
        self._own = None
        for metric in self.metrics.values():
            metric.reset()
        for book in self._lanes.values():
            book.reset()

    def values(self) -> dict[str, Value]:
        """Return "loss" and each metric's value; nothing if there were no samples.

        A metric that gives several values, by name or in order, gives "name.key" each.
        """
        self.settle()
        if not self.samples:
            return {}
        found: dict[str, Value] = {"loss": self.loss_sum / self.samples}
        for name, metric in self.metrics.items():
            with _naming(name, metric, ()):
                found |= _flat(name, metric.compute())
        return found

    def own(self) -> list[dict[str, Any]]:
        """Return what was counted here, apart from other replicas: "lane", "samples" and "metrics" of each lane.

        A metric that cannot be computed of a lane's samples alone is left out; so is a lane without samples.
        """
        self.settle()
        if self._own is not None:
            return self._own
        books = self._lanes or {self._lane: self}
        held = {at: book for at, book in books.items() if book.samples}
        return [{"lane": at, "samples": book.samples, "metrics": book._computable()} for at, book in held.items()]

    def pool(self, sums: Mapping[str, Tensor], where: str) -> None:
        """Replace the sums by those of all replicas; keep what was counted here. Raises what `set_sums` raises."""
        own = self.own()
        self.set_sums(sums, where)
        self._own = own

    def _computable(self) -> dict[str, Value]:
        found: dict[str, Value] = {"loss": self.loss_sum / max(1, self.samples)}
        for name, metric in self.metrics.items():
            with suppress(StageError), _naming(name, metric, ()):
                found |= _flat(name, metric.compute())
        return found

    def state(self) -> dict[str, Tensor]:
        """Return all state for a checkpoint, which stays at its party; states that are lists are put together."""
        found = self.sums()
        for name, _owner, _key, value in self._states():
            if isinstance(value, list) and value:
                found[name] = torch.cat([item.reshape(1) if item.ndim == 0 else item for item in value]).clone()
        for lane, book in self._lanes.items():
            found |= {f"{_LANE}{lane}/{name}": tensor for name, tensor in book.state().items()}
        return found

    def set_state(self, state: Mapping[str, Tensor], where: str) -> None:
        """Go back to a `state`. Raises `ContractError` if it is not of these metrics."""
        lists = {name: (owner, key) for name, owner, key, value in self._states() if isinstance(value, list)}
        own = {name: tensor for name, tensor in state.items() if not name.startswith(_LANE)}
        self.set_sums({name: tensor for name, tensor in own.items() if name not in lists}, where)
        for lane, book in self._lanes.items():
            start = f"{_LANE}{lane}/"
            book.set_state({n.removeprefix(start): t for n, t in state.items() if n.startswith(start)}, where)
        for name, (owner, key) in lists.items():
            kept = state.get(name)
            setattr(owner, key, [] if kept is None else [kept.clone()])

    def sums(self) -> dict[str, Tensor]:
        """Return the sums behind the values."""
        self.settle()
        found = {"loss": torch.tensor(self.loss_sum, dtype=torch.float64), "samples": torch.tensor(self.samples)}
        for name, owner, key, value in self._states():
            if isinstance(value, Tensor):
                begin: Any = owner._defaults[key]  # some metrics change the shape, as R2Score does with (batch, 1)
                known = isinstance(begin, Tensor) and begin.numel() == value.numel()
                found[name] = value.detach().reshape(begin.shape if known else value.shape).clone()
        return found

    def set_sums(self, sums: Mapping[str, Tensor], where: str) -> None:
        """Replace the sums. Raises `ContractError` if they are not those of these metrics."""
        own = self.sums()
        fixed = {"loss", "samples"} if not self.samples else own.keys()  # R2Score's shapes come with its first update
        if {name: t.dtype for name, t in own.items()} != {name: t.dtype for name, t in sums.items()} or any(
            own[name].shape != sums[name].shape for name in fixed
        ):
            raise ContractError(
                "the metric sums received do not fit",
                where=where,
                expected=", ".join(own),
                got=", ".join(sums),
                remedy="use the same metrics at all replicas of the loss",
                code="E524",
            )
        self.loss_sum, self.samples = float(sums["loss"]), int(sums["samples"])
        for name, owner, key, _value in self._states():
            if name in sums:
                setattr(owner, key, sums[name].clone())
        for metric in self.metrics.values():
            for _, one in _within(metric):
                one._computed = None
                one._update_count = max(1, one._update_count)  # torchmetrics warns if it was never updated

    def _states(self) -> Iterator[tuple[str, Metric, str, Any]]:
        """Yield each state: its name here, the metric that has it, its name there, its value."""
        for name, metric in self.metrics.items():
            for path, owner in _within(metric):
                for key, value in owner.metric_state.items():
                    yield f"{name}.{path}.{key}" if path else f"{name}.{key}", owner, key, value


@contextmanager
def _naming(name: str, metric: Metric, inputs: Sequence[Tensor]) -> Iterator[None]:
    """Turn what a metric raises into a `StageError` that names it."""
    try:
        yield
    except CutlayerError:
        raise
    except Exception as error:
        raise metric_error(name, metric, inputs, error) from error


def _named(stage: str, name: str, made: object) -> Iterator[tuple[str, Metric]]:
    """Yield the metrics in what a factory made, those of a collection by "name.key"."""
    from torchmetrics import Metric, MetricCollection

    if isinstance(made, Metric):
        yield name or type(made).__name__, made
    elif isinstance(made, MetricCollection | Mapping) and made:
        for key, metric in made.items():
            yield from _named(stage, f"{name}.{key}" if name else str(key), metric)
    else:
        raise ConfigError(
            f"the metrics of {stage!r} hold something that is no metric",
            where=name,
            expected="name -> torchmetrics.Metric, or a MetricCollection",
            got=type(made).__name__,
            remedy="give a function that makes them: metrics={'LOSS': lambda: {'accuracy': MulticlassAccuracy(3)}}",
            code="E222",
        )


def _within(metric: Metric) -> Iterator[tuple[str, Metric]]:
    """Yield a metric and those that it wraps, by path."""
    from torchmetrics import Metric

    for path, module in metric.named_modules():
        if isinstance(module, Metric):
            yield path, module


def _flat(name: str, value: Any) -> dict[str, Value]:  # noqa: ANN401 - what a metric gives
    if isinstance(value, Mapping):
        parts: list[tuple[str, Any]] = [(f"{name}.{key}", one) for key, one in value.items()]
    elif isinstance(value, tuple | list):
        parts = [(f"{name}.{place}", one) for place, one in enumerate(value)]
    else:
        return {name: value.tolist() if isinstance(value, Tensor) else float(value)}
    found: dict[str, Value] = {}
    for key, one in parts:
        found |= _flat(key, one)
    return found


def _check_sums(stage: str, name: str, metric: Metric) -> None:
    for _, owner in _within(metric):
        for key, value in owner.metric_state.items():
            reduction = getattr(owner._reductions.get(key), "__name__", "")
            if not isinstance(value, Tensor) or reduction != "dim_zero_sum":
                raise ConfigError(
                    f"the metric {name!r} of {stage!r} cannot be added over replicas: its state {key!r} is no sum",
                    where=f"loss {stage}, metric {name}",
                    expected="a metric whose states are sums, such as MulticlassAccuracy, or AUROC with thresholds=100",
                    remedy="choose another metric: only sums may leave a party",
                    code="E222",
                )
