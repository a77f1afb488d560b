"""The error codes and what there is to say about each, from `errors.toml`: the one place where they are described.

`cutlayer explain` and the pages in docs/reference/errors are made from it, and a test compares it with the codes that
the source raises. A code never changes its meaning.

| code | error | meaning |
| --- | --- | --- |
| E209 | ConfigError | there is no such error code |
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Literal

import msgspec

from cutlayer.errors import ConfigError

__all__ = ["Entry", "Who", "catalogue", "find"]

Who = Literal[
    "this party",
    "another party",
    "all parties",
    "the plan's author",
    "the authority's owner",
    "IT",
    "cutlayer's developers",
]
_NEAREST = 4  # codes that are proposed for one that does not exist


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What there is to say about one code.

    Attributes:
        kind: Name of the error's class; `class` in the file.
        title: Its meaning in one line.
        what: What happened, in plain words.
        causes: What usually brings it about, likeliest first.
        do: What to do, first things first.
        who: Who can do it.
        example: Such an error, as the command line prints it: four lines.
    """

    kind: str = msgspec.field(name="class")
    title: str
    what: str
    causes: tuple[str, ...]
    do: tuple[str, ...]
    who: tuple[Who, ...]
    example: str


@cache
def catalogue() -> Mapping[str, Entry]:
    """Return code -> entry, in the order of the codes."""
    text = files("cutlayer.cli").joinpath("errors.toml").read_text(encoding="utf-8")
    return msgspec.toml.decode(text, type=dict[str, Entry])


def find(text: str) -> tuple[str, Entry]:
    """Return the code that is meant by "E351", "e351" or "351", and its entry.

    Raises:
        ConfigError: E209, there is none; the error names the nearest.
    """
    known = catalogue()
    code = text.strip(" []:.,").upper()
    code = f"E{code}" if code.isdecimal() else code
    if code in known:
        return code, known[code]
    raise ConfigError(
        f"there is no error code {text!r}",
        where="the code after `cutlayer explain`",
        expected=f"a code such as {', '.join(_near(code))}",
        got=text[:80],
        remedy="correct it, or list all codes with `cutlayer explain`",
        code="E209",
    )


def _near(code: str) -> list[str]:
    """Return the codes with the nearest numbers; without a number, those of errors that begin a story of their own."""
    digits = "".join(sign for sign in code if sign in "0123456789")[:9]
    number = int(digits) if digits else 0
    return sorted(sorted(catalogue(), key=lambda known: abs(int(known[1:]) - number))[:_NEAREST])
