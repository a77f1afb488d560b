"""Proxies that refuse, fail or are none: each has its code, its remedy and its end, and no password is shown."""

from __future__ import annotations

import socket
import time
import traceback
from pathlib import Path

import pytest

from cutlayer.errors import LinkError
from cutlayer.transport.proxy import Proxy, find_proxy
from cutlayer.transport.reach import OF_PROXIES, REFUSALS, ask_proxy, reach_proxy
from tests.proxies import answering, free_port, real_proxy

PLENTY = 20.0
SECRET = "s3cr3t-W0rd"
HEAD = b"HTTP/1.1 "


def proxy_at(port: int, user: str = "") -> Proxy:
    found = find_proxy(f"http://{user}127.0.0.1:{port}", "server.example", 1)
    assert found is not None
    return found


def ask(proxy: Proxy, server: tuple[str, int] = ("127.0.0.1", 9), seconds: float = PLENTY) -> LinkError | None:
    """Return why the proxy gives no connection; None if it does."""
    deadline, error = time.monotonic() + seconds, None
    try:
        with reach_proxy(proxy, deadline, "party clinic") as plain:
            ask_proxy(plain, proxy, server, deadline, "party clinic")
    except LinkError as met:
        error = met
    if error is not None:
        assert error.code in OF_PROXIES
        assert error.remedy
        assert f"proxy 127.0.0.1:{proxy.port} of [network] proxy" in error.where
        assert SECRET not in "".join(traceback.format_exception(error))
    return error


@pytest.fixture
def echo():
    """A server behind the proxy that says a word at once."""
    with answering(b"hello") as port:
        yield port


# --- the real proxy ------------------------------------------------------------------------------------------------


def test_it_connects_and_reads_nothing_of_the_servers_words(tmp_path: Path, echo: int):
    with real_proxy(tmp_path, f"ConnectPort {echo}") as real:
        proxy, deadline = proxy_at(real.port), time.monotonic() + PLENTY
        with reach_proxy(proxy, deadline, "") as plain:
            ask_proxy(plain, proxy, ("127.0.0.1", echo), deadline, "")
            plain.sendall(b"x")
            assert plain.recv(100) == b"hello"
        assert real.connects() == [f"127.0.0.1:{echo}"]


@pytest.mark.provokes("E607")
def test_a_user_is_asked_for(tmp_path: Path, echo: int):
    with real_proxy(tmp_path, f"ConnectPort {echo}", f"BasicAuth doctor {SECRET}") as real:
        server = ("127.0.0.1", echo)
        missing = ask(proxy_at(real.port), server)
        wrong = ask(proxy_at(real.port, f"doctor:{SECRET}-but-not-quite@"), server)
        assert ask(proxy_at(real.port, f"doctor:{SECRET}@"), server) is None
    assert missing is not None
    assert wrong is not None
    for error, tried in ((missing, "none given"), (wrong, "those given are refused")):
        assert (error.code, error.what) == ("E607", "the proxy wants a user and a password")
        assert error.got.startswith("407 " if error is missing else "401 ")
        assert tried in error.got
        assert 'proxy = "http://user:password@host:port"' in error.remedy


@pytest.mark.provokes("E608")
def test_it_refuses_the_port(tmp_path: Path):
    with real_proxy(tmp_path, "ConnectPort 9") as real:
        error = ask(proxy_at(real.port), ("127.0.0.1", free_port()))
    assert error is not None
    assert (error.code, error.what) == ("E608", "the proxy refuses to connect to the server")
    assert error.got.startswith("403 ")
    assert "Ask your network's people to allow CONNECT" in error.remedy


def test_it_cannot_reach_the_server(tmp_path: Path):
    with real_proxy(tmp_path) as real:
        for server in (("127.0.0.1", free_port()), ("no-such-host.invalid", 443)):
            error = ask(proxy_at(real.port), server)
            assert error is not None
            assert (error.code, error.what) == ("E609", "the proxy cannot connect to the server")
            assert error.got.startswith("500 ")


# --- others ----------------------------------------------------------------------------------------------------------


def test_nobody_is_there():
    error = ask(proxy_at(free_port()))
    assert error is not None
    assert (error.code, error.got) == ("E606", "Connection refused")
    unknown = find_proxy("http://no-such-proxy.invalid:1", "server.example", 1)
    assert unknown is not None
    with pytest.raises(LinkError, match="E606") as caught:
        reach_proxy(unknown, time.monotonic() + PLENTY, "")
    assert "no-such-proxy.invalid" in caught.value.where


def test_a_connection_to_the_proxy_that_is_never_made(monkeypatch: pytest.MonkeyPatch):
    def connect(*_):
        raise TimeoutError

    monkeypatch.setattr(socket.socket, "connect", connect)
    error = ask(proxy_at(9))
    assert error is not None
    assert (error.code, error.got) == ("E606", "no answer in time")


def test_a_proxy_that_never_answers():
    with answering(None) as port:
        begin = time.monotonic()
        error = ask(proxy_at(port), seconds=0.3)
        assert time.monotonic() - begin < 5
    assert error is not None
    assert (error.code, error.got) == ("E609", "no answer in time")


@pytest.mark.parametrize(
    ("answer", "code", "got"),
    [
        (HEAD + b"200 OK\r\n\r\n", None, ""),
        (b"HTTP/1.0 200\r\nVia: x\r\n\r\n", None, ""),
        (HEAD + b"204 Fine\r\n\r\n", None, ""),
        (HEAD + b"302 Found\r\nLocation: http://portal\r\n\r\n", "E608", "302 Found"),
        (HEAD + b"451 \x1b[31mred\r\n\r\n", "E608", "451 ?[31mred"),
        (HEAD + b"503 Service Unavailable\r\n\r\n", "E609", "503 Service Unavailable"),
        (
            HEAD + b"407 Who\r\nProxy-Authenticate: Negotiate\r\nproxy-authenticate: NTLM\r\n\r\n",
            "E607",
            "Negotiate, NTLM",
        ),
        (HEAD + b"200 OK\r\n", "E610", "no answer to HTTP CONNECT"),
        (HEAD + b"20 OK\r\n\r\n", "E610", "no answer to HTTP CONNECT"),
        (b"SSH-2.0-server\r\n", "E610", "no answer to HTTP CONNECT"),
        (b"", "E610", "a closed connection"),
        (HEAD + b"200 OK\r\nA: " + b"a" * 20_000 + b"\r\n\r\n", "E610", "no answer to HTTP CONNECT"),
    ],
    ids=range(12),
)
def test_answers(answer: bytes, code: str | None, got: str):
    with answering(answer) as port:
        error = ask(proxy_at(port, f"user:{SECRET}@"))
    assert (error.code if error else None) == code
    assert error is None or got in error.got


@pytest.mark.provokes("E607")
def test_a_proxy_without_basic_authentication_has_another_remedy():
    with answering(HEAD + b"407 Who\r\nProxy-Authenticate: NTLM\r\n\r\n") as port:
        error = ask(proxy_at(port))
    assert error is not None
    assert error.remedy.startswith("Only basic authentication is known here")


def test_an_address_of_six_is_written_with_brackets():
    asked: list[bytes] = []
    near, far = socket.socketpair()
    with near, far:
        far.sendall(HEAD + b"200 OK\r\n\r\nthe rest")
        ask_proxy(near, proxy_at(1, "me:x@"), ("fd00::1", 7443), time.monotonic() + PLENTY, "")
        asked += far.recv(4096).split(b"\r\n")
        assert near.recv(100) == b"the rest"
    assert asked[:2] == [b"CONNECT [fd00::1]:7443 HTTP/1.1", b"Host: [fd00::1]:7443"]
    assert asked[2].startswith(b"Proxy-Authorization: Basic ")
    assert asked[3:] == [b"", b""]


def test_refusals_are_those_that_do_not_pass_by_themselves():
    assert OF_PROXIES - {"E606", "E609"} == REFUSALS
