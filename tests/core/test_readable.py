"""Labels that can be read from gradients: named in plans where it is so, and in no others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from cutlayer.core.crossing import Crossing
from cutlayer.core.describe import keeps
from cutlayer.core.parts import Loss, Release, Shared, Stage, Training
from cutlayer.core.plan import Plan
from cutlayer.core.readable import READABLE_REMEDY, readable, warnings_of
from cutlayer.core.topologies import u_shaped, vanilla
from cutlayer.data.sources import TensorTable
from cutlayer.run.party import Party
from cutlayer.run.simulate import simulate
from tests.small import TOPOLOGIES, C, float32, plain


def bare(*, at: str | Sequence[str] = "hospital", releases: Sequence[Release] = (), **more: object) -> Plan:
    """A U-shape without its tail: the server gets the gradient at the loss itself."""
    stages = [
        Stage("head", at=at, inputs=["data.x"], output=float32(4)),
        Stage("body", at="server", inputs=["head"], output=C),
        Loss("loss", at=at, inputs=["body", "data.y"]),
    ]
    return Plan(stages, releases=releases, **more)  # type: ignore[arg-type]


def found(plan: Plan) -> list[tuple[str, str, str, str]]:
    return [(one.holder, one.field, one.reader, one.edge.label) for one in readable(plan)]


def tells(plan: Plan) -> list[str]:
    return [line for line in str(plan).splitlines() if line.startswith("  tells")]


def test_the_label_is_in_the_gradient():
    """What the plan says is so: the one that gets the gradient has every label."""
    seen: list[torch.Tensor] = []

    class Spy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.linear(x)
            if y.requires_grad:
                y.register_hook(lambda gradient: seen.append(gradient.clone()))
            return y

    table = TensorTable(x=torch.randn(8, 5), y=torch.tensor([0, 1, 2, 2, 1, 0, 1, 2]))
    plan = bare().with_training(shuffle=False, batch_size=8)
    hospital = Party(
        "hospital", data=table, modules={"head": nn.Linear(5, 4), "loss": nn.CrossEntropyLoss()}, optimizer=plain
    )
    simulate(plan, [hospital, Party("server", modules={"body": Spy()}, optimizer=plain)])
    assert seen[-1].argmin(1).tolist() == [0, 1, 2, 2, 1, 0, 1, 2]
    assert found(plan) == [("hospital", "y", "server", "body->loss")]


def test_the_plan_says_so_and_does_not_keep_it():
    plan = bare()
    assert tells(plan) == [
        "  tells   data.y to server: it can be read from the gradient at body->loss, "
        "as no stage of this party is between"
    ]
    assert keeps(plan, "hospital") == ["data.x", "its weights"]
    assert "  keeps   data.x, its weights" in str(plan).splitlines()
    assert warnings_of(plan) == [
        "server can read data.y of hospital from the gradient at body->loss: no stage of another party is between"
    ]


def test_ordinary_plans_say_nothing_of_it():
    for make in TOPOLOGIES.values():
        assert readable(make()) == ()
        assert tells(make()) == []
    several = [
        u_shaped(["a", "b"], "server", cut=float32(4), back=float32(4), output=C),
        vanilla(["a", "b"], "server", cut=float32(4), output=C),
    ]
    assert [found(plan) for plan in several] == [[], []]


def test_a_label_that_is_released_to_the_reader_is_told_as_declared():
    """The release is not used on the wire, so that the label is still not said to be kept."""
    plan = bare(releases=[Release("y", at="head", to="server", spec="int64[batch]")])
    assert [one.declared for one in readable(plan)] == [True]
    assert tells(plan)[0].endswith("is between (declared release)")
    assert warnings_of(plan) == []
    assert keeps(plan, "hospital") == ["data.x", "its weights"]
    other = bare(releases=[Release("y", at="server", to="server", spec="int64[batch]")])
    assert [one.declared for one in readable(other)] == [False]


def test_a_label_that_the_reader_is_sent_is_not_named_again():
    stages = [
        Stage("head", at="a", inputs=["data.x"], output=C),
        Stage("body", at="s", inputs=["head"], output=C),
        Loss("loss", at="a", inputs=["body", "data.y"]),
        Loss("there", at="s", inputs=["body", "data.y@a"]),
    ]
    plan = Plan(stages, releases=[Release("y", at="a", to="s", spec="int64[batch]")])
    assert found(plan) == []
    assert keeps(plan, "a") == ["data.x", "its weights"]


def test_ports_other_fields_and_several_readers():
    """All fields that a loss takes are in its gradients, also inputs that it compares with."""
    stages = [
        Stage("head", at="a", inputs=["data.x"], output=float32(4)),
        Stage("one", at="s", inputs=["head"], output={"logits": C, "mask": "bool[batch]"}),
        Stage("two", at="t", inputs=["head"], output=C),
        Loss("loss", at="a", inputs=["one.logits", "two", "one.mask", "data.y", "data.x"]),
    ]
    assert found(Plan(stages)) == [
        ("a", "y", "s", "one.logits->loss"),
        ("a", "x", "s", "one.logits->loss"),
        ("a", "y", "t", "two->loss"),
        ("a", "x", "t", "two->loss"),
    ]
    assert keeps(Plan(stages), "a") == ["its weights"]


def coded(**more: Any) -> Plan:
    """A U-shape without its tail, whose label goes through stages that may well have no weights."""
    stages = [
        Stage("head", at="a", inputs=["data.x"], output=float32(4)),
        Stage("body", at="s", inputs=["head"], output=C),
        Stage("whole", at="a", inputs=["data.y"], output="int64[batch]", frozen=True),
        Stage("target", at="a", inputs=["whole"], output=C, **more),
        Loss("loss", at="a", inputs=["body", "target"]),
    ]
    return Plan(stages)


@pytest.mark.parametrize("frozen", [True, False])
def test_what_stages_make_of_a_label_is_in_the_gradient_too(frozen: bool):
    """The plan does not know whether they have weights: a one-hot coding has none."""
    plan = coded(frozen=frozen)
    assert [(one.holder, one.field, one.reader, one.made) for one in readable(plan)] == [("a", "y", "s", "target")]
    assert tells(plan) == [
        "  tells   data.y to s: what target makes of it can be read from the gradient at body->loss, "
        "as no stage of this party is between"
    ]
    assert keeps(plan, "a") == ["data.x", "its weights"]
    assert warnings_of(plan) == [
        "s can read what target makes of data.y of a from the gradient at body->loss: "
        "no stage of another party is between"
    ]


def test_what_the_reader_is_sent_of_a_label_is_not_named_again():
    """Nor what comes from another party, which the plan names there; nor a field twice."""
    sent = [*coded().stages, Stage("seen", at="s", inputs=["target"], output=C)]
    last = Loss("more", at="s", inputs=["seen", "target"])
    assert readable(Plan([*sent, last])) == ()
    tail = [one for one in coded().stages if not isinstance(one, Loss)]
    tail += [
        Stage("tail", at="a", inputs=["body"], output=C),
        Loss("loss", at="a", inputs=["tail", "target"]),
    ]
    assert readable(Plan(tail)) == ()
    far = [one for one in coded().stages if not isinstance(one, Loss)]
    far += [Loss("loss", at="t", inputs=["body", "target"])]
    assert found(Plan(far)) == [("a", "y", "s", "body->loss")]
    twice = [*tail[:-2], Loss("loss", at="a", inputs=["body", "target", "data.y"])]
    assert [one.made for one in readable(Plan(twice))] == [""]


def test_several_losses_each_for_itself():
    stages = [
        Stage("head", at="a", inputs=["data.x"], output=float32(4)),
        Stage("body", at="s", inputs=["head"], output=C),
        Stage("tail", at="a", inputs=["body"], output=C),
        Loss("loss", at="a", inputs=["tail", "data.y"]),
        Loss("side", at="a", inputs=["body", "data.sex"]),
    ]
    plan = Plan(stages)
    assert found(plan) == [("a", "sex", "s", "body->side")]
    assert keeps(plan, "a") == ["data.x", "data.y", "its weights"]


def test_the_label_of_a_third_party():
    """It is released to where the loss is, and can be read one party further."""
    stages = [
        Stage("head", at="a", inputs=["data.x"], output=C),
        Loss("loss", at="s", inputs=["head", "data.y@registry"]),
        Stage("own", at="registry", inputs=["data.z"], output=C),
        Loss("more", at="registry", inputs=["own", "data.y"]),
    ]
    plan = Plan(stages, releases=[Release("y", at="registry", to="s", spec="int64[batch]")])
    assert found(plan) == [("registry", "y", "a", "head->loss")]


def test_a_gradient_that_does_not_flow_tells_nothing():
    frozen = [
        Stage("head", at="a", inputs=["data.x"], output=C, frozen=True),
        Stage("body", at="s", inputs=["head"], output=C, frozen=True),
        Stage("tail", at="a", inputs=["head"], output=C),
        Loss("loss", at="a", inputs=["body", "tail", "data.y"]),
    ]
    assert found(Plan(frozen)) == []


@pytest.mark.parametrize("names", [["a", "b"], ["a", "b", "c"]])
def test_each_lane_is_told(names: list[str]):
    plan = bare(at=names)
    assert found(plan) == [(name, "y", "server", "body->loss") for name in names]
    assert len(set(tells(plan))) == 1
    assert [keeps(plan, name) for name in names] == [["data.x"]] * len(names)


def test_what_is_done_to_the_gradient_is_said():
    """In the plan and in the warning; and the remedy names it."""
    noisy = Crossing("body", gradient_defences=[{"name": "gaussian", "deviation": 0.1}])
    plan, said = bare().with_extras(noisy), "from the gradient at body->loss (after gaussian(deviation=0.1)"
    assert f"{said})" in tells(plan)[0]
    (warning,) = warnings_of(plan)
    assert f"{said}): no stage" in warning
    assert "gradient_defences" in READABLE_REMEDY


def shaped(*at: str, **more: Any) -> Plan:
    return u_shaped(at, "server", cut=float32(4), back=float32(4), output=C, **more)


def test_a_tail_that_the_reader_runs_too_hides_nothing():
    """Its replicas have the same weights, whatever the order."""
    for order in ("relay", "parallel"):
        plan = shaped("a", "server", order=order)
        assert found(plan) == [("a", "y", "server", "body->tail")]
        assert tells(plan) == [
            "  tells   data.y to server: it can be read from the gradient at body->tail, as server runs tail too"
        ]
        assert keeps(plan, "a") == ["data.x"]
        assert warnings_of(plan) == [
            "server can read data.y of a from the gradient at body->tail: server runs tail too"
        ]
        assert keeps(plan, "server") == ["data.x", "data.y"]


def test_a_tail_whose_weight_gradients_go_by_way_of_the_reader_hides_nothing():
    plan = shaped("a", "b", order="parallel", hub="server")
    assert found(plan) == [(name, "y", "server", "body->tail") for name in ("a", "b")]
    (line,) = set(tells(plan))
    assert line.endswith("from the gradient at body->tail, as weight gradients of tail go by way of server")
    assert keeps(plan, "a") == ["data.x"]
    assert found(shaped("a", "b", order="relay", hub="server")) == []  # state is handed on from party to party
    assert found(shaped("a", "b", order="parallel")) == []
    assert found(shaped("a", order="parallel", hub="server")) == []  # one replica: nothing to add up
    assert found(shaped("a", "a", order="parallel", hub="server")) == [("a", "y", "server", "body->tail")]


def test_a_frozen_tail_has_no_weight_gradients_to_go_by_way_of_the_hub():
    stages = [replace(one, frozen=True) if one.name == "tail" else one for one in shaped("a", "b").stages]
    assert found(Plan(stages, training=Training(order="parallel", hub="server"))) == []


def test_a_tail_that_the_reader_gets_at_the_end_hides_nothing():
    """It may have kept the last gradients."""
    base = shaped("a")
    plan = Plan(base.stages, assemble_at=["server"])
    assert tells(plan) == [
        "  tells   data.y to server: it can be read from the gradient at body->tail, "
        "as server gets the weights of tail at the end"
    ]
    assert keeps(plan, "a") == ["data.x"]
    assert found(Plan(base.stages, assemble_at=["a"])) == []


def test_all_stages_between_must_be_known_to_the_reader():
    """One that is not hides the label; which stages are known is said of each."""
    stages = [
        Stage("head", at=["a", "server"], inputs=["data.x"], output=float32(4)),
        Stage("body", at="server", inputs=["head"], output=float32(4)),
        Stage("neck", at=["a", "server"], inputs=["body"], output=float32(4)),
        Stage("tail", at=["a", "server"], inputs=["neck"], output=C),
        Loss("loss", at=["a", "server"], inputs=["tail", "data.y"]),
    ]
    (line,) = tells(Plan(stages))
    assert line.endswith("at body->neck, as server runs neck too and server runs tail too")
    for hidden in (2, 3):
        other = [*stages]
        other[hidden] = replace(other[hidden], at="c")
        assert "server" not in [one.reader for one in readable(Plan(other))]


def test_a_value_that_goes_on_past_the_tail_is_followed_each_way():
    """Through the stage that is known, not through the other; behind a stage of the reader its own gradient counts."""
    stages = [
        Stage("head", at=["a", "server"], inputs=["data.x"], output=float32(4)),
        Stage("body", at="server", inputs=["head"], output=float32(4)),
        Stage("known", at=["a", "server"], inputs=["body"], output=C),
        Stage("private", at="c", inputs=["body"], output=C),
        Stage("again", at="server", inputs=["known"], output=C),
        Stage("last", at="c", inputs=["again"], output=C),
        Loss("one", at=["a", "server"], inputs=["known", "data.y"]),
        Loss("two", at="c", inputs=["private", "data.z"]),
        Loss("three", at="c", inputs=["last", "data.z"]),
    ]
    assert found(Plan(stages)) == [("a", "y", "server", "body->known")]


def test_of_shared_preprocessing_rows_stay():
    """And where one party alone has the field, all of it stays."""
    shared = [Shared("x", at="head"), Shared("y", at="head", kind="classes")]
    plan = u_shaped(["a", "b"], "s", cut=float32(4), back=float32(4), output=C, preprocessing=shared)
    kept = ["rows of data.x (not counts, means and deviations)", "rows of data.y (not the list of values)"]
    assert keeps(plan, "a") == keeps(plan, "b") == kept
    assert f"  keeps   {', '.join(kept)}" in str(plan).splitlines()
    assert keeps(bare(preprocessing=[Shared("x", at="head")]), "hospital") == ["data.x", "its weights"]
