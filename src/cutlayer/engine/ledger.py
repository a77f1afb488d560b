"""The ledger: what left and entered a party, how long it computed and waited, and how much arithmetic it did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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

    def add(self, frame: Frame) -> None:
        """Count one frame."""
        self.payload += frame.nbytes
        self.framing += frame.framing
        self.messages += 1


@dataclass
class Ledger:
    """Counts of one party.

    `flows` is keyed by (way, peer, mode, direction, edge); `seconds` and `flops` by (kind, stage). `step` holds the
    same for the current step only; a driver that wants a log per step takes it with `close_step`.
    """

    party: str
    flows: dict[tuple[str, str, str, str, int], Row] = field(default_factory=dict)
    seconds: dict[tuple[str, str], float] = field(default_factory=dict)
    flops: dict[tuple[str, str], int] = field(default_factory=dict)
    step: dict[str, dict[str, float]] = field(default_factory=dict)

    def sent(self, to: str, frame: Frame) -> None:
        """Count a frame that leaves."""
        self._count("sent", to, frame)

    def received(self, source: str, frame: Frame) -> None:
        """Count a frame that came in."""
        self._count("received", source, frame)

    def spend(self, kind: str, stage: str, seconds: float) -> None:
        """Add seconds of computing (kind "forward", "backward", "step", "load"...) or waiting ("wait")."""
        self.seconds[kind, stage] = self.seconds.get((kind, stage), 0.0) + seconds
        self._note("seconds", f"{kind} {stage}".rstrip(), seconds)

    def compute(self, kind: str, stage: str, flops: int) -> None:
        """Add floating-point operations, two per multiply-add."""
        self.flops[kind, stage] = self.flops.get((kind, stage), 0) + flops
        self._note("flops", f"{kind} {stage}", flops)

    def close_step(self) -> dict[str, dict[str, float]]:
        """Return the step that ends, and begin the next.

        "bytes" and "messages" by "way direction edge"; "seconds" and "flops" by "kind stage".
        """
        row = {part: self.step.get(part, {}) for part in ("bytes", "messages", "seconds", "flops")}
        self.step = {}
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
        }

    def restore(self, document: Mapping[str, Any]) -> None:
        """Set the counts back to those of a `document`, after a roll-back."""
        self.flows = {
            (r["way"], r["peer"], r["mode"], r["direction"], r["edge"]): Row(r["payload"], r["framing"], r["messages"])
            for r in document["flows"]
        }
        self.seconds = {(r["kind"], r["stage"]): r["seconds"] for r in document["seconds"]}
        self.flops = {(r["kind"], r["stage"]): r["flops"] for r in document["flops"]}
        self.step.clear()

    def _count(self, way: str, peer: str, frame: Frame) -> None:
        tag: Tag = frame.tag
        self.flows.setdefault((way, peer, tag.mode, tag.direction, tag.edge), Row()).add(frame)
        key = f"{way} {tag.direction} {tag.edge}"
        self._note("bytes", key, frame.nbytes)
        self._note("messages", key, 1)

    def _note(self, part: str, key: str, amount: float) -> None:
        noted = self.step.setdefault(part, {})
        noted[key] = noted.get(key, 0) + amount
