"""Answers: outputs that a served stage gives to its clients, as a graph of its own, and whether they can be. Pure.

| code | error | meaning |
| --- | --- | --- |
| E114 | PlanError | an answer that cannot be, or that nobody could ever be given |
"""

from __future__ import annotations

from collections.abc import Sequence

from cutlayer.core.graph import Graph
from cutlayer.core.parts import Answer, Loss, Stage
from cutlayer.errors import PlanError

__all__ = ["answer_stage", "check_answers", "holders", "obstacle", "runners", "served_graph"]

_LONGEST = 52  # letters of a stage with an answer: `answer-STAGE-end` is a name too


def answer_stage(of: str) -> str:
    """Return the name of the stage at the client that takes an answer."""
    return f"answer-{of}"


def served_graph(graph: Graph, answers: Sequence[Answer]) -> Graph:
    """Return the graph of what a session runs: a stage at the client takes each answer, and gives it on.

    Losses that take nothing but answers are left out. The answers are those that `check_answers` allows.
    """
    added, ends = list[Stage | Loss](), list[Stage | Loss]()
    for one in answers:
        name, ports = answer_stage(one.of), graph.output_ports[one.of]
        specs = {port: graph.by_name[one.of].ports[port] for port in ports}
        at = graph.by_name[one.to].at if one.to in graph.by_name else one.to
        inputs = [f"{one.of}.{port}" if port else one.of for port in ports]
        output = specs.get("", specs)
        added.append(Stage(name, at=at, inputs=inputs, output=output, frozen=True))
        ends.append(Loss(_end(one.of), at=at, inputs=[f"{name}.{port}" if port else name for port in ports]))
    answered = {one.of for one in answers}
    kept = [s for s in graph.stages if not isinstance(s, Loss) or _taken(graph, s) - answered]
    return Graph((*kept, *added, *ends), graph.releases, tuple(graph.crossings.values()))


def check_answers(graph: Graph, answers: Sequence[Answer]) -> None:
    """Raise `PlanError` E114 for answers that cannot be, and for those with which no session could ever be served."""
    parties = {party for stage in graph.stages for party in stage.places}
    names = parties | set(graph.by_name)
    seen = set[str]()
    for answer in answers:
        if answer.of not in graph.outputs or answer.of in seen:
            raise _wrong(answer, "of", f"one of {', '.join(graph.outputs)}, which feed a loss, each once", answer.of)
        seen.add(answer.of)
        if answer.to not in names:
            raise _wrong(answer, "to", f"one of {', '.join(sorted(names))}", answer.to)
        lanes, stage = range(graph.lanes), answer.to in graph.by_name
        if any(graph.place(answer.of, i) == (graph.place(answer.to, i) if stage else answer.to) for i in lanes):
            raise _wrong(answer, "to", "a party that does not have the output anyway", answer.to)
        _check_names(answer, names)
    served = served_graph(graph, answers) if answers else graph
    active = served.ancestors(served.outputs)
    for answer in answers:
        for lane in range(served.lanes):
            reason, _ = obstacle(served, active, lane, served.place(answer.of, lane))
            if reason:
                raise PlanError(
                    f"with the answer {answer.of!r} to {answer.to!r} nothing can be served",
                    where=f"answer {answer.of!r}",
                    expected="predictions in which one party, the client, gives the data and gets the outputs",
                    got=reason,
                    remedy="let all outputs go to the party that gives the data: name a stage there; or have none",
                    code="E114",
                )


def _check_names(answer: Answer, names: set[str]) -> None:
    if len(answer.of) > _LONGEST:
        raise PlanError(
            f"the name of the stage {answer.of!r} is too long for one with an answer",
            where=f"answer {answer.of!r}",
            expected=f"at most {_LONGEST} letters: a stage {answer_stage('NAME')!r} takes it at the client",
            got=f"{len(answer.of)}",
            remedy="choose a shorter name for the stage",
            code="E114",
        )
    taken = {answer_stage(answer.of), _end(answer.of)} & names
    if taken:
        raise PlanError(
            f"the name {min(taken)!r} is needed for the answer {answer.of!r}",
            where=f"answer {answer.of!r}",
            expected=f"no other stage or party called {min(taken)}: what takes the answer at the client has that name",
            remedy="rename the other one",
            code="E114",
        )


def _wrong(answer: Answer, key: str, expected: str, got: str) -> PlanError:
    return PlanError(
        f"{key!r} of the answer {answer.of!r} is wrong",
        where=f"answer {answer.of!r}",
        expected=expected,
        got=got,
        remedy="name a stage that feeds a loss, and the client's party or a stage there",
        code="E114",
    )


def _answered(graph: Graph, of: str) -> bool:
    return answer_stage(of) in graph.by_name


def _end(of: str) -> str:
    return f"{answer_stage(of)}-end"


def _taken(graph: Graph, loss: Loss) -> set[str]:
    """Return the stages that a loss takes."""
    return {source.stage for source in graph.sources[loss.name] if source.stage}


def runners(graph: Graph, active: set[str], lane: int) -> set[str]:
    """Return the parties that run a stage of a prediction in this lane."""
    return {graph.place(name, lane) for name in active}


def holders(graph: Graph, active: set[str], lane: int) -> set[str]:
    """Return the parties that give data to a prediction in this lane."""
    return {graph.origin(edge, lane) for edge in graph.edges if edge.source.field and edge.target in active}


def obstacle(graph: Graph, active: set[str], lane: int, server: str) -> tuple[str, str]:
    """Return why a lane's predictions cannot be served, or "", and what helps besides `--join`."""
    giving = holders(graph, active, lane)
    others = (runners(graph, active, lane) | giving) - {server}
    if not others:
        return f"{server} makes each alone", "predict there: no other party takes part"
    if len(giving) > 1:
        if server in giving and len(others) == 1:
            return f"{server} would have to give data for each", ""
        return f"{len(giving)} parties give data for each: {', '.join(sorted(giving))}", ""
    (client,) = giving
    for name in graph.outputs:
        place = graph.place(name, lane)
        if place == client or _answered(graph, name):
            continue
        of = name.removeprefix(answer_stage(""))
        if of in graph.by_name and name != of:
            return f"the output {of!r} goes to {place}, and {client} gives the data", ""
        if server != client:
            reason = f"the output {name!r} stays at {place}: the client would get nothing"
            return reason, _declare(graph, active, name)
    if server == client:
        first = next(graph.place(one.name, lane) for one in graph.order if graph.place(one.name, lane) in others)
        reason = f"{server} gives the data for each: it is a client of the stage at {first}"
        return reason, f"serve as {first}; {server} asks there: cutlayer predict --served"
    return "", ""


def _declare(graph: Graph, active: set[str], output: str) -> str:
    """Return how to let an output go to the client."""
    head = next(e.target for e in graph.edges if e.source.field and e.target in active)
    return (
        f'if a client may have it, declare so in the contract: [[answer]] of = "{output}", to = "{head}"; '
        f"or in the plan: extras=[Answer({output!r}, to={head!r})]; else predict with all parties"
    )
