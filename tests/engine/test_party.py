"""The interpreter: what a party does, in which order, and where it goes on after a restart."""

from __future__ import annotations

import pytest

from cutlayer.core import topologies
from cutlayer.core.compile import compile_plan
from cutlayer.core.parts import Loss, Release, Stage, Training
from cutlayer.core.plan import Plan
from cutlayer.core.program import Backward, Checkpoint, Forward, Load, Mode, Program, Recv, Step
from cutlayer.engine.ledger import Ledger
from cutlayer.engine.party import Cursor, Do, EndStep, Post, Take, interpret
from cutlayer.engine.tensors import pack
from cutlayer.engine.wire import Frame
from cutlayer.engine.worker import Parcel
from tests.drawing import DryRun, Silent, first, roster_for
from tests.small import C


class Desk:
    """A worker that computes nothing."""

    def __init__(self) -> None:
        self.site, self.ledger = Silent(), Ledger("a")


def plan(order: str = "relay", **training: object) -> Plan:
    """Clients with frozen heads (so credits) and a server with released labels."""
    stages = [
        Stage("head", at=["a", "b"], inputs=["data.x"], output=C, frozen=True),
        Stage("body", at="s", inputs=["head"], output=C),
        Loss("loss", at="s", inputs=["body", "data.y@head"]),
    ]
    numbers = {"batch_size": 2, "order": order, "window": 2, **training}
    return Plan(stages, training=Training(**numbers), releases=[Release("y", at="head", to="s", spec="int64[batch]")])


def effects(made: Plan, party: str, cursor: Cursor, counts: tuple[int, int] = (7, 4), *, mode: Mode = "train") -> list:
    """All that a party does in a round, everything it waits for being there."""
    return played(compile_plan(made, roster_for(made, counts, evaluation=counts))[party][mode], cursor)


def played(program: Program, cursor: Cursor) -> list:
    talk, found, answer = interpret(program, cursor, Desk()), [], None
    while True:
        try:
            effect = talk.send(answer)
        except StopIteration:
            return found
        found.append(effect)
        answer = None
        if isinstance(effect, Take):
            payload = pack({}) if effect.tag.direction == "exchange" else b""
            answer = Frame(effect.tag, "bytes", (len(payload),), payload)
        elif isinstance(effect, Do):
            answer = Parcel("bytes", (0,), b"")


def test_batches_of_a_lane_are_numbered_through_the_round():
    loads = [e for e in effects(plan(checkpoint_every=1), "a", Cursor(round=1)) if is_job(e, Load)]
    assert [effect.index for effect in loads] == [0, 1, 2, 3]
    both = [
        (e.instruction.lane, e.index)
        for e in effects(plan("parallel"), "a", Cursor(round=1), (7, 4))
        if is_job(e, Load)
    ]
    assert both == [(0, 0), (0, 1), (0, 2), (0, 3)]


def is_job(effect: object, kind: type) -> bool:
    return isinstance(effect, Do) and isinstance(effect.instruction, kind)


def test_the_server_does_one_thing_after_another():
    kinds = [type(e.instruction) for e in effects(plan(), "s", Cursor(round=1)) if isinstance(e, Do)]
    assert kinds[:8] == [Recv, Forward, Recv, Forward, Backward, Backward, Step, Recv]


def test_steps_are_numbered_and_tags_follow_them():
    found = effects(plan(), "a", Cursor(session=3, round=2))
    ends = [effect.step for effect in found if isinstance(effect, EndStep)]
    assert ends == list(range(len(ends)))
    step = 0
    for effect in found:
        if isinstance(effect, EndStep):
            step = effect.step + 1
        elif isinstance(effect, Post):
            tag = effect.frame.tag
            assert (tag.session, tag.mode, tag.round, tag.step) == (3, "train", 2, step)


@pytest.mark.parametrize("order", ["relay", "parallel"])
@pytest.mark.parametrize("every", [0, 1, 2, 3])
@pytest.mark.parametrize("party", ["a", "b", "s"])
def test_a_restart_goes_on_after_any_checkpoint(order, every, party):
    """It does what an uninterrupted party does from there on: same batches, same tags, same credits."""
    made = plan(order, checkpoint_every=every)
    whole = effects(made, party, Cursor(round=1))
    places = [place for place, effect in enumerate(whole) if is_job(effect, Checkpoint)]
    assert len(places) >= (1 if order == "parallel" and not every else 2)
    for place in places:
        number = whole[place].instruction.number
        rest = effects(made, party, Cursor(round=1, checkpoint=number))
        assert rest == whole[place + 2 :]  # after the checkpoint's own end of step


@pytest.mark.parametrize("choose", [first, lambda ready: ready[-1]], ids=["clients first", "server first"])
def test_nothing_is_in_flight_at_a_checkpoint(choose):
    """Whoever saves has taken all frames that the others sent before theirs."""
    made = plan("parallel", checkpoint_every=2)
    run = DryRun(made, roster_for(made, (9, 5)), [("train", 1)])
    saved: dict[tuple[str, int], list] = {}

    def watch() -> None:
        for party, member in run.members.items():
            last = member.jobs[-1] if member.jobs else None
            if isinstance(last, Checkpoint) and (party, last.number) not in saved:
                waiting = [tag for _, to, tag in run.mail if to == party and tag.step < member.steps]
                saved[party, last.number] = waiting

    run.run(choose, watch)
    assert len(saved) == 3 * 5
    assert not any(saved.values())


# --- reading ahead ---------------------------------------------------------------------------------------------------


def returning(order: str, every: int) -> Plan:
    """Clients that wait for the server in each step: in training for gradients too."""
    return topologies.u_shaped(
        ["a", "b"], "s", cut=C, back=C, output=C, batch_size=2, order=order, checkpoint_every=every, microbatches=2
    )


def repetitions(made: Plan, party: str, mode: Mode, counts: tuple[int, int]) -> list[tuple[int, list]]:
    """Of each step: how many repetitions of its block are left, and its effects."""
    program = compile_plan(made, roster_for(made, counts, evaluation=counts))[party][mode]
    found, rest = [], effects(made, party, Cursor(round=1), counts, mode=mode)
    for block in program.blocks:
        for left in reversed(range(block.repeat)):
            end = next(place for place, effect in enumerate(rest) if isinstance(effect, EndStep))
            found.append((left, rest[:end]))
            rest = rest[end + 1 :]
    assert not rest
    return found


@pytest.mark.parametrize("order", ["relay", "parallel"])
@pytest.mark.parametrize("every", [0, 1, 3])
@pytest.mark.parametrize("mode", ["train", "evaluate", "predict"])
@pytest.mark.parametrize("party", ["a", "s"])
def test_the_next_batches_are_read_at_the_first_wait_after_the_loads(order, every, mode, party):
    """Not in the last repetition of a block: so not across a checkpoint either."""
    read: list[tuple[int, int]] = []
    repeated = repetitions(returning(order, every), party, mode, (16, 11))
    for place, (left, found) in enumerate(repeated):
        ahead = [effect for effect in found if is_job(effect, Load) and effect.ahead]
        loads = [effect for effect in found if is_job(effect, Load) and not effect.ahead]
        assert not {(e.instruction.lane, e.index) for e in ahead} & set(read), "read twice"
        read += [(e.instruction.lane, e.index) for e in ahead]
        if not left or not loads:
            assert not ahead
            continue
        following = [e for e in repeated[place + 1][1] if is_job(e, Load) and not e.ahead]
        assert [(e.instruction, e.index) for e in ahead] == [(e.instruction, e.index) for e in following]
        begin = found.index(ahead[0])
        assert found[begin : begin + len(ahead)] == ahead
        waits = [n for n, e in enumerate(found) if isinstance(e, Take) and e.tag.direction in ("up", "down")]
        assert begin + len(ahead) == min(n for n in waits if n > found.index(loads[-1]))
    assert bool(read) == (party == "a" and (mode != "train" or every != 1))


def test_who_waits_for_nothing_reads_nothing_ahead():
    found = effects(plan(), "a", Cursor(round=1), (16, 4))
    assert not any(is_job(effect, Recv) for effect in found)
    assert [effect.index for effect in found if is_job(effect, Load)] == list(range(8))
    assert not any(effect.ahead for effect in found if is_job(effect, Load))


@pytest.mark.parametrize("order", ["relay", "parallel"])
def test_a_step_begins_with_its_loads(order: str):
    """So its first wait comes after them."""
    made = returning(order, 2)
    programs = compile_plan(made, roster_for(made, (16, 11), evaluation=(16, 11)))
    blocks = [block for modes in programs.values() for program in modes.values() for block in program.blocks]
    kinds = [[isinstance(job, Load) for job in block.instructions] for block in blocks]
    assert any(True in kind for kind in kinds)
    assert kinds == [sorted(kind, reverse=True) for kind in kinds]
