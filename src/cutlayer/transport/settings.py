"""What a party must know to join a run's network, and who dials whom.

Pure, but for the machine's proxy settings, which are looked at where nothing else is set.

| code | error | meaning |
| --- | --- | --- |
| E211 | ConfigError | no certificates, and not all addresses are this machine's own |
| E212 | ConfigError | an address is wrong or missing |
| E213 | ConfigError | party, coordinator or certificate do not fit the list of parties |
| E214 | ConfigError | the address of the proxy cannot be used |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from cutlayer.errors import ConfigError
from cutlayer.transport.addresses import host_port, is_loopback
from cutlayer.transport.link import Limits
from cutlayer.transport.proxy import Proxy, find_proxy
from cutlayer.transport.tls import Credentials

__all__ = ["Deadlines", "NetworkSettings", "check_settings", "host_port", "is_loopback", "proxy_to", "route"]

_TEXT_MAX: Final = 255  # characters


@dataclass(frozen=True, kw_only=True)
class Deadlines:
    """How long is waited, in seconds.

    Attributes:
        join: For all parties to come, the first time.
        patience: For a lost party to come back, and for all to meet again after a restart.
        receive: For a frame, and at the end for the others to finish.
        send: For room in a full outbox.
        close: For the last messages, when the network is closed; and, if this party fails before the first session, for
            the others to come and be told.
    """

    join: float = 120.0
    patience: float = 60.0
    receive: float = 600.0
    send: float = 60.0
    close: float = 10.0


@dataclass(frozen=True, kw_only=True)
class Rhythm:
    """How often and how long the network tries by itself, in seconds. Rarely of interest, except to tests.

    Attributes:
        hello: For the peer's hello on a new stream.
        heartbeat: An idle stream sends one this often.
        silence: A stream on which nothing came for so long is given up and dialled anew.
        idle_ack: What came is acknowledged after so long without anything else to send.
        retry: The longest pause between two attempts to dial; the pause is random, and doubled after each failure.
        awake: While the waits of a training are usually no longer than this, the party does not sleep in them; 0: it
            always sleeps.
    """

    hello: float = 10.0
    heartbeat: float = 4.0
    silence: float = 12.0
    idle_ack: float = 0.05
    retry: float = 10.0
    awake: float = 0.003


@dataclass(frozen=True, kw_only=True)
class NetworkSettings:
    """A party's place in a run's network.

    Attributes:
        party: This party.
        parties: All parties, in the plan's order.
        coordinator: The party that starts sessions; it needs an address.
        addresses: Party -> host:port that others dial. A party without one dials out.
        listen: host:port to listen at, if not this party's own address.
        credentials: This party's certificate; None: plaintext, on this machine only.
        identity: Name in that certificate, if it is not the party's: several clients of a served stage play one party.
        proxy: "http://host:port" through which others are dialled, "none", or empty: what the machine is set to.
        run, digest: The run's name and the plan's digest, which must be the same everywhere.
        limit: The most bytes of payload that this party relays for others in one piece.
        task: What the network is for; errors say what to do accordingly. Only a training is resumed. "served": the
            coordinator serves a stage, and the other party asks it.
        behind: Parties besides `parties` whose errors these hand on.
        deadlines, rhythm, limits: Times and bounds.
    """

    party: str
    parties: tuple[str, ...]
    coordinator: str
    addresses: Mapping[str, str]
    run: str
    digest: str
    listen: str = ""
    credentials: Credentials | None = field(default=None, repr=False)
    identity: str = ""
    proxy: str = field(default="", repr=False)  # it may hold a password
    deadlines: Deadlines = Deadlines()
    limit: int = 2**30
    rhythm: Rhythm = Rhythm()
    limits: Limits = field(default_factory=Limits)
    task: Literal["training", "prediction", "served"] = "training"
    behind: frozenset[str] = frozenset()

    @property
    def others(self) -> tuple[str, ...]:
        """Return all parties but this one."""
        return tuple(party for party in self.parties if party != self.party)

    @property
    def coordinates(self) -> bool:
        """Whether this party is the coordinator."""
        return self.party == self.coordinator

    @property
    def port(self) -> str:
        """Return host:port to listen at; empty if this party only dials."""
        return self.listen or self.addresses.get(self.party, "")


Route = Literal["dial", "await", "relay"]


def route(settings: NetworkSettings, other: str) -> Route:
    """Return how this party reaches another: it dials, it is dialled, or the coordinator relays.

    Of two parties with addresses, the later one in the plan's order dials.
    """
    here, there = settings.party in settings.addresses, other in settings.addresses
    if not here and not there:
        return "relay"
    later = settings.parties.index(settings.party) > settings.parties.index(other)
    return "dial" if there and (not here or later) else "await"


def check_settings(settings: NetworkSettings) -> None:
    """Raise `ConfigError` E211 to E214 for settings that cannot work."""
    where = f"party {settings.party}"
    parties = settings.parties
    strangers = [name for name in (settings.party, settings.coordinator, *settings.addresses) if name not in parties]
    if strangers or len(set(parties)) != len(parties):
        raise ConfigError(
            "the parties of a network do not fit together",
            where=where,
            expected=f"names of {', '.join(parties)}, each once",
            got=", ".join(strangers) or "a name twice",
            remedy="take the names from the contract",
            code="E213",
        )
    _check_texts(settings, where)
    for name in settings.others:
        if route(settings, name) == "dial":
            proxy_to(settings, name)
    if settings.coordinator not in settings.addresses:
        raise ConfigError(
            "the coordinator has no address",
            where=where,
            expected=f"host:port for {settings.coordinator}, which all others can reach",
            remedy="name another party as coordinator, or give it an address",
            code="E212",
        )
    for address in (*settings.addresses.values(), *([settings.listen] if settings.listen else [])):
        try:
            host, _ = host_port(address)
        except ConfigError as error:
            error.within(where)
            raise
        if settings.credentials is None and not is_loopback(host):
            raise ConfigError(
                "without certificates, parties talk on one machine only",
                where=where,
                expected="addresses such as 127.0.0.1:7001",
                got=address,
                remedy="make certificates with `cutlayer pki`, and give each party its own",
                code="E211",
            )


def proxy_to(settings: NetworkSettings, other: str) -> Proxy | None:
    """Return the proxy through which this party dials another, or None. Raises `ConfigError` E211, E212 or E214."""
    host, port = host_port(settings.addresses[other])
    proxy = find_proxy(settings.proxy, host, port)
    if proxy is not None and settings.credentials is None:
        raise ConfigError(
            "without certificates, parties talk on one machine only",
            where=f"party {settings.party}, dialling {other}",
            expected="no proxy",
            got=f"the proxy {proxy}",
            remedy="make certificates with `cutlayer pki`, and give each party its own",
            code="E211",
        )
    return proxy


def _check_texts(settings: NetworkSettings, where: str) -> None:
    name = settings.identity or settings.party
    if settings.credentials is not None and settings.credentials.party != name:
        raise ConfigError(
            "the certificate is another party's",
            where=where,
            expected=name,
            got=settings.credentials.party,
            remedy="give this party's own folder of certificates",
            code="E213",
        )
    if not all(0 < len(text) <= _TEXT_MAX for text in (*settings.parties, settings.run, settings.digest)):
        raise ConfigError(
            "a name, the run's name or the plan's digest is empty or too long",
            where=where,
            expected=f"1 to {_TEXT_MAX} characters",
            remedy="choose a shorter name",
            code="E213",
        )
