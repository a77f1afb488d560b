"""A run is read back from its folder as it was written; what is not whole is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

import cutlayer as cl
from cutlayer.errors import ConfigError
from cutlayer.report.record import read_record, restored_plan
from tests.report import synthetic
from tests.report.conftest import Real

PLANS = synthetic.topologies()


def plain(value: Any) -> Any:
    return msgspec.json.decode(msgspec.json.encode(value))


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_comes_back_with_its_digest(name: str):
    document = msgspec.json.decode(msgspec.json.encode(PLANS[name].document()))
    assert restored_plan(document).digest() == PLANS[name].digest()


def test_a_run_comes_back_as_it_was(real: Real):
    record, result = real.record, real.result
    assert record.plan.digest() == result.plan.digest()
    assert record.complete
    assert record.events == {}
    for party, ledger in result.ledgers.items():
        assert plain(record.summary.ledgers[party]) == ledger.document()
        process = record.process(party)
        assert process is not None
        assert process.parties == tuple(result.ledgers)
        assert record.summary.parameters[party].total == (35 if party == "server" else 48)  # 4*6+6 + 5*3+3; 6*5+5
    assert plain(record.summary.history) == result.history
    assert record.process("nobody") is None


def test_a_join_is_not_complete(tmp_path: Path):
    assert not synthetic.record(tmp_path, PLANS["u-shaped-8"], known=["north"]).complete


def test_events_that_readers_want_to_know_of_are_counted(tmp_path: Path):
    synthetic.write(tmp_path, synthetic.summary(PLANS["vanilla-1"]))
    names = ["step", "lost", "step", "returned", "round", "lost", "rollback", "connected"]
    lines = [msgspec.json.encode({"event": name, "text": '"event":"aborted"'}) + b"\n" for name in names]
    (tmp_path / "metrics.jsonl").write_bytes(b"".join([*lines, b'{"event":"abor']))
    assert read_record(tmp_path).events == {"lost": 2, "returned": 1, "rollback": 1}


def test_what_all_parties_tell_of_a_session_is_counted_once(tmp_path: Path):
    synthetic.write(tmp_path, synthetic.summary(PLANS["vanilla-1"]))
    names = ["anew", "rollback", "rollback", "damaged"]
    lines = [msgspec.json.encode({"event": name, "party": party}) + b"\n" for party in "abc" for name in names]
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(lines))
    assert read_record(tmp_path).events == {"rollback": 2, "damaged": 3, "anew": 1}


@pytest.mark.provokes("E281")
def test_a_folder_without_a_run(tmp_path: Path):
    with pytest.raises(ConfigError, match="the folder holds no results of a run") as caught:
        read_record(tmp_path)
    assert (caught.value.code, caught.value.where) == ("E281", str(tmp_path))
    assert caught.value.remedy == "give the folder that the run named at its start"


def _changed(**changes: Any) -> bytes:
    return msgspec.json.encode({**synthetic.summary(PLANS["vanilla-1"]), **changes})


def _foreign(**row: Any) -> bytes:
    history = [{"mode": "train", "round": 1, "loss": "loss", "metrics": {}, "party": "server", **row}]
    return _changed(history=history)


DIGEST, OTHER = PLANS["vanilla-1"].digest(), {**PLANS["vanilla-1"].document(), "name": "other"}
DAMAGED = {
    "cut short": (_changed()[:-100], "truncated"),
    "no object": (b"[1, 2]", "object"),
    "no json": (b"\xff\xfe", "JSON|invalid"),
    "older": (_changed(version=1), "version 1"),
    "no version": (b"{}", "version None"),
    "a part is missing": (b'{"version": 2}', "missing required field"),
    "a text for a number": (_changed(seconds="2.5"), r"\$.seconds"),
    "another plan": (_changed(plan={"name": "x", "digest": DIGEST, "document": OTHER}), "[0-9a-f]{64}"),
    "no plan": (_changed(plan={"name": "x", "digest": "", "document": {"stages": [{"kind": "stage"}]}}), "argument"),
    "a stage of nobody": (_changed(plan={"name": "x", "digest": "", "document": {}}), "stages"),
    "a loss that is not there": (_foreign(loss="<b>"), "<b>"),
    "a lane that is not there": (_foreign(own=[{"lane": 1, "samples": 2, "metrics": {}}]), "lane 1"),
    "a party that is not there": (_foreign(party="mallory"), "mallory"),
}  # fmt: skip


@pytest.mark.provokes("E282")
@pytest.mark.parametrize("case", DAMAGED)
def test_a_summary_that_cannot_be_read(tmp_path: Path, case: str):
    data, got = DAMAGED[case]
    (tmp_path / "summary.json").write_bytes(data)
    with pytest.raises(ConfigError, match="the summary of the run cannot be read") as caught:
        read_record(tmp_path)
    assert caught.value.code == "E282"
    assert caught.value.where == str(tmp_path / "summary.json")
    assert re.search(got, caught.value.got), caught.value.got
    assert caught.value.expected
    assert "version of cutlayer" in caught.value.remedy


def test_a_flow_of_a_stranger_is_refused(tmp_path: Path):
    document = synthetic.summary(PLANS["vanilla-1"])
    document["ledgers"]["north"]["flows"][0]["peer"] = "mallory"
    synthetic.write(tmp_path, document)
    with pytest.raises(ConfigError) as caught:
        read_record(tmp_path)
    assert (caught.value.code, caught.value.got) == ("E282", "mallory")


def test_a_plan_of_python_is_one_of_files():
    plan = cl.vanilla("north", "server", cut="float32[batch, 3]", output="float32[batch, 2]", epochs=2)
    assert restored_plan(plan.document()).training == plan.training


def test_a_plan_with_extras_comes_back():
    plan = cl.u_shaped("a", "b", cut="float32[batch, 4]", back="float32[batch, 2]", output="float32[batch, 2]")
    told = cl.PlannedExchange("capacity", ["a", "b"], says="x")
    plan = cl.Plan(plan.stages, extras=[cl.Crossing("head", codec="int8", defences=["gaussian"]), told])
    assert restored_plan(plain(plan.document())) == plan
