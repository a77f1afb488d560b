"""Labels that can be read from gradients: named in plans where it is so, and in no others."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from cutlayer.core.crossing import Crossing
from cutlayer.core.describe import keeps
from cutlayer.core.parts import Loss, Release, Shared, Stage
from cutlayer.core.plan import Plan
from cutlayer.core.readable import readable, warnings_of
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
    return [(one.holder, one.field, one.reader, one.edge.label) for one in readable(plan.graph)]


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
    assert warnings_of(plan.graph) == [
        "server can read data.y of hospital from the gradient at body->loss: no stage of another party is between"
    ]


def test_ordinary_plans_say_nothing_of_it():
    for make in TOPOLOGIES.values():
        assert readable(make().graph) == ()
        assert tells(make()) == []
    several = [
        u_shaped(["a", "b"], "server", cut=float32(4), back=float32(4), output=C),
        vanilla(["a", "b"], "server", cut=float32(4), output=C),
    ]
    assert [found(plan) for plan in several] == [[], []]


def test_a_label_that_is_released_to_the_reader_is_told_as_declared():
    """The release is not used on the wire, so that the label is still not said to be kept."""
    plan = bare(releases=[Release("y", at="head", to="server", spec="int64[batch]")])
    assert [one.declared for one in readable(plan.graph)] == [True]
    assert tells(plan)[0].endswith("is between (declared release)")
    assert warnings_of(plan.graph) == []
    assert keeps(plan, "hospital") == ["data.x", "its weights"]
    other = bare(releases=[Release("y", at="server", to="server", spec="int64[batch]")])
    assert [one.declared for one in readable(other.graph)] == [False]


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
    noisy = Crossing("body", gradient_defences=[{"name": "gaussian", "deviation": 0.1}])
    assert "from the gradient at body->loss (after gaussian(deviation=0.1))" in tells(bare().with_extras(noisy))[0]


def test_of_shared_preprocessing_rows_stay():
    """And where one party alone has the field, all of it stays."""
    shared = [Shared("x", at="head"), Shared("y", at="head", kind="classes")]
    plan = u_shaped(["a", "b"], "s", cut=float32(4), back=float32(4), output=C, preprocessing=shared)
    kept = ["rows of data.x (not counts, means and deviations)", "rows of data.y (not the list of values)"]
    assert keeps(plan, "a") == keeps(plan, "b") == kept
    assert f"  keeps   {', '.join(kept)}" in str(plan).splitlines()
    assert keeps(bare(preprocessing=[Shared("x", at="head")]), "hospital") == ["data.x", "its weights"]
