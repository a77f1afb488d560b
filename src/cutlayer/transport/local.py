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

__all__ = ["Others", "run_together"]

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
    _check_empty(mail)


def _check_empty(mail: Mapping[tuple[str, str, Tag], Frame]) -> None:
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


class Others:
    """All parties but one, run in this thread whenever that one waits for a frame. A `base.Transport` for it.

    Args:
        party: The party that drives itself.
        handle: Fulfils `Do` and `EndStep` of the others.
    """

    def __init__(self, party: str, handle: Handler) -> None:
        """Nobody runs yet: see `begin`."""
        self.party, self._handle = party, handle
        self._members: dict[str, _Member] = {}
        self._mail: dict[tuple[str, str, Tag], Frame] = {}

    def begin(self, talks: Mapping[str, Talk]) -> None:
        """Start a round of the others."""
        self._members = {name: _Member(talk) for name, talk in talks.items()}

    def send(self, to: str, *frames: Frame) -> None:
        """Leave frames for a party; they share no memory with the sender's."""
        for frame in frames:
            _put(self.party, Post(to, frame), self._mail)

    def flush(self) -> None:
        """Do nothing: what was sent has left; see `base.Transport.flush`."""

    def recv(self, source: str, tag: Tag) -> Frame:
        """Run the others until the frame is there. Raises `ProgramError` E402 if none of them can go on."""
        key = (source, self.party, tag)
        while key not in self._mail:
            if not self._turn():
                waiting = {self.party: _Member(_nothing())}
                waiting[self.party].waits = Take(source, tag)
                raise _deadlock({**self._members, **waiting})
        return self._mail.pop(key)

    def finish(self) -> None:
        """Run the others to the end of their round. Raises `ProgramError` E402, `ContractError` E403."""
        while not all(member.done for member in self._members.values()):
            if not self._turn():
                raise _deadlock(self._members)
        _check_empty(self._mail)

    def close(self) -> None:
        """End the others where they are."""
        for member in self._members.values():
            member.talk.close()

    def _turn(self) -> bool:
        """Let each of the others go on as far as it can; say whether anyone could. Leaves torch as it was."""
        moved, outer = False, torch.get_rng_state()
        try:
            with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
                for name, member in self._members.items():
                    if not member.done and _ready(name, member, self._mail):
                        torch.set_rng_state(member.random)
                        _advance(name, member, self._mail, self._handle)
                        member.random = torch.get_rng_state()
                        moved = True
        finally:
            torch.set_rng_state(outer)
        return moved


def _nothing() -> Talk:
    yield from ()
