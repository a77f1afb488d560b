"""Transports: how frames get from party to party. The only folder that knows sockets and gRPC."""
