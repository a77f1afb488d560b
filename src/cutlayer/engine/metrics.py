"""Metrics of a loss, computed where the labels are. Between parties only sums travel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cutlayer.errors import ConfigError, ContractError, StageError

if TYPE_CHECKING:
    from torchmetrics import Metric  # takes seconds to import: only who uses metrics pays

__all__ = ["MetricBook"]

MetricFactory = Callable[[], Mapping[str, "Metric"]]


class MetricBook:
    """The mean loss and the torchmetrics of one loss, over a round.

    Args:
        stage: Name of the loss.
        make: Makes the metrics, name -> `torchmetrics.Metric`; each gets (prediction, label): the first and the last
            input of the loss.
        shared: Whether sums of replicas will be added; then every metric state must be a sum.
    """

    def __init__(self, stage: str, make: MetricFactory | None, *, shared: bool) -> None:
        """Make the metrics; refuse those that would need samples to leave."""
        self.stage = stage
        self.metrics: dict[str, Metric] = dict(make()) if make else {}
        self.loss_sum, self.samples = 0.0, 0
        if shared:
            for name, metric in self.metrics.items():
                _check_sums(stage, name, metric)

    def update(self, loss: Tensor, inputs: list[Tensor], batch: int, reduction: str) -> None:
        """Add one microbatch: its loss (a scalar), its inputs (prediction first, label last), its size."""
        factor = batch if reduction == "mean" else 1
        self.loss_sum += loss.item() * factor
        self.samples += batch
        for name, metric in self.metrics.items():
            try:
                metric.update(inputs[0].detach().cpu(), inputs[-1].detach().cpu())
            except Exception as error:
                raise StageError(
                    f"the metric {name!r} cannot take what the loss takes",
                    where=f"loss {self.stage}, prediction {_form(inputs[0])}, label {_form(inputs[-1])}",
                    expected=f"a prediction and a label as {type(metric).__name__} takes them",
                    got=type(error).__name__,
                    remedy="choose the metric of this task, or give the label in its form; see docs/reference/data.md",
                    code="E308",
                ) from error

    def reset(self) -> None:
        """Forget all, at the start of a round."""
        self.loss_sum, self.samples = 0.0, 0
        for metric in self.metrics.values():
            metric.reset()

    def values(self) -> dict[str, float | list[float]]:
        """Return "loss" and each metric's value; nothing if there were no samples."""
        if not self.samples:
            return {}
        found: dict[str, float | list[float]] = {"loss": self.loss_sum / self.samples}
        for name, metric in self.metrics.items():
            value = metric.compute()
            found[name] = value.tolist() if isinstance(value, Tensor) else float(value)
        return found

    def state(self) -> dict[str, Tensor]:
        """Return all state for a checkpoint, which stays at its party; states that are lists are put together."""
        found = self.sums()
        for name, metric in self.metrics.items():
            for key, value in metric.metric_state.items():
                if isinstance(value, list) and value:
                    found[f"{name}.{key}"] = torch.cat(
                        [item.reshape(1) if item.ndim == 0 else item for item in value]
                    ).clone()
        return found

    def set_state(self, state: Mapping[str, Tensor], where: str) -> None:
        """Go back to a `state`. Raises `ContractError` if it is not of these metrics."""
        lists = {
            f"{name}.{key}"
            for name, metric in self.metrics.items()
            for key, value in metric.metric_state.items()
            if isinstance(value, list)
        }
        self.set_sums({name: tensor for name, tensor in state.items() if name not in lists}, where)
        for name, metric in self.metrics.items():
            for key in [key for key in metric.metric_state if f"{name}.{key}" in lists]:
                kept = state.get(f"{name}.{key}")
                setattr(metric, key, [] if kept is None else [kept.clone()])

    def sums(self) -> dict[str, Tensor]:
        """Return the sums behind the values."""
        found = {"loss": torch.tensor(self.loss_sum, dtype=torch.float64), "samples": torch.tensor(self.samples)}
        for name, metric in self.metrics.items():
            for key, value in metric.metric_state.items():
                if isinstance(value, Tensor):
                    found[f"{name}.{key}"] = value.detach().clone()
        return found

    def set_sums(self, sums: Mapping[str, Tensor], where: str) -> None:
        """Replace the sums. Raises `ContractError` if they are not those of these metrics."""
        own = {name: (t.shape, t.dtype) for name, t in self.sums().items()}
        if own != {name: (t.shape, t.dtype) for name, t in sums.items()}:
            raise ContractError(
                "the metric sums received do not fit",
                where=where,
                expected=", ".join(own),
                got=", ".join(sums),
                remedy="use the same metrics at all replicas of the loss",
                code="E524",
            )
        self.loss_sum, self.samples = float(sums["loss"]), int(sums["samples"])
        for name, metric in self.metrics.items():
            for key in metric.metric_state:
                if f"{name}.{key}" in sums:
                    setattr(metric, key, sums[f"{name}.{key}"].clone())
            metric._computed = None
            metric._update_count = max(1, metric._update_count)  # torchmetrics warns if it was never updated


def _check_sums(stage: str, name: str, metric: Metric) -> None:
    for key, value in metric.metric_state.items():
        reduction = getattr(metric._reductions.get(key), "__name__", "")
        if not isinstance(value, Tensor) or reduction != "dim_zero_sum":
            raise ConfigError(
                f"the metric {name!r} of {stage!r} cannot be added over replicas: its state {key!r} is no sum",
                expected="a metric whose states are sums, such as MulticlassAccuracy, or AUROC with thresholds=100",
                remedy="choose another metric: only sums may leave a party",
                code="E222",
            )


def _form(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
