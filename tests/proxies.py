"""A real HTTP proxy (Debian's tinyproxy) on loopback, and proxies that misbehave."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def need_tinyproxy() -> str:
    """Return the program; without it, skip the test, but never in CI."""
    program = shutil.which("tinyproxy")
    if program is None:
        reason = "tinyproxy is not installed (Debian: apt-get install tinyproxy-bin)"
        if os.environ.get("CI") == "true":
            pytest.fail(f"{reason}; .ci/run installs it")
        pytest.skip(reason)
    return program


@dataclass
class RealProxy:
    """A running tinyproxy: where it is, and what it has logged."""

    port: int
    log: Path

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def connects(self) -> list[str]:
        """Return the targets of the CONNECT requests that it has granted or tried."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line.split("CONNECT ", 2)[2].split(" ")[0] for line in lines if ": CONNECT " in line]


@contextlib.contextmanager
def real_proxy(folder: Path, *lines: str, port: int = 0) -> Iterator[RealProxy]:
    """Run tinyproxy with further lines of configuration, such as `BasicAuth user word` or `ConnectPort 9`."""
    program = need_tinyproxy()
    port = port or free_port()
    proxy = RealProxy(port, folder / f"tinyproxy-{port}.log")
    settings = [f"Port {port}", "Listen 127.0.0.1", "Timeout 60", "MaxClients 50", "LogLevel Connect"]
    path = folder / f"tinyproxy-{port}.conf"
    path.write_text("\n".join([*settings, f'LogFile "{proxy.log}"', *lines, ""]))
    process = subprocess.Popen(
        [program, "-d", "-c", str(path)], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 20
        while True:
            assert process.poll() is None, "tinyproxy has ended"
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield proxy
    finally:
        process.terminate()
        process.wait(10)


@contextlib.contextmanager
def answering(answer: bytes | None, *, hold: bool = False) -> Iterator[int]:
    """A server that reads a request and sends `answer`, again and again; None says nothing and holds the line."""
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        lines: list[socket.socket] = []

        def serve() -> None:
            while not stop.is_set():
                with contextlib.suppress(TimeoutError):
                    line, _ = server.accept()
                    lines.append(line)
                    line.settimeout(5)
                    if answer is not None:
                        with contextlib.suppress(OSError):
                            line.recv(65536)
                            line.sendall(answer)
                        if not hold:
                            line.close()

        thread = threading.Thread(target=serve, name="answering")
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            stop.set()
            thread.join(10)
            for line in lines:
                line.close()
