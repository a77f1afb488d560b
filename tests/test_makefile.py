"""What the Makefile would do: `make -n` shows commands without running them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from cutlayer.cli.fetching import DATA
from cutlayer.data.files import WHEELS

ROOT = Path(__file__).parents[1]


def planned(*words: str) -> str:
    done = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    return done.stdout


def test_the_wheelhouse_is_all_that_a_machine_without_a_network_needs():
    shown = planned("wheelhouse")
    assert "pip wheel --disable-pip-version-check -c constraints.txt --wheel-dir wheelhouse ." in shown
    assert "cp constraints.txt wheelhouse/" in shown
    (told,) = re.findall(r"pip install (--no-index[^\"\n]*)", shown)
    page = (ROOT / "docs" / "how-to" / "offline-install.md").read_text()
    assert f"pip install {told}" in page  # the page says what the target says
    assert "[llm]" in planned("wheelhouse", "EXTRAS=[llm]")


def test_the_data_that_make_fetches_are_those_that_loaders_and_templates_name():
    shown = subprocess.run(["make", "-pn", "help"], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    (listed,) = re.findall(r"(?m)^DATA_WHEELS := (.*)$", shown.stdout)
    assert listed.split() == list(WHEELS.values())
    assert set(DATA.values()) <= set(WHEELS)
    for wheel in WHEELS.values():
        named = [path.name for path in sources() if wheel in path.read_text()]
        assert named == ["files.py"], "named in one place"


def sources() -> list[Path]:
    return [ROOT / "Makefile", *sorted((ROOT / "src").rglob("*.py"))]


def test_every_target_is_explained():
    text = (ROOT / "Makefile").read_text()
    named = set(re.search(r"(?m)^\.PHONY: (.*)$", text)[1].split())  # type: ignore[index]
    assert named == set(re.findall(r"(?m)^([a-z-]+):.*## ", text))
