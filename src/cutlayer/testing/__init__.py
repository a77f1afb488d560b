"""Conformance checks for what extends cutlayer: codecs, defences, exchanges, stages and transports.

Each check is a function for a test of one's own. It raises `AssertionError` that says what was expected, and returns
nothing. They need no pytest.
"""

from __future__ import annotations

from cutlayer.testing.crossings import check_codec, check_defence
from cutlayer.testing.exchanges import check_exchange
from cutlayer.testing.stages import check_stage
from cutlayer.testing.transports import TRANSPORT_CHECKS, check_transport

__all__ = [
    "TRANSPORT_CHECKS",
    "check_codec",
    "check_defence",
    "check_exchange",
    "check_stage",
    "check_transport",
]
