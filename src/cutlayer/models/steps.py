"""A forward as a list of steps, and the module that runs one piece of the list.

A step is one call that the model's own code makes: a submodule, a function, a method of a tensor, or the fetching of a
parameter or buffer. The list is data: it is cut by slicing it, and `PieceModule` runs a slice. Nothing is generated
as source text and nothing is compiled, so that an error comes from the user's own line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cutlayer.errors import StageError

__all__ = ["PieceModule", "Ref", "Routine", "Step", "every_module", "hold", "lend", "refs", "routine", "substitute"]


@dataclass(frozen=True)
class Ref:
    """Stands in a step's arguments for the result of an earlier step, or for an input, by name."""

    name: str


@dataclass(frozen=True, eq=False)
class Step:
    """One call.

    Attributes:
        name: Name of its result; unique in the list.
        op: "module", "function", "method" or "state" (a parameter or buffer is fetched).
        target: Path of the submodule or of the state, the function, or the method's name.
        args: Positional arguments, with `Ref` where results of other steps go.
        kwargs: Keyword arguments, likewise.
        path: The submodule that makes the call ("" for the model itself).
        line: Where in the user's code the call stands; for errors.
        contexts: What the user's code had switched on around the call: "no_grad", or (device, dtype, enabled) of
            autocast.
    """

    name: str
    op: str
    target: Any
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    path: str = ""
    line: str = ""
    contexts: tuple[Any, ...] = ()

    def __str__(self) -> str:
        """Return the call as a user knows it: the function, the submodule, the line."""
        if self.target is hold:
            return "a number that Python asks for" + (f" at {self.line}" if self.line else "")
        target = self.target if isinstance(self.target, str) else getattr(self.target, "__name__", str(self.target))
        kind = {"module": "submodule", "method": "method", "state": "tensor", "function": "function"}[self.op]
        inside = f" in {self.path!r}" if self.path and self.path != target else ""
        return f"{kind} {target!r}{inside}" + (f" at {self.line}" if self.line else "")


def substitute(value: Any, change: Callable[[Ref], Any]) -> Any:  # noqa: ANN401
    """Return `value` with each `Ref` in it changed; goes into tuples, lists, dicts and slices."""
    if isinstance(value, Ref):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(substitute(item, change) for item in value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(substitute(item, change) for item in value))
    if type(value) is dict:
        return {key: substitute(item, change) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(substitute(item, change) for item in (value.start, value.stop, value.step)))
    return value


def refs(step: Step) -> Iterator[str]:
    """Name every result that a step uses, in order, once each."""
    found: dict[str, None] = {}

    def note(ref: Ref) -> Ref:
        found[ref.name] = None
        return ref

    substitute((step.args, step.kwargs), note)
    return iter(found)


def hold(value: object, expected: object, text: str) -> None:
    """Raise `StageError` if what the model's own control flow depends on is another than when it was cut.

    That is a size, or what a submodule gives beside tensors: a number, a text, or None where it may be a tensor.
    """
    if isinstance(value, Tensor) != isinstance(expected, Tensor) or value != expected:
        raise StageError(
            "the model was cut for another size",
            where=text,
            expected=str(expected),
            got="a tensor" if isinstance(value, Tensor) else str(value),
            remedy="keep sizes (all but the batch) as in the example that the model was cut with, or cut it again with "
            "an example of this size; where a submodule finds it from values, use it in that submodule, or as a tensor",
            code="E322",
        )


@dataclass(frozen=True, eq=False)
class Routine:
    """The steps of a piece in one mode (train or evaluation).

    Attributes:
        entries: Names under which the steps know the piece's inputs, in the order of the inputs.
        steps: The steps in order.
        frees: For each step, the names that nobody needs after it.
        results: Names of the outputs, in order.
    """

    entries: tuple[str, ...]
    steps: tuple[Step, ...]
    frees: tuple[tuple[str, ...], ...]
    results: tuple[str, ...]


def routine(entries: tuple[str, ...], steps: tuple[Step, ...], results: tuple[str, ...]) -> Routine:
    """Make a `Routine`: find after which step each value can be let go."""
    last: dict[str, int] = {}
    for index, step in enumerate(steps):
        last |= dict.fromkeys([step.name, *refs(step)], index)
    frees: list[list[str]] = [[] for _ in steps]
    for name, index in last.items():
        if name not in results:
            frees[index].append(name)
    return Routine(entries, steps, tuple(tuple(names) for names in frees), results)


def lend(owner: nn.Module, borrower: nn.Module) -> None:
    """Let `borrower` hold the parameters, buffers and submodules of `owner` under their own names.

    Both look into the same dictionaries: moving or loading one moves or loads the other. `owner` is kept as
    `borrower.lender`, unregistered, so that names get no prefix.
    """
    for table in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        borrower.__dict__[table] = owner.__dict__[table]
    borrower.__dict__["lender"] = owner


def every_module(owner: nn.Module) -> Iterator[nn.Module]:
    """Give a module, all its submodules, and those that lend (which are not registered)."""
    for module in owner.modules():
        yield from _with_lenders(module)


def _with_lenders(module: nn.Module) -> Iterator[nn.Module]:
    yield module
    while "lender" in module.__dict__:
        module = module.__dict__["lender"]
        yield module


class PieceModule(nn.Module):
    """Runs one piece of a cut model. Called positionally with the piece's inputs.

    Its parameters are those of the user's model, the same objects under the same names. It follows `train()` and
    `eval()`: each mode has its own routine, because the model's code may do something else in it.

    Args:
        routines: What to do in train mode (True) and in evaluation (False).

    Attributes:
        frozen: Paths of submodules, at any depth, that the user's model keeps in evaluation mode even when it trains.
    """

    def __init__(self, routines: Mapping[bool, Routine]) -> None:
        """Keep the routines; submodules, parameters and what is frozen are added by who builds the piece."""
        super().__init__()
        self.routines, self.frozen = dict(routines), tuple[str, ...]()

    def forward(self, *inputs: Tensor) -> Any:  # noqa: ANN401
        """Return the piece's output, or a tuple of its outputs in their order; tensors with the batch first."""
        todo = self.routines[self.training]
        values: dict[str, Any] = dict(zip(todo.entries, inputs, strict=True))
        for step, frees in zip(todo.steps, todo.frees, strict=True):
            with _contexts(step):
                values[step.name] = self._do(step, lambda ref: values[ref.name])
            for name in frees:
                del values[name]
        results = tuple(values[name] for name in todo.results)
        return results[0] if len(results) == 1 else results

    def train(self, mode: bool = True) -> PieceModule:
        """Switch to train mode or evaluation, as the user's model does."""
        super().train(mode)
        if "lender" in self.__dict__:
            self.__dict__["lender"].train(mode)
        for path in self.frozen if mode else ():
            for module in _with_lenders(self.get_submodule(path)):
                module.training = False
        return self

    def _do(self, step: Step, change: Callable[[Ref], Any]) -> Any:  # noqa: ANN401
        args, kwargs = substitute(step.args, change), substitute(dict(step.kwargs), change)
        if step.op == "module":
            module = self.get_submodule(step.target) if step.target else self.__dict__["lender"]
            return module(*args, **kwargs)
        if step.op == "method":
            return getattr(args[0], step.target)(*args[1:], **kwargs)
        if step.op == "function":
            return step.target(*args, **kwargs)
        holder, _, name = step.target.rpartition(".")
        return getattr(self.get_submodule(holder), name)


def _contexts(step: Step) -> AbstractContextManager[Any]:
    if not step.contexts:
        return nullcontext()
    stack = ExitStack()
    for context in step.contexts:
        if context == "no_grad":
            stack.enter_context(torch.no_grad())
        else:
            device, dtype, enabled = context
            stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled))
    return stack
