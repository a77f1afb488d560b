"""Parties as separate processes over mutual TLS: the bits and bytes of one process, also after kill -9."""

from __future__ import annotations

import pytest

from tests.run.cluster import cluster, flows, in_process

LISTENING = {
    "hops": ["one", "two", "three", "four"],
    "parallel": ["server"],
    "pixels": ["server"],
    "relay": ["server"],
    "u_shaped": ["server"],
    "vertical": ["registry"],
}
pytestmark = pytest.mark.timeout(170)


def _check_same(done, alone):
    for party, result in done.items():
        assert result["sha256"] == alone[party]["sha256"], f"other weights at {party}"
        assert flows(result) == flows(alone[party]), f"other bytes at {party}"
        assert result["history"] == alone[party]["history"]


@pytest.mark.parametrize("case", ["u_shaped", "vertical", "hops", "relay", "parallel", "pixels"])
def test_processes_give_the_bits_and_bytes_of_one_process(case, tmp_path):
    with cluster(case, tmp_path, listening=LISTENING[case]) as running:
        for party in running.parties:
            running.start(party)
        assert set(running.wait_all().values()) == {0}, running.logs()
        done = running.results()
    alone = in_process(case)
    _check_same(done, alone)
    assert all(result["undone"]["messages"] == 0 for result in done.values())
    sent = {(p, f[1], *f[2:]) for p, r in done.items() for f in flows(r) if f[0] == "sent"}
    received = {(f[1], p, *f[2:]) for p, r in done.items() for f in flows(r) if f[0] == "received"}
    assert sent == received
    framing = lambda ledgers: {p: [f["framing"] for f in r["ledger"]["flows"]] for p, r in ledgers.items()}  # noqa: E731
    assert framing(done) == framing(alone)


@pytest.mark.parametrize("victim", ["beta", "server"])
def test_kill_in_mid_round_and_restart_gives_the_same_weights(victim, tmp_path):
    training = {"checkpoint_every": 1}
    count = 4 if victim == "beta" else 9
    with cluster("relay", tmp_path, listening=["server"], training=training) as running:
        for party in running.parties:
            crash = {"event": "step", "count": count} if party == victim else None
            running.start(party, crash=crash)
        assert running.wait(victim) == -9, running.logs()
        for party in running.parties:
            if party != victim:
                assert running.processes[party].is_alive(), running.logs()
        running.start(victim)
        assert set(running.wait_all().values()) == {0}, running.logs()
        done = running.results()
        assert running.events("gamma", "rollback"), "nobody rolled back: the crash was not in mid-round"
        told = {party: _told(running.events(party, "step")) for party in running.parties}
    _check_same(done, in_process("relay", training))
    for party, result in done.items():
        flows = [row for row in result["ledger"]["flows"] if row["way"] == "sent"]
        undone = result["undone"]
        assert sum(row["payload"] for row in flows) + undone["payload"] >= told[party]["bytes"]
        assert sum(row["messages"] for row in flows) + undone["messages"] >= told[party]["messages"]
    assert done[victim]["undone"]["messages"] > 0
    assert done["gamma" if victim == "server" else "server"]["undone"]["messages"] > 0


def _told(steps):
    """Return what the steps that a party told of have sent, those included that were undone."""
    return {
        part: sum(size for step in steps for name, size in step[part].items() if name.startswith("sent"))
        for part in ("bytes", "messages")
    }


def test_kill_while_the_others_have_finished(tmp_path):
    """The last thing a party does before it says that it is done: the others come back for it."""
    with cluster("u_shaped", tmp_path, listening=["server"]) as running:
        running.start("server")
        running.start("alpha", crash={"event": "round", "mode": "evaluate", "count": 1})
        assert running.wait("alpha") == -9, running.logs()
        running.wait_event("server", "round", count=4)
        running.start("alpha")
        assert set(running.wait_all().values()) == {0}, running.logs()
        done = running.results()
    _check_same(done, in_process("u_shaped"))


def test_a_failure_reaches_every_terminal_with_code_and_remedy(tmp_path):
    """A party whose module breaks: all others stop, with its name, its code and its remedy, never its data."""
    with cluster("relay", tmp_path, listening=["server"], training={"drop_last": False, "batch_size": 17}) as running:
        for party in running.parties:  # alpha's 18 samples leave a last batch of one, which BatchNorm refuses
            running.start(party)
        assert set(running.wait_all(60).values()) == {1}, running.logs()
        for party in running.parties:
            error = running.events(party, "error")[-1]
            if party == "alpha":
                assert error["code"] == "E304"
            else:
                assert error["code"].startswith("E7")
                assert "alpha" in error["text"]
                assert "E304" in error["text"]
                assert "drop_last" in error["text"]


def test_another_plan_is_refused_on_both_sides(tmp_path):
    with cluster("u_shaped", tmp_path, listening=["server"]) as running:
        running.start("server")
        running.start("alpha", digest="0" * 64)
        assert set(running.wait_all(40).values()) == {1}, running.logs()
        assert running.events("alpha", "error")[-1]["code"] == "E642"
        assert running.events("server", "error")[-1]["code"] in ("E642", "E700", "E703")


def test_a_party_that_never_comes(tmp_path):
    with cluster("relay", tmp_path, listening=["server"]) as running:
        running.deadlines["join"] = 8
        for party in running.parties:
            if party != "gamma":
                running.start(party)
        assert set(running.wait_all(40).values()) == {1}, running.logs()
        for party in running.processes:
            error = running.events(party, "error")[-1]
            assert error["code"] == "E702"
            assert "gamma" in error["text"]


def test_a_party_that_dies_and_stays_dead(tmp_path):
    with cluster("relay", tmp_path, listening=["server"], training={"epochs": 400}) as running:
        running.deadlines["patience"] = 5
        for party in running.parties:
            running.start(party)
        running.wait_event("beta", "step", count=10)
        running.kill("beta")
        assert set(running.wait_all(60).values()) == {1}, running.logs()
        for party in running.processes:
            error = running.events(party, "error")[-1]
            assert error["code"] == "E701"
            assert "beta" in error["text"]
