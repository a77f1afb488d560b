"""Reach a server step by step, and say which step fails and why. Nothing of a run is sent.

gRPC reports an expired, foreign or missing certificate as "UNAVAILABLE: Socket closed", as if the server were down, and
a proxy that refuses likewise; so causes are found here, without gRPC.

| code | error | meaning |
| --- | --- | --- |
| E601, E602 | LinkError | nobody listens; the host's name cannot be resolved (`cutlayer.transport.reach`) |
| E603 | LinkError | the connection closed within the TLS handshake, or without a word |
| E606 to E610 | LinkError | the proxy (`cutlayer.transport.reach`) |
| E621 | DeadlineError | no answer within the time allowed |
| E641 | HandshakeError | something answers, but not TLS with HTTP/2 |
| E646, E648 | HandshakeError | plaintext where TLS is spoken, or the reverse (`cutlayer.transport.dialect`) |
| E663, E666, E669 | CertificateError | our own files (`cutlayer.transport.tls`) |
| E667 | CertificateError | the server's certificate or its TLS is refused by us (`transport.server_certificate`) |
| E668 | CertificateError | the server refuses our certificate |
"""

from __future__ import annotations

import contextlib
import math
import socket
import ssl
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final, TypeVar, cast

from cryptography import x509

from cutlayer.errors import CertificateError, CutlayerError, DeadlineError, HandshakeError, LinkError
from cutlayer.transport.addresses import joined
from cutlayer.transport.certificates import first_line, listed, names_of, parse_chain, title
from cutlayer.transport.dialect import (
    FRAME_HEAD,
    PREFACE,
    SETTINGS,
    check_plaintext,
    not_alike,
    speaks_plaintext,
)
from cutlayer.transport.proxy import Proxy
from cutlayer.transport.reach import ask_proxy, connect, left, reach_proxy, resolve, silent
from cutlayer.transport.server_certificate import other_name, refused_by_tls, shown_by, why_refused
from cutlayer.transport.tls import Credentials, context_of

__all__ = ["Step", "Target", "contact", "diagnose"]

_Returned = TypeVar("_Returned")
_Walk = Generator[str, None, _Returned]
_OF_CERTIFICATES: Final = ("CERTIFICATE", "UNKNOWN_CA", "ACCESS_DENIED", "DECRYPT_ERROR")  # alerts about ours
_DIRECT: Final = ("name", "connection")
_PROXIED: Final = ("proxy", "tunnel")
_TLS: Final = ("files", "server", "certificate")
_PLAIN: Final = "plaintext"


@dataclass(frozen=True, kw_only=True)
class Target:
    """A server to reach: its party's name, which its certificate must have, and where it is."""

    party: str
    host: str
    port: int
    proxy: Proxy | None = None


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step on the way to a server.

    Attributes:
        name: "files" (our own); "name" and "connection", or "proxy" and "tunnel"; "server" (TLS, and its certificate)
            and "certificate" (it accepts ours), or "plaintext" (it speaks that too).
        seconds: How long it took.
        seen: What was seen, in words.
        error: Why it failed; None if it did not.
    """

    name: str
    seconds: float
    seen: str = ""
    error: CutlayerError | None = None


def contact(
    target: Target,
    credentials: Credentials | None,
    *,
    each: float,
    total: float = math.inf,
    party: str = "",
) -> Iterator[Step]:
    """Yield one step after the other, up to the first that fails; then close the connection.

    A server sends its HTTP/2 SETTINGS only once it has accepted the client's certificate, so they are waited for.

    Args:
        target: The server.
        credentials: What this party shows it; None: it has none.
        each: Seconds that a step may take.
        total: Seconds that all steps together may take.
        party: This party, if it has no certificates; without a name too, nothing is said to the server.
    """
    end = time.monotonic() + total
    until = lambda: min(end, time.monotonic() + each)  # noqa: E731
    middle = _DIRECT if target.proxy is None else _PROXIED
    names = (_TLS[0], *middle, *_TLS[1:]) if credentials is not None else (*middle, _PLAIN) if party else middle
    with ExitStack() as opened:
        walk: _Walk[object]
        if credentials is not None:
            walk = _walk(target, credentials, until, opened)
        else:
            walk = _walk_plain(target, until, opened, party) if party else _reach(target, until, opened)
        for name in names:
            begin = time.monotonic()
            try:
                seen = next(walk)
            except CutlayerError as error:
                yield Step(name=name, seconds=time.monotonic() - begin, error=error)
                return
            yield Step(name=name, seconds=time.monotonic() - begin, seen=seen)


def diagnose(target: Target, credentials: Credentials | None, party: str, timeout: float) -> CutlayerError | None:
    """Say why `party` gets no connection with a gRPC server; None if it gets one.

    Returns within about `timeout` seconds; codes are in this module's table. The error is returned, not raised.
    """
    steps = contact(target, credentials, each=timeout, total=timeout, party=party)
    return next((step.error for step in steps if step.error), None)


def _reach(target: Target, until: Callable[[], float], opened: ExitStack, party: str = "") -> _Walk[socket.socket]:
    """Connect, and yield what was seen after each of the two steps; return the socket, which `opened` closes."""
    address, where = joined(target.host, target.port), _where(target, party)
    if target.proxy is None:
        addresses = resolve(target.host, target.port, until(), where)
        yield ", ".join(dict.fromkeys(str(entry[4][0]) for entry in addresses))
        plain = opened.enter_context(connect(addresses, until(), where))
        yield f"connected to {joined(str(plain.getpeername()[0]), target.port)}"
    else:
        plain = opened.enter_context(reach_proxy(target.proxy, until(), where))
        yield f"connected to the proxy {target.proxy}"
        ask_proxy(plain, target.proxy, (target.host, target.port), until(), where)
        yield f"the proxy connects to {address}"
    return plain


def _where(target: Target, party: str) -> str:
    return f"{f'party {party}, ' if party else ''}server {target.party} at {joined(target.host, target.port)}"


def _again(target: Target, until: Callable[[], float], opened: ExitStack, party: str) -> socket.socket:
    """Connect once more, to ask something else."""
    steps = _reach(target, until, opened, party)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return cast(socket.socket, end.value)


def _walk_plain(target: Target, until: Callable[[], float], opened: ExitStack, party: str) -> _Walk[None]:
    """Take all steps of a party without certificates, and yield what was seen after each."""
    where = _where(target, party)
    plain = yield from _reach(target, until, opened, party)
    check_plaintext(plain, lambda: _again(target, until, opened, party), until, where)
    yield "the server speaks plaintext, as this party does"


def _walk(target: Target, credentials: Credentials, until: Callable[[], float], opened: ExitStack) -> _Walk[None]:
    """Take all steps, and yield what was seen after each."""
    where = _where(target, credentials.party)
    context = context_of(credentials, where)
    yield "certificate and key can be used"
    plain = yield from _reach(target, until, opened, credentials.party)
    stream = context.wrap_socket(plain, server_hostname=target.party, do_handshake_on_connect=False)
    opened.enter_context(stream)
    try:
        _shake_hands(stream, credentials, until(), where)
    except ssl.SSLCertVerificationError as error:
        raise why_refused(error, shown_by(stream), target.party, credentials.authority, where) from error
    except HandshakeError:
        with contextlib.suppress(LinkError, DeadlineError):  # then it is not known what it speaks
            if speaks_plaintext(_again(target, until, opened, credentials.party), until(), where):
                raise not_alike(where, secure=True) from None
        raise
    yield _check_server(stream, target.party, where)
    _await_settings(stream, credentials, until(), where)
    yield f"the server accepts the certificate of {credentials.party}"


def _shake_hands(stream: ssl.SSLSocket, credentials: Credentials, deadline: float, where: str) -> None:
    try:
        stream.settimeout(left(deadline, where))
        stream.do_handshake()
    except TimeoutError as error:
        raise silent(where) from error
    except ssl.SSLCertVerificationError:
        raise
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
        raise refused_by_tls(where, f"the alert {reason}") from error


def _check_server(stream: ssl.SSLSocket, server_name: str, where: str) -> str:
    certificate = stream.getpeercert(binary_form=True) or b""
    names = names_of(certificate)
    if server_name not in names:
        raise other_name(names, server_name, where)
    if stream.selected_alpn_protocol() != "h2":
        raise _no_server(where, "TLS without HTTP/2")
    return f"{stream.version()}, certificate of {server_name}, valid {_span(parse_chain(certificate, where=where)[0])}"


def _await_settings(stream: ssl.SSLSocket, credentials: Credentials, deadline: float, where: str) -> None:
    head = b""
    try:
        stream.settimeout(left(deadline, where))
        with contextlib.suppress(ConnectionError, ssl.SSLEOFError):  # refused already: an alert may still be read
            stream.sendall(PREFACE)
        while len(head) < FRAME_HEAD:
            stream.settimeout(left(deadline, where))
            piece = stream.recv(FRAME_HEAD - len(head))
            if not piece:
                raise _refused(credentials, where, "the connection closed after our certificate")
            head += piece
    except TimeoutError as error:
        raise silent(where) from error
    except OSError as error:
        raise _refused(credentials, where, first_line(error)) from error
    if head[3] != SETTINGS:
        raise _no_server(where, "bytes that are no HTTP/2 SETTINGS")


def _refused(credentials: Credentials, where: str, got: str) -> CertificateError:
    own = parse_chain(credentials.certificate, where=where)[0]
    names, issuer = listed(names_of(credentials.certificate)), title(own.issuer)
    return CertificateError(
        "the server does not accept our certificate",
        where=where,
        expected="HTTP/2 SETTINGS after the handshake",
        got=f"{got}; ours names {names}, issuer {issuer}, valid {_span(own)}",
        remedy="Compare the authority (ca.pem) of both parties and both clocks. Only `cutlayer doctor CONTRACT --party "
        "FILE --serve` at the server, run in its place, tells its reason.",
        code="E668",
    )


def _no_server(where: str, got: str) -> HandshakeError:
    return HandshakeError(
        "what answers at the server's address is no TLS server of this protocol",
        where=where,
        expected="TLS 1.2 or later with HTTP/2",
        got=got,
        remedy="Check the port; check that no proxy ends the server's TLS.",
        code="E641",
    )


def _span(certificate: x509.Certificate) -> str:
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return f"{start:%Y-%m-%d %H:%M} to {end:%Y-%m-%d %H:%M} UTC"
