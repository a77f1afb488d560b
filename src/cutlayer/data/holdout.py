"""Rows held out for testing, so that no person (or item, or work) is on both sides.

Each side is drawn from the identifier alone, not from its place: parties of a vertical plan find the same split, each
by itself, and rows that come later move no other row.

| code | error | meaning |
| --- | --- | --- |
| E254 | DataError | identifiers that may name one person in two ways |
| E263 | DataError | one of the sides would be empty |
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cutlayer.data.identifiers import fault
from cutlayer.errors import DataError

__all__ = ["Holdout", "holdout"]


@dataclass(frozen=True)
class Holdout:
    """Places of rows, ascending: `train` int64[n], `test` int64[m]."""

    train: Tensor
    test: Tensor


def holdout(groups: Tensor | Iterable[int | str], *, share: float = 0.2, seed: int = 0) -> Holdout:
    """Hold out about `share` of the groups, with all their rows.

    A group is held out when SHA-256 of "cutlayer:holdout:SEED:GROUP", read as a fraction, is below `share`. The seed
    is public: it says who is in the test set to whoever knows an identifier.

    Args:
        groups: One identifier a row: a person, an item, a work. Whole numbers or texts: 7 and "7" are the same, "07" is
            another.
        share: Part of the groups to hold out, between 0 and 1.
        seed: Another one gives another split.

    Raises:
        DataError: E254, an identifier is no whole number and no text, or has spaces around it: written "7.0" or "7 ",
            one person would be on both sides; or it is a text that stands for none, such as "" or "nan". E263, one of
            the sides would be empty.
    """
    names = _names(_listed(groups))
    held = {name: _fraction(seed, name) < share for name in dict.fromkeys(names)}
    tested = torch.tensor([held[name] for name in names], dtype=torch.bool)
    found = Holdout((~tested).nonzero().flatten(), tested.nonzero().flatten())
    if not len(found.train) or not len(found.test):
        raise DataError(
            "a split leaves one side empty",
            where=f"holdout with share={share}, seed={seed!r}",
            expected="rows to train with and rows to test with",
            got=f"{len(found.train)} and {len(found.test)}, from {len(held)} groups with share={share}",
            remedy="change share, or take another seed",
            code="E263",
        )
    return found


def _listed(groups: Any) -> list[Any]:  # noqa: ANN401 - what the user gives
    """Return identifiers as a list; tensors and arrays of one number, also in a list, are that number."""
    if isinstance(groups, Tensor | np.ndarray):
        groups = groups.reshape(1) if not groups.ndim else groups
        return groups.tolist() if isinstance(groups, Tensor) else list(groups)
    if isinstance(groups, str | bytes | set | frozenset):
        raise _refused(f"a {type(groups).__name__}", "give a list or a column: one identifier a row")
    return [one.item() if isinstance(one, Tensor | np.ndarray) and not one.ndim else one for one in groups]


def _names(groups: list[Any]) -> list[str]:
    """Return identifiers as texts. Raises `DataError` E254; no identifier is in its text."""
    other = [row for row, one in enumerate(groups) if isinstance(one, bool) or not isinstance(one, Integral | str)]
    if not other:
        if found := fault(groups):
            raise _refused(*found)
        return [one if isinstance(one, str) else str(int(one)) for one in groups]
    first = groups[other[0]]
    got = f"{len(other)} others, the first" if len(other) > 1 else "1 other,"
    remedy = (
        "give whole numbers or texts, at all parties alike: str(one) of a UUID or a date, one.decode() of bytes; "
        "leave these rows out where an identifier is missing"
    )
    if not isinstance(first, bool) and isinstance(first, Real):
        remedy = (
            "pandas makes floats of whole numbers in a column with a gap: leave the rows without an identifier out, "
            "then convert it, column.astype('int64')"
        )
    raise _refused(f"{got} at row {other[0]}: {type(first).__name__}", remedy)


def _refused(got: str, remedy: str) -> DataError:
    return DataError(
        "identifiers cannot be compared",
        where="holdout, rows counted from 0",
        expected="whole numbers, or texts without spaces around them",
        got=got,
        remedy=remedy,
        code="E254",
    )


def _fraction(seed: int, name: str) -> float:
    digest = hashlib.sha256(f"cutlayer:holdout:{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
