"""The checks of transports find faults; tests/transport/test_conformance.py runs them over cutlayer's own."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from cutlayer.engine.party import Post
from cutlayer.errors import CutlayerError
from cutlayer.testing import TRANSPORT_CHECKS, check_transport
from cutlayer.testing.transports import Script
from cutlayer.transport.local import run_together


def played(scripts: Mapping[str, Script], spoil=lambda effect: effect) -> dict[str, CutlayerError]:
    """Play scripts over the transport of one process; `spoil` changes what is posted."""

    def member(script: Script):
        talk, answer = script(1), None
        while True:
            try:
                effect = talk.send(answer)
            except StopIteration:
                return
            answer = yield spoil(effect) if isinstance(effect, Post) else effect

    try:
        run_together({party: member(script) for party, script in scripts.items()}, lambda _party, _effect: None)
    except CutlayerError as error:
        return dict.fromkeys(scripts, error)
    return {}


def test_the_local_transport_passes_all():
    check_transport(played)


def flipped(effect: Post) -> Post:
    payload = bytes(effect.frame.payload)
    return replace_payload(effect, payload[::-1])


def replace_payload(effect: Post, payload: bytes) -> Post:
    frame = effect.frame
    return Post(effect.to, type(frame)(frame.tag, frame.dtype, frame.shape, payload))


def shorter(effect: Post) -> Post:
    frame = effect.frame
    return Post(effect.to, type(frame)(frame.tag, frame.dtype, (*frame.shape, 1), frame.payload))


@pytest.mark.parametrize(
    ("check", "spoil", "words"),
    [
        ("every_dtype_and_shape_arrives_as_it_left", flipped, "as it left"),
        ("every_dtype_and_shape_arrives_as_it_left", shorter, "as it left"),
        ("large_tensors_both_ways_at_once", flipped, "5 MiB as they left"),
        ("three_parties_in_a_ring", flipped, "a message that went round"),
    ],
)
def test_a_transport_that_changes_frames_is_found(check: str, spoil, words: str):
    with pytest.raises(AssertionError, match=words):
        TRANSPORT_CHECKS[check](lambda scripts: played(scripts, spoil))


def test_a_transport_that_hides_errors_is_found():
    with pytest.raises(AssertionError, match="an error at both parties"):
        TRANSPORT_CHECKS["a_frame_that_never_comes_is_an_error_not_a_hang"](lambda scripts: {})
