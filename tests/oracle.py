"""The uncut model, trained by a plain loop: what every plan must equal to the last bit.

Nothing of the engine is used: no program, no worker, no frame. Each microbatch runs through all modules as one
autograd graph, and one plain optimizer updates all parameters. Of cutlayer, only the plan's parts are read (names,
inputs, places, numbers of the training), and the public rule for the seed of a stage's generator. The order of samples
and the sizes of microbatches are written down here a second time, on purpose.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from cutlayer.core.parts import Loss
from cutlayer.core.plan import Plan
from cutlayer.engine.worker import stage_seed

Fields = Mapping[str, Tensor]  # field -> tensor (samples, ...)


def sample_order(seed: int, epoch: int, lane: int, count: int) -> list[int]:
    """The public order of samples, as the plan documents it."""
    rows = list(range(count))
    random.Random(f"cutlayer:{seed}:{epoch}:{lane}").shuffle(rows)
    return rows


def parts_of(rows: Sequence[int], parts: int) -> list[Sequence[int]]:
    """Cut a batch into microbatches whose sizes differ by one at most, larger ones first."""
    found, begin, parts = [], 0, min(parts, len(rows))
    for place in range(parts):
        end = begin + len(rows) // parts + (1 if place < len(rows) % parts else 0)
        found.append(rows[begin:end])
        begin = end
    return found


@dataclass
class Uncut:
    """All modules of a plan as one model.

    `modules` are trained in place. `seeds` are the parties' private ones. With `shared_lanes` (relay) there is one
    model however many lanes there are; else each lane has copies of the replicated stages, as buffers and generators
    of parallel replicas differ; their parameters stay equal.
    """

    plan: Plan
    modules: Mapping[str, nn.Module]
    seeds: Mapping[str, int]
    optimizer: Callable[[list[nn.Parameter]], Optimizer]
    scheduler: Callable[[Optimizer], LRScheduler] | None = None
    scheduler_every: str = "epoch"
    shared_lanes: bool = True
    replicas: dict[tuple[str, int], nn.Module] = field(default_factory=dict)
    generators: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.lanes = max(len(stage.places) for stage in self.plan.stages)
        for stage in self.plan.stages:
            if getattr(stage, "frozen", False):
                self.modules[stage.name].requires_grad_(False)
            copies = 1 if self.shared_lanes or isinstance(stage.at, str) else self.lanes
            for lane in range(copies):
                module = self.modules[stage.name]
                self.replicas[stage.name, lane] = module if lane == 0 else copy.deepcopy(module)
                seed = stage_seed(self.seeds[stage.places[lane]], stage.name, lane)
                self.generators[stage.name, lane] = torch.Generator().manual_seed(seed).get_state()
        self.parameters = [
            p for stage in self.plan.stages for p in self.modules[stage.name].parameters() if p.requires_grad
        ]
        self.trainer = self.optimizer(self.parameters)
        self.rates = self.scheduler(self.trainer) if self.scheduler else None

    def fit(self, data: Mapping[str, Fields], counts: Sequence[int]) -> None:
        """Train for all epochs. `data`: party -> its fields; `counts`: samples of each lane."""
        training = self.plan.training
        for epoch in range(1, training.epochs + 1):
            batches = [self._batches(epoch, lane, count) for lane, count in enumerate(counts)]
            if training.order == "relay":
                for lane, mine in enumerate(batches):
                    for rows in mine:
                        self.step(data, {lane: rows})
            else:
                for place in range(max(len(mine) for mine in batches)):
                    self.step(data, {lane: mine[place] for lane, mine in enumerate(batches) if place < len(mine)})
            if self.rates is not None and self.scheduler_every == "epoch":
                self.rates.step()

    def step(self, data: Mapping[str, Fields], batch: Mapping[int, Sequence[int]]) -> None:
        """One update from the rows of each lane's batch."""
        total = sum(len(rows) for rows in batch.values())
        micros = {lane: parts_of(rows, self.plan.training.microbatches) for lane, rows in batch.items()}
        for micro in range(max(len(parts) for parts in micros.values())):
            for lane, parts in micros.items():
                if micro < len(parts):
                    self._forward(data, lane, parts[micro], total).backward()
        self._add_lanes()
        if self.plan.training.clip_norm is not None:
            self._clip(min(batch))
        self.trainer.step()
        self.trainer.zero_grad()
        for (name, lane), module in self.replicas.items():
            if lane:
                with torch.no_grad():
                    for mine, first in zip(module.parameters(), self.modules[name].parameters(), strict=True):
                        mine.copy_(first)
        if self.rates is not None and self.scheduler_every == "step":
            self.rates.step()

    def _batches(self, epoch: int, lane: int, count: int) -> list[Sequence[int]]:
        training = self.plan.training
        rows = sample_order(training.seed, epoch, lane, count) if training.shuffle else list(range(count))
        size = training.batch_size
        found = [rows[begin : begin + size] for begin in range(0, count, size)]
        return [rows for rows in found if len(rows) == size or not training.drop_last]

    def _forward(self, data: Mapping[str, Fields], lane: int, rows: Sequence[int], total: int) -> Tensor:
        """The sum of all losses on one microbatch, each scaled by its weight and its share of the samples."""
        values: dict[str, Tensor] = {}
        sum_of_losses = torch.zeros(())
        done: set[str] = set()
        waiting = list(self.plan.stages)
        while waiting:
            stage = next(s for s in waiting if all(i.partition(".")[0] in done | {"data"} for i in s.inputs))
            waiting.remove(stage)
            done.add(stage.name)
            inputs = [
                self._field(data, stage.name, text, lane)[torch.tensor(rows)]
                if text.startswith("data.")
                else values[text].clone()  # one use by each stage; autograd adds their gradients, the last use first
                for text in stage.inputs
            ]
            output = self._call(stage.name, lane, inputs)
            if isinstance(stage, Loss):
                share = len(rows) / total if stage.reduction == "mean" else 1.0
                sum_of_losses = sum_of_losses + output * (stage.weight * share)
                continue
            for port, value in output.items() if isinstance(output, dict) else [("", output)]:
                text = f"{stage.name}.{port}" if port else stage.name
                values[text] = value.detach() if port in stage.detached or not value.is_floating_point() else value
        return sum_of_losses

    def _call(self, name: str, lane: int, inputs: list[Tensor]) -> Tensor:
        """Run a module with its own random generator in place of the global one."""
        key = (name, lane if (name, lane) in self.replicas else 0)
        outer = torch.get_rng_state()
        torch.set_rng_state(self.generators[key])
        output = self.replicas[key](*inputs)
        self.generators[key] = torch.get_rng_state()
        torch.set_rng_state(outer)
        return output

    def _field(self, data: Mapping[str, Fields], stage: str, text: str, lane: int) -> Tensor:
        name, _, owner = text.removeprefix("data.").partition("@")
        places = {s.name: s.places for s in self.plan.stages}
        at = places.get(owner or stage, (owner,))
        return data[at[lane] if len(at) > 1 else at[0]][name]

    def _add_lanes(self) -> None:
        """Put the sum of the gradients of a stage's replicas, in the order of lanes, at the first."""
        for (name, lane), module in self.replicas.items():
            for mine, first in zip(module.parameters(), self.modules[name].parameters(), strict=True):
                if lane and mine.grad is not None:
                    first.grad = mine.grad.clone() if first.grad is None else first.grad + mine.grad
                    mine.grad = None

    def _clip(self, lane: int) -> None:
        largest = self.plan.training.clip_norm
        parties: dict[str, list[nn.Parameter]] = {}
        for stage in self.plan.stages:
            if not isinstance(stage, Loss):
                at = stage.places[lane if len(stage.places) > 1 else 0]
                parties.setdefault(at, []).extend(p for p in self.modules[stage.name].parameters() if p.requires_grad)
        if self.plan.training.clip == "party":
            for parameters in parties.values():
                nn.utils.clip_grad_norm_(parameters, largest)
            return
        total = 0.0
        for parameters in parties.values():
            squares = 0.0
            for parameter in parameters:
                if parameter.grad is not None:
                    squares += float(torch.linalg.vector_norm(parameter.grad, dtype=torch.float64).square())
            total += squares
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(min(1.0, largest / (total**0.5 + 1e-6)))
