"""What every transport must do (`cutlayer.testing`), run over the local one and over gRPC with mutual TLS."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest

from cutlayer.engine.party import Post
from cutlayer.errors import CutlayerError
from cutlayer.testing import TRANSPORT_CHECKS
from cutlayer.testing.transports import Runner, Script
from cutlayer.transport.local import run_together
from cutlayer.transport.network import Network
from tests.transport.parties import QUICK, Cast, meet

PATIENT = {"deadlines": replace(QUICK, receive=40)}  # of the lab, idle in most tests: it is not the first to give up
pytestmark = pytest.mark.timeout(90)


def _local(_cast: Cast) -> Runner:
    def run(scripts: Mapping[str, Script]) -> dict[str, CutlayerError]:
        try:
            run_together({party: script(1) for party, script in scripts.items()}, lambda _party, _effect: None)
        except CutlayerError as error:
            return dict.fromkeys(scripts, error)
        return {}

    return run


def _grpc(cast: Cast) -> Runner:
    cast.certify()

    def part(script: Script) -> Callable[[Network], None]:
        def play(network: Network) -> None:
            talk, answer = script(meet(network)), None
            while True:
                try:
                    effect = talk.send(answer)
                except StopIteration:
                    network.finish()
                    return
                answer = None
                if isinstance(effect, Post):
                    network.send(effect.to, effect.frame)
                else:
                    answer = network.recv(effect.source, effect.tag)

        return play

    def run(scripts: Mapping[str, Script]) -> dict[str, CutlayerError]:
        results = cast.play({party: part(script) for party, script in scripts.items()}, lab_=PATIENT)
        return {party: value for party, value in results.items() if value is not None}

    return run


@pytest.fixture(params=[_local, _grpc], ids=["local", "grpc"])
def run(request: pytest.FixtureRequest, cast: Cast) -> Runner:
    return request.param(cast)


@pytest.mark.parametrize("check", TRANSPORT_CHECKS)
def test_a_transport_keeps_to(check: str, run: Runner) -> None:
    TRANSPORT_CHECKS[check](run)
