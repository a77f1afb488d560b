"""Texts fit where they are put, and shapes are where they are meant to be."""

from __future__ import annotations

import math
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cutlayer.report.palette import STYLES
from cutlayer.report.scene import Box, Label, Line, arrow, fit, fit_name, lock, width

TEXTS = [
    string.ascii_lowercase, string.ascii_uppercase, string.digits, string.punctuation, "hospital-a", "MMMM", "illi",
    "activations of head  float32[batch, 64, 16, 16]", "data.label: leaves, raw", "état größer 医院",
]  # fmt: skip


@pytest.mark.parametrize("bold", [False, True])
@pytest.mark.parametrize("text", [text for text in TEXTS if text.isascii()])
def test_no_text_is_wider_than_measured(text: str, bold: bool):
    """The fonts of a page are not known; that of the PNG files is the widest of those named, and is used smaller."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    font = FontProperties(family="DejaVu Sans", weight="bold" if bold else "normal")
    drawn = TextPath((0, 0), text, size=100, prop=font, usetex=False).get_extents().width
    assert drawn * 0.94 <= width(text, 100, bold=bold)


@given(st.text(st.sampled_from("aMi .医é"), max_size=30), st.floats(0, 300), st.booleans())
def test_fit_leaves_out_no_more_than_it_must(text: str, most: float, bold: bool):
    shown = fit(text, most, 11.0, bold=bold)
    if width(text, 11.0, bold=bold) <= most:
        assert shown == text
    elif shown == "…":
        assert width(f"{text[:1]}…", 11.0, bold=bold) > most or not text[:1].strip()
    else:
        kept = shown.removesuffix("…")
        assert shown.endswith("…")
        assert text.startswith(kept)
        assert width(shown, 11.0, bold=bold) <= most


@given(st.text(st.sampled_from("aMi .-"), max_size=30), st.floats(0, 300), st.booleans())
def test_fit_name_keeps_both_ends(name: str, most: float, bold: bool):
    shown = fit_name(name, most, 14.0, bold=bold)
    if width(name, 14.0, bold=bold) <= most:
        assert shown == name
    elif shown != "…":
        begin, _, end = shown.partition("…")
        assert name.startswith(begin)
        assert name.endswith(end)
        assert 0 <= len(begin) - len(end) <= 1
        assert width(shown, 14.0, bold=bold) <= most


def test_names_that_differ_at_their_ends_are_told_apart():
    shown = [fit_name(f"hospital-of-the-district-of-the-north-{n:02}", 200.0, 14.0, bold=True) for n in range(10)]
    assert len(set(shown)) == 10
    assert shown[3].endswith("-03")


@pytest.mark.parametrize("angle", [0.0, 1.0, math.pi / 2, math.pi, -2.0])
def test_an_arrow_points_where_its_line_goes(angle: float):
    before = (100 - 50 * math.cos(angle), 100 - 50 * math.sin(angle))
    head = arrow((100.0, 100.0), before, "value", size=8.0)
    tip, one, two = head.points
    assert tip == (100.0, 100.0)
    assert math.dist(tip, one) == pytest.approx(8.0)
    assert math.dist(tip, two) == pytest.approx(8.0)
    middle = ((one[0] + two[0]) / 2, (one[1] + two[1]) / 2)
    assert math.dist(middle, before) < math.dist(tip, before)


@pytest.mark.parametrize("closed", [True, False])
def test_a_lock_keeps_to_its_place(closed: bool):
    shackle, body = lock(10.0, 20.0, "keep", closed=closed)
    assert isinstance(shackle, Line)
    assert isinstance(body, Box)
    corners = [*shackle.points, (body.x, body.y), (body.x + body.width, body.y + body.height)]
    assert all(10.0 <= x <= 19.0 and 20.0 <= y <= 32.0 for x, y in corners)
    assert (shackle.points[-1][1] == shackle.points[0][1]) == closed
    assert {shackle.kind, body.kind} <= set(STYLES)


def test_shapes_are_told_apart_by_name():
    assert Box(0, 0, 1, 1, "ink").shape == "box"
    assert Label(0, 0, "a", "ink").shape == "label"
