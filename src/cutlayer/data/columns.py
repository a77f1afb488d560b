"""A column of a table in memory: a tensor, or the texts of a field that preprocessing makes numbers of.

| code | error | meaning |
| --- | --- | --- |
| E253 | DataError | a column is neither numbers nor texts |
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from cutlayer.errors import DataError

__all__ = ["column"]


def column(name: str, value: Any) -> Tensor | tuple[str, ...]:  # noqa: ANN401 - whatever the caller has
    """Return a field of a table as a tensor of shape (samples, ...), or as one text a sample.

    A tensor is kept as it is. An array of numpy keeps its dtype; of Python's numbers, floats become torch's default
    dtype (float32) and whole ones int64. What has `tolist`, such as a column of pandas, is taken as that list.

    Raises:
        DataError: E253, it is neither, or values are missing among texts. Names the field and the sample.
    """
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        native = np.ascontiguousarray(value, dtype=value.dtype.newbyteorder("="))
        return torch.as_tensor(native if native.flags.writeable else native.copy())
    if isinstance(value, np.ndarray) and value.dtype.kind not in "UO":
        raise _refused(name, f"an array of {value.dtype}")
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


def _refused(name: str, got: str) -> DataError:
    return DataError(
        f"the field {name!r} of a table is neither numbers nor texts",
        where=f"TensorTable({name}=...), samples counted from 0",
        expected="a tensor or an array with one row a sample; or one text a sample, for `preprocessing` of the plan",
        got=got,
        remedy='give a tensor; dates as numbers, such as days; for a missing text one of your own, such as ""',
        code="E253",
    )
