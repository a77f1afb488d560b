"""From a contract and a party file to a run: the network's settings, what would leave, the run's folder.

| code | error | meaning |
| --- | --- | --- |
| E205 | ConfigError | a party that is not of the plan |
| E206 | ConfigError | contract and [network] of the party file contradict each other |
| E207 | ConfigError | this site has not accepted the contract |
| E208 | ConfigError | the folder holds no run that can be gone on with |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import msgspec

from cutlayer.core.compile import Roster
from cutlayer.core.cost import epoch_bytes
from cutlayer.core.plan import Plan
from cutlayer.errors import ConfigError
from cutlayer.run.checkpoint import write_atomic
from cutlayer.run.config import Contract, parse_contract
from cutlayer.run.lock import own_folder
from cutlayer.run.partyfile import PartyFile
from cutlayer.run.tables import read_text
from cutlayer.transport.settings import NetworkSettings, check_settings
from cutlayer.transport.tls import check_credentials, load_credentials

__all__ = [
    "NOTES",
    "RECORD",
    "LaunchRecord",
    "Leaving",
    "accept",
    "assumed_roster",
    "begin_run",
    "checked_network",
    "has_checkpoint",
    "kind_of",
    "leaving",
    "network_settings",
    "no_checkpoints",
    "read_run",
    "unfinished",
]

Counts = Mapping[str, Mapping[str, int]]  # party -> mode -> samples
_CONTRACT, RECORD = "contract.toml", "launch.json"
NOTES = (_CONTRACT, RECORD)
"""Files that `begin_run` writes."""
_COMMANDS = {"join": "cutlayer join", "processes": "cutlayer run --processes", "simulate": "cutlayer run"}
_NOMINAL = 1000  # samples for which bytes are told where the number of samples is not known


class LaunchRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What `cutlayer resume` needs of a run, kept in its folder as `launch.json`; it never leaves the site.

    Attributes:
        kind: "join" (one party), "processes" (all parties, a process each) or "simulate" (all in one process).
        digest: Of the contract.
        party_files: Complete paths.
    """

    kind: Literal["join", "processes", "simulate"]
    digest: str
    party_files: tuple[str, ...]
    version: Literal[1] = 1


@dataclass(frozen=True)
class Leaving:
    """What may leave a party: its part of the printed plan, and the bytes of tensors it sends in an epoch.

    `samples` are those that `nbytes` is counted for; `known` says whether they are this party's own.
    """

    text: str
    nbytes: int
    samples: int
    known: bool

    def summary(self) -> str:
        """Return the bytes in one line."""
        of = f"its {self.samples:,} samples" if self.known else f"every {self.samples:,} samples a data holder has"
        return f"{self.nbytes:,} bytes over cuts an epoch (weights of replicas come on top), for {of}"


def checked_network(contract: Contract, file: PartyFile) -> NetworkSettings:
    """Return a party's place in the network, once its own certificate would do now.

    Raises:
        ConfigError, CertificateError: as `network_settings`; and E661 to E665 or E669, as `check_credentials`.
    """
    settings = network_settings(contract, file)
    if settings.credentials is not None:
        check_credentials(settings.credentials, now=datetime.now(UTC))
    return settings


def network_settings(contract: Contract, file: PartyFile) -> NetworkSettings:
    """Return a party's place in the network.

    Raises:
        ConfigError: E205, no party of the plan; E206, neither or both of certificates and plaintext, or an address to
            listen at that nobody dials; E211 to E213, see `transport.settings`.
        CertificateError: E666, a file of the credentials is missing or damaged.
    """
    plan, where = contract.plan, f"{file.path}: [network]"
    if file.name not in plan.parties:
        raise ConfigError(
            f"{file.name!r} is no party of the plan",
            where=str(file.path),
            expected=f"one of {', '.join(plan.parties)}",
            got=file.name,
            remedy="correct `party` in the party file, or take the contract of this run",
            code="E205",
        )
    if file.credentials is None and not file.insecure:
        raise ConfigError(
            "the party file names no certificates",
            where=where,
            expected="credentials = FOLDER",
            remedy="make them with `cutlayer pki issue`; for a trial on one machine set insecure = true",
            code="E206",
        )
    if file.listen and file.name not in contract.addresses:
        raise ConfigError(
            "this party listens, but the contract gives no address at which others could dial it",
            where=where,
            expected=f"{file.name} in [addresses] of the contract, or no `listen`",
            got=f"listen = {file.listen!r}",
            remedy="remove `listen`: a party without an address dials out",
            code="E206",
        )
    wires = [edge.wire(way) for edge in plan.graph.edges for way in ("up", "down")]
    sizes = [wire.nbytes(plan.training.batch_size) for wire in wires if wire is not None]
    settings = NetworkSettings(
        party=file.name,
        parties=plan.parties,
        coordinator=contract.coordinator,
        addresses=contract.addresses,
        run=plan.name,
        digest=contract.digest(),
        listen=file.listen,
        credentials=load_credentials(file.credentials, file.identity or file.name) if file.credentials else None,
        identity=file.identity,
        proxy=file.proxy,
        deadlines=contract.deadlines.settings(),
        limit=max([*sizes, *(stage.state_limit for stage in plan.stages)]),
    )
    check_settings(settings)
    return settings


def accept(contract: Contract, file: PartyFile, given: str) -> bool:
    """Return whether this site has accepted the contract: by the digest `given`, or by the one in its party file.

    False means that nobody has said anything yet. Raises `ConfigError` E207 if another contract was accepted.
    """
    wanted = given or (file.accept if file.accept != "ask" else "")
    if wanted and wanted != contract.digest():
        raise ConfigError(
            "this site has accepted another contract",
            where="--accept" if given else f"{file.path}: run.accept",
            expected=wanted,
            got=contract.digest(),
            remedy="read the contract with `cutlayer plan`; if it may run, accept its digest",
            code="E207",
        )
    return bool(wanted)


def assumed_roster(plan: Plan, counts: Counts) -> Roster:
    """Return a roster from the parties' counts that are known; others are taken to fit them.

    Parties of one lane hold the same samples, so one known count fills its lane; a lane of which nothing is known gets
    one batch.
    """
    samples: dict[str, dict[str, int]] = {}
    for mode in ("train", "evaluate", "predict"):
        held = {party: modes.get(mode, 0) for party, modes in counts.items()}
        for lane in range(plan.lanes):
            parties = tuple(plan.graph.data_fields(lane))
            known = [held[party] for party in parties if party in held]
            wanted = mode == "train" or any(held.values())
            fill = known[0] if known else plan.training.batch_size * wanted
            for party in parties:
                samples.setdefault(mode, {})[party] = held.get(party, fill)
    return Roster(samples)


def leaving(plan: Plan, party: str, counts: Mapping[str, int]) -> Leaving:
    """Return what may leave `party`, whose own numbers of samples by mode are `counts`."""
    own = any(party in plan.graph.data_fields(lane) for lane in range(plan.lanes)) and bool(counts.get("train"))
    samples = counts["train"] if own else _NOMINAL
    known = {party: {"train": samples}} if own else {}
    holders = {p for lane in range(plan.lanes) for p in plan.graph.data_fields(lane)}
    roster = assumed_roster(plan, known or {holder: {"train": samples} for holder in holders})
    return Leaving(_section(plan, party), epoch_bytes(plan, roster, party), samples, own)


def _section(plan: Plan, party: str) -> str:
    """Return the party's part of the printed plan, which describes parties of one kind together: "a, b (each)"."""
    found: list[str] = []
    inside = False
    for line in str(plan).splitlines():
        if not line.startswith(" "):
            inside = party in line.removesuffix(" (each)").split(", ")
        if inside:
            found.append(line if line.startswith(" ") else party)
    return "\n".join(found)


def has_checkpoint(folder: Path) -> bool:
    """Whether a party's folder of a run holds a checkpoint to go on from, as far as can be seen without reading it."""
    return any(path.stem.isdecimal() for path in (folder / "checkpoints").rglob("*.json"))


def begin_run(folder: Path, contract_text: str, record: LaunchRecord) -> None:
    """Note in a run's folder, made if missing, what it was started with. A run of the same contract is gone on with.

    Raises `ConfigError` E208 if the folder holds a run of another contract, one begun in another way, or one without
    checkpoints.
    """
    own_folder(folder)
    path = folder / RECORD
    if path.exists():
        _check_again(folder, _read_record(path), record)
    write_atomic(folder / _CONTRACT, contract_text.encode())
    write_atomic(path, msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n")


def _check_again(folder: Path, before: LaunchRecord, record: LaunchRecord) -> None:
    if before.digest != record.digest:
        raise ConfigError(
            "the folder holds a run of another contract",
            where=str(folder),
            expected=record.digest,
            got=before.digest,
            remedy="give a new folder",
            code="E208",
        )
    if before.kind != record.kind:
        kept = before.kind != "simulate"
        raise ConfigError(
            "the folder holds a run that was begun in another way",
            where=str(folder),
            expected=f"one of `{_COMMANDS[record.kind]}`",
            got=f"one of `{_COMMANDS[before.kind]}`",
            remedy="go on with it: cutlayer resume and this folder; or give a new folder"
            if kept
            else "give a new folder",
            code="E208",
        )
    if record.kind == "simulate":
        raise no_checkpoints(folder)


def no_checkpoints(folder: Path) -> ConfigError:
    """Return the error for a run of all parties in one process, with which nobody can go on."""
    return ConfigError(
        "a run of all parties in one process keeps no checkpoints to go on from",
        where=str(folder),
        remedy="start it again in a new folder; with --processes it can be gone on with",
        code="E208",
    )


def kind_of(folder: Path) -> str:
    """Return how the run of a folder was begun, as `LaunchRecord.kind`; "" if the folder does not say."""
    try:
        return _read_record(folder / RECORD).kind
    except ConfigError:
        return ""


def unfinished(folder: Path) -> bool:
    """Whether a party's run in this folder was begun, and has not ended: then it has written no summary."""
    return kind_of(folder) not in ("", "simulate") and not (folder / "summary.json").exists()


def read_run(folder: Path) -> tuple[Contract, str, LaunchRecord]:
    """Return a run's contract, its text and what it was started with. Raises `ConfigError` E208 if it is no run."""
    record = _read_record(folder / RECORD)
    text = read_text(folder / _CONTRACT)
    contract = parse_contract(text, where=str(folder / _CONTRACT))
    if contract.digest() != record.digest:
        raise _no_run(folder, f"a contract of digest {record.digest}", contract.digest())
    return contract, text, record


def _read_record(path: Path) -> LaunchRecord:
    try:
        return msgspec.json.decode(path.read_bytes(), type=LaunchRecord)
    except (OSError, msgspec.MsgspecError) as error:
        raise _no_run(path.parent, RECORD, str(error)[:200]) from error


def _no_run(folder: Path, expected: str, got: str) -> ConfigError:
    return ConfigError(
        "the folder holds no run that can be gone on with",
        where=str(folder),
        expected=expected,
        got=got,
        remedy="give the folder that `cutlayer run` or `cutlayer join` named when it started",
        code="E208",
    )
