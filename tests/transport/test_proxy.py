"""Which proxy is used: the party file's, the machine's, or none; and nothing of its password is ever shown."""

from __future__ import annotations

import base64
import traceback

import pytest

from cutlayer.errors import ConfigError
from cutlayer.transport.proxy import check_proxy, find_proxy

VARIABLES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "NO_PROXY", "GRPC_PROXY")
SECRET = "s3cr3t-W0rd"


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine without any proxy settings."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    return monkeypatch


def found(setting: str = "", host: str = "server.example", port: int = 7443) -> str:
    proxy = find_proxy(setting, host, port)
    return "none" if proxy is None else proxy.address


def test_without_any_setting_there_is_no_proxy():
    assert found() == "none"


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"])
def test_the_machines_setting_is_used_in_capitals_and_not(machine, name: str):
    machine.setenv(name, "http://proxy.example:3128")
    assert found() == "proxy.example:3128"


def test_https_goes_before_all_and_http_is_for_other_things(machine):
    machine.setenv("HTTP_PROXY", "http://other.example:1")
    assert found() == "none"
    machine.setenv("ALL_PROXY", "http://all.example:2")
    machine.setenv("HTTPS_PROXY", "http://secure.example:3")
    assert found() == "secure.example:3"


def test_the_party_file_wins(machine):
    machine.setenv("HTTPS_PROXY", "http://machine.example:1")
    machine.setenv("NO_PROXY", "*")
    assert found("http://own.example:2") == "own.example:2"
    assert found("none") == "none"
    assert found("http://own.example:2", "127.0.0.1") == "own.example:2"


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.8.8.8"])
def test_the_machines_proxy_is_not_for_the_machine_itself(machine, host: str):
    machine.setenv("HTTPS_PROXY", "http://proxy.example:1")
    assert found(host=host) == "none"


@pytest.mark.parametrize(
    ("exceptions", "host", "proxied"),
    [
        ("*", "server.example", False),
        ("server.example", "server.example", False),
        (".example", "server.example", False),
        ("example", "server.example", False),
        ("other.example, server.example", "server.example", False),
        ("server.example:7443", "server.example", False),
        ("server.example:80", "server.example", True),
        ("erver.example", "server.example", True),
        ("10.0.0.0/8", "10.1.2.3", False),
        ("192.168.0.0/16,fd00::/8", "fd00::7", False),
        ("10.0.0.0/8", "11.1.2.3", True),
        ("10.1.2.3", "10.1.2.3", False),
        ("rubbish/99", "10.1.2.3", True),
    ],
)
def test_exceptions_of_the_machine(machine, exceptions: str, host: str, proxied: bool):
    machine.setenv("HTTPS_PROXY", "http://proxy.example:1")
    machine.setenv("NO_PROXY", exceptions)
    assert (found(host=host) != "none") is proxied


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("http://proxy.example:3128", "proxy.example:3128"),
        ("http://proxy.example:3128/", "proxy.example:3128"),
        ("HTTP://proxy.example:3128", "proxy.example:3128"),
        ("proxy.example:3128", "proxy.example:3128"),
        ("http://proxy.example", "proxy.example:80"),
        ("http://[fd00::1]:3128", "[fd00::1]:3128"),
        ("http://a:b@proxy.example:3128", "proxy.example:3128"),
    ],
)
def test_addresses_of_proxies(text: str, address: str):
    assert found(text) == address


def test_user_and_password_are_decoded_and_never_shown():
    proxy = find_proxy(f"http://dr%40hospital:{SECRET}%3A%2F@proxy.example:1", "x.example", 1)
    assert proxy is not None
    kind, _, value = proxy.authorization.partition(" ")
    assert (kind, base64.b64decode(value)) == ("Basic", f"dr@hospital:{SECRET}:/".encode())
    shown = f"{proxy} {proxy!r} {[proxy]}"
    assert SECRET not in shown
    assert "hospital" not in shown
    assert find_proxy("http://proxy.example:1", "x.example", 1).authorization == ""  # type: ignore[union-attr]


@pytest.mark.provokes("E214")
@pytest.mark.parametrize(
    ("text", "got"),
    [
        (f"https://user:{SECRET}@proxy.example:3128", "the kind https://"),
        (f"socks5://user:{SECRET}@proxy.example:1080", "the kind socks5://"),
        (f"http://user:{SECRET}@", "no host or no port"),
        (f"http://user:{SECRET}@proxy.example:0", "no host or no port"),
        (f"http://user:{SECRET}@proxy.example:99999", "an address that cannot be read"),
        (f"http://user:{SECRET}@proxy.example:port", "an address that cannot be read"),
        (f"http://user:{SECRET}/1@proxy.example:3128", "an address that cannot be read"),  # an unescaped slash
        (f"http://[user:{SECRET}", "an address that cannot be read"),
        (f"http://proxy.example:3128/?{SECRET}", "more than user, password, host and port"),
        (f"http://pro xy.example:1/{SECRET}", "more than user, password, host and port"),
    ],
)
@pytest.mark.parametrize("given", [True, False], ids=["file", "machine"])
def test_an_unusable_address_is_an_error_that_shows_no_secret(machine, text: str, got: str, given: bool):
    if not given:
        machine.setenv("HTTPS_PROXY", text)
    with pytest.raises(ConfigError) as caught:
        find_proxy(text if given else "", "server.example", 1)
    error = caught.value
    assert (error.code, error.got) == ("E214", got)
    assert ("party file" in error.where) is given
    assert ("HTTPS_PROXY" in error.where) is not given
    printed = "".join(traceback.format_exception(error))
    assert SECRET not in printed + "\n".join(error.lines())


def test_a_party_files_setting_is_checked_by_itself():
    for good in ("", "none", "http://proxy.example:1"):
        check_proxy(good)
    with pytest.raises(ConfigError, match="E214"):
        check_proxy("ftp://proxy.example")
