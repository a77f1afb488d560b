"""The graph behind a plan: order of stages, edges between them, and the cuts that follow from where stages are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from cutlayer.core.crossing import Crossing
from cutlayer.core.parts import Loss, Release, Source, Stage
from cutlayer.core.spec import TensorSpec
from cutlayer.errors import PlanError

__all__ = ["Edge", "Graph"]


@dataclass(frozen=True)
class Edge:
    """One input of one stage. `index` is its number in plan order and its name on the wire.

    `trained` says whether a gradient flows back along it; `crossing` what is done to it where it is a cut.
    """

    index: int
    source: Source
    target: str
    position: int
    spec: TensorSpec | None
    trained: bool
    crossing: Crossing | None = None

    def wire(self, direction: str = "up") -> TensorSpec | None:
        """Return the spec that the value ("up") or gradient ("down") has on the wire; None: a field not released."""
        return self.spec if self.spec is None or self.crossing is None else self.crossing.on_wire(self.spec, direction)

    @property
    def label(self) -> str:
        """Return "source->target" for messages."""
        return f"{self.origin}->{self.target}"

    @property
    def origin(self) -> str:
        """Return what the edge carries: "stage", "stage.port" or "data.field"."""
        if self.source.field:
            return f"data.{self.source.field}"
        return f"{self.source.stage}.{self.source.port}" if self.source.port else self.source.stage


class Graph:
    """Stages, edges and cuts, all derived from the plan's parts; nothing here is declared twice.

    Raises:
        PlanError: two stages of one name, an unknown input, a cycle, replicas that do not match.
    """

    def __init__(
        self, stages: tuple[Stage | Loss, ...], releases: tuple[Release, ...] = (), crossings: tuple[Crossing, ...] = ()
    ) -> None:
        """Derive order, trained stages and edges."""
        self.stages = stages
        self.releases = releases
        self.crossings = {crossing.of: crossing for crossing in crossings}
        self.by_name: dict[str, Stage | Loss] = {}
        for stage in stages:
            if stage.name in self.by_name:
                raise PlanError(
                    f"two stages are named {stage.name!r}",
                    where="the stages of the plan",
                    remedy="give each stage its own name",
                    code="E103",
                )
            self.by_name[stage.name] = stage
        self.lanes = max((len(stage.places) for stage in stages), default=1)
        self.sources = {stage.name: tuple(Source.parse(text) for text in stage.inputs) for stage in stages}
        _check_inputs(self)
        self.order = _topological(self)
        self.trained = _trained(self)
        self.edges = tuple(_edges(self))
        self.inputs_of = {s.name: tuple(e for e in self.edges if e.target == s.name) for s in stages}
        self.consumers_of = {s.name: tuple(e for e in self.edges if e.source.stage == s.name) for s in stages}
        rank = {stage.name: place for place, stage in enumerate(self.order)}
        self.last_first = tuple(sorted(self.edges, key=lambda e: (rank[e.target], e.position), reverse=True))

    def place(self, stage: str, lane: int) -> str:
        """Return the party that runs `stage` for `lane`."""
        places = self.by_name[stage].places
        return places[lane] if self.by_name[stage].replicated else places[0]

    def origin(self, edge: Edge, lane: int) -> str:
        """Return the party where the value of `edge` comes into being, for `lane`."""
        if edge.source.stage:
            return self.place(edge.source.stage, lane)
        owner = edge.source.owner or edge.target
        return self.place(owner, lane) if owner in self.by_name else owner

    def is_cut(self, edge: Edge, lane: int) -> bool:
        """Whether `edge` crosses from one party to another in `lane`."""
        return self.origin(edge, lane) != self.place(edge.target, lane)

    def carrier(self, edge: Edge, lane: int) -> Edge:
        """Return the edge on whose frame this edge's value travels: one frame per value and receiving party."""
        target = self.place(edge.target, lane)
        for other in self.edges:
            same = other.source == edge.source and self.origin(other, lane) == self.origin(edge, lane)
            if same and self.place(other.target, lane) == target:
                return other
        return edge

    def cuts(self, lane: int) -> tuple[Edge, ...]:
        """Return the edges of `lane` that cross between parties, in plan order."""
        return tuple(edge for edge in self.edges if self.is_cut(edge, lane))

    def holders(self, name: str) -> tuple[str, ...]:
        """Return the parties that a data owner's name stands for: itself, or those of the stage of that name."""
        return tuple(dict.fromkeys(self.by_name[name].places)) if name in self.by_name else (name,)

    def data_fields(self, lane: int) -> dict[str, tuple[str, ...]]:
        """Return, for each party that loads data in `lane`, the fields it loads, in plan order."""
        found: dict[str, dict[str, None]] = {}
        for edge in self.edges:
            if edge.source.field:
                found.setdefault(self.origin(edge, lane), {})[edge.source.field] = None
        return {party: tuple(fields) for party, fields in found.items()}

    @cached_property
    def data_holders(self) -> tuple[str, ...]:
        """Parties that load data, in any lane."""
        return tuple(dict.fromkeys(party for lane in range(self.lanes) for party in self.data_fields(lane)))

    @cached_property
    def lane_names(self) -> tuple[str, ...]:
        """Whose samples each lane's are: the parties that load them, and the lane's number where they have more."""
        names = [", ".join(self.data_fields(lane)) for lane in range(self.lanes)]
        return tuple(name if names.count(name) == 1 else f"{name} {lane}" for lane, name in enumerate(names))

    @cached_property
    def heights(self) -> tuple[dict[str, int], ...]:
        """Per lane: the largest number of cuts on a way from each stage to an end of the plan."""
        return tuple(_heights(self, lane) for lane in range(self.lanes))

    @cached_property
    def outputs(self) -> tuple[str, ...]:
        """Stages whose values a prediction gives: those that feed a loss directly."""
        feeding = {
            source.stage for s in self.stages if isinstance(s, Loss) for source in self.sources[s.name] if source.stage
        }
        return tuple(s.name for s in self.order if s.name in feeding)

    @cached_property
    def output_ports(self) -> dict[str, tuple[str, ...]]:
        """Return, for each of `outputs`, its ports that feed a loss, in the order of the stage's ports."""
        taken = {
            (source.stage, source.port)
            for s in self.stages
            if isinstance(s, Loss)
            for source in self.sources[s.name]
            if source.stage
        }
        return {name: tuple(p for p in self.by_name[name].ports if (name, p) in taken) for name in self.outputs}

    def ancestors(self, names: tuple[str, ...]) -> set[str]:
        """Return the stages that `names` need, themselves included."""
        need = set(names)
        for stage in reversed(self.order):
            if stage.name in need:
                need.update(source.stage for source in self.sources[stage.name] if source.stage)
        return need


def _heights(graph: Graph, lane: int) -> dict[str, int]:
    heights: dict[str, int] = {}
    for stage in reversed(graph.order):
        heights[stage.name] = max(
            (heights[e.target] + graph.is_cut(e, lane) for e in graph.consumers_of[stage.name]), default=0
        )
    return heights


def _check_inputs(graph: Graph) -> None:
    for stage in graph.stages:
        if not stage.inputs:
            raise PlanError(
                f"stage {stage.name!r} has no inputs",
                where=f"stage {stage.name}",
                remedy="give it a stage's name or 'data.FIELD'",
                code="E102",
            )
        for source in graph.sources[stage.name]:
            if source.stage and source.stage not in graph.by_name:
                raise PlanError(
                    f"stage {stage.name!r} takes {source.stage!r}, which the plan does not have",
                    where=f"stage {stage.name}, its inputs",
                    expected=f"one of {', '.join(sorted(graph.by_name))}, or data.{source.stage}",
                    remedy="correct the name, or add the stage",
                    code="E102",
                )
            if source.stage and isinstance(graph.by_name[source.stage], Loss):
                raise PlanError(
                    f"stage {stage.name!r} takes the loss {source.stage!r} as input",
                    where=f"stage {stage.name}, its inputs",
                    remedy="take the stage that feeds the loss instead",
                    code="E102",
                )
            if source.stage and source.port not in graph.by_name[source.stage].ports:
                raise _no_port(stage.name, source, tuple(graph.by_name[source.stage].ports))


def _no_port(stage: str, source: Source, ports: tuple[str, ...]) -> PlanError:
    named = [f"{source.stage}.{port}" if port else source.stage for port in ports]
    return PlanError(
        f"stage {stage!r} takes {source.stage + '.' + source.port if source.port else source.stage!r}, "
        f"which {source.stage!r} does not give",
        where=f"stage {stage}, its inputs",
        expected=f"one of {', '.join(named)}",
        remedy="name one of the stage's outputs",
        code="E102",
    )


def _topological(graph: Graph) -> tuple[Stage | Loss, ...]:
    done: dict[str, Stage | Loss] = {}
    waiting = list(graph.stages)
    while waiting:
        ready = next((s for s in waiting if all(not i.stage or i.stage in done for i in graph.sources[s.name])), None)
        if ready is None:
            names = ", ".join(s.name for s in waiting)
            raise PlanError(
                f"the stages {names} wait for each other (a cycle)",
                where="the inputs of these stages",
                remedy="remove one of their inputs, or cut the loop into two stages",
                code="E105",
            )
        done[ready.name] = ready
        waiting.remove(ready)
    return tuple(done.values())


def _trained(graph: Graph) -> dict[str, bool]:
    trained: dict[str, bool] = {}
    for stage in graph.order:
        before = any(
            trained[i.stage] and _differentiable(graph.by_name[i.stage], i.port)
            for i in graph.sources[stage.name]
            if i.stage
        )
        own = isinstance(stage, Stage) and not stage.frozen
        trained[stage.name] = (own or before) and any(_differentiable(stage, port) for port in stage.ports)
    return trained


def _differentiable(stage: Stage | Loss, port: str) -> bool:
    return stage.ports[port].floating and port not in stage.detached


def _edges(graph: Graph) -> list[Edge]:
    edges: list[Edge] = []
    for stage in graph.stages:
        for position, source in enumerate(graph.sources[stage.name]):
            spec, trained = _release_spec(graph, source), False
            if source.stage:
                origin = graph.by_name[source.stage]
                spec = origin.ports[source.port]
                trained = graph.trained[origin.name] and graph.trained[stage.name]
                trained = trained and _differentiable(origin, source.port)
            edge = Edge(len(edges), source, stage.name, position, spec, trained)
            crossing = graph.crossings.get(edge.origin) if source.stage else None
            edges.append(replace(edge, crossing=crossing) if crossing else edge)
    return edges


def _release_spec(graph: Graph, source: Source) -> TensorSpec | None:
    for release in graph.releases:
        if source.field == release.field and source.owner == release.at:
            return release.spec
    return None
