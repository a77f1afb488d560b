"""Rows of the people that a party knows, put in the places that all parties have agreed on."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from cutlayer.data.sources import TensorTable
from cutlayer.errors import DataError

__all__ = ["spread"]


def spread(everyone: Iterable[int | str] | Tensor, own: Iterable[int | str] | Tensor, **fields: Tensor) -> TensorTable:
    """Return a table with a row for everyone, and a field "present" that says whose rows the party has.

    The other rows hold NaN, or 0 where a field holds whole numbers: never looked at by `cutlayer.models.rows.Present`,
    and not counted where the plan scales a field.

    Args:
        everyone: Identifiers, in the order that is the same at all parties.
        own: Identifiers of the party's rows, in their own order; those of nobody in `everyone` are left out.
        fields: Field -> tensor of shape (len(own), ...).

    Raises:
        DataError: E254, an identifier is there twice, or a field has not a row for each of `own`.
    """
    order, rows = _listed(everyone), _listed(own)
    sizes = {name: len(value) for name, value in fields.items()}
    twice = [name for name, ids in (("everyone", order), ("own", rows)) if len(set(ids)) != len(ids)]
    if twice or set(sizes.values()) - {len(rows)}:
        raise DataError(
            "rows cannot be put in their places",
            where=f"identifiers in {twice[0]!r}" if twice else "the fields",
            expected=f"each identifier once, and {len(rows)} rows in each field",
            got=f"identifiers twice in {twice[0]!r}" if twice else str(sizes),
            remedy="give `own` and the fields one entry a row; put rows of one person together before",
            code="E254",
        )
    places = {name: place for place, name in enumerate(rows)}
    source = torch.tensor([places.get(name, -1) for name in order], dtype=torch.int64)
    present = source >= 0
    return TensorTable(**{name: _placed(value, source, present) for name, value in fields.items()}, present=present)


def _placed(value: Tensor, source: Tensor, present: Tensor) -> Tensor:
    gap = float("nan") if value.is_floating_point() else 0
    found = torch.full((len(source), *value.shape[1:]), gap, dtype=value.dtype)
    found[present] = value[source[present]]
    return found


def _listed(names: Iterable[int | str] | Tensor) -> list[int | str]:
    return names.tolist() if isinstance(names, Tensor) else list(names)
