"""What a run cost and sent, added up from its record: by party, by cut, by kind of work; and its metrics as series."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from cutlayer.core.compile import Roster
from cutlayer.core.cost import cut_flows
from cutlayer.core.describe import told_of
from cutlayer.core.graph import Edge
from cutlayer.errors import CutlayerError
from cutlayer.report.record import FlowRow, HistoryRow, Record, UndonePart

__all__ = [
    "KINDS", "UNDONE", "Cost", "Moved", "Series", "costs", "crossed", "exchanged", "flat", "moved", "series", "totals",
]  # fmt: skip

# What the report calls the kinds of seconds in a ledger; all else is "other".
KINDS: Mapping[str, str] = {
    "forward": "forward", "backward": "backward", "step": "step", "load": "load", "send": "encode",
    "recv": "receive", "wait": "wait",
}  # fmt: skip
UNDONE = "sent in steps that a restart undid"
_EXCHANGES: Mapping[str, tuple[str, str]] = {  # name -> its words, with and without stages
    "hand_on": ("state of {}, handed on", "state of {}"),
    "broadcast": ("state of {}, to begin equal", "state of {}"),
    "add_gradients": ("weight gradients of {}, to add up", "weight gradients of {}"),
    "agree": ("{}, to agree on a preprocessing", "what is told of {}"),
    "gather": ("weights of {}, to put the whole model together", "weights of {}"),
    "add_metrics": ("metric sums of {}", "metric sums"),
    "global_norm": ("squared norm of gradients", "norm of gradients"),
    "barrier": ("barrier (empty)", ""),
}
_NUMBERED = 10**6  # any number of an exchange is below


@dataclass(frozen=True)
class Moved:
    """What one party sent another: one row for each mode, or of all modes together (mode "").

    Attributes:
        direction: "up" (values), "down" (gradients), "exchange" or "credit".
        edge: Number of the edge in plan order, or of the exchange.
        exchange: Name and stage of an exchange, else empty texts.
        raw: Whether it is raw data, released by the plan.
        payload, framing: Bytes of tensors, and of what is around them.
        planned: Payload that the plan predicts, or at most allows; None where it says no number.
        seen_by: "sender" or "receiver": whose ledger says so.
    """

    sender: str
    receiver: str
    mode: str
    direction: str
    edge: int
    what: str
    spec: str
    exchange: tuple[str, str]
    raw: bool
    payload: int
    framing: int
    messages: int
    planned: int | None
    seen_by: str


@dataclass(frozen=True)
class Cost:
    """What the run cost one party.

    `sent` includes what was sent in steps that a restart undid; `received` and all else do not. `seconds` is by the
    names of `KINDS` and "other"; `process` its parties.
    """

    party: str
    parameters: int | None
    flops: Mapping[str, int]
    sent: Mapping[str, int]
    received: Mapping[str, int]
    seconds: Mapping[str, float]
    wall: float
    memory: int
    process: tuple[str, ...]


@dataclass(frozen=True)
class Series:
    """One metric of one loss in one mode, a value a round.

    `who` are the replicas, which may all tell the same; `listed`: it is one number of a metric that is a list; `own`:
    it is of the samples of `who` alone, and not of all.
    """

    loss: str
    metric: str
    mode: str
    who: tuple[str, ...]
    points: tuple[tuple[int, float], ...]
    listed: bool = False
    own: bool = False


def moved(record: Record) -> list[Moved]:
    """Return what each party sent, by mode: as its own ledger says, or, where that is not here, its receiver's."""
    graph, planned, found = record.plan.graph, _planned(record), list[Moved]()
    told = {f"data.{one.field}": f"{told_of(one)} of data.{one.field}" for one in record.plan.preprocessing}
    for party, ledger in record.summary.ledgers.items():
        names = {row.number: (row.name, row.stage) for row in ledger.exchanges}
        for row in ledger.flows:
            sent = row.way == "sent"
            if not sent and row.peer in record.summary.ledgers:
                continue  # the sender's own ledger has it
            sender, receiver = (party, row.peer) if sent else (row.peer, party)
            edge = graph.edges[row.edge] if row.direction in ("up", "down") and row.edge < len(graph.edges) else None
            found.append(
                Moved(
                    sender=sender, receiver=receiver, mode=row.mode, direction=row.direction, edge=row.edge,
                    what=_what(row, edge, names, told), spec=str(edge.wire(row.direction)) if edge else "",
                    exchange=names.get(row.edge, ("", "")) if row.direction == "exchange" else ("", ""),
                    raw=edge is not None and bool(edge.source.field) and row.direction == "up",
                    payload=row.payload, framing=row.framing, messages=row.messages,
                    planned=planned.get((sender, receiver, row.mode, row.direction, row.edge)),
                    seen_by="sender" if sent else "receiver",
                )
            )  # fmt: skip
    place = {party: number for number, party in enumerate(record.plan.parties)}
    return sorted(found, key=lambda m: (place[m.sender], _rank(m), place[m.receiver], m.mode))


def totals(rows: Iterable[Moved]) -> list[Moved]:
    """Return the rows with all modes together, and all exchanges of one kind."""
    found: dict[tuple[str, str, str, int, str], Moved] = {}
    for row in rows:
        cut = row.direction in ("up", "down")  # the same exchange has another number in each mode and turn
        key = (row.sender, row.receiver, row.direction, row.edge if cut else -1, row.what)
        before = found.get(key)
        if before is None:
            found[key] = replace(row, mode="")
            continue
        known = before.planned is not None and row.planned is not None
        found[key] = replace(
            before,
            payload=before.payload + row.payload,
            framing=before.framing + row.framing,
            messages=before.messages + row.messages,
            planned=(before.planned or 0) + (row.planned or 0) if known else None,
        )
    return list(found.values())


def crossed(record: Record) -> int:
    """Return the bytes of tensors that parties sent each other, also in steps that a restart undid."""
    undone = sum(row.payload for row in record.summary.undone.values())
    return undone + sum(row.payload for row in moved(record))


def costs(record: Record) -> list[Cost]:
    """Return the cost of each party whose ledger is here, in plan order."""
    return [_cost(record, party) for party in record.plan.parties if party in record.summary.ledgers]


def series(record: Record) -> list[Series]:
    """Return all metrics that are numbers, by loss and metric; replicas that tell the same are one series.

    Those of all samples come first, then those of each lane's own.
    """
    several = {(row.loss, row.party) for row in record.summary.history if row.lane}
    points: dict[tuple[str, str, str], dict[str, dict[int, float]]] = {}
    listed: set[str] = set()
    for row in record.summary.history:
        who = f"{row.party} {row.lane}" if (row.loss, row.party) in several and _lanes(record, row) > 1 else row.party
        for metric, value in flat(row.metrics):
            listed |= set() if metric in row.metrics else {metric}
            by_who = points.setdefault((row.loss, metric, row.mode), {})
            by_who.setdefault(who, {})[row.round] = value
    order = {stage.name: place for place, stage in enumerate(record.plan.stages)}
    found: list[Series] = []
    for (loss, metric, mode), by_who in points.items():
        same: dict[tuple[tuple[int, float], ...], list[str]] = {}
        for who, values in by_who.items():
            same.setdefault(tuple(sorted(values.items())), []).append(who)
        found += [Series(loss, metric, mode, tuple(who), line, metric in listed) for line, who in same.items()]
    found += _own_series(record)
    metrics = {name: place for place, name in enumerate(dict.fromkeys(["loss", *(line.metric for line in found)]))}
    clients = record.plan.graph.lane_names

    def key(line: Series) -> tuple[int, int, int, bool]:
        return (
            order.get(line.loss, 0),
            metrics[line.metric],
            clients.index(line.who[0]) + 1 if line.own else 0,
            line.mode != "train",
        )

    return sorted(found, key=key)


def _own_series(record: Record) -> list[Series]:
    names, points = record.plan.graph.lane_names, dict[tuple[str, str, str, str, bool], dict[int, float]]()
    for row in record.summary.history:
        for own in row.own:
            for metric, value in flat(own.metrics):
                key = (row.loss, metric, row.mode, names[own.lane], metric not in own.metrics)
                points.setdefault(key, {})[row.round] = value
    return [
        Series(loss, metric, mode, (who,), tuple(sorted(line.items())), listed, own=True)
        for (loss, metric, mode, who, listed), line in points.items()
    ]


def flat(metrics: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Return metrics as pairs of name and number; the parts of a list as "name[0]", "name[1]"..."""
    found: list[tuple[str, float]] = []
    for name, value in metrics.items():
        if isinstance(value, list):
            found += flat({f"{name}[{place}]": part for place, part in enumerate(value)})
        elif isinstance(value, int | float):
            found.append((name, float(value)))
    return found


def _lanes(record: Record, row: HistoryRow) -> int:
    """Return how many replicas of the row's loss its party runs."""
    return record.plan.stage(row.loss).places.count(row.party)


def _cost(record: Record, party: str) -> Cost:
    summary, ledger = record.summary, record.summary.ledgers[party]
    process, held = record.process(party), summary.parameters.get(party)
    undone = [summary.undone[party]] if party in summary.undone else []
    flops = {kind: sum(r.flops for r in ledger.flops if r.kind == kind) for kind in ("forward", "backward")}
    seconds = dict.fromkeys((*KINDS.values(), "other"), 0.0)
    for row in ledger.seconds:
        seconds[KINDS.get(row.kind, "other")] += row.seconds
    wall = process.seconds if process else summary.seconds
    if process is not None and process.parties == (party,):
        # of several parties in one process nobody can say whose the rest is; after a restart there may be none
        seconds["other"] += max(0.0, wall - sum(seconds.values()))
    return Cost(
        party=party,
        parameters=held.total if held else None,
        flops=flops,
        sent=_sums([*(r for r in ledger.flows if r.way == "sent"), *undone]),
        received=_sums(r for r in ledger.flows if r.way == "received"),
        seconds=seconds,
        wall=wall,
        memory=process.memory if process else 0,
        process=process.parties if process else (party,),
    )


def _sums(rows: Iterable[FlowRow | UndonePart]) -> dict[str, int]:
    found = {"payload": 0, "framing": 0, "messages": 0}
    for row in rows:
        found["payload"] += row.payload
        found["framing"] += row.framing
        found["messages"] += row.messages
    return found


def _planned(record: Record) -> dict[tuple[str, str, str, str, int], int]:
    found: dict[tuple[str, str, str, str, int], int] = {}
    try:
        flows = cut_flows(record.plan, Roster(record.summary.samples))
    except CutlayerError:  # the numbers of samples are not known
        return {}
    for flow in flows:
        key = (flow.sender, flow.receiver, flow.mode, flow.direction, flow.edge)
        found[key] = found.get(key, 0) + flow.payload
    return found


def _what(row: FlowRow, edge: Edge | None, names: Mapping[int, tuple[str, str]], told: Mapping[str, str]) -> str:
    if edge is not None and row.direction == "down":
        return f"gradient at {edge.label}"
    if edge is not None:
        return f"RAW {edge.origin} (declared release)" if edge.source.field else f"activations of {edge.origin}"
    if row.direction == "credit":
        return "credit (empty)"
    name, stage = names.get(row.edge, (f"exchange {row.edge}", ""))
    return _words(name)[0].format(told.get(stage, stage)) if stage or "{}" not in _words(name)[0] else name


def _words(name: str) -> tuple[str, str]:
    plain = name.replace("_", " ")
    return _EXCHANGES.get(name, (f"{plain} of {{}}", plain))


def exchanged(rows: Iterable[Moved]) -> str:
    """Return in few words what exchanges carried, such as "state of head, tail; metric sums".

    What is told of data comes first, then the largest.
    """
    stages: dict[str, dict[str, None]] = {}
    for row in sorted(rows, key=lambda row: (row.exchange[0] != "agree", -row.payload)):
        stages.setdefault(_words(row.exchange[0])[1], {})[row.exchange[1]] = None
    told = stages.get(_EXCHANGES["agree"][1], {})
    if len(told) > 1:
        stages[_EXCHANGES["agree"][1]] = {f"{len(told)} fields": None}  # which, the boxes of a drawing say
    return "; ".join(text.format(", ".join(names)) for text, names in stages.items() if text)


def _rank(row: Moved) -> int:
    """Order values and gradients by edge, then exchanges, then what is empty."""
    if row.direction in ("up", "down"):
        return 2 * row.edge + (row.direction == "down")
    return _NUMBERED + (_NUMBERED if not row.payload else row.edge)
