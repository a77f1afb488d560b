"""Frames and messages of a stream: exact round trips, one buffer, and no harm from hostile bytes."""

from __future__ import annotations

import random
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from cutlayer.core.program import Tag
from cutlayer.engine.wire import CONTROL_MAX, HEADER, KIND_DATA, Frame, Header
from cutlayer.errors import ContractError, CutlayerError, WireError
from cutlayer.transport import control
from cutlayer.transport.frames import LIMITS, MESSAGE_MAX, PIECE, RELAY_PIECE, Arrival, Assembler, messages, run_number
from cutlayer.transport.seal import OFFER_LIMIT, OVERHEAD

RUN = run_number("test")
SMALL = 16  # a piece that makes tests quick
TAG = Tag(1, "train", 0, 3, 2, 0, 1, "up")


def packed(frame: Frame, sequence: int = 1, piece: int = PIECE) -> list[bytes]:
    header = Header(KIND_DATA, len(frame.control), frame.nbytes, sequence, RUN)
    return list(messages(header, frame.control, frame.payload, piece=piece))


def told(message: control.Message, sequence: int, payload: bytes = b"") -> list[bytes]:
    part = control.encode(message)
    return list(messages(Header(control.kind_of(message), len(part), len(payload), sequence, RUN), part, payload))


def yes(head: Arrival) -> bool:
    return True


def feed(assembler: Assembler, pieces: list[bytes]) -> list[Arrival]:
    return [arrival for piece in pieces for arrival in assembler.feed(piece)]


@given(st.lists(st.integers(0, 5 * SMALL), max_size=8), st.integers(0, 2**32))
def test_frames_come_out_as_they_went_in(sizes: list[int], seed: int):
    data = random.Random(seed)
    frames = [Frame(replace(TAG, step=step), "uint8", (size,), data.randbytes(size)) for step, size in enumerate(sizes)]
    pieces = [piece for number, frame in enumerate(frames) for piece in packed(frame, number + 1, SMALL)]
    arrivals = feed(Assembler(RUN, yes, piece=SMALL), pieces)
    assert len(arrivals) == len(frames)
    for number, (arrival, frame) in enumerate(zip(arrivals, frames, strict=True)):
        assert arrival.header.sequence == number + 1
        assert arrival.frame.tag == frame.tag
        assert (arrival.frame.dtype, arrival.frame.shape) == (frame.dtype, frame.shape)
        assert bytes(arrival.payload) == frame.payload
        assert not arrival.payload.readonly


def test_frames_in_one_message_come_out_one_after_the_other():
    """Whole frames, and the first piece of a longer one: each is judged only when the one before has been taken."""
    sizes, asked = (0, 3, SMALL, 2 * SMALL + 1), list[int]()
    frames = [Frame(replace(TAG, step=step), "uint8", (size,), bytes([step]) * size) for step, size in enumerate(sizes)]
    pieces = [packed(frame, number + 1, SMALL) for number, frame in enumerate(frames)]

    def judge(head: Arrival) -> bool:
        asked.append(head.header.sequence)
        return True

    assembler = Assembler(RUN, judge, piece=SMALL)
    taken = list[Arrival]()
    for message in [b"".join(first for first, *_ in pieces), *pieces[-1][1:]]:
        for arrival in assembler.feed(message):
            taken.append(arrival)
            assert asked == [one.header.sequence for one in taken]
    assert [(one.header.sequence, bytes(one.payload)) for one in taken] == [
        (number + 1, frame.payload) for number, frame in enumerate(frames)
    ]


def test_a_frame_that_is_put_off_is_left_with_all_that_follows():
    answers: list[bool | None] = [True, None]
    assembler = Assembler(RUN, lambda head: answers.pop(0), piece=SMALL)
    messages = [packed(Frame(replace(TAG, step=step), "uint8", (3,), b"abc"), step + 1, SMALL)[0] for step in range(3)]
    arrivals = list(assembler.feed(b"".join(messages)))
    assert [one.header.sequence for one in arrivals] == [1]
    assert assembler.left == b"".join(messages[1:])
    answers += [True, False]
    left = assembler.left
    assert [(one.header.sequence, one.skipped) for one in assembler.feed(left)] == [(2, False), (3, True)]
    assert assembler.left == b""


def test_messages_have_the_promised_sizes():
    payload = np.zeros(3 * PIECE + 5, np.uint8)
    frame = Frame(TAG, "uint8", payload.shape, payload.data)
    pieces = packed(frame)
    assert [len(piece) for piece in pieces] == [frame.framing + PIECE, PIECE, PIECE, 5]
    assert frame.framing + CONTROL_MAX + PIECE < MESSAGE_MAX
    # a relayed message, with header, control part and seal, is one piece
    assert HEADER.size + CONTROL_MAX + RELAY_PIECE + OVERHEAD <= PIECE == LIMITS[control.RELAY, True]
    assert LIMITS[control.SEAL_OFFER, True] == OFFER_LIMIT


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (4, 5)])
def test_any_shape_of_payload_is_sent_as_its_bytes(shape: tuple[int, ...]):
    values = np.arange(int(np.prod(shape)), dtype=np.float32).reshape(shape)
    payload = memoryview(values) if values.size else memoryview(b"")
    [arrival] = feed(Assembler(RUN, yes), packed(Frame(TAG, "float32", shape, payload)))
    assert bytes(arrival.payload) == values.tobytes()
    assert arrival.frame.shape == shape


def test_a_frame_that_is_not_wanted_costs_no_memory():
    size = 64 * 2**20
    head = packed(Frame(TAG, "uint8", (size,), np.zeros(size, np.uint8).data))
    tracemalloc.start()
    assembler = Assembler(RUN, lambda head: False)
    arrivals = feed(assembler, head)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000
    assert [(arrival.skipped, arrival.payload.nbytes) for arrival in arrivals] == [(True, 0)]


SAID = {
    "E501": {"a frame is cut short"},
    "E502": {"these bytes are no cutlayer frame"},
    "E506": {"the control part of a frame cannot be read"},
    "E512": {"a frame's control part is cut short", "a message does not have the announced size"},
    "E513": {"a frame of a kind that may not be here", "a message carries too much"},
    "E514": {"a frame of another run"},
}


def test_a_refused_frame_costs_no_memory():
    def refuse(head: Arrival) -> bool:
        assert head.label == (TAG, "uint8", (2**38,), ())
        assert head.payload.nbytes == 0
        raise ContractError("no", code="E521")

    part = Frame(TAG, "uint8", (2**38,), b"").control
    message = Header(KIND_DATA, len(part), 2**38, 1, RUN).pack() + part
    tracemalloc.start()
    with pytest.raises(ContractError):
        list(Assembler(RUN, refuse).feed(message))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000


def test_a_tensor_is_received_in_one_buffer():
    size = 32 * 2**20
    payload = np.ones(size, np.uint8)
    header = Header(KIND_DATA, len(Frame(TAG, "uint8", (size,), b"").control), size, 1, RUN)
    assembler = Assembler(RUN, yes)
    tracemalloc.start()
    for piece in messages(header, Frame(TAG, "uint8", (size,), b"").control, payload.data):
        arrivals = list(assembler.feed(piece))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    [arrival] = arrivals
    assert np.array_equal(np.frombuffer(arrival.payload, np.uint8), payload)
    assert peak < size + 4 * PIECE


@pytest.mark.provokes(by="code")
@pytest.mark.parametrize(
    ("message", "code"),
    [
        (b"", "E501"),
        (b"X" * 36, "E502"),
        (Header(KIND_DATA, 0, 0, 1, RUN + 1).pack(), "E514"),
        (Header(KIND_DATA, 10, 0, 1, RUN).pack(), "E512"),
        (Header(0, 0, 0, 1, RUN).pack(), "E513"),
        (Header(14, 0, 0, 1, RUN).pack(), "E513"),
        (Header(KIND_DATA, 0, 0, 0, RUN).pack(), "E513"),
        (Header(KIND_DATA, 0, 0, 2**63, RUN).pack(), "E513"),
        (Header(control.ACK, 0, 0, 1, RUN).pack(), "E513"),
        (Header(control.READY, 0, 0, 0, RUN).pack(), "E513"),
        (Header(control.READY, 0, 1, 1, RUN).pack(), "E513"),
        (Header(control.RELAY, 0, PIECE + 1, 1, RUN).pack(), "E513"),
        (Header(control.SEAL_OFFER, 0, OFFER_LIMIT + 1, 1, RUN).pack(), "E513"),
        (Header(KIND_DATA, 0, 0, 1, RUN).pack(), "E506"),
        (packed(Frame(TAG, "uint8", (3,), b"abc"))[0][:-1], "E512"),
        (packed(Frame(TAG, "uint8", (3,), b"abc"))[0] + b"x", "E501"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_with_a_first_message_is_named(message: bytes, code: str):
    with pytest.raises(WireError) as caught:
        list(Assembler(RUN, yes).feed(message))
    assert caught.value.code == code
    assert caught.value.what in SAID[code]
    assert caught.value.remedy


@pytest.mark.provokes("E512")
@pytest.mark.parametrize("second", [b"", b"x" * (SMALL - 1), b"x" * (SMALL + 1)], ids=len)
def test_a_piece_of_another_size_is_refused(second: bytes):
    assembler = Assembler(RUN, yes, piece=SMALL)
    assert not list(assembler.feed(packed(Frame(TAG, "uint8", (40,), bytes(40)), 1, SMALL)[0]))
    with pytest.raises(WireError, match=r"does not have the announced size.*expected 16 bytes of payload") as caught:
        list(assembler.feed(second))
    assert caught.value.code == "E512"


# --- hostile bytes -----------------------------------------------------------------------------------------------


def seeds() -> list[list[bytes]]:
    """Good streams of all kinds, to be spoilt."""
    frames = [Frame(TAG, "float32", (2, 3), bytes(24)), Frame(TAG, "uint8", (50,), bytes(50))]
    parties = {"a": 1, "b": 2}
    said = [
        told(control.LinkHello(1, "0.1", "a", "f" * 64, "test", 7, 0, 1), 0),
        told(control.Ack(5), 0),
        told(control.Relay(1, "a", "b", True, 0), 1, bytes(40)),
        told(control.SealOffer(1, "a", "b"), 1, bytes(40)),
        told(control.Ready(0, {"train": 9}, (1, 2)), 1),
        told(control.Start(1, {"train": parties}, 2, parties), 1),
        told(control.Notice("lost", ("a",)), 1),
        told(control.Abort("a", "E351", "what", "do"), 1),
        told(control.Bye(1), 1),
    ]
    return [packed(frame, number + 1, SMALL) for number, frame in enumerate(frames)] + said


def spoil(dice: random.Random, stream: list[bytes]) -> list[bytes]:
    """Change a stream as somebody would who knows the format."""
    stream = [bytearray(piece) for piece in stream]
    first = stream[0]
    how = dice.randrange(9)
    if how == 0:  # any field of the header
        start, size = dice.choice([(0, 4), (4, 1), (5, 1), (6, 2), (8, 4), (12, 8), (20, 8), (28, 8)])
        edge = dice.choice([0, 1, 2**31 - 1, 2**31, 2**40, 2**63 - 1, 2**63, 2**64 - 1, dice.getrandbits(64)])
        first[start : start + size] = (edge % 2 ** (8 * size)).to_bytes(size, "little")
    elif how == 1:  # any bits
        for _ in range(dice.randrange(1, 6)):
            piece = dice.choice(stream)
            if piece:
                piece[dice.randrange(len(piece))] ^= 1 << dice.randrange(8)
    elif how == 2:  # cut short, or longer
        piece = dice.choice(stream)
        if dice.random() < 0.5:
            del piece[dice.randrange(len(piece) + 1) :]
        else:
            piece += dice.randbytes(dice.randrange(1, 40))
    elif how == 3:  # the control part, by a wrong length that fits
        length = int.from_bytes(first[8:12], "little") + dice.randrange(-3, 4)
        first[8:12] = (length % 2**32).to_bytes(4, "little")
    elif how == 4:  # the control part alone
        if len(first) > HEADER.size:
            for _ in range(dice.randrange(1, 4)):
                first[dice.randrange(HEADER.size, len(first))] = dice.randrange(256)
    elif how == 5:  # order, repetition, omission
        dice.shuffle(stream)
        stream = stream[: dice.randrange(len(stream) + 1)] + stream
    elif how == 6:  # nonsense
        stream = [bytearray(dice.randbytes(dice.randrange(200))) for _ in range(3)]
    elif how == 7:  # nonsense behind a good header
        del first[HEADER.size :]
        first += dice.randbytes(dice.randrange(200))
    else:  # a huge or odd shape with a payload length to match
        dims = [dice.choice([0, 1, 3, 2**31, 2**33, 2**62, -1]) for _ in range(dice.randrange(20))]
        frame = Frame(TAG, dice.choice(["uint8", "float64"]), tuple(dims), b"")
        part = frame.control
        first[:] = Header(KIND_DATA, len(part), dice.choice([0, 8, 2**34, 2**39]), 1, RUN).pack() + part
    return [bytes(piece) for piece in stream]


class Guard:
    """Takes small tensors only, as an admission would."""

    def __init__(self) -> None:
        self.taken = 0

    def __call__(self, head: Arrival) -> bool:
        if head.header.payload_length > 4096:
            raise ContractError("too large", code="E522")
        if head.label is None:
            control.decode(head.header.kind, head.control)
        self.taken += 1
        return head.header.sequence != 2


def test_spoilt_streams_are_refused_with_typed_errors_and_little_memory():
    dice, guard, good = random.Random(20), Guard(), seeds()
    refused: dict[str, int] = {}
    tracemalloc.start()
    for _ in range(10_000):
        assembler = Assembler(RUN, guard, piece=SMALL)
        try:
            for _ in range(dice.randrange(1, 3)):
                feed(assembler, spoil(dice, dice.choice(good)))
        except (WireError, ContractError) as error:
            refused[error.code] = refused.get(error.code, 0) + 1
        except CutlayerError as error:
            raise AssertionError(type(error)) from error
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * 2**20
    assert guard.taken > 1000  # some get far enough to matter
    codes = {"E501", "E502", "E503", "E504", "E505", "E506", "E507", "E508", "E509", "E512", "E513", "E514", "E522"}
    assert codes <= set(refused), codes - set(refused)
    assert sum(refused.values()) > 6000
