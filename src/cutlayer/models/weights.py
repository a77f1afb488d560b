"""Operations on a model's parameters and buffers while its forward is followed, however the forward came by these.

`self.weight` is a traced value. `self.parameters()`, `self.state_dict()`, `self._parameters["weight"]` and a list of
weights give the tensors themselves: what is computed with them would be a number of this one moment, and the pieces
would go on with it while training moves the weight. So each operation that takes one of them becomes a step.

| code | when |
|---|---|
| E313 | a weight is reached by what the pieces cannot do again: a tensor that shares its memory, its `.grad`, `vmap` |
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from operator import attrgetter
from typing import Any, Protocol
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.fx.node import map_aggregate
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from cutlayer.errors import StageError
from cutlayer.models.whereabouts import line

__all__ = ["SET", "Tracing", "Weights", "held_again", "memory", "set_on", "step_with_weights"]

SET = frozenset({"data", "requires_grad"})  # what may be set on a tensor as a step: `weight.data = ...`
_MADE = frozenset({"data", "T", "mT", "H", "mH", "real", "imag"})
_KNOWN = frozenset(
    [
        *["shape", "dtype", "device", "layout", "ndim", "requires_grad", "names", "itemsize", "nbytes", "output_nr"],
        *["size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "element_size", "get_device"],
        *["data_ptr", "untyped_storage", "retains_grad", "_version", "has_names", "result_type", "can_cast"],
        *["__len__", "__hash__", "__repr__", "__format__", "__dir__"],
    ]
)
_ASKED: dict[str, Callable[[Any], Any]] = {
    "__bool__": bool,
    "__float__": float,
    "__int__": int,
    "__index__": operator.index,
    "__iter__": iter,
}
_WRITTEN = ["iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "setitem"]
_OPERATORS = {f"__{name}__": getattr(operator, name) for name in _WRITTEN}


class _Record(Protocol):
    @property
    def away(self) -> bool: ...


class Tracing(Protocol):
    """What follows a forward, as those see it who note steps for it."""

    @property
    def record(self) -> _Record:
        """Say whether a step is being carried out, or another thread is at work: nothing is to be noted then."""

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:  # noqa: ANN401
        """Note a step; return what stands for its value."""


class Weights(TorchFunctionMode):
    """Lets an operation that takes a parameter or buffer of a model be a step.

    Args:
        model: The model.
        tracer: What steps are added to.
    """

    def __init__(self, model: nn.Module, tracer: Tracing) -> None:
        """Note which tensors are the model's, and where their memory is."""
        super().__init__()
        self.tracer = tracer
        self.names: dict[int, str] = {}
        self.memory: dict[int, str] = {}
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            self.names.setdefault(id(value), name)
            self.memory.setdefault(memory(value), name)
        self.memory.pop(0, None)
        self.unseen = _Unseen(self)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Call a function of torch, or note the call as a step."""
        del types
        kwargs = dict(kwargs or {})
        if self.tracer.record.away or not self._takes_one((args, kwargs)):
            return func(*args, **kwargs)
        return self._step(func, args, kwargs)

    def name_of(self, value: object) -> str:
        """Return the name of the parameter or buffer that a tensor is, or whose memory it shares; "" if none."""
        if not isinstance(value, Tensor):
            return ""
        return self.names.get(id(value)) or self.memory.get(memory(value), "")

    def __enter__(self) -> Weights:
        """Begin; `get_parameter` and `get_buffer` too give traced values (torch's own ask for the class of theirs)."""
        self.named = ExitStack()
        self.named.enter_context(self.unseen)
        for name in ("get_parameter", "get_buffer"):
            self.named.enter_context(patch.object(nn.Module, name, lambda owner, path: attrgetter(path)(owner)))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        """End."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self.named.close()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave a step alone that is carried out: it runs as it would without this."""
        with ExitStack() as stack:
            if torch.overrides._get_current_function_mode() is self:  # type: ignore[no-untyped-call]
                stack.enter_context(torch.overrides._pop_mode_temporarily())
            if _python_dispatch._get_current_dispatch_mode() is self.unseen:
                stack.enter_context(_python_dispatch._pop_mode_temporarily())
            yield

    def _takes_one(self, given: Any) -> bool:  # noqa: ANN401
        found: list[Any] = []
        map_aggregate(given, found.append)
        return any(self.name_of(leaf) for leaf in found)

    def _fetched(self, leaf: Any) -> Any:  # noqa: ANN401
        name = self.name_of(leaf)
        if not name:
            return leaf
        if id(leaf) not in self.names:
            raise held_again(name)
        return self.tracer.create_proxy("get_attr", name, (), {})

    def _step(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__"):
            return self._attribute(func, name, args)
        if _is_known(name) or (name == "type" and len(args) == 1 and not kwargs):
            with self.paused():
                return func(*args, **kwargs)
        given, named = map_aggregate((args, kwargs), self._fetched)
        if name in _ASKED:
            return _ASKED[name](given[0])
        if name in _OPERATORS:
            return self.tracer.create_proxy("call_function", _OPERATORS[name], given, named)
        if is_tensor_method_or_property(func):
            return self.tracer.create_proxy("call_method", name, given, named)
        return self.tracer.create_proxy("call_function", func, given, named)

    def _attribute(self, func: Callable[..., Any], name: str, args: tuple[Any, ...]) -> Any:  # noqa: ANN401
        attribute = str(getattr(func, "__self__").__name__)  # noqa: B009
        if name == "__get__" and _is_known(attribute):
            return func(*args)
        owner, *value = map_aggregate(args[: 1 + (name == "__set__")], self._fetched)
        if name == "__set__":
            return set_on(self.tracer, owner, attribute, value[0])
        if attribute not in _MADE:
            raise _refusal(f"the model's forward reads .{attribute} of a weight", self.name_of(args[0]))
        return self.tracer.create_proxy("call_function", getattr, (owner, attribute), {})


class _Unseen(TorchDispatchMode):
    """Refuses what is computed from a weight without being a step: within `vmap`, TorchScript, or a library in C++."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.weights = weights

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        del types
        kwargs = dict(kwargs or {})
        if not self.weights.tracer.record.away:
            found: list[Any] = []
            map_aggregate((args, kwargs), found.append)
            for name in filter(None, map(self.weights.name_of, found)):
                raise _refusal("the model's forward computes with a weight where it cannot be followed", name)
        return func(*args, **kwargs)


def step_with_weights(call: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """Note a call as a step if a forward is followed and weights are among the arguments; else make it."""
    mode = torch.overrides._get_current_function_mode()  # type: ignore[no-untyped-call]
    if not isinstance(mode, Weights):
        return call(*args, **kwargs)
    return mode.__torch_function__(call, (), args, kwargs)


def set_on(tracer: Tracing, owner: Any, attribute: str, value: Any) -> None:  # noqa: ANN401
    """Note `owner.attribute = value` as a step. Raises `StageError` E313 for what no piece can do again."""
    if attribute not in SET:
        raise _refusal(f"the model's forward sets .{attribute} of a tensor", str(owner))
    tracer.create_proxy("call_function", setattr, (owner, attribute, value), {})


def held_again(name: str) -> StageError:
    """Return the error for a tensor of the user's that shares the memory of a weight, or was computed from one."""
    return StageError(
        "the model's forward uses a tensor that was made from a weight before it ran",
        where=line(),
        expected="the weight itself, fetched each time: the tensor would stay as it is while a piece trains",
        got=f"a tensor made from {name}",
        remedy="compute it in forward from the weight: self.layer.weight.detach() instead of what __init__ has kept",
        code="E313",
    )


def memory(value: Tensor) -> int:
    """Return where a tensor's memory begins; 0 where it has none of its own."""
    try:
        return value.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # sparse tensors, and those of subclasses that wrap others
        return 0


def _is_known(name: str) -> bool:
    """Say whether a weight's answer does not depend on its values."""
    return name in _KNOWN or (name.startswith("is_") and name != "is_nonzero")


def _refusal(what: str, name: str) -> StageError:
    return StageError(
        what,
        where=line(),
        expected="operations on the weight's values",
        got=name,
        remedy="do this in a submodule of its own that holds the weight, or in the training code",
        code="E313",
    )
