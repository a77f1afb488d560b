"""What this machine has: processors, memory, disk. Read from the system, without torch; sizes in bytes."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Final

__all__ = ["free_memory", "installed_memory", "memory_limit", "room_in", "usable_processors"]

_LIMITS: Final = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_USED: Final = (Path("/sys/fs/cgroup/memory.current"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"))
_MEMORY: Final = Path("/proc/meminfo")
_AVAILABLE: Final = re.compile(r"(?m)^MemAvailable:\s+(\d+) kB$")
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
    """Return the memory that a new program can have; None where the system does not say.

    Linux counts in what it keeps of files only until somebody needs the room. In a container it is what is left of its
    limit, if that is less.
    """
    free = _available()
    limit, used = memory_limit(), _first_number(_USED)
    if limit is None or used is None:
        return free
    left = max(0, limit - used)
    return left if free is None else min(left, free)


def memory_limit() -> int | None:
    """Return the limit of the container that this runs in; None if there is none."""
    limit = _first_number(_LIMITS)
    return limit if limit is not None and limit < _NO_LIMIT else None


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


def _available() -> int | None:
    try:
        found = _AVAILABLE.search(_MEMORY.read_text(encoding="ascii"))
    except (OSError, ValueError):
        found = None
    return int(found[1]) * 1024 if found else _pages("SC_AVPHYS_PAGES")


def _first_number(paths: tuple[Path, ...]) -> int | None:
    """Return the number that the first readable file holds; None if there is none, or it says "max"."""
    for path in paths:
        try:
            return int(path.read_text(encoding="ascii"))
        except (OSError, ValueError):
            continue
    return None


def _pages(name: str) -> int | None:
    try:
        return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None
