"""Doctor: all checks of a machine, a site's files and its way to the others, in an order that people can follow.

Nothing is changed and nothing of a run is sent. Every check ends by itself: a step of the network after `EACH` seconds,
the builder and its data after `CODE` seconds. What a check needs is loaded within it, so that a damaged package is a
finding and does not end the others. The parts are in `doctor_machine`, `doctor_site` and `doctor_network`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cutlayer.run.doctor_machine import folder_row, machine_rows, torch_row
from cutlayer.run.doctor_rows import Row, in_time

if TYPE_CHECKING:
    from cutlayer.run.config import Contract
    from cutlayer.run.partyfile import PartyFile

__all__ = ["CODE", "EACH", "examine"]

EACH: Final = 5.0
"""Seconds that one check, and one step on the network, may take."""
CODE: Final = 60.0
"""Seconds that the party's own code may take to load modules and data and to go through one batch; torch likewise."""
_FOLDER: Final = Path("runs")  # where results go if no party file says so


@dataclass
class _Files:
    """What could be read of the files that were given."""

    contract: Contract | None = None
    party: PartyFile | None = None


def examine(contract_path: Path | None, party_path: Path | None) -> Iterator[Row]:
    """Look at everything that can be looked at with these files, and yield what is found as it is found.

    Never raises on account of what it finds.
    """
    yield from _timely("machine", machine_rows)
    late = Row(
        "torch",
        "warning",
        f"torch takes more than {CODE:g} seconds to load",
        "keep the Python environment on a disk of this machine: on a network folder each start is slow",
    )
    yield from in_time("torch", lambda: [torch_row()], CODE, late)
    files = _Files()
    yield from _timely("contract", lambda: _read_contract(contract_path, files))
    yield from _timely("party file", lambda: _read_party_file(party_path, files))
    contract, file = files.contract, files.party
    yield from _timely("run folder", lambda: [folder_row(file.folder if file is not None else _FOLDER)])
    if file is not None:
        yield from _site(contract, file)
    yield from _network(contract, file, given=(contract_path is not None, party_path is not None))


def _read_contract(path: Path | None, files: _Files) -> Iterator[Row]:
    if path is None:
        yield Row("contract", "skipped", "not given")
        return
    from cutlayer.run.config import load_contract

    files.contract = load_contract(path)


def _read_party_file(path: Path | None, files: _Files) -> Iterator[Row]:
    if path is None:
        yield Row("party file", "skipped", "not given")
        return
    from cutlayer.run.partyfile import load_party_file

    files.party = load_party_file(path)


def _site(contract: Contract | None, file: PartyFile) -> Iterator[Row]:
    from cutlayer.run.doctor_site import acceptance_row, check_rows, key_row, secret_row

    yield from _timely("party file", lambda: [secret_row(file)])
    credentials = file.credentials
    if credentials is not None:
        yield from _timely("private key", lambda: [key_row(credentials)])
    name = f"check of {file.name}"
    if contract is None:
        yield Row(name, "skipped", "modules and data are tried against the contract, of which nothing is known")
        return
    yield acceptance_row(contract, file)
    late = Row(
        name,
        "warning",
        f"the builder {file.builder!r} and one batch of its data take more than {CODE:g} seconds",
        "run `cutlayer check`, which waits for it; a builder that waits for somebody or something never ends",
    )
    yield from in_time(name, lambda: check_rows(contract, file, now=datetime.now(UTC)), CODE, late)


def _network(contract: Contract | None, file: PartyFile | None, *, given: tuple[bool, bool]) -> Iterator[Row]:
    """Yield what is found of the network. `given` says whether a contract and a party file were given at all."""
    if contract is None:
        missing = "the contract cannot be read" if given[0] else "give the contract"
        yield Row("network", "skipped", f"{missing}: it says whom to dial")
        return
    if given[1] and file is None:
        yield Row("network", "skipped", "the party file says how to dial, and it cannot be read")
        return

    def look() -> Iterator[Row]:
        from cutlayer.run.doctor_network import address_rows, network_rows

        yield from network_rows(contract, file, each=EACH) if file else address_rows(contract, each=EACH)

    seconds = 10 * EACH * len(contract.plan.parties)  # each way has an end of its own, long before
    late = Row("network", "problem", f"no end within {seconds:g} seconds", "report it, with what `cutlayer env` prints")
    yield from in_time("network", look, seconds, late)


def _timely(name: str, look: Callable[[], Iterable[Row]]) -> Iterator[Row]:
    late = Row(name, "problem", f"no answer within {EACH:g} seconds", "look whether a disk or a network folder hangs")
    yield from in_time(name, look, EACH, late)
