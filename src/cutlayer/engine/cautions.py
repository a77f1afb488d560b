"""What is hardly meant in preprocessed fields: warnings at this party, which may name a few values; never sent."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Final

from torch import Tensor

from cutlayer.engine.agree import Agreed, Entry

__all__ = ["Unknown", "alike", "noticed", "warn_of_alike", "warn_of_empty", "warn_of_unknown"]

Unknown = tuple[int, tuple[Entry, ...]]
"""How many values a round had so far, and some of them: none is in the list."""

_NAMED: Final = 3  # values, or pairs of them, that a warning names
_DATA: Final = {"train": "training", "evaluate": "evaluation", "predict": "prediction"}


def alike(entries: Iterable[Entry]) -> list[tuple[str, str]]:
    """Return pairs of texts that are equal but for spaces around them and how Unicode writes a letter (NFC, NFD)."""
    first: dict[str, str] = {}
    texts = [entry for entry in dict.fromkeys(entries) if isinstance(entry, str)]
    kept = [(first.setdefault(unicodedata.normalize("NFC", text).strip(), text), text) for text in texts]
    return [(one, other) for one, other in kept if one != other]


def warn_of_alike(party: str, field: str, pairs: Sequence[tuple[str, str]], place: str) -> None:
    """Warn of pairs as of `alike`, if there are any; `place` says whose they are."""
    if pairs:
        _warn(
            f"party {party}: values of {field!r} {place} differ in nothing but spaces around them, or how Unicode "
            f"writes a letter: {'; '.join(_shown(pair) for pair in pairs[:_NAMED])}. They count as different ones; "
            "write them alike"
        )


def warn_of_empty(party: str, field: str, agreed: Agreed) -> None:
    """Warn of columns in which no sample of any party has a value."""
    empty = [str(column) for column, filled in enumerate(agreed.count) if not filled]
    if empty:
        _warn(
            f"party {party}: no training sample of any party has a value of {field!r} in column {', '.join(empty)}, "
            "counted from 0: it is trained as zeros; leave it out, or look for its values"
        )


def warn_of_unknown(party: str, field: str, agreed: Agreed, unknown: Unknown, mode: str) -> None:
    """Warn of a field of which no value of a round is in the list."""
    total, some = unknown
    _warn(
        f"party {party}: none of the {total} values of {field!r} in the {_DATA[mode]} data is among the "
        f"{len(agreed.values)} that the parties agreed on: {_shown(some)} become 0, like all others; write them as in "
        "the training data"
    )


def noticed(before: Unknown | None, raw: Any, ready: Tensor) -> Unknown | None:  # noqa: ANN401 - what `apply` takes
    """Return what is known of a round after a batch of categories, `ready` of any shape; None: a value is in the list.

    `before` is what was known so far.
    """
    if before is None or bool(ready.any()):
        return None
    entries = raw.flatten().tolist() if isinstance(raw, Tensor) else [str(entry) for entry in raw]
    return before[0] + len(entries), tuple(dict.fromkeys((*before[1], *entries)))[:_NAMED]


def _shown(entries: Iterable[Entry]) -> str:
    """Return entries so that what looks the same is told apart."""
    return ", ".join(map(ascii, entries))


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=3)
