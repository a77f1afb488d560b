"""Drawings as PNG, by matplotlib (extra "plot"). Light colours; nothing global of matplotlib is touched."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cutlayer.report.palette import LIGHT, STYLES
from cutlayer.report.scene import Box, Dot, Group, Label, Line, Polygon, Scene, Shape

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

__all__ = ["available", "save_png"]

_DPI = 192  # two dots for each pixel of the drawing
_POINT = 72 / 96  # a pixel in points
_FONT = "DejaVu Sans"  # comes with matplotlib


def available() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def save_png(scene: Scene, path: Path) -> None:
    """Paint a drawing."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(scene.width / 96, scene.height / 96), dpi=_DPI, facecolor=LIGHT["card"])
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_axis_off()
    axes.set_xlim(0, scene.width)
    axes.set_ylim(scene.height, 0)
    _paint(axes, scene.items, 0.0, 0.0)
    figure.savefig(path, format="png", metadata={"Title": scene.title, "Software": None})


def _paint(axes: Axes, items: Sequence[Shape], dx: float, dy: float) -> None:
    """Paint the shapes one over the other, in their order."""
    for item in items:
        if isinstance(item, Group):
            _paint(axes, item.items, dx + item.x, dy + item.y)
        else:
            order = 1.0 + len(axes.patches) + len(axes.lines) + len(axes.texts)
            _shape(axes, item, dx, dy).set_zorder(order)


def _shape(axes: Axes, item: Box | Dot | Label | Line | Polygon, dx: float, dy: float) -> Artist:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Circle, FancyBboxPatch, Rectangle
    from matplotlib.patches import Polygon as Area

    if isinstance(item, Label):
        return _write(axes, item, dx, dy)
    colours = _colours(item.kind)
    if isinstance(item, Line):
        xs, ys = zip(*((x + dx, y + dy) for x, y in item.points), strict=True)
        line = {"linewidth": colours["linewidth"], "linestyle": colours["linestyle"]}
        return axes.add_line(Line2D(xs, ys, color=colours["edgecolor"], **line))
    if isinstance(item, Polygon):
        return axes.add_patch(Area([(x + dx, y + dy) for x, y in item.points], closed=True, **colours))
    if isinstance(item, Dot):
        return axes.add_patch(Circle((item.x + dx, item.y + dy), item.radius, **colours))
    place = (item.x + dx, item.y + dy)
    if not item.radius:
        return axes.add_patch(Rectangle(place, item.width, item.height, **colours))
    rounded = f"round,pad=0,rounding_size={min(item.radius, item.width / 2, item.height / 2)}"
    return axes.add_patch(FancyBboxPatch(place, item.width, item.height, boxstyle=rounded, **colours))


def _write(axes: Axes, item: Label, dx: float, dy: float) -> Artist:
    return axes.text(
        item.x + dx,
        item.y + dy,
        item.text,
        color=_colours(item.kind)["facecolor"],
        fontsize=item.size * _POINT * 0.94,  # this font is wider than those of the page
        fontweight="bold" if item.bold else "normal",
        fontfamily=_FONT,
        ha={"start": "left", "middle": "center", "end": "right"}[item.anchor],
        va="baseline",
        parse_math=False,
    )


def _colours(kind: str) -> dict[str, Any]:
    style = STYLES[kind]
    return {
        "facecolor": LIGHT.get(style.fill, "none"),
        "edgecolor": LIGHT.get(style.stroke, "none"),
        "linewidth": style.width * _POINT if style.stroke else 0.0,
        "linestyle": (0, [length / style.width for length in style.dash]) if style.dash else "-",
    }
