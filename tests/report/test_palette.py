"""Colours can be told from their ground, in the light and in the dark."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import pytest

from cutlayer.report.palette import DARK, LIGHT, SERIES, STYLES

THEMES = {"light": LIGHT, "dark": DARK}
GROUNDS = ("page", "card", "panel")
TEXT = ("ink", "soft", "value", "gradient", "raw", "exchange", "keep")


def luminance(colour: str) -> float:
    """Relative luminance, WCAG 2.2."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_of_black_and_white():
    assert contrast("#000000", "#ffffff") == pytest.approx(21.0)


@pytest.mark.parametrize("name", THEMES)
def test_text_can_be_read(name: str):
    colours = THEMES[name]
    low = {(text, ground): contrast(colours[text], colours[ground]) for text in TEXT for ground in GROUNDS}
    low |= {(text, "keep-panel"): contrast(colours[text], colours["keep-panel"]) for text in ("ink", "keep")}
    assert {pair: round(value, 2) for pair, value in low.items() if value < 4.5} == {}


@pytest.mark.parametrize("name", THEMES)
def test_lines_and_bars_can_be_seen(name: str):
    """WCAG asks 3:1 of what is no text. What is left over ("other") is last, and may be fainter."""
    colours = THEMES[name]
    drawn = [f"c{number}" for number in range(1, SERIES + 1)]
    low = {c: contrast(colours[c], colours["card"]) for c in drawn}
    assert {c: round(value, 2) for c, value in low.items() if value < 3.0} == {}
    assert contrast(colours["c8"], colours["card"]) > 2.5


@pytest.mark.parametrize("name", THEMES)
def test_series_differ(name: str):
    colours = [THEMES[name][f"c{number}"] for number in range(1, SERIES + 2)]
    for one, other in combinations(colours, 2):
        assert sum(abs(int(one[at : at + 2], 16) - int(other[at : at + 2], 16)) for at in (1, 3, 5)) > 60


def _named(styles: Mapping[str, object]) -> set[str]:
    return {name for style in STYLES.values() for name in (style.fill, style.stroke) if name}


def test_both_themes_have_all_colours_of_the_styles():
    assert set(LIGHT) == set(DARK)
    assert _named(STYLES) <= set(LIGHT)
