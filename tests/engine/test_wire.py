"""Frames: what is written is read again, and hostile bytes are refused with `WireError` and nothing else."""

from __future__ import annotations

import math
import random
import struct
from itertools import permutations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cutlayer.core.program import DIRECTIONS, MODES, Tag
from cutlayer.core.spec import DTYPES
from cutlayer.engine.wire import BYTES, CONTROL_MAX, HEADER, Frame, Header, parse_control, parse_header
from cutlayer.errors import WireError

NUMBERS = st.integers(0, 2**63 - 1) | st.integers(0, 300)
TAGS = st.builds(
    Tag, NUMBERS, st.sampled_from(MODES), NUMBERS, NUMBERS, NUMBERS, NUMBERS, NUMBERS, st.sampled_from(DIRECTIONS)
)
SHAPES = st.lists(st.integers(0, 5), max_size=6).map(tuple)
TAG = Tag(1, "train", 2, 3, 4, 5, 6, "up")


@st.composite
def frames(draw: st.DrawFn) -> Frame:
    """Of any dtype, shape and order: 0-d and empty ones too; or of bytes."""
    tag, dtype, shape = draw(TAGS), draw(st.sampled_from([*DTYPES, BYTES])), draw(SHAPES)
    if dtype == BYTES:
        shape = (draw(st.integers(0, 50)),)
    size = math.prod(shape) * DTYPES.get(dtype, 1)
    kind = draw(st.sampled_from([bytes, bytearray, lambda data: memoryview(bytes(data))]))
    order = tuple(draw(st.permutations(range(len(shape))))) if draw(st.booleans()) else ()
    order = tuple(~dim if draw(st.booleans()) else dim for dim in order)
    return Frame(tag, dtype, shape, kind(bytes(size)), order)


@given(frames(), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.sampled_from([bytes, bytearray, memoryview]))
def test_a_frame_is_read_as_it_was_written(frame, sequence, run, kind):
    head = frame.head(sequence, run)
    assert len(head) == frame.framing
    assert frame.nbytes == len(bytes(frame.payload))
    header = parse_header(kind(head))
    assert (header.kind, header.sequence, header.run) == (1, sequence, run)
    assert (header.control_length, header.payload_length) == (len(head) - HEADER.size, frame.nbytes)
    control = kind(head[HEADER.size :])
    assert parse_control(control, header.payload_length) == (frame.tag, frame.dtype, frame.shape, frame.order)


def test_the_bytes_of_a_frame_never_change():
    """A test vector for other implementations of the protocol."""
    frame = Frame(TAG, "int32", (2, 1), b"\x01\x00\x00\x00\xff\xff\xff\xff")
    assert frame.head(7, 8).hex() == (
        "4355544c"  # magic
        "01"  # version
        "01"  # kind
        "0000"  # flags
        "0d000000"  # length of the control part
        "0800000000000000"  # length of the payload
        "0700000000000000"  # sequence
        "0800000000000000"  # run
        "9a" + "01" + "01" + "02" + "03" + "04" + "05" + "06" + "00" + "05" + "920201"
    )
    assert Frame(TAG, BYTES, (3,), b"abc").control.hex() == "9a0101020304050600ccff9103"
    turned = Frame(TAG, "int32", (2, 1, 3), bytes(24), (0, 2, 1))
    assert turned.control.hex() == "9b" + "0101020304050600" + "05" + "93020103" + "93000201"


@pytest.mark.provokes(by="code")
@pytest.mark.parametrize(
    ("code", "data", "words"),
    [
        ("E501", HEADER.pack(b"CUTL", 1, 1, 0, 0, 0, 0, 0)[:-1], "cut short.*expected 36 header bytes, got 35"),
        ("E502", HEADER.pack(b"HTTP", 1, 1, 0, 0, 0, 0, 0), "no cutlayer frame.*got b'HTTP'"),
        ("E503", HEADER.pack(b"CUTL", 2, 1, 0, 0, 0, 0, 0), "another protocol version.*expected 1, got 2"),
        ("E504", HEADER.pack(b"CUTL", 1, 1, 1, 0, 0, 0, 0), "unknown flags.*got 1"),
        ("E505", HEADER.pack(b"CUTL", 1, 1, 0, CONTROL_MAX + 1, 0, 0, 0), "announces too much.*got 65537 and 0"),
        ("E505", HEADER.pack(b"CUTL", 1, 1, 0, 0, 2**41, 0, 0), "announces too much.*got 0 and 2199023255552"),
    ],
    ids=range(6),
)
def test_a_bad_header_is_refused(code, data, words):
    with pytest.raises(WireError, match=words) as caught:
        parse_header(data)
    assert caught.value.code == code


def test_the_largest_header_is_not():
    assert Header(1, CONTROL_MAX, 2**40, 2**64 - 1, 2**64 - 1) == parse_header(
        Header(1, CONTROL_MAX, 2**40, 2**64 - 1, 2**64 - 1).pack()
    )


GOOD = [1, 1, 2, 3, 4, 5, 6, 0, 5, [2, 1]]


def with_item(place: int, value: object) -> list[object]:
    return [*GOOD[:place], value, *GOOD[place + 1 :]]


@pytest.mark.provokes(by="code")
@pytest.mark.parametrize(
    ("control", "code"),
    [
        (GOOD[:-1], "E506"),
        ([*GOOD, 1], "E506"),
        ({"session": 1}, "E506"),
        (None, "E506"),
        *((with_item(place, value), "E506") for place in range(9) for value in (None, "1", [1], 1.5, b"1", True)),
        *((with_item(place, -1), "E507") for place in range(9)),
        *((with_item(place, 2**63), "E507") for place in (0, 2, 3, 4, 5, 6)),
        (with_item(1, len(MODES)), "E507"),
        (with_item(7, len(DIRECTIONS)), "E507"),
        (with_item(8, len(DTYPES)), "E507"),
        (with_item(8, 254), "E507"),
        (with_item(8, 256), "E507"),
        (with_item(9, 8), "E506"),
        (with_item(9, [2, [1]]), "E506"),
        (with_item(9, [-2, -1]), "E507"),
        (with_item(9, [2**63, 1]), "E507"),
        (with_item(9, [1] * 16 + [2]), "E507"),
        (with_item(9, [2, 2]), "E508"),
        (with_item(9, [2**62] * 16), "E508"),
        (with_item(9, []), "E508"),
        (with_item(9, [0]), "E508"),
        ([*GOOD, [0, 0]], "E507"),
        ([*GOOD, [0]], "E507"),
        ([*GOOD, [2, 1]], "E507"),
        ([*GOOD, [0, 1, 2]], "E507"),
        ([*GOOD, [0, -1]], "E507"),
        ([*GOOD, [1, 0], 0], "E506"),
        ([1, 1, 2, 3, 4, 5, 6, 0, 255, [4, 2]], "E508"),
        ([1, 1, 2, 3, 4, 5, 6, 0, 255, []], "E508"),
    ],
)
def test_a_bad_control_part_is_refused(control, code):
    with pytest.raises(
        WireError, match=r"control part|unknown|does not name each dimension|do not give the announced size"
    ) as caught:
        parse_control(msgspec.msgpack.encode(control), 8)
    assert caught.value.code == code
    parse_control(msgspec.msgpack.encode(GOOD), 8)


def test_trailing_bytes_are_refused():
    with pytest.raises(WireError):
        parse_control(msgspec.msgpack.encode(GOOD) + b"\x00", 8)


def mutated(data: bytes, dice: random.Random) -> bytes:
    found = bytearray(data)
    for _ in range(dice.randint(1, 4)):
        place = dice.randrange(len(found) + 1)
        change = dice.randrange(4)
        if change == 0 and found:
            found[place % len(found)] ^= 1 << dice.randrange(8)
        elif change == 1 and found:
            found[place % len(found)] = dice.choice(
                [0, 0x7F, 0x80, 0x90, 0xC1, 0xC7, 0xD4, 0xDC, 0xDD, 0xDE, 0xDF, 0xFF]
            )
        elif change == 2:
            found[place:place] = dice.randbytes(dice.randint(1, 9))
        else:
            del found[place : place + dice.randint(1, 9)]
    return bytes(found)


def test_ten_thousand_mutated_frames_raise_nothing_but_wire_errors():
    """What is still read is in range, and is written as what it was read as."""
    dice = random.Random(20240)
    refused = 0
    frames = Frame(TAG, "float32", (2, 3), bytes(24)), Frame(TAG, "float32", (2, 3), bytes(24), (1, 0))
    for number in range(10_000):
        frame = frames[number % 2]
        try:
            parse_header(mutated(frame.head(1, 2), dice))
            tag, dtype, shape, order = parse_control(mutated(frame.control, dice), 24)
        except WireError:
            refused += 1
            continue
        assert math.prod(shape) * DTYPES.get(dtype, 1) == 24
        numbers = (tag.session, tag.round, tag.step, tag.edge, tag.lane, tag.micro, *shape)
        assert all(0 <= number < 2**63 for number in numbers)
        assert tuple(max(dim, ~dim) for dim in order) in ((), *permutations(range(len(shape))))
        again = parse_control(Frame(tag, dtype, shape, bytes(24), order).control, 24)
        assert again == (tag, dtype, shape, order)
    assert 5_000 < refused < 10_000


@given(st.binary(max_size=60), st.integers(0, 2**40))
def test_random_bytes_raise_nothing_but_wire_errors(data, length):
    for parse in (parse_header, lambda data: parse_control(data, length)):
        try:
            parse(data)
        except WireError as error:
            assert error.code.startswith("E50")  # noqa: PT017 - both ways must be possible


def test_a_deep_control_part_is_refused():
    for data in (b"\x91" * 60_000, struct.pack(">BI", 0xDD, 2**32 - 1), struct.pack(">BI", 0xDF, 2**32 - 1)):
        with pytest.raises(WireError):
            parse_control(data, 8)
