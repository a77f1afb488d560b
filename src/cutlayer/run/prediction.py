"""Joint prediction: all parties run the plan's "predict" program with their trained stages. No labels, no gradients.

| code | error | meaning |
| --- | --- | --- |
| E225 | ConfigError | not exactly one party for a prediction over the network |
| E252 | DataError | no party has data to predict for |
"""

from __future__ import annotations

import csv
import io
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec
import safetensors.torch
import torch
from torch import Tensor, nn

from cutlayer.core.compile import Roster
from cutlayer.core.parts import Loss
from cutlayer.core.plan import Plan
from cutlayer.core.program import Mode, Program
from cutlayer.core.serving import Way, behind, served_plan, served_programs, server_of, ways_of
from cutlayer.engine.agree import Agreed, Entry
from cutlayer.engine.tensors import dtype_name
from cutlayer.engine.worker import Worker
from cutlayer.errors import ConfigError, DataError
from cutlayer.run.answers import left_out, named, serving_party
from cutlayer.run.chain import Chain
from cutlayer.run.checkpoint import write_atomic
from cutlayer.run.lock import own_folder
from cutlayer.run.meeting import telling
from cutlayer.run.outcome import Result
from cutlayer.run.party import Party, build, counts
from cutlayer.run.session import Task, take_part, take_part_over
from cutlayer.run.simulate import roster_of, run_phases
from cutlayer.run.trained import load_trained
from cutlayer.transport.network import Network
from cutlayer.transport.settings import NetworkSettings, check_settings

__all__ = [
    "SERVED",
    "WAIT",
    "agenda",
    "ask",
    "asking",
    "classes_of",
    "client_chain",
    "dialled",
    "idle",
    "pairs",
    "predict",
    "predict_here",
    "predict_with_others",
    "predicting",
    "rows_of",
    "write_predictions",
]

Notify = Callable[[str, Mapping[str, Any]], None]
Programs = Callable[[Plan, Roster], Mapping[str, Mapping[Mode, Program]]]
_TASK: Final = " (prediction)"  # behind the run's name: a training and a prediction of one plan do not meet
SERVED: Final = " (served)"
"""Stands behind the run's name where a stage is served: who predicts with all parties does not meet it."""
WAIT: Final = 15.0
"""Seconds that a prediction waits for a lost party, unless told: nobody can resume it, so nobody sits by it."""
_COLUMNS_MAX: Final = 64  # values a sample of an output that is written to predictions.csv too


def predict(
    plan: Plan,
    parties: Party | Sequence[Party],
    *,
    weights: str | Path | None = None,
    network: NetworkSettings | None = None,
    served: bool = False,
    notify: Notify | None = None,
    wait: float = WAIT,
) -> dict[str, Tensor]:
    """Return the outputs that feed the losses, for the parties' `prediction` data, in its order.

    Give all parties to predict in this process, or one party and a `network` to predict with others that run in
    processes of their own. Labels are not needed, and stages stay as they are: it takes no gradients, and computes in
    evaluation mode. In this process modules have their own modes again afterwards.

    Args:
        plan: The plan, the same at all parties.
        parties: All of the plan's parties, or, with `network`, this one.
        weights: Folder that a run has left; each party here reads `<party>.safetensors` in it. None: the modules are
            used as they are.
        network: Addresses, certificates and deadlines of this party.
        served: Over the network: ask a server that runs `cutlayer serve`, alone; see `ask`.
        notify: Called with events as the prediction goes on; output only.
        wait: Over the network: seconds that a lost party has to come back, and in which a server that serves must
            answer at first. It stands for `patience` of the network's deadlines; with `served`, for `join` too.

    Returns:
        Stage (or "stage.port") -> tensor of shape (samples, ...), lane after lane. Over the network, those that this
        party computes: nobody else sees them.

    Raises:
        CheckpointError: E811, E812, the weights cannot be read, or are not those of the stages.
        DataError: no party has data to predict for, or it does not fit.
        CutlayerError: as `simulate` and `join` raise.
    """
    alone = [parties] if isinstance(parties, Party) else list(parties)
    if network is None and not served:
        return dict(predict_here(plan, alone, weights=weights, notify=notify).predictions)
    if network is None or len(alone) != 1:
        raise ConfigError(
            "over the network a process predicts as one party",
            where=f"prediction of the plan {plan.name}",
            expected="one Party, and its network",
            got=f"{len(alone)}, and {'no network' if network is None else 'a network'}",
            remedy="give this process's party; the others run where they are",
            code="E225",
        )
    way = ask if served else predict_with_others
    return dict(way(plan, alone[0], network=network, weights=weights, notify=notify, wait=wait).predictions)


def predict_here(
    plan: Plan, parties: Sequence[Party], *, weights: str | Path | None = None, notify: Notify | None = None
) -> Result:
    """Predict with all parties in this process; see `predict`. The parties' modules keep their modes."""
    parties = [idle(party) for party in parties]
    roster = roster_of(parties)
    with _modes_kept(parties):
        return run_phases(plan, parties, roster, agenda(plan, roster), notify=notify, prepare=_prepare(weights))


@contextmanager
def _modes_kept(parties: Sequence[Party]) -> Iterator[None]:
    """Give each module within the parties' modules its mode back, training or evaluation."""
    given = [one for party in parties for one in party.modules.values() if isinstance(one, nn.Module)]
    modes = [(module, module.training) for one in given for module in one.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def predict_with_others(
    plan: Plan,
    party: Party,
    *,
    network: NetworkSettings,
    weights: str | Path | None = None,
    notify: Notify | None = None,
    wait: float = WAIT,
) -> Result:
    """Predict as one party; see `predict`. The others are told how many samples it predicts for, and nothing else."""
    party = idle(party)
    if party.seed is None:  # drawn once: after a restart the same value leaves with the same noise
        party = replace(party, seed=secrets.randbits(63))
    settings = predicting(network, wait)
    with telling(settings, f"party {party.name!r}"):
        task = Task(agenda, counts(party), prepare=_prepare(weights))
    return take_part(plan, party, task, network=settings, notify=notify)


def predicting(network: NetworkSettings, wait: float) -> NetworkSettings:
    """Return the settings of a party that predicts with all others."""
    deadlines = replace(network.deadlines, patience=wait)
    return replace(network, run=network.run + _TASK, task="prediction", deadlines=deadlines)


def ask(
    plan: Plan,
    party: Party,
    *,
    network: NetworkSettings,
    weights: str | Path | None = None,
    notify: Notify | None = None,
    wait: float = WAIT,
) -> Result:
    """Predict as a client of served stages; see `cutlayer.serve`.

    Only this party and the servers take part. A server is told how many samples there are, and gets what the plan's
    cuts give it; nobody else gets anything. The party is a role: several identities may play it, each with a
    certificate in its own name and the role's weights. They are read, and checked, before anything is dialled.

    Raises:
        CheckpointError: E811, E812, the weights cannot be read, or are not those of the stages.
        ProgramError: E453, E454, the plan's predictions cannot be served, or this party is no client.
        LinkError: E612 to E615, a server does not let this identity in now: `core.gate.retry_after` says when.
        PeerError: E702, a server did not answer within `wait` seconds; E701, it was lost, and for so long.
        CutlayerError: as `join` raises.
    """
    servers, tell = asking(plan, party.name, network, wait), notify or _silent
    served, party = served_plan(plan), replace(idle(serving_party(plan, party)), seed=secrets.randbits(63))  # new noise
    site = build(served, replace(party, prediction=None), Roster({})).site
    if weights is not None:
        load_trained(site, weights, left_out(plan))
    chain = client_chain(plan, party.name, servers, tell)
    programs: Programs = partial(served_programs, parties=chain.way.parties)
    task = Task(agenda, counts(party), build=partial(build, site=site), programs=programs, trains=False)
    result = take_part_over(chain, served, party, task, tell)
    return replace(result, predictions=named(plan, result.predictions))


def asking(plan: Plan, party: str, network: NetworkSettings, wait: float) -> dict[str, NetworkSettings]:
    """Return the settings of a client with each server that it asks: of the pair that it is with it.

    Raises:
        ProgramError: E453, E454, the plan's predictions cannot be served, or this party is no client.
        ConfigError: E211 to E214, the settings cannot work; a server has no address.
    """
    server_of(plan, party)
    return pairs(ways_of(plan), party, network, wait)


def pairs(ways: Sequence[Way], party: str, network: NetworkSettings, wait: float) -> dict[str, NetworkSettings]:
    """Return server -> settings of the pair with it, for each that a party asks. Raises `ConfigError` as `asking`."""
    found: dict[str, NetworkSettings] = {}
    for server in dict.fromkeys(server for way in ways for server in way.asked_by(party)):
        found[server] = replace(
            network,
            parties=(server, party),
            coordinator=server,
            addresses={name: address for name, address in network.addresses.items() if name == server},
            listen="",
            run=network.run + SERVED,
            task="served",
            behind=behind(ways, server, party),
            deadlines=replace(network.deadlines, join=wait, patience=wait),
            identity=network.credentials.party if network.credentials is not None else "",
        )
        check_settings(found[server])
    return found


def client_chain(plan: Plan, party: str, servers: Mapping[str, NetworkSettings], notify: Notify) -> Chain:
    """Return a client's links with all servers that it asks, which are dialled when they are needed."""
    return Chain(ways_of(plan), party, partial(dialled, servers, notify))


def dialled(servers: Mapping[str, NetworkSettings], notify: Notify, server: str, alarm: Callable[[], None]) -> Network:
    """Open the network with a server; `alarm` is called if it fails."""

    def tell(event: str, facts: Mapping[str, Any]) -> None:
        if event == "aborted":
            alarm()  # first: the other servers are told whatever becomes of `notify`
        notify(event, facts)

    return Network(servers[server], tell).__enter__()


def _silent(_event: str, _facts: Mapping[str, Any]) -> None:
    pass


def idle(party: Party) -> Party:
    """Return the party without what only training needs: data with labels, optimizer, metrics."""
    return replace(party, data=None, evaluation=None, optimizer=_untrained, scheduler=None, metrics={})


def classes_of(plan: Plan, agreed: Mapping[str, Mapping[str, Agreed]]) -> dict[str, tuple[Entry, ...]]:
    """Return output -> its classes in the order of its values, where the label of its loss has a list of classes.

    `agreed` is party -> field -> what it agreed on in training (`Result.agreed`). Holders of a label know its list.
    """
    lists = {field: one.values for held in agreed.values() for field, one in held.items() if one.kind == "classes"}
    found: dict[str, tuple[Entry, ...]] = {}
    for loss in plan.stages:
        if isinstance(loss, Loss):
            field = loss.inputs[-1].removeprefix("data.").partition("@")[0]
            if loss.inputs[-1].startswith("data.") and field in lists:
                found.setdefault(loss.inputs[0], lists[field])
    return found


def rows_of(plan: Plan, samples: Mapping[str, int]) -> list[tuple[str, int]]:
    """Return whose samples the rows of an output are, in order: (the first data holder of a lane, its samples)."""
    firsts = [next(iter(plan.graph.data_fields(lane)), "") for lane in range(plan.lanes)]
    return [(party, samples[party]) for party in firsts if samples.get(party)]


def write_predictions(
    folder: Path,
    predictions: Mapping[str, Tensor],
    classes: Mapping[str, Sequence[Entry]] | None = None,
    rows: Sequence[tuple[str, int]] = (),
) -> dict[str, Any]:
    """Write outputs to `predictions.safetensors`, and small ones to `predictions.csv` too.

    An output of at most 64 values a sample is small; a row of the CSV is a sample, in the order of the data, and a
    column is called "stage", or "stage.0", "stage.1"... Nothing is written if there are none.

    `rows` are as of `rows_of`: with several, a column "party" says whose sample it is, counted from 0 at each.
    `classes` is output -> its classes, in the order of its values. For an output of shape (samples, classes), a further
    column "stage.class" holds the one with the largest value.

    Returns:
        Output -> its dtype, shape and, if known, classes, as plain values.
    """
    classes = classes or {}
    if not predictions:
        return {}
    own_folder(folder)
    held = {name: value.detach().cpu().contiguous() for name, value in predictions.items()}
    write_atomic(folder / "predictions.safetensors", safetensors.torch.save(held))
    lists = {
        name: list(classes[name]) for name, value in held.items() if value.shape[1:] == (len(classes.get(name, ())),)
    }
    table = _table({name: value for name, value in held.items() if value[:1].numel() <= _COLUMNS_MAX}, lists, rows)
    if table:
        write_atomic(folder / "predictions.csv", table.encode())
    document = {
        name: {
            "dtype": dtype_name(value.dtype),
            "shape": list(value.shape),
            **({"classes": lists[name]} if name in lists else {}),
        }
        for name, value in held.items()
    }
    told = {"outputs": document, **({"samples": dict(rows)} if rows else {})}
    write_atomic(folder / "prediction.json", msgspec.json.format(msgspec.json.encode(told), indent=2))
    return document


def _table(
    outputs: Mapping[str, Tensor], classes: Mapping[str, Sequence[Entry]], rows: Sequence[tuple[str, int]]
) -> str:
    """Return outputs as CSV; numbers are written so that reading them gives the same bits."""
    lengths = {len(value) for value in outputs.values()}
    if len(lengths) != 1:
        return ""  # nothing is small, or the outputs are of different samples
    places = [(party, str(place)) for party, size in rows for place in range(size)]
    header, columns = ["sample"], [[str(place) for place in range(*lengths)]]
    if len(rows) > 1 and {len(places)} == lengths:
        header, columns = ["party", "sample"], [list(column) for column in zip(*places, strict=True)]
    for name, value in outputs.items():
        flat = value.flatten(1) if value.ndim > 1 else value[:, None]
        exact = flat.float() if flat.dtype in (torch.bfloat16, torch.float16) else flat
        columns += exact.numpy().astype(str).T.tolist()
        header += [name] if flat.shape[1] == 1 else [f"{name}.{place}" for place in range(flat.shape[1])]
        if name in classes:
            columns.append([str(classes[name][place]) for place in flat.argmax(1).tolist()])
            header.append(f"{name}.class")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(zip(*columns, strict=True))
    return text.getvalue()


def agenda(plan: Plan, roster: Roster) -> list[tuple[Mode, int]]:
    """Return what a prediction runs. Raises `DataError` E252 if nobody has data to predict for."""
    if not any(roster.samples.get("predict", {}).values()):
        raise DataError(
            "no party has data to predict for",
            where=f"plan {plan.name!r}, prediction of {', '.join(plan.graph.data_holders)}",
            remedy="give the parties Party(prediction=...)",
            code="E252",
        )
    return [("predict", 0)]


def _prepare(weights: str | Path | None) -> Callable[[Worker], None]:
    def prepare(worker: Worker) -> None:
        if weights is not None:
            load_trained(worker.site, weights)

    return prepare


def _untrained(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.0)
