"""Which parties are there: links that come and go, how long to wait for them, and what people are told of it.

A lost party has `deadlines.patience` seconds to come back. Its own link's end tells a party at once; the others learn
it from the coordinator.

| code | error | meaning |
| --- | --- | --- |
| E701 | PeerError | a party was lost, or cannot be reached, and patience is over |
| E702 | PeerError | a party never came |
| E704 | PeerError | a party left before the end |
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cutlayer.errors import CutlayerError, PeerError
from cutlayer.transport.control import Notice
from cutlayer.transport.handshake import SECOND
from cutlayer.transport.peer import Peer, parcel_of
from cutlayer.transport.reach import OF_PROXIES
from cutlayer.transport.remedies import when_absent, when_left, when_lost
from cutlayer.transport.settings import NetworkSettings, route
from cutlayer.transport.steward import Steward
from cutlayer.transport.timers import Timer, Timers

__all__ = ["Watch", "busy", "note_refused"]

_TOLD_AFTER = 0.2  # seconds in which changes of who is missing are gathered


@dataclass
class _View:
    """What was last seen of a peer's link, and why it fails to come up."""

    connected: bool = False
    incarnation: int = 0
    patience: Timer | None = None
    cause: str = ""
    blocked: CutlayerError | None = None  # by this party's own proxy, or by another process of it
    told: str = ""  # the code of what people were told of that
    unreached: bool = False  # people were told that no answer comes
    refused: CutlayerError | None = None  # why this party did not let in whoever came last in the peer's name


class Watch:
    """Follows the links of `peers`; `steward.changed` guards it.

    `link_changed` looks at how things are now, so it does not matter in which order threads call it.
    """

    def __init__(self, settings: NetworkSettings, steward: Steward, timers: Timers) -> None:
        """Start with no link up."""
        self._settings, self._steward, self._timers = settings, steward, timers
        self._peers: Mapping[str, Peer] = steward.peers
        self._views = {name: _View() for name in self._peers}
        self._gone: dict[str, set[str]] = {}  # party -> who says that it is gone
        self._told: tuple[str, ...] = ()
        self._telling = False
        self._begun = time.monotonic()

    def look(self) -> None:
        """End streams on which nothing came for too long; now, and again and again."""
        silence = self._settings.rhythm.silence
        for peer in self._peers.values():
            stream = peer.stream
            if stream is not None and not peer.busy and time.monotonic() - stream.heard > silence:
                stream.end()
                stream.cancel()
        self._timers.after(self._settings.rhythm.heartbeat, self.look)

    def link_changed(self, name: str) -> None:
        """A stream of this peer has begun or ended."""
        with self._steward.changed:
            peer, view = self._peers[name], self._views[name]
            connected, incarnation = peer.stream is not None, peer.link.remote
            if connected and not view.connected:
                self._up(name, view)
            elif view.connected and not connected:
                self._down(name, view)
            view.connected = connected
            if connected and incarnation != view.incarnation:
                known, view.incarnation = view.incarnation != 0, incarnation
                self._steward.met(name, incarnation, known)
                self.tell_missing()
            self._steward.changed.notify_all()

    def need(self, name: str) -> None:
        """The session needs this link: if it is not up, it must be within `patience`."""
        with self._steward.changed:
            view = self._views[name]
            if not view.connected and view.patience is None:
                view.patience = self._timers.after(self._settings.deadlines.patience, lambda: self._over(name))

    def need_all(self) -> None:
        """A session begins: the links with the coordinator, or all of the coordinator's, must be up or come back."""
        for name in self._peers:
            if self._settings.coordinator in (name, self._settings.party):
                self.need(name)

    def noticed(self, message: Notice) -> None:
        """The coordinator says that parties are lost, or back."""
        with self._steward.changed:
            for party in message.parties:
                if party != self._settings.party and party in self._settings.parties:
                    self._mark(party, "coordinator", gone=message.event == "lost")

    def failing(self, name: str, cause: str, found: CutlayerError | None = None) -> None:
        """Note why a link does not come up, for the error to come.

        If this party's own proxy is why, or another process of it, its people are told when that is found again: only
        they can help. All else they are told once, of a peer that has not come in a heartbeat's time.
        """
        with self._steward.changed:
            view = self._views[name]
            before, view.cause = view.blocked, cause
            view.blocked = found if found is not None and found.code in (*OF_PROXIES, SECOND) else None
            if view.blocked is None:
                late = time.monotonic() - self._begun > self._settings.rhythm.heartbeat
                if late and self._steward.failure is None and not (view.unreached or view.incarnation):
                    view.unreached = True
                    self._steward.event("unreached", {"party": name, "cause": cause})
                return
            if before is None or before.code != view.blocked.code or view.told == before.code:
                return
            view.told = before.code
            what = {"party": name, "code": before.code, "what": before.what, "got": before.got}
            self._steward.event("second" if before.code == SECOND else "blocked", {**what, "remedy": before.remedy})

    def absent(self) -> CutlayerError:
        """Return the error for a rendezvous to which somebody did not come: E702, E649, or that of our own proxy."""
        steward, settings = self._steward, self._settings
        with steward.changed:
            coordinator = self._views.get(settings.coordinator)
            if steward.conductor is not None:
                missing = steward.conductor.missing
            elif coordinator is None or coordinator.connected:
                missing = steward.member.missing
            else:
                missing = ()
            missing = missing or (settings.coordinator,)
            names, cause = ", ".join(missing), ""
            said, remedy = _refusals(self._views, missing)
            if len(missing) == 1 and missing[0] in self._views:
                view = self._views[missing[0]]
                if view.blocked is not None:
                    return view.blocked
                cause = view.cause
                if view.told == SECOND:
                    remedy = (
                        f"another process ran as {settings.party}: look into its run's folder first, the run has "
                        "probably come to its end; to run again, start all parties"
                    )
            lost = [party for party in missing if party in self._gone]
            there = all(party in self._views and self._views[party].connected for party in missing)
            again = steward.member.session > 0
            there = there or (again and busy(self))
        if lost:
            return _lost(settings, lost, cause)
        limit = ("receive" if there else "patience") if again else "join"
        return PeerError(
            f"{names} did not get ready" if there else f"{names} did not come{said}",
            where=f"party {settings.party}, waiting for all parties" + ("" if there else _way(settings, missing)),
            expected=f"all of {', '.join(settings.parties)} within {getattr(settings.deadlines, limit):g} seconds",
            got=cause,
            remedy=remedy or when_absent(settings, names, limit),
            code="E702",
        )

    def tell_missing(self) -> None:
        """If this is the coordinator, tell all soon for whom it waits."""
        with self._steward.changed:
            if self._steward.conductor is not None and not self._telling:
                self._telling = True
                self._timers.after(_TOLD_AFTER, self._tell)

    def _tell(self) -> None:
        steward = self._steward
        with steward.changed:
            self._telling = False
            conductor = steward.conductor
            if conductor is None or not conductor.missing or steward.failure is not None:
                return
            message = Notice("waiting", conductor.missing)
            for name, view in self._views.items():
                if view.connected:
                    self._peers[name].put(parcel_of(message))
            if conductor.missing != self._told:
                self._told = conductor.missing
                steward.event("waiting", {"parties": conductor.missing})

    def _up(self, name: str, view: _View) -> None:
        view.blocked, view.told, view.refused = None, "", None
        if view.patience is not None:
            view.patience.cancel()
            view.patience = None
        if not view.incarnation:
            self._steward.event("connected", {"party": name})
        self._mark(name, "link", gone=False)

    def _down(self, name: str, view: _View) -> None:
        steward = self._steward
        if steward.closing or steward.failure is not None or steward.member.done:
            return
        if self._peers[name].left:
            if self._settings.coordinator in (name, self._settings.party):
                steward.fail(_left(self._settings, name))
            return
        view.patience = self._timers.after(self._settings.deadlines.patience, lambda: self._over(name))
        self._mark(name, "link", gone=True)

    def _mark(self, party: str, says: str, *, gone: bool) -> None:
        """Note who says that a party is gone; tell when the first says so, and when nobody does any more."""
        before = bool(self._gone.get(party))
        voices = self._gone.setdefault(party, set())
        (voices.add if gone else voices.discard)(says)
        if not voices:
            del self._gone[party]
        if bool(voices) == before:
            return
        event = "lost" if gone else "returned"
        self._steward.event(event, {"party": party})
        if self._settings.coordinates:
            for name, view in self._views.items():
                if name != party and (view.connected or view.incarnation):
                    self._peers[name].put(parcel_of(Notice("lost" if gone else "returned", (party,))))

    def _over(self, name: str) -> None:
        """Patience is over: if the link is needed and still not up, the run fails."""
        steward, settings = self._steward, self._settings
        with steward.changed:
            view = self._views[name]
            view.patience = None
            central = settings.coordinator in (name, settings.party)
            needed = steward.member.session > 0 if central else steward.opened > steward.member.ended
            if view.connected or steward.closing or steward.member.done or not needed:
                return
            steward.fail(view.blocked or _lost(settings, [name], view.cause))


def busy(watch: Watch) -> bool:
    """Return whether all who are missing at a rendezvous are connected, as far as this party knows."""
    steward, settings, views = watch._steward, watch._settings, watch._views
    with steward.changed:
        if steward.conductor is not None:
            missing = [party for party in steward.conductor.missing if party != settings.party]
            return bool(missing) and all(views[party].connected for party in missing)
        return views[settings.coordinator].connected and not watch._gone.keys() & set(steward.member.missing)


def note_refused(watch: Watch, name: str, error: CutlayerError) -> None:
    """Note why whoever came as `name` was not let in, for the error to come."""
    with watch._steward.changed:
        if name in watch._views:
            watch._views[name].refused = error


def _refusals(views: Mapping[str, _View], names: Sequence[str]) -> tuple[str, str]:
    """Return who came as one of `names` and was refused, as the end of a sentence, and the remedy; both may be empty.

    Only codes and sentences of this side: they cross to the other parties.
    """
    known = {name: views[name].refused for name in names if name in views}
    found = {name: error for name, error in known.items() if error is not None}
    said = "".join(f"; who came as {name} was refused: {error.code} {error.what}" for name, error in found.items())
    return said, next((error.remedy for error in found.values()), "")


def _way(settings: NetworkSettings, names: Sequence[str]) -> str:
    """Return how this party reaches those of `names` with which it has a link; empty: with none."""
    found = ""
    for name in names:
        how = route(settings, name) if name != settings.party else "relay"
        found += f", dialling {name} at {settings.addresses[name]}" if how == "dial" else ""
        found += f", where {name} dials this party" if how == "await" else ""
    return found


def _lost(settings: NetworkSettings, lost: Sequence[str], cause: str) -> PeerError:
    names = ", ".join(lost)
    return PeerError(
        f"{names} was lost and did not come back",
        where=f"party {settings.party}{_way(settings, lost) or f', told by {settings.coordinator}'}",
        expected=f"its return within {settings.deadlines.patience:g} seconds",
        got=cause,
        remedy=when_lost(settings, names),
        code="E701",
    )


def _left(settings: NetworkSettings, name: str) -> PeerError:
    return PeerError(
        f"{name} left before the end",
        where=f"party {settings.party}, link with {name}",
        remedy=when_left(settings, name),
        code="E704",
    )
