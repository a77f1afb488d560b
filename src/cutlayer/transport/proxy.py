"""Which HTTP proxy a connection goes through: the party file's, else what the machine is set to, else none.

A machine's setting is `HTTPS_PROXY` (or `https_proxy`, then `ALL_PROXY`) with `NO_PROXY`, as other programs read them;
on macOS also that of the system. gRPC reads some of these by itself, but neither capitals nor a party file: what is
found here is what holds. A user and password in a proxy's address are never shown.

| code | error | meaning |
| --- | --- | --- |
| E214 | ConfigError | the address of the proxy cannot be used |
"""

from __future__ import annotations

import base64
import contextlib
import ipaddress
import urllib.request
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import SplitResult, unquote, urlsplit

from cutlayer.errors import ConfigError
from cutlayer.transport.addresses import is_loopback, joined

__all__ = ["NO_PROXY", "Proxy", "check_proxy", "find_proxy"]

NO_PROXY: Final = "none"
"""The setting that means: dial without a proxy, whatever the machine is set to."""
_GIVEN: Final = "[network] proxy of the party file"
_MACHINE: Final = "HTTPS_PROXY, this machine's setting"
_DEFAULT_PORT: Final = 80  # of http://
_PORT_MAX: Final = 65535


@dataclass(frozen=True, kw_only=True)
class Proxy:
    """An HTTP proxy that connects to others when asked with CONNECT. Its text and `repr` hold no user or password.

    Attributes:
        host: Its name or address.
        port: Its port.
        origin: Who says that it is to be used.
        user: For basic authentication, or empty.
        password: That user's, or empty.
    """

    host: str
    port: int
    origin: str
    user: str = field(default="", repr=False)
    password: str = field(default="", repr=False)

    @property
    def address(self) -> str:
        """Return host:port or [IPv6]:port."""
        return joined(self.host, self.port)

    @property
    def authorization(self) -> str:
        """Return the value of the Proxy-Authorization header, a secret; empty if there is no user."""
        if not self.user and not self.password:
            return ""
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()

    def __str__(self) -> str:
        """Return the address, and nothing of user and password."""
        return self.address


def find_proxy(setting: str, host: str, port: int) -> Proxy | None:
    """Return the proxy through which `host:port` is dialled, or None.

    Args:
        setting: The party file's `proxy`: an address, which wins; "none"; or empty for what the machine is set to.
        host: Who is dialled. This machine itself (loopback) is only dialled through a proxy if `setting` names one.
        port: Its port.

    Raises:
        ConfigError: E214, the proxy's address cannot be used.
    """
    if setting:
        return None if setting == NO_PROXY else _parse(setting, _GIVEN)
    if is_loopback(host):
        return None
    found = urllib.request.getproxies()
    text = found.get("https") or found.get("all")
    if not text or _bypassed(host, port):
        return None
    return _parse(text, _MACHINE)


def check_proxy(setting: str) -> None:
    """Check a party file's `proxy` by itself. Raises `ConfigError` E214."""
    if setting and setting != NO_PROXY:
        _parse(setting, _GIVEN)


def _parse(text: str, origin: str) -> Proxy:
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        port = parts.port if parts.port is not None else _DEFAULT_PORT
        usable = parts.scheme == "http" and parts.hostname and 0 < port <= _PORT_MAX
    except ValueError:
        raise _unusable(origin, "an address that cannot be read") from None
    if not usable or parts.hostname is None:
        raise _unusable(origin, f"the kind {parts.scheme}://" if parts.scheme != "http" else "no host or no port")
    if not _is_plain(parts):
        raise _unusable(origin, "more than user, password, host and port")
    user, password = unquote(parts.username or ""), unquote(parts.password or "")
    return Proxy(host=parts.hostname, port=port, origin=origin, user=user, password=password)


def _is_plain(parts: SplitResult) -> bool:
    """Whether nothing follows the port, and the host has no sign that could end or split a line of HTTP."""
    host = parts.hostname or ""
    return parts.path in ("", "/") and not parts.query and not parts.fragment and host.isprintable() and " " not in host


def _bypassed(host: str, port: int) -> bool:
    """Whether NO_PROXY names this host: by name, by domain, by host:port, or by a network such as 10.0.0.0/8."""
    if urllib.request.proxy_bypass(host) or urllib.request.proxy_bypass(f"{host}:{port}"):
        return True
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host)
        for entry in urllib.request.getproxies_environment().get("no", "").split(","):
            with contextlib.suppress(ValueError):
                if address in ipaddress.ip_network(entry.strip(), strict=False):
                    return True
    return False


def _unusable(origin: str, got: str) -> ConfigError:
    """Return the error, which never shows the address: it may hold a password."""
    return ConfigError(
        "the address of the proxy cannot be used",
        where=origin,
        expected='http://host:port or http://user:password@host:port, with %XX for special signs; or "none"',
        got=got,
        remedy="correct it; the address is not shown here, as it may hold a password",
        code="E214",
    )
