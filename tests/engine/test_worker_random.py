"""Random graphs of stages at random parties equal the uncut model, to the last bit."""

from __future__ import annotations

from contextlib import AbstractContextManager
from unittest.mock import MagicMock, patch

import torch
from hypothesis import HealthCheck, Phase, event, find, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cutlayer.core.parts import Loss, Release, Stage, Training
from cutlayer.core.plan import Plan
from cutlayer.engine import stage as stages_at_work
from tests.drawing import replicated_plans
from tests.small import FEATURES, Block, Case, Ports, adam, difference, float32, momentum

PARTIES = ("p", "q", "r", "s")
BATCH = 6


class Score(nn.Module):
    """A loss of any number of predictions of any width."""

    def __init__(self, reduction: str) -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, *inputs: Tensor) -> Tensor:
        *predictions, label = inputs
        wrong = sum((prediction.float().mean(1) - label) ** 2 for prediction in predictions)
        return wrong.mean() if self.reduction == "mean" else wrong.sum()


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """A graph with fan-in and fan-out at 2 to 4 parties: several losses, frozen stages, releases, any plan order."""
    parties = st.sampled_from(PARTIES[: draw(st.integers(2, 4))])
    stages: list[Stage | Loss] = []
    for place in range(draw(st.integers(2, 6))):
        before = values_of(stages)
        inputs = draw(st.lists(st.sampled_from([*before, "data.x"]), min_size=1, max_size=3)) if place else ["data.x"]
        frozen = draw(st.booleans()) and draw(st.booleans()) if place else False
        output, detached = draw(outputs())
        stages.append(
            Stage(f"s{place}", at=draw(parties), inputs=inputs, output=output, frozen=frozen, detached=detached)
        )
    names = values_of(stages)
    taken = {text for stage in stages for text in stage.inputs}
    ends = [name for name in names if name not in taken or draw(st.integers(0, 4)) == 0]
    releases = []
    for place, end in enumerate(ends):
        at, owner = draw(parties), draw(st.sampled_from(sorted({str(stage.at) for stage in stages})))
        label = "data.y" if at == owner else f"data.y@{owner}"
        if at != owner:
            releases.append(Release("y", at=owner, to=at, spec="float32[batch]"))
        inputs = [end, draw(st.sampled_from(names)), label][:: draw(st.sampled_from([1, 2]))]
        reduction = draw(st.sampled_from(["mean", "sum"]))
        weight = draw(st.sampled_from([1.0, 0.3, 2.5]))
        stages.append(Loss(f"loss{place}", at=at, inputs=inputs, weight=weight, reduction=reduction))
    training = Training(
        batch_size=BATCH,
        microbatches=draw(st.integers(1, 3)),
        schedule=draw(st.sampled_from(["sequential", "gpipe", "1f1b"])),
        seed=draw(st.integers(0, 3)),
    )
    return Plan(draw(st.permutations(stages)), training=training, releases=releases)


@st.composite
def outputs(draw: st.DrawFn) -> tuple[str | dict[str, str], list[str]]:
    """One output, or up to three by name: some detached, some whole numbers."""
    if draw(st.integers(0, 2)):
        return float32(draw(st.integers(1, 4))), []
    ports = draw(st.lists(st.sampled_from(["deep", "skip", "counts"]), min_size=1, max_size=3, unique=True))
    ports = ["deep", *ports] if ports == ["counts"] else ports
    specs = {p: f"{'int64' if p == 'counts' else 'float32'}[batch, {draw(st.integers(1, 3))}]" for p in ports}
    return specs, ["skip"] if "skip" in ports and "deep" in ports and draw(st.booleans()) else []


def values_of(stages: list[Stage | Loss]) -> list[str]:
    """What can be taken as an input: "stage", or "stage.port" for each port."""
    return [f"{s.name}.{port}" if port else s.name for s in stages for port in s.ports]


def case_of(plan: Plan, rest: int, *, norm: bool, drop: float) -> Case:
    """`rest`: samples of a second, smaller batch; with BatchNorm each microbatch needs two."""
    if norm and 0 < rest < 2 * plan.training.microbatches:
        rest = 0 if plan.training.microbatches == 3 else 2 * plan.training.microbatches
    modules = random_modules(plan, norm=norm, drop=drop)
    count = BATCH + rest
    data = {}
    for party, names in plan.graph.data_fields(0).items():
        fields = {"x": torch.randn(count, FEATURES), "y": torch.randn(count)}
        data[party] = {name: fields[name] for name in names}
    optimizer = adam if plan.training.seed % 2 else momentum
    return Case(plan=plan, counts=(count,), optimizer=optimizer, modules=modules, data=data)


def random_modules(plan: Plan, *, norm: bool, drop: float) -> dict[str, nn.Module]:
    torch.manual_seed(len(plan.stages))
    stages = [stage for stage in plan.stages if not isinstance(stage, Loss)]
    widths = {f"{s.name}.{port}" if port else s.name: spec.shape[-1] for s in stages for port, spec in s.ports.items()}
    modules: dict[str, nn.Module] = {s.name: Score(s.reduction) for s in plan.stages if isinstance(s, Loss)}
    for stage in stages:
        taken, options = [widths.get(text, FEATURES) for text in stage.inputs], {"norm": norm, "drop": drop}
        ports = {port: spec.shape[-1] for port, spec in stage.ports.items()}
        alone = stage.name in widths
        modules[stage.name] = Block(taken, ports[""], **options) if alone else Ports(taken, ports, **options)
    return {stage.name: modules[stage.name] for stage in plan.stages}


def uncounted() -> AbstractContextManager[object]:
    """Operations are not counted: this takes half of the time, and all other tests do it."""
    counter = MagicMock()
    counter.return_value.__enter__.return_value.total = 0
    counter.return_value.__exit__.return_value = False
    return patch.object(stages_at_work, "FlopCounter", counter)


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow], phases=[Phase.explicit, Phase.generate])
@given(plan=plans(), rest=st.integers(0, BATCH - 1), norm=st.booleans(), drop=st.sampled_from([0.0, 0.3]))
def test_random_graphs_equal_the_uncut_model(plan, rest, norm, drop):
    event(f"cuts: {min(len(plan.graph.cuts(0)), 5)}")
    event(f"consumers of one stage: {most_consumers(plan)}")
    case = case_of(plan, rest, norm=norm, drop=drop)
    with uncounted():
        assert difference(case.cut(), case.uncut()) == 0.0


def most_consumers(plan: Plan) -> int:
    return max(len(edges) for edges in plan.graph.consumers_of.values())


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow], phases=[Phase.explicit, Phase.generate])
@given(plan=replicated_plans(), counts=st.lists(st.integers(1, 13), min_size=3, max_size=3))
def test_random_replicas_equal_the_uncut_model(plan, counts):
    """Relays and parallel steps with unequal data; stages at clients, at one server, or copied for each client."""
    event(f"{plan.lanes} lanes, {plan.training.order}")
    counts = tuple(counts[: plan.lanes])
    generator = torch.Generator().manual_seed(1)
    data = {
        party: {"x": torch.randn(counts[lane], FEATURES, generator=generator), "y": torch.randn(counts[lane])}
        for lane, party in enumerate(plan.stage("s0").places)
    }
    case = Case(plan=plan, counts=counts, modules=random_modules(plan, norm=False, drop=0.3), data=data)
    with uncounted():
        assert difference(case.cut(), case.uncut()) == 0.0


def test_the_graphs_drawn_are_not_all_simple():
    """The strategy finds each kind of graph; otherwise the test above would prove little."""
    quick = settings(max_examples=2000, database=None, phases=[Phase.generate])
    for wanted in (
        lambda p: most_consumers(p) >= 3 and len(p.graph.cuts(0)) >= 3,
        lambda p: len({s.name for s in p.stages if isinstance(s, Loss)}) >= 3,
        lambda p: len(p.releases) >= 1 and len(p.parties) == 4,
        lambda p: any(getattr(s, "frozen", False) and p.graph.trained[s.name] for s in p.stages),
        lambda p: any(getattr(s, "frozen", False) and not p.graph.trained[s.name] for s in p.stages),
        lambda p: any(len(set(s.inputs)) < len(s.inputs) for s in p.stages),
        lambda p: [s.name for s in p.stages] != [s.name for s in p.graph.order],
        lambda p: any(e.source.port and e.trained for e in p.graph.cuts(0)) and len(p.graph.cuts(0)) >= 3,
        lambda p: any(s.detached for s in p.stages),
        lambda p: any(len(s.ports) == 3 for s in p.stages),
    ):
        find(plans(), wanted, settings=quick)
