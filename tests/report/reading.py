"""Read a page as a browser would: its tables by their names, its text, and whatever it could load."""

from __future__ import annotations

import csv
import io
import re
from html.parser import HTMLParser
from pathlib import Path

VOID = frozenset({"meta", "br", "hr", "img", "input", "link"})
UNITS = {"": 1, "B": 1, "k": 1e3, "kB": 1e3, "M": 1e6, "MB": 1e6, "G": 1e9, "GB": 1e9, "T": 1e12}


class Page(HTMLParser):
    """A parsed page.

    Attributes:
        tags: All elements with their attributes.
        tables: Name -> rows of cells, the head first; the name is the caption's, or that of the region around.
        words: All text outside of styles.
        figures: Title and description of each drawing.
    """

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.words, self.styles = "", ""
        self.figures: list[list[str]] = []
        self._open: list[str] = []
        self._name = ""
        self.feed(text)
        assert self._open == [], "not all elements are closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.tags.append((tag, given))
        if tag not in VOID:
            self._open.append(tag)
        if given.get("role") == "region":
            self._name = given["aria-label"]
        if tag == "table":
            assert self._name not in self.tables
            self.tables[self._name] = []
        if tag == "tr":
            self.tables[self._name].append([])
        if tag in ("td", "th"):
            self.tables[self._name][-1].append("")
        if tag == "svg":
            self.figures.append(["", ""])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> closes another element"
        if tag in ("p", "h1", "h2", "h3", "li", "td", "th", "text"):
            self.words += "\n"

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            self.styles += data
            return
        self.words += data
        if {"td", "th"} & set(self._open):
            self.tables[self._name][-1][-1] += data
        if self._open[-2:] == ["svg", "title"]:
            self.figures[-1][0] += data
        if self._open[-2:] == ["svg", "desc"]:
            self.figures[-1][1] += data

    def column(self, table: str, head: str) -> dict[str, str]:
        """Return first cell -> cell of a column, of rows that are as long as the head."""
        first, *rows = self.tables[table]
        return {row[0]: row[first.index(head)] for row in rows if len(row) == len(first)}


def page(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def table(folder: Path, name: str) -> list[dict[str, str]]:
    """Return the rows of a CSV file of a report."""
    return list(csv.DictReader(io.StringIO((folder / "report" / name).read_text(encoding="utf-8"))))


def amount(text: str) -> float:
    """Return what "18.8 MB", "4.4 GFLOP" or "1,024" says."""
    found = re.fullmatch(r"([\d.,]+) ?([kMGT]?B?)(?:FLOP)?", text)
    assert found is not None, text
    return float(found[1].replace(",", "")) * UNITS[found[2]]


def about(text: str, value: float) -> bool:
    """Whether a text such as "18.8 MB" says this value, to its last digit."""
    found = re.fullmatch(r"[\d,]+(?:\.(\d+))? ?([kMGT]?B?)(?:FLOP)?", text)
    assert found is not None, text
    return abs(amount(text) - value) <= 0.501 * UNITS[found[2]] * 10.0 ** -len(found[1] or "")
