"""Rows, and looking within a time: whatever a check does, rows come and it ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from cutlayer.errors import LinkError
from cutlayer.run.doctor_rows import Row, in_time, of_error, one_line, size, still_looking

LATE = Row("slow", "warning", "it takes too long", "wait")
GOOD = Row("good", "ok", "seen")


def look(*rows: Row, then: BaseException | None = None) -> Iterator[Row]:
    yield from rows
    if then is not None:
        raise then


def test_rows_pass_one_by_one():
    gate = threading.Event()

    def slowly() -> Iterator[Row]:
        yield GOOD
        assert gate.wait(10)
        yield Row("second", "ok", "seen")

    rows = in_time("x", slowly, 20, LATE)
    assert next(rows) == GOOD  # while the check goes on
    gate.set()
    assert [row.name for row in rows] == ["second"]


def test_a_check_that_hangs_is_given_up_and_known_to_go_on():
    gate = threading.Event()
    begin = time.monotonic()
    assert list(in_time("x", lambda: (gate.wait(60) and GOOD for _ in range(1)), 0.2, LATE)) == [LATE]
    assert 0.1 < time.monotonic() - begin < 5
    assert still_looking()
    gate.set()
    deadline = time.monotonic() + 20
    while still_looking() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not still_looking()


def test_what_came_before_the_time_was_over_is_kept():
    gate = threading.Event()

    def look_on() -> Iterator[Row]:
        yield GOOD
        gate.wait(20)

    assert list(in_time("x", look_on, 0.2, LATE)) == [GOOD, LATE]
    gate.set()


@pytest.mark.parametrize(
    ("error", "code", "seen", "do"),
    [
        (
            LinkError("it is cut", got="a knife", remedy="mend it", code="E601"),
            "E601",
            "it is cut (got a knife)",
            "mend",
        ),
        (ModuleNotFoundError("no grpc"), "", "a package cannot be loaded: no grpc", "install cutlayer anew"),
        (SystemExit(3), "E000", "an unexpected error: SystemExit: 3", "report it"),
        (KeyError("x\n\x1b[31my"), "E000", r"an unexpected error: KeyError: 'x\n\x1b[31my'", "report it"),
        (ValueError("x\n\n \x1b[31my"), "E000", "an unexpected error: ValueError: x ?[31my", "report it"),
    ],
)
def test_an_error_is_a_row_that_says_what_to_do(error: BaseException, code: str, seen: str, do: str):
    good, bad = in_time("x", lambda: look(GOOD, then=error), 20, LATE)
    assert good == GOOD
    assert (bad.name, bad.status, bad.code, bad.seen) == ("x", "problem", code, seen)
    assert bad.do.startswith(do)


def test_an_errors_row():
    error = LinkError("it\nis cut", expected="a\tlink", got="x" * 900, remedy="mend it", code="E601")
    row = of_error("way", error)
    assert row.seen.startswith("it is cut (expected a link, got xxx")
    assert len(row.seen) == 600
    assert (row.do, row.code) == ("mend it", "E601")
    assert of_error("way", error, "ask them").do == "ask them"
    assert one_line("\x07a\u202eb  c\n") == "?a?b c"


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (1.5e9, "1.5 GB"), (2.5e15, "2500.0 TB")],
)
def test_sizes_as_people_read_them(count: float, text: str):
    assert size(count) == text
