"""What kind of step a step is: known from sizes alone, random, writing in place, taking one item of a tuple."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from cutlayer.models.steps import Ref, Step, hold, refs

__all__ = ["draws", "is_derived", "is_item", "is_random", "is_size", "is_told", "is_view", "writes"]

_SIZE_ATTRIBUTES = frozenset(
    {
        "shape",
        "dtype",
        "device",
        "ndim",
        "is_cuda",
        "layout",
        "is_nested",
        "is_sparse",
        "is_quantized",
        "is_cpu",
        "is_meta",
    }
)
_SIZE_METHODS = frozenset({"size", "dim", "ndimension", "numel", "nelement", "is_floating_point", "get_device"})
_SIZE_FUNCTIONS: frozenset[Callable[..., Any]] = frozenset({len, torch.numel, torch.is_floating_point})
_RANDOM = frozenset(
    [
        "rand",
        "randn",
        "randint",
        "randperm",
        "rand_like",
        "randn_like",
        "randint_like",
        "bernoulli",
        "multinomial",
        "normal",
        "poisson",
        "sample",
        "sample_n",
        "rsample",
        "rsample_n",
        "empty",
        "empty_like",
        "new_empty",
    ]
)
_VIEWS = frozenset({"squeeze", "transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "select"})
_WRITING: frozenset[Callable[..., Any]] = frozenset(
    getattr(operator, name)
    for name in [
        "iadd",
        "isub",
        "imul",
        "itruediv",
        "ifloordiv",
        "imod",
        "ipow",
        "iand",
        "ior",
        "ixor",
        "imatmul",
        "ilshift",
        "irshift",
        "setitem",
        "delitem",
    ]
) | {setattr}


def is_size(step: Step) -> bool:
    """Say whether a step asks a value only for its shape, dtype or device."""
    if not step.args or not isinstance(step.args[0], Ref):
        return False
    if step.op == "method":
        return step.target in _SIZE_METHODS
    if step.target is getattr:
        return step.args[1] in _SIZE_ATTRIBUTES
    return step.op == "function" and step.target in _SIZE_FUNCTIONS


def is_item(step: Step) -> bool:
    """Say whether a step takes one item out of a tuple, list or dict, or one field out of an object."""
    if step.target is not operator.getitem and step.target is not getattr:
        return False
    return isinstance(step.args[0], Ref) and isinstance(step.args[1], int | str) and not is_size(step)


def is_view(step: Step) -> bool:
    """Say whether a step only looks at one tensor in another shape or order, or at a part of it."""
    alone = isinstance(next(iter(step.args), None), Ref) and len(list(refs(step))) == 1
    if step.op == "function" and step.target is operator.getitem:
        return alone
    name = step.target if step.op == "method" else getattr(step.target, "__name__", "")
    return alone and step.op in ("method", "function") and name in _VIEWS


def is_derived(step: Step, derived: set[str], modules: Mapping[str, nn.Module]) -> bool:
    """Say whether a step needs no data: only sizes, constants, buffers, and other such steps (`derived`).

    Such a step is computed again in each piece that needs it, instead of crossing a cut.
    """
    if is_size(step):
        return True
    if step.target is hold or writes(step, modules):
        return False
    if step.op == "state":
        return False  # the caller knows whether it is a buffer
    if step.op == "module":
        inside = modules[step.name]
        if next(inside.parameters(), None) is not None or any(draws(module) for module in inside.modules()):
            return False
    return not is_random(step) and all(ref in derived for ref in refs(step))


def is_told(step: Step, known: set[str], modules: Mapping[str, nn.Module], values: Mapping[str, Any]) -> bool:
    """Say whether a step takes numbers out of what a submodule gives beside tensors, or reckons with such (`known`).

    An image's size in patches may come so. Forward may decide by them, and is held to them.
    """
    names = list(refs(step))
    taken = step.target is operator.getitem and bool(names) and names[0] in modules
    if step.op != "function" or not names or not known.issuperset(names[taken:]):
        return False
    if taken and not isinstance(values.get(names[0]), tuple | list | Mapping):
        return False
    value = values.get(step.name)
    return all(type(one) in (int, bool) for one in (value if isinstance(value, tuple | list) else [value]))


def is_random(step: Step) -> bool:
    """Say whether a step is a function or method that draws random numbers, or leaves memory as it finds it."""
    name = step.target if isinstance(step.target, str) else getattr(step.target, "__name__", "")
    return name in _RANDOM


def draws(module: nn.Module) -> bool:
    """Say whether a module of PyTorch's own draws random numbers when it trains."""
    return isinstance(module, nn.modules.dropout._DropoutNd | nn.RReLU)


def writes(step: Step, modules: Mapping[str, nn.Module]) -> bool:
    """Say whether a step writes in place, or may do so: an operator such as `+=`, `relu_`, `inplace=True`, `out=`.

    Without an example nobody sees into a submodule, so one that holds an in-place module counts.
    """
    if step.op == "module":
        return any(getattr(module, "inplace", False) is True for module in modules[step.name].modules())
    if step.op == "method":
        return step.target.endswith("_") and not step.target.endswith("__")
    if step.op == "function":
        name = getattr(step.target, "__name__", "")
        named = name.endswith("_") and not name.endswith("__")
        return named or step.target in _WRITING or step.kwargs.get("inplace") is True or "out" in step.kwargs
    return False
