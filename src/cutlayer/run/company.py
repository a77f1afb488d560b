"""The other parties of a user's own loop: run in this process, or met over the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Protocol

from cutlayer.core.compile import Roster, agenda, compile_plan
from cutlayer.core.plan import Plan
from cutlayer.core.program import Mode, Program
from cutlayer.engine.party import Cursor, interpret
from cutlayer.engine.worker import Worker
from cutlayer.run.course import Course
from cutlayer.run.hands import Hands
from cutlayer.run.hooks import Hooks
from cutlayer.run.meeting import let_in, own_process, tell_others
from cutlayer.run.party import Party, build, counts
from cutlayer.run.simulate import check_optimizers, check_parties, handler, roster_of
from cutlayer.run.walk import Walk
from cutlayer.transport.base import Transport
from cutlayer.transport.local import Others
from cutlayer.transport.network import Network, Ready
from cutlayer.transport.settings import NetworkSettings

__all__ = ["Company", "Here", "There"]


class Company(Protocol):
    """What a loop asks of the other parties."""

    worker: Worker
    roster: Roster

    @property
    def workers(self) -> Mapping[str, Worker]:
        """Return the workers that are known here."""

    def meet(self) -> None:
        """Find all parties, and build this one."""

    def begin(self, mode: Mode, number: int) -> None:
        """Begin a round."""

    def walk(self, mode: Mode, number: int, hooks: Hooks | None) -> Walk:
        """Return this party's way through the round."""

    def end(self) -> None:
        """End a round."""

    def finish(self) -> None:
        """End the run, all of it done."""

    def leave(self, error: BaseException | None) -> None:
        """Free everything; tell the others of an error."""


class Here:
    """All parties in this process; the others run whenever this one waits."""

    def __init__(self, plan: Plan, party: Party, others: Sequence[Party]) -> None:
        """Build nothing yet."""
        self.plan, self.party, self._others = plan, party, others
        self.roster = Roster({})
        self._workers: dict[str, Worker] = {}
        self._link: Others | None = None

    @property
    def workers(self) -> dict[str, Worker]:
        """Return all parties' workers."""
        return self._workers

    def meet(self) -> None:
        """Build all parties. Raises what `simulate` raises."""
        parties = [self.party, *self._others]
        check_parties(self.plan, parties)
        self.roster = roster_of(parties)
        self._programs = compile_plan(self.plan, self.roster)
        self._workers = {one.name: build(self.plan, one, self.roster) for one in parties}
        check_optimizers(self._workers)
        self.worker = self.workers[self.party.name]

    def begin(self, mode: Mode, number: int) -> None:
        """Begin a round of all parties."""
        for worker in self.workers.values():
            worker.begin(mode, number)
        self._link = Others(self.party.name, handler(self.workers, mode, number, None))
        self._link.begin(
            {
                name: interpret(self._programs[name][mode], Cursor(round=number), worker)
                for name, worker in self.workers.items()
                if name != self.party.name
            }
        )

    def walk(self, mode: Mode, number: int, hooks: Hooks | None) -> Walk:
        """Return this party's way through the round."""
        program, cursor = self._programs[self.party.name][mode], Cursor(round=number)
        return _walk(program, cursor, self.worker, self._linked(), hooks)

    def end(self) -> None:
        """Let the others come to the end of the round."""
        self._linked().finish()

    def finish(self) -> None:
        """Nothing is left to do."""

    def leave(self, error: BaseException | None) -> None:
        """End the others where they are."""
        del error
        if self._link is not None:
            self._link.close()

    def _linked(self) -> Others:
        if self._link is None:
            raise RuntimeError("no round has begun")
        return self._link


class There:
    """The other parties over the network; this one keeps no checkpoints, so after a restart all begin anew."""

    def __init__(self, plan: Plan, party: Party, settings: NetworkSettings) -> None:
        """Dial nobody yet."""
        self.plan, self.party, self._settings = plan, party, settings
        self.roster = Roster({})
        self._session = 0

    @property
    def workers(self) -> dict[str, Worker]:
        """Return this party's worker, the only one that is known here."""
        return {self.party.name: self.worker}

    def meet(self) -> None:
        """Meet all parties. Raises what `join` raises."""
        with ExitStack() as opened:
            opened.enter_context(own_process(self.party))
            network = self._network = opened.enter_context(Network(self._settings, lambda _event, _details: None))
            try:
                start = network.rendezvous(Ready(counts(self.party), ()))
                self.roster, self._session = Roster(start.counts), start.session
                self.worker = build(self.plan, self.party, self.roster)
                programs, phases = compile_plan(self.plan, self.roster), agenda(self.plan, self.roster)
                self._programs = let_in(network, self.plan, self.party.name, programs, phases)
            except Exception as error:
                self._tell(error)
                raise
            self._opened = opened.pop_all()

    def begin(self, mode: Mode, number: int) -> None:
        """Begin a round of this party."""
        self.worker.begin(mode, number)

    def walk(self, mode: Mode, number: int, hooks: Hooks | None) -> Walk:
        """Return this party's way through the round."""
        return _walk(self._programs[mode], Cursor(self._session, number), self.worker, self._network, hooks)

    def end(self) -> None:
        """Go on to the next round: others are where they are."""

    def finish(self) -> None:
        """Wait until all have finished."""
        self._network.finish()

    def leave(self, error: BaseException | None) -> None:
        """Close the network; tell the others of an error of this party."""
        self._tell(error)
        self._opened.close()

    def _tell(self, error: BaseException | None) -> None:
        tell_others(self._network, error, f"the loop of party {self.party.name!r}")


def _walk(program: Program, cursor: Cursor, worker: Worker, link: Transport, hooks: Hooks | None) -> Walk:
    def told(_step: int) -> None:
        worker.ledger.close_step()

    hands = Hands(program, cursor, worker, link, told)
    ran = hooks.ran if hooks is not None else lambda _stage: True
    walk = Walk(Course(program, worker.graph), hands, ran, training=program.mode == "train")
    if hooks is not None:
        hooks.lane = lambda: walk.lane
    return walk
