"""Links that fail are explained, step by step, against real servers."""

import contextlib
import dataclasses
import errno
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
import trustme

from cutlayer.errors import CertificateError, DeadlineError, HandshakeError, LinkError
from cutlayer.transport import contact as contact_module
from cutlayer.transport.contact import Target
from cutlayer.transport.pki import create_authority, describe, issue
from cutlayer.transport.tls import Credentials, check_credentials, load_credentials

PLENTY = 20.0  # seconds; nothing below comes near


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pki")


@dataclasses.dataclass(frozen=True)
class Site:
    """Parties of one authority with the clock's dates, and one whose certificate has expired."""

    server: Credentials
    client: Credentials
    expired: Credentials
    authority: Path


@pytest.fixture(scope="module")
def site(folder: Path) -> Site:
    made = create_authority(folder / "live", name="live", now=datetime.now(UTC) - timedelta(days=100))
    start = datetime.now(UTC) - timedelta(days=50)
    issue(made, "expired", folder / "live", days=2, now=start)
    for party in ("server", "client"):
        issue(made, party, folder / "live")
    parties = {party: load_credentials(folder / "live" / party, party) for party in ("server", "client", "expired")}
    return Site(authority=made, **parties)


@contextlib.contextmanager
def grpc_server(credentials: Credentials) -> Iterator[int]:
    pool = ThreadPoolExecutor(1)
    server = grpc.server(pool)
    pair = (credentials.private_key, credentials.certificate)
    port = server.add_secure_port(
        "127.0.0.1:0",
        grpc.ssl_server_credentials([pair], root_certificates=credentials.authority, require_client_auth=True),
    )
    server.start()
    try:
        yield port
    finally:
        server.stop(None).wait(10)
        pool.shutdown()


@pytest.fixture(scope="module")
def port(site: Site) -> Iterator[int]:
    with grpc_server(site.server) as port:
        yield port


@contextlib.contextmanager
def listener(answer: Callable[[socket.socket], None] | None) -> Iterator[int]:
    """A server of one connection: `answer` has it; None never accepts."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(PLENTY)

        def serve() -> None:
            plain, _ = server.accept()
            with plain:
                plain.settimeout(PLENTY)
                answer(plain)

        thread = threading.Thread(target=serve) if answer else None
        if thread:
            thread.start()
        yield server.getsockname()[1]
        if thread:
            thread.join(PLENTY)
            assert not thread.is_alive()


def diagnose(port: int, credentials: Credentials, name: str = "server", timeout: float = PLENTY):
    return diagnose_at("127.0.0.1", port, credentials, name, timeout)


def diagnose_at(host: str, port: int, credentials: Credentials, name: str, timeout: float):
    return contact_module.diagnose(Target(party=name, host=host, port=port), credentials, "client", timeout)


def test_nothing_is_wrong(site: Site, port: int):
    assert diagnose(port, site.client) is None
    assert diagnose_at("localhost", port, site.client, "server", PLENTY) is None


def test_nothing_is_wrong_with_certificates_of_another_maker():
    ca = trustme.CA()
    made = {}
    for party in ("server", "client"):
        leaf = ca.issue_cert(party)
        chain = b"".join(blob.bytes() for blob in leaf.cert_chain_pems)
        made[party] = Credentials(
            party=party, certificate=chain, private_key=leaf.private_key_pem.bytes(), authority=ca.cert_pem.bytes()
        )
        check_credentials(made[party], now=datetime.now(UTC))
    with grpc_server(made["server"]) as port:
        assert diagnose(port, made["client"]) is None


@pytest.mark.provokes("E601")
def test_nobody_listens(site: Site):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    error = diagnose(port, site.client)
    assert isinstance(error, LinkError)
    assert str(error).startswith(
        f"[E601] nobody listens at the server's address (party client, server server at 127.0.0.1:{port})"
    )
    assert "Connection refused" in error.got


@pytest.mark.provokes("E668")
def test_our_certificate_has_expired(site: Site, port: int):
    error = diagnose(port, site.expired)
    assert isinstance(error, CertificateError)
    assert (error.code, error.what) == ("E668", "the server does not accept our certificate")
    assert "ours names expired, issuer CN=live, valid " in error.got


def test_our_certificate_is_not_valid_yet(site: Site, port: int, tmp_path: Path):
    made = issue(site.authority, "a", tmp_path, now=datetime.now(UTC) + timedelta(days=9))
    assert diagnose(port, load_credentials(made, "a")).code == "E668"


def test_our_certificate_is_of_a_foreign_authority(site: Site, port: int, tmp_path: Path):
    foreign = load_credentials(issue(create_authority(tmp_path, name="foreign"), "client", tmp_path), "client")
    error = diagnose(port, dataclasses.replace(foreign, authority=site.client.authority))
    assert (type(error), error.code) == (CertificateError, "E668")
    assert "issuer CN=foreign" in error.got
    assert "ca.pem" in error.remedy


def test_the_server_is_of_a_foreign_authority(site: Site, port: int, tmp_path: Path):
    foreign = load_credentials(issue(create_authority(tmp_path, name="foreign"), "client", tmp_path), "client")
    error = diagnose(port, foreign)
    assert (type(error), error.code) == (CertificateError, "E667")
    assert error.what == "the server's certificate is of another authority"
    assert error.expected == "one signed by CN=foreign, the authority (ca.pem) that this party has"
    assert error.got == "issuer CN=live, made for server"
    assert "`cutlayer pki issue server`" in error.remedy


@pytest.mark.provokes("E667")
def test_the_server_has_another_name(site: Site, port: int):
    error = diagnose(port, site.client, "archive")
    assert (type(error), error.code, error.got) == (CertificateError, "E667", "one made for server")
    assert (error.what, error.expected) == (
        "the server's certificate is made for another name",
        "a certificate made for archive",
    )
    assert "`cutlayer pki issue archive`" in error.remedy


def test_the_server_has_expired(site: Site):
    with grpc_server(site.expired) as port:
        error = diagnose(port, site.client, "expired")
    end = describe(site.authority.parent / "live" / "expired" / "party.pem").not_after
    assert (type(error), error.code, error.what) == (CertificateError, "E667", "the server's certificate has expired")
    assert error.got == f"one valid until {end:%Y-%m-%d %H:%M} UTC"
    assert error.expected.startswith(f"a certificate in date now, {datetime.now(UTC):%Y-%m-%d}")
    assert "renew it with `cutlayer pki issue expired`" in error.remedy


def test_the_server_is_not_valid_yet(site: Site, tmp_path: Path):
    start = datetime.now(UTC) + timedelta(days=9)
    early = load_credentials(issue(site.authority, "early", tmp_path, now=start), "early")
    with grpc_server(early) as port:
        error = diagnose(port, site.client, "early")
    assert (error.code, error.what) == ("E667", "the server's certificate is not valid yet")
    assert error.got.startswith("one valid from ")


def test_a_server_whose_certificate_cannot_be_read_again_is_refused_all_the_same(site: Site, monkeypatch):
    monkeypatch.setattr(contact_module, "shown_by", lambda *_: b"")
    with grpc_server(site.expired) as port:
        error = diagnose(port, site.client, "expired")
    assert (error.code, error.got) == ("E667", "certificate has expired")


@pytest.fixture
def open_port() -> Iterator[int]:
    """The port of a gRPC server that speaks plaintext."""
    with ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield port
        server.stop(None).wait(10)


@pytest.mark.provokes("E648")
def test_one_speaks_tls_and_the_other_plaintext(site: Site, port: int, open_port: int):
    error = diagnose(open_port, site.client)
    assert (type(error), error.code) == (HandshakeError, "E648")
    assert error.what == "this party speaks TLS and the server plaintext"
    assert error.where == f"party client, server server at 127.0.0.1:{open_port}"
    assert "`credentials`" in error.expected
    error = diagnose(port, None)
    assert (type(error), error.code) == (HandshakeError, "E648")
    assert error.what == "this party speaks plaintext and the server TLS"
    assert error.where == f"party client, server server at 127.0.0.1:{port}"
    assert "`insecure = true`" in error.expected
    assert "cutlayer pki" in error.remedy


def test_both_speak_plaintext(open_port: int):
    assert diagnose(open_port, None) is None


@pytest.mark.provokes("E646")
def test_a_web_server_without_tls_is_not_ours():
    def serve(server: socket.socket) -> None:
        for _ in range(2):
            plain, _ = server.accept()
            with plain, contextlib.suppress(OSError):
                plain.recv(1000)
                plain.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(PLENTY)
        thread = threading.Thread(target=serve, args=(server,))
        thread.start()
        error = diagnose(server.getsockname()[1], None)
        thread.join(PLENTY)
    assert (type(error), error.code, error.got) == (HandshakeError, "E646", "neither that nor TLS")
    assert error.remedy == "correct the address"


@pytest.mark.provokes("E603")
def test_a_server_that_hangs_up_on_plaintext():
    """As a load balancer does that has no server just now: it passes by itself."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(PLENTY)
        thread = threading.Thread(target=lambda: [server.accept()[0].close() for _ in range(2)])
        thread.start()
        error = diagnose(server.getsockname()[1], None)
        thread.join(PLENTY)
    assert (type(error), error.code) == (LinkError, "E603")
    assert error.what == "the server closed the connection without a word"


def test_a_server_that_says_nothing_to_plaintext():
    with listener(None) as port:
        assert diagnose(port, None, timeout=0.3).code == "E621"


def test_what_grpc_itself_says_of_the_same_failure(site: Site, port: int):
    """The reason for the probe: this is all that a gRPC client learns."""
    wrong = site.expired
    trust = grpc.ssl_channel_credentials(wrong.authority, wrong.private_key, wrong.certificate)
    options = [("grpc.ssl_target_name_override", "server")]
    with grpc.secure_channel(f"127.0.0.1:{port}", trust, options) as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/x/y")(b"", timeout=PLENTY)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "expired" not in caught.value.details()


def test_a_silent_server_meets_the_deadline(site: Site):
    with listener(None) as port:
        start = time.monotonic()
        error = diagnose(port, site.client, timeout=0.3)
        assert 0.2 < time.monotonic() - start < 5
    assert (type(error), error.code) == (DeadlineError, "E621")


def test_no_time_at_all(site: Site, port: int):
    assert diagnose(port, site.client, timeout=0).code == "E621"


@pytest.mark.provokes("E603")
def test_a_server_that_hangs_up_in_the_handshake(site: Site):
    with listener(lambda plain: plain.recv(1)) as port:
        error = diagnose(port, site.client)
    assert (type(error), error.code) == (LinkError, "E603")
    assert error.what == "the server closed the connection within the TLS handshake"


def ssl_server(site: Site, folder: Path, alpn: list[str], after: bytes | None, **settings):
    """An `ssl` server; `after` follows the handshake, None waits for the client to give up."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cadata=site.server.authority.decode())
    (folder / "server.pem").write_bytes(site.server.certificate + site.server.private_key)
    context.load_cert_chain(folder / "server.pem")
    context.set_alpn_protocols(alpn)
    for name, value in settings.items():
        setattr(context, name, value)

    def answer(plain: socket.socket) -> None:
        with contextlib.suppress(OSError), context.wrap_socket(plain, server_side=True) as stream:
            if after is None:
                while stream.recv(1000):
                    continue
            elif after:
                assert stream.recv(1000).startswith(b"PRI * HTTP/2.0")
                for byte in after:
                    stream.send(bytes([byte]))

    return answer


def test_a_web_server_is_not_ours(site: Site, tmp_path: Path):
    with listener(ssl_server(site, tmp_path, ["http/1.1"], b"")) as port:
        error = diagnose(port, site.client)
    assert (type(error), error.code, error.got) == (HandshakeError, "E641", "TLS without HTTP/2")


def test_settings_may_come_byte_by_byte_and_another_frame_is_not_settings(site: Site, tmp_path: Path):
    with listener(ssl_server(site, tmp_path, ["h2"], b"\0\0\0\4\0\0\0\0\0")) as port:
        assert diagnose(port, site.client) is None
    with listener(ssl_server(site, tmp_path, ["h2"], b"\0\0\0\7\0\0\0\0\0")) as port:
        assert diagnose(port, site.client).code == "E641"
    with listener(ssl_server(site, tmp_path, ["h2"], b"\0\0\0\4")) as port:
        assert diagnose(port, site.client).code == "E668"


def test_a_server_that_is_silent_after_the_handshake(site: Site, tmp_path: Path):
    with listener(ssl_server(site, tmp_path, ["h2"], None)) as port:
        assert diagnose(port, site.client, timeout=1.0).code == "E621"


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_an_alert_about_our_certificate_is_told_in_both_versions_of_tls(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version
):
    monkeypatch.setattr(
        contact_module, "_check_server", lambda *_: time.sleep(0.05)
    )  # the alert and the end come first
    settings = {"verify_mode": ssl.CERT_REQUIRED, "maximum_version": version}
    with listener(ssl_server(site, tmp_path, ["h2"], b"", **settings)) as port:
        error = diagnose(port, site.expired)
    assert (type(error), error.code) == (CertificateError, "E668")
    assert "ALERT_CERTIFICATE_EXPIRED" in error.got


def test_another_alert_is_the_servers(site: Site, tmp_path: Path):
    def alert(plain: socket.socket) -> None:
        plain.recv(1)
        plain.sendall(b"\x15\x03\x03\x00\x02\x02\x28")  # fatal handshake_failure
        plain.recv(10_000)

    with listener(alert) as port:
        error = diagnose(port, site.client)
    assert (type(error), error.code) == (CertificateError, "E667")
    assert "HANDSHAKE_FAILURE" in error.got


def addresses(*ports: int):
    return lambda *_, **__: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)) for port in ports]


def test_each_address_of_a_host_is_tried(site: Site, port: int, monkeypatch: pytest.MonkeyPatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        closed = free.getsockname()[1]
    monkeypatch.setattr(socket, "getaddrinfo", addresses(closed, port))
    assert diagnose_at("many", 1, site.client, "server", PLENTY) is None


@pytest.mark.provokes("E602")
@pytest.mark.parametrize(
    "error", [socket.gaierror(socket.EAI_NONAME, "Name not known"), UnicodeError("label too long")]
)
def test_a_host_without_an_address(site: Site, monkeypatch: pytest.MonkeyPatch, error: Exception):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    found = diagnose_at("nowhere", 1, site.client, "server", PLENTY)
    assert (type(found), found.code, found.what) == (LinkError, "E602", "the host name nowhere cannot be resolved")
    assert found.got in str(error)


def test_a_slow_resolver_meets_the_deadline(site: Site, monkeypatch: pytest.MonkeyPatch):
    gate = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: gate.wait(PLENTY) and [])
    start = time.monotonic()
    assert diagnose_at("slow", 1, site.client, "server", 0.2).code == "E621"
    assert time.monotonic() - start < 3
    gate.set()


def test_a_connection_that_times_out(site: Site, monkeypatch: pytest.MonkeyPatch):
    def connect(*_):
        raise TimeoutError(errno.ETIMEDOUT, "timed out")

    monkeypatch.setattr(socket.socket, "connect", connect)
    assert diagnose(1, site.client).code == "E621"


def test_the_deadline_is_for_all_addresses_together(site: Site, monkeypatch: pytest.MonkeyPatch):
    def connect(*_):
        time.sleep(0.3)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "getaddrinfo", addresses(*[1] * 100))
    monkeypatch.setattr(socket.socket, "connect", connect)
    assert diagnose_at("many", 1, site.client, "server", 0.2).code == "E621"


def test_own_files_that_do_not_fit_are_told_before_the_dial(site: Site):
    mixed = dataclasses.replace(site.client, private_key=site.server.private_key)
    assert diagnose(1, mixed).code == "E663"
    assert diagnose(1, dataclasses.replace(site.client, authority=b"")).code == "E666"


def test_a_certificate_that_openssl_refuses(site: Site, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_, **__):
        raise ssl.SSLError(1, "[SSL: EE_KEY_TOO_SMALL] ee key too small")

    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", refuse)
    error = diagnose(1, site.client)
    assert (type(error), error.code) == (CertificateError, "E669")
    assert "ee key too small" in error.got


def test_the_key_touches_the_disk_only_encrypted(site: Site, port: int, tmp_path: Path, monkeypatch):
    seen: list[bytes] = []
    real = ssl.SSLContext.load_cert_chain

    def spy(self, certfile, keyfile, password):
        seen.append(Path(keyfile).read_bytes())
        assert Path(keyfile).parent.parent == tmp_path
        return real(self, certfile, keyfile, password)

    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", spy)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert diagnose(port, site.client) is None
    assert [text.startswith(b"-----BEGIN ENCRYPTED PRIVATE KEY-----") for text in seen] == [True]
    assert list(tmp_path.iterdir()) == []
