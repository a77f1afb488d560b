"""Requests of many sessions for one stage: which are put together, what each gets, and whom a failure concerns."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cutlayer as cl
from cutlayer.core.quota import Serving
from cutlayer.engine.stage import Context, ModuleStage
from cutlayer.errors import CutlayerError, ProgramError, StageError
from cutlayer.run.batcher import Batcher

pytestmark = pytest.mark.timeout(30)
PLACE = ("body", 0)


class Body(nn.Module):
    """Notes the sizes of its batches; refuses a batch with a number above 100; waits for `gate` before a 7."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.sizes, self.gate = nn.Linear(4, 3), [], threading.Event()

    def forward(self, x: Tensor) -> Tensor:
        if (x == 7).any():
            self.gate.wait(10)
        self.sizes.append(len(x))
        if (x > 100).any():
            raise ValueError("too large")
        return self.linear(x)


def plan(cut: str = "float32[batch, 4]", back: str = "float32[batch, 3]") -> cl.Plan:
    return cl.u_shaped("alpha", "server", cut=cut, back=back, output="float32[batch, 2]")


@contextmanager
def batching(limits: Serving, module: nn.Module | None = None, **specs: str) -> Iterator[tuple[Batcher, Any]]:
    drawn, module = plan(**specs), module or Body()
    ports = drawn.stage("body").ports
    stage = ModuleStage("body", module, ports=ports, seed=0, device=torch.device("cpu"))
    batcher = Batcher("server", {PLACE: stage}, drawn.graph, limits)
    batcher.start()
    try:
        yield batcher, module
    finally:
        module.gate.set() if isinstance(module, Body) else None
        batcher.close()


def context(batch: int) -> Context:
    return Context(key=(0, 0), batch=batch, training=False, wanted=(True,))


def at_once(*jobs: Callable[[], Any]) -> list[Any]:
    """Start each in a thread, in this order; return what each gave or raised."""
    found: list[Any] = [None] * len(jobs)

    def run(place: int) -> None:
        try:
            found[place] = jobs[place]()
        except CutlayerError as error:
            found[place] = error

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(jobs))]
    for thread in threads:
        thread.start()
        time.sleep(0.03)
    for thread in threads:
        thread.join(20)
    return found


def asking(batcher: Batcher, value: Tensor) -> Callable[[], Tensor]:
    return lambda: batcher.forward(PLACE, [value], context(len(value)))[0][0]


def rows(count: int, seed: int) -> Tensor:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))


def test_requests_that_wait_become_one_forward():
    with batching(Serving(batch=64, wait=5)) as (batcher, body):
        for _ in range(3):
            batcher.came()
        given = [rows(2, 1), rows(3, 2), rows(1, 3)]
        found = at_once(*(asking(batcher, value) for value in given))
        assert body.sizes == [6]
        whole = body.linear(torch.cat(given)).detach()
        assert torch.equal(torch.cat(found), whole)  # the same batch composition: the same bits
        work = batcher.work
        assert (work.forwards, work.requests, work.samples, work.largest) == (1, 3, 6, 6)


def test_nobody_waits_once_all_sessions_wait():
    with batching(Serving(batch=64, wait=10)) as (batcher, body):
        batcher.came()
        begin = time.monotonic()
        asking(batcher, rows(2, 1))()
        assert time.monotonic() - begin < 2
        batcher.came()
        threading.Timer(0.2, batcher.went).start()  # the other one goes: nobody to wait for
        asking(batcher, rows(2, 1))()
        assert time.monotonic() - begin < 5
        assert body.sizes == [2, 2]


def test_one_waits_for_others_only_so_long():
    with batching(Serving(batch=64, wait=0.05)) as (batcher, body):
        batcher.came()
        batcher.came()
        begin = time.monotonic()
        asking(batcher, rows(2, 1))()
        assert 0.05 <= time.monotonic() - begin < 2
        assert body.sizes == [2]


def test_a_forward_has_a_largest_size():
    with batching(Serving(batch=4, wait=0.3)) as (batcher, body):
        for _ in range(4):
            batcher.came()
        given = [rows(2, 1), rows(2, 2), rows(9, 3), rows(1, 4)]
        found = at_once(*(asking(batcher, value) for value in given))
        assert [len(value) for value in found] == [2, 2, 9, 1]
        assert sorted(body.sizes) == [1, 4, 9]


def test_without_batching_each_has_the_bits_of_its_own_forward():
    with batching(Serving(batch=1, wait=5)) as (batcher, body):
        for _ in range(3):
            batcher.came()
        given = [rows(2, 1), rows(3, 2), rows(5, 3)]
        found = at_once(*(asking(batcher, value) for value in given))
        assert body.sizes == [2, 3, 5]
        assert all(torch.equal(mine, body.linear(value)) for mine, value in zip(found, given, strict=True))


def test_a_failure_is_told_to_whom_it_concerns():
    with batching(Serving(batch=64, wait=5)) as (batcher, body):
        for _ in range(3):
            batcher.came()
        bad = rows(2, 2)
        bad[0, 0] = 101
        first, error, last = at_once(*(asking(batcher, value) for value in (rows(1, 1), bad, rows(4, 3))))
        assert body.sizes == [7, 1, 2, 4]
        assert torch.equal(first, body.linear(rows(1, 1)))
        assert torch.equal(last, body.linear(rows(4, 3)))
        assert isinstance(error, StageError)
        assert error.code == "E304"


@pytest.mark.parametrize(
    ("specs", "given"),
    [
        ({"cut": "float32[batch, time<=9]", "back": "float32[batch, time<=9]"}, [(2, 3), (2, 5)]),  # two lengths
        ({"cut": "float32[batch, 4]", "back": "float32[batch, time<=9]"}, [(2, 4), (2, 4)]),  # a length of its own
        ({"cut": "float32[rows<=batch, 4]", "back": "float32[rows<=batch, 4]"}, [(1, 4), (2, 4)]),  # missing rows
    ],
)
def test_what_does_not_fit_together_runs_alone(specs: dict[str, str], given: list[tuple[int, int]]):
    class Noting(nn.Module):
        sizes: list[int] = []  # noqa: RUF012 - one for each test

        def forward(self, x: Tensor) -> Tensor:
            self.sizes.append(len(x))
            return x + 1

    Noting.sizes = []
    with batching(Serving(batch=64, wait=0.1), Noting(), **specs) as (batcher, _):
        batcher.came()
        batcher.came()
        values = [torch.rand(shape) for shape in given]
        jobs = [lambda v=value: batcher.forward(PLACE, [v], context(2))[0][0] for value in values]
        found = at_once(*jobs)
        assert all(torch.equal(mine, value + 1) for mine, value in zip(found, values, strict=True))
        assert sorted(Noting.sizes) == sorted(count for count, _ in given)


@pytest.mark.provokes("E450")
def test_a_request_waits_only_so_long():
    with batching(Serving(batch=1, deadline=0.2)) as (batcher, body):
        slow = torch.full((1, 4), 7.0)
        threading.Timer(0.8, body.gate.set).start()
        done, late = at_once(asking(batcher, slow), asking(batcher, rows(1, 1)))
        assert torch.equal(done, body.linear(slow))  # it had been taken: it ends
        assert isinstance(late, ProgramError)
        assert (late.code, late.got) == ("E450", "1 requests waiting")
        assert late.expected == "a forward within 0.2 seconds"
        assert body.sizes == [1]


@pytest.mark.provokes("E451")
def test_a_closed_one_takes_no_request_and_leaves_none_waiting():
    with batching(Serving(batch=1, deadline=9)) as (batcher, body):
        slow = torch.full((1, 4), 7.0)

        def close() -> None:
            threading.Timer(0.1, body.gate.set).start()
            batcher.close()

        done, waiting, _ = at_once(asking(batcher, slow), asking(batcher, rows(1, 1)), close)
        assert torch.equal(done, body.linear(slow))
        assert waiting.code == "E451"
        with pytest.raises(ProgramError, match=r"E451.*'body' is no longer served"):
            asking(batcher, rows(1, 1))()


def test_a_session_gets_forwards_only():
    with batching(Serving()) as (batcher, body):
        seat = batcher.seats()[PLACE]
        (output,) = seat.forward([rows(2, 1)], context(2))
        assert torch.equal(output, body.linear(rows(2, 1)))
        assert seat.spent == 2 * 2 * 4 * 3
        assert seat.parameters() == ()
        with pytest.raises(StageError, match=r"E303.*runs forwards only"):
            seat.backward([None], (0, 0))
