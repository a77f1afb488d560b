"""How a party in a process of its own begins and ends: torch's threads, whose frames come in, who hears of an error.

| code | error | meaning |
| --- | --- | --- |
| E390 | StageError | what the others are told when a party's own code fails |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from cutlayer.core.admission import Admission
from cutlayer.core.bounds import mailbox_bounds
from cutlayer.core.plan import Plan
from cutlayer.core.program import Mode, Program
from cutlayer.errors import CutlayerError, PeerError, StageError
from cutlayer.run.memory import keep_freed_memory
from cutlayer.run.party import Party
from cutlayer.transport.network import Network

__all__ = ["let_in", "own_process", "tell_others"]


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
    link: Network,
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


def tell_others(link: Network, error: BaseException | None, what: str) -> None:
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
