"""Crossings and planned exchanges as parts of a plan: what they change in it, and what is refused."""

from __future__ import annotations

import pytest

from cutlayer.core.compile import Roster, compile_plan
from cutlayer.core.cost import epoch_bytes
from cutlayer.core.crossing import Crossing, PlannedExchange
from cutlayer.core.parts import Loss, Stage
from cutlayer.core.plan import Plan
from cutlayer.core.program import Exchange, Recv
from cutlayer.core.spec import TensorSpec
from cutlayer.errors import PlanError

STAGES = (
    Stage("head", at="a", inputs=["data.x"], output="float32[batch, 6]"),
    Stage("body", at="b", inputs=["head"], output="float32[batch, 4]"),
    Stage("tail", at="a", inputs=["body"], output="float32[batch, 2]"),
    Loss("loss", at="a", inputs=["tail", "data.y"]),
)
NOISE = {"name": "gaussian", "deviation": 0.5}
SAYS = PlannedExchange("capacity", ["a", "b"], says="how many samples it could add", limit=8)


def plan(*extras: Crossing | PlannedExchange) -> Plan:
    return Plan(STAGES, extras=extras)


def test_a_plan_without_extras_keeps_its_digest():
    assert plan().digest() == Plan(STAGES).digest()
    assert "crossings" not in plan().document()
    assert len({plan(*extras).digest() for extras in ((), (Crossing("head", codec="int8"),), (SAYS,))}) == 3


def test_training_settings_can_be_changed_without_losing_them():
    made = plan(Crossing("head", codec="bfloat16"), SAYS)
    assert made.with_training(epochs=2).extras == made.extras


@pytest.mark.parametrize(
    ("codec", "wire", "size"),
    [("bfloat16", "bfloat16[batch, 6]", 12), ("float16", "float16[batch, 6]", 12), ("int8", "uint8[batch, 14]", 14)],
)
def test_programs_and_costs_are_those_of_the_wire(codec: str, wire: str, size: int):
    made, roster = plan(Crossing("head", codec=codec)), Roster({"train": {"a": 32}})
    steps = [job for block in compile_plan(made, roster)["b"]["train"].blocks for job in block.instructions]
    specs = {job.direction: job.spec for job in steps if isinstance(job, Recv)}
    assert specs == {"up": TensorSpec.parse(wire), "down": TensorSpec.parse("float32[batch, 4]")}
    assert epoch_bytes(made, roster, "a") == 32 * (size + 4 * 4)  # and the gradient at body, as it is
    assert epoch_bytes(made, roster, "b") == 32 * (4 * 6 + 4 * 4)


def test_a_codec_of_ones_own_needs_its_spec_on_the_wire():
    own = Crossing("head", codec={"name": "top3", "least": 0.1}, wire="float32[batch, 3]", gradient_codec="bfloat16")
    edge = plan(own).graph.edges[1]
    assert (str(edge.wire("up")), str(edge.wire("down"))) == ("float32[batch, 3]", "bfloat16[batch, 6]")
    assert (str(edge.spec), edge.crossing) == ("float32[batch, 6]", own)


def test_the_printed_plan_says_what_is_seen():
    shown = str(
        plan(Crossing("head", codec="int8", defences=[NOISE]), Crossing("body", gradient_defences=[NOISE]), SAYS)
    )
    assert "activations of head (after gaussian(deviation=0.5), as int8) to b: uint8[batch, 14], 448 bytes" in shown
    assert "gradient at body->tail (after gaussian(deviation=0.5)) to b" in shown
    assert (
        "how many samples it could add, by exchange capacity with b: at most 2 messages of 8 bytes, each round" in shown
    )


@pytest.mark.parametrize("when", ["start", "step", "round", "finish"])
def test_an_exchange_runs_where_the_plan_says(when: str):
    made = plan(PlannedExchange("capacity", ["a", "b"], says="x", when=when, messages=3, hub="b"))
    modes = compile_plan(made, Roster({"train": {"a": 32}}))["a"]
    found = {
        mode: [job for block in program.blocks for job in block.instructions if getattr(job, "name", "") == "capacity"]
        for mode, program in modes.items()
    }
    mode = {"start": "start", "step": "train", "round": "train", "finish": "finish"}[when]
    assert {name for name, jobs in found.items() if jobs} == {mode}
    (job,) = found[mode]
    assert isinstance(job, Exchange)
    assert (job.group, job.hub, job.messages, job.limit) == (("a", "b"), "b", 3, 65_536)


@pytest.mark.provokes(by="code")
@pytest.mark.parametrize(
    ("extras", "code", "words"),
    [
        ([Crossing("hed")], "E130", "names no output of its own.*expected one of head, body, tail, got hed"),
        ([Crossing("head"), Crossing("head")], "E130", "got twice"),
        ([Crossing("tail", codec="int8")], "E130", "what a crossing names stays at its party"),
        ([Crossing("head", codec="top3")], "E131", "'top3' has no spec on the wire.*wire=... in the plan"),
        ([Crossing("head", codec="int8", wire="int8[batch, 6]")], "E131", r"expected uint8\[batch, 14\], got int8"),
        ([PlannedExchange("capacity", ["a"], says="x")], "E132", "group of the exchange 'capacity' is 'a'"),
        ([PlannedExchange("capacity", ["a", "c"], says="x")], "E132", "two or more of a, b"),
        ([PlannedExchange("capacity", ["a", "b"], says="x", when="later")], "E132", "when of .* is 'later'"),
        ([PlannedExchange("capacity", ["a", "b"], says="x", limit=-1)], "E132", "limit of .* is -1"),
        ([PlannedExchange("capacity", ["a", "b"], says="x", messages=0)], "E132", "messages of .* is 0"),
        ([PlannedExchange("capacity", ["a", "b"], says="x", stage="no")], "E132", "stage of .* is 'no'"),
        ([PlannedExchange("capacity", ["a", "b"], says="x", hub="c")], "E132", "hub of .* is 'c'"),
        ([PlannedExchange("capacity", ["a", "b"], says=" ")], "E132", "words for the printed plan"),
    ],
)
def test_what_cannot_be_is_refused(extras, code: str, words: str):
    with pytest.raises(PlanError, match=words) as caught:
        plan(*extras)
    assert caught.value.code == code


def test_int8_needs_a_fixed_size():
    stages = (Stage("head", at="a", inputs=["data.x"], output="float32[batch, time<=9, 6]"), *STAGES[1:])
    with pytest.raises(PlanError, match=r"'int8' cannot write this.*a floating tensor of fixed size"):
        Plan(stages, extras=[Crossing("head", codec="int8")])
    wire = Plan(stages, extras=[Crossing("head", codec="bfloat16")]).graph.edges[1].wire()
    assert str(wire) == "bfloat16[batch, time<=9, 6]"
