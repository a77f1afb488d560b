"""Topologies are values: each function gives a `Plan`. A hand-written plan is their equal.

Configurations after Vepakomma et al. 2018, "Split learning for health" (arXiv 1812.00564). In all of them `spec`
texts are those of the values that cross, such as "float32[batch, 64]". Stage names: "head" is at the data, "body" in
the middle, "tail" before the loss. Keyword arguments beyond those named go to `Training`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cutlayer.core.parts import Loss, Release, Stage, Training
from cutlayer.core.plan import Plan

__all__ = ["extended_vanilla", "hybrid", "multihop", "multitask", "u_shaped", "vanilla", "vertical"]

Party = str | Sequence[str]


def vanilla(
    client: Party, server: str, *, cut: str, output: str, label: str = "int64[batch]", **training: object
) -> Plan:
    """Client: data and head. Server: body and loss; the client's labels are released to it."""
    stages: list[Stage | Loss] = [
        Stage("head", at=client, inputs=["data.x"], output=cut),
        Stage("body", at=server, inputs=["head"], output=output),
        Loss("loss", at=server, inputs=["body", "data.y@head"]),
    ]
    release = Release("y", at="head", to=server, spec=label)
    return Plan(stages, training=_training(training), releases=[release], name="vanilla")


def u_shaped(client: Party, server: str, *, cut: str, back: str, output: str, **training: object) -> Plan:
    """Client: data, labels, head, tail and loss. Server: body. No label leaves the client."""
    stages: list[Stage | Loss] = [
        Stage("head", at=client, inputs=["data.x"], output=cut),
        Stage("body", at=server, inputs=["head"], output=back),
        Stage("tail", at=client, inputs=["body"], output=output),
        Loss("loss", at=client, inputs=["tail", "data.y"]),
    ]
    return Plan(stages, training=_training(training), name="u-shaped")


def vertical(
    clients: Mapping[str, str], server: str, *, output: str, optional: Sequence[str] = (), **training: object
) -> Plan:
    """Several clients (party -> spec of its cut), each with a modality of the same people; the server holds labels.

    Those in `optional` miss some people: their data has a bool field "present", and their heads give the rows of those
    who are present, and who they are (see `cutlayer.models.Present`). The body takes both, in this order.
    """
    heads = [_head(party, spec, missing=party in optional) for party, spec in clients.items()]
    inputs = [f"{head.name}.{port}" if port else head.name for head in heads for port in head.ports]
    body = Stage("body", at=server, inputs=inputs, output=output)
    loss = Loss("loss", at=server, inputs=["body", "data.y"])
    return Plan([*heads, body, loss], training=_training(training), name="vertical")


def _head(party: str, spec: str, *, missing: bool) -> Stage:
    if not missing:
        return Stage(f"head-{party}", at=party, inputs=["data.x"], output=spec)
    output = {"rows": spec.replace("[batch", "[rows<=batch", 1), "present": "bool[batch]"}
    return Stage(f"head-{party}", at=party, inputs=["data.x", "data.present"], output=output)


def extended_vanilla(
    clients: Mapping[str, str], middle: str, server: str, *, cut: str, output: str, **training: object
) -> Plan:
    """Like vertical, but a further client processes the merged activations before the server does."""
    heads = [Stage(f"head-{p}", at=p, inputs=["data.x"], output=spec) for p, spec in clients.items()]
    merge = Stage("merge", at=middle, inputs=[head.name for head in heads], output=cut)
    body = Stage("body", at=server, inputs=["merge"], output=output)
    loss = Loss("loss", at=server, inputs=["body", "data.y"])
    return Plan([*heads, merge, body, loss], training=_training(training), name="extended-vanilla")


def multitask(clients: Mapping[str, str], servers: Mapping[str, str], **training: object) -> Plan:
    """Clients (party -> cut) feed several servers (party -> output), each with its own labels and loss."""
    heads = [Stage(f"head-{p}", at=p, inputs=["data.x"], output=spec) for p, spec in clients.items()]
    names = [head.name for head in heads]
    bodies = [Stage(f"body-{p}", at=p, inputs=names, output=spec) for p, spec in servers.items()]
    losses = [Loss(f"loss-{p}", at=p, inputs=[f"body-{p}", "data.y"]) for p in servers]
    return Plan([*heads, *bodies, *losses], training=_training(training), name="multitask")


def multihop(hops: Mapping[str, str], **training: object) -> Plan:
    """A chain of parties (party -> spec of its output): the first has the data, the last the labels and the loss."""
    parties = list(hops)
    inputs = ["data.x", *(f"hop-{party}" for party in parties)]
    stages = [
        Stage(f"hop-{p}", at=p, inputs=[source], output=hops[p]) for p, source in zip(parties, inputs, strict=False)
    ]
    loss = Loss("loss", at=parties[-1], inputs=[stages[-1].name, "data.y"])
    return Plan([*stages, loss], training=_training(training), name="multihop")


def hybrid(clients: Mapping[str, str], hops: Mapping[str, str], *, output: str, **training: object) -> Plan:
    """Vertical, multi-hop and U-shaped in one: heads meet at the first hop; tail and loss are at the first client."""
    owner, parties = next(iter(clients)), list(hops)
    heads = [Stage(f"head-{p}", at=p, inputs=["data.x"], output=spec) for p, spec in clients.items()]
    inputs = [[head.name for head in heads], *([f"hop-{p}"] for p in parties)]
    chain = [Stage(f"hop-{p}", at=p, inputs=i, output=hops[p]) for p, i in zip(parties, inputs, strict=False)]
    tail = Stage("tail", at=owner, inputs=[chain[-1].name], output=output)
    loss = Loss("loss", at=owner, inputs=["tail", "data.y"])
    return Plan([*heads, *chain, tail, loss], training=_training(training), name="hybrid")


def _training(settings: Mapping[str, object]) -> Training:
    return Training(**settings)  # type: ignore[arg-type]
