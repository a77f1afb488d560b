"""Before a run: do contract, party files, certificates, modules and data fit each other? Nothing is sent.

A party's modules are tried on one batch of its own data; what would come from others is made up from the plan's specs,
and what would leave is checked and dropped. The modules are trained by that one step, so they are not used afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

import torch
from torch import Tensor

from cutlayer.core.compile import Roster, compile_plan
from cutlayer.core.plan import Plan
from cutlayer.core.program import Checkpoint, Credit, Exchange, Forward, Instruction, Mode, Program, Recv
from cutlayer.core.readable import READABLE_REMEDY, warnings_of
from cutlayer.engine.party import Do, fulfil
from cutlayer.engine.tensors import dtype_name, to_payload, torch_dtype
from cutlayer.engine.worker import Parcel, Worker
from cutlayer.errors import ConfigError, CutlayerError, DataError
from cutlayer.run.config import Contract
from cutlayer.run.launch import assumed_roster, network_settings
from cutlayer.run.party import Party, build, counts
from cutlayer.run.partyfile import PartyFile
from cutlayer.transport.certificates import parse_chain
from cutlayer.transport.pki import describe
from cutlayer.transport.tls import check_credentials

__all__ = ["Finding", "preflight", "try_party"]

_SOON = 30  # days before a certificate's end at which to warn
_CERTIFY = (
    "ask the authority of this run for the folder that `cutlayer pki issue {}` makes, and name it as `credentials` in "
    "[network] of the party file"
)


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `level` is "ok", "warn" or "fail".

    A failure carries its error, and a warning what to do about it, in `do`.
    """

    level: str
    subject: str
    text: str
    error: CutlayerError | None = None
    do: str = ""


def preflight(contract: Contract, files: Sequence[PartyFile], *, now: datetime) -> Iterator[Finding]:
    """Yield what was found, one finding at a time; failures do not end it. `now` (with a time zone) is the clock."""
    plan = contract.plan
    cuts = {edge.index for lane in range(plan.lanes) for edge in plan.graph.cuts(lane)}
    yield Finding(
        "ok", "contract", f"{len(plan.stages)} stages, {len(plan.parties)} parties, {len(cuts)} cuts, "
        f"digest {contract.digest()}"
    )  # fmt: skip
    yield from (Finding("warn", "contract", text, do=READABLE_REMEDY) for text in warnings_of(plan))
    held: dict[str, Party] = {}
    for file in files:
        yield from _network(contract, file, now)
        try:
            if file.name in held:
                raise ConfigError(
                    f"two party files are of {file.name!r}", where=str(file.path), remedy="give one each", code="E225"
                )
            held[file.name] = file.party()
        except CutlayerError as error:
            yield _failure(file.name, error)
    known = {name: counts(party) for name, party in held.items()}
    for name, party in held.items():
        try:
            try_party(plan, party, assumed_roster(plan, known))
        except CutlayerError as error:
            yield _failure(name, error)
        else:
            own = ", ".join(f"{mode} {count:,}" for mode, count in known[name].items())
            stages = ", ".join(stage.name for stage in plan.stages if name in stage.places)
            yield Finding("ok", name, f"one batch through {stages}; samples: {own or 'none'}")


def try_party(plan: Plan, party: Party, roster: Roster) -> None:
    """Run a party's first step of training, evaluation and prediction, with made-up values for what others would send.

    Raises:
        ConfigError, DataError: a module, an optimizer or a field of the data is missing.
        StageError, ContractError, NonFiniteError: a module fails, or gives something else than the plan says.
    """
    if party.name not in plan.parties:
        raise ConfigError(
            f"{party.name!r} is no party of the plan",
            where=f"party {party.name}, plan {plan.name}",
            expected=f"one of {', '.join(plan.parties)}",
            remedy="correct `party` in the party file, or take the contract of this run",
            code="E205",
        )
    holds = any(party.name in plan.graph.data_fields(lane) for lane in range(plan.lanes))
    if holds and not roster.samples.get("train", {}).get(party.name):
        raise DataError(
            f"party {party.name!r} has no data for train",
            where=f"party {party.name}",
            remedy=f"give Party({party.name!r}, data=...) a data set",
            code="E252",
        )
    programs = compile_plan(plan, roster)[party.name]
    worker = build(plan, party, roster)
    worker.site.preprocess.alone()
    made_up = torch.Generator().manual_seed(0)
    modes: tuple[Mode, ...] = ("train", "evaluate", "predict")
    for mode in modes:
        if mode not in programs:
            continue
        worker.begin(mode, 1)
        for job in _first_step(programs[mode]):
            parcel = _parcel(job, _shape(worker, job), made_up, worker) if isinstance(job, Recv) else None
            fulfil(worker, Do(job, 0, parcel), lambda: 0.0)
        worker.end_step()


def _first_step(program: Program) -> list[Instruction]:
    """Return the instructions of the first block that computes, without those that others must answer."""
    for block in program.blocks:
        if any(isinstance(job, Forward) for job in block.instructions):
            return [job for job in block.instructions if not isinstance(job, Exchange | Credit | Checkpoint)]
    return []


def _shape(worker: Worker, job: Recv) -> tuple[int, ...]:
    """Return the shape of what others would send: of a gradient, that of its value; else as the plan says.

    A length that may differ from batch to batch is that of a tensor here with a length of the same name, or else its
    bound. Where only some samples have a row, nobody has one: masks are made up as False, so these say the same.
    """
    edges = worker.graph.edges
    if job.direction == "down":
        return tuple(worker.values.get(edges[job.edge], job.lane, job.micro).shape)
    lengths: dict[str, int] = {}
    for edge in edges:
        if edge.spec is not None and edge.spec.free and worker.values.has(edge, job.lane, job.micro):
            value = worker.values.get(edge, job.lane, job.micro)
            lengths |= {_name(edge.spec.shape[place]): value.shape[place] for place in edge.spec.free}
    spec = edges[job.edge].spec or job.spec
    shape = list(spec.concrete(job.size))
    for place in spec.free:
        shape[place] = min(shape[place], lengths.get(_name(spec.shape[place]), shape[place])) if place else 0
    return tuple(shape)


def _name(dim: int | str) -> str:
    return str(dim).partition("<=")[0]


def _parcel(job: Recv, shape: tuple[int, ...], made_up: torch.Generator, worker: Worker) -> Parcel:
    """Return random numbers (zeros for integers, which may be indices, and for masks) of the plan's dtype."""
    edge = worker.graph.edges[job.edge]
    spec = edge.spec or job.spec
    value: Tensor = torch.zeros(shape)
    if spec.floating:
        value = torch.randn(shape, generator=made_up)
    value = worker.coder.encoded(edge, job.direction, value.to(torch_dtype(spec.dtype)))
    return Parcel(dtype_name(value.dtype), tuple(value.shape), to_payload(value))


def _network(contract: Contract, file: PartyFile, now: datetime) -> Iterator[Finding]:
    if file.credentials is None and not file.insecure:
        text = "no certificates: enough for `cutlayer run`, not for `cutlayer join`"
        yield Finding("warn", file.name, text, do=_CERTIFY.format(file.name))
        return
    try:
        settings = network_settings(contract, file)
        if settings.credentials is None or file.credentials is None:
            text = "no certificates: plaintext, between processes of this machine only"
            yield Finding("warn", file.name, text, do=f"for a trial nothing; else {_CERTIFY.format(file.name)}")
            return
        check_credentials(settings.credentials, now=now)
        ends = describe(file.credentials / "party.pem").not_after
        authority = max(one.not_valid_after_utc for one in parse_chain(settings.credentials.authority, where=file.name))
    except CutlayerError as error:
        yield _failure(file.name, error)
        return
    yield _valid(file.name, "certificate", ends, now, "ask the authority of this run for a new certificate")
    if (authority - now).days < _SOON:
        do = "ask the authority of this run: all parties need new certificates, and its new ca.pem"
        yield _valid(file.name, "the authority's certificate", authority, now, do)


def _valid(party: str, whose: str, ends: datetime, now: datetime, do: str) -> Finding:
    days = (ends - now).days
    text = f"{whose} valid until {ends:%Y-%m-%d}, {days} more days"
    return Finding("warn", party, text, do=do) if days < _SOON else Finding("ok", party, text)


def _failure(subject: str, error: CutlayerError) -> Finding:
    return Finding("fail", subject, error.what, error)
