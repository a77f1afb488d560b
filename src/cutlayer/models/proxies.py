"""Values while tracing: what Python may ask of them, and what is a step."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from cutlayer.models.weights import set_on

__all__ = ["Value"]


class Value(fx.Proxy):
    """A value while tracing. Python may ask for its size or its number where an example tells them.

    It must not give itself out as a tensor (`__class__`): torch's C code would read it as one. See `asked`.
    """

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        """Return an attribute, or a step that asks for it."""
        return self.tracer.attribute(self, name)  # type: ignore[attr-defined]

    def __setattr__(self, name: str, value: Any) -> None:  # noqa: ANN401
        """Note what is set on a tensor as a step."""
        if name in ("node", "tracer") or not hasattr(Tensor, name):
            super().__setattr__(name, value)
        else:
            set_on(self.tracer, self, name, value)  # type: ignore[arg-type]

    def __index__(self) -> int:
        """Return the number, if sizes alone decide it."""
        return int(self.tracer.constant(self, operator.index))  # type: ignore[attr-defined]

    def __int__(self) -> int:
        """Return the number, if sizes alone decide it."""
        return int(self.tracer.constant(self, int))  # type: ignore[attr-defined]

    def __float__(self) -> float:
        """Return the number, if sizes alone decide it."""
        return float(self.tracer.constant(self, float))  # type: ignore[attr-defined]

    def __len__(self) -> int:
        """Return the length, which the model is held to."""
        return int(self.tracer.constant(self, len))  # type: ignore[attr-defined]

    def __setitem__(self, place: Any, value: Any) -> None:  # noqa: ANN401
        """Note the write as a step."""
        self.tracer.create_proxy("call_function", operator.setitem, (self, place, value), {})

    # --- a length, as a key and as text ---

    def __hash__(self) -> int:
        """Be found where a length is a key."""
        return hash(self._number()) if self._is_length() else super().__hash__()

    def __str__(self) -> str:
        """Read as the number, if it is a length."""
        return str(self._number()) if self._is_length() else super().__str__()

    def __format__(self, spec: str) -> str:
        """Read as the number, if it is a length."""
        return format(self._number(), spec) if self._is_length() else super().__format__(spec)

    def _is_length(self) -> bool:
        """Say whether `len` gave it, or it is reckoned from such a number."""
        return self.node.name in self.tracer.lengths  # type: ignore[attr-defined]

    def _number(self) -> Any:  # noqa: ANN401
        """Return the number, which the model is held to."""
        return self.tracer.constant(self, type(self.tracer.found.values[self.node.name]))  # type: ignore[attr-defined]


def _written(operation: Callable[[Any, Any], Any]) -> Callable[[Value, Any], Any]:
    def method(self: Value, other: Any) -> Any:  # noqa: ANN401
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    return method


for _operation in (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.iand, operator.ior):
    setattr(Value, f"__{_operation.__name__}__", _written(_operation))  # `x += y` writes to x; fx alone makes it x + y
