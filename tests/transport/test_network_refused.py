"""Parties that cannot or may not talk: every side gets a typed error in bounded time; nothing is tried for ever."""

from __future__ import annotations

import dataclasses
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest

from cutlayer.engine.wire import HEADER, Header
from cutlayer.errors import (
    CertificateError,
    ContractError,
    CutlayerError,
    HandshakeError,
    PeerError,
    WireError,
)
from cutlayer.transport import control, grpc_common
from cutlayer.transport.control import Abort, Heartbeat, LinkHello
from cutlayer.transport.frames import run_number
from cutlayer.transport.grpc_common import METHOD, SERVICE, channel_to
from cutlayer.transport.handshake import read_hello, single
from cutlayer.transport.network import Deadlines, Network, Ready
from cutlayer.transport.pki import create_authority, issue
from cutlayer.transport.tls import load_credentials
from tests.transport.parties import Cast, frame_of, meet, tag_of

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("no_thread_stays")]
LONG = Deadlines(join=30, patience=10, receive=10, send=10, close=1)
SHORT = Deadlines(join=4, patience=2, receive=5, send=5, close=1)
DIGEST = "0123456789abcdef" * 4


@pytest.fixture
def pair(cast: Cast) -> Cast:
    cast.names = ("server", "clinic")
    return cast


def outcome(cast: Cast, **changes: Any) -> tuple[CutlayerError, CutlayerError]:
    begin = time.monotonic()
    results = cast.play({"server": meet, "clinic": meet}, **{"deadlines": LONG, **changes})
    assert time.monotonic() - begin < LONG.join / 2  # not by running out of time
    assert all(isinstance(result, CutlayerError) for result in results.values()), results
    for error in results.values():
        assert error.remedy
        assert error.code != error.default_code
    return results["server"], results["clinic"]


@pytest.mark.provokes(by="code")
@pytest.mark.parametrize("secure", [False, True], ids=["plain", "mtls"])
@pytest.mark.parametrize(
    ("changes", "code"), [({"digest": "f" * 64}, "E642"), ({"run": "another"}, "E643")], ids=["plan", "run"]
)
def test_another_plan_or_run_is_refused_on_both_sides(pair: Cast, changes, code: str, secure: bool):
    if secure:
        pair.certify()
    for error in outcome(pair, clinic_=changes):
        assert isinstance(error, HandshakeError), error
        assert error.code == code
        assert "clinic" in str(error)
        assert "server" in str(error)


@pytest.mark.provokes("E641")
def test_another_version_of_the_protocol_is_refused_on_both_sides(pair: Cast, monkeypatch: pytest.MonkeyPatch):
    from cutlayer.transport import handshake

    original = handshake.hello_of

    def newer(settings: Any, *rest: Any) -> LinkHello:
        hello = original(settings, *rest)
        if settings.party == "server":
            return hello
        return LinkHello(control.PROTOCOL + 1, *(getattr(hello, name) for name in LinkHello.__struct_fields__[1:]))

    monkeypatch.setattr("cutlayer.transport.grpc_dialer.hello_of", newer)
    for error in outcome(pair):
        assert isinstance(error, HandshakeError), error
        assert error.code == "E641"


def test_the_other_parties_learn_of_a_refusal(cast: Cast):
    def server(network: Network) -> None:
        while not cast.heard("server", "connected"):
            time.sleep(0.01)
        assert say(cast, hello(digest="f" * 64)) == "E642"
        meet(network)

    results = cast.play({"server": server, "lab": meet}, deadlines=LONG)
    assert {name: error.code for name, error in results.items()} == {"server": "E642", "lab": "E642"}
    assert all(isinstance(error, HandshakeError) for error in results.values())


# --- certificates ------------------------------------------------------------------------------------------------


def test_a_foreign_authority_is_named_by_the_dialler_and_missed_by_the_server(pair: Cast):
    pair.certify()
    foreign = create_authority(pair.folder / "foreign", name="other")
    issue(foreign, "clinic", pair.folder / "foreign")
    pair.credentials["clinic"] = load_credentials(pair.folder / "foreign" / "clinic", "clinic")
    server, clinic = outcome(pair, server_={"deadlines": SHORT})
    assert isinstance(clinic, CertificateError)
    assert clinic.code == "E667"  # each refuses the other; the dialler sees the server's first
    assert "and this party its own and ca.pem" in clinic.remedy  # it is the dialler's that is wrong here
    assert isinstance(server, PeerError)
    assert server.code == "E702"
    assert "clinic" in server.what


def test_a_certificate_of_a_foreign_authority_is_refused_by_the_server(pair: Cast):
    pair.certify()
    foreign = create_authority(pair.folder / "foreign", name="other")
    issue(foreign, "clinic", pair.folder / "foreign")
    theirs = load_credentials(pair.folder / "foreign" / "clinic", "clinic")
    both = theirs.authority + pair.credentials["server"].authority  # trusts the server, is not trusted by it
    pair.credentials["clinic"] = dataclasses.replace(theirs, authority=both)
    server, clinic = outcome(pair, server_={"deadlines": SHORT})
    assert isinstance(clinic, CertificateError)
    assert clinic.code == "E668"
    assert isinstance(server, PeerError)
    assert server.code == "E702"


@pytest.mark.provokes("E648")
@pytest.mark.parametrize("secure", ["server", "clinic"])
def test_one_that_speaks_tls_and_one_that_does_not(pair: Cast, secure: str):
    pair.certify()
    del pair.credentials[{"server": "clinic", "clinic": "server"}[secure]]
    server, clinic = outcome(pair, server_={"deadlines": SHORT})
    assert (type(clinic), clinic.code) == (HandshakeError, "E648")
    assert clinic.where == f"party clinic, server server at {pair.addresses['server']}"
    assert (type(server), server.code) == (PeerError, "E702")


def test_the_servers_certificate_must_be_in_its_name(pair: Cast):
    pair.certify()
    issue(pair.folder / "ca", "ward", pair.folder)
    wrong = load_credentials(pair.folder / "ward", "ward")
    pair.credentials["server"] = dataclasses.replace(wrong, party="server")
    with pytest.raises(CertificateError) as caught:
        pair.network("server")
    assert caught.value.code == "E665"


def test_an_expired_certificate_is_named_before_anything_is_dialled(pair: Cast):
    pair.certify()
    long_ago = datetime.now(UTC) - timedelta(days=100)
    authority = create_authority(pair.folder / "old", name="study", now=long_ago)
    issue(authority, "clinic", pair.folder / "old", days=10, now=long_ago)
    with pytest.raises(CertificateError) as caught:
        pair.network("clinic", credentials=load_credentials(pair.folder / "old" / "clinic", "clinic"))
    assert caught.value.code == "E661"


def test_a_certificate_that_expires_before_the_dial_is_refused_by_the_server(
    pair: Cast, monkeypatch: pytest.MonkeyPatch
):
    long_ago = datetime.now(UTC) - timedelta(days=100)
    pair.certify(since=long_ago)
    issue(pair.folder / "ca", "clinic", pair.folder / "old", days=10, now=long_ago)
    pair.credentials["clinic"] = load_credentials(pair.folder / "old" / "clinic", "clinic")
    monkeypatch.setattr("cutlayer.transport.network.check_credentials", lambda credentials, now: None)
    server, clinic = outcome(pair, server_={"deadlines": SHORT})
    assert isinstance(clinic, CertificateError)
    assert clinic.code == "E668"
    assert isinstance(server, PeerError)
    assert server.code == "E702"


def test_a_party_with_anothers_certificate_is_refused_and_the_run_goes_on(cast: Cast):
    cast.certify()

    def server(network: Network) -> str:
        session = meet(network)
        stolen = cast.credentials["lab"]
        hello = LinkHello(control.PROTOCOL, "1", "clinic", DIGEST, "test", 7, 0, 1)
        answer = say(cast, single(hello, "test"), stolen)
        network.finish()
        return f"{session} {answer}"

    def other(network: Network) -> None:
        meet(network)
        network.finish()

    results = cast.play({"server": server, "clinic": other, "lab": other})
    assert results == {"server": "1 E665", "clinic": None, "lab": None}


def test_plaintext_meets_tls(pair: Cast):
    pair.certify()
    server, clinic = outcome(pair, server_={"credentials": None, "deadlines": SHORT})
    assert isinstance(clinic, HandshakeError | CertificateError), clinic
    assert isinstance(server, PeerError)


# --- who speaks first --------------------------------------------------------------------------------------------


def say(cast: Cast, first: bytes, credentials: Any = None, further: bytes = b"") -> str:
    """Open a stream to the server, say one thing, and return the code of its refusal, or what else it answers.

    With something further to say after the hello, return the code of the ABORT that it gets.
    """
    channel = channel_to("server", cast.addresses["server"], credentials)
    call = None
    try:
        call = channel.stream_stream(f"/{SERVICE}/{METHOD}")(iter([first, further] if further else [first]), timeout=10)
        answer = next(call, None)
        if answer is None:
            return "nothing"
        if further:
            ends = (control.decode(piece[5], piece[HEADER.size :]) for piece in call)
            return next((message.code for message in ends if isinstance(message, Abort)), "nothing")
        message = read_hello(answer)
        return message.code if isinstance(message, Abort) else type(message).__name__
    except grpc.RpcError as error:
        return str(error.code())
    finally:
        if call is not None:
            call.cancel()
        channel.close()


def hello(**changes: Any) -> bytes:
    fields: dict[str, Any] = {
        "protocol": control.PROTOCOL,
        "package": "1",
        "party": "clinic",
        "digest": DIGEST,
        "run": "test",
        "incarnation": 7,
        "known": 0,
        "wanted": 1,
    }
    return single(LinkHello(**{**fields, **changes}), "test")


@pytest.mark.parametrize(
    ("first", "answer"),
    [
        (b"", "E501"),
        (b"GET / HTTP/1.1", "E501"),
        (hello()[:-1], "E513"),
        (hello() + b"x", "E513"),
        (hello(party="nobody"), "E645"),
        (hello(party="server"), "E645"),
        (single(Heartbeat(), "test"), "E513"),
        (single(Abort("clinic", "E999", "no", ""), "test"), "E645"),
        (Header(1, 0, 2**40, 1, run_number("test")).pack(), "E513"),
        (Header(control.LINK_HELLO, 0, 0, 0, run_number("test")).pack(), "E509"),
    ],
    ids=["nothing", "http", "short", "long", "stranger", "self", "heartbeat", "abort", "huge", "empty"],
)
def test_strangers_and_nonsense_are_refused_and_the_run_goes_on(pair: Cast, first: bytes, answer: str):
    def server(network: Network) -> str:
        said = say(pair, first)
        meet(network)
        network.finish()
        return said

    def clinic(network: Network) -> None:
        meet(network)
        network.finish()

    assert pair.play({"server": server, "clinic": clinic}) == {"server": answer, "clinic": None}


def test_another_version_of_frames_is_refused_on_both_sides(pair: Cast):
    newer = bytearray(hello())
    newer[4] += 1
    assert HEADER.unpack_from(newer)[1] == 2

    def server(network: Network) -> tuple[str, str]:
        said = say(pair, bytes(newer))
        with pytest.raises(HandshakeError) as caught:
            network.rendezvous(Ready({}, ()))
        return said, caught.value.code

    assert pair.play({"server": server})["server"] == ("E641", "E641")
    with pytest.raises(HandshakeError) as caught:
        read_hello(bytes(newer))
    assert caught.value.code == "E641"


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (b"nonsense", "E501"),
        (single(control.Bye(1), "test", sequence=2), "E510"),
        (single(control.Ack(5), "test"), "E511"),
        (single(control.Notice("waiting", ()), "test", sequence=1), "E513"),
        (single(control.Reset(1, "lab"), "test", sequence=1), "E513"),
        (hello(), "E513"),
        (Header(control.READY, 1, 0, 1, run_number("test")).pack() + b"x", "E509"),
        (single(control.Relay(1, "lab", "clinic", True, 0), "test", sequence=1), "E529"),
        (single(control.Bye(1), "other", sequence=1), "E514"),
    ],
    ids=["nonsense", "gap", "ack", "notice", "reset", "hello", "ready", "relay", "run"],
)
def test_a_party_that_breaks_the_protocol_stops_the_run_and_is_told(cast: Cast, frame: bytes, code: str):
    def server(network: Network) -> str:
        while not cast.heard("server", "connected"):
            time.sleep(0.01)
        heard = say(cast, hello(), further=frame)
        with pytest.raises((WireError, ContractError)) as caught:
            network.rendezvous(Ready({}, ()))
        assert caught.value.code == code
        assert "clinic" in caught.value.where
        return heard

    def lab(network: Network) -> None:
        network.rendezvous(Ready({}, ()))

    results = cast.play({"server": server, "lab": lab}, deadlines=LONG)
    assert results["server"] == code
    assert isinstance(results["lab"], PeerError)
    assert code in results["lab"].got


def test_a_second_process_of_a_party_does_not_end_the_first(pair: Cast):
    def server(network: Network) -> int:
        session = meet(network)
        assert say(pair, hello()) == "E649"
        network.send("clinic", frame_of(session, 0, b"x"))
        network.finish()
        return session

    def clinic(network: Network) -> int:
        session = meet(network)
        network.recv("server", tag_of(session, 0))
        network.finish()
        return session

    results = pair.play({"server": server, "clinic": clinic}, deadlines=SHORT, clinic_={"deadlines": LONG})
    assert results == {"server": 1, "clinic": 1}


@pytest.mark.provokes("E646")
def test_a_server_without_the_method_is_final(pair: Cast):
    from concurrent.futures import ThreadPoolExecutor

    pair.settings("server")
    with ThreadPoolExecutor(2) as pool:
        other = grpc.server(pool)
        other.add_insecure_port(pair.addresses["server"])
        other.start()
        results = pair.play({"clinic": meet}, deadlines=LONG)
        other.stop(0).wait()
    assert isinstance(results["clinic"], HandshakeError)
    assert results["clinic"].code == "E646"
    assert "what answers is no cutlayer (party clinic, dialling server at 127.0.0.1" in str(results["clinic"])
    assert results["clinic"].remedy == "correct the address"


def test_options_are_those_that_keep_links_alive_and_messages_small():
    both = dict(grpc_common.server_options()), dict(grpc_common.client_options("server"))
    for options in both:
        assert options["grpc.keepalive_time_ms"] == 10_000
        assert options["grpc.keepalive_timeout_ms"] == 5_000
        assert options["grpc.max_receive_message_length"] == options["grpc.max_send_message_length"] == 2 * 2**20
    assert both[0]["grpc.so_reuseport"] == 0
    assert both[1]["grpc.ssl_target_name_override"] == "server"
    assert both[1]["grpc.enable_http_proxy"] == 0  # which proxy, if any, is decided by transport.proxy
