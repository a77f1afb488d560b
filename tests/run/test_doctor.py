"""The whole doctor: the order of its rows, what it does with files it cannot read, and that it always ends."""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cutlayer.run import doctor, doctor_machine
from cutlayer.run.doctor import examine
from cutlayer.run.doctor_rows import Row, still_looking
from tests.cli.conftest import CODE
from tests.run.practice import MEASURED, SECRET, STEPS, Practice, by_name, few_bytes, troubles

pytestmark = pytest.mark.timeout(60)
MACHINE = ["python", "packages", "machine", "torch"]
SITE = ["party file", "private key", "acceptance", "contract", "check of hospital"]


@pytest.fixture
def practice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Practice]:
    few_bytes(monkeypatch)
    monkeypatch.chdir(tmp_path)
    yield Practice(tmp_path)
    deadline = time.monotonic() + 10
    while still_looking():  # what a test has let go
        assert time.monotonic() < deadline
        time.sleep(0.01)


def all_rows(practice: Practice, contract: str = "contract.toml", party: str = "hospital.toml") -> dict[str, Row]:
    paths = [practice.folder / name if name else None for name in (contract, party)]
    return by_name(examine(paths[0], paths[1]))


def contents(folder: Path) -> dict[str, tuple[int, str]]:
    """Return mode and digest of every file."""
    files = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {str(f): (f.stat().st_mode, hashlib.sha256(f.read_bytes()).hexdigest()) for f in files}


def test_everything_in_its_order_and_nothing_changed(practice: Practice):
    before = contents(practice.folder)
    with practice.listening():
        rows = all_rows(practice)
    assert list(rows) == [*MACHINE, "run folder", *SITE, *[f"server: {name}" for name in STEPS + MEASURED]]
    assert troubles(rows.values()) == {}
    assert contents(practice.folder) == before
    assert not (practice.folder / "runs").exists()


def test_without_files_the_machine_is_looked_at(practice: Practice):
    rows = all_rows(practice, "", "")
    assert list(rows) == [*MACHINE, "contract", "party file", "run folder", "network"]
    assert rows["network"].seen == "give the contract: it says whom to dial"
    assert rows["run folder"].seen.startswith("runs: can be written")


def test_a_contract_alone_and_a_party_file_alone(practice: Practice):
    with practice.listening():
        rows = all_rows(practice, party="")
    assert list(rows)[-4:] == ["contract", "server: name", "server: connection", "server: certificate"]
    rows = all_rows(practice, contract="")
    assert rows["check of hospital"].status == rows["network"].status == "skipped"
    assert rows["private key"].status == "ok"


@pytest.mark.provokes(by="code")
@pytest.mark.parametrize("which", ["contract", "party"])
@pytest.mark.parametrize("code", ["E201", "E203"])
def test_a_file_that_cannot_be_read_ends_nothing_else(practice: Practice, which: str, code: str):
    practice.edit("wrong.toml", "[contrakt]\n")
    given = {which: "wrong.toml" if code == "E201" else "missing.toml"}
    rows = all_rows(practice, **given)
    wrong = rows["contract" if which == "contract" else "party file"]
    assert (wrong.status, wrong.code) == ("problem", code)
    assert rows["network"].status == "skipped"
    assert "cannot be read" in rows["network"].seen
    assert rows["run folder"].status == "ok"
    assert ("private key" in rows) == (which == "contract")


def test_all_that_can_be_wrong_at_once(practice: Practice):
    """Each trouble is found although there are others; none of them raises."""
    practice.edit("parties.py", "raise ValueError('x')\n" + CODE)
    practice.write("hospital", 'credentials = "kits/hospital"', more='[run]\nfolder = "parties.py"\n')
    (practice.folder / "kits/hospital/party.key").chmod(0o644)
    assert troubles(all_rows(practice).values()) == {
        "run folder": ("problem", ""),
        "private key": ("problem", ""),
        "check of hospital": ("problem", "E204"),
        "server: connection": ("problem", "E601"),
    }


def test_a_file_that_never_answers(practice: Practice, monkeypatch: pytest.MonkeyPatch):
    """As on a network folder that hangs: here a pipe into which nobody writes."""
    monkeypatch.setattr(doctor, "EACH", 0.3)
    os.mkfifo(practice.folder / "pipe.toml")
    begin = time.monotonic()
    rows = all_rows(practice, contract="pipe.toml", party="pipe.toml")
    assert time.monotonic() - begin < 5
    assert rows["contract"].seen == rows["party file"].seen == "no answer within 0.3 seconds"
    assert "network folder hangs" in rows["contract"].do
    assert rows["network"].status == "skipped"
    os.close(os.open(practice.folder / "pipe.toml", os.O_RDWR))  # lets the two threads go


def test_a_builder_that_never_ends(practice: Practice, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "CODE", 0.5)
    wait = (
        "\nimport pathlib, time\ndef hospital(name):\n"
        "    while not pathlib.Path(__file__).with_name('go').exists(): time.sleep(0.02)\n"
    )
    practice.edit("parties.py", CODE + wait)
    begin = time.monotonic()
    rows = all_rows(practice)
    assert time.monotonic() - begin < 10
    practice.edit("go", "")
    late = rows["check of hospital"]
    assert late.status == "warning"
    assert "'parties.py:hospital' and one batch of its data take more than 0.5 seconds" in late.seen
    assert "`cutlayer check`, which waits for it" in late.do
    assert rows["server: connection"].code == "E601"


def test_a_torch_that_takes_for_ever(practice: Practice, monkeypatch: pytest.MonkeyPatch):
    gate = threading.Event()
    monkeypatch.setattr(doctor, "CODE", 0.2)
    monkeypatch.setattr(doctor, "torch_row", lambda: gate.wait(20) and Row("torch", "ok", "x"))
    rows = all_rows(practice, "", "")
    gate.set()
    assert rows["torch"].status == "warning"
    assert "more than 0.2 seconds" in rows["torch"].seen


@pytest.mark.parametrize(("package", "row"), [("grpc", "network"), ("torch", "torch")])
def test_a_package_that_cannot_be_loaded_is_a_row(
    practice: Practice, monkeypatch: pytest.MonkeyPatch, package: str, row: str
):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        if package == "grpc" or name == "torch":
            monkeypatch.setitem(sys.modules, name, None)
    if package == "grpc":
        for name in ("run.doctor_network", "transport.probe", "transport.grpc_common"):
            monkeypatch.delitem(sys.modules, f"cutlayer.{name}")
    found = all_rows(practice)
    assert found[row].status == "problem"
    assert found[row].do.startswith("install")
    assert found["private key"].status == "ok"


def test_what_nobody_foresaw_is_a_row_too(practice: Practice, monkeypatch: pytest.MonkeyPatch):
    def odd() -> int:
        raise RuntimeError("odd")

    monkeypatch.setattr(doctor_machine, "usable_processors", odd)
    rows = all_rows(practice, "", "")
    assert (rows["machine"].status, rows["machine"].code) == ("problem", "E000")
    assert rows["machine"].do == "report it, with what `cutlayer env` prints"
    assert rows["torch"].status == "ok"


def test_no_secret_is_shown(practice: Practice, monkeypatch: pytest.MonkeyPatch):
    """`by_name` looks at every row for the password and the key; here both are in play."""
    monkeypatch.setenv("HTTPS_PROXY", f"http://doctor:{SECRET}@proxy.example:1")
    practice.write("hospital", f'credentials = "kits/hospital"\nproxy = "http://doctor:{SECRET}@127.0.0.1:1"')
    rows = all_rows(practice)
    assert rows["server: proxy"].code == "E606"
    assert "holds a password" not in rows["party file"].seen  # only this user may read it
    own = (practice.folder / "kits/hospital/party.key").read_text().splitlines()[1]
    assert own not in "".join(f"{row}" for row in rows.values())
