"""What the pages on files and commands say is so: examples run, and no key, option or exit code is left out."""

from __future__ import annotations

import inspect
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cutlayer.cli import app as app_module
from cutlayer.cli import console
from cutlayer.cli.app import app, pki
from cutlayer.cli.console import EXIT_CODES
from cutlayer.run import config, partyfile
from cutlayer.run.config import load_contract
from cutlayer.run.launch import network_settings
from cutlayer.run.partyfile import load_party_file
from cutlayer.run.tables import _tables

DOCS = Path(__file__).parents[2] / "docs"
HOW_TO, CONTRACT, PARTY_FILE, CLI = (
    DOCS / name
    for name in (
        "how-to/run-from-files.md", "reference/contract.md", "reference/party-file.md", "reference/cli.md",
    )
)  # fmt: skip
Call = Callable[..., Any]
Block = tuple[str, str, str]  # language, title, text

# These need other processes, or a digest; tests/cli/test_processes.py and test_running.py run them.
ELSEWHERE = re.compile(r"cutlayer (join|resume)|--processes")


def blocks(page: Path) -> list[Block]:
    text = re.sub(r"(?m)^   (?=\S|   )", "", page.read_text())  # blocks inside lists
    found = re.findall(r'(?ms)^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', text)
    assert len(found) * 2 == text.count("```")
    return found


def carry_out(page: Path, call: Call) -> list[str]:
    """Write the titled blocks and run the commands of a page, in its order; return the commands that ran."""
    ran = []
    for language, title, text in blocks(page):
        if title:
            Path(title).write_text(text)
        for line in text.splitlines() if language == "sh" else ():
            words = shlex.split(line)
            assert words[0] == "cutlayer"
            if not ELSEWHERE.search(line):
                result = call(*words[1:])
                assert result.code == 0, (line, result.err)
                ran.append(line)
    return ran


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_how_to_works_as_written(call: Call, here: Path):
    ran = carry_out(HOW_TO, call)
    assert [line.split()[1] for line in ran] == ["plan", "plan", "check", "run", "pki", "pki", "check"]
    assert len(list((here / "runs").iterdir())) == 1
    contract = load_contract(here / "contract.toml")
    settings = [network_settings(contract, load_party_file(here / f"{name}.toml")) for name in ("hospital", "cloud")]
    assert [one.credentials is not None for one in settings] == [True, True]


def test_commands_of_the_reference_work_as_written(call: Call, here: Path):
    for _, title, text in blocks(HOW_TO)[:5]:
        if title:
            (here / title).write_text(text)
    ran = carry_out(CLI, call)
    assert len(ran) >= 9


def test_reference_contract_has_every_key_with_its_default(call: Call, here: Path):
    assert carry_out(CONTRACT, call) == []
    load_contract(here / "contract.toml")
    tables = dict(_tables(config._ContractFile, ""))
    example = (here / "contract.toml").read_text()
    for path, names in tables.items():
        section = _section(CONTRACT.read_text(), path) if path else ""
        for name in names if path else ():
            assert re.search(rf"(?m)^\| `{name}` \|", section), f"{path}.{name} is not in the reference"
            assert re.search(rf"(?m)^{name} = ", example), f"{path}.{name} is not in the example"
    assert set(tables[""]) == {
        "contract", "stage", "loss", "release", "preprocessing", "crossing", "exchange", "answer", "training",
        "addresses", "deadlines",
    }  # fmt: skip


def test_reference_contract_is_written_from_python(here: Path):
    text = next(text for _, title, text in blocks(CONTRACT) if title == "write_contract.py")
    (here / "write_contract.py").write_text(text)
    done = subprocess.run(
        [sys.executable, "write_contract.py"], capture_output=True, text=True, timeout=100, check=True
    )
    assert done.stdout.strip() == load_contract(here / "written.toml").digest()


TABLES = {
    "stage": config._StageTable,
    "loss": config._LossTable,
    "preprocessing": config._SharedTable,
    "crossing": config._CrossingTable,
    "exchange": config._ExchangeTable,
    "answer": config._AnswerTable,
    "training": config._TrainingTable,
    "deadlines": config.DeadlineTable,
    "network": partyfile._NetworkTable,
    "run": partyfile._RunTable,
    "logging": partyfile._LoggingTable,
}


@pytest.mark.parametrize("table", TABLES)
def test_defaults_in_the_references_are_those_of_the_code(table: str):
    page = PARTY_FILE if table in ("network", "run", "logging") else CONTRACT
    rows = re.findall(r"(?m)^\| `(\w+)` \| [^|]+ \| `?([^|`]+)`? \|", _section(page.read_text(), table))
    shown = dict(rows)
    for field in msgspec.structs.fields(TABLES[table]):
        default = "required" if field.required else "none" if field.default is None else json.dumps(field.default)
        assert shown.pop(field.name) == default
    assert not shown


def test_reference_party_file_has_every_key_and_works(call: Call, here: Path):
    for _, title, text in [*blocks(PARTY_FILE), *blocks(CONTRACT)]:
        (here / title).write_text(text)
    call("pki", "init", "ca")
    call("pki", "issue", "hospital-a")
    result = call("check", "contract.toml", "hospital-a.toml")
    assert result.code == 0, result.err
    page, example = PARTY_FILE.read_text(), (here / "hospital-a.toml").read_text()
    for path, names in _tables(partyfile._PartyTable, ""):
        for name in names:
            if path or name == "party":
                assert f"| `{name}` |" in page
                assert re.search(rf"(?m)^({name} = |\[\w+\.{name}\b)", example)


def test_reference_has_every_command_option_and_exit_code():
    page = CLI.read_text()
    for group, prefix in ((app, ""), (pki, "pki ")):
        for command in group.registered_commands:
            name = command.name or command.callback.__name__  # type: ignore[union-attr]
            assert f"cutlayer {prefix}{name}" in page
    source = inspect.getsource(app_module) + inspect.getsource(console)
    options = set(re.findall(r'"(--[a-z]+)"', source))
    assert options >= {"--grid", "--accept", "--processes", "--wait"}
    assert not {option for option in options if option not in page}
    for code, kinds in EXIT_CODES.items():
        row = next(line for line in page.splitlines() if line.startswith(f"| {code} |"))
        assert [kind.__name__ for kind in kinds] == re.findall(r"`(\w+)`", row)


def _section(page: str, table: str) -> str:
    """Return the part of the page under the heading of a table, `[table]` or `[[table]]`."""
    parts = re.split(r"(?m)^## `\[+(\w+)\]+`$", page)
    return dict(zip(parts[1::2], parts[2::2], strict=True))[table]


def test_reference_names_every_file_of_a_run(call: Call, demo: Path):
    """Of one in a process: a party of assemble_at, and a field with preprocessing. The rest is of other ways to run."""
    text = (demo / "contract.toml").read_text()
    scaled = '[[preprocessing]]\nfield = "x"\nat = "hospital"\n\n[training]'
    text = text.replace("[training]", scaled).replace("[contract]", '[contract]\nassemble_at = ["hospital"]')
    (demo / "contract.toml").write_text(text)
    assert call("run", "contract.toml", "hospital.toml", "server.toml", "--folder", "out", "-q").code == 0
    section = CLI.read_text().partition("## What a run's folder holds")[2]
    told = {
        name.strip("/") for line in re.findall(r"(?m)^\| (`.*?) \|", section) for name in re.findall("`(.*?)`", line)
    }
    left = {re.sub("^(hospital|server)", "<party>", one.name) for one in (demo / "out").iterdir()}
    assert {"<party>.preprocessing.json", "joined.safetensors"} <= left
    assert left - told == set()
