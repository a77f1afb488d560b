"""What a tensor looks like before it exists: dtype and shape, with the batch, and lengths up to a bound, left open."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod

from cutlayer.errors import PlanError

__all__ = ["DTYPES", "TensorSpec", "within"]

# name -> bytes an element. The position in this mapping is the dtype's code on the wire: only ever append.
DTYPES: dict[str, int] = {
    "float32": 4,
    "float64": 8,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
_FLOATING = frozenset({"float32", "float64", "float16", "bfloat16"})
_FREE = re.compile(r"([a-z][a-z0-9_]{0,31})\s*<=\s*([0-9]+|batch)")
_TEXT = re.compile(r"^\s*([a-z]+[0-9]*)\s*\[([^\]]*)\]\s*$")
_MAX_DIM = 2**31 - 1


@dataclass(frozen=True)
class TensorSpec:
    """dtype and shape of a tensor, such as `float32[batch, 64, 16, 16]` or `int64[batch, time<=512]`.

    `shape` holds positive ints, the text "batch" at most once and in first place, and texts such as "time<=512": a
    dimension that may have any length up to the bound, another one in each batch. "rows<=batch" in first place: only
    some of the batch's samples have a row. A shape without the batch is that of a value that does not grow with it,
    such as the scalar of a loss.
    """

    dtype: str
    shape: tuple[int | str, ...]

    @classmethod
    def parse(cls, text: str, where: str = "a tensor spec") -> TensorSpec:
        """Read the notation `dtype[batch, d1, d2]`. Raises `PlanError` E101, at `where`, if the text is not in it."""
        match = _TEXT.match(text)
        if match is None:
            raise PlanError(
                f"cannot read the tensor spec {text!r}",
                where=where,
                expected="a text such as 'float32[batch, 64]' or 'int64[batch, time<=512]'",
                remedy="correct it",
                code="E101",
            )
        dtype, inner = match.groups()
        if dtype not in DTYPES:
            raise PlanError(
                f"unknown dtype in {text!r}",
                where=where,
                expected=f"one of {', '.join(DTYPES)}",
                got=dtype,
                remedy="choose one of these; let the stage convert its output to it",
                code="E101",
            )
        dims = [part.strip() for part in inner.split(",")] if inner.strip() else []
        return cls(dtype, tuple(_dim(dim, place, text, where) for place, dim in enumerate(dims)))

    def __str__(self) -> str:
        """Return the notation that `parse` reads."""
        return f"{self.dtype}[{', '.join(str(dim) for dim in self.shape)}]"

    @property
    def floating(self) -> bool:
        """Whether gradients can flow through a tensor of this dtype."""
        return self.dtype in _FLOATING

    @property
    def per_sample(self) -> bool:
        """Whether the first dimension is the batch."""
        return bool(self.shape) and str(self.shape[0]).endswith("batch")

    @property
    def free(self) -> frozenset[int]:
        """Return the places of the dimensions that have a bound only."""
        return frozenset(place for place, dim in enumerate(self.shape) if isinstance(dim, str) and dim != "batch")

    def concrete(self, batch: int) -> tuple[int, ...]:
        """Return the shape for `batch` samples, free dimensions at their bounds."""
        return tuple(_bound(dim, batch) for dim in self.shape)

    def nbytes(self, batch: int) -> int:
        """Return the size in bytes for `batch` samples; the largest, if a dimension is free."""
        return prod(self.concrete(batch)) * DTYPES[self.dtype]

    def mismatch(self, dtype: str, shape: tuple[int, ...], batch: int) -> str:
        """Return what differs from a real tensor's dtype and shape, or an empty text."""
        want = self.concrete(batch)
        if dtype == self.dtype and (shape == want or within(shape, want, self.free)):
            return ""
        shown = [f"<={dim}" if place in self.free else str(dim) for place, dim in enumerate(want)]
        return f"{dtype}{list(shape)} instead of {self.dtype}[{', '.join(shown)}]"


def within(shape: tuple[int, ...], largest: tuple[int, ...], free: frozenset[int]) -> bool:
    """Whether a shape has the sizes of `largest`, or at most these at the `free` places."""
    return len(shape) == len(largest) and all(
        0 <= size <= most if place in free else size == most
        for place, (size, most) in enumerate(zip(shape, largest, strict=True))
    )


def _bound(dim: int | str, batch: int) -> int:
    if isinstance(dim, int):
        return dim
    return batch if dim.endswith("batch") else int(dim.partition("<=")[2])


def _dim(text: str, place: int, whole: str, where: str) -> int | str:
    free = _FREE.fullmatch(text)
    if text == "batch" or (free and free[2] == "batch"):
        if place:
            raise PlanError(
                f"'batch' is not the first dimension of {whole!r}", where=where, remedy="move it first", code="E101"
            )
        return f"{free[1]}<=batch" if free else text
    if free and free[1] != "batch" and 0 < int(free[2]) <= _MAX_DIM:
        return f"{free[1]}<={int(free[2])}"
    if not text.isdecimal() or not 0 < int(text) <= _MAX_DIM:
        raise PlanError(
            f"bad dimension {text!r} in {whole!r}",
            where=where,
            expected=f"'batch', an integer in 1..{_MAX_DIM}, or 'name<=integer'",
            remedy="correct the dimension",
            code="E101",
        )
    return int(text)
