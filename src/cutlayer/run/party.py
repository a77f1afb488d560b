"""A party as its owner describes it: modules, data, optimizer. Nothing of it leaves but what the plan says."""

from __future__ import annotations

import inspect
import secrets
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset

from cutlayer.core.compile import Roster, stages_of
from cutlayer.core.emit import held_fields
from cutlayer.core.graph import Graph
from cutlayer.core.parts import Loss
from cutlayer.core.plan import Plan
from cutlayer.data.sources import Order, batches, sample_count
from cutlayer.engine.agree import Agreed
from cutlayer.engine.codec import CodecFactory
from cutlayer.engine.defence import DefenceFactory
from cutlayer.engine.exchange import ExchangeFunction
from cutlayer.engine.metrics import MetricFactory
from cutlayer.engine.site import Site
from cutlayer.engine.stage import StageProtocol
from cutlayer.engine.worker import Batches, Parts, Worker
from cutlayer.errors import ConfigError, DataError
from cutlayer.run.plugins import plugs_of

__all__ = ["Party"]

Data = Dataset[Any] | DataLoader[Any]
_EXAMPLES = {
    "optimizer": "lambda params: torch.optim.Adam(params, lr=1e-3)",
    "scheduler": "lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, step_size=10)",
}


@dataclass(frozen=True)
class Party:
    """One organisation in a plan.

    Args:
        name: As the plan names it.
        modules: Stage -> module (or, for a loss, any callable that gives a scalar; or an object that has all of
            `cutlayer.engine.stage.StageProtocol`).
        data: For training: a map-style data set or a `DataLoader`, whose items are dictionaries of the plan's
            fields, or tuples named by `fields`.
        evaluation: The same, for evaluation.
        prediction: The same, for prediction.
        optimizer: Makes the optimizer from a list of parameters.
        scheduler: Makes a learning-rate scheduler from the optimizer.
        scheduler_every: "epoch" or "step": when the scheduler advances.
        metrics: Loss -> function that makes its torchmetrics (one, several by name, or a `MetricCollection`), which
            are given (prediction, label): the first and the last input of the loss.
        fields: Names of the parts of tuple items.
        seed: Private seed of dropout and of randomness in the data, but for loaders with a `generator` of their own;
            None: a new one, never told to anybody.
        device: Where this party computes: one that torch finds here.
        threads: Threads that torch may use in a process of this party's own; more than one pays for large stages on a
            machine that runs nothing else, and changes the last bits.
        finite: Check that nothing which leaves holds a NaN or an infinity.
        agreed: Field -> what a training run agreed on about its preprocessing (`Result.agreed`), for a prediction.
        autocast: "bfloat16" or "float16": run forwards under `torch.autocast`, as in `with torch.autocast(...)`; what
            crosses then has the dtypes that the modules give, and the plan's specs say so.
        codecs: Name -> class or function that makes a codec of one's own; see `cutlayer.engine.codec.Codec`.
        defences: Name -> class or function that makes a defence; see `cutlayer.engine.defence.Defence`.
        exchanges: Name -> function of an exchange of one's own; see `cutlayer.engine.exchange`.
    """

    name: str
    _: KW_ONLY
    modules: Mapping[str, nn.Module | StageProtocol | Callable[..., Tensor]] = field(default_factory=dict)
    data: Data | None = None
    evaluation: Data | None = None
    prediction: Data | None = None
    optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None
    scheduler: Callable[[Optimizer], LRScheduler] | None = None
    scheduler_every: str = "epoch"
    metrics: Mapping[str, MetricFactory] = field(default_factory=dict)
    fields: Sequence[str] | None = None
    seed: int | None = None
    device: str | torch.device = "cpu"
    threads: int = 1
    finite: bool = True
    autocast: str = ""
    agreed: Mapping[str, Agreed] = field(default_factory=dict)
    codecs: Mapping[str, CodecFactory] = field(default_factory=dict)
    defences: Mapping[str, DefenceFactory] = field(default_factory=dict)
    exchanges: Mapping[str, ExchangeFunction] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise `ConfigError` for what would fail later, or be overlooked."""
        for name in ("optimizer", "scheduler"):
            value = getattr(self, name)
            if value is not None and (not callable(value) or isinstance(value, Optimizer | LRScheduler)):
                raise ConfigError(
                    f"the {name} of party {self.name!r} is no function",
                    where=f"party {self.name}, {name}",
                    expected=f"a function that makes it, such as {_EXAMPLES[name]}",
                    got=type(value).__name__,
                    remedy="give the function itself: it is called once the parameters exist",
                    code="E227",
                )
            if value is not None and len(wanted := _wanted(value)) > 1:
                raise ConfigError(
                    f"the {name} of party {self.name!r} needs more than it is called with",
                    where=f"party {self.name}, {name}",
                    expected=f"a function of {'the parameters' if name == 'optimizer' else 'the optimizer'} alone",
                    got=f"a function of ({', '.join(wanted)})",
                    remedy=f"give the rest in a function of one argument: {_EXAMPLES[name]}",
                    code="E227",
                )
        _check_metrics(self)
        _check_numbers(self)
        _check_device(self)
        if self.scheduler_every not in ("epoch", "step"):
            raise ConfigError(
                "unknown scheduler_every",
                where=f"party {self.name}, scheduler_every",
                expected="epoch or step",
                got=self.scheduler_every,
                remedy="choose one of the two",
                code="E227",
            )
        if self.autocast not in ("", "bfloat16", "float16"):
            raise ConfigError(
                "unknown autocast",
                where=f"party {self.name}, autocast",
                expected="bfloat16, float16 or nothing",
                got=self.autocast,
                remedy="choose one of these",
                code="E227",
            )


def _check_metrics(party: Party) -> None:
    if not isinstance(party.metrics, Mapping):
        raise ConfigError(
            f"the metrics of party {party.name!r} have no loss",
            where=f"party {party.name}, metrics",
            expected="loss -> function that makes its metrics",
            got=type(party.metrics).__name__,
            remedy="name the loss: metrics={'loss': lambda: {'accuracy': MulticlassAccuracy(3)}}",
            code="E227",
        )
    for loss, make in party.metrics.items():
        wrong = isinstance(make, nn.Module) or not callable(make)
        wanted = [] if wrong else _wanted(make)
        if wrong or wanted:
            raise ConfigError(
                f"the metrics of {loss!r} at party {party.name!r} are no function that makes them",
                where=f"party {party.name}, metrics",
                expected="a function without arguments, such as lambda: {'accuracy': MulticlassAccuracy(3)}",
                got=f"a function of ({', '.join(wanted)})" if wanted else type(make).__name__,
                remedy="give a function that makes torchmetrics: each replica of the loss makes its own metrics, which "
                "are then given (prediction, label); for a function of your own write a torchmetrics.Metric",
                code="E227",
            )


def _wanted(make: Callable[..., object]) -> list[str]:
    """Return the arguments without which a function cannot be called; none if it does not say."""
    try:
        given = inspect.signature(make).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p.name for p in given if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def _check_numbers(party: Party) -> None:
    for name in ("seed", "threads"):
        value = getattr(party, name)
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        if not (whole or (name == "seed" and value is None)) or (name == "threads" and value < 1):
            raise ConfigError(
                f"the {name} of party {party.name!r} cannot be used",
                where=f"party {party.name}, {name}",
                expected="a whole number, or None" if name == "seed" else "a whole number, 1 or more",
                got=repr(value),
                remedy="give a number, or leave it out",
                code="E227",
            )


def _check_device(party: Party) -> None:
    """Raise `ConfigError` E227 for a device that torch does not find here."""
    try:
        device = torch.device(party.device)
        if device.type == "cuda":
            there = (device.index or 0) < torch.cuda.device_count()
        else:
            torch.empty(0, device=device)
            there = True
    except (RuntimeError, AssertionError, NotImplementedError, TypeError):
        there = False
    if not there:
        raise ConfigError(
            f"the device of party {party.name!r} is not here",
            where=f"party {party.name}, device",
            expected=f"one of {', '.join(_devices())}",
            got=repr(str(party.device)),
            remedy="choose one of these; for a GPU see that cutlayer doctor shows it: torch with CUDA, and a driver",
            code="E227",
        )


def _devices() -> list[str]:
    cards = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return ["cpu", *cards, *(["mps"] if torch.backends.mps.is_available() else [])]


def counts(party: Party) -> dict[str, int]:
    """Return the party's number of samples by mode: the only thing about its data that others are told."""
    held = {"train": party.data, "evaluate": party.evaluation, "predict": party.prediction}
    try:
        return {mode: sample_count(data) for mode, data in held.items() if data is not None}
    except DataError as error:
        error.within(f"party {party.name}")
        raise


def build(plan: Plan, party: Party, roster: Roster, site: Site | None = None) -> Worker:
    """Return the worker of a party; `site`: its stages, if they are there already.

    Raises `ConfigError` if something of the plan's is missing here.
    """
    graph = plan.graph
    mine = {s.name for s in plan.stages if party.name in s.places}
    unknown = party.modules.keys() - mine
    if unknown:
        raise ConfigError(
            f"party {party.name!r} has modules for stages that are not its own: {', '.join(sorted(unknown))}",
            where=f"party {party.name}, modules",
            expected=", ".join(sorted(mine)),
            remedy="check the stage's name and its `at` in the plan",
            code="E223",
        )
    losses = [s.name for s in plan.stages if isinstance(s, Loss)]
    stray = party.metrics.keys() - set(losses)
    if stray:
        raise ConfigError(
            f"party {party.name!r} has metrics for {', '.join(sorted(stray))}, which is no loss of the plan",
            where=f"party {party.name}, metrics",
            remedy=f"name a loss: metrics={{{losses[0]!r}: lambda: {{...}}}}" if losses else "leave them out",
            code="E223",
        )
    seed = secrets.randbits(63) if party.seed is None else party.seed
    held = {"train": party.data, "evaluate": party.evaluation, "predict": party.prediction}
    parts = Parts(
        party=party.name,
        modules={name: _module(module) for name, module in party.modules.items()},
        optimizer=party.optimizer,
        scheduler=party.scheduler,
        scheduler_every=party.scheduler_every,
        metrics=party.metrics,
        batches={
            mode: _batches(plan, graph, party, mode, data, seed, roster)
            for mode, data in held.items()
            if data is not None
        },
        seed=seed,
        device=torch.device(party.device),
        finite=party.finite,
        autocast=party.autocast,
        agreed=party.agreed,
        plugs=plugs_of(plan, party.name, codecs=party.codecs, defences=party.defences, exchanges=party.exchanges),
    )
    return Worker(plan, parts, site)


def _batches(plan: Plan, graph: Graph, party: Party, mode: str, data: Data, seed: int, roster: Roster) -> Batches:
    train, active = mode == "train", stages_of(graph, mode)
    lanes = [lane for lane in range(graph.lanes) if party.name in graph.data_fields(lane)]
    order = Order(
        training=plan.training,
        count=roster.samples[mode][party.name],
        seed=seed,
        shuffle=plan.training.shuffle and train,
        drop_last=plan.training.drop_last and train,
        fields=tuple(party.fields) if party.fields is not None else None,
        taken=tuple(
            dict.fromkeys(name for lane in lanes for name in held_fields(graph, lane, active).get(party.name, ()))
        ),
    )
    if order.drop_last and 0 < order.count < plan.training.batch_size:
        warnings.warn(
            f"party {party.name}: none of its {order.count} samples is trained on: they are fewer than a batch of "
            f"{plan.training.batch_size}, and the plan says drop_last",
            stacklevel=2,
        )
    try:
        return batches(data, order, alone=all(len(graph.data_fields(lane)) == 1 for lane in lanes))
    except DataError as error:
        error.within(f"party {party.name}, data to {mode}")
        raise


class _Call(nn.Module):
    """A function as a module, such as `torch.nn.functional.cross_entropy` for a loss."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def _module(module: nn.Module | StageProtocol | Callable[..., Tensor]) -> nn.Module | StageProtocol:
    return module if isinstance(module, nn.Module | StageProtocol) else _Call(module)
