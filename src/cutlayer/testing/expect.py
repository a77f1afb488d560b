"""How a check fails."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["expect", "random_value"]


def expect(holds: bool, what: str) -> None:
    """Raise `AssertionError` with `what` was expected, unless it holds."""
    if not holds:
        raise AssertionError(f"expected {what}")


def random_value(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Return normal numbers, or whole numbers in -3..3 (truth values) for other dtypes."""
    dice = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=dice).to(dtype)
    return torch.randint(0 if dtype in (torch.bool, torch.uint8) else -3, 4, shape, generator=dice).to(dtype)
