"""Making pieces: by slicing a Sequential, or from traces in train mode and in evaluation."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cutlayer.errors import StageError
from cutlayer.models import sequential
from cutlayer.models.attributes import as_before
from cutlayer.models.example import Arguments, undisturbed
from cutlayer.models.flow import Flow, flow_of, inside_of, positions
from cutlayer.models.inplace import check_writes
from cutlayer.models.names import in_stack, inside, names_of, stacks_of
from cutlayer.models.record import Trace
from cutlayer.models.sizes import BATCHES, complete
from cutlayer.models.stacks import Layout, Parts, returned, take_apart
from cutlayer.models.steps import PieceModule, Routine, Step, hold, refs, routine
from cutlayer.models.trace import trace
from cutlayer.models.tree import adopt, attach, frozen_paths, same_mode, ties

__all__ = ["Piece", "Pieces", "sliced", "traced"]


@dataclass(frozen=True, eq=False)
class Piece:
    """One piece of a cut model.

    Attributes:
        module: Called positionally with the inputs; returns one tensor if there is one output, else a tuple of tensors
            in the order of `outputs`. Its parameters are the user's own, under their own names.
        inputs: Where each input comes from: "data.NAME" (argument NAME of the model's forward) or "PIECE.PORT" (output
            PORT of an earlier piece, by its index), such as "0.layer1_0_relu".
        outputs: Names of the ports, [A-Za-z_][A-Za-z0-9_]*, at most 64 characters. Every output of all but the last
            piece crosses a cut; the last has one, "output".
    """

    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Pieces:
    """What cutting gives: the cut points in the order in which they run, the pieces, and what these share."""

    points: tuple[str, ...]
    pieces: tuple[Piece, ...]
    ties: tuple[tuple[str, int, str, int], ...]


@dataclass(frozen=True)
class _Draft:
    """A piece in one mode, before it has a module: its steps, and the names that come in and go out."""

    steps: tuple[Step, ...]
    entries: tuple[str, ...]
    results: tuple[str, ...]


def sliced(model: nn.Module, names: Sequence[str], arguments: Arguments) -> Pieces:
    """Slice an `nn.Sequential`. Raises `StageError` (E312) if nothing lies between two cut points."""
    points = sorted(names, key=lambda name: sequential.order(model, name))
    modules = sequential.slices(model, points)
    pieces: list[Piece] = []
    for index, module in enumerate(modules):
        if not len(module):
            after = "before the output" if index == len(points) else f"and before the cut after {points[index]!r}"
            raise StageError(
                f"nothing is computed after {points[index - 1]!r} {after}",
                where=f"at={points[index - 1]!r}",
                expected="a cut point with modules on both sides",
                remedy="leave this cut point out, or name another",
                code="E312",
            )
        source = f"{index - 1}.{pieces[-1].outputs[0]}" if index else f"data.{next(iter(arguments.tensors))}"
        port = "output" if index == len(points) else _port(points[index], set())
        same_mode(module, model)
        pieces.append(Piece(module, (source,), (port,)))
    adopt(modules, model)
    return Pieces(tuple(points), tuple(pieces), ties(modules, model.buffers()))


def traced(
    model: nn.Module, names: Sequence[str], arguments: Arguments, pick: Callable[[Any], Any], *, apart: bool = True
) -> Pieces:
    """Cut any module that `torch.fx` can follow down to the cut points, and stacks of blocks.

    Args:
        model: The model.
        names: Qualified names of the submodules after which to cut.
        arguments: What forward is called with.
        pick: Chooses the output tensor.
        apart: Whether stacks are taken apart; else they are followed as any other module is.

    Raises:
        StageError: see `cutlayer.models.cut`.
    """
    stacks: dict[str, Parts] = {}
    if apart:
        stacks, names = _stacks(model, names, arguments)
    names = _as_called(
        model, names, lambda enter: _trace(model, arguments, BATCHES[0], enter - set(stacks), stacks, pick)
    )
    enter = _holders(names) - set(stacks)
    flows: dict[bool, Flow] = {}
    drafts: dict[bool, list[_Draft]] = {}
    frozen, moving = frozen_paths(model), []
    points: list[str] = []
    parts = [part.module for stack in stacks.values() for part in stack.parts]
    with undisturbed(model), as_before(*parts):
        versions = [(buffer, buffer._version) for buffer in model.buffers()]
        for mode in (True, False):
            model.train(mode)
            first = _trace(model, arguments, BATCHES[0], enter, stacks, pick)
            twin = _trace(model, arguments, BATCHES[1], enter, stacks, pick) if arguments.batch else None
            if twin is not None and (step := _other_step(first, twin)) is not None:
                again = (_trace(model, arguments, BATCHES[0], enter, stacks, pick) for _ in range(4))
                raise _unsteady(step) if any(_other_step(first, one) for one in again) else _by_batch(step)
            if mode:
                moved = _written(first)
                moving = [b for b, version in versions if b._version != version or any(b is one for one in moved)]
                points = [name for _, name in sorted(zip(positions(first, names), names, strict=True))]
            flows[mode] = flow_of(first, twin, points)
            check_writes(flows[mode])
            drafts[mode] = _drafts(flows[mode], twin)
    _same_ports(flows, drafts)
    pieces = _build(model, flows, drafts, frozen)
    return Pieces(tuple(points), pieces, ties([piece.module for piece in pieces], moving))


def _written(trace_: Trace) -> list[Tensor]:
    """Return the parameters and buffers that steps write to themselves: `buffer.data.mul_(...)` leaves no version."""
    names = {name for names in trace_.written.values() for name in names}
    return [trace_.values[step.name] for step in trace_.steps if step.op == "state" and step.name in names]


def _as_called(model: nn.Module, names: Sequence[str], follow: Callable[[frozenset[str]], Trace]) -> list[str]:
    """Return each cut point by the name under which forward calls it: the one given if it does, else its last called.

    `follow` traces the model, looking into the given submodules.
    """
    known = {name: names_of(model, name) for name in names}
    if all(len(others) == 1 for others in known.values()):
        return list(names)
    with undisturbed(model):
        model.train()
        seen = follow(_holders(names))
        if all(inside_of(seen, name) for name in names):
            return list(names)
        seen = follow(_holders(other for others in known.values() for other in others))
    last = {name: max(others, key=lambda other: inside_of(seen, other)[-1:]) for name, others in known.items()}
    return [name if inside_of(seen, name) else last[name] for name in names]


def _holders(names: Iterable[str]) -> frozenset[str]:
    """Return the paths of all submodules that hold one of these names, "" (the model) too."""
    parts = [name.split(".") for name in names]
    return frozenset(".".join(one[:depth]) for one in parts for depth in range(len(one)))


def _stacks(model: nn.Module, names: Sequence[str], arguments: Arguments) -> tuple[dict[str, Parts], list[str]]:
    """Take the stacks apart that have cut points inside; a point at a stack's very end becomes one after the stack."""
    layouts, returns = dict[str, Layout](), dict[str, int]()
    for path, layout in stacks_of(model).items():
        if any(inside(model, name, path) for name in names):
            number = returned(model.get_submodule(path), layout, lambda: _run(model, arguments))
            if number is not None:
                layouts[path], returns[path] = layout, number
    spots: dict[str, set[int]] = {}
    points = []
    for name in names:
        found = in_stack(model, name, layouts, checked=bool(arguments.batch))
        if found is not None and found.before == found.layout.count and not found.layout.after and found.path:
            name, found = found.path, None
        if found is not None:
            spots.setdefault(found.path, set()).add(found.before)
        points.append(found.name if found is not None else name)
    return {
        path: take_apart(model.get_submodule(path), path, layouts[path], sorted(ends), returns[path])
        for path, ends in spots.items()
    }, points


def _run(model: nn.Module, arguments: Arguments) -> None:
    if arguments.batch:
        with undisturbed(model), torch.no_grad():
            model(**arguments.called(arguments.resized(BATCHES[1]).tensors))


def _trace(
    model: nn.Module,
    arguments: Arguments,
    batch: int,
    enter: frozenset[str],
    stacks: dict[str, Parts],
    pick: Callable[[Any], Any],
) -> Trace:
    given = arguments.resized(batch) if arguments.batch else arguments
    return trace(model, given, enter=enter, stacks=stacks, pick=pick)


def _other_step(first: Trace, twin: Trace) -> Step | None:
    """Return the first step in which two traces of a model differ, or None."""
    for one, two in zip(first.steps, twin.steps, strict=False):
        same = (one.op, one.target) == (two.op, two.target) and _equal((one.args, one.kwargs), (two.args, two.kwargs))
        if not same:
            return one
    return None if len(first.steps) == len(twin.steps) else max(first.steps, twin.steps, key=len)[-1]


def _equal(one: Any, two: Any) -> bool:  # noqa: ANN401
    if isinstance(one, Tensor) or isinstance(two, Tensor):
        return one is two or (type(one) is type(two) and one.shape == two.shape and bool(torch.equal(one, two)))
    if isinstance(one, dict) and isinstance(two, dict):
        return list(one) == list(two) and all(_equal(one[key], two[key]) for key in one)
    if isinstance(one, tuple | list) and isinstance(two, tuple | list):
        return len(one) == len(two) and all(_equal(a, b) for a, b in zip(one, two, strict=True))
    return one is two or bool(one == two)


def _unsteady(step: Step) -> StageError:
    return StageError(
        "the model does something else each time it is called with the same example",
        where=str(step),
        expected="the same operations in each step",
        got="operations that a random number, or what the model keeps from call to call, decides",
        remedy="put what differs into a submodule of its own (it is carried out as it is), or decide by a tensor: "
        "x + keep * y with keep = torch.rand_like(x[:, :1]).lt(0.5)",
        code="E314",
    )


def _by_batch(step: Step) -> StageError:
    return StageError(
        "the model does something else for another batch size",
        where=str(step),
        expected="the same operations for any number of samples",
        remedy="take the batch as x.size(0), a step of its own: int(), a loop over x, and len(x) in other files give "
        "numbers that hold for one batch size; where a library's code does so, call it in a submodule of its own"
        if step.target is hold
        else "use the batch only in shapes (x.view(x.size(0), -1)), or put this into a submodule of its own",
        code="E314",
    )


def _drafts(flow: Flow, twin: Trace | None) -> list[_Draft]:
    """Find what goes into each piece and what comes out of it."""
    pieces = complete(flow, twin)
    rank = {name: index for index, name in enumerate([*flow.trace.inputs, *(step.name for step in flow.ordinary)])}
    entries = []
    for index, steps in enumerate(pieces):
        used = {name for step in steps for name in refs(step)}
        used |= {flow.trace.output} if index == len(pieces) - 1 else set()
        entries.append(tuple(sorted(used - {step.name for step in steps}, key=rank.__getitem__)))
    drafts = []
    for index, steps in enumerate(pieces):
        crossing = {name for later in entries[index + 1 :] for name in later if flow.place.get(name) == index}
        results = tuple(sorted(crossing, key=rank.__getitem__))
        if index == len(pieces) - 1:
            results = (flow.trace.output,)
        if not results:
            raise _unused(flow, index)
        drafts.append(_Draft(steps, entries[index], results))
    return drafts


def _unused(flow: Flow, piece: int) -> StageError:
    return StageError(
        f"nothing that is computed before the cut after {flow.points[piece]!r} is used after it",
        where=f"at={flow.points[piece]!r}",
        expected="a cut point that values cross",
        remedy="leave this cut point out, or name another",
        code="E312",
    )


def _same_ports(flows: dict[bool, Flow], drafts: dict[bool, list[_Draft]]) -> None:
    """Refuse a model that sends other values in evaluation than in training."""
    for index, (training, evaluation) in enumerate(zip(drafts[True], drafts[False], strict=True)):
        ours, theirs = list[Any](), list[Any]()
        for mode, found, draft in ((True, ours, training), (False, theirs, evaluation)):
            values = flows[mode].trace.values
            for name in (*draft.entries, *draft.results):
                value = values.get(name, name)
                found.append((value.dtype, value.shape) if isinstance(value, Tensor) else value)
        if ours != theirs:
            raise StageError(
                "the model sends other values across the cut in evaluation than in training",
                where=f"piece {index} of the cut after {', '.join(map(repr, flows[True].points))}",
                expected=f"{', '.join((*training.entries, *training.results))}, as in training",
                got=", ".join((*evaluation.entries, *evaluation.results)),
                remedy="cut where both modes compute the same, or put what differs into a submodule of its own",
                code="E320",
            )


def _build(
    model: nn.Module, flows: dict[bool, Flow], drafts: dict[bool, list[_Draft]], frozen: tuple[str, ...]
) -> tuple[Piece, ...]:
    trace_ = flows[True].trace
    ports: dict[str, str] = {name: f"data.{name}" for name in trace_.inputs}
    modules, pieces = [], []
    for index, draft in enumerate(drafts[True]):
        both = {mode: drafts[mode][index] for mode in drafts}
        modules.append(_module(model, flows, both, frozen))
        taken: set[str] = set()
        last = index == len(drafts[True]) - 1
        outputs = ("output",) if last else tuple(_port(name, taken) for name in draft.results)
        pieces.append(Piece(modules[-1], tuple(ports[name] for name in draft.entries), outputs))
        ports |= {name: f"{index}.{port}" for name, port in zip(draft.results, outputs, strict=True)}
    adopt(modules, model)
    for module in modules:
        same_mode(module, model)
    return tuple(pieces)


def _module(
    model: nn.Module, flows: dict[bool, Flow], both: dict[bool, _Draft], frozen: tuple[str, ...]
) -> PieceModule:
    routines: dict[bool, Routine] = {}
    modules: dict[str, nn.Module] = {}
    states: dict[str, None] = {}
    for mode, draft in both.items():
        routines[mode] = routine(draft.entries, tuple(draft.steps), draft.results)
        for step in draft.steps:
            if step.op == "module":
                modules[step.target] = flows[mode].trace.modules[step.name]
            elif step.op == "state":
                states[step.target] = None
    piece = PieceModule(routines)
    attach(piece, model, modules, states)
    inside = {path for path, _ in piece.named_modules(remove_duplicate=False)}
    piece.frozen = tuple(path for path in frozen if path in inside)
    return piece


def _port(name: str, taken: set[str]) -> str:
    """Return a valid name of a port that is not taken yet, and take it."""
    plain = re.sub(r"\W", "_", name, flags=re.ASCII)[-60:]
    plain = plain if plain[:1].isalpha() or plain[:1] == "_" else f"_{plain}"
    port, number = plain, 1
    while port in taken:
        number += 1
        port = f"{plain}_{number}"
    taken.add(port)
    return port
