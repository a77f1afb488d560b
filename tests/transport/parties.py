"""Parties in threads or processes of their own, certificates for them, and a cable that can be cut."""

from __future__ import annotations

import selectors
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from cutlayer.core.program import Tag
from cutlayer.engine.wire import Frame
from cutlayer.transport.network import Deadlines, Network, NetworkSettings, Ready
from cutlayer.transport.pki import create_authority, issue
from cutlayer.transport.settings import Rhythm
from cutlayer.transport.tls import Credentials, load_credentials

QUICK = Deadlines(join=8, patience=6, receive=10, send=10, close=4)
FAST = Rhythm(hello=3, heartbeat=0.5, silence=3, idle_ack=0.02, retry=0.3)
NAMES = ("server", "clinic", "lab")


class Everything:
    """An allow-list that allows all, and notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Tag]] = []

    def check(self, source: str, tag: Tag, dtype: str, shape: tuple[int, ...]) -> None:
        self.asked.append((source, tag))


def tag_of(session: int, step: int, micro: int = 0) -> Tag:
    return Tag(session, "train", 0, step, 0, 0, micro, "up")


def frame_of(session: int, step: int, payload: Any, micro: int = 0) -> Frame:
    return Frame(tag_of(session, step, micro), "uint8", (memoryview(payload).nbytes,), payload)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Cast:
    """Settings of parties that know each other, and threads to run them in."""

    folder: Path
    names: tuple[str, ...] = NAMES
    addressed: tuple[str, ...] = ("server",)
    addresses: dict[str, str] = field(default_factory=dict)
    credentials: dict[str, Credentials] = field(default_factory=dict)
    events: dict[str, list[tuple[str, dict[str, object]]]] = field(default_factory=dict)

    def settings(self, party: str, **changes: Any) -> NetworkSettings:
        for name in self.addressed:
            self.addresses.setdefault(name, f"127.0.0.1:{free_port()}")
        values = {
            "party": party,
            "parties": self.names,
            "coordinator": "server",
            "addresses": self.addresses,
            "run": "test",
            "digest": "0123456789abcdef" * 4,
            "credentials": self.credentials.get(party),
            "deadlines": QUICK,
            "rhythm": FAST,
        }
        return NetworkSettings(**{**values, **changes})

    def certify(self, since: datetime | None = None) -> None:
        """Give all parties certificates of one authority, new or there since some day."""
        authority = create_authority(self.folder / "ca", name="study", now=since)
        for name in self.names:
            issue(authority, name, self.folder)
            self.credentials[name] = load_credentials(self.folder / name, name)

    def network(self, party: str, **changes: Any) -> Network:
        heard = self.events.setdefault(party, [])
        return Network(self.settings(party, **changes), lambda name, facts: heard.append((name, dict(facts))))

    def heard(self, party: str, event: str) -> list[dict[str, object]]:
        return [facts for name, facts in self.events.get(party, []) if name == event]

    def play(self, parts: Mapping[str, Callable[[Network], Any]], **changes: Any) -> dict[str, Any]:
        """Run each party's part in a thread; return what each returned, or the error that ended it."""
        results: dict[str, Any] = {}
        own = {party: changes.pop(f"{party}_", {}) for party in parts}
        for party in parts:
            self.settings(party)

        def run(party: str) -> None:
            try:
                with self.network(party, **{**changes, **own[party]}) as network:
                    results[party] = parts[party](network)
            except Exception as error:
                results[party] = error

        threads = [threading.Thread(target=run, args=(party,), name=f"part-{party}") for party in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads), "a party hangs"
        return results


def meet(network: Network, bounds: Mapping[str, int] | None = None, counts: Mapping[str, int] | None = None) -> int:
    """Go through rendezvous and open; return the session."""
    start = network.rendezvous(Ready(counts or {"train": 1}, ()))
    network.open(Everything(), bounds if bounds is not None else dict.fromkeys(NAMES, 100))  # type: ignore[arg-type]
    return start.session


class Cable:
    """A TCP proxy: what connects to `address` reaches `target`, unless the cable is cut."""

    def __init__(self, target: str) -> None:
        host, port = target.rsplit(":", 1)
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.cut_after: int | None = None
        self.passed = 0
        self.held = False
        self._pairs: dict[socket.socket, socket.socket] = {}
        self._selector = selectors.DefaultSelector()
        self._lock = threading.Lock()
        self._whole, self._stop = True, False
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="cable")
        self._thread.start()

    def cut(self) -> None:
        """Reset all connections, and refuse new ones."""
        with self._lock:
            self._whole = False
            self._drop_all()

    def restore(self) -> None:
        with self._lock:
            self._whole, self.cut_after = True, None

    def close(self) -> None:
        self._stop = True
        self._thread.join()
        self._drop_all()
        self._selector.close()
        self._listener.close()

    def _drop_all(self) -> None:
        for one in list(self._pairs):
            self._drop(one)

    def _drop(self, one: socket.socket) -> None:
        other = self._pairs.pop(one, None)
        if other is None:
            return
        self._pairs.pop(other, None)
        for end in (one, other):
            self._selector.unregister(end)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")  # reset
            end.close()

    def _accept(self) -> None:
        inside, _ = self._listener.accept()
        if not self._whole:
            inside.close()
            return
        try:
            outside = socket.create_connection(self._target, 1)
        except OSError:
            inside.close()
            return
        for one, other in ((inside, outside), (outside, inside)):
            self._pairs[one] = other
            self._selector.register(one, selectors.EVENT_READ)

    def _run(self) -> None:
        while not self._stop:
            if self.held:
                time.sleep(0.02)
                continue
            ready = self._selector.select(0.02)
            with self._lock:
                for key, _ in ready:
                    if key.fileobj is self._listener:
                        self._accept()
                    elif key.fileobj in self._pairs:
                        self._pass(key.fileobj)

    def _pass(self, one: Any) -> None:
        try:
            data = one.recv(65536)
            if not data:
                self._drop(one)
                return
            self._pairs[one].sendall(data)
        except OSError:
            self._drop(one)
            return
        self.passed += len(data)
        if self.cut_after is not None and self.passed > self.cut_after:
            self._whole = False
            self._drop_all()


@dataclass
class Process:
    """A party as a process of its own; it prints one JSON object a line."""

    process: subprocess.Popen[str]
    lines: list[dict[str, Any]] = field(default_factory=list)
    reader: threading.Thread | None = None

    def wait_for(self, what: str, seconds: float = 30, count: int = 1) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            found = [line for line in list(self.lines) if line["what"] == what]
            if len(found) >= count:
                return found[count - 1]
            time.sleep(0.01)
        raise AssertionError(f"{what} not said; {self.lines[-40:]}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)

    def end(self, seconds: float = 30) -> int:
        code = self.process.wait(seconds)
        assert self.reader is not None
        self.reader.join(5)
        return code
