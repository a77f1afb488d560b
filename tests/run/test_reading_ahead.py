"""A party reads the next batch while it waits: each once, in order, and none that a roll-back has made stale."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cutlayer as cl
from cutlayer.core.compile import agenda, compile_plan
from cutlayer.core.program import Load, Mode, Recv, Tag
from cutlayer.engine import party as interpreter
from cutlayer.engine.tensors import pack
from cutlayer.engine.wire import Frame
from cutlayer.engine.worker import Batches, Worker
from cutlayer.errors import DataError
from cutlayer.run import session
from cutlayer.run.checkpoint import Store
from cutlayer.run.party import build, counts
from cutlayer.run.session import Task, take_part
from cutlayer.run.simulate import roster_of, run_phases
from cutlayer.transport.network import Ready, SessionReset
from cutlayer.transport.session import Start
from tests.run import plans
from tests.run.trial import Trial

Asked = tuple[str, Mode, int, int, int]  # party, mode, lane, epoch, index


class Counting:
    """A party's data for a mode, which notes what it is asked for."""

    def __init__(self, source: Batches, party: str, mode: Mode, asked: list[Asked]) -> None:
        self.source, self.party, self.mode, self.asked = source, party, mode, asked

    def load(self, *, lane: int, epoch: int, index: int, size: int) -> Mapping[str, Tensor]:
        self.asked.append((self.party, self.mode, lane, epoch, index))
        return self.source.load(lane=lane, epoch=epoch, index=index, size=size)


def counting(asked: list[Asked]) -> Callable[[Worker], None]:
    def prepare(worker: Worker) -> None:
        sources: Any = worker.parts.batches
        for mode, source in sources.items():
            sources[mode] = Counting(source, worker.party, mode, asked)

    return prepare


def trained(case: plans.Case) -> tuple[list[Asked], cl.Result]:
    """Train, evaluate after each round, predict; note what was asked for."""
    parties = [replace(party, prediction=party.data) for party in case.parties()]
    roster, asked = roster_of(parties), list[Asked]()
    phases = [*agenda(case.plan, roster), ("predict", 1)]
    return asked, run_phases(case.plan, parties, roster, phases, prepare=counting(asked))


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Mode, bool]]:
    """Grows with each batch that is read ahead (True), and with each LOAD that finds one (False)."""
    found, load = [], Worker.load

    def noted(worker: Worker, job: Load, index: int, *, ahead: bool = False) -> bool:
        there = load(worker, job, index, ahead=ahead)
        found.extend([(worker.mode, ahead)] if there or ahead else [])
        return there

    monkeypatch.setattr(Worker, "load", noted)
    return found


@pytest.mark.parametrize("make", [plans.u_shaped, plans.relay, plans.parallel, plans.vertical, plans.hops])
def test_each_batch_is_asked_for_once_and_in_order(
    make: Callable[..., plans.Case], ahead: list[tuple[Mode, bool]], monkeypatch: pytest.MonkeyPatch
):
    """The weights, metrics and outputs are those of a run that reads each batch in its turn."""
    asked, result = trained(make())
    for mode in ("train", "evaluate", "predict") if make in (plans.u_shaped, plans.relay) else ("train",):
        assert ahead.count((mode, True)) == ahead.count((mode, False)) > 0
    monkeypatch.setattr(interpreter, "_ahead", lambda _block: ([], -1))
    ahead.clear()
    expected, other = trained(make())
    assert not ahead
    for party, lane in {(party, lane) for party, _, lane, _, _ in expected}:
        mine, turns = ([one for one in all_of if one[0] == party and one[2] == lane] for all_of in (asked, expected))
        assert mine == turns
        training = [one for one in mine if one[1] == "train"]
        assert len(set(training)) == len(training)
    assert result.history == other.history
    assert result.predictions
    assert all(torch.equal(value, other.predictions[name]) for name, value in result.predictions.items())
    for name, worker in result.workers.items():
        for key, stage in worker.site.stages.items():
            own, theirs = stage.module.state_dict(), other.workers[name].site.stages[key].module.state_dict()
            assert all(torch.equal(own[part], theirs[part]) for part in own.keys() | theirs.keys())


@pytest.mark.parametrize("make", [plans.u_shaped, plans.parallel])
def test_a_batch_is_noted_once(make: Callable[..., plans.Case], monkeypatch: pytest.MonkeyPatch):
    from cutlayer.engine.ledger import Ledger

    notes, spend = [], Ledger.spend

    def noted(ledger: Ledger, kind: str, stage: str, seconds: float) -> None:
        notes.extend([ledger.party] if kind == "load" else [])
        spend(ledger, kind, stage, seconds)

    monkeypatch.setattr(Ledger, "spend", noted)
    asked, _ = trained(make())
    assert sorted(notes) == sorted(party for party, *_ in asked)


# --- what is stale ---------------------------------------------------------------------------------------------------


@pytest.fixture
def alpha() -> tuple[Worker, list[Asked], Load]:
    """A worker that holds data, what its data are asked for, and the LOAD of its full batches."""
    case, asked = plans.u_shaped(), list[Asked]()
    roster = roster_of(case.parties())
    worker = build(case.plan, case.build("alpha"), roster)
    counting(asked)(worker)
    block = compile_plan(case.plan, roster)["alpha"]["train"].blocks[0]
    return worker, asked, next(job for job in block.instructions if isinstance(job, Load))


def held(worker: Worker) -> Tensor:
    """The first field of the first microbatch."""
    return worker.values.inputs("head", 0, 0)[0]


@pytest.mark.parametrize(
    ("again", "place"),
    [
        (lambda worker: worker.clear(), ("train", 1)),
        (lambda worker: worker.begin("train", 1), ("train", 1)),
        (lambda worker: worker.begin("train", 2), ("train", 2)),
        (lambda worker: worker.begin("evaluate", 1), ("evaluate", 0)),
    ],
    ids=["a roll-back", "the same round", "another round", "another mode"],
)
def test_a_batch_that_was_kept_is_forgotten(
    alpha: tuple[Worker, list[Asked], Load], again: Callable[[Worker], None], place: tuple[Mode, int]
):
    worker, asked, job = alpha
    worker.begin("train", 1)
    assert worker.load(job, 1, ahead=True) is False
    again(worker)
    assert worker.load(job, 1) is False
    assert asked == [("alpha", "train", 0, 1, 1), ("alpha", place[0], 0, place[1], 1)]
    mode, epoch = place
    fresh = worker.parts.batches[mode].load(lane=0, epoch=epoch, index=1, size=sum(job.sizes))
    assert torch.equal(held(worker), fresh["x"][: job.sizes[0]])


def test_a_batch_that_was_kept_is_used_for_its_own_index_only(alpha: tuple[Worker, list[Asked], Load]):
    worker, asked, job = alpha
    worker.begin("train", 1)
    worker.load(job, 1, ahead=True)
    assert worker.load(job, 0) is False
    first = held(worker)
    assert worker.load(job, 1) is True
    assert not torch.equal(held(worker), first)
    assert worker.load(job, 1) is False
    assert [index for *_, index in asked] == [1, 0, 1]


def test_a_batch_without_fields_is_read_once(alpha: tuple[Worker, list[Asked], Load]):
    worker, asked, job = alpha
    worker.begin("train", 1)
    bare = replace(job, fields=())
    worker.load(bare, 1, ahead=True)
    assert worker.load(bare, 1) is True
    assert len(asked) == 1


class Alone:
    """A link whose other parties send zeros; after `most` frames one of them restarts, once."""

    def __init__(self, case: plans.Case, most: int, back: int) -> None:
        self.roster = roster_of(case.parties())
        self.graph, self.most, self.back = case.plan.graph, most, back
        self.jobs = {
            (mode, job.edge, job.lane, job.micro, job.direction, step): job
            for mode, program in compile_plan(case.plan, self.roster)["alpha"].items()
            for step, block in enumerate(block for block in program.blocks for _ in range(block.repeat))
            for job in block.instructions
            if isinstance(job, Recv)
        }
        self.sessions, self.got = 0, 0

    def __enter__(self) -> Alone:
        return self

    def __exit__(self, *_: object) -> None: ...

    def rendezvous(self, _ready: object) -> Start:
        self.sessions += 1
        return Start(self.sessions, self.roster.samples, self.back if self.sessions > 1 else -1)

    def open(self, *_: object) -> None: ...

    def send(self, _to: str, *_frames: Frame) -> None: ...

    flush = finish = abort = open

    def recv(self, _source: str, tag: Tag) -> Frame:
        self.got += 1
        if self.got == self.most and self.sessions == 1:
            raise SessionReset("server restarted")
        if tag.direction == "exchange":
            return Frame(tag, "bytes", (len(pack({})),), pack({}))
        job = self.jobs[tag.mode, tag.edge, tag.lane, tag.micro, tag.direction, tag.step]
        shape = job.spec.concrete(job.size)
        return Frame(tag, job.spec.dtype, shape, bytearray(job.spec.nbytes(job.size)))


def alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, most: int = 0, back: int = -1
) -> tuple[list[Asked], list[tuple[int, ...]], dict[int, int]]:
    """Run alpha; return what was asked for, and at what number of it each checkpoint was saved.

    Between them: of each session, at what number it began, then the checkpoints that were there.
    """
    case = plans.u_shaped(epochs=3, checkpoint_every=2, batch_size=6)
    asked, begins, saved = list[Asked](), list[tuple[int, ...]](), dict[int, int]()
    link, party = Alone(case, most, back), case.build("alpha")

    class Noting(Store):
        def save(self, identifier: int, *rest: Any) -> None:
            saved.setdefault(identifier, len(asked))
            super().save(identifier, *rest)

    def connected(*_: object) -> Alone:
        meet = link.rendezvous

        def rendezvous(ready: Ready) -> Start:
            begins.append((len(asked), *ready.checkpoints))
            return meet(ready)

        link.rendezvous = rendezvous
        return link

    monkeypatch.setattr(session, "Network", connected)
    store = Noting(folder, party="alpha", digest=case.plan.digest(), keep=100)
    task = Task(agenda, counts(party), store, counting(asked))
    take_part(case.plan, party, task, network=Trial(case.plan, folder).settings("alpha"))
    return asked, begins, saved


@pytest.mark.parametrize("most", [30, 63, 90])
def test_after_a_roll_back_all_batches_are_read_again(most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """To any checkpoint before, of this round or another, of training or evaluation; or to the beginning."""
    whole, _, saved = alone(tmp_path / "whole", monkeypatch)
    assert {mode for _, mode, *_ in whole} == {"train", "evaluate"}
    asked, (_, (until, *there)), _ = alone(tmp_path / "beginning", monkeypatch, most)
    assert asked == [*whole[:until], *whole]
    assert len(there) > 2
    for back in there:
        asked, _, _ = alone(tmp_path / str(back), monkeypatch, most, back)
        assert asked == [*whole[:until], *whole[saved[back] :]]


# --- errors ----------------------------------------------------------------------------------------------------------


def test_an_error_in_a_batch_read_ahead_names_this_batch():
    class Broken(cl.TensorTable):
        def batch(self, indices: Any) -> dict[str, Tensor]:
            if 20 in indices:
                raise ValueError("no such file")
            return super().batch(indices)

    case, steps = plans.u_shaped(shuffle=False), []
    parties = [replace(p, data=Broken(**p.data.fields)) if p.data else p for p in case.parties()]

    def notify(event: str, details: Mapping[str, Any]) -> None:
        steps.extend([details["mode"]] if event == "step" and details["party"] == "alpha" else [])

    with pytest.raises(DataError, match=r"E268.*party alpha, train round 1, batch 2.*ValueError: no such file"):
        cl.simulate(case.plan, parties, notify=notify)
    assert steps.count("train") == 1, "it was not read ahead"
