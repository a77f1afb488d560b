"""Random plans with replicas, and programs run dry: every frame is sent and taken, no module computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import strategies as st

from cutlayer.core.compile import Roster, agenda, compile_plan
from cutlayer.core.parts import Loss, Release, Stage, Training
from cutlayer.core.plan import Plan
from cutlayer.core.program import Send, Tag
from cutlayer.engine.ledger import Ledger
from cutlayer.engine.party import Cursor, Do, EndStep, Post, Take, interpret
from cutlayer.engine.wire import Frame
from cutlayer.engine.worker import Parcel

CLIENTS, COPIES = ("a", "b", "c"), ("u", "v", "w")


@st.composite
def replicated_plans(draw: st.DrawFn, *, most_lanes: int = 3) -> Plan:
    """Clients with data; other stages at clients, at one server, or copied for each client."""
    lanes = draw(st.integers(1, most_lanes))
    places = st.sampled_from([CLIENTS[:lanes], COPIES[:lanes], ("s",) * lanes, "s", "t"])
    stages: list[Stage | Loss] = [Stage("s0", at=CLIENTS[:lanes], inputs=["data.x"], output="float32[batch, 3]")]
    for place in range(1, draw(st.integers(1, 5))):
        inputs = draw(st.lists(st.sampled_from([s.name for s in stages]), min_size=1, max_size=3))
        frozen = draw(st.integers(0, 3)) == 0
        output = f"float32[batch, {draw(st.integers(1, 4))}]"
        stages.append(Stage(f"s{place}", at=draw(places), inputs=inputs, output=output, frozen=frozen))
    taken = {text for stage in stages for text in stage.inputs}
    names = [stage.name for stage in stages]
    releases = []
    for place, end in enumerate([n for n in names if n not in taken or draw(st.integers(0, 4)) == 0]):
        at = draw(places)
        inputs = [end, draw(st.sampled_from(names)), "data.y@s0"][:: draw(st.sampled_from([1, 2]))]
        stages.append(Loss(f"loss{place}", at=at, inputs=inputs, weight=draw(st.sampled_from([1.0, 0.4]))))
        releases += [Release("y", at="s0", to=to, spec="float32[batch]") for to in dict.fromkeys(stages[-1].places)]
    return Plan(draw(st.permutations(stages)), training=draw(trainings()), releases=releases)


@st.composite
def trainings(draw: st.DrawFn) -> Training:
    return Training(
        metrics_least=1,
        epochs=draw(st.integers(1, 2)),
        batch_size=6,
        microbatches=draw(st.integers(1, 3)),
        schedule=draw(st.sampled_from(["sequential", "gpipe", "1f1b"])),
        order=draw(st.sampled_from(["relay", "parallel"])),
        clip_norm=draw(st.sampled_from([None, 0.1])),
        clip="global",
        checkpoint_every=draw(st.integers(0, 2)),
        evaluate_every=draw(st.integers(0, 1)),
        window=draw(st.integers(1, 4)),
    )


def roster_for(plan: Plan, counts: Sequence[int], *, evaluation: Sequence[int] = ()) -> Roster:
    """Counts of each lane, at all parties that hold data."""

    def held(counts: Sequence[int]) -> dict[str, int]:
        return {party: n for lane, n in enumerate(counts) for party in plan.graph.data_fields(lane)}

    training = {party: count for party, count in held(counts).items() if count}  # who has nothing gives no data set
    return Roster({"train": training, "evaluate": held(evaluation), "predict": held(counts)})


class Silent:
    """What exchanges may do at a party that has nothing."""

    def squared_norm(self, _lanes: tuple[int, ...]) -> float:
        return 0.0

    def clip(self, _norm: float, _lanes: tuple[int, ...]) -> None: ...

    def state(self, _stage: str, _lane: int) -> dict[str, torch.Tensor]:
        return {}

    def load_state(self, *_arguments: object) -> None: ...

    gradients = metric_sums = weights = state
    set_gradients = set_metric_sums = load_state


@dataclass
class Member:
    """One party: its generator, the frame it waits for, and what it has done."""

    talk: Iterator[Any]
    waits: Take | None = None
    done: bool = False
    steps: int = 0
    jobs: list[Any] = field(default_factory=list)


class DryRun:
    """Runs all parties' programs through the given phases, each at its own pace; frames hold zeros."""

    def __init__(self, plan: Plan, roster: Roster, phases: Sequence[tuple[str, int]] = ()) -> None:
        self.plan, self.programs = plan, compile_plan(plan, roster)
        self.phases = list(phases) or agenda(plan, roster)
        self.members = {party: Member(self._talk(party)) for party in self.programs}
        self.mail: dict[tuple[str, str, Tag], Frame] = {}
        self.posted: list[tuple[str, str, Frame]] = []  # sender, receiver, frame

    def _talk(self, party: str) -> Iterator[Any]:
        worker = SimpleNamespace(site=Silent(), ledger=Ledger(party))
        for mode, number in self.phases:
            yield from interpret(self.programs[party][mode], Cursor(round=number), worker)

    def ready(self) -> list[str]:
        """The parties that can go on."""
        return [
            party
            for party, member in self.members.items()
            if not member.done and (member.waits is None or (member.waits.source, party, member.waits.tag) in self.mail)
        ]

    def advance(self, party: str) -> None:
        """Let a party do one thing."""
        member = self.members[party]
        answer = None
        if member.waits is not None:
            answer = self.mail.pop((member.waits.source, party, member.waits.tag))
            member.waits = None
        try:
            effect = member.talk.send(answer)
            if isinstance(effect, Do) and isinstance(effect.instruction, Send):
                member.jobs.append(effect.instruction)
                effect = member.talk.send(self._parcel(effect.instruction))
        except StopIteration:
            member.done = True
            return
        if isinstance(effect, Post):
            key = (party, effect.to, effect.frame.tag)
            assert key not in self.mail, f"sent twice: {key}"
            self.mail[key] = effect.frame
            self.posted.append((party, effect.to, effect.frame))
        elif isinstance(effect, Take):
            member.waits = effect
        elif isinstance(effect, EndStep):
            member.steps += 1
        else:
            member.jobs.append(effect.instruction)

    def run(self, choose: Callable[[list[str]], str], watch: Callable[[], None] = lambda: None) -> None:
        """Until all are done. `choose` picks who goes on; `watch` is called after each."""
        while not all(member.done for member in self.members.values()):
            ready = self.ready()
            assert ready, f"deadlock: {[(p, m.waits) for p, m in self.members.items() if not m.done]}"
            self.advance(choose(ready))
            watch()
        assert not self.mail, f"never taken: {list(self.mail)[:3]}"

    def _parcel(self, job: Send) -> Parcel:
        spec = self.plan.graph.edges[job.edge].spec
        return Parcel(spec.dtype, spec.concrete(job.size), bytes(spec.nbytes(job.size)))


def first(ready: list[str]) -> str:
    return ready[0]


def unrolled(programs: Mapping[str, Mapping[str, Any]], mode: str) -> dict[str, list[tuple[int, Any]]]:
    """Party -> (step, instruction) of a whole round."""
    found: dict[str, list[tuple[int, Any]]] = {}
    for party, modes in programs.items():
        step, found[party] = 0, []
        for block in modes[mode].blocks:
            for _ in range(block.repeat):
                found[party] += [(step, job) for job in block.instructions]
                step += 1
    return found
