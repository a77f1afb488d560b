"""A recording proxy between two parties, and a reader of what it recorded that shares no code with the transport."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from hyperframe.frame import DataFrame, Frame

from tests.run import msgpack_reader

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEAD = struct.Struct("<4sBBHIQQQ")
MODES = ("start", "train", "evaluate", "predict", "finish")
DIRECTIONS = ("up", "down", "exchange", "credit")


@dataclass
class Tap:
    """Forwards connections to `target` and keeps every byte, by direction ("out": towards the target)."""

    target: tuple[str, int]
    recorded: dict[str, list[bytearray]] = field(default_factory=lambda: {"out": [], "back": []})

    def __enter__(self) -> Tap:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._ends: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(10)
        for end in self._ends:
            end.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(self.target, timeout=10)
            except OSError:
                near.close()
                continue
            self._ends += [near, far]
            far.settimeout(None)
            for source, sink, way in ((near, far, "out"), (far, near, "back")):
                kept = bytearray()
                self.recorded[way].append(kept)
                thread = threading.Thread(target=_pump, args=(source, sink, kept), daemon=True)
                thread.start()
                self._threads.append(thread)


def _pump(source: socket.socket, sink: socket.socket, kept: bytearray) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            kept += data
            sink.sendall(data)
    for end in (source, sink):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def grpc_messages(stream: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (HTTP/2 stream, gRPC message) from one direction of a connection."""
    place = len(PREFACE) if stream.startswith(PREFACE) else 0
    waiting: dict[int, bytearray] = defaultdict(bytearray)
    while place + 9 <= len(stream):
        frame, length = Frame.parse_frame_header(memoryview(stream[place : place + 9]))
        body = memoryview(stream[place + 9 : place + 9 + length])
        place += 9 + length
        if not isinstance(frame, DataFrame):
            continue
        frame.parse_body(body)
        buffer = waiting[frame.stream_id]
        buffer += frame.data
        while len(buffer) >= 5:
            size = int.from_bytes(buffer[1:5], "big")
            if len(buffer) < 5 + size:
                break
            yield frame.stream_id, bytes(buffer[5 : 5 + size])
            del buffer[: 5 + size]


def data_frames(stream: bytes) -> tuple[Counter[tuple[str, str, int, str]], bytes]:
    """Return payload, framing and messages by (mode, direction, edge, part), and all payload bytes of data frames."""
    counts: Counter[tuple[str, str, int, str]] = Counter()
    payloads, missing = bytearray(), defaultdict(int)
    for number, message in grpc_messages(stream):
        rest = message
        if missing[number]:
            payloads += rest
            missing[number] -= len(rest)
            continue
        while rest:  # small frames come together
            _magic, _version, kind, _flags, control, payload, _sequence, _run = HEAD.unpack_from(rest)
            part, rest = rest[HEAD.size : HEAD.size + control], rest[HEAD.size + control :]
            piece, rest = rest[:payload], rest[payload:]
            missing[number] = payload - len(piece)
            if kind != 1:
                continue
            payloads += piece
            tag = msgpack_reader.array(part)
            key = (MODES[tag[1]], DIRECTIONS[tag[7]], tag[4])
            counts[*key, "payload"] += payload
            counts[*key, "framing"] += HEAD.size + control
            counts[*key, "messages"] += 1
    return counts, bytes(payloads)
