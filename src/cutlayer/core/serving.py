"""A trained stage served to many clients: which plans allow it, and what a session runs. Pure.

| code | error | meaning |
| --- | --- | --- |
| E453 | ProgramError | the plan's prediction is nothing that one party could serve to another |
| E454 | ProgramError | the party is no client, or no server, of the plan |
"""

from __future__ import annotations

from cutlayer.core.compile import Roster, compile_plan
from cutlayer.core.graph import Graph
from cutlayer.core.plan import Plan
from cutlayer.core.program import Block, Exchange, Forward, Mode, Program
from cutlayer.errors import ProgramError

__all__ = ["clients_of", "requests_in", "served_programs", "server_of"]

Programs = dict[str, dict[Mode, Program]]


def clients_of(plan: Plan, server: str) -> tuple[str, ...]:
    """Return the parties whose role a client of `server` may play, in plan order.

    A plan can be served if each of its predictions is between the server and one client, who gives all data and gets
    all outputs.

    Raises:
        ProgramError: E454, the server is no party of the plan or runs no stage of a prediction; E453, the plan's
            predictions are of another kind.
    """
    graph = plan.graph
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
        reason, others = _obstacle(graph, active, lane, server)
        if reason:
            raise ProgramError(
                f"a prediction of the plan {plan.name!r} cannot be served",
                where=f"party {server}",
                expected="the server and one client, who gives the data and gets the outputs, such as a U-shape",
                got=reason,
                remedy="predict with all parties: cutlayer predict --join at each",
                code="E453",
            )
        clients |= dict.fromkeys(others)
    return tuple(party for party in plan.parties if party in clients)


def server_of(plan: Plan, client: str) -> str:
    """Return the party that serves a client. Raises ProgramError E453 or E454."""
    graph = plan.graph
    active = graph.ancestors(graph.outputs)
    lanes = [lane for lane in range(graph.lanes) if client in _holders(graph, active, lane)]
    others = {name for lane in lanes for name in _runners(graph, active, lane)} - {client}
    for server in (party for party in plan.parties if party in others):
        if client in clients_of(plan, server):
            return server
    raise ProgramError(
        f"{client!r} cannot ask a server of the plan {plan.name!r}",
        expected="the role of a party that gives data for a prediction",
        got=client,
        remedy="predict as the party that holds the data",
        code="E454",
    )


def served_programs(plan: Plan, roster: Roster, pair: tuple[str, str]) -> Programs:
    """Return the programs of a served session: the plan's prediction, for a server and one client.

    They are the plan's own but for the barrier before the end, at which all of the plan's parties would have to be.

    Raises:
        DataError, PlanError: the roster does not fit the plan.
    """
    whole = compile_plan(plan, Roster({"predict": roster.samples.get("predict", {})}))
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


def _obstacle(graph: Graph, active: set[str], lane: int, server: str) -> tuple[str, set[str]]:
    """Return why a lane's predictions cannot be served, or "", and who its client is."""
    holders = _holders(graph, active, lane)
    members = _runners(graph, active, lane) | holders
    held = [name for name in graph.outputs if graph.place(name, lane) == server]
    if len(members) > 2:
        return f"{len(members)} parties take part in each: {', '.join(sorted(members))}", set()
    if held:
        return f"the output {held[0]!r} stays at {server}, where the loss is: the client would get nothing", set()
    if server in holders:
        return f"{server} would have to give data for each", set()
    return "", members - {server}
