"""A folder is one process's at a time; a process that was killed keeps nothing locked."""

from __future__ import annotations

import fcntl
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cutlayer.errors import ConfigError
from cutlayer.run.lock import locked, own_folder
from cutlayer.run.results import results_folder

HOLDER = """
import sys, time
from pathlib import Path
from cutlayer.run.lock import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@contextmanager
def holder(folder: Path, seconds: float = 60.0) -> Iterator[subprocess.Popen[str]]:
    """Let another process lock the folder."""
    words = [sys.executable, "-c", HOLDER, str(folder), str(seconds)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


@pytest.mark.provokes("E248")
def test_folder_of_a_living_process_is_refused(tmp_path: Path):
    with holder(tmp_path) as process, pytest.raises(ConfigError) as caught, locked(tmp_path):
        pass
    assert (caught.value.code, caught.value.where) == ("E248", str(tmp_path))
    assert caught.value.what == "another process works in this folder"
    assert caught.value.got.startswith(f"process {process.pid} on ")


def test_lock_of_a_killed_process_is_no_obstacle(tmp_path: Path):
    with holder(tmp_path) as process:
        process.kill()
        process.wait()
        assert (tmp_path / ".lock").exists()
        with locked(tmp_path):
            assert (tmp_path / ".lock").exists()
    assert list(tmp_path.iterdir()) == []


def test_one_may_wait_for_another_process(tmp_path: Path):
    with holder(tmp_path, 0.5) as process, locked(tmp_path, wait=30.0):
        assert process.wait() == 0


def test_lock_is_not_that_of_a_file_which_its_owner_has_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real, times = fcntl.lockf, []

    def late(*given: Any) -> None:
        """Remove the file between its opening and its lock, as a process does that leaves."""
        if not times:
            (tmp_path / ".lock").unlink()
        times.append(1)
        real(*given)

    monkeypatch.setattr(fcntl, "lockf", late)
    with locked(tmp_path, wait=5.0):
        assert len(times) == 2
        assert (tmp_path / ".lock").exists()


def test_file_system_without_locks_keeps_nobody_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def unknown(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "lockf", unknown)
    with holder(tmp_path), locked(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith("process ")


def test_folder_for_results_is_locked(tmp_path: Path):
    with results_folder(tmp_path, tmp_path, "demo") as folder:
        assert (folder / ".lock").exists()
    with holder(tmp_path), pytest.raises(ConfigError, match="E248"), results_folder(tmp_path, tmp_path, "demo"):
        pass
    assert tmp_path.exists()


def test_own_folder_is_entered_by_this_user_alone(tmp_path: Path):
    there = tmp_path / "there"
    there.mkdir(0o755)
    above, new = tmp_path / "runs", tmp_path / "runs" / "new"
    before = os.umask(0o022)
    try:
        for folder in (there, new):
            own_folder(folder)
    finally:
        os.umask(before)
    assert [stat.S_IMODE(one.stat().st_mode) for one in (there, above, new)] == [0o755, 0o755, 0o700]
