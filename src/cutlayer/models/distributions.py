"""Distributions that a forward makes (`torch.distributions`): making one is a step, and so is each of its methods.

Followed, their code would decide by the values of their parameters, to check these. So the names of their classes, in
the modules of Python whose code is followed, stand for classes that note the call, for as long as it is followed; and
a distribution that a module keeps, for one whose methods are steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributions import Distribution

from cutlayer.models.asked import scopes_of

__all__ = ["made_as_steps"]


class _Record(Protocol):
    @property
    def away(self) -> bool: ...


class _Tracer(Protocol):
    @property
    def record(self) -> _Record: ...

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any: ...  # noqa: ANN401


@contextmanager
def made_as_steps(tracer: _Tracer, modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let what the code of `modules` does with distributions and their classes be steps of `tracer`."""
    replaced = [
        (scope, name, value)
        for scope in [vars(torch.distributions), *scopes_of(modules), *map(vars, modules)]
        for name, value in scope.items()
        if isinstance(value, Distribution) or (type(value) is type and issubclass(value, Distribution))
    ]
    for scope, name, value in replaced:
        if isinstance(value, type):
            scope[name] = _Noting(value.__name__, (value,), {"kind": value, "tracer": tracer})
        else:
            scope[name] = _Kept(value, tracer)
    try:
        yield
    finally:
        for scope, name, value in replaced:
            scope[name] = value


def kept(value: Distribution) -> Distribution:
    """Return a distribution that a module keeps: the step that its methods begin from."""
    return value


class _Kept:
    """Stands for a distribution that a module keeps."""

    def __init__(self, value: Distribution, tracer: _Tracer) -> None:
        self._value, self._tracer = value, tracer

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        if self._tracer.record.away:
            return getattr(self._value, name)
        return getattr(self._tracer.create_proxy("call_function", kept, (self._value,), {}), name)


class _Noting(type):
    """The class of a class that stands for `kind`."""

    kind: type
    tracer: _Tracer

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Note the call as a step; make a distribution where a step is carried out."""
        if cls.tracer.record.away:
            return cls.kind(*args, **kwargs)
        return cls.tracer.create_proxy("call_function", cls.kind, args, kwargs)

    def __instancecheck__(cls, obj: object) -> bool:
        """Answer for the class that it stands for."""
        return isinstance(obj, cls.kind)
