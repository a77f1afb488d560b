"""This party's state in the run, shared by all threads: its session, its mailbox, its failure. Knows no gRPC.

`changed` guards it. Locks are taken in this order: a peer's `inbound`, `changed`, a peer's `changed`.

| code | error | meaning |
| --- | --- | --- |
| E430 | ProgramError | no session is open |
| E431 | ProgramError | the network is closed, or was never entered |
| E513 | WireError | a message that only the coordinator may send, or only to the coordinator |
| E703 | PeerError | another party failed |
| E704 | PeerError | another party left before the end |
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from cutlayer.core.admission import Admission
from cutlayer.core.program import Tag
from cutlayer.engine.wire import Frame, Label
from cutlayer.errors import CutlayerError, ProgramError, WireError
from cutlayer.transport import control
from cutlayer.transport.handshake import SECOND, abort_of, error_of
from cutlayer.transport.mailbox import Mailbox
from cutlayer.transport.peer import Peer, Stream, parcel_of
from cutlayer.transport.session import EVERYBODY, Conductor, Member, Order, SessionReset
from cutlayer.transport.settings import NetworkSettings
from cutlayer.transport.vigil import Vigil

__all__ = ["Steward", "no_session", "resting"]

Event = Callable[[str, Mapping[str, object]], None]

_GATE: Final = 1.0  # seconds between two looks at a closed gate: the end of a stream wakes nobody there


class Steward:
    """What all threads of a party agree on.

    Args:
        settings: The party's.
        peers: The parties that it has a link with.
        event: Called with what people should know; must return at once and take no lock.
    """

    def __init__(self, settings: NetworkSettings, peers: Mapping[str, Peer], event: Event) -> None:
        """Begin outside of any session."""
        self.takes_part = True  # False: this process only tells of an error
        self.settings, self.peers, self.event = settings, peers, event
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.incarnation = secrets.randbelow(2**62) + 1
        self.member = Member()
        self.conductor = Conductor(settings.parties) if settings.coordinates else None
        if self.conductor is not None:
            self.conductor.meet(settings.party, self.incarnation)
        self.expected: Mapping[str, int] = {}
        self.failure: CutlayerError | None = None
        self.closing, self.opened = False, 0
        self.farewell: CutlayerError | None = None  # what ends this party's next wait for others who rest
        self._stopped, self._reset = 0, "the session is over"
        vigil = Vigil(settings.rhythm.awake if settings.task == "training" else 0)
        self._mailbox = Mailbox(settings.party, {}, vigil)
        self._admission: Admission | None = None

    def check(self) -> None:
        """Raise what keeps the driver from going on. Takes no lock, so that it can be called with any of them held."""
        if (failure := self.failure) is not None:
            raise failure
        if self.closing:
            raise _closed(self.settings.party)
        if self.member.over:
            raise SessionReset(self._reset)

    def fail(self, error: CutlayerError, *, tell: control.Abort | None = None, besides: str = "") -> None:
        """Stop everything here, for good, and tell the others; the first failure counts.

        Args:
            error: What send, recv and rendezvous raise from now on.
            tell: What the others learn, if not of this error as this party's.
            besides: A party that knows already.
        """
        with self.lock:
            if self.failure is not None:
                return
            self.failure = error
            abort = tell or abort_of(error, self.settings.party)
            for name in self.peers if self.settings.coordinates else (self.settings.coordinator,):
                if name != besides and abort.code != SECOND:  # that is no end for others: this party goes on elsewhere
                    self.peers[name].put(parcel_of(abort))
            self._stop(error)
        self.event("aborted", {"party": abort.party, "code": abort.code, "what": abort.what})

    def say(self, message: control.Ready | control.Bye | control.Notice) -> None:
        """Tell the coordinator."""
        with self.lock:
            if self.conductor is not None:
                self.heard(self.settings.party, message)
            else:
                self.peers[self.settings.coordinator].put(parcel_of(message))

    def heard(self, source: str, message: control.Message) -> None:
        """Act upon a session message of a party.

        Raises:
            WireError: E513, it may not come from there, or not to here.
        """
        with self.lock:
            if isinstance(message, control.Abort) and self.settings.coordinator in (source, self.settings.party):
                self.fail(error_of(message, source, self.settings), tell=message, besides=source)
            elif self.conductor is not None and (orders := self.conductor.hear(source, message)) is not None:
                self.obey(orders)
            elif source == self.settings.coordinator:
                self._follow(message)
            else:
                raise _out_of_place(self.settings.party, source, message)
            self.changed.notify_all()

    def obey(self, orders: Iterable[Order]) -> None:
        """Send the coordinator's messages; this party is one of those who get them."""
        with self.lock:
            for order in orders:
                for name in self.settings.parties if order.to == EVERYBODY else (order.to,):
                    if name == order.besides:
                        continue
                    if name == self.settings.party:
                        self._follow(order.message)
                    else:
                        self.peers[name].put(parcel_of(order.message))
            self.changed.notify_all()

    def met(self, name: str, incarnation: int, known: bool) -> None:
        """The link with a party is up; `known`: it was up before, with another process of that party."""
        with self.lock:
            again, member = None, self.member
            if self.conductor is not None:
                self.obey(self.conductor.meet(name, incarnation))
            elif name == self.settings.coordinator:
                again = member.on_new_coordinator() if known else None
                self._stop_session(name)
            elif member.session > member.ended and self.expected.get(name) != incarnation:
                again = member.on_reset(member.session)
                self._stop_session(name)
            if again is not None:
                self.say(again)

    def open(self, admission: Admission, bounds: Mapping[str, int]) -> None:
        """Let the frames of the driver's session in.

        Raises:
            ProgramError: E430, there is none.
        """
        with self.lock:
            self.check()
            if not self.member.taken:
                raise no_session(self.settings.party)
            self._admission, self._mailbox = admission, Mailbox(self.settings.party, bounds, self._mailbox.vigil)
            self.opened = self.member.taken
            self.changed.notify_all()

    def admit(self, source: str, label: Label, stream: Stream | None, *, wait: bool = True) -> bool | None:
        """Wait until the session of a data frame is open; False if it is over, and the frame to be dropped.

        Called before memory is taken. With a stream, its end is the end of waiting. None: `wait` is false, and due.

        Raises:
            ContractError: the program expects no such frame, or not now.
        """
        tag, dtype, shape, _ = label
        with self.lock:
            ordered = stream is None or self.settings.coordinator in (source, self.settings.party)
            if ordered and tag.session > self.member.session:
                return False  # START comes before it on this way: it is of an older life
            while self.opened != tag.session or tag.session <= self.member.ended:
                ended = tag.session <= self.member.ended or (stream is not None and stream.closed)
                if ended or self.failure is not None or self.closing:
                    return False
                if not wait:
                    return None
                self.changed.wait(_GATE)
            admission, mailbox = self._admission, self._mailbox
        if admission is None:
            return False
        admission.check(source, tag, dtype, shape)
        mailbox.check(source, tag)
        return True

    def deliver(self, source: str, frame: Frame) -> None:
        """Put an admitted frame into the mailbox, unless its session is over. Raises `ContractError` E530."""
        with self.lock:
            mailbox = self._mailbox if self.opened == frame.tag.session > self.member.ended else None
        if mailbox is not None:
            mailbox.put(source, frame)

    def take(self, source: str, tag: Tag) -> Frame:
        """Wait for a frame. Raises what `check` raises, and DeadlineError E621."""
        with self.lock:
            self.check()
            if not self.opened:
                raise no_session(self.settings.party)
            mailbox = self._mailbox
        return mailbox.take(source, tag, self.settings.deadlines.receive)

    def _follow(self, message: control.Message) -> None:
        """Act upon a message of the coordinator; `changed` is held."""
        member = self.member
        if isinstance(message, control.Start):
            if member.on_start(message):
                self.expected = message.incarnations
                for name, peer in self.peers.items():
                    peer.expect(message.incarnations.get(name, peer.link.remote))
        elif isinstance(message, control.Reset):
            again = member.on_reset(message.session)
            self._stop_session(message.party)
            if again is not None:
                self.say(again)
        elif isinstance(message, control.Notice) and message.event == "waiting":
            member.missing = message.parties
            self.event("waiting", {"parties": message.parties})
        elif isinstance(message, control.Bye) and message.session == member.taken:
            member.done = True

    def _stop_session(self, party: str) -> None:
        """If the driver's session is over, wake the driver; `changed` is held."""
        if self.member.over and self._stopped < self.member.taken:
            self._stopped, self.opened = self.member.taken, 0
            self._reset = f"{party} restarted"
            self._stop(SessionReset(self._reset))
            self.event("reset", {"party": party, "session": self.member.taken})

    def _stop(self, reason: BaseException) -> None:
        """Give up what waits to be sent or taken, and wake everybody; `changed` is held."""
        self._mailbox.fail(reason)
        for peer in self.peers.values():
            peer.drop_unsent()
        self.changed.notify_all()


def resting(steward: Steward) -> bool:
    """Return whether all others have what they wanted of this coordinator's session, and ask for no other."""
    conductor = steward.conductor
    return conductor is not None and conductor.resting >= set(steward.settings.others)


def no_session(party: str) -> ProgramError:
    """Return the error of a call outside of a session."""
    return ProgramError(
        "no session is open",
        where=f"party {party}",
        expected="rendezvous(), then open(), then send() and recv()",
        remedy="call them in this order, again after each SessionReset",
        code="E430",
    )


def _closed(party: str) -> ProgramError:
    return ProgramError("the network is closed", where=f"party {party}", remedy="use it within `with`", code="E431")


def _out_of_place(party: str, source: str, message: control.Message) -> WireError:
    return WireError(
        "a message that may not come from this party",
        where=f"party {party}, link with {source}",
        expected="messages of sessions between the coordinator and the others only",
        got=type(message).__name__,
        remedy="install the same release of cutlayer, and the same contract, at all parties",
        code="E513",
    )
