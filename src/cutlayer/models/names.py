"""Finding the submodule that a user means by a cut point."""

from __future__ import annotations

import difflib
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from torch import nn

from cutlayer.errors import StageError
from cutlayer.models.stacks import PROVEN, Layout, layout_of

__all__ = ["InStack", "Point", "in_stack", "inside", "names_of", "nearest", "points_of", "resolve", "stacks_of"]

Point = str | int | nn.Module


@dataclass(frozen=True)
class InStack:
    """A cut point inside a stack of blocks: its name there, the stack's path and form, the blocks before the cut."""

    name: str
    path: str
    layout: Layout
    before: int


def points_of(model: nn.Module, at: Point | Sequence[Point]) -> list[str | int]:
    """Return the cut points of an `at` as a list, a submodule itself by its name.

    Raises:
        StageError: a module that is none of the model's, or no such submodule (E310); one of them twice (E327).
    """
    if not isinstance(at, str | int | nn.Module | Iterable):
        raise StageError(
            "at= is no cut point",
            where=f"at={at!r}",
            expected="the name of a submodule, an index or a submodule, or several of them",
            remedy="name one in at=; cutlayer.models.candidates(model, example) lists them",
            code="E327",
        )
    given = [at] if isinstance(at, str | int | nn.Module) else list(at)
    points: list[str | int] = [resolve(model, one) if isinstance(one, nn.Module) else one for one in given]
    names = [resolve(model, one) for one in points]
    twice = [name for place, name in enumerate(names) if name in names[:place]]
    if twice:
        raise StageError(
            f"the cut after {twice[0]!r} is named twice",
            where=f"at={tuple(points)!r}",
            expected="each cut point once",
            remedy="name it once, or another submodule",
            code="E327",
        )
    return points


def resolve(model: nn.Module, at: Point) -> str:
    """Return the qualified name of the submodule after which to cut.

    Args:
        model: The model.
        at: A submodule's qualified name, or the end of one if no other ends so ("h.3" for "transformer.h.3"); or an
            index: of a child if the model is an `nn.Sequential`, else of a block if the model has one list of blocks;
            -1 is the last; or the submodule itself.

    Raises:
        StageError: there is no such submodule, or several (E310).
    """
    if isinstance(at, int) and not isinstance(at, bool):
        return _by_index(model, at)
    if isinstance(at, nn.Module):
        own = [name for name, module in model.named_modules() if module is at and name]
        if own:
            return str(own[0])
        inside = [name for name, _ in model.named_children()][:3]
        raise _unknown(model, type(at).__name__, "a module that is not in the model", inside)
    at = str(at)
    names = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    found = [at] if at in names else [name for name in names if name.endswith(f".{at}")]
    if len(found) != 1:
        near = difflib.get_close_matches(at, names, n=3) or list(names)[:3]
        raise _unknown(model, at, f"the names {', '.join(found)}" if found else "no such name", near)
    return found[0]


def names_of(model: nn.Module, name: str) -> list[str]:
    """Return all names of a submodule: `name`, and the others under which the model holds it too."""
    module = model.get_submodule(name)
    others = [path for path, other in model.named_modules(remove_duplicate=False) if other is module and path != name]
    return [name, *others]


def inside(model: nn.Module, name: str, path: str) -> bool:
    """Say whether a submodule is held inside the one at `path`, under any of its names."""
    return not path or any(alias.startswith(f"{path}.") for alias in names_of(model, name))


def nearest(names: Sequence[str], caller: str, stacks: Container[str]) -> str:
    """Return the one of a submodule's names that the submodule `caller` calls: a stack's, or the nearest inside it."""
    inside = [name for name in names if not caller or name.startswith(f"{caller}.")]
    closest = min(inside or names, key=lambda name: name.count("."))
    return next((name for name in names if name in stacks), closest)


def _by_index(model: nn.Module, at: int) -> str:
    if isinstance(model, nn.Sequential):
        children = list(model._modules)
    else:
        lists = _lists(model)
        if len(lists) != 1:
            got = f"{len(lists)} lists of blocks" + (f": {', '.join(lists)}" if lists else "")
            raise _unknown(model, at, got, [name for name, _ in model.named_children()][:3])
        children = [f"{lists[0]}.{name}" for name, _ in model.get_submodule(lists[0]).named_children()]
    if not -len(children) <= at < len(children):
        raise _unknown(model, at, f"{len(children)} children", [str(len(children) - 1)])
    return children[at]


def _lists(model: nn.Module) -> list[str]:
    """Return the paths of the lists of blocks that are not inside another."""
    stacks = stacks_of(model)
    if stacks:
        return [f"{path}.{layout.blocks}".removeprefix(".") for path, layout in stacks.items()]
    found: list[str] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) > 1 and not inside:
            found.append(path)
    return found


def stacks_of(model: nn.Module) -> dict[str, Layout]:
    """Return the stacks of blocks in a model, by path; those inside another are left out."""
    found: dict[str, Layout] = {}
    for path, module in model.named_modules():
        if "" in found or any(path.startswith(f"{outer}.") for outer in found):
            continue
        layout = layout_of(module)
        if layout is not None:
            found[path] = layout
    return found


def in_stack(model: nn.Module, name: str, stacks: Mapping[str, Layout], *, checked: bool) -> InStack | None:
    """Return where in a stack of blocks a cut point lies; None if it is in none.

    Args:
        model: The model.
        name: A qualified name of `resolve`.
        stacks: The stacks that can be taken apart, by path.
        checked: Whether an example will prove the pieces equal; a stack that the tests do not know needs it.

    Raises:
        StageError: the point is inside a block (E311), or the stack is not known and there is no example (E326).
    """
    for alias, (path, layout) in product(names_of(model, name) if stacks else (), stacks.items()):
        inner = alias.removeprefix(f"{path}.") if path else alias
        if path and inner == alias:
            continue
        if inner not in layout.points:
            raise _inside(name, path, layout)
        kind = type(model.get_submodule(path)).__name__
        if kind not in PROVEN and not checked:
            raise StageError(
                f"{kind} has the form of a known stack of blocks, but is not one that has been tried",
                where=f"at={name!r}",
                remedy="pass example=, so that the pieces are compared with the model",
                code="E326",
            )
        before = int(inner.rpartition(".")[2]) + 1 if inner.startswith(f"{layout.blocks}.") else 0
        return InStack(alias, path, layout, before)
    return None


def _inside(name: str, path: str, layout: Layout) -> StageError:
    points = [f"{path}.{point}".removeprefix(".") for point in layout.points]
    return StageError(
        f"no cut after {name!r}: it is inside a stack of blocks",
        where=f"stack {path!r}" if path else "the model",
        expected=f"one of {', '.join(points[:3])}, ... {points[-1]}" if len(points) > 4 else f"one of {points}",
        remedy="cut after a whole block, or after the embeddings",
        code="E311",
    )


def _unknown(model: nn.Module, at: Point, got: str, near: Sequence[str]) -> StageError:
    return StageError(
        f"no submodule to cut after: {at!r}",
        where=f"at={at!r} in {type(model).__name__}",
        expected="the qualified name of a submodule, or an index into an nn.Sequential or a list of blocks",
        got=got,
        remedy=f"near names are {', '.join(near)}; print(model) shows all",
        code="E310",
    )
