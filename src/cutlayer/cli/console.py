"""What every command prints and how it ends: results on stdout, everything else on stderr, an exit code by cause.

| code | error | meaning |
| --- | --- | --- |
| E001 | CutlayerError | the command was stopped |
| E238 | ConfigError | the system refuses a file or folder |
"""

from __future__ import annotations

import errno
import json
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from cutlayer.cli.completion import complete_contract, complete_party_file
from cutlayer.errors import (
    CertificateError,
    CheckpointError,
    ConfigError,
    CutlayerError,
    DataError,
    DeadlineError,
    HandshakeError,
    LinkError,
    NonFiniteError,
    PeerError,
    PlanError,
    StageError,
)

__all__ = [
    "EXIT_CODES",
    "AcceptOption",
    "ContractArgument",
    "ContractHere",
    "FolderOption",
    "JsonOption",
    "NewFolderOption",
    "Output",
    "PartyFileArgument",
    "PartyFilesArgument",
    "PartyFilesHere",
    "QuietOption",
    "VerboseOption",
    "WaitOption",
    "error_document",
    "exit_code",
    "reporting",
    "shown_path",
]

INTERRUPTED, STOPPED = 130, "E001"
_document: ContextVar[TextIO | None] = ContextVar("document", default=None)  # where it goes while stdout is not its own
EXIT_CODES: Mapping[int, tuple[type[CutlayerError], ...]] = {
    2: (PlanError, ConfigError, DataError),
    3: (StageError, NonFiniteError),
    4: (LinkError, DeadlineError, HandshakeError, CertificateError),
    5: (PeerError,),
    6: (CheckpointError,),
}

ContractArgument = Annotated[
    Path, typer.Argument(help="The contract, a TOML file.", show_default=False, autocompletion=complete_contract)
]
PartyFileArgument = Annotated[
    Path, typer.Argument(help="This party's own file, TOML.", show_default=False, autocompletion=complete_party_file)
]
PartyFilesArgument = Annotated[
    list[Path],
    typer.Argument(help="Party files, one for each party.", show_default=False, autocompletion=complete_party_file),
]
ContractHere = Annotated[
    Path | None,
    typer.Argument(
        help="The contract. Default: contract.toml of this folder.",
        show_default=False,
        autocompletion=complete_contract,
    ),
]
PartyFilesHere = Annotated[
    list[Path] | None,
    typer.Argument(
        help="Party files, one for each party. Default: those beside the contract.",
        show_default=False,
        autocompletion=complete_party_file,
    ),
]
AcceptOption = Annotated[
    str, typer.Option("--accept", metavar="DIGEST", help="The digest of the contract that this site accepts.")
]
WaitOption = Annotated[
    float,
    typer.Option(
        "--wait",
        min=0.001,
        max=604_800,
        help="With --join or --served: seconds to wait for a party that is lost.",
    ),
]
FolderOption = Annotated[
    Path | None,
    typer.Option("--folder", help="Run folder; one of the same contract is gone on with.", show_default=False),
]
NewFolderOption = Annotated[
    Path | None,
    typer.Option("--folder", help="Folder for the predictions; one that holds some is refused.", show_default=False),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the last line, and errors.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Print link events, and tracebacks.")]


@dataclass(frozen=True)
class Output:
    """Where a command's words go. With `json`, stdout holds one JSON document and nothing else."""

    json: bool
    quiet: bool
    verbose: bool

    def say(self, text: str) -> None:
        """Print a part of the result, for people."""
        if not (self.json or self.quiet):
            _write(text)

    def note(self, text: str) -> None:
        """Print something on the way to the result, on stderr."""
        if not self.quiet:
            _write(text, err=True)

    def last(self, text: str) -> None:
        """Print the last line for people; -q keeps it."""
        if not self.json:
            _write(text)

    def document(self, value: Mapping[str, Any]) -> None:
        """Print the JSON document, if it was asked for."""
        if self.json:
            _write(json.dumps(value), to=_document.get())

    def stopped(self) -> int:
        """Say that the command was stopped, and return its exit code."""
        error = CutlayerError(
            "stopped by Ctrl-C or a signal",
            remedy="start it again; a run of `join` or `run --processes` goes on with `cutlayer resume RUNFOLDER`",
            code="E001",
        )
        with suppress(typer.Exit):  # nobody reads that
            self.note("stopped")
            self.document({"error": error_document(error)})
        return exit_code(error)

    def fail(self, error: CutlayerError, found: Mapping[str, Any] | None = None) -> None:
        """Print an error: four lines on stderr, and the JSON document, with what was `found`, if it was asked for."""
        if self.verbose:
            traceback.print_exception(error, file=sys.stderr)
        for line in error.lines():
            _write(line, err=True)
        self.document({**(found or {}), "error": error_document(error)})


def error_document(error: CutlayerError) -> dict[str, str]:
    """Return an error as plain values."""
    parts = ("code", "what", "where", "expected", "got", "remedy")
    return {"kind": type(error).__name__, **{part: getattr(error, part) for part in parts}}


def exit_code(error: CutlayerError) -> int:
    """Return the exit code of an error, by its class; 1 for those that have none of their own; 130 if stopped."""
    if error.code == STOPPED:
        return INTERRUPTED
    return next((code for code, kinds in EXIT_CODES.items() if isinstance(error, kinds)), 1)


@contextmanager
def reporting(output: Output) -> Iterator[None]:
    """Turn every error within into words and an exit code.

    With --json, what modules, data sets and libraries print, also in C, goes to stderr: stdout is the document's.
    """
    with _document_alone() if output.json else nullcontext(), _reported(output):
        yield


@contextmanager
def _document_alone() -> Iterator[None]:
    kept = _document.set(_apart(sys.stdout))
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _document.reset(kept)


def _apart(stream: TextIO) -> TextIO:
    """Return a stream to where descriptor 1 leads; that leads to stderr from now on.

    It stays so to the end of the process, when C's own buffers are written. A stream that is not on it is returned.
    """
    try:
        if stream.fileno() != 1:
            return stream
        stream.flush()
        kept = os.dup(1)
        os.dup2(2, 1)
    except (OSError, ValueError, AttributeError):  # a stream without a descriptor, or none
        return stream
    return open(kept, "w", encoding="utf-8", closefd=False)


@contextmanager
def _reported(output: Output) -> Iterator[None]:
    try:
        yield
    except CutlayerError as error:
        with suppress(typer.Exit):  # nobody reads it
            output.fail(error)
        raise typer.Exit(exit_code(error)) from None
    except KeyboardInterrupt:
        with suppress(typer.Exit):
            output.stopped()
        raise typer.Exit(INTERRUPTED) from None
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        told = _refused(error) if isinstance(error, OSError) and _of_a_file(error) else _unexpected(error)
        told.__cause__ = error
        with suppress(typer.Exit):
            output.fail(told)
        raise typer.Exit(exit_code(told)) from None


def _unexpected(error: Exception) -> CutlayerError:
    return CutlayerError(
        "an unexpected error", got=f"{type(error).__name__}: {error}", remedy="run with -v and report the output"
    )


def _of_a_file(error: OSError) -> bool:
    """Whether it is about a file or a disk; one of the network, say, is not."""
    return bool(error.filename) or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def _refused(error: OSError) -> ConfigError:
    return ConfigError(
        "a file or folder cannot be used",
        where=str(error.filename or "a file that the system does not name"),
        got=error.strerror or type(error).__name__,
        remedy="give a path that this user may read and write, and where nothing else is; or make room on the disk",
        code="E238",
    )


def _write(text: str, *, err: bool = False, to: TextIO | None = None) -> None:
    """Print a line. If nobody reads any more, as after `| head -1`, end without a word.

    In a closed terminal go on without one: whether that ends the program is for SIGHUP to say.
    """
    try:
        typer.echo(text, file=to, err=err)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise
        for stream in (to, sys.__stdout__, sys.__stderr__):
            _to_nowhere(stream)  # what is still kept there would fail as the process ends
        if error.errno == errno.EPIPE:
            raise typer.Exit(1) from None


def _to_nowhere(stream: TextIO | None) -> None:
    with suppress(OSError, ValueError, AttributeError):
        stream.flush()  # type: ignore[union-attr]
        return
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())  # type: ignore[union-attr]
        os.close(nowhere)


def shown_path(folder: Path) -> str:
    """Return a folder with a slash at its end, relative to the current one if it lies in it."""
    try:
        shown = folder.absolute().relative_to(Path.cwd())
    except ValueError:
        shown = folder.absolute()
    return f"{shown}/"
