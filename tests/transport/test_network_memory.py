"""A tensor of 64 MB costs little more than its own size, at its receiver and at its sender."""

from __future__ import annotations

import pytest

from tests.transport.parties import Cast

pytestmark = pytest.mark.timeout(90)
SIZE = 64 * 10**6
STEPS = 4


@pytest.mark.parametrize("relayed", [False, True], ids=["direct", "relayed"])
@pytest.mark.parametrize("secure", [pytest.param(False, marks=pytest.mark.slow), True], ids=["plain", "mtls"])
def test_peak_memory(spawn, cast: Cast, secure: bool, relayed: bool):
    source, target = ("clinic", "lab") if relayed else ("clinic", "server")
    cast.names = ("server", "clinic", "lab") if relayed else ("server", "clinic")
    if secure:
        cast.certify()
    cast.settings("server")
    common = {
        "names": cast.names,
        "addresses": cast.addresses,
        "certificates": str(cast.folder) if secure else "",
        "steps": STEPS,
        "size": SIZE,
        "source": source,
        "target": target,
    }
    plays = dict.fromkeys(cast.names, "stand by") | {source: "send", target: "receive"}
    actors = {name: spawn(**common, party=name, play=play) for name, play in plays.items()}
    assert {name: actor.end(60) for name, actor in actors.items()} == dict.fromkeys(actors, 0)
    received = [line for line in actors[target].lines if line["what"] == "grown"]
    sent = [line for line in actors[source].lines if line["what"] == "grown"]
    assert len(received) == len(sent) == STEPS - 1
    assert all(line["good"] for line in received)
    assert min(line["bytes"] for line in received) > 0.8 * SIZE  # the measurement sees the tensor itself
    assert [line["bytes"] for line in received if line["bytes"] > 1.5 * SIZE] == []
    # a sealed tensor is kept sealed until it is acknowledged, at most a window of it
    assert [line["bytes"] for line in sent if line["bytes"] > (1.1 if secure and relayed else 0.5) * SIZE] == []
