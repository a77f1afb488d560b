"""Measuring the way to a server: what is measured, and a server that does not take part."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import msgspec
import pytest

from cutlayer.errors import LinkError
from cutlayer.transport.contact import Target
from cutlayer.transport.grpc_common import SERVICE, server_credentials
from cutlayer.transport.pki import create_authority, issue
from cutlayer.transport.probe import PROBE, Question, measure
from cutlayer.transport.probe_service import ProbeService
from cutlayer.transport.tls import Credentials, load_credentials

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def credentials(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Credentials]:
    folder = tmp_path_factory.mktemp("probe")
    authority = create_authority(folder / "ca", name="study")
    return {name: load_credentials(issue(authority, name, folder), name) for name in ("server", "clinic")}


@contextmanager
def server(own: Credentials, service: ProbeService | None) -> Iterator[Target]:
    with ThreadPoolExecutor(4) as pool:
        listening = grpc.server(pool)
        if service:
            handler = grpc.stream_stream_rpc_method_handler(service.answer)
            listening.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, {PROBE: handler})])
        port = listening.add_secure_port("127.0.0.1:0", server_credentials(own))
        listening.start()
        try:
            yield Target(party="server", host="127.0.0.1", port=port)
        finally:
            listening.stop(0).wait(10)


def test_round_trip_both_directions_and_the_clock(credentials: dict[str, Credentials]):
    service = ProbeService("server", "abc", lambda _context: "clinic")
    with server(credentials["server"], service) as target:
        same = measure(target, credentials["clinic"], digest="abc", seconds=15, clock=lambda: 1e9)
        other = measure(target, credentials["clinic"], digest="abd", seconds=15)
    assert (same.plan, other.plan) == ("same", "other")
    assert 0 < same.round_trip < 15
    assert same.up is not None
    assert same.down is not None
    assert min(same.up, same.down) > 1e6  # bytes a second, on loopback
    assert same.ahead > 5e8  # this machine's clock was said to be in 2001
    assert abs(other.ahead) < 5


@pytest.mark.provokes("E611")
def test_a_server_that_knows_no_probes(credentials: dict[str, Credentials]):
    with (
        server(credentials["server"], None) as target,
        pytest.raises(LinkError, match=r"E611.*does not let itself be measured.*got unimplemented.*doctor --serve"),
    ):
        measure(target, credentials["clinic"], seconds=5)


class Caller:
    """What a service asks of a call's context, for calls that cross no network."""

    def abort(self, code: grpc.StatusCode, details: str) -> None:
        raise PermissionError(f"{code.name}: {details}")

    def cancel(self) -> None:
        raise AssertionError("a call without a network took too long")


@pytest.mark.provokes("E611")
def test_a_caller_without_a_name_and_one_that_asks_too_often(credentials: dict[str, Credentials]):
    nobody = ProbeService("server", "abc", lambda _context: "")
    with server(credentials["server"], nobody) as target, pytest.raises(LinkError, match="got unauthenticated"):
        measure(target, credentials["clinic"], seconds=20)
    service = ProbeService("server", "abc", lambda _context: "clinic")
    hello = msgspec.msgpack.encode(Question("hello"))
    for _ in range(12):  # each is over before the next: a call over the network may still be ending when it is told to
        assert len(list(service.answer(iter([hello]), Caller()))) == 1
    too_often = pytest.raises(LinkError, match="got resource_exhausted: more than 12 probes")
    with server(credentials["server"], service) as target, too_often:
        measure(target, credentials["clinic"], seconds=20)


def test_one_probe_of_a_party_at_a_time_and_two_of_all():
    names = iter(["clinic", "clinic", "lab", "ward", "clinic"])
    service = ProbeService("server", "abc", lambda _context: next(names))
    hello = msgspec.msgpack.encode(Question("hello"))
    clinic = service.answer(iter([hello, hello]), Caller())
    next(clinic)  # answered, and not ended
    with pytest.raises(PermissionError, match="RESOURCE_EXHAUSTED: another probe is being answered"):
        next(service.answer(iter([hello]), Caller()))
    lab = service.answer(iter([hello, hello]), Caller())
    next(lab)
    with pytest.raises(PermissionError, match="another probe is being answered"):
        next(service.answer(iter([hello]), Caller()))  # of a third party
    for call in (clinic, lab):
        call.close()
    assert len(list(service.answer(iter([hello]), Caller()))) == 1
