"""The allow-list: which frames a party's programs expect, computed before any arrives.

A frame is admitted only if a receive of this party's own program names it, its dtype, shape and size are what the
plan declares, and it comes at most once. Everything else is refused before memory is taken for it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from cutlayer.core.program import Credit, Exchange, Instruction, Mode, Program, Recv, Tag
from cutlayer.core.spec import within
from cutlayer.errors import ContractError

__all__ = ["Admission", "Expected"]


@dataclass(frozen=True)
class Expected:
    """What a frame must look like: exactly `dtype` and `shape`, or, if `shape` is None, at most `limit` bytes.

    Dimensions at the places of `free` may be smaller.
    """

    dtype: str
    shape: tuple[int, ...] | None
    limit: int
    free: frozenset[int] = frozenset()


_Key = tuple[str, int, int, int, str]  # source, edge, lane, micro, direction


class Admission:
    """Answers, for one party: may this frame come in?

    Args:
        programs: The party's programs.
        agenda: Modes and rounds that will be run; frames of others are refused.
    """

    def __init__(self, programs: Mapping[Mode, Program], agenda: Sequence[tuple[Mode, int]]) -> None:
        """Index every receive by its block; cost is that of the templates, not of the steps."""
        self._agenda = frozenset(agenda)
        self._ends = {mode: list(accumulate(b.repeat for b in program.blocks)) for mode, program in programs.items()}
        self._tables = {
            mode: [_table(block.instructions) for block in program.blocks] for mode, program in programs.items()
        }

    def expect(self, source: str, tag: Tag) -> Expected:
        """Return what a frame with this tag from `source` must look like.

        Raises:
            ContractError: no receive of the program names it.
        """
        ends = self._ends.get(tag.mode, [])
        if (tag.mode, tag.round) in self._agenda and ends and tag.step < ends[-1]:
            table = self._tables[tag.mode][bisect_right(ends, tag.step)]
            micro = -1 if tag.direction == "exchange" else tag.micro
            found = table.get((source, tag.edge, tag.lane, micro, tag.direction))
            if found is not None and (micro >= 0 or 0 <= tag.micro < found[1]):
                return found[0]
        raise ContractError(
            f"{source!r} sent a frame that this party's program does not expect",
            where=f"{tag.mode} round {tag.round}, step {tag.step}, edge {tag.edge}, lane {tag.lane}, "
            f"microbatch {tag.micro}, {tag.direction}",
            remedy="the sender breaks the contract: stop, and compare its plan and release with yours",
            code="E521",
        )

    def check(self, source: str, tag: Tag, dtype: str, shape: tuple[int, ...]) -> None:
        """Raise `ContractError` unless a frame of this dtype and shape may come in."""
        expected = self.expect(source, tag)
        size = shape[0] if len(shape) == 1 else -1
        exact = dtype == expected.dtype and shape == expected.shape
        if expected.free and expected.shape is not None and dtype == expected.dtype:
            exact = within(shape, expected.shape, expected.free)
        bounded = expected.shape is None and dtype == expected.dtype and 0 <= size <= expected.limit
        if not (exact or bounded):
            raise ContractError(
                f"{source!r} sent a tensor that the plan does not allow",
                where=f"{tag.mode} round {tag.round}, step {tag.step}, edge {tag.edge}, {tag.direction}",
                expected=f"{'at most ' if expected.free else ''}{expected.dtype}{list(expected.shape)}"
                if expected.shape is not None
                else f"at most {expected.limit} bytes",
                got=f"{dtype}{list(shape)}",
                remedy="the sender breaks the contract: stop, and compare its plan and release with yours",
                code="E522",
            )


def _table(instructions: Sequence[Instruction]) -> dict[_Key, tuple[Expected, int]]:
    table: dict[_Key, tuple[Expected, int]] = {}
    for instruction in instructions:
        if isinstance(instruction, Recv):
            spec, size = instruction.spec, instruction.size
            key = (instruction.source, instruction.edge, instruction.lane, instruction.micro, instruction.direction)
            table[key] = (Expected(spec.dtype, spec.concrete(size), spec.nbytes(size), spec.free), 0)
        elif isinstance(instruction, Credit) and not instruction.give:
            table[(instruction.peer, 0, 0, 0, "credit")] = (Expected("bytes", (0,), 0), 0)
        elif isinstance(instruction, Exchange):
            for peer in (*instruction.group, instruction.hub):
                key = (peer, instruction.number, 0, -1, "exchange")
                table[key] = (Expected("bytes", None, instruction.limit), instruction.messages)
    return table
