"""The frame: fixed little-endian header, bounded msgpack control part, raw payload. Nothing executable.

```
offset  size  field
0       4     magic "CUTL"
4       1     protocol version
5       1     kind (1 data; others belong to the link, see docs/reference/protocol.md)
6       2     flags, 0
8       4     length of the control part, at most 65,536
12      8     length of the payload
20      8     sequence number on this link, from 1; 0: not numbered
28      8     run: first eight bytes of the SHA-256 of the run's name
36      ...   control part, then payload
```
The control part of a data frame is a msgpack array: session, mode, round, step, edge, lane, micro, direction, dtype,
shape, and order where the tensor does not lie in C order: its dimensions, from the one with the largest stride on, as
-1 - dim where there is a gap in memory between the steps of dim.
dtype is the position in `core.spec.DTYPES`; 255 means bytes, and shape is then [length].
"""

from __future__ import annotations

import struct
from math import prod
from typing import cast

import msgspec

from cutlayer.core.program import DIRECTIONS, MODES, Tag
from cutlayer.core.spec import DTYPES
from cutlayer.errors import WireError

__all__ = [
    "BYTES",
    "CONTROL_MAX",
    "HEADER",
    "KIND_DATA",
    "PAYLOAD_MAX",
    "VERSION",
    "Frame",
    "Header",
    "Label",
    "parse_control",
    "parse_header",
]

MAGIC = b"CUTL"
VERSION = 1
KIND_DATA = 1
CONTROL_MAX = 65_536
PAYLOAD_MAX = 2**40
BYTES = "bytes"
HEADER = struct.Struct("<4sBBHIQQQ")
_BYTES_CODE = 255
_NAMES = tuple(DTYPES)
_DTYPE_CODES = {**{name: code for code, name in enumerate(_NAMES)}, BYTES: _BYTES_CODE}
_MODE_CODES = {mode: code for code, mode in enumerate(MODES)}
_DIRECTION_CODES = {direction: code for code, direction in enumerate(DIRECTIONS)}
_DIMS_MAX = 16
_UINT = 2**63 - 1

Buffer = bytes | bytearray | memoryview


class _Control(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    session: int
    mode: int
    round: int
    step: int
    edge: int
    lane: int
    micro: int
    direction: int
    dtype: int
    shape: list[int]
    order: list[int] = []


_ENCODE = msgspec.msgpack.Encoder().encode
_DECODE = msgspec.msgpack.Decoder(_Control).decode


class Header(msgspec.Struct, frozen=True):
    """The fixed part of a frame, checked."""

    kind: int
    control_length: int
    payload_length: int
    sequence: int
    run: int

    def pack(self) -> bytes:
        """Return the 36 bytes."""
        return HEADER.pack(
            MAGIC, VERSION, self.kind, 0, self.control_length, self.payload_length, self.sequence, self.run
        )


class Frame(msgspec.Struct, frozen=True, dict=True):
    """A value on its way: where it belongs, what it looks like, and its bytes (little-endian).

    `dtype` is a name of `core.spec.DTYPES`, or "bytes" with shape (length,). `order`: the dimensions as they follow in
    memory, as `engine.tensors.memory_order` gives them; () for C order.
    """

    tag: Tag
    dtype: str
    shape: tuple[int, ...]
    payload: Buffer
    order: tuple[int, ...] = ()

    @property
    def control(self) -> bytes:
        """Return the encoded control part."""
        known = vars(self)
        if "control" not in known:
            tag = self.tag
            numbers = tag.round, tag.step, tag.edge, tag.lane, tag.micro
            codes = _DIRECTION_CODES[tag.direction], _DTYPE_CODES[self.dtype]
            fields: tuple[object, ...] = (tag.session, _MODE_CODES[tag.mode], *numbers, *codes, self.shape)
            if self.order:
                fields = *fields, self.order
            known["control"] = _ENCODE(fields)  # an array, as `_Control` reads it
        return cast("bytes", known["control"])

    def came_with(self, control: bytes) -> Frame:
        """Take note of the control part that came with this frame: it need not be written again to be counted."""
        vars(self)["control"] = control
        return self

    @property
    def nbytes(self) -> int:
        """Return the size of the payload."""
        return memoryview(self.payload).nbytes

    @property
    def framing(self) -> int:
        """Return the bytes of header and control part."""
        return HEADER.size + len(self.control)

    def copied(self) -> Frame:
        """Return the same frame with bytes of its own, which may be written to."""
        own = Frame(self.tag, self.dtype, self.shape, bytearray(self.payload), self.order)
        return own.came_with(self.control)

    def head(self, sequence: int, run: int) -> bytes:
        """Return header and control part, ready for a link."""
        return Header(KIND_DATA, len(self.control), self.nbytes, sequence, run).pack() + self.control


def parse_header(data: Buffer) -> Header:
    """Read the first 36 bytes of a frame. Raises `WireError`; allocates nothing."""
    if len(data) < HEADER.size:
        raise WireError(
            "a frame is cut short",
            expected=f"{HEADER.size} header bytes",
            got=str(len(data)),
            remedy="find out who sends to this port; install the same release of cutlayer at all parties",
            code="E501",
        )
    magic, version, kind, flags, control, payload, sequence, run = HEADER.unpack_from(data)
    if magic != MAGIC:
        raise WireError(
            "these bytes are no cutlayer frame",
            expected=repr(MAGIC),
            got=repr(magic),
            remedy="find out who sends to this port, and compare the addresses in the contract",
            code="E502",
        )
    if version != VERSION:
        raise WireError(
            "the frame has another protocol version",
            expected=str(VERSION),
            got=str(version),
            remedy="install the same release of cutlayer at all parties",
            code="E503",
        )
    if flags:
        raise WireError(
            "unknown flags in a frame",
            expected="0",
            got=str(flags),
            remedy="install the same release of cutlayer at all parties",
            code="E504",
        )
    if control > CONTROL_MAX or payload > PAYLOAD_MAX:
        raise WireError(
            "a frame announces too much",
            expected=f"at most {CONTROL_MAX} control and {PAYLOAD_MAX} payload bytes",
            got=f"{control} and {payload}",
            remedy="install the same release of cutlayer at all parties",
            code="E505",
        )
    return Header(kind, control, payload, sequence, run)


Label = tuple[Tag, str, tuple[int, ...], tuple[int, ...]]


def parse_control(data: Buffer, payload_length: int) -> Label:
    """Read the control part of a data frame: tag, dtype, shape and order.

    Raises:
        WireError: it is no such part, or dtype and shape do not give `payload_length` bytes.
    """
    try:
        control = _DECODE(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise WireError(
            "the control part of a frame cannot be read",
            got=str(error)[:200],
            remedy="install the same release of cutlayer at all parties",
            code="E506",
        ) from None
    _check_range(control)
    shape = tuple(control.shape)
    dtype = BYTES if control.dtype == _BYTES_CODE else _NAMES[control.dtype]
    size = prod(shape) * (1 if dtype == BYTES else DTYPES[dtype])
    if size != payload_length or (dtype == BYTES and len(shape) != 1):
        raise WireError(
            "dtype and shape do not give the announced size",
            expected=f"{payload_length} bytes",
            got=f"{dtype}{list(shape)}",
            remedy="install the same release of cutlayer at all parties",
            code="E508",
        )
    tag = Tag(
        control.session,
        MODES[control.mode],
        control.round,
        control.step,
        control.edge,
        control.lane,
        control.micro,
        DIRECTIONS[control.direction],
    )
    return tag, dtype, shape, tuple(control.order)


def _check_range(control: _Control) -> None:
    """Raise `WireError` E507 for numbers that no frame can have."""
    shape, wrong, expected, got = control.shape, "", "", ""
    numbers = (control.session, control.round, control.step, control.edge, control.lane, control.micro, *shape)
    if min(numbers) < 0 or max(numbers) > _UINT or len(shape) > _DIMS_MAX:
        wrong, expected = "a number in the control part is out of range", "0 to 2^63 - 1"
    elif not (0 <= control.mode < len(MODES) and 0 <= control.direction < len(DIRECTIONS)):
        wrong = "unknown mode or direction in a frame"
    elif control.dtype != _BYTES_CODE and not 0 <= control.dtype < len(_NAMES):
        wrong, got = "unknown dtype code in a frame", str(control.dtype)
    elif control.order and sorted(max(dim, ~dim) for dim in control.order) != list(range(len(shape))):
        wrong, expected = "the order in a frame does not name each dimension once", f"0 to {len(shape) - 1}"
        got = str(control.order)[:200]
    if wrong:
        remedy = "install the same release of cutlayer at all parties"
        raise WireError(wrong, expected=expected, got=got, remedy=remedy, code="E507")
