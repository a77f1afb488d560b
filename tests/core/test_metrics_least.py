"""Sums behind metrics are of enough samples of a party, or no run begins (E264)."""

import pytest

from cutlayer.core.compile import Roster, compile_plan
from cutlayer.core.program import Exchange
from cutlayer.core.topologies import u_shaped, vanilla
from cutlayer.errors import DataError, PlanError

C = "float32[batch, 3]"


def compiled(train, evaluate=(), at=("a", "c"), **training):
    plan = u_shaped(list(at), "b", cut=C, back=C, output=C, **training)
    counts = {"train": dict(zip(at, train, strict=True)), "evaluate": dict(zip(at, evaluate, strict=bool(evaluate)))}
    return compile_plan(plan, Roster(counts))


def told(programs):
    """Return who tells others sums behind metrics, in which modes."""
    return {
        (party, mode)
        for party, modes in programs.items()
        for mode, program in modes.items()
        for block in program.blocks
        for job in block.instructions
        if isinstance(job, Exchange) and job.name == "add_metrics" and len(set(job.group)) > 1
    }


@pytest.mark.provokes("E264")
@pytest.mark.parametrize(
    ("train", "evaluate", "training", "where", "got"),
    [
        ((10, 10), (10, 4), {}, "evaluate rounds, loss loss, at a, c", "4 of c"),
        ((3, 2), (), {}, "train rounds, loss loss, at a, c", "3 of a, 2 of c"),
        ((10, 7), (), {"drop_last": True, "batch_size": 4}, "train rounds, loss loss, at a, c", "4 of c"),
        ((10, 10), (10, 10), {"metrics_least": 11}, "train rounds, loss loss, at a, c", "10 of a, 10 of c"),
    ],
)
@pytest.mark.parametrize("order", ["relay", "parallel"])
def test_sums_over_few_samples_of_a_party_are_refused(order, train, evaluate, training, where, got):
    with pytest.raises(DataError) as caught:
        compiled(train, evaluate, order=order, **training)
    error = caught.value
    assert (error.code, error.where, error.got) == ("E264", where, got)
    evaluating = where.startswith("evaluate")
    least = f"at least {training.get('metrics_least', 5)} samples at each"
    assert error.expected == least + (", or none" if evaluating else "")
    assert ("Party(evaluation=...)" if evaluating else "Party(data=...)") in error.remedy


def test_enough_none_or_a_lower_limit_are_not():
    assert told(compiled((5, 5), (5, 0)))
    assert told(compiled((7, 5), (6, 5), drop_last=True, batch_size=5))  # an evaluation drops nothing
    assert told(compiled((1, 2), (1, 1), metrics_least=1))


def test_what_no_other_party_is_told_of_has_no_limit():
    """One client, or several replicas at one party: their sums stay there. A loss at the server has its own labels."""
    assert not told(compiled((2,), (1,), at=("a",)))
    plan = vanilla(["a", "c"], "b", cut=C, output=C)
    assert not told(compile_plan(plan, Roster({"train": {"a": 2, "c": 1}})))


def test_the_plan_says_so():
    def lines(least):
        plan = u_shaped(["a", "c"], "b", cut=C, back=C, output=C, metrics_least=least)
        return [line for line in str(plan).splitlines() if "behind the metrics" in line]

    assert "(at least 7: how many of each label, not whose)" in lines(7)[0]
    assert "(of one they tell its label)" in lines(1)[0]


def test_the_limit_is_a_number_of_samples():
    with pytest.raises(PlanError, match="metrics_least") as caught:
        compiled((5, 5), metrics_least=0)
    assert caught.value.code == "E110"
