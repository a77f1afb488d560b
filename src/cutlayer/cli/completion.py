"""What the shell offers after TAB: contracts, party files, run folders and error codes. Nothing heavy is loaded."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

__all__ = ["complete_code", "complete_contract", "complete_party_file", "complete_run"]

_SIZE_LIMIT: Final = 2**20  # bytes; longer files are no configuration


def complete_contract(incomplete: str) -> list[str]:
    """Offer the TOML files that are contracts, and folders to look into."""
    return _offer(incomplete, lambda path: "contract" in _table(path))


def complete_party_file(incomplete: str) -> list[str]:
    """Offer the TOML files that are party files, and folders to look into."""
    return _offer(incomplete, lambda path: "party" in _table(path))


def complete_run(incomplete: str) -> list[str]:
    """Offer the folders of runs that have not finished, those in `runs/` too, and folders to look into."""
    begun = [word for start in {incomplete, incomplete or "runs/"} for word, path in _words(start) if _unfinished(path)]
    return sorted(begun) or _offer(incomplete, lambda _: False)


def complete_ended_run(incomplete: str) -> list[str]:
    """Offer the folders of runs that have finished, those in `runs/` too, and folders to look into."""
    ended = [word for start in {incomplete, incomplete or "runs/"} for word, path in _words(start) if _ended(path)]
    return sorted(ended) or _offer(incomplete, lambda _: False)


def complete_template(incomplete: str) -> list[str]:
    """Offer the templates of `cutlayer new`."""
    from cutlayer.cli.fetching import DATA

    return [name for name in DATA if name.startswith(incomplete)]


def complete_code(incomplete: str) -> list[tuple[str, str]]:
    """Offer the error codes with their titles, written as they were begun: E351, e351 or 351.

    A shell takes only what begins with what was typed.
    """
    from cutlayer.cli.catalogue import catalogue

    words = [(code, entry.title) for code, entry in catalogue().items()]
    if incomplete[:1].isdecimal():
        words = [(code[1:], title) for code, title in words]
    elif incomplete[:1].islower():
        words = [(code.lower(), title) for code, title in words]
    return [(word, title) for word, title in words if word.startswith(incomplete)]


def _offer(incomplete: str, fits: Callable[[Path], bool]) -> list[str]:
    """Return fitting TOML files, then folders with a slash, that begin with what was typed."""
    words = [(word, path) for word, path in _words(incomplete) if incomplete or not path.name.startswith(".")]
    files = [word for word, path in words if path.suffix == ".toml" and path.is_file() and fits(path)]
    return [*sorted(files), *sorted(f"{word}/" for word, path in words if path.is_dir())]


def _words(incomplete: str) -> Iterator[tuple[str, Path]]:
    """Yield what there is that begins with what was typed: as it would be typed, and as a path."""
    base = incomplete[: incomplete.rfind("/") + 1]
    try:
        paths = [path for path in Path(base or ".").iterdir() if os.access(path, os.R_OK)]
    except OSError:
        return
    yield from ((word, path) for path in paths if (word := base + path.name).startswith(incomplete))


def _unfinished(folder: Path) -> bool:
    return (folder / "launch.json").is_file() and not (folder / "summary.json").exists()


def _ended(folder: Path) -> bool:
    return (folder / "summary.json").is_file()


def _table(file: Path) -> dict[str, Any]:
    """Return a file's tables; none if it cannot be read: what is wrong with it is for the command to say."""
    try:
        return tomllib.loads(file.read_text(encoding="utf-8")) if file.stat().st_size <= _SIZE_LIMIT else {}
    except (OSError, ValueError, RecursionError):
        return {}
