"""What a run left behind, read from its folder: `summary.json` and `metrics.jsonl`.

| code | error | meaning |
| --- | --- | --- |
| E281 | ConfigError | the folder holds no summary: no run, or one that has not ended |
| E282 | ConfigError | the summary is damaged, or of another version |
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from cutlayer.core.crossing import Crossing, PlannedExchange
from cutlayer.core.parts import Answer, Loss, Release, Shared, Stage, Training
from cutlayer.core.plan import Plan
from cutlayer.errors import ConfigError, PlanError
from cutlayer.run.launch import kind_of

__all__ = ["FlowRow", "HistoryRow", "LedgerPart", "OwnPart", "ProcessPart", "Record", "SummaryFile", "read_record"]

VERSION = 2  # of the summaries that this reads
_TOLD = (
    "lost",
    "returned",
    "rollback",
    "damaged",
    "anew",
    "aborted",
)  # events that a reader of the report wants to know of
_OF_ALL = ("rollback", "anew")  # of them, those that each party tells of the same session


class FlowRow(msgspec.Struct, frozen=True):
    """One flow of a ledger. Units: bytes, messages."""

    way: str
    peer: str
    mode: str
    direction: str
    edge: int
    payload: int
    framing: int
    messages: int


class SecondsRow(msgspec.Struct, frozen=True):
    """Seconds of one kind of work at one stage; of "wait", at one peer."""

    kind: str
    stage: str
    seconds: float


class FlopsRow(msgspec.Struct, frozen=True):
    """Floating-point operations, "forward" or "backward", of one stage."""

    kind: str
    stage: str
    flops: int


class ExchangeRow(msgspec.Struct, frozen=True):
    """What the exchange of a number is."""

    number: int
    name: str
    stage: str


class LedgerPart(msgspec.Struct, frozen=True):
    """A party's ledger."""

    party: str
    flows: tuple[FlowRow, ...]
    seconds: tuple[SecondsRow, ...]
    flops: tuple[FlopsRow, ...]
    exchanges: tuple[ExchangeRow, ...] = ()


class UndonePart(msgspec.Struct, frozen=True):
    """What a party sent in steps that a restart undid. Units: bytes, messages."""

    payload: int
    framing: int
    messages: int


class OwnPart(msgspec.Struct, frozen=True):
    """Metrics over the samples of one lane alone, and their number. `client` is "" in older summaries."""

    lane: int
    samples: int
    metrics: dict[str, Any]
    client: str = ""


class HistoryRow(msgspec.Struct, frozen=True):
    """Metrics of one loss, round and mode, over all lanes; `own`: of each lane whose samples this party counted.

    A value is a number, a list of them, or None where it was not finite.
    """

    mode: str
    round: int
    loss: str
    metrics: dict[str, Any]
    lane: int = 0
    party: str = ""
    own: tuple[OwnPart, ...] = ()


class ProcessPart(msgspec.Struct, frozen=True):
    """One process, the parties in it, its wall-clock seconds and the most bytes of memory it held."""

    parties: tuple[str, ...]
    seconds: float
    memory: int


class CountsPart(msgspec.Struct, frozen=True):
    """Numbers of parameters that a party holds."""

    stages: dict[str, int]
    total: int


class PlanPart(msgspec.Struct, frozen=True):
    """The plan as plain values."""

    name: str
    digest: str
    document: dict[str, Any]


class SummaryFile(msgspec.Struct, frozen=True):
    """What `summary.json` holds."""

    version: int
    plan: PlanPart
    contract: str
    ended: str
    seconds: float
    samples: dict[str, dict[str, int]]
    metrics: dict[str, dict[str, dict[str, Any]]]
    history: tuple[HistoryRow, ...]
    ledgers: dict[str, LedgerPart]
    processes: tuple[ProcessPart, ...]
    parameters: dict[str, CountsPart]
    weights_sha256: dict[str, str]
    versions: dict[str, str]
    undone: dict[str, UndonePart] = {}


@dataclass(frozen=True)
class Record:
    """A run: where it is, its summary, its plan, and how often something happened that should not."""

    folder: Path
    summary: SummaryFile
    plan: Plan
    events: Mapping[str, int]

    @property
    def complete(self) -> bool:
        """Whether the ledgers of all parties are known; of a `join` only this party's own is."""
        return all(party in self.summary.ledgers for party in self.plan.parties)

    def process(self, party: str) -> ProcessPart | None:
        """Return the process that ran the party, or None if this folder does not know it."""
        return next((process for process in self.summary.processes if party in process.parties), None)


def read_record(folder: Path) -> Record:
    """Read a run's folder.

    Raises:
        ConfigError: E281, there is no summary; E282, it cannot be read.
    """
    path = folder / "summary.json"
    try:
        data = path.read_bytes()
    except OSError as error:
        kind = kind_of(folder)
        raise ConfigError(
            "the folder holds no results of a run",
            where=str(folder),
            expected="summary.json, which a run writes when it ends",
            got=type(error).__name__,
            remedy=(
                "give the folder that the run named at its start"
                if not kind
                else "start the run again in a new folder: it keeps checkpoints with --processes only"
                if kind == "simulate"
                else f"go on with the run: cutlayer resume {folder}"
            ),
            code="E281",
        ) from error
    try:
        version = msgspec.json.decode(data, type=dict[str, Any]).get("version")
        if version != VERSION:
            raise _unreadable(path, f"version {VERSION}", f"version {version}")
        summary = msgspec.json.decode(data, type=SummaryFile)
        plan = restored_plan(summary.plan.document)
    except (msgspec.MsgspecError, PlanError, TypeError, LookupError) as error:
        raise _unreadable(path, "a summary as a run writes it", str(error)[:200]) from error
    if plan.digest() != summary.plan.digest:
        raise _unreadable(path, f"a plan of digest {summary.plan.digest[:80]}", plan.digest())
    strangers = _named(summary, plan.lanes) - {*plan.parties, *(stage.name for stage in plan.stages)}
    if strangers:
        raise _unreadable(path, "parties and losses of its plan", ", ".join(sorted(strangers))[:200])
    return Record(folder, summary, plan, _events(folder / "metrics.jsonl"))


def restored_plan(document: Mapping[str, Any]) -> Plan:
    """Return the plan that `Plan.document` gave. Raises `PlanError`, `TypeError` or `KeyError` if it is none."""
    stages: list[Stage | Loss] = []
    for row in document["stages"]:
        fields = {key: value for key, value in row.items() if key != "kind"}
        stages.append(Loss(**fields) if row["kind"] == "loss" else Stage(**fields))
    return Plan(
        stages,
        training=Training(**document["training"]),
        releases=[Release(**row) for row in document["releases"]],
        preprocessing=[Shared(**row) for row in document["preprocessing"]],
        assemble_at=document["assemble_at"],
        name=document["name"],
        extras=[
            *(Crossing(**row) for row in document.get("crossings", ())),
            *(PlannedExchange(**row) for row in document.get("exchanges", ())),
            *(Answer(**row) for row in document.get("answers", ())),
        ],
    )


def _named(summary: SummaryFile, lanes: int) -> set[str]:
    """Return the parties and losses that a summary speaks of, and lanes that are none of its plan's."""
    ledgers = summary.ledgers
    return {
        *ledgers,
        *summary.undone,
        *(row.peer for ledger in ledgers.values() for row in ledger.flows),
        *(name for row in summary.history for name in (row.loss, row.party) if name),
        *(f"lane {own.lane}" for row in summary.history for own in row.own if not 0 <= own.lane < lanes),
        *(party for process in summary.processes for party in process.parties),
    }


def _events(path: Path) -> dict[str, int]:
    """Count the events worth telling; steps and rounds, which are most lines, are passed over unread.

    What all parties tell of one session is counted once, where the file holds the events of several.
    """
    found: Counter[str] = Counter()
    each: Counter[tuple[str, str]] = Counter()  # by event and party
    if path.exists():
        with path.open("rb") as file:
            for line in file:
                name = line[:40].partition(b'"event":"')[2].partition(b'"')[0].decode(errors="replace")
                if name in _OF_ALL:
                    party = line.partition(b'"party":"')[2].partition(b'"')[0].decode(errors="replace")
                    each[name, party] += 1
                    found[name] = max(found[name], each[name, party])
                else:
                    found[name] += name in _TOLD
    return {name: found[name] for name in _TOLD if found[name]}


def _unreadable(path: Path, expected: str, got: str) -> ConfigError:
    return ConfigError(
        "the summary of the run cannot be read",
        where=str(path),
        expected=expected,
        got=got,
        remedy="make the report with the version of cutlayer that made the run, and leave the file as it is",
        code="E282",
    )
