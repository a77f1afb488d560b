"""Fixtures for tests with several parties."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from cutlayer.transport.pki import create_authority, issue
from cutlayer.transport.seal import Seal
from cutlayer.transport.tls import Credentials, load_credentials
from tests.transport.parties import Cable, Cast, Process

NOW = datetime(2030, 1, 1, 12, tzinfo=UTC)
CONTEXT = b"run 7, session 1"
LABEL = "cutlayer sealed relay, version 1: offer of an ephemeral X25519 key to one peer"


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pki")


@pytest.fixture(scope="module")
def authority(folder: Path) -> Path:
    """An authority and its parties a, b and relay, in date at NOW."""
    made = create_authority(folder / "ca", name="study", now=NOW)
    for party in ("a", "b", "relay"):
        issue(made, party, folder, now=NOW)
    return made


@pytest.fixture(scope="module")
def parties(authority: Path, folder: Path) -> dict[str, Credentials]:
    return {party: load_credentials(folder / party, party) for party in ("a", "b", "relay")}


@pytest.fixture
def good(parties: dict[str, Credentials]) -> Credentials:
    return parties["a"]


@pytest.fixture
def pair(parties: dict[str, Credentials]) -> tuple[Seal, Seal]:
    """Two ends of a sealed link that accepted each other."""
    a, b = Seal(parties["a"], "b", CONTEXT), Seal(parties["b"], "a", CONTEXT)
    a.accept(b.offer(), now=NOW)
    b.accept(a.offer(), now=NOW)
    return a, b


def leaf_der(credentials: Credentials) -> bytes:
    return x509.load_pem_x509_certificate(credentials.certificate).public_bytes(serialization.Encoding.DER)
