"""What `cutlayer doctor` finds: rows. And a way to look that always ends."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Literal

from cutlayer.errors import CutlayerError

__all__ = ["Row", "Status", "in_time", "of_error", "one_line", "size", "still_looking"]

Status = Literal["ok", "warning", "problem", "skipped"]
_END: Final = None
_ANEW: Final = (
    "install cutlayer anew, with all its packages, in an environment of its own: python -m pip install cutlayer"
)
_UNITS: Final = ("kB", "MB", "GB", "TB")
_THOUSAND: Final = 1000
_LONGEST: Final = 600  # characters of one row
_THREAD: Final = "cutlayer-doctor"


@dataclass(frozen=True)
class Row:
    """One thing that was looked at.

    Attributes:
        name: What.
        status: "ok", "warning" (it runs, but look), "problem" (it will not run, or must not) or "skipped" (not looked
            at).
        seen: What was seen, in words; why, if it was skipped.
        do: What to do about a warning or a problem.
        code: The error's, if there is one: see `cutlayer explain`.
    """

    name: str
    status: Status
    seen: str
    do: str = ""
    code: str = ""


def of_error(name: str, error: CutlayerError, do: str = "") -> Row:
    """Return the row of an error; `do` goes before its own remedy's place."""
    seen = f"{error.what} ({error.why()})" if error.why() else error.what
    return Row(name, "problem", one_line(seen), do or error.remedy, error.code)


def one_line(text: str) -> str:
    """Return a text that may be long, of several lines, or from somebody else as one printable line."""
    return "".join(sign if sign.isprintable() else "?" for sign in " ".join(text.split())[:_LONGEST])


def in_time(name: str, look: Callable[[], Iterable[Row]], seconds: float, late: Row) -> Iterator[Row]:
    """Look in a thread of its own and pass the rows on; after `seconds`, give `late` and look no further.

    An error that nobody foresaw becomes a problem of the name `name`: one check never ends the others.
    """
    rows: queue.SimpleQueue[Row | None] = queue.SimpleQueue()

    def run() -> None:
        try:
            for row in look():
                rows.put(row)
        except CutlayerError as error:
            rows.put(of_error(name, error))
        except ImportError as error:
            rows.put(Row(name, "problem", f"a package cannot be loaded: {one_line(str(error))}", _ANEW))
        except (Exception, SystemExit) as error:
            seen = one_line(f"an unexpected error: {type(error).__name__}: {error}")
            rows.put(Row(name, "problem", seen, "report it, with what `cutlayer env` prints", "E000"))
        rows.put(_END)

    threading.Thread(target=run, name=_THREAD, daemon=True).start()
    deadline = time.monotonic() + seconds
    while True:
        try:
            row = rows.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            yield late
            return
        if row is None:
            return
        yield row


def still_looking() -> bool:
    """Return whether a check that took too long still runs: a process cannot end in good order before it."""
    return any(thread.name == _THREAD for thread in threading.enumerate())


def size(count: float) -> str:
    """Return a number of bytes as people read it: "1.5 GB"."""
    value, unit = float(count), "bytes"
    for larger in _UNITS:
        if value < _THOUSAND:
            break
        value, unit = value / _THOUSAND, larger
    return f"{value:.0f} bytes" if unit == "bytes" else f"{value:.1f} {unit}"
