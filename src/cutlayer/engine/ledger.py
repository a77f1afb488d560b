"""The ledger: what left and entered a party, how long it computed and waited, and how much arithmetic it did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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


_Note = tuple[str, Any, float, Tag | None, int]  # part, key, amount; of a frame its tag and framing
_Flow = tuple[str, str, str, str, int]  # way, peer, mode, direction, edge
_Sums = dict[tuple[str, str], float]  # by kind and stage
StepRow = dict[str, dict[str, float]]


class Ledger:
    """Counts of one party.

    What is noted is added up later, when a step is closed or somebody looks: a party that computes is not kept by it.
    The "edge" of an exchange is its number; `exchanges` says what it is: its name and stage. `undone` is what was sent
    in steps that a restart undid: it is in no flow and in no `document`, which are those of an undisturbed run.
    """

    def __init__(self, party: str) -> None:
        """Begin at zero."""
        self.party = party
        self.exchanges: dict[int, tuple[str, str]] = {}
        self.undone = Row()
        self._flows: dict[_Flow, Row] = {}
        self._sums: dict[str, _Sums] = {"seconds": {}, "flops": {}}
        self._notes: list[_Note] = []  # of the current step
        self._ended: list[list[_Note]] = []  # of steps that ended
        self._row, self._rows = _step_row(), list[StepRow]()  # what was added of the current step, and of those

    @property
    def flows(self) -> dict[_Flow, Row]:
        """Return what left and entered, by (way, peer, mode, direction, edge)."""
        self._settle()
        return self._flows

    @property
    def seconds(self) -> dict[tuple[str, str], float]:
        """Return the seconds, by (kind, stage)."""
        self._settle()
        return self._sums["seconds"]

    @property
    def flops(self) -> dict[tuple[str, str], int]:
        """Return the floating-point operations, by (kind, stage)."""
        self._settle()
        return {key: int(amount) for key, amount in self._sums["flops"].items()}

    def sent(self, to: str, frame: Frame) -> None:
        """Count a frame that leaves."""
        self._notes.append(("sent", to, frame.nbytes, frame.tag, frame.framing))

    def received(self, source: str, frame: Frame) -> None:
        """Count a frame that came in."""
        self._notes.append(("received", source, frame.nbytes, frame.tag, frame.framing))

    def spend(self, kind: str, stage: str, seconds: float) -> None:
        """Add seconds of computing (kind "forward", "backward", "step", "load"...) or waiting ("wait")."""
        self._notes.append(("seconds", (kind, stage), seconds, None, 0))

    def compute(self, kind: str, stage: str, flops: int) -> None:
        """Add floating-point operations, two per multiply-add."""
        self._notes.append(("flops", (kind, stage), flops, None, 0))

    def end_step(self) -> None:
        """Begin the next step. The one that ends is closed when there is time for it."""
        self._ended.append(self._notes)
        self._notes = []

    def close_step(self) -> StepRow:
        """Return the first step that ended and was not closed; if there is none, the current one, which ends.

        "bytes" and "messages" by "way direction edge"; "seconds" and "flops" by "kind stage".
        """
        if not (self._ended or self._rows):
            self.end_step()
        self._settle(current=False)
        return self._rows.pop(0)

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
        self._flows = {
            (r["way"], r["peer"], r["mode"], r["direction"], r["edge"]): Row(r["payload"], r["framing"], r["messages"])
            for r in document["flows"]
        }
        self._sums = {part: {(r["kind"], r["stage"]): r[part] for r in document[part]} for part in ("seconds", "flops")}
        self.exchanges = {r["number"]: (r["name"], r["stage"]) for r in document.get("exchanges", ())}
        self._notes, self._ended = [], []
        self._row, self._rows = _step_row(), []

    def _settle(self, *, current: bool = True) -> None:
        """Add up all that was noted of steps that ended, and of the current one."""
        for notes in self._ended:
            _add(notes, self._row, self._flows, self._sums)
            self._rows.append(self._row)
            self._row = _step_row()
        self._ended.clear()
        if current:
            _add(self._notes, self._row, self._flows, self._sums)
            self._notes.clear()


def _add(notes: list[_Note], row: StepRow, flows: dict[_Flow, Row], totals: dict[str, _Sums]) -> None:
    """Add notes to the row of their step and to the sums of the run."""
    for part, key, amount, tag, framing in notes:
        if tag is None:
            sums, step, name = totals[part], row[part], _label(key)
            sums[key] = sums.get(key, 0) + amount
            step[name] = step.get(name, 0) + amount
            continue
        place = part, key, tag.mode, tag.direction, tag.edge
        flow = flows.get(place)
        if flow is None:
            flow = flows[place] = Row()
        flow.payload += int(amount)
        flow.framing += framing
        flow.messages += 1
        name = _label((part, tag.direction, tag.edge))
        row["bytes"][name] = row["bytes"].get(name, 0) + amount
        row["messages"][name] = row["messages"].get(name, 0) + 1


def _step_row() -> StepRow:
    return {"bytes": {}, "messages": {}, "seconds": {}, "flops": {}}


@lru_cache(maxsize=4096)  # a run has few names, and notes about forty amounts a step
def _label(names: tuple[str | int, ...]) -> str:
    return " ".join(map(str, names)).rstrip()
