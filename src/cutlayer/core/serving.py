"""Trained stages served to many clients: which plans allow it, and what a session runs. Pure.

In each prediction one party, the client, gives the data and gets the outputs; all others serve. They stand in a `Way`:
the client first, then in the order in which values reach them. Of two with a cut between them the earlier one asks the
later one, so a server in the middle of a chain is itself a client of the next.

Where the outputs are at a server, and the plan declares them as an `Answer`, a session runs the `served_plan`: in it
a stage at the client takes them, so that the way of an answer is a cut as any other.

| code | error | meaning |
| --- | --- | --- |
| E453 | ProgramError | the plan's prediction is nothing that could be served to one client |
| E454 | ProgramError | the party is no client, or no server, of the plan |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cutlayer.core.answers import answer_stage, holders, obstacle, runners, served_graph
from cutlayer.core.compile import Roster, compile_plan
from cutlayer.core.crossing import answers_in
from cutlayer.core.graph import Graph
from cutlayer.core.plan import Plan
from cutlayer.core.program import Block, Exchange, Forward, Mode, Program
from cutlayer.errors import ProgramError

__all__ = [
    "Way",
    "answer_stages",
    "behind",
    "clients_of",
    "requests_in",
    "served_plan",
    "served_programs",
    "server_of",
    "ways_of",
]

Programs = dict[str, dict[Mode, Program]]


@dataclass(frozen=True)
class Way:
    """Who takes part in the predictions of one lane, the client first, and who asks whom.

    Attributes:
        parties: In the order in which values first reach them.
        links: (who asks, who is asked) of each two with a cut between them.
    """

    parties: tuple[str, ...]
    links: frozenset[tuple[str, str]]

    @property
    def client(self) -> str:
        """Return the party that gives the data and gets the outputs."""
        return self.parties[0]

    def asked_by(self, party: str) -> tuple[str, ...]:
        """Return the servers that `party` asks, in order."""
        return tuple(other for other in self.parties if (party, other) in self.links)

    def asking(self, party: str) -> tuple[str, ...]:
        """Return the parties that ask `party`, in order."""
        return tuple(other for other in self.parties if (other, party) in self.links)


def behind(ways: Sequence[Way], peer: str, party: str) -> frozenset[str]:
    """Return the parties whose errors `peer` may hand on to `party`: whom it is linked with not by way of `party`."""
    found: set[str] = set()
    for way in ways:
        links = way.links | {(second, first) for first, second in way.links}
        seen, new = {party}, {peer} if (peer, party) in links else set()
        while new:
            seen |= new
            new = {second for first, second in links if first in new} - seen
        found |= seen
    return frozenset(found - {peer, party})


def ways_of(plan: Plan) -> tuple[Way, ...]:
    """Return, for each lane of a plan that can be served, who takes part in its predictions, and who asks whom."""
    graph = served_plan(plan).graph
    active = graph.ancestors(graph.outputs)
    return tuple(_way(graph, active, lane) for lane in range(graph.lanes))


def _way(graph: Graph, active: set[str], lane: int) -> Way:
    runs = (graph.place(stage.name, lane) for stage in graph.order if stage.name in active)
    parties = tuple(dict.fromkeys([*holders(graph, active, lane), *runs]))
    cuts = ({graph.origin(e, lane), graph.place(e.target, lane)} for e in graph.cuts(lane) if e.target in active)
    links = frozenset((first, second) for first, second in (sorted(cut, key=parties.index) for cut in cuts))
    return Way(parties, links)


def answer_stages(plan: Plan) -> dict[str, str]:
    """Return the stages that `served_plan` adds -> the output that each takes."""
    return {answer_stage(one.of): one.of for one in answers_in(plan.extras)}


def served_plan(plan: Plan) -> Plan:
    """Return what a session of a served stage runs: the plan itself, if it declares no answers.

    Else each answer becomes a stage at the client, `answer-STAGE`, which gives on what it takes. Losses that take
    nothing but answers, and what only a training has, are left out: no session runs them.
    """
    if not answers_in(plan.extras):
        return plan
    left = served_graph(plan.graph, answers_in(plan.extras))
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
    """Return the parties whose role whoever asks `server` may play, in plan order; see `Way`.

    A plan can be served if in each of its predictions one party gives all data and gets all outputs.

    Raises:
        ProgramError: E454, the server is no party of the plan or runs no stage of a prediction; E453, the plan's
            predictions are of another kind.
    """
    graph = served_plan(plan).graph
    active = graph.ancestors(graph.outputs)
    lanes = [lane for lane in range(graph.lanes) if server in runners(graph, active, lane)]
    if not lanes:
        raise ProgramError(
            f"{server!r} has no stage to serve",
            where=f"plan {plan.name}",
            expected=f"a party that runs a stage before the outputs {', '.join(graph.outputs)}",
            got=server,
            remedy="serve as a party that holds a stage in the middle",
            code="E454",
        )
    asking: set[str] = set()
    ways: list[Way] = []
    for lane in lanes:
        reason, remedy = obstacle(graph, active, lane, server)
        if not reason:
            ways.append(_way(graph, active, lane))
            asking.update(ways[-1].asking(server))
            reason, remedy = _crossed(ways)
        if reason:
            raise ProgramError(
                f"a prediction of the plan {plan.name!r} cannot be served",
                where=f"party {server}",
                expected="one client, who gives all data and gets all outputs, such as in a U-shape or a chain",
                got=reason,
                remedy=remedy or "predict with all parties: cutlayer predict --join at each",
                code="E453",
            )
    return tuple(party for party in plan.parties if party in asking)


def _crossed(ways: Sequence[Way]) -> tuple[str, str]:
    """Return why replicas' ways do not go together, and what to do: the first to ask a server leads there, always."""
    for server in dict.fromkeys(name for way in ways for name in way.parties):
        asking = [way.asking(server) for way in ways]
        firsts = {names[0] for names in asking if names}
        twice = sorted(firsts & {name for names in asking for name in names[1:]})
        if twice:
            reason = f"{twice[0]} asks {server} first in one replica, and after another in the next"
            return reason, "let the servers of all replicas stand in the same order"
    return "", ""


def server_of(plan: Plan, client: str) -> str:
    """Return the party that serves a client. Raises ProgramError E453 or E454."""
    graph = served_plan(plan).graph
    active = graph.ancestors(graph.outputs)
    lanes = [lane for lane in range(graph.lanes) if client in holders(graph, active, lane)]
    others = {name for lane in lanes for name in runners(graph, active, lane)} - {client}
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


def served_programs(plan: Plan, roster: Roster, parties: tuple[str, ...]) -> Programs:
    """Return the programs of a served session: the served plan's prediction, for those who take part.

    They are the plan's own but for the barrier before the end, at which all of the plan's parties would have to be.

    Raises:
        DataError, PlanError: the roster does not fit the plan.
    """
    whole = compile_plan(served_plan(plan), Roster({"predict": roster.samples.get("predict", {})}))
    return {party: {"predict": _without_barrier(whole[party]["predict"])} for party in parties}


def requests_in(program: Program) -> int:
    """Return how many forwards of its stages a server's program has."""
    return sum(block.repeat * sum(isinstance(job, Forward) for job in block.instructions) for block in program.blocks)


def _without_barrier(program: Program) -> Program:
    blocks = (
        Block(block.name, tuple(job for job in block.instructions if not isinstance(job, Exchange)), block.repeat)
        for block in program.blocks
    )
    return Program(program.party, program.mode, tuple(blocks))
