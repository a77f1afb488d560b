"""`cutlayer plan` and `cutlayer check`: look at a run before it is one. Both send nothing."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from cutlayer.cli.console import Output, error_document, exit_code
from cutlayer.core.batching import StepSizes, microbatch_sizes
from cutlayer.core.compile import Roster, agenda, compile_plan
from cutlayer.core.plan import Plan
from cutlayer.core.schedules import grid as draw_grid
from cutlayer.core.schedules import schedule
from cutlayer.errors import ConfigError, CutlayerError
from cutlayer.run.config import Contract, load_contract

if TYPE_CHECKING:
    from cutlayer.run.preflight import Finding

__all__ = ["show_check", "show_plan"]


def show_plan(path: Path, output: Output, *, grid: bool, program: str, samples: int | None) -> None:
    """Print the plan, training and meeting, and on request the schedule of one step and one party's programs.

    As JSON, all that the digest is made of.
    """
    contract = load_contract(path)
    plan = contract.plan
    document: dict[str, Any] = {"digest": contract.digest(), **contract.document(), "text": str(plan)}
    output.say(str(plan))
    output.say(_rest(contract))
    if grid:
        document["grid"] = _grid(plan)
        output.say(f"\none step, {plan.training.schedule}\n{document['grid']}")
    if program:
        document["programs"] = _programs(plan, program, samples or plan.training.batch_size)
        output.say("\n" + "\n".join(document["programs"].values()))
    output.document(document)
    output.last(f"contract digest: {contract.digest()}")


def show_check(path: Path, party_files: Sequence[Path], output: Output) -> None:
    """Print every finding; exit with the code of the first failure. Each party's modules see one batch.

    A file that cannot be read is a finding like others. Without the contract, party files are read and no more.
    """
    rows, first = [], None
    contract, findings = _checked(path, party_files)
    for finding in findings:
        output.say(f"{finding.level:<4}  {finding.subject}: {finding.text}")
        if finding.do:
            output.say(f"      do: {finding.do}")
        error = error_document(finding.error) if finding.error else None
        row = {"level": finding.level, "subject": finding.subject, "text": finding.text, "do": finding.do}
        rows.append({**row, "error": error})
        if finding.error is not None:
            first = first or finding.error
            if output.verbose:
                traceback.print_exception(finding.error, file=sys.stderr)
            for line in finding.error.lines():
                typer.echo(f"      {line}", err=True)
    failures = sum(row["level"] == "fail" for row in rows)
    document = {"ok": not failures, "digest": contract.digest() if contract else None, "findings": rows}
    output.document(document if first is None else {**document, "error": error_document(first)})
    output.last("all is well; nothing was sent" if not failures else f"{failures} to correct; nothing was sent")
    if first is not None:
        raise typer.Exit(exit_code(first))


def _checked(path: Path, party_files: Sequence[Path]) -> tuple[Contract | None, Iterator[Finding]]:
    """Return the contract, None if it cannot be read, and what is found: first the files that cannot be read."""
    from cutlayer.run.partyfile import load_party_file
    from cutlayer.run.preflight import Finding, preflight

    unread, files = [], []
    contract = None
    try:
        contract = load_contract(path)
    except CutlayerError as error:
        unread.append(Finding("fail", "contract", error.what, error))
    for file in party_files:
        try:
            files.append(load_party_file(file))
        except CutlayerError as error:
            unread.append(Finding("fail", file.name, error.what, error))
    if contract is None:
        text = "the party file can be read; without the contract, its modules and data are not tried"
        return None, iter([*unread, *(Finding("ok", file.name, text) for file in files)])
    return contract, chain(unread, preflight(contract, files, now=datetime.now(UTC)))


def _rest(contract: Contract) -> str:
    """Return the training and how the parties meet: parts of the digest that the printed plan does not show."""
    addresses = ", ".join(f"{party} at {address}" for party, address in contract.addresses.items())
    deadlines = contract.document()["deadlines"].items()
    training = {
        name: "none" if value in (None, "") else value for name, value in asdict(contract.plan.training).items()
    }
    return "\n".join(
        [
            f"training: {', '.join(f'{name} {value}' for name, value in training.items())}",
            f"meet at {contract.coordinator}; addresses: {addresses}",
            f"deadlines: {', '.join(f'{name} {value:g} s' for name, value in deadlines)}",
        ]
    )


def _grid(plan: Plan) -> str:
    parts = microbatch_sizes(plan.training.batch_size, plan.training.microbatches)
    relay = plan.training.order == "relay"
    sizes: StepSizes = tuple(None if relay and lane else parts for lane in range(plan.lanes))
    return draw_grid(plan.graph, schedule(plan.graph, sizes, plan.training.schedule))


def _programs(plan: Plan, party: str, samples: int) -> dict[str, str]:
    """Return mode -> printed program of those modes that are run, if every data holder has `samples`."""
    if party not in plan.parties:
        raise ConfigError(
            f"{party!r} is no party of the plan",
            where="--program",
            expected=f"one of {', '.join(plan.parties)}",
            got=party,
            remedy="take one of the plan's parties",
            code="E205",
        )
    holders = {name for lane in range(plan.lanes) for name in plan.graph.data_fields(lane)}
    roster = Roster({mode: dict.fromkeys(holders, samples) for mode in ("train", "evaluate")})
    programs = compile_plan(plan, roster)[party]
    return {mode: str(programs[mode]) for mode in dict.fromkeys(mode for mode, _ in agenda(plan, roster))}
