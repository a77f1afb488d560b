"""What an error of a tensor has to do with the data: fields that are not finite, labels whose classes were agreed on.

| code | error | meaning |
| --- | --- | --- |
| E351 | NonFiniteError | the data hold a NaN or an infinity, and so does a tensor at a cut or a loss |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cutlayer.core.graph import Edge, Graph
from cutlayer.core.parts import Loss
from cutlayer.engine.agree import Agreed
from cutlayer.engine.values import Values, own_fields
from cutlayer.errors import NonFiniteError, StageError

__all__ = ["blamed", "with_classes"]


def blamed(error: NonFiniteError, values: Values, lane: int, micro: int) -> NonFiniteError:
    """Return the error that names the fields which hold a NaN or an infinity; `error` itself if none does.

    Args:
        error: What was found at a cut or of a loss.
        values: Those of the step, with this party's own data: fields of shape (samples, ...).
        lane: Of the microbatch that they belong to.
        micro: That microbatch.

    Returns:
        Of the fields this side is told names and numbers of samples; the others only the names, never a value.
    """
    found = {name: text for name, value in own_fields(values, lane, micro).items() if (text := _bad(value))}
    if not found:
        return error
    graph = values.graph
    own = [edge for edge in graph.edges if edge.source.field in found and graph.origin(edge, lane) == values.party]
    return NonFiniteError(
        f"the data hold a NaN or an infinity in {', '.join(found)}, and so: {error.what}",
        where=error.where,
        expected=error.expected,
        got=", ".join(f"{name}: {text}" for name, text in found.items()),
        remedy="; ".join(_fill(name, graph, own, "NaN" in text) for name, text in found.items()),
        code=error.code,
    )


def with_classes(error: StageError, inputs: Sequence[Edge], agreed: Mapping[str, Agreed]) -> StageError:
    """Return E307 with the number of classes that the parties agreed on for a loss's label; other errors as they are.

    The number stays at this side, in `got`; the classes themselves are in nobody's message.
    """
    label = inputs[-1].source.field if inputs else ""
    known = agreed.get(label)
    if error.code != "E307" or known is None or known.kind != "classes":
        return error
    return StageError(
        error.what,
        where=error.where,
        expected=error.expected,
        got=f"{error.got}; the parties agreed on {len(known.values)} classes of {label}",
        remedy=f"{error.remedy}; the classes of {label} are its values in sorted order, 0 the first: "
        f"`Result.agreed` lists them after a run, and PARTY.preprocessing.json in the run's folder",
        code=error.code,
    )


def _bad(value: Tensor) -> str:
    """Return how many samples of a field hold a NaN or an infinity; empty if none does, or if it cannot."""
    if not value.is_floating_point() or not value.numel():
        return ""
    rows = value.reshape(len(value), -1)
    counts = {"NaN": int(torch.isnan(rows).any(1).sum()), "an infinity": int(torch.isinf(rows).any(1).sum())}
    said = [f"{what} in {count} of {len(value)} samples" for what, count in counts.items() if count]
    return f"{' and '.join(said)} of this microbatch" if said else ""


def _fill(name: str, graph: Graph, own: Sequence[Edge], missing: bool) -> str:
    stages = [edge.target for edge in own if edge.source.field == name]
    if any(isinstance(graph.by_name[stage], Loss) for stage in stages):
        return f"leave out the samples that have no {name}"
    if not missing:
        return f"correct {name}, or leave these samples out"
    stage = stages[0]
    return (
        f'fill {name} with the mean of its column: [[preprocessing]] field = "{name}", at = "{stage}", kind = "scale" '
        f'in the contract, Shared("{name}", at="{stage}") in a plan; or leave these samples out'
    )
