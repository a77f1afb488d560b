"""What an exchange must keep to."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Mapping

from cutlayer.core.crossing import PlannedExchange
from cutlayer.core.program import Exchange
from cutlayer.engine.exchange import ExchangeFunction, Hear, Local, Say
from cutlayer.testing.expect import expect

__all__ = ["check_exchange"]

_TURNS_MAX = 100_000


def check_exchange(function: ExchangeFunction, planned: PlannedExchange, locals_: Mapping[str, Local]) -> None:
    """Run an exchange among all members of its group, by hand, and check that it ends and keeps to its budget.

    Every member comes to its end; each message that is said is heard, by a member, in order; no message is longer than
    `planned.limit`, and none is said to oneself, or after `planned.messages` to the same member. The order in which
    members are served does not matter: it is tried forwards and backwards.

    Args:
        function: What members run.
        planned: As in the plan.
        locals_: Party -> what the function is given as its own party; a fresh one for each call, if it is changed.

    Raises:
        AssertionError: it does not keep to this.
    """
    expect(set(locals_) == set(planned.members), f"one `Local` for each of {', '.join(planned.members)}")
    lanes = tuple(range(len(planned.members)))
    hub = planned.hub or planned.members[0]
    job = Exchange(
        planned.name, 1, planned.members, planned.stage, lanes, planned.limit, messages=planned.messages, hub=hub
    )
    for members in (planned.members, planned.members[::-1]):
        _Table(job, members).run({party: function(job, party, locals_[party]) for party in members})


class _Table:
    """Members around a table: mail in both directions, and who has ended."""

    def __init__(self, job: Exchange, members: tuple[str, ...]) -> None:
        self.job, self.members = job, members
        self.mail: dict[tuple[str, str], deque[bytes]] = {}
        self.said: dict[tuple[str, str], int] = {}

    def run(self, talks: Mapping[str, Generator[Say | Hear, bytes, None]]) -> None:
        waiting: dict[str, Hear | None] = dict.fromkeys(self.members)
        for _ in range(_TURNS_MAX):
            if not waiting:
                break
            before = (len(waiting), dict(self.said), {key: len(box) for key, box in self.mail.items()})
            for party in [party for party in self.members if party in waiting]:
                if not self._turn(party, talks[party], waiting):
                    del waiting[party]
            after = (len(waiting), dict(self.said), {key: len(box) for key, box in self.mail.items()})
            stuck = {party: word.source for party, word in waiting.items() if word is not None}
            expect(before != after, f"every member to come to its end; waiting for each other: {stuck}")
        left = {key: len(box) for key, box in self.mail.items() if box}
        expect(not waiting and not left, f"all messages to be heard; left over: {left}")

    def _turn(self, party: str, talk: Generator[Say | Hear, bytes, None], waiting: dict[str, Hear | None]) -> bool:
        """Let a member go on as far as it can; return whether it has not ended."""
        word: Say | Hear | None = waiting[party]
        while True:
            try:
                if isinstance(word, Hear):
                    box = self.mail.get((word.source, party))
                    if not box:
                        return True
                    word = talk.send(box.popleft())
                else:
                    word = next(talk)
            except StopIteration:
                return False
            word = waiting[party] = self._noted(party, word)

    def _noted(self, party: str, word: Say | Hear) -> Hear | None:
        peer = word.to if isinstance(word, Say) else word.source
        expect(peer in self.job.group and peer != party, f"messages among {', '.join(self.job.group)} only; {peer!r}")
        if isinstance(word, Hear):
            return word
        number = self.said[party, peer] = self.said.get((party, peer), 0) + 1
        expect(number <= self.job.messages, f"at most {self.job.messages} messages from {party} to {peer}")
        expect(len(word.payload) <= self.job.limit, f"at most {self.job.limit} bytes; got {len(word.payload)}")
        self.mail.setdefault((party, peer), deque()).append(bytes(word.payload))
        return None
