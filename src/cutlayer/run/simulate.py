"""All parties of a plan in one process: the same programs, bits and bytes as over a network."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cutlayer.core.compile import Roster, agenda, compile_plan
from cutlayer.core.plan import Plan
from cutlayer.core.program import Mode
from cutlayer.engine.party import Cursor, Do, EndStep, fulfil, interpret
from cutlayer.engine.worker import Worker
from cutlayer.errors import ConfigError, DataError
from cutlayer.run.outcome import Result, history_rows
from cutlayer.run.party import Party, build, counts
from cutlayer.transport.local import run_together

__all__ = ["Result", "check_optimizers", "check_parties", "gathered", "handler", "roster_of", "run_phases", "simulate"]

Notify = Callable[[str, Mapping[str, Any]], None]


def roster_of(parties: Sequence[Party]) -> Roster:
    """Return how many samples each party holds, by mode."""
    samples: dict[str, dict[str, int]] = {}
    for party in parties:
        for mode, count in counts(party).items():
            samples.setdefault(mode, {})[party.name] = count
    return Roster(samples)


def simulate(plan: Plan, parties: Party | Sequence[Party], *, notify: Notify | None = None) -> Result:
    """Train and evaluate a plan with all parties in this process.

    Uses as many torch threads as the caller has set; the bits are those of separate processes if both use as many.

    Args:
        plan: The plan.
        parties: One `Party` for each of the plan's, as a list. Their modules are trained in place.
        notify: Called as `notify("step" | "round", details)` as the run goes on; output only.

    Raises:
        ConfigError, DataError, PlanError: parties do not fit the plan.
        StageError, NonFiniteError: a module failed, or a value is not finite.
    """
    parties = [parties] if isinstance(parties, Party) else list(parties)
    check_parties(plan, parties)
    roster = roster_of(parties)
    return run_phases(plan, parties, roster, agenda(plan, roster), notify=notify)


def run_phases(
    plan: Plan,
    parties: Sequence[Party],
    roster: Roster,
    phases: Sequence[tuple[Mode, int]],
    *,
    notify: Notify | None = None,
    prepare: Callable[[Worker], None] | None = None,
) -> Result:
    """Run modes and rounds with all parties in this process; `prepare` is called with each worker before.

    Raises what `simulate` raises.
    """
    check_parties(plan, parties)
    programs = compile_plan(plan, roster)
    workers = {party.name: build(plan, party, roster) for party in parties}
    check_optimizers(workers)
    if prepare is not None:
        for worker in workers.values():
            prepare(worker)
    begin = time.perf_counter()
    for mode, number in phases:
        for worker in workers.values():
            worker.begin(mode, number)
        cursor = Cursor(round=number)
        talks = {name: interpret(programs[name][mode], cursor, worker) for name, worker in workers.items()}
        run_together(talks, handler(workers, mode, number, notify))
        if notify:
            rows = [row for row in history_rows(workers) if (row["mode"], row["round"]) == (mode, number)]
            notify("round", {"mode": mode, "round": number, "history": rows})
    return Result(
        plan=plan,
        history=history_rows(workers),
        ledgers={name: worker.ledger for name, worker in workers.items()},
        workers=workers,
        predictions=gathered(workers),
        seconds=time.perf_counter() - begin,
        samples=roster.samples,
    )


def handler(
    workers: Mapping[str, Worker], mode: Mode, number: int, notify: Notify | None
) -> Callable[[str, Do | EndStep], object]:
    """Return a function that fulfils the instructions of these workers in one round."""

    def handle(party: str, effect: Do | EndStep) -> object:
        if isinstance(effect, Do):
            return fulfil(workers[party], effect, time.perf_counter)
        workers[party].end_step()
        if notify:
            moved = workers[party].ledger.close_step()
            notify("step", {"party": party, "mode": mode, "round": number, "step": effect.step, **moved})
        else:
            workers[party].ledger.close_step()
        return None

    return handle


def gathered(workers: Mapping[str, Worker]) -> dict[str, Tensor]:
    """Return what a prediction gave at these parties: stage (or stage.port) -> (samples, ...), lane after lane.

    Raises:
        DataError: E260, batches gave outputs of different lengths.
    """
    lanes: dict[tuple[str, int], list[Tensor]] = {}
    for worker in workers.values():
        lanes |= worker.predictions
    stages: dict[str, list[Tensor]] = {}
    for stage, lane in sorted(lanes):
        stages.setdefault(stage, []).extend(lanes[stage, lane])
    for stage, parts in stages.items():
        shapes = sorted({tuple(part.shape[1:]) for part in parts})
        if len(shapes) > 1:
            raise DataError(
                f"the output {stage!r} has another shape in each batch",
                where=f"prediction, output {stage}",
                expected="outputs of one shape a sample, so that all of them are one tensor",
                got=", ".join(str(list(shape)) for shape in shapes[:4]),
                remedy="pad the data to one length, or predict the samples of each length by a call of their own",
                code="E260",
            )
    return {stage: torch.cat(parts) for stage, parts in stages.items()}


def check_parties(plan: Plan, parties: Sequence[Party]) -> None:
    """Raise `ConfigError` unless the parties given are those of the plan."""
    names = [party.name for party in parties]
    if sorted(names) != sorted(plan.parties):
        raise ConfigError(
            "the parties given are not those of the plan",
            where=f"plan {plan.name}",
            expected=", ".join(plan.parties),
            got=", ".join(names),
            remedy="give exactly one Party for each; a party without a stage has no place in a plan",
            code="E225",
        )
    owners: dict[int, str] = {}
    for party in parties:
        for stage, module in party.modules.items():
            for parameter in module.parameters() if isinstance(module, nn.Module) else ():
                owner = owners.setdefault(id(parameter), party.name)
                if owner != party.name:
                    raise ConfigError(
                        f"{owner!r} and {party.name!r} share one module object at stage {stage!r}",
                        where=f"stage {stage}, at {owner} and {party.name}",
                        expected="a module of its own for each party, as in separate processes",
                        remedy="call the function that makes the module once for each party, or copy.deepcopy it",
                        code="E226",
                    )


def check_optimizers(workers: Mapping[str, Worker]) -> None:
    """Raise `ConfigError` E221 where an optimizer steps the parameters of another party."""
    for name, worker in workers.items():
        for bundle in worker.site.bundles.values():
            for other, owner in workers.items():
                if name != other and any(bundle.holds(one.parameters) for one in owner.site.bundles.values()):
                    raise ConfigError(
                        f"the optimizer of party {name!r} holds parameters of {other!r}",
                        where=f"party {name}, optimizer",
                        expected="an optimizer over the parameters that its function is called with",
                        got="others as well: each party's optimizer would step them, in the midst of their gradients",
                        remedy="take the argument: lambda parameters: torch.optim.Adam(parameters, lr=1e-3)",
                        code="E221",
                    )
