"""`cutlayer explain`: what an error code means, what usually brings it about, what to do and who can do it."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from typing import Any

from cutlayer import errors
from cutlayer.cli.catalogue import Entry, catalogue, find
from cutlayer.cli.console import Output, exit_code

__all__ = ["exit_code_of", "explain_code", "list_codes"]

_WIDTH = 100


def explain_code(text: str, output: Output) -> None:
    """Print all that there is to say about a code; with -q, what it means, what to do and who can do it.

    Raises:
        ConfigError: E209, there is no such code.
    """
    code, entry = find(text)
    output.say(f"{code}  {entry.title}")
    output.say(f"{entry.kind}, exit code {exit_code_of(code, entry)}\n")
    output.say(_wrapped(entry.what, "") + "\n")
    output.say(_section("likely causes", entry.causes))
    output.say(_section("what to do", entry.do))
    output.say(f"for example\n{textwrap.indent(entry.example.strip(), '  ')}\n")
    output.document(_document(code, entry))
    who = f"who can do it: {', '.join(entry.who)}"
    short = [f"{code}  {entry.title}", _wrapped(entry.what, ""), "", _section("what to do", entry.do), who]
    output.last("\n".join(short) if output.quiet else who)


def list_codes(output: Output) -> None:
    """Print all codes with their titles."""
    for code, entry in catalogue().items():
        output.say(f"{code}  {entry.title}")
    output.document({"codes": [{"code": code, "class": e.kind, "title": e.title} for code, e in catalogue().items()]})
    output.last(f"{len(catalogue())} codes; `cutlayer explain CODE` says more about one")


def exit_code_of(code: str, entry: Entry) -> int:
    """Return the exit code of a command that ends with such an error."""
    return exit_code(getattr(errors, entry.kind)(entry.title, code=code))


def _document(code: str, entry: Entry) -> dict[str, Any]:
    return {
        "code": code,
        "class": entry.kind,
        "exit_code": exit_code_of(code, entry),
        "title": entry.title,
        "what": entry.what,
        "causes": list(entry.causes),
        "do": list(entry.do),
        "who": list(entry.who),
        "example": entry.example.strip().splitlines(),
    }


def _section(title: str, points: Sequence[str]) -> str:
    return "\n".join([title, *(_wrapped(point, "  - ") for point in points), ""])


def _wrapped(text: str, mark: str) -> str:
    width = min(_WIDTH, shutil.get_terminal_size().columns)
    return textwrap.fill(text, width, initial_indent=mark, subsequent_indent=" " * len(mark), break_long_words=False)
