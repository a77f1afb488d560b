"""Following a model's forward with `torch.fx`, only as deep as the cut points ask.

Submodules without a cut point inside are single steps: their code is not looked into, so anything may happen there.
With an example, each step is computed at once while tracing. So sizes are known where the model's code asks for them
(a comparison of sizes is followed, and held to at run time), tuples have a length, and in-place writes are seen.
"""

from __future__ import annotations

import linecache
import operator
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from traceback import walk_tb
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import Attribute, TraceError

from cutlayer.errors import CutlayerError, StageError
from cutlayer.models.example import Arguments
from cutlayer.models.kinds import is_derived
from cutlayer.models.stacks import Parts
from cutlayer.models.steps import Ref, Step, hold, substitute

__all__ = ["Trace", "trace"]

# Functions that make a tensor from sizes alone: torch would not show them a traced size.
_MAKERS = tuple(
    getattr(torch, name)
    for name in [
        "zeros",
        "ones",
        "full",
        "empty",
        "arange",
        "linspace",
        "eye",
        "rand",
        "randn",
        "randint",
        "tril_indices",
    ]
)
_TORCH, _HERE = str(Path(torch.__file__).parent), str(Path(__file__).parent)


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


def trace(
    model: nn.Module,
    arguments: Arguments,
    *,
    enter: frozenset[str],
    stacks: Mapping[str, Parts],
    pick: Callable[[Any], Any],
) -> Trace:
    """Follow `model.forward`.

    Args:
        model: The model, in the mode that is to be followed. It runs on the example, if there is one.
        arguments: What forward is called with.
        enter: Paths of the submodules to look into; "" (the model itself) is always looked into.
        stacks: Stacks of blocks by path, taken apart where they are to be cut.
        pick: Chooses the output tensor from what forward returns.

    Raises:
        StageError: the code cannot be followed (E313), or decides by the values of tensors (E314).
    """
    if "" in stacks:
        enter = frozenset()
    tracer = _Tracer(model, arguments, enter, stacks, pick)
    try:
        graph = tracer.trace(model)
    except CutlayerError:
        raise
    except Exception as error:
        raise StageError(
            "the model's forward cannot be followed",
            where=_line(error.__traceback__) or f"forward of {type(model).__name__}",
            got=f"{type(error).__name__}: {error}",
            remedy="put the operation into a submodule of its own (submodules without a cut point inside are not looked "
            "into), pass example= so that sizes are known, or hand in the stages by hand",
            code="E313",
        ) from error
    return tracer.result(graph)


class _Proxy(fx.Proxy):
    """A value while tracing. Python may ask for its size or its number where an example tells them."""

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return self.tracer.attribute(self, name)  # type: ignore[attr-defined]

    def __index__(self) -> int:
        return int(self.tracer.constant(self, operator.index))  # type: ignore[attr-defined]

    def __int__(self) -> int:
        return int(self.tracer.constant(self, int))  # type: ignore[attr-defined]

    def __float__(self) -> float:
        return float(self.tracer.constant(self, float))  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return int(self.tracer.constant(self, len))  # type: ignore[attr-defined]


class _Tracer(fx.Tracer):
    """`torch.fx`'s tracer, which computes as it goes and treats nearly all submodules as leaves."""

    proxy_buffer_attributes = True

    def __init__(
        self,
        model: nn.Module,
        arguments: Arguments,
        enter: frozenset[str],
        stacks: Mapping[str, Parts],
        pick: Callable[[Any], Any],
    ) -> None:
        super().__init__(autowrap_functions=_MAKERS + _from_einops())
        self._autowrap_search.append(torch)
        self.model, self.arguments, self.enter, self.stacks, self.pick = model, arguments, enter, stacks, pick
        self.found = Trace(tuple(arguments.tensors))
        self.details: dict[str, tuple[str, str, tuple[Any, ...]]] = {}  # step -> path, line, contexts
        self.derived = self.found.derived
        self.path, self.running, self.seen = "", False, set[str]()
        self.callee: tuple[nn.Module, Callable[..., Any]] = model, model.forward  # of the next "call_module"
        self.watched: list[tuple[str, Tensor, int]] = []
        self.ambient = _ambient()

    # --- what fx asks ---

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: object = None
    ) -> tuple[Any, list[Any]]:
        """Make an input of each tensor argument; the others are constants."""
        del is_module, concrete_args
        proxies = {name: self.create_proxy("placeholder", name, (), {}) for name in self.arguments.tensors}
        given = {**self.arguments.constants, **proxies}
        if "" in self.stacks:
            return lambda: self.pick(self._open(self._stack("", (), given))), []
        return lambda: self.pick(self._open(root_fn(self.model, **given))), []

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Wrap a step's result."""
        return _Proxy(node, self)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:  # noqa: ANN401
        """Note the call of a submodule as one step, or look into it."""
        if self.running:
            return forward(*args, **kwargs)
        outer, self.path = self.path, self.path_of_module(m)
        try:
            if self.path in self.stacks:
                return self._stack(self.path, args, kwargs)
            if self.path in self.enter:
                return forward(*args, **kwargs)
            self.callee = m, forward
            return self.create_proxy("call_module", self.path, args, kwargs)
        finally:
            self.path = outer

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:  # noqa: ANN401
        """Fetch a parameter or buffer as a step of its own, each time: it must not outlive an in-place write."""
        if self.running:
            return attr_val
        return super().getattr(attr, attr_val, {})

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> fx.Node:  # noqa: ANN401
        """Add a step and compute it."""
        node = super().create_node(kind, target, args, kwargs, *rest, **more)
        self.details[node.name] = (self.path, _line(), _contexts(self.ambient))
        if kind == "placeholder":
            if self.arguments.batch:
                self._keep(node, self.arguments.tensors[target])
        elif kind != "output":
            if kind == "call_module":
                self.found.modules[node.name] = self.callee[0]
            if self.arguments.batch or kind == "get_attr":
                self._compute(node)
            buffer = kind == "get_attr" and not isinstance(self.found.values[node.name], nn.Parameter)
            if buffer or is_derived(self._step(node), self.derived, self.found.modules):
                self.derived.add(node.name)
        return node

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Any:  # noqa: ANN401
        """Add a step; give None and texts as they are, so that the model's code can test for them."""
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **more)
        value = self.found.values.get(proxy.node.name, proxy)
        plain = value is None or isinstance(value, str)
        if target is getattr and not isinstance(self.found.values.get(args[0].node.name), Tensor):
            plain = plain or isinstance(value, bool | int | float)  # a field of a model's output, not a size
        return value if plain else proxy

    def create_arg(self, a: Any) -> Any:  # noqa: ANN401
        """Let any constant be an argument: a tensor, a configuration object."""
        if isinstance(a, nn.Module):
            raise TraceError(f"the submodule {type(a).__name__} is passed to a function")
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter):
            registered = any(a is buffer for buffer in self.model.buffers())
            return super().create_arg(a) if registered else a
        try:
            return super().create_arg(a)
        except NotImplementedError:
            return a

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Decide a condition from sizes."""
        return bool(self.constant(obj, bool))

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """Go through a tuple or list whose length is known."""
        value = self.found.values.get(obj.node.name)
        if isinstance(value, tuple | list):
            return iter([obj[index] for index in range(len(value))])
        if isinstance(value, Mapping):
            return iter(list(value))
        if isinstance(value, Tensor):
            return iter([obj[index] for index in range(int(self.constant(obj, len)))])
        return super().iter(obj)

    # --- what the values answer ---

    def attribute(self, proxy: fx.Proxy, name: str) -> Any:  # noqa: ANN401
        """Return an attribute of a value: at once where it is data, lazily where it may be a method."""
        value = self.found.values.get(proxy.node.name)
        if proxy.node.op == "get_attr" and name in ("shape", "ndim", "dtype"):
            return getattr(value, name)
        if value is None or callable(getattr(value, name)):
            return Attribute(proxy, name)
        return self.create_proxy("call_function", getattr, (proxy, name), {})

    def constant(self, proxy: fx.Proxy, kind: Callable[[Any], Any]) -> Any:  # noqa: ANN401
        """Return what Python asks of a value, if only sizes decide it, and hold the model to that."""
        node = proxy.node
        if kind is len:
            node = self.create_proxy("call_function", len, (proxy,), {}).node
        if node.name not in self.derived:
            raise StageError(
                "the model's control flow depends on the values of its data",
                where=str(self._step(node)),
                expected="the same operations for all data",
                got=f"Python asks for {kind.__name__}() of a tensor",
                remedy="put this decision into a submodule of its own, or replace it by torch.where",
                code="E314",
            )
        if not self.arguments.batch:
            raise StageError(
                "the model's control flow depends on a size",
                where=str(self._step(node)),
                remedy="pass example=, inputs as a loader gives them: the cut follows what the model does with them",
                code="E326",
            )
        value = kind(self.found.values[node.name]) if kind is not len else self.found.values[node.name]
        self.create_proxy("call_function", hold, (self.proxy(node), self.found.values[node.name], _line()), {})
        return value

    # --- steps ---

    def _open(self, output: Any) -> Any:  # noqa: ANN401
        """Return an output that is one step's tuple or dict as a tuple or dict of values."""
        value = self.found.values.get(output.node.name) if isinstance(output, fx.Proxy) else None
        if isinstance(value, Mapping):
            return {key: output[key] for key in value}
        if isinstance(value, tuple | list):
            return tuple(output[index] for index in range(len(value)))
        return output

    def _stack(self, path: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:  # noqa: ANN401
        if path in self.seen:
            raise TraceError(f"the stack of blocks {path!r} is called twice")
        self.seen.add(path)
        parts = self.stacks[path]
        given, shared = parts.bind(args, kwargs)
        output = None
        for part in parts.parts:
            self.path, self.callee = part.path, (part.module, part.module)
            output = self.create_proxy("call_module", path, (), given, _name(part.path))
            given = {**shared, part.entry: output}
        return output

    def _step(self, node: fx.Node) -> Step:
        path, line, contexts = self.details.get(node.name, ("", "", ()))
        kind = {"call_module": "module", "call_method": "method", "get_attr": "state"}.get(node.op, "function")
        args, kwargs = _with_refs(node.args), _with_refs(node.kwargs)
        return Step(node.name, kind, node.target, args, kwargs, path, line, contexts)

    def _compute(self, node: fx.Node) -> None:
        values = self.found.values
        args = substitute(_with_refs(node.args), lambda ref: values[ref.name])
        kwargs = substitute(_with_refs(node.kwargs), lambda ref: values[ref.name])
        self.running = True
        try:
            if node.op == "call_module":
                value = self.callee[1](*args, **kwargs)
            elif node.op == "call_method":
                value = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            elif node.op == "get_attr":
                value = operator.attrgetter(str(node.target))(self.model)
            else:
                value = node.target(*args, **kwargs)  # type: ignore[operator]
        finally:
            self.running = False
        written = tuple(name for name, tensor, version in self.watched if tensor._version != version)
        if written:
            self.found.written[node.name] = written
            self.watched = [(name, tensor, tensor._version) for name, tensor, _ in self.watched]
        self._keep(node, value)

    def _keep(self, node: fx.Node, value: Any) -> None:  # noqa: ANN401
        self.found.values[node.name] = value
        if isinstance(value, Tensor) and not value.is_inference():
            self.watched.append((node.name, value, value._version))

    def result(self, graph: fx.Graph) -> Trace:
        """Return the steps of a finished graph."""
        nodes = list(graph.nodes)
        output = nodes[-1].args[0]
        if not isinstance(output, fx.Node) or not isinstance(self.found.values.get(output.name, Tensor()), Tensor):
            raise TraceError("the output is not a tensor")
        self.found.output = output.name
        self.found.steps = [self._step(node) for node in nodes if node.op not in ("placeholder", "output")]
        return self.found


def _with_refs(value: Any) -> Any:  # noqa: ANN401
    """Return arguments of fx with `Ref` in place of nodes, and plain lists and dicts in place of fx's own."""
    if isinstance(value, fx.Node):
        return Ref(value.name)
    if isinstance(value, list):
        return [_with_refs(item) for item in value]
    if isinstance(value, dict):
        return {key: _with_refs(item) for key, item in value.items()}
    if isinstance(value, tuple):
        items = [_with_refs(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, slice):
        return slice(*(_with_refs(item) for item in (value.start, value.stop, value.step)))
    return value


def _line(traceback: TracebackType | None = None) -> str:
    """Return the line of the user's code that is running, or that raised: "file.py:12 `x += y`"."""
    frames: Iterator[tuple[FrameType, int]]
    if traceback is None:
        frames = _outwards(sys._getframe())
    else:
        frames = iter([(frame, number) for frame, number in walk_tb(traceback)][::-1])
    for frame, number in frames:
        file = frame.f_code.co_filename
        if not file.startswith((_TORCH, _HERE)):
            text = linecache.getline(file, number).strip()
            return f"{Path(file).name}:{number}" + (f" `{text}`" if text else "")
    return ""


def _outwards(frame: FrameType | None) -> Iterator[tuple[FrameType, int]]:
    while frame is not None:
        yield frame, frame.f_lineno
        frame = frame.f_back


def _name(path: str) -> str | None:
    """Return a step's name for a path, or None for the model itself (fx finds a name then)."""
    return re.sub(r"\W", "_", path) or "blocks"


def _ambient() -> tuple[bool, dict[str, tuple[bool, torch.dtype]]]:
    """Return whether gradients are recorded, and the autocast of each kind of device."""
    kinds = ("cpu", "cuda")
    return torch.is_grad_enabled(), {
        kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds
    }


def _contexts(outside: tuple[bool, dict[str, tuple[bool, torch.dtype]]]) -> tuple[Any, ...]:
    """Return what the user's code has switched on or off around the present call."""
    (grad, casts), (outer_grad, outer_casts) = _ambient(), outside
    changed = [(kind, dtype, on) for kind, (on, dtype) in casts.items() if outer_casts[kind] != (on, dtype)]
    return (*(["no_grad"] if outer_grad and not grad else []), *changed)


def _from_einops() -> tuple[Callable[..., Any], ...]:
    """Return the functions of einops if the user's code has loaded it: they know no traced values."""
    einops = sys.modules.get("einops")
    return tuple(getattr(einops, name) for name in ("rearrange", "reduce", "repeat", "einsum")) if einops else ()
