"""Cutting `nn.Sequential`, nested ones too, by slicing: no tracing, so its modules may do anything."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

__all__ = ["order", "sliceable", "slices"]


def sliceable(model: nn.Module, points: Sequence[str]) -> bool:
    """Say whether all cut points are children of `nn.Sequential`s, nested from the model itself downwards."""
    return all(
        _plain(model.get_submodule(".".join(point.split(".")[:depth])))
        for point in points
        for depth in range(point.count(".") + 1)
    )


def _plain(module: nn.Module) -> bool:
    own = type(module).forward is not nn.Sequential.forward or type(module).train is not nn.Module.train
    return isinstance(module, nn.Sequential) and not own


def order(model: nn.Module, point: str) -> tuple[int, ...]:
    """Return the place of a submodule: the index of each of its ancestors among its siblings, outermost first."""
    place, module = [], model
    for name in point.split("."):
        place.append(list(module._modules).index(name))
        module = module.get_submodule(name)
    return tuple(place)


def slices(model: nn.Module, points: Sequence[str]) -> list[nn.Sequential]:
    """Slice a Sequential after each of `points` (in order); children keep their names.

    Returns:
        One `nn.Sequential` more than there are points; empty where nothing lies between two points.
    """
    pieces, rest = [], model
    for point in points:
        before, rest = _split(rest, point.split("."))
        pieces.append(before)
    return [*pieces, rest]  # type: ignore[list-item]


def _split(module: nn.Module, path: Sequence[str]) -> tuple[nn.Sequential, nn.Sequential]:
    """Return a Sequential's children up to and with those at `path`, and the others."""
    first, second, here = nn.Sequential(), nn.Sequential(), True
    for name, child in module._modules.items():
        if not here:
            second.add_module(name, child)
        elif name != path[0]:
            first.add_module(name, child)
        else:
            here = False
            if len(path) == 1:
                first.add_module(name, child)
                continue
            inner_first, inner_second = _split(child, path[1:])  # type: ignore[arg-type]
            first.add_module(name, inner_first)
            if len(inner_second):
                second.add_module(name, inner_second)
    return first, second
