"""A party as it takes part in sessions of a served stage, whose plan may have stages of its own for answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from cutlayer.core.crossing import answers_in
from cutlayer.core.plan import Plan
from cutlayer.core.serving import answer_stages, served_plan
from cutlayer.run.party import Party

__all__ = ["left_out", "named", "serving_party"]


def serving_party(plan: Plan, party: Party) -> Party:
    """Return the party with the modules that the served plan has for it; the party itself without answers."""
    if not answers_in(plan.extras):
        return party
    mine = {stage.name for stage in served_plan(plan).stages if party.name in stage.places}
    known = {stage.name for stage in plan.stages}
    modules = {name: module for name, module in party.modules.items() if name in mine or name not in known}
    return replace(party, modules={**modules, **{name: _Through() for name in mine - known}})


def left_out(plan: Plan) -> frozenset[str]:
    """Return the losses that no session has: weights of a run may hold tensors of theirs."""
    return frozenset(stage.name for stage in plan.stages) - {stage.name for stage in served_plan(plan).stages}


def named(plan: Plan, predictions: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what a session gave under the names of the plan's own outputs, as every other prediction does."""
    stages, found = answer_stages(plan), dict[str, Tensor]()
    for name, value in predictions.items():
        stage, dot, port = name.partition(".")
        found[f"{stages.get(stage, stage)}{dot}{port}"] = value
    return found


class _Through(nn.Module):
    """Gives on what it takes."""

    def forward(self, *values: Tensor) -> Tensor | tuple[Tensor, ...]:
        return values if len(values) > 1 else values[0]
