"""Who dials whom: both ends of every pair agree."""

from __future__ import annotations

from itertools import combinations, product

import pytest

from cutlayer.errors import ConfigError
from cutlayer.transport.settings import NetworkSettings, host_port, is_loopback, route

NAMES = ("a", "b", "c")


def settings(party: str, addressed: tuple[str, ...]) -> NetworkSettings:
    addresses = {name: f"127.0.0.1:{7000 + number}" for number, name in enumerate(addressed)}
    return NetworkSettings(party=party, parties=NAMES, coordinator="a", addresses=addresses, run="r", digest="d")


@pytest.mark.parametrize("flags", list(product([False, True], repeat=3)))
def test_of_each_pair_one_dials_or_both_are_relayed(flags: tuple[bool, ...]):
    addressed = tuple(name for name, flag in zip(NAMES, flags, strict=True) if flag)
    for first, second in combinations(NAMES, 2):
        there, back = route(settings(first, addressed), second), route(settings(second, addressed), first)
        if first in addressed and second in addressed:
            assert (there, back) == ("await", "dial")  # the later one dials
        elif first in addressed:
            assert (there, back) == ("await", "dial")
        elif second in addressed:
            assert (there, back) == ("dial", "await")
        else:
            assert (there, back) == ("relay", "relay")


@pytest.mark.parametrize(
    ("address", "expected"),
    [("localhost:1", ("localhost", 1)), ("[::1]:65535", ("::1", 65535)), ("h.example:80", ("h.example", 80))],
)
def test_addresses_are_read(address: str, expected: tuple[str, int]):
    assert host_port(address) == expected


@pytest.mark.parametrize("address", ["", "host", ":1", "host:", "host:0", "host:65536", "host:-1", "host:1x", "host:²"])
def test_what_is_no_address_is_refused(address: str):
    with pytest.raises(ConfigError) as caught:
        host_port(address)
    assert caught.value.code == "E212"


def test_loopback_is_this_machine_only():
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "localhost")))
    assert not any(map(is_loopback, (".".join("0000"), "::", "10.0.0.1", "localhost.example", "example.org")))
