"""`cutlayer run --processes`: the same bits as in one process, the right error, and no process left behind."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import safetensors.torch
import torch

from cutlayer.cli import processes
from cutlayer.cli.console import Output
from cutlayer.errors import CutlayerError, LinkError, PeerError, StageError
from cutlayer.run.config import load_contract
from cutlayer.run.launch import read_run
from tests.report.reading import page

Call = Callable[..., Any]
ALL = ("contract.toml", "hospital.toml", "server.toml")
QUIET = Output(json=False, quiet=True, verbose=False)


def child(folder: Path, party: str, *, code: int, error: dict[str, str] | None) -> Any:
    """Return a party's process that has ended, with what it printed."""
    home = folder / party
    home.mkdir()
    (home / "output.json").write_text(json.dumps({"error": error}) if error else "")
    ended = SimpleNamespace(returncode=code, poll=lambda: code)
    return processes._Child(party, home, ended, ("a copy", "his own"))  # type: ignore[arg-type]


def told(kind: str, what: str, code: str) -> dict[str, str]:
    return {"kind": kind, "what": what, "code": code, "where": "step 3", "expected": "x", "got": "y", "remedy": "z"}


def test_error_is_that_of_the_party_that_failed_by_itself(tmp_path: Path):
    ended = [
        child(tmp_path, "a", code=5, error=told("PeerError", "b failed", "E703")),
        child(tmp_path, "b", code=3, error=told("StageError", "it failed", "E301")),
        child(tmp_path, "c", code=4, error=told("LinkError", "gone", "E601")),
    ]
    error = processes._failure(ended, QUIET)
    assert type(error) is StageError
    assert (error.what, error.where, error.code) == ("it failed", "process of b: step 3", "E301")
    assert (error.expected, error.got, error.remedy) == ("x", "y", "z")


def test_results_without_room_are_written_by_resume(call: Call, demo: Path, monkeypatch: pytest.MonkeyPatch):
    """Copied into a party's folder they would be missing from the joint summary."""
    begin = processes._start
    full: list[str] = ["sabotage"]

    def start(file: Any, home: Path, *rest: Any) -> Any:
        home.mkdir(parents=True, exist_ok=True)
        taken = home / "hospital.safetensors"
        if file.name == "hospital":
            taken.mkdir() if full else taken.rmdir()
        return begin(file, home, *rest)

    monkeypatch.setattr(processes, "_start", start)
    result = call("run", *ALL, "--processes", "--folder", "out")
    assert result.code == 2, result.err
    assert result.err[-4].startswith("E238 the results could not be written into the run's folder; all of them are in ")
    assert result.err[-1] == (
        "  do:    make room, then `cutlayer resume out` writes all results; what lies elsewhere can then be deleted "
        "(more: cutlayer explain E238)"
    )
    shutil.rmtree(result.err[-4].split()[-1])
    full.clear()
    again = call("resume", "out")
    assert again.code == 0, again.err
    assert set(json.loads((demo / "out" / "summary.json").read_text())["weights_sha256"]) == {"hospital", "server"}


def test_if_all_complain_of_others_the_first_is_told(tmp_path: Path):
    error = processes._failure([child(tmp_path, "a", code=4, error=told("LinkError", "gone", "E601"))], QUIET)
    assert type(error) is LinkError


@pytest.mark.provokes("E710")
@pytest.mark.parametrize(
    ("code", "error", "got"),
    [
        (-9, None, "signal 9"),
        (1, None, "exit code 1"),
        (130, None, "interrupted"),
        (130, told("CutlayerError", "stopped by Ctrl-C or a signal", "E001"), "interrupted"),
        (1, {"kind": "StageError", "odd": "x"}, "exit code 1"),
    ],
)
def test_process_that_ends_without_a_word(tmp_path: Path, code: int, error: dict[str, str] | None, got: str):
    found = processes._failure([child(tmp_path, "a", code=code, error=error)], QUIET)
    assert type(found) is PeerError
    assert (found.code, found.got) == ("E710", got)
    assert str(tmp_path / "a" / "log.txt") in found.remedy


def test_error_of_an_unknown_kind_is_a_general_one(tmp_path: Path):
    error = processes._failure([child(tmp_path, "a", code=1, error=told("os", "odd", "E999"))], QUIET)
    assert type(error) is CutlayerError


def test_events_are_read_as_they_come(tmp_path: Path):
    watched = child(tmp_path, "a", code=0, error=None)
    path = tmp_path / "a" / "metrics.jsonl"
    assert list(watched.events()) == []
    path.write_text('{"event": "one"}\n{"eve')
    assert list(watched.events()) == [{"event": "one"}]
    with path.open("a") as file:
        file.write('nt": "two"}\n')
    assert list(watched.events()) == [{"event": "two"}]


def test_what_a_party_is_warned_of_is_read_from_its_log(tmp_path: Path):
    watched = child(tmp_path, "a", code=0, error=None)
    path = tmp_path / "a" / "log.txt"
    path.write_text("/x/torch.py:3: UserWarning: of torch\n  warn()\n/x/y.py:8: UserWarning: party a: of da")
    assert list(watched.warnings()) == []
    with path.open("a") as file:
        file.write("ta: 'x'\n  warn()\n/my/parties.py:8: UserWarning: spread: 1 of 3\n")
    assert list(watched.warnings()) == ["party a: of data: 'x'", "party a: spread: 1 of 3"]
    assert list(watched.warnings()) == []


def test_warnings_of_data_are_shown_beside_the_one_document(call: Call, demo: Path):
    text = (demo / "parties.py").read_text()
    (demo / "parties.py").write_text("import warnings\nwarnings.warn('party x: odd data')\n" + text)
    for extra, shown in (((), True), (("--quiet",), False), (("--json",), True)):
        folder = f"out{len(extra)}{shown}"
        result = call("run", *ALL, "--processes", "--folder", folder, *extra)
        assert result.code == 0, result.err
        assert (result.err.count("party x: odd data") == 1) == shown, result.err
        assert "odd data" not in "".join(result.out)
        if extra == ("--json",):
            assert len(result.out) == 1
            json.loads(result.out[0])


def test_local_contract_keeps_its_ports(demo: Path):
    contract = load_contract(demo / "contract.toml")
    local = processes._local_contract(contract, demo)
    assert local.plan == contract.plan
    assert local.addresses["server"].startswith("127.0.0.1:")
    assert local.addresses != contract.addresses
    assert processes._local_contract(contract, demo) == local


def test_keys_that_a_killed_run_has_left_are_removed(tmp_path: Path):
    left, other = tmp_path / "cutlayer-left", tmp_path / "other"
    run = tmp_path / "run"
    for folder in (left, other, run):
        folder.mkdir()
    for old in (left, other):  # what the note names is removed only if a run has made it
        (run / ".keys").write_text(str(old))
        with processes._place_for_keys(run) as place:
            assert (run / ".keys").read_text() == str(place)
            assert place.stat().st_mode & 0o777 == 0o700
        assert list(run.iterdir()) == []
        assert not place.exists()
    assert (left.exists(), other.exists()) == (False, True)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_signal_stops_once_as_ctrl_c_does(name: str):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with processes._stopped_by_signals():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
        signal.raise_signal(number)  # while it is stopping
    assert signal.getsignal(number) == before


def test_run_under_nohup_goes_on():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with processes._stopped_by_signals():
            signal.raise_signal(signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL  # the other one stops it all the same
    finally:
        signal.signal(signal.SIGHUP, before)


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "cutlayer", *words]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    paths = sorted(folder.rglob("*.safetensors"))
    return {
        f"{path.name}: {name}": tensor
        for path in paths
        if path.parent.name != "checkpoints"
        for name, tensor in safetensors.torch.load_file(path).items()
    }


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert len(first) == 4
    assert all(torch.equal(first[name], second[name]) for name in first)


def assert_reports_of_their_own(folder: Path, hashes: dict[str, str]) -> None:
    """Each party's report is in its own folder, and holds its own record alone."""
    whole = page(folder)
    assert list(whole.column("Cost by party", "sent")) == ["hospital", "server"]
    for party, other in (("hospital", "server"), ("server", "hospital")):
        own = page(folder / party)
        assert f"Seen from {party}." in own.words
        assert f"This folder holds the record of {party} only. What {other} computed is not known here" in own.words
        assert own.tables[f"What left {party}"] == whole.tables[f"What left {party}"]
        assert list(own.column("Cost by party", "sent")) == [party]
        assert hashes[party] in own.words
        assert hashes[other] not in own.words


def assert_no_process_left(folder: Path) -> None:
    left = [p.info for p in psutil.process_iter(["cmdline"]) if any(str(folder) in w for w in p.info["cmdline"] or ())]
    assert left == []


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_processes_give_the_bits_and_bytes_of_one_process(call: Call, demo: Path):
    assert call("run", *ALL, "--folder", "one", "-q").code == 0
    result = call("run", *ALL, "--folder", "many", "--processes")
    assert (result.code, result.out[-1]) == (0, "results: many/report.html")
    told = [line.split()[:2] for line in result.err[1:] if not line.startswith("waiting")]  # for a process that starts
    assert told == [["train", "1/2"], ["train", "2/2"], ["evaluate", "2/2"]]
    assert_same_weights(demo / "one", demo / "many")
    one, many = (json.loads((demo / name / "summary.json").read_text()) for name in ("one", "many"))
    for part in ("plan", "metrics", "history", "cuts", "weights_sha256"):
        assert one[part] == many[part]
    assert_reports_of_their_own(demo / "many", many["weights_sha256"])
    assert {one.stat().st_mode & 0o777 for one in (demo / "many", demo / "many" / "server")} == {0o700}
    assert not list((demo / "many").rglob("*.key"))
    assert_no_process_left(demo)
    assert call("resume", "many").out[-1] == "results: many/report.html"


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_error_of_one_party_ends_all(call: Call, demo: Path):
    code = demo / "parties.py"
    code.write_text(code.read_text().replace("linear(8, 2)", "linear(8, 3)"))
    result = call("run", *ALL, "--folder", "many", "--processes")
    assert result.code == 3
    assert result.err[-4].startswith("E30")
    assert result.err[-3].startswith("  where: process of server")
    assert_no_process_left(demo)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_stopped_run_leaves_no_process_and_goes_on_to_the_same_bits(call: Call, demo: Path):
    contract = demo / "contract.toml"
    contract.write_text(contract.read_text().replace("epochs = 2", "epochs = 60"))
    assert call("run", *ALL, "--folder", "one", "-q").code == 0
    process = subprocess.Popen(command("run", *ALL, "--folder", "many", "--processes"), stderr=subprocess.DEVNULL)
    events = demo / "many" / "hospital" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (events.exists() and '"round":3' in events.read_text()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 130
    assert_no_process_left(demo)
    assert not (demo / "many" / "summary.json").exists()
    assert read_run(demo / "many")[2].kind == "processes"
    result = call("resume", "many")
    assert (result.code, result.out[-1]) == (0, "results: many/report.html")
    assert_same_weights(demo / "one", demo / "many")
    document = json.loads((demo / "many" / "summary.json").read_text())
    for party, ledger in document["ledgers"].items():
        left = sum(row["payload"] for row in ledger["flows"] if row["way"] == "sent")
        undone = document["undone"].get(party, {}).get("payload", 0)
        assert int((demo / "many" / party / "sent.txt").read_text().split()[0]) == left + undone
        more = f"  {party}: sent {undone:,} B more in steps that a restart undid"
        assert (more in result.out) == (party in document["undone"])
    assert document["undone"]


@pytest.mark.provokes("E204")
def test_an_error_of_a_party_file_names_the_users_own(demo: Path, call: Call):
    path = demo / "hospital.toml"
    path.write_text(path.read_text().replace("parties.py:hospital", "parties.py:nobody"))
    result = call("run", "--processes", "--folder", "out")
    error = next(place for place, line in enumerate(result.err) if line.startswith("E204"))
    assert result.err[error + 1].startswith(f"  where: process of hospital: {path}")
