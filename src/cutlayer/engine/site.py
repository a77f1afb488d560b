"""The site: what one party has. Its stages, optimizers and metrics, and what exchanges may do with them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cutlayer.core.graph import Graph
from cutlayer.core.parts import Loss
from cutlayer.core.plan import Plan
from cutlayer.engine.agree import Agreed
from cutlayer.engine.coder import Plugs
from cutlayer.engine.copies import copy_of
from cutlayer.engine.metrics import MetricBook, MetricFactory
from cutlayer.engine.optim import (
    Bundle,
    OptimizerFactory,
    SchedulerFactory,
    load_stage_state,
    squared_norm,
    stage_state,
)
from cutlayer.engine.preprocess import Batches, Preprocess
from cutlayer.engine.stage import ModuleStage, StageProtocol
from cutlayer.engine.tied import ties
from cutlayer.errors import ConfigError, ContractError

__all__ = ["Batches", "Parts", "Place", "Site", "stage_seed"]

Place = tuple[str, int]  # stage, lane; lane 0 for a stage without replicas


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a worker is made of; all of it stays at its party. See `cutlayer.Party`, which builds it."""

    party: str
    modules: Mapping[str, nn.Module | StageProtocol]
    optimizer: OptimizerFactory | None = None
    scheduler: SchedulerFactory | None = None
    scheduler_every: str = "epoch"
    metrics: Mapping[str, MetricFactory] = field(default_factory=dict)
    batches: Mapping[str, Batches] = field(default_factory=dict)
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    finite: bool = True
    autocast: str = ""
    agreed: Mapping[str, Agreed] = field(default_factory=dict)
    plugs: Plugs = field(default_factory=Plugs)


def stage_seed(seed: int, stage: str, lane: int) -> int:
    """Return the seed of a stage's own generator, from the party's private seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{stage}:{lane}".encode()).digest()[:7], "little")


class Site:
    """One party's stages, optimizers and metrics. Fulfils `exchange.Local`.

    Args:
        plan: The plan, known to all.
        parts: This party's modules, data and optimizer.

    Raises:
        ConfigError: a stage of this party has no module, or parameters have no optimizer.
    """

    def __init__(self, plan: Plan, parts: Parts) -> None:
        """Build stages, optimizers and metrics of this party."""
        self.plan, self.parts, self.graph = plan, parts, plan.graph
        self.stages = _stages(self.graph, parts)
        self._rank = {stage.name: place for place, stage in enumerate(self.graph.stages)}
        self.bundles = _bundles(self.graph, parts, self.stages)
        own = frozenset(id(p) for bundle in self.bundles.values() for p in bundle.parameters)
        for stage in self.stages.values():
            if isinstance(stage, ModuleStage) and stage.ports is None:
                stage.own = own
        self.preprocess = Preprocess(plan, parts.party, parts.batches, parts.agreed)
        self.gathered: dict[str, dict[str, Tensor]] = {}
        self.exchanges = parts.plugs.exchanges
        _check_exchanges(plan, parts)
        self.books = _books(self.graph, parts, self.stages)

    def place(self, stage: str, lane: int) -> Place:
        """Return where the replica of a stage for a lane is kept."""
        return stage, lane if self.graph.by_name[stage].replicated else 0

    def stepping(self, lanes: tuple[int, ...]) -> list[Bundle]:
        """Return the bundles that a step of these lanes updates."""
        return [bundle for lane, bundle in self.bundles.items() if lane is None or lane in lanes]

    def state(self, stage: str, lane: int) -> dict[str, Tensor]:
        """Return all state of a replica, by name; see `optim.stage_state`."""
        place = self.place(stage, lane)
        return stage_state(self.stages[place], self._bundle(place))

    def load_state(self, stage: str, lane: int, state: Mapping[str, Tensor], where: str) -> None:
        """Take over the state of another replica. Raises `ContractError` if it does not fit."""
        place = self.place(stage, lane)
        load_stage_state(self.stages[place], self._bundle(place), state, where)

    def weights(self, stage: str, lane: int) -> dict[str, Tensor]:
        """Return a replica's parameters and persistent buffers, as copies, by the names of its `state_dict`."""
        state = self.stages[self.place(stage, lane)].module.state_dict()
        return {name: t.detach().cpu().contiguous().clone() for name, t in state.items() if isinstance(t, Tensor)}

    def gradients(self, stage: str, lane: int) -> dict[str, Tensor]:
        """Return the gradients of a replica's parameters, by parameter name.

        A parameter that an earlier stage of the plan has too (tied weights) is that one's: it counts once.
        """
        place = self.place(stage, lane)
        earlier = {
            id(p)
            for name in self._bundle(place).stages
            if self._rank[name] < self._rank[stage]
            for p in self.stages[self.place(name, lane)].module.parameters()
        }
        named = self.stages[place].module.named_parameters()
        return {name: p.grad for name, p in named if p.grad is not None and id(p) not in earlier}

    def set_gradients(self, stage: str, lane: int, gradients: Mapping[str, Tensor], where: str) -> None:
        """Replace the gradients of a replica's parameters. Raises `ContractError` if they do not fit."""
        parameters = dict(self.stages[self.place(stage, lane)].module.named_parameters())
        for name, gradient in gradients.items():
            own = parameters.get(name)
            if own is None or own.shape != gradient.shape or own.dtype != gradient.dtype:
                raise ContractError(
                    "a gradient received does not fit",
                    where=f"{where}, {name}",
                    remedy="use the same module at all replicas of the stage",
                    code="E524",
                )
            own.grad = gradient.to(own.device).clone()

    def squared_norm(self, lanes: tuple[int, ...]) -> float:
        """Return the sum of squares of the gradients here; a replicated stage counts at its first lane."""
        counted = [bundle for lane, bundle in self.bundles.items() if lane is None or lane == lanes[0]]
        return squared_norm(p for bundle in counted for p in bundle.parameters)

    def clip(self, squared_norm: float, lanes: tuple[int, ...]) -> None:
        """Scale gradients by min(1, clip_norm / (norm + 1e-6)), as `torch.nn.utils.clip_grad_norm_` does."""
        largest = self.plan.training.clip_norm or float("inf")
        factor = min(1.0, largest / (squared_norm**0.5 + 1e-6))
        for bundle in self.stepping(lanes):
            for parameter in bundle.parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)

    def metric_sums(self, stage: str, lane: int) -> dict[str, Tensor]:
        """Return the sums behind a loss's metrics."""
        return self.books[self.place(stage, lane)].sums()

    def set_metric_sums(self, stage: str, lane: int, sums: Mapping[str, Tensor], where: str) -> None:
        """Replace the sums behind a loss's metrics by those of all. Raises `ContractError` if they do not fit."""
        self.books[self.place(stage, lane)].pool(sums, where)

    def clear(self) -> None:
        """Forget what an unfinished step has left."""
        for stage in self.stages.values():
            stage.forget()
        for bundle in self.bundles.values():
            bundle.drop_gradients()
        for book in self.books.values():
            book.late.clear()

    def _bundle(self, place: Place) -> Bundle:
        return self.bundles[place[1] if self.graph.by_name[place[0]].replicated else None]


def _stages(graph: Graph, parts: Parts) -> dict[Place, StageProtocol]:
    stages: dict[Place, StageProtocol] = {}
    copies: dict[int, dict[int, Any]] = {}  # lane -> memo of its copies, so that tied weights stay tied
    for part in graph.stages:
        lanes = [lane for lane in range(len(part.places)) if part.places[lane] == parts.party]
        if not lanes:
            continue
        if part.name not in parts.modules:
            raise ConfigError(
                f"party {parts.party!r} has no module for stage {part.name!r}",
                where=f"party {parts.party}, stage {part.name}",
                expected=f"modules for {', '.join(s.name for s in graph.stages if parts.party in s.places)}",
                got=", ".join(parts.modules) or "none",
                remedy=f"add it: Party({parts.party!r}, modules={{{part.name!r}: ...}})",
                code="E223",
            )
        for place, lane in enumerate(lanes):
            module = parts.modules[part.name]
            if place:
                module = copy_of(module, copies.setdefault(lane, {}))
            held = module if isinstance(module, nn.Module) else module.module
            if part.frozen:
                held.requires_grad_(False)
            if isinstance(part, Loss):
                _check_loss(part, held, parts.party)
            if not isinstance(module, nn.Module):
                stages[part.name, lane] = module
                continue
            stages[part.name, lane] = ModuleStage(
                part.name,
                module,
                ports=None if isinstance(part, Loss) else part.ports,
                seed=stage_seed(parts.seed, part.name, lane),
                device=parts.device,
                autocast=parts.autocast,
            )
    return stages


def _books(graph: Graph, parts: Parts, places: Iterable[Place]) -> dict[Place, MetricBook]:
    found: dict[Place, MetricBook] = {}
    for name, lane in places:
        part = graph.by_name[name]
        if isinstance(part, Loss):
            lanes = [lane] if part.replicated else range(graph.lanes)
            try:
                found[name, lane] = MetricBook(name, parts.metrics.get(name), shared=part.replicated, lanes=lanes)
            except ConfigError as error:
                error.within(f"party {parts.party}")
                raise
    return found


def _check_exchanges(plan: Plan, parts: Parts) -> None:
    for extra in plan.exchanges:
        if parts.party in extra.group and extra.name not in parts.plugs.exchanges:
            raise ConfigError(
                f"this party has no exchange {extra.name!r}",
                where=f"party {parts.party}",
                expected=f"one of {', '.join(sorted(parts.plugs.exchanges)) or '(none)'}",
                remedy="give it in Party(exchanges={...}), or install the package that has it as a plug-in",
                code="E290",
            )


def _check_loss(part: Loss, module: nn.Module, party: str) -> None:
    """Raise `ConfigError` E223 for a loss that is trained, or that adds where the plan takes the mean."""
    if any(p.requires_grad for p in module.parameters()):
        raise ConfigError(
            f"the module of the loss {part.name!r} has parameters to train",
            where=f"party {party}",
            remedy="make it a stage, with a loss without parameters after it",
            code="E223",
        )
    own = getattr(module, "reduction", part.reduction)
    if own in ("mean", "sum") and own != part.reduction:
        raise ConfigError(
            f"the module of the loss {part.name!r} has another reduction than the plan",
            where=f"party {party}",
            expected=f"reduction={part.reduction!r}",
            got=f"{own!r}",
            remedy=f"give the module reduction={part.reduction!r}, or the plan Loss(..., reduction={own!r})",
            code="E223",
        )


def _bundles(graph: Graph, parts: Parts, stages: Mapping[Place, StageProtocol]) -> dict[int | None, Bundle]:
    groups: dict[int | None, dict[str, StageProtocol]] = {}
    for (name, lane), stage in stages.items():
        groups.setdefault(lane if graph.by_name[name].replicated else None, {})[name] = stage
    _check_ties(parts.party, groups)
    for group in groups.values():
        trained = [part.name for part in graph.order if graph.trained[part.name] and part.name in group]
        modules = {name: stage for name in trained if isinstance(stage := group[name], ModuleStage)}
        for name, tied in ties({name: stage.parameters() for name, stage in modules.items()}).items():
            modules[name].tied = tied
    return {lane: Bundle(group, parts.optimizer, parts.scheduler) for lane, group in groups.items()}


def _check_ties(party: str, groups: Mapping[int | None, Mapping[str, StageProtocol]]) -> None:
    """Raise `ConfigError` E228 for a weight that two optimizers would train."""
    owners: dict[int, tuple[int | None, str]] = {}
    for lane, stages in groups.items():
        for name, stage in stages.items():
            for parameter in stage.module.parameters():
                first = owners.setdefault(id(parameter), (lane, name))
                if first[0] != lane:
                    raise ConfigError(
                        f"the stages {first[1]!r} and {name!r} share a weight, but only one of them has replicas",
                        where=f"party {party}",
                        expected="tied weights in stages with the same list of parties, or without replicas",
                        remedy="place both stages alike, or give each a weight of its own",
                        code="E228",
                    )
