"""Samples put together as a batch, as torch does it; what does not fit is named by its place in the data set.

| code | error | meaning |
| --- | --- | --- |
| E253 | DataError | samples that cannot be put together |
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from traceback import walk_tb
from typing import Any

import numpy as np
from torch import Tensor
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, default_collate
from torch.utils.data._utils.fetch import _MapDatasetFetcher

from cutlayer.data.samples import at_several, read_again
from cutlayer.errors import CutlayerError, DataError

__all__ = ["collated", "next_batch"]

_READS = (_MapDatasetFetcher.fetch.__code__, ExceptionWrapper.reraise.__code__)  # of torch: where samples are read
_PLAIN = (Tensor, Mapping, list, tuple, bool, int, float, complex, str, bytes)
_SIZES = (
    "bring them to one size in the data set; or give a DataLoader with a collate_fn that pads them to one length and "
    "gives a mask beside, as in docs/reference/data.md; where the length changes by batch, name it: "
    "cl.split(..., longest={...})"
)
_OTHER = "let the data set give tensors, arrays of numbers, numbers or texts"


def collated(samples: list[Any], rows: Sequence[int] | None = None, taken: Collection[str] = ()) -> Any:  # noqa: ANN401 - whatever the data set gives
    """Return samples as a batch.

    Args:
        samples: As the data set gives them.
        rows: Their places in the data set; None: from 0 on.
        taken: The fields that are taken, if that is known. Where all are there, others are left out of dictionaries:
            samples may lack these.

    Raises:
        DataError: E253, they cannot be put together. Two places and sizes are told where sizes differ, and the place of
            a sample that lacks a field; else the type that is no tensor, with its place, and no values.
    """
    rows = rows or range(len(samples))
    if taken and all(isinstance(sample, Mapping) for sample in samples) and set(taken) <= set().union(*samples):
        samples = [{name: sample[name] for name in sample if name in taken} for sample in samples]
    if _lacking(samples, rows):
        raise _misfit(samples, rows, "")
    try:
        batch = default_collate(samples)
    except (RuntimeError, TypeError, ValueError) as error:
        raise _misfit(samples, rows, str(error).partition("\n")[0][:200]) from error
    if _mixed(batch):  # torch puts anything beside texts into their list
        raise _misfit(samples, rows, "texts and others")
    return batch


def next_batch(iterator: Iterator[Any], loader: DataLoader[Any], rows: Callable[[], Sequence[int]]) -> Any:  # noqa: ANN401
    """Return the next batch of a loader; None at its end.

    Where it fails, the samples are read again, one by one, as torch names places in the batch, or none.

    Args:
        iterator: The loader's.
        loader: Its data set and collate function are looked at after an error.
        rows: Gives the places of the batch's samples in the data set; called after an error.

    Raises:
        DataError: E253, they cannot be put together; E268, one of them cannot be read, or that ended in StopIteration.
        Exception: what the loader raises, if not that.
    """
    try:
        batch = next(iterator)
    except CutlayerError:
        raise
    except Exception as error:
        if isinstance(error, StopIteration) and not _of_data(error):
            return None
        places = _name(loader, rows, error)
        if isinstance(error, StopIteration):  # which a caller would take for the end
            raise at_several(error, places) from error
        raise
    if loader.collate_fn is default_collate and _mixed(batch):
        _name(loader, rows, TypeError("texts and others"))
    return batch


def _of_data(end: StopIteration) -> bool:
    """Say whether the data set or the collate function raised it, here or in a process of the loader: no real end."""
    frames = (frame for frame, _ in walk_tb(end.__traceback__))
    return any(frame.f_code in _READS for frame in frames)


def _name(loader: DataLoader[Any], rows: Callable[[], Sequence[int]], error: Exception) -> Sequence[int]:
    """Raise E268 or E253 if it can say which samples do not fit. What fails meanwhile is of less interest.

    Returns:
        The places of the batch's samples, if these can be found.
    """
    places: Sequence[int] = ()
    with suppress(Exception):
        places = rows()
    samples = read_again(loader, places, error)
    known = bool(samples) and loader.collate_fn is default_collate
    if known and (_lacking(samples, places) or _unequal(samples, places) or _strange(samples, places)[0]):
        raise _misfit(samples, places, "") from error
    return places


def _misfit(samples: list[Any], rows: Sequence[int], said: str) -> DataError:
    """Return the error of samples that are no batch; `said` is torch's word, for what is not found out here."""
    got, remedy = _lacking(samples, rows), "give all samples the same fields; or leave such samples out"
    if not got:
        got, remedy = _strange(samples, rows)
    if not got:
        got, remedy = _unequal(samples, rows) or said, _SIZES
    return DataError(
        "the samples of a batch cannot be put together",
        where="a batch of the data set",
        expected="samples whose fields are tensors of one shape, or numbers",
        got=got,
        remedy=remedy,
        code="E253",
    )


def _lacking(samples: list[Any], rows: Sequence[int]) -> str:
    """Return in words the first sample that lacks a field which another has; "" if there is none."""
    if not all(isinstance(sample, Mapping) for sample in samples):
        return ""
    owners = {name: row for row, sample in zip(rows, samples, strict=True) for name in sample}
    for row, sample in zip(rows, samples, strict=True):
        for name, owner in owners.items() if len(sample) < len(owners) else ():
            if name not in sample:
                return f"no field {name} in sample {row}, counted from 0; sample {owner} has it"
    return ""


def _mixed(batch: Any) -> bool:  # noqa: ANN401 - what torch has put together
    """Whether a field is a list that begins with a text and has others than texts."""
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    lists = [part for part in (*parts, batch) if isinstance(part, list) and part and isinstance(part[0], str)]
    return any(not isinstance(entry, str | bytes) for part in lists for entry in part)


def _strange(samples: list[Any], rows: Sequence[int]) -> tuple[str, str]:
    """Return in words the first part of a sample that no batch can hold, and what to do; twice "" if there is none."""
    texts: dict[str, bool] = {}
    for row, sample in zip(rows, samples, strict=True):
        for place, value in _parts(sample):
            where = f"{f' in the field {place} of' if place else ' as'} sample {row}, counted from 0"
            array = isinstance(value, np.ndarray | np.generic) and not isinstance(value, str | bytes)
            if (array and not _taken(value)) or not (array or isinstance(value, _PLAIN)):
                return f"{_kind(value)}{where}", _made(value)
            if texts.setdefault(place, isinstance(value, str)) != isinstance(value, str):
                return f"texts and others: a {type(value).__name__}{where}", "give texts alone there, or numbers alone"
    return "", ""


def _taken(value: Any) -> bool:  # noqa: ANN401 - an array or a number of numpy
    """Whether torch makes a tensor of it."""
    forward = all(stride >= 0 for stride in value.strides)
    return value.dtype.kind in "biufc" and value.dtype.isnative and forward


def _kind(value: Any) -> str:  # noqa: ANN401
    if value is None:
        return "None"
    dtype = getattr(value, "dtype", None)
    return f"{type(value).__module__}.{type(value).__qualname__}{'' if dtype is None else f' of {dtype}'}"


def _made(value: Any) -> str:  # noqa: ANN401
    """Return what to make of a value that no tensor can hold."""
    dtype = getattr(value, "dtype", None)
    kind = dtype.kind if isinstance(dtype, np.dtype) else ""
    if value is None:
        return "fill in a value, such as NaN with a mask beside or a class of its own; or leave such samples out"
    if type(value).__module__.startswith("PIL."):
        return "make a tensor of the picture: torchvision's ToTensor, or torch.as_tensor(numpy.array(picture))"
    if kind in ("M", "m"):
        return "give times as numbers, such as days since a date"
    if kind in "biufc" and kind:
        return "copy it: numpy.array(array, dtype=array.dtype.newbyteorder('='), order='C')"
    if kind == "O":
        return "give the array a dtype of numbers: array.astype(numpy.float32)"
    if kind in ("U", "S"):
        return "give texts as str, one a sample, and declare them in the plan's preprocessing"
    return _OTHER


def _unequal(samples: list[Any], rows: Sequence[int]) -> str:
    """Return in words the first sample with a part whose size is not that of the batch's first; "" if there is none."""
    first = dict(_sizes(samples[0]))
    for row, sample in zip(rows[1:], samples[1:], strict=True):
        for place, size in _sizes(sample):
            if first.get(place, size) != size:
                part = f" in {place}" if place else ""
                return f"sizes {first[place]} of sample {rows[0]} and {size} of sample {row}{part}, counted from 0"
    return ""


def _sizes(sample: Any) -> Iterator[tuple[str, list[int]]]:  # noqa: ANN401
    """Yield where in a sample something has a size, such as "image" or "[0]", and that size."""
    for place, value in _parts(sample):
        if isinstance(value, Tensor | np.ndarray):
            yield place, list(value.shape)
        elif isinstance(value, list | tuple):
            yield place, [len(value)]


def _parts(part: Any, place: str = "") -> Iterator[tuple[str, Any]]:  # noqa: ANN401 - of a sample
    """Yield the parts of a sample, such as "image" or "[0]": all but mappings, whose entries they are."""
    if isinstance(part, Mapping):
        for name, value in part.items():
            yield from _parts(value, f"{place}[{name!r}]" if place else str(name))
        return
    yield place, part
    for number, value in enumerate(part) if isinstance(part, list | tuple) else ():
        yield from _parts(value, f"{place}[{number}]")
