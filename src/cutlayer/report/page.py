"""The page: what its parts say, and how it is put together. All text is escaped by the templates."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cutlayer.core.describe import keeps, tells
from cutlayer.core.parts import Loss
from cutlayer.report.numbers import metric_tables, missing, time_table
from cutlayer.report.palette import DARK, LIGHT, STYLES
from cutlayer.report.record import Record, UndonePart
from cutlayer.report.scene import Point, Scene
from cutlayer.report.tally import UNDONE, Cost, Moved, costs, crossed, moved, totals
from cutlayer.report.words import compact, duration, number, size

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["render_page", "render_svg", "summary_words"]

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
_EVENTS = {
    "lost": "a party was lost", "returned": "a lost party came back",
    "rollback": "the run went back to a checkpoint", "damaged": "a checkpoint was damaged",
    "anew": "the run began anew", "aborted": "a party stopped the run",
}  # fmt: skip


def render_page(record: Record, plan: Scene, curves: Sequence[Scene], time: Scene) -> str:
    """Return the page as HTML. It loads nothing: styles are in it and allowed by their digest, scripts not at all."""
    env = _environment()
    style = env.get_template("report.css").render(_colours())
    digest = b64encode(sha256(style.encode()).digest()).decode()
    rows = totals(moved(record))
    return env.get_template("report.html").render(
        style=_safe(style),
        style_hash=f"sha256-{digest}",
        name=record.plan.name,
        ended=record.summary.ended.replace("T", " ").replace("+00:00", " UTC"),
        place=_place_words(record),
        summary=summary_words(record),
        notices=_notices(record),
        alarms=_alarms(rows),
        facts=_facts(record),
        plan_scene=plan,
        curves=list(zip(curves, metric_tables(record), strict=True)),
        lists=_lists(record),
        missing=missing(record),
        time_scene=time,
        time_table=time_table(record),
        time_words=_time_words(record),
        costs=[_cost_row(row) for row in costs(record)],
        cost_words=_cost_words(record),
        leaving=[_leaving(record, party, rows) for party in record.plan.parties],
        plan_text=str(record.plan),
        again=_again(record),
        version=version("cutlayer"),
    )


def render_svg(scene: Scene) -> str:
    """Return a drawing as an SVG file with its styles in it."""
    env = _environment()
    style = env.get_template("drawing.css").render(_colours())
    return env.get_template("drawing.svg").render(alone=scene, style=_safe(style)) + "\n"


def summary_words(record: Record) -> str:
    """Return in a paragraph what was trained, by whom, with what result, time and bytes."""
    plan, summary = record.plan, record.summary
    stages = [stage.name for stage in plan.stages if not isinstance(stage, Loss)]
    training = plan.training
    held = summary.samples.get("train", {})
    who = [f"{party} ({held[party]:,} samples)" if held.get(party) else party for party in plan.parties]
    results = [
        f"{_metric_words(losses)} {'on evaluation data' if mode == 'evaluate' else 'in the last round of training'}"
        for mode, losses in sorted(summary.metrics.items())
        if _metric_words(losses)
    ]
    return (
        f"A network of {_count(len(stages), 'stage')} ({', '.join(stages)}) was trained for "
        f"{_count(training.epochs, 'epoch')} in batches of {training.batch_size} by "
        f"{_count(len(plan.parties), 'party', 'parties')}: {_listed(who)}. "
        + (f"It reached {'; '.join(results)}. " if results else "")
        + f"That took {duration(summary.seconds)}, and {size(crossed(record))} of tensors crossed between parties"
        + ("." if record.complete else ", as far as this party saw.")
    )


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    env = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        finalize=_printable,
    )
    env.filters |= {"px": _px, "points": _points}
    return env


def _printable(value: object) -> object:
    """Replace characters that neither HTML nor SVG may hold; what is marked safe is our own."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", value) if type(value) is str else value


def _safe(style: str) -> object:
    """Mark our own style sheet as not to be escaped; nothing of a run is in it."""
    from markupsafe import Markup

    return Markup(style)  # noqa: S704 - made from the table of colours alone


def _colours() -> dict[str, Any]:
    return {"light": LIGHT, "dark": DARK, "styles": STYLES}


def _px(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _points(points: Sequence[Point]) -> str:
    return " ".join(f"{_px(x)},{_px(y)}" for x, y in points)


def _place_words(record: Record) -> str:
    known = [party for process in record.summary.processes for party in process.parties]
    if not record.complete:
        return f"Seen from {_listed(known)}."
    if len(record.summary.processes) == 1:
        return "All parties ran in one process." if known[1:] else "It ran in one process."
    return f"The parties ran in {len(record.summary.processes)} processes."


def _notices(record: Record) -> list[str]:
    found: list[str] = []
    if not record.complete:
        others = [party for party in record.plan.parties if party not in record.summary.ledgers]
        between = ", and what they sent each other," if others[1:] else ""
        found.append(
            f"This folder holds the record of {_listed(list(record.summary.ledgers))} only. What {_listed(others)} "
            f"computed{between} is not known here; bytes are those sent and received here."
        )
    if record.events:
        told = [f"{_EVENTS[name]} {_count(count, 'time')}" for name, count in record.events.items()]
        found.append(f"On the way {_listed(told)}. What was done again is counted once.{_undone_words(record)}")
    return found


def _undone_words(record: Record) -> str:
    """Say who sent what in steps that were undone: it left, and its rows do not have it."""
    told = [f"{party} {size(row.payload)}" for party, row in record.summary.undone.items()]
    return (
        f" What was handed to the links is counted each time: {UNDONE.replace('sent in', 'in')}, {_listed(told)}."
        if told
        else ""
    )


def _alarms(rows: Sequence[Moved]) -> list[str]:
    more = [row for row in rows if row.planned is not None and row.payload > row.planned]
    return [
        f"{row.sender} sent {row.receiver} more {row.what} than the plan predicts: "
        f"{row.payload:,} bytes instead of {row.planned:,}."
        for row in more
    ]


def _facts(record: Record) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for mode in ("evaluate", "train"):
        for loss, values in record.summary.metrics.get(mode, {}).items():
            of = "" if loss == "loss" else f" of {loss}"
            found += [(number(v), f"{k}{of}, {mode}") for k, v in values.items() if isinstance(v, float)][:3]
    found = found[:3]
    samples = sum(record.summary.samples.get("train", {}).get(party, 0) for party in _first_owners(record))
    found += [(f"{samples:,}", "training samples")] if samples else []
    found.append((size(crossed(record)), "of tensors crossed"))
    found.append((duration(record.summary.seconds), "from start to end"))
    return found


def _first_owners(record: Record) -> set[str]:
    """Return one data holder for each lane: the others of it hold the same people's samples."""
    graph = record.plan.graph
    return {next(iter(graph.data_fields(lane))) for lane in range(graph.lanes)}


def _lists(record: Record) -> list[str]:
    names = (name for row in record.summary.history for name, value in row.metrics.items() if isinstance(value, list))
    return list(dict.fromkeys(names))


def _time_words(record: Record) -> str:
    if len(record.summary.processes) == 1 and len(record.summary.processes[0].parties) > 1:
        return (
            f"All parties took turns in one process, for {duration(record.summary.seconds)} together, so none of them "
            "waited and none sent anything over a network. Shown is what each of them computed."
        )
    words = (
        "Waiting is for frames of other parties, the network included; encode and receive are copies and checks of "
        "what is sent and comes in. Other is the rest: the start, meeting the others, exchanges, checkpoints."
    )
    longest = max((process.seconds for process in record.summary.processes), default=record.summary.seconds)
    if record.summary.seconds - longest >= 1.0:  # Python and torch take their time to load
        words += (
            f" From start to end it was {duration(record.summary.seconds)}: what no bar shows is the start of the "
            "processes, before a party begins, and their end."
        )
    return words


def _cost_words(record: Record) -> str:
    memory = "Peak memory is the most that a party's process held, Python and its libraries included."
    shared = [process.parties for process in record.summary.processes if len(process.parties) > 1]
    if shared:
        memory = (
            f"{_listed(list(shared[0]))} ran in one process, so there is one figure of peak memory for all of them."
        )
    return (
        "Forward and backward are floating-point operations, two for a multiply-add, over the whole run. Sent and "
        f"received are bytes of tensors; framing is what was sent and received around them. {memory}"
    )


def _cost_row(row: Cost) -> dict[str, str]:
    return {
        "party": row.party,
        "parameters": "" if row.parameters is None else f"{row.parameters:,}",
        "forward": f"{compact(row.flops['forward'])}FLOP" if row.flops["forward"] else "–",
        "backward": f"{compact(row.flops['backward'])}FLOP" if row.flops["backward"] else "–",
        "sent": size(row.sent["payload"]),
        "sent_messages": f"{row.sent['messages']:,}",
        "received": size(row.received["payload"]),
        "received_messages": f"{row.received['messages']:,}",
        "framing": size(row.sent["framing"] + row.received["framing"]),
        "computing": duration(sum(s for kind, s in row.seconds.items() if kind not in ("wait", "other"))),
        "waiting": duration(row.seconds["wait"]),
        "memory": size(row.memory) if row.memory else "",
    }


def _leaving(record: Record, party: str, rows: Sequence[Moved]) -> dict[str, Any]:
    mine = [row for row in rows if row.sender == party]
    undone = [record.summary.undone[party]] if party in record.summary.undone else []
    sent: list[Moved | UndonePart] = [*mine, *undone]
    known = party in record.summary.ledgers
    return {
        "party": party if known else f"{party}, as far as it was received here",
        "rows": [*(_leaving_row(row) for row in mine), *(_undone_row(row) for row in undone)],
        "payload": f"{sum(row.payload for row in sent):,}",
        "framing": f"{sum(row.framing for row in sent):,}",
        "messages": f"{sum(row.messages for row in sent):,}",
        "nothing": "Nothing left this party." if known else "Nothing was received from this party here.",
        "read": tells(record.plan, party),
        "kept": ", ".join(keeps(record.plan, party)) or "nothing that the above does not name",
    }


def _leaving_row(row: Moved) -> dict[str, Any]:
    return {
        "what": row.what,
        "to": row.receiver,
        "spec": row.spec,
        "raw": row.raw,
        "payload": f"{row.payload:,}",
        "planned": "" if row.planned is None else f"{row.planned:,}",
        "framing": f"{row.framing:,}",
        "messages": f"{row.messages:,}",
    }


def _undone_row(row: UndonePart) -> dict[str, Any]:
    sizes = {part: f"{getattr(row, part):,}" for part in ("payload", "framing", "messages")}
    return {"what": UNDONE, "to": "", "spec": "", "raw": False, "planned": "", **sizes}


def _again(record: Record) -> list[tuple[str, str]]:
    summary, training = record.summary, vars(record.plan.training)
    settings = ", ".join(f"{name} {value}" for name, value in training.items() if value not in ("", None))
    return [
        ("plan, SHA-256", summary.plan.digest),
        ("contract, SHA-256", summary.contract or "none: the run was started from Python"),
        ("training", settings),
        *((f"weights of {party}, SHA-256", digest) for party, digest in summary.weights_sha256.items()),
        ("versions", ", ".join(f"{name} {text}" for name, text in summary.versions.items())),
    ]


def _metric_words(losses: Mapping[str, Mapping[str, Any]]) -> str:
    found = [
        f"{name} {number(value)}{'' if loss == 'loss' else f' ({loss})'}"
        for loss, values in losses.items()
        for name, value in values.items()
        if isinstance(value, float)
    ]
    return _listed(found)


def _count(count: int, one: str, several: str = "") -> str:
    return f"{count:,} {one if count == 1 else several or one + 's'}"


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words)
