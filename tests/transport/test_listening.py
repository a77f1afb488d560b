"""Why a party cannot listen, and what to do about each reason. No address of the site is in the remedy."""

from __future__ import annotations

import errno
import socket

import pytest

from cutlayer.transport.listening import cannot_listen, way_out, why_not_listen


def test_a_free_address_is_listened_at_for_a_moment_only():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        reason = why_not_listen(address)
        assert reason is not None
        assert reason.errno == errno.EADDRINUSE
    assert why_not_listen(address) is None


@pytest.mark.parametrize("coordinates", [True, False])
@pytest.mark.parametrize("address", ["192.0.2.1:7443", "no-such-host.invalid:7443"])
def test_behind_a_router_the_setting_and_the_other_way_are_named(address: str, coordinates: bool):
    error = cannot_listen("clinic", address, why_not_listen(address), coordinates=coordinates)
    assert error.got.startswith(f"{address}: ")
    assert 'set listen = "0.0.0.0:PORT" in [network] of the party file' in error.remedy
    assert ("then it dials out, and opens no port" in error.remedy) == (not coordinates)
    assert ("be the coordinator" in error.remedy) == coordinates
    assert "192.0.2" not in error.remedy


def test_a_port_that_takes_rights():
    assert "from 1024 on" in way_out(PermissionError(errno.EACCES, "Permission denied"), coordinates=True)


def test_without_the_systems_reason_the_address_is_said():
    assert cannot_listen("clinic", "127.0.0.1:7443", None, coordinates=True).got == "127.0.0.1:7443"
