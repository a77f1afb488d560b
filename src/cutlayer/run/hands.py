"""What a user's loop leaves to the engine: frames, exchanges, credits, data, the end of a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cutlayer.core.program import Checkpoint, Credit, Exchange, Load, Program, Recv, Send
from cutlayer.engine.party import Cursor, Do, EndStep, Interpreter, fulfil
from cutlayer.engine.worker import Worker
from cutlayer.run.course import Item, Key
from cutlayer.run.drive import drive, waited
from cutlayer.transport.base import Transport

__all__ = ["Hands"]


class Hands:
    """Does single instructions of a party's program.

    Args:
        program: Of the mode.
        cursor: Session and round.
        worker: The party's.
        link: Carries frames.
        told: Called at the end of each step, with its number.
    """

    def __init__(
        self, program: Program, cursor: Cursor, worker: Worker, link: Transport, told: Callable[[int], None]
    ) -> None:
        """Begin at the first step."""
        self._party, self.worker, self.link, self._told = Interpreter(program, cursor, worker), worker, link, told
        self._read = -1  # the step in which the next one's batches were last read

    @property
    def step(self) -> int:
        """Return the number of the step in the round."""
        return self._party.step

    @property
    def place(self) -> str:
        """Return party, mode, round and step, for errors."""
        return f"party {self.worker.party}, {self.worker.mode} round {self.worker.round}, step {self.step}"

    def do(self, job: Item) -> None:
        """Do an instruction that the loop has no part in."""
        if isinstance(job, EndStep):
            self.worker.end_step()
            self._told(self._party.step)
            self._party.step += 1
        elif isinstance(job, Load):
            self._fulfil(Do(job, self._party.batch(job.lane)))
        elif isinstance(job, Exchange | Credit | Checkpoint):
            drive(self._party.talk(job), self.link, self.worker.ledger, self._fulfil)

    def read_ahead(self, coming: Callable[[], Sequence[Load]]) -> None:
        """Read the next step's batches, which `coming` gives, once in a step."""
        if self._read == self._party.step:
            return
        self._read = self._party.step
        for load in coming():
            self._fulfil(Do(load, self._party.batches.get(load.lane, 0), ahead=True))

    def post(self, job: Send, value: Tensor) -> None:
        """Send a value or gradient that the loop has computed; the loop may write to it afterwards."""
        begin = time.perf_counter()
        parcel = self.worker.packed(job, self._party.step, value.detach().clone())
        self.worker.ledger.spend("send", "", time.perf_counter() - begin)
        post = self._party.post(job.to, self._party.tag(job), parcel)
        self.link.send(post.to, post.frame)

    def take(self, job: Recv) -> Tensor:
        """Wait for a value or gradient, and return it."""
        frame = waited(self.link, self.worker.ledger, job.source, self._party.tag(job))
        begin = time.perf_counter()
        value = self.worker.opened(job, self._party.taken(job.source, frame))
        self.worker.ledger.spend("recv", "", time.perf_counter() - begin)
        return value

    def send_field(self, job: Send) -> None:
        """Send a field of this party's data, which the plan releases."""
        self.post(job, self.worker.values.get(self.worker.graph.edges[job.edge], job.lane, job.micro))

    def take_field(self, job: Recv) -> None:
        """Wait for a field of another party's data, and keep it for this step."""
        self.worker.values.put(self.worker.graph.edges[job.edge], job.lane, job.micro, self.take(job))

    def held(self, key: Key) -> dict[str, Tensor]:
        """Return the fields of a microbatch that were loaded or have come."""
        values = self.worker.values
        edges = [edge for edge in self.worker.graph.edges if edge.source.field and values.has(edge, *key)]
        return {edge.source.field: values.get(edge, *key) for edge in reversed(edges)}

    def zeros(self, job: Send) -> Tensor:
        """Return a gradient of zeros, for a value that the loop did not use."""
        spec = self.worker.graph.edges[job.edge].spec
        return torch.zeros(spec.concrete(job.size) if spec else ())

    def _fulfil(self, effect: Do | EndStep) -> object:
        return fulfil(self.worker, effect, time.perf_counter) if isinstance(effect, Do) else None
