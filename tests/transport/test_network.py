"""The network as a driver uses it, with parties in threads."""

from __future__ import annotations

import re
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from cutlayer.core.program import Tag
from cutlayer.errors import (
    ConfigError,
    ContractError,
    CutlayerError,
    DeadlineError,
    LinkError,
    NonFiniteError,
    PeerError,
    ProgramError,
)
from cutlayer.transport.network import Deadlines, Network, Ready, Start
from tests.transport.parties import NAMES, Cast, Everything, frame_of, free_port, meet, tag_of

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("no_thread_stays")]
SAID = {  # code -> how its text begins
    "E211": "without certificates, parties talk on one machine only",
    "E212": "an address is not host:port|the coordinator has no address",
    "E213": "the parties of a network do not fit together|a name, the run's name or the plan's digest is empty",
}
SIZES = (0, 1, 1000, 2**20 - 1, 2**20, 2**20 + 1, 5 * 2**20 + 7)


def payloads() -> list[bytes]:
    return [np.random.default_rng(size).bytes(size) for size in SIZES]


def exchange(network: Network) -> bool:
    """Send all sizes to all others and take theirs."""
    session = meet(network)
    party = network._settings.party
    for other in network._settings.others:
        for step, data in enumerate(payloads()):
            network.send(other, frame_of(session, step, data))
    for other in network._settings.others:
        for step, data in reversed(list(enumerate(payloads()))):
            frame = network.recv(other, tag_of(session, step))
            assert bytes(frame.payload) == data, (party, other, step)
            assert frame.dtype == "uint8"
            assert not memoryview(frame.payload).readonly
    network.finish()
    return True


@pytest.mark.parametrize("addressed", [("server",), ("server", "lab"), NAMES], ids=len)
@pytest.mark.parametrize("secure", [False, True], ids=["plain", "mtls"])
def test_tensors_of_all_sizes_go_both_ways_between_all(cast: Cast, addressed: tuple[str, ...], secure: bool):
    cast.addressed = addressed
    if secure:
        cast.certify()
    assert cast.play(dict.fromkeys(NAMES, exchange)) == dict.fromkeys(NAMES, True)
    assert {str(facts["party"]) for facts in cast.heard("server", "connected")} == {"clinic", "lab"}
    for name in NAMES:
        assert not cast.heard(name, "lost")


def test_the_session_begins_with_what_all_bring(cast: Cast):
    def part(counts: dict[str, int], checkpoints: tuple[int, ...]):
        def run(network: Network) -> Start:
            start = network.rendezvous(Ready(counts, checkpoints))
            network.finish()
            return start

        return run

    results = cast.play(
        {
            "server": part({}, (4, 1, 7)),
            "clinic": part({"train": 10, "evaluate": 3}, (1, 4)),
            "lab": part({"train": 7}, (0, 1, 4, 9)),
        }
    )
    expected = Start(1, {"evaluate": {"clinic": 3}, "train": {"clinic": 10, "lab": 7}}, 4)
    assert results == dict.fromkeys(NAMES, expected)


def test_frames_wait_unread_until_the_session_is_opened(cast: Cast):
    sent = threading.Event()

    def server(network: Network) -> list[str]:
        network.rendezvous(Ready({}, ()))
        assert sent.wait(10)
        time.sleep(0.3)
        admission = Everything()
        network.open(admission, {"clinic": 5})
        frame = network.recv("clinic", tag_of(1, 0))
        assert bytes(frame.payload) == b"early"
        network.finish()
        return [source for source, _ in admission.asked]

    def clinic(network: Network) -> None:
        network.send("server", frame_of(meet(network), 0, b"early"))
        sent.set()
        network.finish()

    cast.names = ("server", "clinic")
    assert cast.play({"server": server, "clinic": clinic}) == {"server": ["clinic"], "clinic": None}


def test_what_is_never_sent_is_missed_in_time_and_named(cast: Cast):
    def server(network: Network) -> None:
        session = meet(network)
        network.recv("clinic", Tag(session, "train", 2, 5, 1, 0, 3, "up"))

    def clinic(network: Network) -> None:
        meet(network)
        network.recv("server", tag_of(1, 0))

    cast.names = ("server", "clinic")
    results = cast.play(
        {"server": server, "clinic": clinic}, server_={"deadlines": Deadlines(receive=0.5, close=4, join=8)}
    )
    error = results["server"]
    assert isinstance(error, DeadlineError)
    assert error.code == "E621"
    assert "clinic" in error.what
    assert "round 2, step 5, edge 1" in error.where
    assert isinstance(results["clinic"], PeerError)
    assert "E621" in results["clinic"].got


def test_a_failing_party_is_named_everywhere_with_code_and_remedy_but_no_values(cast: Cast):
    cast.addressed = ("server", "lab")

    def fails(network: Network) -> None:
        meet(network)
        error = NonFiniteError("a tensor holds a NaN", got="0.123 secret", remedy="lower the rate", code="E351")
        network.abort(error)
        with pytest.raises(NonFiniteError):
            network.recv("server", tag_of(1, 0))
        raise error

    def waits(network: Network) -> None:
        session = meet(network)
        network.recv("clinic", tag_of(session, 0))

    results = cast.play({"server": waits, "clinic": fails, "lab": waits})
    assert isinstance(results["clinic"], NonFiniteError)
    for name in ("server", "lab"):
        error = results[name]
        assert isinstance(error, PeerError)
        assert "clinic" in error.what
        assert "E351" in error.got
        assert error.remedy == "at clinic: lower the rate"
        assert "secret" not in str(error)
        assert [facts["party"] for facts in cast.heard(name, "aborted")] == ["clinic"]


def test_an_exception_that_leaves_the_with_is_told_by_its_kind_only(cast: Cast):
    def fails(network: Network) -> None:
        meet(network)
        raise KeyError("patient 7")

    def waits(network: Network) -> None:
        network.recv("clinic", tag_of(meet(network), 0))

    results = cast.play({"server": waits, "clinic": fails, "lab": waits})
    assert isinstance(results["clinic"], KeyError)
    for name in ("server", "lab"):
        assert isinstance(results[name], PeerError)
        assert results[name].code == "E704"
        assert "clinic stopped: KeyError" in results[name].what
        assert "patient" not in str(results[name])


def test_a_frame_that_the_program_does_not_expect_stops_all(cast: Cast):
    class Nothing:
        def check(self, source: str, tag: Tag, dtype: str, shape: tuple[int, ...]) -> None:
            raise ContractError(f"{source} sent something else", code="E521")

    def server(network: Network) -> None:
        network.rendezvous(Ready({}, ()))
        network.open(Nothing(), {"clinic": 5})  # type: ignore[arg-type]
        network.recv("clinic", tag_of(1, 0))

    def clinic(network: Network) -> None:
        network.send("server", frame_of(meet(network), 0, b"x"))
        network.recv("server", tag_of(1, 0))

    cast.names = ("server", "clinic")
    results = cast.play({"server": server, "clinic": clinic})
    assert isinstance(results["server"], ContractError)
    assert isinstance(results["clinic"], PeerError)
    assert "E521" in results["clinic"].got


def test_more_frames_than_the_bound_stop_all(cast: Cast):
    def server(network: Network) -> None:
        meet(network, {"clinic": 3})
        network.recv("clinic", tag_of(1, 99))

    def clinic(network: Network) -> None:
        session = meet(network)
        for step in range(4):
            network.send("server", frame_of(session, step, b"x"))
        network.recv("server", tag_of(1, 0))

    cast.names = ("server", "clinic")
    results = cast.play({"server": server, "clinic": clinic})
    assert isinstance(results["server"], ContractError)
    assert results["server"].code == "E530"
    assert isinstance(results["clinic"], PeerError)


@pytest.mark.provokes("E702")
def test_a_party_that_never_comes_is_named_at_all_that_came(cast: Cast):
    came = dict.fromkeys(("server", "clinic"), meet)
    begin = time.monotonic()
    results = cast.play(came, deadlines=Deadlines(join=1, close=2))
    assert time.monotonic() - begin < 5
    for name in came:
        assert isinstance(results[name], PeerError), results
        assert results[name].code == "E702"
        assert results[name].what.startswith("lab did not come")
    assert {"parties": ("lab",)} in cast.heard("clinic", "waiting")


def test_a_coordinator_that_is_not_the_first_with_an_address_dials_those_before_it(cast: Cast):
    """They wait for it, as of two parties with addresses the later one dials."""
    cast.addressed = ("server", "lab")
    assert cast.play(dict.fromkeys(NAMES, exchange), coordinator="lab") == dict.fromkeys(NAMES, True)


def test_who_waits_says_who_dials_it(cast: Cast):
    cast.names = ("server", "lab")
    error = cast.play({"server": meet}, deadlines=Deadlines(join=1, close=1))["server"]
    assert (error.code, error.what) == ("E702", "lab did not come")
    assert error.where == "party server, waiting for all parties, where lab dials this party"


def test_a_coordinator_that_never_comes_is_named(cast: Cast):
    results = cast.play({"clinic": meet}, deadlines=Deadlines(join=1, close=1))
    assert results["clinic"].code == "E702"
    assert results["clinic"].what == "server did not come"
    assert results["clinic"].got == "E601 nobody listens at the server's address"
    where = f"party clinic, waiting for all parties, dialling server at {cast.addresses['server']}"
    assert results["clinic"].where == where


@pytest.mark.provokes("E704")
def test_closing_without_finishing_stops_the_others_at_once(cast: Cast):
    def waits(network: Network) -> None:
        network.recv("clinic", tag_of(meet(network), 0))

    results = cast.play({"server": waits, "lab": waits, "clinic": meet})
    assert results["clinic"] == 1
    for name in ("server", "lab"):
        assert isinstance(results[name], PeerError), results
        assert results[name].code == "E704"
        assert "clinic" in results[name].what


def test_finish_waits_for_the_slowest(cast: Cast):
    def quick(network: Network) -> float:
        meet(network)
        network.finish()
        return time.monotonic()

    def slow(network: Network) -> float:
        meet(network)
        time.sleep(1)
        network.finish()
        return time.monotonic()

    results = cast.play({"server": quick, "clinic": quick, "lab": slow})
    assert max(results.values()) - min(results.values()) < 0.5, results


def test_finish_names_who_does_not(cast: Cast):
    def quick(network: Network) -> None:
        meet(network)
        network.finish()

    def never(network: Network) -> None:
        network.recv("server", tag_of(meet(network), 0))

    results = cast.play(
        {"server": quick, "clinic": quick, "lab": never}, server_={"deadlines": Deadlines(receive=0.7, close=3)}
    )
    assert isinstance(results["server"], DeadlineError)
    assert "lab" in results["server"].what
    assert isinstance(results["clinic"], PeerError)
    assert isinstance(results["lab"], PeerError)


@pytest.mark.provokes("E433")
def test_a_failing_callback_ends_the_run_and_is_no_secret(cast: Cast):
    def notify(name: str, facts: object) -> None:
        raise ValueError("oops")

    with Network(cast.settings("server", deadlines=Deadlines(join=5, close=1)), notify) as network:
        network._notifier.post("waiting", {})
        with pytest.raises(
            ProgramError, match=r"the notify callback failed.*got ValueError. correct the callback"
        ) as caught:
            network.rendezvous(Ready({}, ()))
    assert caught.value.code == "E433"


# --- settings and order of calls ---------------------------------------------------------------------------------


@pytest.mark.provokes(by="code")
@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"addresses": {"server": "10.0.0.1:7000"}}, "E211"),
        ({"listen": "0.0.0.0:7000"}, "E211"),
        ({"listen": "example.org:7000"}, "E211"),
        ({"addresses": {"server": "127.0.0.1"}}, "E212"),
        ({"addresses": {"server": "127.0.0.1:70000"}}, "E212"),
        ({"addresses": {}}, "E212"),
        ({"addresses": {"server": "127.0.0.1:7000", "nobody": "127.0.0.1:7001"}}, "E213"),
        ({"parties": ("clinic", "lab")}, "E213"),
        ({"coordinator": "nobody"}, "E213"),
        ({"parties": ("server", "server")}, "E213"),
        ({"run": ""}, "E213"),
        ({"digest": "x" * 1000}, "E213"),
    ],
)
def test_settings_that_cannot_work_are_refused(cast: Cast, changes: dict[str, object], code: str):
    with pytest.raises(ConfigError) as caught:
        Network(cast.settings("server", **changes), lambda name, facts: None)
    assert caught.value.code == code
    assert caught.value.remedy
    assert re.search(SAID[code], str(caught.value))


def test_another_partys_certificate_is_refused(cast: Cast):
    cast.certify()
    with pytest.raises(ConfigError) as caught:
        Network(cast.settings("server", credentials=cast.credentials["lab"]), lambda name, facts: None)
    assert caught.value.code == "E213"


@pytest.mark.provokes("E604")
def test_a_taken_port_is_said(cast: Cast):
    with (
        cast.network("server"),
        pytest.raises(
            LinkError, match=r"cannot listen at its address.*127.0.0.1.*stop what else uses the port"
        ) as caught,
        cast.network("server"),
    ):
        raise AssertionError("the port was taken")
    assert caught.value.code == "E604"


@pytest.mark.provokes("E431")
@pytest.mark.provokes(by="code")
@pytest.mark.parametrize(
    ("call", "code"),
    [
        (lambda network: network.send("clinic", frame_of(1, 0, b"")), "E430"),
        (lambda network: network.recv("clinic", tag_of(1, 0)), "E430"),
        (lambda network: network.open(Everything(), {}), "E430"),
        (lambda network: network.finish(), "E430"),
    ],
)
def test_calls_before_a_session_are_errors(cast: Cast, call, code: str):
    with cast.network("server") as network:
        with pytest.raises(ProgramError, match=r"no session is open.*call them in this order") as caught:
            call(network)
        assert caught.value.code == code
    with pytest.raises(ProgramError, match=r"the network is closed.*use it within `with`") as caught:
        call(network)
    assert caught.value.code == "E431"


@pytest.mark.provokes("E432")
def test_a_frame_for_nobody_or_of_another_session_is_an_error(cast: Cast):
    def server(network: Network) -> list[str]:
        codes = []
        session = meet(network)
        for to, number in (("nobody", session), ("server", session), ("clinic", session + 1)):
            with pytest.raises(
                CutlayerError, match=r"there is no party '(nobody|server)' to send to|no session"
            ) as caught:
                network.send(to, frame_of(number, 0, b""))
            codes.append(caught.value.code)
        network.finish()
        return codes

    def clinic(network: Network) -> None:
        meet(network)
        network.finish()

    cast.names = ("server", "clinic")
    assert cast.play({"server": server, "clinic": clinic})["server"] == ["E432", "E432", "E430"]


def test_the_port_is_free_again_after_closing(cast: Cast, tmp_path: Path):
    port = free_port()
    cast.addresses["server"] = f"127.0.0.1:{port}"
    for _ in range(3):
        with cast.network("server"), socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        with socket.socket() as other:
            other.bind(("127.0.0.1", port))
            assert other.getsockname() == ("127.0.0.1", port)
