"""Models: cutting a user's module into pieces, what each cut would cost, and assembling it back."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cutlayer.models.costs import candidates, costs
    from cutlayer.models.rows import Present, fill

__all__ = ["Present", "candidates", "costs", "fill"]

_HOMES = {"Present": "rows", "candidates": "costs", "costs": "costs", "fill": "rows"}


def __getattr__(name: str) -> object:
    """Load a name from its module, when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'cutlayer.models' has no attribute {name!r}")
    return getattr(import_module(f"cutlayer.models.{_HOMES[name]}"), name)
