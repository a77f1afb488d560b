"""Drawings as PNG: the size of the drawing, its colours where its shapes are, and nothing global touched."""

from __future__ import annotations

from pathlib import Path

import pytest

from cutlayer.report import raster
from cutlayer.report.palette import LIGHT
from cutlayer.report.scene import Box, Dot, Group, Label, Line, Polygon, Scene

image = pytest.importorskip("matplotlib.image")

SHAPES = (
    Box(10, 10, 30, 20, "fill-c1"),
    Group(50, 0, (Box(10, 10, 30, 20, "fill-c2", 4.0), Dot(25, 50, 8, "fill-c3"))),
    Polygon(((10, 40), (40, 40), (25, 60)), "value"),
    Line(((0, 70), (100, 70)), "line-c4"),
    Label(10, 95, "$x^2$ <b>", "ink", bold=True),
)


def colour_at(picture: object, x: float, y: float) -> str:
    red, green, blue = (round(255 * float(part)) for part in picture[int(2 * y), int(2 * x)][:3])  # type: ignore[index]
    return f"#{red:02x}{green:02x}{blue:02x}"


def test_shapes_are_where_the_drawing_has_them(tmp_path: Path):
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    raster.save_png(Scene(120, 100, SHAPES, "a drawing"), tmp_path / "a.png")
    assert dict(mpl.rcParams) == before
    picture = image.imread(tmp_path / "a.png")
    assert picture.shape[:2] == (200, 240)
    assert colour_at(picture, 25, 20) == LIGHT["c1"]
    assert colour_at(picture, 75, 20) == LIGHT["c2"]
    assert colour_at(picture, 75, 50) == LIGHT["c3"]
    assert colour_at(picture, 25, 45) == LIGHT["value"]
    assert colour_at(picture, 60, 70) == LIGHT["c4"]
    assert colour_at(picture, 110, 5) == LIGHT["card"]
    text = picture[170:192, 20:120, :3]
    assert float(text.min()) < 0.3, "the label is there, and dark"


def test_later_shapes_lie_on_top(tmp_path: Path):
    shapes = (Line(((0, 20), (40, 20)), "line-c1"), Box(10, 10, 20, 20, "fill-c2"), Dot(20, 20, 4, "fill-c3"))
    raster.save_png(Scene(40, 40, shapes, "on top"), tmp_path / "a.png")
    picture = image.imread(tmp_path / "a.png")
    assert (colour_at(picture, 20, 20), colour_at(picture, 13, 20)) == (LIGHT["c3"], LIGHT["c2"])
    assert colour_at(picture, 4, 20) == LIGHT["c1"]


def test_available(monkeypatch: pytest.MonkeyPatch):
    assert raster.available()
    monkeypatch.setattr(raster, "find_spec", lambda _name: None)
    assert not raster.available()
