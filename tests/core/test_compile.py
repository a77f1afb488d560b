"""Programs: projections of one total order, with a receive for each send, no deadlock, and bounded leads."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cutlayer.core.compile import Roster, agenda, compile_plan
from cutlayer.core.parts import Loss, Release, Stage, Training
from cutlayer.core.plan import Plan
from cutlayer.core.program import MODES, Backward, Checkpoint, Credit, Exchange, Forward, Load, Recv, Send, Step
from cutlayer.core.topologies import u_shaped, vanilla, vertical
from cutlayer.errors import DataError, PlanError
from tests.drawing import DryRun, first, replicated_plans, roster_for, unrolled
from tests.small import TOPOLOGIES, C, float32

COUNTS = st.lists(st.integers(0, 14), min_size=3, max_size=3).filter(any)


@settings(max_examples=50)
@given(replicated_plans(), COUNTS)
def test_programs_match_each_other(plan, counts):
    """Same blocks at all parties; a receive for each send, of the same size, in the same step; and the reverse."""
    counts = counts[: plan.lanes] if any(counts[: plan.lanes]) else [7] * plan.lanes
    programs = compile_plan(plan, roster_for(plan, counts, evaluation=counts))
    for mode in MODES:
        shapes = {tuple((b.name, b.repeat) for b in modes[mode].blocks) for modes in programs.values()}
        assert len(shapes) == 1
        sends, receives, shared = Counter(), Counter(), {}
        for party, jobs in unrolled(programs, mode).items():
            for step, job in jobs:
                if isinstance(job, Send):
                    sends[party, job.to, step, job.edge, job.lane, job.micro, job.direction, job.size] += 1
                elif isinstance(job, Recv):
                    receives[job.source, party, step, job.edge, job.lane, job.micro, job.direction, job.size] += 1
                    assert job.spec == plan.graph.edges[job.edge].spec
                elif isinstance(job, Credit):
                    way = (party, job.peer) if job.give else (job.peer, party)
                    shared.setdefault(("credit", step, way, job.lag), []).append(job.give)
                elif isinstance(job, Exchange):
                    shared.setdefault((step, job), []).append(party)
        assert sends == receives
        assert set(sends.values()) <= {1}
        for key, members in shared.items():
            expected = [True, False] if key[0] == "credit" else sorted(set(key[1].group))
            assert sorted(members) == sorted(expected)


@settings(max_examples=25)
@given(replicated_plans(), COUNTS, st.randoms(use_true_random=False))
def test_no_interleaving_can_end_in_a_deadlock(plan, counts, dice):
    """Whoever goes on first; to the end of training, evaluation and prediction, and nothing is left in the mail."""
    counts = counts[: plan.lanes] if any(counts[: plan.lanes]) else [7] * plan.lanes
    roster = roster_for(plan, counts, evaluation=counts)
    favourites = sorted(plan.parties, key=lambda _: dice.random())
    orders = [dice.choice, lambda ready: min(ready, key=favourites.index)]
    posted = []
    for choose in orders:
        run = DryRun(plan, roster, [*agenda(plan, roster), ("predict", 0)])
        run.run(choose)
        posted.append(Counter((sender, to, frame.tag) for sender, to, frame in run.posted))
    assert posted[0] == posted[1]


@settings(max_examples=30)
@given(replicated_plans(), COUNTS)
def test_each_party_does_its_part_of_the_schedule(plan, counts):
    """All forwards and backwards of a round, each once, at the party of its stage."""
    counts = counts[: plan.lanes] if any(counts[: plan.lanes]) else [7] * plan.lanes
    programs = compile_plan(plan, roster_for(plan, counts))
    done: Counter = Counter()
    samples: Counter = Counter()
    for party, jobs in unrolled(programs, "train").items():
        for _, job in jobs:
            if isinstance(job, Forward | Backward):
                assert plan.graph.place(job.stage, job.lane) == party
                done[type(job), job.stage, job.lane] += 1
            if isinstance(job, Forward):
                samples[job.stage, job.lane] += job.size
            if isinstance(job, Load):
                samples["load", party, job.lane] += sum(job.sizes)
    for stage in plan.stages:
        for lane, count in enumerate(counts):
            assert samples[stage.name, lane] == count
            forwards, backwards = done[Forward, stage.name, lane], done[Backward, stage.name, lane]
            assert backwards == (forwards if plan.graph.trained[stage.name] else 0)
    for lane, count in enumerate(counts):
        assert all(samples["load", party, lane] == count for party in plan.graph.data_fields(lane))


def test_the_gradient_of_a_loss_is_its_share_of_the_samples():
    stages = [
        Stage("head", at="a", inputs=["data.x"], output=C),
        Loss("mean", at="a", inputs=["head", "data.y"], weight=0.5),
        Loss("sum", at="a", inputs=["head", "data.y"], weight=0.5, reduction="sum"),
    ]
    plan = Plan(stages, training=Training(batch_size=5, microbatches=2))
    block = compile_plan(plan, Roster({"train": {"a": 5}}))["a"]["train"].blocks[0]
    scales = {(job.stage, job.micro): job.scale for job in block.instructions if isinstance(job, Backward)}
    assert scales == {
        ("mean", 0): 0.5 * 3 / 5,
        ("mean", 1): 0.5 * 2 / 5,
        ("sum", 0): 0.5,
        ("sum", 1): 0.5,
        ("head", 0): 1.0,
        ("head", 1): 1.0,
    }


# --- how far ahead ---------------------------------------------------------------------------------------------------


def one_way(window: int, **training: object) -> Plan:
    """A client whose frozen head sends and gets nothing back."""
    stages = [
        Stage("head", at="a", inputs=["data.x"], output=C, frozen=True),
        Stage("body", at="b", inputs=["head"], output=C),
        Loss("loss", at="b", inputs=["body", "data.y@a"]),
    ]
    release = Release("y", at="a", to="b", spec="int64[batch]")
    return Plan(stages, training=Training(batch_size=1, window=window, **training), releases=[release])


def largest_lead(plan: Plan, roster: Roster, phases: list[tuple[str, int]]) -> int:
    """Let the client run whenever it can, the server only when it cannot. In steps whose values wait in the mail."""
    run, lead = DryRun(plan, roster, phases), 0

    def watch() -> None:
        nonlocal lead
        waiting = {(tag.mode, tag.round, tag.step) for _, to, tag in run.mail if to == "b" and tag.direction == "up"}
        lead = max(lead, len(waiting))

    run.run(first, watch)
    return lead


@pytest.mark.parametrize("window", [1, 3, 20])
@pytest.mark.parametrize(
    "phases",
    [
        [("train", 1)],
        [("train", 1), ("train", 2), ("train", 3)],
        [("evaluate", 1)],
        [("predict", 0)],
        [("train", 1), ("evaluate", 1), ("train", 2), ("predict", 0)],
    ],
    ids=str,
)
def test_a_sender_is_at_most_a_window_ahead(window, phases):
    """Exactly: it is not kept waiting without need. Not even from one round to the next can it be further ahead."""
    plan = one_way(window)
    assert largest_lead(plan, roster_for(plan, (9,), evaluation=(9,)), phases) == min(window, 9)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 30])
@pytest.mark.parametrize("every", [0, 1, 2])
def test_each_credit_given_is_taken(count, every):
    """However the number of steps, the window and the checkpoints fall together."""
    for window in (1, 2, 4):
        plan = one_way(window, checkpoint_every=every, epochs=2)
        run = DryRun(plan, roster_for(plan, (count,), evaluation=(count,)))
        run.run(first)  # fails if a frame is left in the mail
        credits = [frame for sender, _, frame in run.posted if frame.tag.direction == "credit"]
        assert len(credits) == 3 * count


def test_two_way_pairs_need_no_credits():
    plan = u_shaped("a", "b", cut=C, back=C, output=C)
    programs = compile_plan(plan, roster_for(plan, (64,), evaluation=(64,)))
    for mode in ("train", "evaluate"):
        assert not any(isinstance(job, Credit) for jobs in unrolled(programs, mode).values() for _, job in jobs)
    assert any(isinstance(job, Credit) for _, job in unrolled(compile_one_way(), "train")["a"])


def compile_one_way() -> dict:
    plan = one_way(2)
    return compile_plan(plan, roster_for(plan, (4,)))


# --- modes, rosters, digests -----------------------------------------------------------------------------------------


def test_the_agenda():
    plan = one_way(1, epochs=3, evaluate_every=2)
    train = {"train": {"a": 4}}
    assert agenda(plan, Roster(train)) == [("start", 0), ("train", 1), ("train", 2), ("train", 3), ("finish", 3)]
    both = Roster({**train, "evaluate": {"a": 4}})
    rounds = [("start", 0), ("train", 1), ("train", 2), ("evaluate", 2), ("train", 3), ("evaluate", 3)]
    assert agenda(plan, both) == rounds
    assert agenda(plan.with_training(evaluate_every=0), both) == [r for r in rounds if r != ("evaluate", 2)]
    assert agenda(plan.with_training(evaluate_every=3), both).count(("evaluate", 3)) == 1


@pytest.mark.provokes("E252")
def test_training_needs_data():
    with pytest.raises(
        DataError, match=r"no party has data to train on.*give the parties of the plan their data"
    ) as caught:
        agenda(one_way(1), Roster({"evaluate": {"a": 4}, "train": {"a": 0}}))
    assert caught.value.code == "E252"
    assert caught.value.where == "plan 'plan', data of a"


@pytest.mark.provokes("E252")
def test_a_data_set_that_is_given_must_not_be_empty():
    plan = vanilla(["a", "b"], "s", cut=C, output=C)
    with pytest.raises(DataError, match=r"the training data of b are empty.*got a: 4, b: 0.*filtered out") as caught:
        agenda(plan, Roster({"train": {"a": 4, "b": 0}}))
    assert caught.value.code == "E252"
    assert agenda(plan, Roster({"train": {"a": 4}})), "who gives none is left out"


@pytest.mark.provokes("E251")
def test_parties_of_one_lane_hold_the_same_samples():
    plan = vertical({"a": C, "b": C}, "s", output=C)
    with pytest.raises(DataError) as caught:
        compile_plan(plan, Roster({"train": {"a": 4, "b": 4, "s": 5}}))
    assert caught.value.code == "E251"
    assert "a: 4, b: 4, s: 5" in caught.value.got


@pytest.mark.provokes("E111")
def test_one_party_cannot_hold_the_data_of_two_lanes():
    plan = vanilla(["a", "b"], "s", cut=C, output=C)
    assert Roster({"train": {"a": 4, "b": 6}}).lane_counts(plan.graph, "train") == (4, 6)
    with pytest.raises(PlanError, match=r"'a' would hold the data of several replicas.*replicate the stages") as caught:
        Roster({"train": {"a": 4}}).lane_counts(vanilla(["a", "a"], "s", cut=C, output=C).graph, "train")
    assert caught.value.code == "E111"


def test_a_prediction_needs_no_labels():
    """Neither a field that only a loss takes, nor a party that holds nothing else."""
    plan = vertical({"a": C, "b": C}, "s", output=C)
    programs = compile_plan(plan, Roster({"train": {"a": 4, "b": 4, "s": 4}, "predict": {"a": 9, "b": 9}}))
    loads = [job for jobs in unrolled(programs, "predict").values() for _, job in jobs if isinstance(job, Load)]
    assert {job.fields for job in loads} == {("x",)}
    assert sum(sum(job.sizes) for job in loads) == 2 * 9
    plan = vanilla("a", "s", cut=C, output=C)
    predict = unrolled(compile_plan(plan, roster_for(plan, (4,))), "predict")
    assert [job.fields for _, job in predict["a"] if isinstance(job, Load)] == [("x",)]
    assert not any(isinstance(job, Backward | Step) for jobs in predict.values() for _, job in jobs)


def test_a_prediction_sends_what_a_loss_alone_would_have_sent_first():
    """The loss is the first that takes the head's value to the server; without losses the body still gets it."""
    stages = [
        Stage("head", at="a", inputs=["data.x"], output=C),
        Loss("near", at="s", inputs=["head"]),
        Stage("body", at="s", inputs=["head"], output=C),
        Loss("far", at="s", inputs=["body"]),
    ]
    plan = Plan(stages)
    roster = roster_for(plan, (40,))
    DryRun(plan, roster, [("predict", 0)]).run(first)
    predict = unrolled(compile_plan(plan, roster), "predict")
    sent = [(plan.graph.edges[job.edge].origin, job.size) for _, job in predict["a"] if isinstance(job, Send)]
    assert sent == [("head", 32), ("head", 8)]
    assert [job.size for _, job in predict["s"] if isinstance(job, Forward) and job.stage == "body"] == [32, 8]


def test_prediction_and_evaluation_use_every_sample():
    plan = u_shaped("a", "b", cut=C, back=C, output=C, batch_size=4, drop_last=True)
    programs = compile_plan(plan, roster_for(plan, (10,), evaluation=(7,)))
    counts = {
        mode: sum(job.size for _, job in unrolled(programs, mode)["b"] if isinstance(job, Forward))
        for mode in ("train", "evaluate", "predict")
    }
    assert counts == {"train": 8, "evaluate": 7, "predict": 10}


def test_checkpoints():
    """Every so many steps, at the end of each turn of a relay and of each round; numbered without gaps."""
    plan = u_shaped(["a", "c"], "b", cut=C, back=C, output=C, batch_size=1, checkpoint_every=2, metrics_least=2)
    programs = compile_plan(plan, roster_for(plan, (5, 2)))
    for party in plan.parties:
        jobs = [(step, job) for step, job in unrolled(programs, "train")[party] if isinstance(job, Checkpoint)]
        assert [job.last for _, job in jobs] == [False] * 6 + [True]
        assert [job.number for _, job in jobs] == list(range(jobs[0][1].number, jobs[0][1].number + 7))


def test_a_program_is_short_however_long_the_round():
    plan = u_shaped(["a", "c"], "b", cut=C, back=C, output=C, batch_size=10, order="parallel")
    short, long = (
        [len(str(p["train"]).splitlines()) for p in compile_plan(plan, roster_for(plan, (n, n))).values()]
        for n in (100, 100_000)
    )
    assert short == long


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_digests_depend_on_the_plan_and_the_roster(name):
    plan = TOPOLOGIES[name](batch_size=8)
    programs = {
        "same": (TOPOLOGIES[name](batch_size=8), 22),
        "other batch": (plan.with_training(batch_size=9), 22),
        "other schedule": (plan.with_training(schedule="1f1b", microbatches=2), 22),
        "other roster": (plan, 23),
    }
    digests = {
        key: tuple(modes["train"].digest() for modes in compile_plan(made, roster_for(made, (count,))).values())
        for key, (made, count) in programs.items()
    }
    own = tuple(modes["train"].digest() for modes in compile_plan(plan, roster_for(plan, (22,))).values())
    assert digests.pop("same") == own
    assert len(set(own)) == len(own)
    for other in digests.values():
        assert not set(other) & set(own)


def test_widths_are_part_of_the_program():
    """A sender and a receiver that disagree on the shape have different digests at the receiver."""
    plans = [vanilla("a", "b", cut=float32(width), output=C) for width in (4, 5)]
    digests = [compile_plan(plan, roster_for(plan, (8,)))["b"]["train"].digest() for plan in plans]
    assert digests[0] != digests[1]
