"""A minimal reader of msgpack arrays of unsigned integers and arrays, written from the format's specification."""

from __future__ import annotations

from typing import Any


def array(data: bytes) -> list[Any]:
    """Return the one array that `data` holds."""
    value, end = _value(data, 0)
    assert end == len(data)
    assert isinstance(value, list)
    return value


def _value(data: bytes, place: int) -> tuple[Any, int]:
    first = data[place]
    if first < 0x80:
        return first, place + 1
    if 0x90 <= first <= 0x9F:
        return _items(data, place + 1, first & 0x0F)
    if 0xCC <= first <= 0xCF:
        width = 1 << (first - 0xCC)
        return int.from_bytes(data[place + 1 : place + 1 + width], "big"), place + 1 + width
    if first == 0xDC:
        return _items(data, place + 3, int.from_bytes(data[place + 1 : place + 3], "big"))
    raise ValueError(f"unexpected byte {first:#x}")


def _items(data: bytes, place: int, count: int) -> tuple[list[Any], int]:
    items = []
    for _ in range(count):
        item, place = _value(data, place)
        items.append(item)
    return items, place
