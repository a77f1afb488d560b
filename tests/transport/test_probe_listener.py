"""Listening before a run: who comes is told of, strangers are turned away with the reason, and all of it ends."""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
import trustme

from cutlayer.errors import CertificateError, LinkError
from cutlayer.transport import probe_listener
from cutlayer.transport.contact import Target, contact
from cutlayer.transport.grpc_common import METHOD, SERVICE, channel_to
from cutlayer.transport.pki import create_authority, issue
from cutlayer.transport.probe import measure
from cutlayer.transport.probe_listener import ProbeListener, Visit
from cutlayer.transport.tls import Credentials, context_of, load_credentials
from tests.proxies import free_port

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("no_thread_stays")]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Credentials]:
    folder = tmp_path_factory.mktemp("listener")
    authority = create_authority(folder / "ca", name="study")
    return {name: load_credentials(issue(authority, name, folder), name) for name in ("server", "clinic", "guest")}


class Place:
    """A listener, where it is, and who came."""

    def __init__(self, credentials: Credentials) -> None:
        self.port = free_port()
        self.visits: list[Visit] = []
        self.listener = ProbeListener(
            f"127.0.0.1:{self.port}", credentials, digest="d", parties=("server", "clinic"), visited=self.visits.append
        )

    @property
    def target(self) -> Target:
        return Target(party="server", host="127.0.0.1", port=self.port)

    def told(self, count: int = 1) -> list[tuple[str, str, str]]:
        """Wait for so many visits and return (result, name, text) of each."""
        deadline = time.monotonic() + 20
        while len(self.visits) < count and time.monotonic() < deadline:
            time.sleep(0.01)
        assert all(visit.address.startswith("127.0.0.1:") for visit in self.visits)
        return [(visit.result, visit.name, visit.text) for visit in self.visits]


@pytest.fixture
def place(own: dict[str, Credentials]) -> Iterator[Place]:
    made = Place(own["server"])
    with made.listener:
        yield made


def test_a_party_measures_and_both_are_told(place: Place, own: dict[str, Credentials]):
    found = measure(place.target, own["clinic"], digest="d", seconds=10)
    assert (found.plan, found.protocol_same) == ("same", True)
    assert 0 < found.round_trip < 5
    (measured,) = place.told()
    assert measured[:2] == ("measured", "clinic")
    assert re.fullmatch(r"it has measured its way here, [0-9,]+ bytes back", measured[2])


def test_each_visit_is_told_as_it_ends(place: Place, own: dict[str, Credentials]):
    for count in (1, 2):
        measure(place.target, own["clinic"], digest="d", seconds=10)
        assert place.told(count)[-1][:2] == ("measured", "clinic")
    with (
        socket.create_connection(("127.0.0.1", place.port), 10) as line,
        context_of(own["clinic"], "test").wrap_socket(line, server_hostname="server") as stream,
    ):
        assert stream.recv(1)  # the server inside greets: the connection is through
        assert len(place.visits) == 2
    assert place.told(3)[-1] == ("accepted", "clinic", "its certificate is good")


def test_a_name_that_the_contract_does_not_have(place: Place, own: dict[str, Credentials]):
    assert [step.error for step in contact(place.target, own["guest"], each=5)][-1] is None
    assert place.told() == [("accepted", "guest", "its certificate is good, but it is no party of the contract")]


def test_who_comes_for_the_run_is_asked_to_come_again(place: Place, own: dict[str, Credentials]):
    channel = channel_to("server", f"127.0.0.1:{place.port}", own["clinic"])
    with channel:
        for _ in range(2):
            with pytest.raises(grpc.RpcError) as caught:
                next(channel.stream_stream(f"/{SERVICE}/{METHOD}")(iter([b"hello"]), timeout=20))
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE  # which a run tries again
            assert "the run has not begun" in caught.value.details()
        came = ("accepted", "clinic", "its certificate is good; it came for the run, which has not begun")
        assert place.told() == [came]
    place.listener.__exit__(None, None, None)
    assert place.told() == [came]  # once for a connection


def until_closed(line: socket.socket) -> None:
    """Read until the other side has closed the line, in good order or not."""
    line.settimeout(10)
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        while line.recv(100):
            continue


def knock(port: int, said: bytes) -> None:
    with socket.create_connection(("127.0.0.1", port), 10) as line:
        if said:
            line.sendall(said)
            until_closed(line)


def speak(port: int, context: ssl.SSLContext) -> None:
    with (
        socket.create_connection(("127.0.0.1", port), 10) as line,
        contextlib.suppress(ConnectionError, ssl.SSLError),
        context.wrap_socket(line, server_hostname="server") as stream,
    ):
        until_closed(stream)


def without_certificate(port: int) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    speak(port, context)


@pytest.mark.parametrize(
    ("guest", "text"),
    [
        (lambda port: knock(port, b""), "it left without a word, as port checks do"),
        (lambda port: knock(port, b"GET / HTTP/1.1\r\n\r\n"), "it speaks no TLS"),
        (
            lambda port: knock(port, b"\x16\x03\x01\x00\x05hello"),
            "WRONG_VERSION|UNSUPPORTED|BAD|UNEXPECTED|RECORD|LENGTH",
        ),
        (without_certificate, "it shows no certificate"),
    ],
    ids=["port check", "browser", "no hello", "no certificate"],
)
def test_strangers_are_turned_away_with_the_reason(place: Place, guest: Callable[[int], None], text: str):
    guest(place.port)
    ((result, name, seen),) = place.told()
    assert (result, name) == ("refused", "")
    assert seen.isprintable()
    assert any(part in seen.upper() for part in text.upper().split("|")), seen


def test_a_client_without_http_2(place: Place, own: dict[str, Credentials]):
    context = context_of(own["clinic"], "test")
    context.set_alpn_protocols(["http/1.1"])
    speak(place.port, context)
    assert place.told() == [("refused", "", "it has no HTTP/2")]


def test_the_reason_that_a_refused_party_is_sent_for_is_here(tmp_path: Path):
    """A run's server cannot tell it: gRPC says nothing. So E668 names this listener."""
    authority = create_authority(tmp_path / "ca", name="study")
    server = load_credentials(issue(authority, "server", tmp_path), "server")
    later = issue(authority, "clinic", tmp_path, now=datetime.now(UTC) + timedelta(days=9))
    place = Place(server)
    with place.listener:
        *_, last = contact(place.target, load_credentials(later, "clinic"), each=5)
        assert last.error is not None
        assert last.error.code == "E668"
        assert "`cutlayer doctor CONTRACT --party FILE --serve` at the server" in last.error.remedy
        assert place.told() == [("refused", "", "its certificate: certificate is not yet valid")]


def test_two_names_could_be_two_parties(own: dict[str, Credentials]):
    authority = trustme.CA()
    made = {}
    for names in (("server",), ("clinic", "guest")):
        leaf = authority.issue_cert(*names)
        made[names[0]] = Credentials(
            party=names[0],
            certificate=b"".join(blob.bytes() for blob in leaf.cert_chain_pems),
            private_key=leaf.private_key_pem.bytes(),
            authority=authority.cert_pem.bytes(),
        )
    place = Place(made["server"])
    with place.listener:
        last = list(contact(place.target, made["clinic"], each=5))[-1]
        assert last.error is not None
        assert last.error.code == "E668"
        assert place.told() == [("refused", "", "its certificate names clinic, guest")]


def test_more_than_there_is_room_for_are_turned_away(own: dict[str, Credentials], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(probe_listener, "_CONNECTIONS", 2)
    monkeypatch.setattr(probe_listener, "_HANDSHAKE", 1.0)
    place = Place(own["server"])
    with place.listener, ExitStack() as lines:
        for _ in range(2):
            lines.enter_context(socket.create_connection(("127.0.0.1", place.port), 10))
        time.sleep(0.3)
        with socket.create_connection(("127.0.0.1", place.port), 10) as third:
            third.settimeout(10)
            assert third.recv(1) == b""
        place.told(2)  # the two that said nothing are given up after a second
        assert [step.error for step in contact(place.target, own["clinic"], each=5)][-1] is None


def test_it_ends_while_somebody_is_there(own: dict[str, Credentials]):
    place = Place(own["server"])
    with place.listener, ExitStack() as lines:
        line = lines.enter_context(socket.create_connection(("127.0.0.1", place.port), 10))
        stream = lines.enter_context(context_of(own["clinic"], "test").wrap_socket(line, server_hostname="server"))
        stream.settimeout(10)
        assert stream.recv(1)  # of the server inside: the connection is through
        begin = time.monotonic()
        place.listener.__exit__(None, None, None)
        assert time.monotonic() - begin < 5
    with socket.create_server(("127.0.0.1", place.port)):
        pass


@pytest.mark.provokes("E604")
def test_an_address_that_is_taken(own: dict[str, Credentials]):
    place = Place(own["server"])
    with (
        socket.create_server(("127.0.0.1", place.port)),
        pytest.raises(LinkError, match=r"E604.*cannot listen at its address.*in use.*stop what else uses the port"),
        place.listener,
    ):
        pass


@pytest.mark.provokes("E663")
def test_certificates_that_cannot_be_used(own: dict[str, Credentials]):
    mixed = Credentials(
        party="server",
        certificate=own["server"].certificate,
        private_key=own["clinic"].private_key,
        authority=own["server"].authority,
    )
    with pytest.raises(CertificateError, match=r"E663.*does not belong to the certificate"):
        Place(mixed)
