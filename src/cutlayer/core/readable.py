"""Which data can be read from gradients: seen from the plan alone.

The gradient at a loss's input is computed from that input and the labels, so whoever gives the input and gets the
gradient can read them: with cross-entropy it is what was predicted, minus one at the label. A stage with weights that
the giver does not have must be between: it can undo one whose weights it has, and gets there as well. It has those of a
stage that it runs too, since replicas are equal; of one whose weight gradients it adds up (with what it sent there and
got back, they tell what it would get behind it); and of all stages if the model is assembled at it, at the end.

A loss's other inputs are in that gradient too, each as what it is made of: a field, or what a stage makes of fields.

What is inside a stage is not seen here, nor which weights are known to all since they come from one file or seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from cutlayer.core.graph import Edge, Graph
from cutlayer.core.parts import Loss, Stage

if TYPE_CHECKING:
    from cutlayer.core.plan import Plan

__all__ = ["READABLE_REMEDY", "Readable", "readable", "treated", "warnings_of"]

READABLE_REMEDY: Final = (
    "put a stage with weights, at the party of the loss, before the loss (a tail), which the reader neither runs, nor "
    "is the hub of, nor gets by assemble_at; or blur the gradient (gradient_defences of a crossing: it is told, and "
    "this warning stays); or, if the field may be known, declare a release of it"
)


@dataclass(frozen=True)
class Readable:
    """A field that a party can read from a gradient that it gets, at an input of a loss or of a stage before it.

    Attributes:
        field: Name of the data field, usually a label.
        holder: The party that holds it.
        reader: The party that gets the gradient; the field is not sent to it.
        edge: Where the gradient is: the input of a loss, or of the first stage before it.
        through: Why the stages between hide nothing from the reader, in words; empty: there is none.
        declared: Whether a release allows the reader to have the field.
        made: The stage whose output can be read, with nothing of the plan between the field and it but stages of the
            holder, which may have no weights (a one-hot coding); empty: the field itself can be read.
    """

    field: str
    holder: str
    reader: str
    edge: Edge
    through: str
    declared: bool
    made: str = ""


def readable(plan: Plan) -> tuple[Readable, ...]:
    """Return what each party can read of others' data in gradients, in plan order; once, if in several lanes."""
    graph, found = plan.graph, dict[Readable, None]()
    for lane in range(graph.lanes):
        for edge in graph.edges:
            reader = graph.origin(edge, lane)
            if not graph.is_cut(edge, lane):
                continue
            for loss, reasons in _reached(plan, graph, lane, edge, reader).items():
                for holder, field, made in _given(graph, lane, loss, reader):
                    declared = _declared(graph, lane, field, (holder, reader))
                    found[Readable(field, holder, reader, edge, " and ".join(reasons), declared, made)] = None
    return tuple(found)


def _given(graph: Graph, lane: int, loss: str, reader: str) -> list[tuple[str, str, str]]:
    """Return the fields of others that a loss takes, and that stages make its inputs of: holder, field, that stage."""
    taken = graph.inputs_of[loss]
    plain = {(graph.origin(edge, lane), edge.source.field, ""): None for edge in taken if edge.source.field}
    made = {
        (graph.origin(edge, lane), field, edge.source.stage): None
        for edge in taken
        if edge.source.stage and not _comes(graph, lane, edge, reader)
        for field in _behind(graph, lane, edge.source.stage)
        if (graph.origin(edge, lane), field, "") not in plain
    }
    return [one for one in (plain | made) if one[0] != reader and not _sent(graph, lane, one[1], (one[0], reader))]


def _behind(graph: Graph, lane: int, stage: str) -> dict[str, None]:
    """Return the fields that a stage's party has, and that it and stages of the same party make its output of."""
    found = dict[str, None]()
    for edge in graph.inputs_of[stage]:
        if not graph.is_cut(edge, lane):
            found |= _behind(graph, lane, edge.source.stage) if edge.source.stage else {edge.source.field: None}
    return found


def _comes(graph: Graph, lane: int, edge: Edge, reader: str) -> bool:
    """Whether a party gets the value of an edge anyway: the plan says so."""
    return any(other.source == edge.source and graph.place(other.target, lane) == reader for other in graph.edges)


def warnings_of(plan: Plan) -> list[str]:
    """Return in words what can be read and is not declared: the plan's author may not know it."""
    return [
        f"{one.reader} can read {f'what {one.made} makes of ' if one.made else ''}data.{one.field} of {one.holder} "
        f"from the gradient at {one.edge.label}{treated(one.edge, 'down')}: "
        f"{one.through or 'no stage of another party is between'}"
        for one in readable(plan)
        if not one.declared
    ]


def treated(edge: Edge, direction: str) -> str:
    """Return " (WORDS)" of what is done to what crosses an edge in a direction; empty: nothing."""
    words = edge.crossing.words(direction) if edge.crossing else ""
    return f" ({words})" if words else ""


def _reached(plan: Plan, graph: Graph, lane: int, cut: Edge, reader: str) -> dict[str, tuple[str, ...]]:
    """Return each loss behind a cut from which gradients come to the reader through no stage but ones it can undo.

    With it, why it can undo those between. What comes back through a stage of the reader's own crosses to it there.
    """
    waiting: list[tuple[Edge, tuple[str, ...]]] = [(cut, ())]
    seen, found = set[str](), dict[str, tuple[str, ...]]()
    for edge, reasons in waiting:
        name = edge.target
        if not edge.trained or name in seen:
            continue
        seen.add(name)
        if isinstance(graph.by_name[name], Loss):
            found[name] = reasons
        elif graph.place(name, lane) != reader and (reason := _undone(plan, graph.by_name[name], reader)):
            waiting += [(following, (*reasons, reason)) for following in graph.consumers_of[name]]
    return found


def _undone(plan: Plan, stage: Stage | Loss, reader: str) -> str:
    """Return why a party can undo another's stage, in words; empty: it does not have its weights."""
    name = stage.name
    if reader in stage.places:
        return f"{reader} runs {name} too"
    added = plan.training.order == "parallel" and plan.lanes > 1 and stage.replicated and not stage.frozen
    if added and plan.hub_of(name) == reader:
        return f"weight gradients of {name} go by way of {reader}"
    return f"{reader} gets the weights of {name} at the end" if reader in plan.assemble_at else ""


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
