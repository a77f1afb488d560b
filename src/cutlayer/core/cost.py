"""What a run will send: closed form, from the plan and the numbers of samples alone.

An independent count of what the ledger measures: it uses no program, only cuts, specs and numbers of samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cutlayer.core.batching import lane_batches, microbatch_sizes
from cutlayer.core.compile import Roster, agenda
from cutlayer.core.graph import Edge, Graph
from cutlayer.core.parts import Training
from cutlayer.core.plan import Plan

__all__ = ["Flow", "cut_flows", "epoch_bytes"]


@dataclass(frozen=True)
class Flow:
    """Bytes and frames of one edge in one direction between two parties. Units: bytes of payload, frames."""

    sender: str
    receiver: str
    mode: str
    direction: str
    edge: int
    payload: int
    messages: int


def cut_flows(plan: Plan, roster: Roster) -> list[Flow]:
    """Return what all cuts of a whole training run carry, evaluations included; exchanges and framing not.

    With n samples a lane, E rounds and a spec of s bytes a sample, a cut carries E n s up and, where trained, E n s
    down (Singh et al. 2019, arXiv 1909.09145: 2pq an epoch). Where a spec has free dimensions this is the most that
    it can carry.
    """
    flows: list[Flow] = []
    rounds = [mode for mode, _ in agenda(plan, roster)]
    for mode in ("train", "evaluate"):
        if mode in rounds:
            flows += _mode_flows(plan, roster, mode, rounds.count(mode))
    return flows


def epoch_bytes(plan: Plan, roster: Roster, party: str) -> int:
    """Return the payload bytes that `party` sends over cuts in one training round."""
    return sum(flow.payload for flow in _mode_flows(plan, roster, "train", 1) if flow.sender == party)


def _mode_flows(plan: Plan, roster: Roster, mode: str, rounds: int) -> list[Flow]:
    graph, flows = plan.graph, list[Flow]()
    for lane, count in enumerate(roster.lane_counts(graph, mode)):
        samples, frames = _volume(count, plan.training, drop_last=plan.training.drop_last and mode == "train")
        for edge in graph.cuts(lane):
            origin, target = graph.origin(edge, lane), graph.place(edge.target, lane)
            up, down = (_each(edge, way) * samples * rounds for way in ("up", "down"))
            if _first(graph, edge, lane):
                flows.append(Flow(origin, target, mode, "up", edge.index, up, frames * rounds))
            if edge.trained and mode == "train":
                flows.append(Flow(target, origin, mode, "down", edge.index, down, frames * rounds))
    return flows


def _each(edge: Edge, direction: str) -> int:
    """Return the bytes of one sample of an edge on the wire."""
    spec = edge.wire(direction)
    return spec.nbytes(1) if spec else 0


def _volume(count: int, training: Training, *, drop_last: bool) -> tuple[int, int]:
    sizes = lane_batches(count, training.batch_size, drop_last)
    return sum(sizes), sum(len(microbatch_sizes(size, training.microbatches)) for size in sizes)


def _first(graph: Graph, edge: Edge, lane: int) -> bool:
    """Whether this edge is the first that takes its source's value to its party: later ones share the frame."""
    target = graph.place(edge.target, lane)
    earlier = graph.edges[: edge.index]
    return not any(other.source == edge.source and graph.place(other.target, lane) == target for other in earlier)


def by_key(flows: list[Flow]) -> Mapping[tuple[str, str, str, str, int], tuple[int, int]]:
    """Return (sender, receiver, mode, direction, edge) -> (payload, messages), lanes added up."""
    found: dict[tuple[str, str, str, str, int], tuple[int, int]] = {}
    for flow in flows:
        key = (flow.sender, flow.receiver, flow.mode, flow.direction, flow.edge)
        payload, messages = found.get(key, (0, 0))
        found[key] = (payload + flow.payload, messages + flow.messages)
    return found
