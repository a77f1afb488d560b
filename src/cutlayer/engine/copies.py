"""Copies of modules for further replicas: all that `copy.deepcopy` takes along, and the hooks of parameters."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import nn

__all__ = ["copy_of"]

_M = TypeVar("_M")


def copy_of(module: _M, memo: dict[int, Any]) -> _M:
    """Return a deep copy whose parameters have the hooks of the module's, which torch leaves out.

    Without them a hook that clamps or masks gradients would act at the first replica only. `memo` is that of all copies
    for one replica, so that weights which several modules share are shared by the copies.
    """
    made = copy.deepcopy(module, memo)
    if not isinstance(module, nn.Module) or not isinstance(made, nn.Module):
        return made
    for parameter, own in zip(module.parameters(), made.parameters(), strict=True):
        if not parameter.requires_grad or own._backward_hooks or own._post_accumulate_grad_hooks:
            continue  # no gradient comes there, or it has been copied with another module
        for hook in (parameter._backward_hooks or {}).values():
            own.register_hook(hook)  # type: ignore[no-untyped-call]
        for hook in (parameter._post_accumulate_grad_hooks or {}).values():
            own.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    return made
