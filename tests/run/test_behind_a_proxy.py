"""A whole run with a party behind a real proxy: the bits, the bytes and the metrics of a run without one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.proxies import real_proxy
from tests.run.cluster import cluster, flows, in_process

pytestmark = pytest.mark.timeout(170)


@pytest.mark.parametrize(
    ("case", "listening", "behind"),
    [("u_shaped", "server", ["alpha"]), ("relay", "server", ["beta", "gamma"]), ("vertical", "registry", ["clinic"])],
)
def test_same_bits_and_bytes_as_without_it(case: str, listening: str, behind: list[str], tmp_path: Path):
    with (
        real_proxy(tmp_path, "BasicAuth doctor s3cr3t-W0rd") as proxy,
        cluster(case, tmp_path, listening=[listening]) as running,
    ):
        assert set(behind) < set(running.parties)
        for party in running.parties:
            setting = f"http://doctor:s3cr3t-W0rd@{proxy.address}" if party in behind else "none"
            running.start(party, proxy=setting)
        assert set(running.wait_all().values()) == {0}, running.logs()
        done = running.results()
        assert set(proxy.connects()) == {running.addresses[listening]}
        assert len(proxy.connects()) >= len(behind)  # more where a party was there before the server
        assert "s3cr3t" not in running.logs()
    alone = in_process(case)
    for party, result in done.items():
        assert result["sha256"] == alone[party]["sha256"], f"other weights at {party}"
        assert flows(result) == flows(alone[party]), f"other bytes at {party}"
        assert result["history"] == alone[party]["history"]
