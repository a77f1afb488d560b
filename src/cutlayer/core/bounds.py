"""How many frames a sender can ever be ahead of a receiver: computed from the programs, so mailboxes are bounded."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping

from cutlayer.core.program import Credit, Exchange, Instruction, Mode, Program, Recv, Send

__all__ = ["mailbox_bounds"]

_Pair = tuple[str, str]  # sender, receiver


def mailbox_bounds(programs: Mapping[str, Mapping[Mode, Program]], window: int) -> dict[_Pair, int]:
    """Return, for each pair (sender, receiver), the most frames that can be sent and not yet taken.

    Each party carries a vector clock: how many frames it knows each receiver to have taken from each sender. At a
    send, the frames sent less those known taken are a bound that no interleaving exceeds. Blocks repeat alike, so a
    few repetitions of each show the largest value. Exchanges are counted apart, at the most they may send.
    """
    bounds: Counter[_Pair] = Counter()
    modes = next(iter(programs.values())).keys()
    for mode in modes:
        flat = {party: _unroll(programs[party][mode], window + 3) for party in programs}
        for pair, most in _watch(flat).items():
            bounds[pair] = max(bounds[pair], most)
    for pair, most in _exchanges(programs).items():
        bounds[pair] += most
    return dict(bounds)


def _unroll(program: Program, most: int) -> list[tuple[int, Instruction]]:
    found: list[tuple[int, Instruction]] = []
    step = 0
    for block in program.blocks:
        for repetition in range(min(block.repeat, most)):
            found.extend((step + repetition, instruction) for instruction in block.instructions)
        step += min(block.repeat, most)
    return found


def _watch(flat: Mapping[str, list[tuple[int, Instruction]]]) -> Counter[_Pair]:
    """Run all parties' sends and receives, clocks attached, and return the largest lead of each pair."""
    places = dict.fromkeys(flat, 0)
    known: dict[str, Counter[_Pair]] = {party: Counter() for party in flat}
    sent: Counter[_Pair] = Counter()
    lead: Counter[_Pair] = Counter()
    mail: dict[tuple[str, str, object], Counter[_Pair]] = {}
    waiting = deque(flat)
    idle = 0
    while waiting and idle <= len(waiting):
        party = waiting.popleft()
        begin = places[party]
        while places[party] < len(flat[party]):
            step, instruction = flat[party][places[party]]
            message = _message(step, instruction)
            if message is not None:
                way, peer, tag = message
                if way == "send":
                    sent[party, peer] += 1
                    lead[party, peer] = max(lead[party, peer], sent[party, peer] - known[party][party, peer])
                    mail[party, peer, tag] = known[party].copy()
                elif (peer, party, tag) in mail:
                    known[party][peer, party] += 1
                    known[party] |= mail.pop((peer, party, tag))
                elif not isinstance(instruction, Credit):
                    break
            places[party] += 1
        idle = 0 if places[party] > begin else idle + 1
        if places[party] < len(flat[party]):
            waiting.append(party)
    return lead


def _message(step: int, instruction: Instruction) -> tuple[str, str, object] | None:
    if isinstance(instruction, Send):
        tag = (step, instruction.edge, instruction.lane, instruction.micro, instruction.direction)
        return "send", instruction.to, tag
    if isinstance(instruction, Recv):
        tag = (step, instruction.edge, instruction.lane, instruction.micro, instruction.direction)
        return "take", instruction.source, tag
    if isinstance(instruction, Credit):
        return (
            ("send", instruction.peer, ("credit", step))
            if instruction.give
            else (
                "take",
                instruction.peer,
                ("credit", step - instruction.lag),
            )
        )
    return None


def _exchanges(programs: Mapping[str, Mapping[Mode, Program]]) -> Counter[_Pair]:
    """Count, per pair, the messages that the exchanges of a mode may send, twice: the next ones may have begun.

    An exchange that is repeated waits for its own members, so it counts once however often it is run.
    """
    most: Counter[_Pair] = Counter()
    for party, modes in programs.items():
        for program in modes.values():
            steps = (job for block in program.blocks for job in block.instructions)
            jobs = {job.number: job for job in steps if isinstance(job, Exchange)}
            found: Counter[_Pair] = Counter()
            for job in jobs.values():
                found.update({(party, peer): 2 * job.messages for peer in {*job.group, job.hub} if peer != party})
            most |= found
    return most
