"""Listen in a server's place before a run, answer probes, and say who came and why who was refused.

gRPC tells nobody why it refused a certificate, so TLS ends here, in Python's own; what is inside goes to a gRPC server
that only this machine reaches and that answers nothing but probes.

| code | error | meaning |
| --- | --- | --- |
| E604 | LinkError | the server cannot listen at its address |
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self

import grpc

from cutlayer.transport.addresses import host_port, joined
from cutlayer.transport.certificates import first_line, listed, names_of, printable
from cutlayer.transport.grpc_common import METHOD, SERVICE, server_options
from cutlayer.transport.listening import cannot_listen
from cutlayer.transport.probe import PROBE
from cutlayer.transport.probe_service import CALLS_AT_ONCE, ProbeService
from cutlayer.transport.tls import Credentials, context_of

__all__ = ["ProbeListener", "Visit"]

_CONNECTIONS: Final = 16  # at one time; more are turned away
_HANDSHAKE: Final = 5.0  # seconds
_LONGEST: Final = 60.0  # seconds that a connection may last
_PIECE: Final = 64 * 1024
_LOOK: Final = 0.1  # seconds between two looks at whether all is over
_TLS: Final = 0x16  # first byte of a client's hello


@dataclass(frozen=True, kw_only=True)
class Visit:
    """Somebody who came: told when a connection or a measurement ends, once for each.

    Attributes:
        address: From where, host:port; behind a proxy, the proxy's.
        name: That of its certificate, once it is accepted; else empty.
        result: "accepted", "measured" or "refused".
        text: More about it, in words; why, if it was refused.
    """

    address: str
    name: str
    result: str
    text: str


@dataclass
class _Guest:
    """Who is at the other end of a connection; `told`: a visit has told of it already."""

    name: str
    address: str
    told: bool = False


class ProbeListener:
    """Listens while it is entered.

    Args:
        address: host:port to listen at.
        credentials: This party's.
        digest: Of its contract.
        parties: Names that are expected; others with a good certificate are accepted, and the visit says so.
        visited: Called from several threads, with each visit.
    """

    def __init__(
        self,
        address: str,
        credentials: Credentials,
        *,
        digest: str,
        parties: tuple[str, ...],
        visited: Callable[[Visit], None],
    ) -> None:
        """Open nothing yet. Raises CertificateError E663, E666 or E669 for certificates that TLS cannot use."""
        self._address, self._party, self._parties, self._visited = address, credentials.party, parties, visited
        self._context = context_of(credentials, f"party {credentials.party}", server=True)
        self._known: dict[int, _Guest] = {}  # port of a connection inside -> who is outside
        self._service = ProbeService(credentials.party, digest, self._name_of)
        self._room = threading.Semaphore(_CONNECTIONS)
        self._stop = threading.Event()
        self._acceptor = threading.Thread(target=self._accept, name="cutlayer-probes-accept", daemon=True)
        self._guests: list[threading.Thread] = []
        self._pool: ThreadPoolExecutor | None = None
        self._inside: Any = None
        self._inside_port = 0

    def __enter__(self) -> Self:
        """Listen. Raises `LinkError` E604."""
        host, port = host_port(self._address)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._outside = socket.create_server((host, port), family=family)
        except OSError as error:
            raise cannot_listen(self._party, self._address, error, coordinates=True) from error
        self._outside.settimeout(_LOOK)
        self._pool = ThreadPoolExecutor(2 * CALLS_AT_ONCE, thread_name_prefix="cutlayer-probes")
        self._inside = grpc.server(self._pool, options=server_options())
        methods = {
            PROBE: grpc.stream_stream_rpc_method_handler(self._answer),
            METHOD: grpc.stream_stream_rpc_method_handler(self._not_yet),
        }
        self._inside.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
        self._inside_port = self._inside.add_insecure_port("127.0.0.1:0")
        self._inside.start()
        self._acceptor.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close all connections and end all threads."""
        self._stop.set()
        self._inside.stop(0).wait()
        self._acceptor.join()
        self._outside.close()
        for thread in self._guests:
            thread.join(_HANDSHAKE + 1)
        if self._pool is not None:
            self._pool.shutdown(wait=True)

    def _accept(self) -> None:
        while not self._stop.is_set():
            try:
                plain, peer = self._outside.accept()
            except TimeoutError:  # nobody came just now
                continue
            except OSError:  # such as too many open files
                self._stop.wait(_LOOK)
                continue
            if not self._room.acquire(blocking=False):
                plain.close()
                continue
            guest = (plain, joined(str(peer[0]), int(peer[1])))
            thread = threading.Thread(target=self._host, args=guest, name="cutlayer-probes-guest", daemon=True)
            thread.start()
            self._guests = [one for one in self._guests if one.is_alive()] + [thread]

    def _host(self, plain: socket.socket, address: str) -> None:
        """Serve one connection to its end."""
        try:
            with plain, contextlib.suppress(OSError):
                stream = self._greet(plain, address)
                if stream is not None:
                    with stream:
                        self._forward(stream, address)
        finally:
            self._room.release()

    def _greet(self, plain: socket.socket, address: str) -> ssl.SSLSocket | None:
        """Shake hands; on failure say why to our people, and return None."""
        plain.settimeout(_HANDSHAKE)
        try:
            first = plain.recv(1, socket.MSG_PEEK)
            if not first or first[0] != _TLS:
                self._refuse(address, "it speaks no TLS" if first else "it left without a word, as port checks do")
                return None
            stream = self._context.wrap_socket(plain, server_side=True)
        except ssl.SSLCertVerificationError as error:
            self._refuse(address, f"its certificate: {printable(error.verify_message)}")
            return None
        except ssl.SSLError as error:
            self._refuse(address, _reason(error))
            return None
        except OSError as error:
            self._refuse(address, first_line(error))
            return None
        names = names_of(stream.getpeercert(binary_form=True) or b"")
        if len(names) != 1 or stream.selected_alpn_protocol() != "h2":
            self._refuse(address, f"its certificate names {listed(names)}" if len(names) != 1 else "it has no HTTP/2")
            stream.close()
            return None
        return stream

    def _forward(self, stream: ssl.SSLSocket, address: str) -> None:
        """Carry bytes between a guest and the server inside; tell of the guest in the end, if nothing else has."""
        guest = _Guest(names_of(stream.getpeercert(binary_form=True) or b"")[0], address)
        try:
            with socket.create_connection(("127.0.0.1", self._inside_port), _HANDSHAKE) as inside:
                for one in (stream, inside):  # small pieces at once, or the round trip is not that of the way
                    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                port = int(inside.getsockname()[1])
                self._known[port] = guest
                try:
                    _pump(stream, inside, self._stop)
                finally:
                    del self._known[port]
        finally:
            if not guest.told:
                self._tell(guest, "accepted", "its certificate is good")

    def _tell(self, guest: _Guest, result: str, text: str) -> None:
        guest.told = True
        known = "" if guest.name in self._parties else ", but it is no party of the contract"
        name = printable(guest.name)
        self._visited(Visit(address=guest.address, name=name, result=result, text=f"{text}{known}"))

    def _refuse(self, address: str, text: str) -> None:
        self._visited(Visit(address=address, name="", result="refused", text=text))

    def _guest(self, context: Any) -> _Guest:  # noqa: ANN401 - grpc has no types
        """Return who is at the other end of a connection inside; for strangers without a name."""
        port = str(context.peer()).rpartition(":")[2]
        return self._known.get(int(port) if port.isdigit() else 0, _Guest("", ""))

    def _name_of(self, context: Any) -> str:  # noqa: ANN401
        return self._guest(context).name

    def _answer(self, incoming: Iterator[bytes], context: Any) -> Iterator[bytes]:  # noqa: ANN401
        guest = self._guest(context)
        passed = 0
        try:
            for answer in self._service.answer(incoming, context):
                passed += len(answer)
                guest.told = True  # below, even if the connection ends before
                yield answer
        finally:
            if passed:
                self._tell(guest, "measured", f"it has measured its way here, {passed:,} bytes back")

    def _not_yet(self, _incoming: Iterator[bytes], context: Any) -> Iterator[bytes]:  # noqa: ANN401
        """Turn away who comes for the run itself, so that it tries again later: told once for a connection."""
        guest = self._guest(context)
        if guest.name and not guest.told:
            self._tell(guest, "accepted", "its certificate is good; it came for the run, which has not begun")
        context.abort(grpc.StatusCode.UNAVAILABLE, "this is `cutlayer doctor --serve`: the run has not begun")
        yield b""


def _reason(error: ssl.SSLError) -> str:
    reason = error.reason or first_line(error)
    if "PEER_DID_NOT_RETURN_A_CERTIFICATE" in reason:
        return "it shows no certificate"
    if "ALERT" in reason:
        return f"it does not accept our certificate: {printable(reason)}"
    return printable(reason)


def _pump(stream: ssl.SSLSocket, inside: socket.socket, stop: threading.Event) -> None:
    """Carry bytes both ways until one side ends, or all is over."""
    end = time.monotonic() + _LONGEST
    stream.setblocking(False)
    while not stop.is_set() and time.monotonic() < end:
        ready = [stream] if stream.pending() else select.select([stream, inside], [], [], _LOOK)[0]
        if stream in ready:
            with contextlib.suppress(ssl.SSLWantReadError):
                data = stream.recv(_PIECE)
                if not data:
                    return
                inside.sendall(data)
        if inside in ready:
            data = inside.recv(_PIECE)
            if not data:
                return
            _send(stream, data, end)


def _send(stream: ssl.SSLSocket, data: bytes, end: float) -> None:
    view = memoryview(data)
    while view and time.monotonic() < end:
        try:
            view = view[stream.send(view) :]
        except ssl.SSLWantWriteError:
            select.select([], [stream], [], _LOOK)
        except ssl.SSLWantReadError:
            select.select([stream], [], [], _LOOK)
