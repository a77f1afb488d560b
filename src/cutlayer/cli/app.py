"""The commands and their help. Each loads what it needs when it runs, so that help is quick."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from cutlayer.cli import completion
from cutlayer.cli.console import (
    AcceptOption,
    ContractArgument,
    ContractHere,
    FolderOption,
    NewFolderOption,
    PartyFileArgument,
    PartyFilesHere,
    WaitOption,
    reporting,
)
from cutlayer.cli.doctor import doctor
from cutlayer.cli.spread import Told, spread
from cutlayer.cli.usage import Commands

__all__ = ["app"]

app = typer.Typer(
    cls=Commands,
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Split learning: one network trained across organisations, where only declared tensors leave.",
    epilog="Example: cutlayer run contract.toml hospital.toml server.toml",
)
pki = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    help="A small certificate authority: one certificate for each party of a run.",
    epilog="Example: cutlayer pki init ca && cutlayer pki issue hospital server --authority ca --out credentials",
)
app.add_typer(pki, name="pki")


_ENDED = completion.complete_ended_run
EndedRun = Annotated[Path, typer.Argument(help="The folder of a run that has ended.", autocompletion=_ENDED)]
WeightsOption = Annotated[
    Path | None,
    typer.Option(
        "--weights",
        metavar="RUN",
        help="Folder of the training run, which holds <party>.safetensors. Default: modules as the builder makes them.",
        show_default=False,
        autocompletion=_ENDED,
    ),
]


@dataclass(frozen=True)
class Where:
    """Where the parties of a prediction are."""

    processes: Annotated[
        bool, typer.Option("--processes", help="A process for each party, over mutual TLS on this machine.")
    ] = False
    join: Annotated[bool, typer.Option("--join", help="One party here; the others predict where they are.")] = False
    served: Annotated[bool, typer.Option("--served", help="One party here; ask a server that runs serve.")] = False
    accept: AcceptOption = ""
    wait: WaitOption = 15.0


_TOLD, _HERE = Told(), Where()


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"cutlayer {version('cutlayer')}")
        raise typer.Exit


@app.callback()
def _top(
    _version_wanted: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Split learning: one network trained across organisations, where only declared tensors leave."""


@app.command(epilog="Example: cutlayer new study --template images-u")
@spread
def new(
    name: Annotated[str, typer.Argument(help="The project, and its folder.", show_default=False)],
    template: Annotated[
        str,
        typer.Option(
            "--template", help="images-u, tabular-vertical or text.", autocompletion=completion.complete_template
        ),
    ] = "images-u",
    data: Annotated[bool, typer.Option("--data/--no-data", help="Fetch its data with pip, unless here.")] = True,
    told: Told = _TOLD,
) -> None:
    """Write a project that runs as it is, on real data: contract, party files, modules and data in Python."""
    output = told.output()
    with reporting(output):
        from cutlayer.cli.creating import new_project

        new_project(name, template, output, data=data)


@app.command(epilog="Example: cutlayer run contract.toml hospital.toml server.toml --processes")
@spread
def run(
    contract: ContractHere = None,
    party_files: PartyFilesHere = None,
    processes: Annotated[
        bool, typer.Option("--processes", help="A process for each party, over mutual TLS on this machine.")
    ] = False,
    folder: FolderOption = None,
    told: Told = _TOLD,
) -> None:
    """Train with all parties on this machine. Results go to runs/<time>-<name>/ unless told.

    Without arguments: contract.toml of this folder, and the party files beside it.
    """
    output = told.output()
    with reporting(output):
        from cutlayer.cli.here import contract_here, party_files_here
        from cutlayer.cli.running import run_here

        path = contract_here(contract)
        run_here(path, party_files_here(party_files, path), folder, output, processes=processes)


@app.command(epilog="Example: cutlayer join contract.toml hospital.toml --accept DIGEST")
@spread
def join(
    contract: ContractArgument,
    party_file: PartyFileArgument,
    accept: AcceptOption = "",
    folder: FolderOption = None,
    told: Told = _TOLD,
) -> None:
    """Take part in a run as one party; the others join from where they are.

    Shows what may leave this party and asks once whether it may. Without a terminal it never asks: give --accept.
    """
    output = told.output()
    with reporting(output):
        from cutlayer.cli.running import join_run

        join_run(contract, party_file, folder, output, accepted=accept)


@app.command(epilog="Example: cutlayer resume runs/20260101-090000-digits")
@spread
def resume(
    run_folder: Annotated[
        Path, typer.Argument(help="The folder that the run named at its start.", autocompletion=completion.complete_run)
    ],
    told: Told = _TOLD,
) -> None:
    """Go on with a run after a crash, from the last checkpoint that all parties have."""
    output = told.output()
    with reporting(output):
        from cutlayer.cli.running import resume_run

        resume_run(run_folder, output)


@app.command(epilog="Example: cutlayer predict contract.toml hospital.toml cloud.toml --weights runs/first")
@spread
def predict(
    contract: ContractHere = None,
    party_files: PartyFilesHere = None,
    weights: WeightsOption = None,
    where: Where = _HERE,
    folder: NewFolderOption = None,
    told: Told = _TOLD,
) -> None:
    """Predict with trained weights, for the data that parties give as `prediction`. Needs no labels.

    Without arguments: contract.toml of this folder, and the party files beside it.

    With --join or --served, shows what may leave this party and asks once whether it may, unless --accept says so.
    """
    output = told.output()
    with reporting(output):
        from cutlayer.cli.here import contract_here, party_files_here
        from cutlayer.cli.predicting import How, predict_command

        path = contract_here(contract)
        how = How(**vars(where))
        predict_command(path, party_files_here(party_files, path), weights, folder, output, how)


@app.command(epilog="Example: cutlayer serve contract.toml cloud.toml --weights runs/20260101-090000-scans")
@spread
def serve(
    contract: ContractArgument,
    party_file: PartyFileArgument,
    weights: WeightsOption = None,
    accept: AcceptOption = "",
    told: Told = _TOLD,
) -> None:
    """Serve this party's trained stage to many clients, which ask with `predict --served`, until Ctrl-C.

    Limits and quotas are in [serving] of the party file. Shows what may leave this party and asks once whether it may,
    unless --accept says so. After Ctrl-C or SIGTERM nobody comes in, and who is there may end. In a chain each server
    runs this, and asks the next one itself.
    """
    output = told.output()
    with reporting(output):
        from cutlayer.cli.serving import serve_party

        serve_party(contract, party_file, weights, output, accepted=accept)


@app.command(epilog="Example: cutlayer report runs/20260101-090000-digits --open")
@spread
def report(
    run_folder: EndedRun,
    open_page: Annotated[bool, typer.Option("--open", help="Show the page in the web browser.")] = False,
    told: Told = _TOLD,
) -> None:
    """Write the report of a run again: report.html, and beside it drawings (SVG, PNG) and tables (CSV)."""
    output = told.output()
    with reporting(output):
        from cutlayer.cli.report import show_report

        show_report(run_folder, output, open_page=open_page)


@app.command(epilog="Example: cutlayer plan contract.toml --grid")
@spread
def plan(
    contract: ContractHere = None,
    grid: Annotated[bool, typer.Option("--grid", help="Print the schedule of one step: a row a party.")] = False,
    program: Annotated[
        str, typer.Option("--program", metavar="PARTY", help="Print the programs that this party will run.")
    ] = "",
    samples: Annotated[
        int | None, typer.Option(min=1, help="Samples of each data holder, for --program.", show_default="one batch")
    ] = None,
    told: Told = _TOLD,
) -> None:
    """Print who holds what, what leaves whom, and the digest that a site accepts."""
    output = told.output()
    with reporting(output):
        from cutlayer.cli.here import contract_here
        from cutlayer.cli.showing import show_plan

        show_plan(contract_here(contract), output, grid=grid, program=program, samples=samples)


@app.command(epilog="Example: cutlayer check contract.toml hospital.toml")
@spread
def check(
    contract: ContractHere = None,
    party_files: Annotated[
        list[Path] | None,
        typer.Argument(help="Party files, if any.", show_default=False, autocompletion=completion.complete_party_file),
    ] = None,
    told: Told = _TOLD,
) -> None:
    """Check contract, party files, certificates, modules and one batch of data. Sends nothing."""
    output = told.output()
    with reporting(output):
        from cutlayer.cli.here import contract_here, files_to_check
        from cutlayer.cli.showing import show_check

        path = contract_here(contract)
        files = party_files or ([] if contract else files_to_check(path))
        show_check(path, files, output)


@app.command(epilog="Example: cutlayer explain E351")
@spread
def explain(
    code: Annotated[
        str,
        typer.Argument(
            help="An error code, such as E351 or 351; without one, all are listed.",
            show_default=False,
            autocompletion=completion.complete_code,
        ),
    ] = "",
    told: Told = _TOLD,
) -> None:
    """Say what an error code means, what brings it about, what to do and who can do it."""
    output = told.output()
    with reporting(output):
        from cutlayer.cli.explain import explain_code, list_codes

        explain_code(code, output) if code else list_codes(output)


app.command(epilog="Example: cutlayer doctor contract.toml --party hospital.toml")(doctor)


@app.command(epilog="Example: cutlayer env --json")
@spread
def env(told: Told = _TOLD) -> None:
    """Print what a bug report needs: versions, processors, memory. Names no host, user, folder or address."""
    output = told.output()
    with reporting(output):
        from cutlayer.cli.environment import show_environment

        show_environment(output)


@app.command(epilog="Example: cutlayer cut model.py:resnet --input 'float32\\[batch, 3, 32, 32]'")
@spread
def cut(
    model: Annotated[
        str, typer.Argument(help="file.py:function or package.module:function; gives a model.", show_default=False)
    ],
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input", metavar="[NAME=]SPEC", help="An argument of forward, or ARGUMENT.KEY.", show_default=False
        ),
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Samples in a step.")] = 32,
    refused: Annotated[bool, typer.Option("--refused", help="Also say where it cannot be cut, and why.")] = False,
    pick: Annotated[str, typer.Option("--output", metavar="NAME", help="Which of the model's outputs to take.")] = "",
    told: Told = _TOLD,
) -> None:
    """Show where a model can be cut: bytes a step, operations, parameters and memory of each side."""
    output = told.output()
    with reporting(output):
        from cutlayer.cli.cutting import show_cuts

        show_cuts(model, inputs or [], output, batch=batch, refused=refused, pick=pick)


@app.command(epilog="Example: cutlayer export runs/20260101-090000-digits --out model.safetensors")
@spread
def export(
    run_folder: EndedRun,
    out: Annotated[Path, typer.Option("--out", help="The file to write.")] = Path("model.safetensors"),
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
    told: Told = _TOLD,
) -> None:
    """Put the whole model together and write its weights, where the contract allows it (assemble_at)."""
    output = told.output()
    with reporting(output):
        from cutlayer.cli.exporting import export_model

        export_model(run_folder, out, output, force=force)


@pki.command("init", epilog="Example: cutlayer pki init ca --name heart-study")
@spread
def pki_init(
    folder: Annotated[Path, typer.Argument(help="Where the authority is kept; its key never leaves there.")],
    name: Annotated[str, typer.Option("--name", help="The authority's name, for people.")] = "cutlayer",
    days: Annotated[int, typer.Option("--days", min=1, help="Valid for so many days.")] = 3650,
    told: Told = _TOLD,
) -> None:
    """Make a certificate authority. Whoever holds it can make any party's certificate."""
    output = told.output()
    with reporting(output):
        from cutlayer.cli.certificates import init

        init(folder, name, days, output)


@pki.command("issue", epilog="Example: cutlayer pki issue hospital server --authority ca --out credentials")
@spread
def pki_issue(
    parties: Annotated[list[str], typer.Argument(help="Names of parties, as in the contract.")],
    authority: Annotated[Path, typer.Option("--authority", help="Folder of the authority.")] = Path("ca"),
    out: Annotated[Path, typer.Option("--out", help="Gets a folder for each party.")] = Path("credentials"),
    days: Annotated[int, typer.Option("--days", min=1, help="Valid for so many days.")] = 397,
    told: Told = _TOLD,
) -> None:
    """Make a key and a certificate for each party. Hand each folder to its party over a trusted way."""
    output = told.output()
    with reporting(output):
        from cutlayer.cli.certificates import issue_all

        issue_all(parties, authority, out, days, output)


@pki.command("show", epilog="Example: cutlayer pki show credentials/hospital")
@spread
def pki_show(
    path: Annotated[Path, typer.Argument(help="A certificate, or a folder of one.", show_default=False)],
    told: Told = _TOLD,
) -> None:
    """Print whose certificate it is, who made it and until when it is valid."""
    output = told.output()
    with reporting(output):
        from cutlayer.cli.certificates import show

        show(path, output)
