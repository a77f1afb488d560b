"""What each piece computes for itself: sizes, constants, buffers, and what follows from them alone.

A size of a tensor that the piece does not have is found from what it has: the batch from any of its inputs, a size that
is the same for all batches as a constant. The piece that has the tensor then checks that the size stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cutlayer.errors import StageError
from cutlayer.models.flow import Flow
from cutlayer.models.kinds import is_size
from cutlayer.models.record import Trace
from cutlayer.models.steps import Ref, Step, hold, refs

__all__ = ["BATCHES", "complete"]

BATCHES = (3, 2)  # samples of the two examples that tell a size that follows the batch from one that does not
_PLACES = ("device", "is_cuda", "is_cpu", "is_meta", "get_device", "layout")


def complete(flow: Flow, twin: Trace | None) -> list[tuple[Step, ...]]:
    """Return the steps of each piece: its own, and before their first use those that it computes for itself.

    Args:
        flow: The placed steps, traced with `BATCHES[0]` samples if there is an example.
        twin: The same model traced with `BATCHES[1]` samples; None without an example.

    Raises:
        StageError: a piece needs a size that nothing in it tells (E315).
    """
    checks: dict[int, dict[str, Step]] = {}
    pieces = [_complete(flow, twin, piece, checks) for piece in range(len(flow.points) + 1)]
    return [(*steps, *checks.get(piece, {}).values()) for piece, steps in enumerate(pieces)]


def _complete(flow: Flow, twin: Trace | None, piece: int, checks: dict[int, dict[str, Step]]) -> list[Step]:
    own, inputs = flow.of_piece(piece), flow.needs(piece)
    free = {step.name: step for step in flow.trace.steps if step.name in flow.derived or step.op == "state"}
    have = {*inputs, *(step.name for step in own)}
    have |= {name for step in own for name in refs(step) if name in free and free[name].op == "state"}
    done: dict[str, Step] = {}

    def add(step: Step) -> None:
        for name in refs(step):
            if name in free and name not in done:
                needed = free[name]
                base = next(refs(needed), "") if is_size(needed) else ""
                if base and base not in have and base not in flow.derived:
                    needed = _from_elsewhere(flow, twin, needed, inputs, checks)
                add(needed)
        done[step.name] = step

    for step in own:
        add(step)
    return list(done.values())


def _from_elsewhere(
    flow: Flow, twin: Trace | None, step: Step, inputs: Sequence[str], checks: dict[int, dict[str, Step]]
) -> Step:
    """Return a step with the same result as `step`, a question for the size of a tensor that the piece lacks."""
    asked = step.args[1] if step.target is getattr else step.target
    if asked in _PLACES and inputs:
        return replace(step, args=(Ref(inputs[0]), *step.args[1:]))
    base = next(refs(step))
    state = base not in flow.place and base not in flow.trace.inputs
    values, others = flow.trace.values, (flow.trace if state or twin is None else twin).values
    if step.name not in values or step.name not in others or (twin is None and not state):
        raise _unknown(flow, step, base, "pass example=, inputs as a loader gives them: it tells which sizes are fixed")
    first, second = values[step.name], others[step.name]
    whole = isinstance(first, tuple)
    pairs = list(zip(first, second, strict=True)) if whole else [(first, second)]
    sizes = [_size(a, b) for a, b in pairs]
    if None in sizes:
        raise _unknown(flow, step, base, "compute what needs this size before the cut")
    if not state:
        _check_there(flow, base, step, others, checks)
    if all(factor == 0 for _, factor in sizes):  # type: ignore[misc]
        return replace(step, op="function", target=_constant, args=(first,), kwargs={})
    source = _with_batch(inputs, values, others)
    if source is None:
        raise _unknown(flow, step, base, "cut where a tensor with the batch first crosses")
    return replace(step, op="function", target=_sizes, args=(Ref(source), tuple(sizes), whole), kwargs={})


def _size(first: Any, second: Any) -> tuple[Any, int] | None:  # noqa: ANN401
    """Return (constant, 0), or (0, factor) for a multiple of the batch, or None if it is neither."""
    if first == second:
        return first, 0
    large, small = BATCHES
    if isinstance(first, int) and isinstance(second, int) and first * small == second * large and first % large == 0:
        return 0, first // large
    return None


def _constant(value: Any) -> Any:  # noqa: ANN401
    return value


def _sizes(source: Tensor, sizes: Sequence[tuple[Any, int]], whole: bool) -> Any:  # noqa: ANN401
    """Return sizes, of which some are a multiple of the batch of `source`, float[batch, ...]."""
    found = [source.shape[0] * factor if factor else constant for constant, factor in sizes]
    return torch.Size(found) if whole else found[0]


def _with_batch(inputs: Sequence[str], values: Mapping[str, Any], others: Mapping[str, Any]) -> str | None:
    for name in inputs:
        pair = [value for value in (values.get(name), others.get(name)) if isinstance(value, Tensor) and value.dim()]
        if tuple(value.shape[0] for value in pair) == BATCHES:
            return name
    return None


def _check_there(
    flow: Flow, base: str, step: Step, others: Mapping[str, Any], checks: dict[int, dict[str, Step]]
) -> None:
    """Let the piece that has the tensor check the sizes that are now constants elsewhere."""
    first, second = flow.trace.values[base].shape, others[base].shape
    fixed = tuple(a if a == b else None for a, b in zip(first, second, strict=True))
    holders = [piece for piece in range(len(flow.points) + 1) if base in flow.needs(piece)]
    piece = flow.place.get(base, min(holders, default=0))
    if base in flow.place or holders:
        text = f"sizes of {base!r}, which {step} needs after the cut"
        check = Step(f"check[{base}]", "function", _hold_sizes, (Ref(base), fixed, text), {}, step.path, step.line)
        checks.setdefault(piece, {})[base] = check


def _hold_sizes(value: Tensor, fixed: Sequence[int | None], text: str) -> None:
    """Raise `StageError` (E322) if a fixed size of a tensor has changed."""
    now = [None if size is None else value.shape[dim] for dim, size in enumerate(fixed)]
    hold(now, list(fixed), text)


def _unknown(flow: Flow, step: Step, base: str, remedy: str) -> StageError:
    return StageError(
        "a size is needed after the cut, of a tensor that does not cross",
        where=f"{step}; cut after {', '.join(repr(point) for point in flow.points)}",
        expected="a size that the later piece can tell: of a tensor that it gets, a constant, or the batch",
        got=f"a size of {base!r}",
        remedy=remedy,
        code="E315",
    )
