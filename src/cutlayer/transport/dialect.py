"""Find out whether a server speaks TLS or plaintext, from what it answers. Each question is a connection of its own.

| code | error | meaning |
| --- | --- | --- |
| E603 | LinkError | the server closes the connection without a word, as a machine in between does |
| E646 | HandshakeError | what answers speaks neither TLS nor HTTP/2 |
| E648 | HandshakeError | this party speaks TLS and the server plaintext, or the reverse |
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Callable
from typing import Final

from cutlayer.errors import HandshakeError, LinkError
from cutlayer.transport.reach import left, silent

__all__ = ["FRAME_HEAD", "PREFACE", "SETTINGS", "check_plaintext", "not_alike", "speaks_plaintext", "speaks_tls"]

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
"""What a client of HTTP/2 says first, and its empty SETTINGS."""
FRAME_HEAD: Final = 9
"""Bytes: length (3), type, flags, stream (4)."""
SETTINGS: Final = 4
"""The type of the frame that a server must send first."""


def check_plaintext(
    plain: socket.socket, again: Callable[[], socket.socket], until: Callable[[], float], where: str
) -> None:
    """Check that a server answers HTTP/2 without TLS; if not, `again` gives a second connection with it.

    Raises:
        DeadlineError: E621, it says nothing.
        HandshakeError: E648, it speaks TLS; E646, something else.
        LinkError: E603, it closes the connection; and what `again` raises.
    """
    head = _answer(plain, until(), where)
    if _settings(head):
        return
    if speaks_tls(again(), until(), where):
        raise not_alike(where, secure=False)
    if not head:
        raise LinkError(
            "the server closed the connection without a word",
            where=where,
            expected="HTTP/2 in plaintext",
            remedy="Check that the address is the server's own; then try again.",
            code="E603",
        )
    raise HandshakeError(
        "what answers is no cutlayer",
        where=where,
        expected="HTTP/2 in plaintext",
        got="neither that nor TLS",
        remedy="correct the address",
        code="E646",
    )


def speaks_plaintext(plain: socket.socket, deadline: float, where: str) -> bool:
    """Return whether a server answers HTTP/2 without TLS. Raises `DeadlineError` E621 if it says nothing."""
    return _settings(_answer(plain, deadline, where))


def _settings(head: bytes) -> bool:
    return len(head) == FRAME_HEAD and head[3] == SETTINGS


def _answer(plain: socket.socket, deadline: float, where: str) -> bytes:
    """Return the first bytes of the answer to a client's preface; fewer if the server closes the connection."""
    head = b""
    try:
        plain.settimeout(left(deadline, where))
        with contextlib.suppress(ConnectionError):
            plain.sendall(PREFACE)
            while len(head) < FRAME_HEAD and (piece := plain.recv(FRAME_HEAD - len(head))):
                head += piece
                plain.settimeout(left(deadline, where))
    except TimeoutError as error:
        raise silent(where) from error
    return head


def speaks_tls(plain: socket.socket, deadline: float, where: str) -> bool:
    """Return whether a server answers a TLS hello. Whose it is does not matter: nothing is sent to it.

    Raises:
        DeadlineError: E621, it says nothing.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        plain.settimeout(left(deadline, where))
        with context.wrap_socket(plain, do_handshake_on_connect=False) as stream:
            stream.do_handshake()
    except TimeoutError as error:
        raise silent(where) from error
    except ssl.SSLError as error:
        return "ALERT" in (error.reason or "")
    except OSError:
        return False
    return True


def not_alike(where: str, *, secure: bool) -> HandshakeError:
    """Return the error for two parties of which one speaks TLS; `secure` says whether it is this one."""
    own = "its `credentials`" if secure else "`insecure = true`"
    return HandshakeError(
        f"this party speaks {_name(secure)} and the server {_name(not secure)}",
        where=where,
        expected=f"{_name(secure)}, because of {own} in [network] of this party's file",
        got=_name(not secure),
        remedy="give all parties certificates (`cutlayer pki`); insecure = true only for a trial, and then at all",
        code="E648",
    )


def _name(secure: bool) -> str:
    return "TLS" if secure else "plaintext"
