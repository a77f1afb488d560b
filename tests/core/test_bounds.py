"""Mailbox bounds hold in the worst interleaving, and are not idle."""

from __future__ import annotations

from collections import Counter

import pytest

import cutlayer as cl
from cutlayer.core.bounds import mailbox_bounds
from cutlayer.core.compile import Roster, compile_plan
from cutlayer.core.program import Credit, Recv, Send

U = {"cut": "float32[batch, 5]", "back": "float32[batch, 4]", "output": "float32[batch, 3]"}


def _flat(program):
    step, found = 0, []
    for block in program.blocks:
        for _ in range(block.repeat):
            found += [(step, instruction) for instruction in block.instructions]
            step += 1
    return found, step


def _worst(programs, mode, sender, receiver):
    """Run everyone but the receiver as far as possible, the receiver only when all else is stuck: largest backlog."""
    flats = {party: _flat(modes[mode])[0] for party, modes in programs.items()}
    total = _flat(programs[sender][mode])[1]
    place, mail, worst = dict.fromkeys(flats, 0), Counter(), 0

    def advance(party):
        step, job = flats[party][place[party]]
        if isinstance(job, Recv):
            key = (job.source, party, step, job.edge, job.lane, job.micro, job.direction)
            if not mail[key]:
                return False
            mail[key] -= 1
        elif isinstance(job, Send):
            mail[party, job.to, step, job.edge, job.lane, job.micro, job.direction] += 1
        elif isinstance(job, Credit) and job.give:
            mail[party, job.peer, step, "credit"] += step + job.lag < total
        elif isinstance(job, Credit) and step >= job.lag:
            if not mail[job.peer, party, step - job.lag, "credit"]:
                return False
            mail[job.peer, party, step - job.lag, "credit"] -= 1
        place[party] += 1
        return True

    eager = [party for party in flats if party != receiver]
    while any(place[party] < len(flats[party]) for party in flats):
        moved = False
        for party in [*eager, receiver]:
            while place[party] < len(flats[party]) and (party != receiver or not moved) and advance(party):
                backlog = sum(n for key, n in mail.items() if key[:2] == (sender, receiver) and key[-1] != "credit")
                worst, moved = max(worst, backlog), True
        assert moved, "deadlock"
    return worst


@pytest.mark.parametrize("schedule", ["sequential", "gpipe", "1f1b"])
@pytest.mark.parametrize("microbatches", [1, 3])
def test_no_interleaving_exceeds_the_bound(schedule, microbatches):
    plans = [
        cl.u_shaped("a", "s", batch_size=6, microbatches=microbatches, schedule=schedule, **U),
        cl.vanilla(
            "a", "s", cut=U["cut"], output=U["output"], batch_size=6, microbatches=microbatches, schedule=schedule
        ),
    ]
    for plan in plans:
        programs = compile_plan(plan, Roster({"train": {"a": 40}, "evaluate": {"a": 40}, "predict": {"a": 70}}))
        bounds = mailbox_bounds(programs, plan.training.window)
        for mode in ("train", "evaluate", "predict"):
            for sender, receiver in (("a", "s"), ("s", "a")):
                assert _worst(programs, mode, sender, receiver) <= bounds[sender, receiver]


def test_one_way_traffic_is_bounded_by_the_window_not_by_the_data():
    def bound(samples, window):
        plan = cl.vanilla("a", "s", cut=U["cut"], output=U["output"], batch_size=1, window=window)
        return mailbox_bounds(compile_plan(plan, Roster({"predict": {"a": samples}})), window)["a", "s"]

    assert bound(100, 4) == bound(10_000, 4)
    assert bound(10_000, 4) < bound(10_000, 8) < 40
