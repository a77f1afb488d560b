"""What left is counted whatever becomes of the run."""

from __future__ import annotations

from pathlib import Path

import pytest

from cutlayer.core.program import Tag
from cutlayer.engine.ledger import Ledger, Row
from cutlayer.engine.wire import Frame
from cutlayer.run.sent import Sent

NOTHING = {"flows": [], "seconds": [], "flops": []}


class Wire:
    """A link that keeps what it is given."""

    def __init__(self) -> None:
        self.frames: list[tuple[str, Frame]] = []

    def send(self, to: str, *frames: Frame) -> None:
        self.frames += [(to, frame) for frame in frames]

    def flush(self) -> None:
        raise AssertionError

    def recv(self, source: str, tag: Tag) -> Frame:
        return next(frame for to, frame in self.frames if (to, frame.tag) == (source, tag))


def frame(size: int, step: int = 0) -> Frame:
    return Frame(Tag(1, "train", 1, step, 0, 0, 0, "up"), "uint8", (size,), bytes(size))


def send(sent: Sent, ledger: Ledger, *frames: Frame) -> None:
    for one in frames:
        ledger.sent("server", one)
        sent.send("server", one)


@pytest.mark.parametrize("kept", [True, False])
def test_steps_that_were_undone_are_counted_besides_the_ledger(tmp_path: Path, kept: bool):
    wire, ledger = Wire(), Ledger("clinic")
    sent = Sent(wire, tmp_path if kept else None)
    sent.settle(ledger)
    assert ledger.undone == Row()
    send(sent, ledger, frame(10))
    saved = ledger.document()
    send(sent, ledger, frame(7, 1), frame(5, 2))
    ledger.restore(saved)
    sent.settle(ledger)
    undone = wire.frames[1:]
    assert ledger.undone == Row(12, sum(one.framing for _, one in undone), 2)
    assert ledger.document() == saved
    send(sent, ledger, frame(7, 1), frame(5, 2))
    sent.settle(ledger)
    assert ledger.undone.payload == 12
    assert ledger.total("sent") + ledger.undone.payload == sum(one.nbytes for _, one in wire.frames) == 34
    sent.close()
    assert (tmp_path / "sent.txt").exists() is kept


def test_a_process_that_was_killed_leaves_its_count(tmp_path: Path):
    ledger = Ledger("clinic")
    killed = Sent(Wire(), tmp_path)  # never closed
    send(killed, ledger, *(frame(1000, step) for step in range(5)))
    anew, empty = Sent(Wire(), tmp_path), Ledger("clinic")
    anew.settle(empty)
    assert empty.undone == Row(5000, ledger.total("sent", "framing"), 5)
    anew.send("server", frame(1))
    anew.settle(empty)
    assert (tmp_path / "sent.txt").read_text().split()[::2] == ["5001", "6"]
    anew.close()
    killed.close()


@pytest.mark.parametrize("text", [None, "", "12 3", "many more bytes"])
def test_a_folder_without_a_count_goes_on_from_the_ledger(tmp_path: Path, text: str | None):
    if text is not None:
        (tmp_path / "sent.txt").write_text(text)
    ledger, sent = Ledger("clinic"), Sent(Wire(), tmp_path)
    ledger.sent("server", frame(30))
    sent.settle(ledger)
    assert ledger.undone == Row()
    ledger.restore(NOTHING)
    sent.settle(ledger)
    assert ledger.undone.payload == 30


def test_a_disk_that_refuses_is_told_with_the_file(tmp_path: Path):
    (tmp_path / "sent.txt").mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        Sent(Wire(), tmp_path)
    assert caught.value.filename == str(tmp_path / "sent.txt")
    sent = Sent(Wire(), tmp_path / "gone")
    with pytest.raises(FileNotFoundError) as caught:
        sent.send("server", frame(1))
    assert caught.value.filename == str(tmp_path / "gone" / "sent.txt")


def test_it_stands_for_the_link(tmp_path: Path):
    sent, one = Sent(Wire(), tmp_path), frame(3)
    sent.send("server", one)
    assert sent.recv("server", frame(3).tag) is one
    with pytest.raises(AssertionError):
        sent.flush()
    sent.close()
    sent.close()
