"""The side of a link that dials: one thread a peer, which dials again until the network is closed.

What passes by itself (no route, connection reset, server not up yet, another process of this party) is tried again,
with random pauses; what does not
(certificates, version, plan, run, a proxy that refuses) fails the run. gRPC tells neither apart, so a failed dial is
looked into.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator
from typing import Any, Final

import grpc

from cutlayer.errors import CertificateError, CutlayerError, HandshakeError
from cutlayer.transport.addresses import host_port
from cutlayer.transport.certificates import printable
from cutlayer.transport.contact import Target, diagnose
from cutlayer.transport.control import Abort
from cutlayer.transport.grpc_common import METHOD, SERVICE, channel_to
from cutlayer.transport.grpc_server import Desk
from cutlayer.transport.handshake import SECOND, error_of, hello_of, read_hello, single, typed
from cutlayer.transport.peer import Stream
from cutlayer.transport.reach import REFUSALS
from cutlayer.transport.settings import proxy_to

__all__ = ["Dialer"]

_AT_ONCE: Final = 0.1  # seconds: the longest pause after a stream that was up
_FIRST_PAUSE: Final = 0.5  # seconds, doubled after each failure
_WITHIN: Final = 6  # so many attempts, at least, before patience is over
_PROBE: Final = 5.0  # seconds that looking into a failure may take


def pause(failures: int, longest: float) -> float:
    """Return the longest pause, in seconds, after so many failures in a row; half of it is the shortest."""
    return min(longest, _FIRST_PAUSE * 2 ** min(failures - 1, 10) if failures else _AT_ONCE)


class Dialer:
    """Keeps the link with one peer up."""

    def __init__(self, desk: Desk, name: str) -> None:
        """Make the thread; `start` starts it."""
        self._desk, self.name = desk, name
        self._peer = desk.steward.peers[name]
        self._stop = threading.Event()
        self._call: Any = None
        self._suspicion = ""
        host, port = host_port(desk.settings.addresses[name])
        self._target = Target(party=name, host=host, port=port, proxy=proxy_to(desk.settings, name))
        deadlines, party = desk.settings.deadlines, desk.settings.party
        self._longest = min(desk.settings.rhythm.retry, deadlines.join / _WITHIN, deadlines.patience / _WITHIN)
        self._thread = threading.Thread(target=self._run, name=f"cutlayer-{party}-dials-{name}", daemon=True)

    @property
    def dials(self) -> bool:
        """Whether it still tries to bring the link up, or to keep it."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Begin to dial."""
        self._thread.start()

    def stop(self) -> None:
        """Dial no more."""
        self._stop.set()

    def join(self, seconds: float) -> None:
        """Wait for the stream to end by itself, then end it."""
        self._thread.join(seconds)
        call = self._call
        if self._thread.is_alive() and call is not None:
            call.cancel()
        self._thread.join()

    def _run(self) -> None:
        failures = 0
        while not self._stop.is_set():
            failure = self._desk.steward.failure
            if failure is not None and failure.code == SECOND:
                return  # whoever would be reached now is to hear nothing of this process
            try:
                reached, error = self._attempt()
            except Exception as met:  # whatever it is, nobody else would learn of it
                reached, error = True, typed(met, f"party {self._desk.settings.party}, dialling {self.name}")
            failures = 0 if reached else failures + 1
            if error is not None:
                self._desk.steward.fail(error)
                return
            if reached and self._desk.steward.failure is not None:
                return  # what had to be said was said, as far as that was possible
            self._stop.wait(pause(failures, self._longest) * (1 + secrets.randbelow(1000) / 1000) / 2)

    def _attempt(self) -> tuple[bool, CutlayerError | None]:
        """Dial once and talk until the stream ends. Returns whether the peer was reached, and what is final."""
        desk, settings = self._desk, self._desk.settings
        channel = channel_to(self.name, settings.addresses[self.name], settings.credentials, self._target.proxy)
        stream = Stream(cancel=channel.close)
        timer = desk.timers.after(settings.rhythm.hello, channel.close)
        try:
            try:
                method = channel.stream_stream(f"/{SERVICE}/{METHOD}", response_deserializer=stream.hear)
                call = method(self._speak(stream))
            except ValueError:  # the timer closed the channel before the call
                return False, None
            self._call, stream.cancel = call, lambda: desk.timers.post(call.cancel)  # a call may wait for `ear`
            first = next(call, None)
            timer.cancel()
            if first is None:
                return False, None
            refusal = self._greet(stream, first)
            if refusal is not None and refusal.code == SECOND:  # it passes once the other process has ended
                desk.watch.failing(self.name, f"{refusal.code} {refusal.what}", refusal)
                return False, None
            if refusal is not None:
                return False, refusal
            desk.follow(stream, call)
            return True, None
        except grpc.RpcError as error:
            return False, self._look_into(error)
        finally:
            timer.cancel()
            stream.end()
            with self._peer.changed:
                self._peer.changed.notify_all()
            channel.close()
            self._call = None

    def _greet(self, stream: Stream, first: bytes) -> CutlayerError | None:
        """Read the answer to our hello; return why the two cannot talk, if so: never, but for E649."""
        try:
            answer = read_hello(first)
            if isinstance(answer, Abort):
                return error_of(answer, self.name, self._desk.settings)
            self._desk.admit(stream, first, None, expected=self.name)
        except CutlayerError as error:
            return error
        return None

    def _speak(self, stream: Stream) -> Iterator[bytes]:
        """Yield our hello, and all else once the peer has answered it."""
        desk, peer = self._desk, self._peer
        with peer.changed:
            wanted = peer.link.inbox.wanted if desk.steward.takes_part else 0
            hello = hello_of(desk.settings, desk.steward.incarnation, peer.link.remote, wanted)
        yield single(hello, desk.settings.run)
        with peer.changed:
            while not (stream.closed or peer.stream is stream):
                peer.changed.wait()
        yield from desk.speak(stream)

    def _look_into(self, error: grpc.RpcError) -> CutlayerError | None:
        """Return what is final about a failed dial; note all else as the reason why the peer is not there."""
        settings = self._desk.settings
        code, details = error.code(), error.details() or ""
        found: CutlayerError | None = None
        if code is grpc.StatusCode.UNIMPLEMENTED:
            return HandshakeError(
                "what answers is no cutlayer",
                where=f"party {settings.party}, dialling {self.name} at {settings.addresses[self.name]}",
                got=details[:200],
                remedy="correct the address",
                code="E646",
            )
        if code is grpc.StatusCode.UNAVAILABLE and not self._stop.is_set():
            found = diagnose(self._target, settings.credentials, settings.party, _PROBE)
        cause = f"{found.code} {found.what}" if found is not None else _in_words(code, details)
        again = found is not None and found.code == self._suspicion
        self._desk.watch.failing(self.name, cause, found)
        self._suspicion = found.code if found is not None else ""
        final = found is not None and (isinstance(found, CertificateError | HandshakeError) or found.code in REFUSALS)
        return found if final and again else None


def _in_words(code: grpc.StatusCode, details: str) -> str:
    """Return why a call of gRPC ended; its own text, of addresses and frames of HTTP/2, where nothing better is known.

    UNAVAILABLE is what it says of a connection that ended or never came about.
    """
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        return "the connection ended"
    return f"{code.name.lower().replace('_', ' ')}: {printable(details)}"
