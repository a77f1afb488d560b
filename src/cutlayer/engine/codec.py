"""Codecs: how a tensor is written where it crosses a cut, and read again at the other side.

Every party of the cut has the codec of that name; the plan fixes dtype and shape of what it writes, so that a receiver
knows the size of each frame beforehand. A codec keeps no state and knows no party.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from cutlayer.core.crossing import Setting
from cutlayer.core.spec import TensorSpec
from cutlayer.engine.tensors import torch_dtype

__all__ = ["CODECS", "Cast", "Codec", "CodecFactory", "Levels"]


@runtime_checkable
class Codec(Protocol):
    """How a tensor is written on the wire. Both methods are seen by their own party only."""

    def encode(self, value: Tensor) -> Tensor:
        """Return what is sent, of the plan's spec on the wire, for a value of shape (batch, ...)."""

    def decode(self, wire: Tensor, spec: TensorSpec) -> Tensor:
        """Return the value, of dtype and shape of `spec`, for what came; shape (batch, ...), dtype of the wire's spec.

        What came has the plan's dtype and shape, and is hostile in all else: whatever it holds, return a tensor or
        raise `ValueError`.
        """


CodecFactory = Callable[..., Codec]


class Cast:
    """Sends a floating tensor as another floating dtype: half the bytes of float32 as bfloat16 or float16."""

    def __init__(self, dtype: str) -> None:
        """Keep the dtype, "bfloat16" or "float16"."""
        self.dtype = torch_dtype(dtype)

    def encode(self, value: Tensor) -> Tensor:
        """Return the value rounded to the dtype."""
        return value.to(self.dtype)

    def decode(self, wire: Tensor, spec: TensorSpec) -> Tensor:
        """Return it in its own dtype again."""
        return wire.to(torch_dtype(spec.dtype))


class Levels:
    """Sends each sample as 256 levels between its least and greatest number: a quarter of the bytes of float32.

    Row by row, q = round((x - low) / step) with step = (high - low) / 255; low and step are sent before the row, as two
    float32. Uniform affine quantisation: Jacob et al. 2018 (arXiv 1712.05877), eq. 1. The error is at most half a step.
    """

    def encode(self, value: Tensor) -> Tensor:
        """Return uint8 (batch, 8 + numbers of a sample)."""
        rows = value.detach().to(torch.float32).reshape(value.shape[0], -1)
        low, high = torch.aminmax(rows, dim=1, keepdim=True)
        step = (high - low) / 255
        levels = ((rows - low) / torch.where(step > 0, step, 1.0)).round().clamp(0, 255).to(torch.uint8)
        head = torch.cat([low, step], 1).reshape(-1).view(torch.uint8).reshape(-1, 8)
        return torch.cat([head, levels], 1)

    def decode(self, wire: Tensor, spec: TensorSpec) -> Tensor:
        """Return the numbers that the levels stand for."""
        shape = spec.concrete(wire.shape[0])
        head = wire[:, :8].reshape(-1).clone().view(torch.float32).reshape(-1, 2)
        rows = head[:, :1] + wire[:, 8:].to(torch.float32) * head[:, 1:]
        if rows.numel() != prod(shape):
            raise ValueError("another number of levels than the plan says")
        return rows.reshape(shape).to(torch_dtype(spec.dtype))


def _cast(dtype: str) -> CodecFactory:
    def make(**settings: Setting) -> Codec:
        if settings:
            raise TypeError(f"no settings are known, but {', '.join(settings)}")
        return Cast(dtype)

    return make


CODECS: Mapping[str, CodecFactory] = {"bfloat16": _cast("bfloat16"), "float16": _cast("float16"), "int8": Levels}
