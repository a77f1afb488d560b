"""Drawings as data: boxes, lines, labels. Painted as SVG by a template and as PNG by `raster`. Units: pixels.

Every shape has a `kind`, which decides its colours; see `palette`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

__all__ = [
    "Box",
    "Dot",
    "Group",
    "Label",
    "Line",
    "Point",
    "Polygon",
    "Scene",
    "Shape",
    "arrow",
    "fit",
    "fit_name",
    "lock",
    "width",
]

Point = tuple[float, float]
Anchor = Literal["start", "middle", "end"]

# Widths as shares of the font's size; at least those of Arial and DejaVu Sans, so that what is measured fits.
_NARROW, _SLIM, _WIDE = frozenset(" .,:;|!'`ijlI"), frozenset('frt()[]{}/\\-"*°'), frozenset("mwMW@%→←")
_BROAD = frozenset("+<=>#~^&")
_BOLD = 1.09


@dataclass(frozen=True)
class Box:
    """A rectangle; `title` is what a reader is told who points at it."""

    x: float
    y: float
    width: float
    height: float
    kind: str
    radius: float = 0.0
    title: str = ""
    shape: ClassVar[str] = "box"


@dataclass(frozen=True)
class Line:
    """A line through points."""

    points: tuple[Point, ...]
    kind: str
    title: str = ""
    shape: ClassVar[str] = "line"


@dataclass(frozen=True)
class Polygon:
    """A filled area."""

    points: tuple[Point, ...]
    kind: str
    shape: ClassVar[str] = "polygon"


@dataclass(frozen=True)
class Dot:
    """A filled circle."""

    x: float
    y: float
    radius: float
    kind: str
    title: str = ""
    shape: ClassVar[str] = "dot"


@dataclass(frozen=True)
class Label:
    """A line of text; `y` is its base line."""

    x: float
    y: float
    text: str
    kind: str
    size: float = 11.0
    anchor: Anchor = "start"
    bold: bool = False
    title: str = ""
    shape: ClassVar[str] = "label"


@dataclass(frozen=True)
class Group:
    """Shapes, moved by `x` and `y`."""

    x: float
    y: float
    items: tuple[Shape, ...]
    shape: ClassVar[str] = "group"


Shape = Box | Line | Polygon | Dot | Label | Group


@dataclass(frozen=True)
class Scene:
    """A drawing, for those who cannot see it too: `title` says what it shows, `about` what is to be read off it."""

    width: float
    height: float
    items: tuple[Shape, ...]
    title: str
    about: str = ""


def width(text: str, size: float = 11.0, *, bold: bool = False) -> float:
    """Return the most pixels that a text takes."""
    shares = sum(
        0.34 if c in _NARROW else 0.42 if c in _SLIM else 0.98 if c in _WIDE or ord(c) > 0x24F else 0.72
        if c.isupper() else 0.8 if c in _BROAD else 0.635
        for c in text
    )  # fmt: skip
    return shares * size * (_BOLD if bold else 1.0)


def fit(text: str, most: float, size: float = 11.0, *, bold: bool = False) -> str:
    """Return the text, its end left out if it would take more than `most` pixels."""
    if width(text, size, bold=bold) <= most:
        return text
    while text and width(f"{text}…", size, bold=bold) > most:
        text = text[:-1]
    return f"{text.rstrip()}…"


def fit_name(name: str, most: float, size: float = 11.0, *, bold: bool = False) -> str:
    """Return the name, its middle left out if it would take more than `most` pixels: names often differ at the end."""
    if width(name, size, bold=bold) <= most:
        return name
    kept = len(name) - 1
    while kept > 1:
        shown = f"{name[: kept - kept // 2]}…{name[len(name) - kept // 2 :]}"
        if width(shown, size, bold=bold) <= most:
            return shown
        kept -= 1
    return "…"


def arrow(tip: Point, before: Point, kind: str, size: float = 7.0) -> Polygon:
    """Return the head of an arrow that comes from `before` and ends at `tip`."""
    angle = math.atan2(tip[1] - before[1], tip[0] - before[0])
    wings = [
        (math.cos(angle + turn) * size, math.sin(angle + turn) * size) for turn in (math.pi - 0.42, math.pi + 0.42)
    ]
    return Polygon((tip, *((tip[0] + dx, tip[1] + dy) for dx, dy in wings)), kind)


def lock(x: float, y: float, kind: str, *, closed: bool = True) -> tuple[Shape, ...]:
    """Return a padlock of 9 by 12 pixels whose left top corner is at (x, y)."""
    steps: Sequence[float] = [math.pi * step / 8 for step in range(9)]
    arc = [(x + 4.5 - 3.0 * math.cos(angle), y + 3.8 - 3.4 * math.sin(angle)) for angle in steps]
    shackle = [(x + 1.5, y + 6.0), *arc, (x + 7.5, y + 6.0)] if closed else [(x + 1.5, y + 6.0), *arc]
    return (Line(tuple(shackle), f"{kind}-line"), Box(x, y + 5.5, 9.0, 6.5, kind, 1.5))
