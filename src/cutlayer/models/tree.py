"""Building a piece's module: the user's own submodules and parameters, under their own names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from cutlayer.errors import StageError
from cutlayer.models.steps import PieceModule, every_module, lend

__all__ = ["adopt", "attach", "frozen_paths", "same_mode", "ties"]

_EXTRA = "_extra_state"  # torch's name in a state_dict for what get_extra_state gives


def attach(piece: nn.Module, model: nn.Module, modules: Mapping[str, nn.Module], states: Iterable[str]) -> None:
    """Hang submodules and single parameters or buffers into a piece, at the paths that they have in the model.

    Args:
        piece: The piece; gets plain `nn.Module` containers where a path leads through code that is in several pieces.
        model: The user's model.
        modules: What to hang at which path: the model's submodule, or a part of a stack of blocks. "" is the model.
        states: Paths of parameters and buffers that the piece fetches by itself.
    """
    if "" in modules:
        lend(modules[""], piece)
        return
    order = {path: index for index, (path, _) in enumerate(model.named_modules(remove_duplicate=False))}
    for path in sorted(modules, key=lambda path: (path.count("."), order[path])):
        holder, _, name = path.rpartition(".")
        owner = _container(piece, holder)
        if owner is not None and name not in owner._modules:
            owner.add_module(name, modules[path])
    for path in dict.fromkeys(states):
        _attach_state(piece, model, path)


def _attach_state(piece: nn.Module, model: nn.Module, path: str) -> None:
    holder, _, name = path.rpartition(".")
    source, owner = model.get_submodule(holder), _container(piece, holder)
    if owner is None or name in owner._parameters or name in owner._buffers:
        return
    if name in source._parameters:
        owner.register_parameter(name, source._parameters[name])
    else:
        owner.register_buffer(name, source._buffers[name], persistent=name not in source._non_persistent_buffers_set)


def _container(piece: nn.Module, path: str) -> nn.Module | None:
    """Return the container at a path, made if need be; None if one of the model's own modules is there already."""
    owner = piece
    for name in path.split(".") if path else ():
        child = owner._modules.get(name)
        if child is None:
            child = nn.Module()
            owner.add_module(name, child)
        elif type(child) is not nn.Module:
            return None
        owner = child
    return owner


def _in_order(piece: nn.Module, model: nn.Module) -> None:
    """Bring the containers' children into the model's order: an optimizer sees parameters in the order it would."""
    for path, container in [(path, m) for path, m in piece.named_modules() if m is piece or type(m) is nn.Module]:
        names = list(model.get_submodule(path)._modules)
        children = sorted(container._modules.items(), key=lambda item: names.index(item[0]))
        container._modules.clear()
        container._modules.update(children)


def adopt(pieces: Sequence[nn.Module], model: nn.Module) -> None:
    """Give parameters and buffers that no piece has to one: to the piece with the same tensor, else to the last.

    These are second names of a shared tensor, and what the model's forward does not use.

    Raises:
        StageError: E321, a module that no piece has whole keeps an extra state.
    """
    held = {key for piece in pieces for key in piece.state_dict()}
    known = [{id(value) for value in (*piece.parameters(), *piece.buffers())} for piece in pieces]
    for key, value in model.state_dict(keep_vars=True).items():
        if key in held:
            continue
        path, _, last = key.rpartition(".")
        if last == _EXTRA:
            raise _extra_state(model, path)
        if not isinstance(value, Tensor):
            continue
        place = next((place for place, ids in enumerate(known) if id(value) in ids), len(pieces) - 1)
        known[place].add(id(value))
        owner = pieces[place]
        while "lender" in owner.__dict__:
            owner = owner.__dict__["lender"]
        _attach_state(owner, model, key)
    for piece in pieces:
        if isinstance(piece, PieceModule) and "lender" not in piece.__dict__:
            _in_order(piece, model)


def _extra_state(model: nn.Module, owner: str) -> StageError:
    return StageError(
        "the pieces do not keep the extra state of a module that is cut apart",
        where=f"{type(model.get_submodule(owner)).__name__}.get_extra_state of {owner or 'the model itself'}",
        expected="state in parameters and buffers, or in submodules that stay whole",
        remedy="keep it in a buffer, self.register_buffer(...), or in a submodule that is not cut apart",
        code="E321",
    )


def frozen_paths(model: nn.Module) -> tuple[str, ...]:
    """Name the submodules that stay in evaluation mode when the model is told to train (it overrides `train`)."""
    if all(type(module).train is nn.Module.train for module in model.modules()):
        return ()
    modes = {module: module.training for module in model.modules()}
    model.train()
    frozen = tuple(path for path, module in model.named_modules(remove_duplicate=False) if path and not module.training)
    for module, mode in modes.items():
        module.training = mode
    return frozen


def ties(pieces: Sequence[nn.Module], moving: Iterable[Tensor] = ()) -> tuple[tuple[str, int, str, int], ...]:
    """Name what several pieces share: (name, piece, name, piece) for each pair of pieces.

    Args:
        pieces: The pieces.
        moving: Buffers that training changes (BatchNorm's averages); others may be shared without harm.
    """
    changing = {id(buffer) for buffer in moving}
    tables: list[dict[int, str]] = []
    for piece in pieces:
        named: dict[int, str] = {}
        for name, value in [*piece.named_parameters(), *piece.named_buffers()]:
            if isinstance(value, nn.Parameter) or id(value) in changing:
                named.setdefault(id(value), name)
        tables.append(named)
    return tuple(
        (name, first, tables[second][key], second)
        for first, table in enumerate(tables)
        for second in range(first + 1, len(tables))
        for key, name in table.items()
        if key in tables[second]
    )


def same_mode(piece: nn.Module, model: nn.Module) -> None:
    """Put a new piece into the model's mode without touching the modes of the model's own submodules."""
    theirs = set(model.modules())
    for module in every_module(piece):
        if module not in theirs:
            module.training = model.training
