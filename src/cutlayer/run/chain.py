"""A party's links in one served request as one: with those who ask it, and with the servers that it asks itself.

Each link is a network of two, as between a client and a server. A request that passes several servers has a number,
which its client draws and which travels along, so that a server that several ask knows what belongs together: the link
of the first of them leads, the others are lent to it in the server's lobby.

| code | error | meaning |
| --- | --- | --- |
| E456 | ProgramError | the links of one request do not fit together |
| E702 | PeerError | a party of the request did not come |
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Final, Self

import msgspec

from cutlayer.core.admission import Admission
from cutlayer.core.program import Tag
from cutlayer.core.serving import Way
from cutlayer.engine.wire import Frame
from cutlayer.errors import (
    CertificateError,
    CutlayerError,
    DeadlineError,
    HandshakeError,
    LinkError,
    PeerError,
    ProgramError,
)
from cutlayer.transport.hall import Guest
from cutlayer.transport.network import Network, Ready, SessionReset, Start, over

__all__ = ["Asked", "Chain", "Host", "Loan", "Lobby"]

Alarm = Callable[[], None]
_LOOK: Final = 0.2  # seconds between two looks at whether a link that waits for others has failed
_BITS: Final = 62
_LINK_ERRORS: Final = (CertificateError, DeadlineError, HandshakeError, LinkError, PeerError, SessionReset)


@dataclass(frozen=True)
class Asked:
    """What travels with a request: whose it is (a lane of the plan), its number, and how many samples it has."""

    lane: int
    number: int
    samples: int

    def counts(self, way: Way) -> dict[str, int]:
        """Return what a READY says of it. Between two parties alone nothing but the samples is needed."""
        more = {"lane": self.lane, "request": self.number} if len(way.parties) > 2 else {}
        return {"predict": self.samples, **more}


@dataclass(eq=False)
class Loan:
    """A link that is lent to the session that leads a request. `moved`: requests, samples, bytes sent and received."""

    guest: Guest
    session: int
    taken: bool = False
    error: BaseException | None = None
    moved: tuple[int, int, int, int] = (0, 0, 0, 0)
    done: threading.Event = field(default_factory=threading.Event)

    def end(self, error: BaseException | None) -> None:
        """Give the link back; with an error it ends too."""
        self.error = error
        self.done.set()


class Lobby:
    """Where the links of a request find each other at a server; each waits for the others at most `seconds`."""

    def __init__(self, party: str, seconds: float) -> None:
        """Begin with nobody there."""
        self._party, self._seconds = party, seconds
        self._changed = threading.Condition()
        self._loans: dict[tuple[Asked, str], Loan] = {}
        self._leads: dict[Asked, Guest] = {}  # of requests for which links are lent

    def lend(self, asked: Asked, loan: Loan) -> None:
        """Lend a guest's link to who leads the request, and wait for its end.

        Raises:
            ProgramError: E456, the request has a link in this role already. PeerError: E702, nobody took it.
            CutlayerError: what ended the request, or the link. SessionReset: the guest asks for another.
        """
        key, until = (asked, loan.guest.role), time.monotonic() + self._seconds
        with self._changed:
            if key in self._loans:
                raise _misfit(self._party, "one link in each role", f"a second one as {loan.guest.role}")
            self._loans[key] = loan
            self._changed.notify_all()
        while not loan.done.wait(_LOOK):
            with self._changed:
                late = time.monotonic() >= until
                if loan.taken or not (late or _ended(loan.guest.network)):
                    continue
                del self._loans[key]
            _go_on(loan.guest.network)
            raise _absent(self._party, "the client", self._seconds)
        if loan.error is not None:
            raise loan.error

    def lead(self, asked: Asked, guest: Guest) -> None:
        """Let a guest lead a request, until it is `left`. Raises `ProgramError` E456, another one leads it."""
        with self._changed:
            if self._leads.setdefault(asked, guest) is not guest:
                raise _misfit(self._party, "one link in each role", f"a second one as {guest.role}")

    def left(self, asked: Asked, guest: Guest) -> None:
        """Forget the request of a guest, if it leads it."""
        with self._changed:
            if self._leads.get(asked) is guest:
                del self._leads[asked]

    def borrow(self, asked: Asked, role: str, lead: Guest) -> Loan:
        """Wait for the link in this role of a request that another guest leads.

        Raises:
            PeerError: E702, it did not come. CutlayerError: the link that leads has ended. SessionReset: its guest asks
                for another.
        """
        until = time.monotonic() + self._seconds
        with self._changed:
            while (loan := self._loans.pop((asked, role), None)) is None:
                _go_on(lead.network)
                left = until - time.monotonic()
                if left <= 0:
                    raise _absent(self._party, role, self._seconds)
                self._changed.wait(min(left, _LOOK))
            loan.taken = True
        return loan


@dataclass(frozen=True)
class Host:
    """What the chain of a server needs besides: the guest that leads, and where the others are.

    `welcome` is called with all guests of a request, this one first, and may refuse it; `leave` is how long it may take
    to take leave.
    """

    guest: Guest
    lobby: Lobby
    welcome: Callable[[Sequence[Guest]], None]
    leave: float


class Chain:
    """All links of a party for the requests of one session, as one `meeting.Link`.

    Each link counts its sessions by itself: tags are changed to its own on the way.

    Args:
        ways: By lane.
        party: This party.
        dial: Opens the network with a server that this party asks; what it is given is to be called if that fails.
        host: At a server: where its guests are. None: this party is the client.
    """

    def __init__(
        self, ways: Sequence[Way], party: str, dial: Callable[[str, Alarm], Network], host: Host | None = None
    ) -> None:
        """Nothing is dialled yet."""
        self._ways, self._party, self._dial, self._host = ways, party, dial, host
        self._asked = Asked(-1, 0, 0)
        self._dialled: dict[str, Network] = {}
        self._links: dict[str, tuple[Network, int]] = {}  # of this request: the link, and its number of the session
        self.loans: list[Loan] = []
        self.way = next((way for way in ways if way.client == party), ways[0])
        if host is not None:
            host.guest.alarms.append(partial(_alarm, self, host.guest.role))

    def __enter__(self) -> Self:
        """Return the chain."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give back what was lent, take leave of the servers, or tell them and the lenders of the error."""
        _give_back(self, error)
        if error is not None:
            for link in self._dialled.values():
                link.__exit__(kind, error, trace)
        self.close(self._host.leave if self._host is not None and error is None else 0.0)

    @property
    def failed(self) -> bool:
        """Whether one of the links that were dialled is closed, or has failed."""
        return any(link.failed for link in self._dialled.values())

    def rendezvous(self, ready: Ready) -> Start:
        """Meet those who ask, or, as the client, those who are asked. Raises what `Network.rendezvous` raises."""
        _give_back(self, None)
        self._links.clear()
        if self._host is None:
            lane = self._ways.index(self.way)
            self._asked = Asked(lane, secrets.randbits(_BITS), ready.counts.get("predict", 0))
            _ask(self)
            number = next(iter(self._links.values()))[1]
        else:
            guest = self._host.guest
            start = guest.network.rendezvous(ready)
            self._asked, self.way = read(self._ways, self._party, guest.role, start)
            self._links[guest.role], number = (guest.network, start.session), start.session
        return Start(number, {"predict": {self.way.client: self._asked.samples}}, -1)

    def open(self, admission: Admission, bounds: Mapping[str, int]) -> None:
        """Let frames in. A server first waits for the other links of the request, then asks further servers.

        Raises:
            ProgramError: E456, another link leads the request. PeerError: E702, a party did not come.
            CutlayerError: what `Network.rendezvous` raises.
        """
        if self._host is not None:
            for role in self.way.asking(self._party):
                if role not in self._links:
                    self._host.lobby.lead(self._asked, self._host.guest)
                    _borrow(self, self._host, role)
            self._host.welcome([self._host.guest, *(loan.guest for loan in self.loans)])
            _ask(self)
        for name, (link, _) in self._links.items():
            link.open(admission, {name: bounds[name]} if name in bounds else {})

    def send(self, to: str, *frames: Frame) -> None:
        """Queue frames; see `base.Transport.send`."""
        link, number = self._links[to]
        link.send(to, *(_numbered(frame, number) for frame in frames))

    def flush(self) -> None:
        """Let the thread that writes run; see `base.Transport.flush`."""
        next(iter(self._links.values()))[0].flush()

    def recv(self, source: str, tag: Tag) -> Frame:
        """Take the frame with this tag; see `base.Transport.recv`."""
        link, number = self._links[source]
        return link.recv(source, tag if tag.session == number else msgspec.structs.replace(tag, session=number))

    def abort(self, error: CutlayerError) -> None:
        """Tell all parties of this request of an error of this one."""
        for link in (*list(self._dialled.values()), *[link for link, _ in list(self._links.values())]):
            link.abort(error)

    def finish(self) -> None:
        """End a request: the client all of it; a server waits until who leads has ended, and may ask for another."""
        for name, (link, _) in self._links.items():
            if self._host is None:
                link.finish()
            elif name in self._dialled:
                link.rest()
        self._links.clear()
        _give_back(self, None)
        if self._host is not None:
            self._host.guest.network.finish()

    def rest(self) -> None:
        """Say that the client has what it wanted of this request, and may ask for another."""
        for link, _ in self._links.values():
            link.rest()
        self._links.clear()

    def close(self, within: float) -> None:
        """Take leave of all servers, each for at most so many seconds, and close; without any, only close."""
        for link in self._dialled.values():
            try:
                if within and not link.failed:
                    with suppress(*_LINK_ERRORS):  # nothing is owed any more
                        link.finish(within)
            finally:
                link.close()
        self._dialled.clear()


def _numbered(frame: Frame, session: int) -> Frame:
    """Return a frame with the number that the session has on its link."""
    if frame.tag.session == session:
        return frame
    tag = msgspec.structs.replace(frame.tag, session=session)
    return Frame(tag, frame.dtype, frame.shape, frame.payload, frame.order)


def read(ways: Sequence[Way], party: str, role: str, start: Start) -> tuple[Asked, Way]:
    """Return what whoever asks a server in a role has said of the request. Raises `ProgramError` E456."""
    said = {name: counts.get(role, 0) for name, counts in start.counts.items()}
    own = next((lane for lane, way in enumerate(ways) if way.client == role), -1)
    lane = said.get("lane", own)
    if not (0 <= lane < len(ways) and role in ways[lane].asking(party)):
        raise _misfit(party, f"the number of a replica whose predictions {role} takes part in", str(lane))
    return Asked(lane, said.get("request", 0), said.get("predict", 0)), ways[lane]


def _ask(chain: Chain) -> None:
    """Meet all servers that the party asks."""
    for server in chain.way.asked_by(chain._party):
        ready, known = Ready(chain._asked.counts(chain.way), ()), chain._dialled.get(server)
        link = known if known is not None and not known.failed else _dial(chain, server)
        try:
            start = link.rendezvous(ready)
        except PeerError as error:
            if link is not known or error.got != f"E621 at {server}":
                raise
            link = _dial(chain, server)  # it has just let this party go, as it was idle: nothing of the request has run
            start = link.rendezvous(ready)
        chain._links[server] = (link, start.session)
        _check(link)  # from here on the alarm tells the others


def _dial(chain: Chain, server: str) -> Network:
    """Dial a server, in place of a link that has failed."""
    if server in chain._dialled:
        chain._dialled[server].close()
    link = chain._dialled[server] = chain._dial(server, partial(_alarm, chain, server))
    for other, _ in chain._links.values():
        _check(other)  # its alarm came before there was this link to end
    return link


def _alarm(chain: Chain, party: str) -> None:
    """A link has failed: who waits at another one for the same request is to know why. One that rests harms nobody."""
    link, _ = chain._links.get(party, (None, 0))
    if link is None:
        return
    try:
        _check(link)
    except CutlayerError as error:
        chain.abort(error)


def _borrow(chain: Chain, host: Host, role: str) -> None:
    """Have the link in a role lent. The hall sees to it that nobody is two parties of a request."""
    loan = host.lobby.borrow(chain._asked, role, host.guest)
    chain.loans.append(loan)
    chain._links[role] = (loan.guest.network, loan.session)
    loan.guest.alarms.append(partial(_alarm, chain, role))
    _check(loan.guest.network)  # from here on the alarm tells the others


def _give_back(chain: Chain, error: BaseException | None) -> None:
    for loan in chain.loans:
        loan.guest.alarms.clear()
        loan.end(error)
    chain.loans.clear()
    if chain._host is not None:
        chain._host.lobby.left(chain._asked, chain._host.guest)


def _check(link: Network) -> None:
    """Raise what has ended a link."""
    if link.failed:
        link.finish(0.0)


def _ended(link: Network) -> bool:
    """Whether a link has failed, or its request is over, as the other side has begun anew."""
    return link.failed or over(link)


def _go_on(link: Network) -> None:
    """Raise what has ended a link, or `SessionReset` if its request is over."""
    if _ended(link):
        link.finish(0.0)


def _absent(party: str, role: str, seconds: float) -> PeerError:
    return PeerError(
        f"{role} did not come with its part of a request",
        where=f"party {party}",
        expected=f"all links of a request within {seconds:g} seconds",
        remedy=f"look at the terminals of {party}, which says whom it has refused, and of those who ask it; "
        "then run the prediction again",
        code="E702",
    )


def _misfit(party: str, expected: str, got: str) -> ProgramError:
    return ProgramError(
        "the links of a request do not fit together",
        where=f"party {party}",
        expected=expected,
        got=got,
        remedy="ask again; if that does not help, install the same release of cutlayer at all parties",
        code="E456",
    )
