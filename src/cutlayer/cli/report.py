"""`cutlayer report`, the report at the end of a run, and the loggers that party files ask for."""

from __future__ import annotations

import webbrowser
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cutlayer.cli.console import Output, shown_path

if TYPE_CHECKING:
    from cutlayer.report.loggers import Notify
    from cutlayer.run.config import Contract
    from cutlayer.run.partyfile import PartyFile

__all__ = ["loggers", "show_report", "shown_page", "written_page"]


def show_report(folder: Path, output: Output, *, open_page: bool) -> None:
    """Write the report of a run's folder, drawings as PNG too, and say where it is."""
    from cutlayer.report.write import write_report

    report = write_report(folder)
    output.document({"report": str(report.page.absolute()), "files": [str(file.absolute()) for file in report.files]})
    missing = "" if report.drawn else " (its drawings as PNG need matplotlib: pip install 'cutlayer[plot]')"
    output.last(f"report: {shown_page(report.page)}{missing}")
    if open_page:
        webbrowser.open(report.page.absolute().as_uri())


def written_page(folder: Path, output: Output, *, anew: bool) -> Path | None:
    """Write the report of a run that has ended and return its path; not `anew`: one that is there is left as it is.

    A run that went well does not fail by its report: if that cannot be written, the reason is told, and None returned.
    """
    page = folder / "report.html"
    if page.exists() and not anew:
        return page
    from cutlayer.report.write import write_report

    try:
        return write_report(folder, png=False).page
    except Exception as error:
        output.note(f"the report could not be written: {type(error).__name__}: {error}; try `cutlayer report`")
        return None


@contextmanager
def loggers(files: Sequence[PartyFile], folder: Path, contract: Contract, output: Output) -> Iterator[Notify]:
    """Open the loggers that these party files ask for, each for its own party; an error of one is told once."""
    from cutlayer.report.loggers import fan_out, guarded, mlflow, tensorboard

    parameters = {
        "plan": contract.plan.name,
        "plan_digest": contract.plan.digest(),
        "contract_digest": contract.digest(),
        **vars(contract.plan.training),
    }
    with ExitStack() as stack:
        found: list[Notify] = []
        for file in files:
            if file.tensorboard:
                logger = tensorboard(folder / "tensorboard" / file.name, party=file.name, parameters=parameters)
                found.append(stack.enter_context(guarded("TensorBoard", logger, output.note)))
            if file.mlflow:
                settings = {"experiment": contract.plan.name, "party": file.name}
                logger = mlflow(file.mlflow, folder=folder, parameters=parameters, **settings)
                found.append(stack.enter_context(guarded("MLflow", logger, output.note)))
        yield fan_out(*found)


def shown_page(page: Path) -> str:
    """Return a file's path, relative to the current folder if it lies in it."""
    return f"{shown_path(page.parent)}{page.name}"
