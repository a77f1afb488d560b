"""The allow-list: each frame of the real run is admitted, and no other."""

from __future__ import annotations

import contextlib
import itertools

import pytest
from hypothesis import given, settings
from msgspec.structs import replace

from cutlayer.core.admission import Admission
from cutlayer.core.compile import agenda, compile_plan
from cutlayer.core.parts import Loss, Release, Stage, Training
from cutlayer.core.plan import Plan
from cutlayer.core.program import DIRECTIONS, MODES, Tag
from cutlayer.errors import ContractError
from tests.drawing import DryRun, first, replicated_plans, roster_for
from tests.small import C


def small_plan(order: str) -> Plan:
    """Two clients with unequal data, a frozen head (so credits), labels released, and a global norm."""
    stages = [
        Stage("head", at=["a", "b"], inputs=["data.x"], output="float32[batch, 2]", frozen=True),
        Stage("body", at="s", inputs=["head"], output=C),
        Stage("tail", at=["a", "b"], inputs=["body"], output=C),
        Loss("loss", at=["a", "b"], inputs=["tail", "data.y"]),
        Loss("more", at="t", inputs=["body", "data.y@head"]),
    ]
    training = Training(
        batch_size=2, microbatches=2, order=order, clip_norm=1.0, clip="global", window=1, epochs=2, metrics_least=1
    )
    return Plan(stages, training=training, releases=[Release("y", at="head", to="t", spec="int64[batch]")])


def run_of(plan: Plan, counts: tuple[int, ...]) -> tuple[DryRun, dict[str, Admission]]:
    roster = roster_for(plan, counts, evaluation=counts[::-1])
    run = DryRun(plan, roster)
    run.run(first)
    phases = agenda(plan, roster)
    return run, {party: Admission(modes, phases) for party, modes in compile_plan(plan, roster).items()}


def refused(door: Admission, sender: str, tag: Tag, dtype: str, shape: tuple[int, ...]) -> str:
    """The code with which a frame is refused, and what to do said with it; empty if it is admitted."""
    try:
        door.check(sender, tag, dtype, shape)
    except ContractError as error:
        found = error
    else:
        return ""
    assert f"{sender!r} sent a" in str(found)
    assert "compare its plan and release with yours" in found.remedy
    return found.code


@settings(max_examples=25)
@given(replicated_plans())
def test_every_frame_of_a_run_is_admitted(plan):
    run, doors = run_of(plan, (7, 3, 9)[: plan.lanes])
    assert run.posted or len(plan.parties) == 1
    for sender, receiver, frame in run.posted:
        doors[receiver].check(sender, frame.tag, frame.dtype, frame.shape)


def test_no_other_frame_is_admitted():
    """All addresses there are, from all senders: those of the run and no others. (Exchanges: see below.)"""
    run, doors = run_of(small_plan("parallel").with_training(epochs=1), (3, 1))
    expected: dict[str, set] = {party: set() for party in doors}
    for sender, receiver, frame in run.posted:
        if frame.tag.direction != "exchange":
            expected[receiver].add((sender, frame.tag))
    tags = [tag for known in expected.values() for _, tag in known]
    steps, edges = max(tag.step for tag in tags) + 2, max(tag.edge for tag in tags) + 2
    space = itertools.product(MODES, range(3), range(steps), range(edges), range(2), range(3), ("up", "down", "credit"))
    found: dict[str, set] = {party: set() for party in doors}
    for numbers in space:
        tag = Tag(0, *numbers)
        for party, sender in itertools.product(doors, [*doors, "z"]):
            with contextlib.suppress(ContractError):
                doors[party].expect(sender, tag)
                found[party].add((sender, tag))
    assert found == expected


def one_off(tag: Tag) -> list[Tag]:
    """The tag with one field changed."""
    numbers = [
        replace(tag, **{name: getattr(tag, name) + by})
        for name in ("round", "step", "edge", "lane", "micro")
        for by in (1, -1, 1000)
    ]
    return [
        *(other for other in numbers if min(other.round, other.step, other.edge, other.lane, other.micro) >= 0),
        *(replace(tag, mode=mode) for mode in MODES if mode != tag.mode),
        *(replace(tag, direction=direction) for direction in DIRECTIONS if direction != tag.direction),
    ]


@pytest.mark.parametrize("order", ["relay", "parallel"])
def test_a_frame_with_one_thing_wrong_is_refused(order):
    run, doors = run_of(small_plan(order), (5, 3))
    real = {(sender, receiver, frame.tag) for sender, receiver, frame in run.posted}
    exchanges = exchange_addresses(run)
    for sender, receiver, frame in run.posted:
        door = doors[receiver]
        for tag in one_off(frame.tag):
            if (sender, receiver, tag) in real or may_be_said(exchanges, sender, receiver, tag):
                continue
            assert refused(door, sender, tag, frame.dtype, frame.shape) == "E521", tag
        for other in {*doors, "z"} - {sender}:
            if (other, receiver, frame.tag) not in real and not may_be_said(exchanges, other, receiver, frame.tag):
                assert refused(door, other, frame.tag, frame.dtype, frame.shape) == "E521"
        assert refused(door, sender, frame.tag, "float16", frame.shape) == "E522"
        assert refused(door, sender, frame.tag, frame.dtype, (*frame.shape, 1)) == "E522"
        if frame.tag.direction in ("up", "down"):
            assert refused(door, sender, frame.tag, "bytes", (4,)) == "E522"
            assert refused(door, sender, frame.tag, frame.dtype, (frame.shape[0] + 1, *frame.shape[1:])) == "E522"
        if frame.tag.direction == "credit":
            assert refused(door, sender, frame.tag, "bytes", (1,)) == "E522"


def exchange_addresses(run: DryRun) -> dict[tuple[str, int, int], tuple[set[str], int, int]]:
    """(mode, step, number) -> members, most messages, most bytes."""
    found = {}
    for modes in run.programs.values():
        for mode, program in modes.items():
            step = 0
            for block in program.blocks:
                for job in block.instructions:
                    if hasattr(job, "messages"):
                        for at in range(step, step + block.repeat):
                            found[mode, at, job.number] = (set(job.group), job.messages, job.limit)
                step += block.repeat
    return found


def may_be_said(exchanges: dict, sender: str, receiver: str, tag: Tag) -> bool:
    """Whether a tag is within what an exchange allows: any member may say something, up to a number of messages."""
    members, messages, _ = exchanges.get((tag.mode, tag.step, tag.edge), (set(), 0, 0))
    rounds = {"start": {0}, "train": {1, 2}, "evaluate": {2}}.get(tag.mode, set())
    return (
        tag.direction == "exchange"
        and {sender, receiver} <= members
        and tag.lane == 0
        and 0 <= tag.micro < messages
        and tag.round in rounds
    )


@pytest.mark.provokes("E521", "E522")
@pytest.mark.parametrize("order", ["relay", "parallel"])
def test_exchanges_have_a_budget(order):
    """Of messages and of bytes, at each address; nobody outside the group is heard."""
    run, doors = run_of(small_plan(order), (5, 3))
    exchanges = exchange_addresses(run)
    kinds = set()
    for sender, receiver, frame in run.posted:
        tag = frame.tag
        if tag.direction != "exchange":
            continue
        members, messages, limit = exchanges[tag.mode, tag.step, tag.edge]
        assert {sender, receiver} <= members
        door = doors[receiver]
        assert refused(door, sender, tag, "bytes", (limit,)) == ""
        assert refused(door, sender, tag, "bytes", (limit + 1,)) == "E522"
        assert refused(door, sender, tag, "float32", (1,)) == "E522"
        assert refused(door, sender, replace(tag, micro=messages - 1), "bytes", (0,)) == ""
        assert refused(door, sender, replace(tag, micro=messages), "bytes", (0,)) == "E521"
        assert refused(door, sender, replace(tag, lane=1), "bytes", (0,)) == "E521"
        for stranger in {*doors, "z"} - members:
            assert refused(door, stranger, tag, "bytes", (0,)) == "E521"
        kinds.add((tag.mode, tag.edge))
    assert len(kinds) >= 4


def test_a_round_that_is_not_on_the_agenda_is_refused():
    plan = small_plan("relay")
    run, doors = run_of(plan, (5, 3))
    seen = {frame.tag.mode for _, _, frame in run.posted}
    assert {"train", "evaluate"} <= seen
    for sender, receiver, frame in run.posted:
        for number in (0, 3) if frame.tag.mode == "train" else (1, 3):
            assert refused(doors[receiver], sender, replace(frame.tag, round=number), frame.dtype, frame.shape) == (
                "E521" if (frame.tag.mode, number) not in agenda_of(plan) else ""
            )


def agenda_of(plan: Plan) -> list[tuple[str, int]]:
    return agenda(plan, roster_for(plan, (5, 3), evaluation=(3, 5)))


def test_the_refusal_says_what_and_where():
    run, doors = run_of(small_plan("relay"), (5, 3))
    sender, receiver, frame = next(item for item in run.posted if item[2].tag.direction == "up")
    with pytest.raises(ContractError) as caught:
        doors[receiver].check("z", frame.tag, frame.dtype, frame.shape)
    assert "'z' sent a frame that this party's program does not expect" in str(caught.value)
    assert f"train round 1, step {frame.tag.step}, edge {frame.tag.edge}" in caught.value.where
    with pytest.raises(ContractError) as caught:
        doors[receiver].check(sender, frame.tag, "float64", frame.shape)
    assert caught.value.expected == f"{frame.dtype}{list(frame.shape)}"
    assert caught.value.got == f"float64{list(frame.shape)}"


def test_the_table_is_as_short_as_the_program():
    """A round of ten thousand steps costs no more memory than its templates."""
    plan = small_plan("parallel").with_training(batch_size=2, microbatches=1)
    roster = roster_for(plan, (20_000, 20_000))
    door = Admission(compile_plan(plan, roster)["s"], agenda(plan, roster))
    entries = sum(len(table) for tables in door._tables.values() for table in tables)
    assert entries < 40


def test_a_free_dimension_may_be_shorter_never_longer():
    stages = [
        Stage(
            "head",
            at="a",
            inputs=["data.x"],
            output={"words": "float32[batch, time<=8, 2]", "mask": "bool[batch, time<=8]"},
        ),
        Loss("loss", at="b", inputs=["head.words", "head.mask"]),
    ]
    plan = Plan(stages, training=Training(batch_size=4))
    roster = roster_for(plan, (4,))
    door = Admission(compile_plan(plan, roster)["b"], agenda(plan, roster))
    words, mask = plan.graph.cuts(0)
    tag = Tag(1, "train", 1, 0, words.index, 0, 0, "up")
    for length in (0, 1, 8):
        assert refused(door, "a", tag, "float32", (4, length, 2)) == ""
    for shape in ((4, 9, 2), (5, 8, 2), (3, 8, 2), (4, 8, 3), (4, 8)):
        assert refused(door, "a", tag, "float32", shape) == "E522"
    assert refused(door, "a", tag, "float16", (4, 8, 2)) == "E522"
    assert refused(door, "a", replace(tag, edge=mask.index), "bool", (4, 3)) == ""
