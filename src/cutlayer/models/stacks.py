"""Stacks of blocks that tracing cannot enter: transformers of Hugging Face, and `nn.TransformerEncoder`.

Their forwards are full of Python that depends on shapes and options, but they share one form: something before the
blocks, a list of blocks, something after. A part of a stack is the user's own stack, shallowly copied, whose list
holds only some of the blocks; it runs the stack's *own* forward. So masks, positions, alibi and rotary tables are
computed in each part by the model's own code from the shape of the hidden state and from the attention mask: only the
hidden state crosses. What the other parts own is replaced by stand-ins without parameters.

A stack is known by its structure: a list of blocks under a name of `_BLOCKS`, and submodules that its forward names,
which hold all other parameters. What forward names last after the blocks runs after them, all else before. One whose
blocks do not hand on one hidden state is no such stack: it is traced, as any other module is.
"""

from __future__ import annotations

import copy
import dis
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from cutlayer.models.kinds import draws
from cutlayer.models.steps import lend

__all__ = ["Layout", "Part", "Parts", "layout_of", "returned", "take_apart", "without_cache"]

_BLOCKS = ("h", "layers", "encoder.layer", "encoder.layers")
# What only the part with the embeddings gets; all parts get the other arguments (masks, positions).
_FIRST_ONLY = ("input_ids", "inputs_embeds", "pixel_values", "token_type_ids", "bool_masked_pos", "labels")
# Stacks that the tests cut at every block; others of the same structure are cut when an example proves them equal.
PROVEN = (
    "BertModel",
    "GPT2Model",
    "LlamaModel",
    "ModernBertModel",
    "PhiModel",
    "TransformerEncoder",
    "ViTModel",
)


@dataclass(frozen=True)
class Layout:
    """The form of a stack: the path of its list of blocks, and the names of what runs before and after them.

    Before them, only what has parameters or draws random numbers; a rotary table is computed again in each part.
    """

    blocks: str
    count: int
    before: tuple[str, ...]
    after: tuple[str, ...]

    @property
    def points(self) -> list[str]:
        """Where the stack can be cut: after its embeddings, and after each block (paths inside the stack)."""
        return [*self.before[-1:], *(f"{self.blocks}.{index}" for index in range(self.count))]


@dataclass(frozen=True)
class Part:
    """A part of a stack: `module` is called by keyword, with the hidden state as `entry` (all but the first part).

    All but the last part return the hidden state, float[batch, time, width]; the last returns what the stack does.
    """

    module: nn.Module
    path: str
    entry: str


@dataclass(frozen=True)
class Parts:
    """A stack taken apart, and how its forward names its arguments."""

    parts: tuple[Part, ...]
    signature: inspect.Signature

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the arguments of the first part, and those that all the others get beside the hidden state."""
        bound = self.signature.bind(*args, **kwargs)
        given: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            if self.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
                given |= value
            else:
                given[name] = value
        first = {name: value for name, value in given.items() if value is not None}
        hidden = self.parts[1].entry
        return first, {name: value for name, value in first.items() if name not in (*_FIRST_ONLY, hidden)}


def layout_of(module: nn.Module) -> Layout | None:
    """Return the form of a stack, or None if `module` is not a stack of blocks that is known."""
    if isinstance(module, nn.TransformerEncoder):
        return Layout("layers", len(module.layers), (), ("norm",) if module.norm is not None else ())
    if module._parameters or not _of_transformers(module):
        return None
    if not {"inputs_embeds", "pixel_values"} & inspect.signature(module.forward).parameters.keys():
        return None  # a hidden state cannot be handed in
    for path in _BLOCKS:
        try:
            blocks = module.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(blocks, nn.ModuleList) and (around := _around(module, path)) is not None:
            return Layout(path, len(blocks), *around)
    return None


def _of_transformers(module: nn.Module) -> bool:
    return any(base.__name__ == "PreTrainedModel" for base in type(module).__mro__)


def without_cache(module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the keywords of a call of a model of transformers that keeps no keys and values, unless it is told to.

    They are for generation: kept in an object made anew in each call, which cannot cross.
    """
    signature = inspect.signature(module.forward)
    if not _of_transformers(module) or "use_cache" not in signature.parameters:
        return kwargs
    told = kwargs.get("use_cache") or "use_cache" in signature.bind_partial(*args).arguments
    return kwargs if told else {**kwargs, "use_cache": False}


def _around(module: nn.Module, path: str) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """Return what runs before and after the blocks at a path, or None if it cannot be told of all parameters."""
    holder, _, inner = path.partition(".")
    if inner and any(not name.startswith(f"{inner}.") for name, _ in module.get_submodule(holder).named_parameters()):
        return None
    place = _named_in_forward(module)
    before, after = list[str](), list[str]()
    for name, child in module.named_children():
        trains = next(child.parameters(), None) is not None
        if name == holder or name not in place or holder not in place:
            if name != holder and trains:
                return None
        elif place[name] > place[holder]:
            after.append(name)
        elif trains or any(draws(one) for one in child.modules()):
            before.append(name)
    return tuple(sorted(before, key=place.__getitem__)), tuple(sorted(after, key=place.__getitem__))


def _named_in_forward(module: nn.Module) -> dict[str, int]:
    """Return where a forward names an attribute last, by the attribute's name; read from its code without a call."""
    code = getattr(inspect.unwrap(module.forward), "__code__", None)
    return {
        step.argval: index
        for index, step in enumerate(dis.get_instructions(code) if code else ())
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD")
    }


def returned(stack: nn.Module, layout: Layout, run: Callable[[], object]) -> int | None:
    """Return how many values a block returns as a tuple, the hidden state first; 0 if it returns that alone.

    Args:
        stack: The stack.
        layout: Its form.
        run: Runs the model that the stack is in. It may fail: whoever traces the model finds out why.

    Returns:
        None if nothing can stand for what is in another part: what runs before the blocks gives more than one tensor,
        or the blocks do not hand on a hidden state of one shape (Swin's make it smaller).
    """
    if isinstance(stack, nn.TransformerEncoder):
        return 0
    blocks = list(stack.get_submodule(layout.blocks).children())
    given: list[object] = []
    made: list[object] = []
    handles = [one.register_forward_hook(lambda *call: made.append(call[2])) for one in blocks]
    before = [stack.get_submodule(name) for name in layout.before]
    handles += [one.register_forward_hook(lambda *call: given.append(call[2])) for one in before]
    try:
        with suppress(Exception):
            run()
    finally:
        for handle in handles:
            handle.remove()
    hidden = [one[0] if type(one) is tuple and one else one for one in made]
    shapes = {tuple(one.shape) if isinstance(one, Tensor) else None for one in hidden}
    if len(shapes) > 1 or None in shapes or not all(isinstance(one, Tensor) for one in given):
        return None
    return len(made[0]) if made and type(made[0]) is tuple else 0


def take_apart(stack: nn.Module, path: str, layout: Layout, ends: Sequence[int], returns: int = 0) -> Parts:
    """Cut a stack into parts.

    Args:
        stack: The stack.
        path: Its path in the user's model.
        layout: Its form.
        ends: For each part but the last, how many blocks lie before its end; ascending. 0 is after the embeddings.
        returns: What a block returns, as of `returned`.

    Returns:
        The parts in order. They share the stack's blocks: same modules, same names below `path`.
    """
    bounds = [0, *ends, layout.count]
    encoder = isinstance(stack, nn.TransformerEncoder)
    parts = []
    for index, (low, high) in enumerate(pairwise(bounds)):
        last = index == len(ends)
        if encoder:
            module = _encoder_part(stack, (low, high), last)
        else:
            module = _part(stack, layout, (low, high), _Hidden(index == 0, last, returns))
        inner = f"{layout.blocks}.{high - 1}" if high else layout.before[-1]
        name = path if last else f"{path}.{inner}".removeprefix(".")
        parts.append(Part(module, name, "src" if encoder else "hidden"))
    return Parts(tuple(parts), inspect.signature(stack.forward))


def _encoder_part(stack: nn.Module, span: tuple[int, int], last: bool) -> nn.Module:
    if span[0] == span[1]:  # a cut after the last layer: `forward` looks at the first one
        return _Rest(stack._modules.get("norm"))
    part = copy.copy(stack)
    blocks = list(stack._modules["layers"]._modules.items())[slice(*span)]  # type: ignore[union-attr]
    part._modules = {**stack._modules, "layers": _Some(dict(blocks))}
    if not last and "norm" in part._modules:
        part._modules["norm"] = None
    return part


class _Rest(nn.Module):
    """What an `nn.TransformerEncoder` does after its last layer."""

    def __init__(self, norm: nn.Module | None) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, src: Tensor, *_: object, **__: object) -> Tensor:
        """Map (batch, length, width) to the same shape."""
        return src if self.norm is None else self.norm(src)


class _Some(nn.ModuleList):
    """Some modules of a list, under the names that they have in it; counts and indexes from its own first one."""

    def __init__(self, modules: Mapping[str, nn.Module | None]) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)

    def __getitem__(self, index: Any) -> Any:  # noqa: ANN401
        return list(self)[index]


class _Hidden:
    """The hidden state that came into a part, while it runs; which part it is, and what a block returns."""

    def __init__(self, first: bool, last: bool, returns: int) -> None:
        self.value: Tensor | None = None
        self.first, self.last, self.returns = first, last, returns


def _part(stack: nn.Module, layout: Layout, span: tuple[int, int], hidden: _Hidden) -> nn.Module:
    part, holder = copy.copy(stack), stack
    part._modules = dict(stack._modules)
    inner = part
    for name in layout.blocks.split(".")[:-1]:
        holder = holder.get_submodule(name)
        copied = copy.copy(holder)
        copied._modules = dict(holder._modules)
        inner._modules[name] = copied
        inner = copied
    name = layout.blocks.rpartition(".")[2]
    inner._modules[name] = _window(holder.get_submodule(name), *span, hidden)
    for name in () if hidden.first else layout.before:
        part._modules[name] = _Before(part._modules[name], hidden)  # type: ignore[arg-type]
    for name in () if hidden.last else layout.after:
        part._modules[name] = _After()
    return _BlocksPart(part, hidden)


def _window(blocks: nn.Module, low: int, high: int, hidden: _Hidden) -> nn.ModuleList:
    """Return the list of blocks with all but those of low..high-1 passed over; places and names stay."""
    window = nn.ModuleList()
    for index, (name, block) in enumerate(blocks.named_children()):
        window.add_module(name, block if low <= index < high else _Skip(block, hidden, index < low))
    return window


class _Skip(nn.Module):
    """Stands where a block of another part stands: hands the hidden state on.

    Before the part's own blocks it hands in the hidden state that came. So what the stack's forward does before the
    blocks, such as scaling the embeddings, is not done to it again.
    """

    def __init__(self, block: nn.Module, hidden: _Hidden, before: bool) -> None:
        super().__init__()
        for name, value in vars(block).items():  # what a forward may ask of a block, such as its kind of attention
            if isinstance(value, str | int) and name != "training":
                setattr(self, name, value)
        self.__dict__["hidden"], self.__dict__["before"] = hidden, before

    def forward(self, value: Tensor, *_args: object, **_kwargs: object) -> Any:  # noqa: ANN401
        hidden = self.__dict__["hidden"]
        value = hidden.value if self.__dict__["before"] else value
        return (value, *[None] * (hidden.returns - 1)) if hidden.returns else value


class _Before(nn.Module):
    """Stands for what ran before the blocks in an earlier part: gives the hidden state that came from there.

    Called with something else than a hidden state (positions, say), it is an embedding that is added: it adds nothing.
    """

    def __init__(self, module: nn.Module, hidden: _Hidden) -> None:
        super().__init__()
        self.__dict__["hidden"] = hidden
        dtype = next((p.dtype for p in module.parameters()), torch.get_default_dtype())
        weight = SimpleNamespace(dtype=dtype)  # vision models ask for it, to convert the image
        self.patch_embeddings = SimpleNamespace(projection=SimpleNamespace(weight=weight))

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        value: Tensor = self.__dict__["hidden"].value
        given = [one.shape for one in (*args, *kwargs.values()) if isinstance(one, Tensor)]
        return value if value.shape in given else torch.zeros(())


class _After(nn.Module):
    """Stands for what runs after the blocks in a later part: hands on what it is called with."""

    def forward(self, value: Tensor, *_args: object, **_kwargs: object) -> Tensor:
        return value


class _BlocksPart(nn.Module):
    """Runs the own forward of a stack of which only some blocks are there."""

    def __init__(self, part: nn.Module, hidden: _Hidden) -> None:
        super().__init__()
        lend(part, self)
        self.__dict__["hidden"] = hidden
        names = inspect.signature(part.forward).parameters
        self.entry = "inputs_embeds" if "inputs_embeds" in names else "pixel_values"
        self.cached = "use_cache" in names

    def forward(self, **arguments: Any) -> Any:  # noqa: ANN401
        """Take the first part's arguments, or `hidden` and the arguments of all parts."""
        hidden = self.__dict__["hidden"]
        if self.cached:
            arguments["use_cache"] = False  # a cache of keys and values is for generation, and would not cross
        if not hidden.last:
            arguments.pop("return_dict", None)
        if not hidden.first:
            arguments[self.entry] = hidden.value = arguments.pop("hidden")
        try:
            output = self.__dict__["lender"](**arguments)
        finally:
            hidden.value = None
        return output if hidden.last else output[0]

    def train(self, mode: bool = True) -> _BlocksPart:
        """Switch the stack's modules too; what its own `train` freezes is for the piece, as some blocks are away."""
        super().train(mode)
        nn.Module.train(self.__dict__["lender"], mode)
        return self
