"""All parties in one process and one thread: cooperative, deterministic, with deadlock explained."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from typing import Any

import torch
from torch import Tensor

from cutlayer.core.program import Tag
from cutlayer.engine.party import Do, Effect, EndStep, Post, Take
from cutlayer.engine.wire import Frame
from cutlayer.errors import ContractError, ProgramError

__all__ = ["run_together"]

Talk = Generator[Effect, Any, None]
Handler = Callable[[str, Do | EndStep], object]
_WORK = (Do, EndStep)


class _Member:
    """One party's generator, what it waits for, and its random generator while it does not run."""

    def __init__(self, talk: Talk) -> None:
        self.talk = talk
        self.waits: Take | None = None
        self.done = False
        self.random: Tensor = torch.get_rng_state()


def run_together(talks: Mapping[str, Talk], handle: Handler) -> None:
    """Drive all parties' generators in turns until all are done.

    Args:
        talks: Party -> generator of `engine.party.interpret`.
        handle: Fulfils `Do` and `EndStep` of a party and returns the answer.

    Raises:
        ProgramError: no party can go on (E402); says what each waits for.
        ContractError: a frame was sent that nobody waited for, or one tag twice.
    """
    members = {party: _Member(talk) for party, talk in talks.items()}
    mail: dict[tuple[str, str, Tag], Frame] = {}
    outer = torch.get_rng_state()
    try:
        while not all(member.done for member in members.values()):
            moved = False
            for party, member in members.items():
                if not member.done and _ready(party, member, mail):
                    torch.set_rng_state(member.random)
                    _advance(party, member, mail, handle)
                    member.random = torch.get_rng_state()
                    moved = True
            if not moved:
                raise _deadlock(members)
    finally:
        torch.set_rng_state(outer)
        for member in members.values():
            member.talk.close()
    if mail:
        sender, receiver, tag = next(iter(mail))
        raise ContractError(
            f"{sender!r} sent {receiver!r} a frame that it never took",
            where=str(tag),
            remedy="report this plan",
            code="E403",
        )


def _ready(party: str, member: _Member, mail: Mapping[tuple[str, str, Tag], Frame]) -> bool:
    return member.waits is None or (member.waits.source, party, member.waits.tag) in mail


def _advance(party: str, member: _Member, mail: dict[tuple[str, str, Tag], Frame], handle: Handler) -> None:
    """Run a party until it waits for a frame that is not there, or is done."""
    answer: object = None
    if member.waits is not None:
        answer = mail.pop((member.waits.source, party, member.waits.tag))
        member.waits = None
    while True:
        try:
            effect = member.talk.send(answer)
        except StopIteration:
            member.done = True
            return
        answer = None
        if isinstance(effect, _WORK):
            answer = handle(party, effect)
        elif isinstance(effect, Post):
            _put(party, effect, mail)
        else:
            answer = mail.pop((effect.source, party, effect.tag), None)
            if answer is None:
                member.waits = effect
                return


def _put(party: str, post: Post, mail: dict[tuple[str, str, Tag], Frame]) -> None:
    key = (party, post.to, post.frame.tag)
    if key in mail:
        raise ContractError(
            f"{party!r} sent {post.to!r} one frame twice",
            where=str(post.frame.tag),
            remedy="report this plan",
            code="E403",
        )
    # The receiver may write into what it gets; the sender's graph may still need its tensor.
    mail[key] = post.frame.copied()


def _deadlock(members: Mapping[str, _Member]) -> ProgramError:
    waiting = "; ".join(
        f"{party} waits for {member.waits.source}: {member.waits.tag}"
        for party, member in members.items()
        if member.waits is not None
    )
    return ProgramError(
        "no party can go on (deadlock)", where=waiting, remedy="compare the parties' programs and plans", code="E402"
    )
