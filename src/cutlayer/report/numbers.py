"""The numbers behind the drawings as tables: for readers who want them, and for those who cannot see a drawing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cutlayer.report.charts import named, panels, title_of
from cutlayer.report.palette import SERIES
from cutlayer.report.record import Record
from cutlayer.report.tally import KINDS, Series, costs
from cutlayer.report.words import duration, number

__all__ = ["Table", "metric_tables", "missing", "time_table"]

_ROUNDS = 16  # more rounds than these are in curves.csv only


@dataclass(frozen=True)
class Table:
    """A table: what it shows, the names of its columns, and rows whose first cell names the row."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def metric_tables(record: Record) -> list[Table]:
    """Return a table for each drawing of `charts.curves`: a row a round; of many rounds, some evenly apart."""
    return [_metric_table(lines) for lines in panels(record)]


def time_table(record: Record) -> Table:
    """Return the seconds of each party by kind of work."""
    kinds = (*KINDS.values(), "other")
    rows = [
        (row.party, *(duration(row.seconds[kind]) for kind in kinds), duration(sum(row.seconds.values())))
        for row in costs(record)
    ]
    return Table("Time of each party by kind of work", ("party", *kinds, "together"), tuple(rows))


def missing(record: Record) -> list[str]:
    """Return metrics that were no finite number, such as "accuracy of loss (train) in rounds 2, 3"."""
    clients, found = record.plan.graph.lane_names, dict[tuple[str, str, str], dict[int, None]]()
    for row in record.summary.history:
        for metrics, mode in [
            (row.metrics, row.mode),
            *((o.metrics, f"{row.mode}, {clients[o.lane]}") for o in row.own),
        ]:
            for name, value in metrics.items():
                if value is None or (isinstance(value, list) and None in value):
                    found.setdefault((name, row.loss, mode), {})[row.round] = None
    return [f"{name} of {loss} ({mode}) in {_rounds(sorted(rounds))}" for (name, loss, mode), rounds in found.items()]


def _rounds(rounds: Sequence[int]) -> str:
    shown = ", ".join(map(str, rounds[:8]))
    more = f" and {len(rounds) - 8} more" if len(rounds) > 8 else ""
    return f"round{'s' if len(rounds) > 1 else ''} {shown}{more}"


def _metric_table(lines: Sequence[Series]) -> Table:
    own = list(dict.fromkeys(line.who for line in lines if line.own))
    kept = [line for line in lines if not line.own or line.who in own[:SERIES]]
    rounds = sorted({at for line in lines for at, _ in line.points})
    shown = _some(rounds)
    caption = f"{title_of(lines[0])} by round"
    if len(shown) < len(rounds):
        caption += f": {len(shown)} of {len(rounds)} rounds, all of them in report/curves.csv"
    if len(own) > SERIES:
        caption += f"; {len(own) - SERIES} more by their own samples are in report/curves.csv"
    values = [dict(line.points) for line in kept]
    rows = [(str(at), *(number(known[at]) if at in known else "–" for known in values)) for at in shown]
    heads = [f"{line.mode}, {name}" for line, name in zip(kept, named(kept), strict=True)]
    return Table(caption, ("round", *heads), tuple(rows))


def _some(rounds: Sequence[int]) -> list[int]:
    """Return the first, the last, and some between, evenly apart."""
    if len(rounds) <= _ROUNDS:
        return list(rounds)
    return [rounds[place * (len(rounds) - 1) // (_ROUNDS - 1)] for place in range(_ROUNDS)]
