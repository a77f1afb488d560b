"""Write docs/reference/errors.md from the errors that the source raises: `python scripts/errors_page.py`."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reference" / "errors.md"
HEAD = """# Error codes

Every error says what happened, where, what was expected and got, and what to do; the command line prints it in four
lines and ends with an exit code by kind (see [the command line](cli.md)). A failure at one party reaches all others
with its code and remedy (E7xx around it), never with its data. Codes never change their meaning.

Made by `python scripts/errors_page.py` from the source. `...` stands for names and numbers.

| code | class | what happened | what to do |
|---|---|---|---|
"""


def page() -> str:
    """Return the page's text."""
    rows: dict[tuple[str, str], tuple[str, str]] = {}
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("Error"):
                words = {keyword.arg: keyword.value for keyword in node.keywords}
                code = words.get("code")
                if isinstance(code, ast.Constant) and node.args:
                    key = (str(code.value), _text(node.args[0]))
                    rows.setdefault(key, (node.func.id, _text(words.get("remedy"))))
    lines = [f"| {code} | {kind} | {what} | {do} |" for (code, what), (kind, do) in sorted(rows.items())]
    return HEAD + "\n".join(lines) + "\n"


def _text(node: ast.expr | None) -> str:
    """Return a text as it stands in the source; `...` for what is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value).replace("|", "\\|")
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) if isinstance(part, ast.Constant) else "..." for part in node.values)
    if isinstance(node, ast.BinOp):
        return _text(node.left) + _text(node.right)
    return "..." if node is not None else ""


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE.relative_to(ROOT)}")
