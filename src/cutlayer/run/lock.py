"""A run's folder: this user alone may read it, and it belongs to one living process at a time.

| code | error | meaning |
| --- | --- | --- |
| E248 | ConfigError | another process works in the folder |
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Final

from cutlayer.errors import ConfigError

__all__ = ["locked", "own_folder"]

_LOCK: Final = ".lock"
_POLL: Final = 0.1  # seconds between two tries


def own_folder(folder: Path) -> None:
    """Make a folder that this user alone may enter (mode 0700), if it is missing; those above it are as all others."""
    folder.mkdir(0o700, parents=True, exist_ok=True)


@contextmanager
def locked(folder: Path, *, wait: float = 0.0) -> Iterator[None]:
    """Keep other processes out of a folder, which exists. The lock ends with this process, however that ends.

    It is one of the system's on the file `.lock`, which forked processes do not inherit. (`filelock` takes flock: a
    data loader's workers would keep the folder after their parent was killed.) Where the file system knows no locks,
    nothing is kept out. Not for a folder that this process has locked already.

    Args:
        folder: The run's folder.
        wait: Seconds for another process to leave it.

    Raises:
        ConfigError: E248, another process works in it.
        OSError: the file cannot be written.
    """
    path, deadline = folder / _LOCK, time.monotonic() + wait
    while (file := _taken(path)) is None:
        if time.monotonic() > deadline:
            raise _in_use(path)
        time.sleep(_POLL)
    with file:
        with suppress(OSError):  # a full disk: others are kept out all the same
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _taken(path: Path) -> IO[str] | None:
    """Return the file, locked and empty; None if another process has it."""
    file = path.open("a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A file that its owner has removed just now keeps nobody out.
        kept = path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError as error:
        kept = error.errno not in (errno.EACCES, errno.EAGAIN)  # a file system without locks
    if not kept:
        file.close()
        return None
    file.truncate(0)
    return file


def _in_use(path: Path) -> ConfigError:
    return ConfigError(
        "another process works in this folder",
        where=str(path.parent),
        got=path.read_text(encoding="utf-8") if path.exists() else "",
        remedy="wait until it has ended, or stop it; or give another folder",
        code="E248",
    )
