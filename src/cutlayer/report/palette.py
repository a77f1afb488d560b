"""Colours and line styles, by kind of shape: one table for the page, the SVG files and the PNG files.

Series colours are those of Okabe and Ito, which colour-blind readers tell apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["DARK", "LIGHT", "SERIES", "STYLES", "Style"]

LIGHT: Mapping[str, str] = {
    "page": "#ffffff", "card": "#ffffff", "panel": "#f4f6f8", "ink": "#1c2733", "soft": "#5a6876", "rule": "#d5dce3",
    "frame": "#8798a8", "chip": "#ffffff", "value": "#0b62a4", "gradient": "#b8500f", "raw": "#c0152f",
    "exchange": "#6b4fa0", "keep": "#1d7a46", "keep-panel": "#eaf5ee", "c1": "#0072b2", "c2": "#d55e00",
    "c3": "#009e73", "c4": "#cc79a7", "c5": "#8a6d00", "c6": "#3a9bd0", "c7": "#5a6876", "c8": "#8996a2",
}  # fmt: skip
DARK: Mapping[str, str] = {
    "page": "#12181f", "card": "#19212a", "panel": "#202a35", "ink": "#e6ecf2", "soft": "#a2b0bd", "rule": "#36434f",
    "frame": "#6d7f90", "chip": "#19212a", "value": "#6cb4ee", "gradient": "#f0965a", "raw": "#ff7d8c",
    "exchange": "#b9a2ea", "keep": "#6cc795", "keep-panel": "#1b2f26", "c1": "#56b4e9", "c2": "#f0863a",
    "c3": "#3fc79c", "c4": "#e09cc0", "c5": "#e3c446", "c6": "#9ad2f5", "c7": "#a2b0bd", "c8": "#6f7d8a",
}  # fmt: skip
SERIES = 7  # colours c1 to c7 are for series; c8 is for what is left over; "all" for what is of all of them


@dataclass(frozen=True)
class Style:
    """Names of colours, or "" for none; width of the line in pixels; its dashes."""

    fill: str = ""
    stroke: str = ""
    width: float = 1.0
    dash: tuple[float, ...] = ()


def _series() -> dict[str, Style]:
    found = {
        "fill-all": Style(fill="ink"),
        "line-all": Style(stroke="ink", width=3.2),
        "dash-all": Style(stroke="ink", width=3.2, dash=(8.0, 4.0)),
    }
    for number in range(1, SERIES + 2):
        name = f"c{number}"
        found |= {
            f"fill-{name}": Style(fill=name),
            f"line-{name}": Style(stroke=name, width=2.0),
            f"dash-{name}": Style(stroke=name, width=2.0, dash=(6.0, 4.0)),
            f"thin-{name}": Style(stroke=name, width=1.1),
            f"thindash-{name}": Style(stroke=name, width=1.1, dash=(4.0, 3.0)),
        }
    return found


STYLES: Mapping[str, Style] = {
    "page": Style(fill="card"),
    "ink": Style(fill="ink"),
    "soft": Style(fill="soft"),
    "rule": Style(stroke="rule"),
    "axis": Style(stroke="frame"),
    "party": Style(fill="panel", stroke="frame", width=1.5),
    "stage": Style(fill="chip", stroke="frame"),
    "loss": Style(fill="chip", stroke="frame", dash=(3.0, 2.0)),
    "inside": Style(fill="keep-panel"),
    "keep": Style(fill="keep"),
    "keep-line": Style(stroke="keep", width=1.6),
    "value": Style(fill="value"),
    "value-line": Style(stroke="value", width=1.8),
    "gradient": Style(fill="gradient"),
    "gradient-line": Style(stroke="gradient", width=1.8),
    "raw": Style(fill="raw"),
    "raw-line": Style(stroke="raw", width=1.8),
    "exchange": Style(fill="exchange"),
    "exchange-line": Style(stroke="exchange", width=1.5, dash=(6.0, 4.0)),
    **_series(),
}
