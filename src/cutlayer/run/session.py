"""One party of a run over the network: its part of the programs, with checkpoints, and on again after a crash."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cutlayer.core.compile import Roster, agenda, compile_plan
from cutlayer.core.plan import Plan
from cutlayer.core.program import Checkpoint, Mode, Program
from cutlayer.engine.party import Cursor, Do, EndStep, fulfil, interpret
from cutlayer.engine.snapshot import restore, snapshot
from cutlayer.engine.worker import Worker
from cutlayer.errors import CheckpointError, PeerError
from cutlayer.run.checkpoint import Position, Store, none_whole, write_atomic
from cutlayer.run.drive import drive
from cutlayer.run.launch import RECORD, has_checkpoint
from cutlayer.run.lock import own_folder
from cutlayer.run.meeting import Link, let_in, own_process, tell_others, telling
from cutlayer.run.outcome import Result, history_rows
from cutlayer.run.party import Party, build, counts
from cutlayer.run.sent import Sent
from cutlayer.run.simulate import gathered
from cutlayer.transport.network import Network, NetworkSettings, Ready, SessionReset, Start

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Task", "join", "run_session", "take_part", "take_part_over"]

Notify = Callable[[str, Mapping[str, Any]], None]
_RESETS_MAX = 1000
_UNTOLD = 8  # steps that may end before one hears of them: a party that only sends never waits


def join(
    plan: Plan, party: Party, *, network: NetworkSettings, folder: str | Path, notify: Notify | None = None
) -> Result:
    """Run one party of a plan; the others run in processes of their own.

    A party that was killed is started again with the same `folder`: all parties go back to the last checkpoint that
    every one of them has, and the result has the bits of an uninterrupted run.

    Args:
        plan: The plan, the same at all parties.
        party: This party.
        network: Addresses, certificates and deadlines.
        folder: Where checkpoints are kept; created if missing, for this user alone.
        notify: Called with events ("connected", "lost", "step", "round"...) as the run goes on; output only.

    Raises:
        HandshakeError, CertificateError: this party or a peer is not who or what it should be; final.
        PeerError, DeadlineError, LinkError: a peer failed, never came or stayed away; its code and remedy are in it.
        CheckpointError: E802, all checkpoints here are damaged; E804, they are of another run.
        CutlayerError: this party failed; the others are told the code and the remedy.
    """
    folder = Path(folder)
    again = has_checkpoint(folder)  # then the others may run, and wait for this party
    with nullcontext() if again else telling(network, f"party {party.name!r}"):
        own_folder(folder)
        party = replace(party, seed=_private_seed(folder, party))
        store = Store(folder / "checkpoints", party=party.name, digest=network.digest)
        task = Task(agenda, counts(party), store)
        store.check()
    try:
        return take_part(plan, party, task, network=network, notify=notify)
    except PeerError as error:
        if (folder / RECORD).exists() and store.identifiers():
            error.besides(f"from the last checkpoint on, here: cutlayer resume {folder}")
        raise


@dataclass(frozen=True)
class Task:
    """What a party takes part in.

    Attributes:
        agenda: Gives the modes and rounds to run, from the plan and the numbers of samples.
        counts: This party's numbers of samples by mode, which all others are told.
        store: Keeps checkpoints; None: after a restart of any party, all begin anew.
        prepare: Called with the worker before it runs anything.
        build: Makes the worker, once the numbers of samples are known. It may refuse them.
        programs: Gives the programs of those who take part.
        trains: False: weights stay as they are, so that nothing has to be restored for a new session.
        anew: Build the worker in each session, even if the numbers of samples are those of the session before.
        ends: False: leave the network open at the end, for another task of this party's.
        most: Sessions in one network, restarts included; 0: as many as restarts may make.
    """

    agenda: Callable[[Plan, Roster], list[tuple[Mode, int]]]
    counts: Mapping[str, int]
    store: Store | None = None
    prepare: Callable[[Worker], None] | None = None
    build: Callable[[Plan, Party, Roster], Worker] = build
    programs: Callable[[Plan, Roster], Mapping[str, Mapping[Mode, Program]]] = compile_plan
    trains: bool = True
    anew: bool = False
    ends: bool = True
    most: int = 0


def take_part(
    plan: Plan, party: Party, task: Task, *, network: NetworkSettings, notify: Notify | None = None
) -> Result:
    """Meet the other parties and do this party's share of a task. Raises what `join` raises."""
    tell: Notify = notify or (lambda _event, _details: None)
    return take_part_over(Network(network, tell), plan, party, task, tell)


def take_part_over(opening: AbstractContextManager[Link], plan: Plan, party: Party, task: Task, tell: Notify) -> Result:
    """Do this party's share of a task over what `opening` opens. Raises what `join` raises."""
    begin = time.perf_counter()
    with own_process(party), opening as link:
        worker, roster = run_session(plan, party, task, link, tell)
    return Result(
        plan=plan,
        history=history_rows({party.name: worker}),
        ledgers={party.name: worker.ledger},
        workers={party.name: worker},
        predictions=gathered({party.name: worker}),
        seconds=time.perf_counter() - begin,
        samples=roster.samples,
    )


def run_session(plan: Plan, party: Party, task: Task, link: Link, tell: Notify) -> tuple[Worker, Roster]:
    """Do a party's share of a task over an open network; the others are told if this party fails.

    Returns:
        What did the work, and how many samples each party had. Raises what `join` raises.
    """
    sent = Sent(link, task.store.folder.parent if task.store else None)
    try:
        return _until_done(_Run(plan, party, task, link, tell, sent))
    except Exception as error:
        tell_others(link, error, f"party {party.name!r}")
        raise
    finally:
        sent.close()


@dataclass(frozen=True)
class _Run:
    """What stays the same through all sessions of a run."""

    plan: Plan
    party: Party
    task: Task
    link: Link
    tell: Notify
    sent: Sent


@dataclass(frozen=True)
class _Session:
    """What one session has: who is there, and where it begins."""

    number: int
    roster: Roster
    phases: list[tuple[Mode, int]]
    programs: Mapping[Mode, Program]
    phase: int
    cursor: int


def _until_done(run: _Run) -> tuple[Worker, Roster]:
    """Run sessions until one gets to the end, and return what it had; each restart of a party begins a new one."""
    worker: Worker | None = None
    known = Roster({})
    initial: dict[str, Tensor] = {}
    most = run.task.most or _RESETS_MAX
    for _ in range(most):
        try:
            start = _met(run)
            roster = Roster(start.counts)
            if worker is None or roster != known or run.task.anew:
                known = roster
                worker = run.task.build(run.plan, run.party, roster)
                if run.task.prepare:
                    run.task.prepare(worker)
                initial = snapshot(worker.site) if run.task.trains else {}
            session = _open(run, worker, roster, start.session, start.checkpoint, initial)
            _work(run, worker, session)
            if run.task.ends:
                run.link.finish()
            else:
                run.link.rest()
        except SessionReset as reset:
            run.tell("rollback", {"party": run.party.name, "reason": str(reset)})
            if worker is not None:
                worker.clear()
            continue
        return worker, known
    raise PeerError(
        "parties restarted too often",
        where=f"party {run.party.name}",
        expected=f"at most {most} restarts",
        remedy="look at the first error of the party that restarts",
        code="E709",
    )


def _met(run: _Run) -> Start:
    """Meet the others, with the checkpoints that are whole here; say so where one is not, or where none is common.

    Raises:
        CheckpointError: E802, there is none to go on from, as one here is damaged.
    """
    whole, damaged = run.task.store.look() if run.task.store else ([], [])
    for error in damaged:
        run.tell("damaged", {"party": run.party.name, "file": error.where, "got": error.got})
    if damaged and not whole:
        raise none_whole(damaged[-1])
    start = run.link.rendezvous(Ready(run.task.counts, tuple(whole)))
    if start.checkpoint < 0 and damaged:
        raise none_whole(damaged[-1])
    if start.checkpoint < 0 and whole:
        run.tell("anew", {"party": run.party.name})
    return start


def _open(
    run: _Run, worker: Worker, roster: Roster, number: int, checkpoint: int, initial: Mapping[str, Tensor]
) -> _Session:
    """Compile the programs, go back to the checkpoint (-1: the beginning), and let frames in."""
    programs = run.task.programs(run.plan, roster)
    phases, store = run.task.agenda(run.plan, roster), run.task.store
    phase, cursor = 0, -1
    if store is not None:
        if checkpoint < 0:
            store.set_aside()
        else:
            store.drop_after(checkpoint)
    if checkpoint < 0 or store is None:
        if run.task.trains:
            restore(worker.site, initial, "the beginning")
        worker.ledger.restore({"flows": [], "seconds": [], "flops": []})
        worker.history.clear()
        worker.predictions.clear()
    else:
        loaded = store.load(checkpoint)
        if loaded.document["roster"] != _plain(roster):
            raise CheckpointError(
                "the numbers of samples changed since the checkpoint",
                where=f"party {run.party.name}, checkpoint {checkpoint}",
                remedy="restore the data sets, or start a new run",
                code="E805",
            )
        phase, cursor = loaded.position.phase, loaded.position.number
        if loaded.position.last:
            phase, cursor = phase + 1, -1
        if phase < len(phases):
            worker.begin(*phases[phase])
        restore(worker.site, loaded.tensors, f"checkpoint {checkpoint}")
        worker.ledger.restore(loaded.document["ledger"])
        worker.history[:] = loaded.document["history"]
    run.sent.settle(worker.ledger)
    mine = let_in(run.link, run.plan, run.party.name, programs, phases)
    return _Session(number, roster, phases, mine, phase, cursor)


def _work(run: _Run, worker: Worker, session: _Session) -> None:
    identifiers = _identifiers(session)
    for place in range(session.phase, len(session.phases)):
        mode, number = session.phases[place]
        resumed = place == session.phase and session.cursor >= 0
        if not resumed:
            worker.begin(mode, number)
        cursor = Cursor(session.number, number, session.cursor if resumed else -1)

        def saved(job: Checkpoint, place: int = place) -> None:
            _save(run, worker, session, identifiers[place, job.number], Position(place, job.number, job.last))

        observer = _Observer(run, worker, mode, number, session.programs[mode].steps, saved)
        talk = interpret(session.programs[mode], cursor, worker)
        try:
            drive(talk, run.sent, worker.ledger, observer.handle, observer.tell)
        finally:
            observer.tell()
        rows = [row for row in worker.history if (row["mode"], row["round"]) == (mode, number)]
        run.tell("round", {"party": run.party.name, "mode": mode, "round": number, "history": rows})


@dataclass(frozen=True)
class _Observer:
    """Fulfils instructions, saves checkpoints, tells of steps: of each while the party waits in the next."""

    run: _Run
    worker: Worker
    mode: Mode
    number: int
    steps: int
    saved: Callable[[Checkpoint], None]
    ended: list[int] = field(default_factory=list)

    def handle(self, effect: Do | EndStep) -> object:
        if isinstance(effect, EndStep):
            self.worker.end_step()
            self.worker.ledger.end_step()
            self.ended.append(effect.step)
            if len(self.ended) > _UNTOLD:
                self.tell()
            return None
        result = fulfil(self.worker, effect, time.perf_counter)
        if isinstance(effect.instruction, Checkpoint):
            self.tell()
            self.saved(effect.instruction)
        return result

    def tell(self) -> None:
        """Tell of the steps that have ended."""
        while self.ended:  # each is taken before it is told: what stops in the middle, such as Ctrl-C, tells none again
            place = {"mode": self.mode, "round": self.number, "step": self.ended.pop(0), "steps": self.steps}
            self.run.tell("step", {"party": self.run.party.name, **place, **self.worker.ledger.close_step()})


def _save(run: _Run, worker: Worker, session: _Session, identifier: int, position: Position) -> None:
    if run.task.store is None:
        return
    document = {
        "ledger": worker.ledger.document(),
        "history": worker.history,
        "roster": _plain(session.roster),
    }
    run.task.store.save(identifier, position, snapshot(worker.site), document)


def _identifiers(session: _Session) -> dict[tuple[int, int], int]:
    """Return (place in the agenda, checkpoint's number) -> identifier, the same at all parties."""
    found: dict[tuple[int, int], int] = {}
    for place, (mode, _) in enumerate(session.phases):
        for block in session.programs[mode].blocks:
            for job in block.instructions:
                if isinstance(job, Checkpoint):
                    found[place, job.number] = len(found)
    return found


def _plain(roster: Roster) -> dict[str, dict[str, int]]:
    return {mode: dict(held) for mode, held in roster.samples.items()}


def _private_seed(folder: Path, party: Party) -> int:
    """Return the party's seed; one that was drawn is kept in the run's folder, which never leaves, for a restart."""
    if party.seed is not None:
        return party.seed
    path = folder / f"{party.name}.seed"
    if not path.exists():
        write_atomic(path, str(secrets.randbits(63)).encode())
        path.chmod(0o600)
    return int(path.read_text())
