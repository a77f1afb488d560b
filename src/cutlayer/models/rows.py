"""Rows that are missing: a party of a vertical plan that does not hold everybody's data.

The party's head runs on the rows that are there, and only these cross the cut, with a mask that says whose they are.
The party behind the cut puts them back in their places, zeros elsewhere; gradients return for present rows only.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cutlayer.errors import StageError

__all__ = ["Present", "fill"]


class Present(nn.Module):
    """Runs a module on the rows that are present.

    Takes the module's inputs, each of shape (batch, ...), then `present`, bool of shape (batch,). Gives
    `{"rows": (k, ...), "present": present}` for the k rows that are present; `rows` is seen by the party behind the
    cut, as is who is missing. Rows that are missing are never given to the module, whatever they hold.

    Args:
        module: Gives one tensor with a row for each row of its inputs. In train mode BatchNorm needs two of them.
        empty: Shape of one row of its output, for batches in which nobody is present.
    """

    def __init__(self, module: nn.Module, empty: tuple[int, ...]) -> None:
        """Keep the module."""
        super().__init__()
        self.module, self.empty = module, tuple(empty)

    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Return the rows and who is present."""
        *values, present = inputs
        if present.dtype != torch.bool or present.shape != values[0].shape[:1]:
            raise StageError(
                "the last input does not say which rows are present",
                expected=f"bool[{values[0].shape[0]}]",
                got=f"{str(present.dtype).removeprefix('torch.')}{list(present.shape)}",
                remedy='give the data a field "present": True where the row is there',
                code="E306",
            )
        if not bool(present.any()):
            like = next(self.module.parameters(), values[0])
            return {"rows": like.new_zeros((0, *self.empty)), "present": present}
        return {"rows": self.module(*(value[present] for value in values)), "present": present}


def fill(rows: Tensor, present: Tensor) -> Tensor:
    """Put rows back in their places.

    Args:
        rows: Shape (k, ...), as they came over the cut.
        present: bool of shape (batch,), k times True.

    Returns:
        Shape (batch, ...): zeros where nobody is present. Gradients flow to `rows`.

    Raises:
        StageError: E306, there are not as many rows as are said to be present.
    """
    if int(present.sum()) != rows.shape[0]:
        raise StageError(
            "there are not as many rows as are said to be present",
            expected=f"{int(present.sum())} rows",
            got=f"{rows.shape[0]}",
            remedy="let one stage give both, as cutlayer.models.Present does",
            code="E306",
        )
    places = present.nonzero().squeeze(1)
    return rows.new_zeros((present.shape[0], *rows.shape[1:])).index_copy(0, places, rows)
