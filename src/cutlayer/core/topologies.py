"""Topologies are values: each function gives a `Plan`. A hand-written plan is their equal.

Configurations after Vepakomma et al. 2018, "Split learning for health" (arXiv 1812.00564). In all of them `spec`
texts are those of the values that cross, such as "float32[batch, 64]". Stage names: "head" is at the data, "body" in
the middle, "tail" before the loss. Keyword arguments beyond those named go to `Training`, but for `training` and
`preprocessing`, which are those of `Plan`: a sequence of `Shared`, such as `[Shared("x", at="head-clinic")]`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cutlayer.core.parts import Loss, Release, Stage
from cutlayer.core.plan import Plan, settings
from cutlayer.core.spec import TensorSpec
from cutlayer.errors import PlanError

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
    return Plan(stages, **settings(training), releases=[release], name="vanilla")


def u_shaped(client: Party, server: str, *, cut: str, back: str, output: str, **training: object) -> Plan:
    """Client: data, labels, head, tail and loss. Server: body. No label leaves the client."""
    stages: list[Stage | Loss] = [
        Stage("head", at=client, inputs=["data.x"], output=cut),
        Stage("body", at=server, inputs=["head"], output=back),
        Stage("tail", at=client, inputs=["body"], output=output),
        Loss("loss", at=client, inputs=["tail", "data.y"]),
    ]
    return Plan(stages, **settings(training), name="u-shaped")


def vertical(
    clients: Mapping[str, str],
    server: str,
    *,
    output: str,
    optional: Sequence[str] = (),
    absent: Sequence[str] = (),
    **training: object,
) -> Plan:
    """Several clients (party -> spec of its cut), each with a modality of the same people; the server holds labels.

    Those in `optional` miss some people; see `_heads`. Those of them in `absent` take no part, for a prediction: their
    heads, at the server, say that nobody is present (`cutlayer.models.rows.Absent`).
    """
    heads, inputs = _heads(clients, optional, absent, server)
    body = Stage("body", at=server, inputs=inputs, output=output)
    loss = Loss("loss", at=server, inputs=["body", "data.y"])
    return Plan([*heads, body, loss], **settings(training), name="vertical")


def extended_vanilla(
    clients: Mapping[str, str],
    middle: str,
    server: str,
    *,
    cut: str,
    output: str,
    optional: Sequence[str] = (),
    **training: object,
) -> Plan:
    """Like vertical, but a further client processes the merged activations before the server does."""
    heads, inputs = _heads(clients, optional)
    merge = Stage("merge", at=middle, inputs=inputs, output=cut)
    body = Stage("body", at=server, inputs=["merge"], output=output)
    loss = Loss("loss", at=server, inputs=["body", "data.y"])
    return Plan([*heads, merge, body, loss], **settings(training), name="extended-vanilla")


def multitask(
    clients: Mapping[str, str], servers: Mapping[str, str], *, optional: Sequence[str] = (), **training: object
) -> Plan:
    """Clients (party -> cut) feed several servers (party -> output), each with its own labels and loss."""
    heads, inputs = _heads(clients, optional)
    bodies = [Stage(f"body-{p}", at=p, inputs=inputs, output=spec) for p, spec in servers.items()]
    losses = [Loss(f"loss-{p}", at=p, inputs=[f"body-{p}", "data.y"]) for p in servers]
    return Plan([*heads, *bodies, *losses], **settings(training), name="multitask")


def multihop(hops: Mapping[str, str], **training: object) -> Plan:
    """A chain of parties (party -> spec of its output): the first has the data, the last the labels and the loss."""
    parties = list(hops)
    inputs = ["data.x", *(f"hop-{party}" for party in parties)]
    stages = [
        Stage(f"hop-{p}", at=p, inputs=[source], output=hops[p]) for p, source in zip(parties, inputs, strict=False)
    ]
    loss = Loss("loss", at=parties[-1], inputs=[stages[-1].name, "data.y"])
    return Plan([*stages, loss], **settings(training), name="multihop")


def hybrid(
    clients: Mapping[str, str],
    hops: Mapping[str, str],
    *,
    output: str,
    optional: Sequence[str] = (),
    **training: object,
) -> Plan:
    """Vertical, multi-hop and U-shaped in one: heads meet at the first hop; tail and loss are at the first client."""
    heads, merged = _heads(clients, optional)
    owner, parties = next(iter(clients)), list(hops)
    inputs = [merged, *([f"hop-{p}"] for p in parties)]
    chain = [Stage(f"hop-{p}", at=p, inputs=i, output=hops[p]) for p, i in zip(parties, inputs, strict=False)]
    tail = Stage("tail", at=owner, inputs=[chain[-1].name], output=output)
    loss = Loss("loss", at=owner, inputs=["tail", "data.y"])
    return Plan([*heads, *chain, tail, loss], **settings(training), name="hybrid")


def _heads(
    clients: Mapping[str, str], optional: Sequence[str], absent: Sequence[str] = (), server: str = ""
) -> tuple[list[Stage], list[str]]:
    """Return the heads of vertical parties, and what the stage that merges them takes, in the order of the clients.

    Those in `optional` miss some people: their data has a bool field "present", and their heads give the rows of those
    who are present, and who they are (see `cutlayer.models.rows.Present`). The merging stage takes both.
    """
    _check_missing(clients, optional, absent)
    heads: list[Stage] = []
    for party, spec in clients.items():
        here = Stage(f"head-{party}", at=party, inputs=["data.x"], output=spec)
        if party in optional:
            rows = TensorSpec.parse(spec)
            rows = TensorSpec(rows.dtype, tuple("rows<=batch" if dim == "batch" else dim for dim in rows.shape))
            ports = {"rows": rows, "present": TensorSpec("bool", ("batch",))}
            here = Stage(here.name, at=party, inputs=["data.x", "data.present"], output=ports)
        heads.append(here)
    inputs = [f"{head.name}.{port}" if port else head.name for head in heads for port in head.ports]
    first = next(text for text in inputs if text.partition(".")[0][len("head-") :] not in absent)
    counted = [first.replace(".rows", ".present")]  # one entry for each person of the batch
    gone = [f"head-{party}" for party in absent]
    return [
        Stage(h.name, at=server, inputs=counted, output=h.ports, frozen=True) if h.name in gone else h for h in heads
    ], inputs


def _check_missing(clients: Mapping[str, str], optional: Sequence[str], absent: Sequence[str]) -> None:
    for what, names, known in (("optional", optional, tuple(clients)), ("absent", absent, tuple(optional))):
        wrong = [name for name in ([names] if isinstance(names, str) else names) if name not in known]
        if wrong or isinstance(names, str) or (len(set(names)) == len(clients) and what == "absent"):
            raise PlanError(
                f"the parties in {what!r} are not those that may miss people",
                where=f"{what}=...",
                expected=f"a list of {', '.join(known) or 'none'}" + (", not of all" if what == "absent" else ""),
                got=repr(names) if isinstance(names, str) else ", ".join(wrong or names),
                remedy="name them as in `clients`; a party that is absent must be optional, and one must be there",
                code="E113",
            )
