"""What a model's forward was followed with: plain attributes, and which submodules and weights it had.

The forward of a module that is cut apart does not run again: its pieces have the steps that it took. So an attribute
that is changed after the cut would be ignored; it is refused instead. Modules that stay whole run as they are. Of an
object of another class (a logger; the configuration of a model of `transformers`, which its own `save_pretrained`
writes to) only the identity is kept.

| code | error | meaning |
| --- | --- | --- |
| E335 | PlanError | an attribute, a submodule or a weight of a module that is cut apart has changed since |
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, is_dataclass
from enum import Enum
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from cutlayer.errors import PlanError
from cutlayer.models.steps import every_module

__all__ = ["Kept", "attributes", "changed"]

_TABLES = ("_modules", "_parameters", "_buffers")
_OF_TORCH = frozenset(vars(nn.Module()))
_DEPTH = 4  # of values within values
_LONG = 1000  # entries, from which a list is kept by its identity


@dataclass(frozen=True)
class _Same:
    """Stands for an object of which only the identity is kept."""

    value: object

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"a {type(self.value).__name__}"


_MISSING = _Same(None)


class Kept:
    """What modules that are cut apart had when they were cut.

    Args:
        model: The model.
        pieces: The modules of its pieces.
        moved: Names of attributes that its own forward changes: they are not kept.
    """

    def __init__(self, model: nn.Module, pieces: Iterable[nn.Module], moved: Container[str]) -> None:
        """Keep them."""
        whole = {module for piece in pieces for module in every_module(piece)}
        apart = [path for path, module in model.named_modules() if module not in whole]
        now = attributes(model, apart)
        self.model, self.apart, self.moved = model, apart, moved
        self.values = {name: value for name, value in now.items() if name not in moved}

    def check(self) -> None:
        """Refuse a model that was changed where the pieces would not follow. Raises `PlanError` E335."""
        found = attributes(self.model, self.apart)
        hidden = [name for name in found if name not in self.values and name not in self.moved]
        own = {name: _of_class(self.model, name) for name in hidden}  # an attribute of the class, or `forward` itself
        for name, value in {**self.values, **{name: one for name, one in own.items() if one is not None}}.items():
            now = found.get(name, _MISSING)
            alike = _shown(now) == _shown(value)
            if now != value:
                raise PlanError(
                    f"{name!r} of the model has changed since it was cut, and the pieces would not follow",
                    where=f"{type(self.model).__name__}.{name}",
                    expected=f"{_shown(value)}, as it was when cl.split followed forward",
                    got="none" if now is _MISSING else f"{_shown(now)}, another one" if alike else _shown(now),
                    remedy="cut the model again, with cl.split, after each such change: it keeps the trained weights; "
                    "or, for a number, keep it in a buffer and change that in place: self.NAME.fill_(...)",
                    code="E335",
                )


def _of_class(model: nn.Module, name: str) -> Any:  # noqa: ANN401
    """Return what the class of a module has under a name that the module itself has now; None: nothing."""
    path, _, last = name.rpartition(".")
    kind = type(model.get_submodule(path))
    return _plain(getattr(kind, last)) if hasattr(kind, last) else None


def attributes(model: nn.Module, paths: Iterable[str] | None = None) -> dict[str, Any]:
    """Return what modules have, by path and name: numbers and texts as values, tensors and submodules as identities.

    Args:
        model: The model.
        paths: Of which of its modules; None: of all.
    """
    found: dict[str, Any] = {}
    modules = dict(model.named_modules())
    for path in modules if paths is None else paths:
        module = modules.get(path)
        if module is None:
            continue
        own = {name: _Same(value) for table in _TABLES for name, value in vars(module)[table].items()}
        own |= {name: _plain(value) for name, value in vars(module).items() if name not in _OF_TORCH}
        found |= {f"{path}.{name}".lstrip("."): value for name, value in own.items()}
    return found


def changed(model: nn.Module, before: Mapping[str, Any]) -> frozenset[str]:
    """Return the names of attributes that are other ones than `before`, or new."""
    return frozenset(name for name, value in attributes(model).items() if before.get(name, _MISSING) != value)


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else repr(value).replace('"', "")
    return text if len(text) <= 80 else f"{text[:80]}..."


def _plain(value: Any, depth: int = _DEPTH) -> Any:  # noqa: ANN401
    """Return a value as one that can be compared later, whatever becomes of it."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | Enum | torch.dtype):
        return repr(value)  # not a number is then equal to itself
    if isinstance(value, list | tuple | Mapping) and len(value) > _LONG:
        return _Same(value)
    if depth and isinstance(value, list | tuple):
        return [type(value).__name__, *(_plain(item, depth - 1) for item in value)]
    if depth and isinstance(value, Mapping):
        return {repr(key): _plain(item, depth - 1) for key, item in value.items()}
    fields = is_dataclass(value) and not isinstance(value, type) and not hasattr(value, "save_pretrained")
    if depth and (fields or isinstance(value, Namespace | SimpleNamespace)):
        return [type(value).__name__, _plain(dict(getattr(value, "__dict__", {})), depth - 1)]
    return repr(value) if isinstance(value, set | frozenset | torch.device | torch.Size) else _Same(value)
