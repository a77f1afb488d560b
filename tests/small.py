"""Small plans, modules, data and parties for the tests, and the comparison with the oracle."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from cutlayer.core import topologies
from cutlayer.core.parts import Loss, Stage
from cutlayer.core.plan import Plan
from cutlayer.data.sources import TensorTable
from cutlayer.run.party import Party
from cutlayer.run.simulate import Result, simulate
from tests.oracle import Uncut

FEATURES, CLASSES = 5, 3


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, 1e-2)


def momentum(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 1e-1, momentum=0.9, weight_decay=1e-3)


def plain(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 1e-1)


class Block(nn.Module):
    """Joins its inputs (batch, width) side by side; then a linear layer, BatchNorm, ReLU and dropout."""

    def __init__(self, widths: Sequence[int], out: int, *, norm: bool, drop: float) -> None:
        super().__init__()
        self.linear = nn.Linear(sum(widths), out)
        self.norm = nn.BatchNorm1d(out) if norm else nn.Identity()
        self.drop = nn.Dropout(drop)

    def forward(self, *inputs: Tensor) -> Tensor:
        floats = [value if value.is_floating_point() else value.float() for value in inputs]
        return self.drop(torch.relu(self.norm(self.linear(torch.cat(floats, 1)))))


class Ports(nn.Module):
    """A `Block` whose output is cut into named parts, each of its own width; `counts` is a part of whole numbers."""

    def __init__(self, widths: Sequence[int], ports: Mapping[str, int], **options: Any) -> None:
        super().__init__()
        self.widths = dict(ports)
        self.block = Block(widths, sum(ports.values()), **options)

    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        parts = self.block(*inputs).split(list(self.widths.values()), 1)
        found = dict(zip(self.widths, parts, strict=True))
        return {name: part.mul(4).long() if name == "counts" else part for name, part in found.items()}


def float32(*dims: int) -> str:
    return f"float32[{', '.join(['batch', *map(str, dims)])}]"


C = float32(CLASSES)
TOPOLOGIES: dict[str, Callable[..., Plan]] = {
    "vanilla": lambda **t: topologies.vanilla("a", "server", cut=float32(6), output=C, **t),
    "u_shaped": lambda **t: topologies.u_shaped("a", "server", cut=float32(6), back=float32(4), output=C, **t),
    "vertical": lambda **t: topologies.vertical(
        {"a": float32(4), "b": float32(6), "c": float32(2)}, "server", output=C, **t
    ),
    "extended_vanilla": lambda **t: topologies.extended_vanilla(
        {"a": float32(4), "b": float32(6)}, "middle", "server", cut=float32(5), output=C, **t
    ),
    "multitask": lambda **t: topologies.multitask({"a": float32(4), "b": float32(6)}, {"s": C, "t": C}, **t),
    "multihop": lambda **t: topologies.multihop({"a": float32(6), "b": float32(4), "c": float32(5), "d": C}, **t),
    "hybrid": lambda **t: topologies.hybrid(
        {"a": float32(4), "b": float32(6)}, {"s": float32(5), "t": float32(4)}, output=C, **t
    ),
}


def modules_for(
    plan: Plan, *, norm: bool = True, drop: float = 0.2, seed: int = 3, dtype: torch.dtype = torch.float32
) -> dict[str, nn.Module]:
    """A module for each stage and loss, of the widths that the plan says. Equal for equal arguments."""
    torch.manual_seed(seed)
    widths = {stage.name: stage.output.shape[-1] for stage in plan.stages if not isinstance(stage, Loss)}
    return {
        stage.name: nn.CrossEntropyLoss(reduction=stage.reduction)
        if isinstance(stage, Loss)
        else Block([widths.get(i, FEATURES) for i in stage.inputs], widths[stage.name], norm=norm, drop=drop).to(dtype)
        for stage in plan.stages
    }


def in_float64(plan: Plan) -> Plan:
    """The same plan with all values in double precision."""
    stages = [
        stage
        if isinstance(stage, Loss)
        else Stage(stage.name, at=stage.at, inputs=stage.inputs, output=replace(stage.output, dtype="float64"))
        for stage in plan.stages
    ]
    return Plan(stages, training=plan.training, releases=plan.releases, name=plan.name)


def data_for(plan: Plan, counts: Sequence[int], dtype: torch.dtype = torch.float32) -> dict[str, dict[str, Tensor]]:
    """Party -> field -> tensor; `x` are features and `y` classes. `counts`: samples of each lane."""
    generator = torch.Generator().manual_seed(11)
    found: dict[str, dict[str, Tensor]] = {}
    for lane, count in enumerate(counts):
        for party, names in plan.graph.data_fields(lane).items():
            for name in names:
                values = torch.randn(count, FEATURES, generator=generator, dtype=dtype)
                if name == "y":
                    values = torch.randint(0, CLASSES, (count,), generator=generator)
                found.setdefault(party, {})[name] = values
    return found


@dataclass(frozen=True, kw_only=True)
class Case:
    """A plan with everything needed to run it, cut or uncut."""

    plan: Plan
    counts: tuple[int, ...] = (22,)
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] = adam
    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    data: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)  # more arguments of every Party

    @classmethod
    def of(cls, plan: Plan, counts: Sequence[int] = (22,), **rest: Any) -> Case:
        """With modules and data made for the plan, unless given."""
        rest.setdefault("modules", modules_for(plan))
        rest.setdefault("data", data_for(plan, counts))
        return cls(plan=plan, counts=tuple(counts), **rest)

    @property
    def seeds(self) -> dict[str, int]:
        return {party: sum(party.encode()) for party in self.plan.parties}

    def parties(self, **more: Any) -> list[Party]:
        """Parties with copies of the modules."""
        found = []
        for name in self.plan.parties:
            mine = {s.name: copy.deepcopy(self.modules[s.name]) for s in self.plan.stages if name in s.places}
            table = TensorTable(**self.data[name]) if name in self.data else None
            options = {"optimizer": self.optimizer, "seed": self.seeds[name], "data": table, **self.extra, **more}
            found.append(Party(name, modules=mine, **options))
        return found

    def cut(self, **more: Any) -> Result:
        """Train by the engine."""
        return simulate(self.plan, self.parties(**more))

    def uncut(self, **rest: Any) -> Uncut:
        """Train by the oracle."""
        for name in ("scheduler", "scheduler_every"):
            if name in self.extra:
                rest.setdefault(name, self.extra[name])
        rest.setdefault("shared_lanes", self.plan.training.order == "relay")
        oracle = Uncut(self.plan, copy.deepcopy(dict(self.modules)), self.seeds, self.optimizer, **rest)
        oracle.fit(self.data, self.counts)
        return oracle

    def but(self, **training: Any) -> Case:
        """The same with other numbers of the training."""
        return replace(self, plan=self.plan.with_training(**training))


def far(mine: Tensor, other: Tensor) -> float:
    """The largest absolute difference; infinite for other shapes, dtypes or NaN."""
    if mine.shape != other.shape or mine.dtype != other.dtype:
        return float("inf")
    if not mine.numel():
        return 0.0
    value = float((mine.detach().double() - other.detach().double()).abs().max())
    return value if value == value else float("inf")


def difference(result: Result, oracle: Uncut, *, lane: int | None = None) -> float:
    """The largest difference of any weight, buffer, generator or optimizer state between engine and oracle.

    Compares all replicas, or those of one lane.
    """
    worst, compared = 0.0, 0
    for worker in result.workers.values():
        for (name, at), stage in worker.site.stages.items():
            if lane is not None and at != lane and oracle.plan.stage(name).replicated:
                continue
            uncut = oracle.replicas.get((name, at), oracle.modules[name])
            own, theirs = stage.module.state_dict(), uncut.state_dict()
            worst = max([worst, *(far(own[key], theirs[key]) for key in own.keys() | theirs.keys())])
            key = (name, at if (name, at) in oracle.generators else 0)
            replicated = oracle.plan.stage(name).replicated
            if not (replicated and isinstance(oracle.plan.stage(name), Loss)):  # nothing of a loss is handed on
                worst = max(worst, far(stage.generator, oracle.generators[key]))
            optimizer = worker.site.bundles[at if replicated else None].optimizer
            pairs = zip(stage.module.parameters(), oracle.modules[name].parameters(), strict=True)
            for cut, plain_one in pairs if optimizer is not None else ():
                state, expected = optimizer.state.get(cut, {}), oracle.trainer.state.get(plain_one, {})
                assert state.keys() == expected.keys()
                worst = max([worst, *(far(_tensor(state[k]), _tensor(expected[k])) for k in state)])
                compared += 1
    assert compared, "nothing was compared"
    return worst


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(float("nan") if value is None else float(value))
