"""Tests that provoke an error of a certain code say so, and are held to it.

`@pytest.mark.provokes("E351")` on a test, or on one set of its parameters, claims that the test makes the code raise
such an error and reads its text; `@pytest.mark.provokes(by="code")` claims so for the code that the parameter `code`
holds. While the test runs, every error is watched: it must have been made outside the tests, be of the class that the
catalogue gives, and have had its text read by the test. tests/test_error_codes.py wants such a test for every code.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cutlayer.cli.catalogue import catalogue
from cutlayer.errors import CutlayerError

TESTS = str(Path(__file__).parent)
PARTS = frozenset({"what", "where", "expected", "got", "remedy"})
READERS = (TESTS, str(Path(pytest.__file__).parents[1] / "_pytest"))  # pytest.raises(match=...) reads for a test


class Watch:
    """The errors that were made while a test ran, and the codes of those whose text it read."""

    def __init__(self) -> None:
        self.made: list[CutlayerError] = []
        self.read: set[str] = set()

    def saw(self, text: str) -> None:
        """Note a text that the test looks at, such as what a command printed."""
        self.read |= {error.code for error in self.made if error.code in text and error.what in text}

    def complaints(self, codes: list[str]) -> list[str]:
        """Return what is not as the marks claim."""
        found = []
        for code in codes:
            kinds = {type(error).__name__ for error in self.made if error.code == code}
            if code not in catalogue():
                found.append(f"{code} is not in the catalogue")
            elif not kinds:
                found.append(f"no {code} was made; but {sorted({error.code for error in self.made})}")
            elif kinds != {catalogue()[code].kind}:
                found.append(f"{code} was of class {kinds}, in the catalogue it is {catalogue()[code].kind}")
            elif code not in self.read:
                found.append(f"the text of {code} was not read")
        return found


_watches: list[Watch] = []


def saw(text: str) -> str:
    """Return a text, and note that the test reads it."""
    for watch in _watches:
        watch.saw(text)
    return text


def codes_of(item: pytest.Item) -> list[str]:
    """Return the codes that the marks of a test claim."""
    codes: list[str] = []
    for mark in item.iter_markers("provokes"):
        codes += mark.args
        if "by" in mark.kwargs:
            codes.append(item.callspec.params[mark.kwargs["by"]])  # type: ignore[attr-defined]
    return codes


@contextmanager
def watching() -> Iterator[Watch]:
    """Watch all errors that are made and read."""
    watch, begin, read = Watch(), CutlayerError.__init__, CutlayerError.__getattribute__
    ours: set[int] = set()

    def begin_watched(self: CutlayerError, *words: Any, **named: Any) -> None:
        begin(self, *words, **named)
        if not sys._getframe(1).f_code.co_filename.startswith(TESTS):
            ours.add(id(self))
            watch.made.append(self)

    def read_watched(self: CutlayerError, name: str) -> Any:
        if name in PARTS and id(self) in ours and sys._getframe(1).f_code.co_filename.startswith(READERS):
            watch.read.add(read(self, "code"))
        return read(self, name)

    def shown(self: CutlayerError) -> str:
        if id(self) in ours and sys._getframe(1).f_code.co_filename.startswith(READERS):
            watch.read.add(read(self, "code"))
        return Exception.__str__(self)

    _watches.append(watch)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(CutlayerError, "__init__", begin_watched)
            patch.setattr(CutlayerError, "__getattribute__", read_watched)
            patch.setattr(CutlayerError, "__str__", shown)
            yield watch
    finally:
        _watches.remove(watch)
