"""A cable that is cut and mended: nothing is lost, nothing comes twice, and the program does not notice."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from cutlayer.errors import PeerError
from cutlayer.transport.network import Deadlines, Network
from cutlayer.transport.settings import Rhythm
from tests.transport.parties import Cable, Cast, frame_of, meet, tag_of

pytestmark = [pytest.mark.timeout(90), pytest.mark.usefixtures("no_thread_stays")]


def payload(step: int, size: int) -> bytes:
    return np.random.default_rng(step).bytes(size)


def sends(steps: int, size: int, to: str = "server"):
    def run(network: Network) -> int:
        session = meet(network, dict.fromkeys(("server", "clinic", "lab"), 100))
        for step in range(steps):
            network.send(to, frame_of(session, step, payload(step, size)))
        network.finish()
        return session

    return run


def takes(steps: int, size: int, source: str = "clinic"):
    def run(network: Network) -> int:
        session = meet(network, {source: steps})
        for step in range(steps):
            assert bytes(network.recv(source, tag_of(session, step)).payload) == payload(step, size), step
        network.finish()
        return session

    return run


def cuts(line: Cable, times: int, after: int) -> None:
    """Cut the cable each time that so many more bytes have passed, and mend it."""
    for _ in range(times):
        line.cut_after = line.passed + after
        deadline = time.monotonic() + 5
        while line._whole and time.monotonic() < deadline:
            time.sleep(0.01)
        line.cut()
        time.sleep(0.15)
        line.restore()


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "mtls"])
@pytest.mark.parametrize(("steps", "size"), [(200, 20_000), (4, 5_000_000)], ids=["small", "large"])
def test_frames_arrive_once_and_in_order_though_the_cable_is_cut(cast: Cast, cable, steps, size, secure):
    cast.names = ("server", "clinic")
    if secure:
        cast.certify()
    cast.settings("server")
    line = cable(cast.addresses["server"])

    breaker = threading.Thread(target=cuts, args=(line, 5, steps * size // 7))
    breaker.start()
    results = cast.play(
        {"server": takes(steps, size), "clinic": sends(steps, size)},
        clinic_={"addresses": {"server": line.address}},
    )
    breaker.join()
    assert results == {"server": 1, "clinic": 1}
    for name, other in (("server", "clinic"), ("clinic", "server")):
        assert {"party": other} in cast.heard(name, "lost")
        assert len(cast.heard(name, "lost")) == len(cast.heard(name, "returned"))
        assert not cast.heard(name, "reset")


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "mtls"])
def test_relayed_frames_arrive_once_and_in_order_though_a_cable_is_cut(cast: Cast, cable, secure: bool):
    if secure:
        cast.certify()
    cast.settings("server")
    line = cable(cast.addresses["server"])
    steps, size = 30, 300_000

    def server(network: Network) -> int:
        session = meet(network, {})
        network.finish()
        return session

    breaker = threading.Thread(target=cuts, args=(line, 4, steps * size // 5))
    breaker.start()
    results = cast.play(
        {"server": server, "clinic": sends(steps, size, "lab"), "lab": takes(steps, size)},
        lab_={"addresses": {"server": line.address}},
    )
    breaker.join()
    assert results == {"server": 1, "clinic": 1, "lab": 1}
    assert {"party": "lab"} in cast.heard("clinic", "lost")
    assert {"party": "lab"} in cast.heard("clinic", "returned")


def test_a_silent_cable_is_noticed_and_dialled_anew(cast: Cast, cable):
    cast.names = ("server", "clinic")
    cast.settings("server")
    line = cable(cast.addresses["server"])
    steps = 20

    def clinic(network: Network) -> int:
        session = meet(network)
        for step in range(steps):
            network.send("server", frame_of(session, step, payload(step, 1000)))
            if step == 10:
                line.held = True  # nothing passes, nothing is closed
                time.sleep(2.5)
                line.held = False
        network.finish()
        return session

    results = cast.play(
        {"server": takes(steps, 1000), "clinic": clinic},
        clinic_={"addresses": {"server": line.address}},
        rhythm=Rhythm(hello=1, heartbeat=0.2, silence=1, idle_ack=0.02, retry=0.3),
    )
    assert results == {"server": 1, "clinic": 1}
    assert cast.heard("server", "lost")
    assert cast.heard("clinic", "returned")


@pytest.mark.provokes("E701")
@pytest.mark.parametrize("secure", [False, True], ids=["plain", "mtls"])
def test_a_cable_that_stays_cut_ends_the_run_everywhere(cast: Cast, cable, secure: bool):
    if secure:
        cast.certify()
    cast.settings("server")
    line = cable(cast.addresses["server"])

    def waits(network: Network) -> None:
        network.recv("lab", tag_of(meet(network), 0))

    def lab(network: Network) -> None:
        session = meet(network)
        line.cut()
        network.recv("server", tag_of(session, 0))

    begin = time.monotonic()
    results = cast.play(
        {"server": waits, "clinic": waits, "lab": lab},
        lab_={"addresses": {"server": line.address}},
        deadlines=Deadlines(join=8, patience=1.5, receive=20, close=1),
    )
    assert time.monotonic() - begin < 12
    for name, lost in (("server", "lab"), ("clinic", "lab"), ("lab", "server")):
        assert isinstance(results[name], PeerError), results
        assert results[name].code == "E701"
        assert lost in results[name].what
        assert "resume" in results[name].remedy
        assert {"party": lost} in cast.heard(name, "lost")
    places = {results[name].where for name in ("server", "clinic")}
    places = {place.replace("reported by server", "party server, where lab dials this party") for place in places}
    assert places == {"party server, where lab dials this party"}
    assert results["lab"].where == f"party lab, dialling server at {line.address}"
    assert results["lab"].got.startswith("E603 the server closed the connection w")


def test_a_direct_link_that_stays_cut_ends_the_run_everywhere(cast: Cast, cable):
    cast.addressed = ("server", "clinic")
    cast.settings("server")
    line = cable(cast.addresses["clinic"])

    def server(network: Network) -> None:
        network.recv("lab", tag_of(meet(network), 0))

    def clinic(network: Network) -> None:
        session = meet(network)
        network.recv("lab", tag_of(session, 0))
        line.cut()
        network.recv("lab", tag_of(session, 1))

    def lab(network: Network) -> None:
        session = meet(network)
        network.send("clinic", frame_of(session, 0, b"x"))
        network.recv("clinic", tag_of(session, 0))

    results = cast.play(
        {"server": server, "clinic": clinic, "lab": lab},
        lab_={"addresses": {"server": cast.addresses["server"], "clinic": line.address}},
        deadlines=Deadlines(join=8, patience=1.5, receive=20, close=1),
    )
    for name in results:
        assert isinstance(results[name], PeerError), results
        assert results[name].code == "E701"
