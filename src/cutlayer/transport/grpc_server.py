"""The side of a link that is dialled: a gRPC server of one method and of probes, and a thread to read each stream.

| code | error | meaning |
| --- | --- | --- |
| E604 | LinkError | the server cannot listen at its address |
| E645 | HandshakeError | a stream does not begin as it must |
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol

import grpc

from cutlayer.errors import CutlayerError, HandshakeError
from cutlayer.transport.control import Abort, LinkHello
from cutlayer.transport.grpc_common import METHOD, SERVICE, server_credentials, server_options
from cutlayer.transport.handshake import SECOND, abort_of, check_hello, hello_of, read_hello, single, typed
from cutlayer.transport.listening import cannot_listen, why_not_listen
from cutlayer.transport.peer import Stream, dismiss, write
from cutlayer.transport.probe import PROBE
from cutlayer.transport.probe_service import CALLS_AT_ONCE, ProbeService
from cutlayer.transport.reception import Reception
from cutlayer.transport.settings import NetworkSettings
from cutlayer.transport.steward import Steward
from cutlayer.transport.timers import Timers
from cutlayer.transport.watch import Watch, note_refused

__all__ = ["Desk", "Door", "RunDoor", "Server"]


class Desk:
    """What both ends of a stream need to greet a peer and to talk with it."""

    def __init__(
        self, settings: NetworkSettings, steward: Steward, watch: Watch, reception: Reception, timers: Timers
    ) -> None:
        """Keep them together."""
        self.settings, self.steward, self.watch = settings, steward, watch
        self.reception, self.timers = reception, timers

    def admit(self, stream: Stream, first: bytes, names: tuple[str, ...] | None, expected: str = "") -> LinkHello:
        """Check a peer's first message and let its stream carry the link.

        Args:
            stream: The stream.
            first: Its first message.
            names: Those of the peer's certificate, if this side has to check them.
            expected: Who must answer; empty: any party.

        Returns:
            This side's hello.

        Raises:
            HandshakeError: the two cannot talk, or the peer refused.
            CertificateError: the peer is not whom it says it is.
            WireError: it is no hello.
        """
        settings, steward = self.settings, self.steward
        hello = read_hello(first)
        if isinstance(hello, Abort):
            raise HandshakeError(
                "a stream begins with an ABORT",
                got=hello.code,
                remedy="compare the addresses in the contract with where the parties run",
                code="E645",
            )
        check_hello(hello, settings, names)
        if expected not in ("", hello.party) or hello.party not in steward.peers:
            raise HandshakeError(
                "another party than expected answers",
                where=f"party {settings.party}",
                expected=expected or ", ".join(steward.peers),
                got=hello.party,
                remedy="compare the addresses in the contract with where the parties run",
                code="E645",
            )
        wanted = steward.peers[hello.party].attach(
            stream, hello, steward.incarnation, patient=settings.coordinates and not expected
        )
        self.watch.link_changed(hello.party)
        return hello_of(settings, steward.incarnation, hello.incarnation, wanted)

    def follow(self, stream: Stream, incoming: Iterator[bytes]) -> None:
        """Read an admitted stream to its end."""
        peer = stream.peer
        if peer is None:
            return
        try:
            with contextlib.suppress(grpc.RpcError):
                self.reception.read(peer, stream, incoming)
        finally:
            peer.detach(stream)
            self.watch.link_changed(peer.name)

    def speak(self, stream: Stream) -> Iterator[bytes]:
        """Yield what an admitted stream is to carry, to its end."""
        if stream.peer is None:
            return
        try:
            yield from write(stream.peer, stream)
        except Exception as error:  # whatever it is, nobody else would learn of it
            self.steward.fail(typed(error, f"party {self.settings.party}, link with {stream.peer.name}"))


class Door(Protocol):
    """Who lets streams in: to one network's desk (`RunDoor`), or each client to a session of its own (`hall.Hall`).

    Attributes:
        settings: Where to listen, and as whom.
        timers: Already running when the first stream comes.
        streams: Most streams at one time.
    """

    settings: NetworkSettings
    timers: Timers
    streams: int

    def admit(self, stream: Stream, first: bytes, names: tuple[str, ...] | None) -> tuple[Desk, LinkHello]:
        """Return the desk that a stream is let in at, and this side's hello. Raises what `Desk.admit` raises."""
        ...

    def refused(self, error: CutlayerError, first: bytes, names: tuple[str, ...] | None) -> None:
        """Take note of who was not let in."""
        ...


class RunDoor:
    """The door of a run: the parties of its plan, each of them once."""

    def __init__(self, desk: Desk) -> None:
        """Let them in at this desk."""
        self._desk, self.settings, self.timers = desk, desk.settings, desk.timers
        self.streams = 2 * len(desk.settings.parties) + 2  # a reconnecting party has two for a moment

    def admit(self, stream: Stream, first: bytes, names: tuple[str, ...] | None) -> tuple[Desk, LinkHello]:
        """Let a party of the plan in. Raises what `Desk.admit` raises."""
        return self._desk, self._desk.admit(stream, first, names)

    def refused(self, error: CutlayerError, first: bytes, names: tuple[str, ...] | None) -> None:
        """A party of the plan with which this one cannot talk ends the run, unless it is here already.

        Whatever else refuses who came as a party is remembered: if that party does not come, it is why.

        Who it is says its certificate. Without certificates anybody may say anything: that ends no session.
        """
        steward = self._desk.steward
        name = names[0] if names is not None and len(names) == 1 else ""
        if error.code == SECOND:  # the party is here, and the run goes on
            return
        claimed = name
        with contextlib.suppress(CutlayerError):
            claimed = read_hello(first).party
        name = claimed if names is None else name
        note_refused(self._desk.watch, claimed, error)
        waits = name in steward.peers and not steward.peers[name].link.remote
        if names is None:
            waits = not steward.member.session and (waits or not name)
        final = waits and error.code in ("E641", "E642", "E643")
        if final and name in steward.peers:
            dismiss(steward.peers[name])
        if final or error.code == "E511":  # E511: what the link has lost cannot be had back
            steward.fail(error)


class Server:
    """Listens at `settings.port`, if the party has one, and asks a door who comes in where."""

    def __init__(self, door: Door) -> None:
        """Nothing is opened before `start`."""
        self._door = door
        self._pool: ThreadPoolExecutor | None = None
        self._server: Any = None
        self._readers: list[threading.Thread] = []
        self._lock = threading.Lock()  # of the readers

    @property
    def listens(self) -> bool:
        """Whether others can dial in."""
        return self._server is not None

    def start(self) -> None:
        """Listen. Raises `LinkError` E604 if that is not possible."""
        settings = self._door.settings
        if not settings.port:
            return
        calls = self._door.streams + CALLS_AT_ONCE
        self._pool = ThreadPoolExecutor(calls, thread_name_prefix=f"cutlayer-{settings.party}-stream")
        self._server = grpc.server(self._pool, options=server_options(), maximum_concurrent_rpcs=calls)
        self._server.add_generic_rpc_handlers((_Methods(self._serve),))
        if settings.credentials is not None:
            probes = ProbeService(settings.party, settings.digest, _only_name)
            methods = {PROBE: grpc.stream_stream_rpc_method_handler(probes.answer)}
            self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
        try:
            if settings.credentials is None:
                port = self._server.add_insecure_port(settings.port)
            else:
                port = self._server.add_secure_port(settings.port, server_credentials(settings.credentials))
        except RuntimeError:
            port = 0
        if not port:
            self.stop(0)
            reason = why_not_listen(settings.port)
            raise cannot_listen(settings.party, settings.port, reason, coordinates=settings.coordinates) from reason
        self._server.start()

    def stop(self, seconds: float) -> None:
        """Wait up to some seconds for streams to end, then end them, and all threads."""
        if self._server is not None:
            self._server.stop(seconds).wait()
            self._server = None
        if self._pool is not None:
            self._pool.shutdown(wait=True)
            self._pool = None
        for thread in self._readers:
            thread.join()

    def _serve(self, stream: Stream, incoming: Iterator[bytes], context: Any) -> Iterator[bytes]:  # noqa: ANN401 - grpc has no types
        """Greet whoever dialled, then write the stream from here and read it in another thread."""
        door = self._door
        stream.cancel = context.cancel
        if not context.add_callback(stream.end):
            return
        timer = door.timers.after(door.settings.rhythm.hello, context.cancel)
        try:
            first = next(incoming, None)
        except grpc.RpcError:
            return
        finally:
            timer.cancel()
        if first is None:
            return
        names = _names(context) if door.settings.credentials is not None else None
        try:
            desk, own = door.admit(stream, first, names)
        except CutlayerError as error:
            door.refused(error, first, names)
            yield single(abort_of(error, door.settings.party), door.settings.run)
            return
        reader = threading.Thread(
            target=desk.follow, args=(stream, incoming), name=f"cutlayer-{door.settings.party}-reader", daemon=True
        )
        with self._lock:
            reader.start()
            self._readers = [thread for thread in self._readers if thread.is_alive()] + [reader]
        yield single(own, desk.settings.run)
        yield from desk.speak(stream)


class _Methods(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc has no types
    """Gives each call of the link's method a stream of its own, whose ear gRPC's thread calls with each message."""

    def __init__(self, serve: Callable[[Stream, Iterator[bytes], Any], Iterator[bytes]]) -> None:
        self._serve = serve

    def service(self, handler_call_details: Any) -> Any:  # noqa: ANN401 - grpc has no types
        """Return how a call is answered; None: it is of another method."""
        if handler_call_details.method != f"/{SERVICE}/{METHOD}":
            return None
        stream = Stream(cancel=lambda: None)
        serve = partial(self._serve, stream)
        return grpc.stream_stream_rpc_method_handler(serve, request_deserializer=stream.hear)


def _only_name(context: Any) -> str:  # noqa: ANN401 - grpc has no types
    names = _names(context)
    return names[0] if len(names) == 1 else ""


def _names(context: Any) -> tuple[str, ...]:  # noqa: ANN401 - grpc has no types
    """Return the DNS names of the client's certificate, which gRPC has verified."""
    names = context.auth_context().get("x509_subject_alternative_name", ())
    return tuple(name.decode("utf-8", "replace") for name in names)
