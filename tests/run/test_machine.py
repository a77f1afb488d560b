"""What the machine has, read from files such as Linux and containers have; and a place to write, left as it was."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from cutlayer.run import machine
from cutlayer.run.machine import free_memory, installed_memory, memory_limit, room_in, usable_processors

GB = 10**9


def fake(folder: Path, monkeypatch: pytest.MonkeyPatch, limit: str = "", used: str = "", meminfo: str = "") -> None:
    for name, text in (("max", limit), ("current", used), ("meminfo", meminfo)):
        if text:
            (folder / name).write_text(text)
    monkeypatch.setattr(machine, "_LIMITS", (folder / "none", folder / "max"))
    monkeypatch.setattr(machine, "_USED", (folder / "none", folder / "current"))
    monkeypatch.setattr(machine, "_MEMORY", folder / "meminfo")


def test_this_machine():
    assert 1 <= usable_processors() <= (os.cpu_count() or 1)
    installed, free = installed_memory(), free_memory()
    assert installed is not None
    assert free is not None
    assert 0 <= free <= installed


def test_free_memory_counts_in_what_is_kept_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fake(tmp_path, monkeypatch, meminfo="MemTotal: 9000 kB\nMemFree:  10 kB\nMemAvailable:   3000 kB\n")
    assert free_memory() == 3000 * 1024


def test_in_a_container_it_is_what_is_left_of_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fake(tmp_path, monkeypatch, limit=f"{4 * GB}\n", used=f"{3 * GB}\n", meminfo="MemAvailable: 50000000 kB\n")
    assert memory_limit() == 4 * GB
    assert free_memory() == GB
    (tmp_path / "current").write_text(str(5 * GB))
    assert free_memory() == 0
    (tmp_path / "meminfo").write_text("MemAvailable: lots\n")
    monkeypatch.setattr(machine, "_pages", lambda _name: None)
    (tmp_path / "current").write_text(str(GB))
    assert free_memory() == 3 * GB


@pytest.mark.parametrize("limit", ["max\n", str(2**63 - 4096)])
def test_no_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str):
    fake(tmp_path, monkeypatch, limit=limit, meminfo="MemAvailable: 2 kB\n")
    assert memory_limit() is None
    assert free_memory() == 2048


def test_a_system_that_does_not_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def unknown(_name: str) -> int:
        raise ValueError

    fake(tmp_path, monkeypatch)
    monkeypatch.setattr(os, "sysconf", unknown)
    assert (installed_memory(), free_memory(), memory_limit()) == (None, None, None)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert usable_processors() == os.cpu_count()


def test_room_is_tried_and_nothing_stays(tmp_path: Path):
    place, free = room_in(tmp_path / "a" / "b")
    assert place == tmp_path
    assert free > 0
    assert list(tmp_path.iterdir()) == []


def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(_handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        room_in(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="Not a directory"):
        room_in(Path(__file__) / "runs")
