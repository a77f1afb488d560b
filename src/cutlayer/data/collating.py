"""Samples put together as a batch, as torch does it; what does not fit is named by its place in the data set.

| code | error | meaning |
| --- | --- | --- |
| E253 | DataError | samples that cannot be put together |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from cutlayer.errors import DataError

__all__ = ["collated", "next_batch"]

_OF_COLLATE = ("equal size", "default_collate")  # in what torch's own collate function says


def collated(samples: list[Any], rows: Sequence[int] | None = None) -> Any:  # noqa: ANN401 - whatever the data set gives
    """Return samples as a batch. `rows`: their places in the data set; None: from 0 on.

    Raises:
        DataError: E253, they cannot be put together. Two places and sizes are told where sizes differ, and no values.
    """
    try:
        return default_collate(samples)
    except (RuntimeError, TypeError) as error:
        found = _unequal(samples, rows or range(len(samples)))
        raise _misfit(found or str(error).partition("\n")[0][:200]) from error


def next_batch(iterator: Iterator[Any], loader: DataLoader[Any], rows: Callable[[], Sequence[int]]) -> Any:  # noqa: ANN401
    """Return the next batch of a loader; None at its end.

    Where torch's own collate function fails, the samples are read again, one by one, as it names places in the batch.

    Args:
        iterator: The loader's.
        loader: Its data set and collate function are looked at after an error.
        rows: Gives the places of the batch's samples in the data set; called after an error.

    Raises:
        DataError: E253, they have different sizes.
        Exception: what the loader raises, if not that.
    """
    try:
        return next(iterator, None)
    except (RuntimeError, TypeError) as error:
        if loader.collate_fn is default_collate and any(words in str(error) for words in _OF_COLLATE):
            _name(loader.dataset, rows, error)
        raise


def _name(dataset: Any, rows: Callable[[], Sequence[int]], error: Exception) -> None:  # noqa: ANN401
    """Raise E253 if it can say which samples do not fit. What fails meanwhile is of less interest than `error`."""
    found = ""
    with suppress(Exception):
        places = rows()
        found = _unequal([dataset[row] for row in places], places)
    if found:
        raise _misfit(found) from error


def _misfit(got: str) -> DataError:
    return DataError(
        "the samples of a batch cannot be put together",
        where="a batch of the data set",
        expected="samples whose fields are tensors of one shape, or numbers",
        got=got,
        remedy="bring them to one size in the data set; or give a DataLoader with a collate_fn that pads them to one "
        "length and gives a mask beside, as in docs/reference/data.md; where the length changes by batch, name it: "
        "cl.split(..., longest={...})",
        code="E253",
    )


def _unequal(samples: list[Any], rows: Sequence[int]) -> str:
    """Return in words the first sample with a part whose size is not that of the batch's first; "" if there is none."""
    first = dict(_sizes(samples[0]))
    for row, sample in zip(rows[1:], samples[1:], strict=True):
        for place, size in _sizes(sample):
            if first.get(place, size) != size:
                part = f" in {place}" if place else ""
                return f"sizes {first[place]} of sample {rows[0]} and {size} of sample {row}{part}, counted from 0"
    return ""


def _sizes(part: Any, place: str = "") -> Iterator[tuple[str, list[int]]]:  # noqa: ANN401 - of a sample
    """Yield where in a sample something has a size, such as "image" or "[0]", and that size."""
    if isinstance(part, Tensor | np.ndarray):
        yield place, list(part.shape)
    elif isinstance(part, Mapping):
        for name, value in part.items():
            yield from _sizes(value, f"{place}[{name!r}]" if place else str(name))
    elif isinstance(part, list | tuple):
        yield place, [len(part)]
        for number, value in enumerate(part):
            yield from _sizes(value, f"{place}[{number}]")
