"""What a recording proxy sees is what the ledger says, byte for byte; and no raw value is in it."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.run import plans
from tests.run.cluster import cluster
from tests.run.tap import Tap, data_frames

pytestmark = pytest.mark.timeout(120)


def _recorded(case, tmp_path):
    """Run client and server with a tap between them; return ledgers and the two recorded directions."""
    with cluster(case, tmp_path, listening=["server"], secure=False) as running:
        host, port = running.addresses["server"].split(":")
        with Tap((host, int(port))) as tap:
            running.start("server")
            running.start("alpha", addresses={"server": f"127.0.0.1:{tap.port}"})
            assert set(running.wait_all(100).values()) == {0}, running.logs()
        return running.results(), {way: [bytes(s) for s in streams] for way, streams in tap.recorded.items()}


def _ledger(result, way):
    rows = [flow for flow in result["ledger"]["flows"] if flow["way"] == way]
    counts = Counter()
    for row in rows:
        for part in ("payload", "framing", "messages"):
            counts[row["mode"], row["direction"], row["edge"], part] += row[part]
    return +counts


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    return _recorded("u_shaped", tmp_path_factory.mktemp("guarded"))


def test_ledger_equals_what_the_proxy_counts(guarded):
    results, recorded = guarded
    for way, direction in (("sent", "out"), ("received", "back")):
        seen = Counter()
        for stream in recorded[direction]:
            seen += data_frames(stream)[0]
        assert seen == _ledger(results["alpha"], way)
    assert _ledger(results["alpha"], "sent") == _ledger(results["server"], "received")
    assert _ledger(results["server"], "sent") == _ledger(results["alpha"], "received")


def _hits(streams):
    """Count the samples whose raw feature bytes are somewhere in the recorded payloads or streams."""
    rows = plans._table(slice(None)).fields["x"]
    whole = b"".join(data_frames(stream)[1] for stream in streams) + b"".join(streams)
    return sum(row.numpy().tobytes() in whole for row in rows)


def test_no_raw_sample_is_on_the_wire(guarded, tmp_path):
    assert _hits(guarded[1]["out"] + guarded[1]["back"]) == 0
    _, leaking = _recorded("raw", tmp_path)  # the control: here the plan releases the inputs
    assert _hits(leaking["out"]) == plans.ROWS
