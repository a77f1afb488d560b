"""Tensors as raw bytes, and named tensors as one message."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from math import isfinite

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from cutlayer.core.spec import DTYPES, TensorSpec
from cutlayer.engine.wire import Buffer
from cutlayer.errors import ContractError, NonFiniteError

__all__ = ["dtype_name", "from_payload", "memory_order", "pack", "to_payload", "torch_dtype", "unpack"]


_NOT_IN_NUMPY = frozenset({torch.bfloat16})
_OF_NUMPY = {name: np.dtype(name) for name in DTYPES if name != "bfloat16"}


@cache
def dtype_name(dtype: torch.dtype) -> str:
    """Return a torch dtype's name without "torch."."""
    return str(dtype).removeprefix("torch.")


@cache
def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype of a name of `core.spec.DTYPES`."""
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(name)
    return dtype


def memory_order(value: Tensor) -> tuple[int, ...]:
    """Return a tensor's dimensions as they follow in memory, from the one with the largest stride on; () for C order.

    A dimension is given as `~dim` if there is a gap in memory between its steps, as in a slice of a larger tensor.
    Operations add in the order of memory, and choose another way over gaps: a tensor that arrives with other strides
    gives other last bits. A dimension of one step has a place of its own too, by its stride: a batch of one image tells
    by it whether channels are last. An expanded tensor, whose numbers share memory, has no order: ().
    """
    shape, strides, filled = value.shape, value.stride(), 1
    if value.is_contiguous() and (1 not in shape or 0 in strides or not value.numel()):
        return ()
    order = sorted(range(value.ndim), key=lambda dim: (-strides[dim], shape[dim] == 1))
    for place in range(value.ndim - 1, -1, -1):
        dim = order[place]
        if shape[dim] == 1:
            continue
        if strides[dim] < filled:
            return ()
        if strides[dim] > filled:
            order[place] = ~dim
        filled = strides[dim] * shape[dim]
    return tuple(order) if order != list(range(value.ndim)) else ()


def to_payload(value: Tensor, order: tuple[int, ...] = ()) -> memoryview:
    """Return a tensor's bytes without gaps, its dimensions in this order of `memory_order`; () means C order.

    Shares memory with the tensor where it lies so on the CPU already.
    """
    if order:
        value = value.permute([max(dim, ~dim) for dim in order])
    if value.requires_grad:
        value = value.detach()
    if value.device.type != "cpu":
        value = value.cpu()
    if not value.is_contiguous():
        value = value.contiguous()
    if not value.numel():
        return memoryview(b"")
    if value.dtype in _NOT_IN_NUMPY or not value.ndim:
        value = value.as_strided((value.numel(),), (1,)).view(torch.uint8)  # of one number, the stride may be any
    return value.numpy().data.cast("B")


def _with_gaps(value: Tensor, gaps: list[bool]) -> Tensor:
    """Return a copy with a gap of one number between the steps of the dimensions that have one."""
    filled, strides = 1, [0] * value.ndim
    for dim in range(value.ndim - 1, -1, -1):
        strides[dim] = filled + (gaps[dim] and value.shape[dim] > 1)
        filled = strides[dim] * value.shape[dim]
    return torch.empty_strided(value.shape, strides, dtype=value.dtype, device=value.device).copy_(value)


def from_payload(
    payload: Buffer, dtype: str, shape: tuple[int, ...], device: torch.device, order: tuple[int, ...] = ()
) -> Tensor:
    """Return the tensor of this shape whose bytes `to_payload` gave; `order` as there.

    Shares memory with a writable payload where `device` is the CPU and there are no gaps. Gaps are of one number each,
    whatever they were, so that no peer can ask for more than three times the payload.
    """
    if order:
        dims = [max(dim, ~dim) for dim in order]
        stored = from_payload(payload, dtype, tuple(shape[dim] for dim in dims), device)
        if min(order) < 0 and stored.numel():
            stored = _with_gaps(stored, [dim < 0 for dim in order])
        return stored.permute(sorted(range(len(dims)), key=dims.__getitem__))
    kind, view = torch_dtype(dtype), memoryview(payload)
    if not view.nbytes:
        return torch.empty(shape, dtype=kind, device=device)
    if view.readonly:
        view = memoryview(bytearray(view))
    if dtype in _OF_NUMPY and shape:
        value = torch.from_numpy(np.ndarray(shape, _OF_NUMPY[dtype], view))  # one call of torch instead of two
    else:
        value = torch.frombuffer(view, dtype=kind).reshape(shape)
    return value if device.type == "cpu" else value.to(device)


def check_finite(value: Tensor, where: Callable[[], str]) -> None:
    """Raise `NonFiniteError` if a floating tensor holds a NaN or an infinity. Says where, never a value."""
    if not value.is_floating_point() or not value.numel():
        return
    if isfinite(value.sum().item()):
        return  # a NaN or an infinity would be in the sum; finite numbers may overflow in it, and are looked at below
    low, high = torch.aminmax(value)
    if not (isfinite(low.item()) and isfinite(high.item())):
        raise NonFiniteError(
            "a tensor at a cut holds a NaN or an infinity",
            where=where(),
            expected="finite numbers",
            remedy="lower the learning rate, clip gradients (training.clip_norm), or look for bad samples",
            code="E351",
        )


def check_spec(value: Tensor, spec: TensorSpec, batch: int) -> str:
    """Return how a tensor differs from its spec, or an empty text."""
    return _mismatch(spec, value.dtype, value.shape, batch)


@lru_cache(maxsize=4096)  # a run has few shapes, and checks each tensor that crosses
def _mismatch(spec: TensorSpec, dtype: torch.dtype, shape: torch.Size, batch: int) -> str:
    return spec.mismatch(dtype_name(dtype), tuple(shape), batch)


def pack(tensors: Mapping[str, Tensor]) -> bytes:
    """Return named tensors as one safetensors message."""
    return safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def unpack(payload: Buffer, source: str) -> dict[str, Tensor]:
    """Read what `pack` wrote. Raises `ContractError` if it is no such message. Keeps nothing of `payload`."""
    try:
        return safetensors.torch.load(bytes(payload))
    except (safetensors.SafetensorError, ValueError, KeyError, OverflowError) as error:
        raise ContractError(
            "a message of an exchange cannot be read",
            where=f"from {source}",
            got=type(error).__name__,
            remedy="install the same release of cutlayer at all parties",
            code="E523",
        ) from None
