"""Stacks of blocks that tracing cannot enter: transformers of Hugging Face, and `nn.TransformerEncoder`.

Their forwards are full of Python that depends on shapes and options, but they share one form: something before the
blocks, a list of blocks, something after. A part of a stack is the user's own stack, shallowly copied, whose list
holds only some of the blocks; it runs the stack's *own* forward. So masks, positions and rotary tables are computed in
each part by the model's own code from the shape of the hidden state and from the attention mask: only the hidden state
crosses. What the other parts own is replaced by stand-ins without parameters.

A stack is known by its structure: the names in `_BLOCKS`, `_BEFORE` and `_AFTER` must account for all its parameters.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from cutlayer.models.steps import lend

__all__ = ["Layout", "Part", "Parts", "layout_of", "take_apart"]

_BLOCKS = ("h", "layers", "encoder.layer", "encoder.layers")
_BEFORE = ("wte", "wpe", "embed_tokens", "embed_positions", "embed_in", "embeddings", "emb_dropout", "drop")
_AFTER = ("ln_f", "norm", "layernorm", "final_layer_norm", "pooler")
# What only the part with the embeddings gets; all parts get the other arguments (masks, positions).
_FIRST_ONLY = ("input_ids", "inputs_embeds", "pixel_values", "token_type_ids", "bool_masked_pos", "labels")
# Stacks that the tests cut at every block; others of the same structure are cut when an example proves them equal.
PROVEN = ("BertModel", "GPT2Model", "LlamaModel", "TransformerEncoder", "ViTModel")


@dataclass(frozen=True)
class Layout:
    """The form of a stack: the path of its list of blocks, and the names of what runs before and after them."""

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
    if module._parameters or not any(base.__name__ == "PreTrainedModel" for base in type(module).__mro__):
        return None
    for path in _BLOCKS:
        try:
            blocks = module.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(blocks, nn.ModuleList) and _accounted(module, path):
            before = tuple(name for name in _BEFORE if module._modules.get(name) is not None)
            after = tuple(name for name in _AFTER if module._modules.get(name) is not None)
            return Layout(path, len(blocks), before, after)
    return None


def _accounted(module: nn.Module, path: str) -> bool:
    """Say whether all parameters belong to the blocks or to names that are known to run before or after them."""
    holder, _, _ = path.partition(".")
    if holder != path:
        inside = dict(module.get_submodule(holder).named_parameters())
        if any(not name.startswith(path.removeprefix(f"{holder}.") + ".") for name in inside):
            return False
    return all(
        name in (holder, *_BEFORE, *_AFTER) or next(child.parameters(), None) is None
        for name, child in module.named_children()
    )


def take_apart(stack: nn.Module, path: str, layout: Layout, ends: Sequence[int]) -> Parts:
    """Cut a stack into parts.

    Args:
        stack: The stack.
        path: Its path in the user's model.
        layout: Its form.
        ends: For each part but the last, how many blocks lie before its end; ascending. 0 is after the embeddings.

    Returns:
        The parts in order. They share the stack's blocks: same modules, same names below `path`.
    """
    bounds = [0, *ends, layout.count]
    encoder = isinstance(stack, nn.TransformerEncoder)
    parts = []
    for index, (low, high) in enumerate(pairwise(bounds)):
        last = index == len(ends)
        make = _encoder_part if encoder else _part
        module = make(stack, layout, (low, high), index == 0, last)
        inner = f"{layout.blocks}.{high - 1}" if high else layout.before[-1]
        name = path if last else f"{path}.{inner}".removeprefix(".")
        parts.append(Part(module, name, "src" if encoder else "hidden"))
    return Parts(tuple(parts), inspect.signature(stack.forward))


def _encoder_part(stack: nn.Module, layout: Layout, span: tuple[int, int], first: bool, last: bool) -> nn.Module:
    del layout, first
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


def _part(stack: nn.Module, layout: Layout, span: tuple[int, int], first: bool, last: bool) -> nn.Module:
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
    inner._modules[name] = _window(holder.get_submodule(name), *span)
    given = None
    if not first:
        given = _replace_before(part, layout)
    if not last:
        for name in layout.after:
            part._modules[name] = None if name == "pooler" else nn.Identity()
    return _BlocksPart(part, given, first, last)


def _window(blocks: nn.Module, low: int, high: int) -> nn.ModuleList:
    """Return the list of blocks with all but those of low..high-1 passed over; places and names stay."""
    window = nn.ModuleList()
    for index, (name, block) in enumerate(blocks.named_children()):
        window.add_module(name, block if low <= index < high else _Skip(block))
    return window


class _Skip(nn.Module):
    """Stands where a block of another part stands: hands the hidden state on."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        for name, value in vars(block).items():  # what a forward may ask of a block, such as its kind of attention
            if isinstance(value, str | int) and name != "training":
                setattr(self, name, value)

    def forward(self, hidden: Tensor, *_args: object, **_kwargs: object) -> Tensor:
        return hidden


class _Given(nn.Module):
    """Stands for embeddings: returns the hidden state that came from the part before, whatever it is called with."""

    def __init__(self, embeddings: nn.Module) -> None:
        super().__init__()
        self.value: Tensor | None = None
        dtype = next((p.dtype for p in embeddings.parameters()), torch.get_default_dtype())
        weight = SimpleNamespace(dtype=dtype)  # vision models ask for it, to convert the image
        self.patch_embeddings = SimpleNamespace(projection=SimpleNamespace(weight=weight))

    def forward(self, *_args: object, **_kwargs: object) -> Tensor | None:
        return self.value


class _Nothing(nn.Module):
    """Stands for an embedding that was added in an earlier part: adds nothing."""

    def forward(self, *_args: object, **_kwargs: object) -> Tensor:
        return torch.zeros(())


def _replace_before(part: nn.Module, layout: Layout) -> _Given | None:
    """Replace what runs before the blocks. Returns the stand-in that hands in the hidden state, if there is one."""
    given = None
    for name in layout.before:
        if name in ("embeddings", "emb_dropout", "drop"):  # the last to run before the blocks
            given = _Given(part._modules[name])  # type: ignore[arg-type]
            part._modules[name] = given
        else:
            part._modules[name] = _Nothing()
    return given


class _BlocksPart(nn.Module):
    """Runs the own forward of a stack of which only some blocks are there."""

    def __init__(self, part: nn.Module, given: _Given | None, first: bool, last: bool) -> None:
        super().__init__()
        lend(part, self)
        self.first, self.last = first, last
        self.__dict__["given"] = given
        names = inspect.signature(part.forward).parameters
        self.entry = "inputs_embeds" if "inputs_embeds" in names else "pixel_values"
        self.cached = "use_cache" in names

    def forward(self, **arguments: Any) -> Any:  # noqa: ANN401
        """Take the first part's arguments, or `hidden` and the arguments of all parts."""
        if self.cached:
            arguments["use_cache"] = False  # a cache of keys and values is for generation, and would not cross
        if not self.last:
            arguments.pop("return_dict", None)
        given = self.__dict__["given"]
        if not self.first:
            arguments[self.entry] = hidden = arguments.pop("hidden")
            if given is not None:
                given.value = hidden
        try:
            output = self.__dict__["lender"](**arguments)
        finally:
            if given is not None:
                given.value = None
        return output if self.last else output[0]

    def train(self, mode: bool = True) -> _BlocksPart:
        """Switch the stack's modules too; what its own `train` freezes is for the piece, as some blocks are away."""
        super().train(mode)
        nn.Module.train(self.__dict__["lender"], mode)
        return self
