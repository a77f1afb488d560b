"""Identifiers of people, as they come out of files: what is none, and what another party would write otherwise."""

from __future__ import annotations

import re
from typing import Any

__all__ = ["fault"]

_GAPS = frozenset({"", "nan", "none", "nat", "<na>"})  # an empty field of a file, and str() of a gap
_UNSEEN = "\ufeff\u200b\u200c\u200d\u2060"  # marks of byte order and of width 0, which str.strip() leaves

_FAULTS = {
    "missing": "leave the rows without an identifier out, at all parties",
    "decimal": (
        "pandas makes floats of whole numbers in a column with a gap: leave the rows without an identifier out, then "
        "convert it, column.astype('int64'), before astype(str)"
    ),
    "spaces": "take the spaces off, at all parties: text.strip()",
    "unseen": "open the file with encoding='utf-8-sig'; or take them off, at all parties: text.replace('\\ufeff', '')",
}
_WORDS = {
    "missing": ("text that says that none is there", "texts that say that none is there"),
    "decimal": ("text of a decimal number", "texts of decimal numbers"),
    "spaces": ("text with spaces around it", "texts with spaces around them"),
    "unseen": ("text with signs of no width", "texts with signs of no width"),
}


def fault(identifiers: list[Any]) -> tuple[str, str] | None:
    """Return what is wrong with texts that name nobody, or a person otherwise than others would, and what helps.

    None: nothing. No identifier is in what is returned; rows are counted from 0.
    """
    kinds = {row: kind for row, one in enumerate(identifiers) if isinstance(one, str) and (kind := _kind(one))}
    if not kinds:
        return None
    first, kind = next(iter(kinds.items()))
    many = sum(one == kind for one in kinds.values())
    words = _WORDS[kind][many > 1]
    return f"{many} {words}, {'the first ' if many > 1 else ''}at row {first}", _FAULTS[kind]


def _kind(one: str) -> str:
    if one.strip().lower() in _GAPS:
        return "missing"
    if one != one.strip():
        return "spaces"
    if any(sign in one for sign in _UNSEEN):
        return "unseen"
    return "decimal" if re.fullmatch(r"[+-]?\d+\.0+", one) else ""
