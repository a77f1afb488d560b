"""The party: an interpreter of its own program, sans-I/O.

It is a generator. It yields `Do` (an instruction for the worker), `Post` (a frame to send) and `Take` (a frame to wait
for), and knows no transport, clock, file or device. Whoever drives it fulfils these; see `drive`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from cutlayer.core.program import (
    Backward,
    Checkpoint,
    Credit,
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

__all__ = ["Cursor", "Do", "Effect", "Post", "Take", "fulfil", "interpret"]


@dataclass(frozen=True)
class Do:
    """Let the worker fulfil an instruction. `index` numbers the batches of a `Load`; `parcel` is what came in."""

    instruction: Instruction
    index: int = 0
    parcel: Parcel | None = None


@dataclass(frozen=True)
class Post:
    """Send a frame to a party; answered with None as soon as it is on its way."""

    to: str
    frame: Frame


@dataclass(frozen=True)
class Take:
    """Wait for the frame with this tag from a party; answered with it."""

    source: str
    tag: Tag


@dataclass(frozen=True)
class EndStep:
    """A step is over: values may be forgotten, the step be noted."""

    step: int
    name: str


Effect = Do | Post | Take | EndStep
Talk = Generator[Effect, Any, None]


@dataclass(frozen=True)
class Cursor:
    """A place in a run: `session` of the link, `round` of the mode, and the checkpoint after which to go on.

    `checkpoint` -1 means the beginning of the round.
    """

    session: int = 0
    round: int = 0
    checkpoint: int = -1


def interpret(program: Program, cursor: Cursor, worker: Worker) -> Talk:
    """Run one round of a program, from the cursor on."""
    step, loads = 0, dict[int, int]()
    skipping = cursor.checkpoint >= 0
    owed: dict[str, list[int]] = {}
    for block in program.blocks:
        if skipping:
            step += block.repeat
            for instruction in block.instructions:
                if isinstance(instruction, Load):
                    loads[instruction.lane] = loads.get(instruction.lane, 0) + block.repeat
                if isinstance(instruction, Checkpoint) and instruction.number == cursor.checkpoint:
                    skipping = False
            continue
        for _ in range(block.repeat):
            runner = _Runner(program, cursor, worker, step, owed)
            for instruction in block.instructions:
                index = 0
                if isinstance(instruction, Load):
                    index = loads.get(instruction.lane, 0)
                    loads[instruction.lane] = index + 1
                yield from runner.run(instruction, index)
            yield EndStep(step, block.name)
            step += 1


@dataclass(frozen=True)
class _Runner:
    """Runs the instructions of one step. `owed`: by peer, the steps since the last checkpoint not yet credited."""

    program: Program
    cursor: Cursor
    worker: Worker
    step: int
    owed: dict[str, list[int]]

    def run(self, instruction: Instruction, index: int) -> Talk:
        if isinstance(instruction, Send):
            parcel: Parcel = yield Do(instruction)
            yield from self._post(instruction.to, self._tag(instruction), parcel)
        elif isinstance(instruction, Recv):
            parcel = yield from self._take(instruction.source, self._tag(instruction))
            yield Do(instruction, parcel=parcel)
        elif isinstance(instruction, Credit):
            yield from self._credit(instruction)
        elif isinstance(instruction, Exchange):
            yield from self._exchange(instruction)
        elif isinstance(instruction, Checkpoint):
            yield from self._settle()
            yield Do(instruction)
        else:
            yield Do(instruction, index)

    def _credit(self, credit: Credit) -> Talk:
        if credit.give:
            yield from self._post(credit.peer, self._credit_tag(self.step), Parcel(BYTES, (0,), b""))
            return
        steps = self.owed.setdefault(credit.peer, [])
        if len(steps) == credit.lag:
            yield from self._take(credit.peer, self._credit_tag(steps.pop(0)))
        steps.append(self.step)

    def _settle(self) -> Talk:
        """Wait for all credits that are still owed: at a checkpoint nothing is in flight."""
        for peer, steps in self.owed.items():
            while steps:
                yield from self._take(peer, self._credit_tag(steps.pop(0)))

    def _exchange(self, job: Exchange) -> Talk:
        me, counts = self.program.party, dict[tuple[str, str], int]()
        talk = EXCHANGES[job.name](job, me, self.worker.site)
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
            tag = self._at(self.step, edge=job.number, lane=0, micro=number, direction="exchange")
            if isinstance(word, Hear):
                answer = (yield from self._take(peer, tag)).payload
            else:
                _check_budget(job, me, number, len(word.payload))
                answer = None
                yield from self._post(peer, tag, Parcel(BYTES, (len(word.payload),), word.payload))

    def _post(self, to: str, tag: Tag, parcel: Parcel) -> Talk:
        frame = Frame(tag, parcel.dtype, parcel.shape, parcel.payload)
        self.worker.ledger.sent(to, frame)
        yield Post(to, frame)

    def _take(self, source: str, tag: Tag) -> Generator[Effect, Any, Parcel]:
        frame: Frame = yield Take(source, tag)
        self.worker.ledger.received(source, frame)
        return Parcel(frame.dtype, frame.shape, frame.payload)

    def _tag(self, job: Send | Recv) -> Tag:
        return self._at(self.step, edge=job.edge, lane=job.lane, micro=job.micro, direction=job.direction)

    def _credit_tag(self, step: int) -> Tag:
        return self._at(step, edge=0, lane=0, micro=0, direction="credit")

    def _at(self, step: int, **rest: Any) -> Tag:  # noqa: ANN401 - the fields of a Tag
        return Tag(session=self.cursor.session, mode=self.program.mode, round=self.cursor.round, step=step, **rest)


def _check_budget(job: Exchange, me: str, number: int, size: int) -> None:
    if number >= job.messages or size > job.limit:
        raise ContractError(
            f"the exchange {job.name!r} would send more than the plan allows",
            where=f"party {me}, stage {job.stage or 'all'}",
            expected=f"at most {job.messages} messages of {job.limit} bytes",
            got=f"message {number + 1} of {size} bytes",
            remedy="raise state_limit of the stage in the plan, at all parties",
            code="E525",
        )


def fulfil(worker: Worker, effect: Do, clock: Callable[[], float]) -> Parcel | None:
    """Let the worker fulfil one instruction, and note the seconds it took. `clock` gives seconds."""
    job, begin = effect.instruction, clock()
    result: Parcel | None = None
    if isinstance(job, Load):
        worker.load(job, effect.index)
    elif isinstance(job, Forward):
        worker.forward(job)
    elif isinstance(job, Backward):
        worker.backward(job)
    elif isinstance(job, Send):
        result = worker.parcel(job)
    elif isinstance(job, Recv) and effect.parcel is not None:
        worker.deliver(job, effect.parcel)
    elif isinstance(job, Step):
        worker.step(job)
    elif isinstance(job, Checkpoint) and job.last:
        worker.end_round()
    worker.ledger.spend(type(job).__name__.lower(), getattr(job, "stage", ""), clock() - begin)
    return result
