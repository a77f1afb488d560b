"""Addresses as people write them: host:port. Pure.

| code | error | meaning |
| --- | --- | --- |
| E212 | ConfigError | an address is wrong |
"""

from __future__ import annotations

import ipaddress
from typing import Final

from cutlayer.errors import ConfigError

__all__ = ["host_port", "is_loopback", "joined"]

_PORT_MAX: Final = 65535


def host_port(address: str) -> tuple[str, int]:
    """Split host:port or [IPv6]:port. Raises `ConfigError` E212."""
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    plain = host.isprintable() and not any(sign.isspace() or sign in "/@" for sign in host)  # part of a line of HTTP
    if not (host and plain and port.isascii() and port.isdigit() and 0 < int(port) <= _PORT_MAX):
        raise ConfigError(
            "an address is not host:port",
            expected="such as hospital.example:7001, without https://",
            got=repr(address),
            remedy="correct it in the contract",
            code="E212",
        )
    return host, int(port)


def joined(host: str, port: int) -> str:
    """Return host:port, or [IPv6]:port."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Return whether this is an address of the machine itself."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
