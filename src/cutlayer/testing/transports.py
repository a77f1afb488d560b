"""What every transport must do, as scripts that a runner plays over it.

A script is a function of the session's number that gives a generator: it yields `Post` and `Take`, as
`cutlayer.engine.party.interpret` does, and is answered with None and with the frame. A runner plays the scripts of the
three parties "server", "clinic" and "lab" over the transport, and returns party -> the error that ended it, without
those that came to their end.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Mapping
from math import prod
from typing import Any

from cutlayer.core.program import Tag
from cutlayer.core.spec import DTYPES
from cutlayer.engine.party import Post, Take
from cutlayer.engine.wire import Frame
from cutlayer.errors import CutlayerError
from cutlayer.testing.expect import expect

__all__ = ["TRANSPORT_CHECKS", "Runner", "Script", "check_transport"]

Talk = Generator[Post | Take, Any, None]
Script = Callable[[int], Talk]
Runner = Callable[[Mapping[str, Script]], dict[str, CutlayerError]]


def check_transport(run: Runner) -> None:
    """Run all of `TRANSPORT_CHECKS`. Raises `AssertionError` for the first thing that is not as it must be."""
    for check in TRANSPORT_CHECKS.values():
        check(run)


def tag_of(session: int, step: int, micro: int = 0) -> Tag:
    """Return an address."""
    return Tag(session, "train", 1, step, 0, 0, micro, "up")


def frame_of(session: int, step: int, payload: Any, micro: int = 0) -> Frame:  # noqa: ANN401 - any buffer
    """Return a frame of bytes."""
    return Frame(tag_of(session, step, micro), "bytes", (len(payload),), payload)


def idle(_session: int) -> Talk:
    """Do nothing."""
    yield from ()


def frames_are_taken_by_tag_not_by_arrival(run: Runner) -> None:
    """Sixty frames are taken in another order than they were sent in."""
    order = list(range(60))
    random.Random(1).shuffle(order)  # noqa: S311 - made-up data

    def server(session: int) -> Talk:
        for step in range(60):
            yield Post("clinic", frame_of(session, step, bytes([step]) * step))

    def clinic(session: int) -> Talk:
        for step in order:
            frame = yield Take("server", tag_of(session, step))
            expect(bytes(frame.payload) == bytes([step]) * step, f"the payload of step {step}")
            expect(frame.tag == tag_of(session, step), f"the tag of step {step}")

    _end_well(run({"server": server, "clinic": clinic, "lab": idle}))


def every_dtype_and_shape_arrives_as_it_left(run: Runner) -> None:
    """All dtypes, shapes with zeros and without dimensions."""
    cases = [(dtype, shape) for dtype in DTYPES for shape in ((), (0,), (3, 0, 2), (5,), (2, 3, 4))]
    draw = random.Random(2)  # noqa: S311 - made-up data
    payloads = [draw.randbytes(DTYPES[dtype] * prod(shape)) for dtype, shape in cases]

    def server(session: int) -> Talk:
        for step, ((dtype, shape), payload) in enumerate(zip(cases, payloads, strict=True)):
            yield Post("lab", Frame(tag_of(session, step), dtype, shape, payload))

    def lab(session: int) -> Talk:
        for step, ((dtype, shape), payload) in enumerate(zip(cases, payloads, strict=True)):
            frame = yield Take("server", tag_of(session, step))
            got = (frame.dtype, frame.shape, bytes(frame.payload))
            expect(got == (dtype, shape, payload), f"{dtype}{list(shape)} as it left")

    _end_well(run({"server": server, "lab": lab, "clinic": idle}))


def three_parties_in_a_ring(run: Runner) -> None:
    """A message goes round, also between two parties of which none can be dialled."""
    ring = {"server": "clinic", "clinic": "lab", "lab": "server"}

    def member(me: str) -> Script:
        before = next(party for party, following in ring.items() if following == me)

        def talk(session: int) -> Talk:
            for step in range(15):
                if me == "server":
                    yield Post(ring[me], frame_of(session, step, f"{step} {me}".encode()))
                frame = yield Take(before, tag_of(session, step))
                text = bytes(frame.payload) + f" {me}".encode()
                if me != "server":
                    yield Post(ring[me], frame_of(session, step, text))
                else:
                    expect(text == f"{step} server clinic lab server".encode(), "a message that went round")

        return talk

    _end_well(run({party: member(party) for party in ring}))


def large_tensors_both_ways_at_once(run: Runner) -> None:
    """Two parties send 5 MiB three times before either reads: a send never waits for the receiver's program."""
    size = 5 * 2**20 + 17
    data = {party: random.Random(party).randbytes(size) for party in ("server", "clinic")}  # noqa: S311

    def member(me: str, other: str) -> Script:
        def talk(session: int) -> Talk:
            for step in range(3):
                yield Post(other, frame_of(session, step, memoryview(data[me])))
            for step in range(3):
                frame = yield Take(other, tag_of(session, step))
                expect(bytes(frame.payload) == data[other], "5 MiB as they left")

        return talk

    scripts = {"server": member("server", "clinic"), "clinic": member("clinic", "server"), "lab": idle}
    _end_well(run(scripts))


def what_the_receiver_writes_does_not_reach_the_sender(run: Runner) -> None:
    """A payload is writable at the receiver and shares no memory with the sender's."""
    kept = bytearray(b"sender" * 100)

    def server(session: int) -> Talk:
        yield Post("clinic", frame_of(session, 0, kept))
        yield Take("clinic", tag_of(session, 1))
        expect(bytes(kept) == b"sender" * 100, "the sender's bytes to stay as they were")

    def clinic(session: int) -> Talk:
        frame = yield Take("server", tag_of(session, 0))
        view = memoryview(frame.payload)
        expect(not view.readonly, "a payload that its receiver may write to")
        view[:] = bytes(len(view))
        yield Post("server", frame_of(session, 1, b""))

    _end_well(run({"server": server, "clinic": clinic, "lab": idle}))


def a_frame_that_never_comes_is_an_error_not_a_hang(run: Runner) -> None:
    """Two parties wait for each other: a deadlock (E402) or a deadline (E621) that names party and step."""

    def server(_session: int) -> Talk:
        yield Take("clinic", tag_of(_session, 7, 3))

    def clinic(session: int) -> Talk:
        yield Take("server", tag_of(session, 9))

    errors = run({"server": server, "clinic": clinic, "lab": idle})
    expect({"server", "clinic"} <= set(errors), "an error at both parties")
    first = [error for error in errors.values() if error.code in ("E402", "E621")]  # the others are told of it
    expect(bool(first), "E402 or E621 at one party at least")
    for error in first:
        expect(any(name in str(error) for name in ("clinic", "server")), "the error to name a party")
        steps = ("step=7", "step 7", "step=9", "step 9")
        expect(any(step in str(error) for step in steps), "the error to name the step")
    for error in errors.values():
        expect("E402" in str(error) or "E621" in str(error), "the others to be told which error it was")


def an_error_of_one_party_ends_all(run: Runner) -> None:
    """A party fails: the other learns the code and the remedy."""

    def server(session: int) -> Talk:
        yield Post("clinic", frame_of(session, 0, b"x"))
        raise CutlayerError("broken on purpose", remedy="mend it")

    def clinic(session: int) -> Talk:
        yield Take("server", tag_of(session, 0))
        yield Take("server", tag_of(session, 1))

    errors = run({"server": server, "clinic": clinic, "lab": idle})
    expect(errors["server"].code == "E000", "the party's own error at the party")
    expect("E000" in str(errors["clinic"]) and "mend it" in str(errors["clinic"]), "its code and remedy at the other")


TRANSPORT_CHECKS: Mapping[str, Callable[[Runner], None]] = {
    check.__name__: check
    for check in (
        frames_are_taken_by_tag_not_by_arrival,
        every_dtype_and_shape_arrives_as_it_left,
        three_parties_in_a_ring,
        large_tensors_both_ways_at_once,
        what_the_receiver_writes_does_not_reach_the_sender,
        a_frame_that_never_comes_is_an_error_not_a_hang,
        an_error_of_one_party_ends_all,
    )
}
"""Name -> check, for a test that runs each by itself."""


def _end_well(errors: Mapping[str, CutlayerError]) -> None:
    expect(not errors, f"no error; got {'; '.join(str(error) for error in errors.values())}")
