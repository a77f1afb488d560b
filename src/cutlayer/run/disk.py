"""Errors of the disk that name the file: the system names it where a file is opened, not where it is written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["named"]


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Let an OSError from within name `path`: a full disk is found out by a write, whose error names no file."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise
