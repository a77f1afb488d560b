"""Numbers as people read them."""

from __future__ import annotations

import math

__all__ = ["compact", "duration", "number", "size"]


def size(nbytes: float) -> str:
    """Return "18.8 MB": decimal units, three digits."""
    return _scaled(nbytes, ("B", "kB", "MB", "GB", "TB", "PB"))


def compact(count: float) -> str:
    """Return "25.6 M": thousands, millions and so on, three digits."""
    return _scaled(count, ("", "k", "M", "G", "T", "P"))


def duration(seconds: float) -> str:
    """Return "0.042 s", "4.20 s", "38 s", "3 min 12 s" or "2 h 5 min"."""
    if seconds < 59.5:
        return f"{seconds:.{3 if seconds < 0.9995 else 2 if seconds < 9.995 else 0}f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def number(value: float) -> str:
    """Return a metric with four digits behind the point, or in powers of ten where that says nothing."""
    if not math.isfinite(value):
        return str(value)
    if value and (abs(value) < 1e-3 or abs(value) >= 1e5):
        return f"{value:.3g}"
    return f"{value:.4f}"


def _scaled(value: float, units: tuple[str, ...]) -> str:
    place = 0
    while abs(value) >= 999.5 and place + 1 < len(units):
        value, place = value / 1000, place + 1
    digits = 0 if place == 0 or abs(value) >= 99.95 else 1
    return f"{value:.{digits}f} {units[place]}".rstrip()
