"""The party: an interpreter of its own program, sans-I/O.

It is a generator. It yields `Do` (an instruction for the worker), `Post` (a frame to send) and `Take` (a frame to wait
for), and knows no transport, clock, file or device. Whoever drives it fulfils these; see `drive`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import Any, cast

import msgspec

from cutlayer.core.program import (
    Backward,
    Block,
    Checkpoint,
    Credit,
    Direction,
    Exchange,
    Forward,
    Instruction,
    Load,
    Program,
    Recv,
    Send,
    Step,
    Tag,
)
from cutlayer.engine.exchange import EXCHANGES, Hear, Say
from cutlayer.engine.wire import BYTES, Buffer, Frame
from cutlayer.engine.worker import Parcel, Worker
from cutlayer.errors import ContractError

_OWN = {Forward: "forward", Backward: "backward", Step: "step"}  # what a party does without any other
_TIMED: tuple[type, ...] = (Load, Forward, Backward, Send, Recv, Step, Checkpoint)
_KINDS = {kind: kind.__name__.lower() for kind in _TIMED}

__all__ = ["Cursor", "Do", "Effect", "Post", "Take", "fulfil", "interpret"]


class Do(msgspec.Struct, frozen=True):
    """Let the worker fulfil an instruction. `index`: batch of a `Load`, step of a `Send`; `parcel` is what came in.

    `ahead`: the turn of this `Load` is in the next step; the batch is read now, for the party has to wait.
    """

    instruction: Instruction
    index: int = 0
    parcel: Parcel | None = None
    ahead: bool = False


class Post(msgspec.Struct, frozen=True):
    """Send a frame to a party; answered with None as soon as it is on its way."""

    to: str
    frame: Frame


class Take(msgspec.Struct, frozen=True):
    """Wait for the frame with this tag from a party; answered with it."""

    source: str
    tag: Tag


class EndStep(msgspec.Struct, frozen=True):
    """A step is over: values may be forgotten, the step be noted."""

    step: int
    name: str


Effect = Do | Post | Take | EndStep
Talk = Generator[Effect, Any, None]


class Cursor(msgspec.Struct, frozen=True):
    """A place in a run: `session` of the link, `round` of the mode, and the checkpoint after which to go on.

    `checkpoint` -1 means the beginning of the round.
    """

    session: int = 0
    round: int = 0
    checkpoint: int = -1


def interpret(program: Program, cursor: Cursor, worker: Worker) -> Talk:
    """Run one round of a program, from the cursor on."""
    party = Interpreter(program, cursor, worker)
    for block in party.rest():
        loads, spot = _ahead(block)
        jobs = [(job, Do(job) if type(job) in _OWN else None) for job in block.instructions]
        for left in reversed(range(block.repeat)):
            for place, (job, alone) in enumerate(jobs):
                if place == spot and left:
                    for load in loads:
                        yield Do(load, party.batches.get(load.lane, 0), ahead=True)
                if alone is not None:
                    yield alone  # made once: it is the same in each step
                elif isinstance(job, Send):
                    parcel: Parcel = yield Do(job, party.step)
                    yield party.post(job.to, party.tag(job), parcel)
                elif isinstance(job, Recv):
                    frame = yield Take(job.source, party.tag(job))
                    yield Do(job, 0, party.taken(job.source, frame))
                elif isinstance(job, Load):
                    yield Do(job, party.batch(job.lane))
                elif isinstance(job, Credit | Exchange | Checkpoint):
                    yield from party.talk(job)
            yield EndStep(party.step, block.name)
            party.step += 1


class Interpreter:
    """What a party remembers while it runs a program.

    `step` counts through the round, `batches` those that were read of each lane; `owed`: by peer, the steps since the
    last checkpoint not yet credited.
    """

    def __init__(self, program: Program, cursor: Cursor, worker: Worker) -> None:
        self.program, self.cursor, self.worker, self.ledger = program, cursor, worker, worker.ledger
        self.step = 0
        self.owed: dict[str, list[int]] = {}
        self.batches: dict[int, int] = {}

    def rest(self) -> Iterator[Block]:
        """Give the blocks after the cursor's checkpoint, and count the steps and batches of those before."""
        skipping = self.cursor.checkpoint >= 0
        for block in self.program.blocks:
            if not skipping:
                yield block
                continue
            self.step += block.repeat
            for job in block.instructions:
                if isinstance(job, Load):
                    self.batches[job.lane] = self.batches.get(job.lane, 0) + block.repeat
                if isinstance(job, Checkpoint) and job.number == self.cursor.checkpoint:
                    skipping = False

    def batch(self, lane: int) -> int:
        """Number the batches of a lane."""
        index = self.batches.get(lane, 0)
        self.batches[lane] = index + 1
        return index

    def talk(self, job: Credit | Exchange | Checkpoint) -> Talk:
        """Run what is about other parties and not about a tensor at a cut."""
        if isinstance(job, Credit):
            yield from self._credit(job)
        elif isinstance(job, Exchange):
            yield from self._exchange(job)
        else:
            yield from self._settle()
            yield Do(job)

    def tag(self, job: Send | Recv) -> Tag:
        """Address a value or gradient."""
        return self._at(self.step, job.edge, job.lane, job.micro, job.direction)

    def post(self, to: str, tag: Tag, parcel: Parcel) -> Post:
        """Make a frame, and count it."""
        frame = Frame(tag, parcel.dtype, parcel.shape, parcel.payload, parcel.order)
        self.ledger.sent(to, frame)
        return Post(to, frame)

    def taken(self, source: str, frame: Frame) -> Parcel:
        """Count a frame that came."""
        self.ledger.received(source, frame)
        return Parcel(frame.dtype, frame.shape, frame.payload, frame.order)

    def _credit(self, credit: Credit) -> Talk:
        if credit.give:
            yield self.post(credit.peer, self._credit_tag(self.step), Parcel(BYTES, (0,), b""))
            return
        steps = self.owed.setdefault(credit.peer, [])
        if len(steps) == credit.lag:
            self.taken(credit.peer, (yield Take(credit.peer, self._credit_tag(steps.pop(0)))))
        steps.append(self.step)

    def _settle(self) -> Talk:
        """Wait for all credits that are still owed: at a checkpoint nothing is in flight."""
        for peer, steps in self.owed.items():
            while steps:
                self.taken(peer, (yield Take(peer, self._credit_tag(steps.pop(0)))))

    def _exchange(self, job: Exchange) -> Talk:
        me, counts = self.program.party, dict[tuple[str, str], int]()
        self.ledger.exchanges[job.number] = (job.name, job.stage)
        run = EXCHANGES.get(job.name) or self.worker.site.exchanges[job.name]
        talk = run(job, me, self.worker.site)
        answer: Buffer | None = None
        while True:
            try:
                word = talk.send(answer) if answer is not None else next(talk)
            except StopIteration:
                return
            peer = word.to if isinstance(word, Say) else word.source
            way = "say" if isinstance(word, Say) else "hear"
            number = counts.get((way, peer), 0)
            counts[way, peer] = number + 1
            tag = self._at(self.step, job.number, 0, number, "exchange")
            if isinstance(word, Hear):
                answer = self.taken(peer, (yield Take(peer, tag))).payload
            else:
                _check_budget(job, me, number, len(word.payload))
                answer = None
                yield self.post(peer, tag, Parcel(BYTES, (len(word.payload),), word.payload))

    def _credit_tag(self, step: int) -> Tag:
        return self._at(step, 0, 0, 0, "credit")

    def _at(self, step: int, edge: int, lane: int, micro: int, direction: Direction) -> Tag:
        cursor = self.cursor
        return Tag(cursor.session, self.program.mode, cursor.round, step, edge, lane, micro, direction)


def _check_budget(job: Exchange, me: str, number: int, size: int) -> None:
    if number >= job.messages or size > job.limit:
        raise ContractError(
            f"the exchange {job.name!r} would send more than the plan allows",
            where=f"party {me}, stage {job.stage or 'all'}",
            expected=f"at most {job.messages} messages of {job.limit} bytes",
            got=f"message {number + 1} of {size} bytes",
            remedy="raise state_limit of the stage in the plan, at all parties",
            code="E531",
        )


def _ahead(block: Block) -> tuple[list[Load], int]:
    """Return what a step of a block loads, at its beginning, and where its first wait is; -1 if there is none.

    What must be waited for takes long: meanwhile the next step's batches can be read.
    """
    loads = [job for job in block.instructions if isinstance(job, Load)]
    return loads, next((place for place, job in enumerate(block.instructions) if isinstance(job, Recv)), -1)


def fulfil(worker: Worker, effect: Do, clock: Callable[[], float]) -> Parcel | None:
    """Let the worker fulfil one instruction, and note the seconds it took. `clock` gives seconds.

    A batch is noted once: a `Load` whose batch was read ahead is not.
    """
    job, begin = effect.instruction, clock()
    kind, stage, result = type(job), "", None
    own = _OWN.get(kind)
    if own is not None:
        getattr(worker, own)(job)
        stage = getattr(job, "stage", "")
    elif kind is Send:
        result = worker.parcel(cast("Send", job), effect.index)
    elif kind is Recv and effect.parcel is not None:
        worker.deliver(cast("Recv", job), effect.parcel)
    elif kind is Load:
        if worker.load(cast("Load", job), effect.index, ahead=effect.ahead):
            return None
    elif isinstance(job, Checkpoint) and job.last:
        worker.end_round()
    worker.ledger.spend(_KINDS[kind], stage, clock() - begin)
    return result
