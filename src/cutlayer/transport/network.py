"""A run's network as one party uses it: meet the others, send and take frames, finish or abort.

```python
with Network(settings, notify) as network:
    start = network.rendezvous(Ready(counts, checkpoints))
    network.open(admission, bounds)
    network.send("server", frame)
    frame = network.recv("server", tag)
    network.finish()
```
All but `abort` and `close` raise `SessionReset` when a party has restarted: the driver rolls back and calls
`rendezvous` again. Every wait has a deadline.

| code | error | meaning |
| --- | --- | --- |
| E431 | ProgramError | the network is closed |
| E432 | ProgramError | a frame for a party that there is not |
| E433 | ProgramError | the notify callback failed |
| E621 | DeadlineError | a frame did not come, or the others did not finish, within `deadlines.receive` |
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import Final, Self

from cutlayer.core.admission import Admission
from cutlayer.core.program import Tag
from cutlayer.engine.wire import KIND_DATA, Frame
from cutlayer.errors import CutlayerError, ProgramError
from cutlayer.transport.control import Bye, Notice
from cutlayer.transport.grpc_server import Desk
from cutlayer.transport.handshake import abort_of, typed
from cutlayer.transport.link import Parcel
from cutlayer.transport.links import Links, unfinished
from cutlayer.transport.notifier import Notifier, Notify
from cutlayer.transport.peer import Peer
from cutlayer.transport.reception import Reception
from cutlayer.transport.relay import Relays
from cutlayer.transport.session import Ready, SessionReset, Start
from cutlayer.transport.settings import Deadlines, NetworkSettings, check_settings, route
from cutlayer.transport.steward import Steward, no_session, resting
from cutlayer.transport.timers import Timers
from cutlayer.transport.tls import check_credentials
from cutlayer.transport.watch import Watch, busy

_BRIEFLY: Final = 1e-6  # seconds; in fact as long as the system takes to wake a thread
_LOOK: Final = 1.0  # seconds between two looks at who is there, while a party waits for the others

__all__ = ["Deadlines", "Network", "NetworkSettings", "Notify", "Ready", "SessionReset", "Start", "over"]


class Network:
    """This party's links with all others, and its place in the run's sessions. A `base.Transport`.

    Args:
        settings: Who and where this party is.
        notify: Called, from a thread of its own, with what people should know: "connected", "lost", "returned"
            (party), "waiting" (parties), "reset" (party, session), "aborted" (party, code, what). Never with data.
        listens: False: a `Hall` listens, and lets others in at this network's `desk`.
        tells: It only tells of an error, and is not heard where another process of this party has come.

    Raises:
        ConfigError: E211 to E213, settings that cannot work.
        CertificateError: this party's own certificate is not usable.
    """

    def __init__(self, settings: NetworkSettings, notify: Notify, *, listens: bool = True, tells: bool = False) -> None:
        """Check the settings; nothing is opened before the `with`."""
        check_settings(settings)
        if settings.credentials is not None:
            check_credentials(settings.credentials, now=datetime.now(UTC))
        self._settings = settings
        self._notifier = Notifier(f"cutlayer-{settings.party}-notify", notify, self._failed)
        peers = {name: Peer(name, settings) for name in settings.others if route(settings, name) != "relay"}
        where = f"party {settings.party}"
        self._timers = Timers(
            f"cutlayer-{settings.party}-timers", lambda error: self._steward.fail(typed(error, where))
        )
        self._steward = Steward(settings, peers, self._notifier.post)
        self._steward.takes_part = not tells
        self._watch = Watch(settings, self._steward, self._timers)
        self._relays = Relays(settings, self._steward)
        reception = Reception(settings, self._steward, self._watch, self._relays)
        self.desk = Desk(settings, self._steward, self._watch, reception, self._timers)
        self._links = Links(self.desk, listens=listens)

    @property
    def failed(self) -> bool:
        """Whether the network is closed, or has failed: then nothing can be done with it any more."""
        return self._steward.closing or self._steward.failure is not None

    def __enter__(self) -> Self:
        """Listen, and dial the coordinator. Raises `LinkError` E604 if the party cannot listen at its address."""
        self._links.start()
        self._notifier.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close; if an error leaves the `with`, the others are told that this party has stopped."""
        if error is not None and not self._steward.member.done:
            own = error if isinstance(error, CutlayerError) else _stopped(error, self._settings.party)
            self._steward.fail(own, tell=abort_of(error, self._settings.party))
        self.close()

    def rendezvous(self, ready: Ready) -> Start:
        """Say what this party brings, wait for all parties, and return what all begin with.

        Waits at most `deadlines.join` seconds the first time and `deadlines.patience` after a reset; then, while all
        who are missing are connected, and so in a long step, `deadlines.receive`.

        Raises:
            PeerError: E702, a party never came, E701, a lost one did not come back; all parties raise this.
            HandshakeError, CertificateError: a link with another party cannot be.
        """
        steward, deadlines = self._steward, self._settings.deadlines
        with steward.changed:
            allowed = deadlines.patience if steward.member.session else deadlines.join
            begin, deadline = time.monotonic(), time.monotonic() + allowed
            steward.say(steward.member.begin(ready))
            self._watch.tell_missing()
            seen = steward.member.session
            while True:
                steward.check()
                start = steward.member.take()
                if start is not None:
                    self._watch.need_all()
                    return start
                if steward.farewell is not None:
                    steward.fail(steward.farewell)
                    continue
                if steward.member.session != seen:  # one more session came and went
                    seen, begin = steward.member.session, time.monotonic()
                    deadline = begin + deadlines.patience
                now = time.monotonic()
                if seen and busy(self._watch):
                    deadline = max(deadline, min(now + deadlines.patience, begin + deadlines.receive))
                left = deadline - now
                if left <= 0:
                    break
                steward.changed.wait(min(left, _LOOK))
        error = self._watch.absent()
        steward.fail(error)
        steward.check()
        raise error

    def open(self, admission: Admission, bounds: Mapping[str, int]) -> None:
        """Let the frames of the session in; those that came before wait unread.

        Args:
            admission: Says which frames the program expects; asked before memory is taken.
            bounds: Source -> the most frames of it that may wait here.

        Raises:
            ProgramError: E430, there was no rendezvous.
        """
        self._steward.open(admission, bounds)
        for name in bounds:
            self._links.need(name)

    def send(self, to: str, *frames: Frame) -> None:
        """Queue frames; see `base.Transport.send`."""
        steward = self._steward
        if not steward.opened or any(frame.tag.session != steward.opened for frame in frames):
            steward.check()  # the session may have ended
            raise no_session(self._settings.party)
        peer = steward.peers.get(to)
        if peer is not None:
            if peer.stream is None:
                self._links.need(to)
            parcels = [Parcel(kind=KIND_DATA, control=f.control, payload=f.payload, size=f.nbytes) for f in frames]
            peer.put_waiting(parcels, self._settings.deadlines.send, steward.check)
        elif to in self._settings.others:
            for frame in frames:
                self._relays.send(to, frame, steward.check)
        else:
            raise ProgramError(
                f"there is no party {to!r} to send to",
                where=f"party {self._settings.party}",
                expected=f"one of {', '.join(self._settings.others)}",
                remedy="correct the name",
                code="E432",
            )

    def flush(self) -> None:
        """Leave the interpreter's lock to the thread that writes; see `base.Transport.flush`.

        It would get it only when this one next enters torch or a system call: in a small step, half a message later.
        """
        time.sleep(_BRIEFLY)

    def recv(self, source: str, tag: Tag) -> Frame:
        """Take the frame with this tag; see `base.Transport.recv`."""
        return self._steward.take(source, tag)

    def abort(self, error: CutlayerError) -> None:
        """Stop the run at all parties: they raise `PeerError` with this party's name, the code and the remedy.

        What they are told is the error's sentence, code and remedy: never a value or a traceback; and `got` and
        `expected` (versions, digests, names, dates) only of errors of the network itself.
        """
        self._steward.fail(error)

    def finish(self, within: float | None = None) -> None:
        """Wait until all parties have finished and everything has arrived, then close.

        Args:
            within: Seconds that this may take. None: `deadlines.receive`.

        Raises:
            DeadlineError: E621, not within that time.
        """
        steward = self._steward
        deadline = time.monotonic() + (self._settings.deadlines.receive if within is None else within)
        steward.check()
        if not steward.member.taken:
            raise no_session(self._settings.party)
        self._links.settle(deadline)
        steward.say(Bye(steward.member.taken))
        with steward.changed:
            while not steward.member.done:
                if steward.farewell is not None and resting(steward):
                    steward.fail(steward.farewell)
                steward.check()
                left = deadline - time.monotonic()
                if left <= 0:
                    raise unfinished(self.desk)
                steward.changed.wait(left)
        self.close()

    def rest(self) -> None:
        """Say that this party has all that it wanted of the session; it may `rendezvous` for another, or `finish`."""
        self._steward.say(Notice("resting", (self._settings.party,)))

    def close(self) -> None:
        """Say what must still be said, for at most `deadlines.close` seconds, and end all streams and threads."""
        deadline = time.monotonic() + self._settings.deadlines.close
        self._links.close()
        self._notifier.close(max(0.1, deadline - time.monotonic()))

    def _failed(self, error: BaseException) -> None:
        self._steward.fail(
            ProgramError(
                "the notify callback failed",
                where=f"party {self._settings.party}",
                got=type(error).__name__,
                remedy="correct the callback",
                code="E433",
            )
        )


def over(link: Network) -> bool:
    """Whether the session that a party is in has ended: another one has restarted, or asks for a new session."""
    return link._steward.member.over


def _stopped(error: BaseException, party: str) -> ProgramError:
    return ProgramError(
        "this party has stopped",
        where=f"party {party}",
        got=type(error).__name__,
        remedy="look for that error above",
        code="E431",
    )
