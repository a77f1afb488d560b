"""How often a party dials while nobody answers, and what of it reaches a terminal."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest

from cutlayer.transport.grpc_dialer import Dialer, pause
from cutlayer.transport.settings import Deadlines, Rhythm
from tests.transport.parties import Cast

CALL = """
import sys
import cutlayer.transport.grpc_common
import grpc
channel = grpc.secure_channel(sys.argv[1], grpc.ssl_channel_credentials())
try:
    next(channel.stream_stream("/a/b")(iter([b"x"]), timeout=10))
except grpc.RpcError as error:
    print(error.code().name)
"""


def test_pauses_double_up_to_a_bound():
    assert [pause(failures, 10.0) for failures in range(8)] == [0.1, 0.5, 1, 2, 4, 8, 10, 10]
    assert pause(10**6, 10.0) == 10
    assert pause(0, 0.05) == 0.05


class Clock(threading.Event):
    """Stands for the event that ends the dialling: notes the pauses instead of waiting, and ends after a time."""

    def __init__(self, end: float) -> None:
        super().__init__()
        self.end, self.pauses = end, []

    def wait(self, timeout: float | None = None) -> bool:
        self.pauses.append(timeout or 0.0)
        if sum(self.pauses) > self.end:
            self.set()
        return self.is_set()


@pytest.mark.parametrize(("join", "patience", "longest"), [(120, 600, 10), (120, 30, 5), (12, 60, 2)])
def test_a_party_dials_seldom_while_nobody_answers(
    cast: Cast, monkeypatch: pytest.MonkeyPatch, join: float, patience: float, longest: float
):
    clock = Clock(end=600)
    monkeypatch.setattr(Dialer, "_attempt", lambda _: (False, None))
    settings = replace(cast.settings("clinic"), rhythm=Rhythm(), deadlines=Deadlines(join=join, patience=patience))
    steward = SimpleNamespace(peers={"server": None}, failure=None)
    dialer = Dialer(SimpleNamespace(settings=settings, steward=steward), "server")  # type: ignore[arg-type]
    dialer._stop = clock
    dialer._run()
    assert all(most / 2 <= seconds <= most for seconds, most in zip(clock.pauses, [0.5, 1, 2], strict=False))
    late = clock.pauses[6:]
    assert longest / 2 <= min(late) < max(late) <= longest
    assert len(set(late)) > len(late) / 2  # parties that lost the same server do not come back at one moment
    assert 600 / longest < len(clock.pauses) < 600 / longest * 2 + 6


@pytest.fixture
def no_tls() -> Iterator[str]:
    """Give the address of a server that answers a TLS handshake with something else."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            while True:
                try:
                    one, _ = server.accept()
                except OSError:
                    return
                with one:
                    one.recv(1000)
                    one.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)


def called(address: str, **more: str) -> tuple[str, str]:
    own = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}
    words = [sys.executable, "-c", CALL, address]
    done = subprocess.run(words, check=True, capture_output=True, text=True, timeout=60, env={**own, **more})
    return done.stdout, done.stderr


def test_what_grpc_logs_does_not_reach_the_terminal_unless_asked_for(no_tls: str):
    assert called(no_tls) == ("UNAVAILABLE\n", "")
    out, err = called(no_tls, GRPC_VERBOSITY="INFO")
    assert out == "UNAVAILABLE\n"
    assert "Handshake failed" in err
