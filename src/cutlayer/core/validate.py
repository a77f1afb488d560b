"""What must hold for a plan to be run, beyond the graph itself. Each complaint names the stage and the remedy."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

from cutlayer.core.graph import Edge, Graph
from cutlayer.core.parts import Loss, Shared, Stage, Training, check_name
from cutlayer.errors import PlanError

__all__ = ["check", "check_assembly", "check_shared"]

SCHEDULES = ("1f1b", "gpipe", "sequential")
ORDERS = ("parallel", "relay")
CLIPS = ("global", "party")
REDUCTIONS = ("mean", "sum")
KINDS = ("categories", "classes", "scale")
_LIMITS = {"epochs": 1, "batch_size": 1, "microbatches": 1, "metrics_least": 1, "window": 1} | {
    "checkpoint_every": 0,
    "evaluate_every": 0,
}


def check(graph: Graph, training: Training) -> None:
    """Raise `PlanError` for the first thing that is wrong with the plan."""
    _check_places(graph)
    _check_releases(graph)
    _check_data(graph)
    _check_ends(graph)
    _check_training(graph, training)
    _check_clip(graph, training)


def check_shared(graph: Graph, preprocessing: Sequence[Shared]) -> None:
    """Raise `PlanError` for preprocessing that cannot be agreed on."""
    seen: set[tuple[str, str]] = set()
    for shared in preprocessing:
        holders = {party for stage in graph.stages for party in stage.places} | set(graph.by_name)
        if not isinstance(shared.at, str):
            raise PlanError(
                f"the preprocessing of {shared.field!r} is at several places",
                where=f"preprocessing of {shared.field!r}",
                expected="one name: a party's, or that of a stage, for all parties that have it",
                got=repr(shared.at),
                remedy="name the stage at whose parties the field is held: they agree on one preprocessing",
                code="E112",
            )
        if shared.at not in holders:
            raise _choice(
                f"preprocessing of {shared.field!r}", f"holder of {shared.field!r}", shared.at, tuple(sorted(holders))
            )
        if shared.kind not in KINDS:
            raise _choice(
                f"preprocessing of {shared.field!r}", f"preprocessing of {shared.field!r}", shared.kind, KINDS
            )
        for name in ("limit", "least"):
            value = getattr(shared, name)
            if type(value) is not int or not 1 <= value <= 2**20:
                raise PlanError(
                    f"{name} of the preprocessing of {shared.field!r} is {value!r}",
                    where=f"preprocessing of {shared.field!r}",
                    expected="an integer in 1..1048576",
                    remedy="correct it",
                    code="E110",
                )
        for party in graph.holders(shared.at):
            fields = {name for lane in range(graph.lanes) for name in graph.data_fields(lane).get(party, ())}
            if shared.field not in fields or (party, shared.field) in seen:
                raise PlanError(
                    f"{party!r} cannot preprocess the field {shared.field!r}",
                    where=f"preprocessing of {shared.field!r}, at {shared.at}",
                    expected=f"one of its fields {', '.join(sorted(fields)) or '(none)'}, each once",
                    remedy="name the party, or the stage at whose parties the field is held",
                    code="E112",
                )
            seen.add((party, shared.field))


def check_assembly(graph: Graph, parties: Sequence[str]) -> None:
    """Raise `PlanError` unless the parties that may put the whole model together are parties of the plan."""
    own = {party for stage in graph.stages for party in stage.places}
    if isinstance(parties, str):
        raise PlanError(
            "assemble_at is one text",
            where="assemble_at",
            expected="a list",
            remedy=f"write [{parties!r}]",
            code="E102",
        )
    for party in parties:
        if party not in own or len(set(parties)) != len(parties):
            raise _choice("assemble_at", "party in assemble_at", party, tuple(sorted(own)))


def _check_places(graph: Graph) -> None:
    for stage in graph.stages:
        check_name(stage.name, "stage")
        if not stage.places:
            raise PlanError(
                f"stage {stage.name!r} is at no party",
                where=f"stage {stage.name}",
                remedy="set at='PARTY'",
                code="E106",
            )
        for party in stage.places:
            check_name(party, "party")
            if party in graph.by_name:
                raise PlanError(
                    f"{party!r} is both a party and a stage",
                    where=f"stage {stage.name}",
                    remedy="rename one of them: one name, one thing",
                    code="E104",
                )
        if type(stage.state_limit) is not int or stage.state_limit < 1:
            raise PlanError(
                f"state_limit of {stage.name!r} is {stage.state_limit!r}",
                where=f"stage {stage.name}",
                expected="a number of bytes",
                remedy="give a whole number of at least 1",
                code="E110",
            )
        if stage.replicated and len(stage.places) != graph.lanes:
            raise PlanError(
                f"stage {stage.name!r} has {len(stage.places)} replicas, others have {graph.lanes}",
                where=f"stage {stage.name}",
                expected="one number of replicas for all replicated stages, in the same order of parties",
                remedy="repeat a party in the list where it runs several replicas",
                code="E106",
            )


def _check_releases(graph: Graph) -> None:
    holders = set(graph.by_name) | {party for stage in graph.stages for party in stage.places}
    for release in graph.releases:
        for name in (release.at, release.to):
            if name not in holders:
                raise PlanError(
                    f"the release of {release.field!r} names {name!r}, which is no party or stage of the plan",
                    where=f"release of {release.field!r}",
                    expected=f"one of {', '.join(sorted(holders))}",
                    remedy="correct the name",
                    code="E107",
                )
        if not release.spec.per_sample:
            raise PlanError(
                f"the release of {release.field!r} is {release.spec}, which does not begin with the batch",
                where=f"release of {release.field!r}",
                expected="a shape such as int64[batch]: batches are cut into microbatches along it",
                remedy="begin the shape with 'batch'",
                code="E109",
            )
    for edge in graph.edges:
        _check_edge(graph, edge, holders)


def _check_edge(graph: Graph, edge: Edge, holders: set[str]) -> None:
    owner, target = edge.source.owner, graph.by_name[edge.target]
    if owner and owner not in holders:
        raise PlanError(
            f"stage {target.name!r} takes data of {owner!r}, which is no party or stage of the plan",
            where=f"stage {target.name}, input {edge.position}",
            expected=f"one of {', '.join(sorted(holders))}",
            remedy="correct the owner after @",
            code="E102",
        )
    crossing = [lane for lane in range(graph.lanes) if graph.is_cut(edge, lane)]
    if not (owner and crossing):
        return
    receivers = {graph.place(edge.target, lane) for lane in crossing}
    allowed = {r.to for r in graph.releases if r.field == edge.source.field and r.at == owner}
    if not receivers <= allowed:
        missing = ", ".join(sorted(receivers - allowed))
        raise PlanError(
            f"the field {edge.source.field!r} of {owner!r} would leave it for {missing}, and no release allows this",
            where=f"stage {target.name}, input {edge.position}",
            remedy=f"move the stage to the data, or declare Release({edge.source.field!r}, at={owner!r}, "
            f"to={min(receivers - allowed)!r}, spec=...)",
            code="E107",
        )


def _check_data(graph: Graph) -> None:
    for lane in range(graph.lanes):
        if not graph.data_fields(lane):
            raise PlanError(
                "no stage of the plan takes data",
                where="the inputs of all stages" if graph.lanes == 1 else f"the inputs of all stages, replica {lane}",
                remedy="give one the input 'data.FIELD'",
                code="E102",
            )


def _check_ends(graph: Graph) -> None:
    losses = tuple(stage.name for stage in graph.stages if isinstance(stage, Loss))
    if not losses:
        raise PlanError(
            "the plan has no loss",
            where="the losses of the plan",
            remedy="end it with Loss(name, at=..., inputs=[...])",
            code="E108",
        )
    useful = graph.ancestors(losses)
    for stage in graph.stages:
        if stage.name not in useful:
            raise PlanError(
                f"stage {stage.name!r} has no way to a loss, so nothing would train it",
                where=f"stage {stage.name}",
                remedy="let a loss or another stage take it as input, or remove it",
                code="E108",
            )
        if isinstance(stage, Loss):
            if not any(source.stage for source in graph.sources[stage.name]):
                raise PlanError(
                    f"the loss {stage.name!r} takes no stage",
                    where=f"loss {stage.name}",
                    remedy="give it a stage's output",
                    code="E108",
                )
            if stage.reduction not in REDUCTIONS:
                raise _choice(f"loss {stage.name}", f"reduction of {stage.name!r}", stage.reduction, REDUCTIONS)
            if not isfinite(stage.weight):
                raise PlanError(
                    f"weight of {stage.name!r} is {stage.weight}",
                    where=f"loss {stage.name}",
                    expected="a finite number",
                    remedy="give such a number",
                    code="E110",
                )
            continue
        _check_outputs(graph, stage)
        if graph.trained[stage.name] and not any(edge.trained for edge in graph.consumers_of[stage.name]):
            raise PlanError(
                f"no gradient can reach stage {stage.name!r}: all that take it give whole numbers",
                where=f"stage {stage.name}",
                remedy="let a stage with a floating output or a loss take it, or set frozen=True here and before",
                code="E108",
            )


def _check_outputs(graph: Graph, stage: Stage) -> None:
    for port, spec in stage.ports.items():
        if not spec.per_sample:
            raise PlanError(
                f"stage {stage.name!r} gives {spec}, which does not begin with the batch",
                where=f"stage {stage.name}" + (f", port {port}" if port else ""),
                expected="a shape such as float32[batch, 64]: batches are cut into microbatches along it",
                remedy="begin the shape with 'batch'",
                code="E109",
            )
    unknown = [port for port in stage.detached if port not in stage.ports]
    if unknown:
        raise _choice(f"stage {stage.name}", f"detached port of {stage.name!r}", unknown[0], tuple(stage.ports))
    taken = {(edge.source.stage, edge.source.port) for edge in graph.edges}
    unused = [port for port in stage.ports if (stage.name, port) not in taken]
    if unused and len(stage.ports) > 1:
        raise PlanError(
            f"nothing takes the output {unused[0]!r} of stage {stage.name!r}",
            where=f"stage {stage.name}, output {unused[0]}",
            remedy=f"let a stage take {stage.name}.{unused[0]}, or leave it out",
            code="E108",
        )
    if not stage.frozen and set(stage.detached) == set(stage.ports):
        raise PlanError(
            f"no gradient can reach stage {stage.name!r}: all its outputs are detached",
            where=f"stage {stage.name}",
            remedy="set frozen=True on it, or detach fewer outputs",
            code="E108",
        )


def _check_training(graph: Graph, training: Training) -> None:
    for name, value, choices in (
        ("schedule", training.schedule, SCHEDULES),
        ("order", training.order, ORDERS),
        ("clip", training.clip, CLIPS),
    ):
        if value not in choices:
            raise _choice("training", name, value, choices)
    for name, least in _LIMITS.items():
        value = getattr(training, name)
        if type(value) is not int or value < least:
            raise PlanError(
                f"training.{name} is {value!r}",
                where="training",
                expected=f"an integer of at least {least}",
                remedy="correct it",
                code="E110",
            )
    if training.microbatches > min(training.batch_size, 65_535):
        raise PlanError(
            f"{training.microbatches} microbatches of a batch of {training.batch_size}",
            where="training",
            expected="at most one microbatch a sample",
            remedy="lower training.microbatches, or raise training.batch_size",
            code="E110",
        )
    if training.clip_norm is not None and not (isfinite(training.clip_norm) and training.clip_norm > 0):
        raise PlanError(
            f"training.clip_norm is {training.clip_norm}",
            where="training",
            expected="a positive number",
            remedy="give such a number, or leave it out",
            code="E110",
        )
    parties = {party for stage in graph.stages for party in stage.places}
    if training.hub and training.hub not in parties:
        raise _choice("training", "hub", training.hub, tuple(sorted(parties)))


def _check_clip(graph: Graph, training: Training) -> None:
    """Replicas that step together stay equal only if the same norm clips each of them."""
    if training.clip_norm is None or training.clip != "party" or training.order != "parallel":
        return
    trained = [stage for stage in graph.stages if not isinstance(stage, Loss) and not stage.frozen]
    for stage in trained:
        beside = {tuple(s.name for s in trained for party in s.places if party == place) for place in stage.places}
        if len(beside) > 1:
            raise PlanError(
                f"the replicas of stage {stage.name!r} would be clipped by different norms, and so become different",
                where=f"its parties {', '.join(stage.places)} train different sets of stages",
                remedy="set training.clip to 'global'",
                code="E110",
            )


def _choice(where: str, name: str, value: object, choices: tuple[str, ...]) -> PlanError:
    return PlanError(
        f"unknown {name}: {value!r}",
        where=where,
        expected=f"one of {', '.join(choices)}",
        remedy="choose one of these",
        code="E110",
    )
