"""The order of a tensor's dimensions in memory: what crosses a cut arrives contiguous, and is laid out again.

An operation may add in another order, and so give other last bits, for a transposed tensor than for a contiguous one.
So a piece lays out what comes in as the uncut model has it at this place. Nothing on the wire changes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from cutlayer.models.record import Trace
from cutlayer.models.steps import Ref, Step

__all__ = ["laid_out"]


def laid_out(entries: Iterable[str], trace: Trace) -> tuple[Step, ...]:
    """Return the steps that lay out a piece's inputs as they are in the uncut model, each under its own name."""
    orders = {name: _order(trace.values.get(name)) for name in entries if name not in trace.inputs}
    return tuple(Step(name, "function", _lay_out, (Ref(name), order)) for name, order in orders.items() if order)


def _order(value: Any) -> tuple[int, ...]:  # noqa: ANN401
    """Return a transposed tensor's dimensions as they follow in memory; () if it is contiguous or has gaps."""
    if not isinstance(value, Tensor) or value.is_contiguous():
        return ()
    strides = value.stride()
    order = tuple(sorted(range(value.dim()), key=lambda dim: -strides[dim]))
    return order if value.permute(order).is_contiguous() else ()


def _lay_out(value: Tensor, order: tuple[int, ...]) -> Tensor:
    """Return `value`, of the same shape, with its dimensions in this order in memory."""
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return value.permute(order).contiguous().permute(inverse)
