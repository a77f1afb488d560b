"""Samples read one by one, so that the one that fails can be named; it is named at its own party only.

| code | error | meaning |
| --- | --- | --- |
| E268 | DataError | a sample, or a batch, cannot be read |
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePath
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Subset

from cutlayer.errors import CutlayerError, DataError

__all__ = ["at_several", "read_again", "samples_of", "whole"]

_LISTS = ("samples", "imgs", "files", "paths")  # where data sets, torchvision's too, list their files
_LISTED = 8  # places that an error names


def samples_of(dataset: Any, rows: Sequence[int]) -> list[Any]:  # noqa: ANN401 - a map-style data set
    """Return the samples at these places. Raises `DataError` E268 that names the one that cannot be read."""
    found = []
    for row in rows:
        try:
            found.append(dataset[row])
        except CutlayerError:
            raise
        except Exception as error:
            place = f"sample {row} of the data set, counted from 0{_file(dataset, row)}"
            raise _unread(error, "the data set failed at a sample", place) from error
    return found


def whole(dataset: Any, rows: Sequence[int]) -> Mapping[str, Tensor]:  # noqa: ANN401 - a `BatchDataset`
    """Return a batch that the data set makes itself. Raises `DataError` E268 that names its samples."""
    try:
        batch: Mapping[str, Tensor] = dataset.batch(rows)
    except CutlayerError:
        raise
    except Exception as error:
        raise at_several(error, rows) from error
    return batch


def at_several(error: Exception, rows: Sequence[int]) -> DataError:
    """Return the error E268 of samples that are read or put together at once."""
    more = ", ..." if len(rows) > _LISTED else ""
    place = f"samples {', '.join(str(row) for row in rows[:_LISTED])}{more} of the data set, counted from 0"
    return _unread(error, "the data set failed at several samples at once", place if rows else "the data set")


def read_again(loader: DataLoader[Any], rows: Sequence[int], error: Exception) -> list[Any]:
    """Return the samples of a batch at which a loader has failed, read one by one, here; none if that tells nothing.

    What a process of the loader died of, or waited for, is not tried here.

    Raises:
        DataError: E268, a sample fails with the same error.
    """
    text = str(error)
    if loader.num_workers and not text.startswith("Caught "):
        return []
    try:
        return samples_of(loader.dataset, rows)
    except DataError as own:
        cause = type(own.__cause__)
        if own.code == "E268" and (cause is type(error) or text.startswith(f"Caught {cause.__name__} in ")):
            raise own from error
    except Exception:
        return []
    return []


def _file(dataset: Any, row: int) -> str:  # noqa: ANN401
    """Return the file of a sample where the data set lists them, with a comma before it; else an empty text."""
    with suppress(Exception):
        while isinstance(dataset, Subset):
            dataset, row = dataset.dataset, dataset.indices[row]
        for name in _LISTS:
            listed = getattr(dataset, name, None)
            one = listed[row] if listed is not None else None
            one = one[0] if isinstance(one, tuple | list) else one
            if isinstance(one, PurePath) or (isinstance(one, str) and os.sep in one and Path(one).parent.is_dir()):
                return f", file {one}"
    return ""


def _unread(error: Exception, what: str, where: str) -> DataError:
    return DataError(
        what,
        where=where,
        got=" ".join(f"{type(error).__name__}: {error}".split())[:400],
        remedy="a next(...) in it found nothing left: begin what it reads from anew, or give a default, next(..., None)"
        if isinstance(error, StopIteration)
        else "read it alone, as data[index]; check that its file is there and can be read",
        code="E268",
    )
