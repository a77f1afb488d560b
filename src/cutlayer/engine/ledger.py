"""The ledger: what left and entered a party, how long it computed and waited, and how much arithmetic it did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from cutlayer.core.program import Tag
from cutlayer.engine.wire import Frame

__all__ = ["Ledger", "Row"]


@dataclass
class Row:
    """Totals of one flow. Units: bytes, messages."""

    payload: int = 0
    framing: int = 0
    messages: int = 0


@dataclass
class Ledger:
    """Counts of one party.

    `flows` is keyed by (way, peer, mode, direction, edge); `seconds` and `flops` by (kind, stage). The "edge" of an
    exchange is its number; `exchanges` says what it is: its name and stage. `step` lists what the current step has
    added, as (part, name, amount); a driver takes it with `close_step`, or clears it.
    """

    party: str
    flows: dict[tuple[str, str, str, str, int], Row] = field(default_factory=dict)
    seconds: dict[tuple[str, str], float] = field(default_factory=dict)
    flops: dict[tuple[str, str], int] = field(default_factory=dict)
    exchanges: dict[int, tuple[str, str]] = field(default_factory=dict)
    step: list[tuple[str, tuple[str | int, ...], float]] = field(default_factory=list)

    def sent(self, to: str, frame: Frame) -> None:
        """Count a frame that leaves."""
        self._count("sent", to, frame)

    def received(self, source: str, frame: Frame) -> None:
        """Count a frame that came in."""
        self._count("received", source, frame)

    def spend(self, kind: str, stage: str, seconds: float) -> None:
        """Add seconds of computing (kind "forward", "backward", "step", "load"...) or waiting ("wait")."""
        key = (kind, stage)
        self.seconds[key] = self.seconds.get(key, 0.0) + seconds
        self.step.append(("seconds", key, seconds))

    def compute(self, kind: str, stage: str, flops: int) -> None:
        """Add floating-point operations, two per multiply-add."""
        key = (kind, stage)
        self.flops[key] = self.flops.get(key, 0) + flops
        self.step.append(("flops", key, flops))

    def close_step(self) -> dict[str, dict[str, float]]:
        """Return the step that ends, and begin the next.

        "bytes" and "messages" by "way direction edge"; "seconds" and "flops" by "kind stage".
        """
        row: dict[str, dict[str, float]] = {"bytes": {}, "messages": {}, "seconds": {}, "flops": {}}
        for part, names, amount in self.step:
            name, sums = _label(names), row[part]
            sums[name] = sums.get(name, 0) + amount
            if part == "bytes":
                row["messages"][name] = row["messages"].get(name, 0) + 1
        self.step.clear()
        return row

    def total(self, way: str, part: str = "payload") -> int:
        """Return all bytes "sent" or "received": their "payload", "framing", or number of "messages"."""
        return sum(int(getattr(row, part)) for key, row in self.flows.items() if key[0] == way)

    def document(self) -> dict[str, Any]:
        """Return the ledger as plain values, for `summary.json` and checkpoints."""
        return {
            "party": self.party,
            "flows": [
                {
                    "way": way,
                    "peer": peer,
                    "mode": mode,
                    "direction": direction,
                    "edge": edge,
                    "payload": row.payload,
                    "framing": row.framing,
                    "messages": row.messages,
                }
                for (way, peer, mode, direction, edge), row in sorted(self.flows.items())
            ],
            "seconds": [{"kind": k, "stage": s, "seconds": v} for (k, s), v in sorted(self.seconds.items())],
            "flops": [{"kind": k, "stage": s, "flops": v} for (k, s), v in sorted(self.flops.items())],
            "exchanges": [{"number": n, "name": k, "stage": s} for n, (k, s) in sorted(self.exchanges.items())],
        }

    def restore(self, document: Mapping[str, Any]) -> None:
        """Set the counts back to those of a `document`, after a roll-back."""
        self.flows = {
            (r["way"], r["peer"], r["mode"], r["direction"], r["edge"]): Row(r["payload"], r["framing"], r["messages"])
            for r in document["flows"]
        }
        self.seconds = {(r["kind"], r["stage"]): r["seconds"] for r in document["seconds"]}
        self.flops = {(r["kind"], r["stage"]): r["flops"] for r in document["flops"]}
        self.exchanges = {r["number"]: (r["name"], r["stage"]) for r in document.get("exchanges", ())}
        self.step.clear()

    def _count(self, way: str, peer: str, frame: Frame) -> None:
        tag: Tag = frame.tag
        key = (way, peer, tag.mode, tag.direction, tag.edge)
        row = self.flows.get(key)
        if row is None:
            row = self.flows[key] = Row()
        size = frame.nbytes
        row.payload += size
        row.framing += frame.framing
        row.messages += 1
        self.step.append(("bytes", (way, tag.direction, tag.edge), size))


@lru_cache(maxsize=4096)  # a run has few names, and notes about forty amounts a step
def _label(names: tuple[str | int, ...]) -> str:
    return " ".join(map(str, names)).rstrip()
