"""The tail of a U-shape: where it begins if one cut point is given, and that it keeps the labels at the client.

The gradient of the loss at the model's own output tells the labels: for cross entropy it is negative at the label of
each sample and nowhere else. So whatever the server gives must pass weights of the tail before it becomes the output;
then what goes back has passed them too. A layer's matrix or kernel counts, a scale or a shift does not.

| code | error | meaning |
| --- | --- | --- |
| E330 | PlanError | nothing is left for the server, or no layer for the tail |
| E334 | PlanError | what the server gives becomes the output without passing weights at the client |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Final

import torch
from torch import Tensor, nn

from cutlayer.errors import PlanError, StageError
from cutlayer.models.attributes import as_before
from cutlayer.models.check import run_pieces
from cutlayer.models.cut import Cut, Piece
from cutlayer.models.example import Arguments, undisturbed
from cutlayer.models.kinds import is_size, writes
from cutlayer.models.names import Point, resolve
from cutlayer.models.sizes import BATCHES
from cutlayer.models.steps import PieceModule, Step, refs

__all__ = ["check_tail", "tail_points", "with_tail"]

_TRIES: Final = 8  # places where a tail may begin; each is a cut of its own
_PRODUCTS: Final = "linear bilinear matmul mm bmm mv addmm addmv addbmm baddbmm einsum tensordot inner dot"
_KERNELS: Final = (f"conv{kind}{size}d" for kind in ("", "_transpose") for size in (1, 2, 3))
_WEIGHING: Final = frozenset(_PRODUCTS.split(" ")).union(_KERNELS)  # functions that put weights on a value


def with_tail(model: nn.Module, first: Point, make: Callable[[list[Point]], Cut], arguments: Arguments) -> Cut:
    """Cut at `first` and at the last place where the tail of a U-shape may begin.

    Args:
        model: The model.
        first: The cut point that was given.
        make: Cuts the model at the points it is given.
        arguments: The example.

    Raises:
        PlanError: E330, there is no such place behind `first`; E334, none of the places tried keeps the labels.
        StageError: what `make` raises at the place that is tried first, if no other will do.
    """
    name, failed = resolve(model, first), list[PlanError | StageError]()
    for point in islice(tail_points(model), _TRIES):
        if point == name:
            break
        try:
            with _telling(point):
                made = make([name, point])
            if name in made.points and made.points[0] != name:
                break
            check_tail(model, made, ("client", "server", "client"), arguments)
        except (StageError, PlanError) as error:
            failed.append(error)
            if error.code != "E334" and f"at={point!r}" not in error.where and "." not in point:
                break
        else:
            return made
    if failed:
        raise failed[0]
    raise PlanError(
        f"nothing is left for the server after {first!r}",
        where=f"at={first!r}: the tail begins after {point!r} too, before the last layer with parameters",
        expected="an earlier cut point, or two of them",
        remedy="cut earlier; name both: at=(FIRST, SECOND); or give the labels to the server: labels='server'",
        code="E330",
    )


def tail_points(model: nn.Module) -> Iterator[str]:
    """Yield the submodules after which the tail of a U-shape may begin, the last one first.

    They are the ones before the last layer with parameters (the classifier) and before the modules that hold it, then
    those before the second last layer, and so on: in the order in which the model registers them.

    Raises:
        PlanError: E330, the model has fewer than two submodules with parameters.
    """
    own = [
        name for name, module in model.named_modules() if name and any(True for _ in module.parameters(recurse=False))
    ]
    if len(own) < 2:
        raise PlanError(
            "the model has no last layer to keep at the client",
            where=type(model).__name__,
            expected="two submodules with parameters or more",
            remedy="name both cut points: at=(FIRST, SECOND)",
            code="E330",
        )
    found = dict[str, None]()
    for layer in reversed(own):
        for point in _before(model, layer):
            if point not in found:
                found[point] = None
                yield point


def _before(model: nn.Module, layer: str) -> Iterator[str]:
    """Yield the module that is registered before a layer, then the ones before those that hold it."""
    while layer:
        parent, _, child = layer.rpartition(".")
        siblings = [name for name, _ in model.get_submodule(parent).named_children()]
        place = siblings.index(child)
        if place:
            yield f"{parent}.{siblings[place - 1]}".lstrip(".")
        layer = parent


def check_tail(model: nn.Module, made: Cut, places: Sequence[str], arguments: Arguments) -> None:
    """Refuse a U-shape whose labels the server could read from the gradients that it is sent.

    Args:
        model: The model.
        made: Its pieces.
        places: "client" or "server", of each piece; the last is at the client, with the labels.
        arguments: The example.

    Raises:
        PlanError: E334.
    """
    bare = {f"{len(made.pieces) - 1}.output"}
    for index in reversed(range(len(made.pieces))):
        piece = made.pieces[index]
        ports = {port for port in piece.outputs if f"{index}.{port}" in bare}
        if ports and places[index] == "server":
            raise _leaks(made, index)
        if index == len(made.pieces) - 1 and (found := _measured(model, made, arguments)) is not None:
            bare |= found
        elif ports:
            bare |= _bare(piece, ports)


def _measured(model: nn.Module, made: Cut, arguments: Arguments) -> set[str] | None:
    """Return the inputs of the last piece to which a gradient comes back where all its matrices and kernels are zero.

    That finds ways within submodules too, such as a residual block's. None: the piece cannot be run so; a weight norm,
    for one, divides by the norm of its weights.
    """
    inputs = {name: value for name, value in arguments.resized(BATCHES[0]).tensors.items() if value is not None}
    modules, last = [piece.module for piece in made.pieces], made.pieces[-1]
    with as_before(model), undisturbed(*modules), suppress(Exception):
        for module in modules:
            module.train()
        with torch.no_grad():
            known = {f"data.{name}": value for name, value in inputs.items()}
            for index, given in enumerate(run_pieces(made.pieces, inputs)):
                known |= {f"{index}.{port}": one for port, one in zip(made.pieces[index].outputs, given, strict=True)}
            for weight in last.module.parameters():
                if _mixes(weight):
                    weight.zero_()
        values = [known[text].detach().clone() for text in last.inputs]
        floats = {text: value for text, value in zip(last.inputs, values, strict=True) if value.is_floating_point()}
        with torch.enable_grad():
            output = last.module(*(value.requires_grad_(value.is_floating_point()) for value in values))
            if not output.requires_grad:
                return set()
            gradients: Sequence[Tensor | None] = torch.autograd.grad(
                output,
                list(floats.values()),
                torch.randn_like(output),
                allow_unused=True,  # of ones, a softmax's is 0
            )
        reached = {text: one for text, one in zip(floats, gradients, strict=True) if one is not None}
        if output.isfinite().all() and all(one.isfinite().all() for one in reached.values()):
            return {text for text, one in reached.items() if one.any()}
    return None


def _bare(piece: Piece, ports: set[str]) -> set[str]:
    """Return the inputs from which a way without weights leads to one of these outputs."""
    module = piece.module
    if not isinstance(module, PieceModule):
        return set() if _weighs(module) else set(piece.inputs)
    todo = module.routines[True]
    ends = {name for name, port in zip(todo.results, piece.outputs, strict=True) if port in ports}
    weights, found = _weights(module, todo.steps), set[str]()
    for text, entry in zip(piece.inputs, todo.entries, strict=True):
        if ends & _reached(module, todo.steps, entry, weights):
            found.add(text)
    return found


def _reached(module: PieceModule, steps: Sequence[Step], entry: str, weights: set[str]) -> set[str]:
    """Return the values to which a way from `entry` leads that no weights are on."""
    found = {entry}
    for step in steps:
        used = list(refs(step))
        if (
            not found.intersection(used)
            or is_size(step)
            or "no_grad" in step.contexts
            or _passes(module, step, weights)
        ):
            continue
        found.add(step.name)
        if step.op != "module" and writes(step, {}):
            found.add(used[0])
    return found


def _passes(module: PieceModule, step: Step, weights: set[str]) -> bool:
    """Say whether a step puts weights on what it is given, or lets no gradient back."""
    name = step.target if isinstance(step.target, str) else getattr(step.target, "__name__", "")
    if step.op == "module":
        return _weighs(module.get_submodule(step.target) if step.target else module)
    return name == "detach" or (name in _WEIGHING and not weights.isdisjoint(refs(step)))


def _weights(module: PieceModule, steps: Sequence[Step]) -> set[str]:
    """Return the values that are a matrix or kernel of the piece, or are made of nothing but such."""
    own = {name for name, value in module.named_parameters(remove_duplicate=False) if _mixes(value)}
    found = set[str]()
    for step in steps:
        used = list(refs(step))
        if step.target in own if step.op == "state" else used and found.issuperset(used):
            found.add(step.name)
    return found


def _weighs(module: nn.Module) -> bool:
    return any(_mixes(value) for value in module.parameters())


def _mixes(weight: Tensor) -> bool:
    """Say whether a weight is a matrix or a kernel, not a scale or a shift; one row is a layer with one output."""
    return weight.ndim > 1


def _leaks(made: Cut, index: int) -> PlanError:
    point = made.points[index]
    return PlanError(
        f"the server could read the labels: what it gives after {point!r} becomes the output without passing weights "
        "at the client",
        where=f"at={point!r}: piece {index} (server), labels='client'",
        expected="a layer with weights between the last cut and the output",
        got="a way without one: the gradient of the loss at the output goes back to the server",
        remedy="cut earlier, before the last layer with weights that the output passes: at=(FIRST, SECOND); or give "
        "the labels to the server: labels='server'",
        code="E334",
    )


@contextmanager
def _telling(second: str) -> Iterator[None]:
    """Let an error about the second cut point say that `split` chose it itself."""
    try:
        yield
    except StageError as error:
        if f"at={second!r}" not in error.where:
            raise
        raise StageError(
            error.what,
            where=f"{error.where}, the second cut point, chosen as the one before the last layer with parameters",
            expected=error.expected,
            got=error.got,
            remedy="name both cut points, at=(FIRST, SECOND), or give the labels to the server: labels='server'",
            code=error.code,
        ) from error
