"""How a party in a process of its own begins and ends: torch's threads, whose frames come in, who hears of an error.

| code | error | meaning |
| --- | --- | --- |
| E390 | StageError | what the others are told when a party's own code fails |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Final, Protocol

import torch

from cutlayer.core.admission import Admission
from cutlayer.core.bounds import mailbox_bounds
from cutlayer.core.plan import Plan
from cutlayer.core.program import Mode, Program, Tag
from cutlayer.engine.wire import Frame
from cutlayer.errors import CutlayerError, PeerError, StageError
from cutlayer.run.memory import keep_freed_memory
from cutlayer.run.party import Party
from cutlayer.transport.network import Network, NetworkSettings, Ready, Start

__all__ = ["Link", "let_in", "own_process", "tell_others", "telling"]

_DIAL: Final = 5.0  # seconds in which a party that fails before a run tries to tell the coordinator


class Link(Protocol):
    """What a party takes part over: a `Network`, or several as one (`chain.Chain`). See the methods of `Network`."""

    def rendezvous(self, ready: Ready) -> Start: ...  # noqa: D102 - see Network

    def open(self, admission: Admission, bounds: Mapping[str, int]) -> None: ...  # noqa: D102

    def send(self, to: str, *frames: Frame) -> None: ...  # noqa: D102

    def flush(self) -> None: ...  # noqa: D102

    def recv(self, source: str, tag: Tag) -> Frame: ...  # noqa: D102

    def abort(self, error: CutlayerError) -> None: ...  # noqa: D102

    def finish(self) -> None: ...  # noqa: D102

    def rest(self) -> None: ...  # noqa: D102


@contextmanager
def own_process(party: Party) -> Iterator[None]:
    """Let torch use as many threads as the party says, until the end; keep freed memory."""
    threads = torch.get_num_threads()
    torch.set_num_threads(party.threads)
    keep_freed_memory()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def let_in(
    link: Link,
    plan: Plan,
    party: str,
    programs: Mapping[str, Mapping[Mode, Program]],
    phases: Sequence[tuple[Mode, int]],
) -> Mapping[Mode, Program]:
    """Open a session for the frames that the party's own programs wait for, and return these programs."""
    bounds = mailbox_bounds(programs, plan.training.window)
    admitted = {sender: most for (sender, receiver), most in bounds.items() if receiver == party}
    link.open(Admission(programs[party], phases), admitted)
    return programs[party]


@contextmanager
def telling(network: NetworkSettings, what: str) -> Iterator[None]:
    """Tell the others of an error of this party in what it does before it meets them, or only that `what` failed.

    Nothing is opened without an error. After one, whoever does not coordinate dials the coordinator, for at most
    `deadlines.close` or 5 seconds; the coordinator listens until all have come, for at most `deadlines.close`. Where
    another process of this party has come already, nobody is told, and its run goes on. The error itself is raised in
    any case. Only code, sentence and remedy leave, as `Network.abort` says.
    """
    try:
        yield
    except Exception as error:
        deadlines = network.deadlines
        if not network.coordinates:
            deadlines = replace(deadlines, close=min(deadlines.close, _DIAL))
        settings = replace(network, deadlines=deadlines)
        with suppress(Exception), Network(settings, lambda _event, _details: None, tells=True) as link:
            tell_others(link, error, what)
        raise


def tell_others(link: Link, error: BaseException | None, what: str) -> None:
    """Tell the other parties of an error of this one: its code and remedy, or only `what` failed if it has none."""
    if isinstance(error, PeerError) or not isinstance(error, Exception):
        return
    if not isinstance(error, CutlayerError):
        error = StageError(
            f"{what} failed",
            got=type(error).__name__,
            remedy="look at its terminal: the error there is its own code's",
            code="E390",
        )
    link.abort(error)
