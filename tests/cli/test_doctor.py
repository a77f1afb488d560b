"""`cutlayer doctor` as a person meets it: rows, last line, exit code, document; and a real pair with `--serve`."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cutlayer.cli import doctor
from cutlayer.cli.catalogue import catalogue
from cutlayer.cli.console import Output
from cutlayer.run import doctor as examination
from cutlayer.run.doctor_network import _TITLES
from cutlayer.transport.probe_listener import Visit
from tests.cli.conftest import CODE, CONTRACT, write_site
from tests.proxies import free_port

pytestmark = pytest.mark.timeout(120)
Call = Callable[..., Any]
ROW = {"name", "status", "seen", "do", "code"}
SECRET = "s3cr3t-W0rd"
PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "check-before-a-run.md"


@pytest.fixture
def study(demo: Path, call: Call) -> Path:
    """The demo with certificates and a port of its own."""
    (demo / "contract.toml").write_text(CONTRACT.replace("7443", str(free_port())))
    assert call("pki", "init", "ca").code == 0
    assert call("pki", "issue", "hospital", "server").code == 0
    for name in ("hospital", "server"):
        write_site(demo, name, f'credentials = "credentials/{name}"')
    return demo


def statuses(document: Any) -> dict[str, str]:
    assert all(set(row) == ROW for row in document["rows"])
    assert all(row["do"] for row in document["rows"] if row["status"] in ("warning", "problem"))
    return {row["name"]: row["status"] for row in document["rows"]}


# --- alone ------------------------------------------------------------------------------------------------------------


def test_a_fit_machine(call: Call, demo: Path):
    result = call("doctor")
    assert (result.code, result.err) == (0, [])
    assert [line.split()[:2] for line in result.out[:3]] == [["ok", "python"], ["ok", "packages"], ["ok", "machine"]]
    assert result.out[-1] == "all is well; 3 not looked at"
    assert call("doctor", "-q").out == [result.out[-1]]


def test_a_problem_is_followed_by_what_to_do_and_exits_with_1(call: Call, study: Path):
    result = call("doctor", "contract.toml", "--party", "hospital.toml")
    assert (result.code, result.err) == (1, [])
    place = next(number for number, line in enumerate(result.out) if line.startswith("problem"))
    assert "server: connection" in result.out[place]
    assert "E601 nobody listens at the server's address" in result.out[place]
    assert result.out[place + 1].startswith("         do: ask the people of server to start")
    assert result.out[-1] == "1 problem; 2 not looked at"


def test_quiet_keeps_problems_and_the_last_line(call: Call, study: Path):
    result = call("doctor", "contract.toml", "--party", "hospital.toml", "-q")
    assert result.code == 1
    assert result.out == ["1 problem; 2 not looked at"]
    assert [line.split()[0] for line in result.err] == ["problem", "do:"]


def test_warnings_alone_exit_with_0(call: Call, study: Path):
    """A trial without certificates runs, and is said to be one."""
    write_site(study, "server", "insecure = true")
    result = call("doctor", "contract.toml", "--party", "server.toml")
    assert result.code == 0, result.out
    assert result.out[-1] == "1 warning; 1 not looked at"


def test_the_document(call: Call, study: Path):
    result = call("doctor", "contract.toml", "--party", "hospital.toml", "--json")
    assert result.code == 1
    document = result.json()
    assert set(document) == {"ok", "counts", "rows"}
    assert document["ok"] is False
    found = statuses(document)
    assert document["counts"]["problem"] == 1
    assert sum(document["counts"].values()) == len(document["rows"])
    assert found["server: connection"] == "problem"
    assert next(row["code"] for row in document["rows"] if row["status"] == "problem") == "E601"


def test_a_builder_that_prints_and_asks_disturbs_nobody(call: Call, study: Path):
    code = "\ndef hospital(name):\n    print('which scanner?')\n    return input()\n"
    (study / "parties.py").write_text(CODE + code)
    result = call("doctor", "contract.toml", "--party", "hospital.toml", "--json", stdin="mine\n")
    row = next(row for row in result.json()["rows"] if row["code"] == "E204")
    assert "EOFError" in row["seen"]
    assert "which scanner?" in "\n".join(result.err)


def test_no_secret_is_shown(call: Call, study: Path):
    network = f'credentials = "credentials/hospital"\nproxy = "http://doctor:{SECRET}@127.0.0.1:{free_port()}"'
    write_site(study, "hospital", network)
    (study / "hospital.toml").chmod(0o644)
    for words in ((), ("--json",), ("-v",), ("-q",)):
        result = call("doctor", "contract.toml", "--party", "hospital.toml", *words)
        assert result.code == 1
        assert SECRET not in "\n".join([*result.out, *result.err])
    assert "E606" in "\n".join(call("doctor", "contract.toml", "--party", "hospital.toml").out)


def test_ctrl_c_ends_it(call: Call, demo: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*_: object) -> Iterator[None]:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(examination, "examine", interrupted)
    result = call("doctor")
    assert (result.code, result.err) == (130, ["stopped"])


def test_a_check_that_never_ends_does_not_keep_the_process(study: Path):
    """A process whose thread is in torch for ever ends all the same, and in good order."""
    (study / "parties.py").write_text(f"{CODE}\nwhile True:\n    torch.randn(200, 200) @ torch.randn(200, 200)\n")
    script = (
        "import sys\nimport cutlayer.run.doctor as doctor\nfrom cutlayer.cli import main\n"
        "doctor.CODE = 3.0\nsys.argv[1:] = ['doctor', 'contract.toml', '--party', 'hospital.toml', '--json']\nmain()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "")
    assert statuses(json.loads(done.stdout))["check of hospital"] == "warning"


# --- the page that tells of it ----------------------------------------------------------------------------------------


def test_the_page_names_every_row_and_its_commands_are_right(call: Call, study: Path):
    page = PAGE.read_text()
    commands = re.findall(r"(?m)^cutlayer (doctor.*)$", page)
    assert len(commands) == 4
    named: set[str] = set()
    for command in commands:
        words = [*command.split(), *(["--minutes", "0.01"] if "--serve" in command else ["--json"])]
        result = call(*words)
        assert result.code in (0, 1), result.err
        if "--json" in words:
            named |= {name.rpartition(": ")[2] for name in statuses(result.json())}
    named |= {*_TITLES.values(), "round trip", "speed", "release", "listening", "way", "dialled through"}
    rows = {name for row in re.findall(r"(?m)^\| (`.*?) \|", page) for name in re.findall(r"`([^`]+)`", row)}
    aside = {"way", "listening"}
    assert all(f"`{name}`" in page for name in aside)
    assert {name.replace("PARTY", "hospital") for name in rows} | aside | {"all else"} >= named
    assert rows - {name.replace("hospital", "PARTY") for name in named} == set()
    assert {"E601", "E667"} <= set(re.findall(r"E\d{3}", page)) <= set(catalogue())
    assert f"({PAGE.name})" in PAGE.with_name("three-organisations.md").read_text()


# --- for others -------------------------------------------------------------------------------------------------------


@pytest.mark.provokes("E215")
@pytest.mark.parametrize(
    ("words", "got"),
    [
        ((), "neither"),
        (("contract.toml",), "the contract only"),
        (("--party", "hospital.toml"), "--party FILE only"),
        (("contract.toml", "--party", "hospital.toml"), "hospital, which has none"),
    ],
)
def test_serving_needs_both_files_and_an_address(call: Call, study: Path, words: tuple[str, ...], got: str):
    result = call("doctor", *words, "--serve")
    assert result.code == 2
    assert result.err[0] == "E215 this party cannot listen for the doctors of others"
    assert result.err[2].endswith(f", got {got}")


@pytest.mark.provokes("E215")
def test_serving_without_certificates_says_how_to_get_them_and_not_to_go_to_the_coordinator(call: Call, study: Path):
    write_site(study, "server")
    result = call("doctor", "contract.toml", "--party", "server.toml", "--serve")
    assert result.err[0] == "E215 this party cannot listen for the doctors of others"
    assert result.err[2] == "  why:   expected a party with certificates, got server with insecure = true"
    assert "make certificates: cutlayer pki init ca --name" in result.err[3]
    assert (
        "cutlayer pki issue hospital server; in [network] of the party file put credentials = FOLDER" in result.err[3]
    )
    assert "at the coordinator" not in result.err[3]


@pytest.mark.provokes("E604")
def test_a_port_that_is_taken(call: Call, study: Path):
    import socket

    from cutlayer.run.config import load_contract
    from cutlayer.transport.addresses import host_port

    with socket.create_server(host_port(load_contract(study / "contract.toml").addresses["server"])):
        result = call("doctor", "contract.toml", "--party", "server.toml", "--serve")
    assert result.code == 4
    assert result.err[0] == "E604 the party cannot listen at its address"


@pytest.mark.provokes("E661")
def test_a_servers_own_certificate_that_has_expired(call: Call, study: Path):
    from datetime import UTC, datetime, timedelta

    from cutlayer.transport.pki import create_authority, issue

    ago = datetime.now(UTC) - timedelta(days=9)
    create_authority(study / "old", name="old", now=ago)
    issue(study / "old", "server", study / "old-kits", days=2, now=ago)
    write_site(study, "server", 'credentials = "old-kits/server"')
    result = call("doctor", "contract.toml", "--party", "server.toml", "--serve")
    assert result.code == 4
    assert result.err[0] == "E661 the certificate has expired"


def test_serving_ends_by_itself(call: Call, study: Path):
    begin = time.monotonic()
    result = call("doctor", "contract.toml", "--party", "server.toml", "--serve", "--minutes", "0.01")
    assert time.monotonic() - begin < 20
    assert (result.code, result.out) == (0, ["accepted: nobody; refused: 0"])
    assert result.err[0].endswith("as server for 0.01 minutes; Ctrl-C ends it")
    assert result.err[1] == "the others run: cutlayer doctor CONTRACT --party THEIR_FILE"


@pytest.mark.parametrize("as_json", [False, True], ids=["words", "json"])
def test_a_real_pair(call: Call, study: Path, as_json: bool):
    """The server's people serve in a process of their own; the hospital looks; each side is told of the other."""
    words = [sys.executable, "-m", "cutlayer", "doctor", "contract.toml", "--party", "server.toml", "--serve"]
    words += ["--json"] if as_json else []
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            assert server.stderr.readline().startswith("listening at 127.0.0.1:")
            for _ in range(2):  # one after the other: each is told
                good = call("doctor", "contract.toml", "--party", "hospital.toml", "--json").json()
            foreign(call, study)
            bad = call("doctor", "contract.toml", "--party", "hospital.toml", "--json").json()
            server.send_signal(signal.SIGINT)
            out, err = server.communicate(timeout=30)
        finally:
            server.kill()
    assert server.returncode == 0
    assert err.splitlines()[-1] == "stopped"
    assert good["ok"] is True, [row for row in good["rows"] if row["status"] == "problem"]
    assert {"server: accepts ours", "server: speed", "server: clock", "server: contract"} <= set(statuses(good))
    assert [row["code"] for row in bad["rows"] if row["status"] == "problem"] == ["E664", "E668"]
    if as_json:
        document = json.loads(out)
        visits = document["visits"]
        assert document["earlier"] == 0
        assert all(set(one) == {"at", "address", "name", "result", "text"} for one in visits)
        told = [(one["result"], one["name"]) for one in visits]
    else:
        assert out.splitlines()[-1] == "accepted: hospital; refused: 1"
        told = [(line.split()[3], line.split()[4].replace("unknown", "")) for line in out.splitlines()[:-1]]
    assert told == [("accepted", "hospital"), ("measured", "hospital")] * 2 + [("refused", "")]
    assert "its certificate: " in out


def test_a_flood_of_visits_is_counted_and_leaves_room_for_others(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    now = [0.0]
    monkeypatch.setattr(doctor, "_MOST", 30)
    monkeypatch.setattr(doctor.time, "monotonic", lambda: now[0])
    visits = doctor._Visits(Output(json=False, quiet=False, verbose=False))

    def come(count: int, host: str, name: str = "") -> list[str]:
        for port in range(count):
            result = "accepted" if name else "refused"
            visits.add(Visit(address=f"{host}:{port}", name=name, result=result, text="it speaks no TLS"))
        return capsys.readouterr().out.splitlines()

    assert len(come(500, "192.0.2.9")) == 20
    assert come(1, "192.0.2.7", "hospital")[0].endswith("accepted hospital from 192.0.2.7: it speaks no TLS")
    assert sum(len(come(30, f"[2001:db8::{n}]")) for n in range(50)) == 100 - 21
    now[0] = 61.0
    told = come(1, "192.0.2.7", "hospital")
    assert told[0] == f"{500 + 1 + 1500 - 100} visits more in that minute"
    assert len(told) == 2
    assert len(come(25, "192.0.2.9")) == 20
    assert visits.summary() == "accepted: hospital; refused: 2025"
    assert capsys.readouterr().out == "5 visits more in that minute\n"
    document = visits.document()
    assert (len(document["visits"]), document["earlier"]) == (30, 2027 - 30)
    assert document["visits"][-1]["address"] == "192.0.2.9:24"


def foreign(call: Call, study: Path) -> None:
    """Give the hospital a certificate of another authority, while it goes on to trust the study's."""
    assert call("pki", "init", "other").code == 0
    assert call("pki", "issue", "hospital", "--authority", "other", "--out", "others").code == 0
    (study / "others/hospital/ca.pem").write_bytes((study / "ca/ca.pem").read_bytes())
    write_site(study, "hospital", 'credentials = "others/hospital"')
