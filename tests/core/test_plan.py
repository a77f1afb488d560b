"""Plans as values: what is derived from them, and the digest that all parties must share."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields, replace

import pytest

from cutlayer.core.parts import Loss, Release, Stage, Training
from cutlayer.core.plan import Plan
from cutlayer.core.topologies import u_shaped, vanilla
from tests.small import C

BASE = {
    "head": {"at": "a", "inputs": ["data.x"], "output": C},
    "body": {"at": "b", "inputs": ["head"], "output": C},
    "loss": {"at": "b", "inputs": ["body", "data.y@head"]},
}
RELEASE = {"field": "y", "at": "head", "to": "b", "spec": "int64[batch]"}


def plan(release: dict | None = None, training: dict | None = None, name: str = "plan", **changes: dict) -> Plan:
    parts = {stage: {**arguments, **changes.get(stage, {})} for stage, arguments in BASE.items()}
    stages = [Stage("head", **parts["head"]), Stage("body", **parts["body"]), Loss("loss", **parts["loss"])]
    given = {**RELEASE, **(release or {})}
    releases = [Release(given.pop("field"), **given), Release("z", at="head", to="b", spec="int64[batch]")]
    return Plan(stages, training=Training(**(training or {})), releases=releases, name=name)


TRAINING = {
    "epochs": 2,
    "batch_size": 16,
    "microbatches": 2,
    "schedule": "1f1b",
    "order": "parallel",
    "seed": 1,
    "shuffle": False,
    "drop_last": True,
    "clip_norm": 1.0,
    "clip": "global",
    "checkpoint_every": 5,
    "evaluate_every": 1,
    "metrics_least": 1,
    "window": 2,
    "hub": "a",
}
CHANGES = {
    **{f"training.{name}": {"training": {name: value}} for name, value in TRAINING.items()},
    "name": {"name": "other"},
    "place": {"body": {"at": "c"}},
    "replicas": {"head": {"at": ["a"]}},
    "width": {"head": {"output": "float32[batch, 4]"}},
    "dtype": {"head": {"output": "float64[batch, 3]"}},
    "inputs": {"body": {"inputs": ["head", "head"]}},
    "frozen": {"head": {"frozen": True}},
    "state_limit": {"head": {"state_limit": 2**20}},
    "weight": {"loss": {"weight": 0.5}},
    "reduction": {"loss": {"reduction": "sum"}},
    "label": {"loss": {"inputs": ["body", "data.z@head"]}},
    "release.field": {"release": {"field": "z"}, "loss": {"inputs": ["body", "data.z@head"]}},
    "release.spec": {"release": {"spec": "int32[batch]"}},
    "release.to": {"release": {"to": "c"}, "loss": {"at": "c"}},
}


def test_each_part_of_a_plan_changes_its_digest():
    assert set(TRAINING) == {field.name for field in fields(Training)}
    # a label at "c" needs its release: then another plan is the one to compare with
    found = {name: plan(**change).digest() for name, change in CHANGES.items() if "to" not in name and name != "place"}
    assert len({plan().digest(), *found.values()}) == len(found) + 1


def test_the_party_and_the_release_change_the_digest():
    moved = plan(body={"at": "c"})
    released = plan(release={"to": "a"}, loss={"at": "a", "inputs": ["body", "data.y@head"]})
    assert len({plan().digest(), moved.digest(), released.digest()}) == 3


def test_equal_plans_have_equal_digests():
    """However they are written: order of keywords, lists or tuples, texts or specs."""
    other = Plan(
        name="plan",
        stages=(
            Stage(output=C.replace(", ", ","), inputs=("data.x",), at="a", name="head"),
            Stage("body", inputs=("head",), at="b", output=plan().stage("head").output),
            Loss("loss", inputs=("body", "data.y@head"), at="b", weight=1),
        ),
        releases=(
            Release("y", spec="int64[ batch ]", to="b", at="head"),
            Release("z", to="b", at="head", spec="int64[batch]"),
        ),
        training=Training(microbatches=1, epochs=1),
    )
    assert other == plan()
    assert other.digest() == plan().digest()


def test_the_digest_is_the_same_on_every_machine():
    """Written down, and computed by a second process with another hash seed."""
    expected = "fda32611d7f6afdf0a2f04a74fdd14760a53e3c946e23184dc542359b97b9f38"
    code = (
        "from cutlayer.core.topologies import vanilla;"
        "print(vanilla('a', 'b', cut='float32[batch, 3]', output='float32[batch, 3]').digest())"
    )
    assert vanilla("a", "b", cut=C, output=C).digest() == expected
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == expected


def test_the_document_is_plain_and_complete():
    document = plan(training={"clip_norm": 0.5}).document()
    assert json.loads(json.dumps(document)) == document
    assert document["stages"][0] == {
        "kind": "stage",
        "name": "head",
        "at": "a",
        "inputs": ["data.x"],
        "output": C,
        "detached": [],
        "frozen": False,
        "state_limit": 64 * 2**20,
    }
    assert document["stages"][2] == {
        "kind": "loss",
        "name": "loss",
        "at": "b",
        "inputs": ["body", "data.y@head"],
        "weight": 1.0,
        "reduction": "mean",
    }
    assert document["releases"][0] == {"field": "y", "at": "head", "to": "b", "spec": "int64[batch]"}
    assert document["training"]["clip_norm"] == 0.5


def test_what_a_plan_derives():
    made = u_shaped(["a", "c"], "b", cut=C, back=C, output=C)
    assert made.parties == ("a", "c", "b")
    assert made.lanes == 2
    assert made.hub == "a"
    assert replace(made.training, hub="b") == made.with_training(hub="b").training
    assert made.with_training(hub="b").hub == "b"
    assert made.stage("body").at == "b"
    assert made.with_training(epochs=3).training.epochs == 3
    assert made.training.epochs == 1
    assert plan().lanes == 1
    assert plan().hub == "b"


def test_a_plan_cannot_be_changed():
    with pytest.raises(AttributeError):
        plan().name = "other"  # type: ignore[misc]
    with pytest.raises(AttributeError):
        plan().stage("head").at = "c"  # type: ignore[misc]
