"""Numbers as people read them."""

from __future__ import annotations

import math

import pytest

from cutlayer.report.words import compact, duration, number, size


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"), (1, "1 B"), (999, "999 B"), (1000, "1.0 kB"), (99_949, "99.9 kB"), (99_950, "100 kB"),
        (999_499, "999 kB"), (999_500, "1.0 MB"), (18_816_000, "18.8 MB"), (2_500_000_000, "2.5 GB"),
        (7 * 10**15, "7.0 PB"), (7 * 10**18, "7000 PB"),
    ],
)  # fmt: skip
def test_size(nbytes: float, text: str):
    assert size(nbytes) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0"), (999, "999"), (1234, "1.2 k"), (25_557_032, "25.6 M")])
def test_compact(count: float, text: str):
    assert compact(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.000 s"), (0.0421, "0.042 s"), (0.9994, "0.999 s"), (0.9996, "1.00 s"), (4.2, "4.20 s"),
        (9.994, "9.99 s"), (9.996, "10 s"), (38.4, "38 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (60, "1 min 0 s"),
        (192, "3 min 12 s"), (3599.4, "59 min 59 s"), (3599.9, "1 h 0 min"), (3600, "1 h 0 min"),
        (7500, "2 h 5 min"), (7199.9, "2 h 0 min"),
    ],
)  # fmt: skip
def test_duration(seconds: float, text: str):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.0000"), (0.5, "0.5000"), (-0.25, "-0.2500"), (1e-3, "0.0010"), (0.00099, "0.00099"),
        (99_999.0, "99999.0000"), (123_456.0, "1.23e+05"), (math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf"),
    ],
)  # fmt: skip
def test_number(value: float, text: str):
    assert number(value) == text
