"""Files that a command was not told: the contract and the party files of the current folder.

| code | error | meaning |
| --- | --- | --- |
| E240 | ConfigError | no contract is named, and there is none here |
| E241 | ConfigError | no party files are named, and a party of the plan has none here |
| E242 | ConfigError | no party files are named, and a party has several here |
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

from cutlayer.errors import ConfigError, CutlayerError
from cutlayer.run.config import load_contract

__all__ = ["contract_here", "files_to_check", "party_files_here"]

CONTRACT = "contract.toml"


def contract_here(given: Path | None) -> Path:
    """Return the contract that was named, or `contract.toml` of this folder. Raises `ConfigError` E240."""
    if given is not None:
        return given
    if not Path(CONTRACT).is_file():
        raise ConfigError(
            "no contract is named, and there is none here",
            where=str(Path.cwd()),
            expected=f"a file {CONTRACT} in this folder, or the path of one",
            remedy="name it, go to its folder, or begin a project: cutlayer new NAME --template images-u",
            code="E240",
        )
    return Path(CONTRACT)


def party_files_here(given: Sequence[Path] | None, contract: Path) -> list[Path]:
    """Return the party files that were named, or one for each party of the plan from the contract's folder.

    Where a party has several, those with an `identity` are left out: they are of clients of its served stage.

    Raises:
        ConfigError: E241, a party has none; E242, a party has several.
    """
    if given:
        return list(given)
    found, _ = _beside(contract)
    parties = load_contract(contract).plan.parties
    missing = [party for party in parties if party not in found]
    if missing:
        raise ConfigError(
            f"no party files are named, and {', '.join(missing)} has none here",
            where=str(contract.parent.absolute()),
            expected=f'a file with party = "{missing[0]}" beside the contract',
            got=", ".join(sorted(found)) or "no party files",
            remedy="name the party files: cutlayer run CONTRACT PARTYFILE...",
            code="E241",
        )
    found = _without_clients(found)
    several = [party for party in parties if len(found[party]) > 1]
    if several:
        raise ConfigError(
            f"no party files are named, and {several[0]} has several here",
            where=str(contract.parent.absolute()),
            got=", ".join(path.name for path in found[several[0]]),
            remedy="name the party files that are meant",
            code="E242",
        )
    return [found[party][0] for party in parties]


def files_to_check(contract: Path) -> list[Path]:
    """Return all party files of the plan's parties that lie beside the contract, and what cannot be read as TOML there.

    Those of clients are left out as by `party_files_here`. If the contract cannot be read, all party files.
    """
    found, unread = _beside(contract)
    try:
        parties = load_contract(contract).plan.parties
    except CutlayerError:
        parties = tuple(found)
    found = _without_clients(found)
    return [*(path for party in parties for path in found.get(party, [])), *unread]


def _without_clients(found: Mapping[str, list[Path]]) -> dict[str, list[Path]]:
    """Leave out the files of clients of a served stage, unless a party has no other."""
    return {party: [path for path in paths if not _client(path)] or paths for party, paths in found.items()}


def _client(path: Path) -> bool:
    """Whether a party file, which can be read, is that of a client of a served stage."""
    network = tomllib.loads(path.read_text(encoding="utf-8")).get("network")
    return isinstance(network, dict) and bool(network.get("identity"))


def _beside(contract: Path) -> tuple[dict[str, list[Path]], list[Path]]:
    """Return the party files in the contract's folder by party, and the other .toml files that cannot be read."""
    found: dict[str, list[Path]] = {}
    unread = []
    for path in sorted(contract.parent.glob("*.toml")):
        try:
            name = tomllib.loads(path.read_text(encoding="utf-8")).get("party")
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
            unread.append(path)
            continue
        if isinstance(name, str):
            found.setdefault(name, []).append(path)
    return found, [path for path in unread if path.name != contract.name]
