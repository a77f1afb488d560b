"""`cutlayer run`, `join` and `resume`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from cutlayer.cli.console import Output, shown_path
from cutlayer.cli.processes import run_processes
from cutlayer.cli.progress import RunProgress
from cutlayer.cli.report import loggers, shown_page, written_page
from cutlayer.core.compile import compile_plan
from cutlayer.core.readable import READABLE_REMEDY, warnings_of
from cutlayer.errors import ConfigError
from cutlayer.run.config import Contract, dump_contract, parse_contract
from cutlayer.run.launch import (
    NOTES,
    LaunchRecord,
    accept,
    begin_run,
    checked_network,
    has_checkpoint,
    leaving,
    network_settings,
    no_checkpoints,
    read_run,
)
from cutlayer.run.lock import locked
from cutlayer.run.partyfile import PartyFile, load_party_file
from cutlayer.run.tables import read_text

if TYPE_CHECKING:
    from cutlayer.run.outcome import Result
    from cutlayer.run.party import Party
    from cutlayer.transport.settings import NetworkSettings

__all__ = ["both", "built", "check_names", "consent", "interactive", "join_run", "resume_run", "run_here"]

Notify = Callable[[str, Mapping[str, Any]], None]
Kind = Literal["join", "processes", "simulate"]


def run_here(path: Path, party_files: Sequence[Path], folder: Path | None, output: Output, *, processes: bool) -> None:
    """Run all parties here: in this process, or each in one of its own."""
    text = read_text(path)
    contract = parse_contract(text, where=str(path))
    text = dump_contract(contract)  # with all defaults in it
    files = [load_party_file(file) for file in party_files]
    check_names(contract, files)
    _warn(contract, output)
    from cutlayer.run.results import results_folder

    kind: Kind = "processes" if processes else "simulate"
    with results_folder(folder, Path("runs"), contract.plan.name, notes=() if processes else NOTES) as home:
        _begin(home, contract, text, files, kind)
        if _finished(home, output):
            return
        output.note(f"run folder: {shown_path(home)}")
        if processes:
            try:
                summary, document = run_processes(contract, files, home, output)
            except KeyboardInterrupt:
                output.note(f"to go on: cutlayer resume {shown_path(home)}")
                raise
        else:
            summary, document = _simulate(contract, text, files, home, output)
        _finish(summary, document, home, output)


def join_run(path: Path, party_file: Path, folder: Path | None, output: Output, *, accepted: str) -> None:
    """Join a run as one party, once this site has accepted the contract."""
    text = read_text(path)
    contract, file = parse_contract(text, where=str(path)), load_party_file(party_file)
    text = dump_contract(contract)  # with all defaults in it
    network = checked_network(contract, file)  # what is wrong is said before anybody is asked anything
    again = folder is not None and has_checkpoint(folder)  # then the others may run, and wait for this party
    party, own = built(file, network if accept(contract, file, accepted) and not again else None)
    _warn(contract, output)
    what = leaving(contract.plan, party.name, own)
    consent(contract, file, output, accepted, f"{what.text}\n  epoch   {what.summary()}")
    from cutlayer.run.meeting import telling
    from cutlayer.run.results import results_folder

    with ExitStack() as opened:
        with nullcontext() if again else telling(network, f"party {file.name!r}"):
            home = opened.enter_context(results_folder(folder, file.folder, contract.plan.name))
            _begin(home, contract, text, [file], "join")
        if not _finished(home, output):
            _join(contract, text, file, party, home, output)


def resume_run(folder: Path, output: Output) -> None:
    """Go on with the run of a folder; one that is finished stays as it is."""
    contract, text, record = read_run(folder)
    if _finished(folder, output):
        return
    if record.kind == "simulate":
        raise no_checkpoints(folder)
    files = [load_party_file(Path(file)) for file in record.party_files]
    with locked(folder):
        if record.kind == "join":
            _join(contract, text, files[0], files[0].party(), folder, output)
        else:
            summary, document = run_processes(contract, files, folder, output)
            _finish(summary, document, folder, output)


def built(file: PartyFile, network: NetworkSettings | None) -> tuple[Party, dict[str, int]]:
    """Return the party that a file's builder gives, and its samples by mode; if that fails, the others are told.

    Args:
        file: The party file.
        network: Where the others are; None: nobody is told anything, as this site has not accepted the contract, or as
            the run has begun before, and the others wait for this party to come back.
    """
    from cutlayer.run.meeting import telling
    from cutlayer.run.party import counts

    with nullcontext() if network is None else telling(network, f"the builder of party {file.name!r}"):
        party = file.party()
        return party, counts(party)


def interactive() -> bool:
    """Whether there is a person to ask: stdin and stderr are terminals."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def _simulate(
    contract: Contract, text: str, files: Sequence[PartyFile], folder: Path, output: Output
) -> tuple[str, dict[str, Any]]:
    from cutlayer.run.results import EventLog
    from cutlayer.run.simulate import roster_of, simulate

    parties = [file.party() for file in files]
    programs = compile_plan(contract.plan, roster_of(parties))
    steps = {(party, str(mode)): program.steps for party, modes in programs.items() for mode, program in modes.items()}
    progress = RunProgress(output, epochs=contract.plan.training.epochs, steps=steps)
    with progress, EventLog(folder / "metrics.jsonl") as log, loggers(files, folder, contract, output) as logged:
        result = simulate(contract.plan, parties, notify=both(logged, both(progress, log)))
    return result.summary(), _written(folder, result, contract, text, output)


def _join(contract: Contract, text: str, file: PartyFile, party: Party, folder: Path, output: Output) -> None:
    from cutlayer.run.results import EventLog
    from cutlayer.run.session import join

    output.note(f"run folder: {shown_path(folder)} (after a crash: cutlayer resume {shown_path(folder)})")
    network = network_settings(contract, file)
    progress = RunProgress(output, epochs=contract.plan.training.epochs)
    with progress, EventLog(folder / "metrics.jsonl") as log, loggers([file], folder, contract, output) as logged:
        notify = both(logged, both(progress, log))
        result = join(contract.plan, party, network=network, folder=folder, notify=notify)
    _finish(result.summary(), _written(folder, result, contract, text, output), folder, output)


def _written(folder: Path, result: Result, contract: Contract, text: str, output: Output) -> dict[str, Any]:
    """Write the results; where the disk takes none, show the summary, which would be lost."""
    from cutlayer.run.results import write_results

    try:
        return write_results(folder, result, contract_text=text, digest=contract.digest())
    except ConfigError:
        output.note(result.summary())
        raise


def both(progress: Notify, log: Notify) -> Notify:
    """Return a callback that writes an event down, then shows it."""

    def notify(event: str, details: Mapping[str, Any]) -> None:
        log(event, details)
        progress(event, details)

    return notify


def _finish(summary: str, document: Mapping[str, Any], folder: Path, output: Output) -> None:
    """Write the report, and say in the last line where it is: the other results are beside it."""
    output.say(summary)
    page = written_page(folder, output, anew="finished" not in document)
    report = {"report": str(page.absolute())} if page else {}
    output.document({**document, "results": str(folder.absolute()), **report})
    output.last(f"results: {shown_page(page) if page else shown_path(folder)}")


def _finished(folder: Path, output: Output) -> bool:
    """Say so if the run of this folder has ended: it is left as it is."""
    done = (folder / "summary.json").exists()  # written last
    if done:
        _finish("this run is finished", {"finished": True}, folder, output)
    return done


def _begin(folder: Path, contract: Contract, text: str, files: Sequence[PartyFile], kind: Kind) -> None:
    """Note in the run's folder what it was started with."""
    record = LaunchRecord(kind=kind, digest=contract.digest(), party_files=tuple(str(file.path) for file in files))
    begin_run(folder, text, record)


def _warn(contract: Contract, output: Output) -> None:
    """Say which data can be read from gradients, though the contract declares no release of it."""
    for text in warnings_of(contract.plan):
        output.note(f"warning: {text}\n  do: {READABLE_REMEDY}")


def consent(contract: Contract, file: PartyFile, output: Output, accepted: str, leaves: str) -> None:
    """Show what may leave this party; go on only if this site has accepted it, or its person says so now.

    Raises:
        ConfigError: E207, it was not accepted.
    """
    agreed = accept(contract, file, accepted)
    ask = not agreed and not output.json and interactive()
    text = f"{leaves}\ncontract digest: {contract.digest()}"
    if ask:
        typer.echo(text, err=True)
        agreed = typer.confirm("May this leave?", default=False, err=True)
    else:
        output.note(text)
    if not agreed:
        raise ConfigError(
            "this site has not accepted the contract",
            where=str(file.path),
            expected="yes" if ask else "--accept DIGEST, or `accept` in [run] of the party file",
            got="no" if ask else "neither, and no terminal to ask at",
            remedy=f"read it with `cutlayer plan`; if it may run: --accept {contract.digest()}",
            code="E207",
        )


def check_names(contract: Contract, files: Sequence[PartyFile], way: str = "`cutlayer join`") -> None:
    """Raise `ConfigError` E225 unless there is one party file for each party of the plan.

    `way` is what a site that has only its own file does instead.
    """
    names = [file.name for file in files]
    if sorted(names) != sorted(contract.plan.parties):
        alone = "a site that has its own alone takes part with " + way
        raise ConfigError(
            "the party files are not those of the plan's parties",
            where=", ".join(file.path.name for file in files),
            expected=", ".join(contract.plan.parties),
            got=", ".join(names),
            remedy="give one party file for each party; " + alone,
            code="E225",
        )
