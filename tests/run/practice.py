"""A contract, parties with certificates and code of their own, and a server's place to listen in: for the doctor."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from cutlayer.run.config import Contract, load_contract
from cutlayer.run.doctor_network import network_rows
from cutlayer.run.doctor_rows import Row
from cutlayer.run.partyfile import PartyFile, load_party_file
from cutlayer.transport import probe
from cutlayer.transport.grpc_common import server_credentials
from cutlayer.transport.pki import create_authority, issue
from cutlayer.transport.probe_listener import ProbeListener, Visit
from cutlayer.transport.tls import Credentials, load_credentials
from tests.cli.conftest import CODE, CONTRACT
from tests.provoking import saw
from tests.proxies import free_port

SECRET = "s3cr3t-W0rd"
STEPS = ["name", "connection", "certificate", "accepts ours"]
MEASURED = ["round trip", "speed", "clock", "contract", "release"]
LONG_AGO = datetime.now(UTC) - timedelta(days=100)


@dataclass
class Practice:
    """A folder with `contract.toml`, `parties.py`, an authority `ca` and what it has issued in `kits`."""

    folder: Path
    port: int = field(default_factory=free_port)

    def __post_init__(self) -> None:
        create_authority(self.folder / "ca", name="study", now=LONG_AGO)
        self.edit("contract.toml", CONTRACT.replace("7443", str(self.port)))
        self.edit("parties.py", CODE)
        for name in ("hospital", "server"):
            self.certify(name)
            self.write(name)

    def edit(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(text)
        return path

    def certify(self, name: str, **settings: Any) -> Path:
        """Issue a certificate, or another one in its place: of a foreign `authority`, of other `days`, ..."""
        authority = settings.pop("authority", self.folder / "ca")
        where = settings.pop("where", self.folder / "kits")
        if (where / name).exists():
            (where / name).rename(where / f".{name}-{free_port()}")
        return issue(authority, name, where, **settings)

    def write(self, name: str, network: str | None = None, *, builder: str = "", more: str = "") -> Path:
        network = f'credentials = "kits/{name}"' if network is None else network
        code = builder or f"parties.py:{name}"
        text = f'party = "{name}"\n[code]\nbuilder = "{code}"\n[network]\n{network}\n{more}'
        path = self.edit(f"{name}.toml", text)
        path.chmod(0o600)
        return path

    @property
    def contract(self) -> Contract:
        return load_contract(self.folder / "contract.toml")

    def file(self, name: str) -> PartyFile:
        return load_party_file(self.folder / f"{name}.toml")

    def credentials(self, name: str) -> Credentials:
        return load_credentials(self.folder / "kits" / name, name)

    @contextmanager
    def listening(self, **changes: Any) -> Iterator[list[Visit]]:
        """Listen as the server, as `doctor --serve` does; give the visits."""
        visits: list[Visit] = []
        settings = {"digest": self.contract.digest(), "parties": ("hospital", "server"), "visited": visits.append}
        own = changes.pop("credentials", None) or self.credentials("server")
        with ProbeListener(f"127.0.0.1:{self.port}", own, **{**settings, **changes}):
            yield visits


def by_name(rows: Iterable[Row]) -> dict[str, Row]:
    """Return the rows by name, each of which says what to do if something is wrong, in one line and without secrets."""
    found = list(rows)
    for row in found:
        saw(f"{row.code} {row.seen}")
        assert bool(row.do) == (row.status in ("warning", "problem")), row
        assert row.seen
        assert row.seen.isprintable()
        assert row.do.isprintable()
        assert SECRET not in f"{row}"
        assert "PRIVATE KEY" not in f"{row}"
    return {row.name: row for row in found}


def troubles(rows: Iterable[Row]) -> dict[str, tuple[str, str]]:
    """Return name -> (status, code) of the rows that are not as they should be."""
    return {row.name: (row.status, row.code) for row in by_name(rows).values() if row.status in ("warning", "problem")}


def look(practice: Practice, each: float = 5.0, party: str = "hospital") -> dict[str, Row]:
    """Return what is found of a party's network, within the time that this may take."""
    begin = time.monotonic()
    rows = by_name(network_rows(practice.contract, practice.file(party), each=each))
    assert time.monotonic() - begin < 8 * each
    return rows


@contextmanager
def grpc_server(port: int, credentials: Credentials | None) -> Iterator[None]:
    """A server of gRPC that knows nothing of cutlayer."""
    with ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool)
        address = f"127.0.0.1:{port}"
        if credentials is None:
            server.add_insecure_port(address)
        else:
            server.add_secure_port(address, server_credentials(credentials))
        server.start()
        try:
            yield
        finally:
            server.stop(0).wait(10)


def few_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a measurement move little, where its numbers do not matter."""
    monkeypatch.setattr(probe, "_EACH_WAY", 64 * 1024)
