"""Rows that are missing: a party of a vertical plan that does not hold everybody's data.

The party's head runs on the rows that are there, and only these cross the cut, with a mask that says whose they are.
The party behind the cut puts them back in their places, zeros elsewhere; gradients return for present rows only.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cutlayer.errors import StageError

__all__ = ["Absent", "Present", "fill"]


class Present(nn.Module):
    """Runs a module on the rows that are present.

    Takes the module's inputs, each of shape (batch, ...), then `present`, bool of shape (batch,). Gives
    `{"rows": (k, ...), "present": present}` for the k rows that are present; `rows` is seen by the party behind the
    cut, as is who is missing. Rows that are missing are never given to the module, whatever they hold.

    In a batch in which nobody is present the module is not run. Its parameters then have a gradient of zero, the sum
    over nobody: an optimizer with momentum goes on as it does with any other batch.

    Args:
        module: Gives one tensor with a row for each row of its inputs. In train mode BatchNorm needs two of them.
        empty: Shape of one row of its output, for batches in which nobody is present.
        dtype: Of its output, for these batches; None: that of its first parameter, or of its first input.
    """

    def __init__(self, module: nn.Module, empty: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
        """Keep the module."""
        super().__init__()
        self.module, self.empty, self.dtype = module, tuple(empty), dtype

    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Return the rows and who is present."""
        *values, present = inputs
        if not values or present.dtype != torch.bool or present.shape != values[0].shape[:1]:
            raise StageError(
                "the last input does not say which rows are present",
                where=f"Present({type(self.module).__name__})",
                expected=f"bool[{values[0].shape[0]}]" if values else "an input, then which of its rows are present",
                got=f"{str(present.dtype).removeprefix('torch.')}{list(present.shape)}",
                remedy="give the data's field 'present' as bool, True where the row is there"
                if values and present.shape == values[0].shape[:1]
                else "name the party in the plan's optional=[...], or by hand let 'data.present' be the stage's last "
                "input; its data has a field 'present', True where the row is there",
                code="E306",
            )
        if not bool(present.any()):
            return {"rows": self._nobody(values[0]), "present": present}
        return {"rows": self.module(*(value[present] for value in values)), "present": present}

    def _nobody(self, value: Tensor) -> Tensor:
        """Return no rows; their gradient gives each trained parameter one of zero."""
        like = next(self.module.parameters(), value)
        rows = torch.zeros((0, *self.empty), dtype=self.dtype or like.dtype, device=like.device)
        for parameter in self.module.parameters():
            if parameter.requires_grad:
                rows = rows + (parameter * 0).sum().to(rows.dtype)
        return rows


class Absent(nn.Module):
    """Stands for the head of a party that takes no part: says for any batch that nobody is present.

    Takes a tensor of shape (batch, ...). Gives `{"rows": (0, ...), "present": bool (batch,), all False}`.

    Args:
        empty: Shape of one row of the head's output.
        dtype: Of the head's output.
    """

    def __init__(self, empty: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
        """Keep shape and dtype."""
        super().__init__()
        self.empty, self.dtype = tuple(empty), dtype

    def forward(self, batch: Tensor) -> dict[str, Tensor]:
        """Return no rows."""
        rows = torch.zeros((0, *self.empty), dtype=self.dtype, device=batch.device)
        return {"rows": rows, "present": torch.zeros(len(batch), dtype=torch.bool, device=batch.device)}


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
            where="fill(rows, present)",
            expected=f"{int(present.sum())} rows",
            got=f"{rows.shape[0]}",
            remedy="let one stage give both, as cutlayer.models.rows.Present does",
            code="E306",
        )
    places = present.nonzero().squeeze(1)
    return rows.new_zeros((present.shape[0], *rows.shape[1:])).index_copy(0, places, rows)
