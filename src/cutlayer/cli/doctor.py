"""`cutlayer doctor`: look at machine, files and network before a run; `--serve` lets others look at this server."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cutlayer.cli.completion import complete_contract, complete_party_file
from cutlayer.cli.console import Output, reporting
from cutlayer.cli.spread import Told, spread
from cutlayer.errors import ConfigError

if TYPE_CHECKING:
    from cutlayer.run.doctor_rows import Row
    from cutlayer.transport.probe_listener import Visit

__all__ = ["doctor"]

_TOLD = Told()
_WIDTH = 24  # of a row's name
_OF_HOST, _OF_ALL = 20, 100  # lines a minute, of one address and of all: no flood fills the terminal
_MINUTE = 60.0  # seconds
_MOST = 10_000  # visits that are kept for --json: the last ones


@spread
def doctor(
    contract: Annotated[
        Path | None, typer.Argument(help="The contract.", show_default=False, autocompletion=complete_contract)
    ] = None,
    party: Annotated[
        Path | None,
        typer.Option("--party", help="This party's own file.", show_default=False, autocompletion=complete_party_file),
    ] = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="Listen as this party, answer the doctors of others, and say who came.")
    ] = False,
    minutes: Annotated[float, typer.Option("--minutes", min=0.01, max=1440, help="How long, with --serve.")] = 30.0,
    told: Told = _TOLD,
) -> None:
    """Look at this machine, this site's files and the way to the other parties, and say what to do.

    Versions, memory, disk, certificates, modules, one batch of data, names, proxy, connection, whether the server
    accepts our certificate, speed, clocks. Changes nothing and sends nothing of a run.
    """
    output = told.output()
    with reporting(output):
        if serve:
            _serve(contract, party, minutes, output)
        else:
            _examine(contract, party, output)


def _examine(contract: Path | None, party: Path | None, output: Output) -> None:
    from cutlayer.run.doctor import examine

    rows: list[Row] = []
    with _nothing_to_read():
        for row in examine(contract, party):
            rows.append(row)
            _show(row, output)
    counts = {status: sum(row.status == status for row in rows) for status in ("ok", "warning", "problem", "skipped")}
    fields = ("name", "status", "seen", "do", "code")
    output.document(
        {
            "ok": not counts["problem"],
            "counts": counts,
            "rows": [{name: getattr(row, name) for name in fields} for row in rows],
        }
    )
    found = [_plural(counts[status], status) for status in ("problem", "warning") if counts[status]]
    missing = f"; {counts['skipped']} not looked at" if counts["skipped"] else ""
    output.last(f"{', '.join(found) or 'all is well'}{missing}")
    if counts["problem"]:
        raise typer.Exit(1)


@contextmanager
def _nothing_to_read() -> Iterator[None]:
    """Let nobody ask anything: a builder that does so would wait for ever, and hold the terminal."""
    kept = sys.stdin
    with open(os.devnull, encoding="utf-8") as sys.stdin:
        try:
            yield
        finally:
            sys.stdin = kept


def _show(row: Row, output: Output) -> None:
    lines = [f"{row.status:<8} {row.name:<{_WIDTH}} {row.code + ' ' if row.code else ''}{row.seen}"]
    lines += [f"{'':<8} do: {row.do}"] if row.do else []
    for line in lines:
        output.say(line)
        if output.quiet and row.status == "problem":
            typer.echo(line, err=True)


def _plural(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"


def _serve(contract_path: Path | None, party_path: Path | None, minutes: float, output: Output) -> None:
    """Listen where the run would, until time is up or a person stops it."""
    from cutlayer.run.config import load_contract
    from cutlayer.run.launch import network_settings
    from cutlayer.run.partyfile import load_party_file
    from cutlayer.transport.probe_listener import ProbeListener
    from cutlayer.transport.tls import check_credentials

    if contract_path is None or party_path is None:
        given = [name for name, path in (("the contract", contract_path), ("--party FILE", party_path)) if path]
        raise _unable("the contract and --party FILE", f"{given[0]} only" if given else "neither")
    contract, file = load_contract(contract_path), load_party_file(party_path)
    settings = network_settings(contract, file)
    if not settings.port:
        raise _unable("a party with an address in the contract", f"{file.name}, which has none")
    if settings.credentials is None:
        remedy = f"make certificates: cutlayer pki init ca --name {contract.plan.name}, then cutlayer pki issue "
        remedy += f"{' '.join(settings.parties)}; in [network] of the party file put credentials = FOLDER in place of "
        raise _unable("a party with certificates", f"{file.name} with insecure = true", f"{remedy}insecure = true")
    check_credentials(settings.credentials, now=datetime.now(UTC))
    visits = _Visits(output)
    listener = ProbeListener(
        settings.port, settings.credentials, digest=settings.digest, parties=settings.parties, visited=visits.add
    )
    with listener:
        output.note(f"listening at {settings.port} as {file.name} for {minutes:g} minutes; Ctrl-C ends it")
        output.note("the others run: cutlayer doctor CONTRACT --party THEIR_FILE")
        try:
            threading.Event().wait(minutes * 60)
        except KeyboardInterrupt:
            output.note("stopped")
    output.document(visits.document())
    output.last(visits.summary())


class _Visits:
    """Tells each visit as it comes, so many a minute, and all in the end. Called from several threads."""

    def __init__(self, output: Output) -> None:
        self._output, self._lock = output, threading.Lock()
        self._rows = deque[dict[str, str]](maxlen=_MOST)
        self._names: set[str] = set()
        self._came = self._refused = self._untold = 0
        self._minute, self._lines = time.monotonic(), Counter[str]()  # lines in the minute that began then, by address

    def add(self, visit: Visit) -> None:
        """Take a visit. Those beyond what is told in a minute are counted, and their number told in the next."""
        host, moment = visit.address.rpartition(":")[0], datetime.now(UTC)
        at = f"{moment:%Y-%m-%d %H:%M:%S} UTC"
        row = {"at": at, "address": visit.address, "name": visit.name, "result": visit.result, "text": visit.text}
        with self._lock:
            self._rows.append(row)
            self._came += 1
            self._refused += visit.result == "refused"
            if visit.name:
                self._names.add(visit.name)
            if time.monotonic() - self._minute >= _MINUTE:
                self._next_minute()
            if self._lines[host] >= _OF_HOST or self._lines.total() >= _OF_ALL:
                self._untold += 1
                return
            self._lines[host] += 1
            self._output.say(f"{at}  {visit.result:<8} {visit.name or 'unknown'} from {host}: {visit.text}")

    def _next_minute(self) -> None:
        if self._untold:
            self._output.say(f"{_plural(self._untold, 'visit')} more in that minute")
        self._minute, self._untold = time.monotonic(), 0
        self._lines.clear()

    def document(self) -> dict[str, Any]:
        """Return the last visits as plain values, and how many there were before them."""
        with self._lock:
            return {"visits": list(self._rows), "earlier": self._came - len(self._rows)}

    def summary(self) -> str:
        """Tell how many visits were not told of yet; return who was accepted, and how many were refused."""
        with self._lock:
            self._next_minute()
            return f"accepted: {', '.join(sorted(self._names)) or 'nobody'}; refused: {self._refused}"


def _unable(expected: str, got: str, remedy: str = "") -> ConfigError:
    return ConfigError(
        "this party cannot listen for the doctors of others",
        where="doctor --serve",
        expected=expected,
        got=got,
        remedy=remedy or "run it at the coordinator: cutlayer doctor CONTRACT --party FILE --serve",
        code="E215",
    )
