"""The way to the others, good and bad, over real loopback connections; each row says what to do, and all of it ends."""

from __future__ import annotations

import socket
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from cutlayer.core.topologies import vanilla
from cutlayer.run import doctor_network
from cutlayer.run.config import Contract
from cutlayer.run.doctor_network import address_rows, listening_row, network_rows
from cutlayer.run.doctor_rows import Row
from cutlayer.transport.pki import create_authority
from cutlayer.transport.tls import Credentials
from tests.proxies import answering, free_port, real_proxy
from tests.run.practice import (
    LONG_AGO,
    MEASURED,
    SECRET,
    STEPS,
    Practice,
    by_name,
    few_bytes,
    grpc_server,
    look,
    troubles,
)

pytestmark = pytest.mark.timeout(60)
QUICK = 0.4  # seconds, for what never answers


@pytest.fixture
def practice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Practice:
    few_bytes(monkeypatch)
    return Practice(tmp_path)


def stopped_at(rows: dict[str, Row], step: str, code: str) -> Row:
    """Return the row of the step that failed, after which nothing more was tried."""
    bad = rows[f"server: {step}"]
    assert (bad.status, bad.code) == ("problem", code), rows
    names = list(rows)
    after = names[names.index(bad.name) + 1 :]
    assert after == ["server: all else", "server: clock"]
    assert [rows[name].status for name in after] == ["skipped", "skipped"]
    assert f"'{bad.name}' failed" in rows["server: all else"].seen
    assert f"{datetime.now(UTC):%Y-%m-%d}" in rows["server: clock"].seen
    return bad


# --- all is well -----------------------------------------------------------------------------------------------------


def test_all_is_well(practice: Practice):
    with practice.listening() as visits:
        rows = look(practice)
    assert list(rows) == [f"server: {name}" for name in STEPS + MEASURED]
    assert {row.status for row in rows.values()} == {"ok"}
    assert rows["server: name"].seen.startswith("127.0.0.1 in ")
    assert "certificate of server, valid 20" in rows["server: certificate"].seen
    assert "the server accepts the certificate of hospital" in rows["server: accepts ours"].seen
    assert "40.0 kB up for every 1,000 samples an epoch take " in rows["server: speed"].seen  # 1,000 x 10 x 4 bytes
    assert rows["server: contract"].seen == "server has the same contract"
    assert {visit.name for visit in visits} == {"hospital"}
    assert {visit.result for visit in visits} == {"accepted", "measured"}


# --- the way there ---------------------------------------------------------------------------------------------------


def unresolved(*_: object, **__: object) -> None:
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


@pytest.mark.provokes("E602")
def test_a_name_that_does_not_resolve(practice: Practice, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(socket, "getaddrinfo", unresolved)
    bad = stopped_at(look(practice), "name", "E602")
    assert bad.seen == "the host name 127.0.0.1 cannot be resolved (got Name or service not known)"
    assert "Correct the server's host" in bad.do


@pytest.mark.provokes("E621")
def test_a_name_service_that_does_not_answer(practice: Practice, monkeypatch: pytest.MonkeyPatch):
    gate = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: gate.wait(20) and [])
    bad = stopped_at(look(practice, QUICK), "name", "E621")
    gate.set()
    assert "name service (DNS) does not answer for 127.0.0.1" in bad.do


@pytest.mark.provokes("E601")
def test_nobody_listens(practice: Practice):
    bad = stopped_at(look(practice), "connection", "E601")
    assert "nobody listens at the server's address" in bad.seen
    assert "ask the people of server to start `cutlayer doctor CONTRACT --party FILE --serve`" in bad.do
    assert f"lets this site of hospital in at port {practice.port}" in bad.do
    assert f"connect to 127.0.0.1 port {practice.port}" in bad.do


def test_somebody_who_never_answers(practice: Practice):
    """As behind a firewall that takes connections and passes nothing on."""
    with socket.create_server(("127.0.0.1", practice.port)):
        bad = stopped_at(look(practice, QUICK), "certificate", "E621")
    assert "ask the people of server" in bad.do


@pytest.mark.provokes("E648")
def test_a_plaintext_server(practice: Practice):
    with grpc_server(practice.port, None):
        bad = stopped_at(look(practice), "certificate", "E648")
    assert bad.seen.startswith("this party speaks TLS and the server plaintext")
    assert "give all parties certificates" in bad.do


@pytest.mark.provokes("E648")
def test_a_server_with_tls_for_a_party_without(practice: Practice):
    practice.write("hospital", "insecure = true")
    with grpc_server(practice.port, practice.credentials("server")):
        rows = look(practice)
    assert troubles(rows.values()) == {"server: plaintext": ("problem", "E648")}
    assert rows["server: plaintext"].seen.startswith("this party speaks plaintext and the server TLS")


# --- through a proxy -------------------------------------------------------------------------------------------------


def behind(practice: Practice, address: str) -> None:
    practice.write("hospital", f'credentials = "kits/hospital"\nproxy = "http://doctor:{SECRET}@{address}"')


def test_a_proxy_that_lets_us_pass(practice: Practice, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()  # all bytes: this proxy holds little ones back for a while
    with real_proxy(practice.folder, f"BasicAuth doctor {SECRET}") as proxy, practice.listening():
        behind(practice, proxy.address)
        rows = look(practice)
        assert set(proxy.connects()) == {f"127.0.0.1:{practice.port}"}
    ways = ["dialled through", "proxy", "way through the proxy", "certificate", "accepts ours"]
    assert list(rows) == [f"server: {name}" for name in ways + MEASURED]
    assert {row.status for row in rows.values()} == {"ok"}
    assert rows["server: dialled through"].seen == f"the proxy {proxy.address} ([network] proxy of the party file)"


@pytest.mark.parametrize(
    ("line", "code", "seen", "do"),
    [
        pytest.param(
            "ConnectPort 9", "E608", "got 403 ", "Ask your network's people to allow CONNECT",
            marks=pytest.mark.provokes("E608"),
        ),
        pytest.param(
            "BasicAuth somebody else", "E607", "those given are refused", 'Set proxy = "http://user:password@host:port"',
            marks=pytest.mark.provokes("E607"),
        ),
        pytest.param(
            "# the server is not there", "E609", "got 500 ", "ask the people of server to start",
            marks=pytest.mark.provokes("E609"),
        ),
    ],
)  # fmt: skip
def test_a_proxy_that_does_not_let_us_pass(practice: Practice, line: str, code: str, seen: str, do: str):
    with real_proxy(practice.folder, line) as proxy:
        behind(practice, proxy.address)
        bad = stopped_at(look(practice), "way through the proxy", code)
    assert seen in bad.seen
    assert do in bad.do


def test_a_proxy_that_never_answers_and_one_that_is_none(practice: Practice):
    with answering(None) as port:
        behind(practice, f"127.0.0.1:{port}")
        assert "no answer in time" in stopped_at(look(practice, QUICK), "way through the proxy", "E609").seen
    with answering(b"SSH-2.0-server\r\n") as port:
        behind(practice, f"127.0.0.1:{port}")
        assert "Correct the proxy's host" in stopped_at(look(practice), "way through the proxy", "E610").do
    behind(practice, f"127.0.0.1:{free_port()}")
    assert 'proxy = "none"' in stopped_at(look(practice), "proxy", "E606").do


# --- certificates ----------------------------------------------------------------------------------------------------


def theirs(practice: Practice, name: str = "server") -> Credentials:
    """Return a server's certificate of a foreign authority."""
    create_authority(practice.folder / "theirs", name="theirs")
    practice.certify(name, authority=practice.folder / "theirs")
    return practice.credentials(name)


@pytest.mark.provokes("E667")
def test_a_server_of_a_foreign_authority(practice: Practice):
    with practice.listening(credentials=theirs(practice)) as visits:
        bad = stopped_at(look(practice), "certificate", "E667")
    assert "the server's certificate is of another authority" in bad.seen
    assert "Compare `cutlayer pki show` at both parties" in bad.do
    assert [visit.result for visit in visits] == ["refused"]
    assert "it does not accept our certificate" in visits[0].text


def test_a_server_of_another_name_and_one_that_has_expired(practice: Practice):
    practice.certify("archive")
    with practice.listening(credentials=practice.credentials("archive")):
        assert "got one made for archive" in stopped_at(look(practice), "certificate", "E667").seen
    practice.certify("server", days=2, now=LONG_AGO)
    with grpc_server(practice.port, practice.credentials("server")):
        assert "the server's certificate has expired" in stopped_at(look(practice), "certificate", "E667").seen


@pytest.mark.provokes("E668")
@pytest.mark.parametrize("how", ["expired", "not yet", "foreign"])
def test_a_server_that_does_not_accept_ours(practice: Practice, how: str):
    """The listener tells its own people why, which TLS does not tell us."""
    if how == "foreign":
        authority = (practice.folder / "ca" / "ca.pem").read_bytes()
        theirs(practice, "hospital")
        (practice.folder / "kits/hospital/ca.pem").write_bytes(authority)
    else:
        dates = {"days": 2, "now": LONG_AGO} if how == "expired" else {"now": datetime.now(UTC) + timedelta(days=9)}
        practice.certify("hospital", **dates)
    with practice.listening() as visits:
        bad = stopped_at(look(practice), "accepts ours", "E668")
    assert "the server does not accept our certificate" in bad.seen
    assert "ours names hospital, issuer CN=" in bad.seen
    assert "Compare the authority (ca.pem) of both parties and both clocks" in bad.do
    assert [visit.result for visit in visits] == ["refused"]
    assert visits[0].text.startswith("its certificate: ")


def test_a_party_that_the_contract_does_not_know_is_told_at_the_server(practice: Practice):
    with practice.listening(parties=("server",)) as visits:
        look(practice)
    assert "it is no party of the contract" in visits[0].text


# --- who dials whom --------------------------------------------------------------------------------------------------


def test_the_server_listens_and_dials_nobody(practice: Practice):
    rows = look(practice, party="server")
    assert rows["hospital: way"].status == "skipped"
    assert "hospital dials this party: start `--serve` here" in rows["hospital: way"].seen
    assert rows["listening"].status == "ok"
    assert f"127.0.0.1:{practice.port}" in rows["listening"].seen


def test_a_port_that_is_taken_and_an_address_that_is_not_ours(practice: Practice):
    with practice.listening():
        taken = by_name([listening_row(f"127.0.0.1:{practice.port}", coordinates=True)])["listening"]
    assert (taken.status, taken.code) == ("problem", "E604")
    assert "in use" in taken.seen
    assert taken.do.startswith("stop what else uses the port, or set `listen` in the party file")
    other = by_name([listening_row("192.0.2.1:7443", coordinates=False)])["listening"]
    assert (other.status, other.code) == ("problem", "E604")
    assert other.do == (
        'behind a router or a firewall set listen = "0.0.0.0:PORT" in [network] of the party file, and have the '
        "contract's address passed on to that port; or remove this party from [addresses] of the contract: then it "
        "dials out, and opens no port"
    )
    server = by_name([listening_row("192.0.2.1:7443", coordinates=True)])["listening"]
    assert server.do.endswith("or let a party that others can reach be the coordinator")
    with socket.create_server(("127.0.0.1", practice.port)):  # it was listened at for a moment only
        pass


def test_a_trial_without_certificates_asks_for_plaintext_and_no_more(practice: Practice):
    practice.write("hospital", "insecure = true")
    with grpc_server(practice.port, None):
        rows = look(practice)
    assert [row.status for row in rows.values()] == ["ok", "ok", "ok", "skipped"]
    assert "the server speaks plaintext, as this party does" in rows["server: plaintext"].seen
    assert rows["server: certificate"].seen == "this party has no certificates (insecure = true)"


@pytest.mark.parametrize(
    ("network", "code"),
    [
        ("", "E206"),
        ('credentials = "nowhere"', "E666"),
        ('credentials = "kits/hospital"\nlisten = "127.0.0.1:1"', "E206"),
    ],
)
def test_a_party_file_that_does_not_say_how_to_dial(practice: Practice, network: str, code: str):
    practice.write("hospital", network)
    assert troubles(look(practice).values()) == {"network": ("problem", code)}


def several(practice: Practice, *addressed: str) -> Contract:
    """Return a contract of clinic, hospital and server, some of which have addresses."""
    practice.certify("clinic")
    practice.write("clinic")
    plan = vanilla(["clinic", "hospital"], "server", cut="float32[batch, 8]", output="float32[batch, 2]")
    ports = {name: f"127.0.0.1:{practice.port if name == 'server' else free_port()}" for name in addressed}
    return Contract(plan=plan, coordinator="server", addresses=ports)


def test_two_that_only_dial_are_told_how_they_meet(practice: Practice):
    contract = several(practice, "server")
    rows = by_name(network_rows(contract, practice.file("clinic"), each=5))
    assert rows["hospital: way"].seen == "neither has an address: server passes on, sealed, what the two send"


@pytest.mark.parametrize("how", ["error", "hang"])
def test_one_way_that_goes_wrong_does_not_end_the_others(practice: Practice, monkeypatch: pytest.MonkeyPatch, how: str):
    contract = several(practice, "clinic", "server")
    gate, usual = threading.Event(), doctor_network.contact

    def contact(target: Any, *args: Any, **named: Any) -> Any:
        if target.party == "clinic" and how == "error":
            raise ZeroDivisionError("odd")
        if target.party == "clinic":
            gate.wait(30)
        return usual(target, *args, **named)

    monkeypatch.setattr(doctor_network, "contact", contact)
    monkeypatch.setattr(doctor_network, "_STEPS", 2)
    rows = by_name(network_rows(contract, practice.file("hospital"), each=QUICK))
    gate.set()
    assert rows["clinic: way"].status == "problem"
    assert rows["clinic: way"].code == ("E000" if how == "error" else "")
    assert rows["server: connection"].code == "E601"


# --- a site that has no party file yet -------------------------------------------------------------------------------


def test_addresses_alone(practice: Practice):
    with practice.listening():
        rows = by_name(address_rows(practice.contract, each=5))
    assert [row.status for row in rows.values()] == ["ok", "ok", "ok", "skipped"]
    assert rows["contract"].seen == f"digest {practice.contract.digest()}"
    assert "give --party FILE" in rows["server: certificate"].seen
    bad = by_name(address_rows(practice.contract, each=5))["server: connection"]
    assert bad.code == "E601"
    assert "lets this site in at port" in bad.do


@pytest.mark.provokes("E214")
def test_a_machines_proxy_that_cannot_be_used(practice: Practice, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HTTPS_PROXY", f"socks5://doctor:{SECRET}@proxy.example:1")
    text = (practice.folder / "contract.toml").read_text().replace("127.0.0.1:", "server.example:")
    practice.edit("contract.toml", text)
    alone = by_name(address_rows(practice.contract, each=5))
    assert (alone["server: way"].status, alone["server: way"].code) == ("problem", "E214")
    assert troubles(look(practice).values()) == {"network": ("problem", "E214")}
