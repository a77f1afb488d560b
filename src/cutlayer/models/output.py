"""Choosing the one tensor that is a model's output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, fx, nn

from cutlayer.errors import StageError

__all__ = ["Key", "picker"]

Key = str | int | None


def picker(model: nn.Module, key: Key) -> Callable[[Any], Any]:
    """Return a function from what `forward` returns to its one tensor.

    Args:
        model: The model, for errors.
        key: The field or index to take; None takes the output itself, or the field `logits` of a model of Hugging
            Face, or the only item of a tuple or dict of one. An index leaves a tensor as it is: GoogLeNet gives a tuple
            in train mode and a tensor in evaluation.

    Raises:
        StageError: (when the function is called) there is no one tensor (E317).
    """

    def pick(output: Any) -> Any:  # noqa: ANN401
        if isinstance(output, Tensor | fx.Proxy) and key is None:
            return output
        if isinstance(output, Tensor) and isinstance(key, int):
            return output
        if key is not None:
            return _field(model, output, key)
        names = list(output) if isinstance(output, Mapping) else []
        if "logits" in names:
            return output["logits"]
        if isinstance(output, Mapping | tuple | list) and len(output) == 1:
            return next(iter(output.values() if isinstance(output, Mapping) else output))
        raise _refusal(model, output)

    return pick


def _field(model: nn.Module, output: Any, key: str | int) -> Any:  # noqa: ANN401
    try:
        return output[key]
    except (KeyError, IndexError, TypeError):
        raise _refusal(model, output) from None


def _refusal(model: nn.Module, output: Any) -> StageError:  # noqa: ANN401
    kind = type(output).__name__
    if isinstance(output, Mapping):
        got, choice = f"{kind} with {', '.join(map(repr, output))}", ", ".join(f"output={name!r}" for name in output)
    elif isinstance(output, tuple | list):
        got, choice = f"{kind} of {len(output)}", "output=0"
    else:
        got, choice = kind, ""
    return StageError(
        "the model's output is not one tensor",
        where=f"forward of {type(model).__name__}",
        expected="one tensor, or a choice",
        got=got,
        remedy=f"choose one: {choice} (cutlayer cut: --output); for a loss of several let forward put them side by "
        "side, torch.cat([first, second], 1), and take them apart in the loss"
        if choice
        else "let forward return one tensor",
        code="E317",
    )
