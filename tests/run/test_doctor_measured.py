"""What the doctor measures of the way to a server: speed, clocks, contract, release; and that it sends nothing else."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cutlayer.run import doctor_network
from cutlayer.transport import probe_service
from cutlayer.transport.probe import Measured
from tests.run.practice import STEPS, Practice, few_bytes, grpc_server, look, troubles

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def practice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Practice:
    few_bytes(monkeypatch)
    return Practice(tmp_path)


def test_only_probes_are_sent(practice: Practice):
    """What the server is asked are the questions of a probe; they hold the digest and random filler, nothing else."""
    asked: list[Any] = []
    real = probe_service.msgspec.msgpack.decode

    def decode(data: bytes, type: Any) -> Any:
        asked.append(real(data, type=type))
        return asked[-1]

    spy = SimpleNamespace(msgpack=SimpleNamespace(decode=decode, encode=probe_service.msgspec.msgpack.encode))
    spy.MsgspecError = probe_service.msgspec.MsgspecError
    with pytest.MonkeyPatch.context() as patch, practice.listening():
        patch.setattr(probe_service, "msgspec", spy)
        look(practice)
    assert {one.kind for one in asked} == {"hello", "take", "give"}
    assert {one.digest for one in asked} == {"", practice.contract.digest()}
    assert sum(len(one.filler) for one in asked) > 1000


def test_another_contract(practice: Practice):
    with practice.listening(digest="0" * 64):
        rows = look(practice)
    assert troubles(rows.values()) == {"server: contract": ("problem", "E642")}
    assert "`cutlayer plan CONTRACT --json` prints at both sites" in rows["server: contract"].do


@pytest.mark.parametrize(
    ("protocol", "release", "trouble"),
    [(99, "9.9.9", ("problem", "E641")), (None, "9.9.9\x1b[31m", ("warning", "")), (99, None, ("problem", "E641"))],
)
def test_another_release(
    practice: Practice, monkeypatch: pytest.MonkeyPatch, protocol: int | None, release: str | None, trouble
):
    if protocol:
        monkeypatch.setattr(probe_service, "PROTOCOL", protocol)
    if release:
        monkeypatch.setattr(probe_service, "release", lambda: release)
    with practice.listening():
        rows = look(practice)
    assert troubles(rows.values()) == {"server: release": trouble}
    assert rows["server: release"].seen.startswith("cutlayer 9.9.9" if release else "cutlayer ")
    assert rows["server: release"].do == "install the same release at all parties"


@pytest.mark.parametrize(
    ("minutes", "status", "seen"),
    [(2, "warning", "ahead of"), (-2, "warning", "behind"), (10, "problem", "ahead of"), (-10, "problem", "behind")],
)
def test_clocks_minutes_apart(
    practice: Practice, monkeypatch: pytest.MonkeyPatch, minutes: int, status: str, seen: str
):
    shift = minutes * 60 * 10**9
    clock = SimpleNamespace(monotonic=time.monotonic, time_ns=lambda: time.time_ns() + shift)
    monkeypatch.setattr(probe_service, "time", clock)
    with practice.listening():
        row = look(practice)["server: clock"]
    assert row.status == status
    assert row.seen.startswith(f"the clock of server is {abs(minutes) * 60}.")
    assert f" s {seen} this machine's" in row.seen
    assert "NTP" in row.do


def test_a_slow_link(practice: Practice, monkeypatch: pytest.MonkeyPatch):
    """Each question but the greeting takes a while at the server: 16 kB in 0.15 s is 0.9 Mbit/s."""
    real = probe_service.Question

    def answers(self: Any, incoming: Iterator[bytes], context: Any) -> Iterator[bytes]:
        def slowly() -> Iterator[bytes]:
            for data in incoming:
                if probe_service.msgspec.msgpack.decode(data, type=real).kind != "hello":
                    time.sleep(0.15)
                yield data

        return usual(self, slowly(), context)

    usual = probe_service.ProbeService._answers
    monkeypatch.setattr(probe_service.ProbeService, "_answers", answers)
    with practice.listening():
        rows = look(practice, 3.0)
    assert troubles(rows.values()) == {"server: speed": ("warning", "")}
    assert "Mbit/s" in rows["server: speed"].seen
    assert "a deeper cut or a smaller dtype" in rows["server: speed"].do


@pytest.mark.parametrize(
    ("changes", "trouble", "seen"),
    [
        ({}, {}, ""),
        ({"round_trip": 0.4}, {"server: round trip": ("warning", "")}, "400.0 ms"),
        ({"up": None, "down": None}, {"server: speed": ("warning", "")}, "up too slow to measure, down too slow"),
        ({"down": 1e5}, {"server: speed": ("warning", "")}, "down 0.8 Mbit/s"),
        (
            {"plan": "other", "release": "9"},
            {"server: contract": ("problem", "E642"), "server: release": ("warning", "")},
            "",
        ),
    ],
)
def test_what_is_measured_is_judged(practice: Practice, monkeypatch: pytest.MonkeyPatch, changes, trouble, seen: str):
    good = {"round_trip": 0.01, "up": 1e7, "down": 1e7, "ahead": 0.0, "protocol_same": True, "plan": "same"}
    found = Measured(**{**good, "release": doctor_network.release(), **changes})
    monkeypatch.setattr(doctor_network, "measure", lambda *_, **__: found)
    with practice.listening():
        rows = look(practice)
    assert troubles(rows.values()) == trouble
    assert seen in "; ".join(row.seen for row in rows.values())


@pytest.mark.provokes("E611")
def test_a_server_that_does_not_let_itself_be_measured(practice: Practice):
    with grpc_server(practice.port, practice.credentials("server")):
        rows = look(practice)
    assert [rows[f"server: {name}"].status for name in STEPS] == ["ok"] * 4
    assert troubles(rows.values()) == {"server: speed": ("warning", "E611")}
    assert "got unimplemented" in rows["server: speed"].seen
    assert "`cutlayer doctor --serve` of the same release" in rows["server: speed"].do
