"""A trained stage served to many clients: which plans allow it, and what a session runs. Pure.

Where the outputs are at the server, and the plan declares them as an `Answer`, a session runs the `served_plan`: in it
a stage at the client takes them, so that the way of an answer is a cut as any other.

| code | error | meaning |
| --- | --- | --- |
| E453 | ProgramError | the plan's prediction is nothing that one party could serve to another |
| E454 | ProgramError | the party is no client, or no server, of the plan |
"""

from __future__ import annotations

from dataclasses import replace

from cutlayer.core.compile import Roster, compile_plan
from cutlayer.core.crossing import answers_in
from cutlayer.core.graph import Graph
from cutlayer.core.parts import Loss, Stage
from cutlayer.core.plan import Plan
from cutlayer.core.program import Block, Exchange, Forward, Mode, Program
from cutlayer.errors import ProgramError

__all__ = ["answer_stages", "clients_of", "requests_in", "served_plan", "served_programs", "server_of"]

Programs = dict[str, dict[Mode, Program]]


def answer_stages(plan: Plan) -> dict[str, str]:
    """Return the stages that `served_plan` adds -> the output that each takes."""
    return {f"answer-{one.of}": one.of for one in answers_in(plan.extras)}


def served_plan(plan: Plan) -> Plan:
    """Return what a session of a served stage runs: the plan itself, if it declares no answers.

    Else each answer becomes a stage at the client, `answer-STAGE`, which gives on what it takes. Losses that take
    nothing but answers, and what only a training has, are left out: no session runs them.

    Raises:
        PlanError: E103, E104, a stage of the plan has such a name, or the name is too long.
    """
    if not answers_in(plan.extras):
        return plan
    graph, added, ends = plan.graph, list[Stage | Loss](), list[Stage | Loss]()
    for one in answers_in(plan.extras):
        name, ports = f"answer-{one.of}", graph.output_ports[one.of]
        specs = {port: graph.by_name[one.of].ports[port] for port in ports}
        at = graph.by_name[one.to].at if one.to in graph.by_name else one.to
        inputs = [f"{one.of}.{port}" if port else one.of for port in ports]
        output = specs.get("", specs)
        added.append(Stage(name, at=at, inputs=inputs, output=output, frozen=True))
        ends.append(Loss(f"{name}-end", at=at, inputs=[f"{name}.{port}" if port else name for port in ports]))
    answered = {one.of for one in answers_in(plan.extras)}
    kept = [s for s in plan.stages if not isinstance(s, Loss) or _taken(graph, s) - answered]
    left = Graph((*kept, *added, *ends), plan.releases, plan.crossings)
    loaded = {
        (party, field) for lane in range(left.lanes) for party, all_ in left.data_fields(lane).items() for field in all_
    }
    return Plan(
        left.stages,
        training=replace(plan.training, hub=""),
        releases=plan.releases,
        preprocessing=[
            one for one in plan.preprocessing if all((party, one.field) in loaded for party in left.holders(one.at))
        ],
        name=plan.name,
        extras=plan.crossings,
    )


def clients_of(plan: Plan, server: str) -> tuple[str, ...]:
    """Return the parties whose role a client of `server` may play, in plan order.

    A plan can be served if each of its predictions is between the server and one client, who gives all data and gets
    all outputs.

    Raises:
        ProgramError: E454, the server is no party of the plan or runs no stage of a prediction; E453, the plan's
            predictions are of another kind.
    """
    graph = served_plan(plan).graph
    active = graph.ancestors(graph.outputs)
    lanes = [lane for lane in range(graph.lanes) if server in _runners(graph, active, lane)]
    if not lanes:
        raise ProgramError(
            f"{server!r} has no stage to serve",
            where=f"plan {plan.name}",
            expected=f"a party that runs a stage before the outputs {', '.join(graph.outputs)}",
            got=server,
            remedy="serve as the party that holds the stage in the middle",
            code="E454",
        )
    clients: dict[str, None] = {}
    for lane in lanes:
        reason, others, remedy = _obstacle(graph, active, lane, server)
        if reason:
            raise ProgramError(
                f"a prediction of the plan {plan.name!r} cannot be served",
                where=f"party {server}",
                expected="the server and one client, who gives the data and gets the outputs, such as a U-shape",
                got=reason,
                remedy=remedy or "predict with all parties: cutlayer predict --join at each",
                code="E453",
            )
        clients |= dict.fromkeys(others)
    return tuple(party for party in plan.parties if party in clients)


def server_of(plan: Plan, client: str) -> str:
    """Return the party that serves a client. Raises ProgramError E453 or E454."""
    graph = served_plan(plan).graph
    active = graph.ancestors(graph.outputs)
    lanes = [lane for lane in range(graph.lanes) if client in _holders(graph, active, lane)]
    others = {name for lane in lanes for name in _runners(graph, active, lane)} - {client}
    for server in (party for party in plan.parties if party in others):
        if client in clients_of(plan, server):
            return server
    raise ProgramError(
        f"{client!r} cannot ask a server of the plan {plan.name!r}",
        where=f"party {client}",
        expected="the role of a party that gives data for a prediction",
        got=client,
        remedy="predict as the party that holds the data",
        code="E454",
    )


def served_programs(plan: Plan, roster: Roster, pair: tuple[str, ...]) -> Programs:
    """Return the programs of a served session: the served plan's prediction, for a server and one client.

    They are the plan's own but for the barrier before the end, at which all of the plan's parties would have to be.

    Raises:
        DataError, PlanError: the roster does not fit the plan.
    """
    whole = compile_plan(served_plan(plan), Roster({"predict": roster.samples.get("predict", {})}))
    return {party: {"predict": _without_barrier(whole[party]["predict"])} for party in pair}


def requests_in(program: Program) -> int:
    """Return how many forwards of its stages a server's program has."""
    return sum(block.repeat * sum(isinstance(job, Forward) for job in block.instructions) for block in program.blocks)


def _without_barrier(program: Program) -> Program:
    blocks = (
        Block(block.name, tuple(job for job in block.instructions if not isinstance(job, Exchange)), block.repeat)
        for block in program.blocks
    )
    return Program(program.party, program.mode, tuple(blocks))


def _runners(graph: Graph, active: set[str], lane: int) -> set[str]:
    return {graph.place(name, lane) for name in active}


def _holders(graph: Graph, active: set[str], lane: int) -> set[str]:
    """Return the parties that give data to a prediction in this lane."""
    return {graph.origin(edge, lane) for edge in graph.edges if edge.source.field and edge.target in active}


def _taken(graph: Graph, loss: Loss) -> set[str]:
    """Return the stages that a loss takes."""
    return {source.stage for source in graph.sources[loss.name] if source.stage}


def _obstacle(graph: Graph, active: set[str], lane: int, server: str) -> tuple[str, set[str], str]:
    """Return why a lane's predictions cannot be served, or "", who its client is, and what helps besides `--join`."""
    holders = _holders(graph, active, lane)
    members = _runners(graph, active, lane) | holders
    held = [name for name in graph.outputs if graph.place(name, lane) == server]
    if len(members) > 2:
        return f"{len(members)} parties take part in each: {', '.join(sorted(members))}", set(), ""
    if held:
        reason = f"the output {held[0]!r} stays at {server}: the client would get nothing"
        head = next((e.target for e in graph.edges if e.source.field and e.target in active), "")
        return (
            reason,
            set(),
            (
                f'if a client may have it, declare so in the contract: [[answer]] of = "{held[0]}", to = "{head}"; '
                f"or in the plan: extras=[Answer({held[0]!r}, to={head!r})]; else predict with all parties"
            ),
        )
    if server in holders:
        return f"{server} would have to give data for each", set(), ""
    return "", members - {server}, ""
