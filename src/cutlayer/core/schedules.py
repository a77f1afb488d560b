"""Schedules: pure functions from a graph and its microbatches to a total order of forwards and backwards.

GPipe (Huang et al. 2019, arXiv 1811.06965) runs all forwards, then all backwards. 1F1B (Narayanan et al. 2019,
PipeDream-flush, arXiv 2006.09503) lets each stage run `cuts to the end + 1` forwards ahead, then alternates, so a
stage holds at most that many activations. For a chain both give, per stage, the order of
`torch.distributed.pipelining`. All schedules add gradients in the same order, so they give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cutlayer.core.batching import StepSizes
from cutlayer.core.graph import Graph
from cutlayer.errors import ProgramError

__all__ = ["Action", "forwards_only", "grid", "schedule"]


@dataclass(frozen=True)
class Action:
    """One forward ("F") or backward ("B") of a stage on a microbatch of a lane. Prints as `head:F2`."""

    kind: str
    stage: str
    lane: int
    micro: int

    def __str__(self) -> str:
        """Return `stage:F2`, or `stage@1:F2` in lane 1."""
        return f"{self.stage}{f'@{self.lane}' if self.lane else ''}:{self.kind}{self.micro}"


Item = tuple[int, int]  # (lane, micro)
_Queue = tuple[str, list[Action]]  # (party, what one replica of one stage does, in order)


def schedule(graph: Graph, sizes: StepSizes, name: str) -> list[Action]:
    """Return the total order of a training step. `name` is one of "sequential", "gpipe", "1f1b"."""
    items = _items(sizes)
    if name == "sequential":
        return [action for item in items for action in _one_item(graph, item)]
    most = 1 + max((micro for _, micro in items), default=0)
    makers: dict[str, Callable[[int], int]] = {"gpipe": lambda _height: most, "1f1b": lambda height: height + 1}
    return _merge(graph, _queues(graph, items, makers[name]))


def forwards_only(graph: Graph, sizes: StepSizes, stages: set[str]) -> list[Action]:
    """Return the total order of an evaluation or prediction step: forwards, one microbatch after another."""
    return [
        Action("F", stage.name, lane, micro)
        for lane, micro in _items(sizes)
        for stage in graph.order
        if stage.name in stages
    ]


def grid(graph: Graph, actions: Sequence[Action]) -> str:
    """Return the order as a table: a row a party, a column a tick, `.` where a party waits."""
    rows: dict[str, list[str]] = {}
    done: dict[Action, int] = {}
    for action in actions:
        party = graph.place(action.stage, action.lane)
        row = rows.setdefault(party, [])
        start = max([len(row), *(done[need] + 1 for need in _needs(graph, action) if need in done)])
        row.extend("." * (start - len(row)))
        row.append(str(action))
        done[action] = start
    width = max((len(cell) for row in rows.values() for cell in row), default=1)
    head = max((len(party) for party in rows), default=1)
    return "\n".join(
        f"{party:<{head}} | " + " ".join(f"{cell:<{width}}" for cell in row).rstrip() for party, row in rows.items()
    )


def _items(sizes: StepSizes) -> list[Item]:
    most = max((len(parts) for parts in sizes if parts), default=0)
    return [
        (lane, micro)
        for micro in range(most)
        for lane, parts in enumerate(sizes)
        if parts is not None and micro < len(parts)
    ]


def _one_item(graph: Graph, item: Item) -> list[Action]:
    forward = [Action("F", stage.name, *item) for stage in graph.order]
    backward = [Action("B", stage.name, *item) for stage in reversed(graph.order) if graph.trained[stage.name]]
    return forward + backward


def _queues(graph: Graph, items: list[Item], warm_up: Callable[[int], int]) -> list[_Queue]:
    """Return what each replica does, in order: a forward is `warm_up` microbatches of its lane ahead of a backward.

    The height of a stage is its largest in any lane. So no stage is less far ahead than those after it, whatever the
    lanes are, and the queues cannot wait for each other.
    """
    queues: list[_Queue] = []
    for stage in graph.order:
        lanes = sorted({lane for lane, _ in items}) if stage.replicated else [None]
        for lane in lanes:
            mine = [item for item in items if lane is None or item[0] == lane]
            ahead = warm_up(max(heights[stage.name] for heights in graph.heights))
            trained = graph.trained[stage.name]
            actions = [Action("F", stage.name, *item) for item in mine if item[1] < ahead or not trained]
            for at, micro in mine if trained else ():
                actions.append(Action("B", stage.name, at, micro))
                if (at, micro + ahead) in mine:
                    actions.append(Action("F", stage.name, at, micro + ahead))
            queues.append((graph.place(stage.name, mine[0][0]), actions))
    return queues


def _merge(graph: Graph, queues: list[_Queue]) -> list[Action]:
    """Interleave the stages' own orders: in each tick, each party runs the first of its actions that is ready."""
    order: list[Action] = []
    done: set[Action] = set()
    places = [0] * len(queues)
    while any(place < len(actions) for place, (_, actions) in zip(places, queues, strict=True)):
        tick: dict[str, int] = {}
        for index in _by_urgency(queues, places):
            party, actions = queues[index]
            if party not in tick and all(need in done for need in _needs(graph, actions[places[index]])):
                tick[party] = index
        if not tick:
            stuck = ", ".join(str(a[p]) for p, (_, a) in zip(places, queues, strict=True) if p < len(a))
            raise ProgramError(
                "the schedule cannot go on", where=f"next: {stuck}", remedy="report this plan", code="E401"
            )
        for index in sorted(tick.values()):
            action = queues[index][1][places[index]]
            order.append(action)
            places[index] += 1
        done.update(order[len(order) - len(tick) :])
    return order


def _by_urgency(queues: list[_Queue], places: list[int]) -> list[int]:
    """Return the unfinished queues: backwards first (they free memory), then in plan order."""
    left = [index for index, (_, actions) in enumerate(queues) if places[index] < len(actions)]
    return sorted(left, key=lambda index: (queues[index][1][places[index]].kind != "B", index))


def _needs(graph: Graph, action: Action) -> list[Action]:
    if action.kind == "F":
        return [
            Action("F", source.stage, action.lane, action.micro)
            for source in graph.sources[action.stage]
            if source.stage
        ]
    after = [
        Action("B" if edge.trained else "F", edge.target, action.lane, action.micro)
        for edge in graph.consumers_of[action.stage]
    ]
    return [Action("F", action.stage, action.lane, action.micro), *after]
