"""All links of a party together: who listens, who is dialled, and how they are closed."""

from __future__ import annotations

import time
from typing import Final

from cutlayer.errors import CutlayerError, DeadlineError
from cutlayer.transport.grpc_dialer import Dialer
from cutlayer.transport.grpc_server import Desk, RunDoor, Server
from cutlayer.transport.handshake import SECOND
from cutlayer.transport.listening import in_use
from cutlayer.transport.peer import Peer
from cutlayer.transport.settings import route

__all__ = ["Links", "unfinished"]

_LEAST = 0.1  # seconds that a thread has to end, when time is up
_LOOK = 0.2  # seconds between two looks at who may still come
_UNTOLD: Final = frozenset({"E431", "E702", SECOND})
"""Failures for which nobody is waited for: this party was stopped, the others did not come, or another process of this
party goes on."""


class Links:
    """The server, the dialers and the timers of a party. Only the driver's thread calls these methods."""

    def __init__(self, desk: Desk, *, listens: bool = True) -> None:
        """Nothing is opened before `start`."""
        self._desk = desk
        self._server = Server(RunDoor(desk)) if listens else None
        self._dialers: dict[str, Dialer] = {}

    def start(self) -> None:
        """Listen, and dial the coordinator; as the coordinator, dial whom it must, since they wait for it.

        Raises:
            LinkError: E604, the party cannot listen at its address. Whom it can dial is told; but nobody where the port
                is in use: it may be this party, started twice, and its run is to go on.
        """
        self._desk.timers.start()
        self._desk.watch.look()
        failed: CutlayerError | None = None
        try:
            if self._server is not None:
                self._server.start()
        except CutlayerError as error:
            failed, self._desk.steward.takes_part = error, False
        if failed is None or not in_use(failed.__cause__):
            settings = self._desk.settings
            first = [settings.coordinator] if settings.party != settings.coordinator else settings.others
            for name in first:
                self.need(name)
        if failed is not None:
            if self._dialers:
                self._desk.steward.fail(failed)
            self.close()
            raise failed

    def need(self, name: str) -> None:
        """If the link with a peer is this party's to dial, see to it that it comes up."""
        if name in self._desk.steward.peers and route(self._desk.settings, name) == "dial":
            if name not in self._dialers:
                self._dialers[name] = Dialer(self._desk, name)
                self._dialers[name].start()
            self._desk.watch.need(name)

    def settle(self, deadline: float) -> None:
        """Wait until everything that was sent has arrived.

        Raises:
            DeadlineError: E621, not before `deadline`, by the monotonic clock.
            BaseException: what `Steward.check` raises.
        """
        steward = self._desk.steward
        for peer in steward.peers.values():
            with peer.changed:
                while not peer.link.outbox.empty:
                    steward.check()
                    left = deadline - time.monotonic()
                    if left <= 0:
                        raise unfinished(self._desk)
                    peer.changed.wait(left)

    def close(self) -> None:
        """Say what must still be said, for at most `deadlines.close` seconds, and end all streams and threads."""
        desk, steward = self._desk, self._desk.steward
        if steward.closing:
            return
        deadline = time.monotonic() + desk.settings.deadlines.close
        if steward.failure is not None or steward.member.done:
            for peer in steward.peers.values():
                self._flush(peer, deadline)
        with steward.changed:
            steward.closing = True
            steward.changed.notify_all()
        for dialer in self._dialers.values():
            dialer.stop()
        for peer in steward.peers.values():
            with peer.changed:
                if peer.stream is not None:
                    peer.stream.draining = True
                peer.changed.notify_all()
        if self._server is not None:
            self._server.stop(max(_LEAST, deadline - time.monotonic()))
        for dialer in self._dialers.values():
            dialer.join(max(_LEAST, deadline - time.monotonic()))
        desk.timers.close(max(_LEAST, deadline - time.monotonic()))

    def _flush(self, peer: Peer, deadline: float) -> None:
        """Wait until a peer has everything; at times also for one whose link is down just now: see `_may_come`."""
        with peer.changed:
            while not (peer.link.outbox.empty or peer.left):
                gone = peer.stream is None or peer.stream.closed
                left = deadline - time.monotonic()
                if left <= 0 or (gone and not self._may_come(peer)):
                    return
                peer.changed.wait(min(left, _LOOK) if gone else left)

    def _may_come(self, peer: Peer) -> bool:
        """Whether to wait for a peer whose link is down: after a good end, and when a run fails before it has begun.

        Then the others still dial, and would learn only that this party is not there.
        """
        steward = self._desk.steward
        failure = steward.failure
        early = failure is not None and failure.code not in _UNTOLD and not steward.member.session
        if route(self._desk.settings, peer.name) == "dial":
            dialer = self._dialers.get(peer.name)
            able = dialer is not None and dialer.dials
        else:
            able = self._server is not None and self._server.listens
        return steward.member.done or (early and able)


def unfinished(desk: Desk) -> DeadlineError:
    """Return the error for a run that does not come to its end."""
    conductor, settings = desk.steward.conductor, desk.settings
    late = [name for name in settings.parties if conductor is not None and name not in conductor.finished]
    names = ", ".join(name for name in late if name != settings.party) or "the others"
    return DeadlineError(
        f"{names} did not finish in time",
        where=f"party {settings.party}, at the end of session {desk.steward.member.taken}",
        expected=f"all parties at the end within {settings.deadlines.receive:g} seconds",
        remedy="look at their terminals; if their last steps take longer, raise deadlines.receive",
        code="E621",
    )
