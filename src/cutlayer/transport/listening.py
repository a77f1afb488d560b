"""Why this machine cannot listen at an address, and what to do: another port, `listen`, or no address at all.

| code | error | meaning |
| --- | --- | --- |
| E604 | LinkError | the party cannot listen at its address |
"""

from __future__ import annotations

import errno
import os
import socket

from cutlayer.errors import LinkError
from cutlayer.transport.addresses import host_port
from cutlayer.transport.certificates import first_line

__all__ = ["cannot_listen", "in_use", "reason_of", "way_out", "why_not_listen"]


def why_not_listen(address: str) -> OSError | None:
    """Return why this machine cannot listen at host:port; None if it can. Stops listening at once."""
    host, port = host_port(address)
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            return None
    except OSError as error:
        return error


def in_use(error: BaseException | None) -> bool:
    """Whether the reason is that something else, or this party in another process, listens there."""
    return isinstance(error, OSError) and error.errno == errno.EADDRINUSE


def reason_of(error: OSError) -> str:
    """Return the system's reason in words."""
    if error.errno is None or isinstance(error, socket.gaierror):
        return error.strerror or first_line(error)
    return os.strerror(error.errno)  # Python's own text says the address again


def way_out(error: OSError | None, *, coordinates: bool) -> str:
    """Return what to do; names no address of this site, as the other parties are told it too.

    Args:
        error: The system's reason, if it is known.
        coordinates: Whether this party is the coordinator, which must be reached.
    """
    if in_use(error):
        return (
            "stop what else uses the port, or set `listen` in the party file to another one that others reach; "
            "if this party runs already, let it be"
        )
    if error is not None and error.errno in (errno.EACCES, errno.EPERM):
        return "take a port from 1024 on: `listen` in the party file, and the contract's unless something passes it on"
    own = 'behind a router or a firewall set listen = "0.0.0.0:PORT" in [network] of the party file, and have the '
    own += "contract's address passed on to that port; "
    if coordinates:
        return own + "or let a party that others can reach be the coordinator"
    return own + "or remove this party from [addresses] of the contract: then it dials out, and opens no port"


def cannot_listen(party: str, address: str, error: OSError | None, *, coordinates: bool) -> LinkError:
    """Return E604 for host:port; see `way_out`."""
    return LinkError(
        "the party cannot listen at its address",
        where=f"party {party}",
        got=f"{address}: {reason_of(error)}" if error is not None else address,
        remedy=way_out(error, coordinates=coordinates),
        code="E604",
    )
