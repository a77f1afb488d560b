"""A trained stage served to many clients over the network, until it is told to stop.

```python
site = cl.load_site(Path("contract.toml"), Path("cloud.toml"))
cl.serve(site.plan, site.party, network=site.network, weights=Path("runs/20260101-090000-scans"), serving=site.serving)
```
Each client has a session of its own, which runs the plan's prediction program; the stage itself is run by one batcher
for all of them. Clients ask with `cutlayer.predict(plan, party, network=..., served=True)`. In a chain a session
asks the next servers itself, as a client does; see `run.chain`.
"""

from __future__ import annotations

import copy
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from cutlayer.core.compile import Roster
from cutlayer.core.gate import Gate
from cutlayer.core.plan import Plan
from cutlayer.core.program import Mode, Program
from cutlayer.core.quota import Serving
from cutlayer.core.serving import Way, clients_of, requests_in, served_plan, served_programs, ways_of
from cutlayer.engine.ledger import Ledger
from cutlayer.engine.site import Place
from cutlayer.engine.worker import Worker
from cutlayer.errors import CutlayerError
from cutlayer.run.answers import left_out, serving_party
from cutlayer.run.batcher import Batcher
from cutlayer.run.chain import Chain, Host, Loan, Lobby, read
from cutlayer.run.party import Party, build
from cutlayer.run.prediction import SERVED, agenda, dialled, idle, pairs
from cutlayer.run.session import Task, run_session
from cutlayer.run.trained import load_trained
from cutlayer.transport.hall import Guest, Hall
from cutlayer.transport.network import Ready, SessionReset
from cutlayer.transport.notifier import Notifier
from cutlayer.transport.settings import NetworkSettings

__all__ = ["Served", "Service", "Tally", "serve"]

Notify = Callable[[str, Mapping[str, Any]], None]
_LOOK: Final = 1.0  # seconds between two looks at whether to stop
_PREDICTIONS_MAX: Final = 1_000_000  # of one session; its quota bounds what they ask for
_REFUSALS: Final = frozenset({"E612", "E613", "E614", "E615"})


@dataclass
class Tally:
    """What one identity has asked for: sessions that came to their end, and those that did not.

    Attributes:
        sessions, failed, refused: Sessions that ended well, that ended otherwise, and that were refused.
        requests, samples: Of the predictions whose outputs were made; a session has one or more, however it ended.
        sent, received: Bytes of the frames of these predictions between the identity and this server.
    """

    sessions: int = 0
    failed: int = 0
    refused: int = 0
    requests: int = 0
    samples: int = 0
    sent: int = 0
    received: int = 0


@dataclass(frozen=True)
class Served:
    """What a service has done.

    Attributes:
        seconds: From when it listened.
        identities: Identity -> its tally.
        forwards, requests: Forwards of the stages, and how many requests were put into them.
        largest: Most samples in one forward.
    """

    seconds: float
    identities: dict[str, Tally] = field(default_factory=dict)
    forwards: int = 0
    requests: int = 0
    largest: int = 0


def serve(
    plan: Plan,
    party: Party,
    *,
    network: NetworkSettings,
    weights: str | Path | None = None,
    serving: Serving | None = None,
    notify: Notify | None = None,
    stop: threading.Event | None = None,
) -> Served:
    """Serve a party's trained stages to many clients, until `stop` is set or Ctrl-C is pressed; then drain.

    Args:
        plan: The plan. In each of its predictions one client must give the data and get the outputs: as in a U-shape,
            or where the plan declares them as an `Answer`. All other parties serve.
        party: The server, with its modules.
        network: Its address, certificate and deadlines, and the addresses of the servers that it asks itself; `run`
            and `digest` must be the clients' own.
        weights: Folder that a run has left, for `<party>.safetensors`. None: the modules are used as they are.
        serving: Limits; see `Serving`.
        notify: Called from a thread of its own: "serving" (address, roles), "came" and "went" (identity, session, role,
            samples..., and at the end code and what), "refused" (identity, code). Never with data.
        stop: Set it to end the service. None: only Ctrl-C does.

    Returns:
        What was done, by identity.

    Raises:
        ProgramError: E453, E454, the plan or this party cannot be served.
        LinkError: E604, it cannot listen at its address.
        CheckpointError: E811, E812, the weights cannot be read, or are not those of the stages.
        ConfigError: what `build` and the network's settings raise.
    """
    stop = stop or threading.Event()
    with Service(plan, party, network=network, weights=weights, serving=serving, notify=notify) as service:
        try:
            while not stop.wait(_LOOK):
                pass
        except KeyboardInterrupt:
            service.tell("closing", {"seconds": service.serving.drain})
    return service.served()


class Service:
    """A served party, from `with` to its end: then requests under way have `Serving.drain` seconds to end."""

    def __init__(
        self,
        plan: Plan,
        party: Party,
        *,
        network: NetworkSettings,
        weights: str | Path | None = None,
        serving: Serving | None = None,
        notify: Notify | None = None,
    ) -> None:
        """Build the stages; nothing is opened before the `with`. Raises what `serve` raises."""
        self.plan, self.party, self.serving = served_plan(plan), idle(serving_party(plan, party)), serving or Serving()
        self.roles = clients_of(plan, party.name)
        self._worker = build(self.plan, self.party, Roster({}))
        if weights is not None:
            load_trained(self._worker.site, weights, left_out(plan))
        stages = self._worker.site.stages
        self._batcher = Batcher(party.name, stages, self.plan.graph, self.serving, party.threads)
        self._gate = Gate(self.serving, party.name)
        self._notifier = Notifier(f"cutlayer-{party.name}-serving", notify or _silent, _overlook)
        self.tell = self._notifier.post
        self._settings = _hall_settings(network, (party.name, *self.roles), self.serving)
        self.lobby, self.ways = Lobby(party.name, self.serving.patience), ways_of(plan)
        places = self.serving.places
        self._hall = Hall(
            self._settings, self._gate, self.ways, places=places, receive=self._receive, notify=self._heard
        )
        self.servers = pairs(self.ways, party.name, _bounded(network, self.serving), self.serving.patience)
        self.leave = network.deadlines.close
        self._lock = threading.Lock()  # of the tallies and the threads
        self._tallies: dict[str, Tally] = {}
        self._threads: set[threading.Thread] = set()
        self._begun = self._ended = 0.0

    def __enter__(self) -> Self:
        """Listen. Raises `LinkError` E604 if the party cannot listen at its address."""
        self._notifier.start()
        self._batcher.start()
        try:
            self._hall.start()
        except BaseException:
            self._batcher.close()
            self._notifier.close(1.0)
            raise
        self._begun = time.monotonic()
        self.tell("serving", {"address": self._settings.port, "roles": self.roles})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let nobody in any more, wait for requests as long as they may take, and end everything."""
        self._hall.close(0.0 if error is not None else self.serving.drain)
        self._batcher.close()
        deadline = time.monotonic() + self._settings.deadlines.close
        for thread in list(self._threads):
            thread.join(max(0.0, deadline - time.monotonic()))
        self._ended = time.monotonic()
        self._notifier.close(self._settings.deadlines.close)

    def served(self) -> Served:
        """Return what was done so far."""
        work, until = self._batcher.work, self._ended or time.monotonic()
        with self._lock:
            identities = {name: replace(tally) for name, tally in sorted(self._tallies.items())}
        return Served(until - self._begun, identities, work.forwards, work.requests, work.largest)

    def _receive(self, guest: Guest) -> None:
        """Begin a guest's session; called by the hall."""
        name = f"cutlayer-{self.party.name}-session-{guest.number}"
        thread = threading.Thread(target=self._attend, args=(guest,), name=name, daemon=True)
        with self._lock:
            self._threads = {one for one in self._threads if one.is_alive()} | {thread}
        thread.start()

    def _attend(self, guest: Guest) -> None:
        """Run a session to its end, whatever that is, give its place back, and note what it was."""
        session, leads = _Session(self, guest), self._leads(guest)
        begin = time.monotonic()
        if leads:
            self._batcher.came()
        code, what = session.run(leads=leads)
        if leads:
            self._batcher.went()
        self._hall.leave(guest)
        with self._lock:
            session.add_to(self._tallies.setdefault(guest.identity, Tally()), code)
        facts = {"identity": guest.identity, "session": guest.number, "role": guest.role, "samples": session.samples}
        self.tell("went", {**facts, "seconds": round(time.monotonic() - begin, 3), "code": code, "what": what})

    def _leads(self, guest: Guest) -> bool:
        """Whether a guest is the first of those who ask here in one request; others lend it their links."""
        return any(guest.role in way.asking(self.party.name)[:1] for way in self.ways)

    def _heard(self, event: str, facts: Mapping[str, object]) -> None:
        """Pass on what the hall says of those who were not let in; sessions' own networks say nothing new."""
        if event == "refused":
            with self._lock:
                self._tallies.setdefault(str(facts["identity"]), Tally()).refused += 1
            self.tell(event, facts)

    def worker_for(self, guest: Guest, roster: Roster, way: Way) -> tuple[Worker, int, int]:
        """Return a worker for what a guest asks for, its requests and its samples.

        Raises:
            LinkError: E614, it is longer than any may be. DataError: the numbers of samples do not fit the plan.
        """
        samples = roster.samples.get("predict", {}).get(way.client, 0)
        self._gate.measure(guest.identity, samples)
        programs = served_programs(self.plan, roster, way.parties)
        requests = requests_in(programs[self.party.name]["predict"])
        site, seats = copy.copy(self._worker.site), dict[Place, Any](self._batcher.seats())
        site.stages = seats  # the site is shared; its stages are reached through the batcher only
        parts = replace(self._worker.parts, seed=secrets.randbits(63))  # noise that comes twice could be subtracted
        return Worker(self.plan, parts, site), requests, samples

    def welcome(self, guests: Sequence[Guest], requests: int, samples: int) -> None:
        """Count a prediction against the quotas of all who ask for it. Raises `LinkError` E614; then none has paid."""
        self._hall.charge([guest.identity for guest in guests], requests, samples)
        for guest in guests:
            facts = {"identity": guest.identity, "session": guest.number, "role": guest.role, "samples": samples}
            self.tell("came", {**facts, "requests": requests})


class _Session:
    """One guest's session: its worker, once it was let begin, and what it asks for, one prediction after the other."""

    def __init__(self, service: Service, guest: Guest) -> None:
        self._service, self._guest = service, guest
        host = Host(guest, service.lobby, self._welcome, service.leave)
        self._chain = Chain(service.ways, service.party.name, partial(dialled, service.servers, _silent), host)
        self._worker: Worker | None = None  # of the prediction that is under way, or was the last
        self._asked = (0, 0)  # its requests and samples
        self._done, self._predictions = Tally(), 0
        self._refused = False  # by this server itself
        self.samples = 0

    def run(self, *, leads: bool) -> tuple[str, str]:
        """Do what the guest asks for, or lend its link to who leads.

        Returns the code and the sentence of what went wrong, as others are told; both are empty if nothing did.
        """
        try:
            with self._guest.network:
                if leads:
                    self._lead()
                else:
                    self._lend()
        except CutlayerError as error:
            dismissed = error.code == "E615" and self._guest.resting  # nothing was under way: it ended well
            self._refused = error.code in _REFUSALS and not error.origin
            return ("", "") if dismissed else (error.code, error.what)
        except Exception:  # the client was told E390; what a module said of its values stays in this process
            return "E390", ""
        return "", ""

    def _lead(self) -> None:
        service, most = self._service, _PREDICTIONS_MAX
        task = Task(agenda, {}, build=self._build, programs=self._programs, trains=False, anew=True, most=most)
        with self._chain as chain:
            run_session(service.plan, service.party, task, chain, self._told)

    def _lend(self) -> None:
        service, guest = self._service, self._guest
        for _ in range(_PREDICTIONS_MAX):
            with suppress(SessionReset):
                start = guest.network.rendezvous(Ready({}, ()))
                asked, _way = read(service.ways, service.party.name, guest.role, start)
                loan = Loan(guest, start.session)
                try:
                    service.lobby.lend(asked, loan)
                finally:
                    if loan.moved[0]:
                        self.samples += loan.moved[1]
                        self._count(loan.moved)
                guest.network.finish()
                return

    def add_to(self, tally: Tally, code: str) -> None:
        """Count the session, which has ended with this code, and its predictions."""
        good = self._predictions > 0 and not code
        tally.sessions += good
        tally.refused += not good and self._refused
        tally.failed += not good and not self._refused
        tally.requests, tally.samples = tally.requests + self._done.requests, tally.samples + self._done.samples
        tally.sent, tally.received = tally.sent + self._done.sent, tally.received + self._done.received

    def _build(self, _plan: Plan, _party: Party, roster: Roster) -> Worker:
        """Make ready for a prediction; once its links are all there, it is let begin."""
        self._worker, *asked = self._service.worker_for(self._guest, roster, self._chain.way)
        self._asked = (asked[0], asked[1])
        return self._worker

    def _welcome(self, guests: Sequence[Guest]) -> None:
        """Let a prediction begin, with all who ask for it."""
        self._service.welcome(guests, *self._asked)
        self.samples += self._asked[1]

    def _told(self, event: str, facts: Mapping[str, Any]) -> None:
        """Count a prediction as soon as its last outputs have left, whatever becomes of the session.

        Only the checkpoint is then to come, at which the last credits are waited for: in vain, if its client has what
        it wanted and asks anew.
        """
        worker = self._worker
        if event != "step" or facts["step"] != facts["steps"] - 2 or worker is None:
            return
        self._count((*self._asked, *_moved(worker.ledger, self._guest.role)))
        for loan in self._chain.loans:
            loan.moved = (*self._asked, *_moved(worker.ledger, loan.guest.role))

    def _count(self, moved: tuple[int, int, int, int]) -> None:
        done = self._done
        self._predictions += 1
        done.requests, done.samples = done.requests + moved[0], done.samples + moved[1]
        done.sent, done.received = done.sent + moved[2], done.received + moved[3]

    def _programs(self, plan: Plan, roster: Roster) -> Mapping[str, Mapping[Mode, Program]]:
        return served_programs(plan, roster, self._chain.way.parties)


def _moved(ledger: Ledger, peer: str) -> tuple[int, int]:
    """Return the bytes sent to a party and received from it."""
    found = {"sent": 0, "received": 0}
    for (way, other, *_), row in ledger.flows.items():
        found[way] += row.payload if other == peer else 0
    return found["sent"], found["received"]


def _hall_settings(network: NetworkSettings, parties: tuple[str, ...], serving: Serving) -> NetworkSettings:
    """Return the settings of a server's sessions: like those of a run, but for who is in it and how long is waited."""
    deadlines = replace(network.deadlines, join=serving.idle, receive=serving.idle, patience=serving.patience)
    return replace(
        network,
        parties=parties,
        coordinator=network.party,
        addresses={network.party: network.port},
        run=network.run + SERVED,
        task="served",
        deadlines=deadlines,
    )


def _bounded(network: NetworkSettings, serving: Serving) -> NetworkSettings:
    """Return the settings with which a server asks others: it waits for their values as for a client, or a stage."""
    return replace(network, deadlines=replace(network.deadlines, receive=max(serving.idle, serving.deadline)))


def _silent(_event: str, _facts: Mapping[str, object]) -> None:
    pass


def _overlook(_error: BaseException) -> None:
    """What people do with an event does not stop the service."""
