"""Distributions that a forward makes (`torch.distributions`): making one is a step, and so is each of its methods.

Followed, their code would decide by the values of their parameters, to check these. So as long as a model is followed,
`Distribution` has a `__new__` that notes the call as a step, and a `__getattribute__` by which what is asked of a
distribution that the model keeps is a step too. The classes, and the distributions themselves, stay what they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch import nn
from torch.distributions import Distribution

from cutlayer.models.weights import Tracing

__all__ = ["made_as_steps"]


@contextmanager
def made_as_steps(tracer: Tracing) -> Iterator[None]:
    """Let what followed code does with distributions and their classes be steps of `tracer`."""

    def new(cls: type, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Note the call; what is no instance of the class is not initialised. Make one within a step."""
        if not tracer.record.away:
            return tracer.create_proxy("call_function", cls, args, kwargs)
        return _made(cls, *args, **kwargs)

    def attribute(self: Distribution, name: str) -> Any:  # noqa: ANN401
        inside = name.startswith("__") or issubclass(type(self), nn.Module)
        if inside or tracer.record.away:
            return super(Distribution, self).__getattribute__(name)
        return getattr(tracer.create_proxy("call_function", kept, (self,), {}), name)

    before = vars(Distribution).get("__new__", staticmethod(_made))
    try:
        Distribution.__new__ = staticmethod(new)  # type: ignore[method-assign]
        with patch.object(Distribution, "__getattribute__", attribute):
            yield
    finally:
        Distribution.__new__ = before  # type: ignore[method-assign]


def _made(cls: type, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
    """Make a distribution, as without a `__new__`; it stays, for Python calls no class whose `__new__` was deleted."""
    following = super(Distribution, cls).__new__  # type: ignore[misc]
    return following(cls) if following is object.__new__ else following(cls, *args, **kwargs)


def kept(value: Distribution) -> Distribution:
    """Return a distribution that a module keeps: the step that its methods begin from."""
    return value
