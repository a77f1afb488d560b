"""`cutlayer run` in one process, `join` and `resume`."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from cutlayer.cli import running
from cutlayer.run.config import load_contract, parse_contract
from cutlayer.run.launch import read_run
from cutlayer.transport.pki import create_authority, issue
from tests.cli.conftest import write_site
from tests.provoking import saw

Call = Callable[..., Any]
ALL = ("contract.toml", "hospital.toml", "server.toml")


def only_folder(base: Path) -> Path:
    (folder,) = base.iterdir()
    return folder


def replace_in(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_run_says_where_its_results_are_in_the_last_line(call: Call, demo: Path):
    result = call("run", *ALL)
    assert result.code == 0
    folder = only_folder(demo / "runs")
    assert result.out[-1] == f"results: runs/{folder.name}/report.html"
    assert folder.name.endswith("-demo")
    assert result.out[0].startswith("demo: ")
    assert result.err[0] == f"run folder: runs/{folder.name}/"
    assert [line.split()[:2] for line in result.err[1:]] == [["train", "1/2"], ["train", "2/2"], ["evaluate", "2/2"]]
    assert folder.stat().st_mode & 0o777 == 0o700
    names = {"contract.toml", "metrics.jsonl", "hospital.safetensors", "launch.json", "server.safetensors"}
    assert {path.name for path in folder.iterdir()} == {*names, "summary.json", "report", "report.html"}
    resolved = load_contract(folder / "contract.toml")
    assert resolved == load_contract(demo / "contract.toml")
    assert "checkpoint_every = 0" in (folder / "contract.toml").read_text()  # defaults are in it
    assert json.loads((folder / "summary.json").read_text())["contract"] == resolved.digest()
    assert set(safetensors.torch.load_file(folder / "server.safetensors")) == {"body.weight", "body.bias"}
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {event["event"] for event in events} == {"step", "round"}


def test_run_as_json(call: Call, demo: Path):
    document = call("run", *ALL, "--json", "--folder", "out").json()
    assert document["results"] == str(demo / "out")
    assert document["metrics"]["evaluate"]["loss"]["loss"] < 1.0
    places = {"results": str(demo / "out"), "report": str(demo / "out" / "report.html")}
    assert document == {**json.loads((demo / "out" / "summary.json").read_text()), **places}


def test_quiet_run_prints_one_line(call: Call, demo: Path):
    result = call("run", *ALL, "--folder", "out", "-q")
    assert (result.out, result.err) == (["results: out/report.html"], [])
    assert (demo / "out").stat().st_mode & 0o777 == 0o700


def test_run_twice_in_one_folder_is_refused(call: Call, demo: Path):
    assert call("run", *ALL, "--folder", "out", "-q").code == 0
    again = call("run", *ALL, "--folder", "out")
    assert (again.code, again.err[0][:4]) == (2, "E208")


def test_party_files_must_be_those_of_the_plan(call: Call, demo: Path):
    result = call("run", "contract.toml", "server.toml")
    assert (result.code, len(result.err)) == (2, 4)
    assert result.err[0].startswith("E225")
    assert "takes part with `cutlayer join`" in result.err[3]
    assert not (demo / "runs").exists()


def test_module_that_does_not_fit_exits_with_3(call: Call, demo: Path):
    replace_in(demo / "parties.py", "linear(8, 2)", "linear(8, 3)")
    result = call("run", *ALL)
    assert result.code == 3
    assert result.err[-4].startswith("E30")
    assert "body" in "".join(result.err[-4:])
    assert not any("Traceback" in line for line in result.err)
    assert any("Traceback" in line for line in call("run", *ALL, "-v").err)


def test_builder_that_fails_exits_with_2(call: Call, demo: Path):
    replace_in(demo / "server.toml", "parties.py:server", "parties.py:sever")
    result = call("run", *ALL)
    assert result.code == 2
    assert result.err[-4] == "E204 the module has no function 'sever'"


@pytest.mark.provokes("E207")
def test_join_without_a_terminal_never_asks(call: Call, demo: Path):
    digest = load_contract(demo / "contract.toml").digest()
    result = call("join", "contract.toml", "hospital.toml", stdin="y\n")
    assert result.code == 2
    assert result.err[-4] == "E207 this site has not accepted the contract"
    do = f"  do:    read it with `cutlayer plan`; if it may run: --accept {digest}"
    assert result.err[-1] == f"{do} (more: cutlayer explain E207)"
    shown = "\n".join(result.err)
    assert "sends   activations of head to server: float32[batch, 8], 512 bytes a batch" in shown
    assert "1,600 bytes over cuts an epoch (weights of replicas come on top), for its 40 samples" in shown
    assert not (demo / "runs").exists()


def test_labels_that_can_be_read_from_gradients_are_a_warning(call: Call, demo: Path):
    """In `run` and `join`; once they are released, as in the demo, none."""
    release = (demo / "contract.toml").read_text()
    release = release[release.index("[[release]]") : release.index("[training]")]
    assert not any("warning" in line for line in call("run", *ALL, "--folder", "one").err)
    replace_in(demo / "contract.toml", release, "")
    warning = "warning: server can read data.y of hospital from the gradient at body->loss"
    ran = call("run", *ALL, "--folder", "two")
    assert (ran.code, ran.err[0].partition(": no ")[0]) == (0, warning)
    assert ran.err[1].startswith("  do: put a stage with weights, at the party of the loss")
    joined = call("join", "contract.toml", "hospital.toml")
    assert joined.err[0].startswith(warning)
    assert any(line.startswith("  tells   data.y to server: it can be read") for line in joined.err)


@pytest.mark.parametrize("words", [("--json",), ("-q",)])
def test_join_in_a_script_never_asks_even_at_a_terminal(
    call: Call, demo: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
):
    monkeypatch.setattr(running, "interactive", lambda: "--json" in words)
    result = call("join", "contract.toml", "hospital.toml", *words, stdin="y\n")
    assert result.code == 2
    assert result.err[-4].startswith("E207")
    if "--json" in words:
        assert result.json()["error"]["code"] == "E207"


def test_join_refuses_another_contract_than_the_accepted_one(call: Call, demo: Path):
    result = call("join", "contract.toml", "hospital.toml", "--accept", "0" * 64)
    assert (result.code, result.err[-4]) == (2, "E207 this site has accepted another contract")


def test_no_at_the_terminal_is_no(call: Call, demo: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(running, "interactive", lambda: True)
    result = call("join", "contract.toml", "hospital.toml", stdin="n\n")
    assert result.code == 2
    assert result.err[-4] == "May this leave? [y/N]:E207 this site has not accepted the contract"
    assert not (demo / "runs").exists()


def test_yes_is_asked_for_once_and_then_the_party_meets_the_others(
    call: Call, demo: Path, monkeypatch: pytest.MonkeyPatch
):
    """Nobody else comes here, so the run ends by its deadline: a peer's failure, exit code 5."""
    replace_in(demo / "contract.toml", "join = 60", "join = 0.3")
    replace_in(demo / "contract.toml", "127.0.0.1:7443", f"127.0.0.1:{_free_port()}")
    monkeypatch.setattr(running, "interactive", lambda: True)
    result = call("join", "contract.toml", "server.toml", stdin="y\n")
    assert sum("May this leave?" in line for line in result.err) == 1
    assert (result.code, result.err[-4][:4]) == (5, "E702")
    assert "hospital" in "".join(result.err[-4:])
    folder = only_folder(demo / "runs")
    assert f"cutlayer resume runs/{folder.name}/" in "\n".join(result.err)

    monkeypatch.setattr(running, "interactive", lambda: False)
    again = call("resume", str(folder))
    assert (again.code, again.err[-4][:4]) == (5, "E702")
    assert only_folder(demo / "runs") == folder


def test_accepted_digest_in_the_party_file_is_enough(call: Call, demo: Path):
    replace_in(demo / "contract.toml", "join = 60", "join = 0.3")
    replace_in(demo / "contract.toml", "127.0.0.1:7443", f"127.0.0.1:{_free_port()}")
    digest = load_contract(demo / "contract.toml").digest()
    with (demo / "server.toml").open("a") as file:
        file.write(f'[run]\naccept = "{digest}"\nfolder = "mine"\n')
    result = call("join", "contract.toml", "server.toml")
    assert result.code == 5
    _, text, record = read_run(only_folder(demo / "mine"))
    assert (record.kind, record.digest, record.party_files) == ("join", digest, (str(demo / "server.toml"),))
    assert parse_contract(text).digest() == digest


def test_expired_or_missing_certificates_exit_with_4(call: Call, demo: Path):
    replace_in(demo / "hospital.toml", "insecure = true", 'credentials = "none"')
    result = call("join", "contract.toml", "hospital.toml")
    assert (result.code, result.err[-4][:4]) == (4, "E666")


@pytest.mark.parametrize("code", ["E661", "E664", "E665"])
@pytest.mark.parametrize(
    "words", [("join",), ("predict", "--join"), ("predict", "--served"), ("serve",)], ids=lambda words: words[-1]
)
def test_a_certificate_that_cannot_do_is_told_before_anybody_is_asked(
    call: Call, demo: Path, words: tuple[str, ...], code: str
):
    ago = datetime.now(UTC) - timedelta(days=9)
    party = "server" if words == ("serve",) else "hospital"
    authority = create_authority(demo / "ca", name="study", now=ago)
    own = issue(authority, "ward" if code == "E665" else party, demo, days=2 if code == "E661" else 30, now=ago)
    if code == "E664":
        (own / "ca.pem").write_bytes((create_authority(demo / "other", name="other") / "ca.pem").read_bytes())
    contract = demo / "contract.toml"
    contract.write_text(contract.read_text() + '\n[[answer]]\nof = "body"\nto = "head"\n')
    write_site(demo, party, f'credentials = "{own.name}"')
    result = call(words[0], "contract.toml", f"{party}.toml", *words[1:])
    assert (result.code, result.err[-4][:4]) == (4, code)
    assert "contract digest" not in "\n".join(result.err)
    assert ("`identity` in [network]" in result.err[-1]) == (code == "E665")


def test_finished_run_stays_as_it_is(call: Call, demo: Path):
    call("run", *ALL, "--folder", "out", "-q")
    before = {path: path.read_bytes() for path in (demo / "out").rglob("*") if path.is_file()}
    result = call("resume", "out")
    assert (result.code, result.out) == (0, ["this run is finished", "results: out/report.html"])
    places = {"results": str(demo / "out"), "report": str(demo / "out" / "report.html")}
    assert call("resume", "out", "--json").json() == {"finished": True, **places}
    assert {path: path.read_bytes() for path in (demo / "out").rglob("*") if path.is_file()} == before


def test_report_that_a_finished_run_lacks_is_made(call: Call, demo: Path):
    call("run", *ALL, "--folder", "out", "-q")
    (demo / "out" / "report.html").unlink()
    assert call("resume", "out").out == ["this run is finished", "results: out/report.html"]
    assert (demo / "out" / "report.html").exists()


def test_run_that_went_well_does_not_fail_by_its_report(call: Call, demo: Path):
    (demo / "out" / "report.html").mkdir(parents=True)  # where no file can be written
    result = call("run", *ALL, "--folder", "out")
    assert (result.code, result.out[-1]) == (0, "results: out/")
    assert result.err[-1].startswith("the report could not be written: IsADirectoryError: ")
    assert result.err[-1].endswith("; try `cutlayer report`")


def test_join_of_a_finished_run_stays_as_it_is(call: Call, demo: Path):
    """What a service does that starts `join --folder` again and again."""
    call("run", *ALL, "--folder", "out", "-q")
    begun = demo / "out" / "launch.json"
    begun.write_text(begun.read_text().replace('"simulate"', '"join"'))
    digest = load_contract(demo / "contract.toml").digest()
    result = call("join", "contract.toml", "server.toml", "--folder", "out", "--accept", digest)
    assert (result.code, result.out) == (0, ["this run is finished", "results: out/report.html"])


@pytest.mark.provokes("E208")
@pytest.mark.parametrize(
    ("begun", "words", "expected", "got"),
    [
        ("processes", ("run", *ALL), "cutlayer run", "cutlayer run --processes"),
        ("join", ("run", *ALL), "cutlayer run", "cutlayer join"),
        ("simulate", ("run", *ALL, "--processes"), "cutlayer run --processes", "cutlayer run"),
    ],
)
def test_run_that_was_begun_in_another_way(
    call: Call, demo: Path, begun: str, words: tuple[str, ...], expected: str, got: str
):
    record = {"kind": begun, "digest": load_contract(demo / "contract.toml").digest(), "party_files": []}
    (demo / "out").mkdir()
    (demo / "out" / "launch.json").write_text(json.dumps(record))
    result = call(*words, "--folder", "out")
    assert (result.code, result.err[0]) == (2, "E208 the folder holds a run that was begun in another way")
    assert result.err[2] == f"  why:   expected one of `{expected}`, got one of `{got}`"
    assert ("cutlayer resume and this folder" in result.err[3]) == (begun != "simulate")
    assert result.err[1].endswith("out")
    assert " out" not in result.err[3]  # `join` tells the others what to do: a path of this machine is no part of it
    assert json.loads((demo / "out" / "launch.json").read_text()) == record  # as it was


def test_run_in_one_process_cannot_be_gone_on_with(call: Call, demo: Path):
    call("run", *ALL, "--folder", "out", "-q")
    (demo / "out" / "summary.json").unlink()
    result = call("resume", "out")
    assert (result.code, result.err[0][:4]) == (2, "E208")
    assert "--processes" in result.err[3]


def test_resume_of_a_folder_that_is_no_run(call: Call, demo: Path):
    result = call("resume", ".")
    assert (result.code, result.err[0]) == (2, "E208 the folder holds no run that can be gone on with")


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.mark.parametrize("words", [("run",), ("predict",)])
@pytest.mark.parametrize("given", [(), ("--folder", "here/there")])
def test_a_command_that_fails_before_it_writes_anything_leaves_no_folder(
    call: Call, demo: Path, words: tuple[str, ...], given: tuple[str, ...]
):
    (demo / "server.toml").write_text((demo / "server.toml").read_text().replace("parties.py:server", "none.py:f"))
    before = sorted(demo.iterdir())
    result = call(*words, *ALL, *given)
    assert (result.code, result.err[-4][:4]) == (2, "E204")
    assert sorted(path for path in demo.iterdir() if path.name != "__pycache__") == before


def test_a_run_that_failed_before_its_first_step_can_be_started_again_in_its_folder(call: Call, demo: Path):
    """A folder that was there, and what it holds, stay."""
    code = (demo / "parties.py").read_text()
    (demo / "out").mkdir()
    (demo / "out" / "notes.txt").write_text("mine")
    (demo / "parties.py").write_text(code.replace('modules={"body": linear(8, 2)}', "modules={}"))
    assert call("run", *ALL, "--folder", "out").code == 2
    assert [path.name for path in (demo / "out").iterdir()] == ["notes.txt"]
    (demo / "other.py").write_text(code)
    for name in ("hospital", "server"):
        file = demo / f"{name}.toml"
        file.write_text(file.read_text().replace("parties.py:", "other.py:"))
    assert call("run", *ALL, "--folder", "out").code == 0


def test_a_run_that_failed_later_keeps_its_folder(call: Call, demo: Path):
    code = (demo / "parties.py").read_text()
    (demo / "parties.py").write_text(code.replace("lr=0.05", "lr=1e30"))
    result = call("run", *ALL, "--folder", "out")
    assert (result.code, result.err[-4][:4]) == (3, "E351")
    assert (demo / "out" / "metrics.jsonl").stat().st_size
    assert {"contract.toml", "launch.json"} < {path.name for path in (demo / "out").iterdir()}


def _failing(demo: Path, where: str) -> None:
    """Let the hospital's data be missing: at once, or only once they are counted; and let both parties meet soon."""
    text = (demo / "contract.toml").read_text().replace("127.0.0.1:7443", f"127.0.0.1:{_free_port()}")
    (demo / "contract.toml").write_text(text)
    code = (demo / "parties.py").read_text()
    lost = """
from cutlayer.errors import DataError

class Lost:
    def __len__(self):
        raise DataError("the scans are not here", where="/mnt/secret", got="7 patients", remedy="mount the share")

def hospital(name):
    data = Lost()
    LEN
    return Party(name, modules={"head": linear(4, 8), "loss": nn.functional.cross_entropy}, data=data)
"""
    (demo / "parties.py").write_text(code + lost.replace("LEN", "len(data)" if where == "builder" else ""))


@pytest.mark.parametrize("where", ["builder", "count"])
def test_what_is_wrong_with_a_partys_data_is_told_to_the_others_before_the_run(demo: Path, where: str):
    _failing(demo, where)
    digest = load_contract(demo / "contract.toml").digest()
    done = _both(demo, "--accept", digest)
    assert done["hospital"][0] == 2
    assert "E250 the scans are not here" in done["hospital"][1]
    code, text = done["server"]
    assert code == 5, text
    *_, what, _, why, do = text.splitlines()
    assert what == "E703 hospital failed: the scans are not here"
    assert why == "  why:   got E250 at hospital"
    assert do.startswith("  do:    at hospital: mount the share")
    assert "secret" not in text
    assert "7 patients" not in text


def test_a_site_that_has_not_accepted_the_contract_tells_nobody_anything(
    call: Call, demo: Path, monkeypatch: pytest.MonkeyPatch
):
    def telling(*_: object) -> None:
        raise AssertionError("the network is opened")

    _failing(demo, "builder")
    monkeypatch.setattr("cutlayer.run.meeting.telling", telling)
    result = call("join", "contract.toml", "hospital.toml")
    assert (result.code, result.err[-4]) == (2, "E250 the scans are not here")


def _both(demo: Path, *words: str) -> dict[str, tuple[int, str]]:
    """Join as both parties, each in a process; return exit code and stderr of each."""
    started = {
        name: subprocess.Popen(
            [sys.executable, "-m", "cutlayer", "join", "contract.toml", f"{name}.toml", *words],
            cwd=demo, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL, text=True,
        )
        for name in ("server", "hospital")
    }  # fmt: skip
    try:
        return {name: (saw(one.communicate(timeout=50)[1]), one.returncode)[::-1] for name, one in started.items()}
    finally:
        for one in started.values():
            one.kill()
            one.wait()


def test_a_run_in_processes_that_is_stopped_says_how_to_go_on(demo: Path, call: Call, monkeypatch: pytest.MonkeyPatch):
    def stop(*_what: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cutlayer.cli.running.run_processes", stop)
    result = call("run", "--processes", "--folder", "out")
    assert (result.code, result.err[-2:]) == (130, ["to go on: cutlayer resume out/", "stopped"])
