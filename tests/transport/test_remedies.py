"""What to do when a party is not there: only a training is resumed, and a client can start nothing at a server."""

from __future__ import annotations

from typing import Any

import pytest

from cutlayer.transport.remedies import when_absent, when_left, when_lost
from cutlayer.transport.settings import NetworkSettings


def settings(task: Any, party: str) -> NetworkSettings:
    parties = ("ward", "cloud")
    return NetworkSettings(
        party=party,
        parties=parties,
        coordinator="cloud",
        addresses={"cloud": "127.0.0.1:7"},
        run="r",
        digest="d",
        task=task,
    )


@pytest.mark.parametrize(
    ("task", "party", "lost", "left", "absent"),
    [
        ("training", "ward", "then all others, with resume", "all parties with resume", "deadlines.join"),
        ("prediction", "ward", "run the prediction again at all", "again at all parties", "deadlines.join"),
        ("served", "ward", "ask the operator of cloud", "ask the operator of cloud", "`cutlayer serve` runs there"),
        ("served", "cloud", "let ward run the prediction", "let ward run the prediction", "deadlines.join"),
    ],
)
def test_what_to_do_follows_from_what_is_run(task: str, party: str, lost: str, left: str, absent: str):
    here, other = settings(task, party), "ward" if party == "cloud" else "cloud"
    told = [when_lost(here, other), when_left(here, other), when_absent(here, other, "join")]
    for text, part in zip(told, (lost, left, absent), strict=True):
        assert part in text
        assert ("resume" in text) == (task == "training" and text != told[2])
