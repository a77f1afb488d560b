"""Rows held out for testing, so that no person (or item, or work) is on both sides.

Each side is drawn from the identifier alone, not from its place: parties of a vertical plan find the same split, each
by itself, and rows that come later move no other row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

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
        groups: One identifier a row: a person, an item, a work. Integers or texts.
        share: Part of the groups to hold out, between 0 and 1.
        seed: Another one gives another split.

    Raises:
        DataError: E263, one of the sides would be empty.
    """
    names = [str(group) for group in (groups.tolist() if isinstance(groups, Tensor) else groups)]
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


def _fraction(seed: int, name: str) -> float:
    digest = hashlib.sha256(f"cutlayer:holdout:{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
