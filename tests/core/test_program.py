"""Programs as text: what is printed, compared and hashed."""

from __future__ import annotations

from cutlayer.core.compile import compile_plan
from cutlayer.core.program import MODES, Block, Forward, Program, Send
from cutlayer.core.topologies import u_shaped
from tests.drawing import roster_for
from tests.small import C, float32


def programs() -> dict:
    plan = u_shaped("a", "b", cut=float32(4), back=C, output=C, batch_size=4, microbatches=2, schedule="gpipe")
    return compile_plan(plan, roster_for(plan, (9,)))


def test_a_program_reads_as_text():
    assert str(programs()["b"]["train"]) == TRAIN


def test_digests_are_the_same_on_every_machine():
    """Written down: parties compare them, so a change is a change of the protocol."""
    digests = [programs()["b"][mode].digest()[:8] for mode in MODES]
    assert digests == ["52affdfa", "82f29229", "89cce60c", "0b4e32e2", "394f57be"]


def test_any_change_of_an_instruction_changes_the_digest():
    base = Forward("head", 0, 1, 4)
    others = [Forward("tail", 0, 1, 4), Forward("head", 1, 1, 4), Forward("head", 0, 0, 4), Forward("head", 0, 1, 5)]
    digests = {Program("a", "train", (Block("b", (job,), 2),)).digest() for job in [base, *others]}
    digests |= {
        Program("b", "train", (Block("b", (base,), 2),)).digest(),
        Program("a", "evaluate", (Block("b", (base,), 2),)).digest(),
        Program("a", "train", (Block("b", (base,), 3),)).digest(),
        Program("a", "train", (Block("c", (base,), 2),)).digest(),
        Program("a", "train", (Block("b", (base, base), 2),)).digest(),
        Program("a", "train", (Block("b", (Send(0, 0, 1, 4, "up", "b"),), 2),)).digest(),
    }
    assert len(digests) == 11


def test_steps_are_counted_over_blocks():
    assert Program("a", "train", (Block("x", (), 3), Block("y", (), 4))).steps == 7


TRAIN = """\
program of b, train: 5 steps
  2 x lane 0: 4 samples
    RECV edge=1 lane=0 micro=0 size=2 direction=up source=a spec=float32[batch, 4]
    FORWARD stage=body lane=0 micro=0 size=2
    SEND edge=2 lane=0 micro=0 size=2 direction=up to=a
    RECV edge=1 lane=0 micro=1 size=2 direction=up source=a spec=float32[batch, 4]
    FORWARD stage=body lane=0 micro=1 size=2
    SEND edge=2 lane=0 micro=1 size=2 direction=up to=a
    RECV edge=2 lane=0 micro=0 size=2 direction=down source=a spec=float32[batch, 3]
    BACKWARD stage=body lane=0 micro=0 scale=1.0
    SEND edge=1 lane=0 micro=0 size=2 direction=down to=a
    RECV edge=2 lane=0 micro=1 size=2 direction=down source=a spec=float32[batch, 3]
    BACKWARD stage=body lane=0 micro=1 scale=1.0
    SEND edge=1 lane=0 micro=1 size=2 direction=down to=a
    STEP lanes=0
  1 x lane 0: 1 samples
    RECV edge=1 lane=0 micro=0 size=1 direction=up source=a spec=float32[batch, 4]
    FORWARD stage=body lane=0 micro=0 size=1
    SEND edge=2 lane=0 micro=0 size=1 direction=up to=a
    RECV edge=2 lane=0 micro=0 size=1 direction=down source=a spec=float32[batch, 3]
    BACKWARD stage=body lane=0 micro=0 scale=1.0
    SEND edge=1 lane=0 micro=0 size=1 direction=down to=a
    STEP lanes=0
  1 x metric sums
  1 x checkpoint
    EXCHANGE name=barrier number=0 group=a,b stage=- lanes=- limit=0 messages=2 hub=a
    CHECKPOINT number=1 last=True"""
