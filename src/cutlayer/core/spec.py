"""What a tensor looks like before it exists: dtype and shape, with the batch left open."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod

from cutlayer.errors import PlanError

__all__ = ["DTYPES", "TensorSpec"]

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
_TEXT = re.compile(r"^\s*([a-z]+[0-9]*)\s*\[([^\]]*)\]\s*$")
_MAX_DIM = 2**31 - 1


@dataclass(frozen=True)
class TensorSpec:
    """dtype and shape of a tensor, such as `float32[batch, 64, 16, 16]`.

    `shape` holds positive ints, and the text "batch" at most once and in first place. A shape without "batch" is
    that of a value that does not grow with the batch, such as the scalar of a loss.
    """

    dtype: str
    shape: tuple[int | str, ...]

    @classmethod
    def parse(cls, text: str) -> TensorSpec:
        """Read the notation `dtype[batch, d1, d2]`. Raises `PlanError` if the text is not in it."""
        match = _TEXT.match(text)
        if match is None:
            raise PlanError(
                f"cannot read the tensor spec {text!r}", expected="a text such as 'float32[batch, 64]'", code="E101"
            )
        dtype, inner = match.groups()
        if dtype not in DTYPES:
            raise PlanError(
                f"unknown dtype in {text!r}", expected=f"one of {', '.join(DTYPES)}", got=dtype, code="E101"
            )
        dims = [part.strip() for part in inner.split(",")] if inner.strip() else []
        return cls(dtype, tuple(_dim(dim, place, text) for place, dim in enumerate(dims)))

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
        return bool(self.shape) and self.shape[0] == "batch"

    def concrete(self, batch: int) -> tuple[int, ...]:
        """Return the shape for `batch` samples."""
        return tuple(batch if dim == "batch" else int(dim) for dim in self.shape)

    def nbytes(self, batch: int) -> int:
        """Return the size in bytes for `batch` samples."""
        return prod(self.concrete(batch)) * DTYPES[self.dtype]

    def mismatch(self, dtype: str, shape: tuple[int, ...], batch: int) -> str:
        """Return what differs from a real tensor's dtype and shape, or an empty text."""
        want = self.concrete(batch)
        if dtype == self.dtype and shape == want:
            return ""
        return f"{dtype}{list(shape)} instead of {self.dtype}{list(want)}"


def _dim(text: str, place: int, whole: str) -> int | str:
    if text == "batch":
        if place:
            raise PlanError(f"'batch' is not the first dimension of {whole!r}", remedy="move it first", code="E101")
        return text
    if not text.isdecimal() or not 0 < int(text) <= _MAX_DIM:
        raise PlanError(
            f"bad dimension {text!r} in {whole!r}", expected=f"'batch' or an integer in 1..{_MAX_DIM}", code="E101"
        )
    return int(text)
