"""Rows of the people that a party knows, put in the places that all parties have agreed on."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from cutlayer.data.columns import column
from cutlayer.data.identifiers import fault
from cutlayer.data.sources import TensorTable
from cutlayer.errors import DataError

__all__ = ["spread"]


def spread(
    everyone: Iterable[int | str] | Tensor,
    own: Iterable[int | str] | Tensor,
    **fields: Any,  # noqa: ANN401 - whatever is a column
) -> TensorTable:
    """Return a table with a row for everyone, and a field "present" that says whose rows the party has.

    The other rows hold NaN, 0 where a field holds whole numbers, or "" where it holds texts: never looked at by
    `cutlayer.models.rows.Present`, and not counted where the plan scales a field.

    Args:
        everyone: Identifiers, in the order that is the same at all parties.
        own: Identifiers of the party's rows, in their own order, of the same type. Rows of nobody in `everyone` are
            left out, with a `UserWarning` that says how many: a party may know more people than take part, but an
            identifier that is written otherwise is lost in the same way.
        fields: Field -> tensor of shape (len(own), ...), or what else `TensorTable` takes, such as a list of texts.

    Raises:
        DataError: E254, an identifier is there twice, stands for none or is written as others would not, a field has
            not a row for each of `own`, identifiers have different types, or none of `own` is in `everyone`. E253, a
            field is neither numbers nor texts.
    """
    order, rows = _listed(everyone), _listed(own)
    columns = {name: column(name, value) for name, value in fields.items()}
    _check(order, rows, {name: len(value) for name, value in columns.items()})
    known = set(order)
    unknown = sum(name not in known for name in rows)
    if unknown:
        warnings.warn(
            f"spread: {unknown} of {len(rows)} identifiers in 'own' are not in 'everyone': their rows are left out",
            stacklevel=2,
        )
    places = {name: place for place, name in enumerate(rows)}
    source = torch.tensor([places.get(name, -1) for name in order], dtype=torch.int64)
    present = source >= 0
    return TensorTable(**{name: _placed(value, source, present) for name, value in columns.items()}, present=present)


def _check(order: list[int | str], rows: list[int | str], sizes: dict[str, int]) -> None:
    """Raise `DataError` E254 for rows that have no place. No identifier is in its text."""
    where, expected = "the fields", f"each identifier once, and {len(rows)} rows in each field"
    remedy = "give `own` and the fields one entry a row; put rows of one person together before"
    got = str(sizes) if set(sizes.values()) - {len(rows)} else ""
    for name, ids in (("everyone", order), ("own", rows)):
        if len(set(ids)) != len(ids):
            where, got = f"identifiers in {name!r}", f"identifiers twice in {name!r}"
            break
        if found := fault(ids):
            where, expected = f"identifiers in {name!r}, rows counted from 0", "an identifier in each row"
            got, remedy = found
            break
    types = [sorted({_type(one) for one in ids}) for ids in (order, rows)]
    if not got and rows and not set(rows) & set(order):
        where, expected = "identifiers in 'own'", f"some of those in 'everyone' ({', '.join(types[0]) or 'none'})"
        got = f"{len(rows)} others ({', '.join(types[1])})"
        remedy = "write them alike at all parties: the same type, leading zeros, and case"
    elif not got and rows and not set(types[1]) <= set(types[0]):
        where, expected = "identifiers in 'own'", f"those of the type in 'everyone': {', '.join(types[0])}"
        got = ", ".join(types[1])
        remedy = "give both as whole numbers, or both as texts"
    if got:
        raise DataError(
            "rows cannot be put in their places", where=where, expected=expected, got=got, remedy=remedy, code="E254"
        )


def _type(name: object) -> str:
    return "int" if isinstance(name, Integral) else "str" if isinstance(name, str) else type(name).__name__


def _placed(value: Tensor | tuple[str, ...], source: Tensor, present: Tensor) -> Tensor | list[str]:
    if isinstance(value, tuple):
        return [value[place] if place >= 0 else "" for place in source.tolist()]
    gap = float("nan") if value.is_floating_point() else 0
    found = torch.full((len(source), *value.shape[1:]), gap, dtype=value.dtype)
    found[present] = value[source[present]]
    return found


def _listed(names: Iterable[int | str] | Tensor) -> list[int | str]:
    return names.tolist() if isinstance(names, Tensor) else list(names)
