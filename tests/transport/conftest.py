"""Fixtures for tests with several parties."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.transport.parties import Cable, Cast, Process


@pytest.fixture
def cast(tmp_path: Path) -> Cast:
    return Cast(tmp_path)


@pytest.fixture
def no_thread_stays() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + 5
    while (left := set(threading.enumerate()) - before) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not left, f"threads left: {sorted(thread.name for thread in left)}"


@pytest.fixture
def cable() -> Iterator[Callable[[str], Cable]]:
    cables: list[Cable] = []

    def lay(target: str) -> Cable:
        cables.append(Cable(target))
        return cables[-1]

    yield lay
    for one in cables:
        one.close()


@pytest.fixture
def spawn() -> Iterator[Callable[..., Process]]:
    """Start tests/transport/actor.py with a JSON object as its argument."""
    started: list[Process] = []

    def start(**job: Any) -> Process:
        actor = Path(__file__).with_name("actor.py")
        process = subprocess.Popen([sys.executable, str(actor), json.dumps(job)], stdout=subprocess.PIPE, text=True)
        one = Process(process)

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                one.lines.append(json.loads(line))

        one.reader = threading.Thread(target=read, name="actor-output")
        one.reader.start()
        started.append(one)
        return one

    yield start
    for one in started:
        if one.process.poll() is None:
            one.kill()
        assert one.reader is not None
        one.reader.join(5)
        if one.process.stdout is not None:
            one.process.stdout.close()
