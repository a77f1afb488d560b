"""Programs: what each party does, as data that can be printed, compared, hashed and tested.

A program is a list of blocks; a block is a short template of instructions and how often it is repeated. One
repetition is a *step*; steps are numbered through a round. There is one program per mode: "start" (once, before
training), "train" (a round), "evaluate", "predict", "finish" (once, after training).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from typing import Literal

import msgspec

from cutlayer.core.spec import TensorSpec

__all__ = [
    "MODES",
    "Backward",
    "Block",
    "Checkpoint",
    "Credit",
    "Exchange",
    "Forward",
    "Instruction",
    "Load",
    "Program",
    "Recv",
    "Send",
    "Step",
    "Tag",
]

Mode = Literal["start", "train", "evaluate", "predict", "finish"]
MODES: tuple[Mode, ...] = ("start", "train", "evaluate", "predict", "finish")
Direction = Literal["up", "down", "exchange", "credit"]
DIRECTIONS: tuple[Direction, ...] = ("up", "down", "exchange", "credit")


class Tag(msgspec.Struct, frozen=True):
    """The address of a frame within a run: no two frames between two parties have the same.

    Attributes:
        session: Counts restarts of the run, so frames of an earlier life are never taken for new ones.
        mode, round, step: Where in the programs.
        edge: Number of the edge in plan order, or of the exchange.
        lane, micro: Replica and microbatch; in an exchange `micro` counts its messages.
        direction: "up" (values), "down" (gradients), "exchange" or "credit".
    """

    session: int
    mode: Mode
    round: int
    step: int
    edge: int
    lane: int
    micro: int
    direction: Direction


@dataclass(frozen=True)
class Load:
    """Read this step's batch of `lane` from the party's data and cut it into microbatches of `sizes` samples."""

    lane: int
    sizes: tuple[int, ...]
    fields: tuple[str, ...]


@dataclass(frozen=True)
class Forward:
    """Run a stage forwards on a microbatch of `size` samples."""

    stage: str
    lane: int
    micro: int
    size: int


@dataclass(frozen=True)
class Backward:
    """Run a stage backwards. `scale` is the gradient that a loss starts with; stages ignore it."""

    stage: str
    lane: int
    micro: int
    scale: float = 1.0


@dataclass(frozen=True)
class Send:
    """Send a value ("up") or a gradient ("down") of an edge. Never waits for the receiver's program."""

    edge: int
    lane: int
    micro: int
    size: int
    direction: Direction
    to: str


@dataclass(frozen=True)
class Recv:
    """Take a value or gradient of an edge; `spec` and `size` fix dtype, shape and bytes beforehand."""

    edge: int
    lane: int
    micro: int
    size: int
    direction: Direction
    source: str
    spec: TensorSpec


@dataclass(frozen=True)
class Credit:
    """Keep a sender at most `lag` steps ahead of a receiver that sends it nothing else.

    With `give`, tell `peer` that this step is done; else wait until `peer` has done the step `lag` steps ago.
    """

    peer: str
    lag: int
    give: bool


@dataclass(frozen=True)
class Step:
    """Let the optimizers of these lanes' replicas, and of the unreplicated stages, update their parameters."""

    lanes: tuple[int, ...]


@dataclass(frozen=True)
class Exchange:
    """Run the exchange `name` among `group` (a party per place). `number` is its address on the wire.

    `stage` is the stage whose state or gradient it is about, or "data.FIELD" (empty: none), `lanes` the replicas that
    take part, `limit` the most bytes a message may have, `messages` the most messages that a member may send another.
    """

    name: str
    number: int
    group: tuple[str, ...]
    stage: str
    lanes: tuple[int, ...]
    limit: int
    messages: int = 2
    hub: str = ""


@dataclass(frozen=True)
class Checkpoint:
    """A point where nothing is in flight: state may be saved, and a restart may begin here.

    `number` counts the checkpoints of a mode; `last` marks the end of the round.
    """

    number: int
    last: bool = False


Instruction = Load | Forward | Backward | Send | Recv | Credit | Step | Exchange | Checkpoint


@dataclass(frozen=True)
class Block:
    """A template of instructions, repeated. `name` says what it is for: "lane 0", "hand on 0 to 1"."""

    name: str
    instructions: tuple[Instruction, ...]
    repeat: int


@dataclass(frozen=True)
class Program:
    """What one party does in one mode. All parties' programs have the same blocks, some of them empty."""

    party: str
    mode: Mode
    blocks: tuple[Block, ...]

    @property
    def steps(self) -> int:
        """Return the number of steps, over all blocks."""
        return sum(block.repeat for block in self.blocks)

    def digest(self) -> str:
        """Return the SHA-256, in hex, of the printed program."""
        return hashlib.sha256(str(self).encode()).hexdigest()

    def __str__(self) -> str:
        """Return the program as text, an instruction a line."""
        lines = [f"program of {self.party}, {self.mode}: {self.steps} steps"]
        for block in self.blocks:
            lines.append(f"  {block.repeat} x {block.name}")
            lines.extend(f"    {line(instruction)}" for instruction in block.instructions)
        return "\n".join(lines)


def line(instruction: Instruction) -> str:
    """Return an instruction as one line, such as `FORWARD stage=head lane=0 micro=1 size=16`."""
    parts = [f"{f.name}={_short(getattr(instruction, f.name))}" for f in fields(instruction)]
    return " ".join([type(instruction).__name__.upper(), *parts])


def _short(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(str(item) for item in value) or "-"
    return str(value) if value != "" else "-"
