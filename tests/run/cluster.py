"""Starts a plan's parties as separate processes and collects what they leave."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch

import cutlayer as cl
from cutlayer.run.results import weights
from cutlayer.transport.pki import create_authority, issue
from tests.run import plans, site_process

# Each party is a process of its own, forked from one that has imported torch but opened nothing: seconds saved a party.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.run.site_process"])


def _party_process(job: dict[str, Any], log: str) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.exit(site_process.main(job))


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens at."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [item.getsockname()[1] for item in sockets]
    finally:
        for item in sockets:
            item.close()


class Cluster:
    """The processes of one run. `addresses` names the parties that listen; `secure` gives all certificates."""

    def __init__(
        self, case: str, folder: Path, *, listening: Sequence[str], secure: bool = True,
        training: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.case, self.folder, self.training = case, folder, dict(training or {})
        self.parties = plans.CASES[case](**self.training).plan.parties
        self.addresses = {
            party: f"127.0.0.1:{port}" for party, port in zip(listening, free_ports(len(listening)), strict=True)
        }
        self.secure = secure
        self.processes: dict[str, multiprocessing.process.BaseProcess] = {}
        self.deadlines = {"join": 60, "patience": 40, "receive": 60, "send": 30, "close": 10}
        folder.mkdir(parents=True, exist_ok=True)
        if secure:
            create_authority(folder / "ca", name="test")
            for party in self.parties:
                issue(folder / "ca", party, folder / "certificates")

    def start(self, party: str, **changes: Any) -> None:
        """Start one party; its stderr goes to a file."""
        job = {
            "case": self.case,
            "training": self.training,
            "party": party,
            "folder": str(self.folder),
            "addresses": self.addresses,
            "credentials": str(self.folder / "certificates" / party) if self.secure else None,
            "deadlines": self.deadlines,
        }
        log = str(self.folder / f"{party}.log")
        self.processes[party] = PROCESSES.Process(target=_party_process, args=({**job, **changes}, log))
        self.processes[party].start()

    def wait(self, party: str, timeout: float = 90) -> int:
        """Return a party's exit status, as `subprocess` gives it."""
        process = self.processes[party]
        process.join(timeout)
        assert process.exitcode is not None, f"{party} still runs after {timeout} s\n{self.logs()}"
        return process.exitcode

    def wait_all(self, timeout: float = 90) -> dict[str, int]:
        """Return all exit statuses."""
        end = time.monotonic() + timeout
        return {party: self.wait(party, max(1, end - time.monotonic())) for party in self.processes}

    def kill(self, party: str) -> None:
        """Kill a party with SIGKILL and forget it."""
        process = self.processes.pop(party)
        process.kill()
        process.join()

    def log(self, party: str) -> str:
        """Return what a party printed."""
        path = self.folder / f"{party}.log"
        return path.read_text() if path.exists() else ""

    def logs(self) -> str:
        """Return the ends of all logs, for a failing assertion."""
        return "\n".join(f"--- {party}\n{self.log(party)[-2500:]}" for party in self.processes)

    def events(self, party: str, name: str) -> list[dict[str, Any]]:
        """Return a party's events of one name."""
        rows = [json.loads(line) for line in self.log(party).splitlines() if line.startswith("{")]
        return [row for row in rows if row["event"] == name]

    def wait_event(self, party: str, name: str, *, count: int = 1, timeout: float = 60) -> list[dict[str, Any]]:
        """Wait until a party has shown an event."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            found = self.events(party, name)
            if len(found) >= count:
                return found
            time.sleep(0.02)
        raise AssertionError(f"{party} showed no {name!r} within {timeout} s\n{self.logs()}")

    def results(self) -> dict[str, dict[str, Any]]:
        """Return what each party wrote."""
        return {party: json.loads((self.folder / f"{party}.json").read_text()) for party in self.parties}


@contextmanager
def cluster(case: str, folder: Path, **settings: Any) -> Iterator[Cluster]:
    """Make a cluster; kill what is left of it at the end."""
    made = Cluster(case, folder, **settings)
    try:
        yield made
    finally:
        for process in made.processes.values():
            process.kill()
            process.join()


def in_process(case: str, training: Mapping[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """Run the same parties in this process; return what `Cluster.results` gives."""
    made = plans.CASES[case](**dict(training or {}))
    result = cl.simulate(made.plan, made.parties())
    return {
        party: {
            "sha256": hashlib.sha256(safetensors.torch.save(weights(worker.site))).hexdigest(),
            "ledger": json.loads(json.dumps(result.ledgers[party].document())),
            "history": [row for row in result.history if row["party"] == party],
        }
        for party, worker in result.workers.items()
    }


def flows(document: Mapping[str, Any]) -> list[Any]:
    """Return a ledger's flows without what depends on the session's number."""
    return sorted(
        [f["way"], f["peer"], f["mode"], f["direction"], f["edge"], f["payload"], f["messages"]]
        for f in document["ledger"]["flows"]
    )
