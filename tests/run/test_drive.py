"""Frames that a program sends one after the other are handed to the link together, and none is kept back."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from cutlayer.core.program import Load, Send, Step, Tag
from cutlayer.engine.ledger import Ledger
from cutlayer.engine.party import Do, Effect, EndStep, Post, Take
from cutlayer.engine.wire import Frame
from cutlayer.run.drive import drive

LARGE = 2**18 + 1


class Noted:
    """A link and a worker that note in which order they are called."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def send(self, to: str, *frames: Frame) -> None:
        self.seen.append(f"{to} gets {' and '.join(str(frame.tag.edge) for frame in frames)}")

    def flush(self) -> None:
        self.seen.append("flush")

    def recv(self, source: str, tag: Tag) -> Frame:
        self.seen.append(f"{source} is waited for")
        return frame(tag.edge)

    def handle(self, effect: Do | EndStep) -> None:
        self.seen.append(type(effect.instruction).__name__ if isinstance(effect, Do) else "EndStep")


def frame(edge: int, size: int = 1) -> Frame:
    return Frame(Tag(1, "train", 0, 0, edge, 0, 0, "up"), "uint8", (size,), bytes(size))


def sending(edge: int, size: int = 1, to: str = "server") -> Generator[Effect, Any, None]:
    yield Do(Send(edge, 0, 0, size, "up", to))
    yield Post(to, frame(edge, size))


def noted(talk: Generator[Effect, Any, None]) -> list[str]:
    all_of_it = Noted()
    drive(talk, all_of_it, Ledger("clinic"), all_of_it.handle)
    return all_of_it.seen


def test_small_frames_wait_for_the_next_send_and_for_nothing_else():
    """They leave before the party computes on; a wait lets them leave by itself."""

    def talk() -> Generator[Effect, Any, None]:
        yield from sending(0)
        yield from sending(1)
        yield Do(Step((0,)))
        yield from sending(2)
        yield Take("server", frame(3).tag)
        yield from sending(4)
        yield EndStep(0, "lane 0")

    assert noted(talk()) == [
        *("Send", "Send", "server gets 0 and 1", "flush", "Step"),
        *("Send", "server gets 2", "server is waited for"),
        *("Send", "server gets 4", "flush", "EndStep"),
    ]


def test_a_frame_leaves_before_the_next_batch_is_read():
    def talk() -> Generator[Effect, Any, None]:
        yield from sending(0)
        yield Do(Load(0, (1,), ("x",)), 1, ahead=True)
        yield Take("server", frame(1).tag)

    assert noted(talk()) == ["Send", "server gets 0", "flush", "Load", "server is waited for"]


def test_a_large_frame_leaves_before_the_next_is_made():
    def talk() -> Generator[Effect, Any, None]:
        yield from sending(0)
        yield from sending(1, LARGE)
        yield from sending(2)

    assert noted(talk()) == ["Send", "Send", "server gets 0 and 1", "Send", "server gets 2"]


def test_many_small_frames_do_not_wait_for_the_last():
    def talk() -> Generator[Effect, Any, None]:
        for edge in range(6):
            yield from sending(edge, LARGE // 3)

    assert noted(talk()) == [
        *(*["Send"] * 4, "server gets 0 and 1 and 2 and 3"),
        *(*["Send"] * 2, "server gets 4 and 5"),
    ]


def test_frames_for_several_parties_keep_their_order():
    def talk() -> Generator[Effect, Any, None]:
        for edge, to in enumerate(["hub", "hub", "lab", "hub"]):
            yield from sending(edge, to=to)
        yield Take("hub", frame(4).tag)

    assert noted(talk())[4:] == ["hub gets 0 and 1", "lab gets 2", "hub gets 3", "hub is waited for"]


def test_what_an_exchange_says_leaves_at_once():
    """Its next word may take it long to find."""

    def talk() -> Generator[Effect, Any, None]:
        yield from sending(0)
        yield Do(Step((0,)))
        yield Post("server", frame(1))
        seen.append("works")
        yield Post("server", frame(2))

    link = Noted()
    seen = link.seen
    drive(talk(), link, Ledger("clinic"), link.handle)
    assert seen == ["Send", "server gets 0", "flush", "Step", "server gets 1", "works", "server gets 2"]


def test_what_a_program_sends_last_is_sent():
    assert noted(sending(0)) == ["Send", "server gets 0"]


def test_before_each_wait_and_at_no_other_time_it_does_what_could_wait():
    def talk() -> Generator[Effect, Any, None]:
        yield from sending(0)
        yield EndStep(0, "lane 0")
        yield from sending(1)
        yield Take("server", frame(2).tag)

    link = Noted()
    drive(talk(), link, Ledger("clinic"), link.handle, lambda: link.seen.append("idle"))
    assert link.seen == [
        *("Send", "server gets 0", "flush", "EndStep"),
        *("Send", "server gets 1", "idle", "server is waited for"),
    ]
