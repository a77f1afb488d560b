"""When a session starts, is over, and is finished: the coordinator's view and a member's. Pure: messages in and out.

A session is a stretch of a run in which no party restarts. Each party says READY; once all have, the coordinator sends
START with the next number and the largest checkpoint that all hold. A party that restarts (a new incarnation), or a new
coordinator, ends the session: RESET, and all meet again. When all have said BYE, the run's network is finished.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from cutlayer.transport import control

__all__ = ["EVERYBODY", "Conductor", "Member", "Order", "Ready", "SessionReset", "Start"]

EVERYBODY: Final = ""


class SessionReset(Exception):  # noqa: N818 - control flow, not an error
    """The session is over: a party restarted. The driver rolls back to a checkpoint and meets the others again."""


@dataclass(frozen=True)
class Ready:
    """What a party brings: `counts`, its samples by mode, and `checkpoints`, the ids it holds, in ascending order."""

    counts: Mapping[str, int]
    checkpoints: tuple[int, ...]


@dataclass(frozen=True)
class Start:
    """What all begin with.

    Attributes:
        session: Number of the session, for all tags.
        counts: Mode -> party -> samples.
        checkpoint: The largest that all hold; -1: begin at the beginning.
    """

    session: int
    counts: Mapping[str, Mapping[str, int]]
    checkpoint: int


@dataclass(frozen=True)
class Order:
    """A message that the coordinator sends `to` one party or to everybody but `besides`."""

    to: str
    message: control.Message
    besides: str = ""


@dataclass
class Conductor:
    """The coordinator's view. Methods return what is to be sent, itself included among everybody."""

    parties: tuple[str, ...]
    session: int = 0
    active: bool = False
    done: bool = False
    present: dict[str, int] = field(default_factory=dict)
    ready: dict[str, control.Ready] = field(default_factory=dict)
    finished: set[str] = field(default_factory=set)
    resting: set[str] = field(default_factory=set)
    _floor: dict[str, int] = field(default_factory=dict)

    @property
    def missing(self) -> tuple[str, ...]:
        """Return the parties that the next session waits for."""
        return () if self.active else tuple(party for party in self.parties if party not in self.ready)

    def meet(self, party: str, incarnation: int) -> list[Order]:
        """A party's link is up. A process that was not known before ends the session it was thought to be in."""
        if self.present.get(party) == incarnation or self.done:
            return []
        self.present[party] = incarnation
        self._floor[party] = 0
        self.ready.pop(party, None)
        self.resting.discard(party)
        return self._end(party) if self.active else []

    def hear(self, party: str, message: control.Message) -> list[Order] | None:
        """Act upon a message of a party; None: it is none that parties send their coordinator."""
        if isinstance(message, control.Ready):
            return self.on_ready(party, message)
        if isinstance(message, control.Bye):
            return self.on_bye(party, message)
        if isinstance(message, control.Notice) and message.event == "resting":
            self.on_resting(party)
            return []
        return None

    def on_ready(self, party: str, message: control.Ready) -> list[Order]:
        """A party waits for a session; in the middle of one, this ends it. What was sent before a START is stale."""
        if self.done or message.session < self._floor.get(party, 0):
            return []
        orders = self._end(party) if self.active else []
        self.resting.discard(party)
        self.ready[party] = message
        return orders + ([] if self.missing else [self._begin()])

    def on_bye(self, party: str, message: control.Bye) -> list[Order]:
        """A party has finished its programs."""
        if not self.active or message.session != self.session or self.done:
            return []
        self.finished.add(party)
        self.done = self.finished >= set(self.parties)
        return [Order(EVERYBODY, control.Bye(self.session))] if self.done else []

    def on_resting(self, party: str) -> None:
        """A party has what it wanted of the session that runs; it may ask for another."""
        if self.active:
            self.resting.add(party)

    def _begin(self) -> Order:
        """Start the next session. The caller has seen that nobody is missing."""
        self.session = max(self.session, *(ready.session for ready in self.ready.values())) + 1
        self.active = True
        modes = sorted({mode for ready in self.ready.values() for mode in ready.counts})
        counts = {
            mode: {party: self.ready[party].counts[mode] for party in self.parties if mode in self.ready[party].counts}
            for mode in modes
        }
        common = set.intersection(*(set(ready.checkpoints) for ready in self.ready.values()))
        incarnations = {party: self.present[party] for party in self.parties}
        self._floor = dict.fromkeys(self.parties, self.session)
        self.ready.clear()
        self.finished.clear()
        self.resting.clear()
        return Order(EVERYBODY, control.Start(self.session, counts, max(common, default=-1), incarnations))

    def _end(self, party: str) -> list[Order]:
        self.active = False
        self.ready.clear()
        self.finished.clear()
        return [Order(EVERYBODY, control.Reset(self.session, party), besides=party)]


@dataclass
class Member:
    """A party's own view: which session it is in, and which are over.

    Attributes:
        session: The last that started.
        ended: Sessions up to this one are over.
        taken: The session that the driver is in.
        started: A session that the driver has not taken yet.
        waiting: What the driver said when it began to wait.
        missing: Whom the coordinator last said that it waits for.
        done: All parties have finished.
    """

    session: int = 0
    ended: int = 0
    taken: int = 0
    started: control.Start | None = None
    waiting: Ready | None = None
    missing: tuple[str, ...] = ()
    done: bool = False

    @property
    def over(self) -> bool:
        """Whether the driver's session is over and the driver has not said that it waits for the next."""
        return self.waiting is None and 0 < self.taken <= self.ended

    def begin(self, ready: Ready) -> control.Ready:
        """The driver waits for a session; return what to tell the coordinator."""
        self.ended = max(self.ended, self.taken)
        self.waiting = ready
        self.started = None if self.started and self.started.session <= self.ended else self.started
        return self.say(ready)

    def say(self, ready: Ready) -> control.Ready:
        """Return READY with the last session that was seen."""
        return control.Ready(self.session, dict(ready.counts), tuple(sorted(ready.checkpoints)))

    def on_start(self, message: control.Start) -> bool:
        """A session starts; False if this is not what the party waits for."""
        if self.waiting is None or message.session <= self.session:
            return False
        self.session, self.started, self.missing = message.session, message, ()
        self.ended = max(self.ended, message.session - 1)
        return True

    def take(self) -> Start | None:
        """Hand a started session to the driver, which no longer waits."""
        message, self.started = self.started, None
        if message is None:
            return None
        self.waiting, self.taken = None, message.session
        return Start(message.session, message.counts, message.checkpoint)

    def on_reset(self, session: int) -> control.Ready | None:
        """A session is over. Return what to say again if the driver waits and has not seen that session."""
        if session <= self.ended:
            return None
        self.ended, self.started = session, None
        self.session = max(self.session, session)
        return self.say(self.waiting) if self.waiting is not None else None

    def on_new_coordinator(self) -> control.Ready | None:
        """The coordinator restarted and knows of no session. Return what to say again if the driver waits."""
        self.ended, self.started = max(self.ended, self.session), None
        return self.say(self.waiting) if self.waiting is not None else None
