"""All commands and groups of commands, as words, found in the command line itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer

from cutlayer.cli.app import app

Words = tuple[str, ...]


def _walk(command: Any, words: Words) -> Iterator[tuple[Words, bool]]:
    inner = getattr(command, "commands", None)
    yield words, inner is not None
    for name, one in (inner or {}).items():
        yield from _walk(one, (*words, name))


_ALL = list(_walk(typer.main.get_command(app), ()))
GROUPS = [words for words, group in _ALL if group]
COMMANDS = [words for words, group in _ALL if not group]
