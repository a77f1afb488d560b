"""The README's block runs as it stands, and is short."""

from __future__ import annotations

import re
from pathlib import Path

import cutlayer as cl

ROOT = Path(__file__).parents[1]


def test_block_runs_and_is_short(capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(blocks) == 1
    assert len(blocks[0].splitlines()) <= 25
    names: dict[str, object] = {}
    exec(compile(blocks[0], "README.md", "exec"), names)  # noqa: S102 - our own README
    shown = capsys.readouterr().out
    assert "activations of head to cloud" in shown
    assert "evaluate" in shown
    result = names["result"]
    assert isinstance(result, cl.Result)
    assert result.metrics("evaluate")["grade"]["loss"] < 1.65  # below ln 5: it has learnt


def test_the_tutorials_plan_runs_and_learns(capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "tutorial" / "first-run.md").read_text(), re.S)
    names: dict[str, object] = {}
    exec(compile("\n".join(blocks), "first-run.md", "exec"), names)  # noqa: S102 - our own page
    assert "registry" in capsys.readouterr().out
    assert names["result"].metrics("evaluate")["loss"]["loss"] < 0.1


def test_links_lead_somewhere():
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
    broken = [
        f"{page.relative_to(ROOT)}: {link}"
        for page in pages
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
        if not (page.parent / link).exists()
    ]
    assert not broken, "\n".join(broken)
