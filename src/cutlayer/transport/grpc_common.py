"""How gRPC is used: one bidirectional method of raw bytes, its options, and the certificates of both ends."""

from __future__ import annotations

from typing import Any, Final

import grpc

from cutlayer.transport.frames import MESSAGE_MAX
from cutlayer.transport.proxy import Proxy
from cutlayer.transport.tls import Credentials

__all__ = ["METHOD", "SERVICE", "channel_to", "client_options", "server_credentials", "server_options"]

SERVICE: Final = "cutlayer.Link"
METHOD: Final = "Stream"
_Options = list[tuple[str, int | str]]
_BOTH: Final[_Options] = [
    ("grpc.max_send_message_length", MESSAGE_MAX),
    ("grpc.max_receive_message_length", MESSAGE_MAX),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.default_compression_algorithm", 0),
]


def server_options() -> _Options:
    """Return the options of a server."""
    return [
        *_BOTH,
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
        ("grpc.server_handshake_timeout_ms", 10_000),  # who connects and says nothing holds no thread for long
        ("grpc.so_reuseport", 0),
    ]


def client_options(peer: str) -> _Options:
    """Return the options of a channel to `peer`, whose certificate must be in that name, whatever the address is."""
    return [
        *_BOTH,
        ("grpc.min_reconnect_backoff_ms", 5_000),  # also the time that one attempt to connect may take
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.ssl_target_name_override", peer),
        ("grpc.default_authority", peer),
        ("grpc.enable_http_proxy", 0),  # gRPC's own reading of the environment; `find_proxy` decides
    ]


def channel_to(peer: str, address: str, credentials: Credentials | None, proxy: Proxy | None = None) -> Any:  # noqa: ANN401 - grpc has no types
    """Return a new channel to a party, through a proxy if given; nothing is dialled yet. The caller closes it.

    What the proxy passes on is TLS from end to end: the certificates are the two parties', as without a proxy.
    """
    options = client_options(peer)
    if proxy is not None:
        options += [("grpc.http_connect_server", address)]
        if proxy.authorization:
            options += [("grpc.http_connect_headers", f"Proxy-Authorization:{proxy.authorization}")]
        address = proxy.address
    if credentials is None:
        return grpc.insecure_channel(address, options)
    own = grpc.ssl_channel_credentials(credentials.authority, credentials.private_key, credentials.certificate)
    return grpc.secure_channel(address, own, options)


def server_credentials(credentials: Credentials) -> Any:  # noqa: ANN401 - grpc has no types
    """Return what a server shows, and what it asks of clients: a certificate of the same authority."""
    pair = (credentials.private_key, credentials.certificate)
    return grpc.ssl_server_credentials([pair], root_certificates=credentials.authority, require_client_auth=True)
