"""Doctor: all checks of a machine, a site's files and its way to the others, in an order that people can follow.

Nothing is changed and nothing of a run is sent. Every check ends by itself: a step of the network after `EACH` seconds,
the builder and its data after `CODE` seconds. The parts are in `doctor_machine`, `doctor_site` and `doctor_network`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, TypeVar

from cutlayer.errors import CutlayerError
from cutlayer.run.config import Contract, load_contract
from cutlayer.run.doctor_machine import folder_row, machine_rows
from cutlayer.run.doctor_network import address_rows, network_rows
from cutlayer.run.doctor_rows import Row, in_time, of_error
from cutlayer.run.doctor_site import acceptance_row, check_rows, key_row, secret_row
from cutlayer.run.launch import network_settings
from cutlayer.run.partyfile import PartyFile, load_party_file

__all__ = ["CODE", "EACH", "examine"]

EACH: Final = 5.0
"""Seconds that one check, and one step on the network, may take."""
CODE: Final = 60.0
"""Seconds that the party's own code may take to load modules and data and to go through one batch."""

_File = TypeVar("_File", Contract, PartyFile)


def examine(contract_path: Path | None, party_path: Path | None) -> Iterator[Row]:
    """Look at everything that can be looked at with these files, and yield what is found as it is found."""
    yield from _timely("machine", machine_rows)
    contract = yield from _load("contract", contract_path, load_contract)
    file = yield from _load("party file", party_path, load_party_file)
    yield from _timely("run folder", lambda: [folder_row(file.folder if file is not None else Path("runs"))])
    if file is not None:
        yield from _site(contract, file)
    if contract is None:
        yield Row("network", "skipped", "give the contract: it says whom to dial")
    elif party_path is None:
        yield Row("contract", "ok", f"digest {contract.digest()}")
        yield from address_rows(contract, each=EACH)
    elif file is None:
        yield Row("network", "skipped", "the party file says how to dial, and it cannot be read")
    else:
        try:
            settings = network_settings(contract, file)
        except CutlayerError as error:
            yield of_error("network", error)
        else:
            yield from network_rows(contract, file, settings, each=EACH)


def _load(name: str, path: Path | None, load: Callable[[Path], _File]) -> Generator[Row, None, _File | None]:
    """Read a file and return it; yield the row of what is wrong with it, or that it is not given."""
    if path is None:
        yield Row(name, "skipped", "not given")
        return None
    try:
        return load(path)
    except CutlayerError as error:
        yield of_error(name, error)
        return None


def _site(contract: Contract | None, file: PartyFile) -> Iterator[Row]:
    secret = secret_row(file)
    if secret is not None:
        yield secret
    credentials = file.credentials
    if credentials is not None:
        yield from _timely("private key", lambda: [key_row(credentials)])
    if contract is None:
        yield Row("check", "skipped", "give the contract: modules and data are tried against it")
        return
    yield acceptance_row(contract, file)
    name = f"check of {file.name}"
    late = Row(
        name,
        "warning",
        f"the builder {file.builder!r} and one batch of its data take more than {CODE:g} seconds",
        "run `cutlayer check`, which waits for it; a builder that asks something or waits for others never ends",
    )
    yield from in_time(name, lambda: check_rows(contract, file, now=datetime.now(UTC)), CODE, late)


def _timely(name: str, look: Callable[[], Iterable[Row]]) -> Iterator[Row]:
    late = Row(name, "problem", f"no answer within {EACH:g} seconds", "look whether a disk or a network folder hangs")
    yield from in_time(name, look, EACH, late)
