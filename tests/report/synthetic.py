"""Records of runs that never were: any plan, with the bytes that its closed form predicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

import cutlayer as cl
from cutlayer.core.compile import Roster, compile_plan
from cutlayer.core.cost import cut_flows
from cutlayer.core.program import Exchange
from cutlayer.report.record import Record, read_record

NAMES = ("north", "south", "east", "west", "up", "down", "left", "right")


def summary(plan: cl.Plan, *, known: Sequence[str] = (), samples: int = 24, **changes: Any) -> dict[str, Any]:
    """What `summary.json` of a run of this plan would hold; `known`: parties whose record this is."""
    known = known or plan.parties
    holders = {party for lane in range(plan.lanes) for party in plan.graph.data_fields(lane)}
    held = {"train": dict.fromkeys(sorted(holders), samples)}
    ledgers = {party: _ledger(plan, Roster(held), party) for party in known}
    history = [
        {
            "mode": "train",
            "round": number,
            "loss": stage.name,
            "lane": lane,
            "party": party,
            "metrics": {"loss": 1 / number},
        }
        for stage in plan.stages
        if isinstance(stage, cl.Loss)
        for lane, party in enumerate(stage.places)
        for number in (1, 2, 3)
        if party in known
    ]
    return {
        "version": 2,
        "plan": {"name": plan.name, "digest": plan.digest(), "document": plan.document()},
        "contract": "",
        "ended": "2026-01-02T03:04:05+00:00",
        "seconds": 2.5,
        "samples": held,
        "metrics": {"train": {"loss": {"loss": 1 / 3}}},
        "history": history,
        "cuts": [],
        "ledgers": ledgers,
        "processes": [{"parties": list(known), "seconds": 2.5, "memory": 300_000_000}],
        "parameters": {
            party: {"stages": {s.name: 1234 for s in plan.stages if party in s.places}, "total": 1234}
            for party in known
        },
        "weights_sha256": dict.fromkeys(known, "ab" * 32),
        "versions": {"cutlayer": "0.1.0"},
        **changes,
    }  # fmt: skip


def record(folder: Path, plan: cl.Plan, **settings: Any) -> Record:
    """Write the summary into a folder and read it back."""
    write(folder, summary(plan, **settings))
    return read_record(folder)


def write(folder: Path, document: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_bytes(msgspec.json.encode(document))


def _ledger(plan: cl.Plan, roster: Roster, party: str) -> dict[str, Any]:
    flows = []
    for flow in cut_flows(plan, roster):
        for way, me, peer in (("sent", flow.sender, flow.receiver), ("received", flow.receiver, flow.sender)):
            if me == party:
                row = {"way": way, "peer": peer, "mode": flow.mode, "direction": flow.direction, "edge": flow.edge}
                flows.append({**row, "payload": flow.payload, "framing": 40 * flow.messages, "messages": flow.messages})
    exchanges = {
        job.number: job
        for program in compile_plan(plan, roster)[party].values()
        for block in program.blocks
        for job in block.instructions
        if isinstance(job, Exchange)
    }
    for job in exchanges.values():
        for peer in dict.fromkeys(job.group):
            if peer != party and party in job.group and party in (job.group[0], job.hub, job.group[-1]):
                size = 0 if job.name == "barrier" else 5000 + job.number
                row = {"way": "sent", "peer": peer, "mode": "train", "direction": "exchange", "edge": job.number}
                flows.append({**row, "payload": size, "framing": 40, "messages": 1})
    return {
        "party": party,
        "flows": flows,
        "seconds": [{"kind": "forward", "stage": "", "seconds": 0.5}, {"kind": "wait", "stage": "", "seconds": 0.25}],
        "flops": [{"kind": "forward", "stage": "", "flops": 10**9}],
        "exchanges": [{"number": job.number, "name": job.name, "stage": job.stage} for job in exchanges.values()],
    }


def topologies() -> dict[str, cl.Plan]:
    """Every function of `core.topologies`, small and with eight parties."""
    wide, out = "float32[batch, 64, 16, 16]", "float32[batch, 10]"
    u = {"cut": wide, "back": out, "output": out}
    clients = dict.fromkeys(NAMES[:7], wide)
    plans = {
        "vanilla-1": cl.vanilla("north", "server", cut=wide, output=out),
        "vanilla-8": cl.vanilla(NAMES[:7], "server", cut=wide, output=out),
        "vanilla-copies": cl.vanilla(
            NAMES[:7], "server", cut=wide, output=out, order="parallel", clip_norm=1.0, clip="global"
        ),
        "u-shaped-1": cl.u_shaped("north", "server", **u),
        "u-shaped-8": cl.u_shaped(NAMES[:7], "server", **u),
        "u-shaped-parallel": cl.u_shaped(NAMES[:7], "server", **u, order="parallel"),
        "u-shaped-hub": cl.u_shaped(NAMES[:7], "server", **u, order="parallel", hub="server"),
        "vertical-2": cl.vertical({"north": wide}, "server", output=out),
        "vertical-8": cl.vertical(clients, "server", output=out),
        "extended-8": cl.extended_vanilla(dict.fromkeys(NAMES[:6], wide), "middle", "server", cut=wide, output=out),
        "multitask-1-7": cl.multitask({"north": wide}, {f"task-{n}": out for n in range(7)}),
        "multitask-4-4": cl.multitask(dict.fromkeys(NAMES[:4], wide), {f"task-{n}": out for n in range(4)}),
        "multitask-7-1": cl.multitask(clients, {"task": out}),
        **{f"multihop-{n}": cl.multihop(dict.fromkeys(NAMES[:n], wide)) for n in range(2, 9)},
        "hybrid-2-6": cl.hybrid(dict.fromkeys(NAMES[:2], wide), {f"hop-{n}": wide for n in range(6)}, output=out),
        "hybrid-5-3": cl.hybrid(dict.fromkeys(NAMES[:5], wide), {f"hop-{n}": wide for n in range(3)}, output=out),
        "hybrid-7-1": cl.hybrid(clients, {"hop": wide}, output=out),
    }
    return plans  # noqa: RET504 - a name for the table above
