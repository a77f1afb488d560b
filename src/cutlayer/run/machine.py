"""What this machine has: processors, memory, disk. Read from the system, without torch; sizes in bytes."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Final

__all__ = ["free_memory", "installed_memory", "memory_limit", "room_in", "usable_processors"]

_LIMITS: Final = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_NO_LIMIT: Final = 2**60  # an older kernel's way to say that there is none is larger
_TRIAL: Final = b"cutlayer\n" * 100


def usable_processors() -> int:
    """Return how many processors this process may run on; fewer than there are in a container."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return (len(affinity(0)) if affinity else os.cpu_count()) or 1


def installed_memory() -> int | None:
    """Return the machine's memory; None where the system does not say."""
    return _pages("SC_PHYS_PAGES")


def free_memory() -> int | None:
    """Return the memory that is free; None where the system does not say."""
    return _pages("SC_AVPHYS_PAGES")


def memory_limit() -> int | None:
    """Return the limit of the container that this runs in; None if there is none."""
    for path in _LIMITS:
        try:
            limit = int(path.read_text())
        except (OSError, ValueError):
            continue  # no such file, or "max"
        return limit if limit < _NO_LIMIT else None
    return None


def room_in(folder: Path) -> tuple[Path, int]:
    """Write a file where `folder` is or would be made, remove it, and return that place and its free bytes.

    Raises OSError if nothing can be written there.
    """
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    with tempfile.NamedTemporaryFile(prefix=".cutlayer-", dir=place) as file:
        file.write(_TRIAL)
        file.flush()
        os.fsync(file.fileno())
    return place, shutil.disk_usage(place).free


def _pages(name: str) -> int | None:
    try:
        return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None
