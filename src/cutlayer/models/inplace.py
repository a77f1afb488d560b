"""Finding writes in place that a cut would break.

Uncut, a value that is written to has changed for all who use it later. Cut, each piece has its own copy. So a write is
refused if the memory is used after it in another piece, or in the same piece through a value that came in by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from cutlayer.errors import StageError
from cutlayer.models.flow import Flow
from cutlayer.models.kinds import writes
from cutlayer.models.steps import Step, refs

__all__ = ["check_writes"]


def check_writes(flow: Flow) -> None:
    """Refuse a write in place whose effect would be lost in another piece.

    Raises:
        StageError: names the operation that writes and the step that would miss it (E316).
    """
    order = {step.name: index for index, step in enumerate(flow.trace.steps)}
    fetched = {step.name: step.target for step in flow.trace.steps if step.op == "state"}
    for step, touched in _writes(flow, fetched):
        piece, target = flow.place[step.name], next(refs(step), "")
        for user in flow.ordinary:
            elsewhere, after = flow.place[user.name] != piece, order.get(user.name, -1) > order[step.name]
            for name in sorted(touched.intersection(refs(user))):
                came_in = flow.place.get(name, -1) < piece
                lost = elsewhere if name in fetched else after and came_in and (elsewhere or name != target)
                if lost:
                    raise _refusal(flow, step, user, name)


def _writes(flow: Flow, fetched: Mapping[str, str]) -> Iterator[tuple[Step, set[str]]]:
    """Give each step that writes, with all names of the memory that it writes to."""
    known = bool(set(flow.trace.inputs) & set(flow.trace.values))
    for step in flow.ordinary:
        names: set[str] = set()
        if known:
            names |= set(flow.trace.written.get(step.name, ()))
        elif writes(step, flow.trace.modules):
            names |= set(list(refs(step))[:1])
        states = {fetched[name] for name in names if name in fetched}
        names |= {name for name, target in fetched.items() if target in states}
        if names:
            yield step, names


def _refusal(flow: Flow, step: Step, user: Step, name: str) -> StageError:
    return StageError(
        "a value is written in place on one side of the cut and used after that on the other",
        where=f"{step} writes to {name!r}, which {user} uses; cut after "
        + ", ".join(repr(point) for point in flow.points),
        expected="pieces that leave each other's values alone",
        remedy="write x = x + y instead of x += y, and inplace=False in activations, or move the cut point",
        code="E316",
    )
