"""Which values that cross a cut a gradient comes back to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cutlayer.models.cut import Cut, Piece
from cutlayer.models.kinds import writes
from cutlayer.models.steps import PieceModule, Step, refs

__all__ = ["reached"]

_CHANCES = 10  # runs, where a submodule may have left a branch out by chance
_OPAQUE = ("NotImplemented", "Error", "DelayedError")  # nodes of autograd whose backward raises


def reached(cut: Cut, inputs: Mapping[str, Tensor]) -> tuple[set[str], list[tuple[Tensor, ...]]]:
    """Return each "PIECE.PORT" that a gradient comes back to, over a cut; and the outputs of each piece.

    One run tells, by the graph of autograd. Only where the steps of the pieces would let a gradient through, and one of
    their submodules did not, there are more: it may leave a branch out by chance.

    Args:
        cut: The cut model, in train mode. Its buffers and random generators move on.
        inputs: The model's inputs by argument name, each of shape (batch, ...).
    """
    open_ = _open(cut.pieces)
    able, found, outputs = _once(cut.pieces, inputs)
    for _ in range(_CHANCES - 1):
        if able & open_ <= found:
            break
        more_able, more, _ = _once(cut.pieces, inputs)
        able, found = able | more_able, found | more
    return found, outputs


def _once(pieces: Sequence[Piece], inputs: Mapping[str, Tensor]) -> tuple[set[str], set[str], list[tuple[Tensor, ...]]]:
    """Return each "PIECE.PORT" that could have a gradient, those that one comes back to, and the outputs."""
    known = {f"data.{name}": value for name, value in inputs.items()}
    crossed: list[tuple[str, Tensor, Any]] = []
    able: set[str] = set()
    outputs: list[tuple[Tensor, ...]] = []
    for index, piece in enumerate(pieces):
        taken = [known[source].clone() for source in piece.inputs]  # what a piece does itself with it is another way
        crossed += [
            (source, value, value.grad_fn)
            for source, value in zip(piece.inputs, taken, strict=True)
            if value.requires_grad
        ]
        given = piece.module(*taken)
        outputs.append(given if isinstance(given, tuple) else (given,))
        ports = {f"{index}.{port}": value for port, value in zip(piece.outputs, outputs[-1], strict=True)}
        known |= ports
        able |= {port for port, value in ports.items() if value.requires_grad}
    last = outputs[-1][0]
    if not (last.requires_grad and crossed):
        return able, able, outputs
    return able, _arrived(last, crossed, able) | {f"{len(pieces) - 1}.{pieces[-1].outputs[0]}"}, outputs


def _arrived(last: Tensor, crossed: Sequence[tuple[str, Tensor, Any]], able: set[str]) -> set[str]:
    """Return the sources that a gradient of `last` comes back to: by a walk, or by a backward."""
    nodes = _nodes_behind(last)
    if not any(_tells_nothing(node) for node in nodes):
        return {source for source, _, node in crossed if node in nodes}
    try:
        gradients: Sequence[Tensor | None] = torch.autograd.grad(
            last, [value for _, value, _ in crossed], torch.ones_like(last), allow_unused=True
        )
    except Exception:  # a backward of the model's own code: where it fails, training names the stage
        return able
    return {source for (source, *_), gradient in zip(crossed, gradients, strict=True) if gradient is not None}


def _nodes_behind(value: Tensor) -> set[Any]:
    """Return the nodes of autograd that a backward of `value` goes through."""
    found, todo = set[Any](), [value.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in found:
            found.add(node)
            todo += [before for before, _ in node.next_functions]
    return found


def _tells_nothing(node: Any) -> bool:  # noqa: ANN401
    """Say whether a node may give no gradient to what it is made of: a function of the user's, or one without any."""
    return isinstance(node, torch.autograd.function.BackwardCFunction) or type(node).__name__ in _OPAQUE


def _open(pieces: Sequence[Piece]) -> set[str]:
    """Return each "PIECE.PORT" that a gradient might come back to, if all submodules let one through."""
    found = {f"{len(pieces) - 1}.{pieces[-1].outputs[0]}"}
    for index in reversed(range(len(pieces))):
        piece = pieces[index]
        if not isinstance(piece.module, PieceModule):
            found |= set(piece.inputs)
            continue
        todo = piece.module.routines[True]
        used = {name for name, port in zip(todo.results, piece.outputs, strict=True) if f"{index}.{port}" in found}
        used = _used(todo.steps, used)
        found |= {source for source, name in zip(piece.inputs, todo.entries, strict=True) if name in used}
    return found


def _used(steps: Sequence[Step], results: Iterable[str]) -> set[str]:
    """Return the names that results are made of with a gradient; all where one may be written to another."""
    if any(_may_mix(step) for step in steps):
        return {name for step in steps for name in refs(step)} | set(results)
    used = set(results)
    for step in reversed(steps):
        if step.name in used and not _shut(step):
            used |= set(refs(step))
    return used


def _may_mix(step: Step) -> bool:
    """Say whether a step may write one value into another, in place."""
    return len(list(refs(step))) > 1 if step.op == "module" else writes(step, {})


def _shut(step: Step) -> bool:
    """Say whether a step lets no gradient through: it runs under `no_grad`, or detaches."""
    taken = step.target == "detach" if step.op == "method" else step.target in (torch.detach, torch.Tensor.detach)
    return taken or "no_grad" in step.contexts or (step.target is getattr and step.args[1] == "data")
