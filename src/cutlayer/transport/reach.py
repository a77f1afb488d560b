"""Reach a server's port: resolve its name, connect, or ask a proxy to connect. Every step ends by a deadline.

Knows neither TLS nor gRPC. gRPC reports all of these failures as "UNAVAILABLE", so they are told apart here.

| code | error | meaning |
| --- | --- | --- |
| E601 | LinkError | nobody listens at the address, or it cannot be reached |
| E602 | LinkError | the host's name cannot be resolved |
| E606 | LinkError | the proxy itself cannot be reached |
| E607 | LinkError | the proxy wants a user and a password that it knows |
| E608 | LinkError | the proxy refuses to connect to the server |
| E609 | LinkError | the proxy cannot connect to the server |
| E610 | LinkError | what answers at the proxy's address is no HTTP proxy |
| E621 | DeadlineError | no answer within the time allowed |
"""

from __future__ import annotations

import queue
import re
import socket
import threading
import time
from typing import Any, Final

from cutlayer.errors import CutlayerError, DeadlineError, LinkError
from cutlayer.transport.addresses import joined
from cutlayer.transport.certificates import first_line, printable
from cutlayer.transport.proxy import Proxy

__all__ = [
    "OF_PROXIES",
    "REFUSALS",
    "Addresses",
    "ask_proxy",
    "connect",
    "left",
    "reach_proxy",
    "resolve",
    "silent",
]

Addresses = list[tuple[socket.AddressFamily, socket.SocketKind, int, str, tuple[Any, ...]]]
OF_PROXIES: Final = frozenset({"E606", "E607", "E608", "E609", "E610"})
"""Codes that mean: this party's own way out does not work."""
REFUSALS: Final = frozenset({"E607", "E608", "E610"})
"""Those of them that do not pass by themselves."""
_HEAD_MAX: Final = 16 * 1024  # bytes of a proxy's answer that are read
_STATUS: Final = re.compile(rb"HTTP/1\.[01] (\d{3})(?: ([^\r\n]*))?\r?\n")
_WAYS: Final = re.compile(rb"(?im)^Proxy-Authenticate:[ \t]*([A-Za-z0-9-]{1,40})")
_ASKS_FOR_USER: Final = (407, 401)  # the second is wrong, and what tinyproxy says of a wrong password
_GOOD: Final = 2  # hundred and something
_OWN_FAULT: Final = 500  # and above: the proxy tried


def resolve(host: str, port: int, deadline: float, where: str) -> Addresses:
    """Resolve in a thread of its own, as the resolver knows no deadline; the thread dies with the look-up."""
    answers: queue.SimpleQueue[Addresses | OSError] = queue.SimpleQueue()

    def look_up() -> None:
        try:
            answers.put(list(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)))
        except (OSError, UnicodeError) as error:  # UnicodeError: not a name at all
            answers.put(error if isinstance(error, OSError) else OSError(str(error)))

    threading.Thread(target=look_up, name="cutlayer-resolve", daemon=True).start()
    try:
        answer = answers.get(timeout=left(deadline, where))
    except queue.Empty:
        raise silent(where) from None
    if isinstance(answer, OSError):
        raise LinkError(
            f"the host name {host} cannot be resolved",
            where=where,
            got=answer.strerror or first_line(answer),
            remedy="Correct the server's host, or the name service of this machine.",
            code="E602",
        ) from answer
    return answer


def connect(addresses: Addresses, deadline: float, where: str) -> socket.socket:
    """Return a connected socket to the first address that answers. The caller closes it."""
    cause: OSError | None = None
    for family, kind, protocol, _, address in addresses:
        remaining = left(deadline, where)
        plain = socket.socket(family, kind, protocol)
        try:
            plain.settimeout(remaining)
            plain.connect(address)
        except OSError as error:
            plain.close()
            cause = error
        else:
            return plain
    if cause is None or isinstance(cause, TimeoutError):
        raise silent(where) from cause
    raise LinkError(
        "nobody listens at the server's address",
        where=where,
        expected="a server",
        got=cause.strerror or first_line(cause),
        remedy="Start the server, or correct its host and port; check the firewalls between the two.",
        code="E601",
    ) from cause


def reach_proxy(proxy: Proxy, deadline: float, where: str) -> socket.socket:
    """Return a connected socket to the proxy. Raises `LinkError` E606."""
    try:
        return connect(resolve(proxy.host, proxy.port, deadline, where), deadline, where)
    except CutlayerError as error:
        raise LinkError(
            "the proxy cannot be reached",
            where=f"{where}, proxy {proxy} of {proxy.origin}",
            got=error.got or "no answer in time",
            remedy='Correct the proxy, or ask your network\'s people for it; proxy = "none" in the party file dials '
            "without one.",
            code="E606",
        ) from error


def ask_proxy(plain: socket.socket, proxy: Proxy, server: tuple[str, int], deadline: float, where: str) -> None:
    """Ask the proxy for a connection with `server`, host and port (HTTP CONNECT). Raises `LinkError` E607 to E610."""
    where = f"{where}, proxy {proxy} of {proxy.origin}"
    target = joined(*server)
    lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}"]
    lines += [f"Proxy-Authorization: {proxy.authorization}"] if proxy.authorization else []
    try:
        plain.settimeout(left(deadline, where))
        plain.sendall("\r\n".join([*lines, "", ""]).encode())
        head = _read_head(plain, deadline, where)
    except (TimeoutError, DeadlineError):
        raise _no_way(where, "no answer in time") from None
    except OSError as error:
        raise _no_proxy(where, error.strerror or first_line(error)) from error
    status = _STATUS.match(head)
    if status is None or not head.endswith(b"\r\n\r\n"):
        raise _no_proxy(where, "bytes that are no answer to HTTP CONNECT" if head else "a closed connection")
    said = f"{int(status[1])} {printable((status[2] or b'').decode('latin-1'))}".strip()
    if int(status[1]) in _ASKS_FOR_USER:
        raise _unknown_user(where, said, head, known=bool(proxy.authorization))
    _judge(int(status[1]), said, where)


def _read_head(plain: socket.socket, deadline: float, where: str) -> bytes:
    """Read up to the end of the answer's head and nothing behind it: that is the server's."""
    head = b""
    while not head.endswith(b"\r\n\r\n") and len(head) < _HEAD_MAX:
        plain.settimeout(left(deadline, where))
        seen = plain.recv(_HEAD_MAX - len(head), socket.MSG_PEEK)
        end = (head + seen).find(b"\r\n\r\n")
        wanted = len(seen) if end < 0 else end + 4 - len(head)
        piece = plain.recv(wanted)
        if not piece:
            return head
        head += piece
    return head


def _unknown_user(where: str, said: str, head: bytes, *, known: bool) -> LinkError:
    ways = [way.decode() for way in _WAYS.findall(head)]
    if ways and "basic" not in {way.lower() for way in ways}:
        remedy = "Only basic authentication is known here: ask your network's people for it, or to let you pass."
    else:
        remedy = 'Set proxy = "http://user:password@host:port" in [network] of the party file, with your user there.'
    return LinkError(
        "the proxy wants a user and a password",
        where=where,
        expected="a proxy that lets this party pass",
        got=f"{said}; {'those given are refused' if known else 'none given'}; it offers {', '.join(ways) or 'no way'}",
        remedy=remedy,
        code="E607",
    )


def _judge(code: int, said: str, where: str) -> None:
    """Raise what a proxy's status means, unless it is good."""
    if code // 100 == _GOOD:
        return
    if code >= _OWN_FAULT:
        raise _no_way(where, said)
    raise LinkError(
        "the proxy refuses to connect to the server",
        where=where,
        got=said,
        remedy="Ask your network's people to allow CONNECT to this host and port for you, without opening its TLS.",
        code="E608",
    )


def _no_way(where: str, got: str) -> LinkError:
    return LinkError(
        "the proxy cannot connect to the server",
        where=where,
        got=got,
        remedy="Ask the server's party whether it runs and lets your network in; check its host and port.",
        code="E609",
    )


def _no_proxy(where: str, got: str) -> LinkError:
    return LinkError(
        "what answers at the proxy's address is no HTTP proxy",
        where=where,
        expected="an answer to HTTP CONNECT",
        got=got,
        remedy="Correct the proxy's host and port.",
        code="E610",
    )


def left(deadline: float, where: str) -> float:
    """Return the seconds until `deadline`, by the monotonic clock. Raises `DeadlineError` E621 if it is over."""
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise silent(where)
    return remaining


def silent(where: str) -> DeadlineError:
    """Return the error for a server that says nothing in time."""
    return DeadlineError(
        "the server does not answer in time",
        where=where,
        remedy="Check the address and the firewalls between the two; ask the server's party whether it runs.",
        code="E621",
    )
