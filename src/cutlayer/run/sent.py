"""All that a party has sent since its run began, also in steps that a restart undid and in processes that were killed.

The ledger is set back with the run, so that it holds the plan's steps once. What left does not come back: it is counted
here, frame by frame, and kept in the run's folder.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from cutlayer.core.program import Tag
from cutlayer.engine.ledger import Ledger, Row
from cutlayer.engine.wire import Frame
from cutlayer.transport.base import Transport

__all__ = ["Sent"]

_NAME: Final = "sent.txt"


class Sent:
    """Counts what is handed over to a link, for the link itself: it stands before it.

    Args:
        link: Where frames go to.
        folder: The run's, where the count is kept in `sent.txt`: bytes of payload, bytes of framing, messages. A killed
            process leaves it right; after a power loss it may lack the last seconds. None: it is kept nowhere.
    """

    def __init__(self, link: Transport, folder: Path | None) -> None:
        """Go on from the count that the folder holds."""
        self._link, self._path = link, folder / _NAME if folder is not None else None
        self._row, self._file = _read(self._path), -1

    def send(self, to: str, *frames: Frame) -> None:
        """Count frames, then queue them. Raises what `Transport.send` raises; OSError, if the disk refuses."""
        row = self._row
        for frame in frames:
            row.payload += frame.nbytes
            row.framing += frame.framing
            row.messages += 1
        if self._path is not None:
            self._write(self._path)
        self._link.send(to, *frames)

    def flush(self) -> None:
        """See `Transport.flush`."""
        self._link.flush()

    def recv(self, source: str, tag: Tag) -> Frame:
        """See `Transport.recv`."""
        return self._link.recv(source, tag)

    def settle(self, ledger: Ledger) -> None:
        """Tell a ledger that was set back what was sent besides what it holds."""
        row = self._row
        for part in ("payload", "framing", "messages"):
            held = ledger.total("sent", part)
            setattr(row, part, max(held, getattr(row, part)))  # a folder of an older version has no count
            setattr(ledger.undone, part, getattr(row, part) - held)

    def close(self) -> None:
        """Close the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _write(self, path: Path) -> None:
        """Write the count over the last one: as many bytes, in one system call."""
        row = self._row
        text = b"%20d %20d %20d\n" % (row.payload, row.framing, row.messages)
        try:
            if self._file < 0:
                self._file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
            os.pwrite(self._file, text, 0)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error


def _read(path: Path | None) -> Row:
    try:
        payload, framing, messages = map(int, path.read_bytes().split()) if path is not None else (0, 0, 0)
    except (FileNotFoundError, ValueError):  # none yet, or cut off by a power loss
        return Row()
    return Row(payload, framing, messages)
