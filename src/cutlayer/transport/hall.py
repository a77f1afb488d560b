"""A server's door to many clients: each gets a network of its own, with the two of them as its parties.

A client comes with its own certificate, whose name is its *identity*, and plays a party's role in the plan; many
identities may play one role, and one identity may come several times. The role of a server of the plan is its own, and
its only one: it would see, as another, what the plan does not show it. Whoever comes must be let in by the gate. A
client whose stream breaks finds its session again by its process (incarnation); a new process gets a new session.

| code | error | meaning |
| --- | --- | --- |
| E615 | LinkError | the hall closes |
| E645 | HandshakeError | the stream does not begin as it must, or with a party that is no client |
| E665 | CertificateError | the certificate has no single name, or comes in a role that is not its own |
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from cutlayer.core.gate import Gate, closing
from cutlayer.core.serving import Way, behind
from cutlayer.errors import CertificateError, CutlayerError, HandshakeError
from cutlayer.transport.control import Abort, LinkHello
from cutlayer.transport.grpc_server import Desk, Server
from cutlayer.transport.handshake import check_hello, read_hello, tidy
from cutlayer.transport.network import Network
from cutlayer.transport.notifier import Notify
from cutlayer.transport.peer import Stream
from cutlayer.transport.settings import NetworkSettings
from cutlayer.transport.steward import resting
from cutlayer.transport.timers import Timers

__all__ = ["Guest", "Hall"]

_SPARE: Final = 16  # streams of those who are not let in


@dataclass(frozen=True, eq=False)
class Guest:
    """A client that was let in.

    Attributes:
        number: Counts those who were let in.
        identity: The name of its certificate; without certificates, that of its role.
        role: The party of the plan that it plays.
        network: The two parties' own network.
        alarms: Called if it fails.
    """

    number: int
    identity: str
    role: str
    network: Network
    alarms: list[Callable[[], None]] = field(default_factory=list)

    @property
    def resting(self) -> bool:
        """Whether the client has got all that it asked for, and asks for nothing more."""
        return resting(self.network.desk.steward)


class Hall:
    """Lets clients in, up to the gate's limits. A `grpc_server.Door`.

    Args:
        settings: Of the server, as its sessions are to have them, but for `parties`: here the server and all roles.
        gate: Says who may come in.
        ways: Of the plan.
        places: Most sessions at one time, as the gate has it.
        receive: Called with each guest, from the thread of its stream, before it is greeted. Must begin its session in
            a thread of its own, which calls `leave` at its end.
        notify: What the networks of the sessions tell people; see `Network`.

    Raises:
        ConfigError: settings that cannot work.
    """

    def __init__(
        self,
        settings: NetworkSettings,
        gate: Gate,
        ways: Sequence[Way],
        *,
        places: int,
        receive: Callable[[Guest], None],
        notify: Notify,
    ) -> None:
        """Nothing is opened before `start`."""
        self.settings, self.streams = settings, 2 * places + _SPARE
        self.timers = Timers(f"cutlayer-{settings.party}-hall", _overlook)
        self._gate, self._receive, self._notify = gate, receive, notify
        self._server = Server(self)
        self._ways, self._servers = ways, {name for way in ways for name in way.parties[1:]}
        self._changed = threading.Condition()
        self._guests: dict[tuple[str, str, int], Guest] = {}  # identity, role, incarnation
        self._count = 0
        self._closing = False

    def start(self) -> None:
        """Listen. Raises `LinkError` E604 if that is not possible."""
        self.timers.start()
        try:
            self._server.start()
        except BaseException:
            self.timers.close(1.0)
            raise

    def admit(self, stream: Stream, first: bytes, names: tuple[str, ...] | None) -> tuple[Desk, LinkHello]:
        """Let a client in, to the session that it has or to a new one.

        Raises:
            LinkError: E612 to E615, not now; see `core.gate`.
            HandshakeError, CertificateError, WireError: see `Desk.admit`.
        """
        hello = read_hello(first)
        if isinstance(hello, Abort):
            raise _stranger(self.settings, f"an ABORT with {hello.code}")
        identity = self._identity(hello, names)
        check_hello(hello, self.settings, None)
        with self._changed:
            guest = self._guests.get((identity, hello.party, hello.incarnation))
            fresh = guest is None
            if guest is None:
                guest = self._enter(identity, hello)
        try:
            return guest.network.desk, guest.network.desk.admit(stream, first, None)
        except CutlayerError as error:
            if fresh:
                guest.network.abort(error)
            raise

    def refused(self, error: CutlayerError, first: bytes, names: tuple[str, ...] | None) -> None:
        """Tell people who was not let in. Nobody else's session ends by it."""
        identity = _role_of(first) if names is None else ", ".join(names) or "?"
        self._notify("refused", {"identity": tidy(identity), "code": error.code, "what": error.what})

    def charge(self, identities: Sequence[str], requests: int, samples: int) -> None:
        """Count a prediction against the quotas of all who ask for it. Raises `LinkError` E614; then none has paid."""
        now = time.monotonic()
        with self._changed:
            for identity in identities:
                self._gate.check(identity, requests, samples, now)
            for identity in identities:
                self._gate.charge(identity, requests, samples, now)

    def leave(self, guest: Guest) -> None:
        """A guest's session has ended: its place is free."""
        with self._changed:
            for key in [key for key, one in self._guests.items() if one is guest]:
                del self._guests[key]
                self._gate.leave(guest.identity)
            self._changed.notify_all()
        stream = guest.network.desk.steward.peers[guest.role].stream
        if stream is not None:  # it says its last words; what comes after them is for a new session
            self.timers.after(self.settings.deadlines.close, lambda: _cancel(stream))

    def close(self, seconds: float) -> None:
        """Let nobody in any more, end the sessions of guests, and listen no more.

        A session ends as soon as its guest rests: at once if it asks for nothing now, else with its answer, or after
        `seconds` at the latest.
        """
        deadline = time.monotonic() + seconds
        with self._changed:
            self._closing = True
            guests = list(self._guests.values())
        for guest in guests:
            _dismiss(guest, closing(self.settings.party))
        with self._changed:
            while self._guests and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            late = list(self._guests.values())
        for guest in late:
            guest.network.abort(closing(self.settings.party))
        with self._changed:
            self._changed.wait_for(lambda: not self._guests, self.settings.deadlines.close + 1)
        self._server.stop(self.settings.deadlines.close)
        self.timers.close(1.0)

    def _identity(self, hello: LinkHello, names: tuple[str, ...] | None) -> str:
        if names is None:
            return hello.party
        if len(names) != 1:
            raise CertificateError(
                "a client's certificate must have one name",
                where=f"party {self.settings.party}, link with {tidy(hello.party)}",
                expected="one DNS name (SAN)",
                got=", ".join(tidy(name) for name in names) or "no name",
                remedy="ask the authority of this run for a certificate with `cutlayer pki issue NAME`",
                code="E665",
            )
        identity = names[0]
        if identity != hello.party and {identity, hello.party} & self._servers:
            raise CertificateError(
                "a server's certificate and its role go together",
                where=f"party {self.settings.party}, link with {tidy(hello.party)}",
                expected=f"{tidy(hello.party)} as {tidy(hello.party)}, or a client as a client",
                got=f"{tidy(identity)} as {tidy(hello.party)}",
                remedy="come with the certificate of this party, in its own role; a client needs one in a name that no "
                "server of the plan has",
                code="E665",
            )
        return identity

    def _enter(self, identity: str, hello: LinkHello) -> Guest:
        """Give a new client its place and its network; `_changed` is held."""
        server = self.settings.party
        if self._closing:
            raise closing(server)
        self._gate.enter(identity, time.monotonic())
        self._count += 1
        pair = [name for name in self.settings.parties if name in (server, hello.party)]
        others = behind(self._ways, hello.party, server)
        settings = replace(self.settings, parties=tuple(pair), behind=others)
        alarms: list[Callable[[], None]] = []

        def tell(event: str, facts: Mapping[str, object]) -> None:
            if event == "aborted":
                for alarm in alarms.copy():  # meanwhile a request may end
                    alarm()
            self._notify(event, facts)

        guest = Guest(self._count, identity, hello.party, Network(settings, tell, listens=False), alarms)
        self._guests[identity, hello.party, hello.incarnation] = guest
        self._receive(guest)
        return guest


def _dismiss(guest: Guest, error: CutlayerError) -> None:
    """Have a guest's session end with this error as soon as the guest rests."""
    steward = guest.network.desk.steward
    with steward.changed:
        steward.farewell = error
        steward.changed.notify_all()


def _cancel(stream: Stream) -> None:
    stream.cancel()


def _overlook(_error: BaseException) -> None:
    """A timer ends a stream: whatever that raises, it concerns nobody else."""


def _role_of(first: bytes) -> str:
    try:
        hello = read_hello(first)
    except CutlayerError:
        return "?"
    return hello.party


def _stranger(settings: NetworkSettings, got: str) -> HandshakeError:
    return HandshakeError(
        "a stream begins with an ABORT",
        where=f"party {settings.party}",
        got=got,
        remedy="compare the addresses in the contract with where the parties run",
        code="E645",
    )
