"""A column of a table in memory: a tensor, or the texts of a field that preprocessing makes numbers of.

| code | error | meaning |
| --- | --- | --- |
| E253 | DataError | a column is neither numbers nor texts, or has masked values or no rows |
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from cutlayer.errors import DataError

__all__ = ["column"]

_REMEDY = 'give a tensor; dates as numbers, such as days; for a missing text one of your own, such as ""'
_GAPS = (
    "fill them, array.filled(...): with numpy.nan where the plan scales the field, kind='scale' of `preprocessing`; "
    "else with a value of your own, and give the mask as a further field; or leave such samples out"
)
_DTYPE = "convert it: array.astype(numpy.float32), or a complex one of numpy.complex64"


def column(name: str, value: Any) -> Tensor | tuple[str, ...]:  # noqa: ANN401 - whatever the caller has
    """Return a field of a table as a tensor of shape (samples, ...), or as one text a sample.

    A tensor is kept as it is. An array of numpy keeps its dtype; of Python's numbers, floats become torch's default
    dtype (float32) and whole ones int64. What has `tolist`, such as a column of pandas, is taken as that list.

    Raises:
        DataError: E253, it is neither, has no rows or a dtype that no tensor has, or values are missing among texts or
            masked. Names the field and the sample.
    """
    if isinstance(value, int | float | complex) or getattr(value, "shape", None) == ():
        raise _refused(
            name, "a single value: shape []", "has no rows", "give it one row a sample, also where all are alike"
        )
    if gaps := _masked(value):
        raise _refused(
            name, f"masked values from sample {gaps[0]} on", "has masked values: a tensor has no mask", _GAPS
        )
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        native = np.asarray(value, dtype=value.dtype.newbyteorder("="), order="C")
        try:
            return torch.as_tensor(native if native.flags.writeable else native.copy())
        except TypeError as error:
            raise _refused(name, f"an array of {value.dtype}", "has a dtype that no tensor has", _DTYPE) from error
    if isinstance(value, np.ndarray) and value.dtype.kind not in "UO":
        raise _refused(name, f"an array of {value.dtype}")
    return _listed(name, value)


def _masked(value: Any) -> list[int]:  # noqa: ANN401
    """Return the samples with masked values."""
    if isinstance(value, np.ma.MaskedArray):
        mask = np.ma.getmaskarray(value)
        return [int(at) for at in np.flatnonzero(mask.any(axis=tuple(range(1, mask.ndim))))]
    entries = enumerate(value) if isinstance(value, list | tuple) else ()
    return [at for at, entry in entries if isinstance(entry, np.ma.MaskedArray) and np.ma.is_masked(entry)]


def _listed(name: str, value: Any) -> Tensor | tuple[str, ...]:  # noqa: ANN401
    entries = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(entries, list | tuple):
        raise _refused(name, f"a {type(value).__name__}")
    texts = [isinstance(entry, str) for entry in entries]
    if texts and all(texts):
        return tuple(str(entry) for entry in entries)
    if any(texts) or any(entry is None for entry in entries):
        at = next(at for at, entry in enumerate(entries) if not isinstance(entry, str))
        at = next((one for one, entry in enumerate(entries) if entry is None), at)
        raise _refused(name, f"{entries[at] if entries[at] is None else type(entries[at]).__name__} at sample {at}")
    try:
        if entries and all(isinstance(entry, Tensor) for entry in entries):
            return torch.stack(list(entries))
        return torch.as_tensor(np.array(entries) if any(isinstance(e, np.ndarray) for e in entries) else entries)
    except (TypeError, ValueError, RuntimeError) as error:
        raise _refused(name, f"{type(error).__name__}: {error}"[:200]) from error


def _refused(name: str, got: str, what: str = "is neither numbers nor texts", remedy: str = _REMEDY) -> DataError:
    return DataError(
        f"the field {name!r} of a table {what}",
        where=f"TensorTable({name}=...), samples counted from 0",
        expected="a tensor or an array with one row a sample; or one text a sample, for `preprocessing` of the plan",
        got=got,
        remedy=remedy,
        code="E253",
    )
