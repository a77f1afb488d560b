"""The report's numbers as CSV, one file for each kind."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence

from cutlayer.report.record import Record
from cutlayer.report.tally import KINDS, UNDONE, costs, flat, moved

__all__ = ["costs_csv", "curves_csv", "cuts_csv"]

_Cell = str | int | float | None
_FORMULA = ("=", "+", "-", "@")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def curves_csv(record: Record) -> str:
    """Return every number of every metric: a row for each round, mode, loss, replica and metric.

    `client` and `samples` say of whose samples alone the number is, and how many they are; empty: it is of all.
    """
    clients, rows = record.plan.graph.lane_names, list[list[_Cell]]()
    for row in record.summary.history:
        place: list[_Cell] = [row.round, row.mode, row.loss, row.party]
        rows += [[*place, row.lane, metric, value, None, None] for metric, value in flat(row.metrics)]
        for own in row.own:
            whose: list[_Cell] = [clients[own.lane], own.samples]
            rows += [[*place, own.lane, metric, value, *whose] for metric, value in flat(own.metrics)]
    return _text(["round", "mode", "loss", "party", "lane", "metric", "value", "client", "samples"], rows)


def costs_csv(record: Record) -> str:
    """Return a row for each party: operations, bytes, messages, seconds, memory, parameters."""
    kinds = [*KINDS.values(), "other"]
    head = ["party", "parameters", "forward_flops", "backward_flops"]
    head += [f"{way}_{part}" for way in ("sent", "received") for part in ("payload_bytes", "framing_bytes", "messages")]
    head += [*(f"{kind}_seconds" for kind in kinds), "process_seconds", "process_memory_bytes", "process_parties"]
    rows: list[list[_Cell]] = [
        [
            row.party,
            row.parameters,
            row.flops["forward"],
            row.flops["backward"],
            *row.sent.values(),
            *row.received.values(),
            *(round(row.seconds[kind], 6) for kind in kinds),
            row.wall,
            row.memory or None,
            " ".join(row.process),
        ]
        for row in costs(record)
    ]
    return _text(head, rows)


def cuts_csv(record: Record) -> str:
    """Return a row for all that one party sent another of one kind in one mode, and one for steps that were undone."""
    head = ["from", "to", "what", "direction", "edge", "mode", "spec", "payload_bytes", "framing_bytes", "messages"]
    rows: list[list[_Cell]] = [
        [
            row.sender, row.receiver, row.what, row.direction, row.edge, row.mode, row.spec, row.payload, row.framing,
            row.messages, row.planned, row.seen_by,
        ]
        for row in moved(record)
    ]  # fmt: skip
    rows += [
        [party, None, UNDONE, "undone", None, None, None, row.payload, row.framing, row.messages, None, "sender"]
        for party, row in record.summary.undone.items()
    ]
    return _text([*head, "planned_bytes", "seen_by"], rows)


def _text(head: Sequence[str], rows: Sequence[Sequence[_Cell]]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(head)
    writer.writerows([_plain(cell) for cell in row] for row in rows)
    return file.getvalue()


def _plain(cell: _Cell) -> _Cell:
    """Keep a text on one line, and one that a spreadsheet would run as a formula from being one."""
    if not isinstance(cell, str):
        return cell
    text = _CONTROL.sub(" ", cell)
    return f"'{text}" if text.lstrip().startswith(_FORMULA) else text
