"""Where a stage touches autograd below its public calls: how values enter its graph, and how gradients come out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

__all__ = ["Hooks", "enter", "go_back", "hooks_of", "hooks_to", "put_last", "tell_writes"]

Hooks = OrderedDict[int, Callable[[Tensor], None]]
_engine: Any = torch.autograd.Variable._execution_engine
_HOOK = -1  # PyTorch numbers its own hooks from 0
_alias = torch.ops.aten._unsafe_view.default  # the same memory, and for autograd no view of it


def go_back(roots: tuple[Tensor, ...], seeds: tuple[Tensor, ...]) -> None:
    """Do what `torch.autograd.backward` does, but for its checks of the gradients, which ModuleStage has made."""
    _engine.run_backward(roots, seeds, False, False, (), allow_unreachable=True, accumulate_grad=True)


def hooks_to(sink: list[Tensor | None], place: int) -> Hooks:
    """Return the hooks of a value that enters: the gradient at it goes to this place of `sink`."""
    return OrderedDict(((_HOOK, partial(sink.__setitem__, place)),))


def hooks_of(reached: list[bool]) -> Hooks:
    """Return the hooks of a value that enters from the graph of another stage: they tell when a gradient is at it."""
    return OrderedDict(((_HOOK, lambda _gradient: reached.append(True)),))


def enter(leaf: Tensor, hooks: Hooks) -> Tensor:
    """Let a value into a stage's graph. It may be changed in place, though autograd forbids that for leaves.

    A hook takes the gradient as it comes: what the leaf keeps has its strides, and what goes on with other strides has
    other last bits. The hooks are put where `register_hook` puts them, without its handle.
    """
    entered: Any = _alias(leaf, leaf.shape)
    if entered.stride() != leaf.stride():
        entered.data = leaf.detach()  # an alias may give a dimension of one step another stride
    entered._backward_hooks = hooks
    entered.grad_fn._register_hook_dict(entered)
    return cast("Tensor", entered)


def tell_writes(leaves: Sequence[Tensor], entered: Sequence[Tensor], places: Iterable[int]) -> None:
    """Let whoever made a value, and needs it for a backward, know that it was written to in place."""
    for place in places:
        if entered[place]._version:
            increment_version(leaves[place])


def put_last(catching: Iterable[Hooks]) -> None:
    """Let our hook see what those that modules have put on an input make of the gradient."""
    for hooks in catching:
        hooks[_HOOK] = hooks.pop(_HOOK)
