"""Prediction of a trained plan: what leaves each party then. No gradients, and no labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from cutlayer.core.describe import keeps, size_of, what_of
from cutlayer.core.graph import Edge, Graph
from cutlayer.core.plan import Plan

__all__ = ["describe_prediction", "prediction_bytes"]


def describe_prediction(plan: Plan, party: str) -> str:
    """Return what `party` runs, sends, gets and keeps in a joint prediction. No gradients and no labels are in it."""
    graph, batch = plan.graph, plan.training.batch_size
    active = graph.ancestors(graph.outputs)
    cuts = list(_crossing(graph, active))
    gets = [(carrier, graph.origin(e, lane)) for carrier, e, lane in cuts if graph.place(e.target, lane) == party]
    runs = [s.name for s in plan.stages if s.name in active and party in s.places]
    lanes = range(graph.lanes)
    fields = [e for e in graph.edges if e.source.field and e.target in active]
    own = any(graph.origin(e, lane) == party for e in fields for lane in lanes)
    number = ["its number of samples, once, to all parties"] if own and len(plan.parties) > 1 else []
    sends = [*_grouped(_leaving(graph, cuts, party), "to", batch), *number]
    return _text(plan, party, runs, sends, _grouped(gets, "from", batch))


def prediction_bytes(plan: Plan, party: str, samples: int) -> int:
    """Return the most bytes of tensors that `party` sends in a joint prediction, if each replica has `samples`."""
    graph = plan.graph
    sent = {
        (carrier.index, lane, peer): wire.nbytes(samples) if (wire := carrier.wire()) else 0
        for carrier, edge, lane in _crossing(graph, graph.ancestors(graph.outputs))
        for peer in [graph.place(edge.target, lane)]
        if graph.origin(edge, lane) == party
    }
    return sum(sent.values())


def _crossing(graph: Graph, active: set[str]) -> Iterator[tuple[Edge, Edge, int]]:
    """Yield the cuts before active stages: the edge whose frame carries the value, the edge itself, and the lane."""
    for lane in range(graph.lanes):
        for edge in graph.edges:
            if edge.target in active and graph.is_cut(edge, lane):
                yield graph.carrier(edge, lane), edge, lane


def _leaving(graph: Graph, cuts: Iterable[tuple[Edge, Edge, int]], party: str) -> list[tuple[Edge, str]]:
    return [(carrier, graph.place(e.target, lane)) for carrier, e, lane in cuts if graph.origin(e, lane) == party]


def _grouped(flows: Iterable[tuple[Edge, str]], word: str, batch: int) -> list[str]:
    """Return a line for each value, with all its peers."""
    peers: dict[str, dict[str, None]] = {}
    for edge, peer in flows:
        size = size_of(edge, "up", batch)
        peers.setdefault(f"{what_of(edge)} {word} {{}}{size and ': '}{size}", {})[peer] = None
    return [line.format(", ".join(names)) for line, names in peers.items()]


def _text(plan: Plan, party: str, runs: list[str], sends: list[str], gets: list[str]) -> str:
    kept = [*keeps(plan, party), *(["its weights"] if "its weights" not in keeps(plan, party) else [])]
    lines = [party, f"  runs    {', '.join(runs) or 'nothing'}"]
    lines += [f"  sends   {line}" for line in sends or ["nothing"]]
    lines += [f"  gets    {line}" for line in gets]
    return "\n".join([*lines, f"  keeps   {', '.join(kept)}; no gradients are sent"])
