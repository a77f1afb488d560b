"""Where in the user's code a step was, what was switched on around it, and its arguments without fx's own kinds."""

from __future__ import annotations

import linecache
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from traceback import walk_tb
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import fx

from cutlayer.models.steps import Ref

__all__ = ["ambient", "contexts", "from_einops", "line", "step_name", "with_refs"]

_TORCH, _HERE = str(Path(torch.__file__).parent), str(Path(__file__).parent)


def with_refs(value: Any) -> Any:  # noqa: ANN401
    """Return arguments of fx with `Ref` in place of nodes, and plain lists and dicts in place of fx's own."""
    if isinstance(value, fx.Node):
        return Ref(value.name)
    if isinstance(value, list):
        return [with_refs(item) for item in value]
    if isinstance(value, dict):
        return {key: with_refs(item) for key, item in value.items()}
    if isinstance(value, tuple):
        items = [with_refs(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, slice):
        return slice(*(with_refs(item) for item in (value.start, value.stop, value.step)))
    return value


def line(traceback: TracebackType | None = None) -> str:
    """Return the line of the user's code that is running, or that raised: "file.py:12 `x += y`"."""
    frames: Iterator[tuple[FrameType, int]]
    if traceback is None:
        frames = _outwards(sys._getframe())
    else:
        frames = iter([(frame, number) for frame, number in walk_tb(traceback)][::-1])
    for frame, number in frames:
        file = frame.f_code.co_filename
        if not file.startswith((_TORCH, _HERE)):
            text = linecache.getline(file, number).strip()
            return f"{Path(file).name}:{number}" + (f" `{text}`" if text else "")
    return ""


def _outwards(frame: FrameType | None) -> Iterator[tuple[FrameType, int]]:
    while frame is not None:
        yield frame, frame.f_lineno
        frame = frame.f_back


def step_name(path: str) -> str | None:
    """Return a step's name for a path, or None for the model itself (fx finds a name then)."""
    return re.sub(r"\W", "_", path) or "blocks"


def ambient() -> tuple[bool, dict[str, tuple[bool, torch.dtype]]]:
    """Return whether gradients are recorded, and the autocast of each kind of device."""
    kinds = ("cpu", "cuda")
    return torch.is_grad_enabled(), {
        kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds
    }


def contexts(outside: tuple[bool, dict[str, tuple[bool, torch.dtype]]]) -> tuple[Any, ...]:
    """Return what the user's code has switched on or off around the present call."""
    (grad, casts), (outer_grad, outer_casts) = ambient(), outside
    changed = [(kind, dtype, on) for kind, (on, dtype) in casts.items() if outer_casts[kind] != (on, dtype)]
    return (*(["no_grad"] if outer_grad and not grad else []), *changed)


def from_einops() -> tuple[Callable[..., Any], ...]:
    """Return the functions of einops if the user's code has loaded it: they know no traced values."""
    einops = sys.modules.get("einops")
    return tuple(getattr(einops, name) for name in ("rearrange", "reduce", "repeat", "einsum")) if einops else ()
