"""Exchanges: everything parties tell each other besides values and gradients at cuts.

Each is one sans-I/O generator with bounded messages in its own tag space. It yields `Say` and `Hear`, and touches its
party only through `Local`. A new exchange is one function and a row in `EXCHANGES`; no new instruction.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from torch import Tensor

from cutlayer.core.program import Exchange
from cutlayer.engine.preprocess import Preprocess
from cutlayer.engine.tensors import pack, unpack
from cutlayer.engine.wire import Buffer
from cutlayer.errors import ContractError

__all__ = ["EXCHANGES", "ExchangeFunction", "Hear", "Local", "Say", "Talk"]

_NUMBER = struct.Struct("<d")


@dataclass(frozen=True)
class Say:
    """Send `payload` to a member of the group."""

    to: str
    payload: bytes


@dataclass(frozen=True)
class Hear:
    """Wait for the next message of a member of the group."""

    source: str


Talk = Generator[Say | Hear, Buffer, None]


class Local(Protocol):
    """What an exchange may do at its own party."""

    preprocess: Preprocess
    gathered: dict[str, dict[str, Tensor]]  # stage -> weights of another party

    def weights(self, stage: str, lane: int) -> dict[str, Tensor]:
        """Return a replica's parameters and persistent buffers, by name."""

    def state(self, stage: str, lane: int) -> dict[str, Tensor]:
        """Return all state of a replica."""

    def load_state(self, stage: str, lane: int, state: Mapping[str, Tensor], where: str) -> None:
        """Take over the state of another replica."""

    def gradients(self, stage: str, lane: int) -> dict[str, Tensor]:
        """Return the gradients of a replica's parameters."""

    def set_gradients(self, stage: str, lane: int, gradients: Mapping[str, Tensor], where: str) -> None:
        """Replace the gradients of a replica's parameters."""

    def squared_norm(self, lanes: tuple[int, ...]) -> float:
        """Return the sum of squares of this party's gradients, each replicated stage counted at its first lane."""

    def clip(self, squared_norm: float, lanes: tuple[int, ...]) -> None:
        """Scale this party's gradients down to the plan's largest norm, given the squared norm over all parties."""

    def metric_sums(self, stage: str, lane: int) -> dict[str, Tensor]:
        """Return the sums behind a loss's metrics; never a value of a single sample."""

    def set_metric_sums(self, stage: str, lane: int, sums: Mapping[str, Tensor], where: str) -> None:
        """Replace the sums behind a loss's metrics by those over all replicas."""


def hand_on(job: Exchange, me: str, local: Local) -> Talk:
    """Relay (Gupta and Raskar 2018, arXiv 1810.06060, algorithm 2): all state goes to the next party, peer to peer."""
    (source, target), (lane, following) = job.group, job.lanes
    if source == target:
        local.load_state(job.stage, following, _copy(local.state(job.stage, lane)), _where(job, me))
    elif me == source:
        yield Say(target, pack(local.state(job.stage, lane)))
    elif me == target:
        payload = yield Hear(source)
        local.load_state(job.stage, following, unpack(payload, source), _where(job, source))


def broadcast(job: Exchange, me: str, local: Local) -> Talk:
    """Give all replicas the state of the first, so that they start equal. Generators differ from then on."""
    root = job.group[0]
    others = [party for party in dict.fromkeys(job.group) if party != root]
    if me == root:
        given = local.state(job.stage, job.lanes[0])
        state = _copy({name: tensor for name, tensor in given.items() if not name.startswith("g.")})
        for party in others:
            yield Say(party, pack(state))
    else:
        state = unpack((yield Hear(root)), root)
    for party, lane in zip(job.group, job.lanes, strict=True):
        if party == me and lane != job.lanes[0]:
            own = local.state(job.stage, lane)
            kept = {name: tensor for name, tensor in own.items() if name.startswith("g.")}
            local.load_state(job.stage, lane, {**state, **kept}, _where(job, root))


def add_gradients(job: Exchange, me: str, local: Local) -> Talk:
    """Add the gradients of all replicas that had samples, in the order of lanes, at the hub; give the sum to all.

    Losses are scaled by each lane's share of the samples, so the sum is the gradient of one large batch. A lane that
    has no samples left says so with an empty message: the hub never runs ahead of it.
    """
    total = yield from _total(job, me, partial(local.gradients, job.stage), job.lanes)
    for lane, party in enumerate(job.group):
        if party == me:
            local.set_gradients(job.stage, lane, total, _where(job, job.hub))


def global_norm(job: Exchange, me: str, local: Local) -> Talk:
    """Clip by the norm over all parties: each releases one number, the squared norm of its gradients (Pascanu 2013)."""
    own = _number(_NUMBER.pack(local.squared_norm(job.lanes)), me)
    if me == job.hub:
        total = 0.0
        for party in job.group:
            total += own if party == me else _number((yield Hear(party)), party)
        for party in job.group:
            if party != me:
                yield Say(party, _NUMBER.pack(total))
    else:
        yield Say(job.hub, _NUMBER.pack(own))
        total = _number((yield Hear(job.hub)), job.hub)
    local.clip(total, job.lanes)


def add_metrics(job: Exchange, me: str, local: Local) -> Talk:
    """Add the sums behind the metrics of all replicas of a loss; all get the total, nobody a sample's value."""
    total = yield from _total(job, me, partial(local.metric_sums, job.stage), range(len(job.group)))
    for lane, party in enumerate(job.group):
        if party == me:
            local.set_metric_sums(job.stage, lane, total, _where(job, job.hub))


def agree(job: Exchange, me: str, local: Local) -> Talk:
    """Shared preprocessing: the holders of a field tell the hub sums over their samples, and get the total."""
    others = [party for party in dict.fromkeys(job.group) if party != job.hub]
    if me == job.hub:
        told: list[tuple[str, Buffer]] = []
        for party in dict.fromkeys(job.group):
            own = local.preprocess.summary(job.stage) if party == me else bytes((yield Hear(party)))
            told.append((party, own))
        total = local.preprocess.merge(job.stage, told)
        for party in others:
            yield Say(party, total)
    else:
        yield Say(job.hub, local.preprocess.summary(job.stage))
        total = bytes((yield Hear(job.hub)))
    if me in job.group:
        local.preprocess.take(job.stage, total, job.hub)


def gather(job: Exchange, me: str, local: Local) -> Talk:
    """Give a stage's weights to a party that may put the whole model together: parameters and buffers, no more."""
    source, target = job.group
    if me == source:
        yield Say(target, pack(local.weights(job.stage, job.lanes[0])))
    elif me == target:
        local.gathered[job.stage] = unpack((yield Hear(source)), source)


def barrier(job: Exchange, me: str, _local: Local) -> Talk:
    """Wait until all members are here. Messages are empty."""
    for party in job.group:
        if me == job.hub and party != me:
            yield Hear(party)
    for party in job.group:
        if me == job.hub and party != me:
            yield Say(party, b"")
    if me != job.hub:
        yield Say(job.hub, b"")
        yield Hear(job.hub)


ExchangeFunction = Callable[[Exchange, str, Local], Talk]

EXCHANGES: Mapping[str, ExchangeFunction] = {
    "add_gradients": add_gradients,
    "add_metrics": add_metrics,
    "agree": agree,
    "barrier": barrier,
    "broadcast": broadcast,
    "gather": gather,
    "global_norm": global_norm,
    "hand_on": hand_on,
}


def _total(
    job: Exchange, me: str, own: Callable[[int], dict[str, Tensor]], lanes: Sequence[int]
) -> Generator[Say | Hear, Buffer, dict[str, Tensor]]:
    """Add what the `lanes` have of their `own` at the hub, in the order of lanes; others send an empty message."""
    total: dict[str, Tensor] = {}
    if me != job.hub:
        for lane, party in enumerate(job.group):
            if party == me:
                yield Say(job.hub, pack(own(lane)) if lane in lanes else b"")
        return unpack((yield Hear(job.hub)), job.hub)
    for lane, party in enumerate(job.group):
        heard = b"" if party == me else (yield Hear(party))
        if lane in lanes:
            _add(total, own(lane) if party == me else unpack(heard, party), _where(job, party))
    for party in dict.fromkeys(job.group):
        if party != me:
            yield Say(party, pack(total))
    return total


def _copy(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def _add(total: dict[str, Tensor], given: Mapping[str, Tensor], where: str) -> None:
    for name, tensor in given.items():
        if name not in total:
            total[name] = tensor.clone()
        elif total[name].shape != tensor.shape or total[name].dtype != tensor.dtype:
            raise ContractError(
                "replicas send tensors of different shapes",
                where=f"{where}, {name}",
                remedy="use the same module at all replicas of the stage",
                code="E524",
            )
        else:
            total[name] += tensor.to(total[name].device)


def _number(payload: Buffer, source: str) -> float:
    if memoryview(payload).nbytes != _NUMBER.size:
        raise ContractError(
            "a number was expected",
            where=f"from {source}",
            expected="8 bytes",
            remedy="install the same release of cutlayer at all parties",
            code="E523",
        )
    value: float = _NUMBER.unpack(payload)[0]
    if not 0.0 <= value < float("inf"):
        raise ContractError(
            "a squared norm is no finite number",
            where=f"from {source}",
            remedy="look at the sender's terminal: its gradients are NaN or infinite",
            code="E523",
        )
    return value


def _where(job: Exchange, source: str) -> str:
    return f"exchange {job.name} of {job.stage or 'all stages'}, from {source}"
