"""What crosses each cut of a model: dtype and shape of every tensor, and whether a gradient comes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cutlayer.core.spec import DTYPES, TensorSpec
from cutlayer.engine.tensors import dtype_name
from cutlayer.errors import StageError
from cutlayer.models.check import run_pieces
from cutlayer.models.cut import Cut
from cutlayer.models.example import Arguments, undisturbed
from cutlayer.models.sizes import BATCHES

__all__ = ["Ports", "input_specs", "port_specs"]


@dataclass(frozen=True)
class Ports:
    """The outputs of one piece: port -> spec, in order; and the ports that no gradient comes back to."""

    specs: Mapping[str, TensorSpec]
    detached: tuple[str, ...]


def port_specs(cut: Cut, arguments: Arguments, *, autocast: torch.dtype | None = None) -> tuple[Ports, ...]:
    """Return what each piece gives, found by running the pieces on the example with two batch sizes.

    Leaves modules, random generators and gradients as they were.

    Args:
        cut: The cut model.
        arguments: The example: inputs of shape (batch, ...).
        autocast: Run under `torch.autocast` with this dtype.

    Raises:
        StageError: E319, a tensor that crosses does not begin with the batch, or has a dtype that cannot cross.
    """
    large, small = (_run(cut, arguments.resized(batch), autocast) for batch in BATCHES)
    return tuple(
        Ports(
            {
                port: _spec(port, first, second)
                for port, first, second in zip(piece.outputs, large[index], small[index], strict=True)
            },
            tuple(
                port
                for port, value in zip(piece.outputs, large[index], strict=True)
                if value.is_floating_point() and not value.requires_grad
            ),
        )
        for index, piece in enumerate(cut.pieces)
    )


def input_specs(arguments: Arguments) -> dict[str, TensorSpec]:
    """Return the spec of each of the model's inputs. Raises `StageError` E319 as `port_specs` does."""
    large, small = (arguments.resized(batch).tensors for batch in BATCHES)
    return {
        name: _spec(f"data.{name}", value, small[name])  # type: ignore[arg-type]
        for name, value in large.items()
        if value is not None
    }


def _run(cut: Cut, arguments: Arguments, autocast: torch.dtype | None) -> list[tuple[Tensor, ...]]:
    modules = [piece.module for piece in cut.pieces]
    inputs = {name: value for name, value in arguments.tensors.items() if value is not None}
    device = next(iter(inputs.values())).device.type
    with undisturbed(*modules), torch.autocast(device, dtype=autocast, enabled=autocast is not None):
        for module in modules:
            module.train(True)
        return run_pieces(cut.pieces, inputs)


def _spec(port: str, first: Tensor, second: Tensor) -> TensorSpec:
    dtype, (large, small) = dtype_name(first.dtype), BATCHES
    begins = first.dim() and second.dim() and (first.shape[0], second.shape[0]) == (large, small)
    if not begins or first.shape[1:] != second.shape[1:] or dtype not in DTYPES:
        raise StageError(
            "a tensor that would cross the cut does not begin with the batch",
            where=port,
            expected=f"shape [batch, ...], one of {', '.join(DTYPES)}",
            got=f"{dtype}{list(first.shape)} for {large} samples, {list(second.shape)} for {small}",
            remedy="cut elsewhere, or hand in the stages by hand",
            code="E319",
        )
    return TensorSpec(dtype, ("batch", *first.shape[1:]))
