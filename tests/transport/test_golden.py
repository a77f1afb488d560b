"""Golden frames: the bytes of protocol version 2. A change here is a change of the protocol.

`python -m tests.transport.test_golden` writes files that are missing; it never changes one that is there.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from cutlayer.core.program import Tag
from cutlayer.engine.wire import HEADER, KIND_DATA, Frame, Header
from cutlayer.transport import control
from cutlayer.transport.frames import Arrival, Assembler, messages, run_number

FOLDER = Path(__file__).with_name("golden")
PAGE = Path(__file__).parents[2] / "docs" / "reference" / "protocol.md"
RUN = "golden"
NUMBER = run_number(RUN)
DIGEST = "00112233445566778899aabbccddeeff" * 2
FRAMES: dict[str, tuple[int, Frame]] = {
    "data-float32": (1, Frame(Tag(1, "train", 0, 3, 2, 0, 1, "up"), "float32", (2, 3), bytes(range(24)))),
    "data-transposed": (
        4,
        Frame(Tag(1, "train", 0, 3, 2, 0, 1, "down"), "float32", (2, 3, 1, 1), bytes(range(24)), (0, 2, 3, 1)),
    ),
    "data-scalar": (2, Frame(Tag(1, "evaluate", 4, 0, 0, 1, 0, "down"), "float64", (), bytes(8))),
    "data-empty": (3, Frame(Tag(1, "predict", 0, 0, 0, 0, 0, "up"), "int64", (0, 5), b"")),
    "data-bytes": (2**40, Frame(Tag(9, "finish", 0, 0, 3, 0, 1, "exchange"), "bytes", (5,), b"hello")),
    "data-credit": (5, Frame(Tag(1, "train", 2**33, 7, 0, 0, 0, "credit"), "bytes", (0,), b"")),
    "data-two-messages": (
        6,
        Frame(Tag(1, "start", 0, 0, 0, 0, 0, "exchange"), "uint8", (2**20 + 3,), b"\xa5" * 2**20 + b"\x01\x02\x03"),
    ),
}
SAID: dict[str, tuple[int, control.Message, bytes]] = {
    "link-hello": (0, control.LinkHello(2, "0.1.0", "hospital-a", DIGEST, RUN, 81985529216486895, 0, 1), b""),
    "link-hello-again": (0, control.LinkHello(2, "0.1.0", "hospital-a", DIGEST, RUN, 81985529216486895, 77, 42), b""),
    "ack": (0, control.Ack(300), b""),
    "heartbeat": (0, control.Heartbeat(), b""),
    "leave": (0, control.Leave(), b""),
    "relay-sealed": (7, control.Relay(1, "hospital-a", "hospital-b", True, 12), bytes(range(40))),
    "relay-plain": (8, control.Relay(1, "hospital-a", "hospital-b", False, 0), b"one message of a stream"),
    "seal-offer": (9, control.SealOffer(1, "hospital-a", "hospital-b"), b"an offer"),
    "ready": (1, control.Ready(0, {"train": 120, "evaluate": 30}, (0, 5, 10)), b""),
    "start": (1, control.Start(2, {"train": {"hospital-a": 120}}, -1, {"hospital-a": 7, "server": 8}), b""),
    "reset": (3, control.Reset(2, "hospital-a"), b""),
    "notice-lost": (4, control.Notice("lost", ("hospital-a",)), b""),
    "notice-waiting": (5, control.Notice("waiting", ("hospital-a", "hospital-b")), b""),
    "notice-resting": (11, control.Notice("resting", ("hospital-a",)), b""),
    "abort": (6, control.Abort("hospital-a", "E351", "a tensor holds a NaN", "lower the learning rate"), b""),
    "abort-refusal": (0, control.Abort("server", "E642", "two parties have different plans", "compare them"), b""),
    "bye": (10, control.Bye(2), b""),
}


def stream(name: str) -> list[bytes]:
    """The messages of a golden frame, made anew."""
    if name in FRAMES:
        sequence, frame = FRAMES[name]
        kind, part, payload = KIND_DATA, frame.control, bytes(frame.payload)
    else:
        sequence, message, payload = SAID[name]
        kind, part = control.kind_of(message), control.encode(message)
    return list(messages(Header(kind, len(part), len(payload), sequence, NUMBER), part, payload))


def text_of(pieces: list[bytes]) -> str:
    """One line a message; long runs of one byte are written as `xx*count`."""
    return "\n".join(short(piece) for piece in pieces) + "\n"


def short(piece: bytes) -> str:
    parts, start = [], 0
    while start < len(piece):
        end = start
        while end < len(piece) and piece[end] == piece[start]:
            end += 1
        run = end - start
        parts.append(f" {piece[start : start + 1].hex()}*{run} " if run > 64 else piece[start:end].hex())
        start = end
    return "".join(parts).strip()


def read(path: Path) -> list[bytes]:
    pieces = []
    for line in path.read_text().splitlines():
        piece = b""
        for word in line.split():
            digits, _, count = word.partition("*")
            piece += bytes.fromhex(digits) * int(count or 1)
        pieces.append(piece)
    return pieces


@pytest.mark.parametrize("name", [*FRAMES, *SAID])
def test_golden_frames_are_written_bit_for_bit(name: str):
    assert stream(name) == read(FOLDER / f"{name}.hex")


@pytest.mark.parametrize("name", [*FRAMES, *SAID])
def test_golden_frames_are_read_and_written_again_bit_for_bit(name: str):
    pieces = read(FOLDER / f"{name}.hex")
    assembler = Assembler(NUMBER, lambda head: True)
    arrivals = [arrival for piece in pieces for arrival in assembler.feed(piece)]
    [arrival] = arrivals
    assert isinstance(arrival, Arrival)
    if name in FRAMES:
        part, (sequence, frame) = arrival.frame.control, FRAMES[name]
        assert replace(arrival.frame, payload=bytes(arrival.payload)) == frame
    else:
        sequence, message, payload = SAID[name]
        assert control.decode(arrival.header.kind, arrival.control) == message
        assert bytes(arrival.payload) == payload
        part = control.encode(control.decode(arrival.header.kind, arrival.control))
    assert arrival.header.sequence == sequence
    assert list(messages(arrival.header, part, arrival.payload)) == pieces


def test_golden_frames_are_what_the_reference_says():
    """Read without the package's own readers, as another language would."""
    head = read(FOLDER / "data-float32.hex")[0]
    assert head[:4] == b"CUTL"
    assert head[4:8] == bytes([1, 1, 0, 0])  # version, kind, flags
    length, payload = int.from_bytes(head[8:12], "little"), int.from_bytes(head[12:20], "little")
    assert (length, payload) == (len(head) - 36 - 24, 24)
    assert int.from_bytes(head[20:28], "little") == 1
    assert msgspec.msgpack.decode(head[36:-24]) == [1, 1, 0, 3, 2, 0, 1, 0, 0, [2, 3]]
    turned = read(FOLDER / "data-transposed.hex")[0]
    assert msgspec.msgpack.decode(turned[36:-24]) == [1, 1, 0, 3, 2, 0, 1, 1, 0, [2, 3, 1, 1], [0, 2, 3, 1]]
    ack = read(FOLDER / "ack.hex")[0]
    assert msgspec.msgpack.decode(ack[36:]) == [3, 300]
    assert ack[5] == 3
    hello = read(FOLDER / "link-hello.hex")[0]
    assert msgspec.msgpack.decode(hello[36:])[:2] == [2, control.PROTOCOL]
    assert f"`protocol` is {control.PROTOCOL};" in PAGE.read_text()
    assert HEADER.size == 36


def test_every_kind_has_a_golden_frame_and_every_file_is_used():
    assert {control.kind_of(message) for _, message, _ in SAID.values()} == set(control.KINDS)
    assert {path.stem for path in FOLDER.glob("*.hex")} == {*FRAMES, *SAID}


def write_missing() -> None:
    for name in (*FRAMES, *SAID):
        path = FOLDER / f"{name}.hex"
        if not path.exists():
            path.write_text(text_of(stream(name)))


if __name__ == "__main__":
    write_missing()
