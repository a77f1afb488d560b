"""What a forward is told that asks what a traced value is: `isinstance`, `torch.is_tensor`, `torch.jit.isinstance`.

The answer is what the value is for the example. A traced value cannot give it by itself: one with the class of a tensor
would be read as one by torch's C code. So the modules of Python whose code is followed get an `isinstance` of their own
for as long as it is followed; for all that is no traced value it is the builtin. Code in other files is not reached.
So too for `len` of a tensor, which may be the batch: it is the step `size(0)`, where the builtin gives a number. And so
for the checks of transformers, which ask whether a condition can be called: each is a step, which the pieces carry out.

| code | when |
|---|---|
| E326 | an example is needed, to know what a value is |
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from cutlayer.errors import StageError
from cutlayer.models.whereabouts import line

__all__ = ["answering"]

_OF_TORCHSCRIPT: Any = torch.jit.isinstance


@contextmanager
def answering(tracer: fx.Tracer, values: Mapping[str, Any], modules: Sequence[nn.Module]) -> Iterator[None]:
    """Answer what traced values are, in the code of `modules`.

    Args:
        tracer: Whose values.
        values: What each was for the example, by name; filled while the tracer runs.
        modules: The model, and the submodules whose forwards are followed.

    Raises:
        StageError: E326, where a forward asks what a value is that `values` does not have.
    """
    ours = {"isinstance": partial(_is, tracer, values), "len": partial(_length, tracer, values)}
    check = getattr(sys.modules.get("transformers.utils"), "torch_compilable_check", _none)
    scopes = _scopes_of(modules)
    added = [(scope, name) for scope in scopes for name in ours if name not in scope]
    checks = [(scope, name) for scope in scopes for name, value in scope.items() if value is check]
    for scope, name in added:
        scope[name] = ours[name]
    for scope, name in checks:
        scope[name] = partial(_checked, tracer, check)
    try:
        with (
            patch.object(torch, "is_tensor", lambda obj: _is(tracer, values, obj, Tensor)),
            patch.object(torch.jit, "isinstance", partial(_is_of_torchscript, values)),
        ):
            yield
    finally:
        for scope, name in added:
            del scope[name]
        for scope, name in checks:
            scope[name] = check


def _scopes_of(modules: Sequence[nn.Module]) -> list[dict[str, Any]]:
    """Return the global names of all code that modules and their classes are written in, but torch's own."""
    found: dict[int, dict[str, Any]] = {}
    for module in modules:
        files = [vars(sys.modules[base.__module__]) for base in type(module).__mro__ if base.__module__ in sys.modules]
        for scope in [*files, getattr(inspect.unwrap(module.forward), "__globals__", {})]:
            name = scope.get("__name__", "builtins").partition(".")[0]
            if name not in ("torch", "builtins", "cutlayer"):
                found[id(scope)] = scope
    return list(found.values())


def _is(tracer: fx.Tracer, values: Mapping[str, Any], obj: Any, kind: Any) -> bool:  # noqa: ANN401
    if not isinstance(obj, fx.Proxy) or obj.tracer is not tracer or isinstance(obj, kind):
        return isinstance(obj, kind)
    if obj.node.name not in values:
        raise StageError(
            "the model's control flow depends on what a value is",
            where=line(),
            expected="an example, so that it is known",
            remedy="pass example=, inputs as a loader gives them: the cut follows what the model does with them",
            code="E326",
        )
    return isinstance(values[obj.node.name], kind)


def _length(tracer: fx.Tracer, values: Mapping[str, Any], obj: Any) -> Any:  # noqa: ANN401
    if isinstance(obj, fx.Proxy) and obj.tracer is tracer and isinstance(values.get(obj.node.name), Tensor):
        size = tracer.create_proxy("call_method", "size", (obj, 0), {})
        tracer.lengths.add(size.node.name)  # type: ignore[attr-defined]
        return tracer.proxy(size.node)
    return len(obj)


def _none() -> None:
    """Stands for the check where transformers is not loaded."""


def _checked(tracer: fx.Tracer, check: Callable[..., None], *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
    if any(isinstance(one, fx.Proxy) and one.tracer is tracer for one in [*args, *kwargs.values()]):
        tracer.create_proxy("call_function", check, args, kwargs)
    else:
        check(*args, **kwargs)


def _is_of_torchscript(values: Mapping[str, Any], obj: Any, target_type: Any) -> bool:  # noqa: ANN401
    """Answer for lists and dictionaries of traced values too; the type may be such as `list[Tensor]`."""

    def known(one: Any) -> Any:  # noqa: ANN401
        return values.get(one.node.name, one) if isinstance(one, fx.Proxy) else one

    return bool(_OF_TORCHSCRIPT(map_aggregate(obj, known), target_type))
