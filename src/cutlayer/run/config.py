"""The contract: one TOML file that all parties share, and whose digest they compare before anything is sent.

It holds the plan (stages, losses, releases, training) and how parties meet (coordinator, addresses, deadlines). What is
private to a site is in its party file instead; see `cutlayer.run.partyfile`.

| code | error | meaning |
| --- | --- | --- |
| E205 | ConfigError | parts of the contract do not fit each other |
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec

from cutlayer.core.crossing import Crossing, PlannedExchange, answers_in
from cutlayer.core.parts import STATE_LIMIT, Answer, Loss, Release, Shared, Stage, Training, check_name
from cutlayer.core.plan import Plan
from cutlayer.errors import ConfigError, CutlayerError
from cutlayer.run.tables import parse_table, read_text, write_table
from cutlayer.transport.settings import Deadlines, host_port

__all__ = ["Contract", "DeadlineTable", "dump_contract", "load_contract", "parse_contract"]

CONTRACT_VERSION = 1
_DAY = 86_400.0

_Transform = str | dict[str, str | int | float | bool]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=7 * _DAY)]


class DeadlineTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How long a party waits, in seconds. The same at all parties.

    Attributes:
        join: For all parties to come, the first time.
        patience: For a lost party to come back, and for all to meet again after a restart.
        receive: For a frame, and at the end for the others to finish.
        send: For room in a full outbox.
        close: For the last messages, when the network is closed.
    """

    join: Seconds = 120.0
    patience: Seconds = 60.0
    receive: Seconds = 600.0
    send: Seconds = 60.0
    close: Seconds = 10.0

    def settings(self) -> Deadlines:
        """Return them as the transport takes them."""
        return Deadlines(**msgspec.structs.asdict(self))


class _ContractTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    name: str
    coordinator: str
    assemble_at: tuple[str, ...] = ()


class _StageTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    name: str
    at: str | tuple[str, ...]
    inputs: tuple[str, ...]
    output: str | dict[str, str]
    detached: tuple[str, ...] = ()
    frozen: bool = False
    state_limit: Annotated[int, msgspec.Meta(gt=0)] = STATE_LIMIT


class _LossTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    name: str
    at: str | tuple[str, ...]
    inputs: tuple[str, ...]
    weight: float = 1.0
    reduction: str = "mean"


class _ReleaseTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    field: str
    at: str
    to: str
    spec: str


class _SharedTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    field: str
    at: str
    kind: str = "scale"
    limit: int = 1024
    least: int = 5


class _CrossingTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    of: str
    codec: _Transform = ""
    gradient_codec: _Transform = ""
    defences: tuple[_Transform, ...] = ()
    gradient_defences: tuple[_Transform, ...] = ()
    wire: str = ""
    gradient_wire: str = ""


class _ExchangeTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    name: str
    group: tuple[str, ...]
    says: str
    when: str = "round"
    limit: int = 65_536
    messages: int = 2
    stage: str = ""
    hub: str = ""


class _AnswerTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    of: str
    to: str


class _TrainingTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The fields of `cutlayer.Training`; a test holds both side by side."""

    epochs: int = 1
    batch_size: int = 32
    microbatches: int = 1
    schedule: str = "sequential"
    order: str = "relay"
    seed: int = 0
    shuffle: bool = True
    drop_last: bool = False
    clip_norm: float | None = None
    clip: str = "party"
    checkpoint_every: int = 0
    evaluate_every: int = 0
    metrics_least: int = 5
    window: int = 4
    hub: str = ""


class _ContractFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    contract: _ContractTable
    stage: tuple[_StageTable, ...]
    loss: tuple[_LossTable, ...]
    release: tuple[_ReleaseTable, ...] = ()
    preprocessing: tuple[_SharedTable, ...] = ()
    crossing: tuple[_CrossingTable, ...] = ()
    exchange: tuple[_ExchangeTable, ...] = ()
    answer: tuple[_AnswerTable, ...] = ()
    training: _TrainingTable = _TrainingTable()
    addresses: dict[str, str] = {}
    deadlines: DeadlineTable = DeadlineTable()


@dataclass(frozen=True, kw_only=True)
class Contract:
    """What all parties agree on.

    Attributes:
        plan: Who runs what, and what may leave whom. Its losses stand after its stages, as in the file.
        coordinator: The party that gathers the others at the start; it has an address.
        addresses: Party -> "host:port", for those that others can dial.
        deadlines: How long a party waits for what.

    Raises:
        ConfigError: E205, the parts do not fit each other; E212, an address is not host:port.
        PlanError: E104, the name cannot be a folder's.
    """

    plan: Plan
    coordinator: str
    addresses: Mapping[str, str] = field(default_factory=dict)
    deadlines: DeadlineTable = field(default_factory=DeadlineTable)

    def __post_init__(self) -> None:
        """Check what the tables alone cannot say."""
        check_name(self.plan.name, "contract")  # it is part of folders' names, and the contract may be somebody else's
        parties = self.plan.parties
        named = {"contract.coordinator": self.coordinator, **{f"addresses.{name}": name for name in self.addresses}}
        for place, name in named.items():
            if name not in parties:
                raise _unfit(f"{name!r} is no party of the plan", place, f"one of {', '.join(parties)}", name)
        if self.coordinator not in self.addresses:
            raise _unfit(
                f"the coordinator {self.coordinator!r} has no address",
                "addresses",
                f'{self.coordinator} = "host:port" in [addresses]',
                ", ".join(self.addresses) or "no addresses",
            )
        for party, address in self.addresses.items():
            with _within(f"addresses.{party}"):
                host_port(address)
        kinds = [isinstance(stage, Loss) for stage in self.plan.stages]
        if kinds != sorted(kinds):
            raise _unfit(
                "a loss stands before a stage",
                "stages of the plan",
                "all stages first, then the losses",
                "another order",
            )

    def document(self) -> dict[str, Any]:
        """Return all that the digest is made of as plain values; deadlines in seconds."""
        return {
            "version": CONTRACT_VERSION,
            "plan": self.plan.document(),
            "coordinator": self.coordinator,
            "addresses": dict(self.addresses),
            "deadlines": {name: float(value) for name, value in msgspec.structs.asdict(self.deadlines).items()},
        }

    def digest(self) -> str:
        """Return the SHA-256, in hex, over the plan's digest and the rest of the contract."""
        document = {**self.document(), "plan": self.plan.digest()}
        text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()


def load_contract(path: Path) -> Contract:
    """Read a contract file.

    Raises:
        ConfigError: E201 to E203 for the file, E205 for parts that do not fit each other.
        PlanError: the plan in it cannot be run.
    """
    return parse_contract(read_text(path), where=str(path))


def parse_contract(text: str, *, where: str = "contract") -> Contract:
    """Return the contract that a TOML text holds; `where` names it in errors. Raises as `load_contract`."""
    file = parse_table(text, _ContractFile, where=where)
    with _within(where):
        return _contract(file)


def _contract(file: _ContractFile) -> Contract:
    stages: list[Stage | Loss] = [Stage(**_fields(row)) for row in file.stage]  # type: ignore[arg-type]
    losses = [Loss(**_fields(row)) for row in file.loss]  # type: ignore[arg-type]
    plan = Plan(
        [*stages, *losses],
        training=Training(**_fields(file.training)),  # type: ignore[arg-type]
        releases=[Release(**_fields(row)) for row in file.release],  # type: ignore[arg-type]
        preprocessing=[Shared(**_fields(row)) for row in file.preprocessing],  # type: ignore[arg-type]
        assemble_at=file.contract.assemble_at,
        name=file.contract.name,
        extras=[
            *(Crossing(**_fields(row)) for row in file.crossing),  # type: ignore[arg-type]
            *(PlannedExchange(**_fields(row)) for row in file.exchange),  # type: ignore[arg-type]
            *(Answer(of=row.of, to=row.to) for row in file.answer),
        ],
    )
    return Contract(
        plan=plan, coordinator=file.contract.coordinator, addresses=file.addresses, deadlines=file.deadlines
    )


def dump_contract(contract: Contract) -> str:
    """Return the contract as TOML text, every key written out. `parse_contract` gives an equal contract back."""
    plan = contract.plan
    file = _ContractFile(
        contract=_ContractTable(name=plan.name, coordinator=contract.coordinator, assemble_at=plan.assemble_at),
        stage=tuple(_stage_table(s) for s in plan.stages if isinstance(s, Stage)),
        loss=tuple(
            _LossTable(name=s.name, at=s.at, inputs=s.inputs, weight=s.weight, reduction=s.reduction)
            for s in plan.stages
            if isinstance(s, Loss)
        ),
        release=tuple(_ReleaseTable(field=r.field, at=r.at, to=r.to, spec=str(r.spec)) for r in plan.releases),
        preprocessing=tuple(_SharedTable(**asdict(shared)) for shared in plan.preprocessing),
        crossing=tuple(msgspec.convert(crossing.row(), _CrossingTable) for crossing in plan.crossings),
        exchange=tuple(msgspec.convert(exchange.row(), _ExchangeTable) for exchange in plan.exchanges),
        answer=tuple(_AnswerTable(of=one.of, to=one.to) for one in answers_in(plan.extras)),
        training=_TrainingTable(**asdict(plan.training)),
        addresses=dict(contract.addresses),
        deadlines=contract.deadlines,
    )
    return write_table(file)


def _stage_table(stage: Stage) -> _StageTable:
    ports = {port: str(spec) for port, spec in stage.ports.items()}
    return _StageTable(
        name=stage.name,
        at=stage.at,
        inputs=stage.inputs,
        output=ports.get("", ports),
        detached=stage.detached,
        frozen=stage.frozen,
        state_limit=stage.state_limit,
    )


@contextmanager
def _within(place: str) -> Iterator[None]:
    """Say of an error within that it happened in this place."""
    try:
        yield
    except CutlayerError as error:
        error.within(place)
        raise


def _fields(row: msgspec.Struct) -> dict[str, object]:
    return msgspec.structs.asdict(row)


def _unfit(what: str, where: str, expected: str, got: str) -> ConfigError:
    return ConfigError(
        what, where=where, expected=expected, got=got, remedy="correct the contract, at all parties", code="E205"
    )
