"""A party that fails before a run has begun tells the others, whenever they come, why, and not only that it is gone."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from cutlayer.errors import CutlayerError, DataError, HandshakeError, LinkError, PeerError
from cutlayer.transport import control
from cutlayer.transport.control import LinkHello
from cutlayer.transport.handshake import single
from cutlayer.transport.network import Deadlines, Network
from cutlayer.transport.tls import load_credentials
from tests.transport.parties import Cast, meet
from tests.transport.test_network_refused import DIGEST, say

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("no_thread_stays")]
PATIENT = Deadlines(join=30, patience=10, receive=10, send=10, close=8)


def wrong_data(network: Network) -> None:
    network.abort(DataError("no data here", where="/secret/path", got="42 rows", remedy="copy it", code="E257"))


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "mtls"])
@pytest.mark.parametrize("other", ["server", "clinic"])
def test_who_comes_after_two_that_have_other_plans_hears_of_the_plans(cast: Cast, secure: bool, other: str):
    if secure:
        cast.certify()
    begin = time.monotonic()

    def start_late(party: str, **changes: Any) -> Network:
        if party == "lab":
            time.sleep(1.5)  # the others have failed by then
        return Cast.network(cast, party, **changes)

    cast.network = start_late  # type: ignore[method-assign]
    results = cast.play(
        dict.fromkeys(("server", "clinic", "lab"), meet), deadlines=PATIENT, **{f"{other}_": {"digest": "f" * 64}}
    )
    assert {name: (type(error), error.code) for name, error in results.items()} == dict.fromkeys(
        results, (HandshakeError, "E642")
    )
    assert all("got contract" in str(error) for error in results.values())
    assert time.monotonic() - begin < PATIENT.close


@pytest.mark.parametrize("fails", ["server", "clinic"])
def test_who_fails_before_the_others_come_tells_them(cast: Cast, fails: str):
    begin = time.monotonic()

    def start_late(party: str, **changes: Any) -> Network:
        if party != fails:
            time.sleep(1)
        return Cast.network(cast, party, **changes)

    cast.network = start_late  # type: ignore[method-assign]
    results = cast.play({**dict.fromkeys(("server", "clinic", "lab"), meet), fails: wrong_data}, deadlines=PATIENT)
    assert results.pop(fails) is None
    for error in results.values():
        assert (type(error), error.code) == (PeerError, "E703")
        assert error.what == f"{fails} failed: no data here"
        assert (error.got, error.remedy) == (f"E257 at {fails}", f"at {fails}: copy it")
        assert "secret" not in str(error)
        assert "42" not in str(error)
    assert time.monotonic() - begin < PATIENT.close


def test_nobody_is_waited_for_longer_than_close(cast: Cast):
    begin = time.monotonic()
    cast.play({"server": wrong_data}, deadlines=dataclasses.replace(PATIENT, close=1))
    assert 1 <= time.monotonic() - begin < 3


def test_ctrl_c_and_parties_that_do_not_come_end_at_once(cast: Cast):
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt), cast.network("server", deadlines=PATIENT):
        raise KeyboardInterrupt
    results = cast.play({"server": meet}, deadlines=dataclasses.replace(PATIENT, join=0.5))
    assert results["server"].code == "E702"
    assert time.monotonic() - begin < 3


def test_a_party_that_cannot_listen_tells_the_coordinator(cast: Cast):
    cast.names = cast.addressed = ("server", "clinic")
    cast.certify()
    clinic = {"listen": "192.0.2.7:7070"}  # an address of no machine
    results = cast.play({"server": meet, "clinic": meet}, deadlines=PATIENT, clinic_=clinic)
    assert (type(results["clinic"]), results["clinic"].code) == (LinkError, "E604")
    assert (type(results["server"]), results["server"].code) == (PeerError, "E703")
    assert results["server"].got == "E604 at clinic"
    assert results["clinic"].got == "192.0.2.7:7070: Cannot assign requested address"
    assert "192.0.2.7" not in str(results["server"])


def test_a_party_that_is_started_twice_does_not_end_its_run(cast: Cast):
    """The port is its own: whoever told the others of the second process would stop the first."""
    cast.names = cast.addressed = ("server", "clinic")
    cast.settings("clinic")
    begun, second = threading.Event(), list[CutlayerError]()

    def clinic(network: Network) -> None:
        meet(network)
        begun.set()
        network.finish()

    def server(network: Network) -> None:
        meet(network)
        assert begun.wait(10)
        with pytest.raises(LinkError) as caught, cast.network("clinic", deadlines=PATIENT):
            pass
        second.append(caught.value)
        time.sleep(0.5)
        network.finish()

    results = cast.play({"server": server, "clinic": clinic}, deadlines=PATIENT)
    assert results == {"server": None, "clinic": None}
    assert (second[0].code, "if this party runs already, let it be" in second[0].remedy) == ("E604", True)


FAILING = """
import sys
from cutlayer.run.meeting import telling
from cutlayer.transport.settings import NetworkSettings
settings = NetworkSettings(
    party="clinic", parties=("server", "clinic"), coordinator="server", addresses={"server": sys.argv[1]}, run="test",
    digest="0123456789abcdef" * 4,
)
with telling(settings, "the builder of party 'clinic'"):
    raise ValueError("no such file")
"""


@pytest.mark.parametrize("runs", [True, False], ids=["while it runs", "before it has come"])
def test_a_second_start_whose_builder_fails_does_not_end_the_run_of_the_first(cast: Cast, runs: bool):
    """The clinic opens no port, so nothing but the server knows that it runs already. Each start is a process."""
    cast.names = ("server", "clinic")
    fails = [sys.executable, "-c", FAILING, cast.settings("server").addresses["server"]]
    begun, ended = threading.Event(), threading.Event()

    def clinic(network: Network) -> int:
        session = meet(network)
        begun.set()
        assert ended.wait(30)
        network.finish()
        return session

    def server(network: Network) -> int:
        session = meet(network) if runs else 0
        assert begun.wait(10) or not runs
        started = subprocess.run(fails, check=False, capture_output=True, text=True, timeout=30)
        assert "ValueError: no such file" in started.stderr
        ended.set()
        session = session or meet(network)
        network.finish()
        return session

    results = cast.play({"server": server, **({"clinic": clinic} if runs else {})}, deadlines=PATIENT)
    if runs:
        assert results == {"server": 1, "clinic": 1}
        assert not cast.heard("server", "reset")
    else:
        assert results["server"].code == "E703"
        assert results["server"].what == "clinic failed: the builder of party 'clinic' failed"


def test_whoever_came_in_a_missing_partys_name_is_named(cast: Cast):
    """A kit handed to the wrong site: the certificate is lab's, the party says that it is clinic."""
    cast.certify()
    heard: dict[str, str] = {}

    def server(network: Network) -> None:
        hello = LinkHello(control.PROTOCOL, "1", "clinic", DIGEST, "test", 7, 0, 1)
        heard["clinic"] = say(cast, single(hello, "test"), load_credentials(cast.folder / "lab", "lab"))
        meet(network)

    results: dict[str, CutlayerError] = cast.play(
        {"server": server, "lab": meet}, deadlines=dataclasses.replace(PATIENT, join=2), lab_={"deadlines": PATIENT}
    )
    assert heard == {"clinic": "E665"}
    for error in results.values():
        assert (type(error), error.code) == (PeerError, "E702")
        said = "clinic did not come; who came as clinic was refused: E665 a party speaks with another's certificate"
        assert error.what == said
        assert error.remedy.startswith("ask the authority of this run for a certificate in the name clinic")
