"""Following a model's forward with `torch.fx`, only as deep as the cut points ask.

Submodules without a cut point inside are single steps: their code is not looked into, so anything may happen there.
With an example, each step is computed at once while tracing. So sizes are known where the model's code asks for them
(a comparison of sizes is followed, and held to at run time), tuples have a length, and in-place writes are seen.
"""

from __future__ import annotations

import operator
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import Attribute, TraceError

from cutlayer.errors import CutlayerError, StageError
from cutlayer.models.asked import answering
from cutlayer.models.attributes import Attributes
from cutlayer.models.distributions import made_as_steps
from cutlayer.models.example import Arguments
from cutlayer.models.functions import kept_whole
from cutlayer.models.kinds import is_derived, is_told
from cutlayer.models.names import nearest
from cutlayer.models.proxies import Value
from cutlayer.models.record import Recorder, Trace
from cutlayer.models.stacks import Parts, without_cache
from cutlayer.models.steps import every_module, hold
from cutlayer.models.weights import Weights, held_again
from cutlayer.models.whereabouts import from_einops, line, step_name

__all__ = ["trace"]

_ONE = threading.RLock()  # tracing replaces methods of `nn.Module` for the whole process: one thread at a time

# Functions that make a tensor from sizes or from what they are given: torch would not show them a traced value.
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
        "as_tensor",
        "asarray",
        "tensor",
    ]
)


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
    kept = Attributes(every_module(model))
    buffers = [(owner, name, value) for owner in model.modules() for name, value in owner._buffers.items()]
    try:
        entered = [model, *map(model.get_submodule, enter)]
        with (
            _ONE,
            answering(tracer, tracer.found.values, entered),
            made_as_steps(tracer),
            kept_whole(),
            _without_backward_hooks(entered),
            tracer.weights,
        ):
            graph = tracer.trace(model)
    except CutlayerError:
        raise
    except Exception as error:
        sizes = "" if arguments.batch else " pass example= so that sizes are known,"
        raise StageError(
            "the model's forward cannot be followed",
            where=line(error.__traceback__) or f"forward of {type(model).__name__}",
            got=f"{type(error).__name__}: {error}",
            remedy="put the operation into a submodule of its own (submodules without a cut point inside are not looked"
            f" into),{sizes} or hand in the stages by hand",
            code="E313",
        ) from error
    for owner, name, value in buffers:
        _put_back(owner, name, value, tracer.record)
    kept.without(fx.Proxy)
    return tracer.record.result(graph)


@contextmanager
def _without_backward_hooks(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Take away the backward hooks of modules that are looked into: torch would put them on values that have none."""
    with ExitStack() as stack:
        for module in modules:
            for table in ("_backward_hooks", "_backward_pre_hooks"):
                stack.enter_context(patch.object(module, table, OrderedDict()))
        yield


def _put_back(owner: nn.Module, name: str, value: Tensor | None, record: Recorder) -> None:
    """Put back a buffer that the forward has assigned to: `self.count += 1` has written to it, all else is refused."""
    now: object = owner._buffers.get(name)
    if not isinstance(now, fx.Proxy):
        return
    owner._buffers[name] = value
    if record.found.values.get(now.node.name) is not value:
        step = record.step(now.node)
        raise StageError(
            f"the model's forward puts another tensor in place of its buffer {name!r}",
            where=str(step),
            expected="a buffer that is written to in place",
            remedy=f"write self.{name}.copy_(...) or self.{name} += ... instead of self.{name} = ...",
            code="E313",
        )


def _made_inside(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward of a module that the model's forward has made itself, such as `nn.ReLU()(x)`, to look into."""
    held = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    if held:
        raise StageError(
            f"the model's forward calls a {type(module).__name__} that is not one of its submodules",
            where=line(),
            expected="a submodule, or a module without parameters and buffers",
            got=f"one that holds {', '.join(map(repr, held[:3]))}",
            remedy="make it once, in __init__, and keep it as an attribute: self.layer = ...",
            code="E313",
        )
    return forward


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
        super().__init__(autowrap_functions=(*_MAKERS, torch.distributions.kl_divergence, *from_einops()))
        self._autowrap_search += [torch, torch.distributions, torch.distributions.kl]
        self.model, self.arguments, self.enter, self.stacks, self.pick = model, arguments, enter, stacks, pick
        self.record = Recorder(model, arguments)
        self.found, self.derived = self.record.found, self.record.found.derived
        self.weights = Weights(model, self)
        self.record.paused = self.weights.paused
        self.told, self.lengths = set[str](), set[str]()  # steps: numbers out of what a submodule gave; `len`s
        self.path, self.seen, self.names = "", set[str](), dict[nn.Module, list[str]]()
        for name, module in model.named_modules(remove_duplicate=False):
            self.names.setdefault(module, []).append(name)

    # --- what fx asks ---

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: object = None
    ) -> tuple[Any, list[Any]]:
        """Make an input of each tensor argument; the others are constants."""
        del root_fn, is_module, concrete_args  # a forward may be the object's own, not its class's
        proxies = {name: self.create_proxy("placeholder", name, (), {}) for name in self.arguments.tensors}
        given = self.arguments.called(proxies)
        if "" in self.stacks:
            return lambda: self._end(self._stack("", (), given)), []
        return lambda: self._end(self.model.forward(**without_cache(self.model, (), given))), []

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Wrap a step's result."""
        number = node.name in self.derived and type(self.found.values.get(node.name)) in (int, float)
        if number and any(one.name in self.lengths for one in node.all_input_nodes):
            self.lengths.add(node.name)
        return Value(node, self)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:  # noqa: ANN401
        """Note the call of a submodule as one step, or look into it."""
        if self.record.away:
            return forward(*args, **kwargs)
        if m not in self.names:
            return _made_inside(m, forward)(*args, **kwargs)
        outer, self.path = self.path, nearest(self.names[m], self.path, self.stacks)
        try:
            if self.path in self.stacks:
                return self._stack(self.path, args, kwargs)
            if self.path in self.enter:
                return forward(*args, **without_cache(m, args, kwargs))
            self.record.callee = m, forward
            return self.create_proxy("call_module", self.path, args, kwargs)
        finally:
            self.path = outer

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:  # noqa: ANN401, ARG002
        """Fetch a parameter or buffer as a step of its own, each time: it must not outlive an in-place write."""
        if self.record.away or isinstance(attr_val, fx.Proxy):
            return attr_val
        return super().getattr(attr, attr_val, {})

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> fx.Node:  # noqa: ANN401
        """Add a step and compute it."""
        node = super().create_node(kind, target, args, kwargs, *rest, **more)
        if kind == "placeholder":
            node.name = target  # fx calls an argument `input` "input_1", as it does with all names of builtins
        self.record.note(node, self.path)
        if kind == "placeholder":
            if self.arguments.batch:
                self.record.keep(node, self.arguments.tensors[target])
        elif kind == "output":
            self.record.check_dice(node)
        else:
            if kind == "call_module":
                self.found.modules[node.name] = self.record.callee[0]
            if self.arguments.batch or kind == "get_attr":
                self.record.compute(node)
            buffer = kind == "get_attr" and not isinstance(self.found.values[node.name], nn.Parameter)
            step = self.record.step(node)
            alone = buffer or is_derived(step, self.derived, self.found.modules)
            if alone and self.found.values.get(node.name, node) is not None:  # one that gives nothing is a check
                self.derived.add(node.name)
            elif is_told(step, self.told | self.derived, self.found.modules, self.found.values):
                self.told.add(node.name)
        return node

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Any:  # noqa: ANN401
        """Add a step; give None and texts as they are, so that the model's code can test for them."""
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **more)
        value = self.found.values.get(proxy.node.name, proxy)
        plain = value is None or isinstance(value, str)
        if target is getattr and not isinstance(self.found.values.get(args[0].node.name), Tensor):
            plain = plain or isinstance(value, bool | int | float)  # a field of a model's output, not a size
        if plain and target in (getattr, operator.getitem):
            super().create_proxy("call_function", hold, (proxy, value, line()), {})
        return value if plain else proxy

    def create_arg(self, a: Any) -> Any:  # noqa: ANN401
        """Let any constant be an argument: a tensor, a configuration object."""
        if isinstance(a, nn.Module):
            raise TraceError(f"the submodule {type(a).__name__} is passed to a function")
        if isinstance(a, fx.Proxy):
            return a.node
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter):
            if id(a) in self.weights.names:
                return super().create_arg(a)
            if id(a) in self.record.makers:
                return self.record.makers[id(a)]  # a hook, or code of another file, may have kept a step's result
            if not self.record.away and (a.grad_fn is not None or self.weights.name_of(a)):
                raise held_again(self.weights.name_of(a) or "weights: it has a gradient")
            return a
        try:
            return super().create_arg(a)
        except NotImplementedError:
            return a

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Decide a condition from sizes, or numbers that a submodule gave."""
        return bool(self.constant(obj, bool))

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """Go through a value whose length is known, and held to."""
        value = self.found.values.get(obj.node.name)
        if isinstance(value, Mapping):
            self.constant(obj, len)
            return iter(list(value))
        if isinstance(value, tuple | list | Tensor):
            return iter([obj[index] for index in range(int(self.constant(obj, len)))])  # type: ignore[index]
        return super().iter(obj)

    # --- what the values answer ---

    def attribute(self, proxy: fx.Proxy, name: str) -> Any:  # noqa: ANN401
        """Return an attribute of a value: at once where it is data, lazily where it may be a method."""
        value = self.found.values.get(proxy.node.name)
        if proxy.node.op == "get_attr" and name in ("shape", "ndim", "dtype"):
            return getattr(value, name)
        if value is None or callable(self.record.attribute(value, name)):
            return Attribute(proxy, name)
        return self.create_proxy("call_function", getattr, (proxy, name), {})

    def constant(self, proxy: fx.Proxy, kind: Callable[[Any], Any]) -> Any:  # noqa: ANN401
        """Return what Python asks of a value, if only sizes decide it, and hold the model to that."""
        node = proxy.node
        if kind is len:
            node = self.create_proxy("call_function", len, (proxy,), {}).node
        if node.name not in self.derived | self.told:
            raise StageError(
                "the model's control flow depends on the values of its data",
                where=str(self.record.step(node)),
                expected="the same operations for all data",
                got=f"Python asks for {kind.__name__}() of a tensor",
                remedy="put this decision into a submodule of its own, or replace it by torch.where",
                code="E314",
            )
        if not self.arguments.batch:
            raise StageError(
                "the model's control flow depends on a size",
                where=str(self.record.step(node)),
                remedy="pass example=, inputs as a loader gives them: the cut follows what the model does with them",
                code="E326",
            )
        value = kind(self.found.values[node.name]) if kind is not len else self.found.values[node.name]
        self.create_proxy("call_function", hold, (self.proxy(node), self.found.values[node.name], line()), {})
        return value

    # --- steps ---

    def _end(self, output: Any) -> Any:  # noqa: ANN401
        """Return the one tensor of what forward returns; that may be one step's tuple or dict, then of values."""
        value = self.found.values.get(output.node.name) if isinstance(output, fx.Proxy) else None
        if isinstance(value, Mapping):
            output = {key: output[key] for key in value}
        elif isinstance(value, tuple | list):
            output = tuple(output[index] for index in range(len(value)))
        elif isinstance(value, Tensor) and self.pick(value) is value:
            return output
        return self.pick(output)

    def _stack(self, path: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:  # noqa: ANN401
        if path in self.seen:
            raise TraceError(f"the stack of blocks {path!r} is called twice")
        self.seen.add(path)
        parts = self.stacks[path]
        given, shared = parts.bind(args, kwargs)
        output = None
        for part in parts.parts:
            self.path, self.record.callee = part.path, (part.module, part.module)
            output = self.create_proxy("call_module", path, (), given, step_name(part.path))
            given = {**shared, part.entry: output}
        return output
