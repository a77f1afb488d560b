"""One block of all parties' programs: where the sends and receives go around each forward and backward of a step."""

from __future__ import annotations

from dataclasses import dataclass, field

from cutlayer.core.batching import StepSizes
from cutlayer.core.graph import Edge, Graph
from cutlayer.core.parts import Loss
from cutlayer.core.program import Backward, Credit, Direction, Forward, Instruction, Recv, Send
from cutlayer.core.schedules import Action
from cutlayer.errors import PlanError

__all__ = ["Blocks", "Emitter", "add_credits", "held_fields"]


@dataclass
class Blocks:
    """One block, for all parties."""

    name: str
    repeat: int = 1
    per_party: dict[str, list[Instruction]] = field(default_factory=dict)

    def add(self, party: str, instruction: Instruction) -> None:
        """Put an instruction at the end of a party's part."""
        self.per_party.setdefault(party, []).append(instruction)


class Emitter:
    """Puts the sends and receives around each action of one step."""

    def __init__(self, graph: Graph, sizes: StepSizes, block: Blocks, active: set[str]) -> None:
        """Begin a step of these `sizes`, in which the stages of `active` run."""
        self.graph, self.sizes, self.block, self.active = graph, sizes, block, active
        self.gone: set[tuple[int, int, int]] = set()
        self.arrived: set[tuple[int, int, int]] = set()
        self.totals = sum(sum(parts) for parts in sizes if parts)

    def emit(self, action: Action) -> None:
        """Add what an action needs, the action, and what it gives."""
        if action.kind == "F":
            self._forward(action)
        else:
            self._backward(action)

    def _forward(self, action: Action) -> None:
        graph, lane, micro = self.graph, action.lane, action.micro
        size = self._size(action)
        here = graph.place(action.stage, lane)
        for edge in graph.inputs_of[action.stage]:
            carrier = graph.carrier(edge, lane)
            if graph.is_cut(edge, lane) and (carrier.index, lane, micro) not in self.arrived:
                self.arrived.add((carrier.index, lane, micro))
                origin = graph.origin(edge, lane)
                if edge.source.field:
                    self.block.add(origin, Send(carrier.index, lane, micro, size, "up", here))
                self.block.add(here, self._recv(carrier, action, "up", origin))
        self.block.add(here, Forward(action.stage, lane, micro, size))
        for edge in graph.consumers_of[action.stage]:
            number = graph.carrier(edge, lane).index
            if edge.target in self.active and graph.is_cut(edge, lane) and (number, lane, micro) not in self.gone:
                self.gone.add((number, lane, micro))
                self.block.add(here, Send(number, lane, micro, size, "up", graph.place(edge.target, lane)))

    def _backward(self, action: Action) -> None:
        graph, lane, micro = self.graph, action.lane, action.micro
        here, stage = graph.place(action.stage, lane), graph.by_name[action.stage]
        for edge in graph.consumers_of[action.stage]:
            if edge.trained and graph.is_cut(edge, lane):
                self.block.add(here, self._recv(edge, action, "down", graph.place(edge.target, lane)))
        scale = self._scale(stage, self._size(action)) if isinstance(stage, Loss) else 1.0
        self.block.add(here, Backward(action.stage, lane, micro, scale))
        for edge in graph.inputs_of[action.stage]:
            if edge.trained and graph.is_cut(edge, lane):
                origin = graph.origin(edge, lane)
                self.block.add(here, Send(edge.index, lane, micro, self._size(action), "down", origin))

    def _recv(self, edge: Edge, action: Action, direction: Direction, source: str) -> Recv:
        spec = edge.wire(direction)
        if spec is None:
            raise PlanError(
                f"the field {edge.source.field!r} has no release",
                where=edge.label,
                remedy="declare the release in the plan",
                code="E107",
            )
        return Recv(edge.index, action.lane, action.micro, self._size(action), direction, source, spec)

    def _scale(self, stage: Loss, size: int) -> float:
        return stage.weight * size / self.totals if stage.reduction == "mean" else stage.weight

    def _size(self, action: Action) -> int:
        return (self.sizes[action.lane] or ())[action.micro]


def held_fields(graph: Graph, lane: int, stages: set[str]) -> dict[str, tuple[str, ...]]:
    """Return, for each party that loads data for these stages in `lane`, the fields it loads, in plan order."""
    found: dict[str, dict[str, None]] = {}
    for edge in graph.edges:
        if edge.source.field and edge.target in stages:
            found.setdefault(graph.origin(edge, lane), {})[edge.source.field] = None
    return {party: tuple(fields) for party, fields in found.items()}


def add_credits(block: Blocks, window: int) -> None:
    """Bound the memory of pairs in which one side only receives: see `Credit`."""
    ways = {
        (party, instruction.to)
        for party, instructions in block.per_party.items()
        for instruction in instructions
        if isinstance(instruction, Send)
    }
    for sender, receiver in sorted(ways):
        if (receiver, sender) not in ways:
            block.per_party[sender].insert(0, Credit(receiver, window, give=False))
            block.add(receiver, Credit(sender, window, give=True))
