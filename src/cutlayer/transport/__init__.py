"""Transports: how frames get from party to party. The only folder that knows sockets and gRPC."""

import os

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # before gRPC is loaded: what it logs is told as errors and events here
