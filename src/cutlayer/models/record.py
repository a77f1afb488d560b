"""What tracing finds out: the steps, what each gave for the example, and which of them wrote in place."""

from __future__ import annotations

import operator
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from threading import get_ident
from types import FunctionType
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError

from cutlayer.errors import StageError
from cutlayer.models.example import Arguments, dice
from cutlayer.models.steps import Step, substitute
from cutlayer.models.weights import memory
from cutlayer.models.whereabouts import ambient, contexts, line, with_refs

__all__ = ["Recorder", "Trace"]


@dataclass
class Trace:
    """A forward as steps.

    Attributes:
        inputs: Names of the inputs, in the order of the arguments.
        steps: The steps in the order in which the model runs them.
        output: Name of the value that is the model's output.
        modules: The submodule of each step that calls one, by the step's name.
        values: What each step gave for the example, by name; only parameters and buffers where there is none.
        written: For a step that writes in place: the names of all values whose memory it wrote to.
        derived: Names of the steps that need no data, only sizes and buffers.
    """

    inputs: tuple[str, ...]
    steps: list[Step] = field(default_factory=list)
    output: str = ""
    modules: dict[str, nn.Module] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    written: dict[str, tuple[str, ...]] = field(default_factory=dict)
    derived: set[str] = field(default_factory=set)


class Recorder:
    """Notes steps, and computes each on the example.

    `running` is true while a step is carried out, within `paused()`. `callee` is the submodule that the next
    "call_module" calls, and how.
    """

    def __init__(self, model: nn.Module, arguments: Arguments) -> None:
        """Begin without steps."""
        self.model = model
        self.found = Trace(tuple(arguments.tensors))
        self.details: dict[str, tuple[str, str, tuple[Any, ...]]] = {}  # step -> path, line, contexts
        self.running, self.thread = False, get_ident()
        self.paused: Callable[[], AbstractContextManager[None]] = nullcontext
        self.callee: tuple[nn.Module, Callable[..., Any]] = model, model.forward
        self.makers: dict[int, fx.Node] = {}  # id of a tensor -> the step that gave it
        self.watched: list[tuple[str, Tensor, int]] = []
        self.ambient = ambient()
        self.dice = {torchs: dice(torchs=torchs) for torchs in (True, False)}  # as it was after the last step
        self.stray: fx.Node | None = None

    @property
    def away(self) -> bool:
        """Whether a call is none of the trace's: it is made within a step, or in another thread."""
        return self.running or get_ident() != self.thread

    def attribute(self, value: Any, name: str) -> Any:  # noqa: ANN401
        """Return an attribute of a step's value; what it runs is none of the trace's."""
        before, self.running = self.running, True
        try:
            return getattr(value, name)
        finally:
            self.running = before
            self.note_dice(True, False)

    def note(self, node: fx.Node, path: str) -> None:
        """Note where in the model and in the user's code a step is."""
        self.details[node.name] = (path, line(), contexts(self.ambient))

    def step(self, node: fx.Node) -> Step:
        """Return a node of fx as a step."""
        path, line, contexts = self.details.get(node.name, ("", "", ()))
        kind = {"call_module": "module", "call_method": "method", "get_attr": "state"}.get(node.op, "function")
        args, kwargs = with_refs(node.args), with_refs(node.kwargs)
        return Step(node.name, kind, node.target, args, kwargs, path, line, contexts)

    def compute(self, node: fx.Node) -> None:
        """Carry out a step on the example, and note which values it wrote to."""
        self.look_at_dice(node)
        values = self.found.values
        args = substitute(with_refs(node.args), lambda ref: values[ref.name])
        kwargs = substitute(with_refs(node.kwargs), lambda ref: values[ref.name])
        self.running = True
        try:
            with self.paused():
                value = self._value(node, args, kwargs)
                self._note_writes(node, args)
                self.keep(node, value)
        finally:
            self.running = False
            self.note_dice(*_dice_of(node))

    def note_dice(self, *which: bool) -> None:
        """Note where generators stand after a step that may have drawn."""
        self.dice |= {torchs: dice(torchs=torchs) for torchs in which}

    def look_at_dice(self, node: fx.Node) -> None:
        """Note the first step before which a random number was drawn in no step."""
        if self.stray is None and any(dice(torchs=torchs) != self.dice[torchs] for torchs in _dice_of(node)):
            self.stray = node

    def check_dice(self, node: fx.Node) -> None:
        """Raise `StageError` E314 if a random number was drawn outside of steps, up to this one: it would stay so."""
        self.look_at_dice(node)
        if self.stray is not None:
            raise StageError(
                "the model draws a random number that is no step of its own, so it would be the same each time",
                where=f"before {self.step(self.stray)}",
                expected="random numbers that are drawn by a submodule, or like a tensor",
                got="a draw of Python, of NumPy, or of torch with sizes that are plain numbers",
                remedy="put what it decides into a submodule of its own (it is carried out as it is), or decide by a "
                "tensor: x + keep * y with keep = torch.rand_like(x[:, :1]).lt(0.5)",
                code="E314",
            )

    def _value(self, node: fx.Node, args: Any, kwargs: Any) -> Any:  # noqa: ANN401
        if node.op == "call_module":
            return self.callee[1](*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self.model)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _note_writes(self, node: fx.Node, args: Any) -> None:  # noqa: ANN401
        """Note what a step wrote to: values with another version, those that share their memory, and `x.data = ...`."""
        moved = [tensor for _, tensor, version in self.watched if tensor._version != version]
        given = args[0] if node.target is setattr else None
        if not moved and given is None:
            return
        places = {memory(tensor) for tensor in moved} - {0}
        self.found.written[node.name] = tuple(
            name
            for name, tensor, version in self.watched
            if tensor is given or tensor._version != version or memory(tensor) in places
        )
        self.watched = [(name, tensor, tensor._version) for name, tensor, _ in self.watched]

    def keep(self, node: fx.Node, value: Any) -> None:  # noqa: ANN401
        """Keep a step's value."""
        self.found.values[node.name] = value
        if isinstance(value, Tensor):
            self.makers[id(value)] = node
        if isinstance(value, Tensor) and not value.is_inference():
            self.watched.append((node.name, value, value._version))

    def result(self, graph: fx.Graph) -> Trace:
        """Return the steps of a finished graph."""
        nodes = list(graph.nodes)
        output = nodes[-1].args[0]
        if not isinstance(output, fx.Node) or not isinstance(self.found.values.get(output.name, Tensor()), Tensor):
            raise TraceError("the output is not a tensor")
        self.found.output = output.name
        self.found.steps = [self.step(node) for node in nodes if node.op not in ("placeholder", "output")]
        return self.found


def _dice_of(node: fx.Node) -> tuple[bool, ...]:
    """Return whose generators a step may draw from: torch's, and others (dearer to look at) where it is Python code."""
    own = node.op in ("call_module", "output") or isinstance(node.target, FunctionType)
    return (True, False) if own else (True,)
