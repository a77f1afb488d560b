"""Two processes of one party, and strangers in the middle of a run: the run goes on with who belongs to it."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest

from cutlayer.errors import HandshakeError, PeerError
from cutlayer.transport.grpc_common import METHOD, SERVICE, channel_to
from cutlayer.transport.handshake import read_hello
from cutlayer.transport.network import Network, SessionReset
from tests.transport.parties import QUICK, Cable, Cast, frame_of, meet, tag_of

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("no_thread_stays")]


def to_the_end(network: Network) -> str:
    while True:
        try:
            session = meet(network)
            network.finish()
            return f"session {session}"
        except SessionReset:
            pass


@pytest.mark.provokes("E649")
def test_a_second_process_waits_while_the_first_is_alive_and_is_refused_in_the_end(cast: Cast):
    met, refused = threading.Event(), threading.Event()
    second: list[BaseException] = []

    def first(network: Network) -> str:
        session = meet(network)
        met.set()
        assert refused.wait(20)
        network.finish()
        return f"session {session}"

    def later() -> None:
        assert met.wait(10)
        try:
            with cast.network("clinic", deadlines=replace(QUICK, join=4)) as network:
                to_the_end(network)
        except HandshakeError as error:
            second.append(error)
        refused.set()

    thread = threading.Thread(target=later)
    thread.start()
    results = cast.play({"server": to_the_end, "clinic": first, "lab": to_the_end})
    thread.join()
    assert results == dict.fromkeys(cast.names, "session 1")
    (error,) = second
    assert (error.code, error.what) == ("E649", "another process runs as clinic, and is alive")
    assert "expected one process of each party, got a second one" in str(error)
    assert "stop this one, and let the other go on; or stop the other" in error.remedy
    (told,) = cast.heard("clinic", "second")
    assert told["party"] == "server"
    assert told["code"] == "E649"
    for party in ("server", "lab"):
        assert not [name for name, _ in cast.events[party] if name in ("reset", "lost", "aborted")]


def test_a_second_process_whose_first_has_finished_is_told_where_to_look(cast: Cast):
    met, waits = threading.Event(), threading.Event()
    second: list[BaseException] = []

    def first(network: Network) -> None:
        meet(network)
        met.set()
        assert waits.wait(10)
        network.finish()

    def later() -> None:
        assert met.wait(10)
        threading.Thread(target=told).start()
        try:
            with cast.network("clinic", deadlines=replace(QUICK, join=6)) as network:
                to_the_end(network)
        except PeerError as error:
            second.append(error)

    def told() -> None:
        deadline = time.monotonic() + 10
        while not cast.heard("clinic", "second") and time.monotonic() < deadline:
            time.sleep(0.05)
        waits.set()

    thread = threading.Thread(target=later)
    thread.start()
    cast.play({"server": to_the_end, "clinic": first, "lab": to_the_end})
    thread.join()
    (error,) = second
    assert error.code == "E702"
    assert "another process ran as clinic: look into its run's folder first" in error.remedy


@pytest.mark.provokes("E644")
@pytest.mark.parametrize("silent", [False, True], ids=["ended", "silent"])
def test_a_second_process_takes_over_once_the_first_is_gone(cast: Cast, silent: bool):
    met, waits = threading.Event(), threading.Event()
    second: list[str] = []
    cast.settings("server")
    cable = Cable(cast.addresses["server"])

    def first(network: Network) -> None:
        meet(network)
        met.set()
        assert waits.wait(10)
        if silent:
            cable.held = True  # nothing passes, nothing is closed
        else:
            cable.cut()
        deadline = time.monotonic() + 20
        while not second and time.monotonic() < deadline:
            time.sleep(0.05)
        cable.held = False
        cable.restore()
        to_the_end(network)

    def later() -> None:
        assert met.wait(10)
        with cast.network("clinic") as network:
            threading.Thread(target=told).start()
            session = meet(network)
            second.append(f"session {session}")
            time.sleep(1)  # the first comes back
            network.finish()

    def told() -> None:
        while not cast.heard("clinic", "second"):
            time.sleep(0.05)
        waits.set()

    thread = threading.Thread(target=later)
    thread.start()
    addresses = {"addresses": {**cast.addresses, "server": cable.address}}
    try:
        results = cast.play({"server": to_the_end, "clinic": first, "lab": to_the_end}, clinic_=addresses)
    finally:
        thread.join()
        cable.close()
    assert second == ["session 2"]
    assert (results["server"], results["lab"]) == ("session 2", "session 2")
    assert isinstance(results["clinic"], HandshakeError), results
    assert results["clinic"].code == "E644"
    assert "another process runs as clinic" in str(results["clinic"])


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "mtls"])
def test_another_version_of_frames_in_the_middle_of_a_run_is_refused_and_the_run_goes_on(cast: Cast, secure: bool):
    cast.names = ("server", "clinic")
    if secure:
        cast.certify()

    def server(network: Network) -> str:
        session = meet(network)
        channel = channel_to("server", cast.addresses["server"], cast.credentials.get("clinic"))
        call = channel.stream_stream(f"/{SERVICE}/{METHOD}")(iter([b"CUTL\x02" + bytes(40)]), timeout=10)
        try:
            answer = read_hello(next(call))
        finally:
            call.cancel()
            channel.close()
        network.send("clinic", frame_of(session, 0, b"x"))
        network.finish()
        return answer.code

    def clinic(network: Network) -> bytes:
        payload = bytes(network.recv("server", tag_of(meet(network), 0)).payload)
        network.finish()
        return payload

    assert cast.play({"server": server, "clinic": clinic}) == {"server": "E641", "clinic": b"x"}
