"""Certificates, addresses and threads for the parties of a plan, all in this process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import cutlayer as cl
from cutlayer.transport.network import Deadlines, NetworkSettings
from cutlayer.transport.pki import create_authority, issue
from cutlayer.transport.settings import Rhythm
from cutlayer.transport.tls import load_credentials
from tests.run.cluster import free_ports

DEADLINES = Deadlines(join=20, patience=10, receive=20, send=10, close=4)
FAST = Rhythm(hello=3, heartbeat=0.5, silence=3, idle_ack=0.02, retry=0.3)


class Trial:
    """A network on loopback with mutual TLS. All parties of a chain need an address; by default the last has one."""

    def __init__(self, plan: cl.Plan, folder: Path, *, coordinator: str = "") -> None:
        self.plan, self.folder = plan, folder
        self.coordinator = coordinator or plan.parties[-1]
        self.addresses = {self.coordinator: f"127.0.0.1:{free_ports(1)[0]}"}
        authority = create_authority(folder / "ca", name="study")
        for name in plan.parties:
            issue(authority, name, folder)

    def settings(self, party: str, **changes: Any) -> NetworkSettings:
        values = {
            "party": party,
            "parties": self.plan.parties,
            "coordinator": self.coordinator,
            "addresses": self.addresses,
            "run": "trial",
            "digest": self.plan.digest(),
            "credentials": load_credentials(self.folder / party, party),
            "deadlines": DEADLINES,
            "rhythm": FAST,
        }
        return NetworkSettings(**{**values, **changes})

    def play(self, parts: Mapping[str, Callable[[], Any]], seconds: float = 60) -> dict[str, Any]:
        """Run functions in threads; return what each returned, or the error that ended it."""
        found: dict[str, Any] = {}

        def run(name: str) -> None:
            try:
                found[name] = parts[name]()
            except Exception as error:
                found[name] = error

        threads = [threading.Thread(target=run, args=(name,), name=f"part-{name}") for name in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(seconds)
        assert not any(thread.is_alive() for thread in threads), "a part hangs"
        return found
