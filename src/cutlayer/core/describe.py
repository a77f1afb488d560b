"""The printed plan: what a privacy officer reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from cutlayer.core.crossing import answers_in
from cutlayer.core.graph import Edge, Graph
from cutlayer.core.parts import Loss, Shared, Stage
from cutlayer.core.readable import readable, treated

if TYPE_CHECKING:
    from cutlayer.core.plan import Plan

__all__ = ["agreed", "describe", "keeps", "size_of", "tells", "told_of", "what_of"]

_WHENS = {"start": "once", "step": "each step", "round": "each round", "finish": "at the end"}
_Pick = Callable[[str, str], bool]
_Flows = dict[tuple[str, str], dict[int, list[str]]]  # (what, size) -> lane -> peers


def describe(plan: Plan) -> str:
    """Return who holds what, what leaves each party, what never leaves, and how many bytes.

    Parties of which the same is true are described once.
    """
    graph, training = plan.graph, plan.training
    lanes = f"; {graph.lanes} lanes, {training.order}" if graph.lanes > 1 else ""
    lines = [
        f"plan {plan.name}: {len(plan.stages)} stages at {len(plan.parties)} parties, digest {plan.digest()[:16]}",
        f"  {training.epochs} epochs, batches of {training.batch_size} in {training.microbatches} microbatches, "
        f"schedule {training.schedule}{lanes}",
    ]
    groups: dict[tuple[str, ...], list[str]] = {}
    for party in plan.parties:
        groups.setdefault(tuple(_party(plan, graph, party)), []).append(party)
    for body, parties in groups.items():
        lines += [f"{', '.join(parties)}{' (each)' if len(parties) > 1 else ''}", *body]
    return "\n".join(lines)


def _party(plan: Plan, graph: Graph, party: str) -> list[str]:
    runs = [_stage(stage) for stage in plan.stages if party in stage.places]
    fields = _fields(graph, party)
    kept = keeps(plan, party)
    lines = [f"  runs    {', '.join(runs)}"]
    if fields:
        lines.append(f"  data    {', '.join(f'data.{name}' for name in fields)}")
    lines += [f"  sends   {text}" for text in _sends(plan, graph, party)] or ["  sends   nothing"]
    lines += [f"  gets    {text}" for text in _gets(plan, graph, party)]
    lines += [f"  tells   {text}" for text in tells(plan, party)]
    return [*lines, f"  keeps   {', '.join(kept) or 'nothing that the above does not name'}"]


def keeps(plan: Plan, party: str) -> list[str]:
    """Return what never leaves a party: "data.FIELD" for fields of its data, and "its weights".

    Of a field that is preprocessed together with others, "rows of data.FIELD (not ...)".
    """
    graph, told = plan.graph, {shared.field: told_of(shared) for shared in agreed(plan, party)}
    leaving = [edge for lane in range(graph.lanes) for edge in _values(graph, party, lane)]
    known = {edge.source.field for edge in leaving} | {one.field for one in readable(plan) if one.holder == party}
    kept = [
        f"rows of data.{name} (not {told[name]})" if name in told else f"data.{name}"
        for name in _fields(graph, party)
        if name not in known
    ]
    return kept if _shares_state(plan, party) or _gives_weights(plan, party) else [*kept, "its weights"]


def agreed(plan: Plan, party: str) -> list[Shared]:
    """Return the preprocessing for which a party tells others something of its data."""
    holders = [(shared, plan.graph.holders(shared.at)) for shared in plan.preprocessing]
    return [shared for shared, those in holders if party in those and len(those) > 1]


def told_of(shared: Shared) -> str:
    """Return what a party tells of a field for its preprocessing."""
    return "counts, means and deviations" if shared.kind == "scale" else "the list of values"


def tells(plan: Plan, party: str) -> list[str]:
    """Return what others can read of a party's data without being sent it."""
    readers: dict[str, dict[str, None]] = {}
    for one in readable(plan):
        if one.holder == party:
            where = f"the gradient at {one.edge.label}{treated(one.edge, 'down')}"
            allowed = " (declared release)" if one.declared else ""
            reason = one.through or "no stage of this party is between"
            why = (
                f"{f'what {one.made} makes of it' if one.made else 'it'} can be read from {where}, as {reason}{allowed}"
            )
            readers.setdefault(f"data.{one.field} to {{}}: {why}", {})[one.reader] = None
    return [text.format(_joined(list(peers), "and")) for text, peers in readers.items()]


def _fields(graph: Graph, party: str) -> list[str]:
    return sorted({name for lane in range(graph.lanes) for name in graph.data_fields(lane).get(party, ())})


def _stage(stage: Stage | Loss) -> str:
    kind = "loss " if isinstance(stage, Loss) and stage.name != "loss" else ""
    return f"{kind}{stage.name}{' (frozen)' if stage.frozen else ''}"


def _values(graph: Graph, party: str, lane: int) -> list[Edge]:
    return [e for e in graph.cuts(lane) if graph.origin(e, lane) == party and graph.carrier(e, lane) == e]


def _sends(plan: Plan, graph: Graph, party: str) -> list[str]:
    cuts = _flows(plan, graph, lambda sender, _receiver: sender == party)
    return [_line(what, "to", peers) for what, peers in cuts.items()] + _exchanges(plan, party) + _answers(plan, party)


def _gets(plan: Plan, graph: Graph, party: str) -> list[str]:
    cuts = _flows(plan, graph, lambda _sender, receiver: receiver == party)
    added = [
        f"{'sums behind the metrics' if isinstance(stage, Loss) else 'weight gradients'} of {stage.name} from each of "
        f"{', '.join(dict.fromkeys(stage.places))}, to add up"
        for stage in plan.stages
        if len(set(stage.places)) > 1
        and plan.hub_of(stage.name) == party
        and (isinstance(stage, Loss) or plan.training.order == "parallel")
    ]
    agreed = [
        f"{_told(shared)} from each of {', '.join(plan.graph.holders(shared.at))}, to put together"
        for shared in plan.preprocessing
        if plan.hub == party and len(plan.graph.holders(shared.at)) > 1
    ]
    lines = [_line(what, "from", peers) for what, peers in cuts.items()] + added + agreed
    return lines + _results(plan, party) + _answered(plan, party)


def _results(plan: Plan, party: str) -> list[str]:
    """Return what a party gets of exchanges: what others hand on, and what was put together elsewhere."""
    texts, training = list[str](), plan.training
    for stage in plan.stages:
        others, hub = [name for name in dict.fromkeys(stage.places) if name != party], plan.hub_of(stage.name)
        if party not in stage.places or not others:
            continue
        if isinstance(stage, Loss):
            texts += [f"sums over all samples behind the metrics of {stage.name} from {hub}"] if hub != party else []
        elif training.order == "relay":
            texts.append(f"all state of {stage.name} from another of {', '.join(dict.fromkeys(stage.places))}")
        else:
            texts += [f"the sum of all weight gradients of {stage.name} from {hub}"] if hub != party else []
            texts += [f"the state of {stage.name}, once, from {first}"] if (first := stage.places[0]) != party else []
    for shared in agreed(plan, party) if party != plan.hub else ():
        holders = _joined(list(plan.graph.holders(shared.at)), "and")
        texts.append(f"{_told(shared)}, of {holders} together, once, from {plan.hub}")
    if training.clip_norm is not None and training.clip == "global" and len(plan.parties) > 1:
        whose = f"from {plan.hub}, of all together" if party != plan.hub else "from each party"
        texts.append(f"one number a step, the squared norm of gradients, {whose}")
    for stage in plan.stages if party in plan.assemble_at else ():
        if not isinstance(stage, Loss) and party not in stage.places:
            texts.append(f"the weights of {stage.name} from {stage.places[0]}, at the end")
    lanes = [plan.graph.data_fields(lane) for lane in range(plan.lanes)]
    counted = {name for fields in lanes for name in fields} - {party}
    return [*texts, "the number of samples of each party that has data, once"] if counted else texts


def _flows(plan: Plan, graph: Graph, mine: _Pick) -> _Flows:
    """Return the values and gradients that a party sends or gets."""
    batch, found = plan.training.batch_size, _Flows()
    for lane in range(graph.lanes):
        for edge in graph.cuts(lane):
            origin, target = graph.origin(edge, lane), graph.place(edge.target, lane)
            if mine(origin, target) and graph.carrier(edge, lane) == edge:
                what = (what_of(edge), size_of(edge, "up", batch))
                _note(found, what, lane, target if mine(origin, "") else origin)
            if edge.trained and mine(target, origin):
                what = (f"gradient at {edge.label}{treated(edge, 'down')}", size_of(edge, "down", batch))
                _note(found, what, lane, origin if mine(target, "") else target)
    return found


def size_of(edge: Edge, direction: str, batch: int) -> str:
    """Return "SPEC, N bytes a batch" of what is on the wire; empty for a field that is not released."""
    spec = edge.wire(direction)
    return f"{spec}, {'at most ' if spec.free else ''}{spec.nbytes(batch):,} bytes a batch" if spec else ""


def _note(found: _Flows, key: tuple[str, str], lane: int, peer: str) -> None:
    peers = found.setdefault(key, {}).setdefault(lane, [])
    if peer not in peers:
        peers.append(peer)


def what_of(edge: Edge) -> str:
    """Return what the value of an edge is, and what is done to it before it leaves."""
    if edge.source.field:
        return f"RAW data.{edge.source.field} (declared release)"
    return f"activations of {edge.origin}{treated(edge, 'up')}"


def _line(what: tuple[str, str], word: str, peers: dict[int, list[str]]) -> str:
    """Name the peers: "s and t" get it both, "a, b or c" each in its lane."""
    lanes = [_joined(mine, "and") for mine in peers.values()]
    several = any(len(mine) > 1 for mine in peers.values())
    return f"{what[0]} {word} {_joined(list(dict.fromkeys(lanes)), 'or')}: {what[1]}{' each' if several else ''}"


def _joined(names: list[str], word: str) -> str:
    return f"{', '.join(names[:-1])} {word} {names[-1]}" if names[1:] else names[0]


def _exchanges(plan: Plan, party: str) -> list[str]:
    training, texts = plan.training, list[str]()
    replicas = [s for s in plan.stages if s.replicated and party in s.places and len(set(s.places)) > 1]
    for stage in replicas:
        others = f"another of {', '.join(dict.fromkeys(stage.places))}"
        if isinstance(stage, Loss):
            texts.append(
                f"sums over its samples behind the metrics of {stage.name}, by way of {plan.hub_of(stage.name)} "
                f"({_behind(training.metrics_least)})"
            )
        elif training.order == "relay":
            texts.append(f"all state of {stage.name} to {others}: at most {stage.state_limit:,} bytes a turn")
        else:
            limit = f"at most {stage.state_limit:,} bytes"
            texts.append(
                f"weight gradients of {stage.name}, by way of {plan.hub_of(stage.name)} to {others}: {limit} a step"
            )
            if party == stage.places[0]:
                rest = [name for name in dict.fromkeys(stage.places) if name != party]
                texts.append(f"its state of {stage.name}, once, to {_joined(rest, 'and')}: {limit}")
    for shared in agreed(plan, party):
        holders = ", ".join(plan.graph.holders(shared.at))
        texts.append(f"{_told(shared)}, once, by way of {plan.hub} to {holders}")
    texts += [
        f"{extra.says}, by exchange {extra.name} with {', '.join(p for p in extra.group if p != party)}: at most "
        f"{extra.messages} messages of {extra.limit:,} bytes, {_WHENS[extra.when]}"
        for extra in plan.exchanges
        if party in extra.group
    ]
    whole = [name for name in plan.assemble_at if name != party]
    for stage in plan.stages if whole else ():
        to, giver = ", ".join(name for name in whole if name not in stage.places), stage.places[0]
        if not isinstance(stage, Loss) and party in stage.places and to:
            way = "" if giver == party else f", which {giver} has as well, by way of {giver}"
            texts.append(f"its weights of {stage.name}{way} to {to}, at the end (it may put the whole model together)")
    if training.clip_norm is not None and training.clip == "global" and len(plan.parties) > 1:
        texts.append(f"one number a step, the squared norm of its gradients, by way of {plan.hub} (declared release)")
    if len(plan.parties) > 1 and any(party in plan.graph.data_fields(lane) for lane in range(plan.lanes)):
        texts.append("its number of samples, once, to all parties")
    return texts


def _answers(plan: Plan, party: str) -> list[str]:
    """Return what a party's clients get, where it serves: a line for each declared answer."""
    found = []
    for of, pairs in _answering(plan).items():
        clients = [client for server, client in pairs if server == party]
        if clients:
            what = f"outputs of {of}{_encoded(plan, of)}"
            found.append(f"{what} to {_joined(clients, 'or')}, only where {of} is served (declared answer)")
    return found


def _answered(plan: Plan, party: str) -> list[str]:
    return [
        f"outputs of {of}{_encoded(plan, of)} from {server}, only where {of} is served (declared answer)"
        for of, pairs in _answering(plan).items()
        for server, client in pairs
        if client == party
    ]


def _encoded(plan: Plan, of: str) -> str:
    """Return what is done to the outputs of a stage before they leave as an answer; empty: nothing."""
    made = {port: plan.graph.crossings.get(f"{of}.{port}" if port else of) for port in plan.graph.output_ports[of]}
    words = [f"{port} {one.words('up')}".strip() for port, one in made.items() if one is not None and one.words("up")]
    return f" ({'; '.join(words)})" if words else ""


def _answering(plan: Plan) -> dict[str, list[tuple[str, str]]]:
    """Return the stage of each answer -> the pairs of who sends and who gets it."""
    graph = plan.graph
    return {
        one.of: list(
            dict.fromkeys(
                (graph.place(one.of, lane), graph.place(one.to, lane) if one.to in graph.by_name else one.to)
                for lane in range(graph.lanes)
            )
        )
        for one in answers_in(plan.extras)
    }


def _gives_weights(plan: Plan, party: str) -> bool:
    own = [s for s in plan.stages if not isinstance(s, Loss) and s.places[0] == party]
    return any(target not in stage.places for stage in own for target in plan.assemble_at)


def _told(shared: Shared) -> str:
    """Return what a party tells of a field, and from how many of its samples at least."""
    few = {1: "also of one sample: then they are its values", 2: "also of two samples: then they tell both values"}
    if shared.kind == "scale":
        from_ = few.get(shared.least, f"each column of at least {shared.least} samples of a party")
        return f"{told_of(shared)} of data.{shared.field} ({from_})"
    rare = f"each in at least {shared.least} samples of a party" if shared.least > 1 else "also of one sample"
    return f"{told_of(shared)} of data.{shared.field} (at most {shared.limit:,}, {rare})"


def _behind(least: int) -> str:
    """Return over how many of a party's samples the sums behind metrics are at least, and what they tell."""
    return f"at least {least}: how many of each label, not whose" if least > 1 else "of one they tell its label"


def _shares_state(plan: Plan, party: str) -> bool:
    return any(s.replicated and party in s.places and len(set(s.places)) > 1 for s in plan.stages)
