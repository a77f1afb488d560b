"""Cutting a user's model into pieces.

| code | when |
|---|---|
| E310 | no submodule of that name, or several |
| E311 | the submodule is never called, is inside a block, or its stack is called twice |
| E312 | nothing is computed on one side of a cut point |
| E313 | the model's forward cannot be followed |
| E314 | control flow depends on the values of data, or on the batch size |
| E315 | a value that would cross is not a tensor, or a size is not known after the cut |
| E316 | a write in place whose effect the cut would lose |
| E317 | the model's output is not one tensor |
| E318 | the model has no parameter to train, lazy modules that were never run, weights on the meta device, or weights |
| | that are quantised or sparse |
| E320 | train mode and evaluation send different values across the cut |
| E321 | the pieces do not give what the model gives |
| E322 | a piece meets another size than the model was cut for |
| E325 | the example does not fit the model's forward |
| E326 | an example is needed |
| E327 | an argument of `cut` is wrong |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.node import map_aggregate
from torch.nn.parameter import is_lazy

from cutlayer.errors import StageError
from cutlayer.models.attributes import as_before, call_first
from cutlayer.models.check import check, check_backward_hooks, run_pieces, run_whole
from cutlayer.models.example import Arguments, Example, arguments_of, undisturbed
from cutlayer.models.kept import attributes, changed
from cutlayer.models.names import Point, inside, points_of, resolve, stacks_of
from cutlayer.models.output import Key, picker
from cutlayer.models.pieces import Piece, Pieces, sliced, traced
from cutlayer.models.sequential import sliceable

__all__ = ["Cut", "Piece", "compose", "cut", "refuse_compiled"]

METHODS = ("auto", "sequential", "fx")


@dataclass(frozen=True, eq=False)
class Cut:
    """A model cut into pieces.

    Attributes:
        pieces: The pieces in the order in which they run: one more than there are cut points.
        points: Qualified names of the submodules after which it is cut, in the order in which they run.
        ties: What several pieces share: (name, piece, name, piece). These are parameters (the same object in both
            pieces, under these names), and buffers that training changes. Pieces at one party may share; pieces at
            different parties may not, and it is for the caller to refuse them.
        inputs: The model's inputs: names of the arguments of its forward that are tensors.
        method: "sequential" (sliced) or "fx" (traced).
        checked: Whether the pieces were compared with the model on an example.
        moved: Names of the model's attributes that its own forward changes, such as a count of its calls.
    """

    pieces: tuple[Piece, ...]
    points: tuple[str, ...]
    ties: tuple[tuple[str, int, str, int], ...]
    inputs: tuple[str, ...]
    method: str
    checked: bool
    moved: frozenset[str] = frozenset()


def cut(
    model: nn.Module,
    at: Point | Sequence[Point],
    *,
    example: Example | None = None,
    method: str = "auto",
    output: Key = None,
) -> Cut:
    """Cut a model after the named submodules.

    Everything that the model computes up to and including the last step of a named submodule lies before the cut. All
    values that are made before a cut and used after it cross: skip connections too, and directly from the piece that
    makes them to each that uses them. Sizes, constants and buffers do not cross; each piece computes its own. A
    submodule that is called several times is cut after its last call. One that the model holds under several names may
    be named by any: the cut is after the call by that name, or, if forward does not call it by that, by another.

    Args:
        model: The user's model; it is not changed, and the pieces use its own parameters.
        at: One cut point or several, in any order. Each is the qualified name of a submodule ("layer2.0.conv1"), the
            end of one if that is unique, or the submodule itself; or an index: of a child of an `nn.Sequential`, or of
            a block if the model has one list of blocks; -1 is the last. The cut is *after* it: k points give k + 1
            pieces.
        example: Inputs as a loader gives them, without labels: a tensor, a tuple in the order of forward, or a dict by
            argument name; tensors of shape (batch, ...), any batch. For a forward that takes one dictionary of tensors
            it is `({...},)`, and its keys name the inputs. With it, decisions by size are followed, writes in place are
            found exactly, tuples may cross, and the pieces are compared with the model (outputs bit for bit on the CPU,
            gradients up to rounding), so give it where you can. Three samples are used; nothing leaves the process.
        method: "sequential" slices, "fx" traces, "auto" slices where that is possible.
        output: Which field or index of the model's output to take, if it is not one tensor; `logits` is taken by
            itself. An index is for a tuple: where the model gives one tensor in evaluation, that is taken.

    Returns:
        The pieces, and what they share.

    Raises:
        StageError: the model cannot be cut there; the text names the operation and what to do (codes above).
    """
    names, arguments, chosen = _asked(model, at, example, method, output)
    pick, before = picker(model, output), attributes(model)
    if chosen == "fx" and arguments.batch:
        call_first(model, lambda: _call(model, arguments.resized(3)))
    with as_before(model):
        try:
            if chosen == "fx":
                made = _traced(model, names, arguments, pick)
            else:
                made = _checked(model, sliced(model, names, arguments), arguments, pick)
        except StageError as error:
            if error.code == "E313" and example is not None:
                check_example(model, example)
            raise
        moved = changed(model, before)
    return Cut(made.pieces, made.points, made.ties, tuple(arguments.tensors), chosen, bool(arguments.batch), moved)


def _traced(model: nn.Module, names: Sequence[str], arguments: Arguments, pick: Callable[[Any], Any]) -> Pieces:
    """Cut by tracing. A stack whose parts do not give what it gives, such as its hidden states, is followed instead."""
    try:
        return _checked(model, traced(model, names, arguments, pick), arguments, pick)
    except StageError as error:
        in_a_stack = any(inside(model, name, path) for path in stacks_of(model) for name in names)
        if error.code not in ("E313", "E321") or not arguments.batch or not in_a_stack:
            raise
        return _checked(model, traced(model, names, arguments, pick, apart=False), arguments, pick)


def _checked(model: nn.Module, made: Pieces, arguments: Arguments, pick: Callable[[Any], Any]) -> Pieces:
    """Return the pieces, compared with the model on the example if there is one. Raises `StageError` (E321)."""
    check_backward_hooks(model, made.pieces)
    if arguments.batch:
        with as_before(*(piece.module for piece in made.pieces)):
            check(model, made.pieces, arguments, pick)
    return made


def _asked(
    model: nn.Module, at: Point | Sequence[Point], example: Example | None, method: str, output: Key
) -> tuple[list[str], Arguments, str]:
    """Return the names of the cut points, what forward is called with, and the method."""
    if method not in METHODS:
        raise StageError(
            f"unknown method {method!r}",
            where=f"method={method!r}",
            expected=f"one of {', '.join(METHODS)}",
            remedy="leave it out",
            code="E327",
        )
    refuse_compiled(model)
    _refuse_lazy(model)
    _refuse_unsaved(model)
    if example is not None:
        _refuse_meta(model)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise StageError(
            "the model has no parameter to train",
            where=type(model).__name__,
            expected="at least one parameter with requires_grad",
            remedy="build the model before it is cut, or unfreeze a part of it",
            code="E318",
        )
    arguments = arguments_of(model, example)
    names = [resolve(model, point) for point in points_of(model, at)]
    if not names:
        raise StageError(
            "no cut point", where="at=()", expected="at least one submodule", remedy="name one in at=", code="E327"
        )
    can_slice = sliceable(model, names) and output is None and not arguments.dictionary
    if method == "sequential" and not can_slice:
        raise StageError(
            "only an nn.Sequential can be sliced",
            where=f"at={', '.join(map(repr, names))} in {type(model).__name__}",
            expected="children of nn.Sequentials nested in each other, from the model itself downwards",
            remedy="leave method out",
            code="E313",
        )
    if can_slice and method != "fx":
        return names, arguments, "sequential"
    _refuse_compiled_inside(model)
    return names, arguments, "fx"


def _refuse_lazy(model: nn.Module) -> None:
    """Refuse a model with parameters or buffers that its first call is to make. Raises `StageError` (E318)."""
    held = [*model.named_parameters(), *model.named_buffers()]
    lazy = [name.rpartition(".")[0] for name, value in held if is_lazy(value)]
    if lazy:
        raise StageError(
            "a lazy module has no parameters yet",
            where=f"{type(model).__name__}, {', '.join(dict.fromkeys(lazy))}",
            expected="parameters whose shapes are known",
            remedy="call the model once on a batch before it is cut, as before an optimizer is made",
            code="E318",
        )


def _refuse_unsaved(model: nn.Module) -> None:
    """Refuse weights and buffers that no checkpoint holds and no party can hand on. Raises `StageError` (E318)."""
    found: dict[str, str] = {}

    def note(name: str, leaf: Any) -> None:  # noqa: ANN401
        if isinstance(leaf, Tensor) and (leaf.is_quantized or leaf.layout != torch.strided):
            found[name] = "quantised" if leaf.is_quantized else "sparse"

    for name, value in {**dict(model.named_buffers()), **model.state_dict()}.items():
        map_aggregate(value, partial(note, name))
    if found:
        name, kind = next(iter(found.items()))
        remedy = "train the layers in floating point (nn.EmbeddingBag.from_pretrained(layer.weight().dequantize()) "
        remedy += "in place of a quantised one, for example), and quantise the trained model"
        if kind == "sparse":
            remedy = (
                "register_buffer(..., value.to_dense()); or keep a constant as a plain attribute: self.graph = value"
            )
        raise StageError(
            f"a {kind} tensor among the weights cannot be saved or handed on",
            where=f"{type(model).__name__}, {name}",
            expected="parameters and buffers that are dense, and not quantised",
            got=", ".join(f"{one}: {what}" for one, what in [*found.items()][:3]),
            remedy=remedy,
            code="E318",
        )


def _refuse_meta(model: nn.Module) -> None:
    """Refuse a model with parameters or buffers without values. Raises `StageError` (E318)."""
    names = [name for name, value in [*model.named_parameters(), *model.named_buffers()] if value.is_meta]
    if names:
        raise StageError(
            "weights on the meta device have no values, so the pieces cannot be compared with the model",
            where=f"{type(model).__name__}, {', '.join(names[:3])}"
            + (f" and {len(names) - 3} more" if len(names) > 3 else ""),
            expected="parameters and buffers on the CPU or on an accelerator",
            got="device meta",
            remedy="give them values before the cut: build the model without torch.device('meta'); or "
            "model.to_empty(device='cpu'), then model.load_state_dict(...)",
            code="E318",
        )


def check_example(model: nn.Module, example: Example) -> None:
    """Run the whole model on the example, to tell one that does not fit from a forward that cannot be followed.

    Raises:
        StageError: the model does not take it (E325).
    """
    refuse_compiled(model)
    arguments = arguments_of(model, example).resized(3)
    with undisturbed(model), torch.no_grad():
        run_whole(model, arguments, arguments.tensors)


def _call(model: nn.Module, arguments: Arguments) -> None:
    """Call the whole model on the example in both modes. It may fail: whoever follows the model finds out why."""
    with undisturbed(model), suppress(StageError):
        for mode in (True, False):
            model.train(mode)
            run_whole(model, arguments, arguments.tensors)


def refuse_compiled(model: nn.Module) -> None:
    """Refuse a model whose forward is no longer Python. Raises `StageError` (E313)."""
    scripted = isinstance(model, torch.jit.ScriptModule)
    if scripted or "_orig_mod" in model._modules:
        raise StageError(
            "a compiled model cannot be cut",
            where=type(model).__name__,
            expected="the nn.Module itself, with its forward in Python",
            got="a model of torch.jit" if scripted else "a model of torch.compile",
            remedy="pass the module that was compiled, before it is",
            code="E313",
        )


def _refuse_compiled_inside(model: nn.Module) -> None:
    """Refuse submodules of torch.compile where forward is followed. Raises `StageError` (E313)."""
    names = [
        name
        for name, module in model.named_modules()
        if name and ("_orig_mod" in module._modules or module._compiled_call_impl is not None)
    ]
    if names:
        raise StageError(
            "a forward that calls a compiled submodule cannot be followed",
            where=f"{type(model).__name__}, {', '.join(names[:3])}",
            expected="submodules that are compiled after the cut",
            got="a module of torch.compile",
            remedy=f"pass the model before {names[0]!r} is compiled; model.{names[0]}.compile() may follow the cut",
            code="E313",
        )


def compose(cut: Cut, inputs: Example) -> Tensor:
    """Run the pieces by hand, one after another, as the uncut model would run.

    Args:
        cut: The cut model.
        inputs: As `example` of `cut`.

    Returns:
        The model's output tensor; gradients flow through all pieces.
    """
    if isinstance(inputs, Tensor):
        inputs = {cut.inputs[0]: inputs}
    values = list(inputs.values() if isinstance(inputs, Mapping) else inputs)
    if len(values) == 1 and isinstance(values[0], Mapping):
        inputs = values[0]  # the one dictionary that forward takes
    named = dict(inputs) if isinstance(inputs, Mapping) else dict(zip(cut.inputs, values, strict=False))
    return run_pieces(cut.pieces, named)[-1][0]
