"""Write docs/reference/errors.md and a page for each code in docs/reference/errors/: `python scripts/errors_page.py`.

What the pages say of a code is in src/cutlayer/cli/errors.toml; the messages on them are those of the source.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

from cutlayer import errors
from cutlayer.cli.catalogue import Entry, catalogue
from cutlayer.cli.explain import exit_code_of

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "cutlayer"
REFERENCE = ROOT / "docs" / "reference"
CODE = re.compile(r"E\d{3}")
MADE = "Made by `python scripts/errors_page.py`"
HEAD = f"""# Error codes

Every error says what happened, where, what was expected and got, and what to do; the command line prints it in four
lines and ends with an [exit code](cli.md#exit-codes) by its class. `cutlayer explain CODE` prints what is here, without
a network. A failure at one party reaches all others with its code and remedy ([E703](errors/E703.md) around it), never
with its data. Codes never change their meaning.

{MADE}.
"""


class Message(NamedTuple):
    """A place in the source that makes an error: "..." stands for names and numbers."""

    code: str
    kind: str
    what: str
    do: str


def pages() -> dict[Path, str]:
    """Return the text of every page, by its path."""
    known, told = catalogue(), messages()
    found = {REFERENCE / "errors.md": _index(known)}
    for code, entry in known.items():
        found[REFERENCE / "errors" / f"{code}.md"] = _page(code, entry, [one for one in told if one.code == code])
    return found


@cache
def messages() -> list[Message]:
    """Return what the source says with each code, where that is written at the place that makes the error."""
    found = set()
    for tree in _trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and (kind := _kind(node.func)):
                words = {keyword.arg: keyword.value for keyword in node.keywords}
                code = words.get("code")
                if isinstance(code, ast.Constant) and node.args:
                    found.add(Message(str(code.value), kind, _text(node.args[0]), _text(words.get("remedy"))))
    return sorted(found)


def _kind(function: ast.expr) -> str:
    """Return the class of error that a call makes: itself, or through the gate's helper; "" for other calls."""
    if isinstance(function, ast.Attribute) and function.attr == "_refused":
        return "LinkError"
    return function.id if isinstance(function, ast.Name) and function.id.endswith("Error") else ""


def source_codes() -> dict[str, set[str]]:
    """Return code -> modules of the source that make errors with it or have it as a class's own."""
    found: dict[str, set[str]] = {}
    for path, tree in zip(_paths(), _trees(), strict=True):
        asked = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.Compare) for inner in ast.walk(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and id(node) not in asked and CODE.fullmatch(str(node.value)):
                found.setdefault(str(node.value), set()).add(str(path.relative_to(SOURCE)))
    return found


def _index(known: Mapping[str, Entry]) -> str:
    parts = [HEAD]
    for kind in dict.fromkeys(entry.kind for entry in known.values()):
        meaning = (getattr(errors, kind).__doc__ or "").splitlines()[0].rstrip(".")
        parts.append(f"## {kind}\n\n{meaning}.\n\n| code | what it means | who can do it |\n| --- | --- | --- |")
        own = [(code, entry) for code, entry in known.items() if entry.kind == kind]
        rows = [f"| [{code}](errors/{code}.md) | {_cell(e.title)} | {', '.join(e.who)} |" for code, e in own]
        parts[-1] += "\n" + "\n".join(rows) + "\n"
    return "\n".join(parts)


def _page(code: str, entry: Entry, told: list[Message]) -> str:
    parts = [
        f"# {code}: {entry.title}",
        f"`{entry.kind}`, exit code {exit_code_of(code, entry)}. Who can do it: {', '.join(entry.who)}.",
        entry.what,
        "## Likely causes\n\n" + _list(entry.causes),
        "## What to do\n\n" + _list(entry.do),
        f"## For example\n\n```text\n{entry.example.strip()}\n```",
    ]
    rows = [f"| {_cell(one.what)} | {_cell(one.do) or 'see above'} |" for one in told]
    if rows:
        table = "\n".join(["| what the first line says | what the last line says |", "| --- | --- |", *rows])
        parts.append(f"## Messages\n\n`...` stands for names and numbers.\n\n{table}")
    parts.append(f"[All codes](../errors.md). {MADE}.")
    return "\n\n".join(parts) + "\n"


def _list(points: tuple[str, ...]) -> str:
    return "\n".join(f"- {point}" for point in points)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _paths() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


@cache
def _trees() -> list[ast.Module]:
    return [ast.parse(path.read_text(encoding="utf-8")) for path in _paths()]


def _text(node: ast.expr | None) -> str:
    """Return a text as it stands in the source; `...` for what is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) if isinstance(part, ast.Constant) else "..." for part in node.values)
    if isinstance(node, ast.BinOp):
        return _text(node.left) + _text(node.right)
    if isinstance(node, ast.IfExp):
        return f"{_text(node.body)} / {_text(node.orelse)}"
    return "..." if node is not None else ""


if __name__ == "__main__":
    made = pages()
    (REFERENCE / "errors").mkdir(exist_ok=True)
    for path in set((REFERENCE / "errors").glob("*.md")) - set(made):
        path.unlink()
    for path, text in made.items():
        path.write_text(text, encoding="utf-8")
    print(f"wrote {len(made)} pages")
