"""One thread runs a party's trained stages for many sessions, and puts requests that wait into one forward.

A request is a forward of a stage for one session. Requests of one stage whose tensors differ in nothing but the number
of samples are put together along the first dimension, and the outputs are cut apart again. Each sample is then in a
batch of another size than its client's: on many kernels that changes the last bits. With `Serving(batch=1)` each
request runs alone, with the bits of a prediction of two processes.

| code | error | meaning |
| --- | --- | --- |
| E303 | StageError | a session asks for a backward |
| E450 | ProgramError | the stage did not take a request in time |
| E451 | ProgramError | the stage is no longer served |
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cutlayer.core.graph import Graph
from cutlayer.core.quota import Serving
from cutlayer.engine.site import Place
from cutlayer.engine.stage import Context, Gradients, StageProtocol
from cutlayer.errors import ProgramError, StageError

__all__ = ["Batcher", "SharedStage", "Work"]

_Alike = tuple[Place, tuple[tuple[torch.dtype, torch.Size], ...]]


@dataclass
class Work:
    """What was done: `forwards` of stages for `requests` with `samples`; `largest` is the most samples in one."""

    forwards: int = 0
    requests: int = 0
    samples: int = 0
    largest: int = 0


@dataclass(eq=False)
class _Request:
    """A forward that a session waits for; `alike` is None if it must run alone."""

    place: Place
    inputs: Sequence[Tensor]
    context: Context
    alike: _Alike | None
    begun: float = field(default_factory=time.monotonic)
    taken: bool = False
    done: threading.Event = field(default_factory=threading.Event)
    outputs: tuple[Tensor, ...] = ()
    spent: int = 0
    error: BaseException | None = None


class Batcher:
    """Runs stages in evaluation mode, in the order in which requests come.

    Args:
        party: Who serves; for messages and names of threads.
        stages: The party's stages.
        graph: Says which values grow with the batch.
        serving: Its `batch`, `wait` and `deadline`.
        threads: torch threads.
    """

    def __init__(
        self, party: str, stages: Mapping[Place, StageProtocol], graph: Graph, serving: Serving, threads: int = 1
    ) -> None:
        """Make the thread; `start` starts it."""
        self.work = Work()
        self._party, self._stages, self._serving, self._threads = party, stages, serving, threads
        self._together = {place: serving.batch > 1 and _grows(graph, place[0]) for place in stages}
        self._changed = threading.Condition()
        self._queue: deque[_Request] = deque()
        self._sessions = 0
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"cutlayer-{party}-batcher", daemon=True)

    def start(self) -> None:
        """Begin to run what is asked for."""
        self._thread.start()

    def close(self) -> None:
        """Refuse what waits and what comes, and wait for the forward that runs."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()

    def came(self) -> None:
        """A session has begun: a request may be worth waiting for."""
        self._count(1)

    def went(self) -> None:
        """A session has ended."""
        self._count(-1)

    def seats(self) -> dict[Place, StageProtocol]:
        """Return the stages as one session is to see them."""
        return {place: SharedStage(self, place, stage) for place, stage in self._stages.items()}

    def forward(self, place: Place, inputs: Sequence[Tensor], context: Context) -> tuple[tuple[Tensor, ...], int]:
        """Wait for a forward of a stage on inputs of shape (samples, ...).

        Returns:
            The outputs, of this request's samples only, and its share of the floating-point operations.

        Raises:
            ProgramError: E450, not taken within `deadline` seconds; E451, the batcher is closed.
            StageError: the stage fails on this request's inputs; what others asked for does not fail with it.
        """
        request = _Request(place, inputs, context, self._alike(place, inputs, context.batch))
        with self._changed:
            if self._closed:
                raise _closed(self._party, place[0])
            self._queue.append(request)
            self._changed.notify_all()
        if not request.done.wait(self._serving.deadline):
            with self._changed:
                if not request.taken:
                    error = _late(self._party, place[0], self._serving.deadline, len(self._queue))
                    self._queue.remove(request)
                    raise error
            request.done.wait()  # it runs just now
        if request.error is not None:
            raise request.error
        return request.outputs, request.spent

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        while group := self._next():
            self._do(group)
        for request in self._queue:  # nobody adds to it any more
            request.error = _closed(self._party, request.place[0])
            request.done.set()

    def _next(self) -> list[_Request]:
        """Wait for requests that go together; none: closed."""
        with self._changed:
            while not self._closed:
                group = self._ready()
                if group:
                    for request in group:
                        request.taken = True
                        self._queue.remove(request)
                    return group
        return []

    def _ready(self) -> list[_Request]:
        """Return the requests to run now, or wait for a change and return none; `_changed` is held."""
        if not self._queue:
            self._changed.wait()
            return []
        first, most = self._queue[0], self._serving.batch
        if first.alike is None:
            return [first]
        group, samples, full = [first], first.context.batch, False
        for request in list(self._queue)[1:]:
            if request.alike != first.alike:
                continue
            if samples + request.context.batch > most:
                full = True
                break
            group.append(request)
            samples += request.context.batch
        left = first.begun + self._serving.wait - time.monotonic()
        if full or samples >= most or len(self._queue) >= self._sessions or left <= 0:
            return group
        self._changed.wait(left)
        return []

    def _do(self, group: list[_Request]) -> None:
        """Run one forward for a group; if it fails, each alone, so that only who is at fault is told."""
        try:
            self._forward(group)
        except Exception as error:
            for request in group if len(group) > 1 else ():
                try:
                    self._forward([request])
                except Exception as own:
                    request.error = own
            if len(group) == 1:
                group[0].error = error
        for request in group:
            request.done.set()

    def _forward(self, group: list[_Request]) -> None:
        place, sizes = group[0].place, [request.context.batch for request in group]
        stage, total = self._stages[place], sum(sizes)
        if len(group) == 1:
            outputs = [stage.forward(group[0].inputs, group[0].context)]
        else:
            joined = [torch.cat(values) for values in zip(*(request.inputs for request in group), strict=True)]
            context = Context(key=(0, 0), batch=total, training=False, wanted=group[0].context.wanted)
            parts = [torch.split(output, sizes) for output in stage.forward(joined, context)]
            outputs = list(zip(*parts, strict=True))
        for request, mine, size in zip(group, outputs, sizes, strict=True):
            request.outputs, request.spent = mine, stage.spent * size // total
        work = self.work
        work.forwards, work.requests = work.forwards + 1, work.requests + len(group)
        work.samples, work.largest = work.samples + total, max(work.largest, total)

    def _alike(self, place: Place, inputs: Sequence[Tensor], batch: int) -> _Alike | None:
        if not self._together[place] or batch >= self._serving.batch:
            return None
        if not all(value.ndim and value.shape[0] == batch for value in inputs):
            return None
        return place, tuple((value.dtype, value.shape[1:]) for value in inputs)

    def _count(self, change: int) -> None:
        with self._changed:
            self._sessions += change
            self._changed.notify_all()


class SharedStage:
    """A stage as one session sees it: forwards only, by the batcher. A `StageProtocol`."""

    def __init__(self, batcher: Batcher, place: Place, stage: StageProtocol) -> None:
        """Stand for `stage` in one session."""
        self._batcher, self._place, self._stage = batcher, place, stage
        self.name, self.device, self.spent = place[0], stage.device, 0
        self.module, self.generator, self.cuda_generator = stage.module, stage.generator, stage.cuda_generator

    def forward(self, inputs: Sequence[Tensor], context: Context) -> tuple[Tensor, ...]:
        """Return the outputs for this session's inputs. Raises what `Batcher.forward` raises."""
        outputs, self.spent = self._batcher.forward(self._place, inputs, context)
        return outputs

    def backward(self, _gradients: Gradients, context_key: tuple[int, int]) -> Sequence[Tensor | None]:
        """Raise `StageError` E303."""
        raise StageError(
            f"stage {self.name!r} is served: it runs forwards only",
            where=f"lane {context_key[0]}, microbatch {context_key[1]}",
            remedy="train with all parties: cutlayer join at each",
            code="E303",
        )

    def parameters(self) -> Sequence[nn.Parameter]:
        """Return none: no optimizer trains it."""
        return ()

    def forget(self) -> None:
        """Do nothing: a forward leaves nothing here."""


def _grows(graph: Graph, stage: str) -> bool:
    """Whether all inputs and outputs of a stage have one row for each sample, as far as the plan says.

    An output of a length of its own, which no input has, may depend on who else is in the batch.
    """
    given = [edge.spec for edge in graph.inputs_of[stage]]
    made = list(graph.by_name[stage].ports.values())
    if not all(spec is not None and spec.shape[:1] == ("batch",) for spec in (*given, *made)):
        return False
    lengths = {spec.shape[place] for spec in given if spec is not None for place in spec.free}
    return all(spec.shape[place] in lengths for spec in made for place in spec.free)


def _closed(party: str, stage: str) -> ProgramError:
    return ProgramError(
        f"the stage {stage!r} is no longer served",
        where=f"party {party}",
        remedy="start the service again",
        code="E451",
    )


def _late(party: str, stage: str, seconds: float, waiting: int) -> ProgramError:
    return ProgramError(
        f"the stage {stage!r} did not take a request in time",
        where=f"party {party}",
        expected=f"a forward within {seconds:g} seconds",
        got=f"{waiting} requests waiting",
        remedy="ask again later; let fewer sessions in, or raise deadline in [serving]",
        code="E450",
    )
