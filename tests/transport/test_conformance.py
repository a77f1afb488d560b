"""What every transport must do: one suite, run over the local one and over gRPC with mutual TLS.

A script is a generator per party that yields `Post` and `Take`, as `engine.party.interpret` does.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Mapping
from dataclasses import replace
from typing import Any

import pytest

from cutlayer.core.program import Tag
from cutlayer.core.spec import DTYPES
from cutlayer.engine.party import Post, Take
from cutlayer.engine.wire import Frame
from cutlayer.errors import CutlayerError
from cutlayer.transport.local import run_together
from cutlayer.transport.network import Network
from tests.transport.parties import QUICK, Cast, meet

Script = Callable[[int], Generator[Post | Take, Any, None]]
Runner = Callable[[Mapping[str, Script]], dict[str, CutlayerError]]
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


def _tag(session: int, step: int, micro: int = 0) -> Tag:
    return Tag(session, "train", 1, step, 0, 0, micro, "up")


def _bytes(session: int, step: int, payload: Any, micro: int = 0) -> Frame:
    return Frame(_tag(session, step, micro), "bytes", (len(payload),), payload)


def _idle(_session: int) -> Generator[Post | Take, Any, None]:
    return
    yield


def test_frames_are_taken_by_tag_not_by_arrival(run: Runner) -> None:
    order = list(range(60))
    random.Random(1).shuffle(order)

    def server(session: int):
        for step in range(60):
            yield Post("clinic", _bytes(session, step, bytes([step]) * step))

    def clinic(session: int):
        for step in order:
            frame = yield Take("server", _tag(session, step))
            assert bytes(frame.payload) == bytes([step]) * step
            assert frame.tag == _tag(session, step)

    assert run({"server": server, "clinic": clinic, "lab": _idle}) == {}


def test_every_dtype_and_shape_arrives_as_it_left(run: Runner) -> None:
    cases = [(dtype, shape) for dtype in DTYPES for shape in ((), (0,), (3, 0, 2), (5,), (2, 3, 4))]
    draw = random.Random(2)
    payloads = [draw.randbytes(DTYPES[d] * _size(shape)) for d, shape in cases]

    def server(session: int):
        for step, ((dtype, shape), payload) in enumerate(zip(cases, payloads, strict=True)):
            yield Post("lab", Frame(_tag(session, step), dtype, shape, payload))

    def lab(session: int):
        for step, ((dtype, shape), payload) in enumerate(zip(cases, payloads, strict=True)):
            frame = yield Take("server", _tag(session, step))
            assert (frame.dtype, frame.shape, bytes(frame.payload)) == (dtype, shape, payload)

    assert run({"server": server, "lab": lab, "clinic": _idle}) == {}


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for dim in shape:
        size *= dim
    return size


def test_three_parties_in_a_ring_also_without_an_address(run: Runner) -> None:
    ring = {"server": "clinic", "clinic": "lab", "lab": "server"}

    def member(me: str) -> Script:
        before = next(party for party, following in ring.items() if following == me)

        def talk(session: int):
            for step in range(15):
                if me == "server":
                    yield Post(ring[me], _bytes(session, step, f"{step} {me}".encode()))
                frame = yield Take(before, _tag(session, step))
                text = bytes(frame.payload) + f" {me}".encode()
                if me != "server":
                    yield Post(ring[me], _bytes(session, step, text))
                else:
                    assert text == f"{step} server clinic lab server".encode()

        return talk

    assert run({party: member(party) for party in ring}) == {}


def test_large_tensors_both_ways_at_once(run: Runner) -> None:
    size = 5 * 2**20 + 17
    data = {party: random.Random(party).randbytes(size) for party in ("server", "clinic")}

    def member(me: str, other: str) -> Script:
        def talk(session: int):
            for step in range(3):
                yield Post(other, _bytes(session, step, memoryview(data[me])))
            for step in range(3):
                frame = yield Take(other, _tag(session, step))
                assert bytes(frame.payload) == data[other]

        return talk

    scripts = {"server": member("server", "clinic"), "clinic": member("clinic", "server"), "lab": _idle}
    assert run(scripts) == {}


def test_what_the_receiver_writes_does_not_reach_the_sender(run: Runner) -> None:
    kept = bytearray(b"sender" * 100)

    def server(session: int):
        yield Post("clinic", _bytes(session, 0, kept))
        yield Take("clinic", _tag(session, 1))
        assert bytes(kept) == b"sender" * 100

    def clinic(session: int):
        frame = yield Take("server", _tag(session, 0))
        view = memoryview(frame.payload)
        assert not view.readonly
        view[:] = bytes(len(view))
        yield Post("server", _bytes(session, 1, b""))

    assert run({"server": server, "clinic": clinic, "lab": _idle}) == {}


def test_a_frame_that_never_comes_is_an_error_that_names_it_not_a_hang(run: Runner) -> None:
    def server(session: int):
        yield Take("clinic", _tag(session, 7, 3))

    def clinic(session: int):
        yield Take("server", _tag(session, 9))

    errors = run({"server": server, "clinic": clinic, "lab": _idle})
    assert set(errors) >= {"server", "clinic"}
    first = [error for error in errors.values() if error.code in ("E402", "E621")]  # the others are told of it
    assert first
    for error in first:
        assert any(name in str(error) for name in ("clinic", "server"))
        assert any(step in str(error) for step in ("step=7", "step 7", "step=9", "step 9"))
    for error in errors.values():
        assert "E402" in str(error) or "E621" in str(error)


def test_an_error_of_one_party_ends_all(run: Runner) -> None:
    def server(session: int):
        yield Post("clinic", _bytes(session, 0, b"x"))
        raise CutlayerError("broken on purpose", code="E999", remedy="mend it")

    def clinic(session: int):
        yield Take("server", _tag(session, 0))
        yield Take("server", _tag(session, 1))

    errors = run({"server": server, "clinic": clinic, "lab": _idle})
    assert errors["server"].code == "E999"
    assert "E999" in str(errors["clinic"])
    assert "mend it" in str(errors["clinic"])
