"""Which data can be read from gradients: seen from the graph alone.

The gradient at a loss's input is computed from that input and the labels, so whoever gives the input and gets the
gradient can read them: with cross-entropy it is what was predicted, minus one at the label. A stage with weights that
the giver does not have must be between. What is inside a stage is not seen here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cutlayer.core.graph import Edge, Graph
from cutlayer.core.parts import Loss

__all__ = ["READABLE_REMEDY", "Readable", "readable", "warnings_of"]

READABLE_REMEDY: Final = (
    "put a stage with weights, at the party of the loss, before the loss (a tail); or, if it may be known, declare "
    "a release of it"
)


@dataclass(frozen=True)
class Readable:
    """A field that a party can read from the gradient that it gets at an input of a loss.

    Attributes:
        field: Name of the data field, usually a label.
        holder: The party that holds it.
        reader: The party that gets the gradient; the field is not sent to it.
        edge: The loss's input.
        declared: Whether a release allows the reader to have the field.
    """

    field: str
    holder: str
    reader: str
    edge: Edge
    declared: bool


def readable(graph: Graph) -> tuple[Readable, ...]:
    """Return what each party can read of others' data in gradients, in plan order; once, if in several lanes."""
    found: dict[Readable, None] = {}
    for lane in range(graph.lanes):
        for edge in graph.edges:
            if not (edge.trained and isinstance(graph.by_name[edge.target], Loss) and graph.is_cut(edge, lane)):
                continue
            reader = graph.origin(edge, lane)
            for taken in graph.inputs_of[edge.target]:
                holder, field = graph.origin(taken, lane), taken.source.field
                if field and holder != reader and not _sent(graph, lane, field, (holder, reader)):
                    declared = _declared(graph, lane, field, (holder, reader))
                    found[Readable(field, holder, reader, edge, declared)] = None
    return tuple(found)


def warnings_of(graph: Graph) -> list[str]:
    """Return in words what can be read and is not declared: the plan's author may not know it."""
    return [
        f"{one.reader} can read data.{one.field} of {one.holder} from the gradient at {one.edge.label}: "
        "no stage of another party is between"
        for one in readable(graph)
        if not one.declared
    ]


def _sent(graph: Graph, lane: int, field: str, way: tuple[str, str]) -> bool:
    return any(
        edge.source.field == field and (graph.origin(edge, lane), graph.place(edge.target, lane)) == way
        for edge in graph.edges
    )


def _declared(graph: Graph, lane: int, field: str, way: tuple[str, str]) -> bool:
    return any(
        release.field == field
        and (graph.place(release.at, lane) if release.at in graph.by_name else release.at, release.to) == way
        for release in graph.releases
    )
