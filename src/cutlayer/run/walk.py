"""A party's program, walked by a user's own loop: what the loop does itself is passed over, the rest is done here.

| code | error | meaning |
| --- | --- | --- |
| E443 | ProgramError | the loop asks for a field that the plan gives no stage of this party |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from cutlayer.core.graph import Edge
from cutlayer.core.program import Backward, Credit, Exchange, Forward, Recv, Send, Step
from cutlayer.errors import ProgramError
from cutlayer.run.course import PARTS, Course, Item, Key
from cutlayer.run.hands import Hands
from cutlayer.run.missteps import evaluating, misplaced, second

__all__ = ["Leg", "Walk", "spread"]


@dataclass
class Leg:
    """What one call of `remote` sent and got: edges, in program order."""

    key: Key = (0, 0)
    sent: list[Edge] = field(default_factory=list)
    got: list[Edge] = field(default_factory=list)


class Walk:
    """One round of a party's program.

    Args:
        course: What is to be done.
        hands: Do what the loop does not.
        ran: Says whether the loop has run a stage on a microbatch since the last time this was asked.
        training: Whether it is a round of training.
    """

    def __init__(self, course: Course, hands: Hands, ran: Callable[[str], bool], *, training: bool) -> None:
        """Stand before the first instruction."""
        self.course, self.hands, self._ran, self.training = course, hands, ran, training
        self._done: set[tuple[int, int, int, str]] = set()  # edge, lane, micro, direction: done before its turn
        self._stepped = False
        self._key: Key | None = None

    @property
    def lane(self) -> int:
        """The lane of the present microbatch; 0 between microbatches."""
        return self._key[0] if self._key is not None else 0

    def part(self) -> int | None:
        """Go on to the next microbatch and return its size; None at the end of the round.

        Raises:
            ProgramError: E440, something of the last one is not done.
        """
        self._leave_part()
        while (job := self.course.next) is not None:
            if isinstance(job, PARTS):
                if isinstance(job, Backward) or (isinstance(job, Send | Recv) and job.direction == "down"):
                    raise self._unexpected("the next batch", job)
                self._key = job.lane, job.micro
                return job.size
            self._do(job)
        return None

    def _leave_part(self) -> None:
        """Pass over what the loop must have done of the last microbatch."""
        while self._key is not None and (job := self.course.next) is not None:
            if isinstance(job, PARTS):
                if (job.lane, job.micro) != self._key:
                    break
                self._pass(job, "the next batch")
            elif isinstance(job, Exchange | Step) and self.training and not self._stepped and self._trains():
                raise self._unexpected("the next batch", job)
            else:
                break
        self._key = None

    def _pass(self, job: Item, call: str) -> None:
        """Pass over an instruction of a microbatch that is done, or do it if no loop can."""
        if isinstance(job, Send | Recv):
            done = (job.edge, job.lane, job.micro, job.direction) in self._done
            if not done and not (job.direction == "up" and self.course.of_field(job)):
                raise self._unexpected(call, job)
            if not done and isinstance(job, Send):
                self.hands.send_field(job)
            elif not done and isinstance(job, Recv):
                self.hands.take_field(job)
        elif isinstance(job, Forward) and not self._ran(job.stage):
            raise self._unexpected("", job)
        self.course.take()

    def forward(self, values: Mapping[str, Tensor]) -> tuple[Leg, list[Tensor]]:
        """Send what this party has computed, by origin, and wait for what it needs to go on.

        Raises:
            ProgramError: E440, another value is due, or none.
        """
        leg, found = Leg(self.key("remote")), list[Tensor]()
        while isinstance(job := self.course.next, Forward | Send | Recv) and (job.lane, job.micro) == leg.key:
            if isinstance(job, Forward) and found:
                break
            if isinstance(job, Forward) or self.course.of_field(job):
                self._pass(job, "remote")
                continue
            if job.direction == "down":
                break
            edge = self.course.graph.edges[job.edge]
            if isinstance(job, Recv):
                self.hands.read_ahead(self.course.next_loads)
                found.append(self.hands.take(job))
                leg.got.append(edge)
            elif edge.origin in values:
                self.hands.post(job, values[edge.origin])
                leg.sent.append(edge)
            else:
                raise self._unexpected(f"remote({', '.join(values)})", job)
            self.course.take()
        if set(values) - {edge.origin for edge in leg.sent} or not (leg.sent or leg.got):
            raise self._unexpected(f"remote({', '.join(values)})", self.course.next)
        return leg, found

    def backward(self, leg: Leg, gradients: Sequence[Tensor | None]) -> dict[int, Tensor]:
        """Send the gradients at what a leg got, and wait for those at what it sent: edge -> gradient.

        Raises:
            ProgramError: E440, the program is not there: the loop goes back twice, for another microbatch, or in a
                round of evaluation.
        """
        if not self.training:
            raise evaluating(self.hands.place, "backward")
        due = self._due(leg) if self._key == leg.key else []
        trained = [edge.index for edge in (*leg.sent, *leg.got) if edge.trained]
        if not due and trained:
            if all((index, *leg.key, "down") in self._done for index in trained):
                raise second(self.hands.place)
            raise self._unexpected("backward", self.course.next)
        at = {edge.index: gradient for edge, gradient in zip(leg.got, gradients, strict=True)}
        heard: dict[int, Tensor] = {}
        for job in due:
            if isinstance(job, Send):
                gradient = at[job.edge]
                self.hands.post(job, gradient if gradient is not None else self.hands.zeros(job))
        for job in due:
            if isinstance(job, Recv):
                self.hands.read_ahead(self.course.next_loads)
                heard[job.edge] = self.hands.take(job)
            self._done.add((job.edge, job.lane, job.micro, "down"))
        if not heard:
            self.hands.link.flush()  # the loop goes on to its optimizer
        return heard

    def _due(self, leg: Leg) -> list[Send | Recv]:
        """Return the instructions of a leg's way back: all edges of what it sent and got, each once."""
        origins, got = {edge.origin for edge in leg.sent}, {edge.index for edge in leg.got}
        found = list[Send | Recv]()
        for job in self.course.ahead(leg.key):
            if isinstance(job, Send | Recv) and job.direction == "down":
                new = (job.edge, job.lane, job.micro, "down") not in self._done
                mine = job.edge in got if isinstance(job, Send) else self.course.graph.edges[job.edge].origin in origins
                found += [job] if new and mine else []
        return found

    def before_step(self) -> None:
        """Do what comes before the optimizer's step: sums of replicas' gradients, the norm over all parties.

        Raises:
            ProgramError: E440, gradients are not complete yet, or this is a round of evaluation.
        """
        if not self.training:
            raise evaluating(self.hands.place, "optimizer.step()")
        if self._stepped:
            return
        self.key("optimizer.step()")
        while (job := self.course.next) is not None and not isinstance(job, Step):
            if isinstance(job, PARTS):
                self._pass(job, "optimizer.step()")
            elif isinstance(job, Exchange | Credit):
                self._do(job)
            else:
                raise self._unexpected("optimizer.step()", job)
        self.course.take()
        self._stepped = True

    def field(self, name: str) -> Tensor:
        """Return a field of this microbatch's data, also one that another party releases.

        Raises:
            ProgramError: E443, there is none of this name here.
        """
        key = self.key("a field of the batch")
        graph, ahead = self.course.graph, [job for job in self.course.ahead(key) if isinstance(job, Recv)]
        coming = {graph.edges[job.edge].source.field: job for job in reversed(ahead) if self.course.of_field(job)}
        held = self.hands.held(key)
        if name not in held and name in coming:
            self.hands.take_field(coming[name])
            self._done.add((coming[name].edge, *key, "up"))
            held = self.hands.held(key)
        if name in held:
            return held[name]
        raise _no_field(self.hands, name, sorted({*held, *coming}))

    def _do(self, job: Item) -> None:
        self.course.take()
        self.hands.do(job)
        if not isinstance(job, Exchange | Credit):
            self._stepped = False
            self._done.clear()

    def _trains(self) -> bool:
        return any(bundle.optimizer is not None for bundle in self.hands.worker.site.bundles.values())

    def key(self, call: str) -> Key:
        """Return lane and number of the present microbatch. Raises `ProgramError` E440 if there is none."""
        if self._key is None:
            raise self._unexpected(call, self.course.next)
        return self._key

    def _unexpected(self, call: str, job: Item | None) -> ProgramError:
        return misplaced(self.hands.place, self.course.comes(job), call, stepping=isinstance(job, Exchange | Step))


def spread(
    walk: Walk, names: Sequence[str], given: Sequence[Tensor]
) -> tuple[tuple[str, ...], list[Tensor], tuple[int, ...]]:
    """Return origins and values once for each edge that takes them, in the order in which autograd adds gradients.

    The edges come third; -1: no stage takes the value.
    """
    last_first = walk.course.graph.last_first
    ways = {name: [edge.index for edge in last_first if edge.origin == name] or [-1] for name in names}
    found = [(name, one, way) for name, one in zip(names, given, strict=True) for way in ways[name]]
    return tuple(name for name, _, _ in found), [one for _, one, _ in found], tuple(way for _, _, way in found)


def _no_field(hands: Hands, name: str, names: Sequence[str]) -> ProgramError:
    worker = hands.worker
    return ProgramError(
        f"a microbatch has no field {name!r} here",
        where=f"party {worker.party}, {worker.mode} round {worker.round}",
        expected=f"one of {', '.join(names)}" if names else "none: no stage of this party takes a field",
        got=repr(name),
        remedy="correct the name; the fields are those that this party's stages take in the plan",
        code="E443",
    )
