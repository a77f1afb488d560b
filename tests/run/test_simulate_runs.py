"""All parties in one process: what a run gives, what it leaves alone, and how it explains what is wrong."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import MinMetric
from torchmetrics.classification import MulticlassAccuracy

from cutlayer.core.compile import Roster, compile_plan
from cutlayer.core.parts import Loss, Stage
from cutlayer.core.plan import Plan
from cutlayer.core.program import Tag
from cutlayer.core.topologies import u_shaped, vanilla, vertical
from cutlayer.data.sources import TensorTable
from cutlayer.engine.party import Post, Take
from cutlayer.engine.wire import Frame
from cutlayer.errors import (
    ConfigError,
    ContractError,
    CutlayerError,
    DataError,
    NonFiniteError,
    ProgramError,
    StageError,
)
from cutlayer.run.prediction import predict
from cutlayer.run.simulate import simulate
from cutlayer.transport.local import run_together
from tests.small import CLASSES, FEATURES, C, Case, adam, difference, float32, modules_for, plain

COUNTS = (12, 10, 16)


def relay(**training: object) -> Plan:
    numbers = {"batch_size": 6, **training}
    return u_shaped(["a", "b", "c"], "server", cut=float32(6), back=float32(4), output=C, **numbers)


def single(**training: object) -> Case:
    return Case.of(vanilla("a", "server", cut=float32(6), output=C, batch_size=8, **training))


def raises(kind: type[CutlayerError], code: str, run) -> CutlayerError:
    with pytest.raises(kind) as caught:
        run()
    assert caught.value.code == code
    assert len(caught.value.lines()) == 4
    return caught.value


# --- what a run gives ------------------------------------------------------------------------------------------------


def test_a_run_is_the_same_again():
    case = single(epochs=2)
    first, second = case.cut(), case.cut()
    assert difference(first, case.uncut()) == 0.0
    assert first.history == second.history
    assert {p: ledger.flows for p, ledger in first.ledgers.items()} == {
        p: ledger.flows for p, ledger in second.ledgers.items()
    }
    assert first.history != single(epochs=2, seed=1).cut().history


def test_the_modules_given_are_trained():
    case = single()
    parties = case.parties()
    simulate(case.plan, parties)
    assert not torch.equal(parties[0].modules["head"].linear.weight, case.modules["head"].linear.weight)
    assert torch.equal(parties[0].modules["head"].linear.weight, case.uncut().modules["head"].linear.weight)


def test_the_order_of_parties_does_not_matter():
    case = Case.of(relay(), COUNTS)
    assert difference(simulate(case.plan, case.parties()[::-1]), case.uncut()) == 0.0


def test_a_run_leaves_torch_as_it_was():
    case = single()
    outer, threads = torch.get_rng_state(), torch.get_num_threads()
    case.cut()
    assert torch.equal(torch.get_rng_state(), outer)
    assert torch.get_num_threads() == threads
    assert torch.is_grad_enabled()


def test_a_party_without_a_seed_does_not_disturb_the_others():
    """A party without a seed gets one of its own; those with one do not change."""
    case = single()
    parties = [replace(party, seed=None) if party.name == "server" else party for party in case.parties()]
    assert case.modules["head"].drop.p > 0
    results = [simulate(case.plan, copy.deepcopy(parties)) for _ in range(2)]
    states = [result.workers["a"].site.stages["head", 0].generator for result in results]
    assert torch.equal(*states)
    states = [result.workers["server"].site.stages["body", 0].generator for result in results]
    assert not torch.equal(*states)


def test_a_loss_may_be_a_function():
    case = single()
    called = [
        replace(party, modules={**party.modules, "loss": nn.functional.cross_entropy})
        if party.name == "server"
        else party
        for party in case.parties()
    ]
    assert difference(simulate(case.plan, called), case.uncut()) == 0.0


def accuracy() -> dict:
    return {"accuracy": MulticlassAccuracy(CLASSES, average="micro")}


@pytest.mark.parametrize("order", ["relay", "parallel"])
def test_metrics_of_replicas_are_those_of_all_samples(order):
    plan = relay(order=order, epochs=2, evaluate_every=1)
    case = Case.of(plan, COUNTS, modules=modules_for(plan, norm=False))
    parties = [replace(p, evaluation=p.data, metrics={"loss": accuracy} if p.data else {}) for p in case.parties()]
    result = simulate(plan, parties)
    rows = [row for row in result.history if row["mode"] == "evaluate" and row["round"] == 2]
    assert [row["party"] for row in rows] == ["a", "b", "c"]
    assert rows[0]["metrics"] == rows[1]["metrics"] == rows[2]["metrics"] == result.metrics()["loss"]
    model = nn.Sequential(*(case.uncut().modules[name] for name in ("head", "body", "tail"))).eval()
    x, y = (torch.cat([case.data[client][name] for client in "abc"]) for name in ("x", "y"))
    with torch.no_grad():
        output = model(x)
    assert result.metrics()["loss"]["accuracy"] == pytest.approx(float((output.argmax(1) == y).float().mean()))
    assert result.metrics()["loss"]["loss"] == pytest.approx(float(nn.functional.cross_entropy(output, y)), rel=1e-5)
    assert [(row["mode"], row["round"]) for row in result.history[::3]] == [
        ("train", 1),
        ("evaluate", 1),
        ("train", 2),
        ("evaluate", 2),
    ]


def test_notes_come_as_the_run_goes_on():
    case, notes = single(epochs=2), []
    simulate(case.plan, case.parties(), notify=lambda kind, details: notes.append((kind, details)))
    rounds = [(d["mode"], d["round"]) for kind, d in notes if kind == "round"]
    assert rounds == [("start", 0), ("train", 1), ("train", 2), ("finish", 2)]
    steps = [d for kind, d in notes if kind == "step" and d["party"] == "a" and (d["mode"], d["round"]) == ("train", 1)]
    assert [d["step"] for d in steps] == list(range(len(steps)))
    assert steps[0]["bytes"]["sent up 1"] == 8 * 6 * 4
    assert steps[2]["bytes"]["sent up 1"] == 6 * 6 * 4


def test_the_summary_is_for_people():
    case = single()
    parties = [
        replace(p, evaluation=p.data, metrics={"loss": accuracy} if p.name == "server" else {}) for p in case.parties()
    ]
    lines = simulate(case.plan, parties).summary().splitlines()
    assert lines[0].startswith("vanilla: ")
    assert [line.split()[0] for line in lines[1:]] == ["train", "evaluate", "a:", "server:"]
    assert "accuracy 0." in lines[2]


# --- prediction ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["relay", "parallel"])
@pytest.mark.parametrize("make", [relay, lambda **t: vanilla(["a", "b", "c"], "server", cut=C, output=C, **t)])
def test_predictions_come_in_the_order_of_the_data(make, order):
    """Lane after lane; without labels; the last microbatch smaller than the others."""
    plan = make(order=order, batch_size=5, microbatches=2)
    case = Case.of(plan, COUNTS)
    x = [case.data[client]["x"] for client in "abc"]
    parties = [
        replace(party, data=None, optimizer=plain, prediction=TensorTable(x=x["abc".index(party.name)]))
        if party.name in "abc"
        else replace(party, data=None)
        for party in case.parties()
    ]
    ends = plan.graph.outputs
    found = predict(plan, parties)
    assert list(found) == list(ends)
    model = nn.Sequential(*(copy.deepcopy(case.modules[s.name]) for s in plan.stages if not isinstance(s, Loss)))
    with torch.no_grad():
        expected = model.eval()(torch.cat(x))
    assert torch.allclose(found[ends[0]], expected, atol=1e-6)


def test_prediction_changes_nothing():
    case = single()
    parties = [replace(party, prediction=party.data) for party in case.parties()]
    before = copy.deepcopy(parties[0].modules["head"].state_dict())
    predict(case.plan, parties)
    assert all(torch.equal(before[k], v) for k, v in parties[0].modules["head"].state_dict().items())


def test_a_party_that_holds_only_labels_is_not_asked_for_them():
    plan = vertical({"a": C, "b": C}, "server", output=C)
    case = Case.of(plan)
    parties = [
        replace(party, prediction=TensorTable(x=case.data[party.name]["x"])) if party.name != "server" else party
        for party in case.parties()
    ]
    assert predict(plan, parties)["body"].shape == (22, CLASSES)


# --- what is wrong ---------------------------------------------------------------------------------------------------


def changed(case: Case, name: str, **changes: object) -> list:
    return [replace(party, **changes) if party.name == name else party for party in case.parties()]


def test_the_parties_must_be_those_of_the_plan():
    case = single()
    for parties in (case.parties()[:1], [*case.parties(), replace(case.parties()[0], name="z")], case.parties() * 2):
        error = raises(ConfigError, "E225", lambda parties=parties: simulate(case.plan, parties))
        assert error.expected == "a, server"


def test_each_stage_needs_a_module():
    case = single()
    error = raises(ConfigError, "E223", lambda: simulate(case.plan, changed(case, "a", modules={})))
    assert "party 'a' has no module for stage 'head'" in str(error)
    assert error.where == "party a, stage head"
    extra = {"head": nn.Identity(), "hed": nn.Identity()}
    error = raises(ConfigError, "E223", lambda: simulate(case.plan, changed(case, "a", modules=extra)))
    assert "stages that are not its own: hed" in str(error)


def test_parameters_need_an_optimizer():
    case = single()
    error = raises(ConfigError, "E221", lambda: simulate(case.plan, changed(case, "a", optimizer=None)))
    assert "frozen=True" in error.remedy


def test_training_needs_data():
    case = single()
    raises(DataError, "E252", lambda: simulate(case.plan, changed(case, "a", data=None)))


def test_parties_of_one_lane_need_the_same_samples():
    plan = vertical({"a": C, "b": C}, "server", output=C)
    case = Case.of(plan)
    short = TensorTable(x=case.data["b"]["x"][:20])
    error = raises(DataError, "E251", lambda: simulate(plan, changed(case, "b", data=short)))
    assert "b: 20" in error.got
    assert error.remedy == "align the data by identifier first"
    error = raises(DataError, "E251", lambda: simulate(plan, changed(case, "b", data=None)))
    assert error.remedy == "nothing is given at b: give Party(data=...) there too"
    roster = Roster({"train": {"a": 40, "b": 0, "server": 40}})
    error = raises(DataError, "E251", lambda: compile_plan(plan, roster))
    assert error.remedy.startswith("0 samples are given at b: look at what they are read from")


@pytest.mark.parametrize(
    ("mode", "name", "names"), [("evaluate", "evaluation", "b, server"), ("predict", "prediction", "b")]
)
def test_data_that_one_party_alone_is_given_is_named(mode, name, names):
    plan = vertical({"a": C, "b": C}, "server", output=C)
    case = Case.of(plan)
    given, told = TensorTable(**case.data["a"]), []
    parties = changed(case, "a", **{name: given})
    error = raises(DataError, "E251", lambda: simulate(plan, parties, notify=lambda *event: told.append(event)))
    assert not told  # before the first step: no training is lost
    assert error.where == f"mode {mode}, lane 0"
    assert f"nothing is given at {names}: give Party({name}=...) there too" in error.remedy
    assert "or give it at no party: a training does not need it" in error.remedy


def test_the_data_must_have_the_fields_of_the_plan():
    case = single()
    table = TensorTable(x=case.data["a"]["x"])
    error = raises(DataError, "E253", lambda: simulate(case.plan, changed(case, "a", data=table)))
    assert "no usable field 'y'" in str(error)
    assert "train round 1, batch 0" in error.where


def test_an_error_of_the_data_names_the_party_and_what_for():
    case = single()
    uneven = [{"x": torch.zeros(size), "y": torch.zeros(())} for size in (2, 3)]
    error = raises(DataError, "E253", lambda: simulate(case.plan, changed(case, "a", data=uneven)))
    assert error.where == "party a, train round 1, batch 0: a batch of the data set"
    error = raises(DataError, "E255", lambda: simulate(case.plan, changed(case, "a", data=iter(()))))
    assert error.where == "party a: the data set"
    loader = DataLoader(uneven, batch_size=1)
    error = raises(DataError, "E256", lambda: simulate(case.plan, changed(case, "a", evaluation=loader)))
    assert error.where == "party a, data to evaluate: the loader"


def test_a_label_of_another_dtype_does_not_leave():
    case = single()
    table = TensorTable(x=case.data["a"]["x"], y=case.data["a"]["y"].int())
    error = raises(ContractError, "E522", lambda: simulate(case.plan, changed(case, "a", data=table)))
    assert "cut data.y->loss" in error.where
    assert error.got == "int32[8] instead of int64[8]"


def test_a_stage_must_give_what_the_plan_says():
    case = single()
    modules = {"head": nn.Linear(FEATURES, 7)}
    error = raises(StageError, "E301", lambda: simulate(case.plan, changed(case, "a", modules=modules)))
    assert "got float32[8, 7] instead of float32[8, 6]" in str(error)
    assert error.where == "party a, train round 1, microbatch 0: stage head, inputs of shapes [[8, 5]]"
    modules = {"head": nn.Linear(FEATURES + 1, 6)}
    error = raises(StageError, "E304", lambda: simulate(case.plan, changed(case, "a", modules=modules)))
    assert "stage 'head' failed in its forward" in str(error)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_does_not_cross(bad):
    case = single()

    class Bad(nn.Linear):
        def forward(self, value):
            return super().forward(value) * bad

    modules = {"head": Bad(FEATURES, 6)}
    error = raises(NonFiniteError, "E351", lambda: simulate(case.plan, changed(case, "a", modules=modules)))
    assert "cut head->body" in error.where
    unchecked = [replace(p, finite=False) for p in changed(case, "a", modules={"head": Bad(FEATURES, 6)})]
    simulate(case.plan, unchecked)


def test_a_metric_that_would_send_samples_is_refused():
    case = Case.of(relay(), COUNTS)
    error = raises(
        ConfigError,
        "E222",
        lambda: simulate(case.plan, changed(case, "a", metrics={"loss": lambda: {"least": MinMetric()}})),
    )
    assert error.where == "party a: loss loss, metric least"


def test_replicas_with_other_modules_are_refused():
    case = Case.of(relay(), COUNTS)
    other = {**case.parties()[1].modules, "head": nn.Linear(FEATURES, 6)}
    error = raises(ContractError, "E524", lambda: simulate(case.plan, changed(case, "b", modules=other)))
    assert "exchange hand_on of head, from a" in error.where


def test_one_party_may_be_the_whole_plan():
    stages = [Stage("head", at="a", inputs=["data.x"], output=C), Loss("loss", at="a", inputs=["head", "data.y"])]
    case = Case.of(Plan(stages), optimizer=adam)
    result = case.cut()
    assert difference(result, case.uncut()) == 0.0
    assert result.ledgers["a"].flows == {}


# --- deadlock --------------------------------------------------------------------------------------------------------


def tag(step: int) -> Tag:
    return Tag(0, "train", 1, step, 0, 0, 0, "up")


def frame(step: int) -> Frame:
    return Frame(tag(step), "bytes", (1,), b"x")


@pytest.mark.provokes("E402")
def test_a_deadlock_is_explained():
    def first():
        yield Post("b", frame(0))
        yield Take("b", tag(7))

    def second():
        yield Take("a", tag(0))
        yield Take("a", tag(1))

    error = raises(ProgramError, "E402", lambda: run_together({"a": first(), "b": second()}, lambda *_: None))
    assert "a waits for b: Tag(session=0, mode='train', round=1, step=7" in error.where
    assert "b waits for a: Tag(session=0, mode='train', round=1, step=1" in error.where


def test_a_party_that_ended_leaves_others_waiting():
    def first():
        yield from ()

    def second():
        yield Take("a", tag(0))

    error = raises(ProgramError, "E402", lambda: run_together({"a": first(), "b": second()}, lambda *_: None))
    assert "b waits for a" in error.where
    assert "a waits" not in error.where


@pytest.mark.provokes("E403")
@pytest.mark.parametrize("number", [1, 2])
def test_a_frame_that_nobody_takes_is_an_error(number):
    def first():
        for _ in range(number):
            yield Post("b", frame(0))

    def second():
        yield from ()

    error = raises(ContractError, "E403", lambda: run_together({"a": first(), "b": second()}, lambda *_: None))
    assert ("one frame twice" if number == 2 else "never took") in str(error)


def test_generators_are_closed_when_one_fails():
    closed = []

    def first():
        try:
            yield Take("b", tag(0))
        finally:
            closed.append("a")

    def second():
        yield Post("a", frame(3))
        raise ValueError("broken")

    outer = torch.get_rng_state()
    with pytest.raises(ValueError, match="broken") as caught:
        run_together({"a": first(), "b": second()}, lambda *_: None)
    assert closed == ["a"]  # now, not when the error with its frames is forgotten
    assert caught.traceback
    assert torch.equal(torch.get_rng_state(), outer)


def test_a_receiver_may_write_into_what_it_gets():
    """The sender's bytes are its own: in one process too, a frame is copied."""
    payload, seen = bytearray(b"abc"), []

    def first():
        yield Post("b", Frame(tag(0), "bytes", (3,), payload))

    def second():
        got = yield Take("a", tag(0))
        got.payload[0] = 0
        seen.append(bytes(got.payload))

    run_together({"a": first(), "b": second()}, lambda *_: None)
    assert seen == [b"\x00bc"]
    assert payload == b"abc"
