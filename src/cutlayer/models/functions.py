"""A user's own `torch.autograd.Function`: its call is one step, so that its backward is kept.

Left alone, `apply` would run the forward on traced values without autograd: the operations inside would be recorded,
and the backward lost. `MyFunction.apply` may be kept under any name (`rounded = MyFunction.apply`), so another
attribute in its place is not enough: what all of them run is replaced.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate
from torch.fx.proxy import TraceError
from torch.utils.checkpoint import CheckpointFunction

from cutlayer.models.weights import step_with_weights

__all__ = ["Applied", "applied", "kept_whole"]

_APPLY: types.FunctionType = torch.autograd.Function.apply.__func__  # type: ignore[attr-defined]
_CODE = _APPLY.__code__
_UNTRACED = types.FunctionType(_CODE, _APPLY.__globals__, "apply", _APPLY.__defaults__, _APPLY.__closure__)


@dataclass(frozen=True)
class Applied:
    """What a step calls: `function.apply`."""

    function: type[torch.autograd.Function]

    @property
    def __name__(self) -> str:
        """The call as a user wrote it."""
        return f"{self.function.__name__}.apply"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Apply the function; its outputs have its own backward."""
        return _UNTRACED(self.function, *args, **kwargs)


def _traced(cls: type, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
    import sys  # it runs with torch's globals

    return sys.modules["cutlayer.models.functions"].applied(cls, args, kwargs)


@contextmanager
def kept_whole() -> Iterator[None]:
    """While tracing, let a call of `apply` with a traced value be a step; all other calls are as ever."""
    _APPLY.__code__ = _traced.__code__.replace(co_freevars=_CODE.co_freevars)
    try:
        yield
    finally:
        _APPLY.__code__ = _CODE


def applied(function: type[torch.autograd.Function], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """Call `function.apply`, as one step if a traced value is among its arguments.

    A function of Python that is handed to it may use weights which no piece would hold, so it is refused. The one of
    `torch.utils.checkpoint` is followed instead: with or without checkpoints, values and gradients are the same.

    Raises:
        TraceError: an argument is a submodule or a function.
    """
    leaves: list[Any] = []
    map_aggregate((args, dict(kwargs)), leaves.append)
    tracer = next((leaf.tracer for leaf in leaves if isinstance(leaf, fx.Proxy)), None)
    if tracer is None:
        return step_with_weights(Applied(function), args, kwargs)
    if function is CheckpointFunction:
        inputs = args[2:]
        with nullcontext() if any(_trains(leaf) for leaf in inputs) else torch.no_grad():
            return args[0](*inputs)
    if any(_may_hold_weights(leaf) for leaf in leaves):
        raise TraceError(f"{function.__name__}.apply is given a submodule or a function")
    return tracer.create_proxy("call_function", Applied(function), args, dict(kwargs))


def _trains(value: object) -> bool:
    if isinstance(value, fx.Proxy):
        values = value.tracer.found.values  # type: ignore[attr-defined]
        if value.node.name not in values:
            raise TraceError("checkpoint(..., use_reentrant=True) needs an example; or set use_reentrant=False")
        value = values[value.node.name]
    return isinstance(value, Tensor) and value.requires_grad


def _may_hold_weights(value: Any) -> bool:  # noqa: ANN401
    if not callable(value) or isinstance(value, fx.Proxy | type | types.BuiltinFunctionType):
        return False
    return type(value).__name__ != "function" or value.__closure__ is not None
