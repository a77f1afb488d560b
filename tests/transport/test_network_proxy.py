"""A party that dials through a proxy: the same run, TLS from end to end, and every refusal on its own terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from cutlayer.errors import CertificateError, ConfigError, CutlayerError, LinkError, PeerError
from cutlayer.transport.grpc_common import server_credentials
from cutlayer.transport.network import Deadlines, Network
from cutlayer.transport.pki import issue
from cutlayer.transport.tls import load_credentials
from tests.proxies import RealProxy, answering, free_port, real_proxy
from tests.run.tap import Tap
from tests.transport.parties import Cast, frame_of, meet, tag_of

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("no_thread_stays")]
LONG = Deadlines(join=30, patience=10, receive=10, send=10, close=1)
SHORT = Deadlines(join=3, patience=2, receive=5, send=5, close=1)
CANARY = b"CANARY-of-the-clinic-0123456789"
SECRET = "s3cr3t-W0rd"
VARIABLES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy", "HTTP_PROXY", "http_proxy")


@pytest.fixture
def pair(cast: Cast, monkeypatch: pytest.MonkeyPatch) -> Cast:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    cast.names = ("server", "clinic")
    cast.certify()
    cast.settings("server")
    return cast


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[RealProxy]:
    with real_proxy(tmp_path) as running:
        yield running


def exchange(network: Network) -> bytes:
    """Send a canary and 3 MiB to the other, take theirs, and return its digits."""
    session = meet(network)
    (other,) = network._settings.others
    network.send(other, frame_of(session, 0, CANARY))
    network.send(other, frame_of(session, 1, CANARY * 100_000))
    assert bytes(network.recv(other, tag_of(session, 1)).payload) == CANARY * 100_000
    got = bytes(network.recv(other, tag_of(session, 0)).payload)
    network.finish()
    return got


def behind(pair: Cast, tap: Tap) -> None:
    """Let the clinic's way to the server end at the tap, which passes all on."""
    pair.addresses["server"] = f"127.0.0.1:{tap.port}"


def recorded(tap: Tap) -> bytes:
    return b"".join(bytes(kept) for kept in (*tap.recorded["out"], *tap.recorded["back"]))


def play(pair: Cast, setting: str, **changes) -> dict[str, object]:
    return pair.play({"server": exchange, "clinic": exchange}, clinic_={"proxy": setting, **changes})


def test_what_passes_the_proxy_is_ciphertext(pair: Cast, proxy: RealProxy):
    port = int(pair.addresses["server"].rpartition(":")[2])
    with Tap(("127.0.0.1", port)) as tap:
        behind(pair, tap)
        done = pair.play(
            {"server": exchange, "clinic": exchange},
            server_={"listen": f"127.0.0.1:{port}"},
            clinic_={"proxy": f"http://{proxy.address}"},
        )
        assert done == {"server": CANARY, "clinic": CANARY}
        assert set(proxy.connects()) == {f"127.0.0.1:{tap.port}"}
        seen = recorded(tap)
    assert len(seen) > 2 * len(CANARY) * 100_000
    assert CANARY not in seen
    assert b"cutlayer.Link" not in seen  # not even the method


def test_the_tap_would_have_seen_it(pair: Cast):
    """Without certificates the same words pass in the open: the search above can find them."""
    pair.credentials.clear()
    port = int(pair.addresses["server"].rpartition(":")[2])
    with Tap(("127.0.0.1", port)) as tap:
        behind(pair, tap)
        done = pair.play({"server": exchange, "clinic": exchange}, server_={"listen": f"127.0.0.1:{port}"})
        assert done == {"server": CANARY, "clinic": CANARY}
        seen = recorded(tap)
    assert CANARY in seen
    assert b"cutlayer.Link" in seen


def test_a_user_and_password(pair: Cast, tmp_path: Path):
    with real_proxy(tmp_path, f"BasicAuth doctor {SECRET}") as proxy:
        assert play(pair, f"http://doctor:{SECRET}@{proxy.address}") == {"server": CANARY, "clinic": CANARY}
        assert set(proxy.connects()) == {pair.addresses["server"]}


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "https_proxy"])
def test_the_machines_proxy(pair: Cast, proxy: RealProxy, monkeypatch: pytest.MonkeyPatch, name: str):
    """`127.1` is this machine too, but only the resolver knows."""
    port = pair.addresses["server"].rpartition(":")[2]
    pair.addresses["server"] = f"127.1:{port}"
    monkeypatch.setenv(name, f"http://{proxy.address}")
    done = pair.play({"server": exchange, "clinic": exchange}, server_={"listen": f"127.0.0.1:{port}"})
    assert done == {"server": CANARY, "clinic": CANARY}
    assert set(proxy.connects()) == {f"127.1:{port}"}  # more than one, where the server begins to listen later


def test_the_party_files_none_wins(pair: Cast, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{free_port()}")
    port = pair.addresses["server"].rpartition(":")[2]
    pair.addresses["server"] = f"[::ffff:127.0.0.1]:{port}"  # this machine, written so that its proxy would be used
    listen = {"listen": f"127.0.0.1:{port}"}
    done = pair.play({"server": exchange, "clinic": exchange}, server_=listen, clinic_={"proxy": "none"})
    assert done == {"server": CANARY, "clinic": CANARY}


def test_the_servers_name_is_checked_behind_the_proxy(pair: Cast, proxy: RealProxy):
    """The proxy leads to another party of the same authority: it is not the server."""
    issue(pair.folder / "ca", "lab", pair.folder)
    pair.credentials["lab"] = load_credentials(pair.folder / "lab", "lab")
    with ThreadPoolExecutor(1) as pool:
        lab = grpc.server(pool)
        lab.add_secure_port(pair.addresses["server"], server_credentials(pair.credentials["lab"]))
        lab.start()
        results = pair.play({"clinic": meet}, deadlines=LONG, proxy=f"http://{proxy.address}")
        lab.stop(0).wait()
    assert isinstance(results["clinic"], CertificateError)
    assert (results["clinic"].code, results["clinic"].got) == ("E667", "one made for lab")
    assert proxy.connects()


# --- what goes wrong -----------------------------------------------------------------------------------------------


def failing(pair: Cast, setting: str, deadlines: Deadlines = LONG) -> CutlayerError:
    """Return what ends the clinic, which must not be the end of its patience."""
    begin = time.monotonic()
    results = pair.play({"clinic": meet}, deadlines=deadlines, proxy=setting)
    assert time.monotonic() - begin < LONG.join / 2
    error = results["clinic"]
    assert isinstance(error, CutlayerError)
    assert SECRET not in "\n".join(error.lines()) + repr(pair.events)
    return error


@pytest.mark.parametrize("user", ["", f"doctor:{SECRET}@"], ids=["none", "wrong"])
def test_a_proxy_that_wants_another_user_ends_the_run(pair: Cast, tmp_path: Path, user: str):
    with real_proxy(tmp_path, "BasicAuth someone else") as proxy:
        error = failing(pair, f"http://{user}{proxy.address}")
    assert (type(error), error.code) == (LinkError, "E607")


def test_a_proxy_that_refuses_ends_the_run(pair: Cast, tmp_path: Path):
    with real_proxy(tmp_path, "ConnectPort 9") as proxy:
        error = failing(pair, f"http://{proxy.address}")
    assert (type(error), error.code) == (LinkError, "E608")
    assert pair.addresses["server"] in error.where


@pytest.mark.provokes("E610")
def test_what_is_no_proxy_ends_the_run(pair: Cast):
    with answering(b"SSH-2.0-x\r\n") as port:
        error = failing(pair, f"http://127.0.0.1:{port}")
    assert (type(error), error.code) == (LinkError, "E610")
    assert "no answer to HTTP CONNECT" in error.got


@pytest.mark.provokes("E606")
def test_a_proxy_that_is_away_is_told_at_once_and_is_the_error_in_the_end(pair: Cast):
    error = failing(pair, f"http://doctor:{SECRET}@127.0.0.1:{free_port()}", SHORT)
    assert (type(error), error.code) == (LinkError, "E606")
    told = pair.heard("clinic", "blocked")
    assert [facts["code"] for facts in told] == ["E606"]
    assert told[0]["party"] == "server"
    assert told[0]["remedy"] == error.remedy


@pytest.mark.provokes("E609")
def test_a_server_that_is_down_behind_the_proxy(pair: Cast, proxy: RealProxy):
    error = failing(pair, f"http://{proxy.address}", SHORT)
    assert (type(error), error.code) == (LinkError, "E609")
    assert error.remedy
    assert [facts["code"] for facts in pair.heard("clinic", "blocked")] == ["E609"]


def test_a_server_that_is_down_without_a_proxy_is_another_error(pair: Cast):
    error = failing(pair, "", SHORT)
    assert (type(error), error.code) == (PeerError, "E702")
    assert error.got.startswith("E601 ")
    assert not pair.heard("clinic", "blocked")
    assert [(told["party"], told["cause"]) for told in pair.heard("clinic", "unreached")] == [("server", error.got)]


def test_a_proxy_that_comes_back_is_used(pair: Cast, tmp_path: Path):
    """Nobody is there at first; the run goes on as soon as somebody is."""
    with real_proxy(tmp_path) as before:
        port = before.port

    def clinic(network: Network) -> bytes:
        deadline = time.monotonic() + 20
        while not pair.heard("clinic", "blocked"):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        with real_proxy(tmp_path, port=port) as again:
            got = exchange(network)
            assert again.connects()
        return got

    results = pair.play(
        {"server": exchange, "clinic": clinic}, clinic_={"proxy": f"http://127.0.0.1:{port}"}, deadlines=LONG
    )
    assert results == {"server": CANARY, "clinic": CANARY}


def test_plaintext_never_goes_through_a_proxy(pair: Cast, proxy: RealProxy):
    pair.credentials.clear()
    error = failing(pair, f"http://{proxy.address}")
    assert (type(error), error.code) == (ConfigError, "E211")
    assert proxy.address in error.got
    assert not proxy.connects()


def test_an_unusable_setting_is_told_before_anything_is_dialled(pair: Cast, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HTTPS_PROXY", f"socks5://doctor:{SECRET}@proxy.example:1")
    port = pair.addresses["server"].rpartition(":")[2]
    pair.addresses["server"] = f"server.example:{port}"
    error = failing(pair, "")
    assert (type(error), error.code) == (ConfigError, "E214")


def test_settings_do_not_show_the_password(pair: Cast):
    assert SECRET not in repr(pair.settings("clinic", proxy=f"http://doctor:{SECRET}@proxy.example:1"))
