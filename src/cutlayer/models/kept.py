"""What a model's forward was followed with: plain attributes, and which submodules and weights it had.

The forward of a module that is cut apart does not run again: its pieces have the steps that it took. So an attribute
that is changed after the cut would be ignored; it is refused instead. Modules that stay whole run as they are. Of an
object that holds other objects than settings (a logger) only the identity is kept, and what the use of a model of
`transformers` writes to its own configuration (`save_pretrained` does) is no change. Hooks of such modules are not
called either: those that came or went since are refused too, but for those of `transformers`, which only take note.

| code | error | meaning |
| --- | --- | --- |
| E335 | PlanError | an attribute, a submodule, a weight or a hook of a module that is cut apart has changed since |
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, is_dataclass
from enum import Enum
from pathlib import PurePath
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from cutlayer.errors import PlanError
from cutlayer.models.steps import every_module

__all__ = ["Kept", "attributes", "changed"]

_TABLES = ("_modules", "_parameters", "_buffers")
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_OF_TORCH = frozenset(vars(nn.Module()))
_CHANGED = (
    "cut the model again, with cl.split, after each such change: it keeps the trained weights; or, for a number, keep "
    "it in a buffer and change that in place: self.NAME.fill_(...)"
)
_HOOKED = (
    "remove the hook, or put it on submodules that are not cut apart: these are called; or have it in place before the "
    "model is cut with cl.split, which says whether the pieces can do what it does"
)
_DEPTH = 6  # of values within values
_SCALARS = (
    *(type(None), bool, int, float, complex, str, bytes, Enum, set, frozenset, PurePath),
    *(torch.dtype, torch.device, torch.Size),
)
_BOOKS = ("architectures", "dtype", "problem_type", "transformers_version", "_name_or_path", "_commit_hash")
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


@dataclass(frozen=True)
class _Hooks:
    """The hooks of a module, of one kind, in their order."""

    hooks: tuple[Any, ...]

    def __repr__(self) -> str:
        named = ", ".join(getattr(one, "__name__", type(one).__name__) for one in self.hooks)
        return f"{len(self.hooks)} hook{'s' * (len(self.hooks) > 1)} ({named})" if self.hooks else "no hook"


@dataclass(frozen=True)
class _Object:
    """An object's class and attributes."""

    kind: str
    entries: dict[str, Any]


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
            if now != value:
                raise _changed_since(type(self.model).__name__, *_innermost(name, value, now))


def _changed_since(model: str, name: str, was: object, now: object) -> PlanError:
    alike = _shown(now) == _shown(was)
    return PlanError(
        f"{name!r} of the model has changed since it was cut, and the pieces would not follow",
        where=f"{model}.{name}",
        expected=f"{'none' if was is _MISSING else _shown(was)}, as it was when cl.split followed forward",
        got="none" if now is _MISSING else f"{_shown(now)}, another one" if alike else _shown(now),
        remedy=_HOOKED if isinstance(was, _Hooks) else _CHANGED,
        code="E335",
    )


def _innermost(name: str, was: Any, now: Any) -> tuple[str, Any, Any]:  # noqa: ANN401
    """Return the first attribute of an attribute, and so on, that differs: its name and both values."""
    if isinstance(was, _Object) and isinstance(now, _Object) and was.kind == now.kind:
        for key in [*was.entries, *now.entries]:
            values = was.entries.get(key, _MISSING), now.entries.get(key, _MISSING)
            if values[0] != values[1]:
                return _innermost(f"{name}.{key}", *values)
    return name, was, now


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
        own: dict[str, Any] = {name: _Same(value) for table in _TABLES for name, value in vars(module)[table].items()}
        own |= {table: _Hooks(tuple(filter(_users, vars(module)[table].values()))) for table in _HOOKS}
        own |= {name: _plain(value) for name, value in vars(module).items() if name not in _OF_TORCH}
        found |= {f"{path}.{name}".lstrip("."): value for name, value in own.items()}
    return found


def _users(hook: object) -> bool:
    return not str(getattr(hook, "__module__", "")).startswith("transformers.")


def changed(model: nn.Module, before: Mapping[str, Any]) -> frozenset[str]:
    """Return the names of attributes that are other ones than `before`, or new."""
    return frozenset(name for name, value in attributes(model).items() if before.get(name, _MISSING) != value)


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else repr(value).replace('"', "")
    return text if len(text) <= 80 else f"{text[:80]}..."


def _plain(value: Any, depth: int = _DEPTH) -> Any:  # noqa: ANN401
    """Return a value as one that can be compared later, whatever becomes of it."""
    if isinstance(value, _SCALARS):
        return repr(value)  # not a number is then equal to itself
    if isinstance(value, list | tuple | Mapping) and len(value) > _LONG:
        return _Same(value)
    if depth and isinstance(value, list | tuple):
        return [type(value).__name__, *(_plain(item, depth - 1) for item in value)]
    if depth and isinstance(value, Mapping):
        return {repr(key): _plain(item, depth - 1) for key, item in value.items()}
    fields = is_dataclass(value) and not isinstance(value, type) and not hasattr(value, "save_pretrained")
    if depth and (fields or isinstance(value, Namespace | SimpleNamespace) or _holds_plain(value, depth)):
        return _Object(type(value).__name__, {name: _plain(item, depth - 1) for name, item in _entries(value).items()})
    return _Same(value)


def _entries(value: object) -> dict[str, Any]:
    """Return the attributes of an object, but for what use alone writes to a configuration of `transformers`."""
    left_out = _BOOKS if hasattr(value, "save_pretrained") else ()
    return {name: item for name, item in getattr(value, "__dict__", {}).items() if name not in left_out}


def _holds_plain(value: object, depth: int) -> bool:
    """Say whether an object's attributes are numbers, texts, lists and tables of such, and such objects: settings.

    What can be called does something, and so do objects of Python's own library, such as a `random.Random`.
    """
    library = type(value).__module__ in sys.stdlib_module_names and not isinstance(value, Namespace | SimpleNamespace)
    if callable(value) or library or isinstance(value, torch.Tensor) or not (held := _entries(value)):
        return False
    return all(_is_plain(item, depth - 1) for item in held.values())


def _is_plain(value: Any, depth: int) -> bool:  # noqa: ANN401
    if isinstance(value, _SCALARS):
        return True
    if isinstance(value, list | tuple | Mapping):
        inside = value.values() if isinstance(value, Mapping) else value
        return depth > 0 and len(value) <= _LONG and all(_is_plain(item, depth - 1) for item in inside)
    return depth > 0 and _holds_plain(value, depth)
