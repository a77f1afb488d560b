"""Comparing the gradients of the pieces with those of the model: of a weighted sum of the outputs, on the example.

| code | when |
|---|---|
| E321 | the pieces do not give the gradients that the model gives |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from cutlayer.errors import StageError

__all__ = ["Slopes"]

Inputs = Mapping[str, Tensor | None]


class Slopes:
    """Gradients of the parameters, and of the inputs that are floating-point, of the model and then of its pieces.

    `torch.autograd.grad` takes them, so the parameters keep their `grad`. Nothing is compared where the model cannot be
    run forwards and backwards with inputs that need a gradient.

    Args:
        model: The model.
        inputs: Argument of forward -> tensor of shape (samples, ...).
    """

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        """Make inputs that need a gradient."""
        self.inputs = {
            name: value.detach().clone().requires_grad_() if value is not None and value.is_floating_point() else value
            for name, value in inputs.items()
        }
        named = {f"the input {name!r}": value for name, value in self.inputs.items() if value is not None}
        named |= {repr(name): parameter for name, parameter in model.named_parameters()}
        self.wanted = {name: value for name, value in named.items() if value.requires_grad}
        self.found: list[Sequence[Tensor | None]] = []
        self.failure: Exception | None = None

    def run(self, call: Callable[[Inputs], Tensor]) -> Tensor | None:
        """Return what `call` gives for the inputs, and keep its gradients; None if that cannot be done."""
        try:
            output = call(self.inputs)
            # the plain sum of an output such as softmax is the same for all weights
            weights = torch.linspace(0.5, 1.5, output.numel(), device=output.device).to(output.dtype)
            wanted = list(self.wanted.values())
            self.found.append(torch.autograd.grad(output, wanted, weights.view(output.shape), allow_unused=True))
        except Exception as error:  # whoever runs it without gradients finds out what is wrong with it
            self.failure = error
            return None
        return output.detach()

    def compare(self, name: str) -> None:
        """Compare what two runs gave, the model's and the pieces'; `name` is the model's class.

        Raises:
            StageError: E321, gradients differ by more than rounding: sums over several uses may add in another order.
        """
        if not self.found:
            return
        if len(self.found) == 1:
            differing, got = "all parameters", f"{type(self.failure).__name__}: {self.failure}"
        else:
            whole, pieces = ([_dense(one) for one in found] for found in self.found)
            apart = {
                key: distance
                for key, one, other in zip(self.wanted, whole, pieces, strict=True)
                if (distance := _distance(one, other))
            }
            largest = max((_distance(one, None) for one in whole), default=0.0) if apart else 0.0
            apart = {key: by for key, by in apart.items() if by > _rounding(self.wanted[key]) * largest}
            if not apart:
                return
            differing = ", ".join(list(apart)[:3]) + (f" and {len(apart) - 3} more" if len(apart) > 3 else "")
            got = f"gradients that differ by up to {max(apart.values()):.3g}, of up to {largest:.3g}"
        raise StageError(
            "the pieces do not give the gradients that the model gives",
            where=f"{name} in train mode, gradient of {differing}",
            expected="the same gradients for the example",
            got=got,
            remedy="the model's forward does something to gradients that tracing does not see (saved_tensors_hooks, a "
            "hook for all modules); do it in a submodule of its own, cut elsewhere, or hand in the stages by hand",
            code="E321",
        )


def _dense(gradient: Tensor | None) -> Tensor | None:
    return gradient.to_dense() if gradient is not None and gradient.is_sparse else gradient


def _distance(one: Tensor | None, other: Tensor | None) -> float:
    """Return the largest difference of two gradients; None counts as zeros, and two that are no numbers as the same."""
    if one is None:
        return 0.0 if other is None else _distance(other, None)
    if not one.numel() or (other is not None and torch.equal(one, other)):
        return 0.0
    difference = (one if other is None else one - other).abs()
    if other is not None:
        difference = difference.where(one.isfinite() | other.isfinite(), 0)
    distance: float = difference.max().nan_to_num(torch.inf).item()
    return distance


def _rounding(value: Tensor) -> float:
    return math.sqrt(torch.finfo(value.dtype).eps)
