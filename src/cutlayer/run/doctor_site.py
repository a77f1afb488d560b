"""Doctor: do this site's files fit? The party file, the private key, and all that `cutlayer check` looks at."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Final

from cutlayer.errors import CutlayerError
from cutlayer.run.config import Contract
from cutlayer.run.doctor_rows import Row, Status, of_error
from cutlayer.run.launch import accept
from cutlayer.run.partyfile import PartyFile

__all__ = ["acceptance_row", "check_rows", "key_row", "secret_row"]

_STATUS: Final[dict[str, Status]] = {"ok": "ok", "warn": "warning", "fail": "problem"}
_WHERE: Final = "correct the builder in the party file; `cutlayer check -v` shows where in its code it failed"
_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO


def check_rows(contract: Contract, file: PartyFile, *, now: datetime) -> Iterator[Row]:
    """Yield what `cutlayer check` finds: certificate and its dates, the builder, one batch of data. Loads torch."""
    from cutlayer.run.preflight import preflight

    for finding in preflight(contract, [file], now=now):
        name = "contract" if finding.subject == "contract" else f"check of {finding.subject}"
        if finding.error is not None:
            do = _WHERE if finding.error.code == "E204" else ""  # the builder, or what it calls
            yield of_error(name, finding.error, do)
        else:
            yield Row(name, _STATUS[finding.level], finding.text, finding.do)


def acceptance_row(contract: Contract, file: PartyFile) -> Row:
    """Say whether this site has accepted the contract."""
    try:
        agreed = accept(contract, file, "")
    except CutlayerError as error:
        return of_error("acceptance", error)
    seen = "the party file accepts this contract" if agreed else "`cutlayer join` will ask, or wants --accept DIGEST"
    return Row("acceptance", "ok", seen)


def key_row(folder: Path) -> Row:
    """Look whether others on this machine may read the private key."""
    path = folder / "party.key"
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return Row("private key", "problem", f"{path}: {error.strerror}", "give the folder that the authority issued")
    if mode & _OTHERS:
        seen = f"{path}: mode {stat.S_IMODE(mode):04o}, so that others on this machine may use it"
        return Row("private key", "problem", seen, f"chmod 600 {path}; if it was ever read, ask for a new certificate")
    return Row("private key", "ok", f"{path}: only this user may read it")


def secret_row(file: PartyFile) -> Row:
    """Look whether others may read a party file that holds a password."""
    held = [name for name, text in (("proxy", file.proxy), ("mlflow", file.mlflow)) if "@" in text]
    mode = file.path.stat().st_mode
    if held and mode & _OTHERS:
        seen = f"{file.path}: mode {stat.S_IMODE(mode):04o}, and it holds a password ({' and '.join(held)})"
        return Row("party file", "warning", seen, f"chmod 600 {file.path}; if it was ever read, change the password")
    return Row("party file", "ok", f"{file.path}: {'only this user may read it' if held else 'it holds no password'}")
