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


def blamed(
    error: NonFiniteError, values: Values, lane: int, micro: int, seen: Sequence[Tensor], *, trained: bool, mixed: bool
) -> NonFiniteError:
    """Return the error that names the fields which hold a NaN or an infinity; `error` itself if none does.

    A model may well take missing values, so the fields alone are named only where they are the likely cause: the
    samples that are not finite in `seen` are among theirs. Else they are named beside the advice of `error`, the
    likelier first.

    Args:
        error: What was found at a cut or of a loss.
        values: Those of the step, with this party's own data: fields of shape (samples, ...).
        lane: Of the microbatch that they belong to.
        micro: That microbatch.
        seen: The tensor at the cut, or what the loss was given: of shape (samples, ...).
        trained: Whether weights have been trained in this run, so that the learning rate may be the cause.
        mixed: Whether a module of this party lets samples of a batch bear on each other (BatchNorm).

    Returns:
        Of the fields this side is told names and numbers of samples; the others only the names, never a value.
    """
    held = {name: _rows(value) for name, value in own_fields(values, lane, micro).items()}
    found = {name: text for name, rows in held.items() if (text := _bad(rows))}
    if not found:
        return error
    graph, names = values.graph, ", ".join(found)
    own = [edge for edge in graph.edges if edge.source.field in found and graph.origin(edge, lane) == values.party]
    fill = "; ".join(_fill(name, graph, own, "NaN" in text) for name, text in found.items())
    first, alone = _likely(torch.stack([held[name].any(0) for name in found]).any(0), seen, trained, mixed)
    what, remedy = f"the data hold a NaN or an infinity in {names}, and so: {error.what}", fill
    if not alone:
        what = f"{error.what}; the data hold one too, in {names}"
        remedy = f"{fill}; if the model takes such data, {error.remedy}"
        if not first:
            remedy = f"{error.remedy}; if the model does not take such data, {fill}"
    got = ", ".join(f"{name}: {text}" for name, text in found.items())
    return NonFiniteError(what, where=error.where, expected=error.expected, got=got, remedy=remedy, code=error.code)


def _likely(data: Tensor, seen: Sequence[Tensor], trained: bool, mixed: bool) -> tuple[bool, bool]:
    """Return whether the samples of `data` are the likelier cause of what is in `seen`, and whether the only one."""
    rows = [_rows(value).any(0) for value in seen if value.dim() and len(value) == len(data)]
    bad = torch.stack(rows).any(0) if rows else torch.ones_like(data)
    if not bad.any():
        return False, False  # a loss that makes it of finite numbers
    beyond = bool((bad & ~data).any())
    if beyond:
        return mixed or not trained, False
    return not (trained and data.all()), not (trained and data.all())


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


def _rows(value: Tensor) -> Tensor:
    """Return for each sample whether it holds a NaN, and whether an infinity: bool of shape (2, samples), on the CPU.

    Both are False where the dtype has neither.
    """
    if not value.is_floating_point() or not value.numel():
        return torch.zeros(2, len(value), dtype=torch.bool)
    rows = value.detach().reshape(len(value), -1)
    return torch.stack([torch.isnan(rows).any(1), torch.isinf(rows).any(1)]).cpu()


def _bad(rows: Tensor) -> str:
    """Return how many samples of a field hold a NaN or an infinity; empty if none does."""
    counts = zip(("NaN", "an infinity"), rows.sum(1).tolist(), strict=True)
    said = [f"{what} in {count} of {rows.shape[1]} samples" for what, count in counts if count]
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
