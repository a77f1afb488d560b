"""Which piece each step belongs to, and which values cross from piece to piece."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from cutlayer.errors import StageError
from cutlayer.models.kinds import is_item, is_random, is_size, is_view, writes
from cutlayer.models.record import Trace
from cutlayer.models.steps import Ref, Step, hold, refs, substitute

__all__ = ["Flow", "flow_of", "inside_of", "positions"]


@dataclass
class Flow:
    """A trace with its steps placed.

    Attributes:
        trace: The trace.
        points: Names of the cut points, in order.
        place: Piece of each step that is run once; steps that are computed again where needed are not in it.
        ordinary: Steps that are run once, in order.
        derived: Names of steps that each piece computes for itself.
    """

    trace: Trace
    points: tuple[str, ...]
    place: dict[str, int]
    ordinary: list[Step] = field(default_factory=list)
    derived: set[str] = field(default_factory=set)

    def of_piece(self, piece: int) -> list[Step]:
        """Return the steps of a piece that are run once."""
        return [step for step in self.ordinary if self.place[step.name] == piece]

    def needs(self, piece: int) -> list[str]:
        """Name what a piece's own steps use of inputs and of earlier pieces, in the order in which it was made."""
        used = {name for step in self.of_piece(piece) for name in refs(step)}
        if piece == len(self.points):
            used.add(self.trace.output)
        made = [*self.trace.inputs, *(step.name for step in self.ordinary)]
        return [name for name in made if name in used and self.place.get(name, -1) < piece]


def inside_of(trace: Trace, point: str) -> list[int]:
    """Return the indices of the steps that run in a submodule, of this name."""
    return [i for i, step in enumerate(trace.steps) if step.path == point or step.path.startswith(f"{point}.")]


def positions(trace: Trace, points: Sequence[str]) -> list[int]:
    """Return, for each cut point, the index of the last step that runs in that submodule.

    Raises:
        StageError: the submodule is never called (E311).
    """
    found = []
    for point in points:
        inside = inside_of(trace, point)
        if not inside:
            raise StageError(
                f"no cut after {point!r}: it is never called",
                where=f"at={point!r}",
                expected="a submodule that the model's forward calls",
                remedy="name a submodule that it calls; cutlayer.models.candidates(model, example) lists all of them",
                code="E311",
            )
        found.append(inside[-1])
    return found


def flow_of(trace: Trace, twin: Trace | None, points: Sequence[str]) -> Flow:
    """Place the steps of a trace. `points` are in the order in which they run.

    `twin` is the same model traced with another number of samples; None without an example.

    Raises:
        StageError: a piece would do nothing (E312), or a value that crosses is not a tensor (E315).
    """
    ends = positions(trace, points)
    derived = _derived(trace)
    place = {
        step.name: sum(end < index for end in ends)
        for index, step in enumerate(trace.steps)
        if step.name not in derived and step.op != "state"
    }
    flow = Flow(trace, tuple(points), place, derived=derived)
    flow.ordinary = [step for step in trace.steps if step.name in place]
    _drop_unused_items(flow)
    _sink_reads(flow)
    _pull_items(flow, twin)
    _spread_tuples(flow, twin)
    _pull_checks(flow)
    _check_work(flow)
    return flow


def _derived(trace: Trace) -> set[str]:
    """Return the steps that may be computed again: not those whose memory is written to, nor what follows from them."""
    written = {name for names in trace.written.values() for name in names}
    written |= {name for step in trace.steps if writes(step, trace.modules) for name in list(refs(step))[:1]}
    kept: set[str] = set()
    for step in trace.steps:
        alone = step.name in trace.derived and step.name not in written
        if alone and (is_size(step) or all(name in kept for name in refs(step))):
            kept.add(step.name)
    return kept


def _drop_unused_items(flow: Flow) -> None:
    """Leave out fields and items that nobody uses: looking at them does nothing."""
    used = {name for step in flow.trace.steps for name in refs(step)} | {flow.trace.output}
    flow.ordinary = [step for step in flow.ordinary if step.name in used or not is_item(step)]


def _sink_reads(flow: Flow) -> None:
    """Compute what needs weights alone, such as their norm, in the first piece that uses it, if one does."""
    written = {name for names in flow.trace.written.values() for name in names}
    written |= {name for step in flow.ordinary if writes(step, flow.trace.modules) for name in list(refs(step))[:1]}
    targets = {step.name: step.target for step in flow.trace.steps if step.op == "state"}
    moving = {targets[name] for name in written if name in targets}
    pure = {name for name, target in targets.items() if target not in moving}
    reads = []
    for step in flow.ordinary:
        computed = step.target is not hold and step.op in ("function", "method") and step.name not in written
        used = set(refs(step))
        if computed and used and used <= pure and not is_random(step):
            pure.add(step.name)
            reads.append(step)
    for step in reversed(reads):
        users = [flow.place[one.name] for one in flow.ordinary if step.name in refs(one)]
        if users:
            flow.place[step.name] = min(users)
        elif step.name != flow.trace.output:
            flow.ordinary.remove(step)


def _pull_items(flow: Flow, twin: Trace | None) -> None:
    """Take an item of a tuple in the piece that makes the tuple, so that the item crosses and not the tuple.

    So for views of a tensor whose first dimension is not the batch, and which therefore cannot cross: of the last
    states of an LSTM, (layers, batch, width), a layer's can.
    """
    written = {name for names in flow.trace.written.values() for name in names}
    for step in flow.ordinary:
        if not is_item(step) and not is_view(step):
            continue
        owner = step.args[0].name
        if isinstance(flow.trace.values.get(owner), Tensor):
            pulled = owner not in written and twin is not None and _same_length(owner, flow.trace, twin)
        else:
            pulled = is_item(step)
        if owner in flow.place and pulled:
            flow.place[step.name] = flow.place[owner]


def _same_length(name: str, one: Trace, two: Trace) -> bool:
    """Say whether a tensor has as many rows for one number of samples as for another."""
    first, second = one.values[name], two.values.get(name)
    return isinstance(second, Tensor) and first.shape[:1] == second.shape[:1]


def _pull_checks(flow: Flow) -> None:
    """Check a size in the piece where the tensor is that has this size."""
    by_name = {step.name: step for step in flow.trace.steps}
    for step in flow.ordinary:
        if step.target is not hold:
            continue
        bases, todo = [], list(refs(step))
        while todo:
            name = todo.pop()
            if name in flow.derived:
                todo += refs(by_name[name])
            elif name in flow.place:
                bases.append(flow.place[name])
            else:
                users = [flow.place[s.name] for s in flow.ordinary if s.target is not hold and name in refs(s)]
                bases.append(min(users, default=0))
        flow.place[step.name] = max(bases, default=0)


def _spread_tuples(flow: Flow, twin: Trace | None) -> None:
    """Let the items of a tuple, list or dict that crosses whole cross one by one, and put it together again there.

    A number does not cross: it is held to what it was for the example, in any number of samples, where it is made.
    """
    others = {} if twin is None else dict(twin.values)
    for piece in range(1, len(flow.points) + 1):
        for name in flow.needs(piece):
            value = flow.trace.values.get(name)
            if name in flow.trace.inputs or isinstance(value, Tensor) or (name not in flow.trace.values):
                continue
            whole = _spread(flow, others, name, value)
            for index, step in enumerate(flow.ordinary):
                if flow.place[step.name] > flow.place[name]:
                    flow.ordinary[index] = _replaced(step, name, whole)


def _replaced(step: Step, name: str, whole: Any) -> Step:  # noqa: ANN401
    def change(ref: Ref) -> Any:  # noqa: ANN401
        return whole if ref.name == name else ref

    return replace(step, args=substitute(step.args, change), kwargs=substitute(dict(step.kwargs), change))


def _spread(flow: Flow, others: dict[str, Any], name: str, value: Any) -> Any:  # noqa: ANN401
    """Return the structure of a value with `Ref`s for its tensors, and add the steps that take them out.

    `others` has the values for another number of samples, by name.
    """
    if isinstance(value, Tensor):
        return Ref(name)
    if value is None:
        return None
    if type(value) in (tuple, list):
        items = enumerate(value)
        return type(value)(_spread(flow, others, _item(flow, others, name, key), one) for key, one in items)
    if type(value) is dict:
        return {key: _spread(flow, others, _item(flow, others, name, key), one) for key, one in value.items()}
    if isinstance(value, bool | int | float | str | torch.dtype | torch.device) and others.get(name) == value:
        _add(flow, name, f"{name}-held", hold, (Ref(name), value, ""))
        return value
    maker = next(step for step in flow.ordinary if step.name == name)
    raise StageError(
        "a value that would cross the cut is not a tensor",
        where=str(maker),
        expected="a tensor, or a tuple, list or dict of tensors",
        got=type(value).__name__,
        remedy="cut before or after its use, or make it a tensor",
        code="E315",
    )


def _item(flow: Flow, others: dict[str, Any], name: str, key: Any) -> str:  # noqa: ANN401
    """Add, right after a step, one that takes an item of its result; return the item's name."""
    item = f"{name}[{key}]"
    if item not in flow.place:
        _add(flow, name, item, operator.getitem, (Ref(name), key))
        flow.trace.values[item] = flow.trace.values[name][key]
        if type(others.get(name)) is type(flow.trace.values[name]):
            others[item] = others[name][key]
    return item


def _add(flow: Flow, after: str, name: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Add a step right after another, in its piece, if it is not there yet."""
    if name in flow.place:
        return
    index = next(i for i, step in enumerate(flow.ordinary) if step.name == after)
    maker = flow.ordinary[index]
    args = tuple(maker.line if arg == "" else arg for arg in args)
    flow.ordinary.insert(index + 1, Step(name, "function", function, args, {}, maker.path, maker.line))
    flow.place[name] = flow.place[after]


def _check_work(flow: Flow) -> None:
    """Refuse a piece without steps, and one whose results nobody uses."""
    last = len(flow.points)
    for piece in range(last + 1):
        if any(step.target is not hold for step in flow.of_piece(piece)):
            continue
        before = flow.points[piece - 1]
        after = f"and before the cut after {flow.points[piece]!r}" if piece < last else "before the output"
        raise StageError(
            f"nothing is computed after {before!r} {after}",
            where=f"at={before!r}",
            expected="a cut point with operations on both sides",
            remedy="leave this cut point out, or name another",
            code="E312",
        )
