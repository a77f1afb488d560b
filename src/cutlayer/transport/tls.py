"""Certificates of a party: load them, check them before dialling, and find out why a TLS link fails.

A party *is* the one DNS name of its certificate. gRPC reports an expired, foreign or missing certificate as
"UNAVAILABLE: Socket closed", as if the server were down, so causes are found here: `check_credentials` before the first
dial, `diagnose_handshake` after a failed one.

| code | error | meaning |
| --- | --- | --- |
| E661 | CertificateError | the certificate, or the authority's, has expired |
| E662 | CertificateError | the certificate, or the authority's, is not valid yet |
| E663 | CertificateError | the private key does not belong to the certificate |
| E664 | CertificateError | the certificate is not signed by this authority |
| E665 | CertificateError | the certificate's name (SAN) is not the party's |
| E666 | CertificateError | a file is missing, or is not readable PEM or DER |
| E667 | CertificateError | the server's certificate or its TLS is refused by us |
| E668 | CertificateError | the server refuses our certificate |
| E669 | CertificateError | the certificate may not be used for this (key usage, kind of key) |
| E601 | LinkError | nobody listens at the address, or it cannot be reached |
| E602 | LinkError | the host's name cannot be resolved |
| E603 | LinkError | the connection closed within the TLS handshake |
| E621 | DeadlineError | no answer within the time allowed |
| E641 | HandshakeError | something answers, but not TLS with HTTP/2 |
"""

from __future__ import annotations

import contextlib
import queue
import secrets
import socket
import ssl
import tempfile
import threading
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from cutlayer.errors import CertificateError, CutlayerError, DeadlineError, HandshakeError, LinkError
from cutlayer.transport.certificates import (
    SIZE_LIMIT,
    check_chain,
    check_pair,
    first_line,
    listed,
    names_of,
    parse_chain,
    parse_key,
    title,
)

__all__ = ["Credentials", "check_credentials", "diagnose_handshake", "load_credentials", "names_of"]

_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"  # and empty SETTINGS
_Addresses = list[tuple[socket.AddressFamily, socket.SocketKind, int, str, tuple[Any, ...]]]
_FRAME_HEAD: Final = 9  # bytes: length (3), type, flags, stream (4)
_SETTINGS: Final = 4  # the type of the frame that a server must send first
_OF_CERTIFICATES: Final = ("CERTIFICATE", "UNKNOWN_CA", "ACCESS_DENIED", "DECRYPT_ERROR")  # alerts about ours


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """What a party shows and trusts: PEM texts. `repr` shows the party's name only.

    `certificate` is the party's certificate followed by intermediate ones, `private_key` is unencrypted PKCS#8 and
    never leaves the party, `authority` is the certificate (or certificates) of the run's authority.
    """

    party: str
    certificate: bytes = field(repr=False)
    private_key: bytes = field(repr=False)
    authority: bytes = field(repr=False)


def load_credentials(folder: Path, party: str) -> Credentials:
    """Read `party.pem`, `party.key` and `ca.pem` of `folder`, which `pki.issue` wrote.

    Raises CertificateError E666 if a file is missing, longer than 64 KiB or not PEM. Dates and names are left to
    `check_credentials`.
    """
    texts = {name: _read(folder / name, party) for name in ("party.pem", "party.key", "ca.pem")}
    parse_chain(texts["party.pem"], where=f"party {party}, file party.pem")
    parse_key(texts["party.key"], where=f"party {party}, file party.key")
    parse_chain(texts["ca.pem"], where=f"party {party}, file ca.pem")
    return Credentials(
        party=party, certificate=texts["party.pem"], private_key=texts["party.key"], authority=texts["ca.pem"]
    )


def check_credentials(credentials: Credentials, *, now: datetime) -> None:
    """Check at time `now` (with a time zone) all that a peer would check, so that the cause is known here.

    Raises CertificateError: E661 expired, E662 not yet valid, E663 foreign key, E664 foreign authority, E665 another
    name, E666 not readable, E669 not usable as client and server.
    """
    where = f"party {credentials.party}, own certificate"
    chain = parse_chain(credentials.certificate, where=where)
    check_pair(chain[0], parse_key(credentials.private_key, where=f"party {credentials.party}, own key"), where)
    authority = parse_chain(credentials.authority, where=f"party {credentials.party}, authority")
    check_chain(chain, authority, party=credentials.party, now=now, where=where)


def diagnose_handshake(
    host: str, port: int, credentials: Credentials, server_name: str, timeout: float
) -> CutlayerError | None:
    """Say why a TLS connection to the gRPC server `server_name` at `host:port` fails; None if it does not.

    Connects without gRPC and a proxy, presents the certificate and waits for the server's HTTP/2 SETTINGS, which a
    server sends only once it has accepted the certificate. Returns within about `timeout` seconds; codes are in this
    module's table. Nothing of a run is sent. The error is returned, not raised.
    """
    deadline = time.monotonic() + timeout
    where = f"party {credentials.party}, server {server_name} at {host}:{port}"
    try:
        context = _context(credentials, where)
        with (
            _connect(host, port, deadline, where) as plain,
            context.wrap_socket(plain, server_hostname=server_name, do_handshake_on_connect=False) as stream,
        ):
            _shake_hands(stream, credentials, deadline, where)
            _check_server(stream, server_name, where)
            _await_settings(stream, credentials, deadline, where)
    except CutlayerError as error:
        return error
    return None


def _read(path: Path, party: str) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(SIZE_LIMIT + 1)
    except OSError as error:
        raise CertificateError(
            f"the file {path.name} cannot be read",
            where=f"party {party}, folder {path.parent}",
            expected="a folder with party.pem, party.key and ca.pem",
            got=error.strerror or type(error).__name__,
            remedy="Point to the folder that the authority issued for this party.",
            code="E666",
        ) from error


def _context(credentials: Credentials, where: str) -> ssl.SSLContext:
    """Return a client context. Its key goes through a file (`ssl` reads no other), encrypted under a passing secret."""
    key = parse_key(credentials.private_key, where=where)
    check_pair(parse_chain(credentials.certificate, where=where)[0], key, where)
    authority = parse_chain(credentials.authority, where=where)
    secret = secrets.token_hex(16).encode()
    lock = serialization.BestAvailableEncryption(secret)
    sealed = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, lock)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False  # `_check_server` compares the name, and can say whose it is
    context.set_alpn_protocols(["h2"])
    with tempfile.TemporaryDirectory() as folder:
        certificate_file, key_file = Path(folder, "party.pem"), Path(folder, "party.key")
        certificate_file.write_bytes(credentials.certificate)
        key_file.write_bytes(sealed)
        try:
            context.load_cert_chain(certificate_file, key_file, password=secret)
        except ssl.SSLError as error:
            raise CertificateError(
                "TLS cannot use this party's certificate",
                where=where,
                expected="a certificate and key that OpenSSL accepts",
                got=first_line(error),
                remedy="Ask the authority of this run for a certificate with a stronger key.",
                code="E669",
            ) from error
    for one in authority:
        context.load_verify_locations(cadata=one.public_bytes(serialization.Encoding.DER))
    return context


def _connect(host: str, port: int, deadline: float, where: str) -> socket.socket:
    """Return a connected socket to the first address of `host` that answers. The caller closes it."""
    cause: OSError | None = None
    for family, kind, protocol, _, address in _resolve(host, port, deadline, where):
        left = _left(deadline, where)
        plain = socket.socket(family, kind, protocol)
        try:
            plain.settimeout(left)
            plain.connect(address)
        except OSError as error:
            plain.close()
            cause = error
        else:
            return plain
    if cause is None or isinstance(cause, TimeoutError):
        raise _silent(where) from cause
    raise LinkError(
        "nobody listens at the server's address",
        where=where,
        expected="a server",
        got=cause.strerror or first_line(cause),
        remedy="Start the server, or correct its host and port; check the firewalls between the two.",
        code="E601",
    ) from cause


def _resolve(host: str, port: int, deadline: float, where: str) -> _Addresses:
    """Resolve in a thread of its own, as the resolver knows no deadline; the thread dies with the look-up."""
    answers: queue.SimpleQueue[_Addresses | OSError] = queue.SimpleQueue()

    def look_up() -> None:
        try:
            answers.put(list(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)))
        except (OSError, UnicodeError) as error:  # UnicodeError: not a name at all
            answers.put(error if isinstance(error, OSError) else OSError(str(error)))

    threading.Thread(target=look_up, name="cutlayer-resolve", daemon=True).start()
    try:
        answer = answers.get(timeout=_left(deadline, where))
    except queue.Empty:
        raise _silent(where) from None
    if isinstance(answer, OSError):
        raise LinkError(
            f"the host name {host} cannot be resolved",
            where=where,
            got=answer.strerror or first_line(answer),
            remedy="Correct the server's host, or the name service of this machine.",
            code="E602",
        ) from answer
    return answer


def _shake_hands(stream: ssl.SSLSocket, credentials: Credentials, deadline: float, where: str) -> None:
    try:
        stream.settimeout(_left(deadline, where))
        stream.do_handshake()
    except TimeoutError as error:
        raise _silent(where) from error
    except ssl.SSLCertVerificationError as error:
        raise _foreign_server(where, error.verify_message) from error
    except (ssl.SSLEOFError, ssl.SSLZeroReturnError, ConnectionError) as error:
        raise LinkError(
            "the server closed the connection within the TLS handshake",
            where=where,
            got=first_line(error),
            remedy="Check that the address is the server's own and no proxy's that ends TLS; then try again.",
            code="E603",
        ) from error
    except ssl.SSLError as error:
        reason = error.reason or first_line(error)
        if "ALERT" not in reason:
            raise _no_server(where, reason) from error
        if any(word in reason for word in _OF_CERTIFICATES):
            raise _refused(credentials, where, f"the alert {reason}") from error
        raise _foreign_server(where, f"the alert {reason}") from error


def _check_server(stream: ssl.SSLSocket, server_name: str, where: str) -> None:
    names = names_of(stream.getpeercert(binary_form=True) or b"")
    if server_name not in names:
        raise _foreign_server(where, f"the names {listed(names)}")
    if stream.selected_alpn_protocol() != "h2":
        raise _no_server(where, "TLS without HTTP/2")


def _await_settings(stream: ssl.SSLSocket, credentials: Credentials, deadline: float, where: str) -> None:
    head = b""
    try:
        stream.settimeout(_left(deadline, where))
        with contextlib.suppress(ConnectionError, ssl.SSLEOFError):  # refused already: an alert may still be read
            stream.sendall(_PREFACE)
        while len(head) < _FRAME_HEAD:
            stream.settimeout(_left(deadline, where))
            piece = stream.recv(_FRAME_HEAD - len(head))
            if not piece:
                raise _refused(credentials, where, "the connection closed after our certificate")
            head += piece
    except TimeoutError as error:
        raise _silent(where) from error
    except OSError as error:
        raise _refused(credentials, where, first_line(error)) from error
    if head[3] != _SETTINGS:
        raise _no_server(where, "bytes that are no HTTP/2 SETTINGS")


def _refused(credentials: Credentials, where: str, got: str) -> CertificateError:
    own = parse_chain(credentials.certificate, where=where)[0]
    names, issuer = listed(names_of(credentials.certificate)), title(own.issuer)
    return CertificateError(
        "the server does not accept our certificate",
        where=where,
        expected="HTTP/2 SETTINGS after the handshake",
        got=f"{got}; ours names {names}, issuer {issuer}, valid {_span(own)}",
        remedy="Compare the authority (ca.pem) of both parties and both clocks; the server's log has its reason.",
        code="E668",
    )


def _foreign_server(where: str, got: str) -> CertificateError:
    return CertificateError(
        "the server's certificate is not one that this party accepts",
        where=where,
        expected="a certificate of this run's authority, in date, in the server's name",
        got=got,
        remedy="Check the server's address, then compare the authority (ca.pem) of both parties.",
        code="E667",
    )


def _no_server(where: str, got: str) -> HandshakeError:
    return HandshakeError(
        "what answers at the server's address is no TLS server of this protocol",
        where=where,
        expected="TLS 1.2 or later with HTTP/2",
        got=got,
        remedy="Check the port; check that the server does not run in plaintext and no proxy ends its TLS.",
        code="E641",
    )


def _span(certificate: x509.Certificate) -> str:
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return f"{start:%Y-%m-%d %H:%M} to {end:%Y-%m-%d %H:%M} UTC"


def _left(deadline: float, where: str) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise _silent(where)
    return left


def _silent(where: str) -> DeadlineError:
    return DeadlineError(
        "the server does not answer in time",
        where=where,
        remedy="Check the address and the firewalls between the two; ask the server's party whether it runs.",
        code="E621",
    )
