"""Every way in which a plan can be wrong, each with its code and words."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cutlayer.core.parts import Loss, Release, Source, Stage, Training, check_name
from cutlayer.core.plan import Plan
from cutlayer.errors import PlanError
from tests.small import C

HEAD = {"at": "a", "inputs": ["data.x"], "output": C}
BODY = {"at": "b", "inputs": ["head"], "output": C}
LOSS = {"at": "b", "inputs": ["body", "data.y"]}


def plan(
    head: dict | None = None,
    body: dict | None = None,
    loss: dict | None = None,
    more: tuple = (),
    releases: tuple = (),
    **training: object,
) -> Plan:
    """A good plan, with some arguments of its parts changed."""
    stages = [
        Stage("head", **{**HEAD, **(head or {})}),
        Stage("body", **{**BODY, **(body or {})}),
        Loss("loss", **{**LOSS, **(loss or {})}),
    ]
    return Plan([*stages, *more], training=Training(**training), releases=releases)


def one(name: str = "head", at: object = "a") -> Plan:
    """A plan of one stage."""
    return Plan([Stage(name, at=at, inputs=["data.x"], output=C), Loss("loss", at="c", inputs=[name])])


def mixed(replicas: list[str], **training: object) -> Plan:
    """Replicas of two stages, the second always at a server and one client."""
    stages = [
        Stage("head", at=["a", "b"], inputs=["data.x"], output=C),
        Stage("body", at=replicas, inputs=["head"], output=C),
        Loss("loss", at=["a", "b"], inputs=["body", "data.y"]),
    ]
    return Plan(stages, training=Training(order="parallel", clip_norm=1.0, **training))


Y = Release("y", at="a", to="b", spec="int64[batch]")
BAD: dict[str, tuple[Callable[[], object], str, str]] = {
    # names
    "an upper-case name": (
        lambda: plan(more=(Loss("Loss", at="b", inputs=["body"]),)),
        "E104",
        "'Loss' cannot be the name of a stage",
    ),
    "an empty name": (lambda: one(""), "E102", "cannot read the input ''"),
    "a port that is not given": (
        lambda: plan(head={"output": {"deep": C, "skip": C}}, body={"inputs": ["head"]}),
        "E102",
        "stage 'body' takes 'head', which 'head' does not give: expected one of head.deep, head.skip",
    ),
    "a port of a stage without ports": (
        lambda: plan(body={"inputs": ["head.deep"]}),
        "E102",
        "stage 'body' takes 'head.deep', which 'head' does not give: expected one of head",
    ),
    "a port that nothing takes": (
        lambda: plan(head={"output": {"deep": C, "skip": C}}, body={"inputs": ["head.deep"]}),
        "E108",
        "nothing takes the output 'skip' of stage 'head'",
    ),
    "a port that is no name": (lambda: plan(head={"output": {"a b": C}}), "E102", "no usable names"),
    "no ports": (lambda: plan(head={"output": {}}), "E102", "no usable names"),
    "a port without the batch": (
        lambda: plan(head={"output": {"deep": "float32[3]"}}, body={"inputs": ["head.deep"]}),
        "E109",
        "port deep",
    ),
    "a detached port that is not there": (
        lambda: plan(head={"detached": ["skip"]}),
        "E110",
        "unknown detached port of 'head': 'skip'",
    ),
    "a stage that is detached whole": (
        lambda: plan(head={"detached": [""]}),
        "E108",
        "no gradient can reach stage 'head': all its outputs are detached",
    ),
    "detached ports as a text": (lambda: plan(head={"detached": "deep"}), "E102", "write ['deep']"),
    "a field that ends in a newline": (lambda: Source.parse("data.x\n"), "E102", "cannot read the input"),
    "a name with a space": (lambda: check_name("a b", "party"), "E104", "expected 1 to 63 of a-z 0-9 - _"),
    "a name that ends in a hyphen": (lambda: check_name("a-", "party"), "E104", "'a-' cannot be the name of a party"),
    "a name with a path": (lambda: check_name("../a", "party"), "E104", "cannot be the name"),
    "a name that ends in a newline": (lambda: check_name("a\n", "party"), "E104", "cannot be the name"),
    "a name of 64 characters": (lambda: check_name("a" * 64, "party"), "E104", "cannot be the name"),
    "the name of the data": (lambda: check_name("data", "stage"), "E104", "'data' cannot be the name of a stage"),
    "a bad party": (lambda: one(at="Hospital A"), "E104", "'Hospital A' cannot be the name of a party"),
    "two stages of a name": (lambda: plan(more=(Stage("head", **HEAD),)), "E103", "two stages are named 'head'"),
    "a party called like a stage": (lambda: plan(head={"at": "body"}), "E104", "'body' is both a party and a stage"),
    # inputs
    "no inputs": (lambda: plan(body={"inputs": []}), "E102", "stage 'body' has no inputs"),
    "an unknown input": (
        lambda: plan(body={"inputs": ["hed"]}),
        "E102",
        "stage 'body' takes 'hed', which the plan does not have: expected one of body, head, loss, or data.hed",
    ),
    "an input without a field": (lambda: plan(head={"inputs": ["data."]}), "E102", "cannot read the input 'data.'"),
    "a field that is no name": (
        lambda: Source.parse("data.x y"),
        "E102",
        "expected 'STAGE', 'STAGE.PORT', 'data.FIELD'",
    ),
    "a field with an empty owner": (lambda: Source.parse("data.x@"), "E102", "cannot read the input 'data.x@'"),
    "a loss as input": (lambda: plan(body={"inputs": ["loss"]}), "E102", "'body' takes the loss 'loss' as input"),
    "data of nobody": (lambda: plan(loss={"inputs": ["body", "data.y@c"]}), "E102", "takes data of 'c', which is no"),
    "a cycle": (
        lambda: plan(head={"inputs": ["data.x", "body"]}),
        "E105",
        "the stages head, body, loss wait for each other (a cycle)",
    ),
    "a stage that takes itself": (lambda: plan(body={"inputs": ["head", "body"]}), "E105", "body, loss wait for each"),
    "no data": (lambda: Plan([]), "E102", "no stage of the plan takes data"),
    # places
    "no party": (lambda: plan(body={"at": []}), "E106", "stage 'body' is at no party"),
    "other numbers of replicas": (
        lambda: plan(head={"at": ["a", "c"]}, body={"at": ["b", "d", "e"]}),
        "E106",
        "stage 'head' has 2 replicas, others have 3",
    ),
    # what leaves
    "a label that leaves": (
        lambda: plan(loss={"inputs": ["body", "data.y@a"]}),
        "E107",
        "the field 'y' of 'a' would leave it for b, and no release allows this (stage loss, input 1). "
        "move the stage to the data, or declare Release('y', at='a', to='b', spec=...)",
    ),
    "a label released to another": (
        lambda: plan(loss={"at": "c", "inputs": ["body", "data.y@a"]}, releases=(Y,)),
        "E107",
        "would leave it for c",
    ),
    "another field released": (
        lambda: plan(loss={"inputs": ["body", "data.z@a"]}, releases=(Y,)),
        "E107",
        "the field 'z' of 'a' would leave it for b",
    ),
    "a release by nobody": (
        lambda: plan(releases=(Release("y", at="q", to="b", spec="int64[batch]"),)),
        "E107",
        "the release of 'y' names 'q', which is no party or stage of the plan: expected one of a, b, body, head, loss",
    ),
    "a release to nobody": (
        lambda: plan(releases=(Release("y", at="a", to="q", spec="int64[batch]"),)),
        "E107",
        "the release of 'y' names 'q'",
    ),
    "a release without samples": (
        lambda: plan(releases=(Release("y", at="a", to="b", spec="int64[3]"),)),
        "E109",
        "the release of 'y' is int64[3], which does not begin with the batch",
    ),
    # ends
    "no loss": (
        lambda: Plan([Stage("head", **HEAD)]),
        "E108",
        "the plan has no loss. end it with Loss(name, at=..., inputs=[...])",
    ),
    "no way to a loss": (
        lambda: plan(more=(Stage("idle", **BODY),)),
        "E108",
        "stage 'idle' has no way to a loss, so nothing would train it",
    ),
    "a loss of data only": (lambda: plan(more=(Loss("more", at="a", inputs=["data.y"]),)), "E108", "takes no stage"),
    "no gradient": (
        lambda: plan(body={"output": "int64[batch]"}),
        "E108",
        "no gradient can reach stage 'head': all that take it give whole numbers",
    ),
    "no batch": (lambda: plan(head={"output": "float32[3, 4]"}), "E109", "'head' gives float32[3, 4], which does not"),
    "a bad spec": (lambda: plan(head={"output": "float[batch]"}), "E101", "unknown dtype in 'float[batch]'"),
    # numbers
    "an unknown reduction": (
        lambda: plan(loss={"reduction": "none"}),
        "E110",
        "unknown reduction of 'loss': 'none': expected one of mean, sum",
    ),
    "a weight that is none": (lambda: plan(loss={"weight": float("nan")}), "E110", "weight of 'loss' is nan"),
    "no room for state": (lambda: plan(head={"state_limit": 0}), "E110", "state_limit of 'head' is 0"),
    "an unknown schedule": (
        lambda: plan(schedule="zb"),
        "E110",
        "unknown schedule: 'zb': expected one of 1f1b, gpipe, sequential",
    ),
    "an unknown order": (lambda: plan(order="ring"), "E110", "unknown order: 'ring': expected one of parallel, relay"),
    "an unknown clip": (lambda: plan(clip="all"), "E110", "unknown clip: 'all': expected one of global, party"),
    "an unknown hub": (lambda: plan(hub="q"), "E110", "unknown hub: 'q': expected one of a, b"),
    "a stage as hub": (lambda: plan(hub="head"), "E110", "unknown hub: 'head'"),
    "no epochs": (lambda: plan(epochs=0), "E110", "training.epochs is 0: expected an integer of at least 1"),
    "half an epoch": (lambda: plan(epochs=0.5), "E110", "training.epochs is 0.5"),
    "a truth as a number": (lambda: plan(epochs=True), "E110", "training.epochs is True"),
    "no batch size": (lambda: plan(batch_size=0), "E110", "training.batch_size is 0"),
    "no microbatches": (lambda: plan(microbatches=0), "E110", "training.microbatches is 0"),
    "no window": (lambda: plan(window=0), "E110", "training.window is 0"),
    "checkpoints before the start": (lambda: plan(checkpoint_every=-1), "E110", "checkpoint_every is -1"),
    "evaluations before the start": (lambda: plan(evaluate_every=-1), "E110", "evaluate_every is -1"),
    "more microbatches than samples": (
        lambda: plan(batch_size=4, microbatches=5),
        "E110",
        "5 microbatches of a batch of 4: expected at most one microbatch a sample",
    ),
    "a norm of nothing": (lambda: plan(clip_norm=0.0), "E110", "training.clip_norm is 0.0: expected a positive number"),
    "a norm that is none": (lambda: plan(clip_norm=float("nan")), "E110", "training.clip_norm is nan"),
    "an infinite norm": (lambda: plan(clip_norm=float("inf")), "E110", "training.clip_norm is inf"),
    "replicas clipped apart": (
        lambda: mixed(["s", "b"]),
        "E110",
        "the replicas of stage 'head' would be clipped by different norms, and so become different "
        "(its parties a, b train different sets of stages). set training.clip to 'global'",
    ),
}


@pytest.mark.provokes(by="code")
@pytest.mark.parametrize(("make", "code", "words"), BAD.values(), ids=BAD)
def test_a_wrong_plan_is_refused(make, code, words):
    with pytest.raises(PlanError) as caught:
        make()
    error = caught.value
    assert error.code == code
    assert error.where
    text = str(error)
    assert words in text or words in text.replace(f" ({error.where})", "")


@pytest.mark.parametrize(
    "make",
    [
        plan,
        lambda: one("a_1-b"),
        lambda: check_name("a" * 63, "party"),
        lambda: plan(loss={"inputs": ["body", "data.y@a"]}, releases=(Y,)),
        lambda: plan(loss={"inputs": ["body", "data.y@a"], "at": "a"}),  # it stays
        lambda: plan(body={"output": "int64[batch]", "frozen": True}, head={"frozen": True}),
        lambda: plan(batch_size=5, microbatches=5, clip_norm=1, clip="global", hub="a", window=1),
        lambda: mixed(["a", "b"]),
        lambda: mixed(["s", "b"], clip="global"),
        lambda: mixed(["s", "s"]),
    ],
    ids=range(10),
)
def test_its_neighbours_are_not(make):
    make()


def test_a_plan_has_no_stage_of_another_name():
    with pytest.raises(PlanError) as caught:
        plan().stage("tail")
    assert caught.value.code == "E103"
