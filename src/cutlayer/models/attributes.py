"""What a module keeps in Python: attributes, lists and tables in them, hooks. Kept, and put back.

A forward may keep things from call to call: a table that its first call makes, a count, the last output. While a model
is followed these would be traced values; the user's model must not be left with them.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from cutlayer.models.steps import every_module

__all__ = ["Attributes", "as_before", "call_first"]

_CONTAINERS = frozenset((dict, OrderedDict, defaultdict, list, set, deque))


class Attributes:
    """The attributes of modules as they are now; of containers in them, what they hold too.

    The values of tensors are not kept, nor the inside of other objects.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        """Keep the attributes of `modules`."""
        self._kept = {module: dict(vars(module)) for module in modules}
        self._inside = {
            id(value): (value, dict(value) if isinstance(value, dict) else list(value))
            for held in self._kept.values()
            for value in held.values()
            if type(value) in _CONTAINERS
        }

    def hooked(self) -> set[nn.Module]:
        """Return the modules that have other hooks now."""
        return {module for module, held in self._kept.items() if self._rehooked(held)}

    def put_back(self, but: Iterable[nn.Module] = ()) -> None:
        """Put all back as it was, `but` for some modules."""
        left = set(but)
        for module, held in self._kept.items():
            if module in left:
                continue
            now = vars(module)
            for name in [name for name in now if name not in held]:
                del now[name]
            now.update(held)
            for value in held.values():
                self._refill(value)

    def without(self, kind: type) -> None:
        """Put back the attributes that are of a kind now, and the containers that hold one."""
        for module, held in self._kept.items():
            now = vars(module)
            for name in [name for name, value in now.items() if _holds(value, kind)]:
                del now[name]
                if name in held:
                    now[name] = held[name]
                    self._refill(held[name])

    def _refill(self, value: Any) -> None:  # noqa: ANN401
        if type(value) in _CONTAINERS:
            value.clear()
            _fill(value, self._inside[id(value)][1])

    def _rehooked(self, held: Mapping[str, Any]) -> bool:
        tables = [value for name, value in held.items() if name.endswith("_hooks") and id(value) in self._inside]
        return any(list(table) != list(self._inside[id(table)][1]) for table in tables)


def _holds(value: object, kind: type, depth: int = 3) -> bool:
    """Say whether a value is of a kind, or a container with one in it, in another one in it, and so on to a depth."""
    inside = value.values() if isinstance(value, dict) else value
    if depth and isinstance(value, dict | list | tuple | set | deque):
        return any(_holds(one, kind, depth - 1) for one in inside)  # type: ignore[attr-defined]
    return isinstance(value, kind)


def _fill(container: Any, values: Any) -> None:  # noqa: ANN401
    if isinstance(container, list | deque):
        container.extend(values)
    else:
        container.update(values)


@contextmanager
def as_before(*owners: nn.Module) -> Iterator[None]:
    """Put back, at the end, what modules and their submodules keep in Python."""
    kept = Attributes(module for owner in owners for module in every_module(owner))
    try:
        yield
    finally:
        kept.put_back()


def call_first(model: nn.Module, run: Callable[[], object]) -> None:
    """Let a model put on the hooks that its first call puts on, so that no part and no copy of it does so again.

    A model that has put them on notes that somewhere in its attributes, so the modules with new hooks, and those that
    they are in, keep what the call left in their attributes, but for tensors. All others are as before.

    Args:
        model: The model.
        run: Runs it, and puts back the values of its tensors.
    """
    before = Attributes(model.modules())
    try:
        run()
    finally:
        hooked = before.hooked()
        before.put_back([one for one in model.modules() if hooked & set(one.modules())] if hooked else ())
        if hooked:
            before.without(Tensor)
