"""A party's program as a list to look ahead in, and the words of a user's loop for its instructions."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from cutlayer.core.graph import Graph
from cutlayer.core.parts import Loss
from cutlayer.core.program import Backward, Exchange, Forward, Instruction, Load, Program, Recv, Send, Step
from cutlayer.engine.party import EndStep

__all__ = ["PARTS", "Course", "Item", "Key"]

Item = Instruction | EndStep
Key = tuple[int, int]  # lane, micro
PARTS = (Forward, Backward, Send, Recv)


class Course:
    """What is to be done in a round, in order. `next` is what comes; None at the end."""

    def __init__(self, program: Program, graph: Graph) -> None:
        """Stand before the first instruction."""
        self.graph = graph
        self._items, self._seen = _all(program), deque[Item]()
        self.next: Item | None = next(self._items, None)

    def take(self) -> None:
        """Go on to the next instruction."""
        self.next = self._seen.popleft() if self._seen else next(self._items, None)

    def coming(self) -> Iterator[Item]:
        """Give all instructions from here on, without going there."""
        place = -1
        while self.next is not None:
            if place < 0:
                yield self.next
            elif place < len(self._seen):
                yield self._seen[place]
            else:
                following = next(self._items, None)
                if following is None:
                    return
                self._seen.append(following)
                yield following
            place += 1

    def next_loads(self) -> list[Load]:
        """Return what the next step loads, if it begins with that."""
        found, ends = list[Load](), 0
        for item in self.coming():
            ends += isinstance(item, EndStep)
            if ends and isinstance(item, Load):
                found.append(item)
            elif ends == 2 or (ends and not isinstance(item, EndStep)):
                break
        return found

    def ahead(self, key: Key) -> Iterator[Item]:
        """Give the instructions from here to the end of a microbatch, without going there."""
        for item in self.coming():
            if isinstance(item, EndStep | Step) or (isinstance(item, PARTS) and (item.lane, item.micro) != key):
                return
            yield item

    def of_field(self, job: Send | Recv) -> bool:
        """Whether it carries a field of raw data, which the plan releases."""
        return bool(self.graph.edges[job.edge].source.field)

    def leaving(self, key: Key) -> list[str]:
        """Return the origins of the values that the next call of `remote` sends, in program order."""
        found: dict[str, None] = {}
        came = False
        for job in self.ahead(key):
            if (isinstance(job, Forward) and came) or isinstance(job, Backward) or not isinstance(job, PARTS):
                break
            if isinstance(job, Send | Recv):
                if job.direction == "down":
                    break
                if not self.of_field(job):
                    came = came or isinstance(job, Recv)
                    if isinstance(job, Send):
                        found[self.graph.edges[job.edge].origin] = None
        return list(found)

    def outlook(self, key: Key) -> tuple[dict[str, float], bool]:
        """Return what each own loss's gradient starts with, and whether this is the last microbatch of its batch."""
        scales: dict[str, float] = {}
        for job in self.coming():
            if isinstance(job, EndStep):
                break
            if isinstance(job, PARTS) and (job.lane, job.micro) != key:
                return scales, False
            if isinstance(job, Backward) and isinstance(self.graph.by_name[job.stage], Loss):
                scales[job.stage] = job.scale
        return scales, True

    def comes(self, job: Item | None) -> str:
        """Say in words of the loop what an instruction is."""
        if isinstance(job, Forward):
            return f"stage {job.stage!r} to be run: call the module that was given to Party for it"
        if isinstance(job, Send) and job.direction == "up":
            return f"remote(...) with the value of {self.graph.edges[job.edge].origin}"
        if isinstance(job, Recv) and job.direction == "up":
            return f"remote(), which gives {self.graph.edges[job.edge].origin}"
        if isinstance(job, Backward | Send | Recv):
            return "backward() of the loss, or of what remote gave"
        if isinstance(job, Exchange | Step):
            return "session.optimizer.step()"
        return "the next batch" if job is not None else "the end of the round"


def _all(program: Program) -> Iterator[Item]:
    for block in program.blocks:
        for _ in range(block.repeat):
            yield from block.instructions
            yield EndStep(0, block.name)
