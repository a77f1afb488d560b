"""Defences: what a party does to a value or gradient before it leaves.

Only the sender has it. A defence gets a generator that is seeded from the party's private seed and from where in the
run the value is: after a restart the same value goes out again, not a second version of it that could be averaged with
the first, and all receivers of one value get the same version.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isfinite, prod
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

__all__ = ["DEFENCES", "Defence", "DefenceFactory", "Gaussian"]


@runtime_checkable
class Defence(Protocol):
    """What is done to a tensor before it leaves. Seen by its own party only."""

    def __call__(self, value: Tensor, generator: torch.Generator) -> Tensor:
        """Return what leaves, of the same dtype and shape (batch, ...); draw from `generator` (on the CPU) only."""


DefenceFactory = Callable[..., Defence]


class Gaussian:
    """Adds normal noise, after each sample is scaled down to a largest norm.

    x <- x * min(1, clip / ||x||), then x + N(0, deviation^2), per sample. With `clip` this is the Gaussian mechanism of
    local differential privacy for each sample and release (Dwork and Roth 2014, section 3.5.3 and appendix A):
    sensitivity 2 clip. Nothing here adds up what many releases cost, and the generator is a Mersenne Twister, which is
    none of cryptography: who learns much of the noise exactly could work out the rest of the same message.

    Args:
        deviation: Standard deviation of the noise, at least 0.
        clip: Largest L2 norm of a sample's value; 0: not scaled.
    """

    def __init__(self, deviation: float, clip: float = 0.0) -> None:
        """Raises `ValueError` for a number that cannot be."""
        if not (isfinite(deviation) and deviation >= 0 and isfinite(clip) and clip >= 0):
            raise ValueError(f"deviation={deviation} and clip={clip} must be finite and at least 0")
        self.deviation, self.clip = float(deviation), float(clip)

    def __call__(self, value: Tensor, generator: torch.Generator) -> Tensor:
        """Return the value with noise."""
        noised = value.to(torch.promote_types(value.dtype, torch.float32))  # rounding comes after the noise
        if self.clip:
            norms = noised.reshape(len(noised), prod(noised.shape[1:])).norm(dim=1)
            factors = (self.clip / norms.clamp(min=1e-12)).clamp(max=1.0)
            noised = noised * factors.reshape(-1, *[1] * (value.ndim - 1))
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float32)
        return (noised + (noise * self.deviation).to(device=value.device, dtype=noised.dtype)).to(value.dtype)


DEFENCES: Mapping[str, DefenceFactory] = {"gaussian": Gaussian}
